"""Conventions or grounded behaviour: an audit of trained pairs (after Tessera et al., 2025, arXiv 2507.18333).

A pair that trains together may agree on actions that use neither observations nor memory. The audit plays each trained
pair with itself, its agents with those of other seeds, and agent 0 with partners that do not adapt. The measures and
the case study on follow_partner are this project's; the paper's own case study is not public.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.core import memo
from jaxstack.core.errors import UserError
from jaxstack.core.learner import Key, Learner
from jaxstack.envs import rollout, vector
from jaxstack.envs.base import Discrete, Environment
from jaxstack.measures import crossplay, probes
from jaxstack.measures.partners import Partner
from jaxstack.report import plots, stats

RECORDED = 200
"""Episodes that are recorded for the probes."""


class AuditReport(NamedTuple):
    """What K trained pairs do. Scores are mean over both agents: rewards per step where episodes have one length, else
    returns per episode."""

    self_play: np.ndarray
    """[K] greedy."""
    self_play_sampled: np.ndarray
    """[K] with sampled actions: greedy ties make untrained pairs look coordinated."""
    matrix: np.ndarray
    """[K, K] agent 0 of the row's pair with agent 1 of the column's, greedy."""
    partners: dict[str, np.ndarray]
    """[K] agent 0 with each partner, greedy."""
    chance: float
    """The score of uniform actions."""
    most_used: np.ndarray
    """[K] share of agent 0's steps that its most used action takes, in self-play."""
    probes: list[dict[str, probes.Probe]]
    """Probes of each pair's self-play."""

    def convention_index(self, partner: str) -> np.ndarray:
        """[K] with one of the partners."""
        return convention_index(self.self_play, self.partners[partner], self.chance)

    def rows(self) -> list[dict[str, Any]]:
        """One row per pair. Probes of constant actions, whose normaliser H(A) is 0, are 0 and flagged."""
        out = []
        for k, found in enumerate(self.probes):
            row: dict[str, Any] = {"pair": k, "self-play": float(self.self_play[k])}
            row["self-play, sampled"] = float(self.self_play_sampled[k])
            if len(self.matrix) > 1:
                row["cross-play"] = float(np.delete(self.matrix[k], k).mean())
            row |= {f"with {n}": float(v[k]) for n, v in self.partners.items()}
            row["most used action"] = float(self.most_used[k])
            row |= {n: 0.0 if np.isnan(p.norm) else p.norm for n, p in found.items()}
            row["constant"] = bool(np.isnan(found["OAR"].norm))
            out.append(row)
        return out

    def summary(self) -> dict[str, stats.Estimate]:
        """Means over pairs with 95% bootstrap intervals."""
        out = {"self-play": stats.estimate(stats.mean, self.self_play)}
        if len(self.matrix) > 1:
            out["self-play - cross-play"] = crossplay_drop(self.matrix, self.self_play)
        for name, scores in self.partners.items():
            out[f"with {name}"] = stats.estimate(stats.mean, scores)
            index = self.convention_index(name)
            if np.isfinite(index).all():
                out[f"convention index, {name}"] = stats.estimate(stats.mean, index)
        return out

    def figure(self, path: str | Path, title: str = "") -> Path:
        """The matrix of cross-play as a heat map."""
        names = range(len(self.matrix))
        axes = ("agent 0 of seed", "agent 1 of seed")
        return plots.heat_map(self.matrix, path, names, names, "score", axes, title)


def convention_index(own: Any, with_partner: Any, chance: float) -> np.ndarray:
    """(J_self - J_partner) / (J_self - chance): 1 for a pure convention, 0 for behaviour that carries over.

    NaN where self-play is no better than chance.
    """
    own, with_partner = np.asarray(own, np.float64), np.asarray(with_partner, np.float64)
    gain = own - chance
    return np.where(gain > 1e-9, (own - with_partner) / np.where(gain > 1e-9, gain, 1.0), np.nan)


def groundedness(with_partner: Any, chance: float, optimum: float) -> np.ndarray:
    """(J_partner - chance) / (J_opt - chance): 1 for the best reply to the partner, 0 for chance."""
    return (np.asarray(with_partner, np.float64) - chance) / (optimum - chance)


def crossplay_drop(matrix: Any, own: Any, resamples: int = 10_000, seed: int = 0) -> stats.Estimate:
    """Return mean self-play less mean cross-play over ordered pairs of different seeds, with a 95% bootstrap interval.

    Seeds are resampled, not pairs: pairs that share a seed are not independent. A resample counts the pairs of two
    different seeds in it.

    Raises:
        UserError: fewer than two seeds.
    """
    matrix, own = np.asarray(matrix, np.float64), np.asarray(own, np.float64)
    count = len(own)
    if count < 2:
        raise UserError(f"crossplay_drop: expected at least 2 seeds, found {count}")
    drawn = np.random.default_rng(seed).integers(0, count, (resamples, count))
    weight = np.stack([np.bincount(d, minlength=count) for d in drawn]).astype(np.float64)
    pairs = weight[:, :, None] * weight[:, None, :] * ~np.eye(count, dtype=bool)
    total = pairs.sum((1, 2))
    some = total > 0
    drop = (weight @ own)[some] / count - (pairs[some] * matrix).sum((1, 2)) / total[some]
    value = own.mean() - matrix[~np.eye(count, dtype=bool)].mean()
    low, high = np.percentile(drop, [2.5, 97.5])
    return stats.Estimate(float(value), float(low), float(high))


