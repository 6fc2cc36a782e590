"""Evaluation of many trained members at once: across environments, and of mixed teams (cross-play).

Cross-play pairs agents of separately trained teams to see how much each relies on its own partners' conventions (Hu et
al., 2020, "Other-Play" for zero-shot coordination). All members, pairs and slots see the same episodes: start states
and noise come from one key, so differences are paired.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack import envs
from jaxstack.core import memo
from jaxstack.core.errors import UserError
from jaxstack.core.learner import Key, Learner, Policy
from jaxstack.envs import rollout, vector
from jaxstack.envs.base import Environment
from jaxstack.nn.observations import inputs_of
from jaxstack.report import plots, stats

RESAMPLES = 2000


class CrossPlay(NamedTuple):
    """Returns of mixed teams: agent `slots[l]` is member p's, all other agents are member q's."""

    returns: np.ndarray
    """[L, K, K, N] mean over the agents of each of N episodes; axes slot, p, q, episode."""
    slots: tuple[int, ...]

    @property
    def matrix(self) -> np.ndarray:
        """[K, K] mean over episodes and slots; the diagonal is self-play."""
        return self.returns.mean((0, 3))

    def interval(self) -> tuple[np.ndarray, np.ndarray]:
        """(low, high) [K, K] 95% bootstrap interval of `matrix` over episodes; NaN for one episode."""
        _, k, _, n = self.returns.shape
        scores = self.returns.mean(0).reshape(k * k, n).T
        _, low, high = stats.bootstrap(stats.by_task, scores, resamples=RESAMPLES)
        return np.asarray(low).reshape(k, k), np.asarray(high).reshape(k, k)

    def summary(self) -> dict[str, stats.Estimate]:
        """Self-play and, for two members or more, cross-play and their difference: means over members with 95%
        bootstrap intervals. A member's cross-play is its mean over all teams that it is in with another member."""
        matrix, count = self.matrix, len(self.matrix)
        own = matrix.diagonal()
        out = {"self-play": stats.estimate(stats.mean, own, resamples=RESAMPLES)}
        if count > 1:
            mixed = (matrix.sum(0) + matrix.sum(1) - 2 * own) / (2 * (count - 1))
            out["cross-play"] = stats.estimate(stats.mean, mixed, resamples=RESAMPLES)
            out["self-play - cross-play"] = stats.estimate(stats.mean, own - mixed, resamples=RESAMPLES)
        return out

    def figure(self, path: str | Path, names: Sequence[Any] | None = None, title: str = "") -> Path:
        """The matrix as a heat map."""
        names = range(len(self.matrix)) if names is None else names
        slots = ", ".join(map(str, self.slots))
        axes = (f"member in slot {slots}" + " (mean)" * (len(self.slots) > 1), "member in all other slots")
        return plots.heat_map(self.matrix, path, names, names, "return", axes, title)

    def save(
        self, path: str | Path, names: Sequence[Any] | None = None, facts: Mapping[str, Any] | None = None
    ) -> None:
        """`path` with .csv (the matrix; rows are p) and .json (also the intervals, the matrix of each slot, the summary
        and `facts`). Raises `UserError` when they cannot be written."""
        names = [str(n) for n in (range(len(self.matrix)) if names is None else names)]
        low, high = self.interval()
        content = dict(facts or {}) | {
            "members": names,
            "slots": self.slots,
            "episodes": self.returns.shape[-1],
            "matrix": self.matrix.tolist(),
            "low": _finite(low),
            "high": _finite(high),
            "by_slot": self.returns.mean(3).tolist(),
            "summary": {k: _finite(np.asarray(e)) for k, e in self.summary().items()},
        }
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path.with_suffix(".csv"), "w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerows([["", *names], *([n, *row] for n, row in zip(names, self.matrix.tolist()))])
            path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        except OSError as e:
            raise UserError(f"{path}: cannot be written ({e.strerror})") from e


def evaluate_many(
    learner: Learner,
    states: Any,
    environments: Mapping[str, Environment] | Sequence[Environment | str] | None = None,
    key: Key | None = None,
    *,
    episodes: int = 128,
    greedy: bool = True,
    at_once: int | None = None,
) -> dict[str, rollout.Episodes]:
    """Episodes of K members (`states` [K, ...] of one learner) in each environment (default: the learner's own).

    One jitted call an environment, vmapped over members, at most `at_once` of them at a time. Returns, by the
    environment's name, `Episodes` with leaves [K, N, ...]. Raises `UserError` for a learner without policy or an
    environment whose agents, observations or actions are others than the learner's.
    """
    policy, own = policy_of(learner), learner.env
    key = jax.random.key(0) if key is None else key
    count = _members(states, episodes, at_once)
    found = {}
    for name, env in _named(environments, own).items():
        _same_task(learner, own, name, env)
        vec, steps = vector.vectorise(env, episodes), longest(learner, env)

        def run(states: Any, key: Key, vec: vector.VecEnv = vec, steps: int = steps) -> rollout.Episodes:
            def one(p: Any) -> rollout.Episodes:
                return rollout.episodes(vec, act_with(policy, p, greedy), key, policy.init_carry(p, episodes), steps)

            return _map(one, jax.vmap(policy.params)(states), count, at_once)

        found[name] = jax.tree.map(np.asarray, memo.jit(run)(states, key))
    return found


