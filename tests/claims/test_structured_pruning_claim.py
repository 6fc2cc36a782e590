"""The claim of structured pruning: equal updates, sizes that favour pruning, choices by validation images alone."""

import numpy as np
import pytest

from jaxstack.claims import structured_pruning as study
from jaxstack.claims.harness import Tuning
from jaxstack.nn.vision import wrn


def masks(*left):
    return tuple(np.concatenate([np.ones(n), np.zeros(c - n)]) for n, c in zip(left, study.MIDDLE))


LEFT = {50: [(20, 30, 62), (10, 40, 62), (32, 40, 40)], 75: [(10, 16, 30), (4, 20, 32), (16, 20, 20)]}


@pytest.fixture
def found(monkeypatch):
    """Networks that Fisher pruning left, of three seeds, without training; what is trained is written down."""
    nets = tuple({share: (None, masks(*LEFT[share][s])) for share in LEFT} for s in range(3))
    fits = []
    monkeypatch.setattr(study, "fishers", lambda folder: nets)
    monkeypatch.setattr(study, "pruned", lambda folder, arm, lr, seed: nets[seed])
    monkeypatch.setattr(study, "tuned", lambda arm, folder: Tuning(({"lr": 0.01},), ((1.0,),), (100,), "error"))
    monkeypatch.setattr(study, "fit", lambda folder, width, mid, updates, lr, seed: fits.append((width, mid, updates)))
    study.scratch.cache_clear()
    yield fits
    study.scratch.cache_clear()


@pytest.mark.parametrize("share", [50, 75])
def test_rivals_have_no_more_parameters_and_as_many_updates(found, share):
    removed = study.CHANNELS * share // 100
    smallest = min(study.size_of(masks(*left)) for left in LEFT[share])
    for arm in ("copycat", "narrower", "bottleneck"):
        study.scratch("", arm, share, 0.1, 1)
        width, mid, updates = found[-1]
        assert updates == study.BASE + removed * study.UPDATES
        count = wrn.param_count(10, width, mid, channels=1)
        assert 0.9 * smallest < count <= smallest
    study.scratch("", "Fisher, scratch", share, 0.1, 1)
    assert found[-1] == (2.0, LEFT[share][1], study.BASE + removed * study.UPDATES)
    assert sum(mid == tuple(wrn.block_features(10, w)[0]) for w, mid, _ in found[:-1]) == 1  # the narrower one


def test_the_better_network_is_chosen_by_validation_images(monkeypatch):
    wrong = {  # validation and test error of three candidates
        "Fisher, scratch": (10.0, 20.0),
        "narrower": (9.0, 25.0),
        "bottleneck": (12.0, 1.0),
    }
    measured = lambda folder, arm, lr, seed: {
        share: ({"valid": wrong[arm][0] + (arm == "narrower") * seed * 2, "test": wrong[arm][1]}, 7)
        for share in (50, 75)
    }
    monkeypatch.setattr(study, "measured", measured)
    monkeypatch.setattr(study, "prepare", lambda arm, folder, seeds: None)
    monkeypatch.setattr(study, "tuned", lambda arm, folder: Tuning(({"lr": 0.01},), ((1.0,),), (100,), "error"))
    rows = list(study.pruning(study.BEST, (0, 1), "", {}))
    assert [row["error@75"] for row in rows] == [25.0, 20.0]


def test_shares_of_the_channels_are_whole():
    assert study.CHANNELS * 25 % 100 == 0
    assert [study.STEP * (i + 1) for i in range(3)] == [study.CHANNELS * share // 100 for share in study.SHARES]
    assert study.TUNING_SEED not in study.SEEDS
    assert len(study.SEEDS) == study.claim.scales["small"].seeds
    assert all(size % 250 == 0 for size in study.IMAGES.values())
