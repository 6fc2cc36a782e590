"""Compiled programs that this process has already made, so that the second call alike compiles nothing.

A learner is recognised by what its functions compute from: their code and, recursively, what they close over. Learners
made twice from equal configs are thus one. What cannot be compared by value (an object of a library, a jitted function)
counts as equal only to itself; module globals are taken to stay as they are, as `jax.jit` does.

Numbers of configs (their field `hypers`) are traced: they tell learners apart only where tracing reads them from a
config after all, which is noticed.
"""

import contextlib
import dataclasses
import enum
import functools
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxstack.core import aside, config

LEARNERS = 8
"""Learners whose programs are kept, the least recently used leave first."""
PROGRAMS = 12
"""Programs kept for each."""
LARGEST = 2**18
"""Arrays of more elements are compared by identity."""

_known: OrderedDict[Any, OrderedDict[Any, Any]] = OrderedDict()
_reading: OrderedDict[Any, bool] = OrderedDict()
"""Keys, without the numbers of configs, of things whose tracing reads such numbers."""
READING = 64
"""So many of them are remembered; one that is forgotten is noticed again."""
_shapes: OrderedDict[Any, Any] = OrderedDict()
SHAPES = 16
"""Results of `shapes` that are kept."""


class Same:
    """An object as a key: equal to itself alone, and kept from being freed, so that its place is not taken."""

    def __init__(self, thing: Any):
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.thing is other.thing

    def __hash__(self) -> int:
        return id(self.thing)


class Given(NamedTuple):
    """A function whose first `count` arguments are always given, so that defaults of theirs do not matter."""

    function: Callable[..., Any]
    count: int


@contextlib.contextmanager
def programs(*things: Any) -> Iterator[OrderedDict[Any, Any]]:
    """The store for programs made from `things` under JAX's present settings, see `keep`; tracing is to happen inside
    the block. Things that differ in numbers of configs alone share a store, unless tracing reads such a number."""
    settings = _settings()

    def key(numbers: bool) -> Any:
        return settings, numbers, tuple(fingerprint(x, numbers) for x in things)

    short = key(False)
    full = key(True) if short in _reading else short
    store = _known.setdefault(full, OrderedDict())
    _known.move_to_end(full)
    while len(_known) > LEARNERS:
        _known.popitem(last=False)
    with config.watched() as read:
        try:
            yield store
        finally:
            if read and full is short:  # what is in the store is for these numbers alone
                keep(_reading, short, True, READING)
                _known.pop(short, None)
                _known[key(True)] = store


