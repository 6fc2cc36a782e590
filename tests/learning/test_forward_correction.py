"""Noise-bounded losses, and the losses for noisy labels that they are compared with: closed forms and identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import entropy

import jaxstack
from jaxstack.core.errors import UserError
from jaxstack.learning import forward_correction as fc
from jaxstack.learning import noisy_labels as nl


def batch(classes=10, size=64, seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    return 2 * jax.random.normal(keys[0], (size, classes)), jax.random.randint(keys[1], (size,), 0, classes)


def test_floors_have_their_closed_forms():
    card = {0.1: 0.5448, 0.2: 0.9398, 0.4: 1.5519, 0.6: 1.9913, 0.8: 2.2582, 0.9: np.log(10)}
    for rate, value in card.items():
        assert float(fc.symmetric_floor(rate, 10)) == pytest.approx(value, abs=5e-5)
        exact = entropy([1 - rate] + [rate / 9] * 9)
        np.testing.assert_allclose(fc.symmetric_floor(rate, 10), exact, rtol=1e-6)
        np.testing.assert_allclose(fc.transition_floor(nl.symmetric(rate, 10)), exact, rtol=1e-5)
    hundred = {0.1: 0.7846, 0.2: 1.4194, 0.4: 2.5111, 0.6: 3.4301, 0.8: 4.1765}
    for rate, value in hundred.items():
        assert float(fc.symmetric_floor(rate, 100)) == pytest.approx(value, abs=5e-5)
    assert float(fc.symmetric_floor(0.0, 10)) == 0.0
    rising = np.asarray(fc.symmetric_floor(jnp.linspace(0, 0.9, 50), 10))
    assert (np.diff(rising) > 0).all()
    assert float(fc.transition_floor(nl.pair(0.4, 10))) == pytest.approx(0.6730, abs=5e-5)
    prior = jnp.asarray([0.5, 0.25, 0.25])
    t = jnp.asarray([[1.0, 0, 0], [0.5, 0.5, 0], [0, 0, 1.0]])
    assert float(fc.transition_floor(t, prior)) == pytest.approx(0.25 * np.log(2), rel=1e-6)


def test_the_floor_is_what_a_perfect_model_pays():
    t = nl.symmetric(0.4, 10)
    clean = jnp.arange(100_000) % 10
    noisy = nl.apply(jax.random.key(0), clean, t)
    logits = jnp.where(jax.nn.one_hot(clean, 10, dtype=bool), 0.0, -1e4)
    paid = np.asarray(nl.forward_ce(logits, noisy, jnp.log(t)), np.float64)
    assert abs(paid.mean() - float(fc.symmetric_floor(0.4, 10))) < 3 * paid.std() / np.sqrt(len(paid))


def test_the_generic_floor_agrees_where_it_is_known():
    t = nl.symmetric(0.4, 10)
    assert float(fc.generic_floor(nl.ce, t)) == pytest.approx(float(fc.symmetric_floor(0.4, 10)), abs=1e-4)
    # MAE is linear in p: all mass on the likeliest label
    assert float(fc.generic_floor(nl.mae, t)) == pytest.approx(2 * 0.4, abs=1e-3)
    grid = np.linspace(1e-3, 1 - 1e-3, 2001)
    q = 0.7
    risk = 0.6 * (1 - grid**q) / q + 0.4 * (1 - ((1 - grid) / 9) ** q) / q
    assert float(fc.generic_floor(nl.gce, t)) == pytest.approx(risk.min(), abs=1e-3)


def test_forward_correction_identities():
    logits, labels = batch()
    eye = jnp.eye(10)
    np.testing.assert_allclose(nl.forward_ce(logits, labels, jnp.log(eye)), nl.ce(logits, labels), rtol=1e-5, atol=1e-5)
    # an independent form in float64, with a T that is not symmetric
    t = np.asarray(nl.pair(0.3, 10), np.float64)
    p = np.exp(np.asarray(jax.nn.log_softmax(logits), np.float64))
    expected = -np.log((p @ t)[np.arange(64), labels])
    np.testing.assert_allclose(nl.forward_ce(logits, labels, jnp.log(nl.pair(0.3, 10))), expected, rtol=1e-5)
    # gradient at uniform p under symmetric noise: shrunk by 1 - C r / (C - 1)
    zero = jnp.zeros((1, 10))
    one = jnp.asarray([3])
    grads = [
        jax.grad(lambda z, f=f: f(z).sum())(zero)
        for f in (
            lambda z: nl.forward_ce(z, one, jnp.log(nl.symmetric(0.4, 10))),
            lambda z: nl.ce(z, one),
        )
    ]
    np.testing.assert_allclose(grads[0], (1 - 10 * 0.4 / 9) * grads[1], rtol=1e-5, atol=1e-7)
    # a sparse T and an impossible label stay finite
    grad = jax.grad(lambda z: nl.forward_ce(z, labels, jnp.log(nl.pair(0.45, 10))).sum())(100 * logits)
    assert np.isfinite(grad).all()


def test_backward_correction_is_unbiased_over_noisy_labels():
    logits, clean = batch()
    t = nl.pair(0.3, 10)
    inverse = jnp.linalg.inv(t)
    every = jnp.stack([nl.backward_ce(logits, jnp.full(64, k), inverse) for k in range(10)], 1)
    np.testing.assert_allclose((t[clean] * every).sum(1), nl.ce(logits, clean), rtol=1e-4, atol=1e-4)


def test_robust_losses_have_their_closed_forms():
    logits, labels = batch()
    p = np.asarray(jax.nn.softmax(logits), np.float64)
    own = p[np.arange(64), labels]
    one_hot = np.eye(10)[np.asarray(labels)]
    np.testing.assert_allclose(nl.mae(logits, labels), np.abs(one_hot - p).sum(1), rtol=1e-5)
    np.testing.assert_allclose(nl.gce(logits, labels), (1 - own**0.7) / 0.7, rtol=1e-5)
    np.testing.assert_allclose(nl.gce(logits, labels, 1e-4), -np.log(own), rtol=1e-3)
    np.testing.assert_allclose(nl.gce(logits, labels, 1.0), 1 - own, rtol=1e-4, atol=1e-6)
    reverse = -(p * np.where(one_hot > 0, 0.0, -4.0)).sum(1)
    np.testing.assert_allclose(nl.sce(logits, labels), -0.1 * np.log(own) + reverse, rtol=1e-4)
    normalised = np.log(own) / np.log(p).sum(1)
    np.testing.assert_allclose(nl.nce(logits, labels), normalised, rtol=1e-4)
    np.testing.assert_allclose(nl.nce_rce(logits, labels), normalised + reverse, rtol=1e-4)
    np.testing.assert_allclose(nl.nce_mae(logits, labels), normalised + 2 * (1 - own), rtol=1e-4)
    averages = nl.elr_averages(jnp.full((64, 10), 0.1), logits)
    np.testing.assert_allclose(averages, 0.07 + 0.3 * p, rtol=1e-5)
    expected = -np.log(own) + 3 * np.log(1 - (p * np.asarray(averages)).sum(1))
    np.testing.assert_allclose(nl.elr(logits, labels, averages), expected, rtol=1e-4, atol=1e-5)


def test_flooding_turns_the_gradient_round_below_the_floor():
    for value, flood, clip in ((1.0, -1.0, 0.0), (2.0, 1.0, 1.0)):
        at = lambda mode, value=value: jax.value_and_grad(lambda x: fc.bounded(x, 1.5, mode))(value)
        assert at("flood") == (2.0, flood)
        assert at("clip") == (max(value, 1.5), clip)
        assert at("none") == (value, 1.0)


def test_a_loss_is_a_noise_model():
    logits, labels = batch(5)
    probabilities = jnp.stack([jnp.exp(-fc.noise_model(nl.gce)(logits, jnp.full(64, k))) for k in range(5)], 1)
    np.testing.assert_allclose(probabilities.sum(1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(fc.noise_model(nl.ce)(logits, labels), nl.ce(logits, labels), rtol=1e-5, atol=1e-6)


def test_anchors_recover_a_transition_matrix():
    t = nl.pair(0.3, 4)
    clean = jnp.arange(400) % 4
    sure = jnp.where((jnp.arange(400) < 200)[:, None], jax.nn.one_hot(clean, 4), 0.25)
    np.testing.assert_allclose(fc.estimate_anchors(sure @ t), t, atol=1e-6)


def test_transition_matrices():
    for t in (nl.symmetric(0.3, 5), nl.pair(0.3, 5), nl.asymmetric(0.3, {4: 1}, 5)):
        np.testing.assert_allclose(t.sum(1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(nl.symmetric(0.5, 5, itself=True), nl.symmetric(0.4, 5), rtol=1e-6)
    t = np.asarray(nl.asymmetric(0.3, {4: 1}, 5))
    assert (t[4, 1], t[1, 1]) == (pytest.approx(0.3), 1.0)
    clean = jnp.repeat(jnp.arange(5), 4000)
    noisy = np.asarray(nl.apply(jax.random.key(1), clean, nl.pair(0.3, 5))).reshape(5, 4000)
    for y in range(5):
        assert set(noisy[y]) == {y, (y + 1) % 5}
        assert abs((noisy[y] != y).mean() - 0.3) < 4 * np.sqrt(0.21 / 4000)
    x = jax.random.normal(jax.random.key(2), (20_000, 6))
    other = np.asarray(nl.instance_dependent(jax.random.key(3), x, clean, 0.4, 5))
    assert abs((other != np.asarray(clean)).mean() - 0.4) < 0.02
    # what a label becomes depends on the input, not on a class alone
    flipped = other != np.asarray(clean)
    means = [np.asarray(x)[flipped & (other == k)].mean(0) for k in range(5)]
    assert np.linalg.norm(means[0] - means[1]) > 0.2


def test_forward_correction_recovers_the_clean_posterior():
    # logistic regression is the true model of two Gaussians: P(1 | x) = sigmoid(2 x)
    key, k_noise = jax.random.split(jax.random.key(0))
    clean = jnp.arange(50_000) % 2
    x = jax.random.normal(key, clean.shape) + (2.0 * clean - 1.0)
    t = nl.symmetric(0.3, 2)
    noisy = nl.apply(k_noise, clean, t)
    logits = lambda w: jnp.stack([jnp.zeros_like(x), w[0] + w[1] * x], -1)

    def fitted(loss):
        step = lambda w, _: (w - 2.0 * jax.grad(lambda w: loss(logits(w), noisy).mean())(w), None)
        w = jax.lax.scan(step, jnp.zeros(2), None, length=300)[0]
        grid = jnp.linspace(-3, 3, 61)
        return jax.nn.sigmoid(w[0] + w[1] * grid), jax.nn.sigmoid(2 * grid)

    corrected, truth = jax.jit(lambda: fitted(lambda z, y: nl.forward_ce(z, y, jnp.log(t))))()
    plain, _ = jax.jit(lambda: fitted(nl.ce))()
    assert np.abs(corrected - truth).max() < 0.05
    assert np.abs(plain - truth).max() > 0.15


def test_a_study_without_noise_is_the_same_with_a_floor_of_zero():
    data, keys = nl.prepared("digits", (0, 1), "symmetric", 0.0, 200, 100)
    setting = nl.Study("fce", hidden=(16,), epochs=2)
    run = lambda bound: jax.jit(jax.vmap(lambda k, d: nl.study(setting, k, d, jnp.eye(10), jnp.float32(0), bound)))(
        keys, data
    )
    plain, floored = run(None), run(lambda mean, floor: fc.bounded(mean, floor))
    for a, b in zip(plain, floored):
        np.testing.assert_array_equal(a, b)
    assert plain.test.shape == (2, 2)
    assert (plain.test[:, 1] > plain.test[:, 0]).all()


def test_the_learner_settles_at_its_floor_and_not_on_the_noise():
    given = dict(seeds=2, progress=False, eval_every=-1)
    options = dict(train_images=500, num_updates=800, hidden=(64,), assumed=0.4)
    floored = jaxstack.train("forward-correction", **options, **given)
    free = jaxstack.train("forward-correction", bound="none", **options, **given)
    late = lambda r: r.metrics[r.metrics.step > 700].groupby("seed")[["loss/train", "train/accuracy"]].mean().to_numpy()
    floor = float(fc.symmetric_floor(0.4, 10))
    assert (np.abs(late(floored)[:, 0] - floor) < 0.15).all()
    assert (late(free)[:, 0] < floor - 0.15).all()
    assert (late(free)[:, 1] > late(floored)[:, 1]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(loss="gce"), "bound='flood': expected none with loss=gce"),
        (dict(noise="none"), "noise='none': expected symmetric or pair, or assumed_noise and assumed"),
        (dict(assumed=1.5), "assumed=1.5: expected 0 to 1, or -1"),
        (dict(rate=-0.1), "rate=-0.1"),
        (dict(model="wrn"), "model='wrn': expected one of mlp"),
        (dict(data="cifar"), "unknown data set 'cifar'"),
        (dict(q=0.0), "q=0.0: expected a positive number"),
    ],
)
def test_wrong_options_of_noisy_labels_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        jaxstack.make_learner("forward-correction", **changes)


def test_unknown_noise_and_classes_are_named():
    with pytest.raises(UserError, match="unknown noise 'symetric': did you mean 'symmetric'"):
        nl.transition("symetric", 0.1, 10)
    with pytest.raises(UserError, match="found class 7, expected 0 to 4"):
        nl.asymmetric(0.1, {7: 1}, 5)
    with pytest.raises(UserError, match="digits: found 1797 images, expected more than"):
        nl.split("digits", 0, 1700, 100, 10)
