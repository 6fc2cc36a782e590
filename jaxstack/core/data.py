"""Where batches come from: arrays on the device, a function of the step, or a host iterator.

A source gives the runner whole chunks; what a step receives never depends on how steps are grouped, so chunk sizes and
resuming change nothing.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxstack.core.errors import UserError


class Source(Protocol):
    """A source of batches, shared by all seeds."""

    def constants(self) -> Any:
        """Arrays that stay on the device, passed to the program as an argument."""
        ...

    def chunk(self, start: int, count: int, size: int) -> Any:
        """Input of steps start..start+count-1 with a leading axis of `size` (the rest is filler)."""
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

    The order of an epoch depends on `seed` and the epoch's number alone. The last N % batch_size examples of an epoch
    are left out. Raises `UserError` for unequal lengths or a batch larger than the data.
    """

    def __init__(self, arrays: Any, batch_size: int, *, shuffle: bool = True, seed: int = 0):
        sizes = {int(np.shape(x)[0]) for x in jax.tree.leaves(arrays)}
        if len(sizes) != 1:
            raise UserError(f"arrays: expected one common length, found {sorted(sizes)}")
        self.count = sizes.pop()
        if not 1 <= batch_size <= self.count:
            raise UserError(f"batch_size={batch_size}: expected 1 to {self.count}, the number of examples")
        self.arrays, self.batch_size, self.shuffle, self.seed = arrays, batch_size, shuffle, seed
        self.steps_per_epoch = self.count // batch_size
        self._epoch: tuple[int, np.ndarray] = (-1, np.arange(0))

    def constants(self) -> Any:
        return jax.tree.map(jnp.asarray, self.arrays)

    def chunk(self, start: int, count: int, size: int) -> np.ndarray:
        index = np.zeros((size, self.batch_size), np.int32)
        for i in range(count):
            epoch, at = divmod(start + i, self.steps_per_epoch)
            index[i] = self._order(epoch)[at * self.batch_size : (at + 1) * self.batch_size]
        return index

    def batch(self, constants: Any, item: Any) -> Any:
        return jax.tree.map(lambda x: x[item], constants)

    def state(self) -> None:
        return None

    def restore(self, state: Any) -> None:
        """The order is a function of the step: nothing to restore."""

    def _order(self, epoch: int) -> np.ndarray:
        if self._epoch[0] != epoch:
            rng = np.random.default_rng((self.seed, epoch))
            self._epoch = (epoch, rng.permutation(self.count) if self.shuffle else np.arange(self.count))
        return self._epoch[1]


class HostData:
    """Batches made on the host by a pure function of the step: `function(step) -> pytree of arrays`."""

    def __init__(self, function: Callable[[int], Any]):
        self.function = function

    def constants(self) -> tuple:
        return ()

    def chunk(self, start: int, count: int, size: int) -> Any:
        return _stack([self.function(start + i) for i in range(count)], size)

    def batch(self, constants: Any, item: Any) -> Any:
        return item

    def state(self) -> None:
        return None

    def restore(self, state: Any) -> None:
        """Batches are a function of the step: nothing to restore."""


class IteratorData(HostData):
    """A host iterator with `get_state()` and `set_state(state)` (as grain's have), so that a run can be resumed."""

    def __init__(self, iterator: Any):
        for method in ("get_state", "set_state", "__next__"):
            if not hasattr(iterator, method):
                raise UserError(f"iterator of type {type(iterator).__name__} has no {method}; use HostData instead")
        super().__init__(lambda step: next(iterator))
        self.iterator = iterator

    def state(self) -> Any:
        state = self.iterator.get_state()
        return state.decode() if isinstance(state, bytes) else state

    def restore(self, state: Any) -> None:
        self.iterator.set_state(state)


def _stack(batches: list[Any], size: int) -> Any:
    shapes = {tuple((np.shape(x), np.asarray(x).dtype) for x in jax.tree.leaves(b)) for b in batches}
    if len(shapes) != 1:
        raise UserError(f"batches of different shapes cannot share one program: {sorted(map(str, shapes))}")

    def join(*xs: Any) -> np.ndarray:
        out = np.zeros((size, *np.shape(xs[0])), np.asarray(xs[0]).dtype)
        out[: len(xs)] = np.stack(xs)
        return out

    return jax.tree.map(join, *batches)
