import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_learners import assert_same, classifier

from jaxstack.core import program
from jaxstack.core.data import ArrayData, HostData, IteratorData
from jaxstack.core.errors import UserError
from jaxstack.core.ledger import Ledger
from jaxstack.core.runner import train


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return (x / 16.0).astype(np.float32), y.astype(np.int32)


def indices(data, start, count, seeds=(0,)):
    return data.chunk(start, count, count, list(seeds))


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
        index = ArrayData((x, y), 32).chunk(step, 1, 1, [0])[0]
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


def test_arrays_are_arguments_not_constants_of_the_program(digits):
    x, y = digits
    book = Ledger()
    program.build(classifier(), [0], book, data=ArrayData((x, y), 32), chunk=2)
    assert book.programs[0].argument_bytes > x.nbytes + y.nbytes


def test_64_bit_host_batches_are_stored_as_jax_has_them():
    data = HostData(lambda step: {"x": np.ones(3), "n": np.arange(2)})
    chunk = data.chunk(0, 2, 4, [0])
    assert jax.tree.map(lambda x: (x.shape, str(x.dtype)), chunk) == {"x": ((4, 3), "float32"), "n": ((4, 2), "int32")}


def test_looking_ahead_consumes_nothing():
    class Counter:
        at = 0

        def __next__(self):
            self.at += 1
            return jnp.float32(self.at)

        def get_state(self):
            return {"at": self.at}

        def set_state(self, state):
            self.at = state["at"]

    data = IteratorData(Counter())
    data.chunk(0, 1, 3, [0], peek=True)
    assert data.chunk(0, 2, 3, [0]).tolist() == [1.0, 2.0, 0.0]
    assert data.state() == {"value": {"at": 2}}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ArrayData((np.ones(3), np.ones(4)), 2), r"common length, found lengths \[3, 4\]"),
        (lambda: ArrayData((), 2), r"common length, found lengths \[\]"),
        (lambda: ArrayData(np.ones(3), 4), "batch_size=4: expected 1 to 3"),
        (lambda: IteratorData(iter([1])), "has no get_state; use HostData"),
        (lambda: HostData(lambda t: np.ones(t + 1)).chunk(0, 2, 2, [0]), "batches of different shapes"),
        (lambda: train(classifier(), 1), "data is needed"),
    ],
)
def test_bad_data_is_named(make, message):
    with pytest.raises(UserError, match=message):
        make()
