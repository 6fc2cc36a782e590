"""Many copies of one environment with auto-reset.

`auto_reset="pool"` (default) draws each new episode's start from a pool of fresh resets that is made in bulk once a
rollout, so that no step pays for a reset, and only what differs between starts is copied; `"exact"` computes a reset in
every step, as most libraries do, and is the reference. Start states are never used twice within a rollout unless more
episodes end than the pool holds, which `reused` counts.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal as Constant
from jaxtyping import Array

from jaxstack.core.errors import UserError
from jaxstack.envs.base import Environment, TimeStep, cached

AutoReset = Literal["pool", "exact"]


class VecState(NamedTuple):
    """N environments between two steps."""

    env: Any
    """Environment states, leaves [N, ...]."""
    ts: TimeStep
    """What the policy acts on now, leaves [N, ...]."""
    first: Array
    """[N] bool: `ts` starts an episode (recurrent policies reset here)."""
    episode_return: Array
    """[N, A] return so far of the current episode; `rollout.collect` keeps it, `step` leaves it alone."""
    episode_length: Array
    """[N] int32, likewise its steps."""
    parameters: Any = ()
    """What every episode begins with, the same for all N, see `Environment.parameters`."""


class Pool(NamedTuple):
    """Fresh start states and how many were used. Leaves [P, ...], or [1, ...] where all starts are equal."""

    env: Any
    ts: TimeStep
    used: Array

    @property
    def size(self) -> int:
        """P, or 1 if all starts are equal."""
        return max(x.shape[0] for x in jax.tree.leaves((self.env, self.ts)))


class VecEnv(NamedTuple):
    """Static description; hashable."""

    env: Environment
    num_envs: int
    auto_reset: AutoReset = "pool"
    pool_size: int | None = None

    def rollout_pool_size(self, num_steps: int) -> int:
        """How many starts a rollout of `num_steps` gets: enough for every episode of full length, doubled if they can
        end earlier (by terminating, or by a truncation that no promise ties to the horizon); at least one for each
        environment, never more than can be used."""
        if self.pool_size is not None:
            return self.pool_size
        spec = self.env.spec
        length = spec.horizon or 100
        ends = self.num_envs * math.ceil(num_steps / length)
        early = spec.can_terminate or (spec.can_truncate and not spec.truncates_at_horizon)
        wanted = max(self.num_envs, 2 * ends if early else ends)
        return min(wanted, self.num_envs * num_steps)


def vectorise(env: Environment, num_envs: int, auto_reset: AutoReset = "pool", pool_size: int | None = None) -> VecEnv:
    """N copies of `env`; raises `UserError` for sizes below one or an unknown mode."""
    if num_envs < 1:
        raise UserError(f"num_envs={num_envs}: expected at least 1")
    if auto_reset not in ("pool", "exact"):
        raise UserError(f"auto_reset={auto_reset!r}: expected 'pool' or 'exact'")
    if pool_size is not None and pool_size < 1:
        raise UserError(f"pool_size={pool_size}: expected at least 1")
    return VecEnv(env, num_envs, auto_reset, pool_size)


def init(vec: VecEnv, key: jax.Array) -> VecState:
    """N freshly reset environments."""
    return start(vec, jax.random.split(key, vec.num_envs))


def start(vec: VecEnv, keys: jax.Array) -> VecState:
    """The same from their keys [N]."""
    shared = jax.tree.map(jnp.asarray, vec.env.parameters)
    env, ts = jax.vmap(resetter(vec.env, shared))(keys)
    n, a = vec.num_envs, vec.env.spec.num_agents
    return VecState(env, ts, jnp.ones(n, bool), jnp.zeros((n, a), jnp.float32), jnp.zeros(n, jnp.int32), shared)


def resetter(env: Environment, parameters: Any) -> Callable[[jax.Array], tuple[Any, TimeStep]]:
    """`reset` with the parameters that its copies share; without any it takes the key alone."""
    return (lambda key: env.reset(key, parameters)) if jax.tree.leaves(parameters) else env.reset  # pyright: ignore


def parameters_of(state: Any) -> Any:
    """Find what environments share in the state of a learner.

    Args:
        state: of one seed or of several, [S, ...].

    Returns:
        The parameters, see `Environment.parameters`, with the same leading axis.

    Raises:
        UserError: where there are none.
    """
    found = [x.parameters for x in jax.tree.leaves(state, is_leaf=_is_vec) if _is_vec(x)]
    if not found or not jax.tree.leaves(found[0]):
        raise UserError("state: found no environment with parameters, expected one that defines `parameters`")
    return found[0]


def with_parameters(state: Any, parameters: Any) -> Any:
    """Change what environments share: episodes that begin from now on are played with it.

    Args:
        state: of a learner, of one seed or of several, [S, ...].
        parameters: like `parameters_of(state)`; arrays without the axis of seeds serve for all.

    Returns:
        The state with them.

    Raises:
        UserError: where they do not fit.

    Example:
        def harder(now):
            return envs.with_parameters(now.state, jnp.float32(now.step / 100))

        jaxstack.train(learner, 100, callbacks=[harder])
    """
    old = parameters_of(state)
    if jax.tree.structure(parameters) != jax.tree.structure(old):
        raise UserError(f"parameters: found {jax.tree.structure(parameters)}, expected {jax.tree.structure(old)}")

    def fitted(new: Any, old: Array) -> Array:
        new = jnp.asarray(new, old.dtype)
        if new.shape != old.shape and new.shape != old.shape[1:]:
            raise UserError(f"parameters: found an array {new.shape}, expected {old.shape} or {old.shape[1:]}")
        return jnp.broadcast_to(new, old.shape)

    shared = jax.tree.map(fitted, parameters, old)
    put = lambda x: x._replace(parameters=shared) if _is_vec(x) else x
    return jax.tree.map(put, state, is_leaf=_is_vec)


def _is_vec(x: Any) -> bool:
    return isinstance(x, VecState)


def rollout_keys(
    vec: VecEnv, key: jax.Array, num_steps: int, starts: int | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys of a rollout: one for the actions, [P] for start states, [num_steps, N] for `step`. P is what `make_pool`
    takes (0 in exact mode) unless `starts` says otherwise. The first P + 1 keys do not depend on num_steps.

    All from one call: another costs as much as thousands of keys more.
    """
    if starts is None:
        starts = 0 if vec.auto_reset == "exact" else vec.rollout_pool_size(num_steps)
    keys = jax.random.split(key, 1 + starts + num_steps * vec.num_envs)
    return keys[0], keys[1 : 1 + starts], keys[1 + starts :].reshape(num_steps, vec.num_envs)


