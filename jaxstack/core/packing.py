"""Small arrays of a tree side by side in one: fewer, longer kernels for optimisers and minibatches."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

SMALL = 1 << 16
"""Most elements of an array that is packed: copying a larger one costs more than a kernel of its own."""

FEW, TINY = 512, 1 << 11
"""With fewer samples than FEW in a gradient step only arrays of at most TINY elements are packed, which leaves out
matrices of 64 x 64. XLA's CPU backend hands work to a second thread when more than eight kernels can run at once; after
a short step that thread is asleep again, and to wake it takes longer than they do."""

NARROW = 16
"""Most words of four bytes in a row of a leaf that is gathered together with others; a flag is a byte."""

WORDS = (jnp.float32, jnp.int32, jnp.uint32, jnp.bool_)


class Packed(NamedTuple):
    """A tree as one vector and the leaves that are not in it."""

    small: Array
    """[P] float32, the small leaves one after another."""
    large: tuple[Any, ...]
    """The other leaves as they are: large ones, and those of other types."""


class Packing(NamedTuple):
    """Packs trees of one structure. What works element by element, or through sums over all of them (Adam, a global
    norm), gives the same on `Packed` as on the tree, up to the order of sums."""

    structure: Any
    leaves: tuple[jax.ShapeDtypeStruct, ...]
    largest: int
    """Elements of the largest leaf that is packed."""

    def pack(self, tree: Any) -> Packed:
        """`tree` must have this structure and these shapes."""
        small, large = [jnp.zeros(0)], []
        for x, like in zip(self.structure.flatten_up_to(tree), self.leaves, strict=True):
            small.append(jnp.ravel(x)) if self._packs(like) else large.append(x)
        return Packed(jnp.concatenate(small), tuple(large))

    def unpack(self, packed: Packed) -> Any:
        """The tree again."""
        sizes = [x.size for x in self.leaves if self._packs(x)]
        small, large = iter(jnp.split(packed.small, np.cumsum(sizes)[:-1])), iter(packed.large)
        leaves = [next(small).reshape(x.shape) if self._packs(x) else next(large) for x in self.leaves]
        return jax.tree.unflatten(self.structure, leaves)

    def pack_in(self, tree: Any) -> Any:
        """Pack every part of `tree` that is such a tree: the moments in the state of an optimiser."""
        return jax.tree.map(lambda x: self.pack(x) if self._fits(x) else x, tree, is_leaf=self._fits)

    def unpack_in(self, tree: Any) -> Any:
        """Undo `pack_in`."""
        packed = lambda x: isinstance(x, Packed)
        return jax.tree.map(lambda x: self.unpack(x) if packed(x) else x, tree, is_leaf=packed)

    def _fits(self, tree: Any) -> bool:
        leaves, structure = jax.tree.flatten(tree)
        return structure == self.structure and all(
            x.shape == like.shape for x, like in zip(leaves, self.leaves, strict=True)
        )

    def _packs(self, x: jax.ShapeDtypeStruct) -> bool:
        return x.dtype == jnp.float32 and x.size <= self.largest


def packing(tree: Any, samples: int) -> Packing:
    """How to pack trees like this one of arrays, for gradient steps on so many samples."""
    leaves, structure = jax.tree.flatten(tree)
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)
    return Packing(structure, shapes, SMALL if samples >= FEW else TINY)


def rows(tree: Any) -> Callable[[Array], Any]:
    """What gathers rows of a tree of leaves [S, ...]: `rows(tree)(index)` is `tree.map(lambda x: x[index])` to the bit.

    Narrow leaves stand side by side in one table, made here, so that together they cost one gather, and one miss of the
    cache a row. A leaf that stands in the tree twice is gathered once. For data: no gradient flows back to the leaves.
    """
    every, structure = jax.tree.flatten(tree)
    leaves = {id(x): x for x in every}
    size = {i: x.size // len(x) * (1 if x.dtype == jnp.bool_ else 4) for i, x in leaves.items()}
    narrow = [i for i, x in leaves.items() if x.dtype in WORDS and size[i] <= 4 * NARROW]
    # bytes of flags last, where they need no alignment
    narrow.sort(key=lambda i: leaves[i].dtype == jnp.bool_)
    words = [i for i in narrow if leaves[i].dtype != jnp.bool_]
    parts = [jax.lax.bitcast_convert_type(leaves[i], jnp.int32).reshape(len(leaves[i]), -1) for i in words]
    flags = [leaves[i].reshape(len(leaves[i]), -1) for i in narrow[len(words) :]]
    if flags:
        together = jnp.concatenate(flags, axis=1).astype(jnp.uint8)
        together = jnp.pad(together, ((0, 0), (0, -together.shape[1] % 4)))
        parts.append(jax.lax.bitcast_convert_type(together.reshape(len(together), -1, 4), jnp.int32))
    # integers, as the bits of an integer may be a float that processors flush to zero
    table = jnp.concatenate(parts, axis=1) if parts else None

    def take(index: Array) -> Any:
        out = {i: x[index] for i, x in leaves.items() if i not in narrow}
        if table is not None:
            ends = np.cumsum([size[i] // 4 for i in words]).astype(int)
            *columns, rest = jnp.split(table[index], ends, axis=1)
            for i, x in zip(words, columns, strict=True):
                out[i] = jax.lax.bitcast_convert_type(x.reshape(-1, *leaves[i].shape[1:]), leaves[i].dtype)
            rest = jax.lax.bitcast_convert_type(rest, jnp.uint8).reshape(len(index), -1)
            begin = 0
            for i in narrow[len(words) :]:
                out[i] = (rest[:, begin : begin + size[i]] != 0).reshape(-1, *leaves[i].shape[1:])
                begin += size[i]
        return jax.tree.unflatten(structure, [out[id(x)] for x in every])

    return take
