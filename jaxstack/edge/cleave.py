"""Training on idle devices at the edge (Xue, Madhyastha, Lee, Storkey, Burns and Marina, "On Harnessing Idle Compute at
the Edge for Foundation Model Training", 2025): the cost model, the scheduler and what a failure costs.

A parameter server (PS) splits each product O = A B, O [m, q] with inner size n and b bytes per number, into rectangles.
A device gets r rows of A and c columns of B, and returns r c numbers of O; devices never talk to each other.

    (1) bytes down (r + c) n b, bytes up r c b, operations 2 r c n, kept in memory ((r + c) s + r c) b where inner
        columns come in slices of s
    (2) time = latencies + (r + c) n b / D + 2 r c n / F + r c b / U, with downlink D, uplink U and speed F; where the
        three overlap, their largest in place of their sum
    (3) the least time that area a needs has r = c = sqrt(a), or r = min(m, q) where that is smaller; inverted, it is
        the largest area a_d(T) of a device in time T
    (4) relaxed makespan: the smallest T with sum_d a_d(T) >= m q. A device whose latencies reach T gets nothing
    (5) rectangles: strips of columns; in a strip of width w device d has as many rows as it can do by T, and the
        narrowest widths at which all strips end by T cover O
    (6) PS: T is at least all bytes down over its own link down, likewise up
    (7) a device that fails loses its rectangle alone, which is a product of its own for the survivors

Gradients of a product are two more products. All of it is synchronous, so that training is that of one machine.

Only the abstracts could be read, and there is no released code: that products are split, that devices talk to the PS
alone, that bytes per device fall as devices join, and that one cost model decides all this, is the paper's. Equations
(1) to (7) are this project's.
"""

import heapq
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxstack.core.errors import UserError

SLICE = 64
"""s of (1): the narrowest slice of inner columns."""
HALVINGS = 48
Split = Literal["best", "both", "rows", "columns"]


class Devices(NamedTuple):
    """Float64 arrays [p], one entry per device; scenarios may stand in front for `relaxed`: [..., p]."""

    memory: Any
    """Bytes."""
    speed: Any
    """Operations per second."""
    down: Any
    """Bytes per second."""
    up: Any
    latency: Any
    """Seconds per task, of both directions together."""

    @property
    def count(self) -> int:
        """p."""
        return np.shape(self.speed)[-1]

    def take(self, rows: Any) -> "Devices":
        """Some of them."""
        return Devices(*(np.asarray(x)[..., rows] for x in self))


class Gemm(NamedTuple):
    """O [rows, columns] = A [rows, inner] B [inner, columns], `width` bytes per number."""

    rows: int
    inner: int
    columns: int
    width: int = 2

    @property
    def operations(self) -> float:
        """Multiplications and additions."""
        return 2.0 * self.rows * self.inner * self.columns

    def gradients(self) -> "tuple[Gemm, Gemm]":
        """dA = dO B^T and dB = A^T dO."""
        m, n, q, b = self
        return Gemm(m, q, n, b), Gemm(n, m, q, b)


class Chains(NamedTuple):
    """Equal units that stay whole: one head of attention on one sequence, whose softmax needs entire rows."""

    count: int
    down: float
    """Bytes per unit."""
    up: float
    operations_each: float
    memory: float

    @property
    def operations(self) -> float:
        """Of all units."""
        return self.count * self.operations_each


class Link(NamedTuple):
    """Of the PS, bytes per second."""

    down: float = np.inf
    """To the devices."""
    up: float = np.inf


class Plan(NamedTuple):
    """Who does what of a product or of chains."""

    device: np.ndarray
    """[K]"""
    rows: np.ndarray
    """[K, 2] from and up to; of chains: units."""
    columns: np.ndarray
    """[K, 2]; of chains: 0 and 1."""
    seconds: np.ndarray
    """[K] of each task."""
    down: np.ndarray
    """[K] bytes."""
    up: np.ndarray
    relaxed: float
    """(4), with (6)."""
    makespan: float
    """Of the slowest task, with (6)."""


# --- (1) to (4) -------------------------------------------------------------------------------------------------------


def task_bytes(rows: Any, columns: Any, work: Gemm) -> tuple[Any, Any]:
    """(1): bytes down and up."""
    return (rows + columns) * (work.inner * work.width), rows * columns * work.width


