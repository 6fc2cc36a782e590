"""Every learner from data finds the best action of a task of one step, from uniformly random actions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack import agents
from jaxstack.core.learner import as_hypers
from jaxstack.core.metrics import on_host
from jaxstack.data.files import save_dataset
from jaxstack.data.offline import dataset

SMALL = dict(env="probe", env_args=("kind=target",), batch_size=64, actor_hidden=(24,), critic_hidden=(24, 24), lr=3e-3)
LEARNERS = {
    "td3_bc": dict(alpha=20.0),
    "rebrac": dict(beta1=1e-3, beta2=0.0),
    "edac": dict(num_critics=3, eta=0.1, lr=1e-2),
    "cql": dict(weight=0.1, num_actions=2, lr=1e-2),
    "iql": dict(beta=30.0, lr=1e-2),
    "bc": dict(fraction=0.1),
}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    rng = np.random.default_rng(0)
    cue, action = rng.choice([-1.0, 1.0], 512), rng.uniform(-1, 1, (512, 1))
    obs = np.stack([cue, 0 * cue], 1)
    rows = dict(obs=obs, action=action, reward=-((action[:, 0] - 0.5 * cue) ** 2), next_obs=obs)
    path = tmp_path_factory.mktemp("data") / "target.npz"
    return str(save_dataset(path, dataset("target", terminated=np.ones(512, bool), **rows)))


def trained(file, name, updates=600, **options):
    one = agents.make(name, **(SMALL | dict(dataset=file, num_updates=updates, eval_episodes=64) | options))
    source = one.source(one.config)

    @jax.jit
    def run(constants, key):
        def step(s, i):
            return one.step(s, source.batch(constants, i, jax.random.fold_in(key, i)))[0], None

        s, _ = jax.lax.scan(step, one.init(key, as_hypers(one.hypers)), jnp.arange(updates, dtype=jnp.int32))
        return one.evaluate(s, key)["eval/return"]

    return float(on_host(run(source.constants(), jax.random.key(0))))


@pytest.mark.parametrize("name", LEARNERS)
def test_a_learner_finds_the_best_action(name, file):
    assert trained(file, name, **LEARNERS[name]) > -0.02


def test_cloning_everything_plays_the_mean_action(file):
    assert trained(file, "bc") == pytest.approx(-0.25, abs=0.05)
