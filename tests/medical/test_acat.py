"""ACAT: latent counterfactuals, masks, fusions, slices, saliency of scans, regions, weights, training, the command."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from jaxstack import cli
from jaxstack.core.errors import UserError
from jaxstack.medical import acat, acat_saliency, acat_scans, latent_counterfactuals
from jaxstack.medical.volumes import write_volume
from jaxstack.nn.torch_weights import to_torch
from jaxstack.nn.vision.acat import FUSIONS, AcatNet, adaptive_mean, from_released, grad_cam, started_from

SMALL = dict(blocks=(1, 1, 1, 1), widths=(4, 4, 6, 8), bottleneck=False, stem="strided", hidden=4)
SCANS = np.random.default_rng(0).uniform(size=(2, 3, 32, 32, 2)).astype(np.float32)


WINDOW = (10.0, 45.0)


def shapes(net, scans=SCANS):
    return jax.eval_shape(net.init, jax.random.key(0), jax.ShapeDtypeStruct(scans.shape, jnp.float32))


def filled(net, seed=0, scans=SCANS):
    """Random variables of a network, with activations of about 1."""
    rng = np.random.default_rng(seed)

    def leaf(path, x):
        kind = path[-1].key
        if kind in ("var", "scale"):
            return jnp.asarray(rng.uniform(0.5, 1.5, x.shape), jnp.float32)
        width = np.prod(x.shape[:-1]) if kind == "kernel" else 100.0
        return jnp.asarray(rng.normal(size=x.shape) / width**0.5, jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes(net, scans))


@partial(jax.jit, static_argnums=(0, 3))
def run(net, given, scans, method="__call__"):
    return net.apply(given, scans, method=method)


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


@partial(jax.jit, static_argnums=0)
def slope(net, given, scans):
    return jax.grad(lambda x: net.apply(given, x)[:, 1].sum())(scans)


@partial(jax.jit, static_argnums=0)
def trained_slope(net, given, scans):
    def loss(params):
        out, _ = net.apply(given | {"params": params}, scans, train=True, mutable=["batch_stats"])
        return jnp.square(out).sum()

    return jax.grad(loss)(given["params"])


def test_latent_counterfactuals_are_the_published_numbers():
    w, z0 = jnp.array([1.0, -2.0, 0.5, 0.0]), jnp.array([[0.2, -0.1, 0.4, 0.0]])
    logits = lambda x: jnp.stack([jnp.zeros(len(x)), x @ w], 1)
    go = lambda t, a, b, n=20: latent_counterfactuals.counterfactual(logits, lambda z: z, z0, jnp.array([t]), a, b, n)
    chance = lambda z, t: float(jax.nn.softmax(logits(z))[0, t])
    for target, alpha, beta, expected, start, end in (
        (1, 100.0, 1e-3, (0.182186, -0.089373, 0.378593, 0.0), 0.645656, 0.653829),
        (0, 100.0, 1e-3, (0.212056, -0.099113, 0.418528, 0.0), 0.354344, 0.369268),
        (1, 0.0, 0.1, (0.541043, -0.782086, 0.570521, 0.0), 0.645656, 0.912499),
    ):
        np.testing.assert_allclose(go(target, alpha, beta)[0], expected, atol=1e-6)
        assert abs(chance(z0, target) - start) < 1e-6
        # the chance that is printed in a step is that before the step
        assert abs(chance(go(target, alpha, beta, 19), target) - end) < 1e-6
    sure = 20.0 * z0
    p = chance(sure, 1)
    moved = latent_counterfactuals.counterfactual(logits, lambda z: z, sure, jnp.array([1]), 0.0, 0.1)
    assert 0 < float(jnp.linalg.norm(moved - sure)) <= 0.1 * 20 * (1 - p) * float(jnp.linalg.norm(w))


def test_masks_are_sigmoids_of_one_channel_and_without_them_it_is_the_plain_network():
    net, plain = AcatNet("acat", "mean", **SMALL), AcatNet("none", **SMALL)
    given = filled(net)
    features, masks = run(net, given, SCANS, "look")
    # training: the maximum over channels has a gradient wherever channels are equal, all zero behind a ReLU here
    dark = np.where(np.arange(32)[:, None, None] < 16, SCANS, 0.0)
    slopes = trained_slope(net, given, dark)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(slopes))
    assert all(np.abs(slopes[f"mask{i}"]["conv"]["kernel"]).max() > 0 for i in (1, 2, 3))
    assert features.shape == (2, 3, 2, 2, 8)
    assert [m.shape for m in masks] == [(6, n, n, 1) for n in (16, 8, 4)]
    assert all(0 < float(m.min()) < float(m.max()) < 1 for m in masks)
    params = dict(given["params"])
    for i, bias in ((1, 0.3), (2, -0.7), (3, 1.1)):
        conv = jax.tree.map(jnp.zeros_like, params[f"mask{i}"]["conv"])
        bn = params[f"mask{i}"]["bn"] | {"bias": jnp.array([bias])}
        params[f"mask{i}"] = {"conv": conv, "bn": bn}
    stats = {k: v | {"bn": v["bn"] | {"mean": 0 * v["bn"]["mean"]}} if k[:4] == "mask" else v
             for k, v in given["batch_stats"].items()}  # fmt: skip
    _, masks = run(net, {"params": params, "batch_stats": stats}, SCANS, "look")
    for mask, bias in zip(masks, (0.3, -0.7, 1.1)):
        np.testing.assert_allclose(mask, jax.nn.sigmoid(bias), rtol=1e-6)
    for i in (1, 2, 3):
        params[f"mask{i}"] = params[f"mask{i}"] | {"bn": params[f"mask{i}"]["bn"] | {"bias": jnp.array([-1e9])}}
    out = run(net, {"params": params, "batch_stats": stats}, SCANS)
    own = {c: {k: v for k, v in given[c].items() if k in ("trunk", "head")} for c in given}
    np.testing.assert_allclose(out, run(plain, own, SCANS), rtol=1e-6)


def test_fusions_change_the_features_as_they_say():
    trunk = filled(AcatNet("none", **SMALL))
    for fusion in FUSIONS:
        net = AcatNet(fusion, **SMALL)
        given = started_from(filled(net, 1), trunk)
        own = jax.tree.leaves(trunk["params"]["trunk"]["layer1_0"])
        for a, b in zip(jax.tree.leaves(given["params"]["trunk"]["layer1_0"]), own):
            np.testing.assert_array_equal(a, b)
        looked = slope(net, given, SCANS)
        # the saliency is read by those that say so
        assert bool(jnp.any(looked[..., 1] != 0)) == (fusion not in ("none", "image"))
        assert (net.pooling == "attention") == (fusion in ("acat", "image"))
    stem = given["params"]["trunk"]["conv1"]["kernel"]
    assert fusion == "concat"
    assert stem.shape[2] == 2
    np.testing.assert_array_equal(stem[:, :, :1], trunk["params"]["trunk"]["conv1"]["kernel"])
    # s_2 of -infinity leaves smic plain, s_4 <= 0 leaves hsm plain; here s_2 = 0: every feature half as large again
    smic = AcatNet("smic", **SMALL)
    given = started_from(filled(smic, 1), trunk)
    given["params"]["saliency"] = jax.tree.map(jnp.zeros_like, given["params"]["saliency"])
    half = dict(trunk["params"]["trunk"])
    scaled = jax.tree.map(lambda x: x, half)
    for name in ("conv1", "downsample_conv"):
        scaled["layer3_0"] = scaled["layer3_0"] | {name: {"kernel": 1.5 * half["layer3_0"][name]["kernel"]}}
    plain = trunk | {"params": trunk["params"] | {"trunk": scaled}}
    np.testing.assert_allclose(run(smic, given, SCANS), run(AcatNet("none", **SMALL), plain, SCANS), rtol=1e-5)
    hsm = AcatNet("hsm", **SMALL)
    given = started_from(filled(hsm, 1), trunk)
    given["params"]["saliency"] = jax.tree.map(jnp.zeros_like, given["params"]["saliency"])
    np.testing.assert_allclose(run(hsm, given, SCANS), run(AcatNet("none", **SMALL), trunk, SCANS), rtol=1e-6)


def test_the_mean_of_slices_knows_no_order_and_attention_does():
    turned = SCANS[:, ::-1]
    for pool, same in (("mean", True), ("attention", False)):
        net = AcatNet("none", pool, **SMALL)
        given = filled(net)
        assert np.allclose(run(net, given, SCANS), run(net, given, turned), rtol=1e-5) == same
    # equal weights: the weighted mean is the mean, the released sum is S / 2 of it
    zero = given["params"]["slices"] | {
        "attention_layer": jax.tree.map(jnp.zeros_like, given["params"]["slices"]["attention_layer"])
    }
    given["params"]["slices"] = zero
    given["params"]["head"]["bias"] = jnp.zeros(2)
    mean = AcatNet("none", "mean", **SMALL).apply(
        {c: {k: v for k, v in given[c].items() if k != "slices"} for c in given}, SCANS
    )
    np.testing.assert_allclose(run(net, given, SCANS), mean, rtol=1e-5)
    summed = AcatNet("none", "attention", summed=True, **SMALL)
    np.testing.assert_allclose(run(summed, given, SCANS), 1.5 * mean, rtol=1e-5)


def test_pooling_covers_any_size_as_pytorch_does():
    x = np.random.default_rng(0).normal(size=(2, 7, 10, 1)).astype(np.float32)
    found = adaptive_mean(jnp.asarray(x), (3, 4))
    for i in range(3):
        for j in range(4):
            rows = slice(i * 7 // 3, -(-(i + 1) * 7 // 3))
            columns = slice(j * 10 // 4, -(-(j + 1) * 10 // 4))
            np.testing.assert_allclose(found[:, i, j], x[:, rows, columns].mean((1, 2)), rtol=1e-5)


def test_the_networks_have_the_released_sizes_and_names():
    scans = np.broadcast_to(np.float32(0), (1, 11, 128, 128, 2))
    plain = shapes(AcatNet("none", copies=3), scans)
    assert count(plain["params"]) == 23_512_130  # ResNet-50 with two logits
    # the released class has a second trunk whose stem has 2,048 channels: 47.95 M in all
    both = shapes(AcatNet("hsm", copies=3, reference_stem=True), scans)
    assert round(count(both["params"]) / 1e6, 2) == 47.95
    net = AcatNet("acat", copies=3, reference_stem=True)
    names = to_torch(net, jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), shapes(net, scans)))
    assert names["conv1_s.weight"].shape == (2048, 3, 7, 7)
    assert names["layer1_s.0.downsample.0.weight"].shape == (256, 2048, 1, 1)
    for name in ("layer3.5.bn3.running_var", "layer1.0.downsample.1.bias", "fc.weight", "fusion.weight", "bn1_s.bias"):
        assert name in names
    assert names["att_2.att_conv.conv.weight"].shape == (1, 1, 3, 3)
    assert names["att_3.att_conv.bn.running_mean"].shape == (1,)
    assert names["slice_attention.layer_dict.fcc_0.weight"].shape == (64, 11 * 2048)
    assert names["slice_attention.layer_dict.attention_layer.bias"].shape == (11,)


def test_released_weights_are_read_without_their_unused_layers():
    net = AcatNet("acat", copies=3, reference_stem=True, **SMALL)
    given = filled(net)
    weights = to_torch(net, given)
    extra = {"layer4_s.0.conv1.weight": np.zeros((8, 6, 3, 3), np.float32), "conv1.num_batches_tracked": np.zeros(())}
    back = from_released(net, shapes(net), weights | extra)
    jax.tree.map(np.testing.assert_array_equal, back, given)
    plain = AcatNet("none", copies=3, **SMALL)
    np.testing.assert_array_equal(from_released(plain, shapes(plain), weights)["params"]["head"]["kernel"],
                                  given["params"]["head"]["kernel"])  # fmt: skip
    with pytest.raises(UserError, match=r"w\.pth: fc\.extra is unknown"):
        from_released(net, shapes(net), weights | {"fc.extra": np.zeros(1)}, "w.pth")


def test_saliency_of_scans_is_in_0_to_1_and_both_sides_count():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(size=(2, 3, 4, 4, 1)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(48, 2)), jnp.float32)
    logits = lambda x: x.reshape(len(x), -1) @ w
    same = lambda x: x
    found = latent_counterfactuals.sides(logits, same, same, x, 0.0, 0.1)
    s = latent_counterfactuals.pair(found)
    np.testing.assert_allclose(s.max((1, 2, 3, 4)), 1.0)
    assert float(s.min()) >= 0
    a, b = (np.abs(np.asarray(v - x)) for v in (found.towards_0, found.towards_1))
    top = lambda v: v / v.max((1, 2, 3, 4), keepdims=True)
    np.testing.assert_allclose(s, top(top(a) + top(b)), rtol=1e-4)
    np.testing.assert_allclose(latent_counterfactuals.pair(found, True), top(a + top(b)), rtol=1e-4)
    # the class goes where it is told
    p = lambda v: jax.nn.softmax(logits(v))[:, 1]
    assert (p(found.towards_0) < p(x)).all()
    assert (p(found.towards_1) > p(x)).all()
    flat = lambda x: jnp.zeros((len(x), 2))
    assert not np.asarray(latent_counterfactuals.saliency_pair(flat, same, same, x, 0.0)).any()


def test_gradient_and_grad_cam_of_scans():
    net = AcatNet("none", **SMALL)
    given = filled(net)
    images = jnp.asarray(SCANS[..., 0])
    found = acat_saliency.gradient_saliency(net, given, images)
    assert found.shape == images.shape
    np.testing.assert_allclose(found.max((1, 2, 3)), 1.0, rtol=1e-6)
    # the head is linear in the mean over pixels and slices: its gradient is that of each channel's weight
    features = run(net, given, images[..., None], "features")
    cam = jax.nn.relu(features @ given["params"]["head"]["kernel"][:, 0])
    cam = jax.image.resize(cam, images.shape, "bilinear")
    expected = cam / jnp.maximum(cam.max((1, 2, 3), keepdims=True), 1e-9)
    assert float(expected.max()) == 1
    seen = jax.jit(lambda x: grad_cam(net, given, x, 0))(images[..., None])
    np.testing.assert_allclose(seen, expected, rtol=1e-4)
    for stage in (1, 3):
        both = jax.jit(lambda x, i=stage: net.apply(given, net.apply(given, x, i, method="until"), i, method="after"))
        np.testing.assert_allclose(both(images[..., None]), run(net, given, images[..., None]), rtol=1e-4)
    with pytest.raises(UserError, match="fusion='acat', stage=4: expected 'none' and 1 to 4"):
        grad_cam(AcatNet("acat", **SMALL), given, images[..., None])


def test_regions_are_six_and_the_most_salient_is_found():
    inside = np.zeros((12, 10), bool)
    inside[2:11, 1:9] = True
    atlas = acat_saliency.six_regions(inside)
    np.testing.assert_array_equal(atlas.sum(0), inside)
    np.testing.assert_array_equal(atlas.sum((1, 2)), 12)
    assert atlas[0, 2, 1]
    assert atlas[5, 10, 8]  # back right
    maps = np.zeros((8, 2, 12, 10), np.float32)
    for i in range(6):
        maps[i, 1][atlas[i]] = 0.1
        maps[i, 0, 0, 0] = 9.0  # outside
    maps[6, 0, 5, 1] = 1.0
    np.testing.assert_array_equal(acat_saliency.localise(maps, atlas), [0, 1, 2, 3, 4, 5, 2, -1])
    np.testing.assert_array_equal(acat_saliency.lesion_regions(maps > 0, atlas)[:6], range(6))
    assert acat_saliency.lesion_regions(maps[7:] > 0, atlas)[0] == -1
    with pytest.raises(UserError, match="inside: found an empty mask"):
        acat_saliency.six_regions(np.zeros((4, 4), bool))


def test_maps_follow_the_slices_that_the_classifier_sees():
    ramp = np.broadcast_to(np.arange(5, dtype=np.float32)[None, :, None, None], (1, 5, 4, 4))
    found = acat_saliency.resampled(ramp, np.array([0, 1.5, 4]), 4)
    np.testing.assert_allclose(found[0, :, 0, 0], [0, 1.5, 4])
    assert acat_saliency.resampled(ramp, np.array([2]), 2).shape == (1, 1, 2, 2)
    with pytest.raises(UserError, match="positions from 0 to 4"):
        acat_saliency.resampled(ramp, np.array([5]), 4)


def test_classes_weigh_alike_and_the_loss_is_pytorch_s():
    np.testing.assert_allclose(acat.class_weights(np.array([0, 1, 1, 1])), [0.75, 0.25])
    np.testing.assert_allclose(acat.class_weights(np.array([0, 1, 1, 0])), [0.5, 0.5])
    with pytest.raises(UserError, match="found 0 of class 0 and 3 of class 1"):
        acat.class_weights(np.ones(3, int))
    logits, y = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32), np.array([0, 1, 1])
    w = np.array([0.75, 0.25])[y]
    each = np.log(np.exp(logits).sum(1)) - logits[np.arange(3), y]
    found = acat.weighted_cross_entropy(jnp.asarray(logits), {"label": jnp.asarray(y), "weight": jnp.asarray(w)}, None)
    np.testing.assert_allclose(found.mean(), (w * each).sum() / w.sum(), rtol=1e-5)


def test_a_scan_and_its_map_are_flipped_together():
    images = jnp.arange(8 * 2 * 3 * 4.0).reshape(8, 2, 3, 4)
    inputs, targets = acat.flipped(jax.random.key(0), ({"images": images, "maps": images[:, None]}, jnp.arange(8)))
    np.testing.assert_array_equal(inputs["images"], inputs["maps"][:, 0])
    np.testing.assert_array_equal(targets, range(8))
    kinds = set()
    for old, new in zip(np.asarray(images), np.asarray(inputs["images"])):
        ways = [old, old[:, ::-1], old[..., ::-1], old[:, ::-1, ::-1]]
        kinds.add([np.array_equal(new, way) for way in ways].index(True))
    assert kinds == {0, 1, 2, 3}


def test_phantoms_are_scans_with_and_without_a_lesion():
    drawn = acat_scans.phantoms(0, 12, 3, 32, 0.6, (4.0, 8.0), 0.0, WINDOW, "ellipses")
    images, labels = drawn.scans
    assert images.shape == (12, 3, 32, 32)
    assert 0 <= images.min() < images.max() <= 1
    np.testing.assert_array_equal(drawn.lesion.any((1, 2, 3)), labels)
    assert 0 < labels.sum() < 12
    darker = images[drawn.lesion].mean()
    assert darker < images[drawn.inside[None, None] & ~drawn.lesion].mean() - 0.02


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fusion": "sum"}, "fusion"),
        ({"size": 36}, "size=36: expected a multiple of 8"),
        ({"mask_stages": (3, 1)}, r"mask_stages=\(3, 1\): expected some of 1 2 3"),
        ({"present": 1.0}, "present=1.0: expected more than 0 and less than 1"),
        ({"tune_lr": -1.0}, "tune_lr=-1.0"),
        ({"contrast": (8.0, 4.0)}, "contrast"),
        ({"window": (40.0, 40.0)}, "window"),
        ({"batch_size": 900}, "at most num_train=800"),
    ],
)
def test_bad_options_are_one_line(changes, message):
    with pytest.raises(UserError, match=message):
        acat.acat(**changes)


def test_networks_refuse_what_they_do_not_know():
    for changes, message in (({"fusion": "x"}, "fusion='x'"), ({"slice_pool": "max"}, "slice_pool='max'"),
                             ({"mask_stages": ()}, "mask_stages=")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            shapes(AcatNet(**({"fusion": "acat"} | changes), **SMALL))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Volumes of phantoms, 11 of each class, one of them broken later."""
    from jaxstack.medical.phantoms_ct import VIEW_MM, Design, ct_set

    root = tmp_path_factory.mktemp("scans")
    made = ct_set(0, 40, Design(slices=4, size=64, source="ellipses", tilt=0.0, shift=0.0))
    for label, name in enumerate(acat_scans.CLASSES):
        (root / name).mkdir()
        rows = np.flatnonzero((made.side > 0) == label)[:11]
        for i in rows:
            write_volume(root / name / f"scan{i:02d}.nii.gz", made.hu[i], (10.0, VIEW_MM / 64, VIEW_MM / 64))
    return root


