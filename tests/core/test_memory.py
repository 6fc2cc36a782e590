"""Memory by XLA's own analysis: the state is updated in place, rollouts are not copied, shares are divided rightly."""

import json
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_learners import classifier, regression

from jaxstack import agents
from jaxstack.agents import team_ppo
from jaxstack.core import ledger, program
from jaxstack.core.runner import train
from jaxstack.data.sources import ArrayData
from jaxstack.envs import rollout, vector
from jaxstack.sequence import trainer

TINY = dict(env="matrix_game", num_envs=2, num_steps=4, num_minibatches=1, num_epochs=1, hidden=(4,), total_steps=16)
REPLAY = dict(num_envs=2, rounds=2, learning_starts=4, batch_size=4, total_steps=16)
OFF_POLICY = REPLAY | dict(train_every=2, hidden=(4,))
TEAMS = [name for name in agents.AGENTS if issubclass(agents.config_class(name), team_ppo.PPOConfig)]
FEWER = {k: v for k, v in TINY.items() if k not in ("num_minibatches", "num_epochs")}
LEARNERS = {name: lambda name=name: agents.make(name, **TINY) for name in TEAMS if name != "ppo"} | {
    "dqn": lambda: agents.make("dqn", env="cliff_walking", **OFF_POLICY),
    "mate": lambda: agents.make("mate", **FEWER),
    "sac": lambda: agents.make("sac", **REPLAY, actor_hidden=(4,), critic_hidden=(4,)),
    "ppo": lambda: agents.make("ppo", **TINY, env_args=("num_agents=1", "num_actions=3")),
    "recurrent": lambda: agents.make("mappo", **TINY, gru=4),
    "normalised": lambda: agents.make(
        "ippo", **TINY, normalise_obs=True, normalise_value=True, normalise_reward=True, auto_reset="exact"
    ),
    "sequence": lambda: trainer.sequence(features=8, depth=1, batch_size=4, eval_examples=4),
}


def size(tree):
    """Bytes of arrays or shapes; a typed key has as many as its data."""
    data = lambda x: jax.eval_shape(jax.random.key_data, x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return sum(x.size * x.dtype.itemsize for x in map(data, jax.tree.leaves(tree)))


def compiled(learner, seeds=1, **options):
    book = ledger.Ledger()
    program.build(learner, list(range(seeds)), book, evaluate=False, dispatch="scan", chunk=4, **options)
    return book.programs[0]


@pytest.mark.parametrize("name", LEARNERS)
def test_the_whole_state_is_updated_in_place(name):
    learner = LEARNERS[name]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chunk = compiled(learner)
    assert not [str(w.message) for w in caught if "onat" in str(w.message)]
    state = jax.eval_shape(lambda: program.initial(learner, [0], None))
    assert chunk.donated_bytes == pytest.approx(size(state), rel=0.01)
    assert chunk.argument_bytes - chunk.donated_bytes <= 64  # step and count


@pytest.mark.parametrize(("env", "options"), [("matrix_game", ("num_actions=8",)), ("dispersion", ())])
def test_a_rollout_is_not_copied(env, options):
    envs, steps = 64, 256
    sizes = dict(num_envs=envs, num_steps=steps, num_minibatches=4, hidden=(8,), total_steps=envs * steps)
    learner = agents.make("ippo", env=env, env_args=options, **sizes)
    vec = vector.vectorise(team_ppo.make_env(learner.config), envs)

    def play(key):
        idle = jnp.zeros((envs, vec.env.spec.num_agents))
        act = lambda key, carry, vs: (carry, idle.astype(jnp.int32), idle)
        finals = "every" if vec.env.spec.can_truncate else "cuts"
        return rollout.collect(vec, act, key, vector.init(vec, key), (), steps, finals=finals).steps

    recorded = size(jax.eval_shape(play, jax.random.key(0)))
    chunk = compiled(learner)
    assert recorded > 100 * chunk.argument_bytes  # the rollout dominates
    assert 0.5 * recorded <= chunk.temp_bytes <= 3.0 * recorded


def test_bytes_a_seed_and_an_environment_are_what_more_of_them_need():
    learner = lambda envs: agents.make("ippo", **TINY | dict(num_envs=envs, num_steps=64, total_steps=envs * 64))
    # wide enough that XLA packs the buffers of both alike: from 8 to 32 environments it changes by 7%
    few, many, wide = compiled(learner(32), 2), compiled(learner(32), 8), compiled(learner(64), 2)
    assert (few.seeds, many.seeds, few.envs, wide.envs) == (2, 8, 32, 64)
    assert (many.peak_bytes - few.peak_bytes) / 6 == pytest.approx(few.bytes_per_seed, rel=0.1)
    marginal = (wide.bytes_per_seed - few.bytes_per_seed) / 32
    assert 0.5 * few.bytes_per_env <= marginal <= few.bytes_per_env * 1.05


def test_shared_data_is_no_seeds_part():
    data = lambda **options: ArrayData((np.zeros((5000, 64), np.float32), np.zeros(5000, int)), 8, **options)
    one = compiled(classifier(), 4, data=data())
    assert one.shared_bytes == 5000 * 65 * 4 + 4 * 8 * 4  # the dataset and a chunk of indices
    assert one.bytes_per_seed < 64 * 10 * 4 * 8
    assert one.bytes_per_env is None
    own = compiled(classifier(), 4, data=data(per_seed=True))
    assert own.shared_bytes == 5000 * 65 * 4


def test_a_run_prints_and_stores_its_shares(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAXSTACK_PROGRESS", "on")
    train(agents.make("ippo", **TINY), 1, 2, run_dir=tmp_path / "r", eval_every=-1)
    assert re.search(
        r"chunk: .*peak memory [\d.]+ KiB, [\d.]+ KiB a seed, [\d.]+ KiB an environment\n", capsys.readouterr().out
    )
    chunk, init = json.loads((tmp_path / "r" / "ledger.json").read_text())
    assert chunk["bytes_per_seed"] == chunk["peak_bytes"] / 2
    assert chunk["bytes_per_env"] == chunk["peak_bytes"] / 4
    assert init["bytes_per_seed"] is None
    train(regression(), 1, 2, run_dir=tmp_path / "toy", eval_every=-1)
    assert json.loads((tmp_path / "toy" / "ledger.json").read_text())[0]["bytes_per_env"] is None
