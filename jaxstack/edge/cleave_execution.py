"""Products of `jaxstack.edge.cleave` done by workers: split, sent out, put together.

A worker computes its rectangle in tiles of one size, each over the whole inner size, so that results do not depend on
who computed what: on one machine, with failures and without, they are bitwise identical.
"""

import itertools
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.core.errors import UserError
from jaxstack.edge.cleave import Devices, Gemm, Plan, plan_gemm

Product = Callable[[np.ndarray, np.ndarray], np.ndarray]


def tiled(a: np.ndarray, b: np.ndarray, tile: int) -> np.ndarray:
    """A B in tiles of one size; A and B are padded with zeros to it."""
    rows, columns = len(a), b.shape[1]
    pad = lambda x, axis: np.pad(x, [(0, -x.shape[axis] % tile) if i == axis else (0, 0) for i in range(2)])
    a, b = pad(a, 0), pad(b, 1)
    left, right = a.reshape(-1, 1, tile, a.shape[1]), b.reshape(len(b), -1, tile).transpose(1, 0, 2)[None]
    out = np.empty((len(left), right.shape[1], tile, tile), a.dtype)
    for i in range(len(left)):
        for j in range(right.shape[1]):
            np.matmul(left[i, 0], np.ascontiguousarray(right[0, j]), out=out[i, j])
    return out.transpose(0, 2, 1, 3).reshape(len(a), -1)[:rows, :columns]


class Workers:
    """Threads that stand for devices: each takes as long as (2) says, times `scale`, and may die.

    Use as a context manager, or call `close`.
    """

    def __init__(self, devices: Devices, *, tile: int = 16, scale: float = 0.0, timeout: float = 0.0):
        """`scale`: seconds of sleep per planned second; `timeout`: of sleep until a failure is noticed."""
        self.devices, self.tile, self.scale, self.timeout = devices, tile, scale, timeout
        self.alive = np.ones(devices.count, bool)
        self.lost = 0
        """Tasks that were given to others after a failure."""
        self._doomed: set[int] = set()
        self._done: queue.SimpleQueue[tuple[int, int, np.ndarray | None]] = queue.SimpleQueue()
        self._tasks: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in range(devices.count)]
        self._plans: dict[Any, Plan] = {}
        self._numbers = itertools.count()
        self._threads = [threading.Thread(target=self._work, args=(i,), daemon=True) for i in range(devices.count)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """End all threads."""
        for tasks in self._tasks:
            tasks.put(None)
        for thread in self._threads:
            thread.join()

    def kill(self, device: int) -> None:
        """A device dies in its next task: what it has done of it is lost."""
        self._doomed.add(device)

    def join(self, device: int) -> None:
        """A device comes back; it takes part from the next product on."""
        self._doomed.discard(device)
        self.alive[device] = True

    def product(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """A B of float32 matrices.

        Raises:
            UserError: where no device is left.
        """
        a, b = np.asarray(a), np.asarray(b)
        out = np.empty((len(a), b.shape[1]), np.float32)
        waiting: dict[int, tuple[slice, slice]] = {}

        def give(rows: slice, columns: slice) -> None:
            plan = self._plan(rows.stop - rows.start, a.shape[1], columns.stop - columns.start)
            for i, device in enumerate(plan.device):
                own = (
                    slice(rows.start + plan.rows[i, 0], rows.start + plan.rows[i, 1]),
                    slice(columns.start + plan.columns[i, 0], columns.start + plan.columns[i, 1]),
                )
                waiting[number := next(self._numbers)] = own
                self._tasks[device].put((number, a[own[0]], b[:, own[1]], float(plan.seconds[i])))

        give(slice(0, len(a)), slice(0, b.shape[1]))
        while waiting:
            task, device, block = self._done.get()
            if task not in waiting:  # of a product that was given up
                continue
            rows, columns = waiting.pop(task)
            if block is None:
                self.lost += 1
                self.alive[device] = False
                time.sleep(self.timeout)
                give(rows, columns)
            else:
                out[rows, columns] = block
        return out

    def _plan(self, m: int, n: int, q: int) -> Plan:
        rows = np.flatnonzero(self.alive)
        if not len(rows):
            raise UserError("workers: found none alive, expected one")
        key = (m, n, q, *rows)
        if key not in self._plans:
            plan = plan_gemm(self.devices.take(rows), Gemm(m, n, q, 4), tile=self.tile)
            self._plans[key] = plan._replace(device=rows[plan.device])
        return self._plans[key]

    def _work(self, device: int) -> None:
        while (task := self._tasks[device].get()) is not None:
            number, a, b, seconds = task
            time.sleep(seconds * self.scale)
            if device in self._doomed:
                self._done.put((number, device, None))
            else:
                self._done.put((number, device, tiled(a, b, self.tile)))


def sharded_matmul(product: Product) -> Callable[[Array, Array], Any]:
    """A differentiable A B of float32 matrices whose product, and whose two gradients, `product` computes on the host;
    it can be called inside `jax.jit`.

    Args:
        product: such as `Workers.product`, or `functools.partial(tiled, tile=16)` for one machine.
    """

    def call(a: Array, b: Array) -> Array:
        shape = jax.ShapeDtypeStruct((a.shape[0], b.shape[1]), jnp.float32)
        return jax.pure_callback(lambda x, y: product(np.asarray(x), np.asarray(y)), shape, a, b)

    @jax.custom_vjp
    def matmul(a: Array, b: Array) -> Array:
        return call(a, b)

    matmul.defvjp(lambda a, b: (call(a, b), (a, b)), lambda kept, g: (call(g, kept[1].T), call(kept[0].T, g)))
    return matmul
