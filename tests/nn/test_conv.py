"""Convolutions against XLA's: values, derivatives of both orders, vmap over images, kernels and both, in loops."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack.core.errors import UserError
from jaxstack.core.program import convolves
from jaxstack.nn import conv, conv_choice
from jaxstack.nn import conv_forms as forms

CASES = {
    "plain": ((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)), 1, (4, 8), (9, 8)),
    "stride 2, odd size": ((3, 3), (2, 2), (1, 1), ((1, 1), (1, 1)), 1, (4, 6), (9, 8)),
    "dilation, cut": ((2, 3), (1, 2), (2, 1), ((0, 2), (-1, 0)), 1, (3, 5), (9, 8)),
    "pointwise": ((1, 1), (2, 1), (1, 1), ((0, 0), (0, 0)), 1, (4, 6), (5, 6)),
    "few groups": ((3, 3), (2, 1), (1, 1), ((1, 1), (1, 1)), 2, (4, 6), (9, 8)),
    "groups, few pixels": ((3, 3), (2, 1), (1, 1), ((1, 1), (1, 1)), 9, (18, 9), (9, 8)),
    "groups, many pixels": ((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)), 9, (18, 9), (24, 24)),
    "depthwise": ((3, 3), (2, 2), (1, 1), ((0, 1), (0, 1)), 4, (4, 4), (9, 8)),
    "depthwise, two outputs": ((3, 3), (1, 1), (2, 2), ((2, 2), (2, 2)), 4, (4, 8), (9, 8)),
}


def arrays(case, dtype, batch=2):
    size, stride, dilation, padding, groups, (c, k), image = CASES[case]
    rng = np.random.default_rng(0)
    window = forms.Window(size, stride, (1, 1), dilation, padding, groups)
    x = jnp.asarray(rng.normal(size=(batch, *image, c)), dtype)
    kernel = jnp.asarray(rng.normal(size=(*size, c // groups, k)), dtype)
    mine = lambda x, w: conv.conv2d(x, w, stride, padding, dilation, groups)
    return x, kernel, window, mine, functools.partial(forms.conv_plain, window=window)


def derivatives(form, x, kernel):
    """Value, gradients, and the derivative of the gradients forward and reverse."""
    loss = lambda x, w: jnp.sin(form(x, w)).mean()
    grads = jax.grad(loss, (0, 1))
    _, forward = jax.jvp(grads, (x, kernel), (0.3 * x, 0.2 * kernel))
    reverse = jax.grad(lambda x, w: sum(jnp.square(g).sum() for g in grads(x, w)), (0, 1))(x, kernel)
    return form(x, kernel), grads(x, kernel), forward, reverse


@pytest.mark.parametrize("case", CASES)
def test_values_and_derivatives_are_those_of_xla(case):
    with jax.enable_x64(True):
        x, kernel, _, mine, plain = arrays(case, jnp.float64)
        found, wanted = (jax.jit(functools.partial(derivatives, form))(x, kernel) for form in (mine, plain))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("case", ["plain", "few groups", "groups, few pixels", "depthwise"])
def test_every_form_computes_the_same(case):
    x, kernel, window, _, plain = arrays(case, jnp.float32)
    out, back = jax.vjp(plain, x, kernel)
    g = jnp.cos(out)
    for form in (forms.conv_pack, forms.conv_dense):
        np.testing.assert_allclose(form(x, kernel, window=window), out, rtol=1e-4, atol=1e-4)
    for form in (forms.kernel_pack, forms.kernel_dense, forms.kernel_plain):
        np.testing.assert_allclose(form(x, g, window=window), back(g)[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("stride", "spread", "padding"), [(1, 1, 0), (2, 1, 0), (1, 2, 0), (1, 2, -1), (1, 1, 1)])
def test_one_pixel_is_a_matrix_product(stride, spread, padding):
    pads = ((padding, 0), (0, padding))
    window = forms.Window((1, 1), (stride, stride), (spread, spread), (1, 1), pads, 1)
    x, kernel = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(((2, 5, 6, 4), (1, 1, 4, 3))))
    found, wanted = (form(x, kernel, window=window) for form in (forms.conv_point, forms.conv_plain))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_all_cores_are_asked_where_that_pays(monkeypatch):
    monkeypatch.setattr(conv_choice, "available_cores", lambda: [0, 1])
    x, kernel = jax.eval_shape(lambda: (jnp.ones((32, 16, 16, 64)), jnp.ones((3, 3, 64, 64))))
    like = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)

    def asks(x, kernel, **options):
        return conv_choice.on_all_cores(x, kernel, forms.window_of(x.shape, kernel.shape, 1, **options))

    assert asks(x, kernel)
    assert not asks(x, like(3, 3, 64, 128))  # two blocks of channels: the other cores have work
    assert not asks(x, kernel, stride=2)
    assert not asks(x, kernel, padding=0)
    assert not asks(like(32, 8, 8, 64), kernel)  # one row more is an eighth
    assert not asks(like(1, 16, 16, 8), like(3, 3, 8, 8))
    monkeypatch.setattr(conv_choice, "available_cores", lambda: [0])
    assert not asks(x, kernel)


@pytest.mark.parametrize(
    ("size", "padding", "dilation"), [((3, 3), ((1, 1), (1, 1)), (1, 1)), ((3, 2), ((0, 4), (2, 0)), (2, 1))]
)
def test_values_and_gradients_on_all_cores_are_those_of_xla(monkeypatch, size, padding, dilation):
    seen = []
    monkeypatch.setattr(conv_choice, "available_cores", lambda: [0, 1])
    monkeypatch.setattr(conv_choice, "MUCH_WORK", 0)
    monkeypatch.setattr(
        conv_choice,
        "conv_rows",
        lambda x, kernel, *, window: seen.append(window) or forms.conv_rows(x, kernel, window=window),
    )
    window = forms.Window(size, (1, 1), (1, 1), dilation, padding, 1)
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, kernel = (jnp.asarray(rng.normal(size=shape)) for shape in ((2, 18, 7, 3), (*size, 3, 5)))
        mine = lambda x, w: conv.conv2d(x, w, 1, padding, dilation)
        plain = functools.partial(forms.conv_plain, window=window)
        found, wanted = (jax.jit(functools.partial(derivatives, form))(x, kernel) for form in (mine, plain))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)
    assert {window, forms.backwards((18, 7), window)} <= set(seen)  # forward and by the image


@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0), (1, 3)])
def test_seeds_and_loops_are_separate_calls(axes):
    x, kernel, _, mine, _ = arrays("groups, few pixels" if axes == (None, 0) else "plain", jnp.float32)
    loss = lambda x, w: jnp.sin(mine(x, w)).mean()
    many = [a if d is None else jnp.stack([a, 2 * a, -a], d) for a, d in zip((x, kernel), axes)]

    def steps(x, w):
        body = lambda w, _: (w - jax.grad(loss, 1)(x, w), ())
        return jax.lax.scan(body, w, length=3)[0]

    found = jax.jit(jax.vmap(steps, axes))(*many)
    for i in range(3):
        one = (a if d is None else jnp.take(a, i, d) for a, d in zip(many, axes))
        np.testing.assert_allclose(found[i], jax.jit(steps)(*one), rtol=1e-4, atol=1e-5)


def test_a_loop_over_it_has_no_convolution_that_is_slow_there():
    """`core.program` unrolls steps whose gradient XLA's CPU backend runs slowly inside a loop."""
    x, kernel, _, mine, plain = arrays("plain", jnp.float32)
    loss = lambda form: lambda w: form(x, w).sum()
    assert convolves(jax.grad(loss(plain)), kernel)
    assert not convolves(jax.grad(loss(mine)), kernel)


