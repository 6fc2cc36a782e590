"""Return and advantage estimators: functions of time-major arrays [T, ...]; the index says when a quantity is known.

`v_tp1` is the value of the TRUE next observation, also where the episode ended: at a truncation it is what bootstraps,
at a termination it is multiplied by zero. `done_t` = terminated or truncated: nothing flows back over it.

Arguments of other shapes or types raise `AssertionError`, which names the argument.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxstack.core import shapes
from jaxstack.core.errors import UserError

Number = Float[Array, ""] | float


def gae(
    r_t: Float[Array, "T *B"],
    v_t: Float[Array, "T *B"],
    v_tp1: Float[Array, "T *B"],
    terminated_t: Bool[Array, "T *B"],
    done_t: Bool[Array, "T *B"],
    gamma: Number,
    lam: Number,
) -> tuple[Float[Array, "T *B"], Float[Array, "T *B"]]:
    """Estimate advantages by generalised advantage estimation (Schulman et al., 2016, eq. 16).

    delta_t = r_t + gamma (1 - terminated_t) v_{t+1} - v_t;  A_t = delta_t + gamma lam (1 - done_t) A_{t+1}.

    Args:
        r_t: Rewards [T, ...].
        v_t: Values of the observations before the rewards [T, ...].
        v_tp1: Values of the true next observations [T, ...].
        terminated_t: Whether nothing follows the step [T, ...].
        done_t: Whether the episode is terminated or truncated after the step [T, ...].
        gamma: Discount.
        lam: Decay of the exponential average, 0 (one step) to 1 (all rewards to the end).

    Returns:
        (advantages A_t, value targets A_t + v_t), both [T, ...].

    Example:
        advantage, target = gae(reward, value[:-1], value[1:], terminated, done, gamma=0.99, lam=0.95)
    """
    _check(terminated_t=terminated_t, done_t=done_t, r_t=r_t, v_t=v_t, v_tp1=v_tp1)
    delta = r_t + gamma * jnp.where(terminated_t, 0.0, v_tp1) - v_t
    decay = gamma * lam * (1.0 - done_t.astype(delta.dtype))
    advantage = _backward(delta, decay, jnp.zeros_like(delta[0]))
    return advantage, advantage + v_t


def lambda_returns(
    r_t: Float[Array, "T *B"],
    v_tp1: Float[Array, "T *B"],
    terminated_t: Bool[Array, "T *B"],
    done_t: Bool[Array, "T *B"],
    gamma: Number,
    lam: Number,
) -> Float[Array, "T *B"]:
    """Compute TD(lambda) returns (Sutton & Barto, 2018, eq. 12.18).

    G_t = r_t + gamma ((1 - lam) v_{t+1} + lam G_{t+1}), with v_{t+1} alone at truncation, 0 at termination.

    Args:
        r_t: Rewards [T, ...].
        v_tp1: Values of the true next observations [T, ...].
        terminated_t: Whether nothing follows the step [T, ...].
        done_t: Whether the episode is terminated or truncated after the step [T, ...].
        gamma: Discount.
        lam: 0 gives one-step returns, 1 all rewards to the end and the value after them.

    Returns:
        Returns [T, ...].
    """
    _check(terminated_t=terminated_t, done_t=done_t, r_t=r_t, v_tp1=v_tp1)
    live = 1.0 - done_t.astype(r_t.dtype)
    v = jnp.where(terminated_t, 0.0, v_tp1)
    base = r_t + gamma * v * jnp.where(done_t, 1.0, 1.0 - lam)
    # the last step has no return after it: its own value stands for it
    base = base.at[-1].add(gamma * lam * (live * v)[-1])
    return _backward(base, gamma * lam * live, jnp.zeros_like(r_t[0]))


def n_step_returns(
    r_t: Float[Array, "T *B"],
    v_tp1: Float[Array, "T *B"],
    terminated_t: Bool[Array, "T *B"],
    done_t: Bool[Array, "T *B"],
    gamma: Number,
    n: int,
) -> Float[Array, "T *B"]:
    """Compute n-step returns (Sutton & Barto, 2018, eq. 7.1): n discounted rewards and the value after them.

    Fewer rewards where the episode or the data ends before: then the value after the last one stands (0 at
    termination).

    Args:
        r_t: Rewards [T, ...].
        v_tp1: Values of the true next observations [T, ...].
        terminated_t: Whether nothing follows the step [T, ...].
        done_t: Whether the episode is terminated or truncated after the step [T, ...].
        gamma: Discount.
        n: Rewards in a return.

    Returns:
        Returns [T, ...].

    Raises:
        UserError: For n < 1.
    """
    if n < 1:
        raise UserError(f"n={n}: expected at least 1")
    _check(terminated_t=terminated_t, done_t=done_t, r_t=r_t, v_tp1=v_tp1)
    v = jnp.where(terminated_t, 0.0, v_tp1)
    ends = done_t.at[-1].set(True)

    def longer(_: Array, after: Array) -> Array:
        # `after` holds the return with one step less; one index on it is what follows the reward
        following = jnp.concatenate([after[1:], after[-1:]])
        return r_t + gamma * jnp.where(ends, v, following)

    return jax.lax.fori_loop(1, n, longer, r_t + gamma * v)


def discounted_returns(r_t: Float[Array, "T *B"], done_t: Bool[Array, "T *B"], gamma: Number) -> Float[Array, "T *B"]:
    """Sum gamma^k r_{t+k} to the end of the episode or of the data.

    Args:
        r_t: Rewards [T, ...].
        done_t: Whether the episode is over after the step [T, ...].
        gamma: Discount.

    Returns:
        Returns [T, ...].
    """
    _check(done_t=done_t, r_t=r_t)
    return _backward(r_t, gamma * (1.0 - done_t.astype(r_t.dtype)), jnp.zeros_like(r_t[0]))


def vtrace(
    r_t: Float[Array, "T *B"],
    v_t: Float[Array, "T *B"],
    v_tp1: Float[Array, "T *B"],
    terminated_t: Bool[Array, "T *B"],
    done_t: Bool[Array, "T *B"],
    log_rho_t: Float[Array, "T *B"],
    gamma: Number,
    clip_rho: float = 1.0,
    clip_c: float = 1.0,
) -> tuple[Float[Array, "T *B"], Float[Array, "T *B"]]:
    """Correct values for data of another policy by V-trace (Espeholt et al., 2018, eq. 1).

    Args:
        r_t: Rewards [T, ...].
        v_t: Values of the observations before the rewards [T, ...].
        v_tp1: Values of the true next observations [T, ...].
        terminated_t: Whether nothing follows the step [T, ...].
        done_t: Whether the episode is terminated or truncated after the step [T, ...].
        log_rho_t: Log ratio of the probabilities of the action, target policy over behaviour policy [T, ...].
        gamma: Discount.
        clip_rho: Largest weight of a temporal difference.
        clip_c: Largest weight with which later differences flow back.

    Returns:
        (value targets, policy-gradient advantages), both [T, ...]; no gradient flows through them.
    """
    _check(terminated_t=terminated_t, done_t=done_t, r_t=r_t, v_t=v_t, v_tp1=v_tp1, log_rho_t=log_rho_t)
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


def _check(*, r_t: Array, done_t: Array, **others: Array) -> None:
    shapes.assert_time_major(r_t=r_t, done_t=done_t, **others)
    flags = {name: x for name, x in others.items() if name == "terminated_t"}
    shapes.assert_bool(done_t=done_t, **flags)
    shapes.assert_float(r_t=r_t, **{name: x for name, x in others.items() if name not in flags})


def _backward(x_t: Array, decay_t: Array, start: Array) -> Array:
    """y_t = x_t + decay_t y_{t+1}."""

    def body(y: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        x, decay = inputs
        y = x + decay * y
        return y, y

    return jax.lax.scan(body, start, (x_t, jnp.broadcast_to(decay_t, x_t.shape)), reverse=True)[1]
