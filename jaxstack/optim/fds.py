"""Schedules of hyperparameters by forward-mode differentiation with sharing (Micaelli and Storkey, "Gradient-based
Hyperparameter Optimization Over Long Horizons", NeurIPS 2021).

An inner training has T steps. With weights w, velocity v, the minibatch's gradient g at w and its Hessian H, learning
rate a, momentum m and weight decay x:

    (1) v' = m v + g + x w;   w' = w - a v'
    (2) a schedule has n values; step t uses number k(t) = floor(n t / T), so that W = T / n steps share a value
    (3) Z = dw / dvalues and C = dv / dvalues, one column per value, pass through the derivative of (1):
        C' = m C + H Z + x Z + (v for the momentum in use, w for the decay in use);
        Z' = Z - a C' - (v' for the rate in use)
    (4) h = Z_T^T grad L_val(w_T) / W: the hypergradient, averaged over the steps that share a value
    (5) value <- max(value - s sign(h), 0), s halved where the sign turns; momentum stays below 1
    (6) for hypergradients of independent steps with variance sigma^2 whose means drift by at most eps per step, the
        average of W has a squared error between sigma^2 / W and sigma^2 / W + eps^2 (W^2 - 1) / 12

(3) is `jax.jvp` of (1) for all columns side by side: one Hessian-vector product per column, memory 2 n |w| whatever T
is. Each outer step draws initial weights and a validation part anew; the last schedules, stretched to the length of
another training, then train on everything.

The paper's body could not be read: the equations are those of the abstract and of the released code (polo5/FDS).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from jaxstack.core.learner import Key

# --- inner training ---------------------------------------------------------------------------------------------------


class Schedules(NamedTuple):
    """Arrays [n] of values, n of each kind its own; scalars where one step is meant; also what belongs to each value,
    such as its hypergradient."""

    lr: Any
    momentum: Any
    weight_decay: Any


class Weights(NamedTuple):
    """What an inner training changes."""

    params: Any
    velocity: Any
    extra: Any = ()
    """What a loss passes on without a gradient: the statistics of BatchNorm."""


class Limits(NamedTuple):
    """Guards of long trainings."""

    gradient: Any = None
    """Entries of g are cut to +-this; the derivative of the cut counts. None: not at all."""
    tangent: Any = None
    """Entries of H Z are cut to +-this; None: not at all, which reverse mode needs."""


Loss = Callable[[Any, Any, Any], tuple[Array, Any]]
"""(params, batch, extra) -> (scalar loss, extra)."""
Batches = Callable[[Any], Any]
"""Number of a step from 0, traced -> its batch."""


def start(params: Any, extra: Any = ()) -> Weights:
    """Weights at rest."""
    return Weights(params, jax.tree.map(jnp.zeros_like, params), extra)


def at(schedules: Schedules, t: Any, total: Any) -> Schedules:
    """(2): the values of step t of `total`."""
    return jax.tree.map(lambda x: x[_index(t, len(x), total)], schedules)


def inner_step(
    loss: Loss, now: Weights, batch: Any, hyper: Schedules, limits: Limits = Limits()
) -> tuple[Weights, Array]:
    """(1): the next weights, and the batch's loss before the step."""
    (value, extra), grads = jax.value_and_grad(loss, has_aux=True)(now.params, batch, now.extra)
    if limits.gradient is not None:
        grads = jax.tree.map(lambda g: jnp.clip(g, -limits.gradient, limits.gradient), grads)
    if limits.tangent is not None:
        grads = jax.tree.map(lambda g: _cut_tangent(g, limits.tangent), grads)
    velocity = jax.tree.map(
        lambda v, g, w: hyper.momentum * v + g + hyper.weight_decay * w, now.velocity, grads, now.params
    )
    params = jax.tree.map(lambda w, v: w - hyper.lr * v, now.params, velocity)
    return Weights(params, velocity, extra), value


def train(
    loss: Loss,
    now: Weights,
    batches: Batches,
    schedules: Schedules,
    steps: Any,
    limits: Limits = Limits(),
    total: Any = None,
) -> tuple[Weights, Array]:
    """Inner training without tangents.

    Args:
        loss: see `Loss`.
        now: see `start`.
        batches: see `Batches`.
        schedules: of the hyperparameters.
        steps: how many are taken; may be traced.
        limits: of gradients.
        total: T of (2); default: `steps`.

    Returns:
        The weights, and the mean training loss over the steps.
    """
    total = steps if total is None else total

    def body(t: Any, c: tuple[Weights, Array]) -> tuple[Weights, Array]:
        new, value = inner_step(loss, c[0], batches(t), at(schedules, t, total), limits)
        return new, c[1] + value

    end, summed = jax.lax.fori_loop(0, steps, body, (now, _zero(now)))
    return end, summed / steps


