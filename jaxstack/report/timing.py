"""One way to time compiled functions, for methods, claims and scripts."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax


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
    counts = {}
    for name, run in compiled.items():
        jax.block_until_ready(run(*args[0]))
        start = time.perf_counter()
        jax.block_until_ready(run(*args[-1]))
        once = time.perf_counter() - start
        counts[name] = max(1, min(calls, round(at_least / max(once, 1e-9))))
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, run in compiled.items():
            start = time.perf_counter()
            for n in range(counts[name]):
                out = run(*args[n % len(args)])
            jax.block_until_ready(out)
            seconds[name].append((time.perf_counter() - start) / counts[name])
    return {name: Timing(tuple(found)) for name, found in seconds.items()}
