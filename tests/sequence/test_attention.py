import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack.core.errors import UserError
from jaxstack.sequence.attention import KVCache, SoftmaxAttention, attend, rotate
from jaxstack.sequence.model import SequenceModel, generate

sys.path.insert(0, os.path.dirname(__file__))
from layers import close, continues, conv, double, make, matches, silu

PLAIN = SoftmaxAttention(8, num_heads=2, context=24)
ROTARY = SoftmaxAttention(8, num_heads=2, context=24, rope=True, use_bias=True)
CONVOLVED = SoftmaxAttention(8, num_heads=2, context=24, conv_size=3)


def turn(x, t, base=10_000.0):
    """x [d]: the pair (i, i + d/2) as a complex number, times exp(i t / base^(2i/d))."""
    half = len(x) // 2
    z = (x[:half] + 1j * x[half:]) * np.exp(1j * t / base ** (2 * np.arange(half) / len(x)))
    return np.concatenate([z.real, z.imag])


def reference(module, p, x):
    """The layer token by token and head by head."""
    (batch, length, width), heads = x.shape, module.num_heads
    z, window = x @ p["in_proj"]["kernel"] + p["in_proj"].get("bias", 0.0), None
    if module.conv_size:
        z, window = silu(conv(z, p["conv"])), z[:, 1 - module.conv_size :]
    qkv = z.reshape(batch, length, 3, heads, -1)
    y, cache = (
        np.zeros((batch, length, heads, width // heads)),
        np.zeros((2, batch, module.context, heads, width // heads)),
    )
    for b, t, h in np.ndindex(batch, length, heads):
        q, k, cache[1, b, t, h] = qkv[b, t, :, h]
        q, cache[0, b, t, h] = (turn(q, t), turn(k, t)) if module.rope else (q, k)
        logits = cache[0, b, : t + 1, h] @ q / np.sqrt(width // heads)
        weights = np.exp(logits - logits.max())
        y[b, t, h] = weights / weights.sum() @ cache[1, b, : t + 1, h]
    y = y.reshape(x.shape) @ p["out_proj"]["kernel"] + p["out_proj"].get("bias", 0.0)
    return y, KVCache(*cache, np.full(batch, length), window)


@pytest.mark.parametrize("module", [PLAIN, ROTARY, CONVOLVED])
def test_layer_is_its_equations(module):
    matches(module, lambda p, x: reference(module, p, x))


@pytest.mark.parametrize("module", [ROTARY, CONVOLVED])
def test_pieces_padding_and_steps(module):
    continues(module)


def test_rotary_positions_are_relative():
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 6)).astype(np.float32)
    at = lambda x, t: rotate(jnp.asarray(x), jnp.full((1, 1), t))
    products = [float((at(q, t + 5) * at(k, t)).sum()) for t in (0, 3, 400)]
    np.testing.assert_allclose(products, products[0], rtol=1e-4, atol=1e-5)
    assert abs(float((at(q, 6) * at(k, 0)).sum()) - products[0]) > 1e-3
    np.testing.assert_array_equal(at(q, 0), q)
    np.testing.assert_allclose(at(q, 7)[0, 0, 0], turn(q[0, 0, 0].astype(float), 7), rtol=1e-5, atol=1e-6)


def test_without_positions_the_order_of_the_past_does_not_matter():
    x, variables = make(PLAIN, length=6)
    shuffled = x[:, jnp.array([3, 1, 0, 4, 2, 5])]
    last = lambda module, x: jax.jit(module.apply)(variables, x)[0][:, -1]
    close(last(PLAIN, shuffled), last(PLAIN, x), rtol=1e-5)
    rotary = PLAIN.clone(rope=True)
    assert jnp.abs(last(rotary, shuffled) - last(rotary, x)).max() > 1e-3


def test_attention_of_equal_keys_is_a_mean_and_of_large_logits_a_choice():
    v = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 1, 2)), jnp.float32)
    causal = jnp.tri(4, dtype=bool)[None]
    one = jnp.ones((1, 4, 1, 2))
    close(attend(one, one, v, causal), np.cumsum(v, 1) / np.arange(1, 5)[:, None, None], rtol=1e-6)
    k = jnp.asarray([0.0, 1.0, 0.5, 0.2])[None, :, None, None] * one
    close(attend(1e8 * one, k, v, causal), v[:, jnp.array([0, 1, 1, 1])], rtol=1e-6)


def test_the_context_is_a_bound():
    module = SoftmaxAttention(8, num_heads=2, context=4)
    x, variables = make(module, length=4)
    y, state = jax.jit(module.apply)(variables, x)
    with pytest.raises(UserError, match="context=4: expected at least the 5 tokens"):
        module.apply(variables, jnp.zeros((2, 5, 8)))
    with pytest.raises(UserError, match="context=4: the state and x together have 5 tokens"):
        module.apply(variables, x[:, 0], state, method="step")
    with pytest.raises(UserError, match="together have 6 tokens"):
        module.apply(variables, x[:, :2], mask=jnp.asarray([[True, False], [True, True]]), state=state)
    same, after = module.apply(variables, x[:, :2], mask=jnp.zeros((2, 2), bool), state=state)
    assert not same.any()
    close(after, state)
    # where the number of tokens is traced, outputs beyond the context are NaN and the cache stays
    beyond, after = jax.jit(lambda s: module.apply(variables, x[:, 0], s, method="step"))(state)
    assert jnp.isnan(beyond).all()
    close(after[:2], state[:2])
    _, middle = module.apply(variables, x[:, :3])
    two, _ = jax.jit(lambda s: module.apply(variables, jnp.stack([x[:, 3], x[:, 0]], 1), state=s))(middle)
    close(two[:, 0], y[:, 3], rtol=1e-5)
    assert jnp.isnan(two[:, 1]).all()


def test_generation_checks_the_context():
    model = SequenceModel((SoftmaxAttention(8, context=8),), 5, 5)
    prompt = np.random.default_rng(0).integers(0, 5, (2, 5))
    params = jax.jit(model.init)(jax.random.key(0), prompt)["params"]
    greedy = generate(model, params, prompt, 3, jax.random.key(0), temperature=0.0)
    tokens = np.concatenate([prompt, greedy], 1)
    logits, _ = jax.jit(model.apply)({"params": params}, tokens)
    np.testing.assert_array_equal(greedy, logits[:, 4:-1].argmax(-1))
    with pytest.raises(UserError, match="context=8: a prompt of 5 tokens and steps=4 do not fit"):
        generate(model, params, prompt, 4, jax.random.key(0))


def test_double_precision_stays():
    x, variables = make(PLAIN, length=5)
    with jax.enable_x64():
        y, _ = jax.jit(PLAIN.apply)(double(variables), double(x))
        assert y.dtype == jnp.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_heads=3), "num_heads=3: expected a divisor of features = 8"),
        (dict(num_heads=True), "num_heads=True"),
        (dict(context=0), "context=0"),
        (dict(conv_size=-1), "conv_size=-1"),
        (dict(num_heads=8, rope=True), "rope=True: expected heads of even width, found 1"),
        (dict(rope=True, rope_base=0.0), "rope_base=0.0"),
    ],
)
def test_fields_are_checked(change, message):
    with pytest.raises(UserError, match=message):
        SoftmaxAttention(8, **change).init_state(1)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(SoftmaxAttention(8, **change).init, jax.random.key(0), jnp.zeros((1, 2, 8)))
