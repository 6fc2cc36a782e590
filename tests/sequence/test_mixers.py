"""The contract of mixer.py, for every registered mixer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack.core.errors import UserError
from jaxstack.sequence import model, trainer
from jaxstack.sequence.mixer import Mixer

WIDTH, LENGTH = 8, 11
SMALL = {
    "attention": dict(context=16, conv_size=3),
    "kla": dict(d_state=2),
    "mamba2": dict(d_state=4, head_dim=8),
}
"""Options beyond the width, for speed alone."""

every = pytest.mark.parametrize("name", sorted(trainer.MIXERS))


@functools.cache
def layer(name):
    """(module, its parameters moved away from special values, x [2, LENGTH, WIDTH], y, last state)."""
    module = trainer.make_mixer(name, WIDTH, **SMALL.get(name, {}))
    x = jax.random.normal(jax.random.key(0), (2, LENGTH, WIDTH))
    leaves, tree = jax.tree.flatten(jax.jit(module.init)(jax.random.key(1), x))
    keys = jax.random.split(jax.random.key(2), len(leaves))
    variables = tree.unflatten([p + 0.05 * jax.random.normal(k, p.shape, p.dtype) for p, k in zip(leaves, keys)])
    return module, variables, x, *jax.jit(module.apply)(variables, x)


def close(actual, desired, tolerance=1e-5):
    """Error of each array relative to its largest entry."""
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(np.abs(y).max(initial=0.0), 1e-6))


@every
def test_pieces_and_single_steps_give_what_the_whole_gives(name):
    module, variables, x, y, last = layer(name)
    assert isinstance(module, Mixer)

    @jax.jit
    def parts(variables, x):
        first, state = module.apply(variables, x[:, :5])
        second, state = module.apply(variables, x[:, 5:8], state=state)
        out = [first, second]
        for t in range(8, LENGTH):
            one, state = module.apply(variables, x[:, t], state, method="step")
            out.append(one[:, None])
        return jnp.concatenate(out, axis=1), state

    close(parts(variables, x), (y, last))

    def decode(variables, x):
        step = lambda s, token: module.apply(variables, token, s, method="step")[::-1]
        state, out = jax.lax.scan(step, module.init_state(2), jnp.swapaxes(x, 0, 1))
        return jnp.swapaxes(out, 0, 1), state

    close(jax.jit(decode)(variables, x), (y, last))


@every
def test_no_token_and_one_token(name):
    module, variables, x, _, last = layer(name)
    empty, state = module.apply(variables, x[:, :0], state=last)
    assert empty.shape == (2, 0, WIDTH)
    close(state, last, 0.0)
    empty, state = module.apply(variables, x[:, :0], mask=jnp.ones((2, 0), bool))
    assert empty.shape == (2, 0, WIDTH)
    close(state, module.init_state(2), 0.0)
    one, after = module.apply(variables, x[:, :1])
    stepped, again = module.apply(variables, x[:, 0], module.init_state(2), method="step")
    close((one[:, 0], after), (stepped, again))


@every
def test_padding_anywhere_changes_nothing(name):
    """What stands at padding is NaN; rows are padded left, right and in between, the last is all padding."""
    module, variables, x, _, _ = layer(name)
    length, rows = 7, ([3, 4, 5, 6, 7, 8, 9], [0, 1, 2, 3, 4, 5, 6], [0, 2, 3, 5, 6, 7, 9], [])
    mask, padded = np.zeros((4, 10), bool), np.full((4, 10, WIDTH), np.nan, np.float32)
    for row, places in enumerate(rows):
        mask[row, places] = True
        padded[row, places] = x[0, : len(places)]
    apply = jax.jit(module.apply)
    want, end = apply(variables, x[:1, :length])
    y, state = apply(variables, padded, mask=jnp.asarray(mask))
    close(y[mask].reshape(3, length, WIDTH), jnp.tile(want, (3, 1, 1)))
    assert not np.asarray(y)[~mask].any()
    for row in range(3):
        close(jax.tree.map(lambda s, row=row: s[row : row + 1], state), end)
    close(jax.tree.map(lambda s: s[3:], state), module.init_state(1), 0.0)
    # from a state, and then on with a step
    four = jax.tree.map(lambda s: jnp.tile(s, (4, *[1] * (s.ndim - 1))), end)
    token = jnp.tile(x[:1, length : length + 1], (4, 2, 1)).at[:, 0].set(jnp.nan)
    y, state = apply(variables, token, mask=jnp.asarray([[False, True]] * 3 + [[False, False]]), state=four)
    want, after = apply(variables, x[:1, : length + 1])
    close(y[:3, 1], jnp.tile(want[:, -1], (3, 1)))
    assert not y[:, 0].any()
    close(jax.tree.map(lambda s: s[:1], state), after)
    close(jax.tree.map(lambda s: s[3:], state), end, 0.0)
    grads = jax.jit(jax.grad(lambda v, x: (module.apply(v, x, mask=jnp.asarray(mask))[0] ** 2).sum(), argnums=(0, 1)))(
        variables, padded
    )
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))
    assert not np.asarray(grads[1])[~mask].any()


@every
def test_outputs_depend_on_the_past_alone(name):
    module, variables, x, y, _ = layer(name)
    other, _ = jax.jit(module.apply)(variables, x.at[0, 5].add(1.0))
    close(other[:, :5], y[:, :5], 1e-6)
    close(other[1], y[1], 1e-6)
    assert (jnp.abs(other - y)[0, 5:].max(axis=-1) > 1e-5).all()


@every
def test_extreme_inputs_stay_finite_with_their_gradients(name):
    module, variables, x, _, _ = layer(name)

    @jax.jit
    def f(variables, x):
        loss = lambda v, x: jnp.abs(module.apply(v, x)[0]).mean()
        return module.apply(variables, x), jax.grad(loss, argnums=(0, 1))(variables, x)

    for scale in (1e4, 1e-30, 0.0):
        bad = [p for p, g in jax.tree_util.tree_leaves_with_path(f(variables, scale * x)) if not jnp.isfinite(g).all()]
        assert not bad, (scale, bad)
    mixed = x.at[:, ::3].multiply(1e4).at[:, 1::3].multiply(0.0)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(f(variables, mixed)))


@every
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_types_keep_theirs_and_a_wide_state(name, dtype):
    module, variables, x, y, last = layer(name)
    both = lambda v, x: (module.apply(v, x), jax.grad(lambda v: (module.apply(v, x)[0].astype(float) ** 2).mean())(v))
    (half, state), grads = jax.jit(both)(variables, x.astype(dtype))
    assert half.dtype == dtype
    assert [s.dtype for s in jax.tree.leaves(state)] == [s.dtype for s in jax.tree.leaves(last)]
    assert all(s.dtype in (jnp.float32, jnp.int32) for s in jax.tree.leaves(last))
    close(half, y, 0.05)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))
    cast = {"params": model.cast(variables["params"], dtype)}  # as the trainer computes in bfloat16
    low, state = jax.jit(module.apply)(cast, x.astype(dtype))
    assert low.dtype == dtype
    assert [s.dtype for s in jax.tree.leaves(state)] == [s.dtype for s in jax.tree.leaves(last)]
    close(low, y, 0.15)


@every
def test_state_of_an_unbound_module(name):
    module, _, _, _, last = layer(name)
    state = module.init_state(3)
    assert jax.tree.structure(state) == jax.tree.structure(last)
    for s, end in zip(jax.tree.leaves(state), jax.tree.leaves(last)):
        assert s.shape == (3, *end.shape[1:])
        assert s.dtype == end.dtype


@every
def test_jit_equals_eager_and_needs_no_key(name):
    module, variables, x, y, last = layer(name)
    close(module.apply(variables, x), (y, last))
    close(jax.jit(module.apply)(variables, x), (y, last), 0.0)


@every
def test_every_parameter_is_used(name):
    module, variables, x, _, _ = layer(name)
    grads = jax.jit(jax.grad(lambda v: (module.apply(v, x)[0] ** 2).sum()))(variables)
    assert not [jax.tree_util.keystr(p) for p, g in jax.tree_util.tree_leaves_with_path(grads) if not g.any()]
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(variables))


@every
def test_wrong_input_is_a_clear_error(name):
    module, variables, x, _, _ = layer(name)
    for bad, message in (
        (dict(x=x[..., :5]), "expected .batch, time, 8"),
        (dict(x=x[0]), "expected .batch, time, 8"),
        (dict(x=jnp.zeros((2, 3, WIDTH), int)), "floating"),
        (dict(x=x, mask=jnp.ones((2, 7), bool)), "mask has shape"),
        (dict(x=x, mask=jnp.ones((2, LENGTH))), "expected bool"),
        (dict(x=x, state=module.init_state(3)), "state.*has shape"),
        (dict(x=x, state=()), "state has structure"),
    ):
        with pytest.raises(UserError, match=message):
            module.apply(variables, **bad)
    for bad, state in ((x[:, 0, :5], module.init_state(2)), (x[:, 0], module.init_state(1))):
        with pytest.raises(UserError):
            module.apply(variables, bad, state, method="step")


def test_a_model_of_all_mixers():
    """Registered mixers work by name in the trainer's model, together, with decoding."""
    names = sorted(trainer.MIXERS)
    mixers = tuple(layer(name)[0] for name in names)
    whole = model.SequenceModel(mixers, 7, 7, mlp_ratio=0.0)
    tokens = np.random.default_rng(0).integers(0, 7, (2, 6))
    params = jax.jit(whole.init)(jax.random.key(0), tokens)["params"]
    out, end = jax.jit(lambda p: whole.apply({"params": p}, tokens))(params)

    def decode(params):
        step = lambda s, x: whole.apply({"params": params}, x, s, method="step")[::-1]
        return jax.lax.scan(step, whole.init_state(2), jnp.asarray(tokens.T))

    last, stepped = jax.jit(decode)(params)
    close((jnp.swapaxes(stepped, 0, 1), last), (out, end), 1e-4)
