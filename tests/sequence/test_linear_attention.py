"""The gated recurrence in all forms, and linear attention, gated linear attention and Mamba-2 against loops."""

import functools
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack.core.errors import UserError
from jaxstack.sequence import model
from jaxstack.sequence.gated_recurrence import GatedState, gated_scan
from jaxstack.sequence.linear_attention import GatedLinearAttention, LinearAttention, elu_feature
from jaxstack.sequence.linear_attention import rms_norm as rms
from jaxstack.sequence.mamba2 import Mamba2

sys.path.insert(0, os.path.dirname(__file__))
from layers import close, continues, conv, matches, rms_norm, sigmoid, silu, softplus

KINDS = ("key", "head", "none")


def inputs(kind, length, seed=0, batch=2, groups=1, heads=2, keys=3, values=4):
    """q, k, v, log decay or None, state in float64; keys decay over 1 to 1000 tokens, one head forgets almost all."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape)
    decay = -np.exp(rng.uniform(np.log(1e-3), 0.0, (batch, length, heads, keys)))
    decay[:, ::5, 0] = -30.0
    decay = {"key": decay, "head": decay[..., 0], "none": None}[kind]
    q, k = normal(batch, length, groups, keys), normal(batch, length, groups, keys)
    return q, k, normal(batch, length, heads, values), decay, normal(batch, heads, keys, values)


def loops(q, k, v, decay, state):
    """S = diag(alpha) S + k v^T, o = S^T q, one matrix after the other, in float64."""
    (batch, length, heads, _), shared = v.shape, v.shape[2] // q.shape[2]
    s, o = np.array(state, np.float64), np.zeros(v.shape)
    for b, t, h in np.ndindex(batch, length, heads):
        alpha = np.ones(k.shape[-1]) * (1.0 if decay is None else np.exp(decay[b, t, h]))
        s[b, h] = np.diag(alpha) @ s[b, h] + np.outer(k[b, t, h // shared], v[b, t, h])
        o[b, t, h] = s[b, h].T @ q[b, t, h // shared]
    return o, s


def plain(q, k, v, decay, state):
    """The recurrence as a scan that autodiff goes through."""

    def step(s, token):
        q, k, v, decay = token
        alpha = 1.0 if decay is None else jnp.exp(decay).reshape(*decay.shape[:2], -1, 1)
        s = alpha * s + k[..., :, None] * v[..., None, :]
        return s, jnp.einsum("bhkv,bhk->bhv", s, q)

    q, k = (jnp.repeat(x, v.shape[2] // x.shape[2], axis=2) for x in (q, k))
    s, o = jax.lax.scan(step, state, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (q, k, v, decay)))
    return jnp.swapaxes(o, 0, 1), s


def scan(method, chunk=None, **options):
    return lambda q, k, v, decay, state: gated_scan(q, k, v, decay, state=state, method=method, chunk=chunk, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["recurrent", "chunked"])
def test_every_form_is_the_recurrence(method, kind):
    for length in (1, 2, 70):
        args = inputs(kind, length, seed=length)
        with jax.enable_x64():
            close(jax.jit(scan(method))(*args), loops(*args), rtol=1e-12)
    single = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), args)
    close(jax.jit(scan(method))(*single), loops(*jax.tree.map(np.asarray, single)), rtol=3e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65])
def test_gradients_equal_those_of_autodiff_through_the_recurrence(length, kind):
    """In float32 against float64, for outputs and last state, with respect to every input."""
    args = inputs(kind, length)
    weights = np.random.default_rng(1)
    w_o, w_s = weights.normal(size=args[2].shape), weights.normal(size=args[4].shape)
    loss = lambda f: lambda args: (lambda o, s: (w_o * jnp.sin(o)).sum() + (w_s * jnp.cos(s)).sum())(*f(*args))
    with jax.enable_x64():
        want = jax.jit(jax.grad(loss(plain)))(jax.tree.map(jnp.asarray, args))
        if length == 65:
            close(jax.jit(jax.grad(loss(scan("chunked"))))(jax.tree.map(jnp.asarray, args)), want, rtol=1e-11)
    single = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), args)
    w_o, w_s = w_o.astype(np.float32), w_s.astype(np.float32)
    for method in ("chunked", "recurrent")[: 2 if length == 65 else 1]:
        close(jax.jit(jax.grad(loss(scan(method))))(single), want, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_any_size_and_shared_keys(kind):
    args = inputs(kind, 21, groups=2, heads=6)
    want = loops(*args)
    with jax.enable_x64():
        for method, chunk in (("recurrent", None), ("chunked", 1), ("chunked", 4), ("chunked", 64)):
            close(jax.jit(scan(method, chunk))(*args), want, rtol=1e-12)


@pytest.mark.parametrize("kind", ["key", "head"])
def test_forgetting_is_exact(kind):
    """Decays of 0 and of exp(-1e5) beside ones near 1: differences of cumulative sums would have lost the latter."""
    q, k, v, decay, state = inputs(kind, 40)
    decay[:, 3::7] = -np.inf
    decay[:, 5::7] = -1e5
    want = loops(q, k, v, decay, state)
    single = [jnp.asarray(x, jnp.float32) for x in (q, k, v, decay, state)]
    for method in ("chunked", "recurrent"):
        f = lambda *args, method=method: (lambda o, s: ((o**2).sum() + (s**2).sum(), (o, s)))(*scan(method)(*args))
        grads, out = jax.jit(jax.grad(f, argnums=(0, 1, 2, 3, 4), has_aux=True))(*single)
        close(out, want, rtol=3e-6)
        assert all(bool(jnp.isfinite(g).all()) for g in grads)
        assert not grads[3][:, 3::7].any()


@pytest.mark.parametrize("kind", KINDS)
def test_masked_tokens_are_not_there(kind):
    q, k, v, decay, state = inputs(kind, 20)
    mask = np.random.default_rng(3).random((2, 20)) < 0.6
    mask[1, :8] = False
    hide = lambda x: None if x is None else np.where(mask.reshape(*mask.shape, *[1] * (x.ndim - 2)), x, np.nan)
    with jax.enable_x64():
        for method in ("recurrent", "chunked"):
            o, s = jax.jit(scan(method, 4, mask=jnp.asarray(mask)))(*(hide(x) for x in (q, k, v, decay)), state)
            assert not o[~mask].any()
            for row in range(2):
                at = lambda x, row=row: None if x is None else x[row : row + 1, mask[row]]
                one, end = loops(at(q), at(k), at(v), at(decay), state[row : row + 1])
                close((o[row, mask[row]], s[row]), (one[0], end[0]), rtol=1e-12)


def test_types_and_empty_sequences():
    q, k, v, decay, state = (jnp.asarray(x, jnp.bfloat16) for x in inputs("key", 5))
    o, s = gated_scan(q, k, v, decay)
    assert o.dtype == s.dtype == jnp.float32
    o, s = gated_scan(q[:, :0], k[:, :0], v[:, :0], decay[:, :0], state=state)
    assert o.shape == (2, 0, 2, 4)
    np.testing.assert_array_equal(s, state.astype(jnp.float32))
    for method in ("recurrent", "chunked"):
        o, s = gated_scan(q[:0], k[:0], v[:0], decay[:0], method=method)
        assert (o.shape, s.shape) == ((0, 5, 2, 4), (0, 2, 3, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=np.ones((2, 5, 1, 4))), "q has shape"),
        (dict(k=np.ones((2, 4, 1, 3))), "k has shape"),
        (dict(v=np.ones((2, 5, 4))), "k has shape.*v"),
        (dict(q=np.ones((2, 5, 3, 3)), k=np.ones((2, 5, 3, 3))), "groups a divisor of heads"),
        (dict(log_decay=np.zeros((2, 5, 3))), "log_decay has shape"),
        (dict(state=np.zeros((2, 2, 4, 3))), "state.*has shape"),
        (dict(mask=np.ones((2, 4), bool)), "mask has shape"),
        (dict(mask=np.ones((2, 5))), "expected bool"),
        (dict(method="fast"), "unknown method of gated_scan 'fast'"),
        (dict(chunk=12), "chunk=12"),
        (dict(chunk=0), "chunk=0"),
    ],
)
def test_wrong_input_of_the_recurrence_is_a_clear_error(change, message):
    q, k, v, decay, state = inputs("head", 5)
    with pytest.raises(UserError, match=message):
        gated_scan(**(dict(q=q, k=k, v=v, log_decay=decay, state=state) | change))


# ---------------------------------------------------------------- layers


def heads(x, count):
    return x.reshape(*x.shape[:2], count, -1)


def mixed(p, z, size):
    """Convolution and SiLU with its window, or nothing."""
    return (silu(conv(z, p["conv"])), z[:, 1 - size :]) if size else (z, None)


def linear_attention(size, p, x):
    z, window = mixed(p, x @ p["in_proj"]["kernel"] + p["in_proj"].get("bias", 0.0), size)
    q, k, v = (heads(y, 2) for y in np.split(z, 3, axis=-1))
    phi = lambda x: np.where(x > 0, x, np.expm1(x)) + 1
    y, s = np.zeros(v.shape), np.zeros((len(x), 2, 3, 4))
    for b, t, h in np.ndindex(v.shape[:3]):
        s[b, h] += np.outer(phi(k[b, t, h]), [*v[b, t, h], 1.0])
        above = sum((phi(q[b, t, h]) @ phi(k[b, j, h])) * v[b, j, h] for j in range(t + 1))  # the paper's equation 9
        y[b, t, h] = above / (sum(phi(q[b, t, h]) @ phi(k[b, j, h]) for j in range(t + 1)) + 1e-6)
    return y.reshape(x.shape) @ p["out_proj"]["kernel"] + p["out_proj"].get("bias", 0.0), GatedState(window, s)


def gated_linear_attention(size, p, x):
    """Two heads, keys of 4 and values of 8 in all."""
    z, window = mixed(p, x @ p["in_proj"]["kernel"], size)
    q, k, v = (heads(y, 2) for y in np.split(z, (4, 8), axis=-1))
    gate = x @ p["gate_down"]["kernel"] @ p["gate_up"]["kernel"] + p["gate_up"]["bias"]
    alpha = heads(sigmoid(gate) ** (1 / 16), 2)
    o, s = np.zeros(v.shape), np.zeros((len(x), 2, 2, 4))
    for b, t, h in np.ndindex(v.shape[:3]):
        s[b, h] = np.diag(alpha[b, t, h]) @ s[b, h] + np.outer(k[b, t, h], v[b, t, h])
        o[b, t, h] = s[b, h].T @ q[b, t, h] / np.sqrt(2)
    o = rms_norm(o, p["scale"]).reshape(*x.shape[:2], -1)
    return (silu(x @ p["out_gate"]["kernel"]) * o) @ p["out_proj"]["kernel"], GatedState(window, s)


def mamba2(groups, p, x):
    """12 channels in 4 heads of 3, two states a group."""
    z, mix, delta = np.split(x @ p["in_proj"]["kernel"], (12, 24 + 4 * groups), axis=-1)
    window, mix = mix[:, -3:], silu(conv(mix, p["conv"]))
    u, b, c = np.split(mix, (12, 12 + 2 * groups), axis=-1)
    u, b, c = heads(u, 4), heads(b, groups), heads(c, groups)
    delta, a = softplus(delta + p["dt_bias"]), -np.exp(p["A_log"])
    y, s = np.zeros(u.shape), np.zeros((len(x), 4, 2, 3))
    for i, t, h in np.ndindex(u.shape[:3]):
        g, step = h // (4 // groups), delta[i, t, h]
        s[i, h] = np.exp(step * a[h]) * s[i, h] + step * np.outer(b[i, t, g], u[i, t, h])
        y[i, t, h] = s[i, h].T @ c[i, t, g] + p["D"][h] * u[i, t, h]
    y = heads(y.reshape(z.shape) * silu(z), groups)
    y = rms_norm(y, 1.0).reshape(z.shape) * p["scale"]
    return y @ p["out_proj"]["kernel"], GatedState(window, s)


LAYERS = {
    "linear": (LinearAttention(6, num_heads=2), functools.partial(linear_attention, 0)),
    "linear, conv, bias": (
        LinearAttention(6, num_heads=2, conv_size=3, use_bias=True),
        functools.partial(linear_attention, 3),
    ),
    "gla": (GatedLinearAttention(8, num_heads=2, gate_rank=3), functools.partial(gated_linear_attention, 0)),
    "gla, conv": (
        GatedLinearAttention(8, num_heads=2, gate_rank=3, conv_size=4),
        functools.partial(gated_linear_attention, 4),
    ),
    "mamba2": (Mamba2(6, d_state=2, head_dim=3), functools.partial(mamba2, 1)),
    "mamba2, groups": (Mamba2(6, d_state=2, head_dim=3, num_groups=2), functools.partial(mamba2, 2)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_its_equations(name):
    matches(*LAYERS[name])


@pytest.mark.parametrize("name", ["linear, conv, bias", "gla, conv"])
def test_layer_continues(name):
    continues(LAYERS[name][0])


@pytest.mark.parametrize("module", [LinearAttention(8), GatedLinearAttention(8), Mamba2(8, d_state=3, head_dim=4)])
def test_layer_forms_agree(module):
    x = jax.random.normal(jax.random.key(0), (2, 20, 8))
    variables = jax.jit(module.init)(jax.random.key(1), x)
    y, state = jax.jit(module.clone(method="recurrent").apply)(variables, x)
    close(jax.jit(module.apply)(variables, x), (y, state), rtol=1e-5)


def test_defaults_have_the_published_shapes_and_starts():
    """GLA: keys of D/2, rank 16, decay sigmoid(0)^(1/16); Mamba-2: A in [1, 16], Delta in [0.001, 0.1], heads of 64."""
    x = jnp.zeros((1, 2, 64))
    p = jax.jit(GatedLinearAttention(64).init)(jax.random.key(0), x)["params"]
    assert p["in_proj"]["kernel"].shape == (64, 128)
    assert p["gate_down"]["kernel"].shape == (64, 16)
    assert p["gate_up"]["kernel"].shape == (16, 32)
    assert p["scale"].shape == (16,)
    assert not p["gate_up"]["bias"].any()
    assert GatedLinearAttention(64).init_state(2).matrix.shape == (2, 4, 8, 16)
    p = jax.jit(Mamba2(512).init)(jax.random.key(0), jnp.zeros((1, 2, 512)))["params"]
    assert p["in_proj"]["kernel"].shape == (512, 2 * 1024 + 2 * 128 + 16)
    assert p["conv"]["weight"].shape == (4, 1024 + 2 * 128)
    a, delta = jnp.exp(p["A_log"]), softplus(np.asarray(p["dt_bias"]))
    assert 1.0 <= a.min() < 6.0 < a.max() <= 16.0
    assert delta.min() > 0.00099
    assert delta.max() < 0.1001
    assert (p["D"] == 1.0).all()
    decayed = model.decay_mask(p)
    half = model.cast(p, jnp.bfloat16)
    for name in ("A_log", "dt_bias", "D"):
        assert not decayed[name]
        assert half[name].dtype == jnp.float32
    assert decayed["in_proj"]["kernel"]
    assert Mamba2(8).sizes() == (16, 1, 16 + 256)


def test_norm_and_features_at_the_ends_of_float32():
    x = jnp.asarray([[3e30, 4e30], [3e-30, 4e-30], [0.0, 0.0], [3.0, 4.0]])
    want = np.array([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0], [3.0, 4.0]]) / np.sqrt(12.5)
    np.testing.assert_allclose(rms(x, 1e-9), want, rtol=1e-6, atol=1e-20)
    assert jnp.isfinite(jax.grad(lambda x: rms(x, 1e-5).sum())(x)).all()
    np.testing.assert_allclose(jax.jacobian(lambda x: rms(x, 0.1))(x[3]), _jacobian(np.array([3.0, 4.0])), rtol=1e-5)
    np.testing.assert_allclose(
        elu_feature(jnp.asarray([-20.0, -1.0, 0.0, 2.0])), np.exp([-20.0, -1, 0, np.log(3)]), 1e-6
    )


def _jacobian(x, eps=0.1):
    root = np.sqrt((x * x).mean() + eps)
    return np.eye(len(x)) / root - np.outer(x, x) / len(x) / root**3


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (LinearAttention(6), "LinearAttention.num_heads=4: expected a divisor of features = 6"),
        (LinearAttention(8, num_heads=0), "LinearAttention.num_heads=0"),
        (LinearAttention(8, conv_size=-1), "LinearAttention.conv_size=-1"),
        (LinearAttention(8, method="fast"), "unknown method"),
        (GatedLinearAttention(12), "expected a divisor of expand_k . features = 6"),
        (GatedLinearAttention(8, expand_v=0.25), "expand_v . features = 2"),
        (GatedLinearAttention(8, gate_rank=0), "gate_rank=0"),
        (GatedLinearAttention(8, gate_normalizer=0.0), "gate_normalizer=0.0"),
        (Mamba2(8, head_dim=5), "head_dim=5: expected a divisor of expand . features = 16"),
        (Mamba2(8, num_groups=3, head_dim=4), "num_groups=3: expected a divisor of the 4 heads"),
        (Mamba2(8, expand=0.1), "expand=0.1"),
        (Mamba2(8, conv_size=0), "conv_size=0"),
        (Mamba2(8, a_range=(0.0, 1.0)), "a_range"),
    ],
)
def test_layer_fields_are_checked(module, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2, module.features)))
    if "method" not in message:
        with pytest.raises(UserError, match=message):
            module.init_state(1)
