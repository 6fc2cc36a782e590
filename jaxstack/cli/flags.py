"""A learner's options as `jaxstack train` and `sweep` read them: from flags, and from the file of `--config`."""

import contextlib
import dataclasses
import io
import os
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

ELSEWHERE = {
    "learning_rate": "lr",
    "discount": "gamma",
    "entropy_coef": "ent_coef",
    "entropy_coeff": "ent_coef",
    "value_coef": "vf_coef",
    "total_timesteps": "total_steps",
    "num_timesteps": "total_steps",
    "n_envs": "num_envs",
    "n_steps": "num_steps",
    "env_id": "env",
    "env_name": "env",
    "env_kwargs": "env_args",
    "output_dir": "run_dir",
    "logdir": "run_dir",
    "epochs": "num_epochs",
    "num_seeds": "seeds",
}
"""Option names of other libraries -> ours."""


class Stated(NamedTuple):
    """Options read from a file, as plain values."""

    config: dict[str, Any]
    run: dict[str, Any]
    job: dict[str, Any]


def job_of(name: str | None, argv: Sequence[str]) -> tuple[str, Any]:
    """The learner's name, and its config, run options, seeds, run directory and sinks.

    Args:
        name: of a learner, or `module:factory`; None where the file is that of a run, which names it.
        argv: flags, `--config FILE` among them.

    Raises:
        UserError: for flags and values that do not fit.
        SystemExit: after `--help`.
    """
    from jaxstack import learners
    from jaxstack.core import config, job, options
    from jaxstack.core.errors import UserError

    argv, file = _file(argv)
    read = options.load(file.read_text(encoding="utf-8"), str(file)) if file else {}
    if not isinstance(read, dict):
        raise UserError(f"--config {file}: expected a mapping of options, found {type(read).__name__}")
    stored = {"agent", "config", "seeds"} <= set(read)
    if stored and name not in (None, read["agent"]):
        raise UserError(f"--config {file}: found a run of {read['agent']}, expected one of {name}")
    name = read["agent"] if stored else name
    if name is None:
        raise UserError(f"--config {file}: found options without a learner, expected `jaxstack train LEARNER --config`")
    cls = learners.config_class(name)

    @dataclasses.dataclass(frozen=True)
    class Job(config.Config):
        config: Any
        run: job.RunOptions = job.RunOptions()
        seeds: tuple[int, ...] = (0,)
        """Seeds trained at once."""
        run_dir: str | None = None
        """Where to store the run; default runs/LEARNER-TIME."""
        start_from: str | None = None
        """A run whose parameters this one starts from, seed by seed, or all from its only seed."""
        tensorboard: bool = False
        wandb: str | None = None
        """Project of Weights & Biases."""
        wandb_entity: str | None = None
        wandb_group: str | None = None
        """Default: the name of the run directory."""
        wandb_tags: tuple[str, ...] = ()
        wandb_mode: Literal["online", "offline", "disabled"] | None = None

    Job.__annotations__["config"] = cls
    stated = _of_run(read) if stored else _of_options(read, cls, Job, str(file))
    source = str(file) if file else "config"
    parts = {"config": config.from_dict(cls, stated.config, source), "run": stated.run}
    default = config.from_dict(Job, parts | stated.job, source)
    classes = (cls, job.RunOptions, Job)
    made = _parsed(Job, _habits(argv, classes), default, name, cls, _names(classes))
    job.check_seeds(made.seeds)
    return name, made


def _file(argv: Sequence[str]) -> tuple[list[str], Path | None]:
    """`argv` without `--config FILE` or `--config=FILE`, and the file; of a run's directory its run.yaml."""
    from jaxstack.core.errors import UserError

    rest, files = [], []
    words = iter(argv)
    for word in words:
        flag, eq, value = word.partition("=")
        if flag != "--config":
            rest.append(word)
        else:
            files.append(value if eq else next(words, None))
    if not files:
        return rest, None
    if len(files) > 1 or files[0] is None:
        raise UserError(f"--config: expected one file, found {len(files) if files[0] is not None else 'none'}")
    path = Path(files[0]) / "run.yaml" if Path(files[0]).is_dir() else Path(files[0])
    if not path.is_file():
        raise UserError(f"--config {files[0]}: expected a YAML file, or the directory of a run")
    return rest, path


def _of_run(plan: dict[str, Any]) -> Stated:
    own = {k: plan[k] for k in ("seeds", "start_from") if k in plan}
    return Stated(plan["config"], plan.get("options", {}), own)


def _of_options(read: dict[str, Any], cls: Any, job: Any, source: str) -> Stated:
    """Options of the learner, of the run and of the job, all in one mapping; hyperparameters may stand among them."""
    from jaxstack.core import config
    from jaxstack.core.errors import UserError, unknown
    from jaxstack.core.job import RunOptions

    fields, run = ({f.name for f in dataclasses.fields(c)} for c in (cls, RunOptions))
    own = {f.name for f in dataclasses.fields(job)} - {"config", "run"}
    hypers = set(getattr(_hint(cls, "hypers"), "_fields", ()))
    stated = Stated({}, {}, {})
    flat: dict[str, Any] = {}
    for name, value in read.items():
        if name in fields:
            stated.config[name] = value
        elif name in hypers:
            flat[name] = value
        elif name in run:
            stated.run[name] = value
        elif name in own:
            stated.job[name] = value
        else:
            raise unknown(f"field in {source}", str(name), _known(str(name), {*fields, *hypers, *run, *own}))
    if flat:
        nested = stated.config.get("hypers", {})
        if twice := sorted({*flat} & {*nested}):
            raise UserError(f"{source}: {twice[0]} is given twice, by itself and among hypers")
        # hypers that are given in part keep this method's own defaults
        stated.config["hypers"] = config.to_dict(cls())["hypers"] | nested | flat
    if "seeds" in stated.job and isinstance(stated.job["seeds"], int):
        stated.job["seeds"] = [stated.job["seeds"]]
    return stated


