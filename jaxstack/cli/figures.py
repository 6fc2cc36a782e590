"""`jaxstack plot` and `jaxstack render`."""

import argparse
from typing import Any

from jaxstack.cli import runs
from jaxstack.cli.parsing import Commands, row_flags, whole


def add_commands(commands: Commands) -> None:
    """Add the commands of this file."""
    p = commands.add("plot", _plot, "Draw learning curves of runs with 95%% intervals over seeds.")
    p.add_argument("run_dirs", metavar="RUN", nargs="+")
    p.add_argument("--metric", help="default: rollout/return, or the training loss of learners that do not act")
    p.add_argument("--out", default="curves.png")
    p = commands.add("render", _render, "Draw an episode of a trained policy as .gif, .html or .mp4.")
    p.add_argument("run_dir", metavar="RUN")
    p.add_argument("--out", default="episode.gif")
    row_flags(p)
    p.add_argument("--seed", type=whole, default=0, help="of the episode")
    p.add_argument("--max-steps", type=whole, default=200)
    p.add_argument("--fps", type=whole, default=10)


def _plot(args: argparse.Namespace, _: list[str]) -> None:
    from jaxstack.core import rundir
    from jaxstack.report import plots

    curves: dict[str, Any] = {}
    for label, run_dir in zip(rundir.labels(args.run_dirs), args.run_dirs):
        frame = rundir.read_metrics(run_dir)
        if "setting" not in frame:
            curves[label] = frame
            continue
        plan = rundir.read_plan(run_dir)
        for setting, name in dict(zip(plan["settings"], rundir.setting_names(plan))).items():
            curves[f"{label}, {name}" if len(args.run_dirs) > 1 else name] = frame[frame.setting == setting]
    frames = list(curves.values())
    losses = [c for c in frames[0] if c.startswith("loss/")]
    first = next((m for m in ("rollout/return", *losses) if all(m in f for f in frames)), "rollout/return")
    print(plots.learning_curves(curves, args.out, args.metric or first))


def _render(args: argparse.Namespace, _: list[str]) -> None:
    from jaxstack.envs.rollout import record
    from jaxstack.report import plots

    learner, state = runs.one_row(args)
    frames = record(learner.env, learner.policy, state, args.seed, args.max_steps)
    print(plots.animation(frames, args.out, args.fps))
