"""`jaxstack compare`: which run is better, with intervals over seeds, as a table, a figure and a CSV."""

import argparse
from pathlib import Path
from typing import Any

from jaxstack.cli import runs
from jaxstack.cli.parsing import Commands


def add_commands(commands: Commands) -> None:
    """Add the command of this file."""
    text = "Compare runs by their last scores: IQM, mean, probability of improvement, with 95%% intervals over seeds."
    p = commands.add("compare", _compare, text)
    p.add_argument("run_dirs", metavar="RUN", nargs="+", help="runs, or sweeps, whose settings are compared")
    p.add_argument("--metric", help="default: the objective of the first run")
    p.add_argument("--smallest", action="store_true", help="the smallest metric is the best one")
    p.add_argument("--out", metavar="DIR", default="comparison", help="of comparison.csv and comparison.png")


def _compare(args: argparse.Namespace, _: list[str]) -> None:
    import numpy as np
    import pandas as pd

    from jaxstack.core.errors import UserError
    from jaxstack.report import plots, stats

    found = runs.frames(args.run_dirs, by_stage=False)
    if len(found) < 2:
        raise UserError(f"compare: found {len(found)} run, expected two or more, or a sweep of several settings")
    plan = next(iter(found.values()))[1]
    goal, direction = plan.get("objective", ["rollout/return", "max"])
    metric = args.metric or goal
    smallest = args.smallest or (metric == goal and direction == "min")
    for label, (frame, _plan) in found.items():
        if metric not in frame or not frame[metric].notna().any():
            has = ", ".join(c for c in frame.columns if "/" in c and frame[c].notna().any())
            raise UserError(f"--metric {metric}: {label} has no such values; it has {has}")
    where = {label: runs.place(own) for label, (_frame, own) in found.items()}
    if len({*where.values()}) > 1:
        print("note: these runs are of different environments: " + ", ".join(f"{k}: {v}" for k, v in where.items()))
    sign = -1.0 if smallest else 1.0
    scores = {label: np.asarray(runs.last_scores(frame, metric)) for label, (frame, _plan) in found.items()}
    good = {label: s[np.isfinite(s)] for label, s in scores.items()}
    if dead := [label for label, s in good.items() if not len(s)]:
        raise UserError(f"{dead[0]}: every seed failed, expected at least one with a finite {metric}")
    failed = {label: len(s) - len(good[label]) for label, s in scores.items()}
    order = sorted(good, key=lambda k: (failed[k] > 0, -sign * float(stats.iqm(stats.table(good[k])))))
    best = order[0]
    rows: list[dict[str, Any]] = []
    for label in order:
        iqm, mean = (stats.estimate(f, good[label]) for f in (stats.iqm, stats.mean))
        better = None if label == best else stats.estimate(stats.improvement, sign * good[best], sign * good[label])
        rows.append(
            {"run": label, "env": where[label], "seeds": len(good[label]), "failed": failed[label]}
            | {f"{n}{end}": v for n, e in (("iqm", iqm), ("mean", mean)) for end, v in zip(("", "_low", "_high"), e)}
            | dict(zip(("best_is_better", "best_is_better_low", "best_is_better_high"), better or (np.nan,) * 3))
            | {"verdict": _verdict(best, better, failed[label])}
        )
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(rows)
    table.to_csv(out / "comparison.csv", index=False)
    print(_text(rows, metric, best))
    plots.arm_panels([("", metric, {label: scores[label].tolist() for label in order})], out / "comparison.png")
    print(f"table: {out / 'comparison.csv'}, figure: {out / 'comparison.png'}")


def _verdict(best: str, better: Any, failed: int) -> str:
    if failed:
        return f"{failed} failed"
    if better is None:
        return "best"
    if better.low != better.low:  # NaN: one seed
        return "one seed tells nothing"
    return f"tie with {best}" if better.low <= 0.5 else f"behind {best}"


def _text(rows: list[dict[str, Any]], metric: str, best: str) -> str:
    """The table as aligned text."""
    lines = [("", f"IQM of {metric}", "mean", "seeds", f"P({best} is better)", "")]
    for row in rows:
        numbers = []
        for name in ("iqm", "mean", "best_is_better"):
            value, low, high = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
            interval = f" [{low:.4g}, {high:.4g}]" if low == low else ""
            numbers.append(f"{value:.4g}{interval}" if value == value else "")
        seeds = f"{row['seeds']}" + (f" (+ {row['failed']} failed)" if row["failed"] else "")
        lines.append((row["run"], numbers[0], numbers[1], seeds, numbers[2], row["verdict"]))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in lines)
