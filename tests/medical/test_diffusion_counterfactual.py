"""Dif-fuse: schedules, exact denoisers, fused sampling, masks, anomalies, latent saliency, phantoms, the command."""

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from scipy import ndimage

from jaxstack import cli
from jaxstack.core.errors import UserError
from jaxstack.medical import brain
from jaxstack.medical import diffusion_counterfactual as dc
from jaxstack.medical import latent_counterfactuals as lc
from jaxstack.nn import diffusion

SCHEDULE = diffusion.make_schedule()


def scalar_prior(mean=0.5, std=0.2, schedule=SCHEDULE):
    """The exact denoiser of images of one pixel, N(mean, std^2)."""
    one = lambda v: jnp.full(1, v, jnp.float32)
    return dc.exact_gaussian_denoiser(dc.Healthy(one(mean), jnp.ones((1, 1)), one(std**2), jnp.float32(0)), schedule)


def pixels(values):
    return jnp.asarray(values, jnp.float32).reshape(-1, 1, 1, 1)


def fused(eps_fn, x, mask, level, schedule=SCHEDULE, **options):
    mask = jnp.broadcast_to(jnp.asarray(mask), x.shape)
    return jax.jit(lambda x: dc.dif_fuse(eps_fn, x, mask, jax.random.key(0), schedule, level, **options))(x)


def test_the_schedule_is_the_release_s():
    np.testing.assert_allclose(
        SCHEDULE.ab[jnp.array([0, 249, 499, 999])], [0.9999, 0.5240854, 0.0785872, 4.0358e-5], rtol=1e-4
    )
    tenth = diffusion.respaced(SCHEDULE, 10)
    np.testing.assert_allclose(jnp.cumprod(1 - tenth.betas), SCHEDULE.ab[::10], rtol=1e-4)
    assert list(tenth.times[:3]) == [0, 10, 20]
    t, clean, noise = jnp.array([0, 999]), jnp.ones((2, 3)), jnp.full((2, 3), 2.0)
    a = SCHEDULE.ab[t][:, None]
    np.testing.assert_allclose(
        diffusion.noised(SCHEDULE, clean, t, noise), (np.sqrt(a) + 2 * np.sqrt(1 - a)) * clean, rtol=1e-6
    )


@pytest.mark.parametrize(
    ("level", "expected"),
    [(500, (0.10584, 0.30280, 0.49976, 0.69672, 0.89368)), (100, (0.10044, 0.29998, 0.49953, 0.69907, 0.89861))],
)
def test_reference_indexing_gives_the_numbers_of_the_released_loop(level, expected):
    x = pixels([0.1, 0.3, 0.5, 0.7, 0.9])
    found = fused(scalar_prior(), x, False, level, clip=(-1.0, 1.0), reference_indexing=True)
    np.testing.assert_allclose(found.reconstruction.ravel(), expected, atol=1e-4)
    np.testing.assert_array_equal(found.counterfactual, found.reconstruction)


def test_our_indexing_reconstructs_the_mean_exactly_and_the_rest_to_first_order():
    x = pixels([0.1, 0.5, 0.9])
    error = jnp.abs(fused(scalar_prior(), x, False, 500, clip=None).reconstruction - x).ravel()
    assert float(error[1]) < 1e-5
    assert float(error.max()) < 0.0052
    fine = diffusion.make_schedule(4000, 1e-4 / 4, 0.02 / 4)
    finer = fused(scalar_prior(schedule=fine), x, False, 2000, fine, clip=None).reconstruction
    np.testing.assert_allclose(jnp.abs(finer - x).ravel()[jnp.array([0, 2])], error[jnp.array([0, 2])] / 4, rtol=0.1)


def test_ddpm_everywhere_forgets_the_image_as_the_exact_posterior_does():
    x = jnp.full((512, 1, 1, 1), 0.95)
    out = fused(scalar_prior(), x, True, 500, clip=(-1.0, 1.0), reference_indexing=True).counterfactual
    assert abs(float(out.mean()) - 0.521) < 0.02
    assert abs(float(out.std()) - 0.189) < 0.02
    near = fused(scalar_prior(), x, True, 100, clip=(-1.0, 1.0), reference_indexing=True).counterfactual
    assert abs(float(near.mean()) - 0.721) < 0.02


