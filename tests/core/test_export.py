"""Exported policies act like the policy, at any batch size, and a wrong file is not left behind."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack import agents, envs
from jaxstack.core import bundle, export
from jaxstack.core.errors import UserError
from jaxstack.learners import load_policy

CASES = {
    "feed-forward": ("ippo", dict(env="dispersion", hidden=(8,))),
    "generated weights": ("hypermarl", dict(env="dispersion", hidden=(8,), hyper_hidden=(4,))),
    "recurrent": ("ippo", dict(env="dispersion", hidden=(8,), gru=4)),
    "categories": ("mappo", dict(env="jaxmarl/switch_riddle", hidden=(8,))),
    "continuous": ("ippo", dict(env="navigation", hidden=(8,), normalise_obs=True)),
}


@pytest.fixture(scope="module", params=CASES)
def policy(request, tmp_path_factory):
    agent, options = CASES[request.param]
    learner = agents.make(agent, **options, num_envs=2, num_steps=4, num_minibatches=1, total_steps=8)
    path = tmp_path_factory.mktemp("policy")
    return load_policy(bundle.save_policy(path, learner, jax.jit(learner.init)(jax.random.key(0))))


def obs_shape(policy):
    spec = envs.make(policy.learner.config.env).spec
    return (spec.num_agents, *spec.obs_shape)


def obs_dtype(policy):
    return envs.make(policy.learner.config.env).spec.observation.dtype


def test_stablehlo_acts_like_the_policy(policy, tmp_path):
    dtype = obs_dtype(policy)
    path = export.stablehlo(policy, obs_shape(policy), tmp_path / "policy.stablehlo", obs_dtype=dtype)
    run = export.load_stablehlo(path)
    signature = json.loads((tmp_path / "policy.stablehlo.json").read_text())
    assert signature["inputs"][0] == {"shape": ["batch", *obs_shape(policy)], "dtype": jnp.dtype(dtype).name}
    assert signature["platforms"] == ["cpu", "cuda", "tpu"]
    for batch in (2, 7):
        obs = jax.random.normal(jax.random.key(batch), (batch, *obs_shape(policy))).astype(dtype)
        first = jnp.arange(batch) % 2 == 0
        carry = policy.init_carry(batch)
        want_carry, want = policy.act(obs, carry, first=first)
        *got_carry, got = run(obs, first, *jax.tree.leaves(carry))
        np.testing.assert_allclose(got, want, atol=1e-6)
        for a, b in zip(got_carry, jax.tree.leaves(want_carry), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


def test_masked_actions_are_never_taken(tmp_path):
    learner = agents.make("ippo", env="dispersion", hidden=(8,), num_minibatches=1, num_envs=2, num_steps=4)
    path = bundle.save_policy(tmp_path / "p", learner, jax.jit(learner.init)(jax.random.key(0)))
    policy = load_policy(path)
    count = envs.make("dispersion").spec.action_space.n
    run = export.load_stablehlo(export.stablehlo(policy, obs_shape(policy), tmp_path / "x", mask_size=count))
    mask = jnp.zeros((3, 4, count), bool).at[..., 2].set(True)
    *_, action = run(jnp.ones((3, *obs_shape(policy))), jnp.ones(3, bool), mask)
    assert (np.asarray(action) == 2).all()


def test_differing_outputs_are_refused_and_the_file_removed(tmp_path):
    path = tmp_path / "x"
    path.write_text("x")
    inputs = lambda batch: [jnp.ones((batch, 2))]
    with pytest.raises(UserError, match=r"output 0 differs from the policy's by 0\.5"):
        export._verify(path, lambda x: (x + 0.5,), lambda x: (x,), inputs)
    assert not path.exists()


def test_bad_files_and_platforms_are_named(policy, tmp_path):
    with pytest.raises(UserError, match="gpuu"):
        export.stablehlo(policy, obs_shape(policy), tmp_path / "x", platforms=("gpuu",))
    with pytest.raises(UserError, match="not found"):
        export.load_stablehlo(tmp_path / "none")
    (tmp_path / "bad").write_bytes(b"no export")
    with pytest.raises(UserError, match="not an exported policy"):
        export.load_stablehlo(tmp_path / "bad")
