"""Noisy early stopping (Toner and Storkey, "Noisy Early Stopping for Noisy Labels", 2024).

Without clean labels, the epoch is chosen by accuracy on a held-out part of the same noisy data:

    (1) A_t = mean_i 1[argmax f_t(x_i) = noisy label i] over the held-out part after epoch t
    (2) t* = the first maximiser of A_t; what is returned is f_{t*}

    (3) noisy risk of a classifier h: R~(h) = 1 - E[T[y, h(x)]]
    (4) symmetric noise of rate r over C classes: R~ = r + (1 - C r / (C - 1)) R, affine and increasing for
        r < (C - 1) / C, so that (2) chooses as clean labels would with enough held-out examples. No other noise does so
        for every set of classifiers and every distribution: pair noise can rank a worse one first.

Only the abstract and the first page could be read; shares, patience and networks are this project's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxstack.core import config as configs
from jaxstack.core.config import require, require_at_least
from jaxstack.core.learner import Learner
from jaxstack.learning import noisy_labels
from jaxstack.nn.best import Checked, keep_best
from jaxstack.nn.supervised import supervised


def noisy_risk(joint: Array, transition: Array) -> Array:
    """Equation (3). `joint` [C, C] has P(clean label y, prediction k), T [C, C] the clean label in its rows."""
    return 1.0 - (joint * transition).sum()


def symmetric_risk(risk: Array | float, rate: Array | float, classes: int) -> Array:
    """Equation (4): the noisy risk of a clean one under symmetric noise of rate `rate`."""
    return jnp.asarray(rate + (1.0 - classes * rate / (classes - 1)) * risk)


def examples_needed(gap: float, rate: float, classes: int, disagreement: float) -> float:
    """Held-out examples that tell two classifiers apart at two standard errors, under symmetric noise.

    The difference of their noisy accuracies has a deviation of at most sqrt(disagreement / n), and noise shrinks the
    clean difference by 1 - C r / (C - 1).

    Args:
        gap: difference of their clean accuracies.
        rate: r.
        classes: C.
        disagreement: share of examples that they label differently.
    """
    return 4.0 * disagreement / (gap * (1.0 - classes * rate / (classes - 1))) ** 2


def early_stop(accuracies: Array) -> Array:
    """Equation (2): the first maximiser of a history [T]."""
    return jnp.argmax(accuracies)


class Stopping(NamedTuple):
    """The best parameters so far, for a loop of one's own."""

    params: Any
    best: Array
    """Their score."""
    step: Array
    """The look that they are of, from 0."""
    looks: Array
    """Looks so far."""

    @property
    def waited(self) -> Array:
        """Looks since the best one: stop where it reaches one's patience."""
        return self.looks - 1 - self.step


def start(params: Any) -> Stopping:
    """Before the first look."""
    return Stopping(params, jnp.float32(-jnp.inf), jnp.int32(-1), jnp.int32(0))


def look(state: Stopping, params: Any, accuracy: Array) -> Stopping:
    """Equations (1) and (2), one epoch at a time, inside `jax.lax.scan`; of equal ones the earlier stays."""
    better = accuracy > state.best
    kept = jax.tree.map(lambda a, b: jnp.where(better, a, b), params, state.params)
    best = jnp.where(better, accuracy, state.best)
    return Stopping(kept, best, jnp.where(better, state.looks, state.step), state.looks + 1)


@dataclass(frozen=True)
class Config(noisy_labels.Config):
    """Training whose weights are those of the best look at held-out noisy labels."""

    looks_every: int = 0
    """Updates between two looks; 0: an epoch."""
    held_out: int = 0
    """Held-out noisy examples; 0: the whole validation part."""

    def validate(self) -> None:
        super().validate()
        require_at_least(self, 0, "looks_every", "held_out")
        kept = self.noise != "pair" or self.rate < 0.5
        require(self, "rate", kept, "less than 0.5 with noise=pair: beyond it the wrong label is the likelier one")


def source(config: Config) -> Checked:
    """Noisy training batches and the held-out part."""
    parts = noisy_labels.parts(config)
    x, y = parts["valid"]
    require(config, "held_out", config.held_out <= len(x), f"at most the {len(x)} images for validation")
    count = config.held_out or len(x)
    held_out = (x[:count], y[:count])
    return Checked(parts["train"], held_out, config.batch_size, every=config.looks_every or None)


def noisy_early_stopping(config: Config = Config(), /, **changes: Any) -> Learner:
    """The learner of a config or of field values, hyperparameters among them. Raises `UserError`."""
    config = configs.replace(config, **changes) if changes else config
    model = noisy_labels.model_of(config)
    loss: Callable[..., Array] = noisy_labels.training_loss(config)
    options = noisy_labels.learner_options(config)
    learner = supervised(model, loss, source=source, name="noisy-early-stopping", **options)

    def score(variables: Any, held_out: Any) -> Array:
        x, labels = held_out
        return (model.apply(variables, x).argmax(-1) == labels).mean()

    return keep_best(learner, score)
