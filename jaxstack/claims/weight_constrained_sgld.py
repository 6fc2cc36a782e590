"""Constrained Langevin dynamics against ordinary optimisers: spirals, and 2,000 images of Fashion-MNIST.

Every arm has three settings (a learning rate or step size, or for the constrained ones a radius) that are tried on
seeds of their own; the best by validation loss at the last epoch then runs on fresh seeds.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from jaxstack.claims.harness import Check, Claim, Curve, Experiment, Row, Scale, Tuning
from jaxstack.data import images
from jaxstack.nn import networks
from jaxstack.optim import constrained_langevin as cl

TUNING_SEEDS = (100, 101)


class Task(NamedTuple):
    """Static: a network with one hidden layer, and how long it is trained."""

    hidden: int
    epochs: int
    batch: int
    classes: int
    grid: int
    """Which grid of an arm is tried."""


SPIRALS = Task(hidden=200, epochs=400, batch=50, classes=2, grid=0)
FASHION = Task(hidden=100, epochs=40, batch=128, classes=10, grid=1)


class Data(NamedTuple):
    """Rows [N, D] float32 and labels [N] int32 of three parts."""

    x: Any
    y: Any
    valid_x: Any
    valid_y: Any
    test_x: Any
    test_y: Any


def spirals(key: jax.Array, count: int, turns: float) -> tuple[Array, Array]:
    """Two interleaved arms: 2 sqrt(t) (cos, sin)(turns sqrt(t) pi + k pi) + 0.02 N, t uniform in 0..1."""
    k_t, k_noise = jax.random.split(key)
    label = jnp.arange(count, dtype=jnp.int32) % 2
    root = jnp.sqrt(jax.random.uniform(k_t, (count,)))
    angle = jnp.pi * (turns * root + label)
    x = 2 * root[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)
    return x + 0.02 * jax.random.normal(k_noise, x.shape), label


def spiral_data(seeds: Sequence[int]) -> Data:
    """Leaves [S, ...]."""
    found = []
    for seed in seeds:
        parts = [spirals(k, n, 4.0) for k, n in zip(jax.random.split(jax.random.key(seed), 3), (500, 500, 2000))]
        found.append(Data(*(x for part in parts for x in part)))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)


def fashion_data(seeds: Sequence[int], folder: str) -> Data:
    """2,000 images for training and 1,000 for validation, drawn by seed, and 2,000 for testing; leaves [S, ...]."""
    (x, y), (tx, ty) = (images.load(f"fashion-mnist={folder}", which) for which in ("train", "test"))
    flat = lambda a: (a.reshape(len(a), -1).astype(np.float32) / 255.0 - 0.2860) / 0.3530
    found = []
    for seed in seeds:
        rows = np.random.default_rng(seed).permutation(len(x))
        a, b = rows[:2000], rows[2000:3000]
        found.append(Data(flat(x[a]), y[a], flat(x[b]), y[b], flat(tx[:2000]), ty[:2000]))
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(x) for x in leaves]), *found)


class Arm(NamedTuple):
    """How an arm is made from the number that is tuned, and which numbers are tried: of spirals, of images."""

    make: Callable[[Any], optax.GradientTransformation]
    name: str
    grids: tuple[tuple[float, ...], tuple[float, ...]]
    limits: Callable[[Any, Any], Any] = lambda params, value: jax.tree.map(lambda x: None, params)
    """(parameters, number) -> their constraints."""


RATES = ((0.1, 0.3, 1.0), (0.03, 0.1, 0.3))
SLOW = ((0.02, 0.05, 0.1), (0.003, 0.01, 0.03))
FREE = lambda params: jax.tree.map(lambda x: None, params)
RADII = ((1.0, 2.0, 4.0), (0.05, 0.1, 0.2))


def circles(params: Any, radius: Any) -> Any:
    """Weights of both layers within a radius; the first layer's within half of it."""
    return cl.by_shape(params, circle=float(radius), first=float(radius) / 2)


def orthonormal(params: Any, _: Any) -> Any:
    """Orthonormal weights of the second layer."""
    return cl.by_shape(params, stiefel=True)


def constrained(limits: Callable[[Any, Any], Any], **options: Any) -> Callable[[Any], optax.GradientTransformation]:
    """An arm's optimiser; for circles the tuned number is the radius, else the step size."""

    def make(value: Any) -> optax.GradientTransformation:
        given = dict(options)
        step = given.pop("step_size", value)
        return cl.constrained_langevin(step, lambda params: limits(params, value), **given)

    return make