def test_fusion_keeps_what_is_outside_the_mask_and_paints_what_is_inside():
    rng = np.random.default_rng(0)
    healthy = dc.fit_gaussian(rng.normal(0.5, 0.1, (200, 4, 4)).astype(np.float32), 5)
    eps_fn = dc.exact_gaussian_denoiser(healthy, SCHEDULE)
    x, mask = jnp.full((2, 4, 4, 1), 0.9), np.zeros((1, 4, 4, 1), bool)
    mask[:, :2] = True
    runs = {f: fused(eps_fn, x, mask, 300, stride=10, fuse=f) for f in ("steps", "end", "noised")}
    for name, out in runs.items():
        outside = x if name == "noised" else out.reconstruction
        np.testing.assert_array_equal(out.counterfactual[:, 2:], outside[:, 2:])
        assert float(jnp.abs(out.counterfactual[:, :2] - 0.5).mean()) < 0.25 < float(jnp.abs(x - 0.5).mean())
    late = fused(eps_fn, x, mask, 300, stride=10, fuse_from=30)
    assert not np.array_equal(late.counterfactual[:, 2:], late.reconstruction[:, 2:])
    still = fused(eps_fn, x, True, 1)
    np.testing.assert_array_equal(still.counterfactual, x)
    # a model that knows one image paints that image
    sure = healthy._replace(s2=jnp.zeros(5), tau2=jnp.float32(0))
    out = fused(dc.exact_gaussian_denoiser(sure, SCHEDULE), x, mask, 500, stride=10, clip=None)
    mu = jnp.broadcast_to(healthy.mu.reshape(1, 4, 4, 1), x.shape)
    np.testing.assert_allclose(out.counterfactual[:, :2], mu[:, :2], atol=0.03)


def test_a_classifier_guides_ddim():
    tenth, s2, g = diffusion.respaced(SCHEDULE, 10), 0.04, 5.0
    eps_fn = scalar_prior(0.5, s2**0.5)
    x = pixels([0.2, 0.5, 0.8])
    up, down = jnp.arange(49), jnp.arange(49, 0, -1)

    @jax.jit
    def both(scale):
        start = diffusion.ddim_invert(tenth, eps_fn, x, up, None)
        log_prob = lambda x: g * x.sum((1, 2, 3))
        return diffusion.ddim_guided(tenth, eps_fn, log_prob, start, down, scale, None), start

    plain, start = both(0.0)
    np.testing.assert_allclose(plain, x, atol=0.05)  # nothing but DDIM, whose steps are coarse
    guided, _ = both(1.0)
    # the same steps in plain NumPy
    a, want = np.asarray(tenth.ab, np.float64), np.asarray(start, np.float64).ravel()
    for t in range(49, 0, -1):
        var = a[t] * s2 + 1 - a[t]
        eps = np.sqrt(1 - a[t]) * ((want - np.sqrt(a[t]) * 0.5) / var - g)
        clean = (want - np.sqrt(1 - a[t]) * eps) / np.sqrt(a[t])
        want = np.sqrt(a[t - 1]) * clean + np.sqrt(1 - a[t - 1]) * eps
    np.testing.assert_allclose(guided.ravel(), want, rtol=1e-3)
    assert (guided > plain + 0.05).all()


def test_the_exact_denoiser_is_the_gaussian_s_score():
    rng = np.random.default_rng(1)
    h = dc.fit_gaussian(rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6)), 3)
    v = np.asarray(h.basis, np.float64)
    cov = v @ np.diag(h.s2) @ v.T + float(h.tau2) * (np.eye(6) - v @ v.T)
    x = rng.normal(size=(4, 6))
    for t in (0, 300, 999):
        a = float(SCHEDULE.ab[t])
        away = x - np.sqrt(a) * np.asarray(h.mu)
        score = -np.linalg.solve(a * cov + (1 - a) * np.eye(6), away.T).T
        found = dc.exact_gaussian_denoiser(h, SCHEDULE)(jnp.asarray(x, jnp.float32), jnp.full(4, t))
        np.testing.assert_allclose(found, -np.sqrt(1 - a) * score, rtol=2e-3, atol=2e-4)


