"""S5 and minGRU."""

import functools
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack.core.errors import UserError
from jaxstack.sequence.mingru import MinGRU, MinGRUState, positive
from jaxstack.sequence.mixer import Mixer
from jaxstack.sequence.s5 import S5, Complex, complex_scan, discretise, hippo_normal

sys.path.insert(0, os.path.dirname(__file__))
from layers import close, continues, conv, double, matches, recurrence_equals, sigmoid, stays_finite

LAYER = S5(5, d_state=8, blocks=2)


def pair(x):
    return Complex(np.real(x), np.imag(x))


def whole(x):
    return np.asarray(x.re) + 1j * np.asarray(x.im)


def inputs(length, seed=0, batch=2, width=3):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape) + 1j * rng.normal(size=shape)
    a = rng.uniform(0.5, 1.0, width) * np.exp(1j * rng.uniform(-3, 3, width))
    return pair(a), pair(normal(batch, length, width)), pair(normal(batch, width))


def loops(a, b, x):
    out = []
    for t in range(b.shape[1]):
        x = a * x + b[:, t]
        out.append(x)
    return np.stack(out, 1), x


def plain(a, b, x0):
    """The recurrence on complex numbers, which autodiff goes through."""
    a, b, x0 = (jax.lax.complex(x.re, x.im) for x in (a, b, x0))
    last, x = jax.lax.scan(lambda x, b: (a * x + b,) * 2, x0, b.swapaxes(0, 1))
    return Complex(x.real.swapaxes(0, 1), x.imag.swapaxes(0, 1)), Complex(last.real, last.imag)


def form(method):
    return functools.partial(complex_scan, method=method)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65])
def test_forms_equal_the_plain_recurrence_with_their_gradients(length):
    recurrence_equals([form("sequential"), form("chunked")], inputs(length), plain)


def test_associative_form():
    recurrence_equals([form("associative")], inputs(5), plain)


@pytest.mark.parametrize("method", ["sequential", "chunked"])
def test_masked_tokens_are_not_seen(method):
    a, b, x0 = inputs(9, batch=1)
    mask = np.array([[0, 1, 1, 0, 0, 1, 1, 1, 0]], bool)
    dirty = Complex(*(np.where(mask[..., None], t, np.nan) for t in b))
    want, last = loops(whole(a), whole(b)[:, mask[0]], whole(x0))
    with jax.enable_x64():
        run = functools.partial(complex_scan, mask=mask, method=method)
        x, end = jax.jit(run)(a, dirty, x0)
        close((Complex(x.re[:, mask[0]], x.im[:, mask[0]]), end), (pair(want), pair(last)))
        grads = jax.jit(jax.grad(lambda a, b: run(a, b, x0)[0].re.sum(), (0, 1)))(
            *jax.tree.map(jnp.asarray, (a, dirty))
        )
        assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_eigenvalues_of_hippo():
    """V diag(Lambda) V^H is HiPPO-LegS + P P^T, built here from its definition."""
    size = 8
    n = np.arange(size)
    legs = np.array([[-np.sqrt((2 * i + 1) * (2 * k + 1)) * (i > k) - (i + 1) * (i == k) for k in n] for i in n])
    eigenvalues, vectors = hippo_normal(size)
    values, basis = np.concatenate([eigenvalues, eigenvalues.conj()]), np.concatenate([vectors, vectors.conj()], 1)
    rank_one = np.outer(np.sqrt(n + 0.5), np.sqrt(n + 0.5))
    np.testing.assert_allclose((basis * values) @ basis.conj().T, legs + rank_one, atol=1e-12)
    np.testing.assert_allclose(basis.conj().T @ basis, np.eye(size), atol=1e-12)


def test_discretisation_is_the_exact_step_of_the_differential_equation():
    """Also for |Lambda| Delta of 1e-6, where (exp - 1) / Lambda cancels in float32."""
    values, delta = np.array([-0.5 + 3j, -0.5 + 200j, -1e-4 + 1e-4j, -20 + 0j]), np.array([0.1, 0.03, 1e-2, 0.5])
    decay, weight = discretise(Complex(*(jnp.asarray(x, jnp.float32) for x in pair(values))), jnp.asarray(delta))
    np.testing.assert_allclose(whole(decay), np.exp(values * delta), rtol=2e-6)
    np.testing.assert_allclose(whole(weight), np.expm1(values * delta) / values, rtol=3e-6)


def s5_reference(p, x):
    values = np.minimum(p["Lambda_re"], -1e-4) + 1j * p["Lambda_im"]
    b, c = p["B"][0] + 1j * p["B"][1], p["C"][0] + 1j * p["C"][1]
    delta = np.exp(p["log_step"])
    weight = (np.expm1(values * delta) / values)[:, None] * b
    hidden, last = loops(np.exp(values * delta), x @ weight.T, np.zeros((len(x), len(values)), complex))
    y = 2 * (hidden @ c.T).real + p["D"] * x
    g = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    return g * sigmoid(g @ p["gate"]["kernel"] + p["gate"]["bias"]), pair(last)


def test_s5_equals_the_reference():
    matches(LAYER, s5_reference)


def test_s5_contract():
    assert isinstance(LAYER, Mixer)
    continues(LAYER)
    stays_finite(LAYER)


