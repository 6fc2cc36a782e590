"""The U-Net on MobileNetV3: counts, names, and outputs of segmentation-models-pytorch 0.6.0 on the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack.core.errors import UserError
from jaxstack.nn.torch_weights import from_torch, to_torch
from jaxstack.nn.vision import mobilenet_v3
from jaxstack.nn.vision.unet_mobilenet import UNetMobileNetV3

KEY = jax.random.key(0)


def random_weights(net, rng):
    """A state dict drawn in the order of its names."""
    shapes = jax.eval_shape(net.init, KEY, jnp.zeros((1, 64, 64, 1)))
    names = to_torch(net, jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes))
    out = {}
    for name in sorted(names):
        x = rng.normal(size=names[name].shape)
        if x.ndim == 4:
            x *= 0.8 * np.sqrt(2 / np.prod(x.shape[1:]))
        elif name.endswith(("running_var", "weight")):
            x = 0.5 + rng.uniform(size=x.shape)
        else:
            x *= 0.1
        out[name] = x.astype(np.float32)
    return shapes, out


def test_outputs_are_those_of_the_library():
    net, rng = UNetMobileNetV3(), np.random.default_rng(0)
    shapes, weights = random_weights(net, rng)
    assert sum(x.size for x in jax.tree.leaves(shapes["params"])) == 6_685_537
    x = rng.normal(size=(1, 1, 64, 96)).astype(np.float32).transpose(0, 2, 3, 1)
    given = from_torch(net, weights, shapes)
    taps = mobilenet_v3.MobileNetV3(0)
    encoder = {k: v["encoder"] for k, v in given.items()}

    @jax.jit
    def run(given, encoder):
        return net.apply(given, x), taps.apply(encoder, x, taps=True)[1]

    with jax.default_matmul_precision("highest"):
        logits, found = run(given, encoder)
    # the library's encoder: channels, rows, columns, mean and deviation of what it gives at each resolution
    expected = [
        ((16, 32, 48), 0.39594781398773193, 1.1551438570022583),
        ((24, 16, 24), -0.08313186466693878, 1.6190487146377563),
        ((40, 8, 12), -0.4573005735874176, 1.7392139434814453),
        ((112, 4, 6), -0.18517044186592102, 1.7311441898345947),
        ((960, 2, 3), 0.0850941613316536, 0.392829954624176),
    ]
    for tap, (shape, mean, deviation) in zip(found, expected, strict=True):
        assert tap.shape == (1, *shape[1:], shape[0])
        assert float(tap.mean()) == pytest.approx(mean, abs=1e-5)
        assert float(tap.std()) == pytest.approx(deviation, abs=1e-5)
    # its logits; they reach over 1.586
    y = np.asarray(logits)[0, :, :, 0]
    some = y[[0, 0, 10, 31, 40, 63], [0, 95, 20, 50, 90, 47]]
    theirs = [0.17228227, 0.16915720, 0.54931455, 0.55928319, 0.23477193, 0.25406000]
    np.testing.assert_allclose(some, theirs, atol=1e-5 * 1.586)
    assert float(y.mean()) == pytest.approx(0.42902329, abs=1e-5)
    assert float(np.ptp(y)) == pytest.approx(1.58647835, abs=2e-5)


def test_widths_round_to_eights_and_bad_shapes_are_named():
    assert [mobilenet_v3.divisible(c) for c in (1, 8, 12, 18, 184, 28)] == [8, 8, 16, 24, 184, 32]
    x = jnp.array([-4.0, -3.0, 0.0, 3.0, 5.0])
    np.testing.assert_allclose(mobilenet_v3.hard_swish(x), [0, 0, 0, 3, 5])
    np.testing.assert_allclose(mobilenet_v3.hard_sigmoid(x), [0, 0, 0.5, 1, 1])
    small = UNetMobileNetV3(2, 0.25, (4, 4, 4, 4, 4))
    shapes = jax.eval_shape(small.init, KEY, jnp.zeros((1, 32, 64, 1)))
    assert jax.eval_shape(small.apply, shapes, jnp.zeros((3, 32, 64, 1))).shape == (3, 32, 64, 2)
    assert shapes["params"]["encoder"]["last"]["kernel"].shape == (1, 1, 40, 240)
    for net, shape, message in (
        (small, (40, 64), "unet: found images of 40x64 pixels, expected multiples of 32"),
        (UNetMobileNetV3(decoder=(4, 4)), (32, 32), "expected five numbers of channels"),
        (UNetMobileNetV3(width=0.0), (32, 32), "width=0.0, form='tf': expected a positive width"),
        (UNetMobileNetV3(form="jax"), (32, 32), "form='jax': expected a positive width, and 'tf' or 'torch'"),  # pyright: ignore[reportArgumentType]
    ):
        with pytest.raises(UserError, match=message):
            jax.eval_shape(net.init, KEY, jnp.zeros((1, *shape, 1)))
