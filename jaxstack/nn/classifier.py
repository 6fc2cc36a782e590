"""A classifier of images: an MLP or a small convolutional network, SGD or AdamW, dropout, BatchNorm, averaged weights.

Data sets: `digits` (scikit-learn's, 8x8 pixels). Training images are moved by up to `shift` pixels; the validation part
is evaluated, the test part with `eval_split="test"`.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxstack.core import config as configs
from jaxstack.core.config import require, require_at_least, require_unit
from jaxstack.core.learner import Key, Learner
from jaxstack.core.source import Source
from jaxstack.data.digits import digits
from jaxstack.data.sources import ArrayData, SplitData
from jaxstack.nn.conv import Conv
from jaxstack.nn.optimisers import Schedule
from jaxstack.nn.supervised import Optimiser, accuracy, cross_entropy, linen, supervised

CLASSES, SHAPE, LARGEST = 10, (8, 8, 1), 16.0


class Hypers(NamedTuple):
    """Numeric hyperparameters: traced, so a sweep over them compiles once."""

    lr: float = 0.1
    min_lr: float = 0.0
    weight_decay: float = 5e-4
    momentum: float = 0.9
    b1: float = 0.9
    b2: float = 0.999
    max_grad_norm: float = 1.0
    label_smoothing: float = 0.0
    ema_decay: float = 0.99


@dataclass(frozen=True)
class Config(configs.Config):
    """What a classifier's training can set."""

    data: Literal["digits"] = "digits"
    model: Literal["mlp", "cnn"] = "mlp"
    features: tuple[int, ...] = (64, 64)
    """Width of each hidden layer, or channels of each convolution."""
    batch_norm: bool = True
    dropout: float = 0.1
    optimiser: Literal["sgd", "adamw"] = "sgd"
    schedule: Schedule = "cosine"
    warmup: float = 0.05
    """Share of the updates in which the learning rate rises linearly."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Shares of the updates at which the schedule "steps" divides the learning rate by ten."""
    nesterov: bool = True
    clip: bool = False
    """Clip gradients at `max_grad_norm`."""
    ema: bool = False
    """Evaluate averages of weights and statistics."""
    shift: int = 1
    """Training images are moved by up to so many pixels."""
    batch_size: int = 64
    data_parallel: int = 1
    """Devices that share a batch's rows."""
    num_updates: int = 400
    eval_split: Literal["valid", "test"] = "valid"
    split_seed: int = 0
    """Of the parts for training, validation and test."""
    hypers: Hypers = Hypers()

    def validate(self) -> None:
        require_at_least(self, 1, "batch_size", "num_updates", "data_parallel")
        rows = f"a divisor of batch_size={self.batch_size}"
        require(self, "data_parallel", self.batch_size % self.data_parallel == 0, rows)
        require_at_least(self, 0, "shift", "split_seed", "hypers.lr", "hypers.min_lr", "hypers.weight_decay")
        require_unit(self, "dropout", "warmup", "hypers.momentum", "hypers.b1", "hypers.b2", "hypers.ema_decay")
        require_unit(self, "hypers.label_smoothing")
        require(self, "features", bool(self.features) and min(self.features) >= 1, "widths >= 1")
        require(self, "shift", self.shift < SHAPE[0], f"less than the {SHAPE[0]} pixels of an image")


class Network(nn.Module):
    """Hidden layers or 3x3 convolutions, each with BatchNorm, ReLU and dropout; then a mean over pixels, and logits."""

    features: tuple[int, ...]
    convolutions: bool = False
    batch_norm: bool = True
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Images [B, H, W, C] float -> logits [B, 10]."""
        x = x if self.convolutions else x.reshape(len(x), -1)
        for width in self.features:
            bias = not self.batch_norm
            x = Conv(width, use_bias=bias)(x) if self.convolutions else nn.Dense(width, use_bias=bias)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x) if self.batch_norm else x
            x = nn.Dropout(self.dropout, deterministic=not train)(jax.nn.relu(x))
        return nn.Dense(CLASSES)(x.mean((1, 2)) if self.convolutions else x)


def shifted(key: Key, batch: tuple[Array, Array], most: int) -> tuple[Array, Array]:
    """Each image of a batch moved by -most..most pixels along both axes, zeros coming in."""
    x, y = batch
    padded = jnp.pad(x, ((0, 0), (most, most), (most, most), (0, 0)))
    starts = jax.random.randint(key, (len(x), 2), 0, 2 * most + 1)
    cut = lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), x.shape[1:])
    return jax.vmap(cut)(padded, starts), y


def source(config: Config) -> Source:
    """Batches of the training part, in shuffled epochs of each seed's own."""
    augment = None if not config.shift else lambda key, batch: shifted(key, batch, config.shift)
    return ArrayData(digits("train", config.split_seed), config.batch_size, per_seed=True, augment=augment)


def eval_source(config: Config) -> Source:
    """The part that is evaluated, once."""
    return SplitData(digits(config.eval_split, config.split_seed), 256)


def network(config: Config) -> Network:
    """The unbound network of a config."""
    return Network(config.features, config.model == "cnn", config.batch_norm, config.dropout)


def classifier(config: Config = Config(), /, **changes: Any) -> Learner:
    """The learner of a config or of field values, hyperparameters among them. Raises `UserError`."""
    config = configs.replace(config, **changes) if changes else config
    model = linen(network(config), jnp.zeros((1, *SHAPE), jnp.uint8), prepare=lambda x: x.astype(jnp.float32) / LARGEST)
    optimiser = Optimiser(
        config.optimiser, config.schedule, config.warmup, config.milestones, config.nesterov, config.clip
    )
    return supervised(
        model,
        cross_entropy,
        {"accuracy": accuracy},
        optimiser,
        num_steps=config.num_updates,
        hypers=config.hypers,
        ema=config.ema,
        data_parallel=config.data_parallel,
        config=config,
        name="classifier",
        batch_size=config.batch_size,
        source=source,
        eval_source=eval_source,
        objective=("eval/accuracy", "max"),
    )