def cross_play(
    learner: Learner,
    states: Any,
    key: Key | None = None,
    *,
    env: Environment | None = None,
    slots: Sequence[int] | None = None,
    episodes: int = 128,
    greedy: bool = True,
    at_once: int | None = None,
) -> CrossPlay:
    """Every member p of K (`states` [K, ...] of one learner) in a slot of the team of every member q.

    `slots` are the agents that are replaced, one at a time (default: each in turn). One jitted call, vmapped over
    slots and pairs, at most `at_once` of these teams at a time. Both members of a team see all observations and act;
    only the actions of their own agents are played. Raises `UserError` for a learner without policy, a team of one, or
    slots that are no agents.
    """
    policy, own = policy_of(learner), learner.env
    env = next(iter(_named(None if env is None else [env], own).values()))
    _same_task(learner, own, "env", env)
    agents = env.spec.num_agents
    slots = tuple(range(agents)) if slots is None else tuple(slots)
    if agents < 2:
        raise UserError(f"{env.spec.id}: expected a team of at least 2 agents for cross-play")
    if not slots or not all(0 <= s < agents for s in slots):
        raise UserError(f"slots={slots}: expected agents 0 to {agents - 1}")
    key = jax.random.key(0) if key is None else key
    count = _members(states, episodes, at_once)
    vec, steps = vector.vectorise(env, episodes), longest(learner, env)
    teams = [x.ravel() for x in np.meshgrid(np.asarray(slots), np.arange(count), np.arange(count), indexing="ij")]

    def run(states: Any, key: Key) -> Array:
        params = jax.vmap(policy.params)(states)

        def one(team: tuple[Array, Array, Array]) -> Array:
            slot, *pair = team
            p, q = (jax.tree.map(lambda x, i=i: x[i], params) for i in pair)
            carry = (policy.init_carry(p, episodes), policy.init_carry(q, episodes))
            both = _mixed(act_with(policy, p, greedy), act_with(policy, q, greedy), jnp.arange(agents) == slot)
            return rollout.episodes(vec, both, key, carry, steps).returns.mean(-1)

        return _map(one, tuple(map(jnp.asarray, teams)), len(teams[0]), at_once)

    returns = np.asarray(memo.jit(run)(states, key), np.float64)
    return CrossPlay(returns.reshape(len(slots), count, count, episodes), slots)


def act_with(policy: Policy, params: Any, greedy: bool) -> rollout.Act:
    def act(key: Key, carry: Any, vs: vector.VecState) -> tuple[Any, Array, tuple]:
        ts = vs.ts
        carry = policy.rewarded(carry, ts.reward)
        carry, action = policy.act(params, carry, ts.obs, ts.action_mask, vs.first, None if greedy else key)
        return carry, action, ()

    return act


def _mixed(one: rollout.Act, other: rollout.Act, mine: Array) -> rollout.Act:
    """Actions of `one` for the agents in `mine` [A], else of `other`."""

    def act(key: Key, carry: Any, vs: vector.VecState) -> tuple[Any, Array, tuple]:
        first, a, _ = one(key, carry[0], vs)
        second, b, _ = other(key, carry[1], vs)
        return (first, second), jnp.where(mine.reshape(-1, *[1] * (a.ndim - 2)), a, b), ()

    return act


def _map(function: Any, xs: Any, count: int, at_once: int | None) -> Any:
    return jax.vmap(function)(xs) if at_once is None else jax.lax.map(function, xs, batch_size=min(at_once, count))


def policy_of(learner: Learner) -> Policy:
    if learner.policy is None:
        raise UserError(f"{learner.name}: has no policy to act with")
    return learner.policy


def _named(environments: Any, own: Environment | None) -> dict[str, Environment]:
    if environments is None:
        if own is None:
            raise UserError("environments: expected at least one, as the learner has none")
        return {own.spec.id: own}
    if isinstance(environments, Mapping):
        return dict(environments)
    made = [envs.make(e) if isinstance(e, str) else e for e in environments]
    names = [e.spec.id for e in made]
    if len(set(names)) < len(names):
        raise UserError(f"environments: expected a mapping of names, as ids are equal: {', '.join(names)}")
    return dict(zip(names, made))


def _same_task(learner: Learner, own: Environment | None, name: str, env: Environment) -> None:
    if own is None:
        return
    for field in ("num_agents", "obs_shape", "observation", "action_space", "action_sizes"):
        mine, theirs = getattr(own.spec, field), getattr(env.spec, field)
        # bounds of real numbers may differ: networks do not read them
        equal = inputs_of(own.spec) == inputs_of(env.spec) if field == "observation" else mine == theirs
        if not equal:
            raise UserError(f"{name}: {field}={theirs}, expected {mine}, for which {learner.name} was trained")


def _members(states: Any, episodes: int, at_once: int | None) -> int:
    sizes = {jnp.shape(x)[0] if jnp.ndim(x) else 0 for x in jax.tree.leaves(states)}
    if len(sizes) != 1 or 0 in sizes:
        raise UserError(f"states: expected leaves with one leading axis of members, found lengths {sorted(sizes)}")
    if episodes < 1:
        raise UserError(f"episodes={episodes}: expected at least 1")
    if at_once is not None and at_once < 1:
        raise UserError(f"at_once={at_once}: expected at least 1")
    return sizes.pop()


def longest(learner: Learner, env: Environment) -> int:
    return env.spec.horizon or getattr(learner.config, "eval_steps", 1000)


def _finite(x: np.ndarray) -> Any:
    """Lists, with None for NaN."""
    out = x.astype(object)
    out[~np.isfinite(x)] = None
    return out.tolist()
