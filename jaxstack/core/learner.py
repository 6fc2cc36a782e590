"""The learner contract: every trainable thing is a pair of pure functions over a pytree.

    init(key, hypers) -> state          step(state[, batch]) -> (state, metrics)

`hypers` are the numeric hyperparameters: scalars that live in the state and are traced, so that one compiled program
serves every value of them and a sweep is `vmap(init)` over keys and hypers. What decides shapes or structure is
static and lives in the method's frozen Config.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxstack.core.errors import UserError, unknown
from jaxstack.core.metrics import Metric

Key = jax.Array  # a typed key, jax.random.key(seed)
Metrics = dict[str, Metric]
"""Names `group/name`; each a scalar or a `metrics.Mean`."""


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


class Learner(NamedTuple):
    """What a method's factory returns: pure functions and the static facts that the runner needs."""

    init: Callable[..., Any]
    """(key, hypers) -> state. `state` has the fields `hypers`, `params`, `key`, `step` and whatever else it needs."""
    step: Callable[..., tuple[Any, Mapping[str, Metric]]]
    """(state) or (state, batch) -> (state, metrics), see `Metrics`."""
    hypers: Any
    """Default numeric hyperparameters, a NamedTuple of floats."""
    config: Any = None
    name: str = "learner"
    samples_per_step: int = 1
    """Environment steps, examples or tokens that one `step` consumes: the unit of progress."""
    evaluate: Callable[[Any, Key], Mapping[str, Metric]] | None = None
    policy: Policy | None = None
    takes_batch: bool = False
    over_envs: Callable[[Any], Any] | None = None
    """state -> those parts of it whose leaves have a leading axis of environments, which `env_devices` then spreads."""


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
