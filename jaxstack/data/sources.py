"""Where batches come from: arrays on the device, a function of the step, or a host iterator.

What a step receives depends on the step, the source's seed and, where a source says so, the training seed, never on
how steps are grouped: chunk sizes and resuming change nothing. `augment(key, batch)` runs inside the program, with the
key of the step and the training seed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxstack.core.errors import UserError
from jaxstack.core.source import Batch

Augment = Callable[[jax.Array, Any], Any]
"""(key, batch) -> batch, pure; one call a step and seed."""


class _Base:
    """What all sources have in common.

    `computes_from` of each class is what its `batch` reads beside its arguments, by which memo.py tells programs apart.
    """

    per_seed: bool = False
    batches: int | None = None
    augment: Augment | None = None

    def constants(self) -> Any:
        return ()

    def batch(self, constants: Any, item: Any, key: jax.Array) -> Any:
        batch = self._rows(constants, item, key)
        return batch if self.augment is None else self.augment(jax.random.fold_in(key, 1), batch)

    def _rows(self, constants: Any, item: Any, key: jax.Array) -> Any:
        return item

    def state(self) -> Any:
        return None

    def restore(self, state: Any) -> None:
        """Batches are a function of the step: nothing to restore."""


class _OnDevice(_Base):
    """Arrays [N, ...] that stay on the device."""

    def __init__(self, arrays: Any, batch_size: int, most: int | None = None):
        sizes = {int(np.shape(x)[0]) if np.ndim(x) else 0 for x in jax.tree.leaves(arrays)}
        if len(sizes) != 1:
            raise UserError(f"arrays: expected arrays of one common length, found lengths {sorted(sizes)}")
        self.count = sizes.pop()
        if not self.count:
            raise UserError("arrays: expected at least one example, found none")
        if batch_size < 1 or (most is None and batch_size > self.count):
            raise UserError(f"batch_size={batch_size}: expected 1 to {self.count}, the number of examples")
        self.arrays, self.batch_size = arrays, batch_size

    def constants(self) -> Any:
        self.arrays = jax.tree.map(jnp.asarray, self.arrays)
        return self.arrays


class ArrayData(_OnDevice):
    """Arrays [N, ...] kept on the device, in shuffled epochs without replacement.

    The order of an epoch depends on `seed`, the epoch's number and, with `per_seed`, the training seed alone. The last
    N % batch_size examples of an epoch's order are left out. Raises `UserError` for no arrays, unequal lengths or a
    batch larger than the data.
    """

    def __init__(
        self,
        arrays: Any,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        per_seed: bool = False,
        augment: Augment | None = None,
    ):
        super().__init__(arrays, batch_size)
        self.shuffle, self.seed, self.per_seed, self.augment = shuffle, seed, per_seed, augment
        self.steps_per_epoch = self.count // batch_size
        self._orders: dict[tuple[int, ...], tuple[int, np.ndarray]] = {}

    def computes_from(self) -> Any:
        return self.per_seed, self.augment

    def item(self, seeds: Sequence[int]) -> np.ndarray:
        return np.zeros((len(seeds), self.batch_size) if self.per_seed else self.batch_size, np.int32)

    def items(self, start: int, count: int, seeds: Sequence[int], out: np.ndarray) -> None:
        for i in range(count):
            epoch, at = divmod(start + i, self.steps_per_epoch)
            part = slice(at * self.batch_size, (at + 1) * self.batch_size)
            if self.per_seed:
                for j, seed in enumerate(seeds):
                    out[i, j] = self._order((self.seed, seed), epoch)[part]
            else:
                out[i] = self._order((self.seed,), epoch)[part]

    def _rows(self, constants: Any, item: Any, key: jax.Array) -> Any:
        return jax.tree.map(lambda x: x[item], constants)

    def _order(self, stream: tuple[int, ...], epoch: int) -> np.ndarray:
        known, order = self._orders.get(stream, (-1, np.arange(0)))
        if known != epoch:
            rng = np.random.default_rng((*stream, epoch))
            order = rng.permutation(self.count) if self.shuffle else np.arange(self.count)
            self._orders[stream] = (epoch, order)
        return order


class RandomData(_OnDevice):
    """Arrays [N, ...] kept on the device; each step and training seed draws `batch_size` rows with replacement, inside
    the program. `seed` chooses another stream of draws. Raises `UserError` as `ArrayData`, but a batch may be larger
    than the data."""

    def __init__(self, arrays: Any, batch_size: int, *, seed: int = 0, augment: Augment | None = None):
        super().__init__(arrays, batch_size, most=0)
        self.seed, self.augment = seed, augment

    def computes_from(self) -> Any:
        return self.seed, self.count, self.batch_size, self.augment

    def item(self, seeds: Sequence[int]) -> tuple:
        return ()

    def items(self, start: int, count: int, seeds: Sequence[int], out: Any) -> None:
        """Rows are drawn inside the program."""

    def _rows(self, constants: Any, item: Any, key: jax.Array) -> Any:
        rows = jax.random.randint(jax.random.fold_in(key, 2 + self.seed), (self.batch_size,), 0, self.count)
        return jax.tree.map(lambda x: x[rows], constants)


class SplitData(_OnDevice):
    """Arrays [N, ...] kept on the device, once and in order, as `Batch`es: the last one is filled up with copies of the
    first row, which its mask leaves out. For `Learner.eval_source`."""

    def __init__(self, arrays: Any, batch_size: int):
        super().__init__(arrays, batch_size, most=0)
        self.batch_size = min(batch_size, self.count)
        self.batches: int | None = -(-self.count // self.batch_size)

    def computes_from(self) -> Any:
        return self.count, self.batch_size

    def item(self, seeds: Sequence[int]) -> np.ndarray:
        return np.zeros((), np.int32)

    def items(self, start: int, count: int, seeds: Sequence[int], out: np.ndarray) -> None:
        out[:count] = np.arange(start, start + count)

    def _rows(self, constants: Any, item: Any, key: jax.Array) -> Batch:
        rows = item * self.batch_size + jnp.arange(self.batch_size)
        inside = rows < self.count
        return Batch(jax.tree.map(lambda x: x[jnp.where(inside, rows, 0)], constants), inside.astype(jnp.float32))


class WholeData(_Base):
    """Arrays kept on the device that each step gets whole, for a learner that draws from them itself; with `batches=1`
    as the one `Batch` of an `eval_source`."""

    def __init__(self, arrays: Any, batches: int | None = None):
        if batches not in (None, 1):
            raise UserError(f"batches={batches}: expected 1 or none, as a batch is all there is")
        self.arrays, self.batches = arrays, batches

    def computes_from(self) -> Any:
        return self.batches

    def constants(self) -> Any:
        self.arrays = jax.tree.map(jnp.asarray, self.arrays)
        return self.arrays

    def item(self, seeds: Sequence[int]) -> tuple:
        return ()

    def items(self, start: int, count: int, seeds: Sequence[int], out: Any) -> None:
        """All steps get the same."""

    def _rows(self, constants: Any, item: Any, key: jax.Array) -> Any:
        return constants if self.batches is None else Batch(constants, jnp.ones(1, jnp.float32))


class HostData(_Base):
    """Batches made on the host by a pure function of the step (0, 1, ...): `function(step) -> pytree of arrays`.

    With `per_seed` it is `function(step, seed)`. Types stay as they are on the way to the device, but for 64 bits,
    which become 32: `uint8` images travel as bytes. With `batches` there are so many, each a `Batch`, for
    `Learner.eval_source`.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        per_seed: bool = False,
        batches: int | None = None,
        augment: Augment | None = None,
    ):
        self.function, self.per_seed, self.batches, self.augment = function, per_seed, batches, augment
        self._first: Any = None

    def computes_from(self) -> Any:
        return self.per_seed, self.augment

    def item(self, seeds: Sequence[int]) -> Any:
        if self._first is None:
            self._first = jax.tree.map(_host, self._example(seeds))
        if not self.per_seed:
            return self._first
        return jax.tree.map(lambda x: np.zeros((len(seeds), *x.shape), x.dtype), self._first)

    def items(self, start: int, count: int, seeds: Sequence[int], out: Any) -> None:
        for i in range(count):
            if self.per_seed:
                for j, seed in enumerate(seeds):
                    _write(out, (i, j), self.function(start + i, seed))
            else:
                _write(out, (i,), self.function(start + i))

    def _example(self, seeds: Sequence[int]) -> Any:
        return self.function(0, seeds[0]) if self.per_seed else self.function(0)


