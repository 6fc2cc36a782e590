"""`jaxstack train`, `jaxstack resume` and `jaxstack sweep`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxstack.cli import runs
from jaxstack.cli.flags import job_of
from jaxstack.cli.parsing import Commands, join, process_flags, whole

SWEEP = """\
what to sweep, each name once:
  --sweep lr=1e-4,3e-4,1e-3             these values
  --sweep ent_coef=uniform:0:0.05       numbers between the two
  --sweep lr=log_uniform:1e-5:1e-2      likewise, uniform in the logarithm
  --sweep hidden=[64],[64,64]           an option that is no hyperparameter: a program for each value
Lists alone give their full product. With a random name, --num settings are drawn (a list gives one of its values).
Hyperparameters (`jaxstack info LEARNER` lists them) share one compiled program, whatever their number and values.

all other options are those of `jaxstack train LEARNER`, which its --help lists:
  jaxstack sweep ippo --env dispersion --sweep lr=1e-4,3e-4,1e-3 --seeds 0 1 2 --out lr
  jaxstack sweep hypermarl --env dispersion --sweep lr=log_uniform:1e-5:1e-2 --sweep ent_coef=uniform:0:0.05 \\
      --num 16 --seeds 0 1 2 --total-steps 200000 --split-seeds auto --out random

DIR gets table.jsonl (a row per setting and seed), curves.jsonl, space.yaml, config.yaml, ledger.json, sweep.json, a
figure and the runs. Settings are ranked by interquartile mean over seeds with 95% bootstrap intervals; one with a
failed seed (numbers not finite) ranks after all that have none.
"""


def add_commands(commands: Commands) -> None:
    """Add the commands of this file."""
    train = "Train a learner; `jaxstack train LEARNER --help` lists its options."
    p = commands.add("train", _train, train, takes_options=True, add_help=False, allow_abbrev=False)
    p.add_argument("--config", metavar="FILE")
    process_flags(p)
    p = commands.add("resume", _resume, "Continue an interrupted run, bitwise identical to one that had not stopped.")
    p.add_argument("run_dir", metavar="RUN")
    p.add_argument("--steps", type=whole, help="learner steps (PPO: updates) that the whole run shall have")
    p.add_argument(
        "--total-steps", type=whole, help="samples (environment steps) that it shall have, instead of --steps"
    )
    ends = "where schedules end with other --steps: with them, or where the run had them end (default: extend)"
    p.add_argument("--schedule", choices=("extend", "keep"), help=ends)
    p.add_argument("--devices", type=whole, help="spread the seeds over so many devices; default: as the run began")
    p.add_argument("--env-devices", type=whole, help="devices that share a seed's environments; default: likewise")
    process_flags(p)
    raw = argparse.RawDescriptionHelpFormatter
    many = "Train a learner with many settings and seeds at once."
    p = commands.add("sweep", _sweep, many, takes_options=True, epilog=SWEEP, formatter_class=raw, allow_abbrev=False)
    p.add_argument("learner", metavar="LEARNER")
    p.add_argument("--sweep", action="append", default=[], metavar="NAME=VALUES", help="see below; may be repeated")
    p.add_argument("--num", type=whole, help="settings to draw at random")
    p.add_argument("--search-seed", type=whole, default=0, help="of the draws")
    p.add_argument("--metric", help="what settings are ranked by; default: the learner's objective")
    p.add_argument("--smallest", action="store_true", help="the smallest metric is the best one")
    p.add_argument("--out", metavar="DIR", help="default: runs/sweep-LEARNER-TIME")


def _train(args: argparse.Namespace, rest: list[str]) -> None:
    # not a positional of the parser, which would take the value of the learner's first option where none is named
    name, rest = (rest[0], rest[1:]) if rest and not rest[0].startswith("-") else (None, rest)
    if name is None and args.config is None:
        _train_usage()
        return
    from jaxstack.core import config, devices, distributed, runner, stages

    several = not {"-h", "--help"} & set(rest) and join(args)
    rest = [*rest, "--config", args.config] if args.config else rest
    learner, job = plan(name, rest, show_devices=not several and devices.show)
    run_dir = Path(job.run_dir or f"runs/{_file_name(learner.name)}-{_now()}")
    stored: dict[str, Any] = {"config": config.to_dict(job.config), "options": config.to_dict(job.run)}
    if job.start_from:
        learner = runs.started(learner, job.start_from, job.seeds)
        stored["start_from"] = str(Path(job.start_from).absolute())
    stored |= {"sinks": wanted} if (wanted := _wanted_sinks(job, run_dir)) else {}
    sinks = _sinks(stored, run_dir) if distributed.is_first() else []
    common: dict[str, Any] = dict(run_dir=run_dir, plan=stored, options=job.run, sinks=sinks)
    if isinstance(learner, stages.Staged):
        result = stages.train(learner, job.seeds, **common)
        _report(result.learner, result.of_last_stage(), {"seeds": job.seeds})
    else:
        _report(learner, runner.train(learner, None, job.seeds, **common), {"seeds": job.seeds})


def plan(name: str | None, argv: Sequence[str], show_devices: Any = None) -> tuple[Any, Any]:
    """What `jaxstack train NAME argv` would run: (learner, job with config, run options, seeds, run_dir and sinks).

    Args:
        name: of a learner, or `module:factory`; None where `--config` is a run's, which names it.
        argv: its options.
        show_devices: called with the number of devices that the job needs before anything touches them.

    Raises:
        UserError: for wrong values, and for arguments that do not parse.
        SystemExit: after `--help`.
    """
    from jaxstack import learners

    name, job = job_of(name, argv)
    if show_devices:
        show_devices(job.run.devices * job.run.env_devices)
    return learners.make(name, job.config), job


def _wanted_sinks(job: Any, run_dir: Path) -> dict[str, Any]:
    """The sinks that the job asks for, as a run stores them."""
    import uuid

    from jaxstack.core.errors import UserError

    out: dict[str, Any] = {"tensorboard": {}} if job.tensorboard else {}
    given = {n: v for n in ("entity", "group", "tags", "mode") if (v := getattr(job, f"wandb_{n}"))}
    if given and not job.wandb:
        raise UserError(f"--wandb-{next(iter(given))}: expected together with --wandb PROJECT")
    if job.wandb:
        given |= {"tags": list(given["tags"])} if "tags" in given else {}
        out["wandb"] = {"project": job.wandb, "group": run_dir.name, "id": uuid.uuid4().hex[:12]} | given
    return out


def _sinks(plan: dict[str, Any], run_dir: Path, settings: dict[int, dict[str, Any]] | None = None) -> list[Any]:
    """The sinks of a run, from what it stores; `settings` are the values of a sweep's, by number."""
    from jaxstack.core import sinks

    if settings is None and "settings" in plan:
        values = {k.lstrip("."): v for k, v in plan.get("hypers", {}).items() if isinstance(v, list)}
        settings = {s: {k: v[row] for k, v in values.items()} for row, s in enumerate(plan["settings"])}
    wanted = plan.get("sinks", {})
    out: list[Any] = []
    if "tensorboard" in wanted:
        out.append(sinks.TensorBoard(run_dir.with_name(run_dir.name + "-tensorboard")))
    if "wandb" in wanted:
        out.append(sinks.Wandb(config=plan["config"], settings=settings, **wanted["wandb"]))
    return out


