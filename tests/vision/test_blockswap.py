"""BlockSwap: counts to the unit, budgets, the Fisher potential in closed form and in pieces, students, the command."""

import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack import cli
from jaxstack.core import runner
from jaxstack.core.errors import UserError
from jaxstack.nn import attention_transfer as transfer
from jaxstack.nn import classifier as classifiers
from jaxstack.nn.vision import layers, wrn, zoo
from jaxstack.nn.vision.substitutes import FORMS, KINDS, Unit, middle_of
from jaxstack.vision import blockswap as bs

KEY = jax.random.key(0)
TINY = bs.Space(10, 1.0, 4, 1)
KINDS_OF_TINY = ("DConvG2", "A2B2", "Conv")
# of the released genotypes: types, parameters, parameters of the network that the release scores
PUBLISHED = {
    "bs1.6m": (
        "Conv DConvA2 DConvA2 DConvA2 DConvA2 Conv Conv DConvA2 DConvA2 DConvA2 DConvA2 Conv Conv DConvA2 DConvA2 "
        "DConvA2 DConvA2 Conv",
        1_645_018,
        1_645_018,
    ),
    "bs800k": (
        "ConvB4 Conv A16B2 DConvA4 DConvA8 ConvB4 DConvA4 Conv DConvA16 DConvA2 Conv DConvG16 DConvG8 DConvA2 DConvA2 "
        "G8B2 G4B2 DConvA8",
        811_370,
        837_034,
    ),
    "bs500k": (
        "DConvG16 G8B2 DConvA2 DConv DConvG16 DConvG4 ConvB4 G16B2 DConvA4 DConvG8 A2B2 A4B2 DConvG2 DConvA2 DConvG16 "
        "DConvG2 DConvG16 DConvG2",
        555_962,
        None,
    ),
    "bs400k": (
        "Conv DConvG16 DConv DConvA2 ConvB2 DConvA8 DConvG2 DConvG16 DConvA8 DConvA16 DConvG8 DConvA4 DConvG4 DConvG4 "
        "A4B2 DConvG8 DConvG8 G16B2",
        404_250,
        None,
    ),
    "bs250k": (
        "DConvA16 DConvA2 DConvG4 DConvA2 A8B2 ConvB4 DConvA2 ConvB2 G4B2 DConvG8 DConvA16 A16B2 DConvG2 G16B2 DConvG4 "
        "G8B2 G2B2 G8B2",
        289_226,
        403_018,
    ),
    "bs200k": (
        "A16B2 A16B2 ConvB4 DConv G16B2 DConv A8B2 ConvB2 G2B2 DConvG16 G4B2 G8B2 DConvG2 A16B2 A8B2 A16B2 A8B2 G4B2",
        217_050,
        301_210,
    ),
    "bs150k": (
        "A2B2 G16B2 G8B4 DConv DConv A4B2 DConvG4 DConvG4 DConvG2 G2B4 A8B2 G4B2 G16B2 G2B4 G8B4 G2B2 G4B4 ConvB4",
        162_202,
        172_858,
    ),
}
BLOCKS = {  # parameters with 32, 64 and 128 channels in and out
    "Conv": (18560, 73984, 295424),
    "DConv": (2880, 9856, 36096),
    "DConvA2": (11520, 45568, 181248),
    "DConvG16": (11520, 27136, 70656),
    "ConvB2": (3456, 13568, 53760),
    "ConvB4": (1184, 4544, 17792),
    "A2B2": (2304, 8960, 35328),
    "G16B2": (3456, 8960, 26112),
    "G2B4": (752, 2528, 9152),
}


def size(tree):
    return sum(v.size for v in jax.tree.leaves(tree))


def shapes(network, image=8, channels=1):
    return jax.eval_shape(lambda key: network.init(key, jnp.zeros((1, image, image, channels))), KEY)


# Counts


