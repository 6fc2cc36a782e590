import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack.core.errors import UserError
from jaxstack.sequence import scan
from jaxstack.sequence.scan import affine_scan, moebius_scan, precision_range

FORMS = ("sequential", "associative", "chunked")


def affine_loop(a, b, h0, reverse=False):
    h, out = np.array(h0, np.float64), np.zeros(b.shape)
    for t in reversed(range(len(b))) if reverse else range(len(b)):
        h = out[t] = a[t] * h + b[t]
    return out, h


def moebius_loop(phi, abar2, pbar, lam0):
    lam, out = np.array(lam0, np.float64), np.zeros(phi.shape)
    for t in range(len(phi)):
        lam = out[t] = 1.0 / (abar2 / lam + pbar) + phi[t]
    return out, lam


def affine_inputs(length, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(-1.1, 1.1, (length, 3)), rng.normal(size=(length, 3)), rng.normal(size=3)


def moebius_inputs(length, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda low, high, *shape: rng.uniform(low, high, shape)
    return draw(0, 2, length, 3), draw(0.5, 1, 3), draw(0.001, 0.1, 3), draw(0.5, 2, 3)


def close(actual, desired, rtol=1e-10, atol=1e-12):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=rtol, atol=atol)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65])
def test_forms_equal_the_numpy_loops(form, length):
    with jax.enable_x64():
        for reverse in (False, True):
            f = jax.jit(functools.partial(affine_scan, method=form, reverse=reverse))
            close(f(*affine_inputs(length)), affine_loop(*affine_inputs(length), reverse=reverse))
        f = jax.jit(functools.partial(moebius_scan, method=form))
        close(f(*moebius_inputs(length)), moebius_loop(*moebius_inputs(length)))


@pytest.mark.parametrize("form", ["sequential", "chunked"])
def test_a_thousand_steps_in_float32(form):
    a, b, h0 = affine_inputs(1000)
    close(affine_scan(a, b, h0, method=form), affine_loop(a, b, h0), rtol=2e-4, atol=2e-5)
    close(moebius_scan(*moebius_inputs(1000), method=form), moebius_loop(*moebius_inputs(1000)), rtol=5e-6)


@pytest.mark.parametrize("chunk", [1, 5, 64, 1000])
def test_any_chunk_gives_the_same(chunk):
    with jax.enable_x64():
        close(affine_scan(*affine_inputs(21), method="chunked", chunk=chunk), affine_loop(*affine_inputs(21)))
        close(moebius_scan(*moebius_inputs(21), method="chunked", chunk=chunk), moebius_loop(*moebius_inputs(21)))


def use(out):
    """A scalar of everything a scan returns, the last state with another weight than the rest."""
    return jnp.sin(out[0]).sum() + 2.0 * jnp.cos(out[1]).sum()


def reference_scan(step, carry, xs):
    last, out = jax.lax.scan(lambda h, x: (step(h, x),) * 2, carry, xs)
    return out, last


def moebius_plain(phi, abar2, pbar, lam0):
    return reference_scan(lambda lam, x: lam / (abar2 + pbar * lam) + x, lam0, phi)


def affine_plain(a, b, h0):
    return reference_scan(lambda h, x: x[0] * h + x[1], h0, (a, b))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1, 21])
def test_adjoints_equal_autodiff_through_the_plain_recurrence(form, length):
    with jax.enable_x64():
        cases = (
            (affine_scan, affine_plain, affine_inputs(length)),
            (moebius_scan, moebius_plain, moebius_inputs(length)),
        )
        for f, plain, args in cases:
            args = tuple(map(jnp.asarray, args))
            grad = lambda g, args=args: jax.jit(jax.grad(lambda *x: use(g(*x)), argnums=tuple(range(len(args)))))(*args)
            close(grad(functools.partial(f, method=form)), grad(plain), rtol=1e-10, atol=1e-10)


