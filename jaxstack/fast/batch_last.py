"""`jax.vmap` with the batch in the last axis, for programs of many short vectors, such as physics.

The physics of one robot is thousands of operations on arrays of a few 3-vectors and quaternions. `jax.vmap` puts the
batch first, where XLA's CPU backend vectorises over the three components, and computes anew, in every kernel and for
every component, the cheap values that go into a rotation. `batch_last(f)` equals `f`; where it is vmapped on a CPU, the
operations of `f` are carried out one by one with the batch in the last axis, small products by components, and what a
concatenation or a product gives is stored once. A substep of brax' hopper, 64 at once, takes 0.18 ms instead of 0.55
(2 cores of an EPYC).
"""

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.custom_batching import custom_vmap
from jax.extend import core

ELEMENTWISE = frozenset(
    "abs acos add and asin atan atan2 cbrt ceil clamp convert_element_type copy cos cosh div eq erf exp exp2 expm1 "
    "floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg not or pow reduce_precision rem "
    "round rsqrt select_n sign sin sinh sqrt square stop_gradient sub tan tanh xor".split()
)
SAME_AXES = frozenset(
    "argmax argmin cumlogsumexp cummax cummin cumprod cumsum expand_dims reduce_and reduce_max reduce_min reduce_or "
    "reduce_prod reduce_sum rev squeeze".split()
)
"""Primitives of one operand whose parameters name axes from the front."""
CALLS = frozenset("closed_call custom_jvp_call custom_vjp_call jit pjit remat".split())
BACKENDS = {"cpu"}
"""Where a vmap puts the batch last: where that was measured to be faster. `scripts/check_accelerator.py` measures it on
others."""
SUM = 8
"""The longest sum of a product that is written out."""
PARTS = 32
"""Rows are put together from slices up to so many, else gathered."""


class Value(NamedTuple):
    """An array with the batch in its last axis, or one without a batch."""

    x: Any
    batched: bool


class Batch(NamedTuple):
    size: int
    one: jax.Array
    """1, hidden from XLA: x / one is bitwise x, and XLA does not repeat a division in every kernel that uses it."""


def batch_last(function: Callable) -> Callable:
    """`function`, pure, of pytrees of arrays, with a vmap that runs faster on CPUs where its arrays are small.

    Results of a vmap are those of `jax.vmap(function)` up to the order of sums in products and of scattered terms.
    Derivatives are those of `function`. Only operations that this module names are carried out with the batch last, all
    others by their own batching rules. It is traced once for all calls with equal shapes, so it must not close over
    values of another trace.
    """

    @lru_cache(maxsize=8)
    def traced(tree: Any, shapes: tuple[jax.ShapeDtypeStruct, ...]) -> tuple[core.ClosedJaxpr, Any]:
        return jax.make_jaxpr(function, return_shape=True)(*jax.tree.unflatten(tree, shapes))

    @custom_vmap
    def batched(*args: Any) -> Any:
        leaves, tree = jax.tree.flatten(args)
        program, shapes = traced(tree, tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves))
        return jax.tree.unflatten(jax.tree.structure(shapes), core.jaxpr_as_fun(program)(*leaves))

    @batched.def_vmap
    def _(size: int, in_batched: list, *args: Any) -> tuple[Any, Any]:
        leaves, tree = jax.tree.flatten(args)
        flags = jax.tree.leaves(in_batched)
        own = (jax.ShapeDtypeStruct(x.shape[1:] if b else x.shape, x.dtype) for x, b in zip(leaves, flags))
        program, shapes = traced(tree, tuple(own))
        if jax.default_backend() in BACKENDS:
            values = [Value(jnp.moveaxis(x, 0, -1) if b else x, b) for x, b in zip(leaves, flags)]
            batch = Batch(size, lax.optimization_barrier(jnp.float32(1)))
            found = zip(_evaluate(program, values, batch), jax.tree.leaves(shapes))
            out = [jnp.moveaxis(_full(v, s.shape, batch), -1, 0) for v, s in found]
        else:
            axes = [0 if b else None for b in flags]
            out = jax.vmap(core.jaxpr_as_fun(program), in_axes=axes, axis_size=size)(*leaves)
        return jax.tree.unflatten(jax.tree.structure(shapes), out), jax.tree.map(lambda _: True, shapes)

    # custom_vmap has no reverse mode: derivatives go around it
    whole = jax.custom_jvp(lambda *args: batched(*args))
    whole.defjvp(lambda primals, tangents: jax.jvp(function, primals, tangents))
    return wraps(function)(whole)


