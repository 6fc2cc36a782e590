"""Stroke on CT: symmetries of the network, losses, decisions, the audit, folders, the commands, the claim's metrics."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from jaxstack import cli
from jaxstack.claims import stroke_ct as study
from jaxstack.core.errors import UserError
from jaxstack.medical import stroke_data
from jaxstack.medical.head_ct import prepare
from jaxstack.medical.phantoms_ct import Design, ct_set
from jaxstack.medical.stroke_ct import (
    SWAPPED,
    HalfBrainNet,
    Outputs,
    Targets,
    augmented,
    chosen_slices,
    class_weighted_bce,
    class_weights,
    flip_swap,
    loss,
    on_sides,
    scan_decision,
    side_probabilities,
    stroke_ct,
    targets_of,
    tuned_threshold,
    turned,
)
from jaxstack.medical.volumes import Volume, read_volume, write_volume

X = jax.random.uniform(jax.random.key(0), (3, 2, 3, 32, 16))
TINY = dict(widths=(4, 4), tasks=("old", "size", "atrophy", "calcified"))


def random_statistics(variables):
    """BatchNorm's statistics and all parameters away from their first values."""
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(tree, [x + 0.3 * jnp.abs(jax.random.normal(k, x.shape)) for k, x in zip(keys, leaves)])


@pytest.mark.parametrize(
    ("compare", "pool"),
    [("none", "mean"), ("difference", "max"), ("concatenation", "attention"), ("cross-attention", "mean")],
)
def test_exchanging_the_halves_exchanges_the_logits(compare, pool):
    net = HalfBrainNet(compare=compare, slice_pool=pool, **TINY)
    variables = random_statistics(net.init(jax.random.key(0), X))
    run = jax.jit(lambda x: net.apply(variables, x))
    found, swapped, same = run(X), run(X[:, ::-1]), run(X.at[:, 1].set(X[:, 0]))
    assert found.logits.shape == (3, 2)
    np.testing.assert_allclose(swapped.logits, found.logits[:, ::-1], atol=1e-6)
    np.testing.assert_allclose(swapped.tasks["old"], found.tasks["old"][:, ::-1], atol=1e-6)
    for task, width in (("size", 4), ("atrophy", 1), ("calcified", 1)):
        assert found.tasks[task].shape == (3, width)
        np.testing.assert_allclose(swapped.tasks[task], found.tasks[task], atol=1e-6)
    assert np.abs(found.logits[:, 0] - found.logits[:, 1]).max() > 1e-3
    # a perfectly symmetric head
    np.testing.assert_allclose(same.logits[:, 0], same.logits[:, 1], atol=1e-5)
    if compare == "difference":
        # what is given of the other half is 0: its weights do not matter
        kernel = variables["params"]["Dense_0"]["kernel"]
        half = len(kernel) // 2
        variables["params"]["Dense_0"]["kernel"] = kernel.at[half:].set(9.0)
        other = net.apply(variables, X.at[:, 1].set(X[:, 0]))
        np.testing.assert_allclose(other.logits, same.logits, atol=1e-5)
        assert np.abs(net.apply(variables, X).logits - found.logits).max() > 0.1


def test_whole_slices_are_put_together_again():
    net = HalfBrainNet(head="four-class", compare="none", slice_pool="max", widths=(4, 4), tasks=("old",))
    variables = random_statistics(net.init(jax.random.key(0), X))
    found = net.apply(variables, X)
    assert found.logits.shape == (3, 4)
    assert found.tasks["old"].shape == (3, 2)
    # the mid-line is inside the image: what is at the last columns of both halves meets
    apart = jnp.concatenate([X[:, :1], X[:, 1:, ..., ::-1]], 1)
    assert np.abs(net.apply(variables, apart).logits - found.logits).max() > 1e-4


def test_larger_backbones_have_the_usual_sizes():
    count = lambda net: sum(
        x.size for x in jax.tree.leaves(jax.eval_shape(net.init, jax.random.key(0), X[:1])["params"])
    )
    # torchvision's without their last layer, with one input channel, and a layer of one logit
    assert count(HalfBrainNet("resnet-18", compare="none")) == 11_689_512 - 513_000 - 2 * 3136 + 512 + 1
    assert count(HalfBrainNet("resnet-50", compare="none")) == 25_557_032 - 2_049_000 - 2 * 3136 + 2048 + 1


