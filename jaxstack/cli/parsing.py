"""What the parsers of several commands share."""

import argparse
import re
from collections.abc import Callable
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        """End with exit code 2."""
        choice = re.fullmatch(r"argument (\S+): invalid choice: (.*) \(choose from (.*)\)", message)
        if choice:
            name, found, known = choice.groups()
            message = f"{name}: found {found}, expected one of {known.replace(chr(39), '')}"
        self.exit(2, f"{self.prog}: {message.removeprefix('argument ')}; see `{self.prog} --help`\n")


class Commands:
    """Adds commands to the parser."""

    def __init__(self, subparsers: Any):
        self._subparsers = subparsers

    def add(
        self, name: str, run: Callable[..., Any], help: str, takes_options: bool = False, **options: Any
    ) -> argparse.ArgumentParser:
        """A command's parser; `run(args, rest)` runs it, where `rest` may hold a learner's options."""
        sub = self._subparsers.add_parser(name, help=help, description=help, **options)
        sub.set_defaults(run=run, takes_options=takes_options)
        return sub


def whole(text: str) -> int:
    """A whole number, read as everywhere else; argparse names the option of one that is none."""
    from jaxstack.core import errors, options

    try:
        return options.whole(text)
    except errors.UserError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def seed(text: str) -> int:
    """A number that keys and generators of random numbers take."""
    value = whole(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 0 to 2^32-1")
    return value


def real(text: str) -> float:
    """A number, likewise."""
    from jaxstack.core import errors, options

    try:
        return options.real(text)
    except errors.UserError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def episode_flags(p: argparse.ArgumentParser, of: str) -> None:
    """Options of commands that run episodes with a policy."""
    p.add_argument("--episodes", type=whole, help=f"episodes {of}; default: 128")
    p.add_argument("--sample", action="store_true", help="sample actions instead of taking the likeliest")
    p.add_argument("--seed", type=seed, default=0, help="of the episodes, or of what an evaluation draws")


def row_flags(p: argparse.ArgumentParser) -> None:
    """Which row (setting, seed) of a run is meant."""
    p.add_argument("--train-seed", type=whole, help="which of the run's seeds (default: the first)")
    p.add_argument("--setting", type=whole, help="which of a sweep's settings, by its number")


def process_flags(p: argparse.ArgumentParser) -> None:
    """Options of a run over several processes."""
    group = p.add_argument_group("one run over several processes", "start the same command on each host")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0")
    group.add_argument("--num-processes", type=whole, metavar="N")
    group.add_argument("--process-id", type=whole, metavar="I", help="0 to N-1; process 0 writes the run directory")
    group.add_argument("--distributed", action="store_true", help="find all three from Slurm, a TPU pod or Open MPI")


def join(args: argparse.Namespace) -> bool:
    """Join the other processes of the run, if it has any; before anything touches a device."""
    given = (args.coordinator, args.num_processes, args.process_id)
    several = args.distributed or any(x is not None for x in given)
    if several:
        from jaxstack.core import distributed

        distributed.start(*given)
    return several
