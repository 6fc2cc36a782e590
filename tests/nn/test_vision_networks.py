"""Networks for images: counts of the literature, BatchNorm against flax's and PyTorch's rule, masks, taps, names."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import correlate2d

from jaxstack.core.errors import UserError
from jaxstack.nn import torch_weights as tw
from jaxstack.nn.vision import layers, wrn, zoo
from jaxstack.nn.vision.layers import BatchNorm
from jaxstack.nn.vision.wrn import WRN
from jaxstack.vision import structured_pruning as sp

KEY = jax.random.key(0)
COUNTS = {
    "lenet": 62_006,
    "wrn-16-1": 175_066,
    "wrn-16-2": 691_674,
    "wrn-22-2": 1_079_642,
    "wrn-28-2": 1_467_610,
    "wrn-34-2": 1_855_578,
    "wrn-40-1": 563_930,
    "wrn-40-1.5": 1_264_410,
    "wrn-40-2": 2_243_546,
    "wrn-28-10": 36_479_194,
    "densenet-bc-100-12": 769_162,
    "resnet-18": 11_173_962,
    "resnet-20": 272_474,
    "vgg-16": 14_728_266,
    "mobilenet-v1": 3_217_226,
    "mobilenet-v2": 2_296_922,
}
IMAGENET = {"resnet-18-imagenet": 11_689_512, "resnet-34-imagenet": 21_797_672, "resnet-50-imagenet": 25_557_032}


def test_counts_for_imagenet_are_those_of_torchvision():
    for name, expected in IMAGENET.items():
        assert count(zoo.network(name, 1000), 64) == expected


def count(network, image=32, channels=3):
    start = jax.eval_shape(lambda key: network.init(key, jnp.zeros((1, image, image, channels))), KEY)
    return sum(x.size for x in jax.tree.leaves(start["params"]))


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_those_of_the_literature(name):
    network = zoo.network(name)
    assert count(network) == COUNTS[name]
    if name.startswith("wrn"):
        assert wrn.param_count(network.depth, network.width) == COUNTS[name]


@pytest.mark.parametrize(("z", "expected"), [(0.25, 572_282), (0.5, 1_129_370), (0.75, 1_686_458)])
def test_bottlenecks_have_the_counts_of_the_paper(z, expected):
    outs, _, _ = wrn.block_features(40, 2)
    mid = tuple(int(z * out) for out in outs)
    assert wrn.param_count(40, 2, mid) == count(WRN(40, 2, mid_features=mid)) == expected


def test_closed_form_counts_blocks_without_middle_channels_classes_and_channels():
    mid = (0, 3, 0, 7, 5, 0)  # the first and third change channels or size, so their shortcut has weights
    assert wrn.param_count(16, 1.5, mid, classes=7, channels=1) == count(WRN(16, 1.5, 7, mid), 8, 1)


@pytest.mark.parametrize("variance", ["torch", "flax"])
def test_batch_norm_is_flax_with_the_running_variance_that_is_asked_for(variance):
    x = 2.0 + 3.0 * jax.random.normal(KEY, (4, 3, 2, 5))
    params = {"scale": jnp.arange(1.0, 6.0), "bias": jnp.arange(5.0)}
    stats = {"mean": jnp.ones(5), "var": jnp.full(5, 2.0)}
    old = {"params": params, "batch_stats": stats}
    mine, flax = BatchNorm(variance), nn.BatchNorm(momentum=0.9, epsilon=1e-5)
    y, new = mine.apply(old, x, True, mutable=["batch_stats"])
    other, theirs = flax.apply(old, x, use_running_average=False, mutable=["batch_stats"])
    np.testing.assert_allclose(y, other, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mine.apply(old, x), flax.apply(old, x, use_running_average=True), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(new["batch_stats"]["mean"], theirs["batch_stats"]["mean"], rtol=1e-5)
    ddof = 1 if variance == "torch" else 0
    expected = 0.9 * 2.0 + 0.1 * np.asarray(x, np.float64).reshape(-1, 5).var(0, ddof=ddof)
    np.testing.assert_allclose(new["batch_stats"]["var"], expected, rtol=1e-5)
    with pytest.raises(UserError, match="variance='biased': expected 'torch' or 'flax'"):
        BatchNorm("biased").apply(old, x)


def test_group_norm_is_that_of_flax():
    mine, theirs = layers.GroupNorm(3), nn.GroupNorm(3, epsilon=1e-5)
    with jax.enable_x64(True):
        x = 3.0 + jax.random.normal(jax.random.key(0), (2, 5, 4, 12), jnp.float64)
        variables = {"params": {"scale": jnp.linspace(0.5, 2.0, 12), "bias": jnp.arange(12.0)}}
        assert jax.tree.map(jnp.shape, mine.init(jax.random.key(1), x)) == jax.tree.map(jnp.shape, variables)
        loss = lambda module: lambda x: jnp.sin(module.apply(variables, x)).sum()
        for of in (lambda module: module.apply(variables, x), lambda module: jax.grad(loss(module))(x)):
            np.testing.assert_allclose(of(mine), of(theirs), rtol=1e-8, atol=1e-9)
    with pytest.raises(UserError, match="num_groups=5: expected a divisor of 12 channels"):
        layers.GroupNorm(5).init(jax.random.key(0), x)


def test_masks_taps_and_a_block_without_middle_channels():
    x = jax.random.normal(KEY, (2, 8, 8, 3))
    network = WRN(10, 0.5, mid_features=(5, 6, 7))
    start = network.init(KEY, x)

    @jax.jit
    def run(start, masks):
        return network.apply(start, x, masks=masks, taps=True)

    ones = tuple(jnp.ones(n) for n in (5, 6, 7))
    logits, taps = run(start, ones)
    assert [t.shape for t in taps] == [(2, 8, 8, 8), (2, 4, 4, 16), (2, 2, 2, 32)]
    np.testing.assert_allclose(logits, network.apply(start, x), rtol=1e-5, atol=1e-5)
    # with nothing in the middle the block is its shortcut, as in the network that has no middle channels there
    without, cut = run(start, (ones[0], 0 * ones[1], ones[2]))
    smaller = WRN(10, 0.5, mid_features=(5, 0, 7))
    names = jax.eval_shape(lambda key: smaller.init(key, x), KEY)
    assert set(names["params"]["block1"]) == {"bn1", "shortcut"}
    kept = {k: jax.tree_util.tree_map_with_path(lambda p, _, k=k: at(start[k], p), names[k]) for k in names}
    np.testing.assert_allclose(smaller.apply(kept, x), without, rtol=1e-4, atol=1e-5)
    assert (np.asarray(cut[0]) == np.asarray(taps[0])).all()
    # a mask for each image
    first = jnp.stack([ones[1], 0 * ones[1]])
    mixed, _ = run(start, (ones[0], first, ones[2]))
    np.testing.assert_allclose(mixed, jnp.stack([logits[0], without[1]]), rtol=1e-4, atol=1e-5)
    # an identity block that has lost all channels gives back what it got
    block = wrn.Block(4, 3)
    y = jax.random.normal(KEY, (2, 3, 3, 4))
    assert (block.apply(block.init(KEY, y), y, mask=jnp.zeros(3)) == y).all()
    none = wrn.Block(4, 0)
    assert not none.init(KEY, y)
    assert none.apply({}, y) is y


def test_networks_give_their_stages_and_learn_statistics():
    x = jax.random.normal(KEY, (2, 16, 16, 1))
    sides = {
        "densenet-bc-10-2": [(16, 6), (8, 5), (4, 4)],
        "resnet-18": [(16, 64), (8, 128), (4, 256), (2, 512)],
        "resnet-50-imagenet": [(4, 256), (2, 512), (1, 1024), (1, 2048)],
        "mobilenet-v1": [(16, 64), (8, 128), (4, 256), (2, 512), (1, 1024)],
        "mobilenet-v2": [(16, 16), (16, 24), (8, 32), (4, 64), (4, 96), (2, 160), (2, 320)],
    }
    for name, expected in sides.items():
        network = zoo.network(name, 4)

        def run(key, network=network):
            start = network.init(key, x)
            return start, network.apply(start, x, True, taps=True, mutable=["batch_stats"])

        start, ((logits, taps), changed) = jax.eval_shape(run, KEY)
        assert logits.shape == (2, 4)
        assert [t.shape[1:] for t in taps] == [(side, side, c) for side, c in expected], name
        assert jax.tree.structure(changed["batch_stats"]) == jax.tree.structure(start["batch_stats"])
    with pytest.raises(UserError, match="vgg-16: found images of 16x16, expected at least 32x32"):
        zoo.network("vgg-16").init(KEY, x)


def test_dense_layers_lose_channels_as_residual_blocks_do():
    x = jax.random.normal(KEY, (2, 8, 8, 2))
    network = zoo.network("densenet-bc-10-2", 3)
    assert network.middle() == (8,) * 3
    assert sum(zoo.network("densenet-bc-100-12").middle()) == 2304
    start = network.init(KEY, x)
    masks = (jnp.ones(8), jnp.zeros(8), jnp.ones(8).at[3].set(0.0))
    mid, small = sp.compress(start, masks)
    assert mid == (8, 0, 7)
    smaller = zoo.network("densenet-bc-10-2", 3, mid_features=mid)
    found, wanted = smaller.apply(small, x), network.apply(start, x, masks=masks)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert sum(v.size for v in jax.tree.leaves(small["params"])) == count(smaller, 8, 2)


def test_means_of_pixels_leave_out_an_odd_row():
    x = jax.random.normal(KEY, (2, 5, 4, 3))
    np.testing.assert_allclose(layers.mean_pool(x), nn.avg_pool(x, (2, 2), (2, 2)), rtol=1e-5, atol=1e-6)


def at(tree, path):
    for entry in path:
        tree = tree[entry.key]
    return tree


def test_lenet_pads_small_images_and_shows_its_convolutions():
    x = jax.random.normal(KEY, (2, 28, 28, 1))
    network = zoo.network("lenet", 4)
    start = network.init(KEY, x)
    logits, taps = network.apply(start, x, taps=True)
    assert logits.shape == (2, 4)
    assert [t.shape for t in taps] == [(2, 28, 28, 6), (2, 10, 10, 16)]
    assert min(t.min() for t in taps) == 0
    wide = jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
    np.testing.assert_allclose(network.apply(start, wide), logits, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="found images of 33x33, expected at most image=32"):
        network.init(KEY, jnp.zeros((1, 33, 33, 1)))


def test_max_pooling_by_slices_is_that_of_flax():
    x = jax.random.normal(KEY, (2, 7, 6, 3))
    assert (layers.max_pool(x) == nn.max_pool(x, (2, 2), (2, 2))).all()
    assert (layers.max_pool(x, 3, 2) == nn.max_pool(x, (3, 3), (2, 2))).all()
    # of equal pixels the first has the gradient, as in PyTorch, and none is lost
    even = jax.grad(lambda x: layers.max_pool(x).sum())(jnp.ones((1, 4, 4, 1)))
    assert even[0, ::2, ::2].sum() == even.sum() == 4


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit", {}, "model='vit': expected one of lenet, wrn-D-W"),
        ("wrn-12-1", {}, r"depth=12: expected 6 n \+ 4"),
        ("densenet-bc-12-2", {}, r"depth=12: expected 6 n \+ 4"),
        ("densenet-bc-10-0", {}, "growth=0: expected at least 1"),
        ("densenet-bc-10-2", dict(mid_features=(1,)), "mid_features: found 1, expected 3, one for each block"),
        ("resnet-26", {}, "depth=26: expected 18, 34 or 50"),
        ("wrn-10-0.01", {}, "width=0.01: expected at least 1/16"),
        ("wrn-10-1", dict(mid_features=(1, 2)), "mid_features: found 2, expected 3, one for each block"),
        ("wrn-10-1", dict(mid_features=(1, 2, -1)), "mid_features: found -1, expected 0 or more"),
        ("lenet", dict(mid_features=(1,)), "mid_features: lenet has no middle widths"),
    ],
)
def test_names_that_are_unknown_or_do_not_fit(name, options, message):
    with pytest.raises(UserError, match=message):
        zoo.network(name, **options)


def test_lenet_computes_what_pytorch_would_with_the_same_state_dict():
    rng = np.random.default_rng(0)
    network = zoo.network("lenet", 3)
    shapes = jax.eval_shape(lambda key: network.init(key, jnp.zeros((1, 32, 32, 2))), KEY)
    variables = jax.tree.map(lambda s: 0.2 * rng.normal(size=s.shape).astype(np.float32), shapes)
    weights = tw.to_torch(network, variables)
    x = rng.normal(size=(2, 32, 32)).astype(np.float32)

    def conv(x, name):
        kernel, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        rows = [sum(correlate2d(c, k, "valid") for c, k in zip(x, out)) + b for out, b in zip(kernel, bias)]
        y = np.maximum(np.stack(rows), 0)
        return y.reshape(len(y), y.shape[1] // 2, 2, y.shape[2] // 2, 2).max((2, 4))

    h = conv(conv(x, "conv1"), "conv2").reshape(-1)  # channels first
    for name in ("fc1", "fc2", "fc3"):
        h = weights[f"{name}.weight"] @ h + weights[f"{name}.bias"]
        h = np.maximum(h, 0) if name != "fc3" else h
    again = tw.from_torch(network, weights)  # two channels, as the first weights tell
    found = network.apply(again, x.transpose(1, 2, 0)[None])
    np.testing.assert_allclose(found[0], h, rtol=1e-3, atol=1e-4 * np.abs(h).max())
