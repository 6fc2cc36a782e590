"""DeepGPET: the tracer on known edges, augmentation, padding, folders, weights, commands."""

import csv
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from jaxstack import cli, learners
from jaxstack.core.errors import UserError
from jaxstack.core.runner import train
from jaxstack.medical import deepgpet, gpet, phantoms_oct
from jaxstack.nn.supervised import variables
from jaxstack.nn.torch_weights import to_torch
from jaxstack.nn.vision.unet_mobilenet import UNetMobileNetV3

TINY = dict(size=(32, 64), batch_size=4, width=0.1, decoder=(2, 2, 2, 2, 2), most_blocks=1)


def test_the_tracer_finds_a_known_edge():
    x = np.arange(160)
    edge = 40 + 6 * np.sin(x / 25) + 0.05 * x
    rng = np.random.default_rng(0)
    image = np.where(np.arange(80)[:, None] < edge, 0.7, 0.3) + 0.1 * rng.normal(size=(80, 160))
    image[10] = 0.0  # a stronger edge that is not between the end points
    gradient = gpet.edge_map(image, False)
    assert gradient.min() == 0
    assert gradient.max() == 1
    ends = (0, edge[0]), (159, edge[-1])
    settings = gpet.Settings(height=0.1)
    found = gpet.trace_edge(np.random.default_rng(1), gradient, *ends, settings)
    assert np.abs(found.rows - edge).mean() < 0.7
    np.testing.assert_allclose(found.rows[[0, -1]], edge[[0, -1]], atol=1e-2)
    assert ((found.low <= found.rows) & (found.rows <= found.high)).all()
    assert (found.high - found.low)[80] > (found.high - found.low)[0]
    # eight bins, five of them new in each round
    assert found.rounds <= 2
    same = gpet.trace_edge(np.random.default_rng(1), gradient, *ends, settings)
    np.testing.assert_array_equal(found.rows, same.rows)
    # a part of the image, another kernel
    part = gpet.trace_edge(rng, gradient, (20, edge[20]), (120, edge[120]), settings._replace(kernel="matern", bins=10))
    np.testing.assert_array_equal(part.columns, np.arange(20, 121))
    assert np.abs(part.rows - edge[20:121]).mean() < 0.8
    # an edge from dark to bright is another map
    assert gpet.edge_map(image, True)[:, 80].argmax() != gradient[:, 80].argmax()
    for wrong in (((0, 90), (159, 5)), ((159, 5), (0, 5)), ((0, 5), (3, 5))):
        with pytest.raises(UserError, match="inside of 160 columns and 80 rows, the end at least"):
            gpet.trace_edge(rng, gradient, *wrong)
    with pytest.raises(UserError, match="kernel='cubic': expected 'rbf' or 'matern'"):
        gpet.trace_edge(rng, gradient, *ends, gpet.Settings(kernel="cubic"))


def test_a_curve_costs_its_length_over_what_it_meets():
    gradient = np.zeros((20, 41))
    gradient[8] = 0.5
    flat, tilted = np.full(41, 8.0), 8.0 + np.zeros(41)
    assert gpet.cost(flat[None], gradient, 0)[0] == pytest.approx(40 / 20)
    # between two rows the gradient is interpolated: half of it
    assert gpet.cost(flat[None] + 0.5, gradient, 0)[0] == pytest.approx(40 / 10)
    tilted = np.linspace(0, 10, 41)
    ones = np.ones((20, 41))
    assert gpet.cost(tilted[None], ones, 0)[0] == pytest.approx(1.0)
    # off the edge is far worse than on it, and no edge at all is finite
    assert gpet.cost(flat[None] + 4, gradient, 0)[0] > 1e6
    part = gpet.cost(np.full((1, 11), 8.0), gradient, 30)
    assert part[0] == pytest.approx(2.0)


