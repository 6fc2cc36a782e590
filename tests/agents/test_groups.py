"""Agents that share no parameters never touch each other; agents that die end their returns."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training import make, network, train

from jaxstack.agents import happo, team_ppo
from jaxstack.core.errors import UserError
from jaxstack.envs.base import Discrete, Environment, Spec, first_step

TINY = dict(num_envs=4, num_steps=6, num_minibatches=2, num_epochs=2, hidden=(8,), total_steps=240)
NORMALISED = dict(normalise_value=True, normalise_reward=True, normalise_obs=True)


@dataclass(frozen=True, eq=False)  # hashable with a traced scale
class Scaled(Environment):
    """Another environment, the last agent's rewards times `scale`, which may be traced."""

    env: Environment
    scale: Any

    @property
    def spec(self):
        return self.env.spec

    def reset(self, key):
        return self.env.reset(key)

    def step(self, key, state, action):
        state, ts = self.env.step(key, state, action)
        return state, ts._replace(reward=ts.reward.at[-1].mul(self.scale))


@pytest.mark.parametrize(
    ("agent", "options"),
    [
        ("ippo", dict(sharing="none")),
        ("ippo", dict(sharing="none", gru=4, **NORMALISED)),
        ("mappo", dict(sharing="none", normalise_value=True)),
        ("mappo", dict(sharing="partial", groups=(0, 0, 1), **NORMALISED)),
    ],
)
def test_no_update_sees_the_rewards_of_another_group(agent, options):
    task = network(agent, make(agent, "match", 3, **TINY, **options).config)

    @jax.jit
    def run(scale):
        scaled = task._replace(vec=task.vec._replace(env=Scaled(task.env, scale)))
        learner = team_ppo.make_learner(agent, scaled)
        state, _ = jax.lax.scan(lambda s, _: learner.step(s), learner.init(jax.random.key(0)), None, length=3)
        return {"params": state.params, "opt": state.opt_state, "norms": state.norms._replace(reward=())}, state

    small, state = run(1.0)
    large, other = run(1000.0)
    count = max(task.groups) + 1
    for a, b in zip(jax.tree.leaves(small), jax.tree.leaves(large), strict=True):
        if a.ndim and a.shape[0] == count:
            np.testing.assert_array_equal(a[:-1], b[:-1])
    if task.cfg.normalise_reward:  # a statistic of its own undoes the scale
        deviation = jnp.sqrt(other.norms.reward.stats.var / state.norms.reward.stats.var)
        np.testing.assert_allclose(deviation, [1.0] * (count - 1) + [1000.0], rtol=1e-4)
    else:
        assert any(bool(jnp.any(a[-1] != b[-1])) for a, b in zip(*map(jax.tree.leaves, (state.params, other.params))))


def test_an_independent_agent_learns_what_a_single_learner_would():
    options = TINY | dict(max_grad_norm=0.05, vf_coef=0.7)  # every gradient is clipped
    task = network("ippo", make("ippo", "match", 3, sharing="none", **options).config)
    alone = network("ippo", make("ippo", "match", 1, sharing="full", **options).config)
    learner = team_ppo.make_learner("ippo", task)

    @jax.jit
    def run(key):
        state, batch, _ = team_ppo.gather_batch(task, learner.init(key), key)
        batch = batch._replace(agent_mask=jax.random.bernoulli(key, 0.7, batch.agent_mask.shape))
        return state, batch, team_ppo.ppo_epochs(task, state, batch, key)

    key = jax.random.key(3)
    state, batch, (got, metrics) = run(key)

    @jax.jit
    def single(i):
        pick = lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1, axis=2)
        own = jax.tree.map(lambda x: x if x.ndim < 3 else pick(x), batch)
        row = jax.tree.map(lambda x: x[i], state.params)
        fresh = state._replace(params=row, opt_state=team_ppo.optimiser(alone.cfg, state.hypers).init(row))
        return team_ppo.ppo_epochs(alone, fresh, own, key)

    each = [single(i) for i in range(3)]
    for i, (want, _) in enumerate(each):
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=2e-6), got.params, want.params)
    for name, value in metrics.items():
        assert float(value) == pytest.approx(np.mean([float(m[name]) for _, m in each]), rel=1e-4, abs=1e-5), name


