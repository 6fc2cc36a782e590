"""Exact finite-horizon analysis of tabular MDPs in float64: values, state laws, action randomisation, episodes.

A terminal state is a state like others: it leads to itself and pays nothing. So an episode that ended costs no
case distinction anywhere. Functions take and return NumPy arrays on the host; inside they run as JAX programs with
64-bit types, whatever the rest of the process uses.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxstack.core.errors import UserError
from jaxstack.envs.tabular import TableEnv

TOLERANCE = 1e-9
"""By how much probabilities may miss 1."""


class Mdp(NamedTuple):
    """A tabular MDP: what happens is the same in every step of the horizon."""

    kernel: Float[np.ndarray, "S A S"]
    """Probability of the next state."""
    reward: Float[np.ndarray, "S A"]
    """Mean reward."""
    start: Float[np.ndarray, " S"]
    """Law of the first state."""

    @property
    def num_states(self) -> int:
        return self.reward.shape[0]

    @property
    def num_actions(self) -> int:
        return self.reward.shape[1]


def in_float64(*static: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function of arrays with 64-bit types: real arguments become float64, results NumPy arrays."""

    def wide(x: Any) -> Any:
        real = isinstance(x, np.ndarray) and np.issubdtype(x.dtype, np.inexact)
        return x.astype(np.float64) if real else x

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled = jax.jit(function, static_argnames=static)

        @wraps(function)
        def run(*args: Any, **options: Any) -> Any:
            with jax.enable_x64():
                args = jax.tree.map(lambda x: wide(np.asarray(x)) if not _is_key(x) else x, args)
                return jax.tree.map(np.asarray, compiled(*args, **options))

        return run

    return decorate


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def mdp(kernel: Any, reward: Any, start: Any) -> Mdp:
    """Make an MDP from its tables.

    Args:
        kernel: [S, A, S], rows sum to 1.
        reward: [S, A].
        start: [S], sums to 1.

    Raises:
        UserError: Shapes that do not fit each other, or rows that are no probabilities.
    """
    kernel, reward, start = (np.asarray(x, np.float64) for x in (kernel, reward, start))
    if kernel.ndim != 3 or kernel.shape[0] != kernel.shape[2]:
        raise UserError(f"kernel: found shape {kernel.shape}, expected [S, A, S]")
    if reward.shape != kernel.shape[:2] or start.shape != kernel.shape[:1]:
        found = f"found reward {reward.shape} and start {start.shape}"
        raise UserError(f"mdp: {found}, expected {kernel.shape[:2]} and {kernel.shape[:1]} for kernel {kernel.shape}")
    check_probabilities(kernel=kernel, start=start)
    if not np.isfinite(reward).all():
        raise UserError(f"reward: {int((~np.isfinite(reward)).sum())} entries are not finite")
    return Mdp(kernel, reward, start)


def check_probabilities(**arguments: np.ndarray) -> None:
    """Raise `UserError` naming an argument whose last axis is not a law."""
    for name, x in arguments.items():
        if not np.isfinite(x).all() or (x < -TOLERANCE).any():
            raise UserError(f"{name}: found {np.nanmin(x):g}, expected probabilities")
        sums = np.atleast_1d(x.sum(-1))
        worst = sums.flat[np.abs(sums - 1.0).argmax()]
        if abs(worst - 1.0) > TOLERANCE:
            raise UserError(f"{name}: probabilities sum to {worst:.10g}, expected 1")


