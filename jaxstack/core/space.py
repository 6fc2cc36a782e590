"""What a sweep searches: a name maps to the values of a grid or to a distribution that settings are drawn from.

    {"lr": log_uniform(1e-5, 1e-2), "ent_coef": grid(0.0, 0.01), "hidden": choice((64,), (64, 64))}

Numeric names (fields of the learner's `hypers`) are traced; all others are static: one program for each of
their values.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxstack.core import options
from jaxstack.core.errors import UserError, unknown

RESERVED = ("setting", "seed", "step", "samples", "alive", "failed", "runs")


@dataclass(frozen=True)
class Values:
    """Each of `values`."""

    values: tuple[Any, ...]

    def __str__(self) -> str:
        return f"grid({', '.join(map(str, self.values))})"


@dataclass(frozen=True)
class Uniform:
    """A number between `low` and `high`; with `log`, uniform in its logarithm."""

    low: float
    high: float
    log: bool = False

    def __str__(self) -> str:
        return f"{'log_' if self.log else ''}uniform({self.low}, {self.high})"

    def draw(self, rng: np.random.Generator, num: int) -> list[float]:
        """`num` float32 values, as Python floats: what the program sees."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        x = rng.uniform(low, high, num)
        return np.clip(np.exp(x) if self.log else x, self.low, self.high).astype(np.float32).tolist()


Dimension = Values | Uniform
Space = Mapping[str, Dimension]


def grid(*values: Any) -> Values:
    """Each of `values`."""
    return Values(values)


def choice(*values: Any) -> Values:
    """Each of `values`, which need not be numbers: a static option."""
    return Values(values)


def uniform(low: float, high: float) -> Uniform:
    """Numbers between `low` and `high`."""
    return Uniform(low, high)


def log_uniform(low: float, high: float) -> Uniform:
    """Numbers between `low` > 0 and `high` whose logarithm is uniform: for rates (Bergstra and Bengio, 2012)."""
    return Uniform(low, high, log=True)


def is_grid(space: Space) -> bool:
    """Whether every name has a list of values, so that the full product is swept."""
    return all(isinstance(d, Values) for d in space.values())


def check(space: Any, numeric: Sequence[str], static: Sequence[str] | None, num: int | None, owner: str) -> None:
    """Raise `UserError` for a name that is neither numeric nor static (None: any name is), a dimension that is empty,
    upside down, not finite or does not fit its name, and for `num` where it does not belong."""
    if not isinstance(space, Mapping) or not space:
        raise UserError(f"space={space!r}: expected at least one name with its values")
    for name, dimension in space.items():
        if name not in numeric and static is not None and name not in static:
            raise unknown(f"hyperparameter or option of {owner}", name, [*numeric, *static])
        if name in RESERVED:
            raise UserError(f"{name}: expected a name other than {', '.join(RESERVED)}")
        if isinstance(dimension, Values):
            _check_values(name, dimension.values, name in numeric)
        elif isinstance(dimension, Uniform):
            _check_uniform(name, dimension, name in numeric)
        else:
            raise UserError(f"{name}={dimension!r}: expected grid(...), choice(...), uniform(...) or log_uniform(...)")
    if is_grid(space) and num is not None:
        raise UserError(f"num={num}: expected none, as every name has a list of values, whose full product is swept")
    if not is_grid(space) and (num is None or num < 1):
        drawn = next(name for name, d in space.items() if isinstance(d, Uniform))
        raise UserError(f"num={num}: expected a number of settings >= 1, as {drawn} is drawn at random")


def numeric_settings(space: Space, numeric: Sequence[str], num: int | None, seed: int) -> list[dict[str, float]]:
    """Values of the numeric names: their product, or `num` draws. A draw depends on `seed`, its name and its number
    alone: a larger `num` continues where a smaller one ended."""
    names = [n for n in space if n in numeric]
    if num is None:
        return [dict(zip(names, map(float, v))) for v in itertools.product(*(_values(space[n]) for n in names))]
    if not 0 <= seed < 2**32:
        raise UserError(f"search_seed={seed}: expected 0 to 2^32-1")
    columns = []
    for name in names:
        rng, dimension = np.random.default_rng([seed, *name.encode()]), space[name]
        if isinstance(dimension, Uniform):
            columns.append(dimension.draw(rng, num))
        else:
            # uniform draws keep what was drawn before when num grows
            index = (rng.random(num) * len(dimension.values)).astype(int)
            columns.append([float(dimension.values[i]) for i in index])
    return [dict(zip(names, row)) for row in zip(*columns)]


