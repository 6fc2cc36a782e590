"""Knowledge transfer with a few images per class: the paper's KD+AT, VID, and what a zero-shot student gains by them.

The baselines of zero-shot knowledge transfer (`zero_shot_kt`), and its second half, in which a zero-shot student is
tuned on M images per class. All are supervised learning with a teacher in the loss.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.core.errors import UserError
from jaxstack.core.learner import Key, Learner
from jaxstack.core.source import Source
from jaxstack.data.sources import HostData
from jaxstack.nn import classifier as classifiers
from jaxstack.nn import supervised
from jaxstack.nn.attention_transfer import Outputs, attention_distance
from jaxstack.nn.conv import Conv
from jaxstack.nn.supervised import Model, Optimiser
from jaxstack.vision.zero_shot_kt import Net, belief_divergence, shapes


class FewShotHypers(NamedTuple):
    """Numeric hyperparameters: traced, so a sweep over them compiles once. Defaults are those of the released code."""

    lr: float = 0.1
    min_lr: float = 0.0
    weight_decay: float = 5e-4
    momentum: float = 0.9
    label_smoothing: float = 0.0
    alpha: float = 0.9
    """Share of the teacher against the labels."""
    temperature: float = 4.0
    beta: float = 1000.0
    """Weight of the attention of each of three stages."""
    vid_weight: float = 1.0
    """Weight of VID's stages."""


def labels_alone(outputs: Outputs, targets: tuple[Array, Any], hypers: Any) -> Array:
    """Cross entropy [B]: the baseline without a teacher."""
    return supervised.cross_entropy(outputs[0], targets[0], hypers)


def kd_at(outputs: Outputs, targets: tuple[Array, Outputs], hypers: Any) -> Array:
    """KD+AT [B]: (1 - a) CE + 2 a T^2 KL / C at temperature T + 3 beta / L times the distance of L stages' attentions.

    The released code's loss (Hinton et al., 2015; Zagoruyko and Komodakis, 2017), KL averaged over classes as there.
    """
    (logits, taps), (labels, (logits_t, taps_t)) = outputs, targets
    divergence = belief_divergence(logits_t, logits, hypers.temperature, "none") / logits.shape[-1]
    a = hypers.alpha
    value = (1.0 - a) * supervised.cross_entropy(logits, labels, hypers) + 2 * a * hypers.temperature**2 * divergence
    return value + 3 * hypers.beta / max(len(taps), 1) * attention_distance(taps_t, taps)


class Regressors(nn.Module):
    """VID's guesses of the teacher's stages from the student's: three 1x1 convolutions and a variance per channel."""

    channels: tuple[int, ...]
    """Of the teacher's stages."""

    @nn.compact
    def __call__(self, taps: Sequence[Array]) -> list[tuple[Array, Array]]:
        """Taps [B, H, W, K] -> (means [B, H, W, channels], variances [channels]) of each stage."""
        found, start = [], math.log(math.expm1(5.0))
        for n, (tap, width) in enumerate(zip(taps, self.channels)):
            one = functools.partial(Conv, width, (1, 1), use_bias=False)
            guess = one()(nn.relu(one()(nn.relu(one()(tap)))))
            raw = self.param(f"variance_{n}", nn.initializers.constant(start), (width,))
            found.append((guess, jax.nn.softplus(raw) + 1e-5))
        return found


def vid(outputs: Any, targets: tuple[Array, Outputs], hypers: Any) -> Array:
    """Variational information distillation [B] (Ahn et al., 2019): cross entropy plus, for each stage, the
    mean negative log likelihood of the teacher's activations under normal guesses."""
    (logits, _, guesses), (labels, (_, taps_t)) = outputs, targets
    value = supervised.cross_entropy(logits, labels, hypers)
    for (guess, variance), tap in zip(guesses, taps_t):
        each = 0.5 * (jnp.square(guess - tap) / variance + jnp.log(variance))
        value = value + hypers.vid_weight * each.reshape(len(each), -1).mean(-1)
    return value


def as_model(net: Net) -> Model:
    """A network as the supervised learner takes it; its outputs are (logits, taps)."""
    return Model(net.init, lambda v, x, key: net.apply(v, x, True), lambda v, x: net.apply(v, x, False)[0])


