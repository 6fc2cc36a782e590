"""Losses and metrics of supervised learning beside those of one class per input: several labels, values, pixels.

All are (outputs, targets, hypers) -> the value of each example, as `supervised` takes them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxstack.nn.supervised import Loss, accuracy, cross_entropy, squared_error


def label_cross_entropy(logits: Array, labels: Array, hypers: Any) -> Array:
    """Binary cross entropy in nats [B], the mean over labels, of logits [B, L] and labels [B, L] of 0 and 1.

    A label of 1 counts as 1 - `positive_smoothing`, one of 0 as `negative_smoothing`: a value for each side, as missed
    and wrongly given labels are not equally frequent. Labels between, of mixed images, lie between.
    """
    high, low = 1.0 - hypers.positive_smoothing, hypers.negative_smoothing
    wanted = labels * high + (1.0 - labels) * low
    each = -wanted * jax.nn.log_sigmoid(logits) - (1.0 - wanted) * jax.nn.log_sigmoid(-logits)
    return each.mean(-1)


def label_accuracy(logits: Array, labels: Array, hypers: Any) -> Array:
    """Share of the labels [B, L] that the sign of logits [B, L] tells: [B]."""
    return ((logits > 0) == (labels > 0.5)).mean(-1, dtype=jnp.float32)


def all_labels(logits: Array, labels: Array, hypers: Any) -> Array:
    """1 where every label [B, L] of an example is told: [B]."""
    return ((logits > 0) == (labels > 0.5)).all(-1).astype(jnp.float32)


def absolute_error(outputs: Array, targets: Array, hypers: Any) -> Array:
    """Mean absolute error [B] over all axes but the first."""
    return jnp.abs(outputs - targets).reshape(len(outputs), -1).mean(-1)


def pixel_cross_entropy(logits: Array, masks: Array, hypers: Any) -> Array:
    """Mean over pixels of the softmax cross entropy [B] of logits [B, H, W, C] and classes [B, H, W], with
    `label_smoothing`."""
    rows = logits.reshape(-1, logits.shape[-1])
    return cross_entropy(rows, masks.reshape(-1), hypers).reshape(len(logits), -1).mean(1)


def pixel_accuracy(logits: Array, masks: Array, hypers: Any) -> Array:
    """Share of the pixels [B, H, W] that the largest of logits [B, H, W, C] tells: [B]."""
    return (logits.argmax(-1) == masks).reshape(len(logits), -1).mean(1, dtype=jnp.float32)


TASKS: dict[str, tuple[Loss, dict[str, Loss], tuple[str, str]]] = {
    "classes": (cross_entropy, {"accuracy": accuracy}, ("eval/accuracy", "max")),
    "labels": (
        label_cross_entropy,
        {"label_accuracy": label_accuracy, "all_labels": all_labels},
        ("eval/label_accuracy", "max"),
    ),
    "values": (squared_error, {"absolute_error": absolute_error}, ("eval/absolute_error", "min")),
}
"""What a data set tells of its images -> loss, metrics, objective."""