def test_blocks_have_the_counts_of_the_literature():
    assert len(KINDS) == 23
    for kind, expected in BLOCKS.items():
        assert tuple(bs.block_params(kind, c, c) for c in (32, 64, 128)) == expected
    space = bs.Space()
    assert bs.rest_params(space) == 1978
    conv = bs.encode(["Conv"] * 18)
    assert bs.param_table()[np.arange(18), conv].sum() + 1978 == 2_243_546
    assert bs.candidate_params(conv) == wrn.param_count(40, 2) == 2_243_546
    assert bs.budget_range() == (84_410, 2_243_546)


@pytest.mark.parametrize("kind", KINDS)
def test_closed_form_counts_are_those_of_the_layers(kind):
    for before, out, stride in ((16, 32, 1), (32, 32, 1), (32, 64, 2)):
        block = wrn.Block(out, out, stride, kind=kind, units=1 if FORMS[kind].bottleneck else 2)
        start = jax.eval_shape(lambda key, b=block, c=before: b.init(key, jnp.zeros((1, 4, 4, c))), KEY)
        assert size(start["params"]) == bs.block_params(kind, before, out, stride)
        out_shape = jax.eval_shape(lambda v, b=block, c=before: b.apply(v, jnp.zeros((1, 4, 4, c))), start).shape
        assert out_shape == (1, 4 // stride, 4 // stride, out)


def test_published_genotypes_have_their_sizes_and_the_released_scores_another_network():
    for text, total, scored in PUBLISHED.values():
        kinds = tuple(text.split())
        assert bs.candidate_params(bs.encode(kinds)) == wrn.param_count(40, 2, kinds=kinds) == total
        compat = wrn.param_count(40, 2, kinds=kinds, reference_compat=True)
        assert scored is None or compat == scored
    kinds = tuple(PUBLISHED["bs800k"][0].split())
    for compat, total in ((False, 811_370), (True, 837_034)):
        assert size(shapes(bs.Space().network(kinds, compat), 8, 3)["params"]) == total


def test_conv_blocks_are_those_of_the_wide_residual_network():
    plain, typed = wrn.WRN(16, 0.5, 4), wrn.WRN(16, 0.5, 4, kinds=("Conv",) * 6)
    assert jax.tree.map(lambda v: v.shape, shapes(plain)) == jax.tree.map(lambda v: v.shape, shapes(typed))
    assert typed.torch_name(("block1", "conv2")) == "block1.0.layer.1.conv2.conv"
    mixed = wrn.WRN(16, 1, 4, kinds=("DConv", "A2B2", "Conv", "DConv", "DConv", "DConv"))
    paths = {tuple(k.key for k in path[1:-1]) for path, _ in jax.tree_util.tree_leaves_with_path(shapes(mixed))}
    found = {mixed.torch_name(path) for path in paths}
    assert len(found) == len(paths)
    assert {
        "block1.0.layer.0.conv1.convdw",
        "block1.0.layer.1.conv1.conv1x1_up",
        "block2.0.layer.0.convShortcut",
    } <= found


def test_substitutes_start_as_the_released_ones():
    """N(0, 2 / (k^2 C_out)), where C_out counts all channels of a grouped convolution: depthwise ones start small."""
    start = Unit("DConv", 256).init(KEY, jnp.zeros((1, 4, 4, 256)))["params"]
    assert start["convdw"]["kernel"].shape == (3, 3, 1, 256)
    assert np.std(start["convdw"]["kernel"]) == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.05)
    drawn = bs.Weights(KEY, bs.Space(10, 4.0)).variables(["DConv"] * 3)["params"]["block2"]["conv2"]
    assert drawn["convdw"]["kernel"].shape == (3, 3, 1, 256)
    assert np.std(drawn["convdw"]["kernel"]) == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.05)


# Budgets


def test_candidates_are_within_the_budget_and_draw_every_type():
    drawn = bs.sample_candidates(KEY, 800_000, n=2000)
    sizes = bs.candidate_params(drawn)
    assert drawn.shape == (2000, 18)
    assert (abs(sizes - 800_000) < 20_000).all()
    assert len(np.unique(drawn, axis=0)) == 2000
    assert set(drawn.ravel()) == set(range(23))
    counts = np.bincount(drawn[:, :6].ravel(), minlength=23) / drawn[:, :6].size  # the first stage hardly counts
    assert abs(counts - 1 / 23).max() < 0.015
    assert (bs.sample_candidates(KEY, 800_000, n=50) == drawn[:50]).all()
    one = bs.names(drawn[0])
    assert sizes[0] == size(shapes(bs.Space().network(one), 8, 3)["params"])
    assert (bs.encode(one) == drawn[0]).all()


