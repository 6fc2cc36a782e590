"""What every learner of the registry must do; agents that act have another contract, agents/test_contract.py."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack import learners
from jaxstack.core import stages
from jaxstack.core.errors import UserError
from jaxstack.core.runner import load_state, resume, train
from jaxstack.core.source import DATA_STREAM
from jaxstack.data.files import save_dataset
from jaxstack.data.offline import dataset
from jaxstack.methods import LEARNERS
from jaxstack.sweeps import grid, sweep

AGENT = dict(num_envs=2, num_steps=4, num_minibatches=1, num_epochs=1, hidden=(4,), total_steps=24, eval_episodes=2)
TEAM = AGENT | dict(env="matrix_game", env_args=("num_agents=2", "horizon=4"))
DATA = dict(env="gymnax/Pendulum-v1", env_args=("max_steps_in_episode=4",), batch_size=4, num_updates=3)
DATA |= dict(actor_hidden=(4,), critic_hidden=(4,), eval_episodes=2)
REPLAY = dict(env="gymnax/Pendulum-v1", env_args=("max_steps_in_episode=4",), total_steps=12, num_envs=2, rounds=2)
REPLAY |= dict(updates=2, learning_starts=4, batch_size=4, buffer_size=64, actor_hidden=(4,), critic_hidden=(4,))
REPLAY |= dict(eval_episodes=2)
TINY = {
    "ppo": AGENT | dict(env="gymnax/CartPole-v1"),
    "dqn": dict(
        env="cliff_walking",
        total_steps=24,
        num_envs=2,
        train_every=2,
        rounds=2,
        learning_starts=4,
        batch_size=4,
        buffer_size=64,
        hidden=(4,),
        eval_episodes=2,
    ),
    "sac": REPLAY,
    "td3": REPLAY,
    "ippo": TEAM,
    "mappo": TEAM,
    "hypermarl": TEAM | dict(hyper_hidden=(4,)),
    "happo": TEAM,
    "dico": AGENT | dict(env="navigation", env_args=("num_agents=2",)),
    "kaleidoscope": TEAM,
    "bc": DATA,
    "td3_bc": DATA,
    "rebrac": DATA,
    "edac": DATA | dict(num_critics=2),
    "iql": DATA,
    "cql": DATA | dict(num_actions=2),
    "imitate-then-improve": DATA | dict(pretrain_steps=1),
    "ptgood": (DATA | dict(env="gymnax/MountainCarContinuous-v0", num_updates=2, batch_size=4, eval_episodes=2))
    | dict(model_hidden=(4,), members=2, elites=1, fit_batch=4, fit_patience=1, fit_calls=1, refit_calls=1)
    | dict(rollouts=4, horizon=2, encoder_hidden=(4,), codes=2, encoder_batch=4, encoder_steps=2, components=2)
    | dict(marginal_steps=2, block=2, plan_width=2, plan_depth=2, online_steps=8, random_steps=2, updates=2)
    | dict(refit_every=4, refill_every=2, rounds=2),
    "mate": {k: v for k, v in TEAM.items() if k not in ("num_minibatches", "num_epochs")}
    | dict(gru=4, encoder_hidden=4, decoder_hidden=(4,), mixer_hidden=(4,)),
    "sequence": dict(
        task="parity", task_args=("length=6",), features=4, depth=1, batch_size=4, num_updates=3, eval_examples=8
    ),
    "classifier": dict(features=(4,), batch_size=16, num_updates=3),
    "diffusion-counterfactual": dict(
        template="ellipses",
        size=16,
        num_train=8,
        num_valid=3,
        batch_size=4,
        num_updates=3,
        features=2,
        multiples=(1,),
        stem=2,
        depth=1,
        widths=(2, 2, 2),
        noise_level=40,
        steps=2,
    ),
    "dart": dict(
        size=32,
        num_train=8,
        num_valid=3,
        batch_size=4,
        num_updates=3,
        widths=(2, 2, 2, 2),
        hidden=4,
    ),
    "choroidalyzer": dict(size=(32, 32), channels=(2, 2), num_train=8, num_valid=3, batch_size=4, num_updates=3),
}
TINY["stroke-ct"] = dict(
    slices=2, size=32, num_train=6, num_valid=3, batch_size=3, num_updates=3, widths=(2, 2), tasks=("old",)
)
TINY["reachnet"] = dict(
    size=(32, 32),
    channels="2,8",
    factors=(4,),
    cap=2,
    resolutions=(1.0, 0.5),
    num_train=8,
    num_valid=3,
    batch_size=4,
    num_updates=3,
)
TINY["detector"] = dict(
    size=32, width=2, channels=4, towers=1, train_images=8, eval_images=6, batch_size=4, num_updates=3, detections=4
)
TINY["pgd"] = TINY["detector"] | dict(teacher_width=2, teacher_updates=2, best=3)
TINY["deepgpet"] = dict(
    size=(32, 32),
    num_train=6,
    num_valid=3,
    batch_size=3,
    num_updates=3,
    width=0.1,
    decoder=(2, 2, 2, 2, 2),
    most_blocks=1,
)
TINY["forward-correction"] = dict(train_images=40, hidden=(4,), batch_size=8, num_updates=3)
TINY["noisy-early-stopping"] = TINY["forward-correction"] | dict(looks_every=2, held_out=16)
# its own loss does not change with a shift of the embedding: Adam would follow the rounding of a bias without gradient
TINY["deepccg"] = dict(hidden=(4,), embedding=2, memory=10, batch_size=400, loss="er", head="linear")
TINY["chunking"] = dict(
    train_images=120, chunks=3, epochs=2, hidden=(4,), batch_size=10, memory=10, method="der++", replay=5
)
TINY["weight-constrained-sgld"] = dict(train_images=40, hidden=(4,), batch_size=8, num_updates=3)
TINY["fds"] = dict(train_images=40, hidden=(4,), batch_size=8, epochs=1, outer_steps=1, retrain_epochs=1)
TINY["fds"] |= dict(shift=1, flip=True)
TINY["uwf-diseases"] = dict(
    size=(32, 40), widths=(2, 2, 2, 2), hidden=4, num_train=8, num_valid=3, batch_size=4, num_updates=3, cycles=1
)
TINY["acat"] = dict(
    template="ellipses",
    slices=2,
    size=32,
    num_train=8,
    num_valid=4,
    widths=(2, 2, 2, 2),
    encoder=(2, 2, 2),
    stem_width=2,
    steps=1,
    batch_size=4,
    autoencoder_updates=1,
    num_updates=1,
    tune_updates=2,
)
# biases before a normalisation have no gradient, and Adam scales its rounding up: its averages are compared instead
UNSCALED = {"choroidalyzer": "opt_state", "reachnet": "opt_state"}
OPTIONS = dict(progress=False, chunk=1)


def transitions(path, env=DATA["env"]):
    """The file of a data set of an environment's shapes, those of Pendulum or of the mountain car."""
    rng, cut = np.random.default_rng(0), np.arange(24) % 6 == 5
    size, bound = (3, 2) if "Pendulum" in env else (2, 1)
    obs, action = rng.normal(size=(24, size)), rng.uniform(-bound, bound, (24, 1))
    rows = dict(obs=obs, action=action, reward=rng.normal(size=24), next_obs=obs + 0.1, truncated=cut)
    return save_dataset(path, dataset("tiny", **rows))


