import json
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack import agents
from jaxstack.core import bundle
from jaxstack.core.errors import UserError
from jaxstack.envs.wrappers import Wrapper
from jaxstack.learners import load_policy


@dataclass(frozen=True)
class Masked(Wrapper):
    """Says that it has action masks."""

    @property
    def spec(self):
        return replace(self.env.spec, has_action_mask=True)


SMALL = dict(env="matrix_game", num_envs=4, num_steps=4, num_minibatches=1, total_steps=16, hidden=(8,))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    learner = agents.make("hypermarl", **SMALL, normalise_obs=True)
    state = jax.jit(learner.init)(jax.random.key(3))
    return learner, state, bundle.save_policy(tmp_path_factory.mktemp("bundle") / "policy", learner, state)


def test_a_loaded_policy_acts_like_the_learner(saved):
    learner, state, path = saved
    policy = load_policy(path)
    obs = jax.random.normal(jax.random.key(0), (5, 4, 16))
    first = jnp.zeros(5, bool)
    for key in (None, jax.random.key(1)):
        _, action = policy.act(obs, key=key)
        _, expected = learner.policy.act(learner.policy.params(state), (), obs, None, first, key)
        np.testing.assert_array_equal(action, expected)
    assert policy.spec["agent"] == "hypermarl"


def test_hypernetworks_are_not_stored(saved):
    _, _, path = saved
    names = json.loads((path / "policy.json").read_text())["arrays"]
    assert not any("trunk" in n or "embedding" in n for n in names)
    assert any("obs_norm" in n for n in names)


@pytest.mark.parametrize("damage", ["no json", "bad json", "no arrays", "cut arrays", "other format", "other shape"])
def test_damage_is_named(saved, tmp_path, damage):
    _, _, path = saved
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    spec, arrays = tmp_path / "policy.json", tmp_path / "policy.safetensors"
    content = json.loads(spec.read_text())
    expected = "policy.json"
    if damage == "no json":
        spec.unlink()
    elif damage == "bad json":
        spec.write_text("{")
    elif damage == "other format":
        spec.write_text(json.dumps(content | {"format": 99}))
    elif damage == "other shape":
        content["config"]["hidden"] = [9]
        spec.write_text(json.dumps(content))
        expected = "shape"
    else:
        expected = "policy.safetensors"
        if damage == "no arrays":
            arrays.unlink()
        else:
            arrays.write_bytes(arrays.read_bytes()[:-20])
    with pytest.raises(UserError, match=expected):
        load_policy(tmp_path)


def test_wrong_inputs_of_a_policy_are_named(saved):
    policy = load_policy(saved[2])
    obs = np.zeros((5, 4, 16), np.float32)
    assert str(policy).startswith("LoadedPolicy(hypermarl in matrix_game, 4 agents; ")
    for inputs, message in (
        (dict(obs=obs[:, :3]), r"obs: found an array \[5, 3, 16\], expected \[B, 4, 16\] of matrix_game"),
        (dict(obs=obs[0]), r"obs: found an array \[4, 16\], expected \[B, 4, 16\]"),
        (dict(obs=obs[:0]), r"found an array \[0, 4, 16\]"),
        (dict(obs=obs[..., :9]), r"found an array \[5, 4, 9\]"),
        (dict(obs=obs + np.nan), "obs: found numbers that are not finite"),
        (dict(obs=obs, first=np.zeros(4, bool)), r"first: found an array \[4\], expected \[5\]"),
        (dict(obs=obs, carry=(np.zeros(3),)), "carry: found .* expected that of 5 environments"),
    ):
        with pytest.raises(UserError, match=message):
            policy.act(**inputs)
    jax.jit(lambda obs: policy.act(obs)[1])(obs)  # traced numbers pass


def test_a_mask_is_needed_where_the_environment_has_one():
    learner = agents.make("ippo", **SMALL)
    spec = learner.env.spec
    masked = learner._replace(env=Masked(learner.env))
    policy = bundle.LoadedPolicy(masked, jax.jit(learner.init)(jax.random.key(0)).params, {})
    obs = np.zeros((2, spec.num_agents, *spec.obs_shape), np.float32)
    mask = np.ones((2, spec.num_agents, spec.action_space.n), bool)
    with pytest.raises(UserError, match=r"action_mask: found None, expected .* has one"):
        policy.act(obs)
    with pytest.raises(UserError, match=r"action_mask: found an array"):
        policy.act(obs, action_mask=mask[..., :1])
    with pytest.raises(UserError, match="found an agent without a legal action"):
        policy.act(obs, action_mask=mask & False)
