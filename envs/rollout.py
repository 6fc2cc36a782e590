"""Rollouts: T steps of N environments in one scan, and episode statistics."""

import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.core.errors import UserError
from jaxstack.core.learner import Metrics, Policy
from jaxstack.core.metrics import Mean, mean
from jaxstack.envs import vector
from jaxstack.envs.base import Environment, Spec, TimeStep, action_from, action_noise


class TruncatedFinals(NamedTuple):
    """The true next observations of episodes that were cut (truncated) in a rollout of T steps.

    An environment that promises to truncate at its horizon H and nowhere else is cut at most once within H steps, so
    row k holds what was cut in the steps from k H to k H + H - 1: K = ceil(T / H) rows instead of T. Without that
    promise (`Spec.truncates_at_horizon`) every step has its row. Where the promise is broken a row keeps its last cut,
    and `Rollout.lost_cuts` counts the others.
    """

    step: Array
    """[K, N] int32: the step that was cut, T where none was."""
    obs: Array
    """[K, N, A, *obs_shape]"""
    state: Array | None
    """[K, N, *state_shape] the global state, where the environment has one."""


class Step(NamedTuple):
    """One transition of N environments; a rollout stacks T of them."""

    ts: TimeStep
    """What the policy saw [N, ...]."""
    first: Array
    """[N] bool: `ts` starts an episode."""
    action: Array
    extras: Any
    """Whatever the policy returned beside the action (log-probability, value, ...)."""
    reward: Array
    """[N, A] of this transition."""
    terminated: Array
    truncated: Array
    final_obs: Array | None
    """[N, A, *obs_shape] true next observation, also at episode ends; None in rollouts that keep `TruncatedFinals`."""
    final_state: Array | None
    """Likewise the global state, where the environment has one."""
    final_mask: Array
    """[N, A] agents present after this transition."""
    episode_return: Array
    """[N, A] return of the episode that ended here, 0 elsewhere."""
    episode_length: Array
    info: dict[str, Array]

    @property
    def done(self) -> Array:
        return self.terminated | self.truncated


class Rollout(NamedTuple):
    """T steps of N environments."""

    vec: vector.VecState
    """The environments after them."""
    carry: Any
    """The policy's, likewise."""
    steps: Step
    """Leaves [T, N, ...]."""
    cuts: TruncatedFinals | None
    reused: Array
    """How many start states were used twice."""
    lost_cuts: Array
    """How many cut episodes found no row of their own in `cuts`, so that their true last observation is missing; 0
    wherever the environment keeps its promise."""


Act = Callable[[Any, Any, vector.VecState], tuple[Any, Array, Any]]
"""(random numbers of the step, carry, state) -> (carry, action [N, A, ...], extras)"""

Draw = Callable[[jax.Array, int], Any]
"""(key, T) -> random numbers of T steps, leaves [T, ...], for an `Act`.

They are drawn for all steps at once, before the first: inside the loop every call to the generator costs more than a
small network.
"""


def random_policy(vec: vector.VecEnv) -> tuple[Act, Draw]:
    """Uniformly random legal actions, and their random numbers."""
    spec = vec.env.spec

    def act(noise: Array, carry: Any, vs: vector.VecState) -> tuple[Any, Array, tuple]:
        return carry, action_from(spec, noise, vs.ts.action_mask), ()

    return act, lambda key, steps: action_noise(spec, key, (steps, vec.num_envs))