def test_labels_lie_near_the_truth():
    scans = deepgpet.phantom_scans(3, 3)
    masks = deepgpet.gpet_masks(scans, gpet.Settings(height=0.025))
    overlap = 2 * (masks & scans.masks).sum((1, 2)) / (masks.sum((1, 2)) + scans.masks.sum((1, 2)))
    assert (overlap > 0.8).all()
    errors = deepgpet.boundary_errors(masks, scans.masks)
    assert (errors["top absolute"] < 1.5).all()
    assert (np.abs(errors["bottom signed"]) <= errors["bottom absolute"]).all()
    moved = np.roll(scans.masks, 2, axis=1)
    np.testing.assert_allclose(deepgpet.boundary_errors(moved, scans.masks)["top signed"], 2.0)
    with pytest.raises(UserError, match="mask 1: found 0 columns with a choroid, expected at least 5"):
        deepgpet.gpet_masks(deepgpet.Scans(scans.images, scans.masks * np.array([1, 0, 1], bool)[:, None, None]))


def test_augmentation_moves_masks_with_images_and_noise_leaves_them():
    scan = deepgpet.phantom_scans(0, 1)
    image = jnp.asarray(scan.images[0], jnp.float32) / 255
    mask = jnp.asarray(scan.masks[0])
    keys = jax.random.split(jax.random.key(0), 48)
    many = jax.jit(jax.vmap(deepgpet.augmented, in_axes=(0, None, None, None)))
    images, masks = many(keys, image, mask, True)
    calm, same = many(keys, image, mask, False)
    np.testing.assert_array_equal(masks, same)
    noisy = np.asarray(jnp.abs(images - calm).max((1, 2)) > 0)
    assert 12 <= noisy.sum() <= 36
    assert images.min() >= 0
    assert images.max() <= 1
    # flips and affine maps alone change the mask: a half of it flipped, a quarter moved
    kept = (masks == mask).all((1, 2)).sum()
    flipped = (masks == mask[:, ::-1]).all((1, 2)).sum()
    assert kept > 8
    assert flipped > 8
    assert 4 <= 48 - kept - flipped <= 24
    # the affine map takes the mask where it takes the image
    painted, moved = jax.jit(jax.vmap(deepgpet.moved, in_axes=(0, None, None)))(keys, mask.astype(jnp.float32), mask)
    assert moved.dtype == bool
    assert float(jnp.abs(painted - moved).mean()) < 0.02
    assert float((moved != mask).mean()) > 0.01


def test_padding_is_cropped_away():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (40, 70), np.uint8)
    x, left = deepgpet.padded(deepgpet.normalised(image / 255.0))
    assert x.shape == (64, 96)
    assert left == 0
    assert not x[40:].any()
    assert not x[:, 70:].any()
    # a zero is an intensity of 0.1
    assert deepgpet.normalised(0.1) == 0
    assert deepgpet.normalised(0.3) == pytest.approx(1.0)
    y, left = deepgpet.padded(image.astype(np.float32), "reflect", 50)
    assert (y.shape, left) == ((64, 160), 32)
    np.testing.assert_array_equal(y[:40, 32:102], image)
    np.testing.assert_array_equal(y[40:, 32:102], image[38:14:-1])
    np.testing.assert_array_equal(y[:40, :32], image[:, 32:0:-1])

    class Identity:
        """Gives back its input as logits."""

        def apply(self, given, x):
            return x + given

    # the crop takes what the image's pixels gave
    for mode, extra in (("zero", 0), ("zero", 64), ("reflect", 32)):
        found = deepgpet.segment(Identity(), jnp.float32(0.0), image, mode, extra)
        expected = 1 / (1 + np.exp(-deepgpet.normalised(image / 255.0)))
        np.testing.assert_allclose(found, expected, atol=1e-5)
    whole = deepgpet.segment(Identity(), jnp.float32(0.0), np.zeros((64, 96), np.uint8))
    assert whole.shape == (64, 96)
    for wrong, message in (
        (dict(pad_mode="edge"), "pad_mode='edge': expected 'zero' or 'reflect'"),
        (dict(extra_cols=-1), "extra_cols=-1: expected at least 0"),
        (dict(pad_mode="reflect", extra_cols=96), "image of 40x70 pixels: too small to be mirrored"),
    ):
        with pytest.raises(UserError, match=message):
            deepgpet.padded(image.astype(np.float32), **wrong)
    with pytest.raises(UserError, match=r"image: found int64 \[4, 4\], expected uint8 or float"):
        deepgpet.segment(Identity(), jnp.float32(0.0), np.zeros((4, 4), int))
    spots = np.zeros((6, 6))
    spots[1, 1], spots[3:5, 3:5], spots[0, 5] = 0.9, 0.6, 0.5
    np.testing.assert_array_equal(deepgpet.outlined(spots), ndimage.binary_dilation(spots > 0.55) & (spots == 0.6))


