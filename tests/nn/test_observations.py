"""One place turns observations into real numbers, and refuses what it cannot read."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack.core.errors import UserError
from jaxstack.envs.base import Box, Discrete, Image, MultiDiscrete, Spec, box_like
from jaxstack.nn.observations import inputs_of, joint_state


def spec(space, shape=None):
    return Spec("x", ("a", "b"), space.shape if shape is None else shape, Discrete(2), obs_space=space)


def test_encodings_are_what_they_say():
    one = inputs_of(spec(Discrete(4)), jnp.int32)
    assert one.shape == (4,)
    np.testing.assert_array_equal(one.encode(jnp.array([[2, 0]])), [[[0, 0, 1, 0], [1, 0, 0, 0]]])
    many = inputs_of(spec(MultiDiscrete((2, 3))), jnp.int32)
    assert many.shape == (5,)
    np.testing.assert_array_equal(many.encode(jnp.array([[1, 2], [0, 0]])), [[0, 1, 0, 0, 1], [1, 0, 1, 0, 0]])
    np.testing.assert_array_equal(joint_state(many, many.encode(jnp.array([[1, 2], [0, 0]])))[:5], [0, 1, 0, 0, 1])
    image = inputs_of(spec(Image((1, 2, 1))), jnp.uint8)
    seen = image.encode(jnp.array([[[0], [255]]], jnp.uint8))
    assert seen.dtype == jnp.float32
    np.testing.assert_array_equal(seen, [[[0.0], [1.0]]])
    for dtype in (jnp.float32, jnp.bool_, jnp.bfloat16):
        real = inputs_of(Spec("x", ("a",), (3,), Discrete(2)), dtype)
        x = jnp.ones((2, 3), dtype)
        assert real.encode(x) is x
    assert inputs_of(spec(Box((3,), dtype=jnp.int8)), jnp.int8).shape == (3,)


BAD = [
    (Spec("x", ("a",), (3,), Discrete(2)), jnp.int32, r"found int32, expected Spec\(obs_space=...\).*Discrete\(n\)"),
    (Spec("x", ("a",), (2, 2, 3), Discrete(2)), jnp.uint8, r"found uint8, expected .*Image\(shape\)"),
    (spec(Discrete(4)), jnp.float32, r"found float32, expected integers for Discrete\(n=4\)"),
    (spec(Image((2, 2, 1))), jnp.float32, "found float32, expected uint8"),
    (spec(Box((3,))), jnp.complex64, "found complex64"),
]


@pytest.mark.parametrize(("facts", "dtype", "message"), BAD)
def test_what_cannot_be_read_is_refused(facts, dtype, message):
    with pytest.raises(UserError, match=message):
        inputs_of(facts, dtype)


def test_arrays_of_another_type_are_refused_where_they_are_read():
    with pytest.raises(UserError, match="found float32, expected integers for Discrete"):
        inputs_of(spec(Discrete(4))).encode(jnp.ones(2))
    with pytest.raises(UserError, match="found float32, expected uint8"):
        inputs_of(spec(Image((1, 1, 1)))).encode(jnp.ones((1, 1, 1)))

    class Words:
        shape = ()

    with pytest.raises(UserError, match="expected Discrete, MultiDiscrete, Box or Image"):
        inputs_of(Spec("x", ("a",), (), Discrete(2), obs_space=Words()))  # pyright: ignore[reportArgumentType]


def test_bounds_of_a_library_are_kept_one_by_one_in_vectors():
    low, high = np.array([-1.0, -2.0]), np.array([1.0, 2.0])
    library = Box((2,), low, high)  # pyright: ignore[reportArgumentType]
    assert box_like((2,), library, np.float32) == Box((2,), (-1.0, -2.0), (1.0, 2.0), jnp.dtype("float32"))
    assert box_like((1, 2), library, np.int8) == Box((1, 2), -2.0, 2.0, jnp.dtype("int8"))
    assert box_like((2,), object(), np.bool_) == Box((2,), dtype=jnp.dtype("bool"))
