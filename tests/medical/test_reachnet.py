"""REACHNet: the card's counts, grid of tokens, augmentation, resolutions, fovea, weights, and runs that are read."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from jaxstack import cli
from jaxstack.core.errors import UserError
from jaxstack.medical import oct_networks
from jaxstack.medical import reachnet as rn
from jaxstack.medical.phantoms_oct import DEVICES, oct_set
from jaxstack.medical.segmentation import dice
from jaxstack.nn import torch_weights as tw
from jaxstack.nn.vision import reachnet as nets
from jaxstack.nn.vision.unet import UNet

KEY = jax.random.key(0)


def random_variables(net):
    start = jax.eval_shape(lambda: net.init(KEY, jnp.zeros((1, net.multiple, net.multiple, 1))))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), start)


def parameters(net, size=None):
    size = size or net.multiple
    start = jax.eval_shape(lambda: net.init(KEY, jnp.zeros((1, size, size, 1))))
    return sum(x.size for x in jax.tree.leaves(start["params"]))


@pytest.mark.parametrize(
    ("factors", "channels", "count"),
    [
        ((2,) * 6, "8_doublemax-64", 678_555),
        ((4,) * 3, "8_quadruplemax-128", 1_080_203),
        ((4,) * 3, "16_quadruplemax-128", 1_224_403),
        ((4,) * 3, "32_doublemax-128", 1_257_043),
        ((2,) * 6, "16_doublemax-128", 2_687_283),
    ],
)
def test_counts_of_the_cards_table(factors, channels, count):
    net = rn.ReachNet(channels, factors=factors)
    assert net.side == 12
    assert parameters(net) == count


def test_channels_follow_a_strategy_and_the_family_holds_choroidalyzer():
    for strategy, expected in {
        "8_same": (8, 8, 8, 8),
        "8_double": (8, 16, 32, 64),
        "8_doublemax-20": (8, 16, 20, 20),
        "8_quadruple": (8, 32, 128, 512),
        "16_quadruplemax-128": (16, 64, 128, 128),
        "8, 4,16,2": (8, 4, 16, 2),
    }.items():
        assert nets.channels_of(strategy, 3) == expected
    for wrong in ("8_treble", "8_doublemax", "x_same", "8_same-4", "8,16", "8,16,a,4", "8"):
        with pytest.raises(UserError, match=f"channels='{wrong}': expected"):
            nets.channels_of(wrong, 3)
    assert parameters(rn.ReachNet("8_doublemax-64", factors=(2,) * 7, attend=False)) == 788_283 == parameters(UNet())
    assert rn.ReachNet(factors=(4, 4)).side == 48
    assert rn.ReachNet(factors=(4, 4), cap=8).side == 8


def test_corner_matrices_are_exact_at_corners_and_on_ramps():
    for old, new in ((12, 5), (5, 12), (6, 24), (12, 1), (1, 3), (7, 7)):
        matrix = nets.corner_matrix(old, new)
        assert matrix.shape == (new, old)
        np.testing.assert_allclose(matrix.sum(1), 1.0, atol=1e-6)
        np.testing.assert_array_equal(matrix[0], np.eye(old)[0])
        if new > 1:
            np.testing.assert_array_equal(matrix[-1], np.eye(old)[-1])
            ramp = np.linspace(-1.0, 3.0, old) if old > 1 else np.array([2.0])
            expected = np.linspace(-1.0, 3.0, new) if old > 1 else np.full(new, 2.0)
            np.testing.assert_allclose(matrix @ ramp, expected, atol=1e-6)
            values = np.random.default_rng(0).normal(size=old)
            at = np.linspace(0, old - 1, new)
            np.testing.assert_allclose(matrix @ values, np.interp(at, np.arange(old), values), atol=1e-6)
    np.testing.assert_array_equal(nets.corner_matrix(9, 9), np.eye(9))


def test_attention_is_the_identity_where_it_adds_nothing_and_knows_no_order():
    layer = nets.ResolutionAgnosticAttention(6)
    x = jax.random.normal(KEY, (2, 6, 6, 16))
    variables = layer.init(jax.random.key(1), x)
    quiet = jax.tree.map(lambda a: a, variables)["params"]
    quiet["pos_embed"] = jnp.zeros_like(quiet["pos_embed"])
    for part, name in (("attn", "proj"), ("mlp", "fc2")):
        quiet["attention"][part][name] = jax.tree.map(jnp.zeros_like, quiet["attention"][part][name])
    apply = jax.jit(layer.apply)
    np.testing.assert_array_equal(apply({"params": quiet}, x), x)
    y = jax.random.normal(KEY, (1, 4, 9, 16))
    # a map of another size is resized to the grid and back
    down, up = (
        np.kron(nets.corner_matrix(*rows), nets.corner_matrix(*columns))
        for rows, columns in (
            ((4, 6), (9, 6)),
            ((6, 4), (6, 9)),
        )
    )
    expected = (up @ (down @ np.asarray(y).reshape(36, 16))).reshape(1, 4, 9, 16)
    np.testing.assert_allclose(apply({"params": quiet}, y), expected, atol=2e-6)
    # without the embedding tokens have no place: permuted in, permuted out
    block = nets.TransformerBlock()
    t = jax.random.normal(KEY, (1, 36, 16))
    run = jax.jit(lambda t: block.apply({"params": variables["params"]["attention"]}, t))
    order = np.random.default_rng(0).permutation(36)
    np.testing.assert_allclose(run(t[:, order]), run(t)[:, order], atol=1e-6)
    assert float(jnp.abs(run(t) - t).max()) > 0.01
    with_places = jax.jit(layer.apply)(variables, x.reshape(2, 36, 16)[:, order].reshape(x.shape))
    assert (
        float(jnp.abs(with_places.reshape(2, 36, 16) - apply(variables, x).reshape(2, 36, 16)[:, order]).max()) > 1e-3
    )


def test_every_resolution_comes_back_with_the_same_parameters():
    net = rn.ReachNet()
    start = jax.eval_shape(lambda: net.init(KEY, jnp.zeros((1, 64, 64, 1))))
    for size in ((384, 384), (512, 768), (768, 768), (1024, 1024)):
        out = jax.eval_shape(net.apply, start, jnp.zeros((1, *size, 1)))
        assert out.shape == (1, *size, 3)
    with pytest.raises(UserError, match="found images of 100x64 pixels, expected multiples of 64"):
        jax.eval_shape(net.apply, start, jnp.zeros((1, 100, 64, 1)))


def example():
    """A tall blob with its fovea, its region and a vessel inside."""
    y, x = np.mgrid[:64, :96]
    image = (0.1 + 0.8 * np.exp(-0.5 * (((x - 40) / 6) ** 2 + ((y - 30) / 4) ** 2))).astype(np.float32)
    masks = ((np.abs(y - 30) < 9) & (np.abs(x - 40) < 15)) + 2 * (np.hypot(x - 40, y - 30) < 6)
    return image, masks.astype(np.uint8), np.array([40.0, 30.0], np.float32), np.array([10.0, 4.0], np.float32)


def test_affine_maps_carry_everything_and_the_scale():
    view = rn.View(*example())
    run = jax.jit(rn.affine)
    same = run(view, np.eye(2))
    for a, b in zip(same, view):
        np.testing.assert_array_equal(a, b)
    assert same.masks.dtype == np.uint8
    area = lambda v: float((v.masks & 1).sum() * v.scale[0] * v.scale[1])
    for stretch in (np.diag([1.3, 0.7]), np.diag([0.8, 1.2]), np.diag([-1.0, 1.0])):
        found = run(view, stretch, np.array([5.0, -3.0]))
        np.testing.assert_allclose(found.scale, view.scale / np.abs(np.diag(stretch)), rtol=1e-5)
        assert area(found) == pytest.approx(area(view), rel=0.05)
        ys, xs = np.nonzero(np.asarray(found.masks) & 2)
        np.testing.assert_allclose([xs.mean(), ys.mean()], found.fovea, atol=0.6)
        heights = lambda v: float((np.asarray(v.masks) & 1).sum(0).max() * v.scale[1])
        assert heights(found) == pytest.approx(heights(view), rel=0.09)  # a row of 17
        assert set(np.unique(found.masks)) <= {0, 1, 3}
    # a quarter turn: what was down is across
    quarter = run(view, np.array([[0.0, -1.0], [1.0, 0.0]]))
    np.testing.assert_allclose(quarter.scale, view.scale[::-1], rtol=1e-5)
    # metrics at the old scale would be wrong by as much as the stretch
    wide = run(view, np.diag([1.3, 1.0]))
    assert area(wide._replace(scale=view.scale)) == pytest.approx(1.3 * area(view), rel=0.05)


def test_shadows_darken_columns_below_the_retina_alone_and_speckle_keeps_the_mean():
    image = jnp.full((64, 96), 0.5)
    top = jnp.full(96, 30.0)
    dark = jax.jit(rn.shadow)(
        image, top, jnp.array([20.0, 70.0]), jnp.array([8.0, 5.0]), jnp.array([3.0, 1.0]), jnp.array([10.0, 5.0])
    )
    np.testing.assert_allclose(dark[:12], 0.5, atol=1e-3)  # above its beginning
    np.testing.assert_allclose(dark[40:, 20], 0.125, rtol=0.1)  # 0.5 ** 3, all but reached in the middle
    np.testing.assert_allclose(dark[:, 32:], 0.5, atol=3e-3)  # beside it, and an exponent of 1
    assert (np.diff(np.asarray(dark)[50, 10:21]) <= 1e-6).all()  # soft edges
    assert 0.2 < float(dark[50, 16]) < 0.45
    noisy = jax.jit(rn.speckle)(KEY, jnp.full((128, 192), 0.4), 0.35)
    assert float(noisy.mean()) / 0.4 == pytest.approx(1.0, abs=0.01)
    assert float(noisy.std()) / 0.4 == pytest.approx(0.35, abs=0.01)
    # the choroid's upper boundary, and the mean of it where there is none
    masks = np.zeros((20, 6), np.uint8)
    masks[8:, 0], masks[4:, 3], masks[2, 5] = 1, 3, 2
    np.testing.assert_allclose(rn.upper(jnp.asarray(masks)), [8, 6, 6, 4, 6, 6])
    np.testing.assert_allclose(rn.upper(jnp.zeros((20, 6), jnp.uint8)), 10.0)


def test_augmentation_moves_masks_fovea_and_scale_together_and_shadows_leave_masks():
    image, masks, fovea, scale = example()
    keys = jax.random.split(KEY, 32)
    run = jax.jit(
        lambda keys, ranges, domain=True: jax.vmap(
            lambda k: rn.reach_augment(k, image, masks, fovea, scale, ranges, domain)
        )(keys),
        static_argnames="domain",
    )
    views = run(keys, rn.Ranges())
    assert views.image.min() >= 0
    assert views.image.max() <= 1
    assert views.masks.dtype == jnp.uint8
    assert set(np.unique(views.masks)) <= {0, 1, 3}
    for found, (fx, fy) in zip(np.asarray(views.masks), np.asarray(views.fovea)):
        ys, xs = np.nonzero(found & 2)
        assert np.hypot(xs.mean() - fx, ys.mean() - fy) < 1.0
    assert len({tuple(s) for s in np.asarray(views.scale).round(3).tolist()}) > 8
    # no affine map: masks are those that were given, or mirrored, bit for bit, whatever happens to the light
    still = rn.Ranges(turn=0.0, shear=0.0, across=(1.0, 1.0), down=(1.0, 1.0), shift=0.0)
    for ranges, domain in ((still, True), (rn.Ranges(), False)):
        lit = run(keys, ranges, domain)
        mirrored = [bool((np.asarray(m) == masks[:, ::-1]).all()) for m in lit.masks]
        assert 6 < sum(mirrored) < 26
        for found, flip, (fx, fy) in zip(np.asarray(lit.masks), mirrored, np.asarray(lit.fovea)):
            np.testing.assert_array_equal(found, masks[:, ::-1] if flip else masks)
            np.testing.assert_allclose([fx, fy], [95 - 40 if flip else 40, 30])
        np.testing.assert_allclose(lit.scale, np.broadcast_to(scale, (32, 2)), rtol=1e-6)
        assert float(jnp.abs(lit.image - views.image).max()) > 0.1
    assert len({float(x.std()) for x in run(keys, still).image}) == 32
    np.testing.assert_array_equal(run(keys, rn.Ranges()).image, views.image)


def test_batches_of_several_resolutions_have_masks_and_scales_of_their_own():
    drawn = oct_set(0, 8, DEVICES["A"]._replace(size=(64, 96)))
    scans = oct_networks.phantom_scans(0, 8, (64, 96), ("A",))
    sizes = ((64, 96), (32, 48), (48, 60))
    scale = drawn.scale[0]
    seen, errors = {}, []
    steps = jax.jit(lambda view: (view.masks & 1).sum((1, 2)))
    made = rn.multires_batches(KEY, scans, sizes, 3, scale=scale)
    for _ in range(12):
        view = next(made)
        seen[view.image.shape[1:]] = view
        assert view.image.shape == view.masks.shape
        assert len(view.image) == 3
        assert set(np.unique(view.masks)) <= {0, 1, 3}
        # the physical area stays, with the scale that came with the batch
        areas = np.asarray(steps(view) * view.scale.prod(1))
        ratio = np.array(view.image.shape[:0:-1]) / (96, 64)
        foveas = (scans.fovea + 0.5) * ratio - 0.5
        which = np.abs(np.asarray(view.fovea)[:, None] - foveas).sum(-1).argmin(1)
        np.testing.assert_allclose(view.fovea, foveas[which], atol=1e-4)
        errors.append(areas / (drawn.region.sum((1, 2)) * scale.prod())[which] - 1.0)
    assert np.abs(errors).max() < 0.1  # a region of some ten rows
    assert abs(np.mean(errors)) < 0.015
    assert set(seen) == set(sizes)
    assert steps._cache_size() == 3
    half = seen[32, 48]
    np.testing.assert_allclose(half.scale, np.tile(2 * scale, (3, 1)), rtol=1e-6)
    again = rn.multires_batches(KEY, scans, sizes, 3, scale=scale)
    np.testing.assert_array_equal(next(again).image, next(rn.multires_batches(KEY, scans, sizes, 3)).image)
    many = {
        v.image.shape for _, v in zip(range(8), rn.multires_batches(KEY, scans, sizes[:2], 2, constant_pixels=True))
    }
    assert many == {(2, 64, 96), (8, 32, 48)}
    with pytest.raises(UserError, match=r"batch_size=3: expected 1 to 8 scans, found 12 in a batch"):
        next(rn.multires_batches(KEY, scans, sizes[:2], 3, constant_pixels=True))
    with pytest.raises(UserError, match=r"sizes=\(\): expected at least one pair"):
        next(rn.multires_batches(KEY, scans, ()))
    # each resolution once in as many steps
    order = [int(rn.resolution_of(step, 3)) for step in range(30)]
    assert all(set(order[i : i + 3]) == {0, 1, 2} for i in range(0, 30, 3))
    assert order != sorted(order[:3]) * 10


def test_a_scan_is_not_drawn_above_its_own_resolution(tmp_path, monkeypatch):
    scans = rn.Scans(*(np.arange(5, dtype=np.float32) for _ in range(3)))
    allowed = np.array([[True, False, False, True, False], [True] * 5])
    data = rn.ResolutionData(scans, 64, 2, allowed=allowed)
    drawn = lambda which: data.batch(data.constants(), np.int32(which), jax.random.key(1))
    assert set(np.asarray(drawn(0).scans.images)) == {0.0, 3.0}
    assert set(np.asarray(drawn(1).scans.fovea)) == {0.0, 1.0, 2.0, 3.0, 4.0}
    assert (int(drawn(0).which), int(drawn(1).which)) == (0, 1)
    # from the table: what is not told is drawn at all resolutions
    assert cli.main(["phantoms", "oct", "--num", "6", "--size", "32", "48", "--out", str(tmp_path / "scans")]) == 0
    table = tmp_path / "scans" / "scales.csv"
    head, *lines = table.read_text().splitlines()
    written = lambda entries: table.write_text("\n".join([f"{head},resolution", *map(",".join, zip(lines, entries))]))
    written(["1", "0.5", "", "0.5", "0.25", "0.5"])
    config = rn.Config(**TINY | dict(data=str(tmp_path / "scans")), resolutions=(1.0, 0.5))
    own = rn.own_resolutions(config)
    assert len(own) == len(rn.parts(config)[0].images) == 5
    source = rn.source(config)
    _, order, counts = source.constants()
    assert counts.tolist() == [(own >= 1).sum(), (own >= 0.5).sum()]
    assert (own[np.asarray(order)[0, : counts[0]]] >= 1).all()
    for entries, message in (
        (["0.5"] * 6, "resolutions=1: expected at most 0.5, the largest in "),
        (["half"] * 6, "line 2: resolution: found 'half', expected a number"),
        (["-1"] * 6, "line 2: resolution: found -1, expected a positive share"),
    ):
        written(entries)
        oct_networks._parts.cache_clear()
        with pytest.raises(UserError, match=message):
            rn.source(config)


def test_a_shifted_fovea_has_the_dice_of_two_lenses():
    masks, radius = np.zeros((1, 128, 768), np.uint8), 0.025 * 768
    disc = jax.jit(lambda x: rn.fovea_disc(rn.Targets(masks, jnp.stack([x, 64.0])[None], jnp.array([True])))[0] > 0)
    here = disc(384.0)
    assert float(here.sum()) == pytest.approx(np.pi * radius**2, rel=0.02)
    for away in (0.0, 5.0, 12.0, 25.0):
        u = away / (2 * radius)
        lens = 2 / np.pi * (np.arccos(u) - u * np.sqrt(1 - u**2))
        assert float(dice(disc(384.0 + away), here)) == pytest.approx(lens, rel=0.03)
    logits = jnp.where(here[None, ..., None], 4.0, -4.0) * jnp.ones(3)
    known = lambda yes: rn.Targets(masks, jnp.array([[384.0, 64.0]]), jnp.array([yes]))
    assert float(rn.fovea_dice(logits, known(True), None)[0]) == 1.0
    assert float(rn.fovea_dice(-logits, known(True), None)[0]) == 0.0
    assert float(rn.fovea_dice(-logits, known(False), None)[0]) == 1.0


TINY = dict(size=(32, 48), channels="2,8", factors=(4,), cap=2, num_train=4, num_valid=2, batch_size=2, num_updates=2)


def test_a_step_is_that_of_its_resolution(monkeypatch):
    config = rn.Config(**TINY, crop=(32, 40), resolutions=(1.0, 0.5), augmentation="generic")
    assert config.sizes == ((32, 40), (16, 20))

    def seen(state, batch):
        """In a training step's place what it would have been given."""
        images, targets = batch
        assert targets.masks.shape == images.shape
        return state + 1, dict(rows=jnp.int32(images.shape[1]), light=images.sum(), fovea=targets.fovea)

    inner = rn.of_one_size(config)._replace(step=seen)
    monkeypatch.setattr(rn, "of_one_size", lambda config: inner)
    data = rn.source(config)
    batch = lambda which: data.batch(data.constants(), np.int32(which), jax.random.key(3))
    step, prepared = jax.jit(rn.reachnet(config).step), jax.jit(rn.prepared, static_argnums=(0, 1))
    for which, size in enumerate(config.sizes):
        state, found = step(jnp.int32(4), batch(which))
        images, targets = prepared(config, size, batch(which))
        assert (int(state), int(found["rows"])) == (5, size[0])
        np.testing.assert_allclose(found["light"], images.sum(), rtol=1e-5)
        np.testing.assert_allclose(found["fovea"], targets.fovea, atol=1e-3)
    # over seeds each has scans of its own, all of one resolution
    one = lambda seed: step(jnp.int32(0), data.batch(data.constants(), np.int32(1), jax.random.key(seed)))[1]
    both = jax.jit(jax.vmap(one))(jnp.arange(2))
    assert both["rows"].tolist() == [16, 16]
    assert abs(float(both["light"][0] - both["light"][1])) > 0.1
    assert "cond" not in str(jax.make_jaxpr(rn.reachnet(config, resolutions=(1.0,)).step)(jnp.int32(0), batch(0)))
    # the fovea's disc is as large in a part of a scan as in the whole
    targets = prepared(config, (32, 40), batch(0))[1]
    np.testing.assert_array_equal(targets.width, [48.0, 48.0])
    middle = rn.Targets(np.zeros((2, 32, 40)), jnp.full((2, 2), 16.0), None, targets.width)
    whole = rn.Targets(np.zeros((2, 32, 48)), jnp.full((2, 2), 16.0), None)
    for radius in (0.025, 0.1):
        assert rn.fovea_disc(middle, radius).sum() == rn.fovea_disc(whole, radius).sum() > 2
    # cut scans keep the fovea in its place
    scans = oct_networks.parts(config)[0]
    view = rn.View(jnp.asarray(scans.images[0]), jnp.asarray(scans.masks[0]), jnp.asarray(scans.fovea[0]), jnp.ones(2))
    cut = jax.jit(rn.cropped, static_argnums=2)(KEY, view, (20, 30))
    left, top = (scans.fovea[0] - np.asarray(cut.fovea)).round().astype(int)
    np.testing.assert_array_equal(cut.image, scans.images[0][top : top + 20, left : left + 30])