@pytest.fixture(autouse=True)
def _search_for_nan():
    """The usual way to find a NaN finds none in a healthy run."""
    with jax.debug_nans(True):
        yield


def leaves(tree):
    key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return [np.asarray(jax.random.key_data(x) if key(x) else x) for x in jax.tree.leaves(tree)]


def third_step(learner, states, seeds, row):
    """The third step of a run of `seeds`, taken from its states by one of the rows alone."""
    one = lambda states: jax.tree.map(lambda x: x[row], states)
    if learner.source is None:
        return jax.jit(lambda states: learner.step(one(states))[0])(states)
    source = learner.source(learner.config)
    items = jax.tree.map(lambda x: np.zeros((1, *np.shape(x)), np.asarray(x).dtype), source.item(seeds))
    source.items(2, 1, seeds, items)
    item = jax.tree.map(lambda x: x[0, row] if source.per_seed else x[0], items)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(DATA_STREAM), seeds[row]), 2)
    step = lambda states, constants: learner.step(one(states), source.batch(constants, item, key))[0]
    return jax.jit(step)(states, source.constants())


def test_every_learner_has_a_tiny_config():
    assert set(TINY) == set(LEARNERS)


# (steps of all stages, an option that must be positive)
STAGED = {
    "imitate-then-improve": (3, "lr"),
    "ptgood": (1 + 2 + 2 + 4, "actor_lr"),
    "acat": (1 + 1 + 2, "lr"),
    "pgd": (2 + 3, "lr"),
    "fds": (1 + 5, "lr"),
}


