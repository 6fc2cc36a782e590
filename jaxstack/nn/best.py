"""The weights that were best on held-out examples, kept while a learner of `supervised` trains.

Held-out rows travel beside the training batches (`Checked`), so they are arguments of the program; a look at them
costs one pass over the rows, in the steps that ask for it alone.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from jaxstack.core.learner import Key, Learner, Metrics
from jaxstack.data.sources import ArrayData
from jaxstack.nn.supervised import State, variables


class Step(NamedTuple):
    """What a step of `keep_best` is given."""

    batch: Any
    """For the learner's own step."""
    held_out: Any
    """Arrays [N, ...]."""
    look: Any
    """Scalar bool: whether the new weights are measured on them."""


class Checked(ArrayData):
    """`ArrayData`, shared by all seeds, whose every `every`-th step (default: the last of each epoch) looks at
    held-out arrays."""

    def __init__(self, arrays: Any, held_out: Any, batch_size: int, *, every: int | None = None, **options: Any):
        super().__init__(arrays, batch_size, **options)
        self.held_out, self.every = held_out, every or self.steps_per_epoch

    def computes_from(self) -> Any:
        return super().computes_from()

    def constants(self) -> Any:
        self.held_out = jax.tree.map(jnp.asarray, self.held_out)
        return super().constants(), self.held_out

    def item(self, seeds: Sequence[int]) -> Any:
        return super().item(seeds), np.zeros((), bool)

    def items(self, start: int, count: int, seeds: Sequence[int], out: Any) -> None:
        super().items(start, count, seeds, out[0])
        out[1][:count] = np.arange(start + 1, start + count + 1) % self.every == 0

    def batch(self, constants: Any, item: Any, key: Key) -> Step:
        return Step(super().batch(constants[0], item[0], key), constants[1], item[1])


class Kept(NamedTuple):
    """`supervised`'s state, whose `ema` holds the best variables so far, and their score."""

    hypers: Any
    params: Any
    stats: Any
    ema: Any
    teacher: Any
    opt_state: optax.OptState
    key: Key
    step: Array
    total: Array
    best: Array


def keep_best(learner: Learner, score: Callable[[Any, Any], Array]) -> Learner:
    """Make a learner that evaluates and predicts with the best variables that were seen.

    Until the first look they are the last ones; of equal ones the earlier stay.

    Args:
        learner: of `supervised`, without averages. Its batches are `Step`s, as from `Checked`.
        score: (variables, held-out arrays) -> a number, better when larger.
    """

    # the functions alone: programs are told apart by what they enclose, hyperparameters of a learner among it
    fresh, advance = learner.init, learner.step

    def init(key: Key, hypers: Any, *given: Any) -> Kept:
        s = fresh(key, hypers, *given)
        # copies: buffers of a state are donated one by one
        s = s._replace(ema=jax.tree.map(jnp.copy, variables(s)))
        return Kept(**s._asdict(), best=jnp.float32(-jnp.inf))

    def step(s: Kept, given: Step) -> tuple[Kept, Metrics]:
        new, metrics = advance(State(*s[:-1])._replace(ema={}), given.batch)
        now = variables(new)

        def look() -> tuple[Array, Any]:
            value = score(now, given.held_out)
            better = value > s.best
            return jnp.maximum(value, s.best), jax.tree.map(lambda a, b: jnp.where(better, a, b), now, s.ema)

        def wait() -> tuple[Array, Any]:
            return s.best, jax.tree.map(lambda a, b: jnp.where(jnp.isneginf(s.best), a, b), now, s.ema)

        best, kept = jax.lax.cond(given.look, look, wait)
        return Kept(**new._replace(ema=kept)._asdict(), best=best), dict(metrics)

    return learner._replace(init=init, step=step)
