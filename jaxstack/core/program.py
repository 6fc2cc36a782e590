"""The compiled parts of a run: initialise all seeds, advance them by a chunk of steps, evaluate them.

Everything is compiled from shapes, before any array exists, so that what does not fit into memory is refused early.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxstack.core import distributed, guard, ledger, memo, source
from jaxstack.core.devices import Layout, environments, layout
from jaxstack.core.errors import UserError
from jaxstack.core.learner import Key, Learner, as_hypers
from jaxstack.core.metrics import Mean, on_host
from jaxstack.core.source import Feed, Source

EVAL_STREAM = 7_777_777
"""Evaluation draws from this key: the same episodes for all seeds, steps and methods, apart from training."""


class Programs(NamedTuple):
    """Executables over states [S, ...]; S seeds."""

    init: Callable[[], tuple[Any, guard.Alive]]
    """() -> (state, alive)."""
    advance: Callable[..., tuple[Any, guard.Alive, dict[str, np.ndarray]]]
    """(state, alive, steps done, number of steps <= chunk, what the feed has for them, where there is one) ->
    (state, alive, metrics [steps, S]). Donates its input."""
    evaluate: Callable[[Any], dict[str, np.ndarray]] | None
    """state -> metrics [S]."""
    place: Callable[[Any], Any]
    """Put a restored (state, alive) where the programs expect it."""
    chunk: int
    bind: Callable[[Sequence[int], Any, Any], "Programs"]
    """(seeds, hypers, what is given to `init`) -> the same executables for as many other rows."""
    feed: Callable[[], Feed | None]
    """() -> where dispatches of batches come from, from where the source is; closed by who opens it."""
    causes: Sequence[str]
    """What a number of `Alive.cause` says, see guard.py."""


def initial(
    learner: Learner, seeds: Sequence[int] | jax.Array, hypers: Any, given: Any = None, length: Any = None
) -> tuple[Any, guard.Alive]:
    """States [S, ...] of `seeds`: seed s starts from `jax.random.key(s)`; leaves of `hypers` are scalars or [S], those
    of `given` (default: the learner's) [S, ...]. Schedules end after `length` steps (default: the learner's).

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
    given = learner.given if given is None else given
    for path, x in jax.tree_util.tree_leaves_with_path(given):
        if jnp.shape(x)[:1] != (count,):
            where = jax.tree_util.keystr(path)
            raise UserError(
                f"{learner.name}.given{where}: shape {jnp.shape(x)}, expected ({count}, ...), one row per seed"
            )
    args = (keys, hypers) if given is None else (keys, hypers, given)
    state = jax.lax.map(one, args) if jax.default_backend() == "cpu" else jax.vmap(one)(args)
    if learner.with_length is not None and length is not None:
        state = learner.with_length(state, length)
    return state, guard.start(count)


