"""DART: box counting on exact fractals, degradations, crops, the head, the pipeline, folders, phantoms."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy.special import erf
from scipy.stats import spearmanr

from jaxstack import cli
from jaxstack.claims import dart as study
from jaxstack.core.errors import UserError
from jaxstack.core.runner import train
from jaxstack.data import augment
from jaxstack.medical import dart, fundus, phantoms

POWERS = tuple(2**k for k in range(1, 9))


def cantor(levels):
    line = np.ones(1, bool)
    for _ in range(levels):
        line = np.concatenate([line, np.zeros_like(line), line])
    return line[:, None] & line[None]


def test_box_counting_is_exact_on_fractals():
    i = np.arange(512)
    sierpinski = (i[:, None] & i[None]) == 0
    found = dart.fractal_dims(sierpinski, (0, 1, 2), POWERS)
    np.testing.assert_allclose(found, np.log(3) / np.log(2), rtol=1e-5)
    np.testing.assert_allclose(dart.fractal_dims(np.ones((64, 64)), boxes=(2, 4, 8, 16)), 2.0, rtol=1e-4)
    np.testing.assert_allclose(dart.fractal_dims(np.eye(64), boxes=(2, 4, 8, 16)), 1.0, rtol=1e-5)
    np.testing.assert_allclose(dart.fractal_dims(cantor(5), boxes=(3, 9, 27, 81)), np.log(4) / np.log(3), rtol=1e-5)
    assert np.isnan(dart.fractal_dims(np.zeros((32, 32)))).all()


def test_a_multiplicative_measure_has_its_spectrum():
    p, qs = 0.3, (0.0, 1.0, 2.0, 3.5, -1.0)
    weights = np.ones(1)
    for _ in range(8):
        weights = np.concatenate([p * weights, (1 - p) * weights])
    found = dart.fractal_dims(np.outer(weights, weights), qs, (1, 2, 4, 8, 16, 32))
    entropy = -(p * np.log2(p) + (1 - p) * np.log2(1 - p))
    expected = [2 * entropy if q == 1 else 2 * np.log2(p**q + (1 - p) ** q) / (1 - q) for q in qs]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_dimensions_ignore_scale_and_quarter_turns_and_offsets_take_the_smallest_count():
    mask = phantoms.fundus(np.random.default_rng(3), 64).vessels
    twice = np.repeat(np.repeat(mask, 2, 0), 2, 1)
    boxes = (2, 4, 8, 16)
    np.testing.assert_allclose(
        dart.fractal_dims(mask, boxes=boxes), dart.fractal_dims(twice, boxes=tuple(2 * b for b in boxes)), rtol=1e-4
    )
    np.testing.assert_allclose(
        dart.fractal_dims(mask, (0,), boxes), dart.fractal_dims(np.rot90(mask), (0,), boxes), rtol=1e-5
    )
    # with a ladder of two boxes the slope is a difference: counts by hand, over all shifts by half a box
    grid = np.zeros((16, 16))
    grid[3:5, 3:13] = 1

    def count(b, shift):
        padded = np.pad(grid, ((shift[0], b), (shift[1], b)))
        n = padded.shape[0] // b * b, padded.shape[1] // b * b
        return padded[: n[0], : n[1]].reshape(n[0] // b, b, n[1] // b, b).any((1, 3)).sum()

    fewest = [min(count(b, (y, x)) for y in (0, b // 2) for x in (0, b // 2)) for b in (2, 8)]
    assert fewest[0] < count(2, (0, 0))
    found = dart.fractal_dims(grid, (0,), (2, 8), offsets=2)[0]
    np.testing.assert_allclose(found, np.log(fewest[0] / fewest[1]) / np.log(4), rtol=1e-5)
    # jit and vmap
    masks = np.stack([mask, np.rot90(mask)])
    np.testing.assert_allclose(jax.jit(jax.vmap(dart.fractal_dims))(masks)[1], dart.fractal_dims(masks[1]), rtol=1e-5)
    np.testing.assert_allclose(dart.dimensions(masks)[0], dart.fractal_dims(mask, (0,))[0], rtol=1e-5)


def test_phantoms_are_seeded_and_branch_more_with_more_levels():
    one, same, other = (phantoms.fundus(np.random.default_rng(s), 64) for s in (5, 5, 6))
    np.testing.assert_array_equal(one.image, same.image)
    assert (one.image != other.image).any()
    assert one.image.dtype == np.float32
    assert one.image.min() >= 0
    assert one.image.max() <= 1
    assert not one.image[~phantoms.field_of_view(64)].any()
    assert one.vessels.shape == (128, 128)
    # vessels are darker than the same eye around them
    share = one.vessels.reshape(64, 2, 64, 2).mean((1, 3))
    ring = np.hypot(*(np.mgrid[:64, :64] - 31.5)) < 28
    assert one.image[(share > 0.9) & ring].mean() < 0.8 * one.image[(share == 0) & ring].mean()
    eyes = [phantoms.fundus(np.random.default_rng((9, i)), 64) for i in range(150)]
    values, levels = dart.dimensions(np.stack([e.vessels for e in eyes])), np.array([e.levels for e in eyes])
    means = [values[levels == level].mean() for level in range(3, 9)]
    assert spearmanr(means, range(3, 9)).statistic >= 0.8
    assert values.std() > 0.04
    with pytest.raises(UserError, match="size=16: expected at least 32"):
        phantoms.fundus(np.random.default_rng(0), 16)


def test_degradations_grow_with_severity_and_leave_the_truth():
    eye = jnp.asarray(phantoms.fundus(np.random.default_rng(1), 64).image)
    keys = jax.random.split(jax.random.key(0), 24)
    degrade = jax.jit(jax.vmap(fundus.degrade, in_axes=(0, None, None)))
    errors = []
    for severity in (0.0, 0.3, 0.6, 1.0):
        out = degrade(keys, eye, jnp.float32(severity))
        assert out.min() >= 0
        assert out.max() <= 1
        assert not out[:, ~phantoms.field_of_view(64)].any()
        errors.append(float(jnp.abs(out - eye).mean()))
    # severity 0 is noise of deviation 0.01 alone
    seen = phantoms.field_of_view(64)
    assert 0.007 < float((degrade(keys, eye, jnp.float32(0.0)) - eye)[:, seen].std()) < 0.012
    assert errors == sorted(errors)
    np.testing.assert_array_equal(degrade(keys, eye, 0.5)[3], degrade(keys[3:4], eye, 0.5)[0])
    # blur: nothing at 0, a Gaussian's weights on a point, rows that sum to one
    point = jnp.zeros((21, 21, 1)).at[10, 10, 0].set(1.0)
    np.testing.assert_allclose(augment.blurred(point, jnp.float32(0.0)), point, atol=1e-7)
    spread = augment.blurred(point, jnp.float32(1.5))
    np.testing.assert_allclose(spread[10, 12, 0] / spread[10, 10, 0], np.exp(-0.5 * (2 / 1.5) ** 2), rtol=1e-4)
    np.testing.assert_allclose(augment.blurred(jnp.ones((9, 9, 3)), jnp.float32(3.0)), 1.0, rtol=1e-5)
    turned = dart.turned(jax.random.key(1), jnp.stack([eye] * 64))
    ways = {np.asarray(t).tobytes() for t in turned}
    square = [np.rot90(np.asarray(e), k) for e in (eye, eye[::-1]) for k in range(4)]
    assert ways == {np.ascontiguousarray(s).tobytes() for s in square}


def test_trait_units_head_and_mean_predictor():
    assert dart.to_trait(0.0, *dart.RELEASED) == pytest.approx(1.485399946, abs=1e-9)
    assert dart.to_trait(1.0, *dart.RELEASED) == pytest.approx(1.518013480, abs=1e-8)
    assert dart.to_trait(-1.3943004608154297, *dart.RELEASED) == pytest.approx(1.439927, abs=1e-6)
    assert dart.standardised(dart.to_trait(0.7, 1.4, 0.03), 1.4, 0.03) == pytest.approx(0.7)
    head = dart.Head(8)
    x = jax.random.normal(jax.random.key(0), (5, 12))
    params = head.init(jax.random.key(1), x)
    p = jax.tree.map(np.asarray, params["params"])
    hidden = np.asarray(x) @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]
    hidden = (hidden - hidden.mean(-1, keepdims=True)) / np.sqrt(hidden.var(-1, keepdims=True) + 1e-5)
    hidden = hidden * p["LayerNorm_0"]["scale"] + p["LayerNorm_0"]["bias"]
    gelu = 0.5 * hidden * (1 + erf(hidden / np.sqrt(2)))
    expected = (gelu @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"])[:, 0]
    np.testing.assert_allclose(head.apply(params, x), expected, rtol=1e-4, atol=1e-5)
    # what predicts the mean has the mean absolute deviation as its error
    values = np.array([1.2, 1.4, 1.6], np.float32)
    standard = dart.standardised(values, values.mean(), values.std())
    errors = dart.absolute_error(jnp.zeros(3), jnp.asarray(standard), None)
    np.testing.assert_allclose(errors.mean(), np.abs(values - values.mean()).mean() / values.std(), rtol=1e-5)


def test_any_trait_of_clean_images_is_approximated():
    rng = np.random.default_rng(0)
    images = np.clip(rng.integers(40, 200, (60, 1, 1, 1)) + rng.integers(-20, 20, (60, 32, 32, 3)), 0, 255)
    images = images.astype(np.uint8)
    bright = lambda x: 100.0 + x.mean((1, 2, 3))
    seen = []

    def dim(key, x):
        seen.append(x.shape)
        return x * jax.random.uniform(key, (len(x), 1, 1, 1), minval=0.95)

    options = dict(widths=(4, 4, 4, 4), hidden=8, batch_size=18, num_updates=60)
    learner = dart.approximate_trait(bright, images, dim, **options)
    result = train(learner, seeds=1, progress=False, eval_every=-1)
    assert {shape[1:] for shape in seen} == {(32, 32, 3)}
    state = jax.tree.map(lambda x: x[0], result.state)
    found = np.asarray(learner.predict(state, images.astype(np.float32) / 255))
    assert np.corrcoef(found, bright(images))[0, 1] > 0.9  # in the trait's units, of images that were not dimmed
    assert abs(found.mean() - bright(images).mean()) < 25
    for wrong, message in (
        ((bright, images[:9], dim), r"images: found \[9, 32, 32, 3\] uint8, expected \[M, N, N, 3\] uint8"),
        ((lambda x: np.ones(len(x)), images), "trait_fn: all 54 values are 1: there is nothing to learn"),
        ((lambda x: np.ones(3), images), r"trait_fn: gave \[3\] values, expected 60 finite ones"),
    ):
        with pytest.raises(UserError, match=message):
            dart.approximate_trait(*wrong, **options)


def test_crops_as_released():
    image = np.zeros((120, 200, 3), np.uint8)
    image[30:70, 50:150] = 200
    # 5 pixels on each side, then the shorter side by half the difference on each side
    assert fundus.crop_black_borders(image).shape == (105, 110, 3)  # the upper edge is in the way
    image[:] = 0
    image[0:110, 80:110] = 200
    found = fundus.crop_black_borders(image)  # at the edge there is less to add
    assert found.shape == (115, 114, 3)
    with pytest.raises(UserError, match="no pixel is brighter than 20 of 255, brightest mean 3"):
        fundus.crop_black_borders(np.full((9, 9, 3), 3, np.uint8))


def test_the_pipeline_measures_clean_phantoms_and_fails_on_poor_ones():
    pytest.importorskip("skimage")
    (images, values), _ = dart.phantom_traits(4, 16, 96)
    clean = dart.pipeline(images)
    assert np.corrcoef(clean, values)[0, 1] > 0.7
    poor = np.asarray(dart.copies(jax.random.key(0), images, 0.7, 1.0))
    assert np.abs(dart.pipeline(poor) - values).mean() > 2 * np.abs(clean - values).mean()
    assert not dart.find_vessels(np.zeros((64, 64, 3), np.uint8)).any()


def test_folders_of_photographs_train_and_are_graded(tmp_path, capsys):
    folder = tmp_path / "eyes"
    run = lambda *argv: cli.main([str(a) for a in argv])
    assert run("phantoms", "fundus", "--num", 12, "--size", 48, "--out", folder, "--severity", 0, 0.3) == 0
    assert len(list((folder / "vessels").glob("*.png"))) == 12
    labels = [r["label"] for r in csv.DictReader((folder / "labels.csv").read_text().splitlines())]
    assert {c: labels.count(c) for c in labels} == {"Good": 4, "Usable": 4, "Bad": 4}
    assert run("phantoms", "fundus", "--num", 2, "--out", folder) == 2
    assert "is there already" in capsys.readouterr().err
    learner = dart.dart(data=str(folder), size=32, batch_size=4, num_updates=2, widths=(2, 2, 2, 2), hidden=4)
    result = train(learner, seeds=2, run_dir=tmp_path / "run", progress=False)
    train_part, valid = dart.parts(learner.config)
    assert (len(train_part.values), len(valid.values)) == (10, 2)
    trait = result.state.stats["trait"]
    np.testing.assert_allclose(trait["mean"], train_part.values.mean(), rtol=1e-6)
    np.testing.assert_allclose(trait["std"], train_part.values.std(), rtol=1e-5)
    # a broken file is a row, the others are graded, without the folder's table
    (folder / "broken.png").write_bytes(b"no image")
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(folder / "dark.png")
    assert run("grade-fundus", folder, "--model", tmp_path / "run", "--out", tmp_path / "graded") == 0
    lines = (tmp_path / "graded" / "results.csv").read_text().splitlines()
    rows = {r["file"].rsplit("/", 1)[-1]: r for r in csv.DictReader(lines)}
    assert rows["broken.png"]["status"] == rows["dark.png"]["status"] == "skipped"
    assert "cannot be read as an image" in rows["broken.png"]["reason"]
    one = jax.tree.map(lambda x: x[0], result.state)
    image = fundus.read_photograph(folder / "eye0003.png", 32)[None].astype(np.float32) / 255
    two = np.asarray(jax.vmap(learner.predict, in_axes=(0, None))(result.state, image))[:, 0]
    assert float(rows["eye0003.png"]["trait"]) == pytest.approx(np.mean(two), abs=1e-5)
    raw = dart.Network((2, 2, 2, 2), 4).apply({"params": one.params, **one.stats}, image)[0]
    assert two[0] == pytest.approx(float(raw * (trait["std"][0] + 1e-9) + trait["mean"][0]), abs=1e-5)
    assert run("grade-fundus", folder / "dark.png", "--model", tmp_path / "run", "--out", tmp_path / "none") == 2


def test_the_full_claim_has_photographs_of_one_s_own(tmp_path, monkeypatch):
    pytest.importorskip("skimage")
    run = lambda *argv: cli.main([str(a) for a in argv])
    assert run("phantoms", "fundus", "--num", 20, "--size", 48, "--out", tmp_path / "eyes") == 0
    monkeypatch.setattr(study, "SIZE", 32)
    monkeypatch.setattr(study, "BATCH", 4)
    budget, folder = study.Budget(0, 2, (2, 2, 2, 2)), str(tmp_path / "eyes")
    learned, test = study.given(folder)
    assert (len(learned.values), len(test.values)) == (16, 4)
    rows = {arm: [*study.on_photographs(arm, (0, 1), folder, budget)] for arm in ("DART", study.PIPELINE, "mean")}
    assert [row["seed"] for row in rows["DART"]] == [0, 1]
    assert rows["DART"][0]["r clean"] != rows["DART"][1]["r clean"]
    assert rows["mean"][0]["r clean"] == 0
    expected = np.abs(test.values - learned.values.mean()).mean() / test.values.std()
    assert rows["mean"][1]["error .4 to .6"] == pytest.approx(expected, rel=1e-5)
    assert rows[study.PIPELINE][0]["r clean"] == pytest.approx(
        np.corrcoef(dart.pipeline(test.images), test.values)[0, 1], rel=1e-5
    )
    named = {c.experiment for c in study.claim.scales["full"].checks}
    assert named == {e.name for e in study.claim.scales["full"].experiments} == {"accuracy", "speed", "photographs"}
    assert {c.experiment for c in study.claim.scales["small"].checks} == {"accuracy", "speed"}
    study.given.cache_clear()
    monkeypatch.setattr(study, "BATCH", 64)
    with pytest.raises(UserError, match="eyes: found 20 photographs, expected at least 80"):
        study.given(folder)


def test_bad_input_is_named(tmp_path):
    table = tmp_path / "traits.csv"
    with pytest.raises(UserError, match=r"traits.csv: cannot be read"):
        dart.read_folder(tmp_path, 32)
    table.write_text("file,trait\na.png,1\n")
    with pytest.raises(UserError, match="found columns file, trait, expected file, value"):
        dart.read_folder(tmp_path, 32)
    table.write_text("file,value\na.png,high\n")
    with pytest.raises(UserError, match="line 2: value: found 'high', expected a number"):
        dart.read_folder(tmp_path, 32)
    table.write_text("file,value\na.png,nan\n")
    with pytest.raises(UserError, match="line 2: value: found nan, expected a finite number"):
        dart.read_folder(tmp_path, 32)
    table.write_text("file,value\na.png,1\n")
    with pytest.raises(UserError, match=r"a.png: cannot be read as an image"):
        dart.read_folder(tmp_path, 32)
    Image.fromarray(np.zeros((32, 32), np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a.png: image: no pixel is brighter than 20 of 255, brightest mean 0"):
        dart.read_folder(tmp_path, 32)
    bright = np.full((40, 40, 3), 90, np.uint8)
    for i in range(10):
        Image.fromarray(bright).save(tmp_path / f"{i}.png")
    table.write_text("file,value\n" + "".join(f"{i}.png,1.5\n" for i in range(10)))
    learner = dart.dart(data=str(tmp_path), size=32, batch_size=4)
    with pytest.raises(UserError, match=r"all 9 values are 1.5: there is nothing to learn"):
        learner.source(learner.config)
    with pytest.raises(UserError, match=r"severity=1.5: expected 0 to 1"):
        dart.dart(severity=1.5)
    with pytest.raises(UserError, match="size=50: expected a multiple of 16"):
        dart.dart(size=50)
