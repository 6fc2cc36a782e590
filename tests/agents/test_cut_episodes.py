"""What PPO learns from: values of truncated episodes, against one critic call for each step, and log-probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training import make, network

from jaxstack.agents import team_ppo
from jaxstack.core.learner import as_hypers
from jaxstack.envs import rollout

STEPS = 12  # the probe's episodes are cut after 5 steps


@pytest.mark.parametrize("gru", [0, 4])
@pytest.mark.parametrize(("agent", "count"), [("ppo", 1), ("mappo", 2)])
def test_next_values_are_those_of_the_true_next_inputs(agent, count, gru):
    options = dict(num_envs=3, num_steps=STEPS, num_minibatches=1, hidden=(4,), total_steps=3 * STEPS, gru=gru)
    learner = make(agent, "endless", count, **options)
    task = network(agent, learner.config)
    state = jax.jit(learner.init)(jax.random.key(0), as_hypers(learner.hypers))
    # a team in the middle of its episodes, at different places of them
    length = jnp.array([0, 2, 4])
    state = state._replace(vec=state.vec._replace(env=state.vec.env._replace(t=length), first=length == 0))
    # nothing distinguishes the probe's observations: tell them apart
    key = jax.random.key(1)

    def run(state):
        act, draw = team_ppo._actor(task, state.params, ())
        played = rollout.collect(task.vec, act, key, state.vec, state.carry[0], STEPS, draw, finals="cuts")
        steps, cuts = played.steps, played.cuts
        assert steps.final_obs is None
        noise = jax.random.normal(key, (2, *steps.ts.obs.shape))
        cuts = cuts._replace(obs=noise[1].at[cuts.step, jnp.arange(3)].get(mode="fill"))
        steps = steps._replace(ts=steps.ts._replace(obs=noise[0]), final_obs=noise[1])
        shape = lambda obs: obs.reshape(*obs.shape[:2], -1) if task.shape.central else obs
        critic_x = lambda obs, _: shape(obs)
        carries, value = task.team.critic(
            state.params, state.carry[1], shape(noise[0]), steps.first, return_all_states=True
        )
        next_value = jnp.concatenate([value[1:], jnp.zeros_like(value[:1])])
        return steps, value, team_ppo.value_of_cut(task, state.params, cuts, carries, next_value, critic_x)

    steps, value, got = jax.jit(run)(state)
    assert int(steps.truncated.sum()) == 2 + 2 + 3  # ceil(12 / 5) of the one that was nearest its end
    shape = lambda obs: obs.reshape(1, obs.shape[0], -1) if task.shape.central else obs[None]
    carry = state.carry[1]
    for t in range(STEPS):
        carry, v = task.team.critic(state.params, carry, shape(steps.ts.obs[t]), steps.first[t][None])
        np.testing.assert_allclose(v[0], value[t], atol=1e-5)
        _, after = task.team.critic(state.params, carry, shape(steps.final_obs[t]), jnp.zeros((1, 3), bool))
        cut = np.asarray(steps.truncated[t])
        np.testing.assert_allclose(got[t][cut], after[0][cut], atol=1e-5)
        if t + 1 < STEPS:
            np.testing.assert_array_equal(got[t][~cut], value[t + 1][~cut])


@pytest.mark.parametrize(("agent", "kind", "count", "gru"), [("ppo", "target", 1, 0), ("mappo", "match", 2, 4)])
def test_ratios_are_one_before_the_first_update(agent, kind, count, gru):
    learner = make(agent, kind, count, num_envs=4, num_steps=8, hidden=(4,), total_steps=64, gru=gru)
    task = network(agent, learner.config)

    @jax.jit
    def run(key):
        state = learner.init(key, as_hypers(learner.hypers))
        _, batch, _ = team_ppo.gather_batch(task, state, key)
        drawn = team_ppo.samples(task, batch)
        minibatch = drawn.take(jnp.arange(drawn.count // 2))
        weights, _ = task.team.materialise(state.params, state.aux_state, None)
        return jnp.exp(team_ppo.distribution(task, weights, minibatch).log_prob(minibatch.action) - minibatch.logp)

    ratio = run(jax.random.key(0))
    assert ratio.size == 16 * count
    np.testing.assert_allclose(ratio, 1.0, atol=1e-6)