def shapes_of(
    learner: Learner, seeds: Sequence[int] | np.ndarray, hypers: Any = None, given: Any = None, trace: Any = None
) -> tuple[Any, guard.Alive]:
    """Shapes of what `initial` returns for these arguments, whose leaves may be shapes too; traced once for learners
    alike. `trace`: a function of (seeds, hypers, given) that does what `initial` does."""
    hypers = jax.tree.map(np.asarray, as_hypers(learner.hypers if hypers is None else hypers))
    args = (np.asarray(seeds, np.uint32), hypers, learner.given if given is None else given)
    run = lambda *args: initial(learner, *args)
    return memo.shapes(memo.Given(learner.init, 2), trace or run, *args)


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
    length: int | None = None,
) -> Programs:
    """Compile a run whose schedules end after `length` steps; `memory_limit` in bytes (default: what is free). Large
    batches make `chunk` smaller (source.py).

    Raises `ledger.DoesNotFit` when the run needs more, `UserError` for devices that divide neither the seeds nor the
    environments of each (see devices.py).
    """
    # numbers that are arguments are no part of what is compiled
    bare = learner._replace(given=None, hypers=None, source=None, eval_source=None, init=memo.Given(learner.init, 2))
    with memo.programs(bare, data) as store:
        # under jit it is traced once, for its shapes and its program
        start = jax.jit(lambda *args: initial(learner, *args))
        arguments = lambda seeds, hypers, given: (
            np.asarray(seeds, np.uint32),
            jax.tree.map(np.asarray, as_hypers(learner.hypers if hypers is None else hypers)),
            given,
            None if length is None else np.int32(length),
        )
        rows = arguments(seeds, hypers, learner.given)
        known = ("shapes", memo.signature(rows))
        if known not in store:
            with book.clock():
                memo.keep(store, known, shapes_of(learner, *rows[:3], lambda *args: start(*args, rows[3])))
        shapes = store[known]
        place = layout(learner, shapes[0], devices, env_devices)
        where = None if place.mesh is None else (place.state, jax.tree.map(lambda _: place.seeds, shapes[1]))
        if where is not None:
            shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)
        # beside the chunk, which takes longest
        init = book.begin("init", start, *rows, out_shardings=where, once=True, early=True, store=store)
        evaluation = evaluating(learner, shapes[0], book, place, store=store) if evaluate else None
        arrays = () if data is None else data.constants()
        streamed = not jax.tree.leaves(arrays)  # otherwise the items are rows of `arrays`
        check = (data is not None and learner.check_data) or (lambda examples: None)
        if not streamed:
            check(arrays)
        constants = distributed.place_all(arrays, place.everywhere)
        one_item = () if data is None else data.item(seeds)
        chunk = chunk if data is None else source.fitting(data, seeds, chunk)
        item = jax.tree.map(lambda x: np.zeros((chunk, *np.shape(x)), np.asarray(x).dtype), one_item)
        # who draws: rows and augmentation depend on the seed and the step
        draws = lambda seeds: () if data is None else distributed.place_all(np.asarray(seeds, np.uint32), place.seeds)
        shared = (constants, draws(seeds))
        causes: list[str] = []
        body = jax.jit(
            _step_body(learner, data, guarded, causes)
        )  # traced once, however often it is asked for its shapes
        zero = np.int32(0)
        if dispatch == "auto":
            known = ("convolves", memo.signature((shapes, shared, one_item)))
            if known not in store:
                with book.clock():
                    slow = jax.default_backend() == "cpu" and convolves(body, *shapes, zero, shared, one_item)
                memo.keep(store, known, slow)
            dispatch = "loop" if store[known] else "scan"
        out = None if where is None else (*where, place.everywhere)
        where_items = place.steps if data is not None and data.per_seed else place.everywhere

        def send(tree: Any) -> Any:
            if dispatch == "loop":  # step by step from the host
                return tree
            return jax.device_put(tree) if where_items is None else distributed.place_all(tree, where_items)

        def checked(tree: Any) -> Any:
            if streamed:
                check(tree)
            return send(tree)

        options: dict[str, Any] = dict(donate=(0, 1), store=store, tag=(chunk, guarded), notes=causes)
        with place.compiling():
            if dispatch == "scan":
                item = send(item)
                args = (*shapes, zero, zero, shared, item)
                program = book.compile("chunk", _chunk_program(body, chunk), *args, out_shardings=out, **options)
            else:
                args = (*shapes, zero, shared, one_item)
                program = book.compile("step", body, *args, out_shardings=out, **options)
        measured = book.programs[-1]
        measured.seeds = -(-len(seeds) // devices)
        measured.envs = -(-environments(learner, shapes[0]) // env_devices)
        common = (constants, () if data is not None and data.per_seed else item)
        measured.shared_bytes = sum(x.nbytes for x in jax.tree.leaves(common))
        # host memory is shared by its devices
        copies = max(devices * env_devices // distributed.count(), 1) if jax.default_backend() == "cpu" else 1
        limit = ledger.available_bytes() if memory_limit is None else memory_limit
        limit = -distributed.largest(-(2**62 if limit is None else limit))  # all processes refuse, or none
        ledger.check_memory(book.programs[-1], len(seeds), limit, copies)
        run = _scan if dispatch == "scan" else _loop

        initialise, measure = init(), evaluation and evaluation()

        def bind(seeds: Sequence[int], hypers: Any, given: Any) -> Programs:
            rows = arguments(seeds, hypers, given)

            shared = (constants, draws(seeds))

            def advance(state: Any, alive: guard.Alive, done: int, count: int, items: Any = ()) -> tuple:
                return run(program, state, alive, done, count, shared, items)

            return Programs(
                init=lambda: initialise(*rows),
                advance=advance,
                evaluate=measure,
                place=lambda tree: place.place(*tree),
                chunk=chunk,
                bind=bind,
                feed=lambda: None if data is None else Feed(data, seeds, chunk, checked),
                causes=causes,
            )

        return bind(seeds, hypers, learner.given)


def convolves(function: Callable, *args: Any) -> bool:
    """Whether the function contains a convolution: on XLA's CPU backend its gradient is several times slower inside a
    loop than outside."""
    found = lambda jaxpr: any(
        e.primitive.name == "conv_general_dilated" or any(map(found, core.jaxprs_in_params(e.params)))
        for e in jaxpr.eqns
    )
    return found(jax.make_jaxpr(function)(*args).jaxpr)


def evaluating(
    learner: Learner,
    shapes: Any,
    book: ledger.Ledger,
    place: Layout = Layout(),
    key: Key | None = None,
    store: Any = None,
) -> Callable[[], Callable[[Any], dict[str, np.ndarray]]] | None:
    """Begin to compile the evaluation of states like `shapes` [S, ...] with `key` (default: the one of all runs); the
    function that is returned gives state -> metrics [S]. None for a learner without evaluation.

    Raises `UserError` for an `eval_source` without an end, or an `evaluate` that gives no `Mean`s for its batches.
    """
    evaluate = learner.evaluate
    if evaluate is None:
        return None
    key = distributed.place_all(jax.random.key(EVAL_STREAM) if key is None else key, place.everywhere)
    if learner.eval_source is None:
        one = lambda state, key: over_seeds(lambda s: evaluate(s, key))(state)
        begun = book.begin("evaluate", one, shapes, key, out_shardings=place.everywhere, early=True, store=store)

        def finish() -> Callable:
            program = begun()
            return lambda state: on_host(program(state, key))

        return finish
    split = learner.eval_source(learner.config)
    total = source.finite(split, learner.name)
    constants = distributed.place_all(split.constants(), place.everywhere)
    store = OrderedDict() if store is None else store
    reads = memo.fingerprint(split)

    def measure(state: Any, constants: Any, item: Any, key: Any) -> Any:
        batch = split.batch(constants, item, key)
        return over_seeds(lambda s: evaluate(s, key, batch))(state)

    one_item = split.item([0])
    known = ("measured", reads, memo.signature((shapes, constants, one_item)))
    if known not in store:
        with book.clock():
            found = jax.eval_shape(measure, shapes, constants, one_item, key)
            slow = jax.default_backend() == "cpu" and convolves(measure, shapes, constants, one_item, key)
        memo.keep(store, known, (found, slow))
    found, slow = store[known]
    for name, value in found.items():
        if not isinstance(value, Mean):
            raise UserError(f"{learner.name}.evaluate: {name}: expected a Mean(total, count), to add up over batches")
    size = 1 if slow else source.fitting(split, [0], total)

    def sums(state: Any, constants: Any, items: Any, start: Any, count: Any, key: Any) -> Any:
        at = lambda i: jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), items)
        one = lambda i: measure(state, constants, at(i), jax.random.fold_in(key, start + i))
        if size == 1:  # no loop, in which convolutions are slower on CPU
            return one(0)
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), found)
        return jax.lax.fori_loop(0, count, lambda i, sums: jax.tree.map(jnp.add, sums, one(i)), zero)

    send = lambda tree: jax.device_put(tree) if place.mesh is None else distributed.place_all(tree, place.everywhere)
    items = send(jax.tree.map(lambda x: np.zeros((size, *np.shape(x)), np.asarray(x).dtype), one_item))
    args = (shapes, constants, items, np.int32(0), np.int32(0), key)
    options: dict[str, Any] = dict(out_shardings=place.everywhere, early=True, store=store, tag=(size, reads))
    begun = book.begin("evaluate", sums, *args, **options)

    def finish_split() -> Callable:
        program = begun()

        def run(state: Any) -> dict[str, np.ndarray]:
            parts = []
            with contextlib.closing(Feed(split, [0], size, send)) as feed:
                for start in range(0, total, size):
                    count = min(size, total - start)
                    batches = feed.take(start, count, min(size, total - start - count))
                    part = program(state, constants, batches, np.int32(start), np.int32(count), key)
                    parts.append(jax.tree.map(np.asarray, part))
            return on_host(jax.tree.map(lambda *xs: np.sum(xs, 0), *parts))

        return run

    return finish_split