def test_types_whose_groups_do_not_divide_are_not_drawn():
    table = bs.param_table(TINY)
    assert (table[0] < 0).sum() == 3  # A16B2, G16B2, G8B4 of 16 channels
    drawn = bs.sample_candidates(KEY, 30_000, 0.2, 200, TINY)
    assert {KINDS[i] for i in drawn[:, 0]} <= {k for k, count in zip(KINDS, table[0]) if count > 0}
    with pytest.raises(UserError, match="G8B4: found 4 channels at its 3x3 convolution, expected a multiple of 8"):
        bs.block_params("G8B4", 16, 16)
    with pytest.raises(UserError, match="A16B2: found 8 channels at its 3x3 convolution, expected a multiple of 16"):
        middle_of("A16B2", 16, 16)
    with pytest.raises(UserError, match="candidates: G8B4 does not fit block 0"):
        bs.candidate_params(bs.encode(["G8B4", "Conv", "Conv"]), TINY)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: bs.sample_candidates(KEY, 50_000),
            "budget=50000: expected 84410 to 2243546 parameters, those of the smallest and the largest candidate",
        ),
        (lambda: bs.sample_candidates(KEY, 3e6), "budget=3e"),
        (lambda: bs.sample_candidates(KEY, 30_000, 1e-9, 5, TINY), "found 0 candidates within 0.0%"),
        (lambda: bs.sample_candidates(KEY, 30_000, 0.1, 0, TINY), "n=0, tol=0.1: expected at least 1 candidate"),
        (lambda: bs.names(["Conv3"]), "unknown block type 'Conv3'"),
        (lambda: wrn.WRN(10, 1, kinds=("Conv",)).middle(), "block types: found 1, expected 3"),
        (
            lambda: wrn.WRN(10, 1, 10, (1, 1, 1), kinds=("Conv",) * 3).middle(),
            "mid_features: found .* for a network of given block types",
        ),
        (lambda: zoo.network("lenet", kinds=("Conv",)), "block types: lenet takes none"),
        (lambda: bs.matching_width("Conv", 100, 10), r"target=100: expected at least \d+"),
        (lambda: bs.Scorer(KEY, []), "batches: found none"),
        (lambda: bs.candidate_params([[0, 1]], TINY), "candidates: found 2 types, expected 3, one for each block"),
    ],
)
def test_wrong_values_are_named(call, message, monkeypatch):
    monkeypatch.setattr(bs, "DRAWS", 2)
    with pytest.raises(UserError, match=message):
        call()


def test_networks_of_one_type_have_the_largest_width_that_is_allowed():
    for kind in ("Conv", "DConv", "A2B2"):
        width = bs.matching_width(kind, 61_000, 16, channels=1)
        count = lambda w, kind=kind: wrn.param_count(16, w, None, 10, 1, [kind] * 6)
        assert count(width) <= 61_000
        step = 1 / 64
        while not all(bs.fits(kind, a, b) for a, b, _ in bs.Space(16, width + step).blocks()):
            step += 1 / 64
        assert count(width + step) > 61_000


# Fisher potential


def batch(count=6, channels=1):
    return jax.random.normal(KEY, (count, 8, 8, channels)), jnp.arange(count) % 4


