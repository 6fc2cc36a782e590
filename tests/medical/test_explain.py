"""Explanations of one image against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack.core.errors import UserError
from jaxstack.medical import explain
from jaxstack.nn.conv import conv2d

SIDE, MAPS, LABELS = (8, 12), 5, 3


def linear_parts():
    """Features are a convolution with stride 2, the head is linear after the mean over pixels."""
    features = lambda v, x: conv2d(x, v["kernel"], 2, 1)
    return explain.Parts(features, lambda v, a: a.mean((1, 2)) @ v["head"])


def variables(channels=2):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {"kernel": draw(3, 3, channels, MAPS), "head": draw(MAPS, LABELS)}, draw(4, *SIDE, channels)


def test_grad_cam_of_a_linear_head_is_its_closed_form_and_vmap_agrees():
    given, images = variables()
    parts = linear_parts()
    maps = np.asarray(parts.features(given, images))
    h, w = maps.shape[1:3]
    found = np.asarray(explain.explained(explain.grad_cam(parts), given, images, jnp.arange(LABELS), 3))
    assert found.shape == (4, LABELS, *SIDE)
    # w_k = W_kc / (h w)
    expected = np.maximum(np.einsum("nhwk,kc->nchw", maps, np.asarray(given["head"]) / (h * w)), 0)
    np.testing.assert_allclose(found[:, :, ::2, ::2], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(found[:, :, 1::2], found[:, :, ::2])  # nearest: blocks
    assert (expected.max((2, 3)) > 0).all()
    single = explain.grad_cam(parts)(given, images[2], 1)
    np.testing.assert_allclose(found[2, 1], single, rtol=1e-4, atol=1e-6)
    scaled = np.asarray(explain.normalised(single))
    assert (scaled.min(), scaled.max()) == (0, pytest.approx(1, abs=1e-6))
    assert not explain.normalised(jnp.zeros(SIDE)).any()


def test_maps_of_a_linear_network_are_weights_times_input():
    """f(x) = sum of w x, so that (x - b) w is the gradient's and the integral's map, and a window's fall is its sum."""
    rng = np.random.default_rng(1)
    weights = jnp.asarray(rng.normal(size=(*SIDE, 2, LABELS)), jnp.float32)
    image = jnp.asarray(rng.normal(size=(*SIDE, 2)), jnp.float32)
    parts = explain.Parts(lambda v, x: x, lambda v, a: jnp.einsum("bhwc,hwcl->bl", a, v))
    base = jnp.asarray([0.3, -0.2])
    expected = np.einsum("hwc,hwc->hw", np.asarray(image - base), np.asarray(weights)[..., 1])
    for kind in ("gradient-input", "integrated-gradients"):
        signed = explain.explainer(kind, parts, base, signed=True)(weights, image, 1)
        np.testing.assert_allclose(signed, expected, rtol=1e-4, atol=1e-5)
        positive = explain.explainer(kind, parts, base)(weights, image, 1)
        np.testing.assert_allclose(positive, np.maximum(expected, 0), rtol=1e-4, atol=1e-5)
    each = explain.explainer("occlusion", parts, base, window=1, stride=1, signed=True)(weights, image, 1)
    np.testing.assert_allclose(each, expected, rtol=1e-3, atol=1e-4)
    # windows of 4 with stride 2: the mean over the windows that cover a pixel
    many = explain.explainer("occlusion", parts, base, window=4, stride=2, signed=True)(weights, image, 1)
    total, count = np.zeros(SIDE), np.zeros(SIDE)
    for top in range(-2, SIDE[0], 2):
        for left in range(-2, SIDE[1], 2):
            part = np.s_[max(top, 0) : top + 4, max(left, 0) : left + 4]
            total[part] += expected[part].sum()
            count[part] += 1
    np.testing.assert_allclose(many, total / count, rtol=1e-3, atol=1e-3)


def test_integrated_gradients_are_complete():
    given, images = variables()
    parts = explain.Parts(
        lambda v, x: jax.nn.gelu(conv2d(x, v["kernel"], 2, 1)), lambda v, a: jnp.tanh(a).mean((1, 2)) @ v["head"]
    )
    found = explain.integrated_gradients(parts, 0.1, 64, signed=True)(given, images[0], 2)
    ends = parts.predict(given, jnp.stack([images[0], jnp.full_like(images[0], 0.1)]))[:, 2]
    assert float(found.sum()) == pytest.approx(float(ends[0] - ends[1]), abs=2e-3)
    assert abs(float(ends[0] - ends[1])) > 0.05


def test_bad_input_is_named():
    parts = linear_parts()
    with pytest.raises(UserError, match="explanation='lime': expected one of grad-cam, gradient-input"):
        explain.explainer("lime", parts)
    with pytest.raises(UserError, match="stride=9: expected 1 to window=8"):
        explain.occlusion(parts, stride=9)
    with pytest.raises(UserError, match="steps=0: expected at least 1"):
        explain.integrated_gradients(parts, steps=0)
