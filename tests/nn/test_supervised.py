import os
import signal
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxstack.core import runner
from jaxstack.core.errors import UserError
from jaxstack.core.runner import Interrupted
from jaxstack.core.source import Batch
from jaxstack.data.digits import digits
from jaxstack.data.sources import ArrayData, SplitData
from jaxstack.nn import optimisers
from jaxstack.nn.classifier import Config, arrays, classifier
from jaxstack.nn.supervised import (
    Hypers,
    Optimiser,
    accuracy,
    cross_entropy,
    distillation,
    linen,
    squared_error,
    supervised,
    variables,
    with_variables,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))
from toy_learners import assert_same

KEY = jax.random.key(0)


def test_learning_rates_follow_their_schedules():
    at = lambda kind, step, **o: float(optimisers.learning_rate(kind, step, 100, 2.0, **o))
    assert [at("constant", t) for t in (0, 99)] == [2.0, 2.0]
    assert [at("constant", t, warmup=0.1) for t in (0, 4, 9, 10)] == pytest.approx([0.2, 1.0, 2.0, 2.0])
    cosine = lambda t: 0.5 + 1.5 * 0.5 * (1 + np.cos(np.pi * (t - 10) / 90))
    assert [at("cosine", t, warmup=0.1, min_lr=0.5) for t in (10, 37, 100)] == pytest.approx(
        [cosine(10), cosine(37), 0.5]
    )
    steps = [at("steps", t, milestones=(0.5, 0.75)) for t in (49, 50, 74, 75, 99)]
    assert steps == pytest.approx([2.0, 0.2, 0.2, 0.02, 0.02])


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_has_the_momentum_and_decay_of_pytorch(nesterov):
    p, buffer = np.array([1.0, -2.0]), np.zeros(2)
    tx = optimisers.sgd(lambda step: 0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.01)
    ours = jnp.asarray(p, jnp.float32)
    state = tx.init(ours)
    for i in range(3):
        g = (i + 1) * p
        updates, state = tx.update((i + 1.0) * ours, state, ours)
        ours = optax.apply_updates(ours, updates)
        g = g + 0.01 * p
        buffer = 0.9 * buffer + g
        p = p - 0.1 * (g + 0.9 * buffer if nesterov else buffer)
    np.testing.assert_allclose(ours, p, rtol=1e-5)


def test_losses_have_their_closed_forms():
    logits, teacher = jax.random.normal(KEY, (2, 5, 4))
    labels = jnp.array([0, 1, 2, 3, 0], jnp.uint8)
    hypers = Hypers(label_smoothing=0.1, temperature=3.0, distil_weight=0.7)
    smooth = optax.smooth_labels(jax.nn.one_hot(labels, 4), 0.1)
    plain = optax.softmax_cross_entropy(logits, smooth)
    np.testing.assert_allclose(cross_entropy(logits, labels, hypers), plain, rtol=1e-5)
    p, q = (np.asarray(jax.nn.softmax(x / 3.0), np.float64) for x in (teacher, logits))
    expected = 0.3 * plain + 0.7 * 9.0 * (p * np.log(p / q)).sum(-1)
    got = distillation(logits, (labels, teacher), hypers)
    np.testing.assert_allclose(got, expected, rtol=1e-4)
    assert (accuracy(logits, (labels, teacher), hypers) == accuracy(logits, labels, hypers)).all()
    np.testing.assert_allclose(squared_error(logits, teacher, hypers), ((logits - teacher) ** 2).mean(-1), rtol=1e-6)
    # softmaxes that underflow: the gradient stays finite
    far = lambda x: distillation(x, (labels, -1e4 * teacher), hypers).sum()
    assert jnp.isfinite(jax.grad(far)(1e4 * logits)).all()


class Net(nn.Module):
    """Dense, BatchNorm, dropout, dense."""

    rate: float = 0.0

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.8)(nn.Dense(5)(x))
        return nn.Dense(3)(nn.Dropout(self.rate, deterministic=not train)(jax.nn.relu(x)))