def test_s5_starts_as_the_paper_says():
    """The diagonal system is the dense one of HiPPO-N: B and C in its eigenbasis come from a real B."""
    module = S5(64, d_state=32, blocks=2)
    p = double(jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 2, 64)))["params"])
    values, vectors = hippo_normal(16)
    close(p["Lambda_re"], np.full(16, -0.5))
    close(p["Lambda_im"], np.tile(values.imag, 2), rtol=1e-6)
    assert (p["log_step"] > np.log(0.00099)).all()
    assert (p["log_step"] < np.log(0.101)).all()
    b = p["B"][0] + 1j * p["B"][1]
    dense = 2 * (np.kron(np.eye(2), vectors) @ b).real
    assert np.std(dense) == pytest.approx(64**-0.5, rel=0.1)
    c = p["C"][0] + 1j * p["C"][1]
    assert np.sqrt((np.abs(c) ** 2).mean()) == pytest.approx((2 / 32) ** 0.5, rel=0.1)


def test_s5_never_grows():
    module = S5(4, d_state=4)
    variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 2, 4)))
    variables["params"]["Lambda_re"] = jnp.array([3.0, 0.0])
    decay, weight = module.apply(variables, method="dynamics")
    assert (np.abs(whole(decay)) < 1).all()
    assert np.isfinite(whole(weight)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(d_state=7), "S5.d_state=7"),
        (dict(blocks=3), "S5.blocks=3"),
        (dict(blocks=0), "S5.blocks=0"),
        (dict(delta_range=(0.2, 0.1)), "S5.delta_range"),
        (dict(method="fast"), "S5.method='fast'"),
    ],
)
def test_s5_fields_are_checked(change, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(S5(**(dict(features=6, d_state=8) | change)).init, jax.random.key(0), jnp.zeros((1, 2, 6)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(a=pair(np.ones(4))), "a has shapes"),
        (dict(b=pair(np.ones((2, 3)))), "b has shape"),
        (dict(x0=pair(np.ones((1, 3)))), "x0 has shapes"),
        (dict(mask=np.ones((2, 5))), "mask has shape .* expected bool"),
        (dict(method="fast"), "unknown scan method 'fast'"),
        (dict(chunk=0), "chunk=0"),
    ],
)
def test_wrong_input_is_a_clear_error(change, message):
    with pytest.raises(UserError, match=message):
        complex_scan(**(dict(zip(("a", "b", "x0"), inputs(5))) | change))


# ---------------------------------------------------------------- minGRU


def mingru_reference(p, x, module):
    window, z = (x[:, -3:], conv(x, p["conv"])) if module.use_conv else (None, x)
    gate, new = np.split(z @ p["in_proj"]["kernel"] + p["in_proj"]["bias"], 2, axis=-1)
    gate = sigmoid(gate)
    if module.candidate == "positive":
        new = np.where(new >= 0, new + 0.5, sigmoid(new))
    h, out = np.zeros(gate[:, 0].shape), []
    for t in range(x.shape[1]):
        h = (1 - gate[:, t]) * h + gate[:, t] * new[:, t]
        out.append(h)
    return np.stack(out, 1) @ p["out_proj"]["kernel"] + p["out_proj"]["bias"], MinGRUState(window, h)


@pytest.mark.parametrize(
    "module", [MinGRU(5), MinGRU(4, candidate="positive", use_conv=True, expand=1.5, method="chunked")]
)
def test_mingru_equals_the_reference(module):
    matches(module, lambda p, x: mingru_reference(p, x, module))


def test_mingru_contract():
    module = MinGRU(4, use_conv=True)
    assert isinstance(module, Mixer)
    assert MinGRU(4).init_state(3).conv is None
    continues(module)
    stays_finite(module)


def test_mingru_stays_between_its_candidates():
    """h is an average of candidates and of 0; positive candidates keep it positive."""
    module = MinGRU(3, candidate="positive")
    x = 5 * jax.random.normal(jax.random.key(0), (2, 40, 3))
    variables = jax.jit(module.init)(jax.random.key(1), x)
    _, state = jax.jit(module.apply)(variables, x)
    z = x @ variables["params"]["in_proj"]["kernel"][:, 6:]
    assert (state.hidden > 0).all()
    assert (state.hidden <= positive(z).max(1)).all()


def test_g_is_continuous_and_positive():
    x = jnp.array([-200.0, -1.0, -1e-6, 0.0, 1e-6, 2.0])
    close(positive(x), np.where(x >= 0, x + 0.5, sigmoid(np.asarray(x, np.float64))), rtol=1e-6)
    assert (positive(x[1:]) > 0).all()
    assert jnp.isfinite(jax.grad(lambda x: positive(x).sum())(1e4 * x)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(candidate="log"), "MinGRU.candidate='log'"),
        (dict(expand=0.0), "MinGRU.expand=0.0"),
        (dict(conv_size=0), "MinGRU.conv_size=0"),
        (dict(method="fast"), "MinGRU.method='fast'"),
    ],
)
def test_mingru_fields_are_checked(change, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(MinGRU(6, **change).init, jax.random.key(0), jnp.zeros((1, 2, 6)))


def test_empty_sequences():
    a, b, x0 = inputs(5)
    x, last = complex_scan(a, Complex(b.re[:, :0], b.im[:, :0]), x0)
    assert x.re.shape == (2, 0, 3)
    close(last, x0, rtol=1e-6)
