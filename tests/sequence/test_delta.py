import functools
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack.core.errors import UserError
from jaxstack.sequence.delta import DeltaNet, DeltaState, GatedDeltaNet
from jaxstack.sequence.delta_rule import delta_rule, unit_lower_inverse
from jaxstack.sequence.mixer import Mixer

sys.path.insert(0, os.path.dirname(__file__))
from layers import (
    close,
    continues,
    conv,
    double,
    matches,
    recurrence_equals,
    rms_norm,
    sigmoid,
    silu,
    softplus,
    stays_finite,
    unit,
)

DELTA, GATED = DeltaNet(6, num_heads=2), GatedDeltaNet(8, num_heads=2)


def inputs(length, seed=0, batch=2, heads=2, key=3, value=4):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape)
    scalars = (batch, length, heads)
    q, k, v = normal(*scalars, key), unit(normal(*scalars, key)), normal(*scalars, value)
    return q, k, v, sigmoid(normal(*scalars)), -softplus(normal(*scalars) - 1), normal(batch, heads, key, value)


def loops(q, k, v, beta, log_decay, state):
    """The recurrence, one head and token after the other."""
    o, s = np.zeros(v.shape), np.array(state)
    for b, t, h in np.ndindex(beta.shape):
        key, decay = k[b, t, h], 1.0 if log_decay is None else np.exp(log_decay[b, t, h])
        old = decay * s[b, h]
        s[b, h] = old + beta[b, t, h] * np.outer(key, v[b, t, h] - old.T @ key)
        o[b, t, h] = s[b, h].T @ q[b, t, h] / np.sqrt(len(key))
    return o, s


def plain(q, k, v, beta, log_decay, state):
    """The same as a scan over matrices that autodiff goes through: S = alpha (I - beta k k^T) S + beta k v^T."""

    def step(s, xs):
        q, k, v, beta, log_decay = xs
        kk = jnp.einsum("bhi,bhj->bhij", k, k)
        move = jnp.exp(log_decay)[..., None, None] * (jnp.eye(k.shape[-1]) - beta[..., None, None] * kk)
        s = move @ s + beta[..., None, None] * k[..., None] * v[..., None, :]
        return s, jnp.einsum("bhkv,bhk->bhv", s, q) / q.shape[-1] ** 0.5

    s, o = jax.lax.scan(step, state, [x.swapaxes(0, 1) for x in (q, k, v, beta, log_decay)])
    return o.swapaxes(0, 1), s


def form(method, chunk=None):
    return lambda *arrays: delta_rule(*arrays[:-1], state=arrays[-1], method=method, chunk=chunk)


def layer_reference(p, x, module):
    gated, heads, (key, value) = isinstance(module, GatedDeltaNet), module.num_heads, module.widths
    z = x @ p["qkv_proj"]["kernel"]
    window, z = z[:, -3:], silu(conv(z, p["conv"]))
    split = lambda t: t.reshape(*t.shape[:2], heads, -1)
    q, k, v = map(split, np.split(z, (heads * key, 2 * heads * key), axis=-1))
    beta = sigmoid(x @ p["b_proj"]["kernel"]) * (2 if module.negative_eigenvalues else 1)
    decay = -np.exp(p["A_log"]) * softplus(x @ p["a_proj"]["kernel"] + p["dt_bias"]) if gated else None
    o, s = loops(unit(q), unit(k), v, beta, decay, np.zeros((len(x), heads, key, value)))
    o = rms_norm(o, p["norm"]["scale"])
    o = o * split(silu(x @ p["g_proj"]["kernel"])) if gated else o
    return o.reshape(*x.shape[:2], -1) @ p["out_proj"]["kernel"], DeltaState(window, s)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65])
def test_forms_equal_the_plain_recurrence_with_their_gradients(length):
    arrays = inputs(length)
    close(plain(*map(jnp.asarray, arrays)), loops(*arrays), rtol=1e-5)
    forms = [form("recurrent"), form("chunked", 16), form("auto")]
    recurrence_equals(forms, arrays, plain, rtol=1e-9)


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_chunk_sizes(chunk):
    recurrence_equals([form("chunked", chunk)], inputs(70), plain, rtol=1e-9)