def _aval(variable: Any) -> Any:
    """Shape and type of a variable of a program."""
    return variable.aval


def _evaluate(program: core.ClosedJaxpr, args: list[Value], batch: Batch) -> list[Value]:
    jaxpr = program.jaxpr
    known = dict(zip(jaxpr.constvars, (Value(c, False) for c in program.consts))) | dict(zip(jaxpr.invars, args))

    def read(v: Any) -> Value:
        return Value(np.asarray(v.val, _aval(v).dtype), False) if isinstance(v, core.Literal) else known[v]

    for eqn in jaxpr.eqns:
        known |= zip(eqn.outvars, _apply(eqn, [read(v) for v in eqn.invars], batch))
    return [read(v) for v in jaxpr.outvars]


def _apply(eqn: core.JaxprEqn, values: list[Value], batch: Batch) -> list[Value]:
    name, params = eqn.primitive.name, eqn.params
    shapes = [_aval(v).shape for v in eqn.invars]
    bind = lambda *xs: eqn.primitive.bind(*xs, **params)
    listed = lambda out: list(out) if eqn.primitive.multiple_results else [out]
    if name in CALLS:
        inner = params.get("jaxpr") or params["call_jaxpr"]
        return _evaluate(inner if isinstance(inner, core.ClosedJaxpr) else core.ClosedJaxpr(inner, ()), values, batch)
    if name == "platform_index":
        backend = jax.default_backend()
        own = {"cuda", "rocm"} if backend == "gpu" else {backend}
        fits = (i for i, p in enumerate(params["platforms"]) if p is None or own & {*p})
        return [Value(np.int32(next(fits)), False)]
    if name == "cond" and _concrete(values[:1]):
        return _evaluate(params["branches"][int(values[0].x)], values[1:], batch)
    if not any(v.batched for v in values):
        xs = [v.x for v in values]
        # indices have to be known here, so that gathers become slices
        whole = _concrete(values) and all(not jnp.issubdtype(_aval(v).dtype, jnp.inexact) for v in eqn.outvars)
        if whole and name in NUMPY:
            return [Value(NUMPY[name](eqn, *map(np.asarray, xs)), False)]
        with jax.ensure_compile_time_eval() if whole else nullcontext():
            return [Value(x, False) for x in listed(bind(*xs))]
    shape = _aval(eqn.outvars[0]).shape
    if name in ELEMENTWISE:
        return [Value(x, True) for x in listed(bind(*[_full(v, shape, batch) for v in values]))]
    if name in SAME_AXES:
        return [Value(x, True) for x in listed(bind(values[0].x))]
    if name == "scan":
        return _scan(eqn, values, batch)
    if name in RULES and (out := RULES[name](eqn, values, shapes, batch)) is not None:
        return [Value(x, True) for x in out]
    # all others as jax.vmap would: with the batch where their own rules put it
    axes = tuple(-1 if v.batched else None for v in values)
    return [Value(x, True) for x in listed(jax.vmap(bind, in_axes=axes, out_axes=-1)(*[v.x for v in values]))]


def _concrete(values: list[Value]) -> bool:
    return not any(v.batched or isinstance(v.x, Tracer) for v in values)


def _full(value: Value, shape: tuple[int, ...], batch: Batch) -> jax.Array:
    """[*shape, size] of a value of this shape or of a scalar."""
    x = value.x if value.batched else jnp.expand_dims(value.x, -1)
    if x.ndim == 1:
        x = x.reshape(*[1] * len(shape), -1)
    return jnp.broadcast_to(x, (*shape, batch.size))


def _stored(x: jax.Array, batch: Batch) -> jax.Array:
    return x / batch.one if x.dtype == jnp.float32 else x


