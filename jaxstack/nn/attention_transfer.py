"""Attention transfer: a student learns labels, and to look where its teacher looks.

Zagoruyko and Komodakis, ICLR 2017 (arXiv 1612.03928). A stage's attention map is the mean over channels of its squared
activations, so teacher and student may differ in widths, but not in the pixels of their stages.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxstack.core.errors import UserError
from jaxstack.core.learner import Learner
from jaxstack.core.source import Source
from jaxstack.nn import supervised
from jaxstack.nn.supervised import Model, Optimiser

Outputs = tuple[Array, tuple[Array, ...]]
"""Logits [B, C], and the outputs [B, H, W, K] of the stages whose attention is compared, first one first."""


class Hypers(NamedTuple):
    """Numeric hyperparameters: traced, so a sweep over them compiles once."""

    lr: float = 0.1
    min_lr: float = 0.0
    weight_decay: float = 5e-4
    momentum: float = 0.9
    label_smoothing: float = 0.0
    beta: float = 1000.0
    """Weight of the attention of each of three stages; 0: labels alone."""


def attention_map(activation: Array) -> Array:
    """Where a stage looks: mean over channels of squared activations [B, H, W, K], as unit vectors [B, H W].

    A map of zeros stays one.
    """
    energy = jnp.square(activation).mean(-1).reshape(len(activation), -1)
    return energy * lax.rsqrt(jnp.maximum(jnp.square(energy).sum(-1, keepdims=True), 1e-24))


def attention_maps(taps: Sequence[Array]) -> tuple[Array, ...]:
    """The map of each stage."""
    return tuple(attention_map(tap) for tap in taps)


def map_distance(maps_t: Sequence[Array], maps_s: Sequence[Array]) -> Array:
    """Mean squared difference of two networks' maps [B, H W] for each image, summed over stages: [B].

    Raises:
        UserError: for networks with other numbers of stages, or stages of other sizes.
    """
    sizes_t, sizes_s = ([m.shape[1] for m in maps] for maps in (maps_t, maps_s))
    if sizes_t != sizes_s:
        raise UserError(f"attention: found stages of {sizes_s} pixels in the student, expected the teacher's {sizes_t}")
    return sum((jnp.square(s - t).mean(-1) for t, s in zip(maps_t, maps_s)), jnp.float32(0.0))


def attention_distance(taps_t: Sequence[Array], taps_s: Sequence[Array]) -> Array:
    """Mean squared difference of the attention maps of each image [B], summed over stages.

    Raises:
        UserError: for networks with other numbers of stages, or stages of other sizes.
    """
    sizes_t, sizes_s = ([tuple(tap.shape[1:3]) for tap in taps] for taps in (taps_t, taps_s))
    if sizes_t != sizes_s:
        raise UserError(f"attention: found stages of {sizes_s} pixels in the student, expected the teacher's {sizes_t}")
    return map_distance(attention_maps(taps_t), attention_maps(taps_s))


def attention_transfer_loss(taps_t: Sequence[Array], taps_s: Sequence[Array]) -> Array:
    """Mean over images of `attention_distance`; zero for stages, or networks, without taps."""
    return jnp.mean(attention_distance(taps_t, taps_s))


def attention_weight(image: tuple[int, int, int], of_32: float = 250.0) -> float:
    """The weight of the attention for images of other sizes than 32x32, for which it is `of_32`.

    A mean over the squared differences of unit vectors falls as their length, the number of pixels, grows.
    """
    return of_32 * image[0] * image[1] / 32**2


def labels_and_maps(outputs: Outputs, targets: tuple[Array, Sequence[Array]], hypers: Any) -> Array:
    """CE + 3 beta / L times the distance of L stages' maps [B].

    Args:
        outputs: of the student.
        targets: labels [B] and the teacher's maps [B, H W].
        hypers: with `beta` and `label_smoothing`.
    """
    (logits, taps), (labels, maps) = outputs, targets
    distance = map_distance(maps, attention_maps(taps))
    return supervised.cross_entropy(logits, labels, hypers) + 3 * hypers.beta / max(len(taps), 1) * distance


def with_taps(module: nn.Module, example: Any, prepare: Callable[[Any], Any] = lambda x: x) -> Model:
    """A network of `jaxstack.nn.vision` as a `Model` whose outputs are (logits, taps).

    Args:
        module: unbound, called as `module(x, train, taps=True)` -> `Outputs`.
        example: inputs [1, ...] of the shape and type that it is trained with.
        prepare: inputs -> what the module is given; runs inside the program.
    """
    return supervised.linen(module, example, flags=lambda train: {"train": train, "taps": True}, prepare=prepare)


def taught(
    student: Model,
    teacher: Model | None = None,
    teachers: Any = None,
    *,
    num_updates: int,
    batch_size: int,
    hypers: Hypers = Hypers(),
    optimiser: Optimiser = Optimiser("sgd"),
    config: Any = None,
    name: str = "attention-transfer",
    source: Callable[[Any], Source] | None = None,
    eval_source: Callable[[Any], Source] | None = None,
) -> Learner:
    """The learner of a student that a frozen teacher shows where to look.

    Args:
        student: see `with_taps`.
        teacher: likewise; None: the targets in the data are (labels, maps of a teacher), so that it need not be asked
            in each update.
        teachers: the teacher's variables, leaves [S, ...], one row per seed.
        num_updates: of a whole run.
        batch_size: images per update.
        hypers: default hyperparameters.
        optimiser: kind and schedule.
        config: given to the sources.
        name: of the method.
        source: config -> batches (images, labels).
        eval_source: config -> `Batch`es of them.
    """
    asked = None if teacher is None else lambda variables, x: attention_maps(teacher.apply(variables, x)[1])
    return supervised.supervised(
        student,
        labels_and_maps,
        {"accuracy": lambda outputs, targets, hypers: supervised.accuracy(outputs[0], targets, hypers)},
        optimiser,
        num_steps=num_updates,
        hypers=hypers,
        teacher=asked,
        teachers=teachers,
        config=config,
        name=name,
        batch_size=batch_size,
        source=source,
        eval_source=eval_source,
        objective=("eval/accuracy", "max"),
    )
