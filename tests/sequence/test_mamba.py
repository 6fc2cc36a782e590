import functools
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from jaxstack.core.errors import UserError
from jaxstack.sequence.mamba import Mamba, MambaState, selective_scan
from jaxstack.sequence.mixer import Mixer

sys.path.insert(0, os.path.dirname(__file__))
from layers import close, continues, conv, double, matches, recurrence_equals, silu, softplus, stays_finite

LAYER = Mamba(6, d_state=3, dt_rank=2)


def inputs(length, seed=0, batch=2, channels=3, d_state=2):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape)
    u, delta = normal(batch, length, channels), softplus(normal(batch, length, channels) - 1.0)
    a, state = -np.exp(normal(channels, d_state)), normal(batch, channels, d_state)
    return u, delta, a, normal(batch, length, d_state), normal(batch, length, d_state), state


def loops(u, delta, a, b, c, h):
    """The recurrence, one number after the other."""
    y, h = np.zeros_like(u), np.array(h)
    for i, t, m in np.ndindex(u.shape):
        for n in range(a.shape[1]):
            h[i, m, n] = np.exp(delta[i, t, m] * a[m, n]) * h[i, m, n] + delta[i, t, m] * b[i, t, n] * u[i, t, m]
            y[i, t, m] += c[i, t, n] * h[i, m, n]
    return y, h


def plain(u, delta, a, b, c, h):
    """The same as a scan that autodiff goes through."""

    def step(h, xs):
        u, delta, b, c = xs
        h = jnp.exp(delta[..., None] * a) * h + (delta * u)[..., None] * b[:, None]
        return h, (h * c[:, None]).sum(-1)

    h, y = jax.lax.scan(step, h, [x.swapaxes(0, 1) for x in (u, delta, b, c)])
    return y.swapaxes(0, 1), h


def form(method):
    return lambda *arrays: selective_scan(*arrays[:5], state=arrays[5], method=method)


def layer_reference(p, x):
    z, gate = np.split(x @ p["in_proj"]["kernel"], 2, axis=-1)
    window, z = z[:, -3:], silu(conv(z, p["conv"]))
    dt, b, c = np.split(z @ p["x_proj"]["kernel"], (2, 5), axis=-1)
    delta = softplus(dt @ p["dt_proj"]["kernel"] + p["dt_bias"])
    y, h = loops(z, delta, -np.exp(p["A_log"]), b, c, np.zeros((len(x), 12, 3)))
    return ((y + p["D"] * z) * silu(gate)) @ p["out_proj"]["kernel"], MambaState(window, h)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65])
def test_forms_equal_the_plain_recurrence_with_their_gradients(length):
    arrays = inputs(length)
    close(plain(*map(jnp.asarray, arrays)), loops(*arrays), rtol=1e-5)
    recurrence_equals([form("sequential"), form("chunked")], arrays, plain)


def test_associative_form():
    recurrence_equals([form("associative")], inputs(3), plain)


def test_masked_tokens_are_not_seen():
    u, delta, a, b, c, state = inputs(9, batch=1)
    mask = np.array([[0, 1, 1, 0, 0, 1, 1, 1, 0]], bool)
    dirty = [np.where(mask[..., None], x, np.nan) for x in (u, delta, b, c)]
    want = loops(*(x[:, mask[0]] for x in (u, delta)), a, *(x[:, mask[0]] for x in (b, c)), state)
    with jax.enable_x64():
        for method in ("sequential", "chunked"):
            run = lambda x, method=method: selective_scan(x[0], x[1], a, *x[2:], state=state, mask=mask, method=method)
            y, last = jax.jit(run)(dirty)
            close((y[:, mask[0]], last), want)
            assert not y[~mask].any()
            grads = jax.jit(jax.grad(lambda x, run=run: run(x)[0].sum()))([jnp.asarray(x) for x in dirty])
            assert all(jnp.isfinite(g).all() for g in grads)


