"""Partners that do not learn, and scripted players of follow_partner with known returns.

A partner is a pair of pure functions over a batch of B environments: `init(B) -> memory` and
`act(key, memory, obs [B, ...]) -> (action [B], memory)`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxstack.core.errors import UserError


class Partner(NamedTuple):
    """Pure functions of a player that does not adapt."""

    init: Callable[[int], Any]
    """B -> memory."""
    act: Callable[[Array, Any, Array], tuple[Array, Any]]
    """(key, memory, obs [B, *obs_shape]) -> (action [B] int32, memory)."""


def constant(action: int) -> Partner:
    """Play one action, whatever happens."""
    return Partner(lambda b: (), lambda key, memory, obs: (jnp.full(obs.shape[0], action, jnp.int32), memory))


def noisy(eps: float, actions: int, base: Partner | None = None) -> Partner:
    """Play a uniform action with probability `eps`, else what `base` plays (default: action 0).

    Raises:
        UserError: eps outside [0, 1].
    """
    if not 0.0 <= eps <= 1.0:
        raise UserError(f"eps={eps}: expected a number in [0, 1]")
    base = constant(0) if base is None else base

    def act(key: Array, memory: Any, obs: Array) -> tuple[Array, Any]:
        k_base, k_other, k_choice = jax.random.split(key, 3)
        action, memory = base.act(k_base, memory, obs)
        other = jax.random.randint(k_other, action.shape, 0, actions, jnp.int32)
        return jnp.where(jax.random.uniform(k_choice, action.shape) < eps, other, action), memory

    return Partner(base.init, act)


class _Seen(NamedTuple):
    """Cues of the partner at t-1 and t-2 [B] (-1: none), log-weights of its types [B, K]."""

    last: Array
    before: Array
    types: Array


def _cues(obs: Array, symbols: int) -> tuple[Array, Array, Array]:
    """(own cue, the other's cue, its last action) [B] of follow_partner's observations; a missing action is M."""
    part = lambda a, b: obs[:, a:b].argmax(-1).astype(jnp.int32)
    return part(0, symbols), part(symbols, 2 * symbols), part(2 * symbols, 3 * symbols + 1)


def grounded(kind: int, symbols: int) -> Partner:
    """Play (own cue of the step before + kind) mod M, a uniform action first: follow_partner's script as a player."""

    def act(key: Array, memory: Array, obs: Array) -> tuple[Array, Array]:
        own, _, _ = _cues(obs, symbols)
        first = jax.random.randint(key, memory.shape, 0, symbols, jnp.int32)
        return jnp.where(memory < 0, first, (memory + kind) % symbols), own

    return Partner(lambda b: jnp.full(b, -1, jnp.int32), act)


def tit(symbols: int) -> Partner:
    """Copy what the other player did last; a uniform action first."""

    def act(key: Array, memory: tuple, obs: Array) -> tuple[Array, tuple]:
        _, _, theirs = _cues(obs, symbols)
        first = jax.random.randint(key, theirs.shape, 0, symbols, jnp.int32)
        return jnp.where(theirs >= symbols, first, theirs), memory

    return Partner(lambda b: (), act)


def informed(symbols: int, types: int) -> Partner:
    """Reply best to follow_partner's grounded partner: a Bayes filter over its type.

    The posterior of the type is uniform until one pair (cue, next action) is seen, then one-hot. Mean reward per step
    (1/M + 1/K + T - 2) / T.
    """

    def act(key: Array, memory: _Seen, obs: Array) -> tuple[Array, _Seen]:
        _, cue, action = _cues(obs, symbols)
        # the action of t-1 answers the cue of t-2
        guess = (memory.before[:, None] + jnp.arange(types)) % symbols
        known = ((memory.before >= 0) & (action < symbols))[:, None]
        weights = memory.types + jnp.where(known & (guess != action[:, None]), -1e9, 0.0)
        reply = (memory.last + weights.argmax(-1).astype(jnp.int32)) % symbols
        reply = jnp.where(memory.last < 0, 0, reply).astype(jnp.int32)
        return reply, _Seen(cue, memory.last, weights)

    none = lambda b: jnp.full(b, -1, jnp.int32)
    return Partner(lambda b: _Seen(none(b), none(b), jnp.zeros((b, types))), act)


def window_one(symbols: int) -> Partner:
    """Remember the partner's last cue and take its type to be 0: (1/M + (T - 1)/K) / T per step."""

    def act(key: Array, memory: Array, obs: Array) -> tuple[Array, Array]:
        _, cue, _ = _cues(obs, symbols)
        return jnp.maximum(memory, 0), cue

    return Partner(lambda b: jnp.full(b, -1, jnp.int32), act)


def follow_partner_zoo(symbols: int, types: int) -> dict[str, Partner]:
    """The partners of follow_partner's audit: a constant, each grounded type, tit, and half noise."""
    zoo = {"constant": constant(0)}
    zoo |= {f"grounded({k})": grounded(k, symbols) for k in range(types)}
    return zoo | {"tit": tit(symbols), "noisy(0.5)": noisy(0.5, symbols)}
