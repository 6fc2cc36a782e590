import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxstack.core import runner
from jaxstack.core.errors import UserError
from jaxstack.data.sources import ArrayData, HostData
from jaxstack.sequence import tasks, text, trainer
from jaxstack.sequence.model import decay_mask

TINY = dict(features=8, depth=1, mixer_args=("d_state=2", "expand=1.0"), batch_size=8, num_updates=10, eval_examples=16)
PARITY = TINY | dict(task="parity", task_args=("length=6",))
OPTIONS = runner.RunOptions(progress=False)


def config(**changes):
    return trainer.Config(**(PARITY | changes))


def advance(learner, steps=1, seed=0):
    state = jax.jit(learner.init)(jax.random.key(seed))
    step = jax.jit(learner.step)
    for _ in range(steps):
        state, metrics = step(state)
    return state, metrics


def test_learning_rate_rises_and_follows_a_cosine():
    cfg = config(num_updates=110, warmup=1 / 11)
    hypers = trainer.Hypers(lr=1.0, min_lr=0.1)
    at = lambda step: float(trainer.learning_rate(cfg, hypers, step))
    assert [at(0), at(4), at(9)] == pytest.approx([0.1, 0.5, 1.0])
    assert [at(10), at(60), at(110), at(500)] == pytest.approx([1.0, 0.55, 0.1, 0.1])
    assert trainer.learning_rate(config(warmup=0.0), hypers, 0) == 1.0


def test_the_optimiser_is_adamw_with_decay_on_linear_weights():
    cfg = config(warmup=0.0)
    hypers = trainer.Hypers(lr=0.1, min_lr=0.1, weight_decay=0.5, max_grad_norm=1.0, b1=0.8, b2=0.9)
    params = {"a": {"kernel": jnp.array([1.0, -2.0]), "delta": jnp.array([3.0])}, "norm": {"scale": jnp.array([1.0])}}
    reference = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(0.1, 0.8, 0.9, weight_decay=0.5, mask=decay_mask)
    )
    ours, theirs, s, t = params, params, trainer.optimiser(cfg, hypers).init(params), reference.init(params)
    for i in range(3):
        grads = jax.tree.map(lambda p, i=i: (i + 1.0) * p, params)
        u, s = trainer.optimiser(cfg, hypers).update(grads, s, ours)
        w, t = reference.update(grads, t, theirs)
        ours, theirs = optax.apply_updates(ours, u), optax.apply_updates(theirs, w)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        np.testing.assert_allclose(x, y, rtol=1e-6)
    ours = trainer.optimiser(cfg, hypers)
    still = ours.update(jax.tree.map(jnp.zeros_like, params), ours.init(params), params)[0]
    np.testing.assert_allclose(still["a"]["kernel"], [-0.05, 0.1], rtol=1e-6)
    assert still["a"]["delta"] == still["norm"]["scale"] == 0


def test_accumulation_gives_the_gradient_of_the_whole_batch():
    # recall has a different number of scored positions in each part
    task = tasks.make("noisy_recall", length=16)
    batch = jax.jit(lambda k: task.sample(k, 8, True))(jax.random.key(0))
    results = []
    for parts in (1, 4):
        cfg = config(accumulate=parts)
        model = trainer.make_model(cfg, task)
        params = jax.jit(model.init)(jax.random.key(1), batch.tokens)["params"]
        results.append(jax.jit(trainer.gradients(model, cfg, task))(params, batch))
    for x, y in zip(jax.tree.leaves(results[0]), jax.tree.leaves(results[1])):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_training_solves_a_small_task_and_repeats_itself():
    changes = dict(task="memorisation", task_args=("length=4", "vocab=9"), num_updates=120, lr=3e-2, eval_lengths=(8,))
    learner = trainer.sequence(**(TINY | changes))
    result = runner.train(learner, seeds=2, options=OPTIONS)
    last = result.metrics[result.metrics.step == 120]
    assert (last["eval/accuracy"] == 1.0).all()
    assert (last["eval/accuracy@8"] == 1.0).all()
    assert (last["eval/loss"] < 0.1).all()
    assert result.metrics["loss/train"].iloc[0] > 1.5
    again = runner.train(learner, seeds=[1], options=OPTIONS)
    np.testing.assert_allclose(
        again.metrics["loss/train"].to_numpy()[:20],
        result.metrics.query("seed == 1")["loss/train"].to_numpy()[:20],
        rtol=1e-4,
    )


