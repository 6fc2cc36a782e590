"""One way to time compiled functions, for methods, claims and scripts."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

Name = TypeVar("Name", bound=Hashable)


class Timing(NamedTuple):
    """Seconds of each repeat, in order."""

    seconds: tuple[float, ...]

    @property
    def best(self) -> float:
        """The fastest repeat."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Taken(NamedTuple):
    """Seconds that a call took."""

    wall: float
    cpu: float
    """Of all threads of this process."""


def timed(call: Callable[[], Any]) -> Taken:
    """Time a call that blocks until it is done."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Taken(time.perf_counter() - wall, time.process_time() - cpu)


def in_turn(measures: Mapping[Name, Callable[[int], Any]], repeats: int, warm_up: bool = True) -> dict[Name, list[Any]]:
    """Measure things in turn, so that a load on the machine meets all of them alike.

    Args:
        measures: by name; each gets the number of the repeat, from 0, and returns what it measured.
        repeats: of every measure.
        warm_up: whether a repeat before them, number 0 then, is not counted.

    Returns:
        What was measured by name, in order.
    """
    found: dict[Name, list[Any]] = {name: [] for name in measures}
    for repeat in range(repeats + warm_up):
        for name, measure in measures.items():
            value = measure(repeat)
            if repeat >= warm_up:
                found[name].append(value)
    return found


def quartiles(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Quartiles of the ratio over / under within a repeat."""
    return [float(q) for q in np.quantile(np.asarray(over) / np.asarray(under), (0.25, 0.5, 0.75))]


def interleaved(
    functions: Mapping[str, Callable[..., Any]],
    args: Sequence[tuple[Any, ...]],
    repeats: int = 5,
    at_least: float = 0.01,
    calls: int = 20,
) -> dict[str, Timing]:
    """Time functions in turn, so that a load on the machine meets all of them alike.

    Each is compiled ahead of time for its arguments, so nothing that is an argument can be folded into the program; a
    first call is not counted.

    Args:
        functions: by name; all take the same arguments.
        args: arguments of successive calls, used in turn so that inputs vary.
        repeats: of every function.
        at_least: seconds that a repeat lasts; short functions are called several times and the mean is kept.
        calls: most calls per repeat.

    Returns:
        Seconds per call by name.
    """
    compiled = {name: jax.jit(f).lower(*args[0]).compile() for name, f in functions.items()}
    return calls_in_turn(compiled, args, repeats, at_least, calls)


def calls_in_turn(
    ready: Mapping[Name, Callable[..., Any]],
    args: Sequence[tuple[Any, ...]],
    repeats: int = 5,
    at_least: float = 0.01,
    calls: int = 20,
) -> dict[Name, Timing]:
    """`interleaved` of functions that are ready: compiled programs, or functions of the host."""
    counts = {}
    for name, run in ready.items():
        jax.block_until_ready(run(*args[0]))
        start = time.perf_counter()
        jax.block_until_ready(run(*args[-1]))
        once = time.perf_counter() - start
        counts[name] = max(1, min(calls, round(at_least / max(once, 1e-9))))

    def measure(name: Name) -> float:
        def several() -> None:
            for n in range(counts[name]):
                out = ready[name](*args[n % len(args)])
            jax.block_until_ready(out)

        return timed(several).wall / counts[name]

    seconds = in_turn({name: lambda _, n=name: measure(n) for name in ready}, repeats, warm_up=False)
    return {name: Timing(tuple(found)) for name, found in seconds.items()}
