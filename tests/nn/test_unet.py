"""U-Nets of Choroidalyzer and REACHNet: counts and names, parity with a plain NumPy form, interpolation, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from jaxstack.core.errors import UserError
from jaxstack.nn import torch_weights as tw
from jaxstack.nn.vision import unet
from jaxstack.nn.vision.reachnet import ReachNet

KEY = jax.random.key(0)


def shapes(net, size, channels=1):
    return jax.eval_shape(lambda key: net.init(key, jnp.zeros((1, size, size, channels))), KEY)


def random_weights(net, size, seed=0):
    """A state dict of the network's names, He scale, with statistics that are not the start's."""
    rng = np.random.default_rng(seed)
    names = tw.to_torch(net, jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes(net, size)))
    out = {}
    for name, x in names.items():
        draw = rng.normal(size=x.shape)
        if x.ndim == 2:
            draw *= np.sqrt(1.0 / x.shape[1])
        elif x.ndim == 3:
            draw *= 0.5
        elif x.ndim == 4:
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

    def between(x, places):
        for axis, at in zip((1, 2), places):
            n = x.shape[axis]
            at = np.clip(at, 0, n - 1)
            low = np.floor(at).astype(int)
            high, share = np.minimum(low + 1, n - 1), at - low
            share = share[:, None] if axis == 1 else share
            x = np.take(x, low, axis) * (1 - share) + np.take(x, high, axis) * share
        return x

    def enlarged(x, f):
        return between(x, [(np.arange(f * n) + 0.5) / f - 0.5 for n in x.shape[1:]])

    def corners(x, size):
        return between(x, [np.linspace(0, n - 1, m) for n, m in zip(x.shape[1:], size)])

    def attention(x, heads=8):
        side = int(np.sqrt(w["attention.pos_embed"].shape[1]))
        part = {k.removeprefix("attention.attention."): v.astype(np.float64) for k, v in w.items()}

        def norm(name, t):
            t = t - t.mean(-1, keepdims=True)
            t = t / np.sqrt((t * t).mean(-1, keepdims=True) + 1e-6)
            return t * part[f"{name}.weight"] + part[f"{name}.bias"]

        t = corners(x, (side, side)).reshape(len(x), -1).T + w["attention.pos_embed"][0]
        # the rows of qkv: first all queries, then all keys, then all values, of head after head
        q, k, v = (a.reshape(len(t), heads, -1) for a in np.split(norm("norm1", t) @ part["attn.qkv.weight"].T, 3, -1))
        out = np.zeros_like(q)
        for h in range(heads):
            e = np.exp(q[:, h] @ k[:, h].T / np.sqrt(q.shape[2]))
            out[:, h] = e / e.sum(-1, keepdims=True) @ v[:, h]
        t = t + out.reshape(len(t), -1) @ part["attn.proj.weight"].T + part["attn.proj.bias"]
        h = norm("norm2", t) @ part["mlp.fc1.weight"].T + part["mlp.fc1.bias"]
        h = h * 0.5 * (1.0 + erf(h / np.sqrt(2.0)))
        t = t + h @ part["mlp.fc2.weight"].T + part["mlp.fc2.bias"]
        return corners(t.T.reshape(-1, side, side), x.shape[1:])

    def block(name, x):
        out = act(f"{name}.conv2", act(f"{name}.conv1", x))
        return out + conv(f"{name}.resid_connection", x) if f"{name}.resid_connection.weight" in w else out

    depth = 1 + max(int(k.split(".")[1]) for k in w if k.startswith("down_blocks"))
    shapes = [w[f"up_blocks.{i}.upsample.0.weight"].shape for i in range(depth)]
    factors = [shape[1] // shape[0] for shape in shapes]
    x = act("in_conv", x)
    skips = [x]
    for i, f in enumerate(factors[::-1]):
        c, h, width = x.shape
        x = block(f"down_blocks.{i}", x.reshape(c, h // f, f, width // f, f).max((2, 4)))
        skips.append(x)
    if "attention.pos_embed" in w:
        x = attention(x)
    for i, f in enumerate(factors):
        x = block(
            f"up_blocks.{i}", np.concatenate([enlarged(conv(f"up_blocks.{i}.upsample.0", x), f), skips[depth - 1 - i]])
        )
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
    variables = tw.from_torch(net, weights | {"in_conv.norm.num_batches_tracked": np.array(7)}, start)
    back = tw.to_torch(net, variables)
    assert set(back) == set(weights)
    assert all((back[k] == weights[k]).all() for k in weights)
    x = np.random.default_rng(1).uniform(-1, 1, (1, 128, 256, 1)).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        mine = np.asarray(jax.jit(net.apply)(variables, x))[0]
    expected = plain_unet(weights, x[0].transpose(2, 0, 1).astype(np.float64)).transpose(1, 2, 0)
    assert np.abs(expected).max() > 0.2
    np.testing.assert_allclose(mine, expected, rtol=0, atol=4e-6 * np.abs(expected).max())


def test_reachnet_is_the_plain_form_at_every_size():
    net = ReachNet((6, 8, 16), factors=(4, 2), residual=True, resolution=32)
    assert (net.multiple, net.side, net.depth) == (8, 4, 2)
    weights = random_weights(net, 8)
    assert weights["attention.pos_embed"].shape == (1, 16, 16)
    assert weights["attention.attention.attn.qkv.weight"].shape == (48, 16)
    assert "attention.attention.attn.qkv.bias" not in weights
    assert weights["up_blocks.1.resid_connection.weight"].shape == (6, 8, 1, 1)  # of the joined 8 / 4 + 6 channels
    variables = tw.from_torch(net, weights, shapes(net, 8))
    back = tw.to_torch(net, variables)
    assert set(back) == set(weights)
    assert all((back[k] == weights[k]).all() for k in weights)
    apply = jax.jit(net.apply)
    for size in ((32, 32), (16, 48)):  # as large as the grid, and resized both ways
        x = np.random.default_rng(1).uniform(-1, 1, (1, *size, 1)).astype(np.float32)
        with jax.default_matmul_precision("highest"):
            mine = np.asarray(apply(variables, x))[0]
        expected = plain_unet(weights, x[0].transpose(2, 0, 1).astype(np.float64)).transpose(1, 2, 0)
        np.testing.assert_allclose(mine, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_interpolation_is_jaxs_and_its_order_leaves_the_function():
    x = jax.random.normal(KEY, (2, 3, 5, 4))
    np.testing.assert_allclose(unet.enlarged(x), jax.image.resize(x, (2, 6, 10, 4), "bilinear"), atol=1e-6)
    np.testing.assert_allclose(unet.enlarged(x, 4), jax.image.resize(x, (2, 12, 20, 4), "bilinear"), atol=1e-6)
    np.testing.assert_allclose(unet.enlarged(x, 3), jax.image.resize(x, (2, 9, 15, 4), "bilinear"), atol=1e-6)
    np.testing.assert_array_equal(
        unet.pooled(x.reshape(2, 15, 4, 1)[:, :12], 4), unet.max_pool(x.reshape(2, 15, 4, 1)[:, :12], 4, 4)
    )
    np.testing.assert_allclose(unet.enlarged(jnp.ones((1, 1, 1, 2))), 1.0)
    x = jax.random.normal(KEY, (2, 8, 12, 1))
    first, last = (unet.UNet((4, 8, 6), 2, mode) for mode in ("conv_then_interpolate", "interpolate"))
    start = first.init(KEY, x)
    names = {k.replace("upsample.0", "upsample.1"): v for k, v in tw.to_torch(first, start).items()}
    other = tw.from_torch(last, names, jax.eval_shape(lambda: last.init(KEY, x)))
    apply = lambda net, variables: jax.jit(net.apply)(variables, x)
    np.testing.assert_allclose(apply(first, start), apply(last, other), atol=1e-5)
    plain = unet.UNet((4, 8), 1, extra_out_conv=False)
    assert "out_conv.weight" in tw.to_torch(plain, plain.init(KEY, x))
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
    with pytest.raises(
        UserError, match="channels=8 16 18, factors=4 4: expected factors >= 2, one fewer than channels"
    ):
        ReachNet((8, 16, 18), factors=(4, 4)).init(KEY, jnp.zeros((1, 16, 16, 1)))
    with pytest.raises(UserError, match="heads=8: expected a divisor of the 12 channels"):
        ReachNet((8, 12), factors=(4,)).init(KEY, jnp.zeros((1, 16, 16, 1)))
    with pytest.raises(UserError, match="up_mode='nearest'"):
        unet.UNet((4, 4), 1, "nearest").init(KEY, jnp.zeros((1, 8, 8, 1)))  # pyright: ignore[reportArgumentType]
    small, start = unet.UNet((4, 8)), unet.UNet((4, 8, 8))
    given, expected = random_weights(small, 8), shapes(start, 8)
    with pytest.raises(UserError, match=r"weights.pth: down_blocks.1.conv1.norm.running_mean is missing"):
        tw.from_torch(start, given, expected, "weights.pth")