def test_bfloat16_compute_keeps_float32_parameters():
    exact, first = advance(trainer.sequence(config()))
    rough, metrics = advance(trainer.sequence(config(compute="bfloat16")))
    assert {x.dtype for x in jax.tree.leaves(rough.params)} == {jnp.dtype("float32")}
    assert float(metrics["loss/train"]) == pytest.approx(float(first["loss/train"]), rel=0.03)
    assert metrics["loss/train"] != first["loss/train"]
    assert any((x != y).any() for x, y in zip(jax.tree.leaves(rough.params), jax.tree.leaves(exact.params)))


def test_real_targets_are_trained_by_squared_error():
    learner = trainer.sequence(**(TINY | dict(task="tracking", task_args=("length=8",))))
    state, metrics = advance(learner)
    assert metrics["loss/train"] > 0
    assert set(jax.jit(learner.evaluate)(state, jax.random.key(0))) == {"eval/loss"}


def test_batches_may_come_from_a_source():
    cfg = config(task="text", task_args=("length=8",), takes_batch=True, num_updates=2)
    source = HostData(text.windows(text.split(text.load())[0], 8, 8))
    result = runner.train(trainer.sequence(cfg), seeds=1, data=source, eval_every=-1, options=OPTIONS)
    assert result.metrics["loss/train"].iloc[0] == pytest.approx(np.log(256), rel=0.2)
    assert trainer.sequence(cfg).samples_per_step == 64


def test_data_outside_the_vocabulary_is_an_error_where_it_enters():
    learner = trainer.sequence(config(takes_batch=True, num_updates=4))  # two tokens
    tokens, mask = np.zeros((8, 4), np.int32), np.ones((8, 4), bool)
    mask[:, -1] = False
    clean = tasks.Batch(tokens, np.where(mask, 1, -100), mask)  # what stands at unscored targets is of no account

    def train(data):
        return runner.train(learner, seeds=1, data=data, eval_every=-1, options=OPTIONS)

    trainer.check_batch(clean, trainer.make_task(learner.config))
    bad = clean._replace(tokens=np.where(np.arange(4) == 2, 7, tokens))
    with pytest.raises(UserError, match=r"data: tokens: found 7 at \[.*\], expected 0 to 1, the vocabulary"):
        train(HostData(lambda step: bad if step == 3 else clean))
    with pytest.raises(UserError, match=r"data: targets: found -1 at \[0, 0\]"):
        train(ArrayData(clean._replace(targets=clean.targets - 2), 8))
    real = tasks.Batch(np.full((1, 4, 3), np.nan, np.float32), np.zeros((1, 4), np.float32), np.ones((1, 4), bool))
    with pytest.raises(UserError, match=r"data: tokens: found nan at \[0, 0, 0\], expected finite numbers"):
        trainer.check_batch(real, tasks.make("tracking", length=4))


def test_initial_deviation_applies_to_all_linear_weights():
    state = jax.jit(trainer.sequence(config(features=32, init_std=0.02)).init)(jax.random.key(0))
    assert np.std(state.params["mixers_0"]["in_proj"]["kernel"]) == pytest.approx(0.02, rel=0.1)
    assert float(state.params["mixers_0"]["lambda_skip"]) == -1.0


