"""The linear probe for the task and the figures of embeddings."""

import numpy as np
import pytest

from jaxstack.core.errors import UserError
from jaxstack.measures.task_embeddings import figure, principal_components, probe_task_id


def clouds(count=400, spread=1.0, seed=0):
    """Points around the corners of a triangle, and which."""
    rng = np.random.default_rng(seed)
    corner = np.array([[0, 0, 5], [3, 0, 5], [0, 3, 5]], np.float32)
    ids = rng.integers(0, 3, count).astype(np.int32)
    return corner[ids] + spread * rng.normal(size=(count, 3)).astype(np.float32) * [1, 1, 0], ids


def test_the_probe_agrees_with_scikit_learn_and_with_chance():
    linear = pytest.importorskip("sklearn.linear_model")
    x, y = clouds()
    z = (x - x[:200].mean(0)) / (x[:200].std(0) + 1e-6)
    # scikit-learn sums the log-likelihood: C = 1 / (l2 rows)
    model = linear.LogisticRegression(C=1 / (1e-3 * 200), max_iter=1000).fit(z[:200], y[:200])
    want = model.score(z[200:], y[200:])
    got = float(probe_task_id(x, y))
    assert 0.8 < want < 0.999
    assert got == pytest.approx(want, abs=0.0051)  # at most one episode at a boundary
    rng = np.random.default_rng(1)
    assert float(probe_task_id(x, rng.permutation(y))) == pytest.approx(1 / 3, abs=0.12)
    assert float(probe_task_id(*clouds(spread=0.01))) == 1.0


def test_principal_components_are_those_of_the_covariance():
    x, _ = clouds()
    at, share = principal_components(x)
    values = np.linalg.eigvalsh(np.cov(x.T))[::-1]
    np.testing.assert_allclose(at.var(0, ddof=1), values[:2], rtol=1e-5)
    np.testing.assert_allclose(share, values[:2] / values.sum(), rtol=1e-5)
    flat, share = principal_components(x[:, :1])
    assert flat.shape == (400, 2)
    np.testing.assert_allclose(share, [1, 0])


def test_the_figure_has_a_panel_per_agent(tmp_path):
    x, y = clouds(12)
    path = figure({"agent 0": x, "agent 1": -x}, y, tmp_path / "e.svg", ("nw", "ne", "sw"))
    text = path.read_text()
    assert "<svg" in text
    assert path.stat().st_size > 10_000


def test_bad_input_is_named():
    x, y = clouds(10)
    with pytest.raises(UserError, match="found 10 episodes, 1 fitted, expected at least 2 in each part"):
        probe_task_id(x, y, held_out=0.9)
    with pytest.raises(UserError, match=r"found \(10, 3\) and int32\(9,\), expected"):
        probe_task_id(x, y[:9])
    with pytest.raises(UserError, match="float32"):
        probe_task_id(x, y.astype(np.float32))
