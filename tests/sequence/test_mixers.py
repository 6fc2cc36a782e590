"""The contract of mixer.py, for every registered mixer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack.core.errors import UserError
from jaxstack.sequence import model, tasks, trainer
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
        step = lambda s, token: module.apply(variables, token, s, method="step")[::-1]
        state, third = jax.lax.scan(step, state, jnp.swapaxes(x[:, 8:], 0, 1))
        return jnp.concatenate([first, second, jnp.swapaxes(third, 0, 1)], axis=1), state

    close(parts(variables, x), (y, last))


@every
def test_no_token_and_one_token(name):
    module, variables, x, _, last = layer(name)

    @jax.jit
    def run(variables, x, last):
        nothing = module.apply(variables, x[:, :0], state=last)
        masked = module.apply(variables, x[:, :0], mask=jnp.ones((2, 0), bool))
        whole = module.apply(variables, x[:, :1])
        y, state = module.apply(variables, x[:, 0], module.init_state(2), method="step")
        return nothing, masked, whole, (y[:, None], state)

    (empty, state), (masked, start), whole, step = run(variables, x, last)
    assert empty.shape == masked.shape == (2, 0, WIDTH)
    close(state, last, 0.0)
    close(start, module.init_state(2), 0.0)
    close(whole, step)


@every
def test_padding_anywhere_changes_nothing(name):
    """Rows are padded left, right and in between, the last is all padding; NaN stands there. Then one more token
    behind a padded one: outputs and state are those of the plain row."""
    module, variables, x, y, last = layer(name)
    valid = [0, 1, 4, 5, 6, 7, 9, 10, 12, 13]
    rows = ([*range(4, 14)], [*range(10)], valid, [])
    mask, padded = np.zeros((4, 14), bool), np.full((4, 14, WIDTH), np.nan, np.float32)
    for row, places in enumerate(rows):
        mask[row, places] = True
        padded[row, places] = x[0, : len(places)]
    more = jnp.tile(x[0, -1], (4, 2, 1)).at[:, 0].set(jnp.nan)
    behind = jnp.asarray([[False, True]] * 3 + [[False, False]])

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def run(variables, padded):
        y, state = module.apply(variables, padded, mask=jnp.asarray(mask))
        one, state = module.apply(variables, more, mask=behind, state=state)
        return (y**2).sum() + (one**2).sum(), (y, one, state)

    grads, (out, one, state) = run(variables, padded)
    three = lambda x: jnp.tile(x[:1], (3, *[1] * (x.ndim - 1)))
    close(out[mask].reshape(3, LENGTH - 1, WIDTH), three(y[:, :-1]))
    close(one[:3, 1], three(y[:, -1]))
    assert not np.asarray(out)[~mask].any()
    assert not one[:, 0].any()
    close(jax.tree.map(lambda s: s[:3], state), jax.tree.map(three, last))
    close(jax.tree.map(lambda s: s[3:], state), module.init_state(1), 0.0)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))
    assert not np.asarray(grads[1])[~mask].any()


@every
def test_a_padded_token_outside_the_vocabulary_is_never_read(name):
    """In a whole model: loss and all gradients are those of clean padding."""
    whole = model.SequenceModel((layer(name)[0],), 7, 7, mlp_ratio=1.0)
    tokens, mask = jax.random.randint(jax.random.key(0), (2, 5), 0, 7), jnp.arange(5) >= jnp.array([[0], [2]])
    params = jax.jit(whole.init)(jax.random.key(1), tokens)["params"]

    @jax.jit
    @jax.value_and_grad
    def run(params, tokens):
        out, _ = whole.apply({"params": params}, tokens, mask=mask)
        return tasks.loss_terms(out, tasks.Batch(tokens, tokens, mask))[0]

    clean = run(params, tokens)
    for outside in (7, -1, 2**31 - 1):
        close(run(params, jnp.where(mask, tokens, outside)), clean, 1e-6)


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
    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def run(variables, x):
        y, state = module.apply(variables, x)
        return jnp.abs(y).mean(), (y, state)

    mixed = x.at[:, ::3].multiply(1e4).at[:, 1::3].multiply(0.0)
    for case in (1e4 * x, 1e-30 * x, 0.0 * x, mixed, x):
        found = run(variables, case)
        bad = [p for p, g in jax.tree_util.tree_leaves_with_path(found) if not jnp.isfinite(g).all()]
        assert not bad, (float(jnp.abs(case).max()), bad)
    unused = [jax.tree_util.keystr(p) for p, g in jax.tree_util.tree_leaves_with_path(found[0]) if not g.any()]
    assert not unused


@every
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_types_keep_theirs_and_a_wide_state(name, dtype):
    module, variables, x, y, last = layer(name)

    @jax.jit
    def run(variables, x):
        loss = lambda v: (lambda y, s: ((y.astype(float) ** 2).mean(), (y, s)))(*module.apply(v, x))
        cast = {"params": model.cast(variables["params"], dtype)}  # as the trainer computes
        return *jax.grad(loss, has_aux=True)(variables), module.apply(cast, x)

    grads, half, low = run(variables, x.astype(dtype))
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))
    assert all(s.dtype in (jnp.float32, jnp.int32) for s in jax.tree.leaves(last))
    for (out, state), tolerance in ((half, 0.05), (low, 0.15)):
        assert out.dtype == dtype
        assert [s.dtype for s in jax.tree.leaves(state)] == [s.dtype for s in jax.tree.leaves(last)]
        close(out, y, tolerance)


@every
def test_state_of_an_unbound_module(name):
    module, _, _, _, last = layer(name)
    state = module.init_state(3)
    assert jax.tree.structure(state) == jax.tree.structure(last)
    for s, end in zip(jax.tree.leaves(state), jax.tree.leaves(last)):
        assert s.shape == (3, *end.shape[1:])
        assert s.dtype == end.dtype
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(layer(name)[1]))


@every
def test_jit_equals_eager_and_needs_no_key(name):
    module, variables, x, y, last = layer(name)
    close(module.apply(variables, x), (y, last))
    close(jax.jit(module.apply)(variables, x), (y, last), 0.0)


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