def test_the_flip_exchanges_halves_and_sides():
    labels = jnp.array([[s, o, 2, 1, 0] for s in range(4) for o in (-1, 0, 1, 2, 3)], jnp.int8)
    x = jnp.arange(20.0 * 2 * 2).reshape(20, 2, 1, 1, 2)
    moved, changed = flip_swap(jax.random.key(3), x, labels)
    swapped = np.asarray(moved[:, 0, 0, 0, 0] != x[:, 0, 0, 0, 0])
    assert 4 < swapped.sum() < 16
    np.testing.assert_array_equal(moved, np.where(swapped[:, None, None, None, None], x[:, ::-1], x))
    for column in (0, 1):
        before = np.asarray(labels[:, column])
        after = np.where(before < 0, before, SWAPPED[before])
        np.testing.assert_array_equal(changed[:, column], np.where(swapped, after, before))
    np.testing.assert_array_equal(changed[:, 2:], labels[:, 2:])
    np.testing.assert_array_equal(on_sides(jnp.arange(4)), [[0, 0], [1, 0], [0, 1], [1, 1]])
    config = stroke_ct(size=32, num_train=32).config
    bytes_, _ = augmented(jax.random.key(0), np.zeros((4, 2, 7, 32, 16), np.uint8), labels[:4], config)
    assert float(bytes_.max()) == 0.0  # nothing happens outside the brain
    copies, _ = augmented(jax.random.key(0), np.full((4, 2, 7, 32, 16), 128, np.uint8), labels[:4], config)
    assert 0.4 < float(copies[copies > 0].mean()) < 0.6
    assert np.unique(copies).size > 100


def test_heads_are_turned_as_a_whole_and_slices_chosen_anew():
    x = jax.random.uniform(jax.random.key(0), (2, 2, 3, 8, 4))
    whole = lambda x: np.concatenate([x[:, 0], x[:, 1, ..., ::-1]], -1)
    one, move = jnp.ones(2), jax.jit(turned)
    np.testing.assert_allclose(move(x, 0.0 * one, one), x, atol=1e-6)
    found = whole(move(x, jnp.array([90.0, 180.0]), one))
    np.testing.assert_allclose(found[0], np.rot90(whole(x)[0], 1, (1, 2)), atol=1e-5)
    np.testing.assert_allclose(found[1], whole(x)[1, :, ::-1, ::-1], atol=1e-5)
    # a ramp stays one, half as steep; what comes in is zero
    ramp = np.broadcast_to(np.arange(8.0) - 3.5, (2, 1, 8, 8))
    split = jnp.stack([ramp[..., :4], ramp[..., ::-1][..., :4]], 1)
    large, small = (whole(move(split, 0.0 * one, z * one)) for z in (2.0, 0.5))
    np.testing.assert_allclose(large[0, 0], ramp[0, 0] / 2, atol=1e-5)
    np.testing.assert_allclose(small[0, 0, 2:6, 2:6], 2 * ramp[0, 0, 2:6, 2:6], atol=1e-5)
    assert not small[:, :, 0].any()
    config = stroke_ct(size=32, num_train=32, turn=10.0, zoom=0.1, jitter=1, slices=2, noise=0.0, shift=0).config
    scans = np.stack([np.full((2, 6, 32, 16), 40 * i, np.uint8) for i in range(1, 5)])
    scans[:, :, 2:4] += 20
    np.testing.assert_array_equal(chosen_slices(scans, 1, 1), scans[:, :, 2:4])
    np.testing.assert_array_equal(chosen_slices(scans, 1, np.array([0, 1, 2, 1]))[2], scans[2, :, 4:])
    labels = jnp.zeros((4, 5), jnp.int8)
    levels = set()
    for i in range(8):
        copies, _ = augmented(jax.random.key(i), scans, labels, config)
        assert copies.shape == (4, 2, 2, 32, 16)
        levels |= {round(float(c[0, 0, 16, 15]) * 255 / 10) for c in copies}
    assert len(levels) >= 6  # both kinds of slices, of each scan
    # the chosen slices are in the middle, those below and above them beside
    made = ct_set(0, 1, Design(slices=9, size=32, source="ellipses"))
    volume = Volume(made.hu[0].astype(np.float32), (5.0, 7.2, 7.2), "")
    alone, beside = prepare(volume, 3, 32), prepare(volume, 3, 32, jitter=1)
    assert (alone.slices, alone.line) == (beside.slices, beside.line)
    np.testing.assert_array_equal(beside.halves[:, 3:6], alone.halves)
    lower = prepare(volume._replace(hu=np.roll(volume.hu, 1, 0)), 3, 32)
    assert np.abs(beside.halves[:, :3].astype(float) - lower.halves).mean() < 3
    assert np.abs(beside.halves[:, :3].astype(float) - alone.halves).mean() > 3
    scans = stroke_data.phantom_scans(0, 2, 3, 32, Design(source="ellipses"), jitter=1)
    assert scans.halves.shape == (2, 2, 9, 32, 16)


