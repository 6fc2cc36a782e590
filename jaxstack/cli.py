"""The `jaxstack` command. Thin: it parses, calls the library and maps errors to exit codes.

0 done; 1 a claim failed; 2 wrong input (one line says what); 130/143 interrupted, everything saved.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

DESCRIPTION = """\
Train agents and sequence models in JAX, whole runs and all seeds in one program.

  jaxstack list                                   agents, environments, claims
  jaxstack info hypermarl                         an agent's options, or an environment's facts
  jaxstack train hypermarl --env dispersion       train; `jaxstack train hypermarl --help` lists options
  jaxstack sweep ippo --sweep lr=1e-4,1e-3        settings x seeds in one program; `jaxstack sweep --help` tells more
  jaxstack resume RUN                             go on where a run stopped, to the bit
  jaxstack evaluate RUN --episodes 256            fresh episodes with the trained policy, of many runs, in many tasks
  jaxstack crossplay RUN                          how well agents do with partners of other seeds
  jaxstack plot RUN RUN ...                       learning curves with intervals
  jaxstack render RUN --out episode.gif           watch an episode
  jaxstack reproduce hypermarl                    check a paper's claim by experiment
"""

SWEEP = """\
what to sweep, each name once:
  --sweep lr=1e-4,3e-4,1e-3             these values
  --sweep ent_coef=uniform:0:0.05       numbers between the two
  --sweep lr=log_uniform:1e-5:1e-2      likewise, uniform in the logarithm
  --sweep hidden=[64],[64,64]           an option that is no hyperparameter: a program for each value
Lists alone give their full product. With a random name, --num settings are drawn (a list gives one of its values).
Hyperparameters (`jaxstack info AGENT` lists them) share one compiled program, whatever their number and values.

all other options are those of `jaxstack train AGENT`, which its --help lists:
  jaxstack sweep ippo --env dispersion --sweep lr=1e-4,3e-4,1e-3 --seeds 0 1 2 --out lr
  jaxstack sweep hypermarl --env dispersion --sweep lr=log_uniform:1e-5:1e-2 --sweep ent_coef=uniform:0:0.05 \\
      --num 16 --seeds 0 1 2 --total-steps 200000 --split-seeds auto --out random