X = np.asarray(jax.random.normal(KEY, (12, 4)))
Y = np.arange(12, dtype=np.int32) % 3
NET = linen(Net(), X[:1])


def make(model=NET, **options):
    options = dict(num_steps=10, optimiser=Optimiser(schedule="constant", decay=None)) | options
    loss = options.pop("loss", cross_entropy)
    return supervised(model, loss, {"accuracy": accuracy}, **options)


def test_a_step_is_that_of_plain_flax_and_optax():
    learner = make(ema=True, hypers=Hypers(lr=0.2, weight_decay=0.1, ema_decay=0.75))
    state = learner.init(KEY, learner.hypers)
    after, metrics = jax.jit(learner.step)(state, (X, Y))

    def loss(params):
        out, new = Net().apply({"params": params, **state.stats}, X, True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(out, Y).mean(), (out, new)

    (value, (out, stats)), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    params = jax.tree.map(lambda p, g: p - 0.2 * (g + 0.1 * p), state.params, grads)
    np.testing.assert_allclose(metrics["loss/train"], value, rtol=1e-5)
    right = metrics["train/accuracy"]
    assert (right.total, right.count) == ((np.asarray(out).argmax(-1) == Y).sum(), 12)
    expect = lambda a, b: jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), a, b)
    expect(after.params, params)
    expect(after.stats, stats)
    # weights and statistics are averaged alike, and used
    old, new = {"params": state.params, **state.stats}, {"params": params, **stats}
    average = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, old, new)
    expect(after.ema, average)
    expect(learner.predict(after, X), Net().apply(average, X, False))
    assert variables(after) is after.ema
    last = learner.init(KEY, learner.hypers)._replace(ema={})
    expect(learner.predict(last, X), Net().apply(old, X, False))


def test_a_state_with_given_weights_can_be_donated():
    learner = make()
    begun = with_variables(learner, NET.init(KEY), 3)
    after, _ = jax.jit(learner.step, donate_argnums=0)(begun, (X, Y))
    assert (int(after.step), int(after.total)) == (4, 3)


def test_dropout_is_of_the_step_and_evaluation_has_none():
    learner = make(linen(Net(0.5), X[:1]), eval_source=lambda config: SplitData((X, Y), 8))
    state = learner.init(KEY, learner.hypers)
    step = jax.jit(learner.step)
    one, first = step(state, (X, Y))
    _, again = step(state, (X, Y))
    _, other = step(state._replace(key=one.key), (X, Y))
    assert first["loss/train"] == again["loss/train"] != other["loss/train"]
    evaluate = jax.jit(learner.evaluate)
    mask = np.ones(12, np.float32)
    full = evaluate(state, KEY, Batch((X, Y), mask))
    assert full["eval/loss"] == evaluate(state, jax.random.key(1), Batch((X, Y), mask))["eval/loss"]
    # a row that fills the batch counts for nothing, whatever it holds
    filled = np.concatenate([X, np.full((3, 4), np.nan, np.float32)]), np.concatenate([Y, Y[:3]])
    part = evaluate(state, KEY, Batch(filled, np.concatenate([mask, np.zeros(3, np.float32)])))
    np.testing.assert_allclose(part["eval/loss"].total, full["eval/loss"].total, rtol=1e-5)
    assert part["eval/accuracy"].count == 12


def test_a_module_without_a_flag_or_with_another_name_is_called_as_it_wants():
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(x)

    learner = make(linen(Plain(), X[:1], flags=lambda train: {}))
    after, _ = learner.step(learner.init(KEY, learner.hypers), (X, Y))
    assert after.stats == {}
    assert learner.predict(after, X).shape == (12, 3)