def test_without_decay():
    *arrays, _, state = inputs(37)
    with jax.enable_x64():
        for method in ("recurrent", "chunked"):
            run = jax.jit(functools.partial(delta_rule, method=method))
            close(run(*arrays, state=state), loops(*arrays, None, state))


def test_float32_error_does_not_grow_with_time():
    arrays = inputs(1000, batch=1)
    for method in ("recurrent", "chunked"):
        close(jax.jit(form(method))(*(jnp.asarray(x, jnp.float32) for x in arrays)), loops(*arrays), rtol=3e-6)


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 33, 64])
def test_inverse_of_a_unit_triangle(size):
    lower = np.tril(np.random.default_rng(0).normal(size=(3, size, size)), -1) / 2
    with jax.enable_x64():
        close(unit_lower_inverse(jnp.asarray(lower)), np.linalg.inv(lower + np.eye(size)), rtol=1e-9)
        weight = jnp.asarray(np.random.default_rng(1).normal(size=lower.shape))
        theirs = lambda x: jnp.linalg.inv(jnp.tril(x, -1) + jnp.eye(size))
        grad = lambda f: jax.jit(jax.grad(lambda x: (weight * f(x)).sum()))(jnp.asarray(lower))
        close(grad(unit_lower_inverse), grad(theirs), rtol=1e-8)


def test_inverse_with_equal_keys_is_exact():
    """(I + ones below the diagonal)^-1 has 1 and -1 below it; powers of the triangle reach 10^18."""
    want = np.eye(64) - np.eye(64, k=-1)
    close(unit_lower_inverse(jnp.tril(jnp.ones((64, 64)), -1)), want, rtol=1e-6)