def resident(rows: Any, columns: Any, work: Gemm) -> Any:
    """(1): bytes kept in memory."""
    return ((rows + columns) * min(SLICE, work.inner) + rows * columns) * work.width


def task_time(devices: Devices, rows: Any, columns: Any, work: Gemm, overlap: bool = False) -> Any:
    """(2): seconds of a rectangle on each device."""
    down, up = task_bytes(rows, columns, work)
    return _time(devices, down, 2.0 * rows * columns * work.inner, up, overlap)


def least_time(devices: Devices, area: Any, work: Gemm, overlap: bool = False) -> Any:
    """(3): seconds of the best rectangle of an area."""
    short = min(work.rows, work.columns)
    side = np.minimum(np.sqrt(area), short)
    return task_time(devices, side, area / side, work, overlap)


def largest_area(devices: Devices, seconds: Any, work: Gemm, overlap: bool = False) -> Any:
    """(3) inverted: what each device can do in a time, in real numbers; at most m q and what its memory holds."""
    _, n, _, b = work
    short = float(min(work.rows, work.columns))
    left = np.maximum(seconds - devices.latency, 0.0)
    # square: 2 side slope + side^2 work = left; strip: short and area / short
    slope = n * b / devices.down
    each, up = 2.0 * n / devices.speed, b / devices.up
    if overlap:
        square = np.minimum((left / (2 * slope)) ** 2, np.minimum(left / each, left / up))
        strip = np.minimum((left / slope - short) * short, np.minimum(left / each, left / up))
    else:
        square = (left / (slope + np.sqrt(slope**2 + (each + up) * left))) ** 2
        strip = (left - slope * short) / (slope / short + each + up)
    return np.minimum(np.where(square <= short**2, square, strip), held_area(devices, work))


def held_area(devices: Devices, work: Gemm) -> Any:
    """(1): the largest area, at most m q, that each device's memory holds."""
    inner, short = min(SLICE, work.inner), float(min(work.rows, work.columns))
    held = np.asarray(devices.memory) / work.width
    side = np.sqrt(inner**2 + held) - inner
    most = np.where(side <= short, side**2, (held - short * inner) / (1.0 + inner / short))
    return np.clip(most, 0.0, float(work.rows) * work.columns)


def relaxed(devices: Devices, work: Gemm, overlap: bool = False) -> tuple[Any, Any]:
    """(4): the makespan [...] of devices [..., p], and areas [..., p].

    Raises:
        UserError: where their memory holds less than O.
    """
    total = float(work.rows) * work.columns
    sum_at = lambda t: largest_area(devices, np.asarray(t)[..., None], work, overlap).sum(-1)
    if np.any(held_area(devices, work).sum(-1) < total):
        raise UserError(f"memory: found devices that hold less than the {total:.3g} numbers of a product, expected all")
    low = np.min(devices.latency, -1) + np.zeros(np.shape(devices.speed)[:-1])
    high = low + 1e-6
    while np.any(short := sum_at(high) < total):
        high = np.where(short, 2 * high, high)
    for _ in range(2 * HALVINGS):
        middle = 0.5 * (low + high)
        enough = sum_at(middle) >= total
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    areas = largest_area(devices, high[..., None], work, overlap)
    return high, areas * (total / areas.sum(-1, keepdims=True))


def _time(devices: Devices, down: Any, operations: Any, up: Any, overlap: bool) -> Any:
    parts = (down / devices.down, operations / devices.speed, up / devices.up)
    return devices.latency + (np.maximum.reduce(parts) if overlap else sum(parts))


# --- (5) --------------------------------------------------------------------------------------------------------------


