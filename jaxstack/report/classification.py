"""How good a classifier's probabilities are: AUC, F1, kappas, log-loss and calibration, as functions of arrays."""

from typing import Any

import numpy as np

from jaxstack.core.errors import UserError


def auc(scores: Any, positive: Any) -> float:
    """Return the area under the ROC curve, the chance that a positive has the larger score; ties count half.

    Args:
        scores: numbers of any shape.
        positive: booleans of the same shape.

    Returns:
        NaN where one class is absent: nothing is measured then.

    Raises:
        UserError: for other shapes or scores that are not finite.
    """
    from scipy.stats import rankdata

    x, y = np.asarray(scores, np.float64).ravel(), np.asarray(positive, bool).ravel()
    if x.shape != y.shape or not np.isfinite(x).all():
        raise UserError(f"scores, positive: found {x.size} and {y.size} values, expected as many finite scores")
    many = int(y.sum())
    few = len(y) - many
    if not many or not few:
        return float("nan")
    return float((rankdata(x)[y].sum() - many * (many + 1) / 2) / (many * few))


def _checked(probabilities: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    p, y = np.asarray(probabilities, np.float64), np.asarray(labels)
    if p.ndim != 2 or y.shape != p.shape[:1] or not len(y) or not np.issubdtype(y.dtype, np.integer):
        raise UserError(
            f"probabilities, labels: found {list(p.shape)}, {list(y.shape)} {y.dtype}, expected [N, C] and N integers"
        )
    if y.min() < 0 or y.max() >= p.shape[1]:
        raise UserError(f"labels: found {y.min()} to {y.max()}, expected 0 to {p.shape[1] - 1}")
    if not np.isfinite(p).all() or p.min() < 0 or np.abs(p.sum(1) - 1).max() > 1e-3:
        raise UserError("probabilities: expected finite numbers of 0 or more that sum to 1 in each row")
    return p, y


def macro_auc(probabilities: Any, labels: Any) -> float:
    """Mean over the classes that occur, but not everywhere, of the AUC of one class against all others.

    Args:
        probabilities: [N, C].
        labels: [N] integers.
    """
    p, y = _checked(probabilities, labels)
    each = [auc(p[:, c], y == c) for c in range(p.shape[1]) if 0 < (y == c).sum() < len(y)]
    return float(np.mean(each)) if each else float("nan")


def confusion(predicted: Any, labels: Any, classes: int) -> np.ndarray:
    """[C, C] counts: rows are the labels, columns what was predicted."""
    table = np.zeros((classes, classes), np.int64)
    np.add.at(table, (np.asarray(labels), np.asarray(predicted)), 1)
    return table


def macro_f1(table: Any) -> float:
    """Mean of F1 = 2 TP / (2 TP + FP + FN) over classes that occur or are predicted, of a confusion table [C, C]."""
    table = np.asarray(table, np.float64)
    whole = table.sum(0) + table.sum(1)
    return float(np.mean(2 * np.diag(table)[whole > 0] / whole[whole > 0]))


def kappa(table: Any, power: float = 0.0) -> float:
    """Cohen's kappa (1960) of a confusion table [C, C]: agreement beyond that of chance.

    Args:
        table: counts.
        power: weights of a disagreement by |i - j|: 0 none, 1 linear, 2 quadratic (Cohen, 1968).

    Returns:
        1 for full agreement; NaN where chance alone agrees fully.
    """
    p = np.asarray(table, np.float64) / np.sum(table)
    far = np.abs(np.subtract.outer(np.arange(len(p)), np.arange(len(p))))
    weights = (far > 0).astype(np.float64) if power == 0 else far**power
    chance = float((weights * np.outer(p.sum(1), p.sum(0))).sum())
    return 1.0 - float((weights * p).sum()) / chance if chance > 0 else float("nan")


def log_loss(probabilities: Any, labels: Any) -> float:
    """Mean of -log p of the labels [N], in nats; probabilities [N, C] below 1e-15 count as that."""
    p, y = _checked(probabilities, labels)
    return float(-np.log(np.maximum(p[np.arange(len(y)), y], 1e-15)).mean())


def calibration_error(probabilities: Any, labels: Any, bins: int = 15) -> float:
    """Expected calibration error (Guo et al., 2017): the gap of confidence and accuracy in bins of equal width.

    Args:
        probabilities: [N, C].
        labels: [N] integers.
        bins: of the largest probability in (0, 1].
    """
    p, y = _checked(probabilities, labels)
    if bins < 1:
        raise UserError(f"bins={bins}: expected at least 1")
    sure, right = p.max(1), (p.argmax(1) == y).astype(np.float64)
    at = np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(at, sure - right, bins)
    return float(np.abs(gap).sum() / len(y))


def measures(probabilities: Any, labels: Any) -> dict[str, float]:
    """All of these by name, of probabilities [N, C] and labels [N]. Raises `UserError` for what is none."""
    p, y = _checked(probabilities, labels)
    table = confusion(p.argmax(1), y, p.shape[1])
    return {
        "auc": macro_auc(p, y),
        "f1": macro_f1(table),
        "kappa": kappa(table),
        "quadratic_kappa": kappa(table, 2.0),
        "log_loss": log_loss(p, y),
        "calibration_error": calibration_error(p, y),
    }