def test_class_weights_and_losses():
    np.testing.assert_allclose(class_weights([0, 0, 0, 1], 2), [4 / 6, 2.0])
    np.testing.assert_allclose(class_weights([0, 1, 0, 1], 2), [1.0, 1.0])
    np.testing.assert_allclose(class_weights([0, 1], 4), [0.5, 0.5, 1.0, 1.0])
    logits, wanted = jnp.array([0.3, -1.0, 2.0]), jnp.array([1.0, 1.0, 0.0])
    plain = -(wanted * jax.nn.log_sigmoid(logits) + (1 - wanted) * jax.nn.log_sigmoid(-logits))
    np.testing.assert_allclose(class_weighted_bce(logits, wanted, jnp.ones(2)), plain, rtol=1e-6)
    np.testing.assert_allclose(
        class_weighted_bce(logits, wanted, jnp.array([3.0, 0.5])), plain * np.array([0.5, 0.5, 3.0]), rtol=1e-6
    )
    labels = jnp.array([[1, 2, 3, 1, -1], [0, -1, -1, -1, -1]], jnp.int8)
    hypers = stroke_ct(size=32).hypers
    rows = lambda w: jnp.tile(jnp.asarray(w, jnp.float32), (2, 1))
    even = Targets(labels, rows([1, 1]), rows([1, 1, 1, 1]))
    two = jnp.array([[0.5, -0.5], [1.0, 0.0]])
    tasks = {"old": two, "size": jnp.eye(4)[:2], "atrophy": jnp.ones((2, 1)), "calcified": jnp.ones((2, 1))}
    bare = loss(Outputs(two, {}), even, hypers)
    np.testing.assert_allclose(bare[0], -np.log(jax.nn.sigmoid(jnp.array([0.5, 0.5]))).mean(), rtol=1e-6)
    whole = loss(Outputs(two, tasks), even, hypers)
    old = -np.log(jax.nn.sigmoid(jnp.array([-0.5, -0.5]))).mean()
    size = -jax.nn.log_softmax(jnp.array([1.0, 0, 0, 0]))[3]
    np.testing.assert_allclose(whole[0] - bare[0], 0.3 * (old + size - np.log(jax.nn.sigmoid(1.0))), rtol=1e-5)
    np.testing.assert_allclose(whole[1], bare[1])  # what is not known is not learned
    four = loss(Outputs(jnp.array([[0.0, 1, 0, 0], [0.0, 0, 0, 0]]), {}), even, hypers)
    np.testing.assert_allclose(four, [-jax.nn.log_softmax(jnp.array([0.0, 1, 0, 0]))[1], np.log(4.0)], rtol=1e-6)


@pytest.mark.parametrize("width", [2, 4])
def test_the_weights_leave_probabilities_at_the_frequencies_of_training(width):
    sides = np.array([0] * 6 + [1] * 3 + [2] * 2 + [3])
    labels = np.stack([sides, *[np.full(12, -1)] * 4], 1).astype(np.int8)
    scans = stroke_data.Scans(np.zeros((12, 2, 1, 2, 1), np.uint8), labels, np.arange(12).astype(str), {})
    targets = jax.tree.map(jnp.asarray, targets_of(scans))
    mean = lambda free: loss(Outputs(jnp.tile(free, (12, 1)), {}), targets, stroke_ct(size=32).hypers).mean()
    free = jnp.zeros(width)
    step = jax.jit(lambda f: f - 2.0 * jax.grad(mean)(f))
    for _ in range(400):
        free = step(free)
    # a network that sees nothing; both sides have the same weights, so each has its own frequency
    expected = [5 / 12, 4 / 12] if width == 2 else None
    found = jax.nn.sigmoid(free) if width == 2 else jax.nn.softmax(free)
    np.testing.assert_allclose(found, [6 / 12, 3 / 12, 2 / 12, 1 / 12] if expected is None else found, atol=1e-3)
    if width == 2:
        both = np.array([4, 3]) / 12  # with weights w_1 / w_0 = 17 / 7 of all halves, odds are o * w / w
        np.testing.assert_allclose(found, both, atol=1e-3)


