import functools
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack.core.errors import UserError
from jaxstack.sequence import kla_filter, scan_pallas
from jaxstack.sequence.kla import (
    KalmanLinearAttention,
    KLALayerState,
    KLAState,
    discretise,
    kla_scan,
    kla_step,
    l2_normalise,
    marginal_log_probs,
)
from jaxstack.sequence.kla_filter import Token
from jaxstack.sequence.mixer import Mixer, ShortConv

sys.path.insert(0, os.path.dirname(__file__))
from reference import inputs, kalman

FORMS = ("sequential", "associative", "chunked", "pallas")


def run(form, **options):
    """kla_scan in one form, jitted."""
    return jax.jit(functools.partial(kla_scan, method=form, interpret=form == "pallas", **options))


def as_float32(args):
    return tuple(jnp.asarray(x, jnp.float32) for x in args)


def close(actual, desired, rtol=1e-10, atol=1e-12):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=rtol, atol=atol)


def textbook(args, **options):
    y, y_var, var, mean = kalman(*args, **options)
    return y, y_var, KLAState(1.0 / var, mean)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("length", "read"), [(1, "posterior"), (2, "prior"), (3, "posterior"), (17, "prior")])
def test_every_form_is_the_textbook_filter(form, length, read):
    args = inputs(length, length=length)
    with jax.enable_x64():
        close(run(form, read=read)(*args), textbook(args, prior=read == "prior"), rtol=1e-11)


@pytest.mark.parametrize("form", ["sequential", "chunked"])
@pytest.mark.parametrize("length", [63, 64, 65, 1000])
def test_float32_error_against_the_textbook_filter(form, length):
    args = inputs(1, batch=1, length=length, channels=2)
    y, y_var, state = run(form)(*as_float32(args))
    want_y, want_var, want_state = textbook(args)
    assert np.abs(y - want_y).max() < 3e-6 * np.abs(want_y).max()
    close(y_var, want_var, rtol=2e-6)
    close(state.precision, want_state.precision, rtol=5e-5)


@pytest.mark.parametrize("masked", ["freeze", "predict"])
@pytest.mark.parametrize("form", FORMS)
def test_masks(form, masked):
    args, mask = inputs(2, batch=1, length=9), np.array([[0, 1, 1, 0, 0, 1, 1, 1, 0]], bool)
    dirty = [np.where(mask[..., None], x, np.nan) for x in args[: 3 if masked == "predict" else 4]]
    with jax.enable_x64():
        y, y_var, state = run(form, masked=masked)(*dirty, *args[len(dirty) :], mask=mask)
        if masked == "freeze":
            want = textbook((*(x[mask][None] for x in args[:4]), *args[4:]))
            close((y[mask], y_var[mask], state), (want[0][0], want[1][0], want[2]), rtol=1e-11)
            assert not y[~mask].any()
            assert not y_var[~mask].any()
        else:
            unseen = (args[0], np.where(mask[..., None], args[1], 0.0), *args[2:])
            close((y, y_var, state), textbook(unseen), rtol=1e-11)
            assert (y_var[0, 4] > y_var[0, 2]).all() or (args[3][0, 4] ** 2 < args[3][0, 2] ** 2).any()
    all_masked = run(form)(*as_float32(args), mask=jnp.zeros((1, 9), bool))
    close(all_masked, (np.zeros((1, 9, 3)), np.zeros((1, 9, 3)), KLAState(np.ones((1, 3, 4)), np.zeros((1, 3, 4)))))


def loss(form, mask=None, **options):
    def f(args, state):
        y, y_var, last = run(form, **options)(*args, state=state, mask=mask)
        return jnp.sin(y).sum() + jnp.log1p(y_var).sum() + jnp.cos(last.mean).sum() + jnp.log(last.precision).sum()

    return f