def test_the_potential_of_a_linear_branch_has_its_closed_form():
    """L = sum_n w.a_n / N: Delta_c = 1/2 mean_n (sum over pixels of w_c a_nc / N)^2, and scores grow with t^2."""
    rng = np.random.default_rng(0)
    a, w = rng.normal(size=(5, 3, 2, 4)).astype(np.float32), rng.normal(size=4).astype(np.float32)

    def apply(params, x, added):
        branch = x if added is None else x + added[0]
        return (branch * params).sum((1, 2, 3)), [branch]

    mean = lambda outputs, labels: outputs.mean()
    total, per_block = bs.fisher_potential(apply, w, (a, None), loss=mean)
    expected = 0.5 * np.square((a * w).sum((1, 2)) / 5).mean(0)
    assert total == pytest.approx(expected.sum(), rel=1e-5)
    assert per_block.shape == (1,)
    averaged, _ = bs.fisher_potential(apply, w, (a, None), "mean", mean)
    assert averaged == pytest.approx(expected.mean(), rel=1e-5)
    thrice, _ = bs.fisher_potential(apply, w, (a, None), loss=lambda outputs, labels: 3 * outputs.mean())
    assert thrice == pytest.approx(9 * float(total), rel=1e-5)


def test_pieces_give_the_potential_of_the_whole_network_and_compile_once_for_each_type_and_shape():
    scorer = bs.Scorer(KEY, [batch()], TINY)
    variables, network = scorer.weights.variables(KINDS_OF_TINY), TINY.network(KINDS_OF_TINY)
    own = jax.tree.map(lambda v: (v.shape, v.dtype), shapes(network))
    assert own == jax.tree.map(lambda v: (v.shape, v.dtype), variables)

    @jax.jit
    def whole(variables):
        potential = bs.fisher_potential(bs.observed(network), variables, batch())[1]
        x, y = batch()
        loss = lambda params: bs.mean_cross_entropy(
            network.apply({**variables, "params": params}, x, True, mutable=["batch_stats"])[0], y
        )
        squares = sum(jnp.square(g).sum() for g in jax.tree.leaves(jax.grad(loss)(variables["params"])))
        return potential, jnp.sqrt(squares)

    potential, norm = whole(variables)
    pieces = scorer.fisher(KINDS_OF_TINY)
    np.testing.assert_allclose(pieces, potential, rtol=1e-4)
    assert (pieces > 0).all()
    means = scorer.fisher(KINDS_OF_TINY, "mean")
    np.testing.assert_allclose(means * [16, 32, 64], pieces, rtol=1e-5)
    assert scorer.gradient_norm(KINDS_OF_TINY) == pytest.approx(float(norm), rel=1e-4)
    # every mixture of the same types in the same places is made of the programs that are there
    other = ("Conv", "DConv", "DConvA4")
    assert scorer.prepare([other]) == 3
    counted = lambda: [f._cache_size() for f in (bs._forward, bs._back, bs._top, bs._stem, bs._information)]
    scorer.fisher(other)
    before = counted()
    mixtures = np.array(np.meshgrid(*zip(bs.encode(KINDS_OF_TINY), bs.encode(other)))).reshape(3, -1).T
    found = [scorer.fisher(c).sum() for c in mixtures]
    assert len(set(found)) == 8
    assert counted() == before
    # two minibatches: the sum of both
    x, y = batch()
    two = bs.Scorer(KEY, [(x, y), (x[::-1] * 2, y)], TINY).fisher(KINDS_OF_TINY)
    second = bs.Scorer(KEY, [(x[::-1] * 2, y)], TINY).fisher(KINDS_OF_TINY)
    np.testing.assert_allclose(two, pieces + second, rtol=1e-4)


def test_a_last_convolution_of_zeros_has_no_potential_and_the_release_counts_other_units():
    space = bs.Space(16, 0.25, 4, 1)
    kinds = ("ConvB2", "Conv", "Conv", "ConvB2", "Conv", "Conv")
    network = space.network(kinds, reference_compat=True)
    variables = bs.Weights(KEY, space, reference_compat=True).variables(kinds)
    assert [sum(k.startswith("conv") for k in variables["params"][f"block{i}"]) for i in range(4)] == [1, 1, 2, 2]
    kernel = variables["params"]["block2"]["conv2"]["kernel"]
    variables["params"]["block2"]["conv2"] = {"kernel": jnp.zeros_like(kernel)}
    _, per_block = jax.jit(lambda v: bs.fisher_potential(bs.observed(network), v, batch()))(variables)
    assert per_block[2] == 0
    assert (np.delete(per_block, 2) > 0).all()


