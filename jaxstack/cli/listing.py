"""`jaxstack list` and `jaxstack info`."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxstack.cli.parsing import Commands

WHAT = ("methods", "agents", "learners", "envs", "wrappers", "claims")


def add_commands(commands: Commands) -> None:
    """Add the commands of this file."""
    p = commands.add("list", _list, "List methods, learners, environments and claims.")
    p.add_argument("what", nargs="?", choices=WHAT, help="only these")
    p.add_argument("--family", help="environments of one family: native, jaxmarl, gymnax, brax")
    p = commands.add(
        "info",
        _info,
        "Describe a method, a learner (options and defaults), an environment (shapes, horizon, notes), a data set (its "
        "file, folder or id), a run or a sweep.",
    )
    p.add_argument("name", metavar="NAME", nargs="?")
    p.add_argument("--determinism", action="store_true", help="what repeats bitwise, and what to rounding only")


def _list(args: argparse.Namespace, _: list[str]) -> None:
    from jaxstack.core.errors import unknown
    from jaxstack.methods import AGENTS, CLAIMS, LEARNERS, METHODS

    tables: dict[str, Any] = {"agents": AGENTS, "learners": [n for n in LEARNERS if n not in AGENTS], "claims": CLAIMS}
    if args.what in (None, "envs", "wrappers"):
        from jaxstack import envs

        families = ["native", *envs.FAMILIES]
        if args.family and args.family not in families:
            raise unknown("environment family", args.family, families)
        tables["envs"], tables["wrappers"] = envs.ids(args.family), envs.WRAPPERS
    width = max(len(m.slug) for m in METHODS)
    methods = [f"{m.slug:{width}}  {m.title} ({m.year}){', planned' * m.planned}" for m in METHODS if m.published]
    if args.what == "learners":
        tables["learners"] = LEARNERS
    if args.what == "methods":
        _section("methods", methods, args.what)
    elif args.what is not None:
        _section(args.what, tables[args.what], args.what)
    else:
        for title in ("agents", "learners", "envs", "wrappers", "claims"):
            _section({"envs": "environments", "learners": "other learners"}.get(title, title), tables[title], None)
        _section("methods", methods, None)


def _section(title: str, names: Iterable[str], only: str | None) -> None:
    if only is None:
        print(f"{title}:")
    for name in names:
        print(name if only else f"  {name}")


def _info(args: argparse.Namespace, _: list[str]) -> None:
    from jaxstack import envs, learners
    from jaxstack.core.errors import UserError, unknown
    from jaxstack.core.registry import own
    from jaxstack.data import files
    from jaxstack.methods import LEARNERS, METHOD

    if args.determinism:
        from jaxstack.core import determinism

        print(determinism.report())
        return
    if args.name is None:
        raise UserError("info: expected the NAME of a method, learner, environment, data set or run, or --determinism")
    if files.is_dataset(args.name):
        print("\n".join(files.load_dataset(args.name).describe()))
        return
    if Path(args.name).is_dir() and args.name not in (*METHOD, *LEARNERS, *envs.NATIVE):
        _print_stored(args.name)
        return
    if args.name in METHOD:
        _print_method(METHOD[args.name])
    if args.name in LEARNERS or (own(args.name) and hasattr(LEARNERS.module(args.name), "Config")):
        _print_config(learners.config_class(args.name))
    elif args.name not in METHOD:
        if "/" not in args.name and args.name not in envs.NATIVE and not own(args.name):
            raise unknown("method, learner or environment", args.name, [*METHOD, *LEARNERS, *envs.ids()])
        spec = envs.make(args.name).spec
        for field in spec.__dataclass_fields__:
            print(f"{field} = {getattr(spec, field)}")


def _print_method(m: Any) -> None:
    print(f"{m.title} ({m.year})")
    for i in m.arxiv:
        print(f"paper: https://arxiv.org/abs/{i}")
    if m.planned:
        print("planned: nothing to run yet")
    if m.claim:
        print(f"claim: jaxstack reproduce {m.slug}")
    for kind, names in (("data for --scale full", m.data), ("extras", m.extras)):
        if names:
            print(f"{kind}: {', '.join(names)}")
    print()


def _print_stored(path: str) -> None:
    """What a run, or each run of a sweep, is, how far it came and what it scored last."""
    import json

    import numpy as np

    from jaxstack.cli import runs
    from jaxstack.core import rundir
    from jaxstack.core.errors import UserError

    for part in rundir.parts(path):
        plan = rundir.read_plan(part)
        own = {k: v for k, v in plan["config"].items() if k != "hypers"}
        print(f"{part}: {plan['agent']}" + (f" on {place}" if (place := runs.place(plan)) else ""))
        settings = plan.get("settings")
        count = f", {len({*settings})} settings" if settings is not None else ""
        print(f"  seeds {', '.join(map(str, dict.fromkeys(plan['seeds'])))}{count}, {plan['num_steps']} steps")
        try:
            status = json.loads((part / "run.json").read_bytes())
        except (OSError, ValueError):
            status = {}
        said = [f"{k} {status[k]}" for k in ("status", "step", "started") if k in status]
        print(f"  {', '.join(said) or 'run.json is missing or damaged'}")
        print(f"  config: {', '.join(f'{k}={v}' for k, v in own.items())}")
        if "settings" not in plan:
            print(f"  hypers: {', '.join(f'{k}={v}' for k, v in plan['config'].get('hypers', {}).items())}")
    try:
        found = runs.frames([path], by_stage=False)
    except UserError as e:
        print(f"  {e}")
        return
    for label, (frame, plan) in found.items():
        metric = plan.get("objective", ["rollout/return"])[0]
        if metric in frame and frame[metric].notna().any():
            scores = np.asarray(runs.last_scores(frame, metric))
            print(f"  {label}: {metric} {np.nanmean(scores):.4g}, by seed {np.round(scores, 4).tolist()}")


def _print_config(cls: Any) -> None:
    import dataclasses

    print((sys.modules[cls.__module__].__doc__ or "").strip(), "\n")
    for f in dataclasses.fields(cls):
        default: Any = f.default if f.default is not dataclasses.MISSING else ""
        if hasattr(default, "_asdict"):
            print("hyperparameters (traced; a sweep over them compiles once):")
            for k, v in default._asdict().items():
                print(f"  {k} = {v}")
        else:
            print(f"{f.name} = {default!r}")
