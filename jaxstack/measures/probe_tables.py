"""What many audited runs say together: the memory gap, the released decision rules, discoveries among many probes."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxstack.core.errors import UserError
from jaxstack.measures.probes import Probe
from jaxstack.report import stats


class Gap(NamedTuple):
    """Memory against none: paired differences J(recurrent) - J(feed-forward) over seeds."""

    mean: float
    p: float
    """One-sided exact Wilcoxon signed-rank p-value of a positive difference."""
    positive: int
    seeds: int
    benefits: bool
    """p < 0.05 and mean > 0; five seeds reach at best 1/32."""


def memory_gap(recurrent: Mapping[int, float], reactive: Mapping[int, float]) -> Gap:
    """Compare returns by seed.

    Args:
        recurrent, reactive: seed -> mean return of the greedy policy.

    Raises:
        UserError: seeds that only one of them has.
    """
    odd = sorted(set(recurrent) ^ set(reactive))
    if odd or not recurrent:
        raise UserError(f"memory_gap: expected the same seeds on both sides, unpaired: {odd}")
    difference = np.asarray([recurrent[s] - reactive[s] for s in sorted(recurrent)], np.float64)
    p = float(stats.wilcoxon(difference, alternative="greater").p)
    mean = float(difference.mean())
    return Gap(mean, p, int((difference > 0).sum()), len(difference), bool(p < 0.05 and mean > 0))


class Scenario(NamedTuple):
    """All audited runs of one environment: probes of each (algorithm, seed) run, and the gap of each algorithm."""

    name: str
    suite: str
    runs: Sequence[Mapping[str, Probe]]
    gaps: Sequence[Gap]


RULES = {
    "memory": lambda s: any(r["HAR"].flag for r in s.runs) and any(g.benefits for g in s.gaps),
    "teammate information": lambda s: any("PIF" in r and r["PIF"].flag for r in s.runs),
    "synchronous coordination": lambda s: any("AA" in r and r["AA"].flag for r in s.runs),
    "temporal coordination": lambda s: any("DAI" in r and r["DAI"].flag for r in s.runs),
}
"""The released decision rules: a scenario satisfies a rule if any run does."""


def decision_table(scenarios: Sequence[Scenario]) -> list[dict[str, Any]]:
    """Return a row per suite: share of its scenarios that satisfy each rule, "60% (3/5)"."""
    rows = []
    for suite in dict.fromkeys(s.suite for s in scenarios):
        own = [s for s in scenarios if s.suite == suite]
        cell = lambda rule, own=own: f"{sum(map(rule, own)) / len(own):.0%} ({sum(map(rule, own))}/{len(own)})"
        rows.append({"suite": suite} | {name: cell(rule) for name, rule in RULES.items()})
    return rows


def discoveries(probes: Mapping[str, Probe], level: float = 0.05) -> dict[str, bool]:
    """Return which of many probes (by scenario) differ from their null with the false discovery rate at `level`
    (Benjamini & Hochberg, 1995); probes without a value never do."""
    known = {name: p.p for name, p in probes.items() if np.isfinite(p.p)}
    adjusted = dict(zip(known, stats.benjamini_hochberg(list(known.values())))) if known else {}
    return {name: bool(adjusted.get(name, 1.0) <= level) for name in probes}
