"""The acceleration stack: primitives, types and sparse forms agree, counts are exact, grids continue, winners are timed
again."""

import dataclasses
import io
import json
import os
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.sparse import csr_matrix

from jaxstack import cli
from jaxstack.core.errors import UserError
from jaxstack.nn import compression, deployment
from jaxstack.nn import conv_forms as forms
from jaxstack.nn import lowering as low
from jaxstack.nn.deployment import Form, Net
from jaxstack.nn.lowering import Choice
from jaxstack.nn.vision import zoo
from jaxstack.nn.vision.folding import Folded, fold_batchnorm
from jaxstack.vision import dlas
from jaxstack.vision.dlas import StackConfig

KEY = jax.random.key(0)
SMALL = {"vgg-small": (3, 2, 4, 4, 6, 5), "resnet-8": (3, 4, 5, 2, 3, 4), "mobilenet-small": (3, 4, 4, *(5,) * 6)}
CHOICES = (
    *(Choice(p, layout) for p in ("xla", "gemm") for layout in ("nhwc", "nchw")),
    Choice("direct"),
    Choice("spatial-pack"),
    Choice("spatial-pack", "nhwc", 2, 4),
)


def random_like(shapes, seed=0):
    """Variables of that form, norms and statistics away from their start."""
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        if path[-1].key in ("scale", "var"):
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32)
        spread = (2 / np.prod(leaf.shape[:-1])) ** 0.5 if leaf.ndim > 1 else 0.2
        return jnp.asarray(spread * rng.standard_normal(leaf.shape, np.float32))

    return jax.tree_util.tree_map_with_path(one, shapes)


def plainly(name, *layer):
    return low.multiplied(*layer)


