"""Measures of classifiers against scikit-learn's and closed forms."""

import numpy as np
import pytest
from sklearn import metrics

from jaxstack.core.errors import UserError
from jaxstack.report import classification as c

RNG = np.random.default_rng(0)
P = RNG.dirichlet(np.ones(4), 200)
Y = np.where(RNG.random(200) < 0.5, P.argmax(1), RNG.integers(0, 4, 200))


def test_measures_are_those_of_scikit_learn():
    found, predicted = c.measures(P, Y), P.argmax(1)
    assert found["auc"] == pytest.approx(metrics.roc_auc_score(Y, P, multi_class="ovr"))
    assert found["f1"] == pytest.approx(metrics.f1_score(Y, predicted, average="macro"))
    assert found["kappa"] == pytest.approx(metrics.cohen_kappa_score(Y, predicted))
    assert found["quadratic_kappa"] == pytest.approx(metrics.cohen_kappa_score(Y, predicted, weights="quadratic"))
    table = c.confusion(predicted, Y, 4)
    assert (table == metrics.confusion_matrix(Y, predicted)).all()
    assert c.kappa(table, 1) == pytest.approx(metrics.cohen_kappa_score(Y, predicted, weights="linear"))
    assert found["log_loss"] == pytest.approx(metrics.log_loss(Y, P))


def test_calibration_has_its_closed_forms():
    sure = np.tile([0.8, 0.2], (10, 1))
    assert c.calibration_error(sure, np.array([0] * 8 + [1] * 2)) == pytest.approx(0.0)
    assert c.calibration_error(sure, np.zeros(10, int)) == pytest.approx(0.2)
    # two bins, one too sure by 0.3 and one too unsure by 0.4, do not cancel out
    both = np.concatenate([np.tile([0.8, 0.2], (10, 1)), np.tile([0.6, 0.4], (10, 1))])
    assert c.calibration_error(both, np.array([0, 1] * 5 + [0] * 10)) == pytest.approx(0.35)


def test_cases_at_the_edge():
    one = np.eye(3)[[0, 1, 1]]
    assert np.isnan(c.macro_auc(one, np.zeros(3, int)))
    assert np.isnan(c.kappa(np.diag([5, 0])))
    assert c.measures(one, np.array([0, 1, 1]))["f1"] == 1.0
    for p, y, message in (
        (P, Y + 1, "labels: found 1 to 4, expected 0 to 3"),
        (2 * P, Y, "probabilities: expected finite numbers"),
        (P, Y[:-1], r"found \[200, 4\], \[199\]"),
    ):
        with pytest.raises(UserError, match=message):
            c.measures(p, y)
