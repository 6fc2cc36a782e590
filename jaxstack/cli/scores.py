"""`jaxstack evaluate` and `jaxstack crossplay`."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from jaxstack.cli import runs
from jaxstack.cli.parsing import Commands, episode_flags, whole


def add_commands(commands: Commands) -> None:
    """Add the commands of this file."""
    several = "Evaluate trained learners: fresh episodes with policies, test data for others."
    p = commands.add("evaluate", _evaluate, several)
    p.add_argument("run_dirs", metavar="RUN", nargs="+")
    p.add_argument(
        "--env",
        action="append",
        metavar="ID[:NAME=VALUE...]",
        help="another environment of the same shapes, e.g. dispersion:horizon=50; may be repeated",
    )
    episode_flags(p, "a seed")
    p = commands.add("crossplay", _crossplay, "Mix agents of separately trained teams and print the matrix of returns.")
    p.add_argument("run_dirs", metavar="RUN", nargs="+", help="every seed is a member; runs of equal config")
    p.add_argument("--slots", type=whole, nargs="+", help="agents to replace, one at a time; default: each in turn")
    p.add_argument("--at-once", type=whole, help="teams at a time, where memory is short; default: all")
    p.add_argument("--out", default="crossplay.png", help="figure; .csv and .json of its name hold the numbers")
    episode_flags(p, "a pair and slot")


def _evaluate(args: argparse.Namespace, _: list[str]) -> None:
    import jax

    from jaxstack.core.errors import UserError

    if args.episodes is not None and args.episodes < 1:
        raise UserError(f"--episodes {args.episodes}: expected at least 1")
    chosen = {text: _environment(text) for text in args.env or ()}
    found = runs.groups(args.run_dirs)
    several = len(args.run_dirs) > 1 or len(chosen) > 0
    for learner, members, states in found:
        if learner.policy is not None and learner.env is not None:
            from jaxstack.measures.crossplay import evaluate_many

            episodes, key = args.episodes or 128, jax.random.key(args.seed)
            played = evaluate_many(learner, states, chosen or None, key, episodes=episodes, greedy=not args.sample)
            for name, result in played.items():
                where = f"{name}  " if several else ""
                values = {"return": result.returns, "length": result.length, "finished": result.finished} | result.info
                means = {f"{where}eval/{k}": v.reshape(len(members), -1).mean(1) for k, v in values.items()}
                _print_scores(means, members, several)
            continue
        for flag in ("env", "episodes", "sample"):
            if getattr(args, flag):
                runs.needs_policy(learner, f"--{flag}")
        from jaxstack.core import runner

        found = dict(runner.evaluate(learner, states, jax.random.key(args.seed)))
        if learner.name == "classifier":
            from jaxstack.nn import classifier

            found |= classifier.measures(learner, states)
        _print_scores(found, members, several)


def _environment(text: str) -> Any:
    """`dispersion:horizon=50` or `my_module:MyEnv:horizon=50`."""
    from jaxstack import envs

    id, *options = text.split(":")
    if options and "=" not in options[0] and "." not in id and id not in envs.NATIVE and "/" not in id:
        id = f"{id}:{options.pop(0)}"
    return envs.make(id, **envs.parse_options(tuple(filter(None, options))))


def _print_scores(scores: Mapping[str, Any], members: Sequence[runs.Member], show_run: bool = False) -> None:
    """A line for each run, setting and metric: the mean over seeds with its interval, and each seed's own value."""
    import numpy as np

    from jaxstack.report import stats

    for run, setting in dict.fromkeys((m.run, m.setting) for m in members):
        rows = [i for i, m in enumerate(members) if (m.run, m.setting) == (run, setting)]
        owner = "".join(f"{text}  " for text in (run * show_run, setting) if text)
        for name, values in scores.items():
            own = np.asarray(values)[rows]
            print(
                f"{owner}{name}: {stats.estimate(stats.mean, own)}  by seed: {np.round(own.astype(float), 3).tolist()}"
            )


def _crossplay(args: argparse.Namespace, _: list[str]) -> None:
    import jax

    from jaxstack.core import config, rundir
    from jaxstack.core.errors import UserError
    from jaxstack.measures.crossplay import cross_play
    from jaxstack.report import plots

    plots.figure_path(args.out)
    groups = runs.groups(args.run_dirs)
    if len(groups) > 1:
        raise UserError(f"crossplay: expected runs of one agent and config, found {len(groups)} different ones")
    ((learner, members, states),) = groups
    runs.needs_policy(learner, "crossplay")
    own = list(dict.fromkeys(m.run for m in members))
    short = dict(zip(own, rundir.labels(own)))
    names = [", ".join(filter(None, (short[m.run] * (len(own) > 1), m.setting, f"seed {m.seed}"))) for m in members]
    options = dict(slots=args.slots, episodes=args.episodes or 128, greedy=not args.sample, at_once=args.at_once)
    result = cross_play(learner, states, jax.random.key(args.seed), **options)
    width = max(map(len, names))
    for name, row in zip(names, result.matrix):
        print(f"{name.rjust(width)}  {' '.join(f'{v:9.3f}' for v in row)}")
    for what, estimate in result.summary().items():
        print(f"{what}: {estimate}")
    facts = {"agent": learner.name, "env": learner.env.spec.id, "config": config.to_dict(learner.config)}
    result.save(args.out, names, facts | rundir.environment())
    print(result.figure(args.out, names, f"{learner.name} on {learner.env.spec.id}"))