@pytest.mark.parametrize("read", ["posterior", "prior"])
def test_hand_written_gradients_equal_central_differences(read):
    with jax.enable_x64():
        args = tuple(map(jnp.asarray, inputs(3, length=6)))
        rng = np.random.default_rng(0)
        state = KLAState(jnp.asarray(rng.uniform(0.5, 2, (2, 3, 4))), jnp.asarray(rng.normal(size=(2, 3, 4))))
        f = jax.jit(loss("sequential", jnp.asarray([[1, 1, 0, 1, 1, 1], [0, 1, 1, 1, 0, 0]], bool), read=read))
        leaves, tree = jax.tree.flatten((args, state))
        grads = jax.tree.leaves(jax.grad(f, argnums=(0, 1))(args, state))
        for i, grad in enumerate(grads):
            direction = rng.normal(size=grad.shape)
            at = lambda e, i=i, d=direction: f(*tree.unflatten([*leaves[:i], leaves[i] + e * d, *leaves[i + 1 :]]))
            np.testing.assert_allclose((at(1e-5) - at(-1e-5)) / 2e-5, (grad * direction).sum(), rtol=1e-6)


@pytest.mark.parametrize("read", ["posterior", "prior"])
@pytest.mark.parametrize("form", ["associative", "chunked", "pallas"])
def test_all_forms_have_the_same_gradients(form, read):
    mask = jnp.asarray([[1, 1, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0, 1]], bool)
    with jax.enable_x64():
        args = tuple(map(jnp.asarray, inputs(4, length=7)))
        state = KLAState(jnp.full((2, 3, 4), 1.7), jnp.full((2, 3, 4), 0.3))
        grad = lambda form: jax.jit(jax.grad(loss(form, mask, read=read), argnums=(0, 1)))(args, state)
        close(grad(form), grad("sequential"), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [32, 33, 75])
