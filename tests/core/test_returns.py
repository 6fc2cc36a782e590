import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax

from jaxstack.core import returns
from jaxstack.core.errors import UserError


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


def loop_n_step(r, vn, term, done, gamma, n):
    out = np.zeros_like(r)
    for t in range(len(r)):
        for k in range(n):
            out[t] += gamma**k * r[t + k]
            if done[t + k] or k == n - 1 or t + k == len(r) - 1:
                out[t] += gamma ** (k + 1) * (0.0 if term[t + k] else vn[t + k])
                break
    return out


@pytest.mark.parametrize("n", [1, 3, 100])
def test_n_step_returns_match_the_definition(n):
    r, _, vn, term, done = episode(4)
    assert term.any()
    assert (done & ~term).any()
    ours = jax.jit(returns.n_step_returns, static_argnums=5)(*map(jnp.asarray, (r, vn, term, done)), 0.9, n)
    np.testing.assert_allclose(ours, loop_n_step(r, vn, term, done, 0.9, n), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="n=0"):
        returns.n_step_returns(*map(jnp.asarray, (r, vn, term, done)), 0.9, 0)


def test_n_step_parity_with_rlax_inside_an_episode():
    r, v, *_ = episode(5)
    no = jnp.zeros(len(r), bool)
    expected = rlax.n_step_bootstrapped_returns(jnp.asarray(r), jnp.full(len(r), 0.9), jnp.asarray(v), 4)
    np.testing.assert_allclose(returns.n_step_returns(r, v, no, no, 0.9, 4), expected, rtol=1e-4, atol=1e-5)


def test_limits_of_lambda():
    """0: one-step returns; 1: all rewards to the end and the value after it."""
    r, v, vn, term, done = map(jnp.asarray, episode(6))
    one = returns.lambda_returns(r, vn, term, done, 0.9, 0.0)
    np.testing.assert_allclose(one, returns.n_step_returns(r, vn, term, done, 0.9, 1), rtol=1e-5, atol=1e-6)
    every = returns.lambda_returns(r, vn, term, done, 0.9, 1.0)
    np.testing.assert_allclose(every, returns.n_step_returns(r, vn, term, done, 0.9, len(r)), rtol=1e-4, atol=1e-5)
    ends = jnp.zeros_like(done).at[-1].set(True)
    alone = returns.lambda_returns(r, jnp.zeros_like(v), ends, ends, 0.9, 1.0)
    np.testing.assert_allclose(alone, returns.discounted_returns(r, ends, 0.9), rtol=1e-5, atol=1e-5)


def loop_vtrace(r, v, vn, term, done, rho, gamma, clip_rho, clip_c):
    target, advantage = np.zeros_like(r), np.zeros_like(r)
    carry = 0.0
    for t in reversed(range(len(r))):
        after = 0.0 if term[t] else vn[t]
        delta = min(rho[t], clip_rho) * (r[t] + gamma * after - v[t])
        carry = delta + (0.0 if done[t] else gamma * min(rho[t], clip_c) * carry)
        target[t] = v[t] + carry
        follows = after if done[t] or t == len(r) - 1 else target[t + 1]
        advantage[t] = min(rho[t], clip_rho) * (r[t] + gamma * follows - v[t])
    return target, advantage


def test_vtrace_matches_the_definition_over_episode_ends():
    r, v, vn, term, done = episode(7)
    log_rho = np.random.default_rng(8).normal(size=len(r)).astype(np.float32)
    ours = returns.vtrace(*map(jnp.asarray, (r, v, vn, term, done, log_rho)), 0.9, clip_rho=1.5, clip_c=0.7)
    for a, b in zip(ours, loop_vtrace(r, v, vn, term, done, np.exp(log_rho), 0.9, 1.5, 0.7)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_vtrace_on_policy_is_the_lambda_return_at_one():
    r, v, vn, term, done = map(jnp.asarray, episode(9))
    vn = jnp.where(done, vn, jnp.append(v[1:], vn[-1]))
    target, _ = returns.vtrace(r, v, vn, term, done, jnp.zeros_like(r), 0.9)
    np.testing.assert_allclose(target, returns.lambda_returns(r, vn, term, done, 0.9, 1.0), rtol=1e-4, atol=1e-5)


def test_environments_and_agents_are_independent_columns():
    columns = [[episode(s) for s in range(3 * a, 3 * a + 3)] for a in range(2)]
    r, v, vn, term, done = (jnp.asarray(np.stack([[c[i] for c in row] for row in columns]).T) for i in range(5))
    batch, _ = returns.gae(r, v, vn, term, done, 0.9, 0.8)
    assert batch.shape == (40, 3, 2)
    single, _ = returns.gae(*(x[:, 1, 1] for x in (r, v, vn, term, done)), 0.9, 0.8)
    np.testing.assert_allclose(batch[:, 1, 1], single, rtol=1e-6)
    vmapped, _ = jax.vmap(lambda *x: returns.gae(*x, 0.9, 0.8), in_axes=2, out_axes=2)(r, v, vn, term, done)
    np.testing.assert_allclose(vmapped, batch, rtol=1e-6)
