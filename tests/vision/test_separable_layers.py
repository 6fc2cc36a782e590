"""Structured maps against dense ones, counts to the unit, scaled weight decay, networks, students, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxstack import cli
from jaxstack.core import runner
from jaxstack.core.errors import UserError
from jaxstack.nn import linalg, optimisers, structured
from jaxstack.nn.attention_transfer import Hypers, attention_maps
from jaxstack.nn.classifier import Config, classifier
from jaxstack.nn.conv import Conv
from jaxstack.nn.supervised import variables
from jaxstack.nn.vision import separable
from jaxstack.nn.vision.separable import SeparableConv
from jaxstack.nn.vision.wrn import WRN
from jaxstack.vision import separable_layers as sl

KEY = jax.random.key(0)
NET = WRN(28, 10)
# the released layers, so ACDC has a layer fewer and hashed a bias
COUNTS = {
    ("dense", None): 4_380_138,
    ("acdc", 12): 555_498,
    ("hashed", 0.05): 568_426,
    ("hashed", 0.2): 1_171_690,
    ("hashed", 0.5): 2_378_218,
    ("generic", 0.03): 601_162,
    ("generic", 0.1): 1_190_634,
    ("generic", 0.24): 2_344_906,
    ("shuffle", 1): 2_384_154,
    ("shuffle", 3): 1_343_834,
    ("shuffle", 7): 719_994,
    ("shuffle", 4): 823_674,
    ("shuffle", 8): 563_594,
    ("shuffle", 16): 437_354,
    ("shuffle", 32): 378_314,
}


@pytest.mark.parametrize(("kind", "size"), COUNTS)
def test_counts_of_wrn_28_10_are_the_released_ones_to_the_unit(kind, size):
    assert NET.clone(pointwise=kind, size=size, reference_compat=True).param_count() == COUNTS[kind, size]


def traced(net, channels=3):
    """Parameters of a network as it is made."""
    return separable.count_params(jax.eval_shape(lambda key: net.init(key, jnp.zeros((1, 32, 32, channels))), KEY))


def test_networks_have_the_counts_of_their_maps():
    assert NET.param_count() == 36_479_194
    assert traced(NET.clone(pointwise="shuffle", size=7, reference_compat=True)) == COUNTS["shuffle", 7]
    ours = lambda kind, size: NET.clone(pointwise=kind, size=size).param_count()
    # what the names say: as many layers, no bias
    assert ours("acdc", 11) == COUNTS["acdc", 12]
    assert ours("hashed", 0.2) == COUNTS["hashed", 0.2] - sum(out for _, out in NET.conv_shapes())
    # the released log rounds these to thousands
    assert round(ours("tt", 0.26) / 1000) == 664
    assert round(NET.clone(pointwise="tucker", size=0.25, reference_compat=True).param_count() / 1000) == 681
    for kind in structured.KINDS:
        for compat in (False, True):
            size = 2 if kind in ("shuffle", "acdc") else 0.3
            layer = SeparableConv(32, pointwise=kind, size=size, reference_compat=compat)
            start = jax.eval_shape(lambda key, layer=layer: layer.init(key, jnp.zeros((1, 4, 4, 16))), KEY)
            counted = separable.layer_params((16, 32), kind, size, reference_compat=compat)
            assert separable.count_params(start) == counted
    empty = WRN(10, 1, 3, (5, 0, 7), pointwise="tt")
    assert traced(empty, 1) == empty.param_count(1)
    whole = WRN(10, 1, 3)
    full = WRN(10, 1, 3, pointwise="hashed-full", size=0.1)
    saved = sum(9 * a * b - int(0.1 * 9 * a * b) for a, b in full.conv_shapes())
    assert full.param_count() == whole.param_count() - saved
    assert sl.compression_ratio(full) == full.param_count() / whole.param_count()


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def drawn(kind, shape, size, compat=False):
    """Arrays of a map as they start."""
    shapes = structured.param_shapes(kind, shape, size, reference_compat=compat)
    params = separable.start(kind, shapes, shape, 1, KEY)
    if kind == "hashed":
        params["index"] = structured.hash_index(KEY, shape, shapes["theta"][0], compat)
    assert {k: v.shape for k, v in params.items() if k != "index"} == shapes
    return params


MAPS = [
    ("dense", (6, 10), None),
    ("generic", (6, 10), 0.3),
    ("lowrank", (5, 10), 0.3),
    ("shuffle", (6, 8), 2),
    ("acdc", (6, 16), 3),
    ("acdc", (12, 4), 2),
    ("acdc", (10, 10), 2),
    ("tt", (8, 12), 0.4),
    ("tucker", (8, 12), 0.5),
    ("hashed", (7, 9), 0.4),
]


@pytest.mark.parametrize(("kind", "shape", "size"), MAPS)
def test_every_way_to_apply_a_map_is_its_matrix(kind, shape, size):
    params = drawn(kind, shape, size)
    x, y = normal(40, shape[0]), normal(40, shape[0], seed=1)

    @jax.jit
    def run(params, x, y):
        f = lambda x: structured.apply_structured(kind, params, x, shape[1])
        few = x[:2].reshape(1, 2, -1)  # fewer rows than channels, so ACDC streams them
        return structured.structured_matrix(kind, params, shape), f(x), f(few), f(x + y) - f(x) - f(y)

    matrix, many, few, apart = run(params, x, y)
    assert matrix.shape == shape
    np.testing.assert_allclose(many, x @ matrix, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(few[0], x[:2] @ matrix, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(apart, 0.0, atol=2e-5)
    each = jax.vmap(lambda p: structured.structured_matrix(kind, p, shape))
    np.testing.assert_allclose(each(jax.tree.map(lambda v: jnp.stack([v, v]), params))[1], matrix, rtol=1e-5, atol=1e-6)


# ACDC


def test_acdc_is_the_product_of_its_layers():
    """Against NumPy: diagonals, cosines by their formula, permutations as matrices."""
    n, layers = 10, 3
    a, d = 1 + 0.1 * normal(layers, n), 1 + 0.1 * normal(layers, n, seed=1)
    k, i = np.mgrid[:n, :n]
    forward = (2 * np.cos(np.pi * k * (2 * i + 1) / (2 * n))).T  # rows are dct(e_i)
    turn = np.eye(n)[:, [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]]
    wanted = np.eye(n)
    for left, right in zip(np.asarray(a, np.float64), np.asarray(d, np.float64)):
        wanted = wanted @ (np.diag(left) @ forward @ turn @ np.diag(right) @ np.linalg.inv(forward)) @ turn
    np.testing.assert_allclose(structured.acdc_matrix(a, d), wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        structured.acdc_layer(a[0], d[0])[:, 3],
        (np.diag(a[0]) @ forward @ turn @ np.diag(d[0]) @ np.linalg.inv(forward))[:, 3],
        rtol=1e-4,
        atol=1e-5,
    )
    x = normal(5, n)
    np.testing.assert_allclose(structured.acdc_stream(a, d, x), x @ wanted.T, rtol=1e-4, atol=1e-5)
    by_matrix, by_stream = (
        jax.grad(lambda ad, f=f: jnp.sin(f(*ad)).sum())((a, d))
        for f in (lambda a, d: x @ structured.acdc_matrix(a, d).T, lambda a, d: structured.acdc_stream(a, d, x))
    )
    for one, two in zip(by_matrix, by_stream):
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-4)


def test_acdc_of_ones_permutes_frequencies_and_starts_near_an_isometry():
    """The riffle stands between C and C^-1, so the layer is a permutation of frequencies, not of channels."""
    ones = jnp.ones(8)
    forward, inverse = structured._cosines(8)
    layer = structured.acdc_layer(ones, ones)
    np.testing.assert_allclose(inverse @ layer @ forward, structured.riffle(jnp.eye(8)), atol=1e-5)
    np.testing.assert_allclose((ones[:, None] * forward) @ (ones[:, None] * inverse), np.eye(8), atol=1e-5)
    assert list(structured.riffle(jnp.arange(6))) == [0, 2, 4, 1, 3, 5]
    assert (structured.unriffle(structured.riffle(jnp.arange(12).reshape(2, 6))) == jnp.arange(12).reshape(2, 6)).all()
    shapes = structured.param_shapes("acdc", (64, 64), 12)
    draw = lambda key: structured.acdc_matrix(**separable.start("acdc", shapes, (64, 64), 1, key))
    matrices = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(KEY, 40)))
    # 24 diagonals N(1, 0.01^2): the mean square of an output is 1.0001^24
    assert np.square(matrices).sum((1, 2)).mean() / 64 == pytest.approx(1.0001**24, abs=0.006)
    assert np.std(normal(1000, 64) @ matrices[0]) == pytest.approx(1.0, abs=0.03)
    values = np.linalg.svd(matrices[0], compute_uv=False)
    assert 0.86 < values.min() < values.max() < 1.14


def test_acdc_repeats_inputs_and_sums_outputs():
    a, d = 1 + 0.1 * normal(2, 16), 1 + 0.1 * normal(2, 16, seed=1)
    square = structured.acdc_matrix(a, d).T
    x = normal(3, 6)
    # 6 channels are extended by their first two, as 8 divides 16, then repeated
    wide = jnp.tile(jnp.concatenate([x, x[:, :2]], 1), 2)
    wide_map = structured.structured_matrix("acdc", {"a": a, "d": d}, (6, 16))
    np.testing.assert_allclose(x @ wide_map, wide @ square, rtol=1e-4, atol=1e-5)
    y = normal(3, 16)
    narrow_map = structured.structured_matrix("acdc", {"a": a, "d": d}, (16, 4))
    np.testing.assert_allclose(y @ narrow_map, (y @ square).reshape(3, 4, 4).sum(-1), rtol=1e-4, atol=1e-5)


# Low rank, shuffles


def test_generic_with_singular_vectors_is_the_nearest_of_its_rank():
    for shape in ((6, 9), (9, 6)):
        matrix = normal(*shape)
        whole = structured.closest("generic", matrix, 6 / 9)
        np.testing.assert_allclose(structured.structured_matrix("generic", whole, shape), matrix, atol=1e-5)
        part = structured.structured_matrix("generic", structured.closest("generic", matrix, 3 / 9), shape)
        u, s, v = np.linalg.svd(np.asarray(matrix))
        np.testing.assert_allclose(part, (u[:, :3] * s[:3]) @ v[:3], rtol=1e-3, atol=1e-4)
    beyond = structured.closest("generic", matrix, 2.0)  # more than there is to have
    assert beyond["reduce"].shape == (9, 18)
    np.testing.assert_allclose(structured.structured_matrix("generic", beyond, shape), matrix, atol=1e-5)
    assert (structured.closest("dense", matrix)["kernel"] == matrix).all()


def test_tied_low_rank_is_symmetric_on_the_repeated_input():
    params = drawn("lowrank", (4, 12), 0.25)
    v = params["factor"]
    x = normal(5, 4)
    wanted = jnp.tile(x, 3) @ v.T @ v
    np.testing.assert_allclose(
        x @ structured.structured_matrix("lowrank", params, (4, 12)), wanted, rtol=1e-4, atol=1e-5
    )


def test_a_shuffle_with_one_group_is_generic_with_the_depthwise_inside():
    x = normal(2, 5, 5, 6)
    layer = SeparableConv(8, strides=2, pointwise="shuffle", size=1)
    start = layer.init(KEY, x)
    parts = start["params"]["structured"]
    assert start["params"]["depthwise"]["kernel"].shape == (3, 3, 1, 2)
    inside = Conv(2, (3, 3), 2, 1, groups=2, use_bias=False)
    middle = inside.apply({"params": start["params"]["depthwise"]}, x @ parts["reduce"][0])
    np.testing.assert_allclose(layer.apply(start, x), middle @ parts["expand"][0], rtol=1e-4, atol=1e-5)
    generic = {name: parts[name][0] for name in parts}
    wanted = structured.structured_matrix("generic", generic, (6, 8))
    np.testing.assert_allclose(structured.structured_matrix("shuffle", parts, (6, 8)), wanted, rtol=1e-5, atol=1e-6)
    y = jnp.arange(24).reshape(2, 12)
    assert (structured.channel_shuffle(structured.channel_shuffle(y, 3), 4) == y).all()
    assert list(structured.channel_shuffle(jnp.arange(6), 2)) == [0, 3, 1, 4, 2, 5]


# Tensors


def test_eigenvectors_are_lapacks_and_leave_it_alone():
    for n in (1, 7, 24):
        a = normal(n, 2 * n)
        symmetric = a @ a.T
        values, vectors = jax.jit(linalg.eigenvectors)(symmetric)
        np.testing.assert_allclose(values, np.linalg.eigvalsh(np.asarray(symmetric))[::-1], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(n), atol=1e-5)
        np.testing.assert_allclose(vectors * values @ vectors.T, symmetric, rtol=1e-4, atol=1e-4)
    text = jax.jit(jax.vmap(linalg.eigenvectors)).lower(symmetric[None]).as_text()
    assert "lapack" not in text
    # a matrix of rank 1: no division by the zeros
    left, right = linalg.leading(jnp.outer(jnp.arange(1.0, 6.0), jnp.ones(3)), 2)
    np.testing.assert_allclose(left @ right, np.outer(np.arange(1.0, 6.0), np.ones(3)), atol=1e-5)


def numpy_tt(tensor, ranks):
    """TT-SVD with LAPACK."""
    dims, left, rest, cores = tensor.shape, 1, tensor, []
    for n, rank in zip(dims, ranks):
        u, s, v = np.linalg.svd(rest.reshape(left * n, -1), full_matrices=False)
        cores.append(u[:, :rank].reshape(left, n, rank))
        left, rest = rank, s[:rank, None] * v[:rank]
    return np.einsum("aib,bjc,ckd->ijk", *cores, rest.reshape(left, dims[-1], 1))


def test_tensor_trains_and_tucker_are_exact_at_full_ranks_and_truncated_as_by_svd():
    assert structured.tensor_shape(512) == (8, 8, 8)
    assert structured.tensor_shape(1024) == (16, 16, 4)
    assert structured.tensor_shape(640 * 640) == (80, 80, 64)
    assert structured.tensor_shape(7 * 11) == (7, 11, 1)
    assert structured.tensor_shape(16, 2) == (4, 4)
    assert structured.full_ranks((4, 5, 6)) == (4, 6)
    assert structured.tt_ranks((16, 16, 4), 0.5) == (8, 2)
    shape = (10, 12)  # 5 x 6 x 4 numbers
    matrix, four = normal(*shape), normal(3, 4, 3, 5)
    released = structured.param_shapes("tucker", shape, 0.5, reference_compat=True)
    full = lambda kind, params: structured.structured_matrix(kind, params, shape)

    @jax.jit
    def run(matrix, four):
        of = {(k, s): full(k, structured.closest(k, matrix, s)) for k in ("tt", "tucker") for s in (9.0, 0.5)}
        stored = structured.factored("tucker", matrix, released)
        by = jax.grad(lambda p: (full("tucker", p) * matrix).sum())(stored)
        again = structured.tt_full(structured.tt_svd(four, structured.full_ranks(four.shape)))
        return of, stored, by, full("tucker", stored), again

    found, stored, by, same, again = run(matrix, four)
    for kind in ("tt", "tucker"):
        np.testing.assert_allclose(found[kind, 9.0], matrix, rtol=1e-4, atol=1e-5)
    dims = structured.tensor_shape(120)
    tensor = np.asarray(matrix.T, np.float64).reshape(dims)
    wanted = numpy_tt(tensor, structured.tt_ranks(dims, 0.5))
    np.testing.assert_allclose(found["tt", 0.5].T.reshape(dims), wanted, atol=1e-3)
    ranks, cut = structured.tucker_ranks(dims, 0.5), tensor
    for axis, rank in enumerate(ranks):
        u = np.linalg.svd(np.moveaxis(tensor, axis, 0).reshape(dims[axis], -1))[0][:, :rank]
        cut = np.moveaxis(np.tensordot(u @ u.T, cut, (1, axis)), 0, axis)
    np.testing.assert_allclose(found["tucker", 0.5].T.reshape(dims), cut, atol=1e-3)
    # the released storage holds the same tensor in more numbers, none of which is cut off from the gradient
    assert {k: v.shape for k, v in stored.items()} == released
    np.testing.assert_allclose(same, found["tucker", 0.5], atol=1e-5)
    assert all(jnp.abs(g).sum() > 0 for g in by.values())
    error = linalg.relative_error(same, matrix)
    assert 0.3 < error < 1.0
    np.testing.assert_allclose(error**2, 1 - np.sum(np.square(same)) / np.sum(np.square(matrix)), rtol=1e-3)
    np.testing.assert_allclose(again, four, rtol=1e-4, atol=1e-5)


# Hashing


def test_the_gradient_of_a_hashed_weight_is_the_sum_over_its_places():
    shape, budget = (9, 7), 12
    index = structured.hash_index(KEY, shape, budget)
    theta, cotangent = normal(budget), normal(*shape)
    found = jax.grad(
        lambda t: (structured.structured_matrix("hashed", {"theta": t, "index": index}, shape) * cotangent).sum()
    )
    wanted = jax.ops.segment_sum(cotangent.ravel(), index.ravel(), budget)
    np.testing.assert_allclose(found(theta), wanted, rtol=1e-5, atol=1e-6)
    matrix = normal(*shape)
    near = structured.closest("hashed", matrix, 12.5 / 63, index)["theta"]
    means = [np.asarray(matrix)[np.asarray(index) == j].mean() for j in range(budget) if (index == j).any()]
    np.testing.assert_allclose(near[jnp.unique(index)], means, rtol=1e-5)
    with pytest.raises(UserError, match="expected dense, generic, tt, tucker, or hashed with an index"):
        structured.closest("hashed", matrix, 0.2)


def test_the_hash_reaches_the_last_weight_and_the_released_one_does_not():
    ours, theirs = (np.asarray(structured.hash_index(KEY, (60, 60), 8, compat)) for compat in (False, True))
    assert sorted(set(ours.ravel())) == list(range(8))
    assert sorted(set(theirs.ravel())) == list(range(7))
    assert np.abs(np.bincount(ours.ravel()) / 450 - 1).max() < 0.2


# Layers and networks


@pytest.mark.parametrize("kind", structured.KINDS)
def test_layers_stand_in_for_convolutions(kind):
    """The layer is a convolution with the kernel that its parts make; strides, odd images, kernels of one pixel."""
    x = normal(2, 5, 7, 8)
    layer, size = SeparableConv, {"shuffle": 2, "acdc": 2}.get(kind, 0.5)
    whole, one = (layer(16, kernel, 2, kind, size) for kernel in ((3, 3), (1, 1)))

    @jax.jit
    def run(x):
        found = []
        for module in (whole, one):
            start = module.init(KEY, x)
            found.append((start, module.apply(start, x)))
        zero = module.apply(start, 0 * x)
        return found, zero

    ((start, y), (_, z)), zero = run(x)
    assert y.shape == z.shape == (2, 3, 4, 16)
    assert (zero == 0).all()  # no bias
    parts = dict(start["params"]["structured"]) | dict(start.get("hash", {}).get("structured", {}))
    if kind == "hashed-full":
        kernel = structured.hashed_weights(parts["theta"], parts["index"])
    else:
        taps = start["params"]["depthwise"]["kernel"]
        if kind == "shuffle":
            reduce, expand = (structured.grouped_matrix(parts[name]) for name in ("reduce", "expand"))
            kernel = jnp.einsum("ac,rsc,cd->rsad", structured.channel_shuffle(reduce, 2), taps[:, :, 0], expand)
        else:
            kernel = jnp.moveaxis(taps, 2, 3) * structured.structured_matrix(kind, parts, (8, 16))
        assert 0.2 < np.std(taps) < 0.8  # of 9 entries: sqrt(2 / 9)
    wanted = Conv(16, (3, 3), 2, 1, use_bias=False).apply({"params": {"kernel": kernel}}, x)
    np.testing.assert_allclose(y, wanted, rtol=1e-3, atol=1e-4)


def test_multiply_adds_are_those_of_the_layers():
    counted = lambda kind, size, stride=1: separable.count_mult_adds(
        SeparableConv(32, strides=stride, pointwise=kind, size=size), (1, 8, 8, 16)
    )
    depthwise = 64 * 9 * 16
    assert counted("dense", None) == depthwise + 64 * 16 * 32
    assert counted("dense", None, 2) == (depthwise + 64 * 16 * 32) // 4
    assert counted("generic", 0.25) == depthwise + 64 * 8 * (16 + 32)
    assert counted("lowrank", 0.25) == depthwise + 64 * 8 * (16 + 32)
    assert counted("shuffle", 2) == 64 * (16 * 8 // 2 + 9 * 8 + 8 * 32 // 2)
    assert counted("shuffle", 2, 2) == 64 * 16 * 8 // 2 + 16 * (9 * 8 + 8 * 32 // 2)
    assert counted("acdc", 3) == depthwise + 64 * 3 * (4 * 32 + 5 * 32 * 5)
    assert counted("hashed-full", 0.1) == 64 * 9 * 16 * 32
    for kind in ("tt", "tucker", "hashed"):  # no less than dense
        assert counted(kind, 0.25) == counted("dense", None)
    # a network: stem, a stage of each size with shortcut and two convolutions, classes
    plain = separable.count_mult_adds(WRN(10, 1, 3), (1, 8, 8, 3))
    blocks = (
        64 * 2 * 9 * 16 * 16 + 16 * (9 * 16 * 32 + 9 * 32 * 32 + 16 * 32) + 4 * (9 * 32 * 64 + 9 * 64 * 64 + 32 * 64)
    )
    assert plain == 64 * 27 * 16 + blocks + 64 * 3
    # twelve layers of ACDC cost as much as a dense map of about 600 channels
    cost = lambda n: structured.position_mult_adds("acdc", structured.param_shapes("acdc", (n, n), 12), (n, n)) / n**2
    assert cost(590) > 1 > cost(620)


def test_labels_are_explicit_and_decay_is_scaled():
    x = normal(1, 8, 8, 1)
    net = WRN(10, 0.5, 3, pointwise="shuffle", size=1)
    start = jax.eval_shape(lambda k: net.init(k, x), KEY)["params"]
    params = jax.tree.map(lambda s: normal(*s.shape), start)
    params["structured_head"] = {"kernel": normal(2, 2)}  # a name that only sounds so
    found = separable.labels(params)
    block = found["block0"]
    assert block["conv1"] == {
        "structured": {"reduce": "structured", "expand": "structured"},
        "depthwise": {"kernel": "weights"},
    }
    assert block["bn1"] == {"scale": "none", "bias": "none"}
    assert block["shortcut"] == found["stem"] == found["structured_head"] == {"kernel": "weights"}
    compat = separable.labels({k: v for k, v in params.items() if k != "structured_head"}, reference_compat=True)
    assert compat["block0"]["conv1"]["depthwise"] == {"kernel": "structured"}
    assert compat["bn"] == {"scale": "weights", "bias": "weights"}
    hashed = {"conv1": {"structured": {"theta": normal(5)}, "depthwise": {"kernel": normal(3, 3, 1, 4)}}}
    assert separable.labels(hashed)["conv1"]["structured"] == {
        "theta": "structured"
    }  # of one axis, decays all the same
    assert separable.labels(hashed, True)["conv1"]["depthwise"] == {"kernel": "weights"}
    decay = separable.crs_weight_decay(params, found, 0.25, 0.1)
    for (path, d), label, p in zip(
        jax.tree_util.tree_leaves_with_path(decay), jax.tree.leaves(found), jax.tree.leaves(params)
    ):
        factor = {"structured": 0.25, "weights": 1.0, "none": 0.0}[label]
        np.testing.assert_allclose(d, 0.1 * factor * p, rtol=1e-6, err_msg=str(path))


def test_at_ratio_one_the_step_is_the_plain_one_bitwise():
    params = {"structured": {"a": normal(3, 4)}, "stem": {"kernel": normal(5, 2)}, "bn": {"scale": normal(4)}}
    grads = jax.tree.map(lambda p: jnp.sin(3 * p), params)
    options = dict(momentum=0.9, weight_decay=jnp.float32(5e-3))
    factors = lambda ratio: lambda p: separable.crs_factors(separable.labels(p), ratio)
    plain = optimisers.sgd(lambda step: 0.1, mask=optimisers.weights_only, **options)
    scaled, less = (optimisers.sgd(lambda step: 0.1, factors=factors(r), **options) for r in (jnp.float32(1.0), 0.5))

    def steps(tx):
        p, state = params, tx.init(params)
        for _ in range(2):
            updates, state = tx.update(grads, state, p)
            p = optax.apply_updates(p, updates)
        return p

    one, two, three = (jax.jit(lambda tx=tx: steps(tx))() for tx in (plain, scaled, less))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two)):
        assert (np.asarray(a) == np.asarray(b)).all()
    assert (three["stem"]["kernel"] == one["stem"]["kernel"]).all()
    assert (three["structured"]["a"] != one["structured"]["a"]).any()
    by_hand = jax.tree.map(jnp.add, grads, separable.crs_weight_decay(params, separable.labels(params), 0.5, 5e-3))
    first, _ = less.update(grads, less.init(params), params)
    np.testing.assert_allclose(first["structured"]["a"], -0.1 * by_hand["structured"]["a"], rtol=1e-5)


def test_the_rival_of_equal_size_is_never_smaller():
    net = WRN(10, 1, 10, pointwise="generic", size=0.2)
    size = net.param_count(1)
    rival = sl.narrower(size, net, 1)
    assert (rival.pointwise, rival.depth) == ("dense", 10)
    assert size <= rival.param_count(1) < 1.1 * size
    assert rival.clone(width=rival.width - 1 / 64).param_count(1) < size
    with pytest.raises(UserError, match=r"target=1000000: expected at most \d+, the dense separable network's"):
        sl.narrower(10**6, net, 1)


def test_a_student_learns_with_and_without_its_teachers_attention():
    image, x, y = (4, 4, 1), normal(8, 4, 4, 1), jnp.arange(8) % 3
    net = WRN(10, 0.25, 3, pointwise="hashed", size=0.3)
    teacher = sl.plain(net)
    assert teacher == WRN(10, 0.25, 3)
    options = dict(num_updates=2, batch_size=8, hypers=Hypers(lr=0.05))

    @jax.jit
    def run(key):
        weights = teacher.init(key, x)
        _, taps = teacher.apply(weights, x, taps=True)
        kept = (x, (y, attention_maps(taps)))
        asked = sl.student(net, image, teacher, jax.tree.map(lambda v: v[None], weights), **options)
        state = asked.init(key, asked.hypers, weights)
        stored, alone = (sl.student(net, image, transfer=on, **options) for on in (True, False))
        after, plain = (one.step(one.init(key, one.hypers), kept) for one in (stored, alone))
        return state, asked.step(state, (x, y)), after, plain

    before, (_, one), (state, two), (_, three) = run(KEY)
    np.testing.assert_allclose(one["loss/train"], two["loss/train"], rtol=1e-4)
    assert three["loss/train"] < two["loss/train"]  # cross entropy alone
    np.testing.assert_allclose(three["loss/train"], np.log(3), rtol=0.6)
    index = lambda s: s.stats["hash"]["block0"]["conv1"]["structured"]["index"]
    theta = lambda s: s.params["block0"]["conv1"]["structured"]["theta"]
    assert (index(state) == index(before)).all()  # never trained
    assert index(state).dtype == jnp.int32
    assert (theta(state) != theta(before)).all()
    assert (index(run(jax.random.key(1))[0]) != index(before)).any()  # each seed draws its own


def test_a_classifier_takes_structured_maps(tmp_path, capsys):
    options = dict(model="wrn-10-0.25", size=4, batch_size=8, num_updates=2, train_images=16)
    learner = classifier(pointwise="hashed", pointwise_size=0.3, scaled_decay=True, ema=True, **options)
    result = runner.train(learner, seeds=1, progress=False, eval_every=-1)
    assert np.isfinite(result.metrics["loss/train"]).all()
    kept = variables(result.state)
    index = kept["hash"]["block1"]["conv2"]["structured"]["index"]
    assert index.dtype == jnp.int32
    assert (index == result.state.stats["hash"]["block1"]["conv2"]["structured"]["index"]).all()
    run = tmp_path / "run"
    runner.save(learner, result.state, [0], run)
    assert cli.main(["compress", str(run), "--out", str(tmp_path / "small")]) == 2
    err = capsys.readouterr().err
    assert "found --pointwise hashed, expected plain convolutions" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(pointwise="shuffle", pointwise_size=3),
            r"size=3 of pointwise='shuffle' with 16 to 32 .*groups do not divide",
        ),
        (dict(pointwise="shuffle", pointwise_size=2.5), "expected a whole number of groups"),
        (
            dict(pointwise="acdc", model="wrn-10-1.3125"),
            "with 16 to 21 channels: found 21 channels inside, expected an even",
        ),
        (dict(pointwise="acdc", pointwise_size=1.5), "expected a whole number of layers"),
        (dict(pointwise="acdc", mid_features=(10, 32, 32)), "expected a divisor of the channels in"),
        (dict(pointwise="generic", pointwise_size=0.01), "found rank 0, expected at least 1, a size of 0.0312 or more"),
        (dict(pointwise="lowrank", mid_features=(24, 32, 32)), "expected as many channels out as in, or a multiple"),
        (dict(pointwise="hashed", pointwise_size=1e-4), "found 0 weights, expected 1 to 512"),
        (dict(pointwise="hashed-full", pointwise_size=1.5), "found 6912 weights, expected 1 to 4608"),
        (dict(pointwise="tt", pointwise_size=-1.0), "pointwise_size=-1.0: expected a positive number, or none"),
        (dict(pointwise="acdc", pointwise_size=0.0), "pointwise_size=0.0: expected a positive number, or none"),
        (dict(pointwise="adcd"), "unknown pointwise 'adcd': did you mean 'acdc'"),
        (
            dict(pointwise="acdc", model="lenet"),
            "pointwise: lenet has no separable convolutions, expected a network wrn-D-W",
        ),
        (dict(pointwise_size=3.0), "pointwise_size=3.0: expected none without --pointwise"),
        (dict(scaled_decay=True), "scaled_decay=True: expected False without --pointwise"),
    ],
)
def test_bad_sizes_are_told_in_one_line(changes, message):
    with pytest.raises(UserError, match=message) as error:
        Config(**(dict(model="wrn-10-2") | changes))
    assert "\n" not in str(error.value)


def test_weights_of_pytorch_are_refused():
    with pytest.raises(UserError, match="pointwise='dense': weights of PyTorch are those of plain convolutions"):
        WRN(10, 1, pointwise="dense").torch_name(("block0", "conv1"))
    with pytest.raises(UserError, match="released code makes one fewer"):
        structured.param_shapes("acdc", (4, 4), 1, reference_compat=True)
    with pytest.raises(UserError, match="expected at least 4 channels out"):
        structured.param_shapes("shuffle", (4, 3), 1)
    with pytest.raises(UserError, match="unknown pointwise 'hashed-full'"):
        structured.structured_matrix("hashed-full", {}, (4, 4))
