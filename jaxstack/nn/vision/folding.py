"""BatchNorm folded into the layers before it, for inference: fewer operations, equal outputs up to rounding.

A BatchNorm with running statistics is y = a x + b per channel. Where x is what a convolution or dense layer gives, and
nothing else reads x, the layer can have the kernel times a and the bias b (plus a times its own). Which layers these
are is read from the network's program, so any flax module can be folded: all norms of a ResNet, VGG or MobileNet, in
pre-activation networks those between two convolutions.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Literal

from jaxstack.core.errors import UserError
from jaxstack.nn.conv import Conv
from jaxstack.nn.vision.layers import BatchNorm

LAYERS = (Conv, nn.Conv, nn.Dense)
NORMS = (BatchNorm, nn.BatchNorm)
Path = tuple[str, ...]


class Folded(NamedTuple):
    """A network of which some norms are folded; its variables are those that `fold_batchnorm` returns."""

    network: nn.Module
    pairs: tuple[tuple[Path, Path], ...]
    """(layer, norm) of each norm that is gone, as paths of names."""

    def apply(self, variables: Mapping[str, Any], x: Any, train: bool = False, **options: Any) -> Any:
        """Apply the network, for inference.

        Args:
            variables: Of `fold_batchnorm`.
            x: As of the network.
            train: False.
            **options: Further ones of the network.

        Raises:
            UserError: For `train`: what is folded has no statistics of a batch.
        """
        if train:
            raise UserError("train=True: found a network with folded BatchNorm, expected the one that it was made from")
        layers, norms = (set(paths) for paths in zip(*self.pairs)) if self.pairs else (set(), set())

        def intercept(call: Any, args: tuple, kwargs: dict, context: Any) -> Any:
            module = context.module
            if context.method_name != "__call__" or module.path not in layers | norms:
                return call(*args, **kwargs)
            if module.path in norms:
                return args[0]
            out = call(*args, **kwargs)
            return out if module.use_bias else out + module.get_variable("params", "bias")

        with nn.intercept_methods(intercept):
            return self.network.apply(variables, x, **options)


def fold_batchnorm(
    network: nn.Module, variables: Mapping[str, Any], x: Any, **options: Any
) -> tuple[Folded, dict[str, Any]]:
    """Fold the BatchNorms of a network into the layers before them, where nothing else reads what the layer gives.

    Args:
        network: Any flax module that is called with images and, where it has it, without `train`.
        variables: Its `params` and `batch_stats`.
        x: Images, or their shape as `jax.ShapeDtypeStruct`.
        **options: Of the call, such as `taps=True` where these are wanted from the folded network.

    Returns:
        The folded network and its variables.

    Raises:
        UserError: For `train`.
    """
    if options.get("train"):
        raise UserError("train=True: expected inference, in which BatchNorm has its running statistics")
    norms: dict[str, Any] = {}

    def mark(call: Any, args: tuple, kwargs: dict, context: Any) -> Any:
        module, name = context.module, "/".join(context.module.path)
        if context.method_name != "__call__" or type(module) not in (*LAYERS, *NORMS):
            return call(*args, **kwargs)
        if type(module) in NORMS:
            if not _is_affine(module, args, kwargs):
                return call(*args, **kwargs)
            norms[name] = module
            return call(checkpoint_name(args[0], f"norm:{name}"), *args[1:], **kwargs)
        return checkpoint_name(call(*args, **kwargs), f"layer:{name}")

    def program(variables: Any, x: Any) -> Any:
        with nn.intercept_methods(mark):
            return network.apply(variables, x, **options)

    found = _pairs(jax.make_jaxpr(program)(variables, x).jaxpr)
    params: dict[Path, Any] = flatten_dict(dict(variables["params"]))  # pyright: ignore[reportAssignmentType]
    stats: dict[Path, Any] = flatten_dict(dict(variables.get("batch_stats", {})))  # pyright: ignore
    for layer, norm in found:
        module = norms["/".join(norm)]
        mean, var = stats.pop((*norm, "mean")), stats.pop((*norm, "var"))
        factor = params.pop((*norm, "scale"), jnp.ones_like(mean)) * jax.lax.rsqrt(var + module.epsilon)
        shift = params.pop((*norm, "bias"), jnp.zeros_like(mean)) - mean * factor
        params[(*layer, "kernel")] = params[(*layer, "kernel")] * factor  # output channels are the last axis
        params[(*layer, "bias")] = params.get((*layer, "bias"), jnp.zeros_like(mean)) * factor + shift
    folded = {**variables, "params": unflatten_dict(params), "batch_stats": unflatten_dict(stats)}
    return Folded(network, tuple(found)), folded


def _is_affine(module: Any, args: tuple, kwargs: dict) -> bool:
    """Whether a call of a norm uses running statistics, over the last axis."""
    if isinstance(module, BatchNorm):
        return not (args[1] if len(args) > 1 else kwargs.get("train", False))
    given = args[1] if len(args) > 1 else kwargs.get("use_running_average")
    return bool(module.use_running_average if given is None else given) and module.axis == -1


def _pairs(jaxpr: Any) -> list[tuple[Path, Path]]:
    """(layer, norm) where the norm is all that reads what the layer gives, and both are called once."""
    readers: dict[Any, list[Any]] = {}
    names: dict[str, int] = {}
    for eqn in jaxpr.eqns:
        for v in eqn.invars:
            if not isinstance(v, Literal):
                readers.setdefault(v, []).append(eqn)
        name = eqn.params.get("name") if eqn.primitive.name == "name" else None
        if name is not None:
            names[name] = names.get(name, 0) + 1
    for v in jaxpr.outvars:
        if not isinstance(v, Literal):
            readers.setdefault(v, []).append(None)
    found = []
    for eqn in jaxpr.eqns:
        name = str(eqn.params.get("name")) if eqn.primitive.name == "name" else ""
        own = readers.get(eqn.outvars[0], []) if name.startswith("layer:") else []
        if len(own) != 1 or own[0] is None or own[0].primitive.name != "name":
            continue
        reader = str(own[0].params["name"])
        if reader.startswith("norm:") and names[name] == names[reader] == 1:
            found.append(
                (tuple(name.removeprefix("layer:").split("/")), tuple(reader.removeprefix("norm:").split("/")))
            )
    return found