def test_the_gradient_by_zeros_is_the_one_by_the_output():
    """Against central differences of the output of a block's branch, in float64."""
    with jax.enable_x64(True):
        network = wrn.WRN(10, 0.25, 3)
        x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 4, 1)))
        start = network.init(KEY, x)
        variables = jax.tree.map(lambda v: v.astype(jnp.float64), start)
        apply = bs.observed(network)
        _, branches = apply(variables, x, None)
        zeros = [jnp.zeros_like(b) for b in branches]
        y = jnp.arange(3)
        loss = jax.jit(lambda added: bs.mean_cross_entropy(apply(variables, x, added)[0], y))
        grads = jax.jit(jax.grad(loss))(zeros)
        rng = np.random.default_rng(1)
        for i, zero in enumerate(zeros):
            way = jnp.asarray(rng.normal(size=zero.shape))
            moved = lambda t, i=i, way=way: [t * way if j == i else z for j, z in enumerate(zeros)]
            slope = (loss(moved(1e-5)) - loss(moved(-1e-5))) / 2e-5
            assert slope == pytest.approx(float((grads[i] * way).sum()), abs=1e-6, rel=1e-6)


def test_a_network_is_not_changed_by_being_observed():
    network = wrn.WRN(10, 0.25, 3)
    x, _ = batch()
    start = network.init(KEY, x)
    assert set(start) == {"params", "batch_stats"}
    logits, branches = bs.observed(network)(start, x, None)
    plain, kept = network.apply(start, x, True, mutable=["batch_stats"])
    assert set(kept) == {"batch_stats"}
    assert (logits == plain).all()
    assert [b.shape for b in branches] == [(6, 8, 8, 4), (6, 4, 4, 8), (6, 2, 2, 16)]

    class Lone(nn.Module):
        @nn.compact
        def __call__(self, x):
            return layers.branch_output(self, x)

    assert Lone().apply({"perturbations": {"branch": jnp.ones(2)}}, jnp.zeros(2)).tolist() == [1, 1]


# Students


def test_attention_transfer_is_zero_for_equal_maps_and_two_over_size_for_orthogonal_ones():
    a = jnp.abs(jax.random.normal(KEY, (2, 3, 4, 5))) + 0.1
    assert transfer.attention_transfer_loss([a], [a]) == 0
    assert transfer.attention_transfer_loss([a], [2.5 * a]) == pytest.approx(0, abs=1e-12)
    first, second = (jnp.zeros((1, 3, 4, 2)).at[0, 0, i].set(3.0) for i in (0, 1))
    assert transfer.attention_transfer_loss([first], [second]) == pytest.approx(2 / 12, rel=1e-6)
    maps = transfer.attention_maps([a, a[:, :2]])
    hypers = transfer.Hypers(beta=30.0)
    logits, labels = jnp.zeros((2, 4)), jnp.array([0, 3])
    value = transfer.labels_and_maps((logits, (a, a[:, :2])), (labels, maps), hypers)
    np.testing.assert_allclose(value, np.log(4), rtol=1e-6)
    moved = transfer.labels_and_maps((logits, (a, a[:, 1:3])), (labels, maps), hypers)
    gap = transfer.map_distance(maps[1:], transfer.attention_maps([a[:, 1:3]]))
    np.testing.assert_allclose(moved, np.log(4) + 45.0 * gap, rtol=1e-5)  # 3 beta over 2 stages
    with pytest.raises(UserError, match="attention: found stages of "):
        transfer.labels_and_maps((logits, (a,)), (labels, maps), hypers)


