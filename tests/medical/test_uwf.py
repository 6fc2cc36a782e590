"""Diseases in ultra-widefield images: network, recipe, patients, measures, folders, the command."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import stats as sp
from scipy.signal import correlate2d

from jaxstack import cli
from jaxstack.core.errors import UserError
from jaxstack.data import augment
from jaxstack.medical import explain, multilabel, uwf, uwf_data
from jaxstack.medical.phantoms_uwf import LABELS
from jaxstack.nn import optimisers
from jaxstack.nn import torch_weights as tw
from jaxstack.nn.vision.resnet import ResNet

KEY = jax.random.key(0)


def variables_of(network, size=(64, 64)):
    return jax.eval_shape(lambda key: network.init(key, jnp.zeros((1, *size, 2))), KEY)


def test_the_network_has_the_papers_parameters_and_names():
    shapes = variables_of(uwf.resnet_34(), (384, 512))
    assert sum(x.size for x in jax.tree.leaves(shapes["params"])) == 21_348_360
    network, x = uwf.resnet_34(), jnp.zeros((1, 384, 512, 2))
    run = lambda key: network.apply(network.init(key, x), x, method="features")
    assert jax.eval_shape(run, KEY).shape == (1, 12, 16, 512)
    names = {
        network.torch_name(tuple(k.key for k in path[1:-1]))
        for path, _ in jax.tree_util.tree_leaves_with_path(shapes)
        if path[0].key != "pixels"
    }
    assert {"conv1", "bn1", "layer1.2.conv2", "layer3.5.bn2", "layer4.0.downsample.1", "fc.1", "fc.2", "fc.4"} <= names


def test_the_backbone_computes_what_pytorch_would_with_the_same_state_dict():
    """ResNet-34's layout with narrow stages, against NumPy on the state dict: strides, padding, shortcuts, eps."""
    rng = np.random.default_rng(0)
    network = uwf.Network(ResNet(34, 0, "imagenet", widths=(2, 3, 3, 4), counts=(2, 2, 1, 1)), hidden=5)
    shapes = {k: v for k, v in variables_of(network).items() if k != "pixels"}
    draw = lambda path, s: 0.7 * (abs(rng.normal(size=s.shape)) if path[-1].key == "var" else rng.normal(size=s.shape))
    given = jax.tree.map(lambda x: x.astype(np.float32), jax.tree_util.tree_map_with_path(draw, shapes))
    w = tw.to_torch(network, given)
    image = rng.normal(size=(2, 38, 45)).astype(np.float32)

    def conv(x, name, stride, pad):
        x = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
        out = [sum(correlate2d(c, k, "valid") for c, k in zip(x, kernel)) for kernel in w[f"{name}.weight"]]
        return np.stack(out)[:, ::stride, ::stride]

    def norm(x, name):
        one = lambda field: w[f"{name}.{field}"][:, None, None]
        scaled = (x - one("running_mean")) / np.sqrt(one("running_var") + 1e-5)
        return scaled * one("weight") + one("bias")

    x = np.maximum(norm(conv(image, "conv1", 2, 3), "bn1"), 0)
    wide = np.pad(x, ((0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    views = np.lib.stride_tricks.sliding_window_view(wide, (3, 3), (1, 2))
    x = views[:, ::2, ::2].max((-2, -1))
    for stage, count in enumerate((2, 2, 1, 1), 1):
        for i in range(count):
            name, stride = f"layer{stage}.{i}", 2 if stage > 1 and not i else 1
            h = np.maximum(norm(conv(x, f"{name}.conv1", stride, 1), f"{name}.bn1"), 0)
            h = norm(conv(h, f"{name}.conv2", 1, 1), f"{name}.bn2")
            if f"{name}.downsample.0.weight" in w:
                x = norm(conv(x, f"{name}.downsample.0", stride, 0), f"{name}.downsample.1")
            x = np.maximum(h + x, 0)
    h = w["fc.1.weight"] @ x.mean((1, 2)) + w["fc.1.bias"]
    h = np.where(h >= 0, h, w["fc.2.weight"] * h)
    expected = w["fc.4.weight"] @ h + w["fc.4.bias"]
    again = tw.from_torch(network, w, shapes) | {"pixels": {"mean": jnp.zeros(2), "std": jnp.ones(2)}}
    found = network.apply(again, jnp.moveaxis(image, 0, -1)[None])[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_grad_cam_of_the_network_cuts_it_where_the_head_begins():
    network = uwf.Network(
        ResNet(18, 0, "half", widths=(2, 2, 3, 3), counts=(1,) * 4), hidden=4, moments=lambda: MOMENTS
    )
    x = jax.random.normal(KEY, (2, 32, 40, 2))
    given = network.init(KEY, x)
    parts = uwf.parts_of(network)
    assert uwf.parts_of(network) is parts
    np.testing.assert_allclose(parts.predict(given, x), network.apply(given, x), rtol=1e-5, atol=1e-6)
    found = explain.explained(explain.grad_cam(parts), given, x, jnp.arange(8))
    assert found.shape == (2, 8, 32, 40)
    # probabilities normalise pixels by what is stored
    p = uwf.probabilities(network, given, x * jnp.asarray(MOMENTS[1]) + jnp.asarray(MOMENTS[0]))
    np.testing.assert_allclose(p, jax.nn.sigmoid(network.apply(given, x)), rtol=1e-4)


MOMENTS = ((0.3, 0.2), (0.1, 0.05))


def test_smoothing_mixup_and_schedule_are_closed_forms():
    np.testing.assert_allclose(uwf.smooth_labels(np.array([False, True])), [0.05, 0.99], rtol=1e-6)
    x, y = jax.random.normal(KEY, (4, 3, 2)), jax.random.uniform(KEY, (4, 8))
    np.testing.assert_array_equal(augment.mixed(x, 1.0), x)
    np.testing.assert_array_equal(augment.mixed(x[::-1], 0.3), augment.mixed(x, 0.7)[::1][::-1][::-1])
    np.testing.assert_array_equal(x[::-1][::-1], x)
    keys = jax.random.split(KEY, 2000)
    both = jax.jit(jax.vmap(lambda k: augment.mixup(k, x, y, 0.6)))(keys)
    np.testing.assert_allclose(both[1].sum(1), jnp.broadcast_to(y.sum(0), (2000, 8)), rtol=1e-5)  # sums are kept
    np.testing.assert_allclose(both[1].mean(0), (y + y[::-1]) / 2, atol=0.02)
    # images and targets share the share, which is Beta(.6, .6)
    share = (both[0][:, 0, 0, 0] - x[3, 0, 0]) / (x[0, 0, 0] - x[3, 0, 0])
    np.testing.assert_allclose(share, (both[1][:, 0, 0] - y[3, 0]) / (y[0, 0] - y[3, 0]), atol=1e-3)
    assert sp.kstest(np.asarray(share), "beta", args=(0.6, 0.6)).pvalue > 1e-3
    for kept in (augment.mixup(KEY, x, y, 0.0), augment.mixup(KEY, x, y, 0.0)):
        np.testing.assert_array_equal(kept[0], x)
    np.testing.assert_array_equal(augment.mixup(KEY, x[:3], y[:3], 0.6)[1], y[:3])  # an odd batch
    # 40 epochs of 1000 steps: four cosines
    rate = lambda epoch: float(optimisers.learning_rate("restarts", 1000 * epoch, 40_000, 0.1, cycles=4))
    assert [rate(0), rate(10), rate(30)] == pytest.approx([0.1] * 3)
    assert [rate(5), rate(25)] == pytest.approx([0.05] * 2, rel=1e-4)
    assert rate(9.999) < 3e-9 + 1e-8
    assert rate(40) == pytest.approx(0, abs=1e-9)


def test_augmentation_keeps_its_order_and_ranges():
    image = jnp.zeros((21, 31, 2)).at[10, 25].set(1.0).at[4, 15, 1].set(0.5)
    np.testing.assert_allclose(uwf.moved(image, 0.0, 1.0, 0.0), image, atol=1e-6)
    quarter = uwf.moved(image, np.pi / 2, 1.0, 0.0)  # +x goes to +y
    assert quarter[20, 15, 0] == pytest.approx(1, abs=1e-4)
    assert quarter[10, 21, 1] == pytest.approx(0.5, abs=1e-4)  # -y to +x
    assert uwf.moved(image, 0.0, 0.5, 0.0)[10, 20, 0] == pytest.approx(1, abs=1e-4)
    assert uwf.moved(image, 0.0, 1.0, np.pi / 4)[4, 9, 1] == pytest.approx(0.5, abs=1e-4)  # x + y tan
    np.testing.assert_allclose(uwf.moved(image, 0.0, 1.0, 0.0, (1.0, -1.0)), image[:, ::-1], atol=1e-6)
    np.testing.assert_allclose(uwf.moved(image, 0.0, 1.0, 0.0, (-1.0, 1.0)), image[::-1], atol=1e-6)
    holes = jax.vmap(lambda k: augment.erased(k, jnp.full((40, 50, 2), 9.0)))(jax.random.split(KEY, 200))
    share = np.asarray((holes[..., 0] != 9).mean((1, 2)))
    assert share.min() > 0.03
    assert share.max() < 0.32
    assert abs(float(holes[holes != 9].std()) - 1) < 0.02
    # mean 9 in the middle after normalising: what is left alone is normalised exactly
    mean, std = jnp.asarray(MOMENTS[0]), jnp.asarray(MOMENTS[1])
    plain = jnp.broadcast_to(mean + 2 * std, (32, 40, 2)) + jnp.linspace(0, 0.1, 40)[:, None]
    many = jax.jit(jax.vmap(uwf.augmented, in_axes=(0, None, None, None)))(jax.random.split(KEY, 600), plain, mean, std)
    target = (plain - mean) / std
    same = lambda picture: np.asarray((jnp.abs(many - picture) < 1e-4).all((1, 2, 3))).mean()
    upright, mirrored = same(target), same(target[:, ::-1])
    # 1 in 10 is not moved and 1 in 10 not made worse; .3 of them are mirrored (upside down looks alike here)
    assert 0.002 < upright + mirrored < 0.025
    flat, labels = jnp.full((4, 32, 40, 2), 0.2), np.eye(4, 8) > 0
    batch = uwf.training_batch(KEY, flat, labels, MOMENTS, uwf.Recipe(alpha=0.0), augment=False)
    np.testing.assert_allclose(batch[0], jnp.broadcast_to((0.2 - mean) / std, (4, 32, 40, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(batch[1], np.where(labels, 0.99, 0.05), rtol=1e-5)


def test_patients_are_split_whole_and_in_equal_shares():
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(3000), rng.integers(1, 4, 3000))
    first = rng.choice(5, 3000, p=[0.5, 0.25, 0.15, 0.07, 0.03])
    labels = np.eye(5, dtype=bool)[first[patients]][:, 1:] & (rng.uniform(size=(len(patients), 1)) < 0.9)
    part = multilabel.stratified_patient_split(patients, labels, (0.7, 0.15, 0.15), seed=1)
    multilabel.check_patients(patients, part)
    names, strata = multilabel.patient_strata(patients, labels)
    of_patient = part[np.searchsorted(patients, names)]
    for k, share in enumerate((0.7, 0.15, 0.15)):
        assert abs((of_patient == k).mean() - share) < 0.01
        for s in np.unique(strata):
            assert abs((strata[of_patient == k] == s).mean() - (strata == s).mean()) < 0.01
    assert (part == multilabel.stratified_patient_split(patients, labels, (0.7, 0.15, 0.15), seed=1)).all()
    assert (part != multilabel.stratified_patient_split(patients, labels, (0.7, 0.15, 0.15), seed=2)).any()
    # the most frequent disease; of equally frequent ones the rarer; -1 for the healthy
    few = np.array([[1, 0], [1, 0], [1, 0], [1, 1], [0, 0], [1, 1], [0, 1], [0, 1]], bool)
    np.testing.assert_array_equal(multilabel.patient_strata(np.array([0, 0, 0, 1, 2, 3, 3, 3]), few)[1], [0, 1, -1, 1])
    with pytest.raises(UserError, match="found patient 7 in train and test, expected one part"):
        multilabel.check_patients(np.array([7, 8, 7]), ["train", "test", "test"])
    with pytest.raises(UserError, match="expected numbers >= 0 that sum to 1"):
        multilabel.stratified_patient_split(patients, labels, (0.5, 0.1))


def test_aucs_and_operating_points():
    rng = np.random.default_rng(0)
    labels = rng.uniform(size=(300, 3)) < 0.3
    labels[:, 2] = False
    scores = labels + rng.normal(size=(300, 3))
    found = multilabel.aucs(scores, labels)
    pairs = scores[labels[:, 0], 0][:, None] - scores[~labels[:, 0], 0]
    assert found[0] == pytest.approx((pairs > 0).mean() + 0.5 * (pairs == 0).mean())
    np.testing.assert_array_equal(multilabel.aucs(np.exp(scores), labels), found)  # monotone transforms
    assert np.isnan(found[2])  # one class: nothing, not 1/2
    table = multilabel.auc_table(scores, labels, ("a", "b", "c"), np.arange(300) // 2, resamples=200)
    assert table["a"].low < table["a"].value < table["a"].high
    assert table["a"].high - table["a"].low < 0.2
    assert all(np.isnan(x) for x in table["c"])
    points = multilabel.operating_points(scores, labels, 0.9, 0.8)
    for k in range(2):
        above = lambda t, k=k: scores[:, k] >= t
        assert above(points.sensitive[k])[labels[:, k]].mean() >= 0.9
        assert above(points.sensitive[k] + 1e-9)[labels[:, k]].mean() < 0.9 + 1e-9
        assert (~above(points.specific[k]))[~labels[:, k]].mean() >= 0.8
        assert (~above(points.specific[k] - 1e-9))[~labels[:, k]].mean() < 0.8
    assert np.isnan(points.sensitive[2])
    p = np.array([[0.1] * 7 + [0.2], [0.9, *[0.1] * 6, 0.2], [0.9, *[0.1] * 6, 0.8]])
    np.testing.assert_array_equal(uwf.inconsistent(p, [0.5] * 8), [False, True, False])


def test_a_folder_is_read_and_screened(tmp_path, capsys, untrained):
    run = lambda *argv: cli.main([str(a) for a in argv])
    folder, table = tmp_path / "eyes", tmp_path / "eyes" / "labels.csv"
    assert run("phantoms", "uwf", "--num", 40, "--size", 32, 40, "--out", folder) == 0
    small = dict(data=str(folder), size=(32, 40), widths=(2, 2, 3, 3), hidden=4, batch_size=8, num_updates=3)
    learner = uwf.uwf_diseases(**small)
    states = untrained(learner, tmp_path / "run", 2)
    parts = uwf.parts(learner.config)
    who = [set(parts[name].patients) for name in ("train", "valid", "test")]
    assert sum(map(len, who)) == len(set.union(*who)) == 20
    assert sum(len(p.images) for p in parts.values()) == 40
    # averages hold statistics too, and evaluation uses them
    assert set(states.ema) == {"params", "batch_stats", "pixels"}
    assert learner.source(learner.config).batch_size == 8
    (folder / "broken.png").write_bytes(b"no image")
    out = tmp_path / "out"
    assert run("screen-uwf", folder, "--model", tmp_path / "run", "--table", table, "--out", out) == 0
    rows = {r["file"].rsplit("/", 1)[-1]: r for r in csv.DictReader((out / "results.csv").read_text().splitlines())}
    assert rows["broken.png"]["status"] == "skipped"
    one = rows["eye0003.png"]
    assert one["laterality"] == "R"
    image = uwf_data.read_uwf(folder / "eye0003.png", (32, 40))[:, ::-1].astype(np.float32) / 255
    p = np.asarray(jax.vmap(learner.predict, in_axes=(0, None))(states, image[None]))[:, 0].mean(0)
    assert [float(one[f"p_{name}"]) for name in LABELS] == pytest.approx(p.tolist(), abs=1e-5)
    assert Image.open(out / "overlays" / "eye0003.png").size[1] >= 32
    aucs = {r["label"]: r for r in csv.DictReader((out / "auc.csv").read_text().splitlines())}
    assert set(aucs) == set(LABELS)
    assert all(r["images"] == "40" for r in aucs.values())
    capsys.readouterr()
    assert run("screen-uwf", folder, "--model", folder, "--out", tmp_path / "none") == 2
    # without a table the side is not known, and said
    other = tmp_path / "other"
    argv = ("screen-uwf", folder / "eye0003.png", "--model", tmp_path / "run", "--threshold", 0.5, "--out", other)
    assert run(*argv) == 0
    row = next(csv.DictReader((other / "results.csv").read_text().splitlines()))
    assert row["laterality"] == "assumed L"
    # maps of half of the patients, curves of the others; the broken file is named
    table.write_text(table.read_text() + f"broken.png,p9,L{',0' * 8}\n")
    explained, options = tmp_path / "explained", ("--labels", table, "--random", 1, "--fill", "mean-image")
    assert run("explain", tmp_path / "run", *options, "--out", explained) == 0
    assert "broken.png: cannot be read" in capsys.readouterr().out
    maps = np.load(explained / "maps.npz")
    assert maps["label_maps"].shape == (8, 32, 40)
    lines = list(csv.DictReader((explained / "curves.csv").read_text().splitlines()))
    at = {(r["ranking"], r["metric"], float(r["share"])): (float(r["erased"]), float(r["restored"])) for r in lines}
    for metric in ("any-auc", "log-likelihood"):
        assert at["map", metric, 0.0][0] == pytest.approx(at["random", metric, 1.0][1], abs=1e-4)
    summary = list(csv.DictReader((explained / "summary.csv").read_text().splitlines()))
    assert {r["ranking"] for r in summary} == {"map", "inverse", "distance to the centre", "random"}
    assert (explained / "maps.png").exists()
    assert (explained / "curves.png").exists()
    assert run("explain", tmp_path / "run", "--labels", table, "--random", 0, "--out", explained) == 2
    assert "--random 0: expected at least 1" in capsys.readouterr().err


def test_bad_input_is_named(tmp_path):
    table = tmp_path / "labels.csv"
    head = f"file,patient,laterality,{','.join(LABELS)},split\n"
    Image.fromarray(np.full((40, 50, 3), 90, np.uint8)).save(tmp_path / "a.png")
    row = lambda name, who, side="L", first="0", split="": f"{name},{who},{side},{first},0,0,0,0,0,0,1,{split}\n"
    cases = [
        ("file,laterality\na.png,L\n", "found no column MH, expected MH, RP"),
        (head + row("a.png", "p", "left"), r"line 2: laterality: found 'left', expected L or R"),
        (head + row("a.png", "p", first="yes"), "line 2: MH: found 'yes', expected 0 or 1"),
        (head + row("a.png", "p", split="dev"), "line 2: split: found 'dev', expected train, valid, test"),
        (head + row("a.png", "p", split="train") + row("a.png", "p", split="test"), "split: found patient p in train"),
        (head + row("a.png", "p", split="train"), "found no images for valid among 1"),
        (head + row("b.png", "p", split="train") + row("a.png", "q", split="valid"), r"b.png: cannot be read"),
    ]
    for text, message in cases:
        table.write_text(text)
        uwf_data.read_folder.cache_clear()
        with pytest.raises(UserError, match=message):
            uwf_data.read_folder(str(tmp_path), (32, 40), 0)
    # an aspect that does not fit gets black around, never stretched
    image = uwf_data.read_uwf(tmp_path / "a.png", (40, 100))
    assert image.shape == (40, 100, 2)
    assert (image[:, :25] == 0).all()
    assert (image[:, 25:75] == 90).all()
    for options, message in (
        (dict(size=(16, 40)), "size=.*expected at least 32"),
        (dict(smooth_low=0.6, smooth_high=0.5), "smooth_low=0.6: expected less than"),
        (dict(widths=(2, 2)), "four widths"),
    ):
        with pytest.raises(UserError, match=message):
            uwf.uwf_diseases(**options)
    state = {name: np.zeros(3, np.float32) for name in ("conv1.weight", "fc.9.bias")}
    np.savez(tmp_path / "w.npz", **state)
    with pytest.raises(UserError, match=r"w.npz: .* is missing; "):
        uwf.load_weights(tmp_path / "w.npz")