def test_averages_begin_when_they_are_asked_to():
    learner = deepgpet.deepgpet(num_train=4, num_valid=1, num_updates=4, ema_decay=0.5, augment=False, **TINY)
    source = learner.source(learner.config)
    step = jax.jit(lambda s, i: learner.step(s, source.batch(source.constants(), i, jax.random.key(0))))
    state = jax.jit(learner.init)(jax.random.key(0), learner.hypers)
    for i in range(3):
        before = state
        state, metrics = step(state, jnp.arange(4))
        mixed = jax.tree.map(lambda a, b: 0.5 * a + 0.5 * b, before.ema["params"], state.params)
        expected = state.params if i < 2 else mixed
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.ema["params"], expected)
    assert set(metrics) >= {"train/dice", "train/iou", "loss/train"}


def test_folders_train_and_are_outlined(tmp_path, capsys):
    run = lambda *argv: cli.main([str(a) for a in argv])
    folder, stored = tmp_path / "scans", tmp_path / "run"
    assert run("phantoms", "oct", "--num", 11, "--size", 40, 60, "--out", folder) == 0
    scans = deepgpet.read_folder(folder, (64, 64))
    truth = phantoms_oct.oct_set(0, 11, phantoms_oct.DEVICES["A"]._replace(size=(40, 60)))
    np.testing.assert_array_equal(scans.masks[:, :40, :60], truth.region)
    assert (scans.images[:, 40:] == 26).all()
    assert not scans.masks[:, :, 60:].any()
    options = dict(data=str(folder), num_updates=2, labels="gpet") | TINY | dict(size=(64, 64))
    learner = learners.make("jaxstack.medical.deepgpet:deepgpet", **options)
    result = train(learner, seeds=2, run_dir=stored, progress=False)
    train_part, valid = deepgpet.parts(learner.config)
    assert (len(train_part.images), len(valid.images)) == (9, 2)
    assert (
        train_part.masks != deepgpet.parts(deepgpet.deepgpet(**options | dict(labels="given")).config)[0].masks
    ).any()
    assert {"eval/dice", "eval/iou", "eval/loss"} <= set(result.metrics)
    capsys.readouterr()
    # a folder with a broken file, and the tables and masks that lie beside the scans
    (folder / "broken.png").write_bytes(b"no image")
    assert run("segment-oct", folder, "--model", stored, "--out", tmp_path / "out") == 0
    assert "11 of 12 files" in capsys.readouterr().out
    rows = {r["file"].rsplit("/", 1)[-1]: r for r in csv.DictReader((tmp_path / "out" / "results.csv").open())}
    assert rows["broken.png"]["status"] == "skipped"
    assert "cannot be read as an image" in rows["broken.png"]["reason"]
    mask = np.asarray(Image.open(tmp_path / "out" / "masks" / "scan0003.png"))
    assert mask.shape == (40, 60)
    net = UNetMobileNetV3(1, 0.1, (2,) * 5, 1)
    image = np.asarray(Image.open(folder / "scan0003.png"))
    members = [jax.tree.map(lambda x, i=i: np.asarray(x)[i], variables(result.state)) for i in range(2)]
    mean = np.mean([deepgpet.segment(net, m, image) for m in members], 0)
    np.testing.assert_array_equal(mask, deepgpet.outlined(mean))
    assert int(rows["scan0003.png"]["pixels"]) == mask.sum()
    # predict is the network of segment, in batches
    padded = np.full((1, 64, 64), 0.1, np.float32)
    padded[0, :40, :60] = image / np.float32(255)
    predict = jax.jit(lambda states, x: learner.predict(jax.tree.map(lambda v: v[0], states), x))
    found = predict(result.state, padded)[0, :40, :60]
    np.testing.assert_allclose(found, deepgpet.segment(net, members[0], image), atol=1e-5)
    assert run("segment-oct", folder / "broken.png", "--model", stored, "--out", tmp_path / "none") == 2
    (tmp_path / "again").mkdir()
    shutil.copy(folder / "scan0003.png", tmp_path / "again")
    # files of one name keep a mask each
    both = (folder / "scan0003.png", tmp_path / "again" / "scan0003.png")
    assert run("segment-oct", *both, "--model", stored, "--out", tmp_path / "both") == 0
    assert {p.name for p in (tmp_path / "both" / "masks").iterdir()} == {"scan0003.png", "scan0003-2.png"}