@pytest.mark.parametrize("name", STAGED)
def test_a_method_in_stages_trains_resumes_and_names_bad_input(name, tmp_path):
    options = TINY[name]
    if hasattr(learners.config_class(name), "dataset"):
        options = options | dict(dataset=str(transitions(tmp_path / "tiny.npz", options["env"])))
    steps, rate = STAGED[name]
    method = learners.make(name, **options)
    assert method.name == name
    whole = stages.train(method, [0, 3], run_dir=tmp_path / "whole", checkpoint_every=1, **OPTIONS)
    assert whole.alive.all()
    assert whole.learner.objective[0] in whole.metrics
    assert sum(stage.steps for stage in method.stages) == steps
    # stopped in the last stage: bitwise identical
    folder = max((tmp_path / "whole").glob("*_*"))
    shutil.rmtree(folder / "checkpoints" / str(method.stages[-1].steps))
    status = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(status | {"status": "interrupted"}))
    again = stages.resume(method, tmp_path / "whole", **OPTIONS)
    for a, b in zip(leaves(whole.state), leaves(again.state), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(UserError, match=f"{rate}=-1"):
        learners.make(name, **options, **{rate: -1.0})
    with pytest.raises(UserError, match="unknown option 'no_such_option'"):
        learners.make(name, **options, no_such_option=1)
    # what takes one learner says so
    with pytest.raises(UserError, match=f"{name}: found a method in stages, train .* expected a learner"):
        train(method)
    with pytest.raises(UserError, match=f"{name}: found a method in stages, a sweep expected a learner"):
        sweep(lambda **changes: learners.make(name, **options, **changes), {rate: grid(1e-3, 1e-4)})


@pytest.mark.parametrize("name", [name for name in TINY if name not in STAGED])
def test_a_learner_trains_resumes_is_stored_and_names_bad_input(name, tmp_path):
    options = TINY[name]
    if hasattr(learners.config_class(name), "dataset"):
        options = options | dict(dataset=str(transitions(tmp_path / "tiny.npz")))
    learner = learners.make(name, **options)
    assert learner.name == name
    assert learner.num_steps == 3
    assert learner.samples_per_step >= 1
    whole = train(learner, seeds=[0, 3], run_dir=tmp_path / "whole", checkpoint_every=2, **OPTIONS)
    assert whole.alive.all()
    assert list(whole.metrics.step) == [1, 1, 2, 2, 3, 3]
    losses = [c for c in whole.metrics if c.startswith("loss/")]
    assert losses
    assert np.isfinite(whole.metrics[losses]).all(None)
    assert learner.objective[0] in whole.metrics
    # stored and read
    for a, b in zip(leaves(load_state(learner, tmp_path / "whole")), leaves(whole.state), strict=True):
        np.testing.assert_array_equal(a, b)
    # resumed: bitwise identical
    shutil.rmtree(tmp_path / "whole" / "checkpoints" / "3")  # as if it had been stopped after two steps
    earlier = load_state(learner, tmp_path / "whole")
    got = resume(learner, tmp_path / "whole", **OPTIONS)
    for a, b in zip(leaves(whole.state), leaves(got.state), strict=True):
        np.testing.assert_array_equal(a, b)
    # other numbers compile nothing
    other = train(learners.make(name, **options, lr=0.2), seeds=[0, 3], **OPTIONS)
    assert [p.name for p in other.ledger.programs if not p.reused] == []
    assert not np.array_equal(other.metrics[losses], whole.metrics[losses], equal_nan=True)
    # a seed among others took the third step that it takes alone, up to rounding
    alone, part = third_step(learner, earlier, [0, 3], 1), UNSCALED.get(name, "params")
    for a, b in zip(leaves(getattr(whole.state, part)), leaves(getattr(alone, part)), strict=True):
        np.testing.assert_allclose(a[1], b, rtol=1e-3, atol=1e-5)
    # it learned something
    changed = zip(leaves(earlier.params), leaves(whole.state.params), strict=True)
    assert any((a != b).any() for a, b in changed)
    with pytest.raises(UserError, match="lr=-1"):
        learners.make(name, **options, lr=-1.0)
    with pytest.raises(UserError, match="unknown option 'no_such_option'"):
        learners.make(name, **options, no_such_option=1)
