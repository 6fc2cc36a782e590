"""The best weights on held-out rows are kept, and Adam's weight decay is PyTorch's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxstack.core import runner
from jaxstack.data.sources import SplitData
from jaxstack.nn import optimisers
from jaxstack.nn.best import Checked, keep_best
from jaxstack.nn.supervised import Hypers, Optimiser, linen, squared_error, supervised, variables

X = np.ones((8, 1), np.float32)


def learner(steps):
    """w goes from 0 towards 4 by 0.5 at a step; held-out rows want 1."""
    net = nn.Dense(1, use_bias=False, kernel_init=nn.initializers.zeros)
    model = linen(net, X[:1], flags=lambda train: {})
    made = supervised(
        model,
        squared_error,
        optimiser=Optimiser("sgd", "constant", decay=None),
        num_steps=steps,
        hypers=Hypers(lr=0.0625, momentum=0.0, weight_decay=0.0),
        source=lambda config: Checked((X, 4 * X), (X, X), 4, every=2),
        eval_source=lambda config: SplitData((X, X), 8),
        batch_size=4,
    )
    return keep_best(made, lambda given, held: -jnp.abs(model.apply(given, held[0]) - held[1]).mean())


def test_the_best_weights_are_kept_and_evaluated():
    result = runner.train(learner(12), seeds=2, progress=False)
    path = 4.0 * (1.0 - 0.875 ** np.arange(13))  # w <- w + 0.125 (4 - w)
    looked = path[2::2]
    best = looked[np.abs(looked - 1.0).argmin()]
    np.testing.assert_allclose(variables(result.state)["params"]["kernel"].ravel(), best, rtol=1e-5)
    np.testing.assert_allclose(result.state.params["kernel"].ravel(), path[-1], rtol=1e-5)
    np.testing.assert_allclose(result.state.best, -abs(best - 1.0), rtol=1e-5)
    np.testing.assert_allclose(result.metrics["eval/loss"].dropna(), (best - 1.0) ** 2, rtol=1e-4)


def test_before_the_first_look_they_are_the_last_ones():
    result = runner.train(learner(1), seeds=1, progress=False)
    np.testing.assert_allclose(variables(result.state)["params"]["kernel"], result.state.params["kernel"])
    assert float(result.state.params["kernel"].ravel()[0]) == 0.5
    assert bool(jnp.isneginf(result.state.best[0]))


def test_adam_has_the_decay_in_the_gradient():
    rng = np.random.default_rng(0)
    p, grads = rng.normal(size=3), rng.normal(size=(4, 3))
    rule = optimisers.adam(lambda step: jnp.float32(0.1), weight_decay=0.5)
    params, state = jnp.asarray(p, jnp.float32), rule.init(jnp.asarray(p, jnp.float32))
    m = v = np.zeros(3)
    for t, g in enumerate(grads, 1):
        updates, state = rule.update(jnp.asarray(g, jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
        g = g + 0.5 * p
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        p = p - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    np.testing.assert_allclose(params, p, rtol=1e-4)
    decoupled = optimisers.adamw(lambda step: jnp.float32(0.1), weight_decay=0.5)
    other, _ = decoupled.update(jnp.asarray(grads[0]), decoupled.init(params), params)
    assert not np.allclose(other, jax.tree.map(np.asarray, updates))
