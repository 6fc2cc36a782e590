"""Products of `jaxstack.edge.cleave` on devices that fail: what happens when, by a queue of events."""

import heapq
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxstack.core.errors import UserError
from jaxstack.edge.cleave import Devices, Gemm, plan_gemm


class Timeline(NamedTuple):
    """What became of a sequence of products."""

    seconds: float
    tasks: list[tuple[int, int, float, float, bool]]
    """(product, device, from, to, whether it was finished)."""
    down: float
    """Bytes of all tasks that began."""
    up: float
    """Bytes of all tasks that were finished."""
    lost: int
    """Tasks that failed."""
    alive: np.ndarray
    """[p]"""


def simulate(
    devices: Devices, products: Sequence[Gemm], fails_at: np.ndarray, timeout: float = 1.0, **options: Any
) -> Timeline:
    """Products one after another on devices that fail, by a queue of events.

    A failed device's rectangle goes to the survivors `timeout` seconds after the failure; each begins with it when its
    own task is done. They may fail again.

    Args:
        devices: [p].
        products: in order.
        fails_at: [p] seconds from the start; inf: never.
        timeout: until a failure is noticed.
        options: for `plan_gemm`.

    Returns:
        The timeline.

    Raises:
        UserError: where the survivors cannot hold a product, or none is left.
    """
    clock, tasks, down, up, lost, ticket = 0.0, [], 0.0, 0.0, 0, itertools.count()
    alive = np.ones(devices.count, bool)
    for number, product in enumerate(products):
        free = np.full(devices.count, clock)
        queue: list[tuple[float, int, bool, int, float, float, Gemm]] = []

        def give(work: Gemm, now: float, free: np.ndarray = free, queue: list = queue) -> float:
            rows = np.flatnonzero(alive)
            if not len(rows):
                raise UserError(f"devices: found none alive after {now:.3g} s, expected one")
            plan = plan_gemm(devices.take(rows), work, **options)
            for i, device in enumerate(rows[plan.device]):
                begin = max(now, free[device])
                end = begin + plan.seconds[i]
                part = Gemm(int(np.diff(plan.rows[i])[0]), work.inner, int(np.diff(plan.columns[i])[0]), work.width)
                fails = fails_at[device] < end
                # a device that has failed already is noticed now
                noticed = max(fails_at[device], now) + timeout if fails else end
                free[device] = end
                heapq.heappush(queue, (noticed, next(ticket), fails, int(device), begin, plan.up[i], part))
            return float(plan.down.sum())

        down += give(product, clock)
        while queue:
            clock, _, fails, device, begin, own, part = heapq.heappop(queue)
            tasks.append((number, device, begin, clock, not fails))
            if fails:
                lost += 1
                alive[device] = False
                down += give(part, clock)
            else:
                up += own
    return Timeline(clock, tasks, down, up, lost, alive)
