"""When a classifier of scans is right: accuracy by subgroup with intervals, and two factors at once.

Scans of a patient resemble each other, so beside Wilson's interval, which takes scans as independent, stands one over
resampled patients.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from jaxstack.core.errors import UserError
from jaxstack.report.stats import cluster_bootstrap, wilson


def _row(right: np.ndarray, truth: np.ndarray, patients: np.ndarray | None, resamples: int, seed: int) -> dict:
    share = wilson(int(right.sum()), len(right))
    classes = np.unique(truth, return_counts=True)[1]
    row: dict[str, Any] = {"scans": len(right), "correct": int(right.sum()), "accuracy": share.value}
    row |= {"low": share.low, "high": share.high, "majority": classes.max() / len(right)}
    if patients is not None:
        people = len(np.unique(patients))
        over = (np.nan, np.nan)
        if people > 1:
            found = cluster_bootstrap(
                lambda x: x.mean(), patients.tolist(), right.astype(np.float64), resamples=resamples, seed=seed
            )
            over = found.low, found.high
        row |= {"patients": people, "patients_low": over[0], "patients_high": over[1]}
    return row


def _checked(pred: Any, truth: Any, **more: Any) -> list[np.ndarray]:
    arrays = [np.asarray(pred), np.asarray(truth), *(np.asarray(x) for x in more.values())]
    for name, x in zip(("pred", "truth", *more), arrays):
        if x.ndim != 1 or len(x) != len(arrays[0]) or not len(x):
            raise UserError(f"{name}: found shape {x.shape}, expected ({len(arrays[0])},), one entry for each scan")
    return arrays


def subgroup_report(
    pred: Any,
    truth: Any,
    factors: Mapping[str, Any],
    patients: Any = None,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Accuracy over all scans and over each level of each factor.

    Args:
        pred: [M] the class that was decided on.
        truth: [M].
        factors: name -> [M] the level of each scan, e.g. its size class.
        patients: [M], for the intervals over patients.
        resamples: of these.
        seed: likewise.

    Returns:
        Columns factor, level, scans, correct, accuracy, low and high (Wilson, 95%), majority (share of the most
        frequent class among these scans, which always naming it would reach) and, with `patients`, their number and the
        interval over them, NaN for one patient alone. The first row is of all scans.

    Raises:
        UserError: for arrays of other lengths or no scans.
    """
    found = _checked(pred, truth, **dict(factors))
    right = found[0] == found[1]
    people = None if patients is None else _checked(pred, truth, patients=patients)[2]
    part = lambda rows: _row(right[rows], found[1][rows], None if people is None else people[rows], resamples, seed)
    rows = [{"factor": "all", "level": ""} | part(np.ones(len(right), bool))]
    for name, levels in zip(factors, found[2:]):
        for level in np.unique(levels):
            rows.append({"factor": name, "level": str(level)} | part(levels == level))
    return pd.DataFrame(rows)


def cross_table(pred: Any, truth: Any, factors: Mapping[str, Any], names: Sequence[str]) -> pd.DataFrame:
    """Accuracy over each pair of levels of two factors: subgroups overlap, as large lesions are on late scans.

    Args:
        pred, truth, factors: as `subgroup_report`.
        names: of the two factors.

    Returns:
        Columns of the two names, scans, correct, accuracy, low, high (Wilson) and majority; pairs without scans are
        left out.

    Raises:
        UserError: for names that are no factors, or arrays of other lengths.
    """
    if len(names) != 2 or not set(names) <= set(factors):
        raise UserError(f"names={tuple(names)}: expected two of {', '.join(factors)}")
    found = _checked(pred, truth, **{name: factors[name] for name in names})
    right, rows = found[0] == found[1], []
    for first in np.unique(found[2]):
        for second in np.unique(found[3]):
            part = (found[2] == first) & (found[3] == second)
            if part.any():
                levels = dict(zip(names, (str(first), str(second))))
                rows.append(levels | _row(right[part], found[1][part], None, 0, 0))
    return pd.DataFrame(rows)