def test_decisions_and_probabilities():
    two = jnp.array([[-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [1.0, 1.0], [0.2, -3.0]])
    np.testing.assert_array_equal(scan_decision(two), [0, 1, 2, 3, 1])
    np.testing.assert_array_equal(scan_decision(two, 0.6), [0, 1, 2, 3, 0])
    four = jnp.log(jnp.array([[0.6, 0.2, 0.1, 0.1], [0.4, 0.1, 0.3, 0.2], [0.1, 0.2, 0.2, 0.5]]))
    np.testing.assert_array_equal(scan_decision(four), [0, 2, 3])
    np.testing.assert_array_equal(scan_decision(four, 0.3), [1, 2, 3])
    np.testing.assert_allclose(side_probabilities(four), [[0.3, 0.2, 0.4], [0.3, 0.5, 0.6], [0.7, 0.7, 0.9]], atol=1e-6)
    p = side_probabilities(jnp.array([0.0, 0.0]))
    np.testing.assert_allclose(p, [0.5, 0.5, 0.75])
    logits = np.stack([np.array([0.0, 1.0, 2.0, 3.0]), np.full(4, -9.0)], 1)
    threshold = tuned_threshold(logits, [0, 0, 1, 1])
    np.testing.assert_array_equal(scan_decision(logits, threshold), [0, 0, 1, 1])
    assert tuned_threshold(np.zeros((2, 2)) - 9.0, [0, 0]) == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(head="four-class", compare="difference"), "compare.*none with --head four-class"),
        (dict(tasks=("olf",)), "tasks.*some of old, size, atrophy, calcified"),
        (dict(size=40), "size.*a multiple of 16"),
        (dict(compare="sum"), "compare"),
        (dict(batch_size=1), "batch_size.*at least 2"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        stroke_ct(**change)


def changed(rows, **entries):
    return [row | {name: values[i] for name, values in entries.items()} for i, row in enumerate(rows)]


def test_from_phantoms_to_a_table(tmp_path, capsys, untrained):
    pytest.importorskip("nibabel")
    pytest.importorskip("nilearn")
    run = lambda *argv: cli.main([str(a) for a in argv])
    data, model, out = tmp_path / "scans", tmp_path / "run", tmp_path / "out"
    assert run("phantoms", "ct", "--num", 24, "--slices", 3, "--size", 32, "--out", data) in (None, 0)
    tiny = dict(size=32, slices=3, widths=(2, 2), batch_size=4, tasks=("old",))
    untrained(stroke_ct(data=str(data), **tiny), model)
    more = tmp_path / "more"
    more.mkdir()
    (more / "broken.nii").write_bytes(b"no volume")
    write_volume(more / "thin.nii", read_volume(data / "scan0000.nii.gz").hu[:2], (5.0, 7.0, 7.0))
    command = ("detect-stroke", data, more, "--model", model, "--labels", data / "scans.csv")
    assert run(*command, "--out", out) == 0
    printed = capsys.readouterr().out
    table = pd.read_csv(out / "results.csv")
    assert list(table.status).count("ok") == 24
    reasons = table[table.status == "skipped"].set_index(table.file.str.split("/").str[-1][table.status == "skipped"])
    assert "cannot be read as NIfTI" in reasons.reason["broken.nii"]
    assert reasons.reason["thin.nii"] == "found 2 slices, expected at least 3"
    good = table[table.status == "ok"]
    decided = np.where(good.p_left > 0.5, 1, 0) + np.where(good.p_right > 0.5, 2, 0)
    assert [("none", "left", "right", "both")[d] for d in decided] == list(good.decision)
    assert good.tilt_degrees.abs().max() < 10
    assert good.brain_cm3.between(200, 1500).all()
    assert len(list((out / "overlays").iterdir())) == 24
    report = pd.read_csv(out / "subgroups.csv")
    assert report.scans[0] == 24
    assert set(report.factor) == {"all", "size", "number", "timing", "old", "calcified", "atrophy"}
    assert pd.read_csv(out / "cross.csv").scans.sum() == 24
    assert "presence and side right in" in printed
    # what has a row is not measured again
    kept, removed = data / "scan0001.nii.gz", out / "overlays" / "scan0000.nii.png"
    removed.unlink()
    pd.read_csv(out / "results.csv", dtype=str)[lambda t: t.file != str(kept)].to_csv(out / "results.csv", index=False)
    assert run(*command, "--out", out, "--resume") == 0
    again = pd.read_csv(out / "results.csv")
    pd.testing.assert_frame_equal(again, table)
    assert not removed.exists()
    pd.testing.assert_frame_equal(pd.read_csv(out / "subgroups.csv"), report)
    capsys.readouterr()
    for argv, message in (
        ((*command, "--threshold", 0.4, "--out", out, "--resume"), "--resume: threshold: found 0.4, expected 0.5"),
        ((*command, "--threshold", 1, "--out", tmp_path / "x"), "--threshold 1: expected more than 0"),
        (("detect-stroke", tmp_path / "none", "--model", model, "--out", tmp_path / "x"), "not found"),
    ):
        assert run(*argv) == 2
        assert message in capsys.readouterr().err
    # what a table may not say
    rows = list(csv.DictReader((data / "scans.csv").open()))

    def written(rows):
        with open(data / "scans.csv", "w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
        stroke_data.read_folder.cache_clear()

    together = next(i for i in range(23) if rows[i]["patient"] == rows[i + 1]["patient"])
    halves = ["train" if i <= together else "valid" for i in range(24)]
    for entries, message in (
        (dict(split=halves), f"split: found patient {rows[together]['patient']} in train and valid"),
        (dict(split=["train"] * 23 + ["tset"]), "line 25: split: found 'tset'"),
        (dict(side=["up"] * 24), "side: found 'up', expected one of none, left, right, both"),
        (dict(file=["none.nii"] + [r["file"] for r in rows[1:]]), "none.nii: not found"),
        (
            dict(file=["scan0001.nii.gz"] + [r["file"] for r in rows[1:]]),
            "line 3: file: found scan0001.nii.gz a second",
        ),
        (dict(file=["masks/scan0000.nii.gz"] + [r["file"] for r in rows[1:]]), "scan0000.nii.gz: found no row in"),
        (dict(atrophy=["much"] * 24), "atrophy: found 'much', expected yes, no or a degree"),
    ):
        written(changed(rows, **entries))
        with pytest.raises(UserError, match=message):
            stroke_data.read_folder(str(data), 3, 32)
    short = read_volume(data / "scan0000.nii.gz").hu[:2]
    write_volume(data / "scan0000.nii.gz", short, (5.0, 7.0, 7.0))
    written(changed(rows, split=[("train", "valid", "test")[int(r["patient"][1:]) % 3] for r in rows]))
    scans, part = stroke_data.read_folder(str(data), 3, 32)
    assert set(part) == {0, 1, 2}
    assert len(part) == len(scans.labels) == len(scans.factors["size"]) == 23
    assert "scan0000.nii.gz: found 2 slices, expected at least 3, left out" in capsys.readouterr().out
    assert not {*scans.patients[part == 0]} & {*scans.patients[part == 1]}


def test_the_claim_compares_decisions_with_the_truth():
    scans = stroke_data.phantom_scans(0, 60, 3, 32, Design(source="ellipses"))
    side = scans.labels[:, stroke_data.SIDE]
    row = study.compared(side, scans)
    assert row["accuracy"] == row["accuracy, size S"] == row["accuracy, old strokes"] == 1.0
    assert row["M - S"] == row["error that old strokes add"] == 0.0
    none = study.compared(np.zeros(60, int), scans)
    assert none["accuracy"] == none["presence"] == (side == 0).mean()
    assert none["accuracy, size L"] == 0.0
    wrong = np.where(scans.factors["old"] != "none", 3 - side, side)
    assert study.compared(wrong, scans)["error that old strokes add"] > 0.9
    # "small" is right on all but small lesions
    small = np.where(scans.factors["size"] == "S", 0, side)
    assert study.compared(small, scans)["M - S"] == 1.0