def clipped(lr: Any, limit: float) -> optax.GradientTransformation:
    """SGD with momentum whose weights are cut to +-limit after every step."""
    inner = optax.sgd(lr, 0.9)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(grads, state, params)
        cut = lambda p, u: jnp.clip(p + u, -limit, limit) - p if p.ndim > 1 else u
        return jax.tree.map(cut, params, updates), state

    return optax.GradientTransformation(inner.init, update)  # pyright: ignore[reportArgumentType]


def arms(grid: int) -> dict[str, Arm]:
    """The arms of a task by name; weights are cut at the middle radius of its circles."""
    middle = RADII[grid][1]
    sgld = lambda tau: lambda h: cl.constrained_langevin(h, FREE, temperature=tau, overdamped=True)
    decayed = lambda lr: optax.chain(optax.add_decayed_weights(1e-3), optax.sgd(lr, 0.9))
    od = dict(overdamped=True)
    found = [
        Arm(lambda lr: optax.sgd(lr), "SGD", RATES),
        Arm(lambda lr: optax.sgd(lr, 0.9), "SGD with momentum", SLOW),
        Arm(decayed, "weight decay", SLOW),
        Arm(lambda lr: clipped(lr, middle), "clipped weights", SLOW),
        Arm(lambda lr: optax.adam(lr), "Adam", ((0.003, 0.01, 0.03), (3e-4, 1e-3, 3e-3))),
        Arm(sgld(1e-5), "SGLD", RATES),
        Arm(constrained(circles, step_size=0.3), "c-CoLA-ud", RADII, circles),
        Arm(constrained(circles, step_size=0.3, temperature=1e-5), "c-CoLA-ud, tau 1e-5", RADII, circles),
        Arm(constrained(circles, step_size=0.3, temperature=1e-6, **od), "c-CoLA-od", RADII, circles),
        Arm(constrained(orthonormal), "o-CoLA-ud", ((0.1, 0.2, 0.4), (0.03, 0.1, 0.3)), orthonormal),
    ]
    return {arm.name: arm for arm in found}


@lru_cache(maxsize=64)
def trained(task: Task, arm: str, value: float, seeds: tuple[int, ...], folder: str) -> dict[str, np.ndarray]:
    """Measures [S] of an arm, and curves [S, E]."""
    data = fashion_data(seeds, folder) if folder else spiral_data(seeds)
    chosen = arms(task.grid)[arm]
    tx = chosen.make(value)
    net = networks.MLP((task.hidden,), task.classes, "relu")

    def score(params: Any, x: Array, y: Array) -> tuple[Array, Array]:
        logits: Any = net.apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), (logits.argmax(-1) == y).mean()

    def run(key: jax.Array, d: Data) -> dict[str, Array]:
        k_init, k_place, k_order = jax.random.split(key, 3)
        params = cl.on_manifold(k_place, start := net.init(k_init, d.x[:1]), chosen.limits(start, value))
        count = len(d.x) // task.batch

        def update(c: tuple, rows: Array) -> tuple[tuple, None]:
            params, state = c
            grads = jax.grad(lambda p: score(p, d.x[rows], d.y[rows])[0])(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        def epoch(c: tuple, key: jax.Array) -> tuple[tuple, Array]:
            rows = jax.random.permutation(key, len(d.x))[: count * task.batch].reshape(count, task.batch)
            c, _ = jax.lax.scan(update, c, rows)
            return c, score(c[0], d.test_x, d.test_y)[0]

        keys = jax.random.split(k_order, task.epochs)
        (params, _), curve = jax.lax.scan(epoch, (params, tx.init(params)), keys)
        test, accuracy = score(params, d.test_x, d.test_y)
        return {
            "test loss": test,
            "test accuracy": accuracy,
            "lowest test loss": curve.min(),
            "training loss": score(params, d.x, d.y)[0],
            "validation loss": score(params, d.valid_x, d.valid_y)[0],
            "violation": cl.violation(params, chosen.limits(params, value)),
            "curve": curve,
        }

    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(run))(keys, data))