class IteratorData(HostData):
    """A host iterator of batches shared by all seeds, with `get_state()` and `set_state(state)` as grain's have, so
    that a run can be resumed. Raises `UserError` for an iterator without them, or that ends too early."""

    def __init__(self, iterator: Any, *, augment: Augment | None = None):
        for method in ("get_state", "set_state", "__next__"):
            if not hasattr(iterator, method):
                raise UserError(f"iterator of type {type(iterator).__name__} has no {method}; use HostData instead")
        super().__init__(self._next, augment=augment)
        self.iterator = iterator

    computes_from = HostData.computes_from

    def state(self) -> Any:
        state = self.iterator.get_state()
        return {"bytes": state.hex()} if isinstance(state, bytes) else {"value": state}

    def restore(self, state: Any) -> None:
        self.iterator.set_state(bytes.fromhex(state["bytes"]) if "bytes" in state else state["value"])

    def _example(self, seeds: Sequence[int]) -> Any:
        state = self.iterator.get_state()
        first = self._next(0)
        self.iterator.set_state(state)
        return first

    def _next(self, step: int) -> Any:
        try:
            return next(self.iterator)
        except StopIteration:
            raise UserError(f"data: the iterator ended before step {step + 1}") from None


def shuffled_rows(count: int, rounds: int, updates: int, batch_size: int, seed: int) -> np.ndarray:
    """[rounds, updates, batch_size] rows of `count` images in shuffled epochs; what an epoch has over is left out.

    Raises `UserError` for a batch that is larger than the data.
    """
    if not 1 <= batch_size <= count:
        raise UserError(f"batch_size={batch_size}: expected 1 to {count}, the number of images")
    rng, each = np.random.default_rng(seed), count // batch_size
    epochs = -(-rounds * updates // each)
    orders = [rng.permutation(count)[: each * batch_size].reshape(each, batch_size) for _ in range(epochs)]
    whole = np.concatenate(orders) if orders else np.zeros((0, batch_size), int)
    return whole[: rounds * updates].reshape(rounds, updates, batch_size).astype(np.int32)


def _host(x: Any) -> np.ndarray:
    """A host array of a type that jax has."""
    x = np.asarray(x)
    return x.astype(jax.dtypes.canonicalize_dtype(x.dtype), copy=False)


def _write(out: Any, at: tuple[int, ...], batch: Any) -> None:
    """One batch into its place in a dispatch."""
    one = jax.tree.map(_host, batch)
    kinds = lambda tree, axes: [(x.shape[axes:], str(x.dtype)) for x in jax.tree.leaves(tree)]
    expected, found = kinds(out, len(at)), kinds(one, 0)
    if jax.tree.structure(out) != jax.tree.structure(one) or expected != found:
        raise UserError(
            f"data: batches of different shapes cannot share one program: expected {expected}, found {found}"
        )
    jax.tree.map(lambda o, x: o.__setitem__(at, x), out, one)
