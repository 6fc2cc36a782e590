"""Numbers that are not finite: none by design, and what is said of those that are."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack import agents
from jaxstack.core.runner import train
from jaxstack.envs.base import Discrete, Environment, Spec, first_step

NORMALISED = dict(normalise_obs=True, normalise_value=True, normalise_reward=True)
SHORT = dict(num_envs=2, num_steps=4, num_minibatches=1, num_epochs=1, hidden=(4,), total_steps=16, eval_episodes=2)


@pytest.mark.parametrize(
    ("agent", "env"), [("ppo", "gymnax/CartPole-v1"), ("ippo", "jaxmarl/MPE_simple_spread_v3"), ("mappo", "navigation")]
)
def test_the_search_for_nan_finds_none_in_a_healthy_run(agent, env):
    """Nor in rollouts without the end of an episode."""
    with jax.debug_nans(True):
        got = train(agents.make(agent, env=env, eval_steps=20, **SHORT, **NORMALISED), seeds=2, progress=False)
    assert got.alive.all()
    assert got.metrics["rollout/episodes"].tolist() == [0.0] * 4
    assert got.metrics["rollout/return"].isna().all()
    assert np.isfinite(got.metrics[[c for c in got.metrics if c.startswith(("loss/", "train/"))]]).all(axis=None)


class FaultyState(NamedTuple):
    t: jax.Array
    at: jax.Array
    """The transition of the fault: the last of the first rollout, or the first of the second."""
    where: jax.Array
    """0: in agent 1's observation, 1: in its reward."""
    what: jax.Array
    """Number of the value in `Faulty.VALUES`."""
    odd: jax.Array
    """The environment's own business."""


@dataclass(frozen=True)
class Faulty(Environment):
    """Two agents; what goes wrong, and when, is drawn from the key of the reset."""

    VALUES = (0.5, np.nan, np.inf, 1e20)

    @property
    def spec(self) -> Spec:
        return Spec("faulty", ("left", "right"), obs_shape=(2,), action_space=Discrete(2), horizon=100)

    def reset(self, key):
        at, where, what = jax.random.randint(key, (3,), jnp.array([4, 0, 0]), jnp.array([6, 2, len(self.VALUES)]))
        state = FaultyState(jnp.int32(0), at, where, what, jnp.float32(-jnp.inf))
        return state, first_step(self.spec, jnp.ones((2, 2)))

    def step(self, key, state, action):
        t = state.t + 1
        fault = jnp.where(t == state.at, jnp.asarray(self.VALUES)[state.what], 0.5)
        noise = jax.random.uniform(key, (2, 2))
        obs = noise.at[1, 0].set(jnp.where(state.where == 0, fault, noise[1, 0]))
        reward = noise[:, 1].at[1].set(jnp.where(state.where == 1, fault, 0.5))
        new = state._replace(t=t, odd=jnp.where(t == 2, jnp.nan, 0.0))
        return new, first_step(self.spec, obs, reward=reward)._replace(truncated=t == 100)


@pytest.mark.parametrize("normalised", [True, False])
def test_a_fault_of_the_environment_is_told_by_its_name_and_enters_nothing(normalised, capsys):
    """A hundred seeds in one program, each with a fault of its own; what an environment keeps to itself is none."""
    options = SHORT | dict(num_envs=1) | (NORMALISED if normalised else {})
    learner = agents.make("ippo", env=f"{__name__}:Faulty", **options)
    got = train(learner, 2, 100, progress=False, eval_every=-1)
    text = capsys.readouterr().out
    env, seen = got.state.vec.env, set()
    for s in range(100):
        at, where, what = (int(x[s, 0]) for x in (env.at, env.where, env.what))
        value, step = Faulty.VALUES[what], 1 if at == 4 else 2
        seen.add((where, what, step))
        thing = ("observations", "rewards")[where]
        if not np.isfinite(value):
            told = f"{thing} of environment faulty, agent right are not finite at step {step}; frozen before it"
            assert f"seed {s}: {told}" in text
        elif value == 1e20 and not normalised and where == 1:  # the square of a target
            assert f"seed {s}: loss/critic is not finite at step {step}" in text
        else:
            assert got.alive[s]
        assert got.alive[s] == (f"seed {s}:" not in text)
    assert len(seen) == 16  # every fault, in either step
    kept = got.state._replace(vec=got.state.vec._replace(env=()))
    for path, x in jax.tree_util.tree_leaves_with_path(kept):
        if jnp.issubdtype(x.dtype, jnp.inexact):
            assert np.isfinite(x).all(), path