def test_fused_scan_holds_no_state_for_every_token():
    """Not even for gradients: neither the program nor a program inside it has an array of T M N numbers."""

    def largest(jaxpr):
        inner = [largest(j) for e in jaxpr.eqns for j in core.jaxprs_in_params(e.params)]
        return max([v.aval.size for e in jaxpr.eqns for v in e.outvars] + inner)

    args = inputs(512, batch=1, channels=16, d_state=8)
    total = lambda method: lambda *x: selective_scan(*x, method=method)[0].sum()
    size = lambda method: largest(jax.make_jaxpr(jax.grad(total(method), argnums=(0, 1, 2, 3, 4)))(*args[:5]).jaxpr)
    assert size("chunked") >= 512 * 16 * 8
    assert size("sequential") <= 512 * 16 * 8 / 8


def test_constant_inputs_have_a_closed_form():
    """h_t = b u Delta (1 - abar^t) / (1 - abar) for one channel and state."""
    one, delta, a = np.ones((1, 30, 1)), 0.2, -0.7
    y, last = selective_scan(2 * one, delta * one, np.array([[a]]), 3 * one, one)
    abar = np.exp(delta * a)
    close(y[0, :, 0], 6 * delta * (1 - abar ** np.arange(1, 31)) / (1 - abar), rtol=2e-6)
    close(last[0, 0, 0], y[0, -1, 0])


def test_layer_equals_the_reference():
    matches(LAYER, layer_reference)


def test_layer_contract():
    assert isinstance(LAYER, Mixer)
    continues(LAYER)
    stays_finite(LAYER)


def test_layer_starts_as_the_paper_says():
    module = Mamba(64)
    p = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 2, 64)))["params"]
    delta = softplus(double(p["dt_bias"]))
    assert ((delta > 0.00099) & (delta < 0.101)).all()
    assert np.median(np.log(delta)) == pytest.approx(np.log(0.01), abs=0.5)
    close(np.exp(double(p["A_log"])), np.tile(np.arange(1, 17), (128, 1)), rtol=1e-6)
    assert (p["D"] == 1).all()
    assert jnp.abs(p["dt_proj"]["kernel"]).max() <= 4**-0.5


def test_layer_has_as_many_parameters_as_a_layer_of_mamba_130m():
    """129,135,360 in all: 24 such layers with a norm, a last norm, and 50,280 embeddings of width 768."""
    x = jax.ShapeDtypeStruct((1, 2, 768), jnp.float32)
    shapes = jax.eval_shape(Mamba(768).init, jax.random.key(0), x)
    count = sum(int(np.prod(p.shape)) for p in jax.tree.leaves(shapes))
    assert 24 * (count + 768) + 768 + 50_280 * 768 == 129_135_360


@functools.cache
def scan_arguments():
    names = ("u", "delta", "a", "b", "c", "state")
    return dict(zip(names, (jnp.asarray(x, jnp.float32) for x in inputs(5))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(method="fast"), "unknown scan method 'fast'"),
        (dict(delta=np.ones((2, 5, 4))), "delta has shape"),
        (dict(u=np.ones((2, 5))), "u has shape"),
        (dict(a=np.ones((2, 2))), "a has shape"),
        (dict(c=np.ones((2, 4, 2))), "c has shape"),
        (dict(state=np.ones((2, 2, 3))), "state has shape"),
        (dict(mask=np.ones((2, 5))), "mask has shape .* expected bool"),
    ],
)
def test_wrong_input_is_a_clear_error(change, message):
    with pytest.raises(UserError, match=message):
        selective_scan(**(scan_arguments() | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(d_state=0), "Mamba.d_state=0"),
        (dict(expand=0.0), "Mamba.expand=0.0"),
        (dict(dt_rank=0), "Mamba.dt_rank=0"),
        (dict(conv_size=0), "Mamba.conv_size=0"),
        (dict(delta_range=(0.2, 0.1)), "Mamba.delta_range"),
        (dict(method="fast"), "unknown scan method"),
    ],
)
def test_layer_fields_are_checked(change, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(Mamba(6, **change).init, jax.random.key(0), jnp.zeros((1, 2, 6)))


def test_empty_sequences():
    arrays = scan_arguments()
    y, last = selective_scan(**{k: v[:, :0] if k in "u delta b c".split() else v for k, v in arrays.items()})
    assert y.shape == (2, 0, 3)
    close(last, arrays["state"])
