from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from jaxstack.core.errors import UserError
from jaxstack.envs.base import Box, Discrete, MultiDiscrete
from jaxstack.nn.distributions import Actions, actions_of

RNG = np.random.default_rng(0)
RAW = RNG.normal(size=(5, 3, 4)).astype(np.float32)


def spec(space, sizes=()):
    return SimpleNamespace(action_space=space, action_sizes=sizes)


def test_actions_are_read_from_the_space():
    assert actions_of(spec(Discrete(5))) == Actions("discrete", (5,))
    assert actions_of(spec(MultiDiscrete((2, 3)))) == Actions("multi_discrete", (2, 3))
    assert actions_of(spec(Box((4,)))) == Actions("continuous", (4,))
    assert actions_of(spec(Discrete(3), (3, 3))).valid is None
    assert actions_of(spec(Discrete(3), (3, 2))).valid == ((True, True, True), (True, True, False))
    assert [a.params for a in (Actions("discrete", (5,)), Actions("multi_discrete", (2, 3)))] == [5, 5]


def test_categorical_equals_scipy():
    dist = Actions("discrete", (4,)).distribution(jnp.asarray(RAW), None)
    action = dist.sample(jax.random.key(0))
    assert action.shape == (5, 3)
    assert action.dtype == jnp.int32
    logp = scipy.special.log_softmax(RAW, -1)
    np.testing.assert_allclose(
        dist.log_prob(action), np.take_along_axis(logp, np.asarray(action)[..., None], -1)[..., 0], atol=1e-6
    )
    np.testing.assert_allclose(dist.entropy(), scipy.stats.entropy(np.exp(logp), axis=-1), atol=1e-6)
    np.testing.assert_array_equal(dist.mode(), RAW.argmax(-1))


def test_samples_follow_the_probabilities():
    dist = Actions("discrete", (4,)).distribution(jnp.broadcast_to(RAW[0, 0], (20000, 1, 4)), None)
    share = np.bincount(np.asarray(dist.sample(jax.random.key(1))).ravel(), minlength=4) / 20000
    np.testing.assert_allclose(share, scipy.special.softmax(RAW[0, 0]), atol=0.015)


def test_masks_leave_illegal_actions_out():
    mask = np.ones((5, 3, 4), bool)
    mask[..., 1] = False
    mask[0, 0] = [False, False, True, False]
    dist = Actions("discrete", (4,)).distribution(jnp.asarray(RAW), None, jnp.asarray(mask))
    p = np.where(mask, scipy.special.softmax(np.where(mask, RAW, -np.inf), -1), 0.0)
    np.testing.assert_allclose(dist.entropy(), scipy.stats.entropy(p, axis=-1), atol=1e-6)
    np.testing.assert_allclose(dist.log_prob(dist.mode()), np.log(p.max(-1)), atol=1e-6)
    samples = jax.vmap(dist.sample)(jax.random.split(jax.random.key(0), 200))
    assert np.take_along_axis(np.broadcast_to(mask, (200, 5, 3, 4)), np.asarray(samples)[..., None], -1).all()


@pytest.mark.parametrize("row", [[True, True, False, True], [False, True, False, False], [False] * 4])
def test_gradients_stay_finite_under_masks(row):
    actions = Actions("discrete", (4,))
    mask = jnp.broadcast_to(jnp.asarray(row), (5, 3, 4))

    def f(raw):
        dist = actions.distribution(raw, None, mask)
        return (dist.log_prob(dist.mode()) + dist.entropy()).sum()

    grad = jax.grad(f)(jnp.asarray(RAW))
    assert np.isfinite(grad).all()
    assert not np.any(np.asarray(grad)[..., ~np.asarray(row)])


def test_padded_actions_are_masked_without_an_environment_mask():
    actions = Actions("discrete", (4,), ((True,) * 4, (True, True, False, False), (True, False, False, False)))
    dist = actions.distribution(jnp.zeros((5, 3, 4)), None)
    np.testing.assert_allclose(dist.entropy()[0], np.log([4, 2, 1]), atol=1e-6)


