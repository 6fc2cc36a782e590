"""The learner of forward-mode differentiation with sharing: schedules are searched, then a classifier is trained.

An outer step of `jaxstack.optim.fds` is a step of the first stage. The second stage trains fresh weights on all
training images with the schedules that were found, stretched to its length.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxstack.core import config as configs
from jaxstack.core.config import require, require_at_least, require_positive
from jaxstack.core.learner import Key, Learner, Metrics, as_hypers
from jaxstack.core.metrics import mean
from jaxstack.core.source import Batch
from jaxstack.core.stages import Stage, Staged
from jaxstack.data import augment, images
from jaxstack.data.sources import ArrayData, SplitData, WholeData
from jaxstack.nn.supervised import Model
from jaxstack.nn.vision import zoo
from jaxstack.optim.fds import (
    Batches,
    Limits,
    Loss,
    Outer,
    Problem,
    Schedules,
    Weights,
    at,
    draw,
    inner_step,
    outer_start,
    outer_step,
    settled,
    start,
)

NAME = "fds"


class Hypers(NamedTuple):
    """Numeric settings of the search: traced, so that others compile nothing."""

    lr: float = 0.0
    """The first value of each learning rate."""
    momentum: float = 0.0
    weight_decay: float = 0.0
    lr_step: float = 0.1
    """How far the first outer step moves a learning rate."""
    momentum_step: float = 0.1
    decay_step: float = 3e-4
    shrink: float = 0.5
    """Factor of a step whose sign turns."""
    clip_gradient: float = 3.0
    """Entries of gradients are cut to +-this."""
    clip_tangent: float = 1.0
    """Entries of Hessian-vector products are cut to +-this; the released code has 1 for 10 epochs and 100 for 50."""


@dataclass(frozen=True)
class Config(configs.Config):
    """Schedules are searched, then a classifier of images is trained with them."""

    data: str = "digits"
    """digits, mnist-5k or fashion-mnist; NAME=PATH for files of one's own."""
    train_images: int = 0
    """Use so many training images; 0: all."""
    model: str = "mlp"
    """mlp, or a convolutional network as `jaxstack train classifier --model` names them."""
    hidden: tuple[int, ...] = (64,)
    """Of mlp."""
    shift: int = 0
    """Training images are moved by up to so many pixels."""
    flip: bool = False
    """Every other training image, at random, is mirrored left to right."""
    lr_values: int = 7
    """n of the learning rate."""
    momentum_values: int = 1
    decay_values: int = 1
    outer_steps: int = 10
    epochs: int = 10
    """Of an inner training."""
    first_epochs: int = 1
    """Of the first one: where all values start at 0, it teaches the direction of the learning rate alone."""
    retrain_epochs: int = 50
    """Of the training with the schedules that were found."""
    batch_size: int = 128
    valid_share: float = 0.05
    """Share of the training images that an outer step holds out."""
    valid_batch: int = 500
    split_seed: int = 0
    hypers: Hypers = Hypers()

    def validate(self) -> None:
        require_at_least(self, 1, "lr_values", "momentum_values", "decay_values", "outer_steps", "epochs")
        require_at_least(self, 1, "first_epochs", "retrain_epochs", "batch_size", "valid_batch")
        require_at_least(self, 0, "train_images", "split_seed", "shift", "hypers.lr", "hypers.weight_decay")
        require(self, "first_epochs", self.first_epochs <= self.epochs, f"at most epochs={self.epochs}")
        require(self, "valid_share", 0 < self.valid_share < 1, "a number between 0 and 1")
        require(self, "hypers.momentum", 0 <= self.hypers.momentum < 1, "0 or more, below 1")
        require_positive(self, "hypers.lr_step", "hypers.momentum_step", "hypers.decay_step")
        require_positive(self, "hypers.clip_gradient", "hypers.clip_tangent")
        require(self, "hypers.shrink", 0 < self.hypers.shrink <= 1, "a number above 0, at most 1")
        images.class_facts(self.data)
        zoo.check_model(self)

    def held_out(self, count: int) -> int:
        """Images of `count` that an outer step holds out."""
        return max(1, round(self.valid_share * count))


