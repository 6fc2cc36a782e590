"""The claim of separable layers: sizes that favour the rival, choices by validation images, arms that differ in one
thing."""

import math

import numpy as np
import pytest

from jaxstack.claims import separable_layers as study
from jaxstack.claims.harness import Tuning
from jaxstack.claims.separable_layers import Wrong
from jaxstack.nn import structured


def weights(net):
    """Numbers of the structured maps, depthwise kernels not among them."""
    shapes = (structured.param_shapes(net.pointwise, shape, net.size) for shape in net.conv_shapes())
    return sum(math.prod(s) for each in shapes for s in each.values())


@pytest.mark.parametrize(("size", "share"), [("12%", 0.12), ("25%", 0.25)])
def test_no_map_has_more_parameters_than_the_narrower_network(size, share):
    dense, rival = weights(study.DENSE), study.net_of(study.NARROWER, size)
    assert rival.pointwise == "dense"
    for name in study.MAPS:
        net = study.net_of(name, size)
        assert 0.9 * rival.param_count(1) < net.param_count(1) <= rival.param_count(1)
        # shuffle has fewer depthwise kernels, in the middle, so its maps may be larger
        if name != "shuffle":
            assert 0.9 * share < weights(net) / dense < 1.1 * share


@pytest.fixture
def runs(monkeypatch):
    """What is trained is written down; errors are 10 and the seed, less with the teacher."""
    found = []

    def train(given, folder):
        found.extend(given)
        return [Wrong(20.0 + run.seed + len(run.arm), 10.0 + run.seed - run.transfer) for run in given]

    monkeypatch.setattr(study, "train", train)
    monkeypatch.setattr(study, "taught", lambda folder, seed: ((), Wrong(1.0, 2.0)))
    tuning = lambda arm, transfer, folder: Tuning(({"lr": 0.1 if transfer else 0.2},), ((1.0,),), (100,), "error")
    monkeypatch.setattr(study, "tuned", tuning)
    return found


def test_arms_of_weight_decay_differ_in_its_scale_alone(runs):
    arms = {kind: list(study.decay(f"shuffle, {kind}", (0, 1), "")) for kind in ("scaled", "plain")}
    assert arms["scaled"] == arms["plain"] == [{"seed": 0, "error": 9.0}, {"seed": 1, "error": 10.0}]
    scaled, plain = runs[:2], runs[2:]
    assert [run._replace(scaled=False) for run in scaled] == plain
    assert all(run.scaled and run.decay == 5e-3 and run.size == "12%" for run in scaled)


def test_arms_of_transfer_differ_in_the_teacher_and_their_own_rate(runs):
    taught, alone = (list(study.transfer(f"{study.ALL}, {k}", (0, 1), "", {})) for k in ("taught", "alone"))
    assert taught == [{"seed": 0, "error": 9.0}, {"seed": 1, "error": 10.0}]
    assert alone == [{"seed": 0, "error": 10.0}, {"seed": 1, "error": 11.0}]
    half = len(runs) // 2
    assert [run._replace(transfer=False, lr=0.2) for run in runs[:half]] == runs[half:]
    assert {run.arm for run in runs} == set(study.MAPS)
    assert study.tune_transfer(f"{study.ALL}, alone", "") is None


def test_the_second_best_map_is_chosen_by_validation_images(runs):
    rows = list(study.maps(study.SECOND, (0, 1), "", {}))
    assert [row["error at 12%"] for row in rows] == [9.0, 10.0]
    each = {name: {0: {"12%": Wrong(valid, 99.0)}} for name, valid in zip(study.MAPS, (5.0, 3.0, 9.0, 4.0, 8.0, 7.0))}
    assert study.second(each, "12%") == "tensor train"
    row = next(study.maps("hashed", (3,), "", {"lr": 0.1}))
    net = study.net_of("hashed", "25%")
    assert row[f"test error, %@{net.param_count(1)}"] == row["error at 25%"] == 12.0
    dense = next(study.maps("dense", (3,), "", {"lr": 0.1}))
    assert (dense["error"], dense["teacher's error"]) == (12.0, 2.0)


def test_runs_see_epochs_and_parts_are_whole_groups():
    order = study.rows(3)
    assert order.shape == (study.UPDATES, study.BATCH)
    epoch = order[: study.PARTS["train"] // study.BATCH].ravel()
    assert len(np.unique(epoch)) == len(epoch)
    assert (
        study.PARTS["valid"] % study.GROUP
        == study.PARTS["test"] % study.GROUP
        == study.PARTS["train"] % study.GROUP
        == 0
    )
    assert study.claim.scales["small"].seeds <= study.TUNING_SEED
    assert study.map_sides() == (12, 6, 3)
