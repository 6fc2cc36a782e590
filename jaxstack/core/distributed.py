"""One run over several processes, usually one a host: all run the same program over the devices of all.

The first process alone writes files and prints. What it finds on the disk, and errors it meets there, it shares, so
that no file system has to be shared and all processes end together. On a single process every function here is the
identity.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxstack.core.errors import UserError

T = TypeVar("T")


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 300,
) -> None:
    """Join the run's other processes; waits up to `timeout` seconds for them. Call it before any array is made.

    `coordinator` is "host:port" of process 0, reachable from all. Without arguments they are found from the environment
    of Slurm, a TPU pod, Open MPI or Kubernetes. Raises `UserError` for arguments that do not belong together or when
    nothing is found.
    """
    given = (coordinator, num_processes, process_id)
    if any(x is None for x in given) and any(x is not None for x in given):
        raise UserError(
            f"coordinator={coordinator}, num_processes={num_processes}, process_id={process_id}: expected all three, "
            "or none to find them from the environment (Slurm, TPU, Open MPI, Kubernetes)"
        )
    if coordinator is not None and num_processes is not None and process_id is not None:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit() or not 1 <= int(port) < 2**16:
            raise UserError(f"coordinator={coordinator!r}: expected HOST:PORT, e.g. 10.0.0.1:1234")
        if num_processes < 1:
            raise UserError(f"num_processes={num_processes}: expected a number >= 1")
        if not 0 <= process_id < num_processes:
            raise UserError(f"process_id={process_id}: expected 0 to {num_processes - 1}")
    # the runner agrees on signals itself; jax's own handler would swallow SIGTERM
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            cluster_detection_method=None if coordinator is None else "deactivate",
            initialization_timeout=timeout,
            shutdown_timeout_seconds=60,
        )
    except ValueError as e:
        raise UserError(
            f"no other processes found ({e}): expected an environment of Slurm, TPU, Open MPI or Kubernetes, or "
            "coordinator, num_processes and process_id"
        ) from e


def count() -> int:
    """Number of processes."""
    return jax.process_count()


def is_first() -> bool:
    """Whether this process writes and prints."""
    return jax.process_index() == 0


def on_first(function: Callable[[], T]) -> T | None:
    """`function()` on the first process, None on the others; what it raises there is a `UserError` on all others.

    All processes must call it, in the same order.
    """
    if count() == 1:
        return function()
    error: BaseException | None = None
    result = None
    if is_first():
        try:
            result = function()
        except BaseException as e:
            error = e
    message = "" if error is None else str(error) if isinstance(error, UserError) else f"process 0: {error!r}"
    message = share(message)
    if error is not None:
        raise error
    if message:
        raise UserError(message)
    return result


def share(value: Any) -> Any:
    """The first process' JSON-able value, on all."""
    if count() == 1:
        return value
    text = json.dumps(value).encode() if is_first() else b""
    size = int(_from_first(np.int32(len(text))))
    padded = max(256, 1 << (size - 1).bit_length() if size else 0)  # few shapes, few compiles
    buffer = np.zeros(padded, np.uint8)
    buffer[: len(text)] = np.frombuffer(text, np.uint8)
    return json.loads(bytes(_from_first(buffer)[:size]))


def share_arrays(table: dict[str, np.ndarray] | None) -> dict[str, np.ndarray]:
    """Return the first process' table of arrays, bitwise identical, on all processes."""
    if count() == 1:
        return table or {}
    table = table or {}
    kinds = share({name: [list(x.shape), x.dtype.name] for name, x in table.items()})
    out = {}
    for name, (shape, kind) in kinds.items():
        # as bytes: a sum over processes would turn -0.0 into 0.0
        raw = np.zeros(int(np.prod(shape)) * np.dtype(kind).itemsize, np.uint8)
        raw = np.frombuffer(np.ascontiguousarray(table[name]).tobytes(), np.uint8) if is_first() else raw
        out[name] = np.frombuffer(_from_first(raw).tobytes(), kind).reshape(shape)
    return out


def fetch(tree: Any) -> Any:
    """The whole arrays of a tree on every process, leaf by leaf; all processes must call it."""
    if count() == 1:
        return tree
    from jax.experimental import multihost_utils

    def one(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return x
        whole = multihost_utils.process_allgather(jax.random.key_data(x) if _is_key(x) else x, tiled=True)
        return _as_keys(jnp.asarray(whole), x)

    return jax.tree.map(one, tree)


def largest(value: int) -> int:
    """The largest of the processes' numbers (64 bits)."""
    if count() == 1:
        return value
    from jax.experimental import multihost_utils

    halves = np.asarray([value], np.int64).view(np.int32)  # jax has no int64 unless told
    return int(np.ascontiguousarray(multihost_utils.process_allgather(halves)).view(np.int64).max())


def place(x: Any, sharding: Any) -> jax.Array:
    """An array that every process holds whole, spread by `sharding`."""
    if count() == 1:
        return jax.device_put(x, sharding)
    data = np.asarray(jax.random.key_data(x) if _is_key(x) else x)
    return _as_keys(jax.make_array_from_callback(data.shape, sharding, lambda index: data[index]), x)


def place_all(tree: Any, sharding: Any) -> Any:
    """`place` for each leaf, all with one sharding; the tree itself where there is none."""
    return tree if sharding is None else jax.tree.map(lambda x: place(x, sharding), tree)


def _as_keys(data: jax.Array, like: Any) -> jax.Array:
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(like)) if _is_key(like) else data


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _from_first(x: Any) -> np.ndarray:
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(x))
