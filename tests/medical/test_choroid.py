"""Measures of the choroid: closed forms on slabs, boundaries, ragged ends, volume."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from jaxstack.core.errors import UserError
from jaxstack.medical import choroid
from jaxstack.medical.phantoms_oct import oct_set

UM_X, UM_Y = choroid.DEFAULT_SCALE
HEIGHT, WIDTH = 496, 768
measure = choroid.choroid_metrics


def slab(rows, slope=0.0, columns=(10, 758)):
    """Boundaries of a tilted slab, and the point of its top in the middle column."""
    x = np.arange(WIDTH)
    top = np.round(200 + slope * (x - WIDTH // 2)).astype(np.int32)
    valid = (x >= columns[0]) & (x < columns[1])
    return (top, top + rows - 1, valid), (WIDTH // 2, top[WIDTH // 2])


@pytest.mark.parametrize(("rows", "thickness", "area"), [(60, 228, 1.392685), (100, 383, 2.321141)])
def test_a_slab_has_its_closed_form(rows, thickness, area):
    trace, fovea = slab(rows)
    for axis in ("image", "choroid"):
        for perpendicular in ("vertical", "pixel", "physical"):
            options = dict(height=HEIGHT, axis=axis, perpendicular=perpendicular)
            released = measure(*trace, fovea, released=True, **options)
            np.testing.assert_array_equal(released.thickness_um, thickness)
            assert float(released.area_mm2) == pytest.approx(area, abs=2e-6)
            ours = measure(*trace, fovea, **options)
            np.testing.assert_allclose(ours.thickness_um, rows * UM_Y, rtol=1e-5)
            assert float(ours.area_mm2) == pytest.approx(522 * rows * UM_X * UM_Y * 1e-6, rel=1e-5)
            assert ours.ok
            assert int(ours.roi.sum()) == 522 * rows
            np.testing.assert_allclose(ours.upper[:, 0], [384 - 261, 384, 384 + 261])
            np.testing.assert_allclose(ours.lower[:, 1], 200 + rows - 0.5)
    # five places are at half the distance too, one is the fovea alone
    found = measure(*trace, fovea, height=HEIGHT, n_measures=5)
    np.testing.assert_allclose(found.upper[:, 0], 384 + np.array([-261, -130, 0, 130, 261]))
    assert measure(*trace, fovea, height=HEIGHT, n_measures=1).thickness_um.shape == (1,)


@pytest.mark.parametrize("slope", [0.05, 0.1, 0.2, 0.3, -0.3])
def test_a_tilted_slab_is_measured_in_micrometres(slope):
    trace, fovea = slab(60, slope)
    exact = 60 * UM_Y / np.hypot(1.0, slope * UM_Y / UM_X)
    # one place is exact to a row, as a mask's rows are whole; over neighbours the steps cancel
    plain = measure(*trace, fovea, height=HEIGHT)
    np.testing.assert_allclose(plain.thickness_um, exact, atol=UM_Y)
    np.testing.assert_allclose(measure(*trace, fovea, height=HEIGHT, n_avg=3).thickness_um, exact, atol=2.0)
    np.testing.assert_allclose(measure(*trace, fovea, height=HEIGHT, n_avg=10).thickness_um, exact, atol=0.4)
    # pixels are not square: what is perpendicular in pixels is far too long
    leaning = measure(*trace, fovea, height=HEIGHT, perpendicular="pixel", released=True)
    # the area is that of the pixels, which it does not count
    for found in (plain, leaning):
        np.testing.assert_allclose(found.area_mm2, int(found.roi.sum()) * UM_X * UM_Y * 1e-6, atol=6e-7)
    pixel = leaning.thickness_um
    rows = 59 / (1 + slope**2)
    np.testing.assert_allclose(pixel, np.hypot(UM_X * slope * rows, UM_Y * rows), atol=10.0)
    if abs(slope) == 0.3:
        assert ((pixel > 265) & (pixel < 290)).all()
    vertical = measure(*trace, fovea, height=HEIGHT, axis="image", perpendicular="vertical", released=True)
    np.testing.assert_array_equal(vertical.thickness_um, 228)
    assert float(vertical.area_mm2) == pytest.approx(1.392685, abs=2e-6)
    # along the steps of the choroid fewer columns fit into the same distance
    step = (1 - abs(slope)) * UM_X + abs(slope) * np.hypot(UM_X, UM_Y)
    columns = np.diff(measure(*trace, fovea, height=HEIGHT).upper[[0, -1], 0])[0]
    assert 2 * 3000 / step - 3 < columns <= 2 * 3000 / step + 1


def test_mirrors_scales_and_vmap():
    scans = oct_set(0, 6)
    traces = jax.vmap(choroid.boundaries)(scans.region)
    options = dict(height=128)
    every = jax.vmap(lambda t, f, s: measure(*t, f, s, **options))
    found = every(traces, scans.fovea, scans.scale)
    assert found.ok.all()
    np.testing.assert_allclose(found.area_mm2, found.roi.sum((1, 2)) * scans.scale.prod(1) * 1e-6, rtol=1e-6)
    for i in range(6):
        one = measure(*(t[i] for t in traces), scans.fovea[i], scans.scale[i], **options)
        np.testing.assert_allclose(one.thickness_um, found.thickness_um[i], rtol=1e-5)
        np.testing.assert_array_equal(one.roi, found.roi[i])
    # exact truth: columns of the window, counted by hand
    assert not (np.asarray(found.roi) & ~scans.region).any()
    vertical = jax.vmap(lambda t, f, s: measure(*t, f, s, perpendicular="vertical", **options))
    window = vertical(traces, scans.fovea, scans.scale)
    for i in range(6):
        left, middle, right = np.asarray(window.upper[i, :, 0], int)
        assert int(window.roi[i].sum()) == scans.region[i, :, left:right].sum()
        np.testing.assert_allclose(window.thickness_um[i], scans.thickness_um()[i, [left, middle, right]], rtol=1e-5)
    mirrored = jax.vmap(choroid.boundaries)(scans.region[:, :, ::-1])
    turned = every(mirrored, np.stack([191 - scans.fovea[:, 0], scans.fovea[:, 1]], 1), scans.scale)
    um_x, um_y = scans.scale[0]
    column = scans.region.sum(1).max(1) * um_x * um_y * 1e-6
    assert (np.abs(turned.area_mm2 - found.area_mm2) <= column + 1e-6).all()
    np.testing.assert_allclose(turned.thickness_um[:, ::-1], found.thickness_um, rtol=1e-4)
    # a scale that is doubled in y doubles thickness
    trace, fovea = slab(60)
    twice = measure(*trace, fovea, (UM_X, 2 * UM_Y), height=HEIGHT).thickness_um
    np.testing.assert_allclose(twice, 2 * measure(*trace, fovea, height=HEIGHT).thickness_um, rtol=1e-5)


def test_short_traces_are_zeros_and_a_flag():
    trace, fovea = slab(60, columns=(200, 700))
    found = measure(*trace, fovea, height=HEIGHT)
    assert not found.ok
    assert not found.thickness_um.any()
    assert found.area_mm2 == 0
    assert not found.roi.any()
    forced = measure(*trace, fovea, height=HEIGHT, force=True)
    assert not forced.ok
    np.testing.assert_allclose(forced.upper[:, 0], [200, 384, 645])
    np.testing.assert_allclose(forced.thickness_um, 60 * UM_Y, rtol=1e-5)
    assert int(forced.roi.sum()) == 60 * 445
    empty = (np.zeros(WIDTH, int), np.zeros(WIDTH, int), np.zeros(WIDTH, bool))
    for force in (False, True):
        nothing = measure(*empty, fovea, height=HEIGHT, force=force)
        assert not nothing.ok
        assert not np.asarray(nothing.thickness_um).any()
        assert nothing.area_mm2 == 0
    # no fovea: the middle of the choroid
    trace, _ = slab(60, columns=(20, 750))
    for none in (None, np.array([np.nan, np.nan])):
        assert measure(*trace, none, height=HEIGHT).upper[1, 0] == (20 + 749) // 2
    # the image ends with the choroid
    trace, fovea = slab(60)
    assert float(measure(*trace, fovea, height=260).thickness_um[1]) == pytest.approx(60 * UM_Y, rel=1e-5)
    # the perpendicular leaves the image: no number
    steep = (*(np.array(t) for t in slab(60, 0.5, (0, 768))[0]),)
    out = measure(*steep, (3, 9), height=HEIGHT, n_measures=1, macula_um=0.0, force=True, perpendicular="pixel")
    assert np.isnan(out.thickness_um[0])
    for options, message in (
        (dict(n_measures=2), "n_measures=2: expected an odd number"),
        (dict(axis="x"), "axis='x': expected 'choroid' or 'image'"),
        (dict(perpendicular="no"), "perpendicular='no': expected 'physical'"),
        (dict(n_avg=-1), "n_avg=-1, offset=15: expected at least 0 and 1"),
    ):
        with pytest.raises(UserError, match=message):
            measure(*trace, fovea, height=HEIGHT, **options)


def test_components_and_boundaries():
    mask = np.zeros((8, 10), bool)
    mask[1:3, 0:3] = True
    mask[3, 3] = True  # touches by a corner
    mask[6, 4:10] = True
    np.testing.assert_array_equal(
        choroid.largest_component(mask).nonzero(), (mask & (np.arange(8) < 5)[:, None]).nonzero()
    )
    measure_module = pytest.importorskip("skimage.measure")
    random = np.random.default_rng(0).uniform(size=(60, 60)) < 0.35
    labels = measure_module.label(random)
    largest = labels == np.bincount(labels[labels > 0]).argmax()
    np.testing.assert_array_equal(choroid.largest_component(random), largest)
    assert not choroid.largest_component(np.zeros((4, 5), bool)).any()
    holes = np.zeros((9, 4), bool)
    holes[[2, 5], 1] = holes[3:8, 2] = True
    found = choroid.boundaries(holes)
    np.testing.assert_array_equal(found.valid, [False, True, True, False])
    np.testing.assert_array_equal((found.top[1:3], found.bottom[1:3]), [[2, 3], [5, 7]])
    region = oct_set(0, 2).region
    traces = jax.vmap(choroid.boundaries)(region)
    np.testing.assert_array_equal(jax.vmap(lambda t: choroid.between(t, 128))(traces), region)


def test_ragged_ends_are_cut_and_gaps_filled():
    crop = jax.jit(choroid.smart_crop, static_argnames=("check", "released"))
    top = np.full(60, 10)
    bottom = np.full(60, 20)
    valid = np.ones(60, bool)
    valid[:2] = False
    trace = choroid.Boundaries(top, bottom, valid)
    found = crop(trace)
    np.testing.assert_array_equal(found.valid, valid)
    np.testing.assert_array_equal(crop(trace, released=True).valid, valid & (np.arange(60) < 59))
    top = top.copy()
    top[:5] = 13  # a step between 4 and 5
    top[3] = 15
    bottom = bottom.copy()
    bottom[50:] = 23  # one between 49 and 50
    bottom[55:] = 26
    top[30] = 14  # not near an end
    found = crop(choroid.Boundaries(top, bottom, valid))
    np.testing.assert_array_equal(np.flatnonzero(found.valid), np.arange(5, 50))
    assert found.top[30] == 14
    # only the last `check` columns count
    np.testing.assert_array_equal(
        np.flatnonzero(crop(choroid.Boundaries(top, bottom, valid), check=8).valid), np.arange(5, 55)
    )
    gap = valid.copy()
    gap[10:14] = False
    bottom = np.arange(60) // 2
    bottom[10:14] = 0
    found = crop(choroid.Boundaries(np.zeros(60, int), bottom, gap))
    assert found.valid[2:].all()
    a, b = bottom[9], bottom[14]
    np.testing.assert_array_equal(found.bottom[10:14], a + (b - a) * np.arange(1, 5) // 5)
    assert not crop(choroid.Boundaries(top, bottom, np.zeros(60, bool))).valid.any()


def test_volume_is_that_of_a_cylinder_and_never_nothing():
    rows = 60
    (top, bottom, valid), fovea = slab(rows)
    for count, dz in ((61, None), (31, None), (31, 200.0)):
        stack = [np.broadcast_to(a, (count, WIDTH)) for a in (top, bottom, valid)]
        found = choroid.choroid_volume(*stack, fovea, height=HEIGHT, dz_um=dz)
        exact = np.pi * 3.0**2 * rows * UM_Y * 1e-3
        assert float(found) == pytest.approx(exact, rel=0.02)
    z = np.array([-3.0, -2.5, -1.0, 0.0, 1.0, 2.5, 3.0])
    values = np.random.default_rng(0).normal(size=7)
    assert choroid._simpson(z) @ values == pytest.approx(integrate.simpson(values, x=z))
    short = [np.broadcast_to(a, (61, WIDTH)) for a in slab(rows, columns=(200, 700))[0]]
    assert np.isnan(choroid.choroid_volume(*short, fovea, height=HEIGHT))
    with pytest.raises(UserError, match="scans: found 19 at 240 um, expected an odd number, at least 25 for 3000 um"):
        choroid.choroid_volume(*(np.zeros((19, 4)),) * 3, fovea, height=HEIGHT)
    assert jnp.isfinite(found)
