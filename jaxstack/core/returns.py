"""Return and advantage estimators: functions of time-major arrays [T, ...]; the index says when a quantity is known.

`v_tp1` is the value of the TRUE next observation, also where the episode ended: at a truncation it is what bootstraps,
at a termination it is multiplied by zero. `done_t` = terminated or truncated: nothing flows back over it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxstack.core.errors import UserError


def gae(
    r_t: Array, v_t: Array, v_tp1: Array, terminated_t: Array, done_t: Array, gamma: Array | float, lam: Array | float
) -> tuple[Array, Array]:
    """Generalised advantage estimation (Schulman et al., 2016, eq. 16), all arguments [T, ...].

    delta_t = r_t + gamma (1 - terminated_t) v_{t+1} - v_t;  A_t = delta_t + gamma lam (1 - done_t) A_{t+1}.
    Returns (advantages, value targets A_t + v_t).
    """
    delta = r_t + gamma * jnp.where(terminated_t, 0.0, v_tp1) - v_t
    decay = gamma * lam * (1.0 - done_t.astype(delta.dtype))
    advantage = _backward(delta, decay, jnp.zeros_like(delta[0]))
    return advantage, advantage + v_t


def lambda_returns(
    r_t: Array, v_tp1: Array, terminated_t: Array, done_t: Array, gamma: Array | float, lam: Array | float
) -> Array:
    """TD(lambda) returns (Sutton & Barto, 2018, eq. 12.18) [T, ...]:
    G_t = r_t + gamma ((1 - lam) v_{t+1} + lam G_{t+1}), with v_{t+1} alone at truncation, 0 at termination."""
    live = 1.0 - done_t.astype(r_t.dtype)
    v = jnp.where(terminated_t, 0.0, v_tp1)
    base = r_t + gamma * v * jnp.where(done_t, 1.0, 1.0 - lam)
    # the last step has no return after it: its own value stands for it
    base = base.at[-1].add(gamma * lam * (live * v)[-1])
    return _backward(base, gamma * lam * live, jnp.zeros_like(r_t[0]))


def n_step_returns(r_t: Array, v_tp1: Array, terminated_t: Array, done_t: Array, gamma: Array | float, n: int) -> Array:
    """n-step returns (Sutton & Barto, 2018, eq. 7.1) [T, ...]: n discounted rewards and the value after them.

    Fewer where the episode or the data ends before: then the value after the last reward stands (0 at termination).
    Raises `UserError` for n < 1.
    """
    if n < 1:
        raise UserError(f"n={n}: expected at least 1")
    v = jnp.where(terminated_t, 0.0, v_tp1)
    ends = done_t.at[-1].set(True)

    def longer(_: Array, after: Array) -> Array:
        # `after` holds the return with one step less; one index on it is what follows the reward
        following = jnp.concatenate([after[1:], after[-1:]])
        return r_t + gamma * jnp.where(ends, v, following)

    return jax.lax.fori_loop(1, n, longer, r_t + gamma * v)


def discounted_returns(r_t: Array, done_t: Array, gamma: Array | float) -> Array:
    """Sum of gamma^k r_{t+k} to the end of the episode or of the data [T, ...]."""
    return _backward(r_t, gamma * (1.0 - done_t.astype(r_t.dtype)), jnp.zeros_like(r_t[0]))


def vtrace(
    r_t: Array,
    v_t: Array,
    v_tp1: Array,
    terminated_t: Array,
    done_t: Array,
    log_rho_t: Array,
    gamma: Array | float,
    clip_rho: float = 1.0,
    clip_c: float = 1.0,
) -> tuple[Array, Array]:
    """V-trace (Espeholt et al., 2018, eq. 1): (value targets, policy-gradient advantages), all [T, ...]."""
    rho = jnp.exp(log_rho_t)
    v_next = jnp.where(terminated_t, 0.0, v_tp1)
    delta = jnp.minimum(rho, clip_rho) * (r_t + gamma * v_next - v_t)
    live = 1.0 - done_t.astype(r_t.dtype)
    c = jnp.minimum(rho, clip_c)
    correction = _backward(delta, gamma * c * live, jnp.zeros_like(r_t[0]))
    target = v_t + correction
    target_next = jnp.concatenate([target[1:], v_next[-1:]])
    target_next = jnp.where(done_t, v_next, target_next)
    advantage = jnp.minimum(rho, clip_rho) * (r_t + gamma * target_next - v_t)
    return jax.lax.stop_gradient(target), jax.lax.stop_gradient(advantage)


def _backward(x_t: Array, decay_t: Array, start: Array) -> Array:
    """y_t = x_t + decay_t y_{t+1}."""

    def body(y: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        x, decay = inputs
        y = x + decay * y
        return y, y

    return jax.lax.scan(body, start, (x_t, jnp.broadcast_to(decay_t, x_t.shape)), reverse=True)[1]
