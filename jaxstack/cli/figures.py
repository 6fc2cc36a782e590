"""`jaxstack plot` and `jaxstack render`."""

import argparse

from jaxstack.cli import runs
from jaxstack.cli.parsing import Commands, row_flags, seed, whole


def add_commands(commands: Commands) -> None:
    """Add the commands of this file."""
    p = commands.add("plot", _plot, "Draw learning curves of runs with 95%% intervals over seeds.")
    p.add_argument("run_dirs", metavar="RUN", nargs="+", help="runs, or sweeps, whose settings are curves each")
    p.add_argument("--metric", help="default: rollout/return, or the training loss of learners that do not act")
    p.add_argument("--smooth", type=whole, default=1, metavar="N", help="mean of each seed's last N values; default: 1")
    p.add_argument("--x", choices=("samples", "step"), default="samples", help="environment steps, or updates")
    p.add_argument("--title", help="default: what the runs have in common, method and environment")
    p.add_argument("--out", default="curves.png", help="a .png, .svg or .pdf; default: curves.png")
    p = commands.add("render", _render, "Draw an episode of a trained policy as .gif, .html or .mp4.")
    p.add_argument("run_dir", metavar="RUN", help="a run, or a sweep together with --setting")
    p.add_argument("--out", default="episode.gif")
    row_flags(p)
    p.add_argument("--seed", type=seed, default=0, help="of the episode")
    p.add_argument("--max-steps", type=whole, default=200)
    p.add_argument("--fps", type=whole, default=10)


def _plot(args: argparse.Namespace, _: list[str]) -> None:
    from jaxstack.core.errors import UserError
    from jaxstack.report import plots

    plots.figure_path(args.out)
    if args.smooth < 1:
        raise UserError(f"--smooth {args.smooth}: expected at least 1")
    found = runs.frames(args.run_dirs)
    names = {k: [c for c in frame if "/" in c and frame[c].notna().any()] for k, (frame, _) in found.items()}
    # of a method in stages, those that have the metric are drawn
    lacking = lambda m: [k for k, (_, plan) in found.items() if m not in names[k] and not plan.get("stages")]
    losses = [c for own in names.values() for c in own if c.startswith("loss/")]
    known = [m for m in ("rollout/return", *losses) if not lacking(m) and any(m in own for own in names.values())]
    metric = args.metric or next(iter(known), "rollout/return")
    if bad := lacking(metric) or [k for k in found if not any(metric in own for own in names.values())]:
        raise UserError(f"--metric {metric}: {bad[0]} has no such values; it has {', '.join(names[bad[0]])}")
    found = {k: v for k, v in found.items() if metric in names[k]}
    methods = list(dict.fromkeys(str(plan["agent"]) for _, plan in found.values()))
    where = [runs.place(plan) for _, plan in found.values()]
    places = list(dict.fromkeys(where))
    curves = {
        label if len(places) == 1 else f"{label}, {place or plan['agent']}": frame
        for (label, (frame, plan)), place in zip(found.items(), where)
    }
    common = [*(methods if len(methods) == 1 else []), *(places if len(places) == 1 else [])]
    title = " on ".join(filter(None, common)) if args.title is None else args.title
    acts = all(plan["config"].get("env") and not plan["config"].get("dataset") for _, plan in found.values())
    unit = "" if acts or args.x == "step" else "samples of each seed"
    print(plots.learning_curves(curves, args.out, metric, args.x, title, smooth=args.smooth, unit=unit))


def _render(args: argparse.Namespace, _: list[str]) -> None:
    from jaxstack.core.errors import UserError
    from jaxstack.envs import render2d
    from jaxstack.envs.rollout import record
    from jaxstack.report import plots

    plots.animation_path(args.out)
    for name in ("max_steps", "fps"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least 1")
    learner, state = runs.one_row(args)
    episode = record(learner.env, learner.policy, state, args.seed, args.max_steps)
    frames = render2d.captioned(episode.frames, episode.captions(), learner.env.legend())
    print(plots.animation(frames, args.out, args.fps))