def test_folders_are_read_and_refused_in_one_line(folder, tmp_path):
    train, valid = acat_scans.split_folder(str(folder), 3, 32, WINDOW, 0)
    assert train.images.shape[1:] == (3, 32, 32)
    assert len(train.labels) + len(valid.labels) == 22
    assert set(valid.labels) == {0, 1}
    # nothing outside of the brain
    assert not train.images[:, :, :, 0].any()
    drawn = acat_scans.phantoms(0, 40, 3, 32, 0.6, (4.0, 8.0), 0.0, WINDOW, "ellipses")
    assert abs(train.images.mean() - drawn.scans.images.mean()) < 0.05
    # the same scans by a table; patients stay together
    rows = [(f"{name}/{p.name}", side) for name, side in (("healthy", "none"), ("lesion", "left"))
            for p in sorted((folder / name).iterdir())]  # fmt: skip
    table = "file,side,patient\n" + "".join(f"{folder}/{f},{s},p{i // 2}\n" for i, (f, s) in enumerate(rows))
    (tmp_path / "scans.csv").write_text(table)
    found = acat_scans.read_folder(tmp_path, 3, 32, WINDOW)
    np.testing.assert_array_equal(found.scans.labels, [0] * 11 + [1] * 11)
    (tmp_path / "scans.csv").write_text(table + "x.nii,,\n")
    with pytest.raises(UserError, match="line 24: found an empty file or side"):
        acat_scans.read_folder(tmp_path, 3, 32, WINDOW)
    (tmp_path / "scans.csv").write_text("\n".join(table.splitlines()[:12]))
    with pytest.raises(UserError, match="found 0 scans of the class lesion, expected at least 10"):
        acat_scans.read_folder(tmp_path, 3, 32, WINDOW)
    (tmp_path / "scans.csv").unlink()
    with pytest.raises(UserError, match=r"found neither scans\.csv nor a folder healthy"):
        acat_scans.read_folder(tmp_path, 3, 32, WINDOW)
    with pytest.raises(UserError, match="found 4 slices, expected at least 9"):
        acat_scans.read_folder(folder, 9, 32, WINDOW)