@pytest.mark.parametrize("method", ["recurrent", "chunked"])
def test_masked_tokens_are_not_seen(method):
    *arrays, state = inputs(20, batch=1)
    mask = np.random.default_rng(3).random((1, 20)) < 0.6
    dirty = [np.where(mask.reshape(1, 20, *[1] * (x.ndim - 2)), x, np.nan) for x in arrays]
    want = loops(*(x[:, mask[0]] for x in arrays), state)
    with jax.enable_x64():
        run = lambda x: delta_rule(*x, state=state, mask=mask, method=method, chunk=8)
        o, last = jax.jit(run)(dirty)
        close((o[:, mask[0]], last), want)
        assert not o[~mask].any()
        grads = jax.jit(jax.grad(lambda x: run(x)[0].sum()))([jnp.asarray(x) for x in dirty])
        assert all(jnp.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("method", ["recurrent", "chunked"])
def test_orthogonal_keys_are_recalled_and_overwritten(method):
    """beta = 1: a key's value is replaced, other keys keep theirs."""
    width = 8
    keys = np.concatenate([np.eye(width), np.eye(width)[:4]])[None, :, None]
    values = np.random.default_rng(0).normal(size=(1, 12, 1, 5))
    run = jax.jit(lambda q: delta_rule(q, keys, values, np.ones((1, 12, 1)), method=method, chunk=4))
    _, state = run(keys)
    close(state[0, 0], np.concatenate([values[0, 8:, 0], values[0, 4:8, 0]]), rtol=1e-6)
    o, _ = run(keys * width**0.5)
    close(o, values, rtol=1e-6)


@pytest.mark.parametrize("method", ["recurrent", "chunked"])
def test_beta_of_two_reflects(method):
    k = np.tile(unit(np.ones(3)), (1, 30, 1, 1))
    none, start = np.zeros((1, 30, 1, 2)), np.outer(k[0, 0, 0], [1.0, -2.0])[None, None]
    run = jax.jit(lambda q: delta_rule(q, k, none, np.full((1, 30, 1), 2.0), state=start, method=method))
    o, last = run(k * 3**0.5)
    close(o[0, :, 0], np.outer((-1.0) ** np.arange(1, 31), [1.0, -2.0]), rtol=2e-5)
    close(last, start, rtol=2e-5)


@pytest.mark.parametrize("forget", [-300.0, -1e6, -1e35, -np.inf])
def test_forgetting_leaves_later_decays_exact(forget):
    """A difference of cumulative sums would give later decays with the error of the large step."""
    q, k, v, beta, log_decay, state = inputs(64, batch=1)
    log_decay = np.maximum(log_decay, -0.05)
    log_decay[:, 10] = forget
    arrays = tuple(jnp.asarray(x, jnp.float32) for x in (q, k, v, beta, log_decay, state))
    want = loops(q, k, v, beta, log_decay, state)
    total = lambda method: lambda *a: sum((x * x).sum() for x in form(method, 64)(*a))
    grads = {}
    for method in ("recurrent", "chunked"):
        close(jax.jit(form(method, 64))(*arrays), want, rtol=2e-6)
        grads[method] = jax.jit(jax.grad(total(method), argnums=(0, 1, 2, 3, 5)))(*arrays)
    close(grads["chunked"], grads["recurrent"], rtol=1e-5)


@pytest.mark.parametrize(
    "module", [DELTA, GATED, DeltaNet(6, num_heads=1, negative_eigenvalues=True, expand_v=2.0, method="recurrent")]
)
def test_layer_equals_the_reference(module):
    matches(module, lambda p, x: layer_reference(p, x, module))


@pytest.mark.parametrize("module", [DELTA, GATED])
def test_layer_contract(module):
    assert isinstance(module, Mixer)
    continues(module)
    stays_finite(module)


def test_gated_layer_starts_as_the_paper_says():
    module = GatedDeltaNet(256, num_heads=64)
    params = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2, 256)))["params"]
    matrices = [p for path, p in jax.tree_util.tree_leaves_with_path(params) if path[-1].key == "kernel"]
    heads = 2 * 256 * 64  # beta and the decay
    assert sum(int(np.prod(p.shape)) for p in matrices) - heads == 6 * 256**2
    small = GatedDeltaNet(64, num_heads=64, expand_k=1.0)
    p = double(jax.jit(small.init)(jax.random.key(0), jnp.zeros((1, 2, 64)))["params"])
    delta, rate = softplus(p["dt_bias"]), np.exp(p["A_log"])
    assert ((delta > 0.00099) & (delta < 0.101)).all()
    assert np.median(np.log(delta)) == pytest.approx(np.log(0.01), abs=0.5)
    assert ((rate > 0) & (rate < 16)).all()
    assert rate.mean() == pytest.approx(8.0, abs=2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(method="fast"), "unknown method of the delta rule 'fast'"),
        (dict(chunk=0), "chunk=0"),
        (dict(q=np.ones((2, 5, 2))), "q has shape"),
        (dict(k=np.ones((2, 5, 2, 4))), "k has shape"),
        (dict(v=np.ones((2, 4, 2, 4))), "v has shape"),
        (dict(beta=np.ones((2, 5))), "beta has shape"),
        (dict(log_decay=np.ones((2, 5, 2, 3))), "log_decay has shape"),
        (dict(state=np.ones((2, 2, 4, 3))), "state has shape"),
        (dict(mask=np.ones((2, 5))), "mask has shape .* expected bool"),
    ],
)
def test_wrong_input_is_a_clear_error(change, message):
    arrays = dict(zip(("q", "k", "v", "beta", "log_decay", "state"), inputs(5)))
    with pytest.raises(UserError, match=message):
        delta_rule(**(arrays | change))


@pytest.mark.parametrize(
    ("cls", "change", "message"),
    [
        (DeltaNet, dict(num_heads=0), "DeltaNet.num_heads=0"),
        (DeltaNet, dict(num_heads=7), "DeltaNet.expand_k=1.0"),
        (GatedDeltaNet, dict(expand_v=0.1), "GatedDeltaNet.expand_v=0.1"),
        (DeltaNet, dict(conv_size=0), "DeltaNet.conv_size=0"),
        (DeltaNet, dict(method="fast"), "DeltaNet.method='fast'"),
        (GatedDeltaNet, dict(dt_range=(0.0, 0.1)), "GatedDeltaNet.dt_range"),
    ],
)
def test_layer_fields_are_checked(cls, change, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(cls(6, **change).init, jax.random.key(0), jnp.zeros((1, 2, 6)))


def test_empty_sequences():
    *arrays, state = inputs(5)
    o, last = delta_rule(*(x[:, :0] for x in arrays), state=state)
    assert o.shape == (2, 0, 2, 4)
    close(last, state, rtol=1e-6)
