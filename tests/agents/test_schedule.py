"""The learning rate's schedule has the length of the run that is asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training import make

from jaxstack.core.errors import UserError
from jaxstack.core.learner import as_hypers
from jaxstack.core.runner import resume, train
from jaxstack.sequence import trainer
from jaxstack.sweeps import grid, sweep

OPTIONS = dict(num_envs=2, num_steps=2, num_epochs=1, num_minibatches=1, hidden=(4,), lr=0.5, anneal_lr=True)
QUIET = dict(progress=False, eval_every=-1, chunk=5)


def learner(updates=10, **options):
    return make("ppo", "match", **(OPTIONS | dict(total_steps=4 * updates) | options))


def falling(length, start=0, end=None):
    return 0.5 * np.maximum(1 - np.arange(start, length if end is None else end) / length, 0)


def rates(result, seed=0):
    rows = result.metrics[result.metrics.seed == seed]
    return rows["train/lr"].to_numpy()


def test_the_schedule_ends_with_the_steps_that_are_asked_for(tmp_path, capsys):
    run = tmp_path / "r"
    first = train(learner(), 15, run_dir=run, **QUIET)
    np.testing.assert_allclose(rates(first), falling(15), rtol=1e-5)
    assert first.state.total.tolist() == [15]
    np.testing.assert_allclose(rates(train(learner(), **QUIET)), falling(10), rtol=1e-5)  # the config's own
    capsys.readouterr()
    longer = resume(learner(), run, 20, **QUIET)
    assert "20 steps instead of 15: schedule=extend" in capsys.readouterr().out
    np.testing.assert_allclose(rates(longer)[15:], falling(20, 15), rtol=1e-5)
    assert longer.state.total.tolist() == [20]
    kept = resume(learner(), run, 25, schedule="keep", **QUIET)
    assert "25 steps instead of 15: schedule=keep" in capsys.readouterr().out
    np.testing.assert_array_equal(rates(kept)[20:], 0.0)
    for a, b in zip(jax.tree.leaves(kept.state.params), jax.tree.leaves(longer.state.params)):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(UserError, match="schedule='stretch': expected 'extend' or 'keep'"):
        resume(learner(), run, 30, schedule="stretch", **QUIET)


def test_groups_of_seeds_and_settings_of_a_sweep_have_that_length_too():
    split = train(learner(), 15, seeds=2, split_seeds=1, **QUIET)
    for seed in (0, 1):
        np.testing.assert_allclose(rates(split, seed), falling(15), rtol=1e-5)
    curves = sweep(lambda: learner(), {"lr": grid(0.5, 1.0)}, 1, 15, **QUIET).curves
    for setting, scale in ((0, 1.0), (1, 2.0)):
        got = curves[curves.setting == setting]["train/lr"].to_numpy()
        np.testing.assert_allclose(got, scale * falling(15), rtol=1e-5)


def test_one_program_serves_every_length():
    one, traces = learner(), []

    @jax.jit
    def step(state):
        traces.append(1)
        return one.step(state)

    start = one.init(jax.random.key(0), as_hypers(one.hypers))
    short, long = (step(step(one.with_length(start, n))[0])[1]["train/lr"] for n in (4, 100))
    assert len(traces) == 1
    np.testing.assert_allclose([short, long], [0.5 * 0.75, 0.5 * 0.99], rtol=1e-6)


def test_a_constant_rate_stays_and_happo_has_a_schedule():
    for agent, options, want in (("ppo", dict(anneal_lr=False), 0.5), ("happo", {}, 0.25)):
        one = make(agent, "match", 1, **(OPTIONS | dict(total_steps=8) | options))
        state = jax.jit(one.step)(one.init(jax.random.key(0)))[0]
        assert float(jax.jit(one.step)(state)[1]["train/lr"]) == pytest.approx(want)


def test_sequence_models_follow_the_length_of_the_run():
    options = dict(task="memorisation", task_args=("length=4", "vocab=9"), features=8, depth=1, batch_size=4)
    one = trainer.sequence(num_updates=1000, **options)
    got = train(one, 15, **QUIET)
    config = trainer.Config(num_updates=15)
    want = [trainer.learning_rate(config, config.hypers, k) for k in range(15)]
    np.testing.assert_allclose(rates(got), np.asarray(want), rtol=1e-5)
    assert float(want[1]) == pytest.approx(1e-3)  # two steps of warm-up
    assert float(want[-1]) < 3e-5
    assert jnp.all(got.state.total == 15)
