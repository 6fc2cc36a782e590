"""A vmap with the batch in the last axis equals jax.vmap, for each kind of operation and for brax' physics."""

import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack import envs
from jaxstack.envs.brax import adapter, fast
from jaxstack.fast.batch_last import batch_last

B = 5
X = jax.random.normal(jax.random.key(0), (B, 4, 3))
TABLE = jnp.arange(12.0).reshape(4, 3)
PARENT = np.array([-1, 0, 0, 2])

CASES = {
    "elementwise, broadcast": lambda x: jnp.where(x > 0, jnp.sqrt(jnp.abs(x)), x**2) + TABLE * 2 - x[:, :1],
    "integers and flags": lambda x: (
        jnp.round(x).astype(jnp.int32) % 3,
        jnp.any(x > 1, axis=1),
        jnp.argmax(x, axis=-1),
    ),
    "sums": lambda x: (x.sum(), x.sum(0), jnp.cumsum(x, axis=1), jnp.max(x, axis=(0, 1))),
    "shapes": lambda x: jnp.tile(jnp.flip(x.reshape(2, 6).T, 0), (2, 1))[1:7:2],
    "pad and split": lambda x: (jnp.pad(x, ((1, 0), (0, 2)), constant_values=3.0), jnp.split(x, 2, axis=0)),
    "stack and concatenate": lambda x: jnp.concatenate([jnp.stack([x[:, 1], x[:, 0]], axis=1), TABLE], axis=1),
    "products": lambda x: (
        x @ x.T,
        jnp.einsum("ij,ik->jk", x, TABLE),
        jax.vmap(jnp.dot)(x, TABLE),
        jnp.cross(x, TABLE),
    ),
    "a long product": lambda x: x.reshape(12) @ jnp.ones((12, 2)),
    "rows": lambda x: (x[np.array([3, 0, 1, 1])], jnp.take(x, np.array([[2], [2]]), axis=0), jnp.take(x, 1, axis=0)),
    "many rows": lambda x: jnp.take(x, np.arange(80) * 3 % 4, axis=0),
    "other gathers": lambda x: (jnp.take(x, np.array([2, 0]), axis=1), x[np.array([0, 1]), np.array([2, 1])]),
    "rows by data": lambda x: x[jnp.argmax(x[:, 0])],
    "scattered rows": lambda x: jnp.zeros((4, 3)).at[np.array([1, 1, 3, 1])].add(x),
    "rows to nowhere are dropped": lambda x: jax.ops.segment_sum(x, jnp.asarray(PARENT + 7 * (PARENT < 0)), 4),
    "scattered by data": lambda x: jnp.zeros(4).at[jnp.argmax(x[:, 0])].set(1.0),
    "sort": lambda x: jnp.sort(x, axis=0),
    "random numbers": lambda x: x + jax.random.normal(jax.random.key(3), (3,)),
    "cond": lambda x: jax.lax.cond(x[0, 0] > 0, lambda y: y * 2, lambda y: y - 1, x),
    "while": lambda x: jax.lax.while_loop(lambda c: c.sum() < 20, lambda c: c + jnp.abs(x) + 0.1, x),
    "scan": lambda x: jax.lax.scan(lambda c, row: (c + jnp.sin(row), (c[0], jnp.float32(2))), TABLE[0], x),
    "scan over constants": lambda x: jax.lax.scan(lambda c, row: (jnp.tanh(c @ x.T @ x) + row, row), x[0], TABLE),
    "jit inside": lambda x: jax.jit(lambda y: jnp.linalg.norm(y, axis=-1))(x),
    "no batch in the result": lambda x: TABLE.sum(0),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_vmap(name: str):
    """Up to the order of sums: float32."""
    f = CASES[name]
    chex.assert_trees_all_close(jax.jit(jax.vmap(batch_last(f)))(X), jax.jit(jax.vmap(f))(X), rtol=2e-5, atol=1e-5)


def test_without_vmap_it_is_the_function():
    f = CASES["products"]
    chex.assert_trees_all_equal(batch_last(f)(X[0]), f(X[0]))


def test_to_the_bit_where_nothing_is_summed():
    f = lambda x: jnp.concatenate([x[:, 1:] * x[:, :1], jnp.exp(x)], axis=1)
    chex.assert_trees_all_equal(jax.vmap(batch_last(f))(X), jax.vmap(f)(X))


def test_batch_axes_nested_and_missing():
    """Seeds over environments; operands without a batch; pytrees in and out."""
    f = lambda tree, w: {"y": tree["x"] @ w["w"], "z": w["w"].sum(0)}
    w = {"w": jax.random.normal(jax.random.key(1), (3, 2))}
    axes = ({"x": 0}, None)
    seeds = jnp.stack([X, X + 1])
    for inner in (axes, ({"x": 1}, None)):
        tree = {"x": X if inner == axes else jnp.moveaxis(X, 0, 1)}
        chex.assert_trees_all_close(jax.vmap(batch_last(f), inner)(tree, w), jax.vmap(f, inner)(tree, w), rtol=1e-5)
    both = lambda g: jax.vmap(jax.vmap(g, axes), ({"x": 0}, None))({"x": seeds}, w)
    chex.assert_trees_all_close(both(batch_last(f)), both(f), rtol=1e-5)


def test_derivatives_are_those_of_the_function():
    f = lambda x: jnp.sum(jnp.cross(x, TABLE)[1:] @ jnp.sin(x).T)
    g = batch_last(f)
    over = lambda h: jax.grad(lambda x: jax.vmap(h)(x).sum())(X)
    chex.assert_trees_all_close(over(g), over(f), rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(jax.vmap(jax.grad(g))(X), jax.vmap(jax.grad(f))(X), rtol=1e-4, atol=1e-5)
    tangent = lambda h: jax.jvp(jax.vmap(h), (X,), (jnp.cos(X),))
    chex.assert_trees_all_close(tangent(g), tangent(f), rtol=1e-4, atol=1e-4)


def test_divisions_by_one_stay_and_small_products_are_written_out():
    """The form that makes it fast: no product is left, and what a concatenation gives is divided by a hidden one."""
    text = str(jax.make_jaxpr(jax.vmap(batch_last(lambda x: jnp.concatenate([x @ x.T, x], axis=1))))(X))
    assert "dot_general" not in text
    assert text.count(" div ") == 2
    assert "optimization_barrier" in text


@pytest.mark.parametrize("backend", fast.BACKENDS)
def test_physics_equals_brax(backend: str):
    """A robot with contacts and joint limits, 25 steps from one start: each step from the library's own state."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from brax import envs as brax_envs

        library = brax_envs.get_environment("hopper", backend=backend)
    ours = envs.make("brax/hopper", backend=backend).lib
    start = jax.jit(jax.vmap(library.reset))(jax.random.split(jax.random.key(0), 3)).pipeline_state
    actions = jax.random.uniform(jax.random.key(1), (25, 3, 3), minval=-1, maxval=1)

    def both(state, action):
        theirs = jax.vmap(library.pipeline_step)(state, action)
        return theirs, (theirs, jax.vmap(ours.pipeline_step)(state, action))

    theirs, mine = jax.jit(lambda s: jax.lax.scan(both, s, actions))(start)[1]
    assert float(jnp.ptp(theirs.x.pos[:, 0, 0, 2])) > 0.01, "it fell and touched the ground"
    chex.assert_trees_all_close(mine.x, theirs.x, rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_close(mine.xd, theirs.xd, rtol=1e-2, atol=2e-2)


def test_only_where_it_gains():
    lib = adapter._library("inverted_pendulum", "generalized", ())
    assert "pipeline_step" not in vars(lib)
    assert "pipeline_step" in vars(envs.make("jaxmarl/hopper_3x1").lib.env)
