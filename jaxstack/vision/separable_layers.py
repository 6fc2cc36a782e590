"""Separable layers as structured efficient linear substitutions: sizes, students and rivals.

Gray, Crowley and Storkey (2019, arXiv 1906.00859). The layer is `jaxstack.nn.vision.separable.SeparableConv`, the maps
are in `jaxstack.nn.structured`, and wide residual networks take them by `pointwise` and `size`. Here is what compares
them: a student taught by a teacher's attention, and the narrower dense net of as many parameters, the control that the
released log asks for.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxstack.core.errors import UserError
from jaxstack.core.learner import Learner
from jaxstack.nn import attention_transfer
from jaxstack.nn.attention_transfer import Hypers
from jaxstack.nn.supervised import Optimiser
from jaxstack.nn.vision.separable import crs_factors, labels
from jaxstack.nn.vision.wrn import WRN

Image = tuple[int, int, int]


def plain(module: WRN) -> WRN:
    """The same network with plain convolutions, the uncompressed one."""
    return module.clone(pointwise="", size=None, reference_compat=False)


def compression_ratio(module: WRN, channels: int = 3) -> float:
    """Parameters of a network over those of the uncompressed one, for images of so many channels."""
    return module.param_count(channels) / plain(module).param_count(channels)


def narrower(target: int, module: WRN, channels: int = 3) -> WRN:
    """Return the dense separable network of the smallest width, in 64ths, with at least as many parameters.

    It never has fewer, so that a structured map gains nothing by its size.

    Args:
        target: parameters of the structured network.
        module: a network of the same depth, whose width is the largest that is tried.
        channels: of the images.

    Raises:
        UserError: when the whole dense separable network has fewer.
    """
    dense = module.clone(pointwise="dense", size=None)
    for part in range(4, round(64 * module.width) + 1):
        found = dense.clone(width=part / 64)
        if found.param_count(channels) >= target:
            return found
    raise UserError(f"target={target}: expected at most {dense.param_count(channels)}, the dense separable network's")


def optimiser(module: WRN, channels: int = 3, scaled: bool = True) -> Optimiser:
    """SGD whose weight decay of structured maps is scaled by the compression ratio, or is that of all weights."""
    ratio = compression_ratio(module, channels) if scaled else 1.0
    return Optimiser("sgd", factors=lambda params: crs_factors(labels(params, module.reference_compat), ratio))


def student(
    module: WRN,
    image: Image,
    teacher: nn.Module | None = None,
    teachers: Any = None,
    *,
    transfer: bool = True,
    scaled: bool = True,
    hypers: Hypers = Hypers(),
    prepare: Callable[[Any], Any] = lambda x: x,
    **options: Any,
) -> Learner:
    """Make the learner of a network with structured maps.

    Args:
        module: the student.
        image: rows, columns and channels.
        teacher: the uncompressed network, or another with stages of the same sizes; None: the data holds its maps, see
            `attention_transfer.taught`.
        teachers: the teacher's variables, leaves [S, ...], one row per seed.
        transfer: whether the teacher's attention is in the loss; else labels alone, the weight `beta` is 0.
        scaled: whether the weight decay of structured maps is scaled by the compression ratio.
        hypers: default hyperparameters.
        prepare: inputs -> what the networks are given; runs inside the program.
        options: further arguments of `attention_transfer.taught`: num_updates, batch_size, source, ...
    """
    example = jnp.zeros((1, *image))
    tapped = lambda net: attention_transfer.with_taps(net, example, prepare)
    return attention_transfer.taught(
        tapped(module),
        None if teacher is None else tapped(teacher),
        teachers,
        hypers=hypers if transfer else hypers._replace(beta=0.0),
        optimiser=optimiser(module, image[2], scaled),
        name="separable-layers",
        **options,
    )