class Searched(NamedTuple):
    """State of the search."""

    hypers: Hypers
    params: Any
    """Of the last inner training."""
    stats: Any
    outer: Outer
    key: Key
    step: Array


class Trained(NamedTuple):
    """State of the training with the schedules that were found."""

    hypers: Hypers
    params: Any
    stats: Any
    velocity: Any
    schedules: Schedules
    key: Key
    step: Array
    total: Array
    """Steps over which the schedules are stretched."""


def model_of(config: Config) -> Model:
    """The network of a config as pure functions of its variables and of uint8 images."""
    return zoo.model_of(config.data, config.model, config.hidden)


def loss_of(model: Model) -> Loss:
    """Mean cross entropy of batches (images, labels, key of dropout)."""

    def loss(params: Any, batch: Any, stats: Any) -> tuple[Array, Any]:
        x, y, key = batch
        logits, changed = model.train({"params": params, **stats}, x, key)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), {**stats, **changed}

    return loss


def weights_of(model: Model, key: Key) -> Weights:
    """Fresh weights at rest."""
    variables = dict(model.init(key))
    params = variables.pop("params")
    return start(params, variables)


def moved(config: Config, key: Key, x: Array) -> Array:
    """Training images as the config changes them."""
    k_shift, k_flip = jax.random.split(key)
    x = augment.shift(k_shift, x, config.shift) if config.shift else x
    return augment.flip(k_flip, x) if config.flip else x


def _evaluate(model: Model, params: Any, stats: Any, batch: Batch) -> Metrics:
    x, y = batch.data
    logits = model.apply({"params": params, **stats}, x)
    values = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return {
        "eval/loss": mean(values, batch.mask > 0),
        "eval/accuracy": mean(logits.argmax(-1) == y, batch.mask > 0),
    }


def eval_source(config: Config) -> SplitData:
    """The validation part of the set, which neither stage trains on, once."""
    return SplitData(images.part(config.data, "valid", config.split_seed), 256)


def training_part(config: Config) -> images.Images:
    """Images and labels that the search splits and the second stage trains on. Raises `UserError`."""
    return images.part(config.data, "train", config.split_seed, config.train_images)


def search(config: Config) -> Learner:
    """The first stage: a step is an outer step.

    Raises:
        UserError: where the images left for training do not fill a batch.
    """
    model = model_of(config)
    loss = loss_of(model)
    count = len(training_part(config)[1])
    left = count - config.held_out(count)
    require(config, "batch_size", config.batch_size <= left, f"at most the {left} images left for training")
    per_epoch = left // config.batch_size

    def init(key: Key, hypers: Any) -> Searched:
        hypers = as_hypers(hypers)
        k_params, key = jax.random.split(key)
        fresh = weights_of(model, k_params)
        values = Schedules(hypers.lr, hypers.momentum, hypers.weight_decay)
        sizes = Schedules(hypers.lr_step, hypers.momentum_step, hypers.decay_step)
        counts = Schedules(config.lr_values, config.momentum_values, config.decay_values)
        return Searched(hypers, fresh.params, fresh.extra, outer_start(values, sizes, counts), key, jnp.int32(0))

    def step(s: Searched, arrays: Any) -> tuple[Searched, Metrics]:
        k_outer, k_batch = jax.random.split(jax.random.fold_in(s.key, s.step))

        def parts(key: Key) -> tuple[Batches, Any]:
            rows, valid = draw(
                key, arrays, config.held_out(count), config.batch_size, config.epochs, config.valid_batch
            )

            def batches(t: Any) -> Any:
                k_move, k_drop = jax.random.split(jax.random.fold_in(k_batch, t))
                x, y = rows(t)
                return moved(config, k_move, x), y, k_drop

            return batches, (*valid, jax.random.split(k_batch, len(valid[1])))

        problem = Problem(lambda key: weights_of(model, key), loss, parts)
        steps = jnp.where(s.step == 0, config.first_epochs, config.epochs) * per_epoch
        limits = Limits(s.hypers.clip_gradient, s.hypers.clip_tangent)
        outer, found = outer_step(problem, k_outer, s.outer, steps, shrink=s.hypers.shrink, limits=limits)
        values = {
            f"search/{kind}_{i + 1}": x[i]
            for kind, x in outer.schedules._asdict().items()
            for i in range(len(x))  # of the next inner training
        }
        metrics = {"loss/train": found.train_loss, "loss/valid": found.valid_loss, "search/settled": settled(outer)}
        new = Searched(s.hypers, found.weights.params, found.weights.extra, outer, s.key, s.step + 1)
        return new, metrics | values

    return Learner(
        init=init,
        step=step,
        hypers=config.hypers,
        config=config,
        name=NAME,
        samples_per_step=config.epochs * per_epoch * config.batch_size,
        evaluate=lambda s, key, batch: _evaluate(model, s.params, s.stats, batch),
        takes_batch=True,
        num_steps=config.outer_steps,
        objective=("eval/accuracy", "max"),
        source=lambda config: WholeData(training_part(config)),
        eval_source=eval_source,
        predict=lambda s, x: model.apply({"params": s.params, **s.stats}, x),
    )