def _scan(eqn: core.JaxprEqn, values: list[Value], batch: Batch) -> list[Value]:
    p = eqn.params
    consts, carries = p["num_consts"], p["num_carry"]
    first, xs = values[consts : consts + carries], values[consts + carries :]
    shapes = [_aval(v).shape for v in p["jaxpr"].jaxpr.outvars]

    def body(carry: list, x: list) -> tuple[list, list]:
        row = [Value(c, True) for c in carry] + [Value(y, v.batched) for y, v in zip(x, xs)]
        out = _evaluate(p["jaxpr"], values[:consts] + row, batch)
        whole = [_full(v, s, batch) for v, s in zip(out, shapes)]
        return whole[:carries], whole[carries:]

    start = [_full(v, s, batch) for v, s in zip(first, shapes)]
    carry, ys = lax.scan(body, start, [v.x for v in xs], p["length"], p["reverse"], p["unroll"])
    return [Value(x, True) for x in (*carry, *ys)]


def _rows(x: jax.Array, index: np.ndarray) -> jax.Array:
    """x[index] of the first axis, as slices, which XLA can fuse."""
    starts = np.flatnonzero(np.diff(index, prepend=index[0] - 2) != 1)
    if len(starts) > PARTS:
        return x[index]
    ends = np.append(starts[1:], len(index))
    parts = [lax.slice_in_dim(x, int(index[s]), int(index[s]) + int(e - s)) for s, e in zip(starts, ends)]
    return jnp.concatenate(parts) if len(parts) > 1 else parts[0]


def _row_index(index: Value, dims: tuple) -> np.ndarray | None:
    """Indices of whole rows of the first axis, from an index array known now and (the axes that it drops, the axes that
    it points into, batch axes); None where it is anything else."""
    return np.asarray(index.x)[..., 0] if dims == ((0,), (0,), ()) and _concrete([index]) else None


def _gather(eqn: core.JaxprEqn, values: list[Value], shapes: list, batch: Batch) -> list | None:
    d, sizes = eqn.params["dimension_numbers"], tuple(eqn.params["slice_sizes"])
    out = _aval(eqn.outvars[0]).shape
    index = _row_index(
        values[1], (tuple(d.collapsed_slice_dims), tuple(d.start_index_map), tuple(d.operand_batching_dims))
    )
    if index is None or sizes != (1, *shapes[0][1:]) or tuple(d.offset_dims) != tuple(range(index.ndim, len(out))):
        return None
    if not index.size or index.min() < 0 or index.max() >= shapes[0][0]:
        return None
    return [_rows(values[0].x, index.ravel()).reshape(*out, batch.size)]


def _scatter_add(eqn: core.JaxprEqn, values: list[Value], shapes: list, batch: Batch) -> list | None:
    d = eqn.params["dimension_numbers"]
    dims = tuple(d.inserted_window_dims), tuple(d.scatter_dims_to_operand_dims), tuple(d.operand_batching_dims)
    index = _row_index(values[1], dims)
    if index is None or tuple(d.update_window_dims) != tuple(range(index.ndim, len(shapes[2]))):
        return None
    outside = (index < 0) | (index >= shapes[0][0])
    dropped = eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    if shapes[2][index.ndim :] != shapes[0][1:] or (outside.any() and not dropped):
        return None
    out = _full(values[0], shapes[0], batch)
    terms = _full(values[2], shapes[2], batch).reshape(index.size, *shapes[0][1:], batch.size)
    terms = jnp.concatenate([terms, jnp.zeros_like(terms[:1])])
    # row i of layer n: the n-th term that goes to it, or the zeros at the end
    given = [np.flatnonzero(index.ravel() == i) for i in range(shapes[0][0])]
    for n in range(max(map(len, given))):
        out = out + _rows(terms, np.array([g[n] if n < len(g) else index.size for g in given]))
    return [out]


