"""The learner contract: every trainable thing is a pair of pure functions over a pytree.

    init(key, hypers) -> state          step(state[, batch]) -> (state, metrics)

`hypers` are the numeric hyperparameters: scalars that live in the state and are traced, so that one compiled program
serves every value of them and a sweep is `vmap(init)` over keys and hypers. What decides shapes or structure is
static and lives in the method's frozen Config.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxstack.core.errors import UserError, unknown
from jaxstack.core.metrics import Metric
from jaxstack.core.source import Source

Key = jax.Array  # a typed key, jax.random.key(seed)
Metrics = dict[str, Metric]
"""Names `group/name`; each a scalar or a `metrics.Mean`."""


class Init(Protocol):
    """(key, hypers) or (key, hypers, given) -> state, for one seed."""

    def __call__(self, key: Key, hypers: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Make the state a run begins with.

        Args:
            key: the seed's key.
            hypers: like `Learner.hypers`, leaves float32 scalars.
            args: this seed's row of `Learner.given`, where there is one.

        Returns:
            A pytree with the fields `hypers`, `params`, `key`, `step` and whatever else the learner needs.
        """
        ...


class Step(Protocol):
    """(state) or (state, batch) -> (state, metrics), for one seed."""

    def __call__(self, state: Any, /, *args: Any, **kwargs: Any) -> tuple[Any, Mapping[str, Metric]]:
        """Advance the state by one update.

        Args:
            state: what `init` or the last step returned. Its buffers are donated.
            args: one batch of the training source, for a learner with a `source` or with `takes_batch`.

        Returns:
            The new state, and metrics. Those of the group `check/...` are booleans that tell the guard whether the
            inputs are sound, see guard.py.
        """
        ...


class Evaluate(Protocol):
    """(state, key) or (state, key, batch) -> metrics, for one seed."""

    def __call__(self, state: Any, key: Key, /, *args: Any, **kwargs: Any) -> Mapping[str, Metric]:
        """Measure the state.

        Args:
            state: a state, not donated.
            key: the same for all seeds and methods; with batches another for each.
            args: one batch of the evaluation source, for a learner with an `eval_source`. Its `mask` [B] tells which
                rows count.

        Returns:
            With batches `Mean`s, whose totals and counts the runner adds up over the split; else `Mean`s or scalars.
        """
        ...


class Predict(Protocol):
    """(state, inputs) -> outputs, for one seed."""

    def __call__(self, state: Any, inputs: Any, /) -> Any:
        """Apply what was learned.

        Args:
            state: a state.
            inputs: inputs [B, ...] as the training source has them.

        Returns:
            Outputs [B, ...].
        """
        ...


class Policy(NamedTuple):
    """How to act with what was learned. `params` is all that a policy bundle stores.

    Shapes: A agents, B environments; `obs` [B, A, *obs_shape], `action` [B, A, ...], `action_mask` [B, A, n] or None.
    """

    params: Callable[[Any], Any]
    """state -> the pytree of arrays (weights, normaliser statistics) that acting needs."""
    init_carry: Callable[[Any, int], Any]
    """(params, B) -> recurrent carry; an empty tuple for feed-forward policies."""
    act: Callable[..., tuple[Any, Any]]
    """(params, carry, obs, action_mask, first [B] bool, key or None) -> (carry, action); no key means the mode."""
    sample: Callable[..., tuple[Any, Any, Any]] | None = None
    """(params, carry, obs, action_mask, first, key) -> (carry, the action that `act` draws with this key, inside the
    environment's bounds, its log-probability [B, A]), for policies that know it. Of real actions it is a log-density in
    the environment's units; at a bound to which draws are clipped, the logarithm of the probability of that bound."""
    rewarded: Callable[[Any, Any], Any] = lambda carry, reward: carry
    """(carry, reward [B, A] of the transition since the last `act`) -> carry, for policies that read rewards. Who plays
    calls it before the next `act`."""