def net_of(name, kind="none"):
    network = zoo.network(name, 3, mid_features=SMALL[name])
    x = jax.ShapeDtypeStruct((1, 8, 8, 2), jnp.float32)
    variables = random_like(jax.eval_shape(lambda: network.init(KEY, jnp.zeros(x.shape))))
    return Net(name, 3, SMALL[name], kind, variables), network, x


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_all_primitives_are_xlas_convolution(stride, groups):
    x = jax.random.normal(KEY, (2, 8, 7, 8))
    w = jax.random.normal(jax.random.key(1), (3, 3, 8 // groups, 8))
    window = forms.window_of(x.shape, w.shape, groups, stride, ((1, 1), (0, 1)))
    whole = lambda v: jnp.round(40 * v).clip(-127, 127).astype(jnp.int8)

    @jax.jit
    def run(x, w):
        xs, ws = whole(x), whole(w)
        floats = [forms.conv_plain(x, w, window=window)]
        exact = [forms.conv_plain(xs.astype(jnp.float32), ws.astype(jnp.float32), window=window)]
        for choice in CHOICES:
            floats.append(low.lowered(x, w, window=window, choice=choice))
            exact.append(low.lowered(xs, ws, window=window, choice=choice))
        return floats, exact

    floats, exact = run(x, w)
    for out, integers in zip(floats[1:], exact[1:]):
        np.testing.assert_allclose(out, floats[0], rtol=1e-4, atol=1e-4)
        assert integers.dtype == jnp.int32
        np.testing.assert_array_equal(integers, exact[0])
    if groups == 1:
        for kept in (w, jnp.where(jnp.abs(w) > 1, w, 0)):  # dense, and with zeros
            wanted = forms.conv_plain(x, kept, window=window)
            matrix = csr_matrix(low.as_matrix(kept))
            assert matrix.nnz == np.count_nonzero(kept)
            found = low.conv_gemm_csr(np.asarray(x), matrix, window=window)
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
            found = jax.jit(lambda x, m: low.conv_gemm_bcoo(x, m, window=window))(x, low.as_bcoo(kept))
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    same = low.conv2d(x, w, stride, ((1, 1), (0, 1)), groups=groups, primitive="gemm")
    np.testing.assert_allclose(same, floats[0], rtol=1e-4, atol=1e-4)


def products(jaxpr, times=1):
    """Multiply-adds of the dot products of a program, in loops too."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (over, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += times * int(np.prod(eqn.outvars[0].aval.shape)) * int(np.prod([shape[i] for i in over]))
        length = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for inner in jax.core.jaxprs_in_params(eqn.params):
            total += products(inner, times * length)
    return total


def test_no_primitive_does_more_work_than_another():
    layer = low.Layer("a", (1, 8, 6, 4), (3, 3, 4, 8), forms.window_of((1, 8, 6, 4), (3, 3, 4, 8), 1, 2))
    assert layer.macs == 4 * 3 * 9 * 4 * 8 == layer.uses * 9 * 4 * 8
    x, w = jnp.zeros(layer.image), jnp.zeros(layer.kernel)
    for choice in (Choice("direct"), Choice("gemm"), *dlas_tiles(layer)):
        form = lambda x, w, c=choice: low.lowered(x, w, window=layer.window, choice=c)
        assert products(jax.make_jaxpr(form)(x, w).jaxpr) == layer.macs


def dlas_tiles(layer):
    return [c for c in deployment.search_space(layer) if c.primitive == "spatial-pack"]


@pytest.mark.parametrize(
    ("name", "channels", "conv_macs", "fc"),
    [("resnet-18", 3, 555_417_600, 5_120), ("wrn-40-2", 3, 327_598_080, 1_280), ("wrn-16-1", 3, 26_656_768, 640)],
)
def test_work_is_counted_from_shapes(name, channels, conv_macs, fc):
    assert low.count_macs(zoo.network(name), (1, 32, 32, channels)) == {"conv": conv_macs, "fc": fc}


def test_work_of_efficientnet_is_that_of_its_public_form():
    found = low.count_macs(zoo.network("efficientnet-b0", 1000), (1, 224, 224, 3))
    assert found == {"conv": 384_534_752, "fc": 1_280_000}


def test_masks_keep_an_exact_number_of_the_largest():
    params = {"a": {"kernel": jax.random.normal(KEY, (3, 3, 5, 11)), "bias": jnp.zeros(11)}, "b": jnp.ones((5, 101))}
    n = 495 + 505
    assert compression.weight_count(params) == n
    for sparsity, kept in ((0.0, n), (0.9, 100), (0.95, 50), (0.333, 667), (0.98, 20)):
        masks = jax.jit(compression.masks_of_count)(params, compression.kept_count(n, sparsity))
        count = sum(int(m.sum()) for m in jax.tree.leaves(masks) if m.ndim)
        assert count == compression.kept_count(n, sparsity) == kept
        eager = compression.magnitude_masks(params, sparsity)
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), masks, eager))
    own = compression.apply_masks(params, compression.magnitude_masks(params, 0.9))
    flat = np.concatenate([np.abs(p).ravel() for p in (params["a"]["kernel"], params["b"])])
    left = np.concatenate([np.abs(p).ravel() for p in (own["a"]["kernel"], own["b"])])
    np.testing.assert_array_equal(np.sort(left)[-100:], np.sort(flat)[-100:])
    assert (own["a"]["bias"] == params["a"]["bias"]).all()
    s = np.array([compression.gradual_sparsity(t, 20, 0.9) for t in range(25)])
    assert s[0] == 0
    assert s[20] == pytest.approx(0.9)
    assert (np.diff(s[:21]) > 0).all()
    assert (s[20:] == s[20]).all()
    assert s[10] == pytest.approx(0.9 * (1 - 0.125))
    assert [dlas.schedule(n, 0.9, 1000) for n in range(5)] == [366, 133, 100, 100, 100]
    with pytest.raises(UserError, match=r"sparsity=1: expected a share in \[0, 1\)"):
        compression.magnitude_masks(params, 1.0)


@pytest.mark.parametrize("name", SMALL)
def test_pruned_folded_and_hosted_networks_are_the_masked_one(name):
    """Channels of no scale or shift give zeros, so removing them changes nothing."""
    net, network, x = net_of(name)
    widths, small = compression.channel_prune(network, net.variables, 0.5)
    assert widths == tuple(compression.channels_kept(w, 0.5) for w in SMALL[name])
    silent = jax.tree.map(jnp.copy, net.variables)
    for space, whole in zip(network.spaces(), SMALL[name]):
        worth = sum(jnp.abs(net.variables["params"][p]["kernel"]).sum((0, 1, 2)) for p in space.producers)
        gone = jnp.argsort(worth)[: whole // 2]
        for norm in (f for f in space.followers if "scale" in net.variables["params"][f]):
            for part in ("scale", "bias"):
                silent["params"][norm][part] = silent["params"][norm][part].at[gone].set(0.0)
    image = jax.random.normal(KEY, x.shape)
    smaller = zoo.network(name, 3, mid_features=widths)

    @jax.jit
    def run(image, silent, small, variables):
        folded, fewer = fold_batchnorm(network, variables, image)
        assert len(jax.tree.leaves(fewer["batch_stats"])) == 0
        plain = network.apply(variables, image)
        by = low.apply_by(folded, fewer, image, plainly)
        return network.apply(silent, image), smaller.apply(small, image), plain, by

    masked, pruned, plain, folded = run(image, silent, small, net.variables)
    np.testing.assert_allclose(pruned, masked, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(folded, plain, rtol=1e-5, atol=1e-5)
    sparse = net._replace(kind="weights")
    hosted = deployment.program(sparse, Form("gemm", "csr"), x.shape)
    np.testing.assert_allclose(hosted.call(image), plain, rtol=1e-4, atol=1e-5)
    for share, left in ((0.0, 5), (0.75, 2), (0.99, 1)):
        assert compression.channels_kept(5, share) == left


def test_int8_is_exact_in_integers_and_close_in_floats():
    kernel = jax.random.normal(KEY, (3, 3, 4, 6)).at[..., 2].set(0.0)
    q, scale = compression.int8_kernel(kernel)
    assert (jnp.abs(q * scale - kernel) <= scale / 2 * (1 + 1e-5)).all()
    assert scale[2] == 1
    whole = jax.random.randint(KEY, (3, 3, 4, 6), -127, 128).at[0, 0, 0].set(127).astype(jnp.float32)
    q, scale = compression.int8_kernel(whole)
    np.testing.assert_array_equal(scale, 1.0)
    np.testing.assert_array_equal(q, whole)

    net, network, x = net_of("mobilenet-small", "int8")
    images = jax.random.normal(KEY, (9, *x.shape[1:]))
    folded, fewer = fold_batchnorm(network, net.variables, x)

    @jax.jit
    def run(fewer, images):
        quantised = compression.quantize_int8(folded, fewer, images)
        forms = [compression.apply_int8(folded, fewer, quantised, images, Choice(p)) for p in low.PRIMITIVES]
        simulated = compression.apply_int8(folded, fewer, quantised, images, simulated=True)
        floats = low.apply_by(folded, fewer, images, plainly)
        clipped = compression.quantize_int8(folded, fewer, images, 90.0)
        return forms, simulated, floats, quantised, clipped

    forms, simulated, floats, quantised, clipped = run(fewer, images)
    for out in forms:
        np.testing.assert_allclose(out, simulated, rtol=1e-6, atol=1e-6)
    assert 0 < jnp.abs(simulated - floats).max() < 0.1 * jnp.abs(floats).max()
    assert all(k.dtype == jnp.int8 for k in quantised.kernels.values())
    assert quantised.inputs["stem"] == pytest.approx(float(jnp.abs(images).max()) / 127)
    assert all(clipped.inputs[name] < quantised.inputs[name] for name in quantised.inputs)
    with pytest.raises(UserError, match="calibration: found 0 images, expected at least 1 for the scales of int8"):
        compression.quantize_int8(folded, fewer, images[:0])


TEXT = """
%fused (param_0: f32[1,4,4,2], param_1: f32[3,3,2,2]) -> f32[1,4,4,2] {
  %param_0 = f32[1,4,4,2]{3,2,1,0} parameter(0)
  %param_1 = f32[3,3,2,2]{3,2,1,0} parameter(1)
  ROOT %c.0 = f32[1,4,4,2]{3,2,1,0} convolution(%param_0, %param_1), window={size=3x3 pad=1_1x1_1}
}
ENTRY %main (x: s8[4,8]) -> s32[4,2] {
  %x = s8[4,8]{1,0} parameter(0)
  %param_1 = s8[8,2]{1,0} constant({...})
  ROOT %dot.1 = s32[4,2]{1,0} dot(%x, %param_1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


def test_types_are_read_from_what_was_compiled():
    assert low.computed_types(TEXT) == ("f32", "s8->s32")
    assert low.computed_types(TEXT.replace("f32", "bf16")) == ("bf16", "s8->s32")
    net, network, x = net_of("vgg-small")
    folded, fewer = fold_batchnorm(network, net.variables, x)
    quantised = compression.quantize_int8(folded, fewer, jnp.ones((2, *x.shape[1:])))
    found = {
        kind: deployment.program(net._replace(kind=kind, quantised=quantised), Form(), x.shape).computed
        for kind in ("none", "int8")
    }
    assert found["none"] == ("f32",)
    assert all(kind.endswith("s32") for kind in found["int8"])


def test_sizes_are_those_of_the_stored_numbers(tmp_path):
    net, _, x = net_of("vgg-small")
    masks = compression.magnitude_masks(net.variables["params"], 0.75)
    sparse = net._replace(kind="weights", variables={**net.variables})
    sparse.variables["params"] = compression.apply_masks(net.variables["params"], masks)
    _, own, layers = deployment.ready_net(sparse, x.shape)
    kernels = [v["kernel"] for v in own.variables["params"].values()]
    biases = sum(v["bias"].size for v in own.variables["params"].values())
    matrices = [csr_matrix(np.asarray(k).reshape(-1, k.shape[-1]).T) for k in kernels]
    total = sum(m.data.nbytes + m.indices.nbytes + m.indptr.nbytes for m in matrices) + 4 * biases
    assert deployment.stored_bytes(sparse, x.shape) == total
    assert low.csr_bytes(10, 3) == 8 * 10 + 4 * 4
    path = tmp_path / "dense.npz"
    np.savez(path, **{str(i): v for i, v in enumerate(jax.tree.leaves(own.variables))})
    dense = deployment.stored_bytes(net, x.shape)
    assert dense <= path.stat().st_size <= dense + 400 * len(jax.tree.leaves(own.variables))
    weights = sum(k.size for k in kernels)
    assert deployment.stored_bytes(net._replace(kind="float16"), x.shape) == dense // 2
    scales = sum(k.shape[-1] + 1 for k in kernels)
    assert deployment.stored_bytes(net._replace(kind="int8"), x.shape) == dense - 3 * weights + 4 * scales
    assert deployment.parameter_count(net) - deployment.parameter_count(sparse) == weights - weights // 4
    left = sum(v.uses * np.count_nonzero(own.variables["params"][v.name]["kernel"]) for v in layers)
    assert deployment.multiply_adds(sparse, x.shape) == left
    kept = deployment.weights_for(net, left, x.shape)
    assert kept == weights // 4
    assert deployment.weights_for(net, left - 1, x.shape) < kept
    assert deployment.multiply_adds(net, x.shape) == sum(layer.macs for layer in layers)
    assert deployment.multiply_adds(sparse._replace(kind="none"), (7, *x.shape[1:])) == sum(v.macs for v in layers)


def test_the_winner_of_a_search_is_timed_again(monkeypatch):
    layers = [
        low.Layer(name, (1, 4, 4, 4), (3, 3, 4, 8), forms.window_of((1, 4, 4, 4), (3, 3, 4, 8), 1)) for name in "ab"
    ]
    depthwise = low.Layer("c", (1, 4, 4, 4), (3, 3, 1, 4), forms.window_of((1, 4, 4, 4), (3, 3, 1, 4), 4))
    dense = low.Layer("d", (1, 8), (8, 3), None)
    asked = []

    def times(layer, choices, repeats, at_least):
        asked.append((layer.name, choices, repeats))
        # lucky in the search, slow when it is timed again
        slow = {Choice("spatial-pack", "nhwc", 1, 8): 0.1 if repeats == 3 else 5.0, Choice("direct"): 0.5}
        return {c: deployment.timing.Timing((slow.get(c, 1.0),) * repeats) for c in choices}

    monkeypatch.setattr(deployment, "layer_times", times)
    found = deployment.tune([*layers, depthwise, dense], trials=40, repeats=4)
    assert list(found) == ["a", "b", "c"]
    assert found["a"] is found["b"]
    assert found["a"].choice == Choice("direct")
    assert set(found["a"].first) == {str(c) for c in deployment.search_space(layers[0])}
    assert found["a"].again["spatial-pack 1x8"] == (5.0,) * 4
    assert "xla" in found["a"].again
    assert found["c"].choice == Choice("direct")
    assert "gemm" not in found["c"].first
    assert [n for n, _, repeats in asked if repeats == 4] == ["a", "c"]
    few = deployment.tune(layers, trials=6, repeats=1)["a"]
    assert len(few.first) == 6
    assert list(few.first)[:4] == ["xla", "direct", "gemm", "spatial-pack 4x8"]
    space = deployment.search_space(layers[0])
    near = deployment.neighbours(Choice("spatial-pack", "nhwc", 2, 8), space)
    assert {(c.rows, c.lanes) for c in near} == {(1, 8), (4, 8)}
    with pytest.raises(UserError, match="trials=0: expected at least 1"):
        deployment.tune(layers, trials=0)


FAST = dict(updates=10, tune_updates=5, batch_size=16, size=8, train_images=64, test_images=50, calibration=8)
FAST |= dict(repeats=2, trials=1)


@pytest.fixture(scope="module")
def points():
    one = StackConfig(**FAST)
    change = lambda **options: dataclasses.replace(one, **options)
    return {
        "dense": one,
        "gemm": change(primitive="gemm"),
        "none gone": change(compression="weights"),
        "csr": change(compression="weights", level=0.9, primitive="gemm", sparse="csr"),
        "int8": change(compression="int8"),
    }


def test_a_grid_continues_from_its_file(points, tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    told = []
    found = dlas.run_grid(points.values(), path, lambda config, result: told.append(config))
    assert list(found) == list(points.values())
    assert set(told) == set(found)
    r = {name: found[point] for name, point in points.items()}
    assert r["dense"].t_expected == r["dense"].t_dense == r["dense"].t_median
    assert r["dense"].efficiency == 1
    assert r["gemm"].t_dense == r["dense"].t_dense  # timed in turn
    assert r["none gone"].t_expected == r["none gone"].t_dense
    assert r["none gone"].accuracy == r["dense"].accuracy
    dense = dlas.compressed(points["dense"])
    whole = compression.weight_count(dense.variables["params"])
    own = dlas.compressed(points["csr"])
    gone = r["dense"].params - r["csr"].params
    assert gone == whole - compression.kept_count(whole, 0.9)
    again = compression.magnitude_masks(own.variables["params"], 0.9)  # what is kept is not zero
    assert jax.tree.all(
        jax.tree.map(lambda m, p: bool((m == (p != 0)).all()) or m.ndim == 0, again, own.variables["params"])
    )
    assert r["csr"].t_expected == pytest.approx(r["csr"].t_dense * r["csr"].macs / r["dense"].macs)
    assert r["int8"].macs == r["dense"].macs
    assert r["int8"].bytes < r["dense"].bytes / 3
    for one in r.values():
        assert 0 < one.t_min <= one.t_median
        assert one.accuracy * 50 == pytest.approx(round(one.accuracy * 50))

    monkeypatch.setattr(dlas, "_run", lambda group: pytest.fail(f"ran {group}"))
    assert dlas.run_grid(points.values(), path) == found
    whole_text = path.read_text()
    path.write_text(whole_text + '{"config": {"mod')  # died while it wrote
    assert dlas.run_grid(points.values(), path) == found
    assert path.read_text() == whole_text
    path.write_text("{}\n" + whole_text)
    with pytest.raises(UserError, match="line 1 is damaged, expected a result of the stack as JSON"):
        dlas.run_grid(points.values(), path)


def test_a_process_of_its_own_measures_on_fewer_cores(monkeypatch):
    net, _, x = net_of("resnet-8")
    (found,) = deployment.measure_on("cpu-1", net, [(net, Form("gemm"))], x.shape, repeats=2)
    assert len(found.seconds) == len(found.dense) == 2
    assert found.computed == ("f32",)

    def child(command, input, **options):
        """What the process does, in this one."""
        streams = SimpleNamespace(buffer=io.BytesIO(input)), SimpleNamespace(buffer=io.BytesIO())
        with monkeypatch.context() as m:
            m.setattr(os, "sched_setaffinity", lambda process, cores: kept.extend(cores))
            m.setattr(sys, "stdin", streams[0])
            m.setattr(sys, "stdout", streams[1])
            deployment._child()
        return SimpleNamespace(returncode=0, stdout=streams[1].buffer.getvalue())

    kept = []
    monkeypatch.setattr(deployment.subprocess, "run", child)
    with pytest.raises(UserError, match="unknown primitive 'no'"):
        deployment.measure_on("cpu-1", net, [(net, Form("no"))], x.shape)
    assert kept == deployment.available_cores()[:1]
    broken = SimpleNamespace(returncode=1, stderr=b"Traceback\nMemoryError: no room\n")
    monkeypatch.setattr(deployment.subprocess, "run", lambda *args, **options: broken)
    with pytest.raises(UserError, match=r"device='cpu-1': the measuring process failed \(MemoryError: no room\)"):
        deployment.measure_on("cpu-1", net, [], x.shape)


def test_operating_points_are_at_equal_accuracy():
    result = dlas.StackResult(0.9, 0.9, 100, 100, 400, 1.0, 1.0, 1.0, 1.0, ("f32",), {})
    one = StackConfig()
    at = lambda kind, level, **options: dataclasses.replace(one, compression=kind, level=level, **options)
    results = {
        one: result,
        at("weights", 0.5): result._replace(valid_accuracy=0.895),
        at("weights", 0.9): result._replace(valid_accuracy=0.892, t_median=3.0),
        at("weights", 0.9, primitive="gemm", sparse="csr"): result._replace(valid_accuracy=0.892, t_median=2.0),
        at("weights", 0.95): result._replace(valid_accuracy=0.88, accuracy=0.99),
        at("channels", 0.5): result._replace(valid_accuracy=0.7),
    }
    found = dlas.operating_points(results)
    assert found == {
        ("resnet-8", "none"): one,
        ("resnet-8", "weights"): at("weights", 0.9, primitive="gemm", sparse="csr"),
    }
    del results[one]
    with pytest.raises(UserError, match="found no dense network of resnet-8"):
        dlas.operating_points(results)


def test_grids_hold_each_point_once():
    points = dlas.grid(["resnet-8", "vgg-small"], [0.5, 0.9], devices=("cpu", "cpu-1"))
    assert len(set(points)) == len(points) == 2 * 2 * (5 + 2 * 3 + 2 * 2 + 1 + 1 + 2)
    assert {p.compression for p in dlas.grid(["resnet-8"], [0.5], ["int8"])} == {"none", "int8"}


def test_the_command_prints_stores_and_continues(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    options = ["--models", "resnet-8", "--levels", "0.5", "--compressions", "weights", "--primitives", "gemm"]
    options += [part for name, value in FAST.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command = ["dlas", *options, "--out", str(out)]
    assert cli.main(command) == 0
    text = capsys.readouterr().out
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(lines) == 5
    assert all(line["result"]["t_median"] > 0 for line in lines)
    assert "weights 0.5, csr" in text
    assert "none, tuned" in text
    assert "rank correlation of parameters and time" in text
    assert (out / "stack.png").exists()
    assert len((out / "results.csv").read_text().splitlines()) == 6
    monkeypatch.setattr(dlas, "_run", lambda group: pytest.fail(f"ran {group}"))
    assert cli.main(command) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--levels", "1.5"], "level=1.5: expected a share in [0, 1)"),
        (["--models", "resnet-9"], "model='resnet-9': expected one of"),
        (["--models", "lenet"], "model='lenet': expected vgg-small, resnet-8"),
        (["--calibration", "0"], "calibration=0: expected at least 1 image for the scales of int8"),
        (["--calibration", "5000", "--compressions", "int8"], "calibration=5000: expected at most"),
        (["--devices", "gpu"], "device='gpu': expected cpu or cpu-N"),
        (["--devices", "cpu-999"], "device='cpu-999': expected at most cpu-"),
        (["--trials", "0"], "trials=0: expected a number >= 1"),
        (["--data", "cifar"], "unknown data set 'cifar'"),
        (["--test-images", "100000"], "test_images=100000: expected at most"),
        (["--tolerance", "-1"], "--tolerance -1: expected 0 or more"),
    ],
)
def test_the_command_refuses_a_bad_stack_in_one_line(options, message, tmp_path, capsys):
    assert cli.main(["dlas", *options, "--out", str(tmp_path / "o")]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(compression="int8", level=0.5), "level=0.5: expected 0 with compression='int8'"),
        (dict(sparse="csr"), "sparse='csr': expected none without compression='weights'"),
        (dict(compression="weights", sparse="csr"), "sparse='csr': expected none without primitive='gemm'"),
        (dict(compression="int8", tuned=True), "tuned=True: expected False for other types than float32"),
        (dict(tuned=True, primitive="gemm"), "tuned=True: expected False with a primitive"),
        (dict(primitive="winograd"), "primitive='winograd': expected one of"),
    ],
)
def test_points_that_there_are_none_of_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        StackConfig(**options)


def test_layers_that_do_not_fit_are_refused():
    x, w = jnp.zeros((1, 6, 6, 4)), jnp.zeros((3, 3, 4, 8))
    window = forms.window_of(x.shape, w.shape, 1)
    with pytest.raises(UserError, match="spatial-pack 4x8: expected divisors of 6 rows and 8 channels"):
        low.conv_spatial_pack(x, w, window=window, rows=4)
    with pytest.raises(UserError, match="unknown primitive 'winograd'"):
        low.conv2d(x, w, primitive="winograd")
    with pytest.raises(UserError, match="unknown layout 'chwn'"):
        low.lowered(x, w, window=window, choice=Choice(layout="chwn"))
    with pytest.raises(UserError, match="channels: WRN does not say which are coupled"):
        compression.channel_prune(zoo.network("wrn-10-1"), {}, 0.5)
    with pytest.raises(UserError, match=r"mid_features: found \(1, 2\), expected 6 numbers of 1 or more"):
        zoo.network("vgg-small", mid_features=(1, 2))
    with pytest.raises(UserError, match="vgg-small: found images of 2x2, expected at least 4x4"):
        low.count_macs(zoo.network("vgg-small"), (1, 2, 2, 1))
    assert Folded(zoo.network("lenet"), ()).pairs == ()