def test_options_reach_the_mixers():
    cfg = config(depth=2, mixers=("kla", "kla"), mixer_args=("d_state=3e0", "kla.expand=2"))
    model = trainer.make_model(cfg, trainer.make_task(cfg))
    assert [(m.features, m.d_state, m.expand) for m in model.mixers] == [(8, 3, 2)] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(task="parrity"), "did you mean 'parity'"),
        (dict(task_args=("length",)), "task_args: 'length': expected name=value"),
        (dict(task_args=("length=[",)), "task_args: 'length=\\[': not valid YAML"),
        (dict(task_args=("length=x",)), "task parity: length='x': expected a whole number"),
        (dict(mixer_args=("d_state=x",)), "mixer kla: d_state='x': expected a whole number"),
        (dict(mixers=("kal",)), "did you mean 'kla'"),
        (dict(mixers=("kla",) * 3), "mixers="),
        (dict(mixer_args=("gla.heads=2",)), "unknown mixer in mixer_args 'gla'"),
        (dict(accumulate=3), "accumulate=3: expected a divisor of 8"),
        (dict(compute="float16"), "compute='float16'"),
        (dict(data_parallel=4), "data_parallel"),
        (dict(sequence_parallel=999), "= 999: expected at most"),
        (dict(lr=-1.0), "hypers.lr=-1.0"),
    ],
)
def test_bad_configs_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        trainer.sequence(**(PARITY | changes))


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from reference import inputs
from jaxstack.sequence import kla, parallel, trainer

assert jax.device_count() == 8
mesh = parallel.make_mesh(2, 4)
args = inputs(0, batch=4, length=24)
normal = np.random.default_rng(1).normal(size=(2, 4, 3, 4))
prior = kla.KLAState(np.exp(normal[0]), normal[1])


def graded(scan):
    def total(args, prior):
        y, var, last = scan(*args, state=prior)
        return jnp.sin(y).sum() + jnp.square(var).sum() + jnp.cos(last.mean * last.precision).sum(), (y, var, last)

    return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(args, prior)


def same(x, y, tolerance):
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


with jax.enable_x64():
    sharded = graded(lambda *a, **k: parallel.kla_scan(*a, mesh, **k))
    same(sharded, graded(kla.kla_scan), 1e-10)
v, precision, k, *rest = (jnp.asarray(x, jnp.float32) for x in args)
large = (v, precision, 1e12 * k, *rest)  # their precisions are beyond what products of undivided maps could hold
found, plain = (jax.jit(f)(*large)[1] for f in (lambda *a: parallel.kla_scan(*a, mesh), kla.kla_scan))
np.testing.assert_allclose(found, plain, rtol=1e-5)
assert sharded[0][1][0].sharding.spec == jax.sharding.PartitionSpec("data", "sequence")

small = dict(task="parity", task_args=("length=8",), features=8, depth=1, mixer_args=("d_state=2", "expand=1.0"))
small |= dict(batch_size=4, num_updates=10, eval_examples=4)
results = []
for mesh in ({}, dict(data_parallel=2, sequence_parallel=4)):
    config = trainer.Config(**small, **mesh)
    task = trainer.make_task(config)
    model, learner = trainer.make_model(config, task), trainer.sequence(config)
    state = jax.jit(learner.init)(jax.random.key(0))
    batch = jax.jit(lambda key: task.sample(key, 4))(jax.random.key(1))
    gradient = jax.jit(trainer.gradients(model, config, task))(state.params, batch)
    trained, metrics = jax.jit(learner.step)(state)
    results.append((gradient, metrics["loss/train"], metrics["train/grad_norm"]))
same(results[1], results[0], 1e-6)
assert type(model.mixers[0]) is parallel.ShardedKLA
assert len(jax.tree.leaves(trained.params)[0].sharding.device_set) == 8
"""


def test_sharded_over_eight_devices_equals_one_device():
    flags = "--xla_force_host_platform_device_count=8"
    env = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": os.path.dirname(__file__), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SHARDED], env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_mesh_must_fit_the_batch():
    from jaxstack.sequence import parallel

    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]).reshape(1), ("x",))
    with pytest.raises(UserError, match="expected one named 'sequence'"):
        parallel.affine_scan(jnp.ones((1, 4, 2)), jnp.ones((1, 4, 2)), jnp.ones((1, 2)), mesh)
    with pytest.raises(UserError, match="= 999"):
        parallel.make_mesh(1, 999)