def mdp_of(env: TableEnv, eps: float | None = None) -> Mdp:
    """Return the MDP of an environment with tables.

    Args:
        env: The environment. Its state S - 1 of the result is the end of an episode.
        eps: Probability with which an action is replaced by a uniform one; default: the environment's (the mean over
            its episodes, as the kernel is linear in it).

    Returns:
        The MDP with one state more than the environment has.
    """
    tables = env.tables
    states, actions = tables.next_state.shape
    target = np.where(tables.done, states, tables.next_state)
    kernel = np.zeros((states + 1, actions, states + 1))
    kernel[np.arange(states)[:, None], np.arange(actions)[None], target] = 1.0
    kernel[states, :, states] = 1.0
    reward = np.concatenate([tables.reward, np.zeros((1, actions))]).astype(np.float64)
    start = np.append(tables.start, 0.0)
    return randomise(mdp(kernel, reward, start / start.sum()), env.eps if eps is None else eps)


def randomise(base: Mdp, eps: float) -> Mdp:
    """Replace actions by uniform ones with probability `eps` (Qian et al., 2026, Algorithm 1).

    p_eps(.|s, a) = (1 - eps) p(.|s, a) + eps mean_a' p(.|s, a'). Rewards belong to the action that is carried out, so
    they mix in the same way.

    Args:
        base: The MDP without randomisation.
        eps: In [0, 1].

    Raises:
        UserError: For `eps` outside [0, 1].
    """
    if not 0.0 <= eps <= 1.0:
        raise UserError(f"eps={eps!r}: expected a number in [0, 1]")
    mix = lambda x: (1.0 - eps) * x + eps * x.mean(1, keepdims=True)
    return base._replace(kernel=mix(base.kernel), reward=mix(base.reward))


def random_mdp(
    rng: np.random.Generator, states: int = 5, actions: int = 3, like: Mdp | None = None, share: float = 0.3
) -> Mdp:
    """Draw an MDP with uniform laws and rewards in [0, 1].

    Args:
        rng: Of all numbers.
        states: S.
        actions: A.
        like: Mix kernel and start with those of this MDP, and take its rewards.
        share: Of what is drawn in the mixture.
    """
    kernel, start = rng.dirichlet(np.ones(states), (states, actions)), rng.dirichlet(np.ones(states))
    if like is None:
        return mdp(kernel, rng.random((states, actions)), start)
    mix = lambda old, new: (1.0 - share) * old + share * new
    return mdp(mix(like.kernel, kernel), like.reward, mix(like.start, start))


def as_policy(policy: Any, base: Mdp, horizon: int) -> Float[np.ndarray, "*B H S A"]:
    """Return a policy as probabilities for every step.

    Args:
        policy: Probabilities [..., H, S, A], or [S, A] for all steps alike; or actions [H, S] or [S] (integers).
        base: An MDP with these states and actions.
        horizon: H.

    Raises:
        UserError: For another shape, or rows that are no probabilities.
    """
    policy = np.asarray(policy)
    states, actions = base.num_states, base.num_actions
    if np.issubdtype(policy.dtype, np.integer):
        if policy.min(initial=0) < 0 or policy.max(initial=0) >= actions:
            raise UserError(f"policy: found actions {policy.min()} to {policy.max()}, expected 0 to {actions - 1}")
        policy = np.eye(actions)[policy]
    if policy.shape == (states, actions):
        policy = np.broadcast_to(policy, (horizon, states, actions))
    if policy.shape[-3:] != (horizon, states, actions):
        expected = f"[..., {horizon}, {states}, {actions}] or [{states}, {actions}]"
        raise UserError(f"policy: found shape {policy.shape}, expected {expected}")
    policy = policy.astype(np.float64)
    check_probabilities(policy=policy)
    return policy


def backward_induction(base: Mdp, horizon: int, policy: Any = None) -> Float[np.ndarray, "*B H S A"]:
    """Compute action values of a finite horizon, V after the last step being 0.

    Args:
        base: The MDP.
        horizon: H.
        policy: Whose values, see `as_policy`; None: the optimal one's.

    Returns:
        Q [..., H, S, A].
    """
    if horizon < 1:
        raise UserError(f"horizon={horizon}: expected at least 1")
    if policy is None:
        return _optimal(base, horizon=horizon)
    return _values(base, as_policy(policy, base, horizon))


