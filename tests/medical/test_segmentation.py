"""Segmentation: losses and measures against closed forms, their references and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats as scipy_stats

from jaxstack.core.errors import UserError
from jaxstack.medical import segmentation as seg


def boxes():
    a, b = np.zeros((2, 8, 10), bool)
    a[2:6, 1:5], b[4:8, 1:5] = True, True
    return a, b


def test_losses_have_their_closed_forms_and_gradients():
    logits = jnp.stack([jnp.zeros((4, 5)), jnp.full((4, 5), 2.0)], -1)[None]
    targets = jnp.ones((1, 4, 5, 2))
    each = np.array([np.log(2.0), np.log1p(np.exp(-2.0))])
    np.testing.assert_allclose(seg.weighted_bce(logits, targets, jnp.array([1.0, 3.0])), each @ [1.0, 3.0], rtol=1e-6)
    np.testing.assert_allclose(seg.weighted_bce(logits, targets), each.sum(), rtol=1e-6)
    # far logits give finite values and gradients
    far = jnp.array([-300.0, 300.0]).reshape(1, 1, 2, 1)
    value, grad = jax.value_and_grad(lambda x: seg.weighted_bce(x, 1.0 - (far > 0)).sum())(far)
    np.testing.assert_allclose(value, 300.0)
    assert np.isfinite(grad).all()
    a, b = boxes()
    np.testing.assert_allclose(seg.soft_dice_loss(a.astype(float), b.astype(float), 0.0), 1 - 16 / 32, rtol=1e-6)
    assert float(seg.soft_dice_loss(jnp.zeros((3, 3)), jnp.zeros((3, 3)))) == 0.0
    soft = jax.random.uniform(jax.random.key(0), (3, 6, 7))
    jitted = jax.jit(jax.vmap(seg.soft_dice_loss))(soft, soft > 0.5)
    np.testing.assert_allclose(jitted, seg.soft_dice_loss(soft, soft > 0.5), rtol=1e-6)
    assert (jax.grad(lambda p: seg.soft_dice_loss(p, soft[0] > 0.5))(soft[0])[soft[0] > 0.5] < 0).all()


def test_overlaps_and_boundary_errors():
    a, b = boxes()
    both = np.stack([a, a, np.zeros_like(a)])
    others = np.stack([b, a, np.zeros_like(a)])
    np.testing.assert_allclose(seg.dice(both, others), [0.5, 1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(seg.iou(both, others), [1 / 3, 1.0, 1.0], rtol=1e-6)
    assert float(seg.dice(a, ~a)) == 0.0
    rows, valid = np.array([3.0, 4.0, 5.0, 9.0]), np.array([True, True, False, True])
    found = seg.boundary_error(rows + np.array([1.0, -3.0, 7.0, 1.0]), rows, valid, np.array([True, True, True, True]))
    np.testing.assert_allclose(found, [-1 / 3, 5 / 3, 0.75], rtol=1e-6)
    none = seg.boundary_error(rows, rows, ~valid, valid)
    assert np.isnan(none.signed)
    assert none.columns == 0.0


def test_agreement_and_auc_are_those_of_scipy():
    rng = np.random.default_rng(0)
    y = rng.normal(200.0, 40.0, 30)
    x = y + rng.normal(5.0, 8.0, 30)
    found, gap = seg.bland_altman(x, y), x - y
    low, high = scipy_stats.t.interval(0.95, 29, gap.mean(), scipy_stats.sem(gap))
    assert found.bias == pytest.approx(gap.mean())
    assert (found.bias_low, found.bias_high) == pytest.approx((low, high))
    assert found.upper - found.lower == pytest.approx(2 * 1.96 * gap.std(ddof=1))
    assert found.limit_reach == pytest.approx(np.sqrt(3) * (high - low) / 2)
    scores, positive = np.round(rng.normal(size=60), 1), rng.random(60) > 0.6
    u = scipy_stats.mannwhitneyu(scores[positive], scores[~positive]).statistic
    assert seg.auc(scores, positive) == pytest.approx(u / (positive.sum() * (~positive).sum()))
    assert np.isnan(seg.auc(scores, np.ones(60)))
    with pytest.raises(UserError, match="at least 3 pairs"):
        seg.bland_altman([1.0, 2.0], [1.0, 2.0])
    with pytest.raises(UserError, match="expected as many finite scores"):
        seg.auc([1.0, np.nan], [True, False])