def test_gradients_do_not_depend_on_which_states_are_kept(length, masked, monkeypatch):
    args, state = inputs(6, length=length), KLAState(jnp.full((2, 3, 4), 1.7), jnp.full((2, 3, 4), 0.3))
    mask = jnp.asarray(np.random.default_rng(1).random((2, length)) < 0.7) if masked else None
    with jax.enable_x64():
        grad = lambda: jax.jit(jax.value_and_grad(loss("sequential", mask), argnums=(0, 1)))(args, state)
        some = grad()
        monkeypatch.setattr(kla_filter, "SPAN", 1)
        close(some, grad(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("read", ["posterior", "prior"])
def test_one_sequence_has_the_gradients_it_has_in_a_batch(read):
    """`filter_scan` goes back through a batch of one without the batch axis."""
    args, state = inputs(6, length=35), KLAState(jnp.full((2, 3, 4), 1.7), jnp.full((2, 3, 4), 0.3))
    mask = jnp.asarray(np.random.default_rng(1).random((2, 35)) < 0.7)
    with jax.enable_x64():
        grad = lambda at: jax.jit(jax.grad(loss("sequential", mask[at], read=read), argnums=(0, 1)))(
            (*(x[at] for x in args[:4]), *args[4:]), jax.tree.map(lambda x: x[at], state)
        )
        (both, d_state), (first, d_first), (second, d_second) = (grad(slice(*at)) for at in ((0, 2), (0, 1), (1, 2)))
        apart = (
            *(jnp.concatenate(x) for x in zip(first[:4], second[:4])),
            *(x + y for x, y in zip(first[4:], second[4:])),
        )
        close(apart, both, rtol=1e-9, atol=1e-10)
        close(jax.tree.map(lambda x, y: jnp.concatenate([x, y]), d_first, d_second), d_state, rtol=1e-9, atol=1e-10)


def test_small_gradients_of_the_mean_pass_saturated_precisions():
    """A cotangent of 1e-9 over a precision of 7e30 is 0 in float32; the mean's own gradient does not take that way."""
    v, precision, k, q, abar, pbar = as_float32(inputs(0, batch=1, length=4))
    state = KLAState(jnp.full((1, 3, 4), 1e38), jnp.ones((1, 3, 4)))
    last = lambda mean: kla_scan(v, precision, k, q, abar, 0.0 * pbar, state=state._replace(mean=mean))[2].mean
    close(jax.grad(lambda mean: 1e-9 * last(mean).sum())(state.mean), 1e-9 * abar[None] ** 4, rtol=1e-5)


def test_pallas_blocks_of_time_and_channels(monkeypatch):
    """As on TPU: several blocks of each, the state handed on through an output, channels and steps padded."""
    plan = scan_pallas._plan
    monkeypatch.setattr(scan_pallas, "_plan", lambda *a: plan(*a)._replace(steps=4, length=12, width=2, channels=6))
    args, state = as_float32(inputs(5, length=10, channels=5)), KLAState(jnp.full((2, 5, 4), 2.0), jnp.ones((2, 5, 4)))
    pallas, sequential = (jax.value_and_grad(loss(m), argnums=(0, 1))(args, state) for m in ("pallas", "sequential"))
    close(pallas, sequential, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("platform", "target"), [("tpu", "tpu"), ("gpu", "cuda")])
def test_pallas_kernels_lower_for_the_accelerators(platform, target):
    """The compilers' front ends accept both kernels; this does not run them."""
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    wide, narrow, state = shape(2, 100, 40), shape(2, 100, 16), shape(2, 40, 16)
    args = (Token(wide, wide, narrow, narrow), shape(40, 16), shape(40, 16), state, state)

    def f(tokens, *rest):
        return sum(x.sum() for x in scan_pallas.kalman_filter(tokens, None, *rest, platform=platform))

    unchecked = [jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    grad = jax.jit(jax.grad(f, argnums=(0, 1, 2, 3, 4)))
    for g in (jax.jit(f), grad):
        assert "custom_call" in jax.export.export(g, platforms=[target], disabled_checks=unchecked)(*args).mlir_module()


def test_without_noise_or_decay_it_is_a_precision_weighted_mean():
    rng = np.random.default_rng(0)
    v, precision = rng.normal(size=(1, 30, 1)), rng.uniform(0.1, 3, (1, 30, 1))
    one = np.ones((1, 30, 1))
    y, y_var, state = kla_scan(*as_float32((v, precision, one, one, np.ones((1, 1)), np.zeros((1, 1)))))
    total = 1.0 + np.cumsum(precision, axis=1)
    close((y, y_var), (np.cumsum(precision * v, axis=1) / total, 1.0 / total), rtol=2e-6, atol=1e-6)
    close(state.precision, total[:, -1:], rtol=1e-6)


def test_without_observations_it_returns_to_the_stationary_prior():
    v, _, k, q, abar, _ = as_float32(inputs(0, length=600))
    abar, pbar = discretise(1.0, 0.3, -jnp.log(abar))
    y, _, state = kla_scan(v, jnp.zeros_like(v), k, q, abar, pbar)
    assert not y.any()
    close(1.0 / state.precision, np.full((2, 3, 4), 0.15), rtol=2e-3)


def test_zero_process_noise_is_a_linear_recurrence():
    """The gates then depend on the keys and precisions only, not on the values: y is linear in v."""
    v, *rest, _ = inputs(6, length=12)
    other = np.random.default_rng(9).normal(size=v.shape)
    with jax.enable_x64():
        y = lambda v, noise: kla_scan(v, *rest, np.full((3, 4), noise))[0]
        close(y(v + 2 * other, 0.0), y(v, 0.0) + 2 * y(other, 0.0), rtol=1e-9)
        precision = lambda noise: kla_scan(v, *rest, np.full((3, 4), noise))[2].precision
        assert (precision(0.1) < precision(0.0)).all()


def test_intervals_cover_data_drawn_from_the_model():
    rng = np.random.default_rng(0)
    batch, length, abar, pbar, noise = 400, 60, 0.95, 0.1, 0.5
    k = rng.normal(size=(batch, length, 1))
    z, hidden = rng.normal(size=(batch, 1)), []
    for _ in range(length):
        z = abar * z + np.sqrt(pbar) * rng.normal(size=z.shape)
        hidden.append(z)
    hidden = np.stack(hidden, axis=1)
    v = k * hidden + np.sqrt(noise) * rng.normal(size=hidden.shape)
    one = np.ones((1, 1))
    y, y_var, _ = kla_scan(*as_float32((v, np.full(v.shape, 1 / noise), k, np.ones_like(k), abar * one, pbar * one)))
    assert abs((np.abs(hidden - y) < 1.6449 * np.sqrt(y_var)).mean() - 0.90) < 0.01


def test_pieces_and_single_steps_continue_a_sequence():
    args = as_float32(inputs(7, length=11))
    tokens, coefficients = args[:4], args[4:]
    whole = kla_scan(*args)
    for form in ("sequential", "chunked"):
        y, y_var, state = run(form)(*(x[:, :6] for x in tokens), *coefficients)
        for t in range(6, 11):
            y_t, var_t, state = kla_step(*(x[:, t] for x in tokens), *coefficients, state)
            y, y_var = jnp.concatenate([y, y_t[:, None]], 1), jnp.concatenate([y_var, var_t[:, None]], 1)
        close((y, y_var, state), whole, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_extreme_inputs_stay_finite_with_their_gradients(form):
    v, precision, k, q, abar, pbar = as_float32(inputs(8, length=6))
    zero = jnp.zeros_like
    cases = {
        "k=0": (v, precision, zero(k), q, abar, pbar),
        "q=0": (v, precision, k, zero(q), abar, pbar),
        "no noise": (v, precision, k, q, abar, zero(pbar)),
        "no memory": (v, precision, k, q, zero(abar), pbar),
        "neither": (v, precision, k, q, zero(abar), zero(pbar)),
        "fast decay": (v, precision, k, q, jnp.full_like(abar, 1e-30), pbar),
        "exact observations": (v, jnp.full_like(precision, jnp.inf), k, q, abar, pbar),
        "blind": (v, jnp.full_like(precision, 1e-38), k, q, abar, pbar),
        "large values": (1e15 * v, precision, k, q, abar, pbar),
        "tiny everything": (1e-30 * v, 1e-30 * precision, 1e-30 * k, 1e-30 * q, abar, 1e-30 * pbar),
        "large keys": (v, precision, 1e12 * k, q, abar, pbar),
        "a large key": (v, precision, k.at[:, 2, 1].set(1e18), q, abar, pbar),
        "keys that saturate": (v, precision, 1e38 * k, q, abar, pbar),
        "large keys without noise": (v, precision, 1e12 * k, q, abar, zero(pbar)),
        "much noise": (v, precision, 1e12 * k, q, abar, 1e30 * pbar),
    }
    f = lambda *x: sum((o * o).mean() for o in run(form)(*x)[:2])
    grad = jax.jit(jax.value_and_grad(f, argnums=tuple(range(6))))
    for name, args in cases.items():
        bad = [i for i, x in enumerate(jax.tree.leaves(grad(*args))) if not bool(jnp.isfinite(x).all())]
        assert not bad, (name, bad)
    y, *_ = run(form)(*cases["exact observations"])
    assert jnp.abs(y).max() < 1e3


def test_large_keys_are_filtered_exactly_in_every_form():
    """k^2 precision leaves float32's safe range; mean and variance are those of the filter in float64."""
    v, precision, k, q, abar, pbar = inputs(8, length=6)

    def stepped(*args):
        state, out = KLAState(jnp.ones((2, 3, 4)), jnp.zeros((2, 3, 4))), []
        for t in range(6):
            *each, state = kla_step(*(x[:, t] for x in args[:4]), *args[4:], state)
            out.append(each)
        return *(jnp.stack(x, 1) for x in zip(*out)), state

    forms = [run(form) for form in FORMS] + [jax.jit(stepped)]
    for size in (1e6, 1e12, np.where(np.arange(6)[:, None] % 2, 1e12, 1.0)):
        args = (v, precision, size * k, q, abar, pbar)
        with jax.enable_x64():
            y, y_var, _ = (np.asarray(x) for x in jax.tree.leaves(run("sequential")(*args))[:3])
        for form in forms:
            found = form(*as_float32(args))
            for x, want in zip(found[:2], (y, y_var)):
                np.testing.assert_allclose(x, want, rtol=1e-5, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize("form", ["sequential", "chunked"])
def test_long_memory_without_noise_saturates_instead_of_overflowing(form):
    """lam ~ abar^(-2t) leaves float32 after 420 steps; the mean does not depend on it any more."""
    v, precision, k, q, _, _ = inputs(0, batch=1, length=1024)
    args = (v, precision, k, q, np.full((3, 4), 0.9), np.zeros((3, 4)))
    y, y_var, _ = run(form)(*as_float32(args))
    want, *_ = kalman(*args)
    assert np.isfinite(y_var).all()
    assert np.abs(y - want).max() < 3e-6 * np.abs(want).max()


def test_narrow_types_and_empty_sequences():
    args = inputs(0, length=5)
    half = tuple(jnp.asarray(x, jnp.bfloat16) for x in args)
    y, y_var, state = kla_scan(*half)
    assert {x.dtype for x in (y, y_var, *state)} == {jnp.dtype(jnp.float32)}
    close((y, y_var, state), textbook([np.asarray(x, np.float64) for x in half]), rtol=2e-5, atol=1e-6)
    state = KLAState(jnp.full((2, 3, 4), 3.0), jnp.ones((2, 3, 4)))
    y, y_var, last = kla_scan(*(x[:, :0] for x in args[:4]), *args[4:], state=state)
    assert y.shape == y_var.shape == (2, 0, 3)
    close(last, state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(method="fast"), "unknown scan method 'fast'"),
        (dict(read="future"), "unknown read-out 'future'"),
        (dict(masked="drop"), "unknown treatment"),
        (dict(mask=np.ones((2, 4), bool)), "mask has shape"),
        (dict(mask=np.ones((2, 5))), "expected bool"),
        (dict(k=np.ones((2, 5, 3))), "q has shape"),
        (dict(v=np.ones((2, 5))), "v has shape"),
        (dict(abar=np.ones((4, 3))), "abar has shape"),
        (dict(state=KLAState(jnp.ones((2, 3, 1)), jnp.ones((2, 3, 4)))), "state.*has shape"),
        (dict(state=jnp.ones((2, 3, 4))), "state has structure"),
        (dict(method="pallas"), "not 'cpu'"),
        (dict(method="sequential", interpret=True), "interpret=True"),
    ],
)
def test_wrong_input_is_a_clear_error(change, message):
    arrays = dict(zip(("v", "obs_precision", "k", "q", "abar", "pbar"), as_float32(inputs(0, length=5))))
    with pytest.raises(UserError, match=message):
        kla_scan(**(arrays | change))


# ---------------------------------------------------------------- layer

SWITCHES = {
    "plain": {},
    "mamba": dict(block="mamba"),
    "zoh": dict(discretisation="zoh"),
    "no process noise": dict(process_noise=0.0),
    "fixed noise": dict(learn_process_noise=False),
    "no convolution": dict(use_conv=False),
    "no gate": dict(use_gate=False),
    "no qk norm": dict(qk_norm=False),
    "prior": dict(read="prior"),
    "vector skip, bias, ranks": dict(skip="vector", use_bias=True, value_rank=3, var_rank=2, obs_var_max=2.0),
    "no skip, bfloat16": dict(skip="none", dtype=jnp.bfloat16),
}


@functools.cache
def layer(name, **more):
    module = KalmanLinearAttention(6, d_state=4, **(SWITCHES[name] | more))
    x = jax.random.normal(jax.random.key(0), (2, 8, 6))
    return module, x, module.init(jax.random.key(1), x)


@pytest.mark.parametrize("name", SWITCHES)
def test_layer_prefill_and_steps_equal_the_whole(name):
    module, x, variables = layer(name)
    assert isinstance(module, Mixer)

    def whole_and_parts(variables, x):
        whole = module.apply(variables, x, return_variance=True)
        y, state = module.apply(variables, x[:, :5])
        for t in range(5, 8):
            y_t, var_t, state = module.apply(variables, x[:, t], state, return_variance=True, method="step")
            y = jnp.concatenate([y, y_t[:, None]], axis=1)
        return whole, (y, var_t, state)

    (y, y_var, last), (y_parts, var_parts, last_parts) = jax.jit(whole_and_parts)(variables, x)
    loose = dict(rtol=2e-2, atol=1e-2) if "bfloat16" in name else dict(rtol=1e-5, atol=1e-6)
    close((y_parts, var_parts, last_parts), (y, y_var[:, -1], last), **loose)
    assert (y_var > 0).all() or "bfloat16" in name
    assert jax.tree.map(jnp.shape, last) == jax.tree.map(jnp.shape, module.init_state(2))
    grads = jax.jit(jax.grad(lambda p: (module.apply(p, x)[0] ** 2).sum()))(variables)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))
    unused = [jax.tree_util.keystr(k) for k, g in jax.tree_util.tree_leaves_with_path(grads) if not g.any()]
    assert not unused


def test_layer_padding_is_not_seen():
    module, x, variables = layer("plain")
    y, state = module.apply(variables, x[:1, :5])
    for where in ([0, 1, 2, 3, 4], [3, 4, 5, 6, 7], [0, 2, 3, 6, 7]):
        mask = np.zeros((1, 8), bool)
        mask[0, where] = True
        dirty = np.full((1, 8, 6), np.nan, np.float32)
        dirty[:, where] = x[:1, :5]
        padded, padded_var, last = module.apply(variables, dirty, mask=jnp.asarray(mask), return_variance=True)
        close((padded[:, where], last), (y, state), rtol=1e-5, atol=1e-6)
        assert not padded[~mask].any()
        assert not padded_var[~mask].any()
    nothing, last = module.apply(variables, dirty, mask=jnp.zeros((1, 8), bool))
    assert not nothing.any()
    close(last, module.init_state(1))


def test_layer_methods_agree_and_empty_or_half_inputs_work():
    module, x, variables = layer("plain")
    y, state = module.apply(variables, x)
    close(layer("plain", method="chunked")[0].apply(variables, x), (y, state), rtol=1e-5, atol=1e-6)
    empty, same = module.apply(variables, x[:, :0], state=state)
    assert empty.shape == (2, 0, 6)
    close(same, state)
    half, half_state = module.apply(variables, x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    assert half_state.belief.precision.dtype == jnp.float32
    close(half, y, rtol=0.1, atol=0.05)
    assert isinstance(half_state, KLALayerState)


def test_layer_parameter_counts():
    """3.76 M and 1.79 M at D = 512, as the authors state for their two blocks."""
    x = jax.ShapeDtypeStruct((1, 2, 512), jnp.float32)
    for block, millions in (("plain", 3.757), ("mamba", 1.79)):
        shapes = jax.eval_shape(KalmanLinearAttention(512, block=block).init, jax.random.key(0), x)
        assert abs(sum(np.prod(p.shape) for p in jax.tree.leaves(shapes)) / 1e6 - millions) < 0.01


def test_layer_variance_is_that_of_a_linear_read_out():
    """Without skip and gate: out = y W, so the variance must be var(y) W^2."""
    module = KalmanLinearAttention(6, d_state=4, use_gate=False, skip="none", use_conv=False)
    _, x, _ = layer("plain")
    variables = module.init(jax.random.key(0), x)
    (out, out_var, _), bound = module.apply(variables, x, return_variance=True), module.bind(variables)
    y, y_var, _ = kla_scan(*bound._sense(bound.in_proj(x)), *bound.dynamics())
    weight = variables["params"]["out_proj"]["kernel"]
    close((out, out_var), (y @ weight, y_var @ weight**2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(block="hyena"), "unknown block"),
        (dict(d_state=0), "d_state=0"),
        (dict(value_rank="low"), "value_rank='low'"),
        (dict(skip="yes"), "skip='yes'"),
        (dict(read="both"), "read='both'"),
        (dict(discretisation="euler"), "discretisation='euler'"),
        (dict(process_noise=-1.0), "process_noise=-1.0"),
        (dict(delta_range=(0.0, 0.1)), "delta_range"),
    ],
)
def test_layer_fields_are_checked(change, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(KalmanLinearAttention(6, **change).init, jax.random.key(0), jnp.zeros((1, 2, 6)))


def test_layer_inputs_are_checked():
    module, x, variables = layer("plain")
    for bad, message in (
        (dict(x=x[..., :5]), "expected .batch, time, 6"),
        (dict(x=jnp.zeros((2, 8, 6), int)), "floating"),
        (dict(x=x, mask=jnp.ones((2, 7), bool)), "mask has shape"),
        (dict(x=x, state=module.init_state(3)), "state.*has shape"),
    ):
        with pytest.raises(UserError, match=message):
            module.apply(variables, **bad)


def test_short_convolution_is_causal_and_carries_its_window():
    conv, x = ShortConv(3, 4), np.random.default_rng(0).normal(size=(2, 7, 3)).astype(np.float32)
    variables = conv.init(jax.random.key(0), x)
    weight, padded = variables["params"]["weight"], np.concatenate([np.zeros((2, 3, 3)), x], axis=1)
    want = np.stack([(padded[:, t : t + 4] * weight).sum(1) for t in range(7)], axis=1)
    y, window = conv.apply(variables, x)
    close((y, window), (want, x[:, 4:]), rtol=1e-5, atol=1e-6)
    first, middle = conv.apply(variables, x[:, :2])
    second, last = conv.apply(variables, x[:, 2:], state=middle)
    close((jnp.concatenate([first, second], 1), last), (want, x[:, 4:]), rtol=1e-5, atol=1e-6)
    one, window = conv.apply(variables, x[:, 6], conv.apply(variables, x[:, :6])[1], method="step")
    close((one, window), (want[:, 6], x[:, 4:]), rtol=1e-5, atol=1e-6)
    assert ShortConv(3, 1).init_state(2).shape == (2, 0, 3)


def test_normalisation_has_a_gradient_at_zero():
    x = jnp.asarray([[3.0, 4.0], [0.0, 0.0], [1e-20, 0.0]])
    close(l2_normalise(x), np.array([[0.6, 0.8], [0, 0], [0, 0]]), rtol=1e-6)
    assert jnp.isfinite(jax.grad(lambda x: l2_normalise(x).sum())(x)).all()


def test_marginal_read_out():
    rng = np.random.default_rng(0)
    mean, weight = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32), jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    read = lambda var: marginal_log_probs(lambda x: 3 * x @ weight, mean, var, jax.random.key(0), 256)
    sharp, blurred = read(jnp.zeros_like(mean)), read(jnp.full_like(mean, 4.0))
    close(sharp, jax.nn.log_softmax(3 * mean @ weight), rtol=1e-4, atol=1e-4)
    close(jnp.exp(blurred).sum(-1), np.ones(5), rtol=1e-5)
    entropy = lambda log_p: -(jnp.exp(log_p) * log_p).sum(-1).mean()
    assert entropy(blurred) > entropy(sharp)
    assert jnp.isfinite(jax.grad(lambda v: read(v).sum())(jnp.zeros_like(mean))).all()
    with pytest.raises(UserError, match="num_samples=0"):
        marginal_log_probs(lambda x: x, mean, mean, jax.random.key(0), 0)
