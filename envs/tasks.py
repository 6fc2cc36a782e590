"""Environments whose dynamics depend on a task `theta`, arrays inside the state: one program serves every task.

A task is a NamedTuple of arrays whose field `task` is its number. `reset(key)` draws one from the set that the option
`task_set` names, so rollouts and auto-reset draw a task per episode; `reset(key, theta)` plays a given one.
"""

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.core.errors import UserError, unknown
from jaxstack.envs.base import Environment, Spec, TimeStep


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


class VariantTasks(TaskEnvironment):
    """Base of environments whose tasks are settings of their own options.

    With an empty `task_set` the options are the only task. Otherwise the tasks are `variants`, those for other numbers
    of agents left out, and all have arrays of the size that the largest needs.
    """

    def variants(self) -> Mapping[str, Any]:
        """Named tasks: this environment with other options, and an empty `task_set`."""
        raise UserError(f"{type(self).__name__} has no variants")

    def theta(self, number: int, room: tuple[int, ...]) -> Any:
        """The task of the options, NumPy arrays of the sizes `room`."""
        raise UserError(f"{type(self).__name__} has no theta")

    @property
    def needs(self) -> tuple[int, ...]:
        """Sizes that the task of the options needs."""
        return ()

    @property
    def members(self) -> Mapping[str, Any]:
        """The tasks of the catalogue."""
        if not self.task_set:
            return {"": self}
        every = _variants(self)
        fits = {name: env for name, env in every.items() if not _differs(env.spec, self.spec)}
        if not fits:
            counts = sorted({env.spec.num_agents for env in every.values()})
            found = f"found num_agents={self.spec.num_agents}, expected one of {counts}"
            raise UserError(f"task_set={self.task_set!r}: {found}")
        return fits

    def sets(self) -> Mapping[str, tuple[str, ...]]:
        """The first task to train on, the others to test on."""
        if not self.task_set:
            return {}
        train, *test = self.members
        return {"train": (train,), "test": tuple(test)}

    @property
    def room(self) -> tuple[int, ...]:
        """Sizes that the largest task of the catalogue needs."""
        return tuple(map(max, zip(*[env.needs for env in self.members.values()])))

    def catalogue(self) -> Mapping[str, Any]:
        return _catalogue(self)

    def tasks(self, name: str) -> Any:
        known = _variants(self) if self.task_set else {}
        for part in name.split(","):
            if part in known and (wrong := _differs(known[part].spec, self.spec)):
                raise UserError(f"task {part!r}: {wrong}")
        return super().tasks(name)


@lru_cache(64)
def _variants(env: VariantTasks) -> Mapping[str, Any]:
    return env.variants()


@lru_cache(64)
def _catalogue(env: VariantTasks) -> Mapping[str, Any]:
    room = env.room
    return MappingProxyType({name: e.theta(i, room) for i, (name, e) in enumerate(env.members.items())})


def _differs(task: Spec, env: Spec) -> str:
    """How a task does not fit an environment's agents, observations and actions; empty where it fits."""
    pairs = {
        "agents": (task.num_agents, env.num_agents),
        "observations of shape": (task.obs_shape, env.obs_shape),
        "actions": (task.action_space, env.action_space),
    }
    return next((f"found {x} {what}, expected {y}" for what, (x, y) in pairs.items() if x != y), "")


def one_of(mask: Array, uniform: Array) -> tuple[Array, Array]:
    """Choose one of the marked cells, each as likely.

    Args:
        mask: [H, W] bool.
        uniform: A number in [0, 1).

    Returns:
        (row and column [2] int32, whether any cell is marked).
    """
    before = jnp.cumsum(mask.reshape(-1), dtype=jnp.int32)
    skip = (uniform * before[-1]).astype(jnp.int32)
    place = jnp.sum(before <= skip, dtype=jnp.int32)
    return jnp.stack([place // mask.shape[1], place % mask.shape[1]]), before[-1] > 0


def _fitting(theta: Any, tasks: Any) -> Any:
    """`theta` as arrays of the types of `tasks`, once its fields have the shapes of a row of it."""
    if type(theta) is not type(tasks):
        raise UserError(f"theta: found {type(theta).__name__}, expected {type(tasks).__name__}")
    for name, found, row in zip(theta._fields, theta, tasks):
        if jnp.shape(found) != row.shape[1:]:
            raise UserError(f"theta.{name}: found shape {jnp.shape(found)}, expected {row.shape[1:]}")
    return jax.tree.map(lambda x, row: jnp.asarray(x, row.dtype), theta, tasks)