def _index(t: Any, count: int, total: Any) -> Any:
    return t * count // total


def _zero(now: Weights) -> Array:
    """A sum of losses that has begun."""
    return jnp.zeros((), jax.tree.leaves(now.params)[0].dtype)


@jax.custom_jvp
def _cut_tangent(x: Array, most: Any) -> Array:
    return x


@_cut_tangent.defjvp
def _(primals: tuple[Array, Any], tangents: tuple[Array, Any]) -> tuple[Array, Array]:
    x, most = primals
    return x, jnp.clip(tangents[0], -most, most)


# --- hypergradients ---------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """What one inner training tells."""

    gradient: Schedules
    """h of each value, (4)."""
    weights: Weights
    train_loss: Array
    """Mean over the steps."""
    valid_loss: Array
    """At the end."""


Mode = Callable[[Loss, Weights, Batches, Any, Schedules, Any, Limits], Found]
"""How hypergradients are found: `forward_mode`, `reverse_mode` or `greedy_mode`."""


def tangents_of(params: Any, schedules: Schedules) -> tuple[Any, Any]:
    """Z and C before the first step: zeros, leaves [n, ...] with a row per value."""
    count = len(ravel_pytree(schedules)[0])
    zeros = lambda: jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), params)
    return zeros(), zeros()


def forward_step(
    loss: Loss,
    now: Weights,
    tangents: tuple[Any, Any],
    batch: Any,
    schedules: Schedules,
    t: Any,
    total: Any,
    limits: Limits = Limits(),
) -> tuple[Weights, tuple[Any, Any], Array]:
    """(1) and (3): weights, tangents (Z, C) and loss after step t of `total`."""

    def step(params: Any, velocity: Any, schedules: Schedules) -> tuple[Any, Any]:
        new, value = inner_step(loss, Weights(params, velocity, now.extra), batch, at(schedules, t, total), limits)
        return (new.params, new.velocity), (new.extra, value)

    def push(dparams: Any, dvelocity: Any, dschedules: Schedules) -> tuple[Any, Any, Any]:
        point = (now.params, now.velocity, schedules)
        return jax.jvp(step, point, (dparams, dvelocity, dschedules), has_aux=True)

    # the point is the same for all columns, so it is computed once
    every = jax.vmap(push, out_axes=(None, 0, None))
    (params, velocity), tangents, (extra, value) = every(*tangents, _columns(schedules))
    return Weights(params, velocity, extra), tangents, value


def forward_mode(
    loss: Loss,
    now: Weights,
    batches: Batches,
    valid: Any,
    schedules: Schedules,
    steps: Any,
    limits: Limits = Limits(),
) -> Found:
    """Train, and differentiate the validation loss by (3) and (4).

    Args:
        loss: of training and validation alike.
        now: the first weights.
        batches: of the training.
        valid: validation batches, leaves [V, ...].
        schedules: what is differentiated.
        steps: T; may be traced.
        limits: see `Limits`.

    Returns:
        Hypergradients and the last weights.
    """

    def body(t: Any, c: tuple[Weights, tuple[Any, Any], Array]) -> tuple[Weights, tuple[Any, Any], Array]:
        new, tangents, value = forward_step(loss, c[0], c[1], batches(t), schedules, t, steps, limits)
        return new, tangents, c[2] + value

    first = (now, tangents_of(now.params, schedules), _zero(now))
    end, (z, _), summed = jax.lax.fori_loop(0, steps, body, first)
    value, grads = validation(loss, end, valid)
    found = ravel_pytree(schedules)[1](_along(z, grads))
    return Found(_shared(found, steps), end, summed / steps, value)


def reverse_mode(
    loss: Loss,
    now: Weights,
    batches: Batches,
    valid: Any,
    schedules: Schedules,
    steps: int,
    limits: Limits = Limits(),
) -> Found:
    """The same hypergradients by backpropagation through all steps, whose weights are kept: memory grows with T;
    arguments as in `forward_mode`. `steps` is static, and tangents are not cut."""
    limits = limits._replace(tangent=None)

    def final(schedules: Schedules) -> tuple[Array, tuple[Weights, Array]]:
        body = lambda c, t: inner_step(loss, c, batches(t), at(schedules, t, steps), limits)
        end, values = jax.lax.scan(jax.checkpoint(body), now, jnp.arange(steps))
        losses = jax.lax.map(lambda batch: loss(end.params, batch, end.extra)[0], valid)
        return losses.mean(), (end, values.mean())

    (value, (end, train_loss)), found = jax.value_and_grad(final, has_aux=True)(schedules)
    return Found(_shared(found, steps), end, train_loss, value)


