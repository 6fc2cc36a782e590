"""Where a run's arrays live: a mesh of devices with the axes "seed" and "env".

Seeds never talk to each other, so spreading them costs nothing. Devices along "env" share the environments of one seed;
XLA's partitioner inserts what they exchange, so results are those of one device up to rounding:

    divided by env_devices    environment states, rollouts, forward and backward passes over minibatches
    a copy on every device    parameters, optimiser, start-state pool, evaluation, the whole rollout once per update,
                              from which shuffled minibatches are drawn
    exchanged                 one flag per environment and environment step, the rollout once per update, gradients
                              in every minibatch

So it pays where stepping environments and large minibatches dominate, and memory falls only by the environments' own
states: spread seeds first.
"""

import contextlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxstack.core import distributed
from jaxstack.core.errors import UserError
from jaxstack.core.learner import Learner

SEED, ENV = "seed", "env"
FORCED = "xla_force_host_platform_device_count"


class Layout(NamedTuple):
    """Shardings of a run; all None on one device."""

    mesh: Mesh | None = None
    state: Any = None
    """Like the state [S, ...]: seeds over "seed", leaves of environments [S, N, ...] also over "env"."""
    seeds: NamedSharding | None = None
    """Of any array [S, ...]."""
    everywhere: NamedSharding | None = None
    """A copy on each device."""
    steps: NamedSharding | None = None
    """Of any array [steps, S, ...]."""

    def compiling(self) -> contextlib.AbstractContextManager:
        """Makes the mesh known to `split` while a program is traced."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def place(self, state: Any, alive: Any) -> tuple[Any, Any]:
        """Put a whole (state, alive) where it belongs."""
        if self.mesh is None:
            return state, alive
        return jax.tree.map(distributed.place, state, self.state), distributed.place_all(alive, self.seeds)


def show(count: int) -> None:
    """Let the CPU show at least `count` devices: several seeds use its cores better in programs side by side than in
    one. Before anything touches a device; accelerators and a number set by XLA_FLAGS or JAX's config stay as they are.
    """
    chosen = jax.config.jax_num_cpu_devices  # pyright: ignore[reportAttributeAccessIssue]
    if count > 1 and chosen == -1 and FORCED not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # devices were in use before; `layout` says how many there are
            jax.config.update("jax_num_cpu_devices", count)


def layout(learner: Learner, state: Any, devices: int, env_devices: int) -> Layout:
    """The layout of `state` (shapes [S, ...]) over `devices` groups of `env_devices`.

    Raises `UserError` for more devices than there are, numbers that divide neither seeds nor environments, a learner
    that does not tell its environments apart, or several processes of which some would have nothing to do.
    """
    total, there = devices * env_devices, jax.device_count()
    if total > there:
        what = f"devices={devices}" if env_devices == 1 else f"devices={devices} times env_devices={env_devices}"
        raise UserError(f"{what}: expected at most {there}, what this machine has")
    if distributed.count() > 1 and total != there:
        raise UserError(
            f"devices={devices}, env_devices={env_devices}: expected a product of {there}, the devices of all "
            f"{distributed.count()} processes"
        )
    if total == 1:
        return Layout()
    num_seeds = jax.tree.leaves(state)[0].shape[0]
    if num_seeds % devices:
        raise UserError(f"devices={devices}: expected a divisor of the {num_seeds} seeds")
    grid = np.asarray(jax.devices()[:total]).reshape(devices, env_devices)
    mesh = Mesh(grid, (SEED, ENV), axis_types=(AxisType.Auto, AxisType.Auto))
    at = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
    shardings = jax.tree.map(lambda _: at(SEED), state)
    if env_devices > 1:
        shardings = jax.tree.map(
            lambda over: at(SEED, ENV) if over else at(SEED), _batched(learner, state, env_devices)
        )
    return Layout(mesh, shardings, at(SEED), at(), at(None, SEED))


def split(x: Any, axis: int, what: str) -> Any:
    """Inside a step: leave each env device its part of `axis`; as it is where a seed has one device.

    Raises `UserError`, naming `what`, for a size that the devices do not divide.
    """
    count = jax.sharding.get_abstract_mesh().shape.get(ENV, 1)
    if count == 1:
        return x
    if x.shape[axis] % count:
        raise UserError(f"env_devices={count}: expected a divisor of {what}={x.shape[axis]}")
    spec = [PartitionSpec.UNCONSTRAINED] * x.ndim
    spec[axis] = ENV
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def rows_over(count: int) -> Callable[[Any], Any]:
    """Inside a step: batch -> the same, its rows spread over `count` devices that work on one seed together. XLA
    partitions what is computed from them; means over the batch, also those of BatchNorm, stay means over all of it.

    Raises:
        UserError: for more devices than there are, or, when called, a batch that they do not divide.
    """
    if count == 1:
        return lambda batch: batch
    if not 1 <= count <= jax.device_count():
        raise UserError(f"data_parallel={count}: expected 1 to {jax.device_count()}, what this machine has")
    mesh = Mesh(np.asarray(jax.devices()[:count]), ("data",), axis_types=(AxisType.Auto,))

    def spread(x: Any) -> Any:
        if x.shape[0] % count:
            raise UserError(f"data_parallel={count}: expected a divisor of the {x.shape[0]} rows of a batch")
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec("data")))

    return lambda batch: jax.tree.map(spread, batch)


def environments(learner: Learner, state: Any) -> int:
    """Environments of one seed in `state` (shapes [S, ...]); 0 for a learner that has none."""
    found = [] if learner.over_envs is None else jax.tree.leaves(learner.over_envs(state))
    return found[0].shape[1] if found else 0


def _batched(learner: Learner, state: Any, env_devices: int) -> Any:
    """Like `state`, True for leaves [S, N, ...] of environments."""
    if learner.over_envs is None:
        raise UserError(
            f"env_devices={env_devices}: expected 1, as {learner.name} does not tell which of its arrays hold "
            "environments (Learner.over_envs)"
        )
    leaves, tree = jax.tree.flatten(state)
    chosen = set(jax.tree.leaves(learner.over_envs(tree.unflatten(range(len(leaves))))))
    sizes = {leaves[i].shape[1] for i in chosen}
    for size in sorted(sizes):
        if size % env_devices:
            raise UserError(f"env_devices={env_devices}: expected a divisor of num_envs={size}")
    return tree.unflatten([i in chosen for i in range(len(leaves))])


def available_cores() -> list[int]:
    """Numbers of the CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