def keep(store: OrderedDict[Any, Any], key: Any, value: Any, most: int = PROGRAMS) -> None:
    """Put a value into a store; the oldest leaves when there are more than `most`."""
    store[key] = value
    while len(store) > most:
        store.popitem(last=False)


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit(function)` for arrays, or the one made before from a function that computes the same."""

    def run(*args: Any) -> Any:
        with programs(function) as store:
            args = jax.tree.map(jnp.asarray, args)
            known = ("jit", signature(args))
            if known not in store:
                lowered = jax.jit(function).lower(*args)
                keep(store, known, aside.begin("jit", lowered.compile).result())
            return store[known](*args)

    return run


def shapes(thing: Any, trace: Callable[..., Any], *args: Any) -> Any:
    """`jax.eval_shape(trace, *args)`, or what was found before for arguments of these shapes and a thing alike, which
    is what `trace` computes from."""
    key = _settings(), fingerprint(thing, True), signature(args)
    if key not in _shapes:
        keep(_shapes, key, jax.eval_shape(trace, *args), SHAPES)
    _shapes.move_to_end(key)
    return _shapes[key]


def forget() -> None:
    """Let go of all programs."""
    _known.clear()
    _reading.clear()
    _shapes.clear()


def _settings() -> Any:
    return tuple((name, repr(getattr(jax.config, name, value))) for name, value in jax.config.values.items())


def signature(tree: Any) -> Any:
    """Structure, shapes, types and placement of arguments."""
    leaves, structure = jax.tree.flatten(tree)
    one = lambda x: (np.shape(x), str(x.dtype), getattr(x, "weak_type", False), getattr(x, "sharding", None))
    return structure, tuple(one(x) for x in leaves)


def fingerprint(thing: Any, numbers: bool = False, above: tuple[int, ...] = ()) -> Any:
    """A hashable value, equal for things that compute the same; with the `numbers` of configs or without.

    An object of a class with a method `computes_from` is described by what that returns.
    """
    if thing is None or isinstance(thing, (bool, int, float, complex, str, bytes, enum.Enum)):
        return type(thing), repr(thing)  # repr tells -0.0 from 0.0, and NaN equals itself
    if id(thing) in above:
        return "above", len(above) - above.index(id(thing))
    inner = functools.partial(fingerprint, numbers=numbers, above=(*above, id(thing)))
    many = lambda things: tuple(inner(x) for x in things)
    if isinstance(thing, Given):
        function, count = thing
        if isinstance(function, types.FunctionType):
            defaults = function.__defaults__ or ()
            kept = defaults[max(count - function.__code__.co_argcount + len(defaults), 0) :]
            return "given", count, _function(function, (kept, function.__kwdefaults__), inner)
        return "given", count, inner(function)
    if isinstance(thing, types.FunctionType):
        return _function(thing, (thing.__defaults__, thing.__kwdefaults__), inner)
    if isinstance(thing, types.MethodType):
        return "method", inner(thing.__func__), inner(thing.__self__)
    if isinstance(thing, functools.partial):
        return "partial", inner(thing.func), inner(thing.args), inner(thing.keywords)
    if isinstance(thing, (tuple, list)):
        return type(thing), many(thing)
    if isinstance(thing, dict):
        return type(thing), tuple((inner(k), inner(v)) for k, v in thing.items())
    if isinstance(thing, jax.Array) and not isinstance(thing, jax.core.Tracer) and thing.size <= LARGEST:
        if jnp.issubdtype(thing.dtype, jax.dtypes.prng_key):
            return "key", str(jax.random.key_impl(thing)), inner(jax.random.key_data(thing))
        if thing.is_fully_addressable:
            return "array", thing.sharding, thing.weak_type, inner(np.asarray(thing))
    if isinstance(thing, (np.ndarray, np.generic)) and thing.dtype != object and thing.size <= LARGEST:
        return type(thing), str(thing.dtype), thing.shape, thing.tobytes()
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        frozen = getattr(type(thing), "__dataclass_params__").frozen  # noqa: B009 - unknown to the type checker
        unbound = getattr(thing, "scope", thing) is None  # a module of flax, which does not change either
        if frozen or unbound:
            names = [f.name for f in dataclasses.fields(thing)]
            if isinstance(thing, config.Config) and not numbers:
                names = [n for n in names if n != "hypers"]
            # past a config's own look-up, which notes that its numbers are read: here nothing is traced from them
            look = object.__getattribute__ if isinstance(thing, config.Config) else getattr
            return type(thing), many(look(thing, n) for n in names)
    if isinstance(thing, jax.ShapeDtypeStruct):
        return "shape", thing.shape, str(thing.dtype), thing.weak_type, thing.sharding
    # inherited, it would not know what a subclass adds
    described = vars(type(thing)).get("computes_from")
    if described is not None:
        return type(thing), inner(described(thing))
    return Same(thing)


def _function(function: types.FunctionType, defaults: Any, inner: Callable[[Any], Any]) -> Any:
    cells = []
    for cell in function.__closure__ or ():
        try:
            cells.append(inner(cell.cell_contents))
        except ValueError:  # not assigned yet
            cells.append("empty")
    return "function", function.__code__, Same(function.__globals__), inner(defaults), tuple(cells)
