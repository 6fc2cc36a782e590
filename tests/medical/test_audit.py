"""Accuracy by subgroup: Wilson's interval, one over patients, the majority's share, two factors at once."""

import numpy as np
import pytest

from jaxstack.core.errors import UserError
from jaxstack.medical.audit import cross_table, subgroup_report


def test_the_audit_tells_when_decisions_are_right():
    truth = np.array([0] * 12 + [1] * 8)
    pred = np.where(np.arange(20) < 15, truth, 3)
    size = np.where(np.arange(20) < 15, "a", "b")
    pred[:2] = 3
    patients = np.arange(20) // 2
    table = subgroup_report(pred, truth, {"size": size}, patients, resamples=200)
    assert list(table.factor) == ["all", "size", "size"]
    one = table[table.level == "a"].iloc[0]
    assert (one.scans, one.correct, one.patients) == (15, 13, 8)
    np.testing.assert_allclose((one.low, one.high), (0.621, 0.963), atol=5e-4)  # Wilson's interval of 13/15
    assert one.patients_low < one.accuracy < one.patients_high
    assert table.majority[0] == 0.6
    assert table[table.level == "b"].iloc[0].accuracy == 0.0
    alone = subgroup_report(pred[:1], truth[:1], {}, ["p"])
    assert np.isnan(alone.patients_low[0])
    cross = cross_table(pred, truth, {"size": size, "early": np.arange(20) < 10}, ("size", "early"))
    assert cross.scans.sum() == 20
    assert list(zip(cross["size"], cross.early)) == [("a", "False"), ("a", "True"), ("b", "False")]
    assert list(cross.correct) == [5, 8, 0]
    with pytest.raises(UserError, match="truth: found shape"):
        subgroup_report(pred, truth[:5], {})
    with pytest.raises(UserError, match="expected two of size"):
        cross_table(pred, truth, {"size": size}, ("size", "age"))
