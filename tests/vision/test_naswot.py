"""Scores against closed forms and an independent NumPy network, the search space's counts, searches on tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack.core.errors import UserError
from jaxstack.nn.vision import zoo
from jaxstack.vision import naswot
from jaxstack.vision.naswot import Scoring, Skeleton

CONVS = "|nor_conv_3x3~0|+|nor_conv_3x3~0|avg_pool_3x3~1|+|skip_connect~0|nor_conv_3x3~1|skip_connect~2|"
CUT = "|none~0|+|none~0|none~1|+|none~0|skip_connect~1|none~2|"
MIXED = "|nor_conv_1x1~0|+|skip_connect~0|nor_conv_3x3~1|+|avg_pool_3x3~0|nor_conv_1x1~1|none~2|"
SMALL = Scoring(Skeleton(channels=3, cells=1, image=8, inputs=2))
IMAGES = np.random.default_rng(0).normal(size=(6, 8, 8, 2)).astype(np.float32)
CELLS = np.stack([naswot.encode_cell(c) for c in (CONVS, CUT, MIXED)])
KEY = jax.random.key(0)


def codes(*rows):
    return jnp.asarray(rows) > 0


def test_the_score_of_codes_is_the_closed_form():
    score = lambda *rows: naswot.naswot_score(naswot.agreement(codes(*rows)))
    assert score([1, 0, 1, 1, 0]) == pytest.approx(np.log(5))
    units, d = 5, 2
    assert score([1, 0, 1, 1, 0], [0, 1, 1, 1, 0]) == pytest.approx(np.log(units**2 - (units - d) ** 2))
    assert score([1, 0, 1], [1, 0, 1]) == -np.inf
    # images at equal distance d: eigenvalues N + (B - 1)(N - d), and d
    rows = np.eye(4, 12)
    assert score(*rows) == pytest.approx(np.log(12 + 3 * 10) + 3 * np.log(2))
    whole = np.random.default_rng(1).normal(size=(5, 30))
    k = naswot.agreement(codes(*whole))
    assert naswot.naswot_score(2 * k) == pytest.approx(naswot.naswot_score(k) + 5 * np.log(2))
    order = np.random.default_rng(2).permutation(30)
    assert (naswot.agreement(codes(*whole[:, order])) == k).all()
    assert naswot.naswot_score(naswot.agreement(codes(*whole[::-1]))) == pytest.approx(naswot.naswot_score(k))


def test_codes_are_read_off_any_network():
    w = jax.random.normal(KEY, (3, 5, 5))
    x = jax.random.normal(jax.random.key(1), (6, 5))

    @jax.jit
    def inner(h):
        return jax.nn.relu6(h @ w[1])

    def apply(w, x):
        h = jax.checkpoint(lambda h: jax.nn.relu(h @ w[0]))(x)
        return jax.nn.softmax(jnp.maximum(inner(h), 0.1) @ w[2])  # no ReLU: maximum

    first = np.asarray(x) @ np.asarray(w[0])
    second = np.maximum(first, 0) @ np.asarray(w[1])
    found = naswot.relu_codes(apply, w, x)
    for code, before in zip(found, (first, second), strict=True):
        np.testing.assert_array_equal(code, before > 0)
    far = (np.concatenate(found, 1)[:, None] != np.concatenate(found, 1)[None]).sum(-1)
    np.testing.assert_array_equal(naswot.hamming_kernel(found), 10 - far)
    network = zoo.network("resnet-8", 3, mid_features=(2,) * 6)
    images = jax.random.normal(KEY, (4, 8, 8, 1))
    variables = jax.jit(network.init)(KEY, images)
    trained = lambda v, x: network.apply(v, x, True, mutable=["batch_stats"])[0]
    codes = naswot.relu_codes(trained, variables, images)
    assert [code.shape[1] for code in codes] == [128, 128, 128, 32, 32, 8, 8]
    assert np.isfinite(naswot.naswot_score(naswot.hamming_kernel(codes)))
    looped = lambda w, x: jax.lax.scan(lambda h, one: (jax.nn.relu(h @ one), None), x, w)[0]
    with pytest.raises(UserError, match="apply: found a ReLU inside of scan, expected none in loops or branches"):
        naswot.relu_codes(looped, w, x)
    with pytest.raises(UserError, match=r"apply: found no ReLU, expected a network with jax\.nn\.relu"):
        naswot.relu_codes(lambda w, x: x @ w[0], w, x)


def test_the_space_has_its_cells_and_strings():
    cells = naswot.all_cells()
    assert len(cells) == 15_625 == len(np.unique(cells, axis=0))
    assert (naswot.cell_number(cells) == np.arange(15_625)).all()
    for cell in cells[::997]:
        assert (naswot.encode_cell(naswot.decode_cell(cell)) == cell).all()
    assert naswot.decode_cell(naswot.encode_cell(CONVS)) == CONVS
    assert naswot.num_units(naswot.encode_cell(CONVS)) == 471_040
    assert naswot.num_units(naswot.encode_cell(CUT)) == 40_960
    for seed in range(20):
        child = naswot.mutate_cell(jax.random.key(seed), jnp.asarray(CELLS[0]))
        assert (np.asarray(child) != CELLS[0]).sum() == 1
    drawn = np.asarray(naswot.sample_cells(KEY, 2000))
    assert np.abs(np.stack([(drawn == op).mean(0) for op in range(5)]) - 0.2).max() < 0.04


def test_parameters_and_units_are_those_of_the_network():
    network = naswot.CellNetwork(SMALL.skeleton, score=True)
    start = jax.jit(lambda cell: network.init_with_output(KEY, IMAGES, cell, True))
    for cell in CELLS:
        (_, k, _), variables = start(cell)
        assert (np.diag(k) == naswot.num_units(cell, SMALL.skeleton)).all()
        unused = 0  # of weights that the cell does not use, and of norms on edges without convolution
        for c in (3, 6, 12):
            ones, threes = (cell == naswot.CONV1).sum(), (cell == naswot.CONV3).sum()
            unused += (6 - ones) * c**2 + (6 - threes) * 9 * c**2 + (6 - ones - threes) * 2 * c
        count = sum(x.size for x in jax.tree.leaves(variables["params"]))
        assert naswot.num_params(cell, SMALL.skeleton) == count - unused


def reference(params, cell, x):
    """K and the last ReLU's K of one cell per stage, in NumPy."""
    found, norms = [], iter(range(100))

    def conv(x, w, stride=1):
        h, wd = x.shape[1:3]
        r = w.shape[0] // 2
        p = np.pad(x, ((0, 0), (r, r), (r, r), (0, 0)))
        out = sum(p[:, i : i + h, j : j + wd] @ w[i, j] for i in range(w.shape[0]) for j in range(w.shape[1]))
        return out[:, ::stride, ::stride]

    def norm(x):
        next(norms)
        return (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)

    def relu(x):
        c = (x > 0).reshape(len(x), -1).astype(np.int64)
        found.append(c @ c.T + (1 - c) @ (1 - c).T)
        return np.maximum(x, 0)

    def pool(x):
        p, ones = (np.pad(a, ((0, 0), (1, 1), (1, 1), (0, 0))) for a in (x, np.ones_like(x)))
        h, w = x.shape[1:3]
        total = lambda a: sum(a[:, i : i + h, j : j + w] for i in range(3) for j in range(3))
        return total(p) / total(ones)

    w = {k: np.asarray(v, np.float64) for k, v in params.items() if not isinstance(v, dict)}
    x = norm(conv(x, w["stem"]))
    for stage in range(3):
        if stage:
            y = norm(conv(relu(x), w[f"down{stage}_a"], 2))
            y = norm(conv(relu(y), w[f"down{stage}_b"]))
            n, h, wd, c = x.shape
            x = y + conv(x.reshape(n, h // 2, 2, wd // 2, 2, c).mean((2, 4)), w[f"down{stage}_shortcut"])
        nodes = [x]
        for to in (1, 2, 3):
            total = 0
            for e, (i, j) in enumerate(naswot.EDGES):
                if j == to:
                    name = f"cell{stage}_0_{e}"
                    total = total + [
                        lambda x: 0 * x,
                        lambda x: x,
                        lambda x: norm(conv(relu(x), w[f"{name}_1x1"])),  # noqa: B023
                        lambda x: norm(conv(relu(x), w[f"{name}_3x3"])),  # noqa: B023
                        pool,
                    ][cell[e]](nodes[i])
            nodes.append(total)
        x = nodes[3]
    relu(norm(x))
    return sum(found), found[-1]


def test_kernels_are_those_of_an_independent_network_and_one_program_scores_all():
    found = np.asarray(naswot.kernels(KEY, CELLS, IMAGES, SMALL))
    start = jax.jit(lambda key: naswot.CellNetwork(SMALL.skeleton).init(key, IMAGES, CELLS[0], True)["params"])
    for cell, key, k in zip(CELLS, jax.random.split(KEY, 3), found):
        params = start(jax.random.split(key)[0])
        whole, last = reference(params, cell, IMAGES.astype(np.float64))
        assert np.abs(k - whole).max() <= 2  # a unit at zero may fall to either side
    before = naswot._kernels._cache_size()
    twice = np.asarray(naswot.kernels(KEY, CELLS[::-1], IMAGES, SMALL))
    assert naswot._kernels._cache_size() == before
    assert twice.shape == found.shape
    released = np.asarray(naswot.kernels(KEY, CELLS, IMAGES, SMALL._replace(relu_weights="reference")))
    assert np.abs(released[2] - (2 * whole - last)).max() <= 4  # MIXED was the last


def test_cells_that_are_cut_come_last_and_images_that_are_equal_cannot_be_told_apart():
    found = naswot.scores(KEY, CELLS, IMAGES, SMALL)
    assert found[1] == -np.inf
    assert np.isfinite(found[[0, 2]]).all()
    assert naswot.connected(CELLS).tolist() == [True, False, True]
    dangling = naswot.encode_cell("|nor_conv_3x3~0|+|none~0|none~1|+|none~0|none~1|none~2|")
    assert naswot.scores(KEY, [dangling], IMAGES, SMALL) == -np.inf
    same = SMALL._replace(same=True)
    assert (naswot.scores(KEY, CELLS, IMAGES, same) == -np.inf).all()
    noisy = naswot.scores(KEY, CELLS, IMAGES, same._replace(noise=1.0, cutout=3, dropout=0.2, repeats=2))
    assert np.isfinite(noisy[[0, 2]]).all()


def test_the_score_ignores_the_order_of_images_and_scales_before_a_norm():
    network = naswot.CellNetwork(SMALL.skeleton, score=True)
    variables = jax.jit(lambda: network.init(KEY, IMAGES, CELLS[0], True))()
    apply = jax.jit(lambda v, x: network.apply(v, x, CELLS[0], True, mutable=["batch_stats"])[0][1])
    kernel = lambda v, x: np.asarray(apply(v, x))
    k = kernel(variables, IMAGES)
    order = np.array([3, 1, 5, 0, 2, 4])
    assert np.abs(kernel(variables, IMAGES[order]) - k[order][:, order]).max() <= 2
    scaled = jax.tree_util.tree_map_with_path(
        lambda path, w: 4.0 * w if any("3x3" in str(p) for p in path) else w, variables
    )
    assert np.abs(kernel(scaled, IMAGES) - k).max() <= 2


def test_rivals_see_what_they_should():
    labels = np.arange(6) % 3
    norms = naswot.gradient_norms(KEY, CELLS, IMAGES, labels, SMALL)
    assert np.isfinite(norms).all()
    assert norms[0] > norms[1] > 0  # the head's bias alone
    flow = naswot.synflow(KEY, CELLS, SMALL)
    assert np.isfinite(flow[[0, 2]]).all()
    params = naswot.num_params(CELLS)
    assert params[0] > params[2] > params[1]


def test_searches_find_what_a_table_holds():
    table = jnp.asarray(np.random.default_rng(0).permutation(naswot.COUNT) / naswot.COUNT, jnp.float32)
    train = lambda cell: table[naswot.cell_number(cell)]
    search = jax.jit(lambda key: naswot.regularised_evolution(key, train, 60, population=8, tournament=4))
    found = search(KEY)
    assert found.values.max() == train(found.best)
    assert (jax.vmap(train)(found.cells) == found.values).all()
    for n in range(8, 60):  # a child differs from one living cell in one edge
        near = (np.asarray(found.cells[n - 8 : n]) != np.asarray(found.cells[n])).sum(1)
        assert near.min() <= 1
    places = naswot.random_search(np.array([1.0, np.nan, 3.0, -np.inf]), 50, 20)
    assert (places == 2).all()
    drawn = np.asarray(naswot.sample_cells(KEY, 40)).reshape(2, 20, 6)
    params = naswot.num_params(drawn)
    start = naswot.area_start(drawn, params, 5)
    assert (naswot.num_params(start) == -np.sort(-params)[:, :5]).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: naswot.encode_cell("|conv~0|"), r"expected \|op~0\|\+"),
        (lambda: naswot.encode_cell(CONVS.replace("skip_connect", "skip")), "unknown operation 'skip'"),
        (lambda: naswot.kernels(KEY, CELLS, IMAGES[:, :4], SMALL), r"images: found shape \[6, 4, 8, 2\]"),
        (lambda: naswot.kernels(KEY, CELLS, IMAGES * np.nan, SMALL), "images: expected finite values"),
        (lambda: naswot.kernels(KEY, CELLS + 4, IMAGES, SMALL), "cells: expected"),
        (lambda: naswot.regularised_evolution(KEY, jnp.sum, 5, 10), "tournament=5, population=10, cycles=5"),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(UserError, match=message):
        call()