def _report(learner: Any, result: Any, plan: dict[str, Any]) -> None:
    """Last scores over the seeds of each setting, the policy bundle, and where everything is."""
    from jaxstack.core import bundle, distributed, rundir

    state = distributed.fetch(result.state)
    if not distributed.is_first():
        return
    last = result.metrics[result.metrics.step == result.metrics.step.max()]
    names = rundir.setting_names(plan)
    shown = [learner.objective[0], "rollout/return"]
    shown += [c for c in last if c.startswith("loss/")][:1] if not any(c in last for c in shown) else []
    for setting, name in dict(zip(plan.get("settings", [None]), names)).items():
        own = last if setting is None else last[last.setting == setting]
        for metric in shown:
            if metric in own and own[metric].notna().any():
                count = own[metric].notna().sum()
                print(f"{name}{': ' * bool(name)}{metric}: {own[metric].mean():.3f} (mean of {count} seeds)")
    if result.run_dir is None:
        return
    first = bundle.save_first(result.run_dir, learner, state, result.alive)
    if first is not None:
        row = ", ".join(filter(None, (names[first], f"seed {plan['seeds'][first]}")))
        print(f"policy of {row}: {result.run_dir}/policy")
    print(f"run: {result.run_dir}")


def _train_usage() -> None:
    from jaxstack.methods import LEARNERS

    print("usage: jaxstack train LEARNER [--config FILE] [--seeds 0 1 2] [--run-dir DIR] [options]\n")
    print("FILE is YAML with any of these options, or a run (RUN or RUN/run.yaml) to repeat; flags override it.")
    print(f"LEARNER is one of {', '.join(LEARNERS)}, or module:factory of your own;")
    print("`jaxstack train LEARNER --help` lists its options.")
    print("several hosts: [--coordinator HOST:PORT --num-processes N --process-id I], or --distributed on Slurm or TPU")


