import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack.fast.products import FewRows, normalise, product


@pytest.mark.parametrize("out", [1, 5, 16, 17])
def test_products_with_few_and_many_outputs_have_the_gradients_of_a_product(out):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((3, 7, 6), (3, 6, out), (3, 7, out))
    x, kernel, weight = (jax.random.normal(k, s) for k, s in zip(keys, shapes))
    loss = lambda f: lambda x, kernel: (weight * f(x, kernel)).sum()
    mine = jax.grad(loss(jax.vmap(product)), argnums=(0, 1))(x, kernel)
    plain = jax.grad(loss(jnp.matmul), argnums=(0, 1))(x, kernel)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), mine, plain)
    np.testing.assert_allclose(jax.vmap(product)(x, kernel), x @ kernel, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 6), (8, 6), (33, 6), (2, 3, 6)])
def test_layer_of_few_rows_is_a_dense_layer(shape):
    x = jax.random.normal(jax.random.key(0), shape)
    few, dense = FewRows(20), nn.Dense(20)
    params = few.init(jax.random.key(1), x)
    jax.tree.map(np.testing.assert_array_equal, params, dense.init(jax.random.key(1), x))
    params = jax.tree.map(lambda w: w + 0.1, params)
    grads = [
        jax.jit(jax.grad(lambda p, x, f=f: jnp.sin(f.apply(p, x)).sum(), argnums=(0, 1)))(params, x)
        for f in (few, dense)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *grads)


def test_normalise_is_a_layer_norm_with_its_first_and_second_gradients():
    x = 3 + 2 * jax.random.normal(jax.random.key(0), (2, 9, 24))
    weight = jax.random.normal(jax.random.key(1), x.shape)
    norm = nn.LayerNorm(epsilon=1e-5, use_scale=False, use_bias=False)
    loss = lambda f: lambda x: (weight * jnp.sin(f(x))).sum()
    bent = lambda f: lambda x: jnp.sin(jax.grad(loss(f))(x)).sum()
    plain = lambda x: norm.apply({}, x)
    for f in (lambda f: f, lambda f: jax.grad(loss(f)), lambda f: jax.grad(bent(f))):
        mine, theirs = jax.jit(f(normalise))(x), jax.jit(f(plain))(x)
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=2e-5)
    assert bool(jnp.isfinite(jax.grad(lambda x: normalise(x).sum())(jnp.full((2, 24), 1e4))).all())