def greedy_step(
    loss: Loss, now: Weights, batch: Any, valid_batch: Any, hyper: Schedules, limits: Limits = Limits()
) -> tuple[Schedules, Weights, Array]:
    """The gradient of the validation loss one step ahead for the values in use, the next weights, the training loss.

    Z of a single step is -v' for the learning rate, -a v for momentum, -a w for weight decay: no Hessian is needed.
    """

    def step(hyper: Schedules) -> tuple[Any, Any]:
        new, value = inner_step(loss, now, batch, hyper, limits)
        return new.params, (new, value)

    push = lambda seed: jax.jvp(step, (hyper,), (seed,), has_aux=True)
    _, z, (new, value) = jax.vmap(push, out_axes=(None, 0, None))(_columns(hyper))
    grads, _ = jax.grad(loss, has_aux=True)(new.params, valid_batch, new.extra)
    return ravel_pytree(hyper)[1](_along(z, grads)), new, value


def greedy_mode(
    loss: Loss,
    now: Weights,
    batches: Batches,
    valid: Any,
    schedules: Schedules,
    steps: Any,
    limits: Limits = Limits(),
) -> Found:
    """Hypergradients that look one step ahead, averaged over the steps that share a value: what greedy methods see;
    arguments as in `forward_mode`. Step t takes validation batch t modulo their number."""

    def body(t: Any, c: tuple[Weights, Schedules, Array]) -> tuple[Weights, Schedules, Array]:
        batch = jax.tree.map(lambda x: x[t % len(x)], valid)
        found, new, value = greedy_step(loss, c[0], batches(t), batch, at(schedules, t, steps), limits)
        sums = jax.tree.map(lambda s, h: s.at[_index(t, len(s), steps)].add(h), c[1], found)
        return new, sums, c[2] + value

    first = (now, jax.tree.map(jnp.zeros_like, schedules), _zero(now))
    end, sums, summed = jax.lax.fori_loop(0, steps, body, first)
    return Found(_shared(sums, steps), end, summed / steps, validation(loss, end, valid)[0])


def validation(loss: Loss, now: Weights, valid: Any) -> tuple[Array, Any]:
    """Mean loss over validation batches, leaves [V, ...], and its gradient; BatchNorm uses the batches' statistics."""

    def body(c: tuple[Array, Any], batch: Any) -> tuple[tuple[Array, Any], None]:
        (value, _), grads = jax.value_and_grad(loss, has_aux=True)(now.params, batch, now.extra)
        return (c[0] + value, jax.tree.map(jnp.add, c[1], grads)), None

    count = len(jax.tree.leaves(valid)[0])
    (value, grads), _ = jax.lax.scan(body, (_zero(now), jax.tree.map(jnp.zeros_like, now.params)), valid)
    return value / count, jax.tree.map(lambda g: g / count, grads)


def _columns(schedules: Schedules) -> Schedules:
    """Unit tangents, leaves [values of all kinds, ...]."""
    vector, unravel = ravel_pytree(schedules)
    return jax.vmap(unravel)(jnp.eye(len(vector), dtype=vector.dtype))


def _along(z: Any, grads: Any) -> Array:
    """Z^T gradient: [n]."""
    inner = lambda a, g: a.reshape(len(a), -1) @ g.ravel()
    return sum(map(inner, jax.tree.leaves(z), jax.tree.leaves(grads)), start=jnp.zeros(()))


def _shared(sums: Schedules, steps: Any) -> Schedules:
    """Over W."""
    return jax.tree.map(lambda h: h * (len(h) / steps), sums)


# --- the outer loop ---------------------------------------------------------------------------------------------------


class Outer(NamedTuple):
    """What an outer step changes."""

    schedules: Schedules
    sizes: Schedules
    """How far the next step moves each value."""
    signs: Schedules
    """Of the last hypergradients; 0 before the first."""


def outer_start(values: Schedules, sizes: Schedules, counts: Schedules) -> Outer:
    """Constant schedules.

    Args:
        values: the first value of each kind.
        sizes: how far the first outer step moves it.
        counts: n of each kind.

    Returns:
        The state before the first outer step.
    """
    full = lambda of: jax.tree.map(lambda n, x: jnp.full(n, x, jnp.float32), counts, of)
    return Outer(full(values), full(sizes), full(Schedules(0.0, 0.0, 0.0)))