def with_regressors(net: Net, teacher: Net, image: tuple[int, int, int]) -> Model:
    """A network and VID's guesses of the teacher's stages, whose weights stand under "regressors"; outputs (logits,
    taps, guesses)."""
    taps_s, taps_t = (shapes(each, image)[1] for each in (net, teacher))
    regressors = Regressors(tuple(tap.shape[-1] for tap in taps_t))

    def init(key: Key) -> Any:
        k_net, k_guess = jax.random.split(key)
        start = net.init(k_net)
        guess = regressors.init(k_guess, [jnp.zeros(tap.shape) for tap in taps_s])
        return {**start, "params": {"net": start["params"], "regressors": guess["params"]}}

    def run(variables: Any, x: Array, train: bool) -> tuple[Any, Any]:
        params = variables["params"]
        (logits, taps), stats = net.apply({**variables, "params": params["net"]}, x, train)
        return (logits, taps, regressors.apply({"params": params["regressors"]}, taps)), stats

    return Model(init, lambda v, x, key: run(v, x, True), lambda v, x: run(v, x, False)[0])


def few_shot(
    teacher: Net,
    student: Net,
    image: tuple[int, int, int],
    teachers: Any,
    loss: Literal["labels", "kd+at", "vid"] = "kd+at",
    *,
    num_updates: int,
    batch_size: int,
    hypers: FewShotHypers = FewShotHypers(),
    start: Any = None,
    source: Callable[[Any], Source] | None = None,
    eval_source: Callable[[Any], Source] | None = None,
) -> Learner:
    """The learner of a student with labelled images, by SGD with momentum and a cosine.

    Args:
        teacher, student: networks.
        image: rows, columns, channels.
        teachers: the teacher's variables, leaves [S, ...], one row per seed.
        loss: "labels" takes no notice of the teacher, "kd+at" is the paper's baseline, "vid" that of Ahn et al.
        num_updates: of a whole run.
        batch_size: images per update.
        hypers: default hyperparameters.
        start: student's variables [S, ...] to start from, those of a zero-shot student; not with "vid".
        source: config -> batches (images, labels).
        eval_source: config -> `Batch`es of them.
    """
    losses: dict[str, Any] = {"labels": labels_alone, "kd+at": kd_at, "vid": vid}
    if loss not in losses:
        raise UserError(f"loss={loss!r}: expected one of {', '.join(losses)}")
    if loss == "vid" and start is not None:
        raise UserError("start: found variables of a student, loss='vid' expected none")
    model = with_regressors(student, teacher, image) if loss == "vid" else as_model(student)
    learner = supervised.supervised(
        model,
        losses[loss],
        {"accuracy": lambda outputs, targets, hypers: supervised.accuracy(outputs[0], targets, hypers)},
        Optimiser("sgd"),
        num_steps=num_updates,
        hypers=hypers,
        teacher=lambda variables, x: teacher.apply(variables, x, False)[0],
        teachers=teachers,
        name=f"few-shot {loss}",
        batch_size=batch_size,
        source=source,
        eval_source=eval_source,
        objective=("eval/accuracy", "max"),
    )
    if start is None:
        return learner

    def init(key: Key, hypers: Any, given: Any) -> Any:
        taught, (params, stats) = given
        return learner.init(key, hypers, taught)._replace(params=params, stats=stats)

    rest = {k: v for k, v in start.items() if k != "params"}
    return learner._replace(init=init, given=(teachers, (start["params"], rest)))


def few_images(labels: Any, count: int, seed: int) -> np.ndarray:
    """Places [C count] of `count` images of each class, drawn by seed without replacement.

    Raises:
        UserError: for a class that has fewer.
    """
    labels, rng, found = np.asarray(labels), np.random.default_rng(seed), []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if not 1 <= count <= len(rows):
            raise UserError(f"images per class: found {count}, expected 1 to {len(rows)}, those of class {label}")
        found.append(rng.choice(rows, count, replace=False))
    return np.concatenate(found)


def few_source(config: classifiers.Config, images: int, seeds: Sequence[int], batch_size: int) -> HostData:
    """Batches of a classifier's training images, of which each seed has `images` per class of its own.

    Args:
        config: says which images, and how they are moved.
        images: per class.
        seeds: of the run, which also draw the images.
        batch_size: rows without replacement, at most all there are.
    """
    x, y = classifiers.arrays(config, "train")
    rows = {seed: few_images(y, images, seed) for seed in seeds}

    def batch(step: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        size = min(batch_size, len(rows[seed]))
        own = np.random.default_rng((seed, step)).choice(rows[seed], size, replace=False)
        return x[own], y[own]

    return HostData(batch, per_seed=True, augment=functools.partial(moved, config))


def moved(config: classifiers.Config, key: Key, batch: Any) -> tuple[Array, Array]:
    """A batch (images uint8, labels) augmented as the config says, the images as the networks take them."""
    x, y = classifiers.augmented(config, key, batch)
    return classifiers.prepared(config, x), y
