"""Run by test_devices.py with 8 forced host devices: one step on many devices against one, from the same state."""

import sys

import jax
import numpy as np
from toy_envs import tracker
from toy_learners import numbers

from jaxstack import agents
from jaxstack.core import program
from jaxstack.core.ledger import Ledger
from jaxstack.core.runner import resume, train

SEEDS = [3, 5, 6, 8]


def step(learner, devices, env_devices, start):
    """(state, metrics) after one step from the whole arrays `start`, and the compiled programs."""
    book = Ledger()
    options = dict(chunk=1, evaluate=False, devices=devices, env_devices=env_devices)
    programs = program.build(learner, SEEDS, book, **options)
    begun = programs.init()
    for a, b in zip(numbers(begun), numbers(start)):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    place = lambda tree: jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), tree, begun)
    state, _alive, metrics = programs.advance(*place(start), 0, 1)
    return state, metrics


def one_step_is_the_same(learner, layouts):
    start = jax.jit(lambda: program.initial(learner, SEEDS, None))()
    copy = lambda: jax.tree.map(lambda x: x.copy(), start)
    one, one_metrics = step(learner, 1, 1, copy())
    for devices, env_devices in layouts:
        many, metrics = step(learner, devices, env_devices, copy())
        for a, b in zip(numbers(one), numbers(many), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        for name in metrics:
            np.testing.assert_allclose(metrics[name], one_metrics[name], rtol=1e-5, atol=1e-5, err_msg=name)
        spread = jax.tree.leaves(learner.over_envs(many))[0].sharding
        assert len(spread.device_set) == devices * env_devices
        shape = spread.shard_shape(jax.tree.leaves(learner.over_envs(many))[0].shape)
        whole = jax.tree.leaves(learner.over_envs(many))[0].shape
        assert shape[:2] == (whole[0] // devices, whole[1] // env_devices)
        weights = jax.tree.leaves(many.params)[0]
        assert weights.sharding.shard_shape(weights.shape) == (len(SEEDS) // devices, *weights.shape[1:])


def checkpoints_know_no_devices(folder):
    """A run that moves from 8 devices to 1 and back equals one that stayed on one device, up to rounding."""
    run = dict(progress=False, chunk=2)
    train(tracker(), 2, SEEDS, run_dir=folder, devices=2, env_devices=4, **run)
    alone = resume(tracker(), folder, 4, **run)
    assert len(alone.state.params["w"].sharding.device_set) == 1
    again = resume(tracker(), folder, 6, devices=4, env_devices=2, **run)
    assert len(again.state.envs["target"].sharding.device_set) == 8
    whole = train(tracker(), 6, SEEDS, **run)
    for a, b in zip(numbers(again.state), numbers(whole.state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(again.metrics["loss/total"], whole.metrics["loss/total"], rtol=1e-4)


if __name__ == "__main__":
    assert jax.device_count() == 8
    if sys.argv[1] == "toy":
        one_step_is_the_same(tracker(), [(1, 8), (2, 4), (4, 1)])
        checkpoints_know_no_devices(sys.argv[2])
    else:
        small = dict(num_envs=4, num_steps=4, num_minibatches=2, num_epochs=1, hidden=(4,), total_steps=160)
        learner = agents.make("ppo", env="gymnax/CartPole-v1", normalise_reward=True, **small)
        one_step_is_the_same(learner, [(2, 4)])