def test_the_layer_is_that_of_flax():
    x, key = jnp.asarray(np.random.default_rng(1).normal(size=(2, 7, 6, 4)), jnp.float32), jax.random.key(0)
    mine = conv.Conv(6, (3, 2), 2, dilation=1, groups=2)
    other = nn.Conv(6, (3, 2), (2, 2), feature_group_count=2)

    class Both(nn.Module):
        layer: nn.Module

        @nn.compact
        def __call__(self, x):
            return self.layer(x)

    one, two = (Both(layer).init(key, x) for layer in (mine, other))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one, two))
    np.testing.assert_allclose(Both(mine).apply(one, x), Both(other).apply(two, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("x", "kernel", "options", "message"),
    [
        ((2, 5, 5), (3, 3, 4, 4), {}, r"x \[N, H, W, C\]"),
        ((2, 5, 5, 4), (3, 3, 4, 6), dict(groups=4), "groups=4: expected a divisor of 4 input and 6 output channels"),
        ((2, 5, 5, 4), (3, 3, 4, 6), dict(groups=2), "4 input channels in 2 groups need kernels of 2, found 4"),
        ((2, 5, 5, 4), (3, 3, 4, 6), dict(padding="same"), "padding='same': expected 'SAME'"),
        ((2, 2, 5, 4), (3, 3, 4, 6), dict(padding=0), "images of 2x5 are smaller than the kernel"),
    ],
)
def test_what_does_not_fit_is_one_line(x, kernel, options, message):
    with pytest.raises(UserError, match=message):
        conv.conv2d(jnp.zeros(x), jnp.zeros(kernel), **options)
