"""Noisy early stopping: risk identities, the choice of an epoch, and a learner that keeps the chosen weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxstack
from jaxstack.core.errors import UserError
from jaxstack.learning import noisy_early_stopping as nes
from jaxstack.learning import noisy_labels as nl

JOINT = jnp.asarray([[0.18, 0.10, 0.05], [0.02, 0.30, 0.02], [0.03, 0.05, 0.25]])


def test_noisy_risks_of_a_confusion_matrix():
    clean = 1.0 - float(jnp.trace(JOINT))
    assert clean == pytest.approx(0.27)
    assert float(nes.noisy_risk(JOINT, nl.symmetric(0.3, 3))) == pytest.approx(0.4485, abs=1e-6)
    assert float(nes.symmetric_risk(0.27, 0.3, 3)) == pytest.approx(0.4485, abs=1e-6)
    assert float(nes.noisy_risk(JOINT, nl.pair(0.3, 3))) == pytest.approx(0.4440, abs=1e-6)


def test_pair_noise_can_reverse_an_order():
    # all errors into the flip's target, against fewer errors elsewhere
    target = jnp.diag(jnp.full(4, 0.21875)) + 0.03125 * jnp.roll(jnp.eye(4), 1, axis=1)
    elsewhere = jnp.diag(jnp.full(4, 0.2275)) + 0.0225 * jnp.roll(jnp.eye(4), 2, axis=1)
    clean = [1.0 - float(jnp.trace(m)) for m in (target, elsewhere)]
    assert clean == pytest.approx([0.125, 0.09])
    noisy = [float(nes.noisy_risk(m, nl.pair(0.45, 4))) for m in (target, elsewhere)]
    assert noisy == pytest.approx([0.4625, 0.4995], abs=1e-6)


def test_noisy_accuracy_of_drawn_labels_is_the_affine_value():
    key, k_wrong, k_noise = jax.random.split(jax.random.key(0), 3)
    clean = jax.random.randint(key, (100_000,), 0, 10)
    wrong = jax.random.uniform(k_wrong, clean.shape) < 0.2
    predicted = jnp.where(wrong, (clean + 3) % 10, clean)
    risk = float((predicted != clean).mean())
    for rate in (0.4, 0.9):
        noisy = nl.apply(k_noise, clean, nl.symmetric(rate, 10))
        expected = float(nes.symmetric_risk(risk, rate, 10))
        found = float((predicted != noisy).mean())
        assert abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / 100_000)
    # at (C - 1) / C no classifier is told from another, beyond it the order turns round
    assert float(nes.symmetric_risk(0.1, 0.9, 10)) == pytest.approx(float(nes.symmetric_risk(0.5, 0.9, 10)))
    assert float(nes.symmetric_risk(0.1, 0.95, 10)) > float(nes.symmetric_risk(0.5, 0.95, 10))


def test_examples_needed_grow_with_the_noise():
    base = nes.examples_needed(0.02, 0.0, 10, 0.1)
    assert base == pytest.approx(4 * 0.1 / 0.02**2)
    assert nes.examples_needed(0.02, 0.6, 10, 0.1) / base == pytest.approx(9.0)
    assert nes.examples_needed(0.02, 0.8, 10, 0.1) / base == pytest.approx(81.0)


def test_the_first_maximiser_is_kept():
    accuracies = jnp.asarray([0.1, 0.5, 0.4, 0.5])
    assert int(nes.early_stop(accuracies)) == 1
    params = {"w": jnp.arange(4.0)}
    each = lambda s, x: (nes.look(s, {"w": x[0]}, x[1]), s.waited)
    last, _ = jax.jit(lambda: jax.lax.scan(each, nes.start({"w": jnp.float32(9)}), (params["w"], accuracies)))()
    assert (float(last.params["w"]), int(last.step), float(last.best), int(last.waited)) == (1.0, 1, 0.5, 2)


def test_the_learner_evaluates_the_weights_of_the_best_look():
    options = dict(train_images=300, hidden=(128,), rate=0.5, lr=0.3, num_updates=600)
    learner = jaxstack.make_learner("noisy-early-stopping", **options)
    result = jaxstack.train(learner, progress=False, seeds=2)
    x, y = nl.parts(learner.config)["valid"]
    test_x, test_y = nl.parts(learner.config)["test"]
    model = nl.model_of(learner.config)
    score = lambda v, x, y: float((model.apply(v, jnp.asarray(x)).argmax(-1) == y).mean())
    for i in range(2):
        s = jax.tree.map(lambda a, i=i: a[i], result.state)
        assert float(s.best) == pytest.approx(score(s.ema, x, y))
        last = {"params": s.params}
        assert score(last, x, y) < float(s.best)
        # chosen by noisy labels, better on clean ones
        assert score(s.ema, test_x, test_y) > score(last, test_x, test_y) + 0.05
        final = result.metrics[(result.metrics.step == 600) & (result.metrics.seed == i)]
        assert float(final["eval/accuracy"].iloc[0]) == pytest.approx(score(s.ema, test_x, test_y))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(noise="pair", rate=0.5), "rate=0.5: expected less than 0.5 with noise=pair"),
        (dict(loss="fce", noise="none"), "noise='none': expected symmetric or pair"),
        (dict(looks_every=-1), "looks_every=-1"),
    ],
)
def test_wrong_options_of_early_stopping_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        jaxstack.make_learner("noisy-early-stopping", **changes)


def test_too_many_held_out_examples_are_named():
    learner = jaxstack.make_learner("noisy-early-stopping", held_out=5000)
    with pytest.raises(UserError, match="held_out=5000: expected at most the 269 images"):
        learner.source(learner.config)
