"""Numbers that are not finite: none by design, and what is said of those that are."""

import jax
import numpy as np
import pytest

from jaxstack import agents
from jaxstack.core.runner import train

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