def test_weights_of_the_release_are_read_under_their_names(tmp_path):
    net = UNetMobileNetV3()
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 32, 32, 1)))
    rng = np.random.default_rng(0)
    given = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    state = to_torch(net, given)
    assert "encoder.model.blocks.2.0.se.conv_reduce.weight" in state
    assert state["segmentation_head.0.weight"].shape == (1, 16, 3, 3)
    for prefix in ("", "module."):
        np.savez(tmp_path / "w.npz", **{prefix + k: x for k, x in state.items()})
        _, found = deepgpet.load_weights(tmp_path / "w.npz")
        jax.tree.map(np.testing.assert_array_equal, found, given)
    state.pop("segmentation_head.0.bias")
    np.savez(tmp_path / "w.npz", **state)
    with pytest.raises(UserError, match=r"w.npz: segmentation_head.0.bias is missing"):
        deepgpet.load_weights(tmp_path / "w.npz")


def test_bad_input_is_named(tmp_path):
    with pytest.raises(UserError, match=r"region: not found, expected a folder of masks"):
        deepgpet.read_folder(tmp_path, (32, 64))
    (tmp_path / "region").mkdir()
    with pytest.raises(UserError, match="no files"):
        deepgpet.read_folder(tmp_path, (32, 64))
    for i in range(10):
        for at in (tmp_path, tmp_path / "region"):
            Image.fromarray(np.zeros((32, 64), np.uint8)).save(at / f"{i}.png")
    assert deepgpet.read_folder(tmp_path, (32, 64)).images.shape == (10, 32, 64)
    with pytest.raises(UserError, match=r"0.png: found 32x64 pixels, expected at most size=32x32"):
        deepgpet.read_folder(tmp_path, (32, 32))
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(tmp_path / "region" / "4.png")
    with pytest.raises(UserError, match=r"4.png: found 32x32 pixels, expected the scan's 32x64"):
        deepgpet.read_folder(tmp_path, (32, 64))
    (tmp_path / "7.png").unlink()
    with pytest.raises(UserError, match="7: found a scan or a mask alone, expected both"):
        deepgpet.read_folder(tmp_path, (32, 64))
    for wrong, message in (
        (dict(size=(40, 64)), "expected two multiples of 32"),
        (dict(decoder=(1, 2)), "expected five numbers of channels"),
        (dict(width=0.0), "width=0.0: expected a positive number"),
        (dict(ema_from=1.0), "ema_from=1.0: expected 0 to less than 1"),
        (dict(num_train=3), "batch_size=16: expected at most num_train=3"),
    ):
        with pytest.raises(UserError, match=message):
            deepgpet.deepgpet(**wrong)
