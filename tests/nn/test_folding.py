"""Networks with folded BatchNorm give what they gave before, with random weights and statistics."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack.core.errors import UserError
from jaxstack.nn.conv import Conv
from jaxstack.nn.vision import zoo
from jaxstack.nn.vision.folding import fold_batchnorm
from jaxstack.nn.vision.layers import BatchNorm


def drawn(shapes, seed=0):
    """Variables of that form: kernels of variance 2 / fan in, scales and variances around 1, the rest around 0."""
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        name = path[-1].key
        if name in ("scale", "var"):
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32)
        spread = (2 / np.prod(leaf.shape[:-1])) ** 0.5 if name == "kernel" else 0.2
        return jnp.asarray(spread * rng.standard_normal(leaf.shape, np.float32))

    return jax.tree_util.tree_map_with_path(one, shapes)


# norms in all, and those that follow a layer which nothing else reads
NETWORKS = {
    "lenet": (0, 0),
    "wrn-10-1": (7, 3),
    "wrn-10-2 DConvA4 DConvG8 A16B2": (12, 9),
    "densenet-bc-10-4": (9, 3),
    "densenet121": (121, 59),
    "resnet-18": (20, 20),
    "resnet-50-imagenet": (53, 53),
    "vgg-16": (13, 13),
    "mobilenet-v1": (27, 27),
    "mobilenet-v2": (57, 57),
    "efficientnet-lite0": (49, 49),
}


@pytest.mark.parametrize("of", NETWORKS)
def test_folded_networks_give_the_same(of):
    name, *kinds = of.split()
    network = zoo.network(name, kinds=kinds or None)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 32, 32, 3)), jnp.float32)
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), x))
    variables = drawn(shapes)
    folded, fewer = fold_batchnorm(network, variables, x, taps=True)
    norms = {p[:-1] for p, _ in jax.tree_util.tree_flatten_with_path(variables.get("batch_stats", {}))[0]}
    assert (len(norms), len(folded.pairs)) == NETWORKS[of]
    left = jax.tree_util.tree_flatten_with_path(fewer["batch_stats"])[0]
    assert len({p[:-1] for p, _ in left}) == len(norms) - len(folded.pairs)
    before, taps = jax.jit(lambda v, x: network.apply(v, x, taps=True))(variables, x)
    after, others = jax.jit(lambda v, x: folded.apply(v, x, taps=True))(fewer, x)
    for a, b in zip((before, *taps), (after, *others)):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5 * float(jnp.abs(a).max()))
    assert float(jnp.abs(before).max()) > 1e-3


class Odd(nn.Module):
    """A norm whose layer is read twice, one with the statistics of the batch, one of a layer that is called twice, one
    of flax after a dense layer with a bias."""

    batch: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        y = Conv(4, name="shared")(x)
        x = BatchNorm(name="a")(y, train) + y
        x = BatchNorm(name="b")(Conv(4, name="own", groups=2)(x), self.batch)
        twice = Conv(4, name="twice")
        x = BatchNorm(name="c")(twice(twice(x)), train)
        x = nn.Dense(3, name="dense")(x.mean((1, 2)))
        return nn.BatchNorm(use_running_average=not train, use_scale=False, name="flax")(x)


def test_only_what_can_be_folded_is():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 5, 2)), jnp.float32)
    variables = drawn(jax.eval_shape(lambda: Odd().init(jax.random.key(0), x)))
    folded, fewer = fold_batchnorm(Odd(), variables, jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert set(folded.pairs) == {(("own",), ("b",)), (("dense",), ("flax",))}
    np.testing.assert_allclose(folded.apply(fewer, x), np.asarray(Odd().apply(variables, x)), rtol=1e-5, atol=1e-5)
    assert set(fewer["params"]) == {"shared", "a", "own", "twice", "c", "dense"}
    grads = jax.grad(lambda v: jnp.square(folded.apply(v, x)).sum())(fewer)
    assert float(jnp.abs(grads["params"]["own"]["bias"]).max()) > 0
    folded, _ = fold_batchnorm(Odd(batch=True), variables, x, mutable=["batch_stats"])
    assert set(folded.pairs) == {(("dense",), ("flax",))}
    with pytest.raises(UserError, match="found a network with folded BatchNorm"):
        folded.apply(fewer, x, True)
    with pytest.raises(UserError, match="train=True: expected inference"):
        fold_batchnorm(Odd(), variables, x, train=True)
