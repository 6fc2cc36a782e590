"""What the runner asks of a source of batches, and the bounded feed that brings batches from the host to the device.

What a step receives never depends on how steps are grouped, so chunk sizes and resuming change nothing.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from jaxstack.core.errors import UserError

DATA_STREAM = 6_666_666
"""What is drawn inside a program (rows, augmentation) comes from this key, the seed and the step."""
FEED_BYTES = 32 * 2**20
"""Most bytes of host batches in one dispatch, unless one batch alone is larger."""


@runtime_checkable
class Source(Protocol):
    """A source of batches, shared by all seeds or one for each.

    Sources that are at hand: `jaxstack.data.sources`.
    """

    per_seed: bool
    """Whether `items` have an axis of seeds."""
    batches: int | None
    """Number of batches in one pass over a split, for evaluation; None for a source without an end."""

    def constants(self) -> Any:
        """Arrays that stay on the device, passed to the program as an argument."""
        ...

    def item(self, seeds: Sequence[int]) -> Any:
        """Like one step's entry of `items`, whatever its values; nothing is consumed."""
        ...

    def items(self, start: int, count: int, seeds: Sequence[int], out: Any) -> None:
        """Write the input of steps start..start+count-1 into the first `count` rows of `out`, a tree of host arrays
        [size, ...] or, with `per_seed`, [size, S, ...]."""
        ...

    def batch(self, constants: Any, item: Any, key: jax.Array) -> Any:
        """Inside jit: one step's batch from the constants, its item and the key of this step and seed."""
        ...

    def state(self) -> Any:
        """JSON-able position, stored with checkpoints."""
        ...

    def restore(self, state: Any) -> None: ...


class Batch(NamedTuple):
    """A batch of a split: `data` with leading axis B, and `mask` [B] float32, 0 for rows that fill the last batch."""

    data: Any
    mask: Any


class Feed:
    """Dispatches of a source, the next one made and sent in a thread while the program works on the last.

    At most three are in memory: the one in use, the one that waits, the one in the making.
    """

    def __init__(self, source: Source, seeds: Sequence[int], size: int, send: Any = lambda tree: tree):
        """`size` steps a dispatch; `send` puts a tree of host arrays onto the devices."""
        self.source, self.seeds, self.size, self._send = source, seeds, size, send
        self._one = source.item(seeds)
        self._thread = ThreadPoolExecutor(1, "feed")
        self._next: tuple[int, int] | None = None
        self._made: Future[tuple[Any, Any]] | None = None
        self._state = source.state()

    def take(self, start: int, count: int, then: int = 0) -> Any:
        """The dispatch of steps start..start+count-1, leaves [size, ...], what is after `count` filler; begin to make
        the one of the `then` steps after it.

        Raises `UserError` for batches that the source cannot make.
        """
        if self._made is not None and self._next != (start, count):
            self._drop()
        made = self._thread.submit(self._make, start, count) if self._made is None else self._made
        self._made = None
        items, self._state = made.result()
        if then > 0:
            self._next = (start + count, then)
            self._made = self._thread.submit(self._make, *self._next)
        return items

    def state(self) -> Any:
        """The source's position after what was taken."""
        return self._state

    def close(self) -> None:
        """End the thread; the source is left where what was taken ends."""
        if self._made is not None:
            self._drop()
        self._thread.shutdown()

    def _make(self, start: int, count: int) -> tuple[Any, Any]:
        out = jax.tree.map(lambda x: np.zeros((self.size, *np.shape(x)), np.asarray(x).dtype), self._one)
        self.source.items(start, count, self.seeds, out)
        return self._send(out), self.source.state()

    def _drop(self) -> None:
        made, self._made = self._made, None
        if made is not None and not made.cancel():
            made.exception()
        self.source.restore(self._state)


def fitting(source: Source, seeds: Sequence[int], most: int, limit: int = FEED_BYTES) -> int:
    """Steps of a dispatch: at most `most`, and as many as `limit` bytes hold."""
    size = sum(np.asarray(x).nbytes for x in jax.tree.leaves(source.item(seeds)))
    return int(np.clip(limit // max(size, 1), 1, most))


def finite(source: Source, name: str) -> int:
    """The number of batches in one pass. Raises `UserError` for a source without an end."""
    if not source.batches:
        raise UserError(
            f"{name}: eval_source of type {type(source).__name__} has no end, expected one such as SplitData"
        )
    return source.batches
