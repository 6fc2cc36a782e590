"""Random numbers in a shape that compiles well."""

import math
from collections.abc import Callable

import jax
from jaxtyping import Array

SHORT = 64


def in_rows(draw: Callable[[jax.Array, tuple[int, ...]], Array], key: jax.Array, shape: tuple[int, ...]) -> Array:
    """`draw(key, shape)`, the same numbers, made as a matrix of shape[0] rows, or a vector where these would be short.

    XLA unrolls the generator over short inner axes (CPU): Gumbel noise [128, 16, 3, 5] takes five times as long and
    six times as much code as [128, 240]. The first axis is left, so that the second can be divided among devices.
    """
    row = math.prod(shape[1:])
    return draw(key, (shape[0], row) if row >= SHORT else (math.prod(shape),)).reshape(shape)
