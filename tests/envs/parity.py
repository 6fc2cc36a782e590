"""What the tests of our forms of a library's environments share."""

import jax
import jax.numpy as jnp
import numpy as np


def agree(ours, theirs, atol: float = 0.0):
    """Trees of one structure and equal types; integers are equal, floats to `atol` and ten times that relatively."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for mine, want in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert mine.dtype == want.dtype
        if jnp.issubdtype(want.dtype, jnp.floating):
            np.testing.assert_allclose(mine, want, rtol=10 * atol, atol=atol)
        else:
            np.testing.assert_array_equal(mine, want)