def strips(areas: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Devices in strips of columns: those of areas > 0, the largest first, cut where the sum of all half-perimeters is
    smallest (Beaumont et al., 2001).

    Args:
        areas: [p].
        rows: m.

    Returns:
        Their order [K], and where strips begin in it.
    """
    order = np.argsort(-areas, kind="stable")[: int((areas > 0).sum())]
    sums = np.concatenate([[0.0], np.cumsum(areas[order])]) / rows
    count = len(order)
    cost, cut = np.zeros(count + 1), np.zeros(count + 1, int)
    for j in range(1, count + 1):
        i = np.arange(j)
        every = cost[:j] + (j - i) * (sums[j] - sums[:j]) + rows
        cut[j] = int(every.argmin())
        cost[j] = every[cut[j]]
    begins, j = [], count
    while j > 0:
        j = cut[j]
        begins.append(j)
    return order, np.array(begins[::-1], int)


def rectangles(
    devices: Devices, work: Gemm, order: np.ndarray, begins: np.ndarray, overlap: bool = False, tile: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(5): rectangles of devices that stand in strips.

    Args:
        devices: all of them.
        work: the product.
        order: of the devices [K].
        begins: where strips begin in it.
        overlap: see (2).
        tile: edges are multiples of it, but for the last.

    Returns:
        Device [K'], rows [K', 2] and columns [K', 2] without empty ones. They tile O.

    Raises:
        UserError: where memory does not allow these strips.
    """
    m, n, q, b = work
    d = devices.take(order)
    strip = np.repeat(np.arange(len(begins)), np.diff([*begins, len(order)]))
    inner, held = min(SLICE, n), d.memory / b

    def heights(t: float, width: np.ndarray) -> np.ndarray:
        w = np.maximum(width[strip], 1e-12)
        left = np.maximum(t - d.latency, 0.0)
        if overlap:
            done = np.minimum.reduce([left * d.down / (n * b) - w, left * d.speed / (2 * n * w), left * d.up / (b * w)])
        else:
            done = (left - w * n * b / d.down) / (n * b / d.down + 2 * w * n / d.speed + w * b / d.up)
        fits = (held - (w + tile) * inner) / (inner + w + tile) - tile  # edges move by less than a tile
        return np.clip(np.minimum(done, fits), 0.0, m)

    def widths(t: float) -> np.ndarray:
        low, high = np.zeros(len(begins)), np.full(len(begins), float(q))
        for _ in range(HALVINGS // 2):
            middle = 0.5 * (low + high)
            enough = np.add.reduceat(heights(t, middle), begins) >= m
            low, high = np.where(enough, middle, low), np.where(enough, high, middle)
        full = np.full(len(begins), float(q))
        return np.where(np.add.reduceat(heights(t, full), begins) >= m, full, low)

    low, high = 0.0, float(np.min(d.latency)) + 1e-3
    for _ in range(200):
        if widths(high).sum() >= q * (1 - 1e-9):
            break
        high *= 2
    else:
        raise UserError(f"memory: found devices whose strips hold less than a product [{m}, {q}], expected all")
    for _ in range(HALVINGS // 2):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if widths(middle).sum() >= q * (1 - 1e-9) else (middle, high)
    width, height = widths(high), heights(high, widths(high))
    right = _edges(width, q, tile)
    found = []
    for j, (begin, end) in enumerate(zip(begins, [*begins[1:], len(order)])):
        low_high = (right[j], right[j + 1])
        if low_high[0] == low_high[1]:
            continue
        edges = _edges(height[begin:end], m, tile)
        found += [
            (order[begin + i], (edges[i], edges[i + 1]), low_high)
            for i in range(end - begin)
            if edges[i] < edges[i + 1]
        ]
    device, rows, columns = (np.array(x, int) for x in zip(*found))
    return device, rows, columns


def _edges(sizes: np.ndarray, total: int, tile: int) -> np.ndarray:
    """Whole edges from 0 to `total` in proportion to sizes."""
    share = np.concatenate([[0.0], np.cumsum(sizes)]) / sizes.sum()
    edges = np.minimum(np.round(share * total / tile).astype(int) * tile, total)
    edges[-1] = total
    return edges


def plan_gemm(
    devices: Devices,
    work: Gemm,
    *,
    overlap: bool = False,
    split: Split = "best",
    link: Link = Link(),
    tile: int = 1,
) -> Plan:
    """(4) to (6) for one product.

    Args:
        devices: [p].
        work: the product.
        overlap: see (2).
        split: rows: all columns on each device; columns: all rows; both: strips; best: the fastest of the three.
        link: of the PS.
        tile: edges are multiples of it.

    Returns:
        The plan.

    Raises:
        UserError: for memory that is too small.
    """
    bound, areas = relaxed(devices, work, overlap)
    order, begins = strips(areas, work.rows)
    ways = {"both": begins, "rows": np.zeros(1, int), "columns": np.arange(len(order))}
    found = []
    for name in ways if split == "best" else (split,):
        try:
            found.append(
                _planned(devices, work, rectangles(devices, work, order, ways[name], overlap, tile), overlap, link)
            )
        except UserError:
            if split != "best" or name == "both":
                raise
    best = min(found, key=lambda plan: plan.makespan)
    down = float(work.rows + work.columns) * work.inner * work.width  # each row and column goes down at least once
    up = float(work.rows) * work.columns * work.width
    return best._replace(relaxed=max(float(bound), down / link.down, up / link.up))


def equal_split(devices: Devices, work: Gemm, *, overlap: bool = False, link: Link = Link()) -> Plan:
    """A plan without the cost model: every device has the same area, nobody is left out."""
    alike = Devices(*(np.full(devices.count, x) for x in (1e30, 1e12, 1e9, 1e9, 0.0)))
    order, begins = strips(np.full(devices.count, float(work.rows) * work.columns / devices.count), work.rows)
    return _planned(devices, work, rectangles(alike, work, order, begins), overlap, link)


def _planned(devices: Devices, work: Gemm, cut: Any, overlap: bool, link: Link) -> Plan:
    device, rows, columns = cut
    r, c = np.diff(rows, axis=1)[:, 0].astype(float), np.diff(columns, axis=1)[:, 0].astype(float)
    seconds = task_time(devices.take(device), r, c, work, overlap)
    down, up = task_bytes(r, c, work)
    makespan = max(float(seconds.max()), down.sum() / link.down, up.sum() / link.up)
    return Plan(device, rows, columns, seconds, down, up, float("nan"), makespan)


def plan_chains(devices: Devices, work: Chains, *, overlap: bool = False, link: Link = Link()) -> Plan:
    """Whole units: the makespan in real numbers, then the units that are over go one by one to who ends first.

    Raises:
        UserError: where no device has memory for a unit.
    """
    fits = np.asarray(devices.memory) >= work.memory
    if not fits.any():
        raise UserError(f"memory: found no device with {work.memory:.3g} bytes, expected one for a head of attention")
    each = _time(devices._replace(latency=np.zeros(devices.count)), work.down, work.operations_each, work.up, overlap)
    each = np.where(fits, each, np.inf)
    could = lambda t: np.maximum(t - devices.latency, 0.0) / each
    low, high = float(np.min(devices.latency)), float(np.min(devices.latency + each * work.count))
    for _ in range(2 * HALVINGS):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if could(middle).sum() >= work.count else (middle, high)
    units = np.floor(could(high) * (work.count / could(high).sum()) + 1e-9).astype(int)
    ends = [(devices.latency[i] + (units[i] + 1) * each[i], i) for i in range(devices.count) if fits[i]]
    heapq.heapify(ends)
    for _ in range(work.count - units.sum()):
        end, i = heapq.heappop(ends)
        units[i] += 1
        heapq.heappush(ends, (end + each[i], i))
    device = np.flatnonzero(units)
    edges = np.concatenate([[0], np.cumsum(units[device])])
    own = units[device].astype(float)
    seconds = devices.latency[device] + own * each[device]
    down, up = own * work.down, own * work.up
    at_link = max(work.count * work.down / link.down, work.count * work.up / link.up)
    rows, columns = np.stack([edges[:-1], edges[1:]], 1), np.tile([0, 1], (len(device), 1))
    return Plan(device, rows, columns, seconds, down, up, max(high, at_link), max(float(seconds.max()), at_link))


def plan_work(devices: Devices, work: Gemm | Chains, *, split: Split = "best", **options: Any) -> Plan:
    """The plan of a product or of chains."""
    if isinstance(work, Chains):
        return plan_chains(devices, work, **options)
    return plan_gemm(devices, work, split=split, **options)


# --- a batch ----------------------------------------------------------------------------------------------------------


class Model(NamedTuple):
    """Shapes of a decoder."""

    layers: int
    features: int
    inner: int
    """Of the feed-forward part."""
    heads: int
    vocabulary: int
    gated: bool = False
    """Whether the feed-forward part has a gate."""

    @property
    def layer_parameters(self) -> float:
        """Matrices of one layer."""
        return 4.0 * self.features**2 + (3 if self.gated else 2) * self.features * self.inner

    @property
    def parameters(self) -> float:
        """Matrices of all layers and the output."""
        return self.layers * self.layer_parameters + self.features * self.vocabulary


MODELS = {
    "opt-1.3b": Model(24, 2048, 8192, 32, 50272),
    "opt-13b": Model(40, 5120, 20480, 40, 50272),
    "llama-70b": Model(80, 8192, 28672, 64, 32000, gated=True),
}


def works(model: Model, sequences: int, length: int, width: int = 2) -> list[tuple[str, int, Gemm | Chains]]:
    """Everything of a training step that devices do: (name, how many times, work).

    Args:
        model: shapes.
        sequences: of a batch.
        length: tokens of each.
        width: bytes per number.

    Returns:
        Products forward, the two gradients of each, and chains of attention: forward with queries, keys and values,
        backward with the output's gradient too. Normalisations, activations and the optimiser stay at the PS.
    """
    tokens, d = sequences * length, model.features
    gemms = {
        "qkv": Gemm(tokens, d, 3 * d, width),
        "projection": Gemm(tokens, d, d, width),
        "up": Gemm(tokens, d, (2 if model.gated else 1) * model.inner, width),
        "down": Gemm(tokens, model.inner, d, width),
    }
    found: list[tuple[str, int, Gemm | Chains]] = []
    for name, gemm in gemms.items():
        found += [(name, model.layers, gemm)]
        found += [(f"{name}, gradient {i}", model.layers, g) for i, g in enumerate(gemm.gradients(), 1)]
    head = d // model.heads
    row = float(length * head * width)
    flops, memory = 4.0 * length**2 * head, (4 * length * head + 2 * length**2) * float(width)
    count = sequences * model.heads
    found += [("attention", model.layers, Chains(count, 3 * row, row, flops, memory))]
    # backward computes the scores again: 1 + 2 times the operations of forward
    found += [("attention, gradient", model.layers, Chains(count, 4 * row, 3 * row, 3 * flops, memory))]
    output = Gemm(tokens, d, model.vocabulary, width)
    found += [("output", 1, output)]
    return found + [(f"output, gradient {i}", 1, g) for i, g in enumerate(output.gradients(), 1)]


class Step(NamedTuple):
    """A training step as planned."""

    seconds: float
    relaxed: float
    down: np.ndarray
    """[p] bytes of each device."""
    up: np.ndarray
    plans: list[tuple[str, int, Plan]]


Planner = Callable[..., Plan]


def plan_step(
    devices: Devices, model: Model, sequences: int, length: int, planner: Planner = plan_work, **options: Any
) -> Step:
    """Plan all products of a training step, one after another.

    Args:
        devices: [p].
        model: shapes.
        sequences: of a batch.
        length: tokens of each.
        planner: (devices, work, **options) -> plan.
        options: for the planner.

    Returns:
        The step.
    """
    known: dict[Any, Plan] = {}
    down, up, seconds, bound, plans = np.zeros(devices.count), np.zeros(devices.count), 0.0, 0.0, []
    for name, times, work in works(model, sequences, length):
        if work not in known:
            known[work] = planner(devices, work, **options)
        plan = known[work]
        np.add.at(down, plan.device, times * plan.down)
        np.add.at(up, plan.device, times * plan.up)
        seconds += times * plan.makespan
        bound += times * plan.relaxed
        plans.append((name, times, plan))
    return Step(seconds, bound, down, up, plans)


# --- (7) --------------------------------------------------------------------------------------------------------------


def recovery(devices: Devices, plan: Plan, work: Gemm, device: int, **options: Any) -> Plan:
    """(7): the plan of what a failed device had, for the others."""
    at = int(np.flatnonzero(plan.device == device)[0])
    r, c = int(np.diff(plan.rows[at])[0]), int(np.diff(plan.columns[at])[0])
    alive = np.flatnonzero(np.arange(devices.count) != device)
    again = plan_gemm(devices.take(alive), Gemm(r, work.inner, c, work.width), **options)
    return again._replace(device=alive[again.device])
