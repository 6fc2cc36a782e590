import jax
import pytest

from jaxstack.claims import kalman_linear_attention as kla
from jaxstack.sequence import trainer


def test_the_filter_knows_its_error_with_process_noise_and_not_without():
    run = kla.calibration(sequences=32, length=64).run
    coverage = {arm: [r["coverage"] for r in run(arm, (0, 1))] for arm in (kla.KLA, kla.NO_NOISE)}
    assert coverage[kla.KLA] == pytest.approx([0.9, 0.9], abs=0.03)
    assert max(coverage[kla.NO_NOISE]) < 0.5


def test_tracking_is_measured_against_the_optimal_filter():
    rows = list(kla.tracking(2, (kla.KLA,), length=8, longer=16, examples=32).run(kla.KLA, (0, 1)))
    assert [r["seed"] for r in rows] == [0, 1]
    assert all(r["mse / optimum"] > 1 and r["mse / optimum at 4x length"] > 1 for r in rows)


def test_classification_gives_accuracies_at_both_lengths():
    options = dict(features=8, depth=1, batch_size=4, num_updates=2, eval_examples=32)
    experiment = kla.classified("parity", "parity", ("length=4",), (kla.NO_NOISE,), longer=(8,), **options)
    rows = list(experiment.run(kla.NO_NOISE, (0, 1)))
    assert all(0 < r["accuracy@8"] < 1 and r["accuracy"] == r["accuracy@4"] for r in rows)


def test_arms_have_equal_state_sizes():
    def size(mixer, options):
        config = trainer.Config(task="mqar", mixers=(mixer,), mixer_args=options, features=32, depth=1)
        state = trainer.make_model(config, trainer.make_task(config)).init_state(1)[0]
        leaves = jax.tree_util.tree_leaves_with_path(state)
        # the convolution's window and KLA's second number a state, its precision, do not count
        return sum(x.size for path, x in leaves if not {"conv", "precision"} & {getattr(p, "name", "") for p in path})

    sizes = {arm: size(*how) for arm, how in kla.ARMS.items() if how[0] != "attention"}
    assert set(sizes.values()) <= {256, 288}  # linear attention carries its normaliser
    assert sizes[kla.KLA] == sizes["GLA"] == sizes["Mamba"] == 256
