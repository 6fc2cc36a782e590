"""Checks of a claim and how they are decided: by 95% bootstrap intervals over seeds, not by means alone."""

import math
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxstack.core.errors import UserError
from jaxstack.report import stats

Row = dict[str, Any]
"""`experiment`, `arm`, `seed` and metrics."""

Rule = Literal[
    "at_least",
    "at_most",
    "near",
    "above",
    "below",
    "within",
    "times_at_least",
    "times_at_most",
    "share",
    "share_below",
    "signed_rank",
    "beaten",
]
Status = Literal["holds", "fails", "report", "not run"]

LARGER = ("above", "times_at_least", "signed_rank")  # a rival is strong where its metric is large
SMALLER = ("below", "times_at_most")
COMPARED = (*LARGER, *SMALLER, "within", "beaten")
TARGETED = ("near", "share", "share_below")

RULE = (
    "95% percentile bootstrap over seeds; a check holds only if the deciding end of the interval does; share rules "
    "count seeds (Wilson interval)"
)


class Check(NamedTuple):
    """One comparison of an arm's metric, decided by an interval over seeds.

    Rules (e.low and e.high are the ends of the interval):
        at_least, at_most: mean >= value (e.low), mean <= value (e.high).
        near: mean within `target` +- value (both ends).
        above, below: arm - other >= value (e.low), arm - other <= -value (e.high).
        within: arm - other within +- value (both ends).
        times_at_least, times_at_most: mean(arm) / mean(other) >= value (e.low), <= value (e.high); positive metrics.
        share, share_below: at least the share `value` of the seeds reach metric >= target (<= target). The share itself
            decides; its Wilson interval is shown.
        signed_rank: one-sided exact Wilcoxon test of arm - other > 0 seed by seed has p <= value. Five seeds reach at
            best 1/32. Needs `paired`.
        beaten: other > arm, seed by seed, in at least the share `value` of the seeds. The share itself decides; its
            Wilson interval is shown. Needs `paired`.
    """

    experiment: str
    arm: str
    metric: str
    rule: Rule
    value: float
    other: str | tuple[str, ...] = ""
    """The rival; of several, the best by the mean of the same rows: the smallest for `below` and `times_at_most`, else
    the largest."""
    target: float = 0.0
    paired: bool = False
    """Run i of arm and rival share seed i: differences or ratios are resampled seed by seed."""
    report: bool = False
    """Printed and stored with its interval; decides nothing."""

    @property
    def rivals(self) -> tuple[str, ...]:
        """The arms that this check compares with."""
        others = (self.other,) if isinstance(self.other, str) else tuple(self.other)
        return tuple(o for o in others if o)

    @property
    def arms(self) -> tuple[str, ...]:
        """All arms that this check reads."""
        return tuple(dict.fromkeys((self.arm, *self.rivals)))

    def describe(self) -> str:
        """The rule in words."""
        what = f"{self.experiment}: {self.metric} of {self.arm}"
        rival = self.rivals[0] if len(self.rivals) == 1 else f"the best of {', '.join(self.rivals)}"
        sign = "+" if self.value >= 0 else "-"
        text = {
            "at_least": f"{what} >= {self.value:g}",
            "at_most": f"{what} <= {self.value:g}",
            "near": f"{what} within {self.value:g} of {self.target:.4g}",
            "above": f"{what} >= {rival} {sign} {abs(self.value):g}",
            "below": f"{what} <= {rival} {'-' if self.value >= 0 else '+'} {abs(self.value):g}",
            "within": f"{what} within {self.value:g} of {rival}",
            "times_at_least": f"{what} >= {self.value:g} x {rival}",
            "times_at_most": f"{what} <= {self.value:g} x {rival}",
            "share": f"{what} >= {self.target:.4g} in at least {self.value:.0%} of the seeds",
            "signed_rank": f"{what} > {rival} with p <= {self.value:g}",
            "beaten": f"{what} < {rival} in at least {self.value:.0%} of the seeds",
            "share_below": f"{what} <= {self.target:.4g} in at least {self.value:.0%} of the seeds",
        }[self.rule]
        return f"{text} (seed by seed)" if self.paired else text

    def problem(self) -> str | None:
        """What is wrong with the check itself, None if nothing."""
        if self.rule not in Rule.__args__:  # pyright: ignore[reportAttributeAccessIssue]
            return f"rule={self.rule!r}: expected one of {', '.join(Rule.__args__)}"  # pyright: ignore
        if bool(self.rivals) != (self.rule in COMPARED):
            return (
                f"other={self.other!r}: rule {self.rule} {'needs' if self.rule in COMPARED else 'takes no'} other arm"
            )
        if self.rule == "within" and len(self.rivals) > 1:
            return f"other={self.other!r}: rule within takes one other arm"
        if self.target and self.rule not in TARGETED:
            return f"target={self.target:g}: rule {self.rule} takes no target"
        if self.paired and self.rule not in COMPARED:
            return f"paired=True: rule {self.rule} compares no two arms"
        if self.rule == "signed_rank" and not (self.paired and 0 < self.value < 1):
            return f"rule signed_rank needs paired=True and a p-value in (0, 1), found {self.paired} and {self.value:g}"
        if self.rule == "beaten" and not self.paired:
            return "rule beaten needs paired=True"
        if self.rule in ("share", "share_below", "beaten") and not 0 < self.value <= 1:
            return f"value={self.value:g}: expected a share of the seeds in (0, 1]"
        return None