def make_pool(vec: VecEnv, keys: jax.Array, parameters: Any = ()) -> Pool | None:
    """Fresh starts from keys [P]; None in exact mode."""
    if vec.auto_reset == "exact":
        return None
    starts = jax.vmap(resetter(vec.env, parameters))(keys)
    env, ts = jax.tree.map(lambda x, random: x if random else x[:1], starts, random_parts(vec.env))
    return Pool(env, ts, jnp.int32(0))


@cached(256)
def _reset_program(env: Environment) -> tuple[Any, tuple[Any, TimeStep]]:
    """The program of `reset` and the shapes of its outputs (state, TimeStep)."""
    return jax.make_jaxpr(resetter(env, env.parameters), return_shape=True)(jax.random.key(0))


def start_shapes(env: Environment) -> tuple[Any, TimeStep]:
    """Shapes and dtypes of a start (state, TimeStep), read off the program of `reset`."""
    return _reset_program(env)[1]


@cached(256)
def random_parts(env: Environment) -> tuple[Any, TimeStep]:
    """Which leaves of a start (state, TimeStep) depend on the key of `reset`: bools, read off its program."""
    program, shapes = _reset_program(env)
    return jax.tree.unflatten(jax.tree.structure(shapes), _depend(program.jaxpr, [True]))


def _depend(jaxpr: Any, inputs: list[bool]) -> list[bool]:
    """Which outputs depend on the given inputs; of inner programs only those of jit are looked into."""
    known = dict(zip(jaxpr.invars, inputs))
    found = lambda variables: [not isinstance(v, Constant) and known.get(v, False) for v in variables]
    for e in jaxpr.eqns:
        given = found(e.invars)
        inner = e.params["jaxpr"].jaxpr if e.primitive.name in ("jit", "pjit") else None
        known |= zip(e.outvars, [any(given)] * len(e.outvars) if inner is None else _depend(inner, given))
    return found(jaxpr.outvars)


def reused(vec: VecEnv, pool: Pool | None) -> Array:
    """How many episodes began from a start state that had been used before; 0 in exact mode and where an environment
    has but one start."""
    if pool is None or not any(jax.tree.leaves(random_parts(vec.env))):
        return jnp.int32(0)
    return jnp.maximum(pool.used - pool.size, 0)


def step(
    vec: VecEnv, keys: jax.Array, vs: VecState, action: Array, pool: Pool | None
) -> tuple[VecState, TimeStep, Pool | None]:
    """Step all environments with a key each [N]; ended ones start anew.

    Returns (state to act on, TRUE TimeStep of this transition [N, ...], pool). The second keeps the last observation,
    the flags, reward and info of ended episodes.
    """
    if pool is None:
        keys, k_reset = jnp.unstack(jax.vmap(jax.random.split)(keys), axis=1)
    env, last = jax.vmap(vec.env.step)(keys, vs.env, action)
    done = last.terminated | last.truncated
    if pool is None:
        fresh_env, fresh_ts = jax.vmap(resetter(vec.env, vs.parameters))(k_reset)
    else:
        order = pool.used + jnp.cumsum(done, dtype=jnp.int32) - 1
        # past the end of the pool the oldest starts are used again
        index = jnp.where(done, order % pool.size, 0)
        fresh_env, fresh_ts = jax.tree.map(lambda x: x if len(x) == 1 else x[index], (pool.env, pool.ts))
        pool = pool._replace(used=pool.used + jnp.sum(done, dtype=jnp.int32))

    def pick(fresh: Array, old: Array) -> Array:
        return jnp.where(done.reshape(-1, *[1] * (old.ndim - 1)), fresh, old)

    env, ts = jax.tree.map(pick, (fresh_env, fresh_ts), (env, last))
    # the reward, flags and info belong to the transition, not to the new episode
    ts = ts._replace(reward=last.reward, terminated=last.terminated, truncated=last.truncated, info=last.info)
    return vs._replace(env=env, ts=ts, first=done), last, pool
