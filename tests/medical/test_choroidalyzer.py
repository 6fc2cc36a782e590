"""Choroidalyzer: the card's numbers of slabs, fovea, padding, weights, augmentation, loss, baselines, folders."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxstack import cli
from jaxstack.core.errors import UserError
from jaxstack.medical import choroidalyzer as ch
from jaxstack.medical import vessels
from jaxstack.medical.phantoms_oct import DEVICES, oct_set
from jaxstack.medical.segmentation import dice
from jaxstack.nn import torch_weights as tw
from jaxstack.nn.vision.unet import UNet

Y, X = np.mgrid[:768, :768]


def slab(thickness=60, slope=0.0):
    """A choroid of whole rows in columns 10 to 757."""
    top = np.rint(300 + slope * (X - 384)).astype(int)
    return (top <= Y) & (top + thickness > Y) & (X >= 10) & (X <= 757)


def store(path, arrays):
    np.savez(path, **arrays)


def test_slabs_have_the_released_numbers():
    measure = jax.jit(ch.measure, static_argnames=("released", "cvi_row_offset"))
    region = slab()
    released = measure(region, region & (Y % 2 == 0), (384, 300), released=True)
    np.testing.assert_array_equal(released.thickness_um, [228, 228, 228])
    np.testing.assert_allclose(
        [released.area_mm2, released.cvi, released.vessel_area_mm2], [1.392685, 0.5, 0.696342], atol=2e-6
    )
    # thickness is that of all rows by default
    np.testing.assert_allclose(measure(region, region, (384, 300)).thickness_um, 60 * 3.87, rtol=1e-5)
    sloped = slab(slope=0.1)
    found = measure(sloped, sloped & (Y % 2 == 0), (384, 300), released=True, cvi_row_offset=1)
    np.testing.assert_array_equal(found.thickness_um, [228, 228, 228])
    np.testing.assert_allclose([found.area_mm2, found.cvi], [1.392685, 0.49253], atol=2e-6)
    # vessels everywhere: all of it, but for the row above the window that the release reads
    assert float(measure(region, region, (384, 300)).cvi) == 1.0
    above = measure(region, region, (384, 300), cvi_row_offset=1)
    assert float(above.cvi) == pytest.approx(59 / 60)
    none = measure(region & (np.abs(X - 384) < 100), region, (384, 300))
    assert not none.ok
    assert [float(v) for v in (none.thickness_um.sum(), none.area_mm2, none.cvi, none.vessel_area_mm2)] == [0.0] * 4


def test_measures_scale_and_mirror():
    scans = oct_set(3, 2)
    region, vessel = scans.region[0], scans.vessels[0]
    fovea, scale = scans.fovea[0], scans.scale[0]
    one = ch.measured(region, vessel, fovea, scale, 2500.0)
    assert one.ok
    wider = ch.measured(region, vessel, fovea, scale * np.array([1.5, 1.0], np.float32), 3750.0)
    np.testing.assert_array_equal(wider.roi, one.roi)
    np.testing.assert_allclose(wider.area_mm2, 1.5 * one.area_mm2, rtol=1e-5)
    np.testing.assert_allclose(wider.cvi, one.cvi)
    taller = ch.measured(region, vessel, fovea, scale * np.array([1.0, 2.0], np.float32), 2500.0)
    np.testing.assert_allclose(taller.thickness_um, 2.0 * one.thickness_um, rtol=1e-5)
    mirror = np.array([region.shape[1] - 1 - np.rint(fovea[0]), fovea[1]], np.float32)
    straight = ch.measured(region, vessel, np.rint(fovea), scale, 2500.0)
    turned = ch.measured(region[:, ::-1], vessel[:, ::-1], np.rint(mirror), scale, 2500.0)
    np.testing.assert_allclose(turned.thickness_um, straight.thickness_um[::-1], rtol=1e-5)
    np.testing.assert_allclose(turned.area_mm2, straight.area_mm2, rtol=0.02)  # the last column is not counted
    # pixels against the trapezoid of the boundaries, and against plain counting
    inside = np.asarray(one.roi)
    heights = inside.sum(0)[inside.any(0)]
    area = (heights[:-1] + heights[1:]).sum() / 2 + (heights[0] + heights[-1]) / 2
    np.testing.assert_allclose(one.area_mm2, area * scale.prod() * 1e-6, rtol=0.01)
    np.testing.assert_allclose(one.cvi, vessel[inside].mean(), rtol=1e-5)
    both = jax.vmap(lambda *scan: ch.measured(*scan, 2500.0))(scans.region, scans.vessels, scans.fovea, scans.scale)
    np.testing.assert_allclose(both.area_mm2[0], one.area_mm2)


def test_the_fovea_is_where_it_is_put_and_rows_can_mislead():
    weights = ch.fovea_filter(21)
    assert weights.sum() == pytest.approx(1.0)
    assert weights.max() == pytest.approx(1 / 12)
    assert (weights == weights.max()).sum() == 3
    assert ch.fovea_filter(51).max() == pytest.approx(0.0350877, abs=1e-6)
    rng = np.random.default_rng(0)
    find = jax.jit(ch.fovea_from_prob, static_argnames=("kx", "ky", "joint"))
    p = np.zeros((128, 160), np.float32)
    p[70, 47] = 0.8
    for joint in (True, False):
        found = find(p, joint=joint)
        # the filter has a flat top of three columns, of which the release takes the first
        assert (int(found.x), int(found.y)) == ((47, 70) if joint else (46, 69))
        assert float(found.score) == pytest.approx(0.8)
    y, x = np.mgrid[:200, :200]
    blob = 0.8 * np.exp(-0.5 * ((x - 60) ** 2 + (y - 60) ** 2) / 36)
    band = 0.3 * ((y >= 140) & (y < 150) & (x >= 100) & (x < 190))
    p = np.maximum(blob, band).astype(np.float32)
    together, apart = find(p), find(p, joint=False)
    assert abs(int(together.x) - 60) <= 1
    assert abs(int(together.y) - 60) <= 1
    assert abs(int(apart.y) - 144) <= 2  # the release's rows
    # a mirrored scan has a mirrored fovea, and SciPy's filter finds the same
    p = rng.random((128, 192), np.float32)
    assert int(find(p[:, ::-1]).x) == 191 - int(find(p).x)
    from scipy.ndimage import correlate1d

    assert int(find(p).x) == correlate1d(p.sum(0), ch.fovea_filter(21), mode="mirror").argmax()
    assert int(find(p, joint=False).y) == correlate1d(p.sum(1), ch.fovea_filter(51), mode="mirror").argmax()
    with pytest.raises(UserError, match="found a size of 20, expected an odd number"):
        ch.fovea_filter(20)
    with pytest.raises(UserError, match="found a size of 51 for 20 pixels"):
        ch.fovea_from_prob(np.zeros((20, 40)))


def test_padding_is_explicit_and_weights_are_found_by_their_shapes(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (2, 40, 70), np.uint8)
    x = ch.preprocess(image, 32)
    assert x.shape == (2, 64, 96, 1)
    np.testing.assert_allclose(x[:, :40, :70, 0], image / 127.5 - 1.0, atol=1e-6)
    assert not x[:, 40:].any()
    assert not x[:, :, 70:].any()
    np.testing.assert_allclose(x, ch.preprocess(image.astype(np.float32) / 255, 32), atol=1e-6)
    net = UNet((4, 6, 8))
    variables = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    weights = tw.to_torch(net, variables)
    for prefix in ("", "module.", "model."):
        store(tmp_path / "net.npz", {prefix + k: v for k, v in weights.items()})
        same, loaded = ch.load_weights(tmp_path / "net.npz")
        assert same.channels == (4, 6, 8)
        assert all((a == b).all() for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(variables), strict=True))
    # two sizes in one process, each with its own padding
    predict, apply = jax.jit(lambda v, x: ch.predict(same, v, x)), jax.jit(net.apply)
    for shape in ((2, 40, 70), (1, 9, 11)):
        part = image[: shape[0], : shape[1], : shape[2]]
        p = predict(loaded, part)
        assert p.shape == (*shape, 3)
        logits: Any = apply(variables, ch.preprocess(part, 4))
        np.testing.assert_allclose(p, jax.nn.sigmoid(logits)[:, : shape[1], : shape[2]], atol=1e-6)
    store(tmp_path / "other.npz", {"conv0.weight": np.zeros((2, 2)), "fc.bias": np.zeros(2)})
    with pytest.raises(
        UserError, match=r"other.npz: found tensors conv0.weight, fc.bias, expected in_conv.conv.weight"
    ):
        ch.load_weights(tmp_path / "other.npz")
    store(tmp_path / "other.npz", {k: v for k, v in weights.items() if "out_conv.1" not in k})
    with pytest.raises(UserError, match=r"other.npz: out_conv.1.bias is missing"):
        ch.load_weights(tmp_path / "other.npz")


def test_augmentation_moves_image_masks_and_fovea_together():
    height, width, many = 64, 96, 24
    y, x = np.mgrid[:height, :width]
    fovea = np.array([40.0, 25.0], np.float32)
    image = (0.05 + 0.9 * np.exp(-0.5 * ((x - 40) ** 2 + (y - 25) ** 2) / 9)).astype(np.float32)
    masks = ((np.abs(y - 25) < 8) + 2 * (np.hypot(x - 40, y - 25) < 6)).astype(np.uint8)
    keys = jax.random.split(jax.random.key(0), many)
    run = jax.jit(jax.vmap(ch.augmented, in_axes=(0, None, None, None)))
    images, moved, foveas = run(keys, image, masks, fovea)
    assert set(np.unique(moved)) <= {0, 1, 2, 3}
    assert moved.dtype == jnp.uint8
    assert images.min() >= 0
    assert images.max() <= 1
    flipped = 0
    for one, mask, (fx, fy) in zip(np.asarray(images), np.asarray(moved), np.asarray(foveas)):
        ys, xs = np.nonzero(mask & 2)
        assert np.hypot(xs.mean() - fx, ys.mean() - fy) < 1.0
        bright = np.where(mask & 2, one - one.min(), 0.0)
        assert abs((bright * x).sum() / bright.sum() - fx) < 1.5
        flipped += abs(fx - 55) < abs(fx - 40)
    assert 4 <= flipped <= 20
    assert (np.asarray(foveas).std(0) > 1.0).all()
    np.testing.assert_array_equal(run(keys, image, masks, fovea)[0], images)
    # without augmentation a batch is what the source has
    config = ch.Config(augment=False)
    plain, targets = ch.augment(config)(keys[0], (masks[None], masks[None], np.array([[-1.0, -1.0]], np.float32)))
    np.testing.assert_allclose(plain[0], masks / 255.0)
    assert not targets.known.any()


def test_the_loss_is_least_at_the_truth_and_weights_switch_channels_off():
    scans = ch.phantom_scans(0, 4, (64, 96), ("A", "C"))
    one = oct_set(0, 2, DEVICES["A"]._replace(size=(64, 96)))
    np.testing.assert_array_equal(scans.masks[2], one.region[1] + 2 * one.vessels[1])
    targets = ch.Targets(scans.masks, scans.fovea, np.array([True, True, True, False]))
    wanted = ch.channels(targets, 3.0)
    np.testing.assert_array_equal(wanted[..., 0], scans.masks & 1)
    np.testing.assert_array_equal(wanted[..., 1], scans.masks >> 1)
    y, x = np.unravel_index(np.asarray(wanted[0, ..., 2]).argmax(), (64, 96))
    np.testing.assert_allclose([x, y], scans.fovea[0], atol=0.51)
    value = jax.jit(ch.loss(3.0))
    hypers = ch.Hypers(fovea_weight=1.0)
    right = 12.0 * (2.0 * wanted - 1.0)
    assert (value(right, targets, hypers) < 0.5).all()
    assert (value(0.0 * right, targets, hypers) > 1.0).all()
    grad = jax.jit(jax.grad(lambda z, h: ch.loss(3.0)(z, targets, h).sum()))
    everything = grad(0.0 * right, hypers)
    assert (jnp.abs(everything).sum((0, 1, 2)) > 0).all()
    assert not everything[3, ..., 2].any()  # an unknown fovea
    alone = grad(0.0 * right, hypers._replace(vessel_weight=0.0, fovea_weight=0.0))
    assert not alone[..., 1:].any()
    np.testing.assert_allclose(alone[..., 0], everything[..., 0], rtol=1e-5)
    error = jax.jit(ch.fovea_error((3, 3)))(right, targets, hypers)
    assert error.shape == (4,)
    assert (error[:3] <= 2.0).all()
    assert error[3] == 0


def test_thresholds_find_dark_vessels():
    assert list(vessels.median_cut([1.0, 2.0, 3.0, 10.0], 2)) == [0, 0, 1, 1]
    assert list(vessels.median_cut([5.0, 5.0, 5.0], 3)) == [0, 0, 0]
    assert list(vessels.median_cut([1.0, 9.0, 9.0, 9.0], 2)) == [0, 1, 1, 1]
    values = np.random.default_rng(0).random((20, 30))
    label = vessels.median_cut(values, 8)
    assert set(label.ravel()) == set(range(8))
    assert (np.diff(label.ravel()[values.ravel().argsort()]) >= 0).all()
    region = np.zeros((40, 60), bool)
    region[10:30] = True
    image = np.where(region, 0.6, 0.95)
    image[18:22, 20:30] = 0.2
    found = vessels.niblack_vessels(image, region, 21)
    np.testing.assert_array_equal(found[:, 15:35], (image == 0.2)[:, 15:35])
    assert not found[~region].any()
    with pytest.raises(UserError, match="window=10: expected an odd number"):
        vessels.niblack_vessels(image, region, 10)
    pytest.importorskip("skimage")
    assert not vessels.mmcq_vessels(image, np.zeros_like(region)).any()
    scans = oct_set(1, 3)
    scores = []
    for i in range(3):
        found = vessels.mmcq_vessels(scans.image[i], scans.region[i], float(scans.scale[i, 1]))
        assert not found[~scans.region[i]].any()
        scores.append(float(dice(found, scans.vessels[i])))
    guess = [2 * s / (1 + s) for s in scans.vessels.sum((1, 2)) / scans.region.sum((1, 2))]  # all of the region
    assert np.mean(scores) > 0.45, (scores, guess)
    vote = vessels.mmcq_vessels(scans.image[0], scans.region[0], 15.0, gammas=(None, 0.8, 1.2), contrasts=(1.5, 2.0))
    assert 0.0 < vote.sum() < scans.region[0].sum()


def test_folders_train_and_name_what_is_wrong(tmp_path):
    folder = tmp_path / "scans"
    argv = ("phantoms", "oct", "--num", "6", "--size", "48", "64", "--out", str(folder))
    assert cli.main(list(argv)) == 0
    (scans, patients), drawn = ch.read_folder(folder, (48, 64)), oct_set(0, 6, DEVICES["A"]._replace(size=(48, 64)))
    np.testing.assert_array_equal(scans.masks, drawn.region + 2 * drawn.vessels)
    np.testing.assert_allclose(scans.images, drawn.image * 255, atol=0.51)
    np.testing.assert_allclose(scans.fovea, drawn.fovea, atol=1e-4)
    assert len(set(patients)) == 6
    half, _ = ch.read_folder(folder, (96, 128))
    np.testing.assert_allclose(half.fovea, 2 * drawn.fovea + 0.5, atol=1e-3)
    assert set(np.unique(half.masks)) <= {0, 1, 3}
    # scans of a patient stay together
    table = (folder / "scales.csv").read_text().splitlines()
    lines = [f"{line},{name}" for line, name in zip(table, ("patient", "a", "a", "a", "b", "b", "b"))]
    (folder / "scales.csv").write_text("\n".join(lines))
    part, valid = ch.parts(ch.Config(data=str(folder), size=(48, 64), batch_size=2))
    assert (len(part.images), len(valid.images)) == (3, 3)
    Image.fromarray(np.zeros((10, 64), np.uint8)).save(folder / "region" / "scan0001.png")
    with pytest.raises(UserError, match=r"region/scan0001.png: found 64 x 10 pixels, expected at least 32 x 32"):
        ch.read_folder(folder, (48, 64))
    Image.fromarray(np.zeros((50, 64), np.uint8)).save(folder / "region" / "scan0001.png")
    with pytest.raises(UserError, match=r"region/scan0001.png: found 50x64 pixels, expected the scan's 48x64"):
        ch.read_folder(folder, (48, 64))
    with pytest.raises(UserError, match=r"scales.csv: cannot be read .*expected a table of file, um_x, um_y"):
        ch.read_folder(tmp_path, (48, 64))
    for changes, message in {
        "size=(16, 64)": dict(size=(16, 64)),
        "scanners=('Z',): expected some of A, B, C": dict(scanners=("Z",)),
        "channels=8: expected at least two": dict(channels=(8,)),
        "fovea_filter=(4, 9): expected two odd": dict(fovea_filter=(4, 9)),
        "dice_weight=-1": dict(dice_weight=-1.0),
    }.items():
        with pytest.raises(UserError) as found:
            ch.choroidalyzer(**message)
        assert changes in str(found.value)