def test_gradients_agree_with_central_differences():
    with jax.enable_x64():
        cases = ((affine_scan, affine_inputs(5)), (moebius_scan, moebius_inputs(5)))
        for f, args in cases:
            args = tuple(map(jnp.asarray, args))
            loss = jax.jit(lambda *x, f=f: use(f(*x, method="sequential")))
            grads = jax.grad(loss, argnums=tuple(range(len(args))))(*args)
            for i, (x, grad) in enumerate(zip(args, grads)):
                direction = jnp.asarray(np.random.default_rng(i).normal(size=x.shape))
                at = lambda e, i=i, d=direction, args=args, loss=loss: loss(*args[:i], args[i] + e * d, *args[i + 1 :])
                np.testing.assert_allclose(
                    (at(1e-5) - at(-1e-5)) / 2e-5, (grad * direction).sum(), rtol=1e-6, atol=1e-8
                )


def test_gradients_can_be_differentiated_again():
    with jax.enable_x64():
        a, b, h0 = map(jnp.asarray, affine_inputs(6))
        outer = lambda f: jax.grad(lambda a: (jax.grad(lambda a: use(f(a, b, h0)))(a) ** 2).sum())(a)
        close(outer(functools.partial(affine_scan, method="sequential")), outer(affine_plain))


def test_reverse_is_the_flip_and_its_gradient_too():
    with jax.enable_x64():
        a, b, h0 = map(jnp.asarray, affine_inputs(7))
        loss = lambda a, b, h0: use(affine_scan(a, b, h0, reverse=True))
        flipped = lambda a, b, h0: use(affine_scan(a[::-1], b[::-1], h0))
        close(jax.grad(loss, argnums=(0, 1, 2))(a, b, h0), jax.grad(flipped, argnums=(0, 1, 2))(a, b, h0))


@pytest.mark.parametrize("form", FORMS)
def test_a_gate_broadcasts_over_a_matrix_state(form):
    rng = np.random.default_rng(0)
    with jax.enable_x64():
        a = jnp.asarray(rng.uniform(0, 1, (2, 6, 3, 1)))
        b = jnp.asarray(rng.normal(size=(2, 6, 3, 4)))
        f = lambda a, b: use(affine_scan(a, b, axis=1, method=form))
        full = jnp.broadcast_to(a, b.shape)
        value, (d_a, d_b) = jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(a, b)
        plain, (d_full, d_plain) = jax.value_and_grad(f, argnums=(0, 1))(full, b)
        close((value, d_a, d_b), (plain, d_full.sum(-1, keepdims=True), d_plain))
        constant = affine_scan(0.5, b, axis=1, method=form)
        close(constant, affine_scan(jnp.full(b.shape, 0.5), b, axis=1, method="sequential"))


@pytest.mark.parametrize("form", FORMS)
def test_masked_steps_are_as_if_absent(form):
    mask = np.array([0, 1, 1, 0, 0, 1, 1, 0], bool)
    with jax.enable_x64():
        a, b, h0 = affine_inputs(8)
        dirty = np.where(mask[:, None], a, np.nan), np.where(mask[:, None], b, np.inf)
        h, last = affine_scan(*dirty, h0, mask=mask, method=form)
        close((h[mask], last), affine_loop(a[mask], b[mask], h0))
        close(h[0], h0)
        phi, *rest = moebius_inputs(8)
        lam, last = moebius_scan(np.where(mask[:, None], phi, np.nan), *rest, mask=mask, method=form)
        close((lam[mask], last), moebius_loop(phi[mask], *rest))
        close(lam[4], lam[2])
        unseen = moebius_scan(np.where(mask[:, None], phi, np.nan), *rest, mask=mask, masked="predict", method=form)
        close(unseen, moebius_loop(np.where(mask[:, None], phi, 0.0), *rest))
        grads = jax.grad(lambda *x: use(moebius_scan(*x, *rest[2:], mask=mask, method=form)), argnums=(0, 1, 2))(
            jnp.asarray(phi), *map(jnp.asarray, rest[:2])
        )
        assert all(bool(jnp.isfinite(g).all()) for g in grads)
        assert not grads[0][~mask].any()


