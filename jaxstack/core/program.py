"""The compiled parts of a run: initialise all seeds, advance them by a chunk of steps, evaluate them.

Everything is compiled from shapes, before any array exists, so that what does not fit into memory is refused early.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxstack.core import distributed, guard, ledger, metrics
from jaxstack.core.data import Source
from jaxstack.core.devices import Layout, layout
from jaxstack.core.errors import UserError
from jaxstack.core.learner import Learner, as_hypers

EVAL_STREAM = 7_777_777
"""Evaluation draws from this key: the same episodes for all seeds, steps and methods, apart from training."""


class Programs(NamedTuple):
    """Executables over states [S, ...]; S seeds."""

    init: Callable[[], tuple[Any, guard.Alive]]
    """() -> (state, alive)."""
    advance: Callable[[Any, guard.Alive, int, int], tuple[Any, guard.Alive, dict[str, np.ndarray]]]
    """(state, alive, steps done, number of steps <= chunk) -> (state, alive, metrics [steps, S]). Donates its input."""
    evaluate: Callable[[Any], dict[str, np.ndarray]] | None
    """state -> metrics [S]."""
    place: Callable[[Any], Any]
    """Put a restored (state, alive) where the programs expect it."""
    chunk: int
    bind: Callable[[Sequence[int], Any], "Programs"]
    """(seeds, hypers) -> the same executables for as many other rows."""


def initial(learner: Learner, seeds: Sequence[int], hypers: Any) -> tuple[Any, guard.Alive]:
    """States [S, ...] of `seeds`: seed s starts from `jax.random.key(s)`; leaves of `hypers` are scalars or [S].

    One seed after another on CPU: there the batched QR of orthogonal initialisers can wait for its own thread pool
    for ever, and a seed's start does not depend on how many run beside it.
    """
    count = len(seeds)
    hypers = as_hypers(learner.hypers if hypers is None else hypers)
    for path, x in jax.tree_util.tree_leaves_with_path(hypers):
        if x.shape not in ((), (count,)):
            raise UserError(f"hypers{jax.tree_util.keystr(path)}: shape {x.shape}, expected () or ({count},)")
    hypers = jax.tree.map(lambda x: jnp.broadcast_to(x, (count,)), hypers)
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    one = lambda args: learner.init(*args)
    state = jax.lax.map(one, (keys, hypers)) if jax.default_backend() == "cpu" else jax.vmap(one)((keys, hypers))
    return state, guard.start(count)


def build(
    learner: Learner,
    seeds: Sequence[int],
    book: ledger.Ledger,
    *,
    hypers: Any = None,
    data: Source | None = None,
    chunk: int = 100,
    dispatch: Literal["auto", "scan", "loop"] = "auto",
    guarded: bool = True,
    evaluate: bool = True,
    devices: int = 1,
    env_devices: int = 1,
    memory_limit: int | None = None,
) -> Programs:
    """Compile a run; `memory_limit` in bytes (default: what is free).

    Raises `ledger.DoesNotFit` when the run needs more, `UserError` for devices that divide neither the seeds nor the
    environments of each (see devices.py).
    """
    # under jit it is traced once, for its shapes and its program
    start = jax.jit(lambda seeds, hypers: initial(learner, seeds, hypers))
    arguments = lambda seeds, hypers: (
        np.asarray(seeds, np.uint32),
        jax.tree.map(np.asarray, as_hypers(learner.hypers if hypers is None else hypers)),
    )
    rows = arguments(seeds, hypers)
    with book.clock():
        shapes = jax.eval_shape(start, *rows)
    place = layout(learner, shapes[0], devices, env_devices)
    where = None if place.mesh is None else (place.state, jax.tree.map(lambda _: place.seeds, shapes[1]))
    if where is not None:
        shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)
    # beside the chunk, which takes longest
    init = book.begin("init", start, *rows, out_shardings=where, once=True, aside=True)
    evaluation = _evaluation(learner, shapes[0], place, book) if evaluate else None
    constants = () if data is None else distributed.place_all(data.constants(), place.everywhere)
    item = () if data is None else data.chunk(0, 1, chunk, seeds, peek=True)
    one_item = jax.tree.map(lambda x: x[0], item)
    body = jax.jit(_step_body(learner, data, guarded))  # traced once, however often it is asked for its shapes
    zero = np.int32(0)
    if dispatch == "auto":
        with book.clock():
            slow = jax.default_backend() == "cpu" and convolves(body, *shapes, zero, constants, one_item)
        dispatch = "loop" if slow else "scan"
    out = None if where is None else (*where, place.everywhere)
    with place.compiling():
        if dispatch == "scan":
            args = (*shapes, zero, zero, constants, item)
            program = book.compile("chunk", _chunk_program(body, chunk), *args, donate=(0, 1), out_shardings=out)
        else:
            args = (*shapes, zero, constants, one_item)
            program = book.compile("step", body, *args, donate=(0, 1), out_shardings=out)
    measured = book.programs[-1]
    measured.seeds = -(-len(seeds) // devices)
    measured.envs = -(-getattr(learner.config, "num_envs", 0) // env_devices)
    shared = (constants, () if data is not None and data.per_seed else item)
    measured.shared_bytes = sum(x.nbytes for x in jax.tree.leaves(shared))
    # host memory is shared by its devices
    copies = max(devices * env_devices // distributed.count(), 1) if jax.default_backend() == "cpu" else 1
    limit = ledger.available_bytes() if memory_limit is None else memory_limit
    limit = -distributed.largest(-(2**62 if limit is None else limit))  # all processes refuse, or none
    ledger.check_memory(book.programs[-1], len(seeds), limit, copies)
    run = _scan if dispatch == "scan" else _loop

    initialise, measure = init(), evaluation and evaluation()

    def bind(seeds: Sequence[int], hypers: Any) -> Programs:
        rows = arguments(seeds, hypers)

        def advance(state: Any, alive: guard.Alive, done: int, count: int) -> tuple:
            items = () if data is None else data.chunk(done, count, chunk, seeds)
            return run(program, state, alive, done, count, constants, items)

        return Programs(
            init=lambda: initialise(*rows),
            advance=advance,
            evaluate=measure,
            place=lambda tree: place.place(*tree),
            chunk=chunk,
            bind=bind,
        )

    return bind(seeds, hypers)


def convolves(function: Callable, *args: Any) -> bool:
    """Whether the function contains a convolution: on XLA's CPU backend its gradient is several times slower inside a
    loop than outside."""
    found = lambda jaxpr: any(
        e.primitive.name == "conv_general_dilated" or any(map(found, jax.core.jaxprs_in_params(e.params)))
        for e in jaxpr.eqns
    )
    return found(jax.make_jaxpr(function)(*args).jaxpr)


def _evaluation(learner: Learner, shapes: Any, place: Layout, book: ledger.Ledger) -> Callable[[], Callable] | None:
    evaluate = learner.evaluate
    if evaluate is None:
        return None
    key = distributed.place_all(jax.random.key(EVAL_STREAM), place.everywhere)
    one = lambda state, key: over_seeds(lambda s: evaluate(s, key))(state)
    begun = book.begin("evaluate", one, shapes, key, out_shardings=place.everywhere, aside=True)

    def finish() -> Callable:
        program = begun()
        return lambda state: metrics.on_host(program(state, key))

    return finish


def _step_body(learner: Learner, data: Source | None, guarded: bool) -> Callable:
    """(state, alive, number of this step, constants, item) -> (state, alive, metrics), each with a seed axis."""
    step = guard.guarded(learner.step) if guarded else guard.unguarded(learner.step)

    def body(state: Any, alive: guard.Alive, number: Any, constants: Any, item: Any) -> tuple:
        if data is None:
            return over_seeds(lambda s, a: step(s, a, number))(state, alive)
        batch = data.batch
        if data.per_seed:
            return over_seeds(lambda s, a, one: step(s, a, number, batch(constants, one)))(state, alive, item)
        shared = batch(constants, item)
        return over_seeds(lambda s, a: step(s, a, number, shared))(state, alive)

    return body


def over_seeds(function: Callable) -> Callable:
    """`jax.vmap`, but one seed runs as it is: products with a batch axis of length one are slower on CPU."""

    def run(*trees: Any) -> Any:
        if jax.tree.leaves(trees)[0].shape[0] > 1:
            return jax.vmap(function)(*trees)
        out = function(*jax.tree.map(lambda x: x[0], trees))
        return jax.tree.map(lambda x: jnp.asarray(x)[None], out)

    return run


def _chunk_program(body: Callable, chunk: int) -> Callable:
    """A loop over `count` <= chunk steps whose metrics go into buffers [chunk, S]."""

    def program(state: Any, alive: guard.Alive, done: Any, count: Any, constants: Any, items: Any) -> tuple:
        at = lambda i: jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), items)
        shapes = jax.eval_shape(body, state, alive, done, constants, at(0))[2]
        empty = jax.tree.map(lambda s: jnp.zeros((chunk, *s.shape), s.dtype), shapes)

        def one(i: jax.Array, carry: tuple) -> tuple:
            state, alive, buffers = carry
            state, alive, row = body(state, alive, done + i + 1, constants, at(i))
            return state, alive, jax.tree.map(lambda b, m: b.at[i].set(m), buffers, row)

        return jax.lax.fori_loop(0, count, one, (state, alive, empty))

    return program


def _scan(program: Callable, state: Any, alive: Any, done: int, count: int, constants: Any, items: Any) -> tuple:
    state, alive, rows = program(state, alive, np.int32(done), np.int32(count), constants, items)
    return state, alive, {k: v[:count] for k, v in metrics.on_host(rows).items()}


def _loop(program: Callable, state: Any, alive: Any, done: int, count: int, constants: Any, items: Any) -> tuple:
    rows = []
    for i in range(count):
        item = jax.tree.map(lambda x, i=i: x[i], items)
        state, alive, row = program(state, alive, np.int32(done + i + 1), constants, item)
        rows.append(row)
    rows = [metrics.on_host(row) for row in rows]  # after the last step was sent off
    return state, alive, {k: np.stack([r[k] for r in rows]) for k in rows[0]}
