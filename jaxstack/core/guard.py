"""Freeze a seed whose numbers go non-finite; the others go on.

Looked at in every step, in this order, and the first that fails is named:

- what the learner says of its inputs: metrics of the reserved group `check/...`, booleans that are true where all is
  well, named in the plural ("check/observations of environment X, agent Y"). They never reach the host's rows;
- losses;
- the new state's real numbers: parameters, optimiser, normalisers, buffers. A leaf that was not finite before the step
  either (say a best value so far that begins at -inf) is no fault, but for parameters.

A frozen seed keeps the state before the bad step. Two kinds of leaves are exempt. Large buffers (LARGE elements or
more, not shaped as a parameter, which spares optimiser moments) are neither looked at nor kept, as that would read or
copy them on every step: what enters them is the learner's to check, and they run on, unused. `Learner.unchecked` names
parts that may hold anything, as environment states of other libraries do; what comes out of them is checked, and they
are kept.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxstack.core.metrics import Metric

LARGE = 2**16
CHECK = "check/"


class Alive(NamedTuple):
    """Whether a seed still trains, the step (1-based) whose result was refused, 0 if none, and why: the number of the
    check that failed first, -1 if none (see `guarded`)."""

    ok: Array
    failed_step: Array
    cause: Array


def start(num_seeds: int) -> Alive:
    """All seeds alive."""
    return Alive(jnp.ones(num_seeds, bool), jnp.zeros(num_seeds, jnp.int32), jnp.full(num_seeds, -1, jnp.int32))


def checks(
    old: Any, new: Any, metrics: Mapping[str, Metric], unchecked: Callable[[Any], Any] | None = None
) -> dict[str, Array]:
    """What must be true after a step from `old` to `new`, in the order in which it is told: name -> bool."""
    real = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)
    found: dict[str, Array] = {}
    for name, value in metrics.items():
        if name.startswith(CHECK):
            found[f"{name.removeprefix(CHECK)} are"] = jnp.all(jnp.asarray(value))
    for name, value in metrics.items():
        if name.startswith("loss/"):
            finite = [jnp.isfinite(x).all() for x in jax.tree.leaves(value)]
            found[f"{name} is"] = jnp.stack(finite).all()
    exempt = {id(x) for x in jax.tree.leaves(() if unchecked is None else unchecked(new))}
    params = jax.tree.leaves(getattr(new, "params", ()))
    keep = _kept(new)
    for (path, n), o in zip(jax.tree_util.tree_leaves_with_path(new), jax.tree.leaves(old), strict=True):
        if n is o or not real(n) or id(n) in exempt or not keep(n):
            continue
        ok = jnp.isfinite(n).all()
        found[f"state{jax.tree_util.keystr(path)} is"] = (
            ok if any(n is p for p in params) else ok | ~jnp.isfinite(o).all()
        )
    return found


def guarded(
    step: Callable[..., tuple[Any, Mapping[str, Metric]]],
    unchecked: Callable[[Any], Any] | None = None,
    causes: list[str] | None = None,
) -> Callable[..., tuple[Any, Alive, dict[str, Metric]]]:
    """(state, alive, number of this step, *batch) -> (state, alive, metrics); a dead or failing seed stays as it is.

    When it is traced, `causes` is filled with what each number of `Alive.cause` says: "loss/total is", to go before
    "not finite".
    """

    def run(state: Any, alive: Alive, number: Array, *batch: Any) -> tuple[Any, Alive, dict[str, Metric]]:
        new, metrics = step(state, *batch)
        found = checks(state, new, metrics, unchecked)
        if causes is not None:
            causes[:] = found
        good = jnp.stack([*found.values(), jnp.bool_(True)])
        first = jnp.argmin(good)
        # not good.all(): XLA would make it a chain over all leaves and compile the chain into the choice of each leaf
        ok = alive.ok & good[first]
        fails = alive.ok & ~ok
        failed = jnp.where(fails, number, alive.failed_step)
        cause = jnp.where(fails, first.astype(jnp.int32), alive.cause)
        keep = _kept(new)
        state = jax.tree.map(lambda n, o: n if n is o or not keep(n) else _where(ok, n, o), new, state)
        return state, Alive(ok, failed, cause), _shown(metrics)

    return run


def unguarded(
    step: Callable[..., tuple[Any, Mapping[str, Metric]]],
) -> Callable[..., tuple[Any, Alive, dict[str, Metric]]]:
    """The same signature without the check."""

    def run(state: Any, alive: Alive, number: Array, *batch: Any) -> tuple[Any, Alive, dict[str, Metric]]:
        new, metrics = step(state, *batch)
        return new, alive, _shown(metrics)

    return run


def _shown(metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    return {name: value for name, value in metrics.items() if not name.startswith(CHECK)}


def _kept(state: Any) -> Callable[[Array], bool]:
    """Which leaves are chosen between old and new: all but large buffers."""
    shapes = {jnp.shape(x) for x in jax.tree.leaves(getattr(state, "params", ()))}
    return lambda x: x.size < LARGE or x.shape in shapes


def _where(ok: Array, new: Array, old: Array) -> Array:
    if jnp.issubdtype(new.dtype, jax.dtypes.prng_key):
        data = jnp.where(ok, jax.random.key_data(new), jax.random.key_data(old))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(new))
    return jnp.where(ok, new, old)
