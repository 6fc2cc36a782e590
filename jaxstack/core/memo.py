"""Compiled programs that this process has already made, so that the second call alike compiles nothing.

A learner is recognised by what its functions compute from: their code and, recursively, what they close over. Learners
made twice from equal configs are thus one. What cannot be compared by value (an object of a library, a jitted function)
counts as equal only to itself; module globals are taken to stay as they are, as `jax.jit` does.
"""

import dataclasses
import enum
import functools
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

LEARNERS = 8
"""Learners whose programs are kept, the least recently used leave first."""
PROGRAMS = 12
"""Programs kept for each."""
LARGEST = 2**18
"""Arrays of more elements are compared by identity."""

_known: OrderedDict[Any, OrderedDict[Any, Any]] = OrderedDict()


class Same:
    """An object as a key: equal to itself alone, and kept from being freed, so that its place is not taken."""

    def __init__(self, thing: Any):
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.thing is other.thing

    def __hash__(self) -> int:
        return id(self.thing)


def programs(*things: Any) -> OrderedDict[Any, Any]:
    """The store for programs made from `things` under JAX's present settings; see `keep`."""
    settings = tuple((name, repr(getattr(jax.config, name, value))) for name, value in jax.config.values.items())
    key = (settings, *(fingerprint(x) for x in things))
    store = _known.setdefault(key, OrderedDict())
    _known.move_to_end(key)
    while len(_known) > LEARNERS:
        _known.popitem(last=False)
    return store


def keep(store: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    """Put a value into a store; the oldest leaves when there are too many."""
    store[key] = value
    while len(store) > PROGRAMS:
        store.popitem(last=False)


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit(function)`, or the one made before from a function that computes the same."""
    store = programs(function)
    if "jit" not in store:
        keep(store, "jit", jax.jit(function))
    return store["jit"]


def forget() -> None:
    """Let go of all programs."""
    _known.clear()


def signature(tree: Any) -> Any:
    """Structure, shapes, types and placement of arguments."""
    leaves, structure = jax.tree.flatten(tree)
    one = lambda x: (np.shape(x), str(x.dtype), getattr(x, "weak_type", False), getattr(x, "sharding", None))
    return structure, tuple(one(x) for x in leaves)


def fingerprint(thing: Any, above: tuple[int, ...] = ()) -> Any:
    """A hashable value, equal for things that compute the same."""
    if thing is None or isinstance(thing, (bool, int, float, complex, str, bytes, enum.Enum)):
        return type(thing), repr(thing)  # repr tells -0.0 from 0.0, and NaN equals itself
    if id(thing) in above:
        return "above", len(above) - above.index(id(thing))
    inner = functools.partial(fingerprint, above=(*above, id(thing)))
    many = lambda things: tuple(inner(x) for x in things)
    if isinstance(thing, types.FunctionType):
        cells = []
        for cell in thing.__closure__ or ():
            try:
                cells.append(inner(cell.cell_contents))
            except ValueError:  # not assigned yet
                cells.append("empty")
        defaults = many((thing.__defaults__, thing.__kwdefaults__))
        return "function", thing.__code__, Same(thing.__globals__), defaults, tuple(cells)
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
            return type(thing), many(getattr(thing, f.name) for f in dataclasses.fields(thing))
    return Same(thing)
