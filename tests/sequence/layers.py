"""What the tests of mixers share: float64 NumPy pieces of layers, and the checks that all of them have to pass."""

import jax
import jax.numpy as jnp
import numpy as np


def sigmoid(x):
    return np.where(x >= 0, 1 / (1 + np.exp(-np.abs(x))), np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x))))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.logaddexp(0.0, x)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def rms_norm(x, scale, eps=1e-5):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def conv(x, p):
    """x [B, T, M], p: weight [K, M] and perhaps bias -> causal depthwise convolution, loop over time."""
    size, y = len(p["weight"]), np.zeros_like(x)
    for t in range(x.shape[1]):
        for j in range(size):
            if t - j >= 0:
                y[:, t] += p["weight"][size - 1 - j] * x[:, t - j]
    return y + p.get("bias", 0.0)


def double(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def close(actual, desired, rtol=1e-10):
    """Error of each array relative to its largest entry."""
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert x.shape == y.shape
        assert np.isfinite(x).all()
        if x.size:
            assert np.abs(x - y).max() <= rtol * max(np.abs(y).max(), 1e-30), np.abs(x - y).max() / np.abs(y).max()


def make(module, batch=2, length=21, seed=0):
    """x [B, T, D] and variables, with every parameter moved so that none is at a special value."""
    x = jax.random.normal(jax.random.key(seed), (batch, length, module.features))
    variables = jax.jit(module.init)(jax.random.key(1), x)
    rng = np.random.default_rng(2)
    move = lambda p: jnp.asarray(p + 0.05 * rng.normal(size=p.shape) * (1 + np.abs(p)), jnp.float32)
    return x, jax.tree.map(move, double(variables))


def matches(module, reference):
    """The layer is `reference(params, x) -> (y, last state as a tree like the module's)`: in float64 to rounding, in
    float32 to 1e-5; so is its gradient finite and used by every parameter."""
    x, variables = make(module)
    want = reference(double(variables["params"]), double(x))
    apply = jax.jit(module.apply)
    y, state = apply(variables, x)
    assert y.dtype == jnp.float32
    close((y, state), want, rtol=1e-5)
    with jax.enable_x64():
        close(apply(double(variables), double(x)), want, rtol=1e-11)
    grads = jax.jit(jax.grad(lambda p: (module.apply(p, x)[0] ** 2).sum()))(variables)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert jnp.isfinite(g).all()
        assert g.any(), jax.tree_util.keystr(path)


def continues(module):
    """Pieces, a padded prefill, single steps and no step at all give what the whole gives."""
    x, variables = make(module, length=20)

    @jax.jit
    def run(x):
        whole = module.apply(variables, x)
        mask = jnp.ones((2, 16), bool).at[0, :3].set(False).at[1, jnp.array([1, 6, 15])].set(False)
        padded = jnp.full((2, 16, module.features), jnp.nan)
        for row in range(2):
            padded = padded.at[row, jnp.flatnonzero(mask[row], size=13)].set(x[row, :13])
        y, state = module.apply(variables, padded, mask=mask)
        first = jnp.stack([y[row, jnp.flatnonzero(mask[row], size=13)] for row in range(2)])
        at_padding = jnp.where(mask[..., None], 0, y)
        second, state = module.apply(variables, x[:, 13:17], state=state)
        parts = [first, second]
        for t in range(17, 20):
            y, state = module.apply(variables, x[:, t], state, method="step")
            parts.append(y[:, None])
        return whole, (jnp.concatenate(parts, 1), state), at_padding

    whole, parts, at_padding = run(x)
    close(parts, whole, rtol=1e-5)
    assert not at_padding.any()
    empty, state = module.apply(variables, x[:, :0], state=whole[1])
    assert empty.shape == (2, 0, module.features)
    close(state, whole[1])


def stays_finite(module):
    """Outputs and gradients for large, small and absent inputs; narrow types keep theirs and a float32 state."""
    x, variables = make(module, length=18)
    f = jax.jit(jax.value_and_grad(lambda v, x: jnp.abs(module.apply(v, x)[0].astype(jnp.float32)).mean(), (0, 1)))
    for scale in (1e4, 1e-4, 1e-30, 0.0):
        for leaf in jax.tree.leaves(f(variables, scale * x)):
            assert jnp.isfinite(leaf).all(), scale
    exact = jax.jit(module.apply)(variables, x)[0]
    for dtype in (jnp.bfloat16, jnp.float16):
        y, state = jax.jit(module.apply)(variables, x.astype(dtype))
        assert y.dtype == dtype
        assert all(s.dtype == jnp.float32 for s in jax.tree.leaves(state))
        close(y, exact, rtol=0.05)


def recurrence_equals(forms, arrays, plain, rtol=1e-10):
    """Outputs and gradients of each form(*arrays) -> tree equal those of autodiff through `plain`, in float64."""
    total = lambda f: lambda *a: (lambda out: (sum(jnp.sin(o).sum() for o in jax.tree.leaves(out)), out))(f(*a))
    with jax.enable_x64():
        arrays = jax.tree.map(jnp.asarray, arrays)
        numbers = tuple(range(len(arrays)))
        run = lambda f: jax.jit(jax.grad(total(f), argnums=numbers, has_aux=True))(*arrays)
        want = run(plain)
        for form in forms:
            close(run(form), want, rtol=rtol)