@in_float64("horizon")
def _optimal(base: Mdp, *, horizon: int) -> Array:
    def earlier(value: Any, _: None) -> tuple[Any, Any]:
        q = base.reward + base.kernel @ value
        return q.max(-1), q

    return jax.lax.scan(earlier, jnp.zeros(base.start.shape), None, length=horizon, reverse=True)[1]


@in_float64()
def _values(base: Mdp, policy: Array) -> Array:
    def earlier(value: Any, pi: Any) -> tuple[Any, Any]:
        q = base.reward + jnp.einsum("iaj,...j->...ia", base.kernel, value)
        return (pi * q).sum(-1), q

    steps = jnp.moveaxis(policy, -3, 0)
    return jnp.moveaxis(jax.lax.scan(earlier, jnp.zeros(steps.shape[1:-1]), steps, reverse=True)[1], 0, -3)


def occupancy(base: Mdp, policy: Any, horizon: int) -> Float[np.ndarray, "*B H S"]:
    """Compute the law of the state in each step.

    Args:
        base: The MDP.
        policy: See `as_policy`.
        horizon: H.

    Returns:
        D [..., H, S]; each row sums to 1, ended episodes being in the terminal state.
    """
    return _occupancy(base, as_policy(policy, base, horizon))


@in_float64()
def _occupancy(base: Mdp, policy: Array) -> Array:
    def later(law: Any, pi: Any) -> tuple[Any, Any]:
        return jnp.einsum("...i,...ia,iaj->...j", law, pi, base.kernel), law

    steps = jnp.moveaxis(policy, -3, 0)
    start = jnp.broadcast_to(base.start, steps.shape[1:-1])
    return jnp.moveaxis(jax.lax.scan(later, start, steps)[1], 0, -2)


def expected_return(base: Mdp, policy: Any, horizon: int) -> Float[np.ndarray, "*B"]:
    """Compute the expected sum of rewards over the horizon.

    Args:
        base: The MDP.
        policy: See `as_policy`.
        horizon: H.
    """
    pi = as_policy(policy, base, horizon)
    first = backward_induction(base, horizon, pi)[..., 0, :, :]
    return ((pi[..., 0, :, :] * first).sum(-1) * base.start).sum(-1)


def simulate(key: jax.Array, base: Mdp, policy: Any, horizon: int, episodes: int) -> Int[np.ndarray, "T H"]:
    """Play episodes and store their states.

    Args:
        key: Of all random numbers.
        base: The MDP.
        policy: [H, S, A] or another form of `as_policy` without leading axes.
        horizon: H.
        episodes: T.

    Returns:
        States [T, H]; an ended episode stays in the terminal state.
    """
    if episodes < 1:
        raise UserError(f"episodes={episodes}: expected at least 1")
    return _simulate(base, as_policy(policy, base, horizon), key, episodes=episodes)


@in_float64("episodes")
def _simulate(base: Mdp, policy: Array, key: jax.Array, *, episodes: int) -> Array:
    draw = jax.vmap(partial(jnp.searchsorted, side="right"))
    last = base.start.size - 1
    rows = jnp.cumsum(base.kernel, -1)
    noise = jax.random.uniform(key, (1 + 2 * len(policy), episodes), jnp.float64)
    pick = lambda sums, u: jnp.minimum(draw(sums, u * sums[:, -1]), sums.shape[-1] - 1)
    first = pick(jnp.broadcast_to(jnp.cumsum(base.start), (episodes, last + 1)), noise[0])

    def later(state: Array, x: tuple[Array, Array]) -> tuple[Array, Array]:
        pi, u = x
        action = pick(jnp.cumsum(pi, -1)[state], u[0])
        return pick(rows[state, action], u[1]), state

    return jax.lax.scan(later, first, (policy, noise[1:].reshape(len(policy), 2, episodes)))[1].T.astype(jnp.int32)