def test_a_teacher_is_part_of_the_state_and_a_row_a_seed():
    teachers = jax.vmap(NET.init)(jax.random.split(jax.random.key(5), 2))
    hypers = Hypers(lr=0.1, distil_weight=1.0, temperature=1.0, weight_decay=0.0)
    learner = make(loss=distillation, teacher=NET.apply, teachers=teachers, hypers=hypers, num_steps=150, batch_size=12)
    data = ArrayData((X, Y), 12)
    result = runner.train(learner, seeds=2, data=data, progress=False, eval_every=-1)
    assert_same(result.state.teacher, teachers)
    losses = result.metrics["loss/train"].to_numpy().reshape(-1, 2)
    assert (losses[-1] < 0.2 * losses[0]).all()
    alone = learner._replace(given=jax.tree.map(lambda x: x[1:], teachers))
    one = runner.train(alone, 3, [1], data=data, progress=False, eval_every=-1)
    np.testing.assert_allclose(one.metrics["loss/train"], losses[:3, 1], rtol=1e-4)
    with pytest.raises(UserError, match="teacher, teachers: expected both"):
        make(teacher=NET.apply)
    with pytest.raises(UserError, match="optimiser='rmsprop': expected 'sgd', 'adam' or 'adamw'"):
        make(optimiser=Optimiser("rmsprop"))


def test_parts_of_the_digits_are_disjoint_and_complete(monkeypatch):
    parts = [digits(name, seed=1) for name in ("train", "valid", "test")]
    assert [len(y) for _, y in parts] == [1258, 269, 270]
    assert parts[0][0].shape == (1258, 8, 8, 1)
    assert parts[0][0].dtype == np.uint8
    from sklearn.datasets import load_digits

    rows = np.concatenate([x.reshape(len(x), 64) for x, _ in parts])
    assert sorted(map(bytes, rows)) == sorted(map(bytes, load_digits().data.astype(np.uint8)))
    assert (digits("valid", seed=2)[1] != parts[1][1]).any()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"digits: scikit-learn is missing; pip install 'jaxstack\[data\]'"):
        digits("test")


class Stop:
    """A sink that raises SIGTERM when a step was written."""

    def __init__(self, step):
        self.step = step

    def write(self, rows):
        if rows[-1]["step"] == self.step:
            signal.raise_signal(signal.SIGTERM)

    def close(self):
        """Nothing to close."""


def test_the_classifier_learns_digits_and_a_stopped_run_resumes_in_an_epoch(tmp_path):
    learner = classifier(num_updates=200, ema=True, features=(64,), shift=0)
    options = dict(progress=False, chunk=50)
    whole = runner.train(learner, seeds=2, **options)
    x, y = digits("valid")
    found = [
        (np.asarray(learner.predict(jax.tree.map(lambda v, i=i: v[i], whole.state), x)).argmax(-1) == y).mean()
        for i in range(2)
    ]
    measured = whole.metrics["eval/accuracy"].dropna().to_numpy()
    np.testing.assert_allclose(measured, found, atol=1e-6)
    assert measured.min() > 0.93
    with pytest.raises(Interrupted):
        runner.train(learner, seeds=2, run_dir=tmp_path / "r", sinks=[Stop(50)], **options)
    got = runner.resume(learner, tmp_path / "r", **options)
    assert_same(got.state, whole.state)
    assert got.metrics.equals(whole.metrics)
    program = next(p for p in whole.ledger.programs if p.name == "chunk")
    assert program.argument_bytes > digits("train")[0].nbytes
    assert learner.samples_per_step == 64


def test_the_convolutional_network_trains_in_one_program():
    learner = classifier(model="cnn", features=(4,), num_updates=2, batch_size=8, optimiser="adamw", lr=1e-3, clip=True)
    result = runner.train(learner, progress=False)
    assert {p.name for p in result.ledger.programs} == {"chunk", "init", "evaluate"}
    assert set(result.metrics) >= {"eval/accuracy", "eval/loss", "train/accuracy", "train/lr", "train/grad_norm"}
    kernel = result.state.params["Conv_0"]["kernel"]
    assert kernel.shape == (1, 3, 3, 1, 4)


