import jax
import numpy as np
import pytest

from jaxstack.claims import CLAIMS
from jaxstack.claims import kalman_linear_attention as kla
from jaxstack.sequence import tasks, trainer
from jaxstack.sequence.model import count_parameters


def test_the_filter_knows_its_error_with_process_noise_and_not_without():
    run = kla.calibration(sequences=32, length=64).run
    coverage = {arm: [r["coverage"] for r in run(arm, (0, 1))] for arm in (kla.KLA, kla.NO_NOISE)}
    assert coverage[kla.KLA] == pytest.approx([0.9, 0.9], abs=0.03)
    assert max(coverage[kla.NO_NOISE]) < 0.5


@pytest.fixture
def brief(monkeypatch):
    """Two updates of four sequences, then a test on four."""
    monkeypatch.setattr(kla, "UPDATES", 2)
    monkeypatch.setattr(kla, "ROWS", 4)
    return dict(features=8, depth=1, batch_size=4, num_updates=2, examples=4)


def test_an_arm_is_tuned_on_seeds_of_its_own_and_tested_at_all_lengths(brief):
    experiment = kla.trained("parity", "parity", (kla.NO_NOISE,), (4, 8), **brief)
    tuning = experiment.tune(kla.NO_NOISE)
    assert (tuning.problem(), tuning.steps, tuning.largest) == (None, 2, True)
    assert [s["lr"] for s in tuning.settings] == list(kla.RATES)
    rows = list(experiment.run(kla.NO_NOISE, tuple(range(6)), tuned=tuning.chosen))
    assert [r["seed"] for r in rows] == list(range(6))
    assert all(0 < r["accuracy@8"] < 1 and r["accuracy"] == r["accuracy@4"] for r in rows)
    again = list(experiment.run(kla.NO_NOISE, tuple(range(6)), tuned=tuning.chosen))
    assert again == rows
    config = trainer.Config(task="parity", mixers=("kla",), mixer_args=kla.ARMS[kla.NO_NOISE][1], features=8, depth=1)
    params = jax.eval_shape(trainer.sequence(config).init, jax.random.key(0)).params
    assert {r["parameters"] for r in rows} == {count_parameters(params)}


def test_tracking_is_measured_against_the_optimal_filter(brief):
    experiment = kla.trained("tracking", "tracking", (kla.KLA,), (8, 32), mlp_ratio=0.0, **brief)
    rows = list(experiment.run(kla.KLA, (0, 1), tuned={"lr": 1e-3}))
    assert all(r["mse / optimum"] > 1 and r["mse / optimum at 4x length"] > 1 for r in rows)


def test_measures_of_a_shorter_length_are_those_of_the_first_positions(brief):
    """Of a causal model: the same sequences cut to that length give the same number."""
    config = trainer.sequence(task="tracking", task_args=("length=8",), features=8, depth=1, mixers=("mingru",)).config
    init, _, measure = kla._programs(config, (3, 8))
    states = init(np.arange(2, dtype=np.uint32), np.full(2, 1e-3, np.float32))
    batches = kla._sampler(tasks.make("tracking", length=8), 4, 2, True)(np.arange(2, dtype=np.uint32), 0)
    cut = jax.tree.map(lambda x: x[:, :, :, :3], batches)
    np.testing.assert_allclose(measure(states, cut)[:, 0], measure(states, batches)[:, 0], rtol=1e-5)
    assert (np.asarray(measure(states, batches))[:, 0] != np.asarray(measure(states, batches))[:, 1]).all()


def test_seeds_of_training_tuning_and_test_data_differ():
    task = tasks.make("parity", length=16)
    seeds = np.asarray([0, 1, *kla.TUNING_SEEDS], np.uint32)
    parts = [kla._sampler(task, 4, 2, test)(seeds, part).tokens for test, part in ((False, 0), (False, 1), (True, 0))]
    drawn = np.asarray(parts).reshape(-1, 4 * 16)
    assert len(np.unique(drawn, axis=0)) == len(drawn) == 3 * 4 * 2
    assert not set(range(CLAIMS.load("kalman-linear-attention").scales["small"].seeds)) & set(kla.TUNING_SEEDS)


def test_arms_have_equal_state_sizes():
    def size(mixer, options):
        config = trainer.Config(task="mqar", mixers=(mixer,), mixer_args=options, features=32, depth=1)
        state = trainer.make_model(config, trainer.make_task(config)).init_state(1)[0]
        leaves = jax.tree_util.tree_leaves_with_path(state)
        # the convolution's window and KLA's second number per state, its precision, do not count
        return sum(x.size for path, x in leaves if not {"conv", "precision"} & {getattr(p, "name", "") for p in path})

    sizes = {arm: size(*how) for arm, how in kla.ARMS.items() if how[0] != "attention"}
    assert set(sizes.values()) <= {256, 288}  # linear attention carries its normaliser
    assert sizes[kla.KLA] == sizes["GLA"] == sizes["Mamba"] == 256


def test_every_mixer_is_in_every_experiment_and_a_rival_of_kla():
    claim = CLAIMS.load("kalman-linear-attention")
    known = {mixer for mixer, _ in kla.ARMS.values()}
    assert known == set(trainer.MIXERS)
    for scale in claim.scales.values():
        for experiment in scale.experiments:
            if experiment.name == "calibration":  # of the variance, which KLA alone has
                continue
            assert {kla.ARMS[arm][0] for arm in experiment.arms} == known
            assert experiment.tune is not None
            deciding = [c for c in scale.checks if c.experiment == experiment.name and not c.report]
            assert any(c.arm == kla.KLA and set(c.rivals) == set(kla.OTHERS) for c in deciding)
