import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack.measures.gradients import cosine_matrix, entry_variance, interference, relative_variance

G = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)


def test_cosines_equal_their_definition():
    want = [[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in G] for a in G]
    np.testing.assert_allclose(cosine_matrix(jnp.asarray(G)), want, atol=1e-6)
    pairs = [want[i][j] for i in range(5) for j in range(5) if i != j]
    assert float(interference(jnp.asarray(G))) == pytest.approx(np.mean(pairs), abs=1e-6)


def test_cosines_of_simple_cases():
    g = jnp.array([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [0.0, 0.0]])
    want = [[1, 0, -1, 0], [0, 1, 0, 0], [-1, 0, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(cosine_matrix(g), want, atol=1e-6)
    assert float(interference(g[:1])) == 0.0


def test_relative_variance_equals_numpy_and_ignores_scale_and_width():
    want = np.trace(np.cov(G.T)) / np.square(G.mean(0)).sum()
    assert float(relative_variance(jnp.asarray(G))) == pytest.approx(want, rel=1e-5)
    assert float(relative_variance(jnp.asarray(9 * G))) == pytest.approx(want, rel=1e-5)
    assert float(relative_variance(jnp.tile(jnp.asarray(G), 3))) == pytest.approx(want, rel=1e-5)


def test_entry_variance_falls_with_width():
    g = jnp.zeros(10).at[0].set(1.0)
    assert float(entry_variance(g)) == pytest.approx(0.09)
    assert float(entry_variance(jnp.concatenate([g, jnp.zeros(90)]))) == pytest.approx(0.0099)