def _resume(args: argparse.Namespace, _: list[str]) -> None:
    from jaxstack.core import config, devices, distributed, job, rundir, runner, stages
    from jaxstack.core.errors import UserError

    if args.steps is not None and args.total_steps is not None:
        raise UserError(f"--steps {args.steps}, --total-steps {args.total_steps}: expected one of the two")
    given = {"--steps": args.steps, "--total-steps": args.total_steps}
    longer = next((f"{name} {value}" for name, value in given.items() if value is not None), None)
    if args.schedule is not None and longer is None:
        raise UserError(f"--schedule {args.schedule}: expected together with --steps or --total-steps")
    layout = {"devices": args.devices, "env_devices": args.env_devices}

    def options_of(plan: dict[str, Any]) -> runner.RunOptions:
        stored = config.from_dict(runner.RunOptions, plan.get("options", {}), f"{args.run_dir}/run.yaml: options")
        return config.replace(stored, **{k: v for k, v in layout.items() if v is not None})

    if not join(args):
        options = options_of(rundir.read_plan(args.run_dir))
        devices.show(options.devices * options.env_devices)
    learner, plan = runs.load_any(args.run_dir)
    if "start_from" in plan:
        learner = runs.started(learner, plan["start_from"], plan["seeds"])
    sinks = _sinks(plan, Path(args.run_dir)) if distributed.is_first() else []
    common: dict[str, Any] = dict(options=options_of(plan), plan=plan, sinks=sinks)
    if isinstance(learner, stages.Staged):
        if longer is not None:
            raise UserError(f"{longer}: expected without, as each stage has steps of its own")
        result = stages.resume(learner, args.run_dir, **common)
        _report(result.learner, result.of_last_stage(), plan)
    else:
        steps = args.steps if args.total_steps is None else job.steps_of(learner, None, args.total_steps)
        if steps in (None, plan["num_steps"]) and distributed.is_first() and rundir.finished(args.run_dir):
            print(f"run directory {args.run_dir}: all {plan['num_steps']} steps are done, nothing is left to do")
        common |= dict(num_steps=steps, schedule=args.schedule or "extend")
        _report(learner, runner.resume(learner, args.run_dir, **common), plan)


def _sweep(args: argparse.Namespace, rest: list[str]) -> None:
    import json

    from jaxstack import learners, sweeps
    from jaxstack.core import config, rundir, space
    from jaxstack.core.errors import UserError

    dimensions = space.parse(args.sweep)
    if not dimensions:
        raise UserError("--sweep: expected at least one NAME=VALUES, see `jaxstack sweep --help`")
    _, job = plan(args.learner, rest)
    for option in ("run_dir", "start_from"):
        if getattr(job, option):
            why = "starts anew" if option == "start_from" else "writes to --out"
            raise UserError(f"--{option.replace('_', '-')}: expected without; a sweep {why}")
    out = rundir.RunDir.check(args.out or f"runs/sweep-{_file_name(args.learner)}-{_now()}")
    make = lambda **changes: learners.make(args.learner, job.config, **changes)
    stored = {"sinks": wanted} if (wanted := _wanted_sinks(job, out)) else {}

    def sinks_of(name: str, settings: dict[int, dict[str, Any]], learner: Any) -> list[Any]:
        return _sinks(stored | {"config": config.to_dict(learner.config)}, out / "runs" / name, settings)

    options = dict(num=args.num, search_seed=args.search_seed, run_dir=out / "runs", options=job.run)
    options |= dict(plan=stored, sinks=sinks_of)
    result = sweeps.sweep(make, dimensions, job.seeds, **options)
    result.save(out)
    (out / "config.yaml").write_text(config.to_yaml(job.config), encoding="utf-8")
    (out / "sweep.json").write_text(json.dumps(rundir.environment(), indent=1), encoding="utf-8")
    goal = result.goal(args.metric, False if args.smallest else None)
    print(result.report(*goal))
    best = result.best(*goal)
    ties = result.verdicts(*goal).count("tie")
    told = f" (a tie with {ties} other{'s' * (ties > 1)}: these seeds do not tell them apart)" if ties else ""
    print(f"best: {' '.join(f'{name}={value}' for name, value in best.items())}{told}")
    print(f"figure: {result.figure(out / 'figure.png', *goal)}")
    print(f"sweep: {out}")


def _file_name(learner: str) -> str:
    return learner.replace(":", ".")


def _now() -> str:
    import time

    return time.strftime("%Y%m%d-%H%M%S")