def sign_update(outer: Outer, gradient: Schedules, shrink: Any = 0.5) -> Outer:
    """(5). A hypergradient of 0, or one that is no number, moves nothing and turns no sign."""
    signs = jax.tree.map(lambda h: jnp.where(jnp.isnan(h), 0.0, jnp.sign(h)), gradient)
    turned = jax.tree.map(lambda new, old: new * old < 0, signs, outer.signs)
    sizes = jax.tree.map(lambda s, turn: jnp.where(turn, shrink * s, s), outer.sizes, turned)
    moved = jax.tree.map(lambda x, s, sign: jnp.maximum(x - s * sign, 0.0), outer.schedules, sizes, signs)
    return Outer(moved._replace(momentum=jnp.minimum(moved.momentum, MOST_MOMENTUM)), sizes, signs)


MOST_MOMENTUM = 0.999


def settled(outer: Outer, share: float = 0.05) -> Array:
    """Whether every value's step is below a share of it, where the released code stops."""
    each = jax.tree.map(lambda x, s: (s < share * x).all(), outer.schedules, outer.sizes)
    return jnp.stack(jax.tree.leaves(each)).all()


class Problem(NamedTuple):
    """What an outer step trains."""

    init: Callable[[Key], Weights]
    loss: Loss
    draw: Callable[[Key], tuple[Batches, Any]]
    """Key -> training batches, and validation batches [V, ...]."""


def outer_step(
    problem: Problem,
    key: Key,
    outer: Outer,
    steps: Any,
    *,
    shrink: Any = 0.5,
    limits: Limits = Limits(),
    mode: Mode = forward_mode,
) -> tuple[Outer, Found]:
    """One inner training from fresh weights on a fresh split, then (5).

    Args:
        problem: what is trained.
        key: of this step.
        outer: the schedules so far.
        steps: T; may be traced but in reverse mode.
        shrink: factor of a step whose sign turns.
        limits: of gradients and tangents.
        mode: how hypergradients are found.

    Returns:
        The next schedules, and what was found.
    """
    k_init, k_draw = jax.random.split(key)
    batches, valid = problem.draw(k_draw)
    found = mode(problem.loss, problem.init(k_init), batches, valid, outer.schedules, steps, limits)
    return sign_update(outer, found.gradient, shrink), found


def draw(
    key: Key, arrays: Any, held_out: int, batch_size: int, epochs: int, valid_batch: int
) -> tuple[Callable[[Any], Any], Any]:
    """Random parts of a data set: shuffled epochs for training, and batches for validation.

    Args:
        key: of the parts and the epochs' orders.
        arrays: leaves [N, ...].
        held_out: rows for validation.
        batch_size: of training; what an epoch has over is left out.
        epochs: how many there are.
        valid_batch: of validation, at most `held_out`; what is over is left out.

    Returns:
        Step -> training batch, and validation batches [V, valid_batch, ...].
    """
    k_split, k_order = jax.random.split(key)
    rows = jax.random.permutation(k_split, len(jax.tree.leaves(arrays)[0]))
    valid_batch = min(valid_batch, held_out)
    valid = rows[: held_out // valid_batch * valid_batch].reshape(-1, valid_batch)
    rest = rows[held_out:]
    whole = len(rest) // batch_size * batch_size
    orders = jax.vmap(lambda k: jax.random.permutation(k, rest)[:whole])(jax.random.split(k_order, epochs))
    orders = orders.reshape(-1, batch_size)
    return lambda t: jax.tree.map(lambda x: x[orders[t]], arrays), jax.tree.map(lambda x: x[valid], arrays)


# --- theorem 4.1 ------------------------------------------------------------------------------------------------------


def sharing_error(sigma: Any, eps: Any, window: Any, correlation: Any = 0.0) -> tuple[Array, Array]:
    """(6): the squared error of an average of hypergradients, without drift and with the largest drift.

    Args:
        sigma: standard deviation of one step's hypergradient.
        eps: most that its mean changes from a step to the next.
        window: W.
        correlation: of any two steps; 0: independent.

    Returns:
        Both ends.
    """
    noise = jnp.square(sigma) * (1.0 + correlation * (window - 1.0)) / window
    return noise, noise + jnp.square(eps) * (jnp.square(window) - 1.0) / 12.0


def best_window(sigma: Any, eps: Any) -> Array:
    """The W at which the larger end of (6) is smallest: (6 sigma^2 / eps^2)^(1/3)."""
    return jnp.cbrt(6.0 * jnp.square(sigma / eps))
