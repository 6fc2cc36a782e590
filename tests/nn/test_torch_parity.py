"""Networks compute what PyTorch, torchvision and timm computed with the same weights (scripts/parity_torch.py).

Outputs are compared in float32, as networks are used. Gradients are compared in float64: in float32 a ReLU whose input
is zero up to rounding changes them by more than the tolerance.
"""

import importlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack.nn.torch_weights import from_torch, to_torch

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))
parity = importlib.import_module("parity_torch")
sys.path.remove(str(SCRIPTS))

QUICK = ("lenet", "wrn-16-2", "densenet-bc-22-12")
"""Whose gradients are compared in every run; those of the others by `make test-slow`."""
TWICE = ("resnet-34-imagenet", "mobilenet-v3-large torch", "efficientnet-b0 tf")
"""Other depths and forms of networks that are compared in every run."""


def marked(name, often):
    return name if often else pytest.param(name, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def recorded():
    with np.load(parity.OUT, allow_pickle=False) as file:
        return dict(file)


def prepared(name, dtype=jnp.float32):
    network, shapes, names = parity.shapes_of(name)
    variables = from_torch(network, parity.weights_of(names), shapes, name)
    x = parity.images_of(name).transpose(0, 2, 3, 1)
    return network, jax.tree.map(lambda v: jnp.asarray(v, dtype), variables), jnp.asarray(x, dtype)


def close(found, wanted, tolerance):
    """The largest difference is at most so many of the largest value."""
    assert float(np.abs(np.asarray(found) - wanted).max(initial=0.0)) <= tolerance * np.abs(wanted).max(initial=0.0)


@pytest.mark.parametrize("name", [marked(name, name not in TWICE) for name in parity.NETWORKS])
def test_outputs_and_statistics_are_those_of_pytorch(name, recorded):
    network, variables, x = prepared(name)

    @jax.jit
    def run(variables, x):
        trained = network.apply(variables, x, True, mutable=[k for k in variables if k != "params"])
        return network.apply(variables, x), trained

    evaluated, (trained, changed) = run(variables, x)
    close(evaluated, recorded[f"{name}/eval"], 1e-5)
    close(trained, recorded[f"{name}/train"], 1e-4)
    close(parity.statistics(to_torch(network, changed)), recorded[f"{name}/statistics"], 1e-4)


@pytest.mark.parametrize("name", [marked(name, name in QUICK) for name in parity.NETWORKS])
def test_gradients_are_those_of_pytorch(name, recorded):
    weigh = parity.numbers("loss", (parity.IMAGES, parity.CLASSES))
    with jax.enable_x64(True):
        network, variables, x = prepared(name, jnp.float64)
        others = [k for k in variables if k != "params"]

        @jax.jit
        def gradients(variables, x):
            of = lambda params: network.apply({**variables, "params": params}, x, True, mutable=others)[0]
            return jax.grad(lambda params: (of(params) * weigh).sum())(variables["params"])

        found = parity.digests(to_torch(network, {"params": gradients(variables, x)}))
    wanted = recorded[f"{name}/gradients"]
    norms = np.maximum(wanted[:, 0], 1e-6 * wanted[:, 0].max())  # biases before BatchNorm have a gradient of zero
    assert float((np.abs(found - wanted) / norms[:, None]).max()) <= 1e-3


def test_the_file_is_small_and_says_what_made_it(recorded):
    assert parity.OUT.stat().st_size < 300_000
    assert '"torch"' in str(recorded["versions"])
    assert {k.split("/")[0] for k in recorded if "/" in k} == set(parity.NETWORKS)