class Verdict(NamedTuple):
    """A check, the interval that decided it (NaN where there is none), its status and, if that needs one, a reason."""

    check: Check
    estimate: stats.Estimate
    status: Status
    note: str = ""

    @property
    def holds(self) -> bool:
        """Whether the check decides and holds."""
        return self.status == "holds"


def judge(check: Check, rows: list[Row]) -> Verdict:
    """Decide `check` from the rows of its arms.

    A seed whose metric is not finite makes the check fail, with a note. An arm without rows makes it "not run".

    Raises:
        UserError: the check is malformed, an arm's rows lack the metric, or `paired` arms have different seeds.
    """
    if problem := check.problem():
        raise UserError(f"check of {check.experiment!r}, {check.arm!r}, {check.metric!r}: {problem}")
    nothing = stats.Estimate(math.nan, math.nan, math.nan)
    scores = {arm: _scores(rows, check, arm) for arm in check.arms}
    if missing := [arm for arm, x in scores.items() if not len(x)]:
        return Verdict(check, nothing, "not run", f"no rows of {', '.join(missing)}")
    bad = {arm: int((~np.isfinite(list(x.values()))).sum()) for arm, x in scores.items()}
    if any(bad.values()):
        text = ", ".join(f"{n} of {len(scores[arm])} seeds of {arm}" for arm, n in bad.items() if n)
        return Verdict(check, nothing, "report" if check.report else "fails", f"not finite: {text}")
    if check.rule.startswith("times") and min(min(x.values()) for x in scores.values()) <= 0:
        return Verdict(check, nothing, "report" if check.report else "fails", "a ratio needs positive scores")
    rival, note = "", ""
    if check.rivals:
        rival = _best(check, scores)
        note = f"best: {rival}" if len(check.rivals) > 1 else ""
    e, holds = _decide(check, scores[check.arm], scores.get(rival, {}))
    return Verdict(check, e, "report" if check.report else "holds" if holds else "fails", note)


def _best(check: Check, scores: dict[str, dict[int, float]]) -> str:
    means = {arm: float(np.mean(list(scores[arm].values()))) for arm in check.rivals}
    return (min if check.rule in SMALLER else max)(means, key=lambda arm: means[arm])


def _decide(check: Check, own: dict[int, float], rival: dict[int, float]) -> tuple[stats.Estimate, bool]:
    x = np.asarray(list(own.values()))
    if check.rule in ("share", "share_below"):
        hits = int((x >= check.target).sum() if check.rule == "share" else (x <= check.target).sum())
        e = stats.wilson(hits, len(x))
        return e, hits >= check.value * len(x) - 1e-9
    if check.rule not in COMPARED:
        e = stats.estimate(stats.mean, x)
    else:
        if check.paired and set(own) != set(rival):
            raise UserError(f"{check.describe()}: found seeds {sorted(own)} and {sorted(rival)}, expected the same")
        y = np.asarray([rival[s] for s in own]) if check.paired else np.asarray(list(rival.values()))
        if check.rule == "beaten":
            hits = int((y > x).sum())
            return stats.wilson(hits, len(x)), hits >= check.value * len(x) - 1e-9
        e = stats.estimate(
            stats.Ratio() if check.rule.startswith("times") else stats.Difference(), x, y, paired=check.paired
        )
        if check.rule == "signed_rank":
            return e, stats.wilcoxon(x, y, alternative="greater").p <= check.value
    v, t = check.value, check.target
    holds = {
        "at_least": e.low >= v,
        "at_most": e.high <= v,
        "near": t - v <= e.low and e.high <= t + v,
        "above": e.low >= v,
        "below": e.high <= -v,
        "within": -v <= e.low and e.high <= v,
        "times_at_least": e.low >= v,
        "times_at_most": e.high <= v,
    }[check.rule]
    return e, bool(holds)


def _scores(rows: list[Row], check: Check, arm: str) -> dict[int, float]:
    own = [r for r in rows if r["experiment"] == check.experiment and r["arm"] == arm]
    if lacking := [r for r in own if check.metric not in r]:
        known = ", ".join(k for k in lacking[0] if k not in ("experiment", "arm", "seed"))
        raise UserError(f"{check.describe()}: found metrics {known} in the rows of {arm!r}")
    return {r["seed"]: float(r[check.metric]) for r in own}