def test_multi_discrete_is_a_product():
    raw = jnp.asarray(RNG.normal(size=(5, 3, 5)), jnp.float32)
    dist = Actions("multi_discrete", (2, 3)).distribution(raw, None)
    action = dist.sample(jax.random.key(0))
    assert action.shape == (5, 3, 2)
    parts = [scipy.special.log_softmax(np.asarray(p), -1) for p in np.split(np.asarray(raw), [2], -1)]
    logp = sum(np.take_along_axis(p, np.asarray(action)[..., i, None], -1)[..., 0] for i, p in enumerate(parts))
    np.testing.assert_allclose(dist.log_prob(action), logp, atol=1e-6)
    np.testing.assert_allclose(dist.entropy(), sum(scipy.stats.entropy(np.exp(p), axis=-1) for p in parts), atol=1e-6)
    np.testing.assert_array_equal(dist.mode(), np.stack([p.argmax(-1) for p in parts], -1))


def test_the_parts_of_a_multi_discrete_sample_are_independent():
    dist = Actions("multi_discrete", (2, 2)).distribution(jnp.zeros((4000, 1, 4)), None)
    a, b = np.asarray(dist.sample(jax.random.key(0)))[:, 0].T
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.06


@pytest.mark.parametrize("shape", [(4,), (3, 4)])
def test_normal_equals_scipy(shape):
    log_std = RNG.normal(size=shape).astype(np.float32)
    dist = Actions("continuous", (4,)).distribution(jnp.asarray(RAW), jnp.asarray(log_std))
    action = dist.sample(jax.random.key(0))
    reference = scipy.stats.norm(RAW, np.broadcast_to(np.exp(log_std), RAW.shape))
    np.testing.assert_allclose(dist.log_prob(action), reference.logpdf(action).sum(-1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dist.entropy(), reference.entropy().sum(-1), rtol=1e-5)
    np.testing.assert_array_equal(dist.mode(), RAW)


def test_unequal_action_dimensions_leave_padding_out():
    valid = ((True,) * 4, (True, True, False, False), (False, True, False, False))
    dist = Actions("continuous", (4,), valid).distribution(jnp.asarray(RAW), jnp.zeros(4))
    action = dist.sample(jax.random.key(0))
    real = np.broadcast_to(np.asarray(valid), action.shape)
    assert not np.any(np.asarray(action)[~real])
    assert not np.any(np.asarray(dist.mode())[~real])
    logp = np.where(real, scipy.stats.norm(RAW, 1).logpdf(action), 0.0).sum(-1)
    np.testing.assert_allclose(dist.log_prob(action), logp, atol=1e-5)
    np.testing.assert_allclose(dist.entropy()[0], np.array([4, 2, 1]) * 0.5 * np.log(2 * np.pi * np.e), rtol=1e-5)
    grad = jax.grad(
        lambda raw: Actions("continuous", (4,), valid).distribution(raw, jnp.zeros(4)).log_prob(action).sum()
    )(jnp.asarray(RAW))
    assert np.isfinite(grad).all()
    assert not np.any(np.asarray(grad)[~real])


def test_continuous_actions_need_a_deviation():
    with pytest.raises(UserError, match="log_std"):
        Actions("continuous", (4,)).distribution(jnp.asarray(RAW), None)


@pytest.mark.parametrize("masked", [False, True])
def test_derivatives_equal_those_of_log_softmax(masked):
    mask = jnp.array([True, not masked, True, True])
    action = jnp.array(RNG.choice([0, 2, 3], size=(5, 3)))
    weight = jnp.asarray(RNG.normal(size=(5, 3)), jnp.float32)

    def of_dist(x):
        dist = Actions("discrete", (4,)).distribution(x, None, mask)
        return (weight * jnp.exp(dist.log_prob(action)) + 0.3 * weight * dist.entropy() ** 2).sum()

    def by_hand(x):
        logp = jax.nn.log_softmax(jnp.where(mask, x, -1e9))
        chosen = jnp.take_along_axis(logp, action[..., None], -1)[..., 0]
        entropy = -jnp.where(mask, jnp.exp(logp) * logp, 0.0).sum(-1)
        return (weight * jnp.exp(chosen) + 0.3 * weight * entropy**2).sum()

    x = jnp.asarray(RAW)
    direction = jnp.asarray(RNG.normal(size=RAW.shape), jnp.float32)
    for derive in (jax.grad, lambda f: jax.grad(lambda x: jax.jvp(f, (x,), (direction,))[1])):
        np.testing.assert_allclose(derive(of_dist)(x), derive(by_hand)(x), atol=2e-6)