class Learner(NamedTuple):
    """What a method's factory returns: pure functions and the static facts that the runner needs."""

    init: Init
    step: Step
    hypers: Any
    """Default numeric hyperparameters, a NamedTuple of floats."""
    config: Any = None
    name: str = "learner"
    samples_per_step: int = 1
    """Environment steps, examples or tokens that one `step` consumes: the unit of progress."""
    evaluate: Evaluate | None = None
    policy: Policy | None = None
    env: Any = None
    """The environment that `policy` acts in, an `envs.base.Environment`."""
    takes_batch: bool = False
    """Batches come from the source that the runner is given; implied by `source`."""
    check_data: Callable[[Any], None] | None = None
    """For learners that take batches: raise `UserError` for examples that a step cannot take, such as tokens outside
    the vocabulary. Called on the host with any number of leading axes: on a source's arrays once, or on each chunk."""
    over_envs: Callable[[Any], Any] | None = None
    """state -> those parts of it whose leaves have a leading axis of environments, which `env_devices` then spreads."""
    num_steps: int | None = None
    """Steps of a whole run, unless the runner is told another number."""
    with_length: Callable[[Any, Any], Any] | None = None
    """(state or states [S, ...], steps) -> the same with schedules (of the learning rate) that end after so many steps.
    The length is part of the state, so that no other one compiles again; `init` gives `num_steps`."""
    objective: tuple[str, str] = ("eval/return", "max")
    """(metric, "max" or "min"): what counts as good when checkpoints are kept and settings are ranked."""
    source: Callable[[Any], Source] | None = None
    """config -> training batches, read when a run begins; never a constant of a program."""
    eval_source: Callable[[Any], Source] | None = None
    """config -> the batches of one pass over a split, for `evaluate`."""
    predict: Predict | None = None
    unchecked: Callable[[Any], Any] | None = None
    """state -> those parts of it that may hold numbers that are not finite, see guard.py: environment states."""
    given: Any = None
    """Arrays [S, ...], one row per seed, for `init`: weights to start from, a teacher, the states of earlier stages."""
    adapted: Callable[[], "Learner"] | None = None
    """() -> the learner of a run that starts from another: its `init` gets a state of that run as `given`. None: this
    learner, whose fresh state takes the other's `params`. See runner.start_from."""


def require_one(learner: Any, what: str) -> None:
    """Raise `UserError` for a method in stages, of which `what` (a sweep, a call) takes but one."""
    if hasattr(learner, "stages"):
        raise UserError(f"{learner.name}: found a method in stages, {what} expected a learner of one stage")


@jax.jit
def rows_of(states: Any, rows: Any) -> Any:
    """Rows of states [S, ...]: of one number, a state [...]; of numbers [R], states [R, ...].

    One program, where leaf by leaf each shape would be a compile of its own.
    """
    return jax.tree.map(lambda x: x[rows], states)


def as_hypers(hypers: Any) -> Any:
    """Float32 scalars, so that ints, floats and arrays trace to one program."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), hypers)


def with_hypers(learner: Learner, **changes: Any) -> Any:
    """The learner's default hypers with `changes`; raises on a name that is not a hyperparameter or a bad number."""
    for name, value in changes.items():
        if name not in learner.hypers._fields:
            raise unknown(f"hyperparameter of {learner.name}", name, learner.hypers._fields)
        if not bool(jnp.all(jnp.isfinite(jnp.asarray(value)))):
            raise UserError(f"{learner.name}.{name}={value!r} must be finite")
    return learner.hypers._replace(**changes)


def better(direction: str) -> float:
    """The factor that makes larger values better: 1 for "max", -1 for "min". Raises `UserError` for others."""
    if direction not in ("max", "min"):
        raise UserError(f"objective direction {direction!r}: expected 'max' or 'min'")
    return 1.0 if direction == "max" else -1.0
