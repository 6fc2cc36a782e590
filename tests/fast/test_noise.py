"""Random numbers in rows are the generator's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack.envs.base import Box, Discrete, MultiDiscrete, Spec, action_from, action_noise
from jaxstack.fast.noise import in_rows


@pytest.mark.parametrize("draw", [jax.random.uniform, jax.random.gumbel, jax.random.normal])
@pytest.mark.parametrize("shape", [(), (3,), (5, 2), (7, 4, 3, 5), (2, 0, 3)])
def test_the_same_numbers(draw, shape):
    key = jax.random.key(3)
    np.testing.assert_allclose(in_rows(draw, key, shape), draw(key, shape), rtol=1e-6)


@pytest.mark.parametrize(
    ("space", "sizes"),
    [(Discrete(5), ()), (Discrete(4), (4, 2)), (MultiDiscrete((3, 2)), ()), (Box((2,), -1.0, 3.0), ())],
    ids=["discrete", "unequal", "multi_discrete", "box"],
)
def test_random_actions_of_a_whole_rollout_are_uniform(space, sizes):
    spec = Spec("x", ("a", "b"), obs_shape=(1,), action_space=space, action_sizes=sizes)
    action = np.asarray(action_from(spec, action_noise(spec, jax.random.key(0), (400, 20))))
    assert action.shape[:3] == (400, 20, 2)
    if isinstance(space, Box):
        assert action.dtype == np.float32
        assert action.min() >= -1.0
        assert action.max() < 3.0
        np.testing.assert_allclose(action.mean((0, 1)), 1.0, atol=0.06)
        return
    assert action.dtype == np.int32
    counts = np.asarray(sizes or space.n) if isinstance(space, Discrete) else np.asarray(space.nvec)
    for index in np.ndindex(action.shape[2:]):
        count = int(np.broadcast_to(counts, action.shape[2:])[index])
        shares = np.bincount(action[(..., *index)].reshape(-1), minlength=count) / 8000
        np.testing.assert_allclose(shares, 1 / count, atol=0.03)


def test_a_mask_leaves_out_what_is_illegal():
    spec = Spec("x", ("a", "b"), obs_shape=(1,), action_space=Discrete(4), has_action_mask=True)
    mask = jnp.broadcast_to(jnp.array([[True, False, True, False], [False, False, False, True]]), (3000, 2, 4))
    action = np.asarray(action_from(spec, action_noise(spec, jax.random.key(0), (3000,)), mask))
    np.testing.assert_array_equal(action[:, 1], 3)
    np.testing.assert_allclose(np.bincount(action[:, 0], minlength=4) / 3000, [0.5, 0, 0.5, 0], atol=0.04)