def test_happo_agents_meet_in_the_joint_advantage_and_the_factor_alone():
    task = network("happo", make("happo", "match", 3, normalise_value=True, **TINY).config)
    learner = team_ppo.make_learner("happo", task, happo.sequential_update, happo.init_optimisers)
    first = lambda key: int(jax.random.permutation(jax.random.split(key)[0], 3)[0])
    order = next(k for k in map(jax.random.key, range(50)) if first(k) == 0)

    @jax.jit
    def run(scale):
        scaled = task._replace(vec=task.vec._replace(env=Scaled(task.env, scale)))
        state, batch, _ = team_ppo.gather_batch(scaled, learner.init(jax.random.key(0)), jax.random.key(1))
        batch = batch._replace(advantage=jnp.ones_like(batch.advantage).at[::2].set(-1.0))
        return happo.sequential_update(task, state, batch, order)[0]

    small, large = run(1.0), run(1000.0)
    for a, b in zip(jax.tree.leaves((small.params, small.opt_state)), jax.tree.leaves((large.params, large.opt_state))):
        np.testing.assert_array_equal(a[0], b[0])
    np.testing.assert_array_equal(small.norms.value.mean[:2], large.norms.value.mean[:2])
    assert float(large.norms.value.var[2]) > 1e3 * float(small.norms.value.var[2])
    with pytest.raises(UserError, match="advantage_norm='agent': expected group"):
        make("happo", "match", 3, advantage_norm="agent", **TINY)


@pytest.mark.parametrize(
    ("agent", "options", "equal"),
    [
        ("ippo", dict(sharing="none"), True),
        ("hypermarl", dict(advantage_norm="group"), False),
        ("hypermarl", dict(advantage_norm="agent"), True),
        ("ippo", dict(sharing="full+id", advantage_norm="group"), False),
        ("ippo", dict(sharing="full+id", advantage_norm="agent"), True),
    ],
)
def test_a_bandit_with_one_large_reward(agent, options, equal):
    """Three agents get a_i * [1, 1, 1000]: small rewards are learned where each agent's advantages stand alone."""
    lr = 1e-3 if agent == "hypermarl" else 1e-2
    learner = make(agent, "pay", 3, env_args=("kind=pay", "count=3", "last=1000"), lr=lr, total_steps=15360, **options)
    task = network(agent, learner.config)

    @jax.jit
    def right(key):
        state, _, _ = train(learner, 60, key)
        weights, _ = task.team.materialise(state.params, state.aux_state, None)
        obs = jnp.broadcast_to(jnp.array([1.0, 0.0]), (1, 1, 3, 2))
        _, raw = task.team.actor(weights, (), obs, jnp.zeros((1, 1), bool))
        return jax.nn.softmax(raw, -1)[0, 0, :, 1]

    chances = np.asarray(right(jax.random.key(0)))
    assert chances[2] > 0.98
    if equal:
        assert chances.min() > 0.98
    else:
        assert chances[:2].min() < 0.8


@dataclass(frozen=True)
class Leaving(Environment):
    """Agent 1 leaves after its second step, agent 2 in the step that cuts the episode, agent 0 never. Rewards 1, 2, ...
    go on for all. The end is a cut after 4 steps."""

    @property
    def spec(self):
        return Spec("leaving", ("a", "b", "c"), (1,), Discrete(2), horizon=4, can_terminate=False)

    def reset(self, key):
        return jnp.int32(0), first_step(self.spec, jnp.ones((3, 1)))

    def step(self, key, state, action):
        t = state + 1
        fields = dict(reward=jnp.full(3, t, jnp.float32), truncated=t == 4, agent_mask=t < jnp.array([9, 2, 4]))
        return t, first_step(self.spec, jnp.full((3, 1), 1.0 + t), **fields)


@pytest.mark.parametrize("agent", ["ippo", "mappo", "happo"])
def test_the_return_of_an_agent_ends_at_its_last_live_step(agent, monkeypatch):
    from jaxstack import envs

    monkeypatch.setitem(envs.NATIVE._table, "leaving", "test_groups:Leaving")
    gamma = 0.9
    options = dict(env="leaving", env_args=(), num_envs=2, num_steps=10, num_minibatches=1, lam=1.0, gamma=gamma)
    task = network(agent, make(agent, "one", **options, normalise_reward=False).config)
    learner = team_ppo.make_learner(agent, task)

    @jax.jit
    def run(key):
        state = learner.init(key)
        weights, _ = task.team.materialise(state.params, state.aux_state, None)
        cut = jnp.full((1, 1, 3), 5.0) if task.shape.central else jnp.full((1, 1, 3, 1), 5.0)
        value = task.team.critic(weights, state.carry[1], cut, jnp.zeros((1, 1), bool))[1]
        return team_ppo.gather_batch(task, state, key)[1], value[0, 0]

    batch, after = run(jax.random.key(0))
    # after the first two episodes; lambda 1: returns hold no value but that of the cut
    seen, target = np.asarray(batch.agent_mask[:8, 0]), np.asarray(batch.target[:8, 0])
    np.testing.assert_array_equal(seen, [[True, t % 4 < 2, True] for t in range(8)])
    tail = lambda t, end: sum(gamma ** (k - t) * (k + 1) for k in range(t, end))
    for t in range(8):
        at = t % 4
        np.testing.assert_allclose(target[t, 0], tail(at, 4) + gamma ** (4 - at) * float(after[0]), rtol=1e-5)
        np.testing.assert_allclose(target[t, 2], tail(at, 4), rtol=1e-5)
        if at < 2:
            np.testing.assert_allclose(target[t, 1], tail(at, 2), rtol=1e-5)
