"""Nearest-neighbour estimators against closed forms, slow references and scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import digamma
from sklearn.feature_selection._mutual_info import _compute_mi_cd

from jaxstack.measures import information as info

LN2 = np.log(2.0)


def nested(z, x, action, k, alpha, classes):
    """cmi_discrete by sorting all distances, row by row."""
    n = len(z)
    count = min(n - 1, max(k + 5, 5 * k))
    kl, entropy = [], []
    for i in range(n):
        dz = ((z - z[i]) ** 2).sum(-1)
        dz[i] = np.inf
        near = np.argsort(dz)[:count]
        both = near[np.argsort(dz[near] + ((x[near] - x[i]) ** 2).sum(-1))[:k]]
        p, q = (
            (np.bincount(action[index], minlength=classes) + alpha) / (k + alpha * classes)
            for index in (both, near[:k])
        )
        kl.append((p * np.log(p / q)).sum())
        entropy.append(-(q * np.log(q)).sum())
    return np.mean(kl), np.mean(entropy)


@pytest.mark.parametrize("columns", [3, 40])
def test_discrete_cmi_is_the_nested_reference(columns):
    rng = np.random.default_rng(0)
    n = 400
    z, x = rng.normal(size=(n, columns)), rng.normal(size=(n, 2))
    action = (x[:, 0] + z[:, 0] + rng.normal(size=n) > 0).astype(int) + (z[:, 1] > 1)
    with jax.enable_x64(True):
        cmi, entropy = info.cmi_discrete(*map(jnp.asarray, (z, x, action)), classes=3, k=10, alpha=0.5)
        mixed = rng.permutation(n)
        again, _ = info.cmi_discrete(*(jnp.asarray(v[mixed]) for v in (z, x, action)), classes=3, k=10, alpha=0.5)
    expected = nested(z, x, action, 10, 0.5, 3)
    np.testing.assert_allclose((cmi, entropy), expected, rtol=1e-9)
    np.testing.assert_allclose(again, cmi, rtol=1e-9)
    single, _ = info.cmi_discrete(
        *(jnp.asarray(v, t) for v, t in ((z, "float32"), (x, "float32"), (action, int))), 3, 10
    )
    np.testing.assert_allclose(single, cmi, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_smallest_of_each_column(dtype):
    rng = np.random.default_rng(6)
    with jax.enable_x64(dtype == "float64"):
        for values in (rng.random((40, 30)), rng.integers(0, 4, (40, 30)), np.zeros((40, 30))):  # few and many ties
            for k in (1, 7, 40):
                found = np.asarray(info.smallest(jnp.asarray(values, dtype), k))
                first = np.argsort(values.astype(dtype), 0, kind="stable")[:k]
                assert (np.sort(np.nonzero(found.T)[1].reshape(30, k), 1) == np.sort(first.T, 1)).all()


@pytest.mark.parametrize("classes", [2, 9])
def test_labels_as_a_source_are_their_one_hot_codes(classes):
    """`label_divergence` against the estimate that takes any X; 9 labels' counts fill more than one integer."""
    rng = np.random.default_rng(7)
    z = jnp.asarray(rng.normal(size=(300, 4)), jnp.float32)
    given, action = jnp.asarray(rng.integers(0, classes, (2, 2, 300)))
    near = info.neighbours(z, info.candidates(300, 10))
    found = np.stack(info.label_divergence(near, given, action, classes, 10, 0.5))
    for i in range(2):
        x = info.standardise(jax.nn.one_hot(given[i], classes))
        np.testing.assert_allclose(found[:, i], info.cmi_discrete(z, x, action[i], classes, 10, 0.5), rtol=1e-5)


def test_a_copy_of_the_condition_adds_nothing():
    rng = np.random.default_rng(1)
    z = jnp.asarray(rng.normal(size=(300, 4)), jnp.float32)
    action = jnp.asarray(rng.integers(0, 2, 300))
    assert abs(float(info.cmi_discrete(z, z, action, 2)[0])) <= 1e-12


