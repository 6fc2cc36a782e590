"""Epochs of gradient steps over shuffled minibatches: what a method that learns from rollouts calls once an update."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxstack.core import devices, groups
from jaxstack.core.learner import Key, Metrics
from jaxstack.fast import packing, shuffle


@runtime_checkable
class Loss(Protocol):
    """(parameters, aux_state, minibatch) -> (loss, (aux_state, metrics))."""

    def __call__(self, params: Any, aux_state: Any, minibatch: Any, /) -> tuple[Array, tuple[Any, Metrics]]:
        """Evaluate the loss.

        Args:
            params: what the gradient is taken of.
            aux_state: state that no gradient touches.
            minibatch: what `Samples.take` gives.

        Returns:
            The scalar loss, the next `aux_state` and scalar metrics.
        """
        ...


class Samples(NamedTuple):
    """What an epoch draws its minibatches from."""

    count: int
    """Samples S that are shuffled: transitions, or whole sequences."""
    size: int
    """Terms of the loss in an epoch: samples times agents, and times steps where a sample is a sequence."""
    take: Callable[[Array], Any]
    """Indices [B] into the samples -> the minibatch."""


def transitions(batch: Any, agents: int = 1) -> Samples:
    """Every transition of a rollout is a sample.

    Args:
        batch: Leaves [T, N, ...]; no gradient flows back to them.
        agents: Agents that each have a term of the loss in a transition.

    Returns:
        The T * N samples; a minibatch of B has leaves [1, B, ...].
    """
    length, envs = jax.tree.leaves(batch)[0].shape[:2]
    rows = packing.rows(batch, axes=2)
    take = lambda index: jax.tree.map(lambda x: x[None], rows(index))
    return Samples(length * envs, length * envs * agents, take)


def sequences(batch: Any, start: Any, agents: int = 1) -> Samples:
    """The whole sequence of an environment is a sample.

    Args:
        batch: Leaves [T, N, ...].
        start: Leaves [N, ...], such as recurrent states before the first step.
        agents: Agents that each have a term of the loss in a transition.

    Returns:
        The N samples; a minibatch of B is (batch, start) with leaves [T, B, ...] and [B, ...].
    """
    length, envs = jax.tree.leaves(batch)[0].shape[:2]

    def take(index: Array) -> tuple[Any, Any]:
        return jax.tree.map(lambda x: x[:, index], batch), jax.tree.map(lambda x: x[index], start)

    return Samples(envs, length * envs * agents, take)


def minibatch_sgd(
    loss: Loss,
    tx: optax.GradientTransformation,
    params: Any,
    opt_state: optax.OptState,
    samples: Samples,
    key: Key,
    *,
    epochs: int,
    minibatches: int,
    aux_state: Any = (),
    num_groups: int = 1,
) -> tuple[Any, optax.OptState, Any, Metrics]:
    """Take a gradient step on each minibatch of each epoch; every epoch splits the samples anew.

    Args:
        loss: What is minimised, see `Loss`.
        tx: Treats parameters element by element or through norms over all of them: it sees small ones as one vector.
        params: The parameters; with several groups every leaf is [G, ...].
        opt_state: `tx.init(params)`, or what the last call returned.
        samples: `transitions` or `sequences`.
        key: Of the shuffles.
        epochs: Passes over the samples.
        minibatches: Gradient steps in a pass, a divisor of the number of samples.
        aux_state: State that no gradient touches, handed from step to step.
        num_groups: Groups of agents with parameters of their own.

    Returns:
        (params, opt_state, aux_state, metrics): the metrics of `loss` and `train/grad_norm`, the gradient's norm before
        clipping (the mean over groups), averaged over the steps.

    Raises:
        UserError: Where several devices share a seed, for minibatches that they do not divide.
    """
    order = shuffle.permutations(key, epochs, samples.count).reshape(epochs * minibatches, -1)
    order = devices.split(order, 1, "the size of a minibatch")
    pack = packing.packing(params, samples.size // minibatches, num_groups)

    def gradient_step(c: tuple, index: Array) -> tuple[tuple, Metrics]:
        packed, opt_state, aux_state = c
        grads, (aux_state, metrics) = jax.grad(loss, has_aux=True)(pack.unpack(packed), aux_state, samples.take(index))
        grads = pack.pack(grads)
        updates, opt_state = tx.update(grads, opt_state, packed)
        norm = optax.global_norm(grads) if num_groups == 1 else groups.norms(grads).mean()
        return (optax.apply_updates(packed, updates), opt_state, aux_state), {**metrics, "train/grad_norm": norm}

    start = (pack.pack(params), pack.pack_in(opt_state), aux_state)
    (packed, opt_state, aux_state), metrics = jax.lax.scan(gradient_step, start, order)
    return pack.unpack(packed), pack.unpack_in(opt_state), aux_state, jax.tree.map(jnp.mean, metrics)