def with_partner(
    learner: Learner, states: Any, env: Environment, partner: Partner, key: Key, episodes: int = 256
) -> np.ndarray:
    """Return [K] scores of agent 0 of each pair (`states` [K, ...], greedy) with `partner`."""
    policy = crossplay.policy_of(learner)
    steps = crossplay.longest(learner, env)
    vec = vector.vectorise(env, episodes)

    def run(states: Any, key: Key) -> Array:
        def one(params: Any) -> Array:
            act = crossplay.act_with(policy, params, greedy=True)

            def both(k: Key, carry: Any, vs: vector.VecState) -> tuple[Any, Array, tuple]:
                k_own, k_partner = jax.random.split(k)
                own, action, _ = act(k_own, carry[0], vs)
                theirs, memory = partner.act(k_partner, carry[1], vs.ts.obs[:, 1])
                return (own, memory), action.at[:, 1].set(theirs.astype(action.dtype)), ()

            carry = (policy.init_carry(params, episodes), partner.init(episodes))
            played = rollout.episodes(vec, both, key, carry, steps)
            return played.returns.mean() / _unit(env)

        return jax.vmap(one)(jax.vmap(policy.params)(states))

    return np.asarray(memo.jit(run)(states, key), np.float64)


def record(
    learner: Learner, states: Any, env: Environment, key: Key, episodes: int = RECORDED
) -> list[probes.Trajectories]:
    """Play greedily and keep what the probes read: `Trajectories` of each pair or team of `states` [K, ...].

    The hidden state is the recurrent carry after it read the observation; agents that cannot act are marked by
    nothing here, so an environment in which agents die needs episodes cut at the first death.
    """
    policy = crossplay.policy_of(learner)
    steps = crossplay.longest(learner, env)
    vec = vector.vectorise(env, episodes)

    def run(states: Any, key: Key) -> tuple:
        def one(params: Any) -> tuple:
            act = crossplay.act_with(policy, params, greedy=True)
            _, k_start, k_env = vector.rollout_keys(vec, key, steps, starts=episodes)
            vs = vector.start(vec, k_start)

            def body(c: tuple, keys: Array) -> tuple[tuple, tuple]:
                vs, carry, alive = c
                carry, action, _ = act(keys[0], carry, vs)
                env_state, ts = jax.vmap(env.step)(keys, vs.env, action)
                seen = (vs.ts.obs, action, carry, alive)
                alive = alive & ~(ts.terminated | ts.truncated)
                return (vs._replace(env=env_state, ts=ts, first=jnp.zeros_like(vs.first)), carry, alive), seen

            start = (vs, policy.init_carry(params, episodes), jnp.ones(episodes, bool))
            return jax.lax.scan(body, start, k_env)[1]

        return jax.vmap(one)(jax.vmap(policy.params)(states))

    obs, action, carry, alive = jax.tree.map(np.asarray, memo.jit(run)(states, key))
    carries = jax.tree.leaves(carry)
    out = []
    for k in range(len(obs)):
        turned = lambda x, k=k: np.moveaxis(x[k], 0, 1)
        hidden = np.concatenate([turned(c) for c in carries], -1) if carries else None
        out.append(probes.trajectories(turned(obs), turned(action), hidden, turned(alive)))
    return out


def audit(
    env: Environment,
    learner: Learner,
    states: Any,
    partners: Mapping[str, Partner],
    *,
    key: Key | None = None,
    episodes: int = 256,
    settings: probes.Settings = probes.Settings(),
) -> AuditReport:
    """Play K trained pairs with themselves, with each other and with partners that do not adapt.

    Args:
        env: an environment of two agents in which both act (follow_partner: partner=learned).
        learner: what trained them.
        states: [K, ...] their states.
        partners: names and players of agent 1's side.
        key: of all episodes; the same episodes for all.
        episodes: episodes per score; the probes read at most 200.
        settings: of the probes.

    Raises:
        UserError: an environment of other than two agents, or without discrete actions.
    """
    spec = env.spec
    if spec.num_agents != 2:
        raise UserError(f"conventions: {spec.id}: expected 2 agents, found {spec.num_agents}")
    if not isinstance(spec.action_space, Discrete):
        raise UserError(f"conventions: {spec.id}: expected discrete actions, found {spec.action_space}")
    key = jax.random.key(0) if key is None else key
    options: dict[str, Any] = dict(episodes=episodes, key=key)

    def score(greedy: bool) -> np.ndarray:
        played = crossplay.evaluate_many(learner, states, {"own": env}, greedy=greedy, **options)["own"]
        return np.asarray(played.returns).mean((1, 2)) / _unit(env)

    own, sampled = score(True), score(False)
    matrix = crossplay.cross_play(learner, states, env=env, slots=(0,), **options).returns[0].mean(-1) / _unit(env)
    scores = {n: with_partner(learner, states, env, p, key, episodes) for n, p in partners.items()}
    recorded = record(learner, states, env, key, min(episodes, RECORDED))
    used = [np.bincount(t.action[..., 0][t.valid]).max() / t.valid.sum() for t in recorded]
    found = [probes.audit(t, settings) for t in recorded]
    return AuditReport(own, sampled, matrix, scores, _chance(env, key, episodes), np.asarray(used), found)


def _unit(env: Environment) -> int:
    """Steps per episode where all have the same number, else 1."""
    spec = env.spec
    return spec.horizon if spec.horizon and not spec.can_terminate else 1


def _chance(env: Environment, key: Key, episodes: int) -> float:
    """The score of uniform actions."""
    vec = vector.vectorise(env, episodes)
    act, draw = rollout.random_policy(vec)
    steps = env.spec.horizon or 1000
    played = memo.jit(lambda k: rollout.episodes(vec, act, k, (), steps, draw).returns.mean())(key)
    return float(played) / _unit(env)