DIR gets table.jsonl (a row a setting and seed), curves.jsonl, space.yaml, config.yaml, ledger.json, sweep.json, a
figure and the runs. Settings are ranked by interquartile mean over seeds with 95% bootstrap intervals; one with a
failed seed (numbers not finite) ranks after all that have none.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [a for a in argv if a != "--debug"]
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if args.command is None:
        parser.print_help()
        return 2
    if rest and args.command not in ("train", "sweep"):
        parser.error(f"unrecognised arguments: {' '.join(rest)}; see `jaxstack {args.command} --help`")
    from jaxstack.core.errors import UserError

    try:
        return args.run(args, rest) or 0
    except UserError as e:
        if debug:
            raise
        print(f"jaxstack: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("jaxstack: interrupted", file=sys.stderr)
        return 130
    except Exception as e:
        signum = getattr(e, "signum", None)
        if debug or signum is None:
            raise
        print(f"jaxstack: {e}", file=sys.stderr)
        return 128 + signum


def whole(text: str) -> int:
    """A whole number, read as everywhere else; argparse names the option of one that is none."""
    from jaxstack.core import errors, options

    try:
        return options.whole(text)
    except errors.UserError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "jaxstack",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="--debug shows the traceback of an error.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")

    def command(name: str, run: Any, help: str, **options: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, **options)
        sub.set_defaults(run=run)
        return sub

    p = command("list", _list, "List agents, environments and claims.")
    p.add_argument("what", nargs="?", choices=["agents", "envs", "claims"], help="only these")
    p.add_argument("--family", help="environments of one family: native, jaxmarl, gymnax, brax")
    p = command("info", _info, "Describe an agent (options and defaults) or an environment (shapes, horizon, notes).")
    p.add_argument("name", metavar="NAME", nargs="?")
    p.add_argument("--determinism", action="store_true", help="what repeats to the bit, and what to rounding only")
    train = "Train an agent; `jaxstack train AGENT --help` lists its options."
    p = command("train", _train, train, add_help=False, allow_abbrev=False)
    p.add_argument("agent", nargs="?")
    _process_flags(p)
    p = command("resume", _resume, "Continue an interrupted run to the bit as if it had not stopped.")
    p.add_argument("run_dir", metavar="RUN")
    p.add_argument("--devices", type=whole, help="spread the seeds over so many devices; default: as the run began")
    p.add_argument("--env-devices", type=whole, help="devices that share a seed's environments; default: likewise")
    _process_flags(p)
    raw = argparse.RawDescriptionHelpFormatter
    many = "Train an agent with many settings and seeds at once."
    p = command("sweep", _sweep, many, epilog=SWEEP, formatter_class=raw, allow_abbrev=False)
    p.add_argument("agent", metavar="AGENT")
    p.add_argument("--sweep", action="append", default=[], metavar="NAME=VALUES", help="see below; may be repeated")
    p.add_argument("--num", type=whole, help="settings to draw at random")
    p.add_argument("--search-seed", type=whole, default=0, help="of the draws")
    p.add_argument("--metric", default="eval/return", help="what settings are ranked by; default: eval/return")
    p.add_argument("--smallest", action="store_true", help="the smallest metric is the best one")
    p.add_argument("--out", metavar="DIR", help="default: runs/sweep-AGENT-TIME")
    several = "Run fresh episodes with trained policies; those of equal config share one program an environment."
    p = command("evaluate", _evaluate, several)
    p.add_argument("run_dirs", metavar="RUN", nargs="+")
    p.add_argument(
        "--env",
        action="append",
        metavar="ID[:NAME=VALUE...]",
        help="another environment of the same shapes, e.g. dispersion:horizon=50; may be repeated",
    )
    _episode_flags(p, "a seed")
    p = command("crossplay", _crossplay, "Mix agents of separately trained teams and print the matrix of returns.")
    p.add_argument("run_dirs", metavar="RUN", nargs="+", help="every seed is a member; runs of equal config")
    p.add_argument("--slots", type=whole, nargs="+", help="agents to replace, one at a time; default: each in turn")
    p.add_argument("--at-once", type=whole, help="teams at a time, where memory is short; default: all")
    p.add_argument("--out", default="crossplay.png", help="figure; .csv and .json of its name hold the numbers")
    _episode_flags(p, "a pair and slot")
    from jaxstack.claims import command as claims_command

    claim = "Check a paper's claim by experiment; exits with 1 when it does not hold."
    p = command("reproduce", _reproduce, claim, epilog=claims_command.EPILOG, formatter_class=raw)
    claims_command.add_options(p, whole)
    p = command("plot", _plot, "Draw learning curves of runs with 95%% intervals over seeds.")
    p.add_argument("run_dirs", metavar="RUN", nargs="+")
    p.add_argument("--metric", default="rollout/return")
    p.add_argument("--out", default="curves.png")
    p = command("render", _render, "Draw an episode of a trained policy as .gif, .html or .mp4.")
    p.add_argument("run_dir", metavar="RUN")
    p.add_argument("--out", default="episode.gif")
    _row_flags(p)
    p.add_argument("--seed", type=whole, default=0, help="of the episode")
    p.add_argument("--max-steps", type=whole, default=200)
    p.add_argument("--fps", type=whole, default=10)
    p = command("export", _export, "Write a trained policy for other programs; the written file is run and compared.")
    p.add_argument("run_dir", metavar="RUN")
    p.add_argument("out", metavar="PATH", help="a directory for a bundle, else a file")
    p.add_argument(
        "--format",
        choices=["bundle", "stablehlo", "onnx"],
        default="bundle",
        help="safetensors and JSON for load_policy, jax.export for cpu, cuda and tpu, or ONNX (needs jax2onnx)",
    )
    _row_flags(p)
    return parser


