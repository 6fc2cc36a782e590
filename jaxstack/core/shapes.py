"""Assertions on arrays at the boundary of public functions: chex, with messages that name the argument.

They look at shapes and types alone, so they cost nothing in a compiled program; `chex.disable_asserts()` turns those of
chex off.
"""

from typing import Any

import chex
import jax.numpy as jnp


def assert_rank(rank: int, /, **arguments: Any) -> None:
    """Raise `AssertionError` for an argument that has not `rank` axes."""
    for name, x in arguments.items():
        chex.assert_rank(x, rank, custom_message=f"argument {name}")


def assert_time_major(**arguments: Any) -> None:
    """Raise `AssertionError` for an argument without an axis of time, and where their shapes differ."""
    for name, x in arguments.items():
        if not jnp.ndim(x):
            raise AssertionError(f"argument {name}: expected an axis of time [T, ...], found a scalar")
    assert_same_shape(**arguments)


def assert_same_shape(**arguments: Any) -> None:
    """Raise `AssertionError` where the shape of an argument is not that of the first."""
    first, *_ = arguments
    shape = jnp.shape(arguments[first])
    for name, x in arguments.items():
        chex.assert_shape(x, shape, custom_message=f"argument {name}, whose shape must be that of {first}")


def assert_float(**arguments: Any) -> None:
    """Raise `AssertionError` for an argument that does not hold floating-point numbers."""
    for name, x in arguments.items():
        chex.assert_type(x, float, custom_message=f"argument {name}")


def assert_bool(**arguments: Any) -> None:
    """Raise `AssertionError` for an argument that does not hold truth values."""
    for name, x in arguments.items():
        chex.assert_type(x, bool, custom_message=f"argument {name}")


def assert_broadcasts(shape: tuple[int, ...], /, **arguments: Any) -> None:
    """Raise `AssertionError` for an argument that does not broadcast to `shape`."""
    for name, x in arguments.items():
        try:
            chex.assert_is_broadcastable(jnp.shape(x), shape)
        except AssertionError as e:
            raise AssertionError(f"argument {name}: {e}") from None


def assert_agent_pairs(**arguments: Any) -> None:
    """Raise `AssertionError` for an argument whose last two axes differ."""
    for name, x in arguments.items():
        *rest, agents, _ = jnp.shape(x)
        chex.assert_shape(x, (*rest, agents, agents), custom_message=f"argument {name}")
