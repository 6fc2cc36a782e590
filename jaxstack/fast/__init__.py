"""Forms that exist only because XLA's CPU backend runs them faster; tests hold each to its plain form.

| here | plain form |
|---|---|
| `batch_last.batch_last(f)` | `f` under `jax.vmap` |
| `packing.packing(tree, n)` | an optimiser on the tree itself |
| `packing.rows(tree)(index)` | `jax.tree.map(lambda x: x[index], tree)` |
| `noise.in_rows(draw, key, shape)` | `draw(key, shape)` |
| `shuffle.permutations(key, rows, n)` | `jax.vmap(lambda k: jax.random.permutation(k, n))`, other numbers |
| `products.product(x, kernel)` | `x @ kernel` |
| `products.FewRows(features)` | `flax.linen.Dense(features)` |
| `products.normalise(x)` | `flax.linen.LayerNorm(use_scale=False, use_bias=False)` |
"""