@pytest.mark.parametrize("columns", [1, 20])
def test_ross_is_its_definition(columns):
    rng = np.random.default_rng(2)
    n = 600
    action = rng.choice(5, n, p=[0.5, 0.3, 0.18, 0.012, 0.008])  # rare classes need more than the list of neighbours
    x = rng.normal(size=(n, columns)) + action[:, None]
    with jax.enable_x64(True):
        ours = info.mi_ross_each(jnp.asarray(x), jnp.asarray([action, action[::-1]]), 5, depth=16, spare=20)
        full = info.mi_ross_each(jnp.asarray(x), jnp.asarray([action]), 5, depth=4, spare=1)
    assert int(np.bincount(action).min()) > 1
    if columns == 1:
        # its trees round distances to the k-th neighbour, so that some rows count it
        np.testing.assert_allclose(ours[0], _compute_mi_cd(x[:, 0], action, 3), rtol=1e-3)
        np.testing.assert_allclose(ours[1], _compute_mi_cd(x[:, 0], action[::-1], 3), rtol=1e-3)
    np.testing.assert_allclose(full[0], ours[0], rtol=1e-9)
    expected = []
    for i in range(n):
        d = ((x - x[i]) ** 2).sum(-1)
        own = np.sort(d[action == action[i]])[min(3, (action == action[i]).sum() - 1)]
        expected.append((min(3, (action == action[i]).sum() - 1), (action == action[i]).sum(), (d < own).sum()))
    k, size, within = np.asarray(expected).T
    value = digamma(n) + np.mean(digamma(k) - digamma(size) - digamma(within))
    np.testing.assert_allclose(ours[0], max(value, 0.0), rtol=1e-9)


def test_gaussian_closed_forms():
    rng = np.random.default_rng(3)
    n = 2000
    z = rng.normal(size=(n, 1))
    x = z + rng.normal(size=(n, 1))
    y = x + z + 0.5 * rng.normal(size=(n, 1))
    z, x, y = (jnp.asarray(v, jnp.float32) for v in (z, x, y))
    assert abs(float(info.cmi_ksg(x, y, z, k=5)) / LN2 - 0.5 * np.log2(1 + 1 / 0.25)) < 0.08
    assert abs(float(info.mi_ksg(z, x, k=3)) / LN2 - 0.5) < 0.03
    assert abs(float(info.entropy_knn(z, k=5)) - 1.4189) < 0.05
    # ranks keep the rows together: the released single argsort does not
    np.testing.assert_array_equal(info.ranks(jnp.asarray([[3.0], [1.0], [2.0]])), [[2], [0], [1]])


def test_ties_are_broken_for_each_row_anew():
    """With one value in all rows the neighbourhoods must be random samples, not one and the same set."""
    near = info.neighbours(jnp.zeros((500, 2)), 10).index
    used = np.bincount(np.asarray(near).ravel(), minlength=500)
    assert used.max() < 40
    assert (used > 0).mean() > 0.99
    assert not (np.asarray(near) == np.arange(500)[:, None]).any()


def test_components_keep_distances_and_small_blocks():
    x = jnp.asarray(np.random.default_rng(4).normal(size=(60, 5)), jnp.float32)
    assert info.principal(x, 5) is x
    wide = jnp.concatenate([x, x @ jnp.ones((5, 3))], -1)  # rank 5
    kept = info.principal(wide, 5)
    distance = lambda v: jnp.square(v[:, None] - v[None]).sum(-1)
    np.testing.assert_allclose(distance(kept), distance(wide), rtol=1e-3, atol=1e-3)


def test_entropies():
    action = jnp.asarray([0, 0, 1, 1, 2, 2, 2, 2])
    assert abs(float(info.entropy(action, 4)) / LN2 - 1.5) < 1e-6
    assert float(info.entropy(jnp.zeros(5, int), 2)) == 0.0
