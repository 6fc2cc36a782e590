"""Hyperparameter selection in continual learning (Lee, Hellan, Ericsson, Crowley and Storkey, arXiv 2404.06466).

A learner sees tasks D_1 .. D_T once, and one of K settings of its hyperparameters must be chosen. Of each class of D_i
a tenth is held out: Val_i; the rest is Train_i. What is chosen from what, and how many times a task is trained on:

    (1) end of training   train with every h on Train_1 .. Train_T, score on the union of all Val_i; then the whole
                          stream again with the best h on Train and Val: no learner of a stream can do so    T K + T
    (2) first task        train with every h on Train_1, score on Val_1; all tasks with the best h, on both    K + T
    (3) current task      at each task, from one state, train with every h on Train_i, score on Val_i; train from the
                          same state with the best h on both                                               T K + T
    (4) seen tasks, Val   as (3), scored on Val_1 .. Val_i, which are stored and never trained on: the best of the
                          trained candidates is kept                                                           T K
    (5) seen tasks, Mem   as (3), scored on Val_i and a part of the memory, left out of replay meanwhile, by the median
                          of the accuracies of the classes                                                  T K + T
    (6) fixed             one h on Train and Val                                                                 T

Candidates of a task share the state, the memory and all random draws. Accuracy is over all classes. Of settings with
the same accuracy the one with the smaller validation loss is chosen: two classes are often told apart without an error.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from jaxstack.core.errors import UserError
from jaxstack.core.learner import Key
from jaxstack.learning import continual
from jaxstack.learning.continual import Config, State
from jaxstack.learning.streams import Memory, Stream
from jaxstack.nn.supervised import Model

Ties = Literal["loss", "first"]


class Tasks(NamedTuple):
    """A stream with held-out examples, as arrays."""

    x: Array
    """[n, ...] all examples."""
    y: Array
    """[n]"""
    rows: Array
    """[T, m] of each task."""
    train: Array
    """[T, m] bool: Train_i."""
    both: Array
    """[T, m] bool: Train_i and Val_i."""
    held: Array
    """[T, v] rows of Val_i."""
    held_mask: Array
    """[T, v] bool"""
    group: Array
    """[C] which task a class belongs to."""


def tasks_of(
    rng: np.random.Generator, x: np.ndarray, y: np.ndarray, stream: Stream, classes: int, share: float = 0.1
) -> Tasks:
    """Hold out a share of each class of each task, at least one example.

    Args:
        rng: which ones.
        x: [n, ...].
        y: [n].
        stream: groups of classes.
        classes: C.
        share: of the examples of a class.

    Raises:
        UserError: for a share outside 0..1, or a class of a single example.
    """
    if not 0 < share < 1:
        raise UserError(f"share={share!r}: expected a number between 0 and 1")
    held, group = [], np.zeros(classes, np.int32)
    for task, (rows, mask) in enumerate(zip(stream.rows, stream.mask)):
        own = []
        for c in np.unique(y[rows[mask]]):
            at = rng.permutation(np.flatnonzero(mask & (y[rows] == c)))
            if len(at) < 2:
                raise UserError(f"class {c}: found {len(at)} example in task {task}, expected two or more")
            own.append(at[: max(1, round(share * len(at)))])
            group[c] = task
        held.append(np.concatenate(own))
    train, most = stream.mask.copy(), max(len(h) for h in held)
    chosen, mask = np.zeros((len(held), most), np.int32), np.zeros((len(held), most), bool)
    for task, at in enumerate(held):
        train[task, at] = False
        chosen[task, : len(at)], mask[task, : len(at)] = stream.rows[task, at], True
    arrays = (x, y.astype(np.int32), stream.rows, train, stream.mask, chosen, mask, group)
    return Tasks(*(jnp.asarray(a) for a in arrays))


class Result(NamedTuple):
    """What a framework chose and what came of it."""

    selected: Array
    """[T] the setting of each task."""
    accuracy: Array
    """[T, K] validation scores; of frameworks that choose once T equal rows."""
    loss: Array
    """[T, K] validation losses."""
    state: State
    trainings: Any
    """Tasks that were trained on, candidates included."""


def median_per_class(right: Array, y: Array, mask: Array, classes: int) -> Array:
    """The median, over the classes that are there, of the share of right ones: right [n], y [n], mask [n]."""
    own = jax.nn.one_hot(y, classes) * mask[:, None]
    there = own.sum(0) > 0
    shares = jnp.sort(jnp.where(there, (own * right[:, None]).sum(0) / jnp.maximum(own.sum(0), 1), jnp.inf))
    count = there.sum()
    return (shares[jnp.maximum(count - 1, 0) // 2] + shares[count // 2]) / 2


def graded(
    model: Model, s: State, x: Array, y: Array, mask: Array, classes: int, median: bool = False
) -> tuple[Array, Array]:
    """Accuracy (or its median over classes) and mean loss on validation examples; what diverged has -1 and infinity."""
    logits = model.apply(continual.variables(s), x)
    right = (logits.argmax(-1) == y).astype(jnp.float32)
    loss = continual.average(optax.softmax_cross_entropy_with_integer_labels(logits, y), mask)
    accuracy = median_per_class(right, y, mask, classes) if median else continual.average(right, mask)
    fine = jnp.isfinite(loss)
    return jnp.where(fine, accuracy, -1.0), jnp.where(fine, loss, jnp.inf)


def choose(accuracy: Array, loss: Array, ties: Ties = "loss") -> Array:
    """The best of K settings; of equal ones the one with the smaller loss, or the first."""
    best = accuracy == accuracy.max()
    return jnp.argmax(best) if ties == "first" else jnp.argmin(jnp.where(best, loss, jnp.inf))


def at(tree: Any, k: Any) -> Any:
    """Entry k of all leaves."""
    return jax.tree.map(lambda a: a[k], tree)


def size_of(grid: Any) -> int:
    """K."""
    return len(jax.tree.leaves(grid)[0])


def through(config: Config, key: Key, hypers: Any, tasks: Tasks, mask: Array) -> State:
    """The whole stream with one setting, on the examples of a mask [T, m]."""
    model = continual.model_of(config)

    def task(s: State, given: Any) -> tuple[State, None]:
        rows, kept = given
        return continual.train_task(config, model, s, tasks.x[rows], tasks.y[rows], kept)[0], None

    return jax.lax.scan(task, continual.init(config, key, hypers), (tasks.rows, mask))[0]


def fixed(config: Config, key: Key, hypers: Any, tasks: Tasks) -> State:
    """(6)."""
    return through(config, key, hypers, tasks, tasks.both)


def _once(config: Config, key: Key, grid: Any, tasks: Tasks, scores: tuple[Array, Array], ties: Ties) -> Result:
    """The stream with the setting that these scores [K] choose."""
    count, k = len(tasks.rows), choose(*scores, ties)
    accuracy, loss = scores[0], scores[1]
    rows = lambda v: jnp.tile(v, (count, 1))
    return Result(jnp.full(count, k), rows(accuracy), rows(loss), fixed(config, key, at(grid, k), tasks), count)


def end_of_training(config: Config, key: Key, grid: Any, tasks: Tasks, ties: Ties = "loss") -> Result:
    """(1): see `FRAMEWORKS` for the arguments."""
    model = continual.model_of(config)
    held, mask = tasks.held.ravel(), tasks.held_mask.ravel()

    def candidate(hypers: Any) -> tuple[Array, Array]:
        s = through(config, key, hypers, tasks, tasks.train)
        return graded(model, s, tasks.x[held], tasks.y[held], mask, config.classes)

    found = _once(config, key, grid, tasks, jax.vmap(candidate)(grid), ties)
    return found._replace(trainings=found.trainings + len(tasks.rows) * size_of(grid))


def first_task(config: Config, key: Key, grid: Any, tasks: Tasks, ties: Ties = "loss") -> Result:
    """(2): see `FRAMEWORKS` for the arguments."""
    model, rows, held = continual.model_of(config), tasks.rows[0], tasks.held[0]

    def candidate(hypers: Any) -> tuple[Array, Array]:
        s = continual.init(config, key, hypers)
        s, _ = continual.train_task(config, model, s, tasks.x[rows], tasks.y[rows], tasks.train[0])
        return graded(model, s, tasks.x[held], tasks.y[held], tasks.held_mask[0], config.classes)

    found = _once(config, key, grid, tasks, jax.vmap(candidate)(grid), ties)
    return found._replace(trainings=found.trainings + size_of(grid))


def left_out(key: Key, memory: Memory, group: Array, share: float) -> Array:
    """A share of the stored examples of each task, rounded up, at random: [M] bool."""
    stored = jnp.arange(len(memory.y)) < memory.count
    of = group[memory.y]
    draw = jax.random.uniform(key, memory.y.shape)
    same = (of[None] == of[:, None]) & stored[None]
    rank = (same & (draw[None] < draw[:, None])).sum(1)
    return stored & (rank < jnp.ceil(share * same.sum(1)))


def without(key: Key, memory: Memory, gone: Array) -> Memory:
    """The memory with random other ones in place of the examples that are left out: shapes stay, replay misses them."""
    kept = (jnp.arange(len(gone)) < memory.count) & ~gone
    others = jax.random.categorical(key, jnp.where(kept, 0.0, -1e9), shape=gone.shape)
    rows = jnp.where(gone, others, jnp.arange(len(gone)))
    return memory._replace(x=memory.x[rows], y=memory.y[rows], logits=memory.logits[rows])


def dynamic(
    config: Config,
    key: Key,
    grid: Any,
    tasks: Tasks,
    signal: Literal["current", "val", "mem"],
    ties: Ties = "loss",
    share: float = 0.1,
) -> Result:
    """(3), (4), (5): a setting for each task, by what `signal` says is scored on. `share`: of the memory in (5)."""
    if signal == "mem" and not config.stores:
        raise UserError(f"method={config.method!r}: expected a method with a memory, which is scored on")
    model, count = continual.model_of(config), len(tasks.rows)

    def task(s: State, given: Any) -> tuple[State, Any]:
        i, rows, train, both = given
        x, y = tasks.x[rows], tasks.y[rows]
        held, mask, trying = tasks.held[i], tasks.held_mask[i], s
        vx, vy = tasks.x[held], tasks.y[held]
        if signal == "val":
            held, mask = tasks.held.ravel(), (tasks.held_mask & (jnp.arange(count) <= i)[:, None]).ravel()
            vx, vy = tasks.x[held], tasks.y[held]
        elif signal == "mem":
            # a number that no epoch has
            k_out, k_fill = jax.random.split(jax.random.fold_in(jax.random.fold_in(s.key, s.step), config.epochs))
            gone = left_out(k_out, s.memory, tasks.group, share)
            trying = s._replace(memory=without(k_fill, s.memory, gone))
            vx, vy = jnp.concatenate([vx, s.memory.x]), jnp.concatenate([vy, s.memory.y])
            mask = jnp.concatenate([mask, gone])
        train_with = lambda h: continual.train_task(config, model, trying._replace(hypers=h), x, y, train)[0]
        tried = jax.vmap(train_with)(grid)
        grade = lambda t: graded(model, t, vx, vy, mask, config.classes, median=signal == "mem")
        accuracy, loss = jax.vmap(grade)(tried)
        k = choose(accuracy, loss, ties)
        if signal == "val":
            new = at(tried, k)
        else:
            new, _ = continual.train_task(config, model, s._replace(hypers=at(grid, k)), x, y, both)
        return new, (k, accuracy, loss)

    start = continual.init(config, key, at(grid, 0))
    s, (selected, accuracy, loss) = jax.lax.scan(task, start, (jnp.arange(count), tasks.rows, tasks.train, tasks.both))
    return Result(selected, accuracy, loss, s, count * size_of(grid) + (0 if signal == "val" else count))


FRAMEWORKS: dict[str, Callable[..., Result]] = {
    "end of training": end_of_training,
    "first task": first_task,
    "current task": functools.partial(dynamic, signal="current"),
    "seen tasks, Val": functools.partial(dynamic, signal="val"),
    "seen tasks, Mem": functools.partial(dynamic, signal="mem"),
}
"""(config, key, grid, tasks, ties="loss") -> `Result`, pure: `jax.vmap` over keys and tasks.

config: the learner, see `jaxstack.learning.continual`; key: of weights and draws; grid: `Hypers` with leaves [K];
tasks: of `tasks_of`; ties: how equal accuracies are told apart."""


def accuracies(config: Config, s: State, tasks: Tasks, x: Array, y: Array) -> tuple[Array, Array]:
    """Mean over tasks of the accuracy on test examples x [n, ...], y [n] of their classes: among all classes, and among
    those of the task."""
    logits = continual.model_of(config).apply(continual.variables(s), x)
    own = tasks.group[y][:, None] == tasks.group[None]
    count = len(tasks.rows)
    of = jax.nn.one_hot(tasks.group[y], count)
    mean = lambda scores: ((of * (scores.argmax(-1) == y)[:, None]).sum(0) / jnp.maximum(of.sum(0), 1)).mean()
    return mean(logits), mean(jnp.where(own, logits, -jnp.inf))