def test_masks_keep_the_percentile_and_grow_by_a_square():
    values = np.random.default_rng(0).permutation(7 * 9 * 2).astype(np.float32).reshape(1, 7, 9, 2)
    n = values.size
    kept = dc.percentile_mask(jnp.asarray(values), 90.0, dilate=1)
    assert int(kept.sum()) == n - 1 - int(np.floor(0.9 * (n - 1)))
    each = dc.percentile_mask(jnp.asarray(values), 90.0, independent=True, dilate=1)
    assert {int(c) for c in each.sum((0, 1, 2))} == {63 - 1 - int(np.floor(0.9 * 62))}
    grown = dc.percentile_mask(jnp.asarray(values), 90.0, dilate=3)
    for c in range(2):
        expected = ndimage.binary_dilation(kept[0, :, :, c], np.ones((3, 3)))
        np.testing.assert_array_equal(grown[0, :, :, c], expected)


def test_anomalies_have_the_morphology_of_the_release():
    rng = np.random.default_rng(0)
    a, b = rng.uniform(size=(2, 1, 20, 20)).astype(np.float32)
    found = np.asarray(dc.anomaly_map(jnp.asarray(a), jnp.asarray(b), 5))[0]
    grey = np.abs(a - b)[0] / np.abs(a - b).max()
    low, high = dict(mode="constant", cval=np.inf), dict(mode="constant", cval=-np.inf)
    erode = lambda x: ndimage.grey_erosion(x, (5, 5), **low)
    dilate = lambda x: ndimage.grey_dilation(x, (5, 5), **high)
    np.testing.assert_allclose(found, erode(dilate(dilate(erode(erode(grey))))), rtol=1e-6)
    np.testing.assert_allclose(dc.anomaly_map(jnp.asarray(7 * a), jnp.asarray(7 * b), 5)[0], found, rtol=1e-3)
    blob = np.zeros((1, 20, 20), np.float32)
    blob[:, 4:8, 4:8] = 1.0
    assert not np.asarray(dc.anomaly_map(jnp.asarray(blob), jnp.zeros((1, 20, 20)))).any()
    assert dc.segment(jnp.asarray(blob), 0.5).sum() == 16
    assert not np.isnan(dc.anomaly_map(jnp.zeros((1, 8, 8)), jnp.zeros((1, 8, 8)))).any()
    assert [dc.morphology_size(n) for n in (256, 128, 48, 512)] == [5, 3, 1, 9]


def test_latent_counterfactuals_are_the_released_steps():
    w, z0 = jnp.array([1.0, -2.0, 0.5, 0.0]), jnp.array([[0.2, -0.1, 0.4, 0.0]])
    logits = lambda x: jnp.stack([jnp.zeros(len(x)), x @ w], 1)
    go = lambda t, a, b: lc.counterfactual(logits, lambda z: z, z0, jnp.array([t]), a, b)[0]
    np.testing.assert_allclose(go(1, 100.0, 1e-3), [0.182186, -0.089373, 0.378593, 0.0], atol=2e-6)
    np.testing.assert_allclose(go(0, 100.0, 1e-3), [0.212056, -0.099113, 0.418528, 0.0], atol=2e-6)
    np.testing.assert_allclose(go(1, 0.0, 0.1), [0.541043, -0.782086, 0.570521, 0.0], atol=2e-6)
    # images do not touch each other
    pair = jnp.concatenate([z0, -3 * z0])
    both = lc.counterfactual(logits, lambda z: z, pair, jnp.array([1, 0]), 1.0, 0.1)
    np.testing.assert_allclose(both[0], lc.counterfactual(logits, lambda z: z, z0, jnp.array([1]), 1.0, 0.1)[0])
    image = jnp.concatenate([z0, z0 * 2]).reshape(2, 2, 2, 1)
    flat = lambda x: logits(x.reshape(len(x), -1))
    s = lc.saliency_pair(flat, lambda x: x, lambda z: z, image, 0.0, 0.1)
    np.testing.assert_allclose(s.max((1, 2, 3)), 1.0)
    assert float(s.min()) >= 0
    flat_zero = lambda x: jnp.zeros((len(x), 2))
    assert not np.asarray(lc.saliency_pair(flat_zero, lambda x: x, lambda z: z, image, 0.0)).any()