def test_the_command_explains_scans_and_tells_of_bad_files(folder, tmp_path, capsys, untrained):
    tiny = dict(slices=2, size=32, widths=(2, 2, 2, 2), encoder=(2, 2, 2), stem_width=2, steps=1, batch_size=4)
    untrained(acat.acat(data=str(folder), **tiny), tmp_path / "run")
    (folder / "lesion" / "broken.nii.gz").write_bytes(b"no volume")
    command = ["counterfactual", str(folder / "lesion"), "--model", str(tmp_path / "run")]
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 0
    table = pd.read_csv(tmp_path / "out" / "results.csv")
    assert list(table.status).count("ok") == 11
    assert table.reason[table.status == "skipped"].str.contains("cannot be read as NIfTI").all()
    good = table[table.status == "ok"]
    assert good.p_lesion.between(0, 1).all()
    np.testing.assert_allclose(good.anomaly_mm2, good.anomaly_px * (230 / 32) ** 2, rtol=1e-4)
    for name in ("healthy", "anomaly", "overlays"):
        assert len(list((tmp_path / "out" / name).iterdir())) == 11
    capsys.readouterr()
    assert cli.main([*command, "--threshold", "2", "--out", str(tmp_path / "other")]) == 2
    assert "--threshold 2: expected more than 0 and less than 1" in capsys.readouterr().err
    # what has a row is not read again; a folder with something in it is asked about
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 2
    assert "exists and is not an empty folder; --resume continues in it" in capsys.readouterr().err
    for path in (folder / "lesion").glob("scan*"):
        path.write_bytes(b"")
    assert cli.main([*command, "--out", str(tmp_path / "out"), "--resume"]) == 0
    assert pd.read_csv(tmp_path / "out" / "results.csv").p_lesion.equals(table.p_lesion)