def _episode_flags(p: argparse.ArgumentParser, of: str) -> None:
    p.add_argument("--episodes", type=whole, default=128, help=f"episodes {of}")
    p.add_argument("--sample", action="store_true", help="sample actions instead of taking the likeliest")
    p.add_argument("--seed", type=whole, default=0, help="of the episodes")


def _row_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--train-seed", type=whole, help="which of the run's seeds (default: the first)")
    p.add_argument("--setting", type=whole, help="which of a sweep's settings, by its number")


def _process_flags(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("one run over several processes", "start the same command on each host")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0")
    group.add_argument("--num-processes", type=whole, metavar="N")
    group.add_argument("--process-id", type=whole, metavar="I", help="0 to N-1; process 0 writes the run directory")
    group.add_argument("--distributed", action="store_true", help="find all three from Slurm, a TPU pod or Open MPI")


def _join(args: argparse.Namespace) -> bool:
    """Join the other processes of the run, if it has any; before anything touches a device."""
    given = (args.coordinator, args.num_processes, args.process_id)
    several = args.distributed or any(x is not None for x in given)
    if several:
        from jaxstack.core import distributed

        distributed.start(*given)
    return several


def _list(args: argparse.Namespace, _: list[str]) -> None:
    if args.what in (None, "agents"):
        from jaxstack.agents import AGENTS

        _section("agents", AGENTS, args.what)
    if args.what in (None, "envs"):
        from jaxstack import envs

        if args.family and args.family not in ("native", *envs.FAMILIES):
            from jaxstack.core.errors import unknown

            raise unknown("environment family", args.family, ["native", *envs.FAMILIES])
        _section("environments", envs.ids(args.family), args.what)
    if args.what in (None, "claims"):
        from jaxstack.claims import CLAIMS

        _section("claims", CLAIMS, args.what)


def _section(title: str, names: Any, only: str | None) -> None:
    if only is None:
        print(f"{title}:")
    for name in names:
        print(name if only else f"  {name}")


def _info(args: argparse.Namespace, _: list[str]) -> None:
    import dataclasses

    from jaxstack import envs
    from jaxstack.agents import AGENTS, config_class
    from jaxstack.core.errors import UserError

    if args.determinism:
        from jaxstack.core import determinism

        print(determinism.report())
        return
    if args.name is None:
        raise UserError("info: expected the NAME of an agent or environment, or --determinism")
    if args.name in AGENTS:
        cls = config_class(args.name)
        print((sys.modules[cls.__module__].__doc__ or "").strip(), "\n")
        for f in dataclasses.fields(cls):
            default = f.default if f.default is not dataclasses.MISSING else ""
            if hasattr(default, "_asdict"):
                print("hyperparameters (traced; a sweep over them compiles once):")
                for k, v in default._asdict().items():  # pyright: ignore[reportAttributeAccessIssue]
                    print(f"  {k} = {v}")
            else:
                print(f"{f.name} = {default!r}")
        return
    from jaxstack.core.errors import unknown

    if "/" not in args.name and args.name not in envs.NATIVE:
        raise unknown("agent or environment", args.name, [*AGENTS, *envs.ids()])
    spec = envs.make(args.name).spec
    for f in dataclasses.fields(spec):
        print(f"{f.name} = {getattr(spec, f.name)}")


def _train(args: argparse.Namespace, rest: list[str]) -> None:
    if args.agent is None or args.agent in ("-h", "--help"):
        _train_usage()
        return
    import time

    from jaxstack import agents
    from jaxstack.core import config, devices, distributed, runner

    several = not {"-h", "--help"} & set(rest) and _join(args)
    job = _job(args.agent, rest)
    if not several:
        devices.show(job.run.devices * job.run.env_devices)
    learner = agents.make(args.agent, job.config)
    run_dir = Path(job.run_dir or f"runs/{args.agent}-{time.strftime('%Y%m%d-%H%M%S')}")
    stored = {"config": config.to_dict(job.config), "options": config.to_dict(job.run)}
    sinks = _sinks(job, run_dir, stored) if distributed.is_first() else []
    result = runner.train(learner, None, job.seeds, run_dir=run_dir, plan=stored, options=job.run, sinks=sinks)
    _report(learner, result, {"seeds": job.seeds})


def plan(agent: str, argv: Sequence[str]) -> tuple[Any, Any]:
    """What `jaxstack train AGENT argv` would run: (learner, job with config, run options, seeds, run_dir and sinks).

    Raises `UserError` for wrong values, SystemExit(2) with a message on stderr for arguments that do not parse.
    """
    from jaxstack import agents

    job = _job(agent, argv)
    return agents.make(agent, job.config), job


def _job(agent: str, argv: Sequence[str]) -> Any:
    import dataclasses

    import tyro

    from jaxstack import agents
    from jaxstack.core import config, options, runner
    from jaxstack.core.errors import UserError

    rest = list(argv)
    cls = agents.config_class(agent)
    default = cls()
    if "--config" in rest:
        at = rest.index("--config")
        file = Path(rest[at + 1]) if at + 1 < len(rest) else None
        if file is None or not file.is_file():
            raise UserError(f"--config {file}: expected a YAML file")
        default = config.from_yaml(cls, file.read_text(encoding="utf-8"), str(file))
        del rest[at : at + 2]

    @dataclasses.dataclass(frozen=True)
    class Job:
        config: Any
        run: runner.RunOptions = runner.RunOptions()
        seeds: tuple[int, ...] = (0,)
        """Seeds trained at once."""
        run_dir: str | None = None
        """Where to store the run; default runs/AGENT-TIME."""
        tensorboard: bool = False
        wandb: str | None = None
        """Project of Weights & Biases."""

    Job.__annotations__["config"] = cls
    job = tyro.cli(
        Job,
        args=rest,
        default=Job(config=default),
        prog=f"jaxstack train {agent}",
        description=sys.modules[cls.__module__].__doc__,
        config=(tyro.conf.OmitArgPrefixes,),
        registry=options.registry(),
    )
    runner.check_seeds(job.seeds)
    return job


def _sinks(job: Any, run_dir: Path, stored: dict[str, Any]) -> list[Any]:
    from jaxstack.core import sinks

    out: list[Any] = []
    if job.tensorboard:
        out.append(sinks.TensorBoard(run_dir.with_name(run_dir.name + "-tensorboard")))
    if job.wandb:
        out.append(sinks.Wandb(job.wandb, run_dir.name, stored["config"]))
    return out


def _report(learner: Any, result: Any, plan: dict[str, Any]) -> None:
    """Last scores over the seeds of each setting, the policy bundle, and where everything is."""
    import jax
    import numpy as np

    from jaxstack.core import bundle, distributed, rundir

    state = distributed.fetch(result.state)
    if not distributed.is_first():
        return
    last = result.metrics[result.metrics.step == result.metrics.step.max()]
    names = rundir.setting_names(plan)
    for setting, name in dict(zip(plan.get("settings", [None]), names)).items():
        own = last if setting is None else last[last.setting == setting]
        for metric in ("eval/return", "rollout/return"):
            if metric in own and own[metric].notna().any():
                count = own[metric].notna().sum()
                print(f"{name}{': ' * bool(name)}{metric}: {own[metric].mean():.3f} (mean of {count} seeds)")
    if result.run_dir is None:
        return
    if learner.policy is not None and result.alive.any():
        first = int(np.flatnonzero(result.alive)[0])
        bundle.save_policy(result.run_dir / "policy", learner, jax.tree.map(lambda x: x[first], state))
        print(
            f"policy of {names[first]}{', ' * bool(names[first])}seed {plan['seeds'][first]}: {result.run_dir}/policy"
        )
    print(f"run: {result.run_dir}")


def _train_usage() -> None:
    from jaxstack.agents import AGENTS

    print("usage: jaxstack train AGENT [--config FILE] [--env ID] [--seeds 0 1 2] [--run-dir DIR] [options]\n")
    print(f"AGENT is one of {', '.join(AGENTS)}; `jaxstack train AGENT --help` lists its options.")
    print("several hosts: [--coordinator HOST:PORT --num-processes N --process-id I], or --distributed on Slurm or TPU")


def _load(run_dir: str) -> tuple[Any, dict[str, Any]]:
    """The learner and plan of a stored run."""
    from jaxstack import agents
    from jaxstack.core import config, distributed
    from jaxstack.core.rundir import read_plan

    plan = distributed.share(distributed.on_first(lambda: read_plan(run_dir)))
    cls = agents.config_class(plan["agent"])
    fields = config.from_dict(cls, plan["config"], f"{run_dir}/run.yaml: config")
    return agents.make(plan["agent"], fields), plan


def _resume(args: argparse.Namespace, _: list[str]) -> None:
    from jaxstack.core import config, devices, runner
    from jaxstack.core.rundir import read_plan

    layout = {"devices": args.devices, "env_devices": args.env_devices}

    def options_of(plan: dict[str, Any]) -> runner.RunOptions:
        stored = config.from_dict(runner.RunOptions, plan.get("options", {}), f"{args.run_dir}/run.yaml: options")
        return config.replace(stored, **{k: v for k, v in layout.items() if v is not None})

    if not _join(args):
        options = options_of(read_plan(args.run_dir))
        devices.show(options.devices * options.env_devices)
    learner, plan = _load(args.run_dir)
    options = options_of(plan)
    result = runner.resume(learner, args.run_dir, options=options, plan=plan)
    _report(learner, result, plan)


def _states(args: argparse.Namespace) -> tuple[Any, dict[str, Any], Any]:
    from jaxstack.core import runner

    learner, plan = _load(args.run_dir)
    return learner, plan, runner.load_state(learner, args.run_dir)


def _one_seed(args: argparse.Namespace) -> tuple[Any, dict[str, Any], Any]:
    import jax

    from jaxstack.core.errors import UserError

    learner, plan, state = _states(args)
    seeds, settings = plan["seeds"], plan.get("settings")
    rows = range(len(seeds))
    if args.setting is not None:
        if settings is None or args.setting not in settings:
            has = "no settings" if settings is None else f"settings {', '.join(map(str, dict.fromkeys(settings)))}"
            raise UserError(f"--setting {args.setting}: expected one of the run's, which has {has}")
        rows = [i for i in rows if settings[i] == args.setting]
    elif settings is not None and len({*settings}) > 1:
        raise UserError(f"--setting: expected one of {', '.join(map(str, dict.fromkeys(settings)))}, as it is a sweep")
    seed = seeds[rows[0]] if args.train_seed is None else args.train_seed
    if seed not in (own := [seeds[i] for i in rows]):
        raise UserError(f"--train-seed {seed}: expected one of the run's seeds {own}")
    row = rows[own.index(seed)]
    return learner, plan, jax.tree.map(lambda x: x[row], state)


def _sweep(args: argparse.Namespace, rest: list[str]) -> None:
    import functools
    import json
    import time

    from jaxstack import agents
    from jaxstack.core import config, rundir, space, sweep
    from jaxstack.core.errors import UserError

    dimensions = space.parse(args.sweep)
    if not dimensions:
        raise UserError("--sweep: expected at least one NAME=VALUES, see `jaxstack sweep --help`")
    _, job = plan(args.agent, rest)
    for option in ("run_dir", "tensorboard", "wandb"):
        if getattr(job, option):
            raise UserError(f"--{option.replace('_', '-')}: expected without; a sweep writes to --out")
    out = rundir.RunDir.check(args.out or f"runs/sweep-{args.agent}-{time.strftime('%Y%m%d-%H%M%S')}")
    make = functools.partial(agents.make, args.agent, job.config)
    options = dict(num=args.num, search_seed=args.search_seed, run_dir=out / "runs", options=job.run)
    result = sweep.sweep(make, dimensions, job.seeds, **options)
    result.save(out)
    (out / "config.yaml").write_text(config.to_yaml(job.config), encoding="utf-8")
    (out / "sweep.json").write_text(json.dumps(rundir.environment(), indent=1), encoding="utf-8")
    print(result.report(args.metric, not args.smallest))
    best = result.best(args.metric, not args.smallest)
    print(f"best: {' '.join(f'{name}={value}' for name, value in best.items())}")
    print(f"figure: {result.figure(out / 'figure.png', args.metric, not args.smallest)}")
    print(f"sweep: {out}")


class Member(NamedTuple):
    """One row of a run: an agent that was trained."""

    run: str
    """As the user typed it."""
    setting: str
    """"setting 0 (lr=0.001)", empty in a run of one setting."""
    seed: int


def _groups(run_dirs: Sequence[str]) -> list[tuple[Any, list[Member], Any]]:
    """(learner, members, states [K, ...]) of the runs whose agent and config are equal, but for the hyperparameters,
    which do not act."""
    from jaxstack.core import config, rundir, runner

    found: dict[str, list[tuple[Any, list[Member], Any]]] = {}
    for run_dir in {Path(r).absolute(): r for r in run_dirs}.values():
        learner, plan = _load(run_dir)
        state = runner.load_state(learner, run_dir)
        members = [Member(run_dir, n, s) for n, s in zip(rundir.setting_names(plan), plan["seeds"])]
        key = repr((plan["agent"], config.to_dict(learner.config) | {"hypers": None}))
        found.setdefault(key, []).append((learner, members, state))
    return [
        (
            g[0][0],
            [m for _, members, _ in g for m in members],
            runner.side_by_side([state for _, _, state in g]),
        )
        for g in found.values()
    ]


def _evaluate(args: argparse.Namespace, _: list[str]) -> None:
    import jax

    from jaxstack import envs
    from jaxstack.core.errors import UserError

    if args.episodes < 1:
        raise UserError(f"--episodes {args.episodes}: expected at least 1")
    if len(args.run_dirs) == 1 and not args.env:
        _evaluate_one(args)
        return
    from jaxstack.agents.crossplay import evaluate_many

    parts = [(e, *e.partition(":")[::2]) for e in args.env or ()]
    chosen = {name: envs.make(id, **envs.parse_options(tuple(filter(None, o.split(":"))))) for name, id, o in parts}
    for learner, members, states in _groups(args.run_dirs):
        options = dict(episodes=args.episodes, greedy=not args.sample)
        found = evaluate_many(learner, states, chosen or None, jax.random.key(args.seed), **options)
        for name, result in found.items():
            _print_scores({f"{name}  eval/return": result.returns.mean((1, 2))}, members, show_run=True)


def _evaluate_one(args: argparse.Namespace) -> None:
    import jax

    from jaxstack import agents
    from jaxstack.core import config, metrics, rundir
    from jaxstack.core.errors import UserError

    (args.run_dir,) = args.run_dirs
    learner, plan, state = _states(args)
    fields = config.replace(learner.config, eval_episodes=args.episodes, eval_greedy=not args.sample)
    learner = agents.make(plan["agent"], fields)
    if learner.evaluate is None:
        raise UserError(f"{learner.name} has no evaluation")
    out = metrics.on_host(jax.jit(jax.vmap(learner.evaluate, in_axes=(0, None)))(state, jax.random.key(args.seed)))
    members = [Member(args.run_dir, n, s) for n, s in zip(rundir.setting_names(plan), plan["seeds"])]
    _print_scores(out, members)


def _print_scores(scores: dict[str, Any], members: Sequence[Member], show_run: bool = False) -> None:
    """A line for each run, setting and metric: the mean over seeds with its interval, and each seed's own value."""
    import numpy as np

    from jaxstack.core import stats

    for run, setting in dict.fromkeys((m.run, m.setting) for m in members):
        rows = [i for i, m in enumerate(members) if (m.run, m.setting) == (run, setting)]
        owner = "".join(f"{text}  " for text in (run * show_run, setting) if text)
        for name, values in scores.items():
            own = np.asarray(values)[rows]
            print(f"{owner}{name}: {stats.estimate(stats.mean, own)}  by seed: {np.round(own, 3).tolist()}")


def _crossplay(args: argparse.Namespace, _: list[str]) -> None:
    import jax

    from jaxstack.agents.crossplay import cross_play
    from jaxstack.core import rundir
    from jaxstack.core.errors import UserError

    groups = _groups(args.run_dirs)
    if len(groups) > 1:
        raise UserError(f"crossplay: expected runs of one agent and config, found {len(groups)} different ones")
    ((learner, members, states),) = groups
    runs = list(dict.fromkeys(m.run for m in members))
    short = dict(zip(runs, rundir.labels(runs)))
    names = [", ".join(filter(None, (short[m.run] * (len(runs) > 1), m.setting, f"seed {m.seed}"))) for m in members]
    options = dict(slots=args.slots, episodes=args.episodes, greedy=not args.sample, at_once=args.at_once)
    result = cross_play(learner, states, jax.random.key(args.seed), **options)
    width = max(map(len, names))
    for name, row in zip(names, result.matrix):
        print(f"{name.rjust(width)}  {' '.join(f'{v:9.3f}' for v in row)}")
    for what, estimate in result.summary().items():
        print(f"{what}: {estimate}")
    facts = {"agent": learner.name, "env": learner.config.env, "env_args": learner.config.env_args}
    result.save(args.out, names, facts | rundir.environment())
    print(result.figure(args.out, names, f"{learner.name} on {learner.config.env}"))


def _reproduce(args: argparse.Namespace, _: list[str]) -> int:
    from jaxstack.claims.command import reproduce

    return reproduce(args)


def _plot(args: argparse.Namespace, _: list[str]) -> None:
    from jaxstack.core import plots, rundir

    curves = {}
    for label, run_dir in zip(rundir.labels(args.run_dirs), args.run_dirs):
        frame = rundir.read_metrics(run_dir)
        if "setting" not in frame:
            curves[label] = frame
            continue
        plan = rundir.read_plan(run_dir)
        for setting, name in dict(zip(plan["settings"], rundir.setting_names(plan))).items():
            curves[f"{label}, {name}" if len(args.run_dirs) > 1 else name] = frame[frame.setting == setting]
    print(plots.learning_curves(curves, args.out, args.metric))


def _render(args: argparse.Namespace, _: list[str]) -> None:
    from jaxstack.agents.team_ppo import make_env
    from jaxstack.core import plots
    from jaxstack.envs.rollout import record

    learner, _plan, state = _one_seed(args)
    env = make_env(learner.config)
    frames = record(env, learner.policy, state, args.seed, args.max_steps)
    print(plots.animation(frames, args.out, args.fps))


def _export(args: argparse.Namespace, _: list[str]) -> None:
    import tempfile

    from jaxstack.agents.team_ppo import make_env
    from jaxstack.core import bundle, export

    learner, _plan, state = _one_seed(args)
    if args.format == "bundle":
        print(bundle.save_policy(args.out, learner, state))
        return
    with tempfile.TemporaryDirectory() as folder:
        policy = bundle.load_policy(bundle.save_policy(folder, learner, state))
    spec = make_env(learner.config).spec
    mask = spec.action_space.n if spec.has_action_mask else None  # pyright: ignore[reportAttributeAccessIssue]
    write = export.stablehlo if args.format == "stablehlo" else export.onnx
    print(write(policy, (spec.num_agents, *spec.obs_shape), args.out, mask, obs_dtype=spec.observation.dtype))


if __name__ == "__main__":
    sys.exit(main())
