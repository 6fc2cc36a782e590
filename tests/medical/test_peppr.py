"""Global explanations and PEPPR: aggregation, rankings, and curves against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm, trim_mean

from jaxstack.core.errors import UserError
from jaxstack.medical import global_maps, peppr
from jaxstack.medical.multilabel import aucs

KEY = jax.random.key(0)
SIZE = (6, 8)


def own_map(variables, image, label):
    """An explanation that is the image's channel of the label."""
    return jnp.take(image, label, axis=-1)


def linear(variables, images):
    """Logits that are linear in the pixels."""
    return jnp.einsum("bhwc,hwcl->bl", images, variables)


def data(n=10, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(0.1, 1.0, (n, *SIZE, 3)).astype(np.float32), rng.uniform(size=(n, 3)) < 0.6


def aggregate(images, carried, batch=4, **options):
    batches = [(images[i : i + batch], carried[i : i + batch]) for i in range(0, len(images), batch)]
    return global_maps.aggregate(own_map, None, batches, **options)


def test_streams_are_the_batch_mean_its_error_and_other_averages():
    images, carried = data(11)
    images[3, ..., 1] = 0.0  # nothing to explain
    carried[3, 1] = True
    found = aggregate(images, carried)
    scaled = images / np.maximum(images.max((1, 2)), 1e-6)[:, None, None]
    for k in range(3):
        rows = carried[:, k] & (images[..., k].max((1, 2)) > 0)
        own = scaled[rows][..., k]
        np.testing.assert_allclose(found.label_maps[k], own.mean(0), rtol=1e-5)
        np.testing.assert_allclose(found.sem[k], own.std(0, ddof=1) / np.sqrt(rows.sum()), rtol=1e-3)
        assert found.n[k] == rows.sum()
    assert found.skipped.tolist() == [0, 1, 0]
    assert np.isfinite(found.label_maps).all()
    weights = found.n / found.n.sum()
    np.testing.assert_allclose(found.overall, np.tensordot(weights, found.label_maps, 1), rtol=1e-5)
    np.testing.assert_allclose(aggregate(images, carried, overall=2).overall, found.label_maps[2], rtol=1e-6)
    np.testing.assert_allclose(aggregate(images, carried, overall="equal").overall, found.label_maps.mean(0), rtol=1e-5)
    # the order of images does not matter
    order = np.random.default_rng(1).permutation(11)
    again = aggregate(images[order], carried[order], batch=11)
    np.testing.assert_allclose(again.label_maps, found.label_maps, atol=1e-6)
    np.testing.assert_allclose(again.sem, found.sem, atol=1e-6)
    # one image gives its own map
    one = aggregate(images[:1], np.ones((1, 3), bool))
    np.testing.assert_allclose(one.label_maps, np.moveaxis(scaled[0], -1, 0), rtol=1e-6)
    assert np.isnan(one.sem).all()
    contrast = aggregate(images, carried, mode="contrast").label_maps
    np.testing.assert_allclose(contrast, found.label_maps - found.label_maps.mean(0), atol=1e-6)
    median = aggregate(images, carried, mode="median", bins=200).label_maps
    np.testing.assert_allclose(median[2], np.median(scaled[carried[:, 2]][..., 2], 0), atol=0.005)
    five = aggregate(images[:5], np.ones((5, 3), bool), mode="trimmed", trim=0.2, bins=200).label_maps
    np.testing.assert_allclose(five[2], trim_mean(scaled[:5, ..., 2], 0.2, 0), atol=0.005)
    nobody = aggregate(images, np.zeros((11, 3), bool))
    assert not nobody.label_maps.any()
    with pytest.raises(UserError, match="batches: found none"):
        global_maps.aggregate(own_map, None, [])
    with pytest.raises(UserError, match="mode='mode': expected one of mean, median"):
        aggregate(images, carried, mode="mode")
    with pytest.raises(UserError, match="found no histograms"):
        global_maps.finish(global_maps.start(1, SIZE), "median")


def test_errors_fall_with_the_root_of_images_and_maps_move_with_them():
    rng = np.random.default_rng(2)
    images = rng.uniform(0.0, 1.0, (800, *SIZE, 1)).astype(np.float32)
    images[:, 0, 0] = 1.0  # the largest, so that scaling changes nothing
    few, many = (aggregate(images[:n], np.ones((n, 1), bool), batch=50) for n in (50, 800))
    ratio = few.sem[0].ravel()[1:].mean() / many.sem[0].ravel()[1:].mean()
    assert ratio == pytest.approx(4.0, rel=0.1)
    shifted = aggregate(np.roll(images, 2, 2), np.ones((800, 1), bool), batch=50)
    np.testing.assert_allclose(shifted.label_maps[0], np.roll(many.label_maps[0], 2, 1), atol=1e-6)


def test_masks_hold_what_is_asked_for_with_ties_broken_by_chance():
    importance = np.repeat(np.repeat(np.arange(12.0).reshape(3, 4), 2, 0), 2, 1)  # blocks, as nearest upsampling makes
    ranks = global_maps.pixel_ranks(jnp.asarray(importance), KEY)
    assert sorted(np.asarray(ranks).ravel()) == list(range(48))
    assert (np.diff(importance.ravel()[np.argsort(np.asarray(ranks).ravel())]) <= 0).all()
    for size in ((6, 8), (64, 80), (384, 512)):
        count = size[0] * size[1]
        own = jnp.arange(count).reshape(size)
        for q in peppr.GRID:
            assert int(global_maps.top(own, q).sum()) == -(-round(q * 100) * count // 100), (size, q)
    other = global_maps.pixel_ranks(jnp.asarray(importance), jax.random.key(1))
    assert (np.asarray(ranks) != np.asarray(other)).any()
    np.testing.assert_array_equal(np.asarray(ranks) // 4, np.asarray(other) // 4)
    images, fill = jnp.asarray(data()[0]), jnp.asarray([0.1, 0.2, 0.3])
    mask = global_maps.top(ranks, 0.3)
    once = global_maps.erased(images, mask, fill)
    np.testing.assert_array_equal(global_maps.erased(once, mask, fill), once)
    rest = global_maps.top(global_maps.inverse(ranks), 0.7)
    # 0.3 x 48 is no integer: of 48 pixels, ceil(14.4) + ceil(33.6) = 49 are named
    assert int((mask & rest).sum()) == 1
    half, others = global_maps.top(ranks, 0.25), global_maps.top(global_maps.inverse(ranks), 0.75)
    np.testing.assert_array_equal(global_maps.erased(images, half, fill), global_maps.restored(images, others, fill))
    middle = global_maps.centre_importance((5, 7))
    assert np.unravel_index(middle.argmax(), (5, 7)) == (2, 3)


def test_curves_of_a_linear_network_are_their_closed_form():
    """x = mu + y d + N(0, s^2), f = w.x, fill = mu: AUC = Phi(D / (s sqrt(2) |w_M|)), D the sum of w d over M."""
    rng = np.random.default_rng(3)
    n, s = 60_000, 0.8
    w, d = rng.normal(size=SIZE), rng.uniform(0.0, 0.3, SIZE)
    d *= np.sign(w) * (rng.uniform(size=SIZE) < 0.8)
    mu = rng.normal(size=SIZE)
    y = rng.uniform(size=(n, 1)) < 0.5
    x = (mu + y[:, :, None] * d + s * rng.normal(size=(n, *SIZE))).astype(np.float32)[..., None]
    given, qs = jnp.asarray(w[:, :, None, None], jnp.float32), (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)
    fill = jnp.asarray(mu[..., None], jnp.float32)
    ranks = global_maps.pixel_ranks(jnp.asarray(w * d), KEY)

    def expected(mask):
        size = np.sqrt((w[mask] ** 2).sum())
        return norm.cdf((w * d)[mask].sum() / (s * np.sqrt(2) * size)) if mask.any() else 0.5

    both = {
        name: peppr.peppr_curves(linear, given, x, y, r, peppr.macro_auc, qs, fill, 2000)
        for name, r in (("own", ranks), ("inverse", global_maps.inverse(ranks)))
    }
    order = np.asarray(ranks)
    own, other = both["own"], both["inverse"]
    for i, q in enumerate(qs):
        top = order < round(q * 48)
        assert own.restore[i] == pytest.approx(expected(top), abs=0.01)
        assert own.erase[i] == pytest.approx(expected(~top), abs=0.01)
    # a ranking and its inverse mirror each other, ends included
    mirrored = {q: other.restore[qs.index(1 - q)] for q in qs if 1 - q in qs}
    for q, value in mirrored.items():
        assert own.erase[qs.index(q)] == pytest.approx(value, abs=1e-6)
    full = float(aucs(np.asarray(linear(given, jnp.asarray(x))), y)[0])
    assert own.erase[0] == pytest.approx(full, abs=1e-6)
    assert own.restore[-1] == pytest.approx(full, abs=1e-6)
    assert own.erase[-1] == own.restore[0] == 0.5  # constant inputs: ties
    control = peppr.mean_curves(
        [
            peppr.peppr_curves(linear, given, x, y, r, peppr.macro_auc, qs, fill, 2000)
            for r in peppr.random_ranks(SIZE, 3, KEY)
        ]
    )
    assert (own.restore >= control.restore - 1e-6).all()
    assert (own.erase <= control.erase + 1e-6).all()
    found = peppr.peppr_summary(own, control)
    assert found.peppr == pytest.approx(found.restore_area - found.erase_area)
    assert found.above_random > 0.1
    assert peppr.peppr_summary(other, control).above_random < -0.1
    assert peppr.peppr_summary(control, control).above_random == 0
    assert found.enough in qs[1:4]
    # one ranking for each image is the same where all are equal
    few = x[:64]
    each = jnp.broadcast_to(ranks, (64, *SIZE))
    a = peppr.logits_at(linear, given, few, ranks, qs, fill)
    b = peppr.logits_at(linear, given, few, each, qs, fill)
    np.testing.assert_allclose(a.erase, b.erase, rtol=1e-4, atol=1e-5)


def test_two_copies_of_one_evidence_show_as_a_plateau():
    rng = np.random.default_rng(4)
    y = rng.uniform(size=(400, 1)) < 0.5
    x = np.zeros((400, 2, 4, 1), np.float32)
    x[:, :, :2] = (y + 0.7 * rng.normal(size=(400, 1)))[:, :, None, None]
    x[:, :, 2:] = x[:, :, :2]
    ranks = jnp.asarray([[0, 1, 4, 5], [2, 3, 6, 7]])
    either = lambda v, images: jnp.maximum(images[:, :, :2].mean((1, 2)), images[:, :, 2:].mean((1, 2)))
    found = peppr.peppr_curves(either, None, x, y, ranks, peppr.macro_auc, (0.0, 0.5, 1.0), -9.0)
    full = found.restore[2]
    assert full > 0.7
    np.testing.assert_allclose(found.erase, [full, full, 0.5])
    np.testing.assert_allclose(found.restore, [0.5, full, full])


def test_fills_metrics_and_retraining():
    images, _ = data(6)
    training = jnp.asarray(data(9, 5)[0])
    x = jnp.asarray(images)
    fill = lambda kind: np.asarray(peppr.fill_of(kind, x, training, KEY))
    np.testing.assert_allclose(fill("mean"), np.asarray(training).mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(fill("mean-image"), np.asarray(training).mean(0), rtol=1e-5)
    assert fill("blur").shape == images.shape
    assert fill("blur").std((1, 2)).max() < 0.2 * images.std((1, 2)).min()
    assert fill("noise").std() == pytest.approx(float(training.std()), rel=0.1)
    with pytest.raises(UserError, match="fill='black': expected one of mean, mean-image"):
        fill("black")
    logits = np.array([[2.0, -1.0], [-3.0, 0.5]])
    labels = np.array([[True, False], [False, True]])
    p = 1 / (1 + np.exp(-logits))
    right = np.where(labels, p, 1 - p)
    assert peppr.log_likelihood(logits, labels) == pytest.approx(np.log(right).mean())
    assert peppr.true_probability(logits, labels) == pytest.approx((p[0, 0] + p[1, 1]) / 2)
    assert peppr.label_auc(1)(logits, labels) == 1.0
    assert np.isnan(peppr.macro_auc(logits, np.zeros((2, 2), bool)))
    # a network of the mean of what it was trained on, which tells the share that was kept
    fit = lambda kept: lambda some: jnp.broadcast_to(kept.mean(), (len(some), 1))
    mean_of = lambda logits, labels: float(logits.mean())
    ranks = jnp.arange(48).reshape(SIZE)
    ones = jnp.ones((3, *SIZE, 1))
    curve = peppr.retrained_curve(fit, ones, ones, np.zeros((3, 1)), ranks, mean_of, (0.25, 1.0), 0.0)
    np.testing.assert_allclose(curve, [0.25, 1.0])
    for qs, message in (((0.5, 1.5), "found 0.5 to 1.5, expected fractions"), ((), "expected fractions in 0..1")):
        with pytest.raises(UserError, match=message):
            peppr.logits_at(linear, jnp.ones((*SIZE, 3, 1)), x, ranks, qs)
    with pytest.raises(UserError, match="ranks: found shape"):
        peppr.logits_at(linear, jnp.ones((*SIZE, 3, 1)), x, ranks[:2])