def collect(
    vec: vector.VecEnv,
    act: Act,
    key: jax.Array,
    vs: vector.VecState,
    carry: Any,
    num_steps: int,
    draw: Draw = jax.random.split,
    *,
    finals: Literal["every", "cuts"] = "every",
) -> Rollout:
    """T steps; `draw` makes the random numbers that `act` gets, by default one key per step.

    The true next observations stand in the steps (finals="every"), or only those of cut episodes are kept, as
    `TruncatedFinals` ("cuts"; None where an environment never truncates): what values bootstrap from, in a
    fraction of the memory.
    Raises `UserError` for another choice.
    """
    if finals not in ("every", "cuts"):
        raise UserError(f"finals={finals!r}: expected 'every' or 'cuts'")
    k_act, k_pool, k_env = vector.rollout_keys(vec, key, num_steps)
    pool = vector.make_pool(vec, k_pool, vs.parameters)
    every = finals == "every"

    def body(c: tuple, x: tuple[Any, Array, Array]) -> tuple[tuple, Step]:
        vs, carry, pool, kept = c
        numbers, keys, row = x
        carry, action, extras = act(numbers, carry, vs)
        new, last, pool = vector.step(vec, keys, vs, action, pool)
        out = Step(
            ts=vs.ts._replace(agent_mask=new.ts.agent_mask),
            first=new.first,
            action=action,
            extras=extras,
            reward=last.reward,
            terminated=last.terminated,
            truncated=last.truncated,
            final_obs=last.obs if every else None,
            final_state=last.state if every else None,
            final_mask=last.agent_mask,
            episode_return=(),  # summed up after the loop
            episode_length=(),
            info=last.info,
        )
        return (new, carry, pool, _note(kept, row, last)), out

    keep = vec.env.spec.can_truncate and not every
    spec = vec.env.spec
    window = spec.horizon if spec.truncates_at_horizon and spec.horizon is not None else 1
    kept = _room(vs.ts, -(-num_steps // window)) if keep else None
    rows = jnp.arange(num_steps, dtype=jnp.int32) // window
    before = vs
    (vs, carry, pool, kept), steps = jax.lax.scan(body, (vs, carry, pool, kept), (draw(k_act, num_steps), k_env, rows))
    # Each small array that the loop reads of its state, or writes, costs a kernel or two in every step. So first and
    # agent_mask come from after each step instead of before it, and returns are summed up afterwards.
    done = steps.terminated | steps.truncated
    count = lambda n: n.astype(jnp.float32)[..., None]
    sums = jnp.concatenate([before.episode_return, count(before.episode_length)], -1)
    sums = _since_start(sums, jnp.concatenate([steps.reward, count(jnp.ones_like(done))], -1), done)
    ended, so_far = jnp.where(done[..., None], sums, 0.0), jnp.where(done[-1, :, None], 0.0, sums[-1])
    steps = steps._replace(
        first=_delay(before.first, steps.first),
        ts=steps.ts._replace(agent_mask=_delay(before.ts.agent_mask, steps.ts.agent_mask)),
        episode_return=ended[..., :-1],
        episode_length=ended[..., -1].astype(jnp.int32),
    )
    vs = vs._replace(episode_return=so_far[..., :-1], episode_length=so_far[..., -1].astype(jnp.int32))
    if kept is None:
        return Rollout(vs, carry, steps, None, vector.reused(vec, pool), jnp.int32(0))
    cuts = TruncatedFinals(_cut_steps(steps.truncated, window), *kept)
    lost = jnp.sum(steps.truncated, dtype=jnp.int32) - jnp.sum(cuts.step < num_steps, dtype=jnp.int32)
    return Rollout(vs, carry, steps, cuts, vector.reused(vec, pool), lost)


def _delay(start: Array, after: Array) -> Array:
    """[T, ...] values before each step, from those after it."""
    return jnp.concatenate([start[None], after[:-1]])


def _since_start(before: Array, x: Array, done: Array) -> Array:
    """Sums over time of x [T, N, k] since each episode's start, this step included; `before` [N, k] is what had come
    together before the first step. In log T passes over all steps: `jax.lax.associative_scan` unrolls them, which took
    1.5 s more to compile with IPPO on MPE, and more memory."""
    length = len(done)
    earlier = lambda y, by: jax.lax.dynamic_slice_in_dim(jnp.concatenate([jnp.zeros_like(y), y]), length - by, length)

    def double(level: Array, c: tuple[Array, Array]) -> tuple[Array, Array]:
        total, runs = c
        by = 1 << level
        return total + jnp.where(runs, earlier(total, by), 0.0), runs & earlier(runs, by)

    # whether the episode of `by` steps ago runs until here
    runs = ~_delay(jnp.ones_like(done[0]), done)[..., None]
    levels = (length - 1).bit_length()
    return jax.lax.fori_loop(0, levels, double, (x.at[0].add(before), runs))[0]


def _room(ts: TimeStep, rows: int) -> tuple[Array, Array | None]:
    """For observations and global states of cut episodes."""
    empty = lambda x: jnp.zeros((rows, *x.shape), x.dtype)
    return jax.tree.map(empty, (ts.obs, ts.state))


def _note(kept: Any, row: Array, last: TimeStep) -> Any:
    """`kept` with those that were cut in a step."""
    put = lambda x, new: x.at[row].set(jnp.where(_like(last.truncated, new), new, x[row]))
    return None if kept is None else jax.tree.map(put, kept, (last.obs, last.state))


def _cut_steps(truncated: Array, window: int) -> Array:
    """[T, N] -> [ceil(T / window), N]: the last step in each window that cut an environment, T where none did."""
    length = len(truncated)
    step = jnp.where(truncated, jnp.arange(length, dtype=jnp.int32)[:, None], -1)
    step = jnp.pad(step, ((0, -length % window), (0, 0)), constant_values=-1)
    last = step.reshape(-1, window, step.shape[1]).max(1)
    return jnp.where(last < 0, length, last)


def statistics(steps: Step, spec: Spec | None = None, each_agent: bool = False) -> Metrics:
    """Means over the episodes that ended in the rollout.

    Args:
        steps: of the rollout, leaves [T, N, ...].
        spec: of the environment; returns of its teams are then metrics, too, see `teams`.
        each_agent: and those of each agent.

    Returns:
        `rollout/return`, an episode's return averaged over agents, `rollout/length`, `rollout/episodes`, `rollout/NAME`
        for each entry of `info`, read at the last step, and `rollout/return_TEAM` and `rollout/return_AGENT`.
    """
    done = steps.done
    count = done.sum().astype(jnp.float32)
    out: Metrics = {
        "rollout/return": Mean(steps.episode_return.mean(-1).sum(), count),
        "rollout/length": Mean(steps.episode_length.sum().astype(jnp.float32), count),
        "rollout/episodes": count,
    }
    for name, members in _parts(spec, each_agent).items():
        out[f"rollout/return_{name}"] = Mean(steps.episode_return[..., members].mean(-1).sum(), count)
    for name, value in steps.info.items():
        value = value.astype(jnp.float32)
        value = value.reshape(*done.shape, -1).mean(-1)
        out[f"rollout/{name}"] = mean(value, where=done)
    return out


def checks(spec: Spec, played: Rollout) -> Metrics:
    """What the guard is told (see core/guard.py): whether all observations and rewards of each agent, and the global
    states, are finite, those behind the last step and at cuts among them."""
    steps, last, cuts = played.steps, played.vec.ts, played.cuts
    sound = lambda x, axis: jnp.isfinite(x).all([i for i in range(x.ndim) if i != axis % x.ndim])
    both = lambda *arrays: [x for x in arrays if x is not None and jnp.issubdtype(x.dtype, jnp.inexact)]
    observed = both(steps.ts.obs, last.obs, steps.final_obs, None if cuts is None else cuts.obs)
    by_agent = {
        "observations": [sound(x, -1 - len(spec.obs_shape)) for x in observed],
        "rewards": [sound(x, -1) for x in both(steps.reward)],
    }
    out: Metrics = {}
    for what, found in by_agent.items():
        for i, agent in enumerate(spec.agents if found else ()):
            name = f"check/{what} of environment {spec.id}, agent {agent}"
            out[name] = jnp.stack([x[i] for x in found]).all()
    states = both(steps.ts.state, last.state, steps.final_state, None if cuts is None else cuts.state)
    if states:
        out[f"check/global states of environment {spec.id}"] = jnp.stack([jnp.isfinite(x).all() for x in states]).all()
    return out


class Episodes(NamedTuple):
    """One episode in each of N environments."""

    returns: Array
    """[N, A]"""
    length: Array
    """[N] int32"""
    finished: Array
    """[N] bool: it ended in time; else `returns` is the return so far."""
    info: dict[str, Array]
    """[N, ...] at the last step."""


def episodes(
    vec: vector.VecEnv,
    act: Act,
    key: jax.Array,
    carry: Any,
    num_steps: int,
    draw: Draw = jax.random.split,
) -> Episodes:
    """An episode in each of the N environments, from fresh resets, at most `num_steps` long; `draw` as in `collect`."""
    k_act, k_start, k_env = vector.rollout_keys(vec, key, num_steps, starts=vec.num_envs)
    vs = vector.start(vec, k_start)

    def body(c: tuple, random: tuple[Any, Array]) -> tuple[tuple, None]:
        vs, carry, alive, total, length, info = c
        numbers, keys = random
        carry, action, _ = act(numbers, carry, vs)
        env, ts = jax.vmap(vec.env.step)(keys, vs.env, action)
        total = total + jnp.where(alive[:, None], ts.reward, 0.0)
        length = length + alive
        info = jax.tree.map(lambda old, new: jnp.where(_like(alive, new), new, old), info, ts.info)
        alive = alive & ~(ts.terminated | ts.truncated)
        vs = vs._replace(env=env, ts=ts, first=jnp.zeros_like(vs.first))
        return (vs, carry, alive, total, length, info), None

    n = vec.num_envs
    start = (
        vs,
        carry,
        jnp.ones(n, bool),
        jnp.zeros((n, vec.env.spec.num_agents), jnp.float32),
        jnp.zeros(n, jnp.int32),
        vs.ts.info,
    )
    (_, _, alive, total, length, info), _ = jax.lax.scan(body, start, (draw(k_act, num_steps), k_env))
    return Episodes(total, length, ~alive, info)


def evaluate(
    vec: vector.VecEnv,
    act: Act,
    key: jax.Array,
    carry: Any,
    num_steps: int,
    draw: Draw = jax.random.split,
    each_agent: bool = False,
) -> Metrics:
    """Means over `episodes`: `eval/return` of the agents' mean return, `eval/finished` the share that ended in time,
    and returns of teams and agents as in `statistics`."""
    e = episodes(vec, act, key, carry, num_steps, draw)
    out = {
        "eval/return": mean(e.returns),
        "eval/length": mean(e.length),
        "eval/finished": mean(e.finished),
    }
    parts = _parts(vec.env.spec, each_agent)
    out |= {f"eval/return_{name}": mean(e.returns[:, members]) for name, members in parts.items()}
    return out | {f"eval/{k}": mean(v) for k, v in e.info.items()}


def teams(spec: Spec) -> dict[str, list[int]]:
    """The agents of each team by their names without the number at the end: `adversary_0, adversary_1, agent_0` are the
    teams `adversary` and `agent`."""
    found: dict[str, list[int]] = {}
    for i, name in enumerate(spec.agents):
        found.setdefault(re.sub(r"_?\d+$", "", name), []).append(i)
    return found


def _parts(spec: Spec | None, each_agent: bool) -> dict[str, np.ndarray]:
    """Whose returns are metrics of their own: teams where there are several, and agents where they are asked for."""
    if spec is None:
        return {}
    several = teams(spec) if len(teams(spec)) > 1 and not spec.shared_reward else {}
    agents = {name: [i] for i, name in enumerate(spec.agents)} if each_agent and spec.num_agents > 1 else {}
    return {name: np.asarray(members) for name, members in (several | agents).items()}


class Recording(NamedTuple):
    """One episode, drawn: its start and up to T steps."""

    frames: np.ndarray
    """[1 + T, H, W, 3] uint8"""
    returns: np.ndarray
    """[1 + T] rewards so far, mean over agents."""
    end: str
    """terminated, truncated, or empty where the recording ended before the episode."""
    agents: int

    def captions(self) -> list[str]:
        """A line for each frame: step, return so far and, in the last one, how the episode ended."""
        of = "" if self.agents == 1 else f", mean of {self.agents} agents"
        lines = [f"step {t}   return so far {value:.4g}{of}" for t, value in enumerate(self.returns.tolist())]
        return [*lines[:-1], lines[-1] + (f"   {self.end}" if self.end else "")]


def record(env: Environment, policy: Policy, state: Any, seed: int, max_steps: int) -> Recording:
    """Draw one greedy episode on the host. Raises `UserError` if `env` has no picture."""
    k_reset, k_step = jax.random.split(jax.random.key(seed))
    params = policy.params(state)
    carry = policy.init_carry(params, 1)
    env_state, ts = jax.jit(env.reset)(k_reset)
    frames, returns, end = [env.frame(env_state)], [0.0], ""

    @jax.jit
    def advance(carry: Any, env_state: Any, ts: TimeStep, t: Array) -> tuple[Any, Any, TimeStep]:
        mask = None if ts.action_mask is None else ts.action_mask[None]
        carry = policy.rewarded(carry, ts.reward[None])
        carry, action = policy.act(params, carry, ts.obs[None], mask, (t == 0)[None], None)
        env_state, ts = env.step(jax.random.fold_in(k_step, t), env_state, action[0])
        return carry, env_state, ts

    for t in range(max_steps):
        carry, env_state, ts = advance(carry, env_state, ts, jnp.int32(t))
        frames.append(env.frame(env_state))
        returns.append(returns[-1] + float(np.asarray(ts.reward).mean()))
        if bool(ts.terminated | ts.truncated):
            end = "terminated" if ts.terminated else "truncated"
            break
    return Recording(np.stack(frames), np.asarray(returns), end, env.spec.num_agents)


def _like(mask: Array, x: Array) -> Array:
    return mask.reshape(-1, *[1] * (x.ndim - 1))
