import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special

from jaxstack.measures.diversity import jensen_shannon, snd, total_variation, wasserstein

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(4, 3, 5)).astype(np.float32)


def test_categorical_distances_equal_scipy():
    p = scipy.special.softmax(LOGITS, -1)
    js, tv = jensen_shannon(jnp.asarray(LOGITS)), total_variation(jnp.asarray(LOGITS))
    for b in range(4):
        for i in range(3):
            for j in range(3):
                want = scipy.spatial.distance.jensenshannon(p[b, i], p[b, j])
                np.testing.assert_allclose(js[b, i, j], want, atol=1e-3 if i == j else 1e-5)
                np.testing.assert_allclose(tv[b, i, j], 0.5 * np.abs(p[b, i] - p[b, j]).sum(), atol=1e-6)


@pytest.mark.parametrize("low", [-1e9, -jnp.inf])
def test_disjoint_deterministic_policies_are_at_the_largest_distance(low):
    logits = jnp.array([[[0.0, low], [low, 0.0]]])
    np.testing.assert_allclose(total_variation(logits)[0, 0, 1], 1.0, atol=1e-6)
    np.testing.assert_allclose(jensen_shannon(logits)[0, 0, 1], np.sqrt(np.log(2)), atol=1e-6)
    assert float(snd(jensen_shannon(logits))) == pytest.approx(0.8326, abs=1e-4)


def test_wasserstein_of_normals():
    mean, std = jnp.array([[[0.0], [3.0]]]), jnp.array([[[1.0], [5.0]]])
    assert float(snd(wasserstein(mean, std))) == pytest.approx(5.0)
    wide = wasserstein(jnp.array([[[0.0, 0.0], [1.0, 2.0]]]), jnp.array([[[1.0, 1.0], [3.0, 1.0]]]))
    assert float(wide[0, 0, 1]) == pytest.approx(3.0)


def test_snd_is_zero_for_identical_policies_and_lone_agents():
    same = jnp.broadcast_to(LOGITS[:, :1], LOGITS.shape)
    assert float(snd(total_variation(same))) == 0.0
    assert float(snd(jensen_shannon(same))) < 1e-3
    assert float(snd(wasserstein(same, jnp.ones_like(same)))) == 0.0
    assert float(snd(total_variation(jnp.asarray(LOGITS[:, :1])))) == 0.0


def test_snd_is_the_mean_over_pairs_and_observations():
    d = np.abs(RNG.normal(size=(4, 3, 3)))
    want = np.mean([(d[b, 0, 1] + d[b, 0, 2] + d[b, 1, 2]) / 3 for b in range(4)])
    assert float(snd(jnp.asarray(d, jnp.float32))) == pytest.approx(want, rel=1e-5)