def test_runs_and_weights_are_read_by_analyse_oct(tmp_path, capsys):
    call = lambda *argv: cli.main([str(a) for a in argv])
    assert call("phantoms", "oct", "--num", 3, "--size", 48, 64, "--out", tmp_path / "scans") == 0
    options = [
        x
        for k, v in (TINY | dict(resolutions=(1.0,))).items()
        for x in (f"--{k.replace('_', '-')}", *(v if isinstance(v, tuple) else (v,)))
    ]
    run = ("--data", tmp_path / "scans", "--eval-every", -1, "--run-dir", tmp_path / "run", "--no-guard")
    assert call("train", "jaxstack.medical.reachnet:reachnet", *options, *run) == 0
    argv = ("analyse-oct", tmp_path / "scans", "--scales", tmp_path / "scans" / "scales.csv", "--batch", 2)
    assert call(*argv, "--model", tmp_path / "run", "--out", tmp_path / "a") == 0
    model = yaml.safe_load((tmp_path / "a" / "run.yaml").read_text())["options"]["model"]
    assert (model["networks"], model["channels"], model["parameters"]) == (
        1,
        [2, 8],
        parameters(rn.Config(**TINY).network),
    )
    with open(tmp_path / "a" / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["ok"] * 3
    # weights of the public names, with any prefix
    net = rn.ReachNet((4, 16), factors=(4,), residual=True, resolution=12, up_mode="interpolate")
    variables = random_variables(net)
    weights = tw.to_torch(net, variables)
    for prefix in ("", "module."):
        np.savez(tmp_path / "net.npz", **{prefix + k: v for k, v in weights.items()})  # pyright: ignore[reportArgumentType]
        same, loaded = rn.load_weights(tmp_path / "net.npz")
        assert same == net
        assert all((a == b).all() for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(variables), strict=True))
    # without attention and residual connections, and tensors that are missing
    bare = rn.ReachNet((4, 16), factors=(4,), attend=False)
    np.savez(tmp_path / "bare.npz", **tw.to_torch(bare, random_variables(bare)))  # pyright: ignore[reportArgumentType]
    assert rn.load_weights(tmp_path / "bare.npz")[0] == bare
    np.savez(tmp_path / "part.npz", **{k: v for k, v in weights.items() if "upsample" not in k})  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=r"part.npz: found no up_blocks.0.upsample.1.weight by which"):
        rn.load_weights(tmp_path / "part.npz")
    np.savez(tmp_path / "part.npz", **{k: v for k, v in weights.items() if "norm1" not in k})  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=r"part.npz: attention.attention.norm1.bias is missing"):
        rn.load_weights(tmp_path / "part.npz")
    capsys.readouterr()


def test_wrong_options_are_named():
    for message, options in {
        "factors=(): expected at least one": dict(factors=()),
        "channels=8 32 64, factors=4 3": dict(factors=(4, 3)),
        "channels='8_treble': expected": dict(channels="8_treble"),
        "channels='4_same': expected a last number that eight heads divide": dict(channels="4_same"),
        "cap=0: expected at least 1": dict(cap=0),
        "crop=(200, 96): expected at least 16, at most the 128 rows": dict(crop=(200, 96)),
        "resolutions=(): expected at least one": dict(resolutions=()),
        "resolutions=(0.01,): expected numbers > 0": dict(resolutions=(0.01,)),
        "ema_from=2.0: expected a number in [0, 1]": dict(ema_from=2.0),
        "augmentation='all': expected one of": dict(augmentation="all"),
        "hypers.ema_decay=1.5": dict(ema_decay=1.5),
    }.items():
        with pytest.raises(UserError) as found:
            rn.reachnet(**options)
        assert message in str(found.value)
