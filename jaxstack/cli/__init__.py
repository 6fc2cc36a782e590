"""The `jaxstack` command. Thin: it parses, calls the library and maps errors to exit codes.

0 done; 1 a claim failed; 2 wrong input (one line says what); 130/143 interrupted, everything saved.
A file per group of commands, each with `add_commands(parser)`; what they need is imported when a command runs.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from jaxstack import __version__
from jaxstack.cli import (
    architectures,
    audits,
    claims,
    collecting,
    comparing,
    compressing,
    counterfactuals,
    distilling,
    edge,
    explaining,
    exporting,
    figures,
    forecasting,
    fundus,
    listing,
    oct,
    phantoms,
    predicting,
    scores,
    screening,
    segmenting,
    stacking,
    strokes,
    training,
    tuning,
    weights,
)
from jaxstack.cli.parsing import Commands, Parser
from jaxstack.cli.training import plan

__all__ = ["main", "parser", "plan"]

DESCRIPTION = """\
Train agents and sequence models in JAX, whole runs and all seeds in one program.

  jaxstack list                                   methods, learners, environments, claims
  jaxstack info hypermarl                         a learner's options, or an environment's facts
  jaxstack train hypermarl --env dispersion       train; `jaxstack train hypermarl --help` lists options
  jaxstack sweep ippo --sweep lr=1e-4,1e-3        settings x seeds in one program; `jaxstack sweep --help` tells more
  jaxstack collect ENV --quality medium --out F    a data set, for learners such as td3_bc and imitate-then-improve
  jaxstack resume RUN                             go on where a run stopped, bitwise identical
  jaxstack evaluate RUN --episodes 256            fresh episodes with the trained policy, of many runs, in many tasks
  jaxstack crossplay RUN                          how well agents do with partners of other seeds
  jaxstack conventions RUN                        do trained pairs read each other, or have they agreed on constants
  jaxstack audit ENV ENV                          what environments ask for: memory, hidden information, coordination
  jaxstack architectures search --num 100         rank untrained networks by their codes of one minibatch
  jaxstack compress RUN --keep 0.5 --out DIR      a classifier with fewer channels
  jaxstack dlas --models resnet-8 --out DIR       accuracy, size and measured time of compressed networks
  jaxstack distil RUN --out DIR                   a smaller classifier from a trained one's weights alone
  jaxstack predict RUN PATH --out DIR             what a detector finds in pictures, or their classes
  jaxstack phantoms fundus --out DIR              images with known truth, for the medical methods
  jaxstack grade-fundus PATH --quality F --out DIR   quality and a trait of each photograph, as a table
  jaxstack screen-uwf PATH --model RUN --out DIR     diseases in ultra-widefield images, as a table
  jaxstack explain RUN --labels CSV --out DIR        where a classifier looks, and whether that is faithful
  jaxstack segment-oct PATH --model RUN --out DIR    masks of the choroid in OCT B-scans
  jaxstack analyse-oct PATH --model RUN --out DIR    thickness, area and vessels of the choroid, as a table
  jaxstack detect-stroke PATH --model RUN --out DIR  strokes on CT scans and their sides, as a table
  jaxstack weights uwf-diseases FILE --check      released weights of a medical method give what is published
  jaxstack plan-edge --devices F --model opt-1.3b            a training step on phones and laptops, beside other ways
  jaxstack score-forecasts F G --observed O --training T   forecasts of whole trajectories, and of their tails
  jaxstack compare RUN RUN ...                    which is better: IQM, probability of improvement, intervals
  jaxstack plot RUN RUN ...                       learning curves with intervals
  jaxstack render RUN --out episode.gif           watch an episode
  jaxstack export RUN DIR                         the policy for other programs
  jaxstack reproduce hypermarl                    check a paper's claim by experiment

Where a learner, environment or claim is named, module:attribute names one of your own:
  jaxstack train my_agent:my_agent --env my_env:MyEnv
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command (default: that of the process); returns the exit code. The process that is interrupted while it
    compiles ends at once."""
    leave = _leave if argv is None else lambda code, _=False: code
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [a for a in argv if a != "--debug"]
    whole = parser()
    try:
        args, rest = whole.parse_known_args(argv)
        if args.command is None:
            whole.print_help()
            return 2
        if rest and not args.takes_options:
            whole.prog = f"jaxstack {args.command}"
            whole.error(f"unrecognised arguments: {' '.join(rest)}")
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # where a user's own modules are
        _import_own(args.imports)
        code = args.run(args, rest) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, such as `head`, has what it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("jaxstack: interrupted", file=sys.stderr)
        return leave(130, True)
    except Exception as e:
        from jaxstack.core.errors import UserError

        signum = getattr(e, "signum", None)
        wrong = e if isinstance(e, UserError) else _missing_device() if signum is None else None
        if debug or (signum is None and wrong is None):
            raise
        print(f"jaxstack: {wrong or e}", file=sys.stderr)
        return 2 if signum is None else leave(128 + signum)


def _missing_device() -> str | None:
    """What is wrong with `JAX_PLATFORMS`, where it asks for a device that is not there: JAX may then fail anywhere."""
    asked = os.environ.get("JAX_PLATFORMS")
    if not asked or "jax" not in sys.modules:
        return None
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError):
        return f"JAX_PLATFORMS={asked}: no such device is found, expected cpu or a JAX that is installed for it"
    return None


def _import_own(modules: Sequence[str]) -> None:
    """Import a user's modules, which add names to registries: those of installed packages (entry points of the group
    `jaxstack.methods`), and those given. Raises `UserError` for one that is not found."""
    from importlib import import_module
    from importlib.metadata import entry_points

    from jaxstack.core.errors import UserError

    for point in entry_points(group="jaxstack.methods"):
        point.load()
    for module in modules:
        try:
            import_module(module)
        except ModuleNotFoundError as e:
            if e.name is None or not f"{module}.".startswith(f"{e.name}."):
                raise
            raise UserError(f"--import {module}: no module named {e.name!r} is found") from e


def _leave(code: int, always: bool = False) -> int:
    """End the process without its usual end, which waits for what is being compiled; `always`, or if something is.

    To be called while the exception is handled: it holds what a compiler that was interrupted may still use.
    """
    from jaxstack.core import aside

    if always or aside.running():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    whole = Parser(
        "jaxstack",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="--debug shows the traceback of an error.",
    )
    whole.add_argument("--version", action="version", version=f"jaxstack {__version__}")
    imports = "a module of yours to import first, which adds names; before the command"
    whole.add_argument("--import", dest="imports", metavar="MODULE", action="append", default=[], help=imports)
    commands = Commands(whole.add_subparsers(dest="command", metavar="COMMAND", title="commands"))
    for group in (
        listing,
        training,
        collecting,
        scores,
        audits,
        comparing,
        figures,
        exporting,
        architectures,
        compressing,
        tuning,
        stacking,
        distilling,
        edge,
        forecasting,
        phantoms,
        fundus,
        oct,
        segmenting,
        strokes,
        counterfactuals,
        screening,
        explaining,
        weights,
        predicting,
        claims,
    ):
        group.add_commands(commands)
    return whole