def test_a_known_network_trains_in_the_size_that_is_asked_for():
    options = dict(model="wrn-10-0.25", mid_features=(2, 0, 3), size=4, train_images=20, flip=True, edge="reflect")
    learner = classifier(num_updates=2, batch_size=4, **options)
    result = runner.train(learner, progress=False)
    assert {p.name for p in result.ledger.programs} == {"chunk", "init", "evaluate"}
    assert result.state.params["block2"]["conv1"]["kernel"].shape == (1, 3, 3, 8, 3)
    x, y = arrays(learner.config, "train")
    assert x.shape == (20, 4, 4, 1)
    whole, labels = digits("train")
    np.testing.assert_allclose(x[0, 0, 0, 0], whole[0, :2, :2].mean(), atol=0.5)
    assert (y == labels[:20]).all()
    with pytest.raises(UserError, match="train_images=2000: expected at most the 1258 images"):
        arrays(Config(train_images=2000), "train")


def test_a_module_with_convolutions_of_flax_trains_step_by_step():
    """XLA's gradient of these is slow in a loop on a CPU."""

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(3)(nn.Conv(2, (3, 3))(x.reshape(-1, 2, 2, 1)).mean((1, 2)))

    learner = make(linen(Plain(), X[:1]), num_steps=2)
    result = runner.train(learner, data=ArrayData((X, Y), 12), progress=False, eval_every=-1)
    assert {p.name for p in result.ledger.programs} == {"step", "init"}


TWO_DEVICES = """
import jax
import numpy as np
from jaxstack.core import runner
from jaxstack.nn.classifier import classifier

make = lambda n: classifier(num_updates=3, features=(8,), batch_size=16, data_parallel=n, dropout=0.0)
one, two = (runner.train(make(n), progress=False, eval_every=-1) for n in (1, 2))
np.testing.assert_allclose(two.metrics["loss/train"], one.metrics["loss/train"], rtol=1e-4)
for x, y in zip(jax.tree.leaves(two.state.stats), jax.tree.leaves(one.state.stats)):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
learner = make(2)
state = learner.init(jax.random.key(0), learner.hypers)
batch = np.zeros((16, 8, 8, 1), np.uint8), np.zeros(16, np.int32)
two = runner.train(make(1), seeds=2, devices=2, progress=False)  # one seed per device, batches with them
one = runner.train(make(1), seeds=2, progress=False)
for name in ("loss/train", "eval/loss", "eval/accuracy"):
    np.testing.assert_allclose(two.metrics[name].dropna(), one.metrics[name].dropna(), rtol=1e-4)
assert "all-reduce" in jax.jit(learner.step).lower(state, batch).compile().as_text()
"""


def test_devices_that_share_a_batch_give_the_same_result():
    # two devices need a process of its own
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2"
    command = [sys.executable, "-c", TWO_DEVICES]
    done = subprocess.run(command, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(shift=8), "shift=8: expected less than the 8 pixels"),
        (dict(features=()), r"features=\(\): expected widths >= 1"),
        (dict(dropout=1.5), r"dropout=1.5: expected a number in \[0, 1\]"),
        (dict(data_parallel=3), "data_parallel=3: expected a divisor of batch_size=64"),
        (dict(model="vit"), "model='vit': expected one of mlp, cnn, lenet, wrn-D-W"),
        (dict(model="wrn-12-1"), "model='wrn-12-1': expected one of mlp, cnn, lenet, wrn-D-W"),
        (dict(mid_features=(3,)), "mid_features: mlp has no middle widths"),
        (dict(model="wrn-10-1", mid_features=(3,)), "mid_features: found 1, expected 3"),
        (dict(data="mnist"), "unknown data set 'mnist'"),
        (dict(size=4, shift=4), "shift=4: expected less than the 4 pixels"),
    ],
)
def test_bad_options_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        Config(**changes)