def test_the_autoencoder_has_the_released_size():
    net = lc.Autoencoder()
    image = jax.ShapeDtypeStruct((1, 128, 128, 1), jnp.float32)
    made = jax.eval_shape(net.init, jax.random.key(0), image)["params"]
    count = lambda names: sum(x.size for k, v in made.items() if k.startswith(names) for x in jax.tree.leaves(v))
    assert count(("first", "encoder")) == 23_840
    assert count(("decoder", "last")) == 21_964
    given = jax.eval_shape(net.init, jax.random.key(0), image)
    z = jax.eval_shape(lambda v, x: net.apply(v, x, method="encode"), given, image)
    assert z.shape == (1, 32, 32, 16)
    assert jax.eval_shape(net.apply, given, image).shape == image.shape


@pytest.mark.parametrize("source", ["mni", "ellipses"])
def test_phantoms_of_brains_have_exact_lesions(source):
    if source == "mni":
        pytest.importorskip("nilearn")
    healthy, none = brain.brain_set(0, 4, 48, source=source)
    lesions, masks = brain.brain_set(0, 12, 48, lesion=True, source=source)
    again, _ = brain.brain_set(0, 4, 48, source=source)
    np.testing.assert_array_equal(healthy, again)
    assert not none.any()
    assert masks.any((1, 2)).all()
    assert 0.008 < masks.mean() < 0.04
    assert healthy.min() >= 0
    assert lesions.max() <= 1
    inside = np.mean([image[m].mean() for image, m in zip(lesions, masks)])
    assert inside > healthy[healthy > 0.2].mean() + 0.2
    scan = brain.brain(np.random.default_rng(1), 48, "ct", True, source)
    assert scan.image.max() > 800
    assert 20 < np.median(scan.image[scan.inside]) < 45
    assert (scan.lesion & ~scan.inside).sum() == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: brain.template("mnii"), "template='mnii': expected one of mni, ellipses"),
        (lambda: brain.brain(np.random.default_rng(0), kind="pet"), "kind='pet': expected 'mri' or 'ct'"),
        (lambda: diffusion.make_schedule(1), "num_times=1"),
        (lambda: diffusion.respaced(SCHEDULE, 0), "stride=0: expected at least 1"),
        (lambda: dc.fit_gaussian(np.ones((5, 4)), 4), "components=4: expected 1 to 3"),
        (lambda: fused(scalar_prior(), pixels([0.5]), True, 1001), "noise_level=1001: expected 1 to 1000"),
        (lambda: fused(scalar_prior(), pixels([0.5]), True, 9, fuse="x"), "fuse='x': expected steps, end or noised"),
        (lambda: dc.diffusion_counterfactual(dilate=4), "dilate=4: expected an odd number"),
        (lambda: dc.diffusion_counterfactual(size=30), "size=30: expected a multiple of 8"),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_bad_folders_are_one_line(tmp_path):
    with pytest.raises(UserError, match="healthy: found 0 files, expected at least 10 images"):
        dc.parts(dc.Config(data=str(tmp_path)))


def test_the_command_tells_of_each_file_and_refuses_other_runs(tmp_path, capsys):
    tiny = [
        "--size",
        "16",
        "--features",
        "2",
        "--multiples",
        "1",
        "--stem",
        "2",
        "--depth",
        "1",
        "--widths",
        "2",
        "2",
        "2",
    ]
    assert cli.main(["phantoms", "mri", "--num", "22", "--size", "32", "--out", str(tmp_path / "slices")]) in (None, 0)
    assert len(list((tmp_path / "slices" / "masks").iterdir())) == 11
    training = ["train", "diffusion-counterfactual", "--data", str(tmp_path / "slices"), *tiny, "--batch-size", "4"]
    training += ["--num-updates", "2", "--noise-level", "40", "--steps", "2", "--run-dir", str(tmp_path / "run")]
    assert cli.main([*training, "--no-progress"]) in (None, 0)
    (tmp_path / "slices" / "lesion" / "broken.png").write_bytes(b"no image")
    command = ["counterfactual", str(tmp_path / "slices" / "lesion"), "--model", str(tmp_path / "run")]
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 0
    table = pd.read_csv(tmp_path / "out" / "results.csv")
    assert list(table.status).count("ok") == 11
    assert "cannot be read as an image" in table.reason[0]
    assert table.p_lesion[1:].between(0, 1).all()
    assert len(list((tmp_path / "out" / "overlays").iterdir())) == 11
    capsys.readouterr()
    assert cli.main([*command, "--threshold", "2", "--out", str(tmp_path / "other")]) == 2
    assert "--threshold 2: expected more than 0 and less than 1" in capsys.readouterr().err
