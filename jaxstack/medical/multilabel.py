"""Several yes-or-no labels of an image: patients in one part alone, AUCs with intervals over patients, thresholds."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxstack.core.errors import UserError
from jaxstack.medical.segmentation import auc
from jaxstack.report.association import Estimate, cluster_bootstrap


def patient_strata(patients: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Patients and the label that each is stratified by.

    Args:
        patients: [N] of each image.
        labels: [N, L] of the diseases, without "any".

    Returns:
        The P different patients, and [P] the disease that most images of a patient have, of equally frequent ones the
        rarest over all images; -1 for the healthy.
    """
    names, code = np.unique(np.asarray(patients), return_inverse=True)
    labels = np.asarray(labels, bool)
    counts = np.zeros((len(names), labels.shape[1]), np.int64)
    np.add.at(counts, code, labels.astype(np.int64))
    rarest_first = np.argsort(labels.sum(0), kind="stable")
    best = rarest_first[counts[:, rarest_first].argmax(1)]
    return names, np.where(counts.any(1), best, -1)


def stratified_patient_split(
    patients: np.ndarray, labels: np.ndarray, fractions: Sequence[float] = (0.7, 0.15, 0.15), seed: int = 42
) -> np.ndarray:
    """Assign images to parts so that a patient is in one alone and the parts have the diseases in equal shares.

    Patients of a stratum are shuffled and cut where the running sums of the fractions say; a start that differs from
    stratum to stratum keeps roundings from adding up.

    Args:
        patients: [N] of each image.
        labels: [N, L] of the diseases, without "any".
        fractions: of the parts, which sum to 1.
        seed: of the shuffle.

    Returns:
        [N] number of the part.

    Raises:
        UserError: for fractions that do not sum to 1, or fewer patients than parts.
    """
    shares = np.asarray(fractions, np.float64)
    if shares.ndim != 1 or shares.min() < 0 or abs(shares.sum() - 1.0) > 1e-6:
        raise UserError(f"fractions={tuple(fractions)}: expected numbers >= 0 that sum to 1")
    names, strata = patient_strata(patients, labels)
    if len(names) < len(shares):
        raise UserError(f"patients: found {len(names)}, expected at least {len(shares)}, one for each part")
    rng = np.random.default_rng(seed)
    part, cuts, done = np.zeros(len(names), np.int64), np.cumsum(shares)[:-1], 0
    for stratum in np.unique(strata):
        own = rng.permutation(np.flatnonzero(strata == stratum))
        # how many of all patients so far belong to the parts before each cut, less those that were given
        ends = np.round(cuts * (done + len(own))) - np.round(cuts * done)
        part[own] = np.searchsorted(np.clip(ends, 0, len(own)), np.arange(len(own)), side="right")
        done += len(own)
    return part[np.searchsorted(names, np.asarray(patients))]


def check_patients(patients: np.ndarray, parts: Sequence[Any], what: str = "patients") -> None:
    """Raise `UserError` naming a patient whose images are in two of the parts [N]."""
    seen: dict[Any, Any] = {}
    for who, part in zip(np.asarray(patients).tolist(), parts):
        if seen.setdefault(who, part) != part:
            raise UserError(f"{what}: found patient {who} in {seen[who]} and {part}, expected one part for a patient")


def aucs(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each label [L] of scores [N, L]; NaN for a label of one class."""
    return np.array([auc(s, y) for s, y in zip(np.asarray(scores).T, np.asarray(labels).T)])


def auc_table(
    scores: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    patients: np.ndarray,
    resamples: int = 1000,
) -> dict[str, Estimate]:
    """AUC of each label with a 95% interval over resampled patients.

    Args:
        scores: [N, L].
        labels: [N, L] bool.
        names: L.
        patients: [N]: whole patients are resampled.
        resamples: of the bootstrap.

    Returns:
        By name; NaN where a label has one class, NaN ends where most resamples have.
    """
    nothing = float("nan")
    found = {}
    for name, s, y in zip(names, np.asarray(scores).T, np.asarray(labels, bool).T):
        value = auc(s, y)
        if value != value:
            found[name] = Estimate(nothing, nothing, nothing)
            continue
        try:
            found[name] = cluster_bootstrap(auc, np.asarray(patients).tolist(), s, y, resamples=resamples)
        except UserError:  # too few patients of one class for an interval
            found[name] = Estimate(value, nothing, nothing)
    return found


class OperatingPoints(NamedTuple):
    """Thresholds of each label [L]: what is at or above one is called ill. NaN for a label of one class."""

    sensitive: np.ndarray
    """The largest that finds at least the wanted share of the ill."""
    specific: np.ndarray
    """The smallest that leaves at least the wanted share of the healthy below it."""


def operating_points(
    scores: np.ndarray, labels: np.ndarray, sensitivity: float = 0.95, specificity: float = 0.95
) -> OperatingPoints:
    """Choose thresholds on a validation part. The paper's two points are not defined in public; these are ours.

    Args:
        scores: [N, L].
        labels: [N, L] bool.
        sensitivity: share of the ill at or above the first threshold.
        specificity: share of the healthy below the second.
    """
    low, high = [], []
    for s, y in zip(np.asarray(scores, np.float64).T, np.asarray(labels, bool).T):
        ill, well = np.sort(s[y]), np.sort(s[~y])
        if not len(ill) or not len(well):
            low.append(np.nan)
            high.append(np.nan)
            continue
        low.append(ill[int(np.floor((1.0 - sensitivity) * len(ill) + 1e-9))])
        below = int(np.ceil(specificity * len(well) - 1e-9))
        high.append(np.nextafter(well[below - 1], np.inf) if below else well[0])
    return OperatingPoints(np.array(low), np.array(high))
