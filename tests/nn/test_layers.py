import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack.nn.init import orthogonal
from jaxstack.nn.networks import MLP, Torso
from jaxstack.nn.recurrent import GRU

H, D, T, B = 6, 4, 7, 3


def flax_params(p):
    """The weights of `GRU` as flax.linen.GRUCell names them."""
    wi, wh = np.split(p["input"], 3, 1), np.split(p["recurrent"], 3, 1)
    bi = np.split(p["input_bias"], 3)
    cell = {f"i{g}": {"kernel": w, "bias": b} for g, w, b in zip("rzn", wi, bi)}
    cell |= {f"h{g}": {"kernel": w} for g, w in zip("rz", wh)}
    return cell | {"hn": {"kernel": wh[2], "bias": p["candidate_bias"]}}


@pytest.fixture(scope="module")
def data():
    keys = jax.random.split(jax.random.key(0), 5)
    x, h = jax.random.normal(keys[0], (T, B, D)), jax.random.normal(keys[1], (B, H))
    first = jnp.zeros((T, B), bool).at[3, 1].set(True).at[0, 2].set(True)
    params = GRU(H).init(keys[2], h, x, first)["params"]
    params = jax.tree.map(lambda w: w + 0.1 * jax.random.normal(keys[3], w.shape), params)
    return params, h, x, first


def loop(cell, h, x, first):
    out = []
    for t in range(T):
        h = jnp.where(first[t][:, None], 0.0, h)
        h, y = nn.GRUCell(H).apply({"params": cell}, h, x[t])
        out.append(y)
    return h, jnp.stack(out)


def test_gru_equals_flax_cell_with_resets(data):
    params, h, x, first = data
    got, want = GRU(H).apply({"params": params}, h, x, first), loop(flax_params(params), h, x, first)
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_gru_gradients_equal_flax_cell(data):
    params, h, x, first = data
    mine = lambda p, h, x: jnp.square(GRU(H).apply({"params": p}, h, x, first)[1]).sum()
    theirs = lambda p, h, x: jnp.square(loop(flax_params_of(p), h, x, first)[1]).sum()

    def flax_params_of(p):
        split = lambda w: jnp.split(w, 3, -1)
        wi, wh, bi = split(p["input"]), split(p["recurrent"]), split(p["input_bias"])
        cell = {f"i{g}": {"kernel": w, "bias": b} for g, w, b in zip("rzn", wi, bi)}
        cell |= {f"h{g}": {"kernel": w} for g, w in zip("rz", wh)}
        return cell | {"hn": {"kernel": wh[2], "bias": p["candidate_bias"]}}

    got, want = (jax.jit(jax.grad(f, argnums=(0, 1, 2)))(params, h, x) for f in (mine, theirs))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4)
    assert float(jnp.abs(got[1][2]).max()) == 0.0  # reset at once: nothing flows to the first state
    assert float(jnp.abs(got[1][0]).max()) > 0.0


def test_gru_unrolled_equals_step_by_step(data):
    params, h, x, first = data
    whole = GRU(H).apply({"params": params}, h, x, first)[1]
    for t in range(T):
        h, y = GRU(H).apply({"params": params}, h, x[t : t + 1], first[t : t + 1])
        np.testing.assert_allclose(y[0], whole[t], atol=1e-6)


def test_gru_takes_an_agent_axis(data):
    params, h, x, first = data
    both = GRU(H).apply({"params": params}, jnp.stack([h, 2 * h], 1), jnp.stack([x, -x], 2), first)
    alone = GRU(H).apply({"params": params}, 2 * h, -x, first)
    np.testing.assert_allclose(both[0][:, 1], alone[0], atol=1e-6)
    np.testing.assert_allclose(both[1][:, :, 1], alone[1], atol=1e-6)