def experiment(name: str, task: Task, needs: tuple[str, ...] = ()) -> Experiment:
    """All arms on one task."""

    def tune(arm: str, fashion_mnist: str = "") -> Tuning:
        grid = arms(task.grid)[arm].grids[task.grid]
        losses = [trained(task, arm, v, TUNING_SEEDS, str(fashion_mnist))["validation loss"] for v in grid]
        scores = tuple(tuple(float(x) for x in loss) for loss in losses)
        steps = task.epochs * ((500 if task.grid == 0 else 2000) // task.batch)
        settings = tuple({"value": v} for v in grid)
        return Tuning(settings, scores, TUNING_SEEDS, "validation loss", largest=False, steps=steps)

    def run(arm: str, seeds: tuple[int, ...], tuned: dict[str, float], fashion_mnist: str = "") -> Iterator[Row]:
        found = trained(task, arm, tuned["value"], seeds, str(fashion_mnist))
        curve = found["curve"]
        points = np.unique(np.geomspace(1, task.epochs, 12).astype(int))
        for i, seed in enumerate(seeds):
            row = {k: float(v[i]) for k, v in found.items() if k != "curve"}
            row |= {f"test loss@{e}": float(curve[i, e - 1]) for e in points}
            yield {"seed": seed} | row

    return Experiment(name, tuple(arms(task.grid)), run, needs=needs, tune=tune)


ON_SPIRALS, ON_IMAGES = "spirals, 4 turns", "Fashion-MNIST, 2,000 images"
PLAIN = ("SGD", "SGD with momentum", "weight decay", "clipped weights", "Adam", "SGLD")
CIRCLES = ("c-CoLA-ud", "c-CoLA-ud, tau 1e-5", "c-CoLA-od")
PAIRED: dict = dict(paired=True)


def image_checks(on: str) -> tuple[Check, ...]:
    """Of the last epoch on images."""
    return (
        Check(on, "c-CoLA-ud", "test loss", "times_at_most", 0.9, "SGD", **PAIRED),
        Check(on, "c-CoLA-ud", "test accuracy", "above", -0.002, "SGD", **PAIRED),
        Check(on, "c-CoLA-ud", "test loss", "times_at_most", 1.0, PLAIN, **PAIRED),
        *(Check(on, arm, "violation", "at_most", 1e-4) for arm in (*CIRCLES, "o-CoLA-ud")),
        Check(on, "c-CoLA-ud", "test accuracy", "above", 0.0, PLAIN, report=True, **PAIRED),
        Check(on, "c-CoLA-od", "test loss", "times_at_most", 0.9, "SGD", report=True, **PAIRED),
        Check(on, "o-CoLA-ud", "test accuracy", "above", 0.0, "SGD with momentum", report=True, **PAIRED),
        Check(on, "c-CoLA-ud, tau 1e-5", "test loss", "times_at_most", 1.0, "c-CoLA-ud", report=True, **PAIRED),
    )


claim = Claim(
    method="weight-constrained-sgld",
    paper=(
        "Leimkuhler, Vlaar, Pouchon and Storkey, Better Training using Weight-Constrained Stochastic Dynamics, ICML "
        "2021 (arXiv 2106.10704)"
    ),
    statement=(
        "Networks with one hidden layer whose weights stay on circles have a lower test loss at the last epoch than "
        "the same networks trained by SGD, at no loss of accuracy, and classify spirals better than networks of "
        "ordinary optimisers; the constraints are kept."
    ),
    scope=(
        "Spirals of 500 points and networks of 200 units; 2,000 images of Fashion-MNIST, 100 units and 40 epochs. The "
        "paper has 10,000 images, 1,000 units, 400 epochs, and ResNets; its figures could not be read."
    ),
    scales={
        "small": Scale(
            experiments=(
                experiment(ON_SPIRALS, SPIRALS),
                experiment(ON_IMAGES, FASHION, needs=("fashion_mnist",)),
            ),
            checks=(
                Check(ON_SPIRALS, "c-CoLA-ud", "test accuracy", "above", 0.0, PLAIN, **PAIRED),
                Check(ON_SPIRALS, "c-CoLA-ud", "test accuracy", "above", 0.02, "SGD", **PAIRED),
                Check(ON_SPIRALS, "c-CoLA-od", "test accuracy", "above", 0.02, "SGD", report=True, **PAIRED),
                Check(ON_SPIRALS, "c-CoLA-ud", "violation", "at_most", 1e-4),
                *image_checks(ON_IMAGES),
            ),
        ),
    },
    baselines=PLAIN,
    ours="c-CoLA",
    curves=(Curve(ON_SPIRALS, "test loss", "epoch", "log"), Curve(ON_IMAGES, "test loss", "epoch", "log")),
)
