"""The claims of uwf-diseases and PEPPR: regions, measures of the truth, blobs, peaks."""

import numpy as np
import pytest

from jaxstack.claims import peppr as faithful
from jaxstack.claims import uwf_diseases as study
from jaxstack.medical.global_maps import GlobalExplanation
from jaxstack.medical.phantoms_uwf import uwf_set


def test_regions_hold_their_share_and_perfect_scores_are_perfect(monkeypatch):
    pole = -np.hypot(*(np.mgrid[:64, :80] - np.array([32, 44])[:, None, None]))
    monkeypatch.setattr(study, "importance", lambda seed, budget: pole.astype(np.float32))
    shares = {arm: study.region(arm, 3, study.SMALL) for arm in study.REGIONS}
    assert [shares[arm].mean() for arm in study.REGIONS] == pytest.approx([1.0, 0.3, 0.1, 0.1, 0.1], abs=0.006)
    assert not (shares[study.TENTH] & shares[study.PERIPHERY]).any()
    assert shares[study.TENTH][32, 44]
    assert (shares[study.THIRD] | ~shares[study.TENTH]).all()
    # nobody is in two parts, and the learner's own phantoms are of other patients
    budget = study.SMALL._replace(train=6, valid=4, test=6)
    parts = study.drawn(1, budget)
    assert [len(p.images) for p in parts] == [6, 4, 6]
    assert len(set.union(*(set(p.patients) for p in parts))) == 8
    labels = np.random.default_rng(0).uniform(size=(40, 8)) < 0.5
    row = study.measured(labels.astype(float), labels)
    assert (row["any AUC"], row["macro AUC"], row["AUC RP"]) == (1.0, 1.0, 1.0)
    assert row["log-loss"] < 1e-6
    assert study.measured(1.0 - labels, labels)["macro AUC"] == 0.0


def test_blobs_lie_at_their_places_and_peaks_are_measured_from_lesions():
    images, labels = faithful.blobs(2, 400)
    assert images.shape == (400, 48, 48, 1)
    for k, (row, column) in enumerate(faithful.PLACES):
        at = images[:, row - 2 : row + 3, column - 2 : column + 3, 0].mean((1, 2))
        assert at[labels[:, k]].mean() > at[~labels[:, k]].mean() + 0.3
    row, column = faithful.DISTRACTOR
    at = images[:, row, column, 0]
    assert at.mean() > 0.2  # half of the images have it, whatever their labels
    assert all(abs(at[labels[:, k]].mean() - at[~labels[:, k]].mean()) < 0.15 for k in range(3))
    lesions = uwf_set(4, 60, (64, 80)).lesions
    truth = np.concatenate([lesions.mean(0), lesions.any(1).mean(0)[None]]).astype(np.float32)
    nothing = np.zeros(8)
    own = faithful.peaks(GlobalExplanation(truth, truth[-1], truth, nothing, nothing), lesions)
    assert own["peaks within 8 px"] == 7
    away = np.roll(truth, 25, 1)
    assert faithful.peaks(GlobalExplanation(away, away[-1], away, nothing, nothing), lesions)["peaks within 8 px"] < 4
