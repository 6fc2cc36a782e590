"""Environments whose dynamics depend on a task `theta`, arrays inside the state: one program serves every task.

A task is a NamedTuple of arrays whose field `task` is its number. `reset(key)` draws one from the set that the option
`task_set` names, so rollouts and auto-reset draw a task per episode; `reset(key, theta)` plays a given one.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.core.errors import UserError, unknown
from jaxstack.envs.base import Environment, TimeStep


class TaskEnvironment(Environment):
    """Base of environments with named tasks. Subclasses have a field `task_set`, a state with a field `theta`, and
    define `catalogue`, `sets` and `begin`."""

    task_set: str

    def catalogue(self) -> Mapping[str, Any]:
        """All named tasks in the order of their numbers: NamedTuples of NumPy arrays, of equal shapes."""
        raise UserError(f"{type(self).__name__} has no catalogue of tasks")

    def sets(self) -> Mapping[str, tuple[str, ...]]:
        """Names of tasks by the name of a set; `all` always exists."""
        raise UserError(f"{type(self).__name__} has no sets of tasks")

    def begin(self, key: jax.Array, theta: Any) -> tuple[Any, TimeStep]:
        """Start an episode of the task `theta`; as `reset`."""
        raise UserError(f"{type(self).__name__} has no begin")

    @property
    def num_tasks(self) -> int:
        return len(self.catalogue())

    def tasks(self, name: str) -> Any:
        known, sets = self.catalogue(), self.sets()
        chosen: dict[str, Any] = {}
        for part in name.split(","):
            if part not in known and part not in sets and part != "all":
                raise unknown("set of tasks", part, ["all", *sets, *known])
            names = known if part == "all" else sets.get(part, (part,))
            chosen |= {n: known[n] for n in names}
        return jax.tree.map(lambda *leaves: np.stack(leaves), *chosen.values())

    def task_of(self, state: Any) -> Array:
        return state.theta.task

    def reset(self, key: jax.Array, theta: Any = None) -> tuple[Any, TimeStep]:
        """Start an episode.

        Args:
            key: Of the task, if none is given, and of the start state. The start state is the same whether its task is
                drawn or given.
            theta: The task, a row of `tasks`; None draws one uniformly from the option `task_set`.

        Returns:
            (state, its TimeStep with reward 0 and nothing ended).

        Raises:
            UserError: Where `theta` is no task of this environment.
        """
        k_task, k_start = jax.random.split(key)
        drawn = self.tasks(self.task_set)
        if theta is None:
            count = len(drawn.task)
            row = jax.random.randint(k_task, (), 0, count, jnp.int32) if count > 1 else 0
            theta = jax.tree.map(lambda x: jnp.asarray(x)[row], drawn)
        else:
            theta = _fitting(theta, drawn)
        return self.begin(k_start, theta)


def _fitting(theta: Any, tasks: Any) -> Any:
    """`theta` as arrays of the types of `tasks`, once its fields have the shapes of a row of it."""
    if type(theta) is not type(tasks):
        raise UserError(f"theta: found {type(theta).__name__}, expected {type(tasks).__name__}")
    for name, found, row in zip(theta._fields, theta, tasks):
        if jnp.shape(found) != row.shape[1:]:
            raise UserError(f"theta.{name}: found shape {jnp.shape(found)}, expected {row.shape[1:]}")
    return jax.tree.map(lambda x, row: jnp.asarray(x, row.dtype), theta, tasks)
