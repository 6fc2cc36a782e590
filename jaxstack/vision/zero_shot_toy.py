"""The paper's experiment in two dimensions: points that search for disagreement, in place of a generator's images.

Three classes of Gaussian blobs, two of them with holes that another class fills. A student learns from a teacher at 50
points in [-3, 3]^2, which are moved to where both disagree, stay where they are, or are drawn anew.
"""

import functools
import itertools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array

from jaxstack.core.learner import Key
from jaxstack.vision.zero_shot_kt import belief_divergence, generator_loss

WIDTHS = (2, 100, 500, 3)
"""Of the teacher's and the student's layers."""
HOLE = 0.3
"""Radius."""

Points = tuple[np.ndarray, np.ndarray]


class Matching(NamedTuple):
    """How points are chosen and how long the student learns."""

    points: Literal["adversarial", "frozen", "fresh normal", "fresh uniform"] = "adversarial"
    """Fresh ones are drawn in every epoch, normal with a deviation of 2, or uniform in [-3, 3]^2."""
    start: float = 3.0
    """Both coordinates of the mean of the start, N(start, I) before the sigmoid that keeps points in the square."""
    epochs: int = 2000
    count: int = 50
    point_steps: int = 50
    student_steps: int = 10
    lr: float = 1e-3
    clip: float = 3.0
    """Of each entry of the points' gradient, and of the norm of the student's."""


def blobs(seed: int, count: int = 1000) -> tuple[Points, Points]:
    """Train and test parts (70% and 30%) of `count` points from each of six blobs: [N, 2] float32 and labels [N]."""
    rng = np.random.default_rng(seed)

    def blob(label: int, centre: tuple[float, float], scale: tuple[float, float], hole: bool = False) -> Points:
        x = rng.normal(centre, scale, (4 * count, 2))
        x = x[np.square(x - centre).sum(1) >= HOLE**2] if hole else x
        return x[:count].astype(np.float32), np.full(count, label, np.int32)

    small = (HOLE / 5, HOLE / 5)
    parts = (
        blob(0, (0.0, 1.0), (0.3, 0.4), hole=True),
        blob(0, (0.0, -1.0), (0.3, 0.4), hole=True),
        blob(1, (-1.0, 0.0), (0.4, 0.3)),
        blob(1, (0.0, 1.0), small),
        blob(2, (1.0, 0.0), (0.4, 0.3)),
        blob(2, (0.0, -1.0), small),
    )
    x, y = (np.concatenate(part) for part in zip(*parts))
    order = rng.permutation(len(x))
    cut = round(0.7 * len(x))
    return (x[order[:cut]], y[order[:cut]]), (x[order[cut:]], y[order[cut:]])


def mlp_init(key: Key) -> Any:
    """Weights and biases of the layers, uniform in +-1/sqrt(inputs)."""
    layers = []
    for k, (before, after) in zip(jax.random.split(key, len(WIDTHS) - 1), itertools.pairwise(WIDTHS)):
        bound = 1 / math.sqrt(before)
        k_weight, k_bias = jax.random.split(k)
        draw = functools.partial(jax.random.uniform, minval=-bound, maxval=bound)
        layers.append((draw(k_weight, (before, after)), draw(k_bias, (after,))))
    return tuple(layers)


def mlp(params: Any, x: Array) -> Array:
    """Logits [..., 3] of points [..., 2]."""
    *hidden, (weight, bias) = params
    for w, b in hidden:
        x = jax.nn.relu(x @ w + b)
    return x @ weight + bias


def train_teacher(key: Key, x: Array, y: Array, epochs: int = 30, batch_size: int = 50) -> Any:
    """A network trained on points [N, 2] and labels [N] by Adam; traced."""
    tx = optax.adam(1e-3)
    k_init, k_order = jax.random.split(key)
    params = mlp_init(k_init)

    def update(carry: tuple[Any, Any], rows: Array) -> tuple[tuple[Any, Any], None]:
        params, opt = carry
        loss = lambda p: optax.losses.softmax_cross_entropy_with_integer_labels(mlp(p, x[rows]), y[rows]).mean()
        updates, opt = tx.update(jax.grad(loss)(params), opt)
        return (optax.apply_updates(params, updates), opt), None

    orders = jax.vmap(lambda k: jax.random.permutation(k, len(x)))(jax.random.split(k_order, epochs))
    batches = orders[:, : len(x) // batch_size * batch_size].reshape(-1, batch_size)
    (params, _), _ = lax.scan(update, (params, tx.init(params)), batches)
    return params


def match(key: Key, teacher: Any, x: Array, how: Matching, every: int = 100) -> tuple[Array, Array]:
    """Teach a student on points alone; traced.

    Args:
        key: of the student, the start and fresh points.
        teacher: its weights.
        x: points [N, 2] of the data, on which agreement is measured.
        how: points and lengths.
        every: epochs between measurements, a divisor of `how.epochs`.

    Returns:
        Share of `x` [epochs / every] that student and teacher put into the same class, and the last points [count, 2].
    """
    k_student, k_start, k_fresh = jax.random.split(key, 3)
    student, free = mlp_init(k_student), how.start + jax.random.normal(k_start, (how.count, 2))
    point_tx = optax.chain(optax.clip(how.clip), optax.adam(how.lr))
    student_tx = optax.chain(optax.clip_by_global_norm(how.clip), optax.adam(how.lr))
    inside = lambda free: 6 * jax.nn.sigmoid(free) - 3
    answer = mlp(teacher, x).argmax(-1)

    def epoch(carry: Any, n: Array) -> tuple[Any, None]:
        student, student_opt, free, free_opt = carry

        def move(carry: Any, _: None) -> tuple[Any, None]:
            free, opt = carry
            points = lambda free: generator_loss(mlp(teacher, inside(free)), mlp(student, inside(free)))
            updates, opt = point_tx.update(jax.grad(points)(free), opt)
            return (optax.apply_updates(free, updates), opt), None

        if how.points == "adversarial":
            (free, free_opt), _ = lax.scan(move, (free, free_opt), None, how.point_steps)
        where = {
            "adversarial": lambda: inside(free),
            "frozen": lambda: inside(free),
            "fresh normal": lambda: 2 * jax.random.normal(jax.random.fold_in(k_fresh, n), free.shape),
            "fresh uniform": lambda: jax.random.uniform(
                jax.random.fold_in(k_fresh, n), free.shape, minval=-3, maxval=3
            ),
        }[how.points]()
        taught = mlp(teacher, where)

        def learn(carry: Any, _: None) -> tuple[Any, None]:
            student, opt = carry
            updates, opt = student_tx.update(jax.grad(lambda p: belief_divergence(taught, mlp(p, where)))(student), opt)
            return (optax.apply_updates(student, updates), opt), None

        (student, student_opt), _ = lax.scan(learn, (student, student_opt), None, how.student_steps)
        return (student, student_opt, free, free_opt), None

    def block(carry: Any, epochs: Array) -> tuple[Any, Array]:
        carry, _ = lax.scan(epoch, carry, epochs)
        return carry, (mlp(carry[0], x).argmax(-1) == answer).mean(dtype=jnp.float32)

    start = (student, student_tx.init(student), free, point_tx.init(free))
    carry, agreement = lax.scan(block, start, jnp.arange(how.epochs).reshape(-1, every))
    return agreement, inside(carry[2])
