"""U-Nets: counts and names of the release, parity with a plain NumPy form, interpolation, equivalent orders, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack.core.errors import UserError
from jaxstack.nn import torch_weights as tw
from jaxstack.nn.vision import unet

KEY = jax.random.key(0)


def shapes(net, size, channels=1):
    return jax.eval_shape(lambda key: net.init(key, jnp.zeros((1, size, size, channels))), KEY)


def random_weights(net, size, seed=0):
    """A state dict of the network's names, He scale, with statistics that are not the start's."""
    rng = np.random.default_rng(seed)
    names = tw.to_torch(jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes(net, size)), net.torch_name)
    out = {}
    for name, x in names.items():
        draw = rng.normal(size=x.shape)
        if x.ndim == 4:
            draw *= 0.7 * np.sqrt(2.0 / np.prod(x.shape[1:]))
        elif name.endswith(("running_var", "norm.weight")):
            draw = 0.5 + rng.uniform(size=x.shape)
        else:
            draw *= 0.1
        out[name] = draw.astype(np.float32)
    return out


def plain_unet(w, x):
    """The release's forward pass in NumPy, float64, [C, H, W], from the names of its state dict alone."""

    def conv(name, x):
        k, b = w[f"{name}.weight"].astype(np.float64), w[f"{name}.bias"].astype(np.float64)
        reach = k.shape[2] // 2
        x = np.pad(x, ((0, 0), (reach, reach), (reach, reach)))
        windows = np.lib.stride_tricks.sliding_window_view(x, k.shape[2:], (1, 2))
        return np.einsum("chwij,ocij->ohw", windows, k, optimize=True) + b[:, None, None]

    def act(name, x):
        x = conv(f"{name}.conv", x)
        v = {k: w[f"{name}.norm.{k}"][:, None, None] for k in ("weight", "bias", "running_mean", "running_var")}
        x = (x - v["running_mean"]) / np.sqrt(v["running_var"] + 1e-5) * v["weight"] + v["bias"]
        return np.maximum(x, 0.0)

    def double(x):
        for axis in (1, 2):
            n = x.shape[axis]
            at = np.clip((np.arange(2 * n) + 0.5) / 2 - 0.5, 0, n - 1)
            low = np.floor(at).astype(int)
            high, share = np.minimum(low + 1, n - 1), at - low
            share = share[:, None] if axis == 1 else share
            x = np.take(x, low, axis) * (1 - share) + np.take(x, high, axis) * share
        return x

    depth = 1 + max(int(k.split(".")[1]) for k in w if k.startswith("down_blocks"))
    x = act("in_conv", x)
    skips = [x]
    for i in range(depth):
        c, h, width = x.shape
        x = x.reshape(c, h // 2, 2, width // 2, 2).max((2, 4))
        x = act(f"down_blocks.{i}.conv2", act(f"down_blocks.{i}.conv1", x))
        skips.append(x)
    for i in range(depth):
        x = np.concatenate([double(conv(f"up_blocks.{i}.upsample.0", x)), skips[depth - 1 - i]])
        x = act(f"up_blocks.{i}.conv2", act(f"up_blocks.{i}.conv1", x))
    return conv("out_conv.1", act("out_conv.0", x))


def test_the_release_has_its_count_names_and_outputs():
    net = unet.UNet()
    start = shapes(net, 128)
    assert net.depth == 7
    assert net.multiple == 128
    assert sum(x.size for x in jax.tree.leaves(start["params"])) == 788_283
    weights = random_weights(net, 128)
    assert len(weights) + sum(k.endswith("running_var") for k in weights) == 226  # with num_batches_tracked
    assert weights["up_blocks.4.upsample.0.weight"].shape == (32, 64, 1, 1)
    variables = tw.from_torch(start, weights | {"in_conv.norm.num_batches_tracked": np.array(7)}, net.torch_name)
    back = tw.to_torch(variables, net.torch_name)
    assert set(back) == set(weights)
    assert all((back[k] == weights[k]).all() for k in weights)
    x = np.random.default_rng(1).uniform(-1, 1, (1, 128, 256, 1)).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        mine = np.asarray(jax.jit(net.apply)(variables, x))[0]
    expected = plain_unet(weights, x[0].transpose(2, 0, 1).astype(np.float64)).transpose(1, 2, 0)
    assert np.abs(expected).max() > 0.2
    np.testing.assert_allclose(mine, expected, rtol=0, atol=4e-6 * np.abs(expected).max())


def test_interpolation_is_jaxs_and_its_order_leaves_the_function():
    x = jax.random.normal(KEY, (2, 3, 5, 4))
    np.testing.assert_allclose(unet.twice(x), jax.image.resize(x, (2, 6, 10, 4), "bilinear"), atol=1e-6)
    np.testing.assert_allclose(unet.twice(jnp.ones((1, 1, 1, 2))), 1.0)
    x = jax.random.normal(KEY, (2, 8, 12, 1))
    first, last = (unet.UNet((4, 8, 6), 2, mode) for mode in ("conv_then_interpolate", "interpolate"))
    start = first.init(KEY, x)
    names = {k.replace("upsample.0", "upsample.1"): v for k, v in tw.to_torch(start, first.torch_name).items()}
    other = tw.from_torch(jax.eval_shape(lambda: last.init(KEY, x)), names, last.torch_name)
    apply = lambda net, variables: jax.jit(net.apply)(variables, x)
    np.testing.assert_allclose(apply(first, start), apply(last, other), atol=1e-5)
    plain = unet.UNet((4, 8), 1, extra_out_conv=False)
    assert "out_conv.weight" in tw.to_torch(plain.init(KEY, x), plain.torch_name)
    # in training each parameter has a gradient and the statistics move
    variables = first.init(KEY, x)

    def loss(params):
        out, new = first.apply({**variables, "params": params}, x, True, mutable=["batch_stats"])
        return jnp.square(out - 1.0).mean(), new

    grads, new = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    # a bias before BatchNorm has none
    flat = jax.tree_util.tree_flatten_with_path(grads)[0]
    moved = {jax.tree_util.keystr(p): float(jnp.abs(g).max()) for p, g in flat}
    assert all(g > 1e-6 for name, g in moved.items() if "'conv']['bias'" not in name), moved
    assert all((a != b).any() for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(variables["batch_stats"])))


def test_bad_shapes_and_channels_are_named():
    with pytest.raises(UserError, match="found images of 12x8 pixels, expected multiples of 8"):
        unet.UNet((2, 2, 2, 2)).init(KEY, jnp.zeros((1, 12, 8, 1)))
    with pytest.raises(UserError, match="channels=4 5: expected at least two numbers"):
        unet.UNet((4, 5)).init(KEY, jnp.zeros((1, 8, 8, 1)))
    with pytest.raises(UserError, match="up_mode='nearest'"):
        unet.UNet((4, 4), 1, "nearest").init(KEY, jnp.zeros((1, 8, 8, 1)))  # pyright: ignore[reportArgumentType]
    small, start = unet.UNet((4, 8)), unet.UNet((4, 8, 8))
    given, expected = random_weights(small, 8), shapes(start, 8)
    with pytest.raises(UserError, match=r"weights.pth: down_blocks.1.conv1.norm.running_mean is missing"):
        tw.from_torch(expected, given, start.torch_name, "weights.pth")