def _step_body(learner: Learner, data: Source | None, guarded: bool, causes: list[str]) -> Callable:
    """(state, alive, number of the step, (constants, seeds), item) -> (state, alive, metrics), each with seed axis."""
    step = guard.guarded(learner.step, learner.unchecked, causes) if guarded else guard.unguarded(learner.step)

    def body(state: Any, alive: guard.Alive, number: Any, shared: Any, item: Any) -> tuple:
        if data is None:
            return over_seeds(lambda s, a: step(s, a, number))(state, alive)
        (constants, seeds), make = shared, data.batch

        def one(s: Any, a: guard.Alive, seed: Any, item: Any) -> tuple:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(source.DATA_STREAM), seed), number - 1)
            return step(s, a, number, make(constants, item, key))

        if data.per_seed:
            return over_seeds(one)(state, alive, seeds, item)
        # what depends on no seed has no seed axis: a shared batch is made once
        return over_seeds(lambda s, a, seed: one(s, a, seed, item))(state, alive, seeds)

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

    def program(state: Any, alive: guard.Alive, done: Any, count: Any, shared: Any, items: Any) -> tuple:
        at = lambda i: jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), items)
        shapes = jax.eval_shape(body, state, alive, done, shared, at(0))[2]
        empty = jax.tree.map(lambda s: jnp.zeros((chunk, *s.shape), s.dtype), shapes)

        def one(i: jax.Array, carry: tuple) -> tuple:
            state, alive, buffers = carry
            state, alive, row = body(state, alive, done + i + 1, shared, at(i))
            return state, alive, jax.tree.map(lambda b, m: b.at[i].set(m), buffers, row)

        return jax.lax.fori_loop(0, count, one, (state, alive, empty))

    return program


def _scan(program: Callable, state: Any, alive: Any, done: int, count: int, shared: Any, items: Any) -> tuple:
    state, alive, rows = program(state, alive, np.int32(done), np.int32(count), shared, items)
    return state, alive, {k: v[:count] for k, v in on_host(rows).items()}


def _loop(program: Callable, state: Any, alive: Any, done: int, count: int, shared: Any, items: Any) -> tuple:
    rows = []
    for i in range(count):
        item = jax.tree.map(lambda x, i=i: x[i], items)
        state, alive, row = program(state, alive, np.int32(done + i + 1), shared, item)
        rows.append(row)
    rows = [on_host(row) for row in rows]  # after the last step was sent off
    return state, alive, {k: np.stack([r[k] for r in rows]) for k in rows[0]}
