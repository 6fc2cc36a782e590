"""Learning rates and optimisers from traced hyperparameters, built anew inside each step."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

Schedule = Literal["constant", "cosine", "restarts", "steps"]


def learning_rate(
    kind: Schedule,
    step: Any,
    num_steps: Any,
    lr: Any,
    *,
    min_lr: Any = 0.0,
    warmup: float = 0.0,
    milestones: Sequence[float] = (0.5, 0.75),
    factor: Any = 0.1,
    cycles: int = 4,
) -> Array:
    """Learning rate of a step: linear warm-up to `lr`, then constant, a cosine or steps down.

    Args:
        kind: "cosine" (Loshchilov and Hutter, 2017, without restarts) ends at `min_lr`; "restarts" is the same with
            `cycles` cosines of one length, each from `lr`; "steps" multiplies by `factor` at each milestone.
        step: number of the step, from 0.
        num_steps: steps of the whole run, a number or an array.
        lr: peak learning rate.
        min_lr: of the cosine.
        warmup: share of the steps in which the rate rises.
        milestones: shares of the steps.
        factor: of a milestone.
        cycles: of "restarts".
    """
    num_steps = jnp.asarray(num_steps, jnp.float32)
    rise = jnp.round(warmup * num_steps)
    warm = (step + 1) / jnp.maximum(rise, 1.0)
    if kind in ("cosine", "restarts"):
        progress = jnp.clip((step - rise) / jnp.maximum(num_steps - rise, 1.0), 0.0, 1.0)
        # the end of the last cycle is no new beginning
        progress = jnp.where(progress < 1.0, progress * cycles % 1.0, 1.0) if kind == "restarts" else progress
        later = min_lr + (lr - min_lr) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    elif kind == "steps":
        passed = sum(jnp.asarray(step >= jnp.round(m * num_steps), jnp.float32) for m in milestones)
        later = lr * jnp.asarray(factor, jnp.float32) ** passed
    else:
        later = jnp.asarray(lr, jnp.float32)
    return jnp.where(step < rise, lr * warm, later)


def adamw(
    rate: Callable[[Any], Array],
    *,
    b1: Any = 0.9,
    b2: Any = 0.999,
    weight_decay: Any = 0.0,
    max_grad_norm: Any = None,
    mask: Callable[[Any], Any] | None = None,
    factors: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformation:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019) on clipped gradients.

    Args:
        rate: step from 0 -> learning rate.
        b1, b2: decay of the moments.
        weight_decay: times the learning rate is what weights lose.
        max_grad_norm: global norm to clip gradients at; None leaves them.
        mask: parameters -> the tree of those that decay; default: all.
        factors: parameters -> a tree of what the weight decay of each is multiplied by, in place of `mask`.
    """
    return optax.chain(
        *_clip(max_grad_norm),
        optax.scale_by_adam(b1, b2),
        _decay(weight_decay, mask, factors),
        optax.scale_by_learning_rate(rate),
    )


def adam(
    rate: Callable[[Any], Array],
    *,
    b1: Any = 0.9,
    b2: Any = 0.999,
    weight_decay: Any = 0.0,
    max_grad_norm: Any = None,
    mask: Callable[[Any], Any] | None = None,
    factors: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformation:
    """Adam (Kingma and Ba, 2015) with weight decay as PyTorch's `Adam` has it: part of the gradient (L2), so that the
    moments see it; arguments as in `adamw`."""
    return optax.chain(
        *_clip(max_grad_norm),
        _decay(weight_decay, mask, factors),
        optax.scale_by_adam(b1, b2),
        optax.scale_by_learning_rate(rate),
    )


def sgd(
    rate: Callable[[Any], Array],
    *,
    momentum: Any = 0.0,
    nesterov: bool = False,
    weight_decay: Any = 0.0,
    max_grad_norm: Any = None,
    mask: Callable[[Any], Any] | None = None,
    factors: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformation:
    """Gradient descent with PyTorch's momentum, in which weight decay is part of the gradient (L2); arguments as in
    `adamw`."""
    return optax.chain(
        *_clip(max_grad_norm),
        _decay(weight_decay, mask, factors),
        optax.trace(momentum, nesterov),
        optax.scale_by_learning_rate(rate),
    )


def weights_only(params: Any) -> Any:
    """True for arrays of two or more axes: biases and the scales of normalisations do not decay."""
    return jax.tree.map(lambda x: x.ndim > 1, params)


def _decay(weight_decay: Any, mask: Any, factors: Callable[[Any], Any] | None) -> optax.GradientTransformation:
    if factors is None:
        return optax.add_decayed_weights(weight_decay, mask=mask)
    one = lambda g, p, factor: g + (weight_decay * factor) * p
    return optax.stateless(lambda grads, params: jax.tree.map(one, grads, params, factors(params)))


def _clip(max_grad_norm: Any) -> tuple[optax.GradientTransformation, ...]:
    return () if max_grad_norm is None else (optax.clip_by_global_norm(max_grad_norm),)
