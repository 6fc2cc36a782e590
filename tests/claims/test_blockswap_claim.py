"""The claim of BlockSwap: candidates of equal size, arms that choose what they say, equal data for all students."""

import numpy as np
import pytest

from jaxstack.claims import blockswap as study
from jaxstack.vision import blockswap as bs


def test_candidates_are_different_and_within_the_budget():
    own = study.candidates()
    assert len(np.unique(own, axis=0)) == len(own) == study.COUNT
    assert (abs(bs.candidate_params(own, study.SPACE) - study.BUDGET) < 0.025 * study.BUDGET).all()
    for arm in study.SINGLE:
        ((space, kinds, beta),) = study.chosen("", arm, 0)
        assert len(set(kinds)) == 1
        assert 0.8 * study.BUDGET < study.count(space, kinds) <= study.BUDGET
        assert beta == study.BETA


def test_arms_choose_by_their_own_scores(monkeypatch):
    size = bs.candidate_params(study.candidates(), study.SPACE)
    fisher, norms = (np.random.default_rng(i).uniform(size=study.COUNT) for i in (1, 2))
    monkeypatch.setattr(study, "scores", lambda folder, seed: fisher)
    monkeypatch.setattr(study, "norms", lambda folder, seed: norms)
    place = {bs.names(c): i for i, c in enumerate(study.candidates())}
    at = lambda arm: [place[kinds] for _, kinds, _ in study.chosen("", arm, 3)]
    assert at(study.TOP) == list(np.argsort(fisher)[::-1][:3])
    assert at(study.BOTTOM) == list(np.argsort(fisher)[:3])
    assert len(set(at(study.RANDOM))) == 3
    assert at(study.NORM) == [norms.argmax()]
    assert size[at(study.LARGEST)] == [size.max()]
    assert at(study.SCRATCH) == at(study.TOP)[:1]
    assert study.chosen("", study.SCRATCH, 3)[0][2] == 0
    # accuracies in the order of the scores
    nets = dict.fromkeys(net for arm in (study.TOP, study.RANDOM, study.BOTTOM) for net in study.chosen("", arm, 3))
    monkeypatch.setattr(study, "errors", lambda folder, seed, own: [-fisher[place[kinds]] for _, kinds, _ in own])
    found = study.correlations("", 3)
    assert 7 <= len(nets) <= 9
    assert found["rank correlation"] == pytest.approx(1.0)


def test_seeds_have_epochs_of_their_own():
    assert study.BATCH * (study.PARTS["train"] // study.BATCH) <= study.PARTS["train"]
    first = np.asarray(study.rows(0))
    each = study.PARTS["train"] // study.BATCH
    assert first.shape == (study.UPDATES, study.BATCH)
    assert len(np.unique(first[:each])) == each * study.BATCH
    assert (first != np.asarray(study.rows(1))).any()
    assert all(size % 500 == 0 for size in study.PARTS.values())