def test_gru_starts_with_orthogonal_recurrence():
    p = GRU(H).init(jax.random.key(1), jnp.zeros((1, H)), jnp.zeros((1, 1, D)), jnp.zeros((1, 1), bool))["params"]
    blocks = np.split(np.asarray(p["recurrent"]), 3, 1)
    for block in blocks:
        np.testing.assert_allclose(block @ block.T, np.eye(H), atol=1e-5)
    assert np.abs(blocks[0] - blocks[1]).max() > 0.1


@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (5, 5), (3, 3, 2, 8), (1, 4), (4, 1)])
@pytest.mark.parametrize("gain", [1.0, 2**0.5])
def test_orthogonal_weights_are_orthonormal(shape, gain):
    w = np.asarray(orthogonal(gain)(jax.random.key(0), shape)).reshape(-1, shape[-1]) / gain
    gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
    np.testing.assert_allclose(gram, np.eye(len(gram)), atol=1e-5)


def test_orthogonal_weights_are_uniform():
    # Haar on O(n): E q = 0, E q_ij^2 = 1/n, E q_ij^4 = 3 / (n (n + 2)), E det = 0, all entries alike
    n = 3
    q = np.asarray(jax.vmap(lambda k: orthogonal()(k, (n, n)))(jax.random.split(jax.random.key(0), 20000)))
    np.testing.assert_allclose(q.mean(0), 0.0, atol=0.02)
    np.testing.assert_allclose((q**2).mean(0), 1 / n, atol=0.01)
    np.testing.assert_allclose((q**4).mean(0), 3 / (n * (n + 2)), atol=0.01)
    assert abs(np.linalg.det(q).mean()) < 0.03


def test_orthogonal_weights_need_no_lapack():
    text = jax.jit(lambda k: orthogonal()(k, (8, 4))).lower(jax.random.key(0)).as_text()
    assert "custom_call" not in text


def test_wide_orthogonal_weights_stay_orthonormal():
    w = np.asarray(orthogonal()(jax.random.key(3), (128, 128)), np.float64)
    np.testing.assert_allclose(w @ w.T, np.eye(128), atol=1e-5)


def test_mlp_gains_and_zero_biases():
    p = MLP((8,), 3, "relu", 0.01).init(jax.random.key(0), jnp.zeros((1, 4)))["params"]
    first, last = p["Dense_0"], p["Dense_1"]
    np.testing.assert_allclose(first["kernel"] @ first["kernel"].T, 2 * np.eye(4), atol=1e-5)
    np.testing.assert_allclose(last["kernel"].T @ last["kernel"], 1e-4 * np.eye(3), atol=1e-8)
    assert not np.any(first["bias"])
    assert not np.any(last["bias"])


def test_plain_torso_flattens_and_has_no_weights():
    torso = Torso(2)
    x = jnp.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    (carry, y), params = torso.init_with_output(jax.random.key(0), (), x, jnp.zeros((2, 3), bool))
    assert carry == ()
    assert not params
    np.testing.assert_array_equal(y, x.reshape(2, 3, 20))
    assert y.dtype == jnp.float32


def test_cnn_torso_sees_each_image_alone():
    torso = Torso(3, network="cnn={channels: [4, 4, 4]}")
    x = jax.random.uniform(jax.random.key(1), (2, 3, 2, 5, 5, 3))
    first = jnp.zeros((2, 3), bool)
    (_, y), params = torso.init_with_output(jax.random.key(0), (), x, first)
    assert y.shape == (2, 3, 2, 5 * 5 * 4)
    one = torso.apply(params, (), x[1:, 2:, 1:], first[1:, 2:])[1]
    np.testing.assert_allclose(one[0, 0, 0], y[1, 2, 1], atol=1e-6)


def test_cnn_and_gru_stack():
    torso = Torso(3, gru=6, network="cnn={channels: [2]}")
    x = jnp.ones((4, 3, 5, 5, 1))
    (h, y), _ = torso.init_with_output(jax.random.key(0), jnp.zeros((3, 6)), x, jnp.zeros((4, 3), bool))
    assert h.shape == (3, 6)
    assert y.shape == (4, 3, 6)
    np.testing.assert_array_equal(h, y[-1])