def _dot(eqn: core.JaxprEqn, values: list[Value], shapes: list, batch: Batch) -> list | None:
    (ca, cb), (ba, bb) = eqn.params["dimension_numbers"]
    if np.prod([shapes[0][i] for i in ca]) > SUM:
        return None
    a, b = (_full(v, s, batch) if v.batched else jnp.expand_dims(v.x, -1) for v, s in zip(values, shapes))
    fa = [i for i in range(a.ndim - 1) if i not in (*ca, *ba)]
    fb = [i for i in range(b.ndim - 1) if i not in (*cb, *bb)]
    a = a.transpose(*ca, *ba, *fa, a.ndim - 1)
    b = b.transpose(*cb, *bb, *fb, b.ndim - 1)
    both = len(ba) + len(fa)
    terms = [
        jnp.expand_dims(a[i], tuple(range(both, both + len(fb)))) * jnp.expand_dims(b[i], tuple(range(len(ba), both)))
        for i in itertools.product(*(range(shapes[0][j]) for j in ca))
    ]
    return [_stored(sum(terms[1:], terms[0]), batch)]


def _slice(eqn: core.JaxprEqn, values: list[Value], shapes: list, batch: Batch) -> list:
    p = eqn.params
    strides = None if p["strides"] is None else (*p["strides"], 1)
    return [lax.slice(values[0].x, (*p["start_indices"], 0), (*p["limit_indices"], batch.size), strides)]


def _broadcast(eqn: core.JaxprEqn, values: list[Value], shapes: list, batch: Batch) -> list:
    shape = _aval(eqn.outvars[0]).shape
    axes = (*eqn.params["broadcast_dimensions"], len(shape))
    return [lax.broadcast_in_dim(values[0].x, (*shape, batch.size), axes)]


def _concatenate(eqn: core.JaxprEqn, values: list[Value], shapes: list, batch: Batch) -> list:
    parts = [_full(v, s, batch) for v, s in zip(values, shapes)]
    return [_stored(lax.concatenate(parts, eqn.params["dimension"]), batch)]


def _pad(eqn: core.JaxprEqn, values: list[Value], shapes: list, batch: Batch) -> list | None:
    if values[1].batched:
        return None
    return [lax.pad(values[0].x, values[1].x, (*eqn.params["padding_config"], (0, 0, 0)))]


RULES: dict[str, Callable[[core.JaxprEqn, list[Value], list, Batch], list | None]] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "dot_general": _dot,
    "gather": _gather,
    "pad": _pad,
    "reshape": lambda e, v, s, batch: [v[0].x.reshape(*_aval(e.outvars[0]).shape, batch.size)],
    "scatter-add": _scatter_add,
    "slice": _slice,
    "split": lambda e, v, s, batch: list(lax.split(v[0].x, e.params["sizes"], e.params["axis"])),
    "tile": lambda e, v, s, batch: [jnp.tile(v[0].x, (*e.params["reps"], 1))],
    "transpose": lambda e, v, s, batch: [v[0].x.transpose(*e.params["permutation"], len(s[0]))],
}
"""primitive -> (equation, operands, their shapes without the batch, batch) -> results, or None: not in this form."""


def _np_broadcast(eqn: core.JaxprEqn, x: np.ndarray) -> np.ndarray:
    shape = [1] * len(eqn.params["shape"])
    for axis, size in zip(eqn.params["broadcast_dimensions"], x.shape):
        shape[axis] = size
    return np.broadcast_to(x.reshape(shape), eqn.params["shape"])


def _np_iota(eqn: core.JaxprEqn) -> np.ndarray:
    p = eqn.params
    shape = [-1 if i == p["dimension"] else 1 for i in range(len(p["shape"]))]
    return np.broadcast_to(np.arange(p["shape"][p["dimension"]], dtype=p["dtype"]).reshape(shape), p["shape"])


NUMPY: dict[str, Callable[..., np.ndarray]] = {
    "add": lambda e, a, b: a + b,
    "broadcast_in_dim": _np_broadcast,
    "concatenate": lambda e, *xs: np.concatenate(xs, e.params["dimension"]),
    "convert_element_type": lambda e, x: x.astype(e.params["new_dtype"]),
    "iota": _np_iota,
    "lt": lambda e, a, b: a < b,
    "reshape": lambda e, x: x.reshape(e.params["new_sizes"]),
    "select_n": lambda e, which, *cases: np.choose(which.astype(int), cases),
    "squeeze": lambda e, x: np.squeeze(x, e.params["dimensions"]),
}
"""What the arithmetic of indices takes, without compiling a program for each operation."""