def test_a_student_learns_labels_and_its_teachers_maps():
    """A frozen teacher that is asked, and its maps in the data, are the same; the weight of the attention counts."""
    network = TINY.network(("DConv", "A2B2", "DConv"))
    x, y = (np.asarray(v) for v in batch(12))
    teacher = wrn.WRN(10, 0.25, 4)
    student, frozen = (transfer.with_taps(net, jnp.zeros((1, 8, 8, 1))) for net in (network, teacher))
    teachers = jax.tree.map(lambda v: v[None], frozen.init(KEY))
    maps = transfer.attention_maps(frozen.apply(jax.tree.map(lambda v: v[0], teachers), x)[1])
    options: dict[str, Any] = dict(num_updates=8, batch_size=12, hypers=transfer.Hypers(lr=0.05, beta=20.0))
    asked, given = transfer.taught(student, frozen, teachers, **options), transfer.taught(student, **options)
    begun = jax.jit(asked.init)(KEY, asked.hypers, jax.tree.map(lambda v: v[0], teachers))
    other = begun._replace(teacher=())
    same, told = jax.jit(asked.step), jax.jit(given.step)
    one, _ = same(begun, (x, y))
    two, first = told(other, (x, (y, maps)))
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one.teacher, begun.teacher))
    alone, _ = told(other._replace(hypers=other.hypers._replace(beta=jnp.float32(0.0))), (x, (y, maps)))
    assert not np.allclose(alone.params["stem"]["kernel"], two.params["stem"]["kernel"], atol=1e-6)
    for _ in range(7):
        two, last = told(two, (x, (y, maps)))
    assert last["loss/train"] < first["loss/train"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    learner = classifiers.classifier(model="wrn-10-1", num_updates=1, batch_size=16, size=4)
    state = jax.jit(learner.init)(KEY, learner.hypers)
    return runner.save(learner, jax.tree.map(lambda v: v[None], state), [0], tmp_path_factory.mktemp("runs") / "base")


def test_the_command_stores_a_student_of_the_budget(run_dir, tmp_path, capsys):
    out = tmp_path / "small"
    options = ["--method", "blockswap", "--budget", "0.35", "--candidates", "2", "--updates", "2", "--batch-size", "8"]
    assert cli.main(["compress", str(run_dir), *options, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    facts = json.loads((out / "compress.json").read_text())
    learner, _ = cli.runs.load(str(out))
    assert learner.config.kinds == tuple(facts["kinds"])
    assert len(facts["kinds"]) == 3
    assert " ".join(facts["kinds"]) in printed
    whole = wrn.param_count(10, 1, None, 10, 1)
    count = wrn.param_count(10, 1, None, 10, 1, facts["kinds"])
    assert abs(count / whole - 0.35) < 0.025 * 0.35
    assert facts["networks"][str(out)]["parameters"] == count
    assert (facts["method"], facts["budget"], facts["candidates"], facts["updates"]) == ("blockswap", 0.35, 2, 2)
    assert cli.main(["evaluate", str(out)]) == 0
    accuracy = float(capsys.readouterr().out.split("eval/accuracy: ")[1].split()[0])
    assert facts["networks"][str(out)]["valid_error"] == pytest.approx(1 - accuracy, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "0.01"], "--budget 0.01: expected 0.08089 to 1.007, or 6274 to 78138 parameters"),
        (["--budget", "1.01"], "parameters, those of the smallest and the largest candidate"),
        ([], "--budget: expected a share of the run's parameters, or their number, with --method blockswap"),
        (["--budget", "0.35", "--keep", "0.5"], "--keep 0.5: found with --method blockswap, expected --budget"),
        (["--budget", "0.35", "--candidates", "0"], "--candidates 0"),
        (["--budget", "0.35", "--minibatches", "0"], "--minibatches 0"),
        (["--budget", "0.35", "--beta", "-1"], "--beta -1"),
        (["--budget", "0.35", "--batch-size", "9999"], "--batch-size 9999: expected 1 to 1258"),
        (["--method", "fisher", "--budget", "0.35"], "--budget 0.35: found with --method fisher, expected --keep"),
    ],
)
def test_the_command_refuses_in_one_line(options, message, run_dir, tmp_path, capsys):
    options = options if "--method" in options else ["--method", "blockswap", *options]
    assert cli.main(["compress", str(run_dir), "--out", str(tmp_path / "o"), *options]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "o").exists()
