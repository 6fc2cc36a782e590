import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax

from jaxstack.core import losses, returns


def loop_gae(r, v, vn, term, done, gamma, lam):
    out = np.zeros_like(r)
    carry = 0.0
    for t in reversed(range(len(r))):
        delta = r[t] + gamma * (0.0 if term[t] else vn[t]) - v[t]
        carry = delta + gamma * lam * (0.0 if done[t] else carry)
        out[t] = carry
    return out


def episode(seed, n=40):
    rng = np.random.default_rng(seed)
    term = rng.random(n) < 0.1
    trunc = ~term & (rng.random(n) < 0.1)
    r, v, vn = rng.normal(size=(3, n)).astype(np.float32)
    return r, v, vn, term, term | trunc


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_gae_matches_the_definition_at_terminations_and_truncations(lam):
    r, v, vn, term, done = episode(0)
    adv, target = jax.jit(returns.gae)(*map(jnp.asarray, (r, v, vn, term, done)), 0.9, lam)
    expected = loop_gae(r, v, vn, term, done, 0.9, lam)
    np.testing.assert_allclose(adv, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(target, expected + v, rtol=1e-5, atol=1e-5)


def test_gae_by_hand():
    no = jnp.zeros(3, bool)
    adv, _ = returns.gae(jnp.ones(3), jnp.zeros(3), jnp.zeros(3), no, no, 0.5, 1.0)
    np.testing.assert_allclose(adv, [1.75, 1.5, 1.0])


def test_truncation_bootstraps_and_termination_does_not():
    args = jnp.ones(1), jnp.zeros(1), jnp.full(1, 10.0)
    cut, _ = returns.gae(*args, jnp.array([False]), jnp.array([True]), 0.9, 0.95)
    end, _ = returns.gae(*args, jnp.array([True]), jnp.array([True]), 0.9, 0.95)
    np.testing.assert_allclose([cut[0], end[0]], [10.0, 1.0])


def test_parity_with_rlax_inside_an_episode():
    r, v, _, _, _ = episode(1)
    no = jnp.zeros(len(r), bool)
    values = jnp.append(v, 0.3)
    discount = jnp.full(len(r), 0.9)
    adv, _ = returns.gae(r, v, values[1:], no, no, 0.9, 0.8)
    expected = rlax.truncated_generalized_advantage_estimation(r, discount, 0.8, values)
    np.testing.assert_allclose(adv, expected, rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(
        returns.lambda_returns(r, values[1:], no, no, 0.9, 0.8),
        rlax.lambda_returns(r, discount, values[1:], 0.8),
        rtol=2e-4,
        atol=1e-5,
    )
    log_rho = jnp.asarray(np.random.default_rng(2).normal(size=len(r)), jnp.float32)
    target, pg = returns.vtrace(r, v, values[1:], no, no, log_rho, 0.9)
    ref = rlax.vtrace_td_error_and_advantage(v, values[1:], r, discount, jnp.exp(log_rho))
    np.testing.assert_allclose(target, ref.errors + v, rtol=2e-4, atol=1e-4)
    np.testing.assert_allclose(pg, ref.pg_advantage, rtol=2e-4, atol=1e-4)


def test_lambda_returns_equal_gae_targets_over_episode_ends():
    r, v, vn, term, done = map(jnp.asarray, episode(3))
    # inside an episode the next value is the value of the next step
    vn = jnp.where(done, vn, jnp.append(v[1:], vn[-1]))
    _, target = returns.gae(r, v, vn, term, done, 0.9, 0.8)
    np.testing.assert_allclose(returns.lambda_returns(r, vn, term, done, 0.9, 0.8), target, rtol=1e-4, atol=1e-5)


def test_discounted_returns_stop_at_episode_ends():
    done = jnp.array([False, True, False])
    np.testing.assert_allclose(returns.discounted_returns(jnp.array([1.0, 2.0, 4.0]), done, 0.5), [2.0, 2.0, 4.0])


def test_losses_by_hand():
    np.testing.assert_allclose(losses.ppo_clip(jnp.log(2.0), 0.0, 1.0, 0.2), -1.2, rtol=1e-6)
    np.testing.assert_allclose(losses.ppo_clip(jnp.log(2.0), 0.0, -1.0, 0.2), 2.0, rtol=1e-6)
    np.testing.assert_allclose(losses.clipped_value(1.0, 0.0, 1.0, 0.2), 0.32, rtol=1e-6)
    np.testing.assert_allclose(losses.huber(jnp.array([0.5, -3.0])), [0.125, 2.5])
    x, w = jnp.array([1.0, 2.0, 100.0]), jnp.array([1.0, 1.0, 0.0])
    np.testing.assert_allclose(losses.masked_mean(x, w), 1.5)
    np.testing.assert_allclose(losses.masked_mean(x, jnp.zeros(3)), 0.0)
    np.testing.assert_allclose(losses.standardise(x, w)[:2], [-1.0, 1.0], rtol=1e-5)


def test_ppo_gradient_at_ratio_one_is_the_policy_gradient():
    adv = jnp.array([1.0, -2.0])
    grad = jax.grad(lambda lp: losses.ppo_clip(lp, jnp.zeros(2), adv, 0.2).sum())(jnp.zeros(2))
    np.testing.assert_allclose(grad, -adv)