def _hint(cls: Any, name: str) -> Any:
    import typing

    return typing.get_type_hints(cls).get(name)


def _names(classes: Sequence[Any]) -> list[str]:
    """Options of the classes, those of their hyperparameters among them."""
    out = []
    for cls in classes:
        out += [f.name for f in dataclasses.fields(cls) if f.name not in ("hypers", "config", "run")]
        out += getattr(_hint(cls, "hypers"), "_fields", ())
    return out


def _habits(argv: Sequence[str], classes: Sequence[Any]) -> list[str]:
    """`argv` where lists may be written `0,1,2` or `[64,64]`, and their options in the singular: `--seed 3`."""
    import typing

    hints = {
        f.name: typing.get_type_hints(c)[f.name] for c in classes for f in dataclasses.fields(c) if f.name != "run"
    }
    flag = lambda name: f"--{name.replace('_', '-')}"
    lists = {name: get_args(hint)[0] for name, hint in hints.items() if get_origin(hint) is tuple and get_args(hint)}
    known = {flag(n[:-1]): flag(n) for n in lists if n[-1] == "s"} | {flag(n): flag(n) for n in hints}
    kinds = {flag(n): kind for n, kind in lists.items()}
    out: list[str] = []
    kind: Any = None
    for word in argv:
        head, eq, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if head:
            head = known.get(head.replace("_", "-"), head)
            kind = kinds.get(head)
        values = _split(value, kind) if kind is not None and value else [value]
        if not head:
            out += values
        else:
            out += [head, *values] if eq and len(values) > 1 else [f"{head}{eq}{values[0] if eq else ''}"]
    return out


def _split(text: str, kind: Any) -> list[str]:
    """The entries of one word of a list: brackets always mean a list, commas where entries are numbers or names."""
    bare = re.fullmatch(r"[\[(](.*)[\])]", text)
    inner = bare.group(1) if bare else text
    if bare is None and ("=" in text or kind not in (int, float, str)):
        return [text]
    return [part.strip() for part in inner.split(",") if part.strip()] or [text]


def _parsed(job: Any, argv: list[str], default: Any, name: str, cls: Any, known: Sequence[str]) -> Any:
    """What tyro reads; its boxed messages become one line. Raises `UserError`."""
    import tyro

    from jaxstack.core import options
    from jaxstack.core.errors import UserError

    said = io.StringIO()
    helps = bool({"-h", "--help"} & set(argv))
    with contextlib.nullcontext() if helps else _wide(), contextlib.redirect_stderr(sys.stderr if helps else said):
        try:
            return tyro.cli(
                job,
                args=argv,
                default=default,
                prog=f"jaxstack train {name}",
                description=sys.modules[cls.__module__].__doc__,
                config=(tyro.conf.OmitArgPrefixes,),
                registry=options.registry(),
            )
        except SystemExit as e:
            if helps or not e.code:
                raise
    raise UserError(_one_line(said.getvalue(), known, f"`jaxstack train {name} --help` lists them"))


@contextlib.contextmanager
def _wide() -> Iterator[None]:
    """Make tyro print messages without line breaks."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "1000"
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def _one_line(box: str, known: Sequence[str], see: str) -> str:
    """The message in tyro's box, with the nearest options for one that is unknown; `see` says where all are."""
    from jaxstack.core.errors import unknown

    lines = [line.strip("│ ").strip() for line in box.splitlines() if "│" in line]
    if not lines:  # where the output is not UTF-8: a title, and rules without sides
        lines = [line.strip() for line in box.splitlines() if line.strip()][2:]
    end = next((i for i, line in enumerate(lines) if set(line) <= {"─", "-"}), len(lines))
    text = " ".join(lines[:end]) or " ".join(box.split())
    text = re.sub(r"^Error parsing (?:(?:config|run): )?", "", text)
    text = re.sub(
        r"^invalid choice (.*) for argument '(.*)'\. Expected one of \((.*)\)\.$", r"\2: \1: expected one of \3", text
    )
    text = re.sub(r"^Missing value for argument '(.*)'\. Expected \d+ values\.$", r"\1: expected a value", text)
    if not (found := re.match(r"Unrecognized options: ([^,]+)", text)):
        return text
    word = found.group(1).strip()
    if not word.startswith("--"):
        return f"{word!r}: expected options, each --name value; {see}"
    name = word.partition("=")[0].removeprefix("--").replace("-", "_")
    if (ours := ELSEWHERE.get(name.lower())) in known:
        return f"unknown option {word}: use --{ours}".replace("_", "-")
    return f"{unknown('option', name, known)}; {see}".replace("_", "-").replace("'", "")


def _known(name: str, known: Collection[str]) -> list[str]:
    """The names among which the nearest is looked for: only ours, where `name` is what others call an option."""
    ours = ELSEWHERE.get(name.lower())
    return [ours] if ours is not None and ours in known else list(known)
