"""Each guarantee of `jaxstack info --determinism` has its test; those that are nowhere else are here."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack import agents, cli
from jaxstack.core import determinism, runner

ROOT = Path(__file__).resolve().parents[2]
SMALL = dict(num_envs=4, num_steps=8, num_minibatches=2, num_epochs=2, hidden=(8,), total_steps=96)
CASES = {
    "ppo": dict(env="gymnax/CartPole-v1"),
    "hypermarl": dict(env="dispersion", gru=4, hyper_hidden=(4,)),
}


@pytest.fixture(params=CASES)
def learner(request):
    return agents.make(request.param, **(SMALL | CASES[request.param]))


def test_a_repeated_run_is_the_same_to_the_bit(learner):
    one, two = (runner.train(learner, seeds=2, progress=False) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, data(one.state), data(two.state))
    assert one.metrics.equals(two.metrics)


def test_vmap_width_changes_one_step_by_rounding_only(learner):
    keys = jax.vmap(jax.random.key)(jnp.arange(8))
    states = jax.jit(lambda keys: jax.lax.map(learner.init, keys))(keys)
    wide, _ = jax.jit(jax.vmap(learner.step))(states)
    alone, _ = jax.jit(learner.step)(jax.tree.map(lambda x: x[5], states))
    for a, b in zip(jax.tree.leaves(data(wide)), jax.tree.leaves(data(alone)), strict=True):
        np.testing.assert_allclose(a[5], b, rtol=1e-5, atol=1e-5)


def data(state):
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, state)


@pytest.mark.parametrize("guarantee", determinism.GUARANTEES, ids=lambda g: g.what[:30])
def test_each_guarantee_names_a_test_that_exists(guarantee):
    file, name = guarantee.test.split("::")
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.M)


def test_the_report_is_on_the_command_line(capsys):
    assert cli.main(["info", "--determinism"]) == 0
    text = capsys.readouterr().out
    assert all(g.what in text for g in determinism.GUARANTEES)
    assert "xla_gpu_deterministic_ops" in text
    assert cli.main(["info"]) == 2
    assert "NAME" in capsys.readouterr().err
