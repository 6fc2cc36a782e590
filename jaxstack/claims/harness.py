"""Claims: what a paper says, as an experiment with a baseline, a margin and a verdict.

A claim is a `Claim` with experiments (functions from a number of seeds to one row an arm and seed) and checks. A check
compares an arm with a number or with another arm; the verdict uses the 95% bootstrap interval over seeds, not the mean
alone. `run_claim` prints the verdicts and stores everything as JSON and a figure.
"""

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxstack.core import rundir, stats
from jaxstack.core.errors import UserError

Row = dict[str, Any]
"""`experiment`, `arm`, `seed` and metrics."""

Experiment = Callable[[int], Iterable[Row]]
"""seeds -> rows; a generator's arms are reported as they finish."""


class Check(NamedTuple):
    """One comparison, decided by intervals over seeds.

    at_least / at_most: the arm's mean against `value`. above: arm - other at least `value`. within: the arm's mean lies
    inside `other` +- value. near: the arm's mean lies inside `target` +- value.
    at_least and above need the lower end of the interval, at_most the upper end, within and near the whole interval.
    """

    experiment: str
    arm: str
    metric: str
    rule: Literal["at_least", "at_most", "above", "within", "near"]
    value: float
    other: str = ""
    target: float = 0.0

    def describe(self) -> str:
        """The rule in words."""
        what = f"{self.experiment}: {self.metric} of {self.arm}"
        return {
            "at_least": f"{what} >= {self.value:g}",
            "at_most": f"{what} <= {self.value:g}",
            "above": f"{what} >= {self.other} + {self.value:g}",
            "within": f"{what} within {self.value:g} of {self.other}",
            "near": f"{what} within {self.value:g} of {self.target:.4g}",
        }[self.rule]


class Claim(NamedTuple):
    """`small` takes minutes on 2 CPU cores, `full` is the paper's scale; `scope` says what can be shown."""

    method: str
    paper: str
    statement: str
    scope: str
    small: tuple[Experiment, ...]
    full: tuple[Experiment, ...]
    checks: tuple[Check, ...]
    seeds: int = 5
    ours: str = ""
    """Arms whose names begin so stand out in figures."""
    curves: tuple[tuple[str, str], ...] = ()
    """(experiment, metric) pairs whose rows also hold `metric@x` for numbers x, drawn over x in a second figure."""


class Verdict(NamedTuple):
    """A check, the interval that decided it, and whether it holds."""

    check: Check
    estimate: stats.Estimate
    holds: bool


def judge(check: Check, rows: list[Row]) -> Verdict:
    """Raises `UserError` when the experiment gave no rows for an arm."""
    x = _scores(rows, check, check.arm)
    if check.rule in ("above", "within"):
        e = stats.difference(x, _scores(rows, check, check.other))
    else:
        e = stats.estimate(stats.mean, x)
    centre = check.target if check.rule == "near" else 0.0
    holds = {
        "at_least": e.low >= check.value,
        "at_most": e.high <= check.value,
        "above": e.low >= check.value,
        "within": -check.value <= e.low and e.high <= check.value,
        "near": centre - check.value <= e.low and e.high <= centre + check.value,
    }[check.rule]
    return Verdict(check, e, bool(holds))