def retrain(config: Config, schedules: Schedules) -> Learner:
    """The second stage: training on all images with schedules, leaves [S, n], stretched to its length."""
    model = model_of(config)
    loss = loss_of(model)
    num_steps = retrain_steps(config)

    def init(key: Key, hypers: Any, given: Schedules) -> Trained:
        k_params, key = jax.random.split(key)
        fresh = weights_of(model, k_params)
        state = (fresh.params, fresh.extra, fresh.velocity, jax.tree.map(jnp.copy, given), key)
        return Trained(as_hypers(hypers), *state, jnp.int32(0), jnp.int32(num_steps))

    def step(s: Trained, batch: Any) -> tuple[Trained, Metrics]:
        key, k_drop = jax.random.split(s.key)
        hyper = at(s.schedules, s.step, s.total)
        now = Weights(s.params, s.velocity, s.stats)
        new, value = inner_step(loss, now, (*batch, k_drop), hyper, Limits(s.hypers.clip_gradient))
        s = s._replace(params=new.params, velocity=new.velocity, stats=new.extra, key=key, step=s.step + 1)
        return s, {"loss/train": value, **{f"train/{kind}": x for kind, x in hyper._asdict().items()}}

    def source(config: Config) -> ArrayData:
        change = (lambda key, batch: (moved(config, key, batch[0]), batch[1])) if config.shift or config.flip else None
        return ArrayData(training_part(config), config.batch_size, per_seed=True, augment=change)

    return Learner(
        init=init,
        step=step,
        hypers=config.hypers,
        config=config,
        name=NAME,
        samples_per_step=config.batch_size,
        evaluate=lambda s, key, batch: _evaluate(model, s.params, s.stats, batch),
        takes_batch=True,
        num_steps=num_steps,
        with_length=lambda s, steps: s._replace(total=jnp.full_like(s.total, steps)),
        objective=("eval/accuracy", "max"),
        source=source,
        eval_source=eval_source,
        predict=lambda s, x: model.apply({"params": s.params, **s.stats}, x),
        given=schedules,
    )


def retrain_steps(config: Config) -> int:
    """Steps of the second stage."""
    return config.retrain_epochs * (len(training_part(config)[1]) // config.batch_size)


def fds(config: Config = Config(), /, **changes: Any) -> Staged:
    """The method of a config or of field values, hyperparameters among them: search, then training. Raises
    `UserError`."""
    config = configs.replace(config, **changes) if changes else config
    first = search(config)

    def second(states: Mapping[str, Any]) -> Learner:
        return retrain(config, states["search"].outer.schedules)

    stages = (
        Stage("search", lambda states: first, steps=config.outer_steps),
        Stage("retrain", second, steps=retrain_steps(config)),
    )
    return Staged(NAME, stages, config)
