import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxstack.core import groups
from jaxstack.fast import packing

TREE = {
    "w": jnp.arange(6.0).reshape(2, 3),
    "big": jnp.arange(4096.0).reshape(64, 64),
    "b": jnp.array(7.0),
    "n": jnp.arange(3),
    "half": jnp.ones(2, jnp.bfloat16),
}


@pytest.mark.parametrize(("samples", "size"), [(100, 7), (1000, 4103)])
def test_packing_keeps_all_leaves_and_leaves_large_and_other_types_alone(samples, size):
    pack = packing.packing(TREE, samples)
    packed = pack.pack(TREE)
    assert packed.small.shape == (size,)
    assert {x.dtype for x in packed.large} >= {jnp.dtype("int32"), jnp.dtype("bfloat16")}
    for name, x in pack.unpack(packed).items():
        np.testing.assert_array_equal(x, TREE[name])
        assert (x.dtype, x.shape) == (TREE[name].dtype, TREE[name].shape)


@pytest.mark.parametrize("tree", [{}, {"n": jnp.arange(3)}, jnp.ones((2, 2)), {"only": jnp.float32(2.0)}])
def test_packing_of_trees_with_little_to_pack(tree):
    pack = packing.packing(tree, 1)
    jax.tree.map(np.testing.assert_array_equal, pack.unpack(pack.pack(tree)), tree)


@pytest.mark.parametrize("samples", [100, 1000])
def test_an_optimiser_takes_the_same_steps_on_packed_parameters(samples):
    params = {"a": jax.random.normal(jax.random.key(0), (5, 7)), "b": [jnp.ones(7), jnp.ones((64, 64))]}
    tx = optax.chain(optax.clip_by_global_norm(0.5), optax.scale_by_adam(), optax.scale_by_learning_rate(1e-2))
    loss = lambda p, t: sum(jnp.sum(jnp.sin(x + t) ** 2) for x in jax.tree.leaves(p))
    pack = packing.packing(params, samples)
    plain, opt, packed, packed_opt = params, tx.init(params), pack.pack(params), pack.pack_in(tx.init(params))
    shapes = [x.shape for x in jax.tree.leaves(packed_opt)]
    assert shapes.count(packed.small.shape) == 2  # both moments
    for t in range(5):
        grads = jax.grad(loss)(plain, float(t))
        updates, opt = tx.update(grads, opt, plain)
        plain = optax.apply_updates(plain, updates)
        grads = pack.pack(jax.grad(loss)(pack.unpack(packed), float(t)))
        updates, packed_opt = tx.update(grads, packed_opt, packed)
        packed = optax.apply_updates(packed, updates)
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6)
    jax.tree.map(close, pack.unpack(packed), plain)
    jax.tree.map(close, pack.unpack_in(packed_opt), opt)


def test_groups_are_clipped_and_packed_each_by_itself():
    """Against one optimiser for each group on its own rows of the tree."""
    params = {"a": jax.random.normal(jax.random.key(0), (3, 5, 7)), "b": [jnp.ones((3, 7)), jnp.ones((3, 64, 64))]}
    chain = lambda clip: optax.chain(clip(0.5), optax.scale_by_adam(), optax.scale_by_learning_rate(1e-2))
    tx, one = chain(groups.clip_by_norms), chain(optax.clip_by_global_norm)
    size = jnp.array([1e-4, 1.0, 1e4])  # below and above the norm to which gradients are clipped
    loss = lambda p, size: sum(jnp.sum((jnp.sin(x).reshape(len(x), -1) ** 2).sum(1) * size) for x in jax.tree.leaves(p))
    grad = jax.jit(jax.grad(loss))
    pack = packing.packing(params, 100, groups=3)
    packed, opt = pack.pack(params), pack.pack_in(tx.init(params))
    assert packed.small.shape == (3, 5 * 7 + 7)
    jax.tree.map(np.testing.assert_array_equal, pack.unpack(packed), params)
    plain, plain_opt = params, jax.vmap(one.init)(params)
    for _ in range(3):
        updates, opt = tx.update(pack.pack(grad(pack.unpack(packed), size)), opt, packed)
        packed = optax.apply_updates(packed, updates)
        updates, plain_opt = jax.vmap(one.update)(grad(plain, size), plain_opt, plain)
        plain = optax.apply_updates(plain, updates)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6), pack.unpack(packed), plain)
    bad = groups.clip_by_norms(0.5).update({"x": jnp.array([[3.0, 4.0], [jnp.inf, 0.0]])}, optax.EmptyState())[0]["x"]
    np.testing.assert_allclose(bad[0], [0.3, 0.4], rtol=1e-6)


def test_rows_are_those_of_each_leaf_to_the_bit():
    key = jax.random.split(jax.random.key(0), 4)
    shared = jax.random.normal(key[0], (9, 2))
    tree = {
        "float": shared.at[3, 0].set(jnp.nan).at[4, 1].set(-0.0),
        "int": jnp.array([0, 1, -1, 2**31 - 1, -(2**31), 5, 8388608, 2139095041, 3]),  # as floats: tiny, NaN
        "uint": jnp.arange(9, dtype=jnp.uint32)[:, None] + jnp.uint32(2**31),
        "bool": jax.random.bernoulli(key[1], shape=(9, 3, 2)),
        "flag": jnp.arange(9) % 2 == 0,
        "wide": jax.random.normal(key[2], (9, packing.NARROW + 1)),
        "byte": jnp.arange(9, dtype=jnp.uint8),
        "twice": (shared, shared),
        "none": None,
    }
    index = jnp.array([8, 3, 3, 0, 4])
    take = jax.jit(lambda tree, index: packing.rows(tree)(index))
    for got, want in zip(jax.tree.leaves(take(tree, index)), jax.tree.leaves(tree), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(np.asarray(got).view(np.uint8), np.asarray(want[index]).view(np.uint8))