def static_settings(space: Space, numeric: Sequence[str]) -> list[dict[str, Any]]:
    """The product of the static names' values; one empty setting when there are none."""
    names = [n for n in space if n not in numeric]
    return [dict(zip(names, v)) for v in itertools.product(*(_values(space[n]) for n in names))]


def to_plain(space: Space) -> dict[str, Any]:
    """For YAML: {"lr": {"log_uniform": [1e-5, 1e-2]}, ...}."""

    def plain(d: Dimension) -> dict[str, Any]:
        if isinstance(d, Values):
            return {"grid": [list(v) if isinstance(v, tuple) else v for v in d.values]}
        return {"log_uniform" if d.log else "uniform": [d.low, d.high]}

    return {name: plain(d) for name, d in space.items()}


def from_plain(data: Mapping[str, Any]) -> dict[str, Dimension]:
    """The inverse of `to_plain`."""
    make = {"grid": grid, "uniform": uniform, "log_uniform": log_uniform}
    return {name: make[kind](*map(options.as_tuple, values)) for name, d in data.items() for kind, values in d.items()}


def parse(entries: Iterable[str]) -> dict[str, Dimension]:
    """`lr=1e-4,1e-3`, `lr=log_uniform:1e-5:1e-2` or `hidden=[64],[64,64]`, as on the command line.

    Raises `UserError` for entries of another form and names given twice.
    """
    space: dict[str, Dimension] = {}
    for entry in entries:
        name, eq, text = entry.partition("=")
        name = name.strip().replace("-", "_")
        if not eq or not name:
            raise UserError(f"--sweep {entry}: expected NAME=VALUE,VALUE,... or NAME=uniform:LOW:HIGH")
        if name in space:
            raise UserError(f"--sweep {entry}: {name} is given twice")
        kind, *ends = text.split(":")
        if kind in ("uniform", "log_uniform"):
            numbers = [options.number(e) for e in ends]
            if len(numbers) != 2 or None in numbers:
                raise UserError(f"--sweep {entry}: expected {name}={kind}:LOW:HIGH")
            low, high = (float(x) for x in numbers if x is not None)
            space[name] = Uniform(low, high, log=kind == "log_uniform")
            continue
        try:
            values = options.load(f"[{text}]", name)
        except UserError as e:
            raise UserError(f"--sweep {entry}: expected values with commas between them") from e
        space[name] = Values(options.as_tuple(values))
    return space


def _values(dimension: Dimension) -> tuple[Any, ...]:
    assert isinstance(dimension, Values)
    return dimension.values


def _check_values(name: str, values: tuple[Any, ...], numeric: bool) -> None:
    if not values:
        raise UserError(f"{name}: expected at least one value, found none")
    if any(v in values[:i] for i, v in enumerate(values)):
        raise UserError(f"{name}={values}: expected different values")
    for v in values if numeric else ():
        if not _finite(v):
            raise UserError(f"{name}={v!r}: expected a finite number")


def _check_uniform(name: str, d: Uniform, numeric: bool) -> None:
    if not numeric:
        raise UserError(f"{name}={d}: expected choice(...), as each value of {name} needs a program of its own")
    if not _finite(d.low) or not _finite(d.high):
        raise UserError(f"{name}={d}: expected finite ends")
    if d.low >= d.high:
        raise UserError(f"{name}={d}: expected low < high")
    if d.log and d.low <= 0:
        raise UserError(f"{name}={d}: expected low > 0")


def _finite(x: Any) -> bool:
    number = isinstance(x, (int, float, np.integer, np.floating)) and not isinstance(x, bool)
    return number and bool(abs(float(x)) <= float(np.finfo(np.float32).max))
