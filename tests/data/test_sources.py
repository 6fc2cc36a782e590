import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_learners import assert_same, classifier, regression

from jaxstack.core import program, runner
from jaxstack.core.errors import UserError
from jaxstack.core.ledger import Ledger
from jaxstack.core.metrics import Mean
from jaxstack.core.runner import resume, train
from jaxstack.core.source import Feed, fitting
from jaxstack.data.sources import ArrayData, HostData, IteratorData, RandomData, SplitData


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return (x / 16.0).astype(np.float32), y.astype(np.int32)


def indices(data, start, count, seeds=(0,)):
    return Feed(data, seeds, count).take(start, count)


def test_an_epoch_holds_every_example_at_most_once_and_epochs_differ():
    data = ArrayData(np.arange(10), 3)
    epochs = indices(data, 0, 6).reshape(2, 9)
    assert all(len(set(e)) == 9 for e in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()


def test_order_is_a_function_of_the_step():
    data = ArrayData(np.arange(10), 3)
    whole = indices(data, 0, 9)
    again = ArrayData(np.arange(10), 3)
    assert_same([indices(again, t, 1)[0] for t in reversed(range(9))], list(whole[::-1]))
    assert indices(ArrayData(np.arange(10), 3, seed=1), 0, 9).tolist() != whole.tolist()
    assert indices(ArrayData(np.arange(10), 3, shuffle=False), 0, 3).ravel().tolist() == list(range(9))


def test_orders_per_seed_belong_to_the_seed():
    data = ArrayData(np.arange(10), 3, per_seed=True)
    both = indices(data, 0, 9, (4, 7))
    assert both.shape == (9, 2, 3)
    assert both[:, 0].tolist() != both[:, 1].tolist()
    assert both[:, 1].tolist() == indices(data, 0, 9, (7,))[:, 0].tolist()


def test_training_works_and_host_batches_give_the_same_result_as_arrays(digits):
    x, y = digits
    arrays = ArrayData((x, y), 32)
    on_device = train(classifier(), 300, 2, data=arrays, progress=False)

    def batch(step):
        index = indices(ArrayData((x, y), 32), step, 1)[0]
        return x[index], y[index]

    on_host = train(classifier(), 300, 2, data=HostData(batch), progress=False)
    assert_same(on_device.state, on_host.state)
    assert on_device.metrics.equals(on_host.metrics)
    logits = x @ np.asarray(on_device.state.params["w"][0]) + np.asarray(on_device.state.params["b"][0])
    assert (logits.argmax(-1) == y).mean() > 0.93
    assert on_device.metrics["train/accuracy"][:2].mean() < 0.5


def test_chunk_size_and_dispatch_change_nothing(digits):
    run = lambda **options: train(classifier(), 20, 2, data=ArrayData(digits, 32), progress=False, **options)
    whole = run(chunk=20)
    assert_same(run(chunk=3).state, whole.state)
    np.testing.assert_allclose(run(dispatch="loop").state.params["w"], whole.state.params["w"], rtol=1e-4, atol=1e-6)


def test_each_seed_can_have_its_own_batches(digits):
    learner = classifier()
    many = train(learner, 10, [3, 5], data=ArrayData(digits, 32, per_seed=True), progress=False)
    one = train(learner, 10, [5], data=ArrayData(digits, 32, per_seed=True), progress=False)
    np.testing.assert_allclose(many.state.params["w"][1], one.state.params["w"][0], rtol=1e-4, atol=1e-6)
    x, y = digits
    host = HostData(lambda step, seed: (x[seed : seed + 32], y[seed : seed + 32]), per_seed=True)
    got = train(learner, 2, [3, 5], data=host, progress=False)
    assert got.metrics.query("step == 1")["loss/total"].nunique() == 2


def with_evaluation(learner, split):
    """`learner` that counts what it classifies right, over the split that `split(config)` makes."""

    def evaluate(state, key, batch):
        (x, y), mask = batch
        right = ((x @ state.params["w"] + state.params["b"]).argmax(-1) == y).astype(jnp.float32)
        return {"eval/accuracy": Mean((right * mask).sum(), mask.sum())}

    return learner._replace(evaluate=evaluate, eval_source=split, objective=("eval/accuracy", "max"))


def test_training_and_evaluation_data_are_arguments_not_constants_of_the_programs(digits):
    x, y = digits
    book = Ledger()
    learner = with_evaluation(classifier(), lambda config: SplitData((x, y), 100))
    program.build(learner, [0], book, data=ArrayData((x, y), 32), chunk=2)
    sizes = {p.name: p for p in book.programs}
    for name in ("chunk", "evaluate"):
        assert sizes[name].argument_bytes > x.nbytes + y.nbytes
        assert sizes[name].temp_bytes < x.nbytes


def test_evaluation_covers_a_whole_split_once(digits):
    x, y = digits
    learner = with_evaluation(classifier(), lambda config: SplitData((x, y), 500))._replace(
        source=lambda config: ArrayData((x, y), 32), num_steps=30
    )
    assert SplitData((x, y), 500).batches == 4  # the last one of 297 examples
    result = train(learner, seeds=2, progress=False)
    w, b = (np.asarray(result.state.params[n]) for n in ("w", "b"))
    right = [((x @ w[s] + b[s]).argmax(-1) == y).mean() for s in range(2)]
    np.testing.assert_allclose(result.metrics["eval/accuracy"].dropna(), right, rtol=1e-6)

    def batch(i):
        rows = np.arange(500 * i, 500 * i + 500)
        return (x[rows % len(x)], y[rows % len(x)]), (rows < len(x)).astype(np.float32)

    on_host = with_evaluation(classifier(), lambda config: HostData(batch, batches=4))
    np.testing.assert_allclose(runner.evaluate(on_host, result.state)["eval/accuracy"], right, rtol=1e-6)


def test_random_rows_are_a_function_of_seed_and_step():
    x = np.arange(50)
    source = RandomData(x, 40)
    rows = lambda seed, step, source=source: np.asarray(source.batch(x, (), jax.random.key(100 * seed + step)))
    assert rows(0, 0).tolist() == rows(0, 0).tolist()
    assert len({tuple(rows(seed, step)) for seed in (0, 1) for step in (0, 1)}) == 4
    assert len(set(rows(0, 0))) < 40  # with replacement
    assert rows(0, 0).tolist() != rows(0, 0, RandomData(x, 40, seed=1)).tolist()
    counts = np.bincount(np.concatenate([rows(1, t) for t in range(50)]), minlength=50)
    assert counts.min() > 15
    assert counts.max() < 75


def seen(batch_size=4, **options):
    """A learner that keeps the last batch of integers that it saw, and tells their sum."""

    def init(key, hypers):
        return regression().init(key, hypers)._replace(params=jnp.zeros(batch_size), opt_state=())

    def step(s, batch):
        s = s._replace(params=batch.astype(jnp.float32), step=s.step + 1)
        return s, {"loss/total": s.params.sum()}

    hypers = regression().hypers
    return regression()._replace(init=init, step=step, hypers=hypers, evaluate=None, takes_batch=True, **options)


def test_augmentation_runs_in_the_program_by_step_and_seed_and_resumes_in_an_epoch(tmp_path):
    def augment(key, batch):
        assert batch.dtype == jnp.uint8
        return batch + jax.random.randint(key, batch.shape, 0, 100).astype(jnp.uint8)

    arrays = np.arange(10, dtype=np.uint8)
    learner = seen(source=lambda config: ArrayData(arrays, 4, augment=augment))
    run = lambda steps, seeds, **options: train(learner, steps, seeds, progress=False, **options)
    whole = run(5, [3, 4], chunk=5)
    sums = whole.metrics["loss/total"].to_numpy().reshape(5, 2)
    assert len(np.unique(sums)) > 6
    assert (sums[:, 0] != sums[:, 1]).any()
    assert run(5, [4], chunk=2).metrics["loss/total"].tolist() == sums[:, 1].tolist()
    run(3, [3, 4], run_dir=tmp_path / "r")
    again = resume(learner, tmp_path / "r", 5, progress=False)
    assert_same(again.state, whole.state)
    assert again.metrics["loss/total"].tolist() == whole.metrics["loss/total"].tolist()


def test_bytes_travel_as_bytes():
    source = HostData(lambda step: np.full((2, 3), step, np.uint8))
    assert indices(source, 7, 2).dtype == np.uint8
    learner = seen(2)._replace(takes_batch=True)
    step = lambda s, batch: learner.step(s, batch.sum(-1).astype(jnp.int32))
    got = train(learner._replace(step=step), 3, 1, data=source, progress=False)
    assert got.metrics["loss/total"].tolist() == [0.0, 6.0, 12.0]


def test_at_most_three_dispatches_of_host_batches_are_in_memory():
    alive, most, made = set(), 0, 0

    class Counting(HostData):
        def items(self, start, count, seeds, out):
            nonlocal most, made
            made += count
            alive.add(id(out))
            weakref.finalize(out, alive.discard, id(out))
            most = max(most, len(alive))
            super().items(start, count, seeds, out)

    source = Counting(lambda step: np.full((64, 8, 8, 3), step, np.float32))
    size = fitting(source, [0], 200, limit=20 * 64 * 8 * 8 * 3 * 4)
    assert size == 20
    feed = Feed(source, [0], size)
    for start in range(0, 10_000, size):
        items = feed.take(start, size, min(size, 10_000 - start - size))
        assert items[-1, 0, 0, 0, 0] == start + size - 1
    feed.close()
    del items
    gc.collect()
    assert made == 10_000
    assert most <= 3
    assert not alive
    assert fitting(source, [0], 200, limit=1) == 1  # a batch larger than the limit still goes


class Counter:
    """An iterator of whole numbers."""

    at = 0

    def __next__(self):
        self.at += 1
        return jnp.float32(self.at)

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


def test_the_position_of_a_feed_is_that_of_what_was_taken():
    source = IteratorData(Counter())
    feed = Feed(source, [0], 3)
    assert feed.take(0, 2, 3).tolist() == [1.0, 2.0, 0.0]
    assert feed.state() == {"value": {"at": 2}}  # while the next one is made
    assert feed.take(2, 1).tolist() == [3.0, 0.0, 0.0]  # not what was announced
    feed.take(3, 3, 3)
    feed.close()
    assert source.iterator.at == 6


def test_64_bit_host_batches_are_stored_as_jax_has_them():
    source = HostData(lambda step: {"x": np.ones(3), "n": np.arange(2)})
    items = Feed(source, [0], 4).take(0, 2)
    assert jax.tree.map(lambda x: (x.shape, str(x.dtype)), items) == {"x": ((4, 3), "float32"), "n": ((4, 2), "int32")}


def test_keeping_the_best_follows_the_objective(tmp_path):
    learner = regression()
    loss = lambda s, key: {"eval/loss": s.step.astype(jnp.float32)}
    for direction, best in (("min", 1), ("max", 4)):
        run = tmp_path / direction
        one = learner._replace(evaluate=loss, objective=("eval/loss", direction))
        options = dict(run_dir=run, eval_every=1, checkpoint_every=1, keep_best=1, keep_last=1, progress=False)
        train(one, 4, 1, **options)
        assert sorted(int(p.name) for p in (run / "checkpoints").iterdir()) == sorted({best, 4})


STATE = {"w": np.zeros((1, 2))}
ONES = lambda config: SplitData(np.ones(3), 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ArrayData((np.ones(3), np.ones(4)), 2), r"common length, found lengths \[3, 4\]"),
        (lambda: ArrayData((), 2), r"common length, found lengths \[\]"),
        (lambda: ArrayData(np.ones(3), 4), "batch_size=4: expected 1 to 3"),
        (lambda: IteratorData(iter([1])), "has no get_state; use HostData"),
        (lambda: indices(HostData(lambda t: np.ones(t + 1)), 0, 2), "batches of different shapes"),
        (lambda: RandomData(np.ones(0), 1), "at least one example"),
        (lambda: SplitData(np.ones(3), 0), "batch_size=0: expected"),
        (
            lambda: runner.evaluate(with_evaluation(classifier(), lambda _: ArrayData(np.ones(3), 1)), STATE),
            "softmax: eval_source of type ArrayData has no end",
        ),
        (
            lambda: runner.evaluate(
                regression()._replace(evaluate=lambda s, k, b: {"eval/x": b.mask.sum()}, eval_source=ONES), STATE
            ),
            r"toy.evaluate: eval/x: expected a Mean\(total, count\)",
        ),
        (lambda: runner.evaluate(classifier(), STATE), "softmax: has no evaluation"),
        (lambda: train(regression(), 1, keep_best=1, run_dir="x", best_direction="up"), "best_direction='up'"),
        (lambda: train(classifier(), 1), "data is needed"),
    ],
)
def test_bad_data_is_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_pipelines_of_grain_feed_a_run_and_resume(tmp_path):
    grain = pytest.importorskip("grain", reason="the extra `data` has grain")
    learner = seen(4)

    def batches():
        rows = grain.MapDataset.source(np.arange(50, dtype=np.int32)).seed(3).shuffle().repeat()
        return rows.map(lambda x: x * 2).batch(4)

    run = lambda steps, data, **options: train(learner, steps, 2, data=data, progress=False, **options)
    iterator = lambda: IteratorData(iter(batches().to_iter_dataset()))
    whole = run(30, iterator(), chunk=7)
    sums = whole.metrics["loss/total"].to_numpy().reshape(30, 2)
    assert len(np.unique(sums)) > 15
    assert (sums[:, 0] == sums[:, 1]).all()  # shared by the seeds
    run(13, iterator(), run_dir=tmp_path / "r", chunk=4)
    again = resume(learner, tmp_path / "r", 30, data=iterator(), progress=False)
    assert_same(again.state, whole.state)
    # a map dataset is a pure function of the step, the same batches
    on_host = run(30, HostData(batches().__getitem__))
    assert on_host.metrics["loss/total"].tolist() == whole.metrics["loss/total"].tolist()