def test_pieces_with_the_state_carried_equal_the_whole():
    a, b, h0 = affine_inputs(13)
    phi, *coefficients, lam0 = moebius_inputs(13)
    for form in FORMS:
        first, middle = affine_scan(a[:5], b[:5], h0, method=form)
        second, last = affine_scan(a[5:], b[5:], middle, method=form)
        close((jnp.concatenate([first, second]), last), affine_scan(a, b, h0, method="sequential"), 1e-5, 1e-6)
        first, middle = moebius_scan(phi[:5], *coefficients, lam0, method=form)
        second, last = moebius_scan(phi[5:], *coefficients, middle, method=form)
        whole = moebius_scan(phi, *coefficients, lam0, method="sequential")
        close((jnp.concatenate([first, second]), last), whole, 1e-5)


def test_constant_observations_reach_the_riccati_fixed_point():
    with jax.enable_x64():
        phi, a2, p = 0.3, 0.81, 0.05
        lam, _ = moebius_scan(np.full((500, 1), phi), a2, p, 1.0)
        np.testing.assert_allclose(lam[-1, 0], max(np.roots([p, a2 - 1 - p * phi, -a2 * phi])), rtol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_extreme_decay_and_zero_noise_stay_finite(form):
    phi = jnp.full((40, 3), 0.5)
    abar = jnp.asarray([1e-6, 1e-15, 1e-30])
    f = lambda *x: moebius_scan(*x, method=form)
    lam, _ = f(phi, abar**2, 0.01, 1.0)
    close(lam[1:], np.full((39, 3), 100.5), rtol=1e-5)
    loss = lambda phi, a2, p, lam0: (1.0 / f(phi, a2, p, lam0)[0]).sum()
    for a2, p, steps in ((abar**2, 0.01, 40), (jnp.float32(0.81), 0.0, 1000), (jnp.float32(0.0), 0.0, 3)):
        args = (jnp.full((steps, 3), 0.5), a2, p, 1.0)
        if form == "associative" and steps == 1000:
            continue  # the same normalised products as the chunked form, compiled for 1000 leaves
        value, grads = jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(*args)
        assert np.isfinite(value)
        assert all(bool(jnp.isfinite(g).all()) for g in grads)
    saturated, _ = f(jnp.full((5, 1), 1e38), 0.9, 0.0, 1e30)
    close(saturated, np.full((5, 1), precision_range(jnp.float32)[1]), rtol=1e-6)


def test_composition_is_associative_and_stays_in_range():
    with jax.enable_x64():
        maps = [scan._leaf(*map(jnp.asarray, x[:3])) for x in (moebius_inputs(1, s) for s in range(3))]
        first, second, third = maps
        left = scan._compose(scan._compose(first, second), third)
        right = scan._compose(first, scan._compose(second, third))
        close(left, right, rtol=1e-14)
    leaf = scan._leaf(jnp.float32(0.3), jnp.float32(0.9), jnp.float32(0.01))
    product, low = jax.jit(
        lambda: jax.lax.fori_loop(
            0,
            2**20,
            lambda i, c: ((m := scan._compose(c[0], leaf)), jnp.minimum(c[1], jnp.stack(m).min())),
            (leaf, jnp.float32(1.0)),
        )
    )()
    assert low > 0
    assert 0 < product.a < 1
    assert 0 < product.d < 1
    assert product.b * product.c <= 0.25 + 1e-6


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_narrow_inputs_are_widened(dtype):
    a, b, h0 = (jnp.asarray(x, dtype) for x in affine_inputs(6))
    h, last = affine_scan(a, b, h0)
    lam, _ = moebius_scan(*(jnp.asarray(x, dtype) for x in moebius_inputs(6)))
    assert h.dtype == last.dtype == lam.dtype == jnp.float32
    close(h, affine_loop(*(np.asarray(x, np.float64) for x in (a, b, h0)))[0], rtol=1e-5, atol=1e-6)
    grads = jax.grad(lambda *x: use(affine_scan(*x)), argnums=(0, 1, 2))(a, b, h0)
    assert [g.dtype for g in grads] == [dtype] * 3


def test_vmap_over_sequences_equals_a_batch_axis():
    rng = np.random.default_rng(1)
    a, b = rng.uniform(0, 1, (4, 9, 3)), rng.normal(size=(4, 9, 3))
    for form in FORMS:
        f = functools.partial(affine_scan, method=form)
        close(jax.vmap(f)(a, b), f(a, b), 1e-6, 1e-7)
        close(f(np.moveaxis(a, 1, 0), np.moveaxis(b, 1, 0), axis=0)[1], f(a, b)[1], 1e-6, 1e-7)


def test_no_steps_return_the_initial_state():
    h, last = affine_scan(jnp.zeros((2, 0, 3)), jnp.zeros((2, 0, 3)), 1.5)
    lam, last_lam = moebius_scan(jnp.zeros((2, 0, 3)), 0.9, 0.1, 2.0, mask=jnp.ones((2, 0), bool))
    assert h.shape == lam.shape == (2, 0, 3)
    close((last, last_lam), (np.full((2, 3), 1.5), np.full((2, 3), 2.0)))
    grad = jax.grad(lambda h0: affine_scan(jnp.zeros((0, 3)), jnp.zeros((0, 3)), h0)[1].sum())(jnp.ones(3))
    close(grad, np.ones(3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: affine_scan(x, x, method="blelloch"), "unknown scan method 'blelloch'"),
        (lambda x: affine_scan(x[:-1], x), "a has shape"),
        (lambda x: affine_scan(jnp.ones((2, *x.shape)), x), "a has shape"),
        (lambda x: affine_scan(x, x, jnp.ones(5)), "h0 has shape"),
        (lambda x: affine_scan(x, x, axis=2), "no time axis 2"),
        (lambda x: affine_scan(x, x, mask=jnp.ones(4)), "expected bool"),
        (lambda x: affine_scan(x, x, mask=jnp.ones(3, bool)), "mask has shape"),
        (lambda x: affine_scan(x, x, method="chunked", chunk=0), "chunk=0"),
        (lambda x: affine_scan(x * 1j, x), "real numbers"),
        (lambda x: moebius_scan(x, jnp.ones(7), 0.1, 1.0), "abar2 has shape"),
        (lambda x: moebius_scan(x, 0.9, 0.1, 1.0, mask=jnp.ones(4, bool), masked="skip"), "unknown treatment"),
    ],
)
def test_wrong_input_is_a_clear_error(call, message):
    with pytest.raises(UserError, match=message):
        call(jnp.ones((4, 3)))


def test_auto_follows_the_table_where_there_is_one(monkeypatch):
    table = {
        "cpu": {"affine": [{"length": 64, "lanes": 8, "best": "chunked"}, {"length": 4096, "lanes": 8, "best": "x"}]}
    }
    monkeypatch.setattr(scan, "_table", lambda: table)
    assert scan.choose("affine", "auto", 100, 10) == "chunked"
    assert scan.choose("affine", "auto", 2000, 10) == "x"
    assert scan.choose("affine", "associative", 100, 10) == "associative"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert scan.choose("affine", "auto", 100, 10) == "chunked"
    assert scan.choose("affine", "auto", 10, 10) == "sequential"


def test_the_shipped_table_names_known_forms():
    rows = [(r, row) for table in scan._table().values() for r, rows in table.items() for row in rows]
    assert {r for r, _ in rows} >= {"affine", "moebius", "kla"}
    assert all(row["best"] in ("sequential", "associative", "chunked", "pallas") for _, row in rows)
