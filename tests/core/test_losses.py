import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rlax

from jaxstack.core import losses


def test_losses_by_hand():
    np.testing.assert_allclose(losses.ppo_clip(jnp.log(2.0), 0.0, 1.0, 0.2), -1.2, rtol=1e-6)
    np.testing.assert_allclose(losses.ppo_clip(jnp.log(2.0), 0.0, -1.0, 0.2), 2.0, rtol=1e-6)
    np.testing.assert_allclose(losses.clipped_value(1.0, 0.0, 1.0, 0.2), 0.32, rtol=1e-6)
    np.testing.assert_allclose(losses.huber(jnp.array([0.5, -3.0])), [0.125, 2.5])
    x, w = jnp.array([1.0, 2.0, 100.0]), jnp.array([1.0, 1.0, 0.0])
    np.testing.assert_allclose(losses.masked_mean(x, w), 1.5)
    np.testing.assert_allclose(losses.masked_mean(x, jnp.zeros(3)), 0.0)
    for weight in (w, jnp.zeros(3)):
        means = losses.masked_means({"x": x, "y": -2.0 * x}, weight)
        assert list(means) == ["x", "y"]
        np.testing.assert_allclose([*means.values()], jnp.array([1.0, -2.0]) * losses.masked_mean(x, weight))
    np.testing.assert_allclose(losses.standardise(x, w)[:2], [-1.0, 1.0], rtol=1e-5)


def test_ppo_gradient_at_ratio_one_is_the_policy_gradient():
    adv = jnp.array([1.0, -2.0])
    grad = jax.grad(lambda lp: losses.ppo_clip(lp, jnp.zeros(2), adv, 0.2).sum())(jnp.zeros(2))
    np.testing.assert_allclose(grad, -adv)


@pytest.mark.parametrize(
    ("ratio", "advantage", "flows"),
    [(1.5, 1.0, False), (1.5, -1.0, True), (0.5, 1.0, True), (0.5, -1.0, False), (1.1, 1.0, True), (0.9, -1.0, True)],
)
def test_ppo_gradient_stops_where_the_step_has_gone_far_enough(ratio, advantage, flows):
    grad = jax.grad(losses.ppo_clip)(jnp.log(ratio), 0.0, advantage, 0.2)
    np.testing.assert_allclose(grad, -ratio * advantage if flows else 0.0, rtol=1e-5)


def test_ppo_parity_with_rlax():
    rng = np.random.default_rng(0)
    logp, adv = jnp.asarray(rng.normal(0, 0.3, 50), jnp.float32), jnp.asarray(rng.normal(size=50), jnp.float32)
    ours = losses.ppo_clip(logp, jnp.zeros(50), adv, 0.2).mean()
    np.testing.assert_allclose(ours, rlax.clipped_surrogate_pg_loss(jnp.exp(logp), adv, 0.2), rtol=1e-5)


def test_clipped_value_takes_the_worse_of_two_errors():
    value, old, target = jnp.array([0.05, 1.0, 1.0]), jnp.zeros(3), jnp.array([1.0, 2.0, 0.1])
    expected = [0.5 * 0.95**2, 0.5 * 1.8**2, 0.5 * 0.9**2]
    np.testing.assert_allclose(losses.clipped_value(value, old, target, 0.2), expected, rtol=1e-5)
    grad = jax.vmap(jax.grad(losses.clipped_value), (0, 0, 0, None))(value, old, target, 0.2)
    np.testing.assert_allclose(grad, [-0.95, 0.0, 0.9], atol=1e-6)
    np.testing.assert_allclose(losses.clipped_value(value, old, target, jnp.inf), 0.5 * (value - target) ** 2)


@pytest.mark.parametrize("delta", [0.5, 1.0, 3.0])
def test_huber_parity_with_optax(delta):
    error = jnp.linspace(-5, 5, 41)
    np.testing.assert_allclose(losses.huber(error, delta), optax.losses.huber_loss(error, delta=delta), rtol=1e-6)


def test_weights_broadcast_and_leave_samples_out_of_the_gradient():
    x, w = jnp.arange(6.0).reshape(2, 3), jnp.array([[1.0], [0.0]])
    np.testing.assert_allclose(losses.masked_mean(x, w), 1.0)
    np.testing.assert_allclose(jax.grad(losses.masked_mean)(x, w), [[1 / 3] * 3, [0.0] * 3], rtol=1e-6)


def test_standardise_has_mean_zero_and_deviation_one_over_what_counts():
    rng = np.random.default_rng(1)
    x, w = rng.normal(5, 3, (40, 6)).astype(np.float32), rng.random((40, 6)) < 0.5
    out = np.asarray(jax.jit(losses.standardise)(x, w))
    np.testing.assert_allclose(out[w].mean(), 0.0, atol=1e-5)
    np.testing.assert_allclose(out[w].std(), 1.0, rtol=1e-5)
    np.testing.assert_allclose(out, (x - x[w].mean()) / x[w].std(), rtol=1e-4, atol=1e-5)
    same = losses.standardise(jnp.full(4, 3.0), jnp.ones(4))
    np.testing.assert_array_equal(same, 0.0)


def test_groups_of_agents_have_moments_of_their_own():
    rng = np.random.default_rng(3)
    x, w, groups = rng.normal(5, 3, (40, 6, 4)).astype(np.float32), rng.random((40, 6, 4)) < 0.5, (0, 1, 0, 2)
    means = losses.masked_means({"x": x, "y": 2.0 * x}, w, groups)
    out = jax.jit(losses.standardise, static_argnames="groups")(x, w, groups=groups)
    left = []
    for g in range(3):
        own = np.asarray(groups) == g
        part, keep = x[:, :, own], w[:, :, own]
        assert float(means["x"][g]) == pytest.approx(part[keep].mean(), rel=1e-5)
        assert float(means["y"][g]) == pytest.approx(2 * part[keep].mean(), rel=1e-5)
        want = losses.standardise(jnp.asarray(part), jnp.asarray(keep))
        np.testing.assert_allclose(out[:, :, own], want, rtol=1e-4, atol=1e-5)
        left += [1 - np.var(0.5 * part[keep]) / np.var(part[keep])] * own.sum()
    np.testing.assert_allclose(losses.explained_variance(0.5 * x, x, w, groups), np.mean(left), rtol=1e-4)
    grad = jax.grad(lambda x: losses.masked_means({"x": x}, w, groups)["x"].sum())(x)
    np.testing.assert_allclose(grad[:, :, 1], w[:, :, 1] / w[:, :, 1].sum(), rtol=1e-5)
    bad = losses.standardise(jnp.asarray(x).at[:, :, 1].set(jnp.nan), w, groups=groups)
    np.testing.assert_array_equal(bad[:, :, ::2], out[:, :, ::2])
