import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack import agents
from jaxstack.core import bundle
from jaxstack.core.errors import UserError
from jaxstack.learners import load_policy

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
