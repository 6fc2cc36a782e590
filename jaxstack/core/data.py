"""Where batches come from: arrays on the device, a function of the step, or a host iterator.

A source gives the runner whole chunks; what a step receives never depends on how steps are grouped, so chunk sizes and
resuming change nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxstack.core.errors import UserError


class Source(Protocol):
    """A source of batches, shared by all seeds or one for each."""

    per_seed: bool

    def constants(self) -> Any:
        """Arrays that stay on the device, passed to the program as an argument."""
        ...

    def chunk(self, start: int, count: int, size: int, seeds: Sequence[int], peek: bool = False) -> Any:
        """Input of steps start..start+count-1 with leading axes [size] or, for each seed, [size, S]; the rest is
        filler. With `peek` nothing is consumed."""
        ...

    def batch(self, constants: Any, item: Any) -> Any:
        """Inside jit: one step's batch from the constants and its slice of the chunk."""
        ...

    def state(self) -> Any:
        """JSON-able position, stored with checkpoints."""
        ...

    def restore(self, state: Any) -> None: ...


class ArrayData:
    """Arrays [N, ...] kept on the device, in shuffled epochs without replacement.

    The order of an epoch depends on `seed`, the epoch's number and, with `per_seed`, the training seed alone. The last
    N % batch_size examples of an epoch's order are left out. Raises `UserError` for no arrays, unequal lengths or a
    batch larger than the data.
    """

    def __init__(self, arrays: Any, batch_size: int, *, shuffle: bool = True, seed: int = 0, per_seed: bool = False):
        leaves = jax.tree.leaves(arrays)
        sizes = {int(np.shape(x)[0]) if np.ndim(x) else 0 for x in leaves}
        if len(sizes) != 1:
            raise UserError(f"arrays: expected arrays of one common length, found lengths {sorted(sizes)}")
        self.count = sizes.pop()
        if not 1 <= batch_size <= self.count:
            raise UserError(f"batch_size={batch_size}: expected 1 to {self.count}, the number of examples")
        self.arrays, self.batch_size, self.shuffle, self.seed = arrays, batch_size, shuffle, seed
        self.per_seed = per_seed
        self.steps_per_epoch = self.count // batch_size
        self._orders: dict[tuple[int, ...], tuple[int, np.ndarray]] = {}

    def constants(self) -> Any:
        self.arrays = jax.tree.map(jnp.asarray, self.arrays)
        return self.arrays

    def chunk(self, start: int, count: int, size: int, seeds: Sequence[int], peek: bool = False) -> np.ndarray:
        streams = [(self.seed, s) for s in seeds] if self.per_seed else [(self.seed,)]
        index = np.zeros((size, len(streams), self.batch_size), np.int32)
        for i in range(count):
            epoch, at = divmod(start + i, self.steps_per_epoch)
            for j, stream in enumerate(streams):
                index[i, j] = self._order(stream, epoch)[at * self.batch_size : (at + 1) * self.batch_size]
        return index if self.per_seed else index[:, 0]

    def batch(self, constants: Any, item: Any) -> Any:
        return jax.tree.map(lambda x: x[item], constants)

    def state(self) -> None:
        return None

    def restore(self, state: Any) -> None:
        """The order is a function of the step: nothing to restore."""

    def _order(self, stream: tuple[int, ...], epoch: int) -> np.ndarray:
        known, order = self._orders.get(stream, (-1, np.arange(0)))
        if known != epoch:
            rng = np.random.default_rng((*stream, epoch))
            order = rng.permutation(self.count) if self.shuffle else np.arange(self.count)
            self._orders[stream] = (epoch, order)
        return order


class HostData:
    """Batches made on the host by a pure function of the step (0, 1, ...): `function(step) -> pytree of arrays`.

    With `per_seed` it is `function(step, seed)`.
    """

    def __init__(self, function: Callable[..., Any], *, per_seed: bool = False):
        self.function, self.per_seed = function, per_seed

    def constants(self) -> tuple:
        return ()

    def chunk(self, start: int, count: int, size: int, seeds: Sequence[int], peek: bool = False) -> Any:
        if not self.per_seed:
            return _stack([self.function(start + i) for i in range(count)], size)
        return _stack([_stack([self.function(start + i, s) for s in seeds]) for i in range(count)], size)

    def batch(self, constants: Any, item: Any) -> Any:
        return item

    def state(self) -> Any:
        return None

    def restore(self, state: Any) -> None:
        """Batches are a function of the step: nothing to restore."""


class IteratorData(HostData):
    """A host iterator of batches shared by all seeds, with `get_state()` and `set_state(state)` as grain's have, so
    that a run can be resumed. Raises `UserError` for an iterator without them, or that ends too early."""

    def __init__(self, iterator: Any):
        for method in ("get_state", "set_state", "__next__"):
            if not hasattr(iterator, method):
                raise UserError(f"iterator of type {type(iterator).__name__} has no {method}; use HostData instead")
        super().__init__(self._next)
        self.iterator = iterator

    def chunk(self, start: int, count: int, size: int, seeds: Sequence[int], peek: bool = False) -> Any:
        state = self.iterator.get_state() if peek else None
        out = super().chunk(start, count, size, seeds)
        if peek:
            self.iterator.set_state(state)
        return out

    def state(self) -> Any:
        state = self.iterator.get_state()
        return {"bytes": state.hex()} if isinstance(state, bytes) else {"value": state}

    def restore(self, state: Any) -> None:
        self.iterator.set_state(bytes.fromhex(state["bytes"]) if "bytes" in state else state["value"])

    def _next(self, step: int) -> Any:
        try:
            return next(self.iterator)
        except StopIteration:
            raise UserError(f"data: the iterator ended before step {step + 1}") from None


def _stack(batches: list[Any], size: int | None = None) -> Any:
    """Leaves [len(batches), ...], filled up with zeros to `size`."""
    size = len(batches) if size is None else size
    kinds = {tuple((np.shape(x), str(np.asarray(x).dtype)) for x in jax.tree.leaves(b)) for b in batches}
    if len(kinds) != 1:
        raise UserError(f"data: batches of different shapes cannot share one program: {sorted(map(str, kinds))}")

    def join(*xs: Any) -> np.ndarray:
        first = np.asarray(xs[0])
        first = first.astype(jax.dtypes.canonicalize_dtype(first.dtype))
        out = np.zeros((size, *first.shape), first.dtype)
        out[: len(xs)] = np.stack(xs)
        return out

    return jax.tree.map(join, *batches)
