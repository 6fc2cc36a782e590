"""Hyperparameter selection in continual learning: what each protocol may look at, what it returns, what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack.core.errors import UserError
from jaxstack.data.mixtures import Mixture
from jaxstack.learning import cl_hpo, continual, streams

CONFIG = continual.Config(
    data="mixture",
    order="classes",
    chunks=3,
    method="er",
    epochs=2,
    hidden=(8,),
    memory=12,
    replay=4,
    batch_size=10,
)
KEY = jax.random.key(0)


def tasks_of(seed=0, count=3):
    x, y = Mixture(classes=6, spread=0.7).draw(180)
    groups = streams.class_groups(np.random.default_rng(seed), y, 6, count)
    return cl_hpo.tasks_of(np.random.default_rng(1), x, y, streams.of_groups(groups), 20, share=0.2)


def grid(*rates):
    return jax.tree.map(lambda *v: jnp.asarray(v, jnp.float32), *(continual.Hypers(lr=lr) for lr in rates))


@jax.jit
def everything(rates, tasks):
    out = {name: f(CONFIG, KEY, rates, tasks) for name, f in cl_hpo.FRAMEWORKS.items()}
    one = cl_hpo.at(rates, 0)
    models = {"both": cl_hpo.fixed(CONFIG, KEY, one, tasks)}
    models["train"] = cl_hpo.through(CONFIG, KEY, one, tasks, tasks.train)
    return out, {k: s.params for k, s in models.items()}


def test_held_out_examples_are_a_share_of_each_class_and_are_not_trained_on():
    tasks = tasks_of()
    x, y = Mixture(classes=6, spread=0.7).draw(180)
    for i in range(3):
        held = np.asarray(tasks.held[i])[np.asarray(tasks.held_mask[i])]
        trained = np.asarray(tasks.rows[i])[np.asarray(tasks.train[i])]
        whole = np.asarray(tasks.rows[i])[np.asarray(tasks.both[i])]
        assert sorted([*held, *trained]) == sorted(whole)
        assert set(np.bincount(y[held])) <= {0, 6}
        assert (np.asarray(tasks.group)[y[whole]] == i).all()
    args = np.random.default_rng(0), x[:6], np.arange(6), streams.of_groups([np.arange(6)]), 6
    with pytest.raises(UserError, match="class 0: found 1 example in task 0, expected two or more"):
        cl_hpo.tasks_of(*args)
    with pytest.raises(UserError, match=r"share=1.5: expected a number between 0 and 1"):
        cl_hpo.tasks_of(*args, share=1.5)


def test_one_setting_gives_the_model_of_that_setting():
    found, models = everything(grid(0.1, 0.1), tasks_of())
    for name, result in found.items():
        expected = models["train" if name == "seen tasks, Val" else "both"]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), result.state.params, expected)
        np.testing.assert_allclose(result.accuracy[:, 0], result.accuracy[:, 1])


def test_the_order_of_settings_does_not_matter_and_bad_ones_are_not_chosen():
    tasks = tasks_of()
    a, _ = everything(grid(0.1, 1e-5), tasks)
    b, _ = everything(grid(1e-5, 0.1), tasks)
    for name in a:
        np.testing.assert_allclose(a[name].accuracy, b[name].accuracy[:, ::-1], atol=1e-6)
        np.testing.assert_array_equal(a[name].selected, 1 - b[name].selected)
        assert a[name].selected[0] == 0


def test_with_one_task_looking_at_the_end_the_first_and_the_current_one_are_the_same():
    tasks, rates = tasks_of(count=1), grid(0.03, 0.3)
    names = ("end of training", "first task", "current task")
    end, *others = jax.jit(lambda: [cl_hpo.FRAMEWORKS[name](CONFIG, KEY, rates, tasks) for name in names])()
    for other in others:
        np.testing.assert_array_equal(end.selected, other.selected)
        for a, b in zip(jax.tree.leaves(end.state.params), jax.tree.leaves(other.state.params)):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_later_tasks_do_not_leak_into_earlier_choices():
    tasks = tasks_of()
    rates = grid(0.03, 0.3)
    before, _ = everything(rates, tasks)
    later = jnp.concatenate([tasks.rows[1:].ravel(), tasks.held[1:].ravel()])
    after, _ = everything(rates, tasks._replace(y=tasks.y.at[later].set((tasks.y[later] + 1) % 6)))
    for name in before:
        a, b = before[name], after[name]
        if name == "end of training":  # it looks at everything
            assert not np.array_equal(a.accuracy, b.accuracy)
            continue
        np.testing.assert_array_equal(a.selected[0], b.selected[0])
        np.testing.assert_array_equal(a.accuracy[0], b.accuracy[0])
    # labels that are only scored on do not reach the weights, once the choice is the same
    held = tasks.held.ravel()
    other, _ = everything(grid(0.1, 0.1), tasks._replace(y=tasks.y.at[held].set((tasks.y[held] + 1) % 6)))
    same, _ = everything(grid(0.1, 0.1), tasks)
    weights = lambda found: jax.tree.leaves(found["seen tasks, Val"].state.params)
    for a, b in zip(weights(other), weights(same)):
        np.testing.assert_array_equal(a, b)


def test_what_protocols_cost():
    five = tasks_of(count=5)
    costs: dict[str, int] = {}

    def count():
        for name, f in cl_hpo.FRAMEWORKS.items():
            costs[name] = f(CONFIG, KEY, grid(*[0.1] * 6), five).trainings

    jax.eval_shape(count)
    assert list(costs.values()) == [35, 11, 35, 30, 35]


def test_scores():
    right, y = jnp.asarray([1.0, 1.0, 0.0, 1.0]), jnp.asarray([0, 1, 2, 2])
    mask = jnp.asarray([True, True, True, False])
    assert float(cl_hpo.median_per_class(right, y, mask, 5)) == 1.0
    assert float(cl_hpo.median_per_class(right, y, jnp.ones(4, bool), 5)) == 1.0
    assert float(cl_hpo.median_per_class(right, y, jnp.asarray([True, False, True, False]), 5)) == 0.5
    accuracy, loss = jnp.asarray([0.5, 0.9, 0.9, -1.0]), jnp.asarray([0.1, 0.8, 0.3, jnp.inf])
    assert cl_hpo.choose(accuracy, loss) == 2
    assert cl_hpo.choose(accuracy, loss, "first") == 1


def test_a_part_of_the_memory_is_left_out_of_replay():
    memory = streams.empty(20, np.zeros(1, np.float32), 6)
    memory = memory._replace(x=jnp.arange(20.0)[:, None], y=jnp.arange(20) % 6, count=jnp.int32(18))
    group = jnp.asarray([0, 0, 0, 1, 1, 1])
    gone = cl_hpo.left_out(KEY, memory, group, 0.3)
    assert not gone[18:].any()
    np.testing.assert_array_equal(np.bincount(np.asarray(group[memory.y])[np.asarray(gone)]), [3, 3])
    rest = cl_hpo.without(jax.random.key(1), memory, gone)
    assert not set(rest.x[:18, 0].tolist()) & set(memory.x[gone, 0].tolist())
    np.testing.assert_array_equal(rest.x[:18][~gone[:18]], memory.x[:18][~gone[:18]])
    np.testing.assert_array_equal(rest.y[:18], rest.x[:18, 0] % 6)
    with pytest.raises(UserError, match="method='sgd': expected a method with a memory"):
        cl_hpo.dynamic(continual.Config(data="mixture"), KEY, grid(0.1), tasks_of(), "mem")


def test_accuracy_over_tasks():
    tasks = tasks_of()
    s = continual.init(CONFIG, KEY, CONFIG.hypers)
    x, y = Mixture(classes=6, spread=0.7).draw(60, 2)
    whole, own = cl_hpo.accuracies(CONFIG, s, tasks, jnp.asarray(x), jnp.asarray(y))
    logits = np.asarray(continual.model_of(CONFIG).apply(continual.variables(s), x))
    group = np.asarray(tasks.group)
    shares, told = [], []
    for i in range(3):
        rows = group[y] == i
        shares.append((logits[rows].argmax(1) == y[rows]).mean())
        among = np.where(group == i, logits[rows], -np.inf)
        told.append((among.argmax(1) == y[rows]).mean())
    assert float(whole) == pytest.approx(np.mean(shares), abs=1e-6)
    assert float(own) == pytest.approx(np.mean(told), abs=1e-6)