def run_claim(
    claim: Claim, scale: str = "small", seeds: int | None = None, out: Path = Path("docs/results"), quiet: bool = False
) -> bool:
    """Run, print, store `<method>-<scale>.json` and `.png` in `out`; True when every check holds.

    Raises `UserError` for an unknown scale or fewer than two seeds.
    """
    if scale not in ("small", "full"):
        raise UserError(f"scale={scale!r}: expected 'small' or 'full'")
    seeds = claim.seeds if seeds is None else seeds
    if seeds < 2:
        raise UserError(f"seeds={seeds}: expected at least 2, a claim is a statement over seeds")
    from rich.console import Console

    console = Console(quiet=quiet)
    run = rundir.environment()  # of the start: later the code may be another
    # the record goes with the code: where its folder lies is nobody's business
    run["command"] = [Path(a).name if Path(a).is_absolute() else a for a in run["command"]]
    rows: list[Row] = []
    start = time.perf_counter()
    for experiment in claim.small if scale == "small" else claim.full:
        for row in experiment(seeds):
            rows.append(row)
            if row["seed"] == seeds - 1:
                done = f"{time.perf_counter() - start:6.0f} s  {row['experiment']}: {row['arm']}"
                console.print(done, highlight=False, soft_wrap=True)
    seconds = time.perf_counter() - start
    have = {r["experiment"] for r in rows}
    verdicts = [judge(c, rows) for c in claim.checks if c.experiment in have]
    holds = bool(verdicts) and all(v.holds for v in verdicts)
    path = out / f"{claim.method}-{scale}"
    record = {
        "method": claim.method,
        "paper": claim.paper,
        "statement": claim.statement,
        "scope": claim.scope,
        "scale": scale,
        "holds": holds,
        "rule": "95% percentile bootstrap over seeds; a check holds only if the deciding end of the interval does",
        "verdicts": [{"check": v.check.describe(), "holds": v.holds, "estimate": list(v.estimate)} for v in verdicts],
        "seeds": seeds,
        "seconds": round(seconds, 1),
        "run": run,
        "rows": [{k: _plain(v) for k, v in r.items()} for r in rows],
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except OSError as e:
        raise UserError(f"{path}.json: cannot be written ({e.strerror})") from e
    figure(claim, rows, path.with_suffix(".png"))
    if claim.curves:
        curves(claim, rows, path.with_name(f"{path.name}-curves.png"))
    _print(console, claim, verdicts, holds, seconds, path)
    return holds


def figure(claim: Claim, rows: list[Row], path: Path) -> Path:
    """The checked metrics of all arms with intervals, a panel for each experiment and metric."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from jaxstack.core.plots import COLOURS

    panels = list(dict.fromkeys((c.experiment, c.metric) for c in claim.checks))
    panels = [p for p in panels if any(r["experiment"] == p[0] and p[1] in r for r in rows)]
    arms = max(len({r["arm"] for r in rows if r["experiment"] == e}) for e, _ in panels)
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    fig = Figure(figsize=(4.2 * columns, 0.9 + (0.8 + 0.32 * arms) * lines), dpi=110, layout="constrained")
    FigureCanvasAgg(fig)
    for i, (experiment, metric) in enumerate(panels):
        axes = fig.add_subplot(lines, columns, i + 1)
        names = list(dict.fromkeys(r["arm"] for r in rows if r["experiment"] == experiment and metric in r))
        for y, arm in enumerate(reversed(names)):
            values = [r[metric] for r in rows if r["experiment"] == experiment and r["arm"] == arm]
            e = stats.estimate(stats.mean, values)
            colour = COLOURS[0] if arm.startswith(claim.ours or "\0") else COLOURS[6]
            axes.plot([e.low, e.high], [y, y], color=colour, linewidth=7, alpha=0.3, solid_capstyle="butt")
            axes.plot(values, np.full(len(values), y), "o", color=colour, markersize=3, alpha=0.6)
            axes.plot([e.value], [y], "|", color=colour, markersize=12, markeredgewidth=2.5)
        axes.set_yticks(range(len(names)), list(reversed(names)), fontsize=8)
        axes.set_title(experiment, fontsize=9, loc="left")
        axes.set_xlabel(metric, fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
        left, right = axes.get_xlim()
        pad = max(0.0, 0.01 - (right - left) / 2)  # arms that agree to three digits look alike
        axes.set_xlim(left - pad, right + pad)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path)
    return path


def curves(claim: Claim, rows: list[Row], path: Path) -> Path:
    """`metric@x` over x with intervals over seeds, a panel for each pair of `claim.curves`, a line for each arm."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from jaxstack.core.plots import COLOURS

    fig = Figure(figsize=(5.0 * len(claim.curves), 4.6), dpi=110, layout="constrained")
    FigureCanvasAgg(fig)
    for i, (experiment, metric) in enumerate(claim.curves):
        axes = fig.add_subplot(1, len(claim.curves), i + 1)
        own = [r for r in rows if r["experiment"] == experiment]
        at = sorted({float(k.partition("@")[2]) for r in own for k in r if k.startswith(f"{metric}@")})
        for j, arm in enumerate(dict.fromkeys(r["arm"] for r in own)):
            scores = [[r[f"{metric}@{x:g}"] for x in at] for r in own if r["arm"] == arm]
            value, low, high = (np.asarray(v) for v in stats.bootstrap(stats.by_task, scores))
            colour, dash = COLOURS[j % len(COLOURS)], ("-", "--", ":")[j // len(COLOURS) % 3]
            axes.plot(at, value, label=arm, marker="o", markersize=3, color=colour, linestyle=dash)
            axes.fill_between(at, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(at, [f"{x:g}" for x in at])
        axes.set_title(experiment, fontsize=10, loc="left")
        axes.set_xlabel("length")
        axes.set_ylabel(metric)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    fig.savefig(path)
    return path


def _scores(rows: list[Row], check: Check, arm: str) -> np.ndarray:
    values = [r[check.metric] for r in rows if r["experiment"] == check.experiment and r["arm"] == arm]
    if not values:
        raise UserError(f"claim: no results of arm {arm!r} in experiment {check.experiment!r}")
    return np.asarray(values, np.float64)


def _plain(value: Any) -> Any:
    return round(float(value), 6) if isinstance(value, (float, np.floating)) else value


def _print(console: Any, claim: Claim, verdicts: list[Verdict], holds: bool, seconds: float, path: Path) -> None:
    from rich.table import Table

    table = Table(title=f"{claim.method}: {claim.statement}", title_justify="left")
    for column in ("check", "estimate [95% interval]", "verdict"):
        table.add_column(column)
    for v in verdicts:
        table.add_row(v.check.describe(), str(v.estimate), "holds" if v.holds else "FAILS")
    console.print(table)
    console.print(f"{claim.paper}. {claim.scope}")
    console.print(
        f"{'The claim holds' if holds else 'The claim does NOT hold'} at this scale ({seconds:.0f} s): {path}.json"
    )
