"""Small arrays of a tree side by side in one: fewer, longer kernels in optimisers and minibatches.

`optax.flatten` makes one vector of everything, large matrices too, and hands the update back leaf by leaf, a kernel
each; here the parameters stay packed from one gradient step to the next.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

SMALL = 1 << 16
"""Most elements of an array that is packed: copying a larger one costs more than a kernel of its own."""

FEW, TINY = 512, 1 << 11
"""With fewer samples than FEW in a gradient step only arrays of at most TINY elements are packed, which leaves out
matrices of 64 x 64. XLA's CPU backend hands work to a second thread when more than eight kernels can run at once; after
a short step that thread is asleep again, and to wake it takes longer than they do."""

NARROW = 16
"""Maximum row width, in 32-bit words, of a leaf that is gathered together with others; a flag is a byte."""

WORDS = (jnp.float32, jnp.int32, jnp.uint32, jnp.bool_)
"""Types that are gathered together."""


class Packed(NamedTuple):
    """A tree as one vector and the leaves that are not in it."""

    small: Array
    """[P] float32, the small leaves one after another; [G, P] of parameters in groups, one row per group."""
    large: tuple[Any, ...]
    """The other leaves as they are: large ones, and those of other types."""


class Packing(NamedTuple):
    """Packs trees of one structure. What works element by element, or through sums over all of them (Adam, a global
    norm; with groups, the norms of `groups.norms`), gives the same on `Packed` as on the tree, up to the order of
    sums."""

    structure: Any
    shapes: tuple[tuple[int, ...], ...]
    packed: tuple[bool, ...]
    """Which leaves are in the vector."""
    join: Callable[[list[Array]], Array]
    """The vector of these leaves."""
    split: Callable[[Array], list[Array]]
    """The vector's leaves."""

    def pack(self, tree: Any) -> Packed:
        """`tree` must have this structure and these shapes."""
        leaves = self.structure.flatten_up_to(tree)
        small, large = ([x for x, yes in zip(leaves, self.packed) if yes is which] for which in (True, False))
        return Packed(self.join(small), tuple(large))

    def unpack(self, packed: Packed) -> Any:
        """The tree again."""
        small, large = iter(self.split(packed.small)), iter(packed.large)
        return jax.tree.unflatten(self.structure, [next(small if yes else large) for yes in self.packed])

    def pack_in(self, tree: Any) -> Any:
        """Pack every part of `tree` that is such a tree: the moments in the state of an optimiser."""
        return jax.tree.map(lambda x: self.pack(x) if self._fits(x) else x, tree, is_leaf=self._fits)

    def unpack_in(self, tree: Any) -> Any:
        """Undo `pack_in`."""
        packed = lambda x: isinstance(x, Packed)
        return jax.tree.map(lambda x: self.unpack(x) if packed(x) else x, tree, is_leaf=packed)

    def _fits(self, tree: Any) -> bool:
        return jax.tree.structure(tree) == self.structure and self.shapes == _shapes(jax.tree.leaves(tree))


def packing(tree: Any, samples: int, groups: int = 1) -> Packing:
    """How to pack trees like this one of arrays, for gradient steps on so many samples; with several `groups` every
    leaf is [G, ...]."""
    leaves, structure = jax.tree.flatten(tree)
    largest = SMALL if samples >= FEW else TINY
    packed = tuple(x.dtype == jnp.float32 and x.size <= largest for x in leaves)
    small = [x for x, yes in zip(leaves, packed) if yes]
    if groups == 1:
        join, split = lambda xs: ravel_pytree(xs)[0], ravel_pytree(small)[1]
    else:
        join, split = _rows_together(small, groups)
    return Packing(structure, _shapes(leaves), packed, join, split)


def _rows_together(
    small: list[Array], groups: int
) -> tuple[Callable[[list[Array]], Array], Callable[[Array], list[Array]]]:
    """What puts leaves [G, ...] side by side in rows [G, P], and what takes them apart."""
    shapes = _shapes(small)
    ends = np.cumsum([int(np.prod(s[1:])) for s in shapes])[:-1]

    def join(xs: list[Array]) -> Array:
        return jnp.concatenate([jnp.zeros((groups, 0), jnp.float32), *(x.reshape(groups, -1) for x in xs)], axis=1)

    def split(rows: Array) -> list[Array]:
        return [x.reshape(s) for x, s in zip(jnp.split(rows, ends, axis=1), shapes)]

    return join, split


def _shapes(leaves: list[Any]) -> tuple[tuple[int, ...], ...]:
    return tuple(map(jnp.shape, leaves))


def rows(tree: Any, axes: int = 1) -> Callable[[Array], Any]:
    """Return a minibatch gather function for a tree whose leaves share their first `axes` axes.

    `rows(tree)(index)` is bitwise identical to `jax.tree.map(lambda x: x[index], tree)` with these axes taken as one.

    Narrow leaves stand side by side in one table, made here, so that together they cost one gather, and one miss of the
    cache a row. A leaf that stands in the tree twice is gathered once. For data: no gradient flows back to the leaves.
    """
    every, structure = jax.tree.flatten(tree)
    leaves = {id(x): x.reshape(-1, *x.shape[axes:]) for x in every}
    tables = {i: _words(x) for i, x in leaves.items() if x.dtype in WORDS}
    tables = {i: x for i, x in tables.items() if x.shape[1] <= NARROW}
    table = jnp.concatenate([*tables.values()], axis=1) if tables else None
    ends = np.cumsum([x.shape[1] for x in tables.values()])[:-1]

    def take(index: Array) -> Any:
        out = {i: x[index] for i, x in leaves.items() if i not in tables}
        if table is not None:
            columns = jnp.split(table[index], ends, axis=1)
            out |= {i: _like(x, leaves[i]) for i, x in zip(tables, columns, strict=True)}
        return jax.tree.unflatten(structure, [out[id(x)] for x in every])

    return take


def _words(x: Array) -> Array:
    """[S, ...] as words [S, k]; integers, as the bits of an integer may be a float that processors flush to zero."""
    x = x.reshape(len(x), -1)
    if x.dtype == jnp.bool_:
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % 4))).astype(jnp.uint8).reshape(len(x), -1, 4)
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _like(words: Array, leaf: Array) -> Array:
    """Rows of `leaf` from rows of its words."""
    shape = (len(words), *leaf.shape[1:])
    if leaf.dtype != jnp.bool_:
        return jax.lax.bitcast_convert_type(words, leaf.dtype).reshape(shape)
    flags = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(len(words), -1)
    return (flags[:, : leaf.size // len(leaf)] != 0).reshape(shape)
