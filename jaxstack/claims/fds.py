"""Schedules found by hypergradients, and by searches that train again and again; what sharing does to hypergradients.

Every search sees 6,000 images of Fashion-MNIST with 14x14 pixels and a network with one hidden layer, and has ten
trainings of 500 steps where its name says no other number. What it finds trains fresh weights on all images. Nothing of
the method is tuned: first values, steps and limits are those of the released code.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from jaxstack.claims.harness import Check, Claim, Experiment, Row, Scale
from jaxstack.data import images
from jaxstack.nn import networks
from jaxstack.optim import fds
from jaxstack.optim.fds import Limits, Schedules, Weights

# --- theorem 4.1: simulated hypergradients --------------------------------------------------------------------------

SIGMA, EPS, WINDOW, STEPS, DRAWS = 0.25, 0.08, 40, 400, 400
SIMULATED = {
    "no drift": (0.0, 0.0, WINDOW),
    "largest drift": (EPS, 0.0, WINDOW),
    "largest drift, correlation 0.3": (EPS, 0.3, WINDOW),
    "a value per step": (EPS, 0.0, 1),
}
"""Drift, correlation, W."""


def simulated(arm: str, seeds: tuple[int, ...]) -> Iterator[Row]:
    """Squared error of averages over W steps, as a multiple of what (6) says."""
    drift, correlation, window = SIMULATED[arm]
    low, high = (float(x) for x in fds.sharing_error(SIGMA, drift, window, correlation))
    for seed in seeds:
        rng = np.random.default_rng(seed)
        means = drift * np.arange(STEPS)
        common = rng.normal(size=(DRAWS, STEPS // window, 1))
        own = rng.normal(size=(DRAWS, STEPS // window, window))
        noise = SIGMA * (np.sqrt(correlation) * common + np.sqrt(1 - correlation) * own)
        averages = (means.reshape(-1, window) + noise).mean(-1, keepdims=True)
        error = float(np.square(averages - means.reshape(-1, window)).mean())
        yield {"seed": seed, "error over prediction": error / (high if drift else low), "error": error}


# --- the network ----------------------------------------------------------------------------------------------------


def network(hidden: int, inputs: int) -> tuple[Callable[[Any], Weights], fds.Loss, Callable[[Any, Array], Array]]:
    """Key -> first weights, loss of batches (x, y), and (params, x) -> logits, of one hidden layer."""
    net = networks.MLP((hidden,), 10, "relu")

    def loss(params: Any, batch: Any, extra: Any) -> tuple[Array, Any]:
        logits: Any = net.apply(params, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean(), extra

    init = lambda key: fds.start(net.init(key, jnp.zeros((1, inputs))))
    return init, loss, lambda params, x: net.apply(params, x)  # pyright: ignore[reportReturnType]


# --- hypergradients of many trainings ---------------------------------------------------------------------------------

RUNS, LENGTH = 40, 250
GROUPS = {"a value per step": 1, "shared by 10 steps": 10, "shared by 50 steps": 50}
SEEN = (*GROUPS, "greedy, a value per step", "greedy, shared by 50 steps")


@functools.lru_cache(maxsize=8)
def hypergradients(seeds: tuple[int, ...], greedy: bool, peak: float) -> np.ndarray:
    """Of every step's learning rate, a cosine from a peak, in trainings with other first weights and batches: [seed,
    RUNS, LENGTH]."""
    (x, y), (vx, vy) = (images.part("digits", which) for which in ("train", "valid"))
    flat = lambda a: jnp.asarray(a.reshape(len(a), -1) / 16.0 - 0.3053, jnp.float32) / 0.3759
    data, valid = (flat(x), jnp.asarray(y)), (flat(vx)[None], jnp.asarray(vy)[None])
    init, loss, _ = network(32, 64)
    shape = 0.5 * (1 + jnp.cos(jnp.pi * jnp.arange(LENGTH) / LENGTH))
    mode: fds.Mode = fds.greedy_mode if greedy else fds.reverse_mode

    def one(key: Array, peak: Array) -> Array:
        k_init, k_draw = jax.random.split(key)
        batches, _ = fds.draw(k_draw, data, 1, 64, 14, 1)
        schedules = Schedules(peak * shape, jnp.full(1, 0.9), jnp.zeros(1))
        return mode(loss, init(k_init), batches, valid, schedules, LENGTH, Limits(1.0)).gradient.lr

    keys = jnp.stack([jax.random.split(jax.random.key(seed), RUNS) for seed in seeds])
    each = jax.jit(lambda keys, peak: jax.lax.map(lambda own: jax.vmap(lambda key: one(key, peak))(own), keys))
    return np.asarray(each(keys, jnp.float32(peak)))


def fluctuation(peak: float, arm: str, seeds: tuple[int, ...]) -> Iterator[Row]:
    """How far single trainings' hypergradients are from their mean, and how often their signs are right."""
    greedy = arm.startswith("greedy, ")
    window = GROUPS[arm.removeprefix("greedy, ")]
    group = lambda h: h.reshape(len(seeds), RUNS, -1, window).mean(-1)
    found, true = (group(hypergradients(seeds, g, peak)) for g in (greedy, False))
    for i, seed in enumerate(seeds):
        spread, size = found[i].std(0, ddof=1), np.abs(found[i].mean(0))
        right = np.sign(found[i]) == np.sign(true[i].mean(0))
        yield {
            "seed": seed,
            "relative error": float(np.sqrt(np.square(spread).mean() / np.square(size).mean())),
            "right signs": float(right.mean()),
        }


# --- memory -----------------------------------------------------------------------------------------------------------

SHORT, LONG = 100, 1600


@functools.lru_cache(maxsize=4)
def memory(arm: str) -> tuple[int, int]:
    """Bytes beside inputs and outputs of compiled programs with SHORT and LONG steps that draw their batches."""
    init, loss, _ = network(32, 64)
    schedules = Schedules(jnp.full(7, 0.1), jnp.full(1, 0.9), jnp.zeros(1))

    def bytes_of(steps: int) -> int:
        def run(key: Array, x: Array, y: Array) -> Schedules:
            def batches(t: Any) -> Any:
                rows = jax.random.randint(jax.random.fold_in(key, t), (64,), 0, len(y))
                return x[rows], y[rows]

            mode = fds.forward_mode if arm == "forward mode" else fds.reverse_mode
            return mode(loss, init(key), batches, (x[None, :64], y[None, :64]), schedules, steps).gradient

        shapes = (jax.random.key(0), jax.ShapeDtypeStruct((1000, 64), jnp.float32), jax.ShapeDtypeStruct((1000,), int))
        found: Any = jax.jit(run).lower(*shapes).compile().memory_analysis()
        return int(found.temp_size_in_bytes)

    return bytes_of(SHORT), bytes_of(LONG)


def grown(arm: str, seeds: tuple[int, ...]) -> Iterator[Row]:
    """The same for every seed: shapes alone decide."""
    short, long = memory(arm)
    for seed in seeds:
        yield {"seed": seed, "memory, 1,600 steps over 100": long / short, "bytes": float(long)}


# --- searches ---------------------------------------------------------------------------------------------------------

HIDDEN, COUNT, HELD, BATCH, EPOCHS, OUTER = 32, 6000, 1000, 100, 10, 10
PER_EPOCH = (COUNT - HELD) // BATCH
T = EPOCHS * PER_EPOCH
LIMITS = Limits(3.0, 1.0)
RATES, DECAY = 7, 4e-3
"""n of the learning rate, and the largest weight decay that searches try."""


class Data(NamedTuple):
    """Of one seed, or of several side by side."""

    x: Any
    """[COUNT, 196]"""
    y: Any
    test_x: Any
    test_y: Any


@functools.lru_cache(maxsize=4)
def prepared(seeds: tuple[int, ...], folder: str) -> tuple[Data, Array]:
    """Leaves [S, ...], and keys [S]."""
    (x, y), (tx, ty) = (images.load(f"fashion-mnist={folder}", which) for which in ("train", "test"))
    small = lambda a: (a.reshape(-1, 14, 2, 14, 2).mean((2, 4)).reshape(len(a), -1) / 255.0 - 0.2860) / 0.3530
    rows = [np.random.default_rng(seed).permutation(len(x))[:COUNT] for seed in seeds]
    count = len(seeds)
    test = (jnp.asarray(small(tx[:5000]), jnp.float32), jnp.asarray(ty[:5000]))
    tests = (jnp.broadcast_to(a, (count, *a.shape)) for a in test)
    train = (
        jnp.asarray(np.stack([small(x[r]) for r in rows]), jnp.float32),
        jnp.asarray(np.stack([y[r] for r in rows])),
    )
    return Data(*train, *tests), jnp.stack([jax.random.key(seed) for seed in seeds])


def parts(key: Array, d: Data) -> tuple[fds.Batches, Any]:
    """Training batches and one validation batch."""
    return fds.draw(key, (d.x, d.y), HELD, BATCH, EPOCHS, HELD)


@functools.partial(jax.jit, static_argnames=("mode", "rates"))
def descended(data: Data, keys: Array, mode: fds.Mode, rates: int) -> Schedules:
    """Schedules [S, ...] after the outer steps of hypergradients of a kind; the first one has one epoch."""
    init, loss, _ = network(HIDDEN, data.x.shape[-1])

    def one(d: Data, key: Array) -> Schedules:
        problem = fds.Problem(init, loss, lambda key: parts(key, d))
        sizes = Schedules(0.1, 0.1, 3e-4)
        outer = fds.outer_start(Schedules(0.0, 0.0, 0.0), sizes, Schedules(rates, 1, 1))
        first, *rest = jax.random.split(key, OUTER)
        outer, _ = fds.outer_step(problem, first, outer, PER_EPOCH, limits=LIMITS, mode=mode)
        step = lambda outer, key: (fds.outer_step(problem, key, outer, T, limits=LIMITS, mode=mode)[0], None)
        return jax.lax.scan(step, outer, jnp.stack(rest))[0].schedules

    return jax.vmap(one)(data, keys)


def stretched(schedules: Schedules) -> Schedules:
    """The same with T values of each kind, so that all searches share one program; leaves [..., n]."""
    return jax.tree.map(lambda x: x[..., np.arange(T) * x.shape[-1] // T], schedules)


@jax.jit
def validated(data: Data, keys: Array, schedules: Schedules, steps: Any) -> Array:
    """Validation accuracy [S] after some of the T steps of schedules [S, T], on the same images for all trainings."""
    init, loss, logits = network(HIDDEN, data.x.shape[-1])

    def one(d: Data, key: Array, own: Schedules) -> Array:
        batches, (vx, vy) = parts(jax.random.fold_in(key, 0), d)
        end, _ = fds.train(
            loss, init(jax.random.fold_in(key, 1)), batches, own, steps, LIMITS._replace(tangent=None), T
        )
        return (logits(end.params, vx[0]).argmax(-1) == vy[0]).mean()

    return jax.vmap(one)(data, keys, schedules)


@functools.partial(jax.jit, static_argnames="epochs")
def retrained(data: Data, keys: Array, schedules: Schedules, epochs: int) -> Array:
    """Test accuracy [S] of fresh weights trained on all images."""
    init, loss, logits = network(HIDDEN, data.x.shape[-1])

    def one(d: Data, key: Array, own: Schedules) -> Array:
        k_init, k_order = jax.random.split(jax.random.fold_in(key, 2))
        orders = jax.vmap(lambda k: jax.random.permutation(k, COUNT))(jax.random.split(k_order, epochs))
        orders = orders.reshape(-1, BATCH)
        batches = lambda t: (d.x[orders[t]], d.y[orders[t]])
        end, _ = fds.train(loss, init(k_init), batches, own, len(orders), LIMITS._replace(tangent=None))
        return (logits(end.params, d.test_x).argmax(-1) == d.test_y).mean()

    return jax.vmap(one)(data, keys, schedules)


def sampled(rng: np.random.Generator, count: int) -> np.ndarray:
    """Points [count, 9] of the unit cube: seven learning rates, momentum, weight decay."""
    return rng.uniform(size=(count, RATES + 2))


def placed(points: np.ndarray) -> Schedules:
    """Points [..., 9] as schedules with T values: rates in 0..1, momentum in 0..1, decay in 0..DECAY."""
    points = np.asarray(points, np.float32)
    return stretched(
        Schedules(points[..., :RATES], 0.999 * points[..., RATES : RATES + 1], DECAY * points[..., RATES + 1 :])
    )


def best(points: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The point [S, 9] of each seed with the best score, of points [N, S, 9] and scores [N, S]."""
    return points[scores.argmax(0), np.arange(scores.shape[1])]


RANDOM = 170
"""Trainings that cost about as much arithmetic as FDS."""


@functools.lru_cache(maxsize=4)
def tried_at_random(seeds: tuple[int, ...], folder: str) -> tuple[np.ndarray, np.ndarray]:
    """Points [RANDOM, S, 9] and their validation accuracies [RANDOM, S]."""
    data, keys = prepared(seeds, folder)
    points = np.stack([sampled(np.random.default_rng(seed), RANDOM) for seed in seeds], 1)
    return points, np.stack([np.asarray(validated(data, keys, placed(p), T)) for p in points])


def random_search(seeds: tuple[int, ...], folder: str, count: int) -> Schedules:
    """The best of so many random points."""
    points, scores = tried_at_random(seeds, folder)
    return placed(best(points[:count], scores[:count]))


@functools.lru_cache(maxsize=4)
def modelled(seeds: tuple[int, ...], folder: str, count: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """Bayesian optimisation: five random points, then those of largest expected improvement by a Gaussian process."""
    from scipy.stats import norm
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    data, keys = prepared(seeds, folder)
    points, scores = (list(a[:5]) for a in tried_at_random(seeds, folder))
    rngs = [np.random.default_rng((seed, 1)) for seed in seeds]
    scales: Any = np.full(RATES + 2, 0.5)
    kernel = ConstantKernel(1.0) * Matern(scales, (0.05, 20.0), nu=2.5) + WhiteKernel(1e-2)
    while len(points) < count:
        chosen = []
        for i, rng in enumerate(rngs):
            x, y = np.stack(points)[:, i], np.stack(scores)[:, i]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # a bound is reached with few points
                model = GaussianProcessRegressor(kernel, normalize_y=True, random_state=0).fit(x, y)
            # half of the candidates lie near the best point
            near = np.clip(x[y.argmax()] + 0.1 * rng.normal(size=(1000, RATES + 2)), 0, 1)
            candidates = np.concatenate([sampled(rng, 1000), near])
            mean, deviation = model.predict(candidates, return_std=True)
            gain = (mean - y.max()) / np.maximum(deviation, 1e-9)
            improvement = deviation * (gain * norm.cdf(gain) + norm.pdf(gain))
            chosen.append(candidates[improvement.argmax()])
        points.append(np.stack(chosen))
        scores.append(np.asarray(validated(data, keys, placed(points[-1]), T)))
    return np.stack(points), np.stack(scores)


def bayesian(seeds: tuple[int, ...], folder: str, count: int) -> Schedules:
    """The best of so many points."""
    points, scores = modelled(seeds, folder)
    return placed(best(points[:count], scores[:count]))


def halved(seeds: tuple[int, ...], folder: str) -> Schedules:
    """A bracket of Hyperband: 27 points for a ninth of the steps, the best nine for a third, the best three for all,
    nine trainings in sum."""
    data, keys = prepared(seeds, folder)
    points = np.stack([sampled(np.random.default_rng((seed, 2)), 27) for seed in seeds], 1)
    scores = np.zeros(points.shape[:2])
    for share in (9, 3, 1):
        scores = np.stack([np.asarray(validated(data, keys, placed(p), T // share)) for p in points])
        order = np.argsort(-scores, 0)[: max(len(points) // 3, 1)]
        points = np.take_along_axis(points, order[..., None], 0) if share > 1 else points
    return placed(best(points, scores))


def cosine(seeds: tuple[int, ...], folder: str) -> Schedules:
    """A cosine with momentum 0.9 and weight decay 5e-4: ten peaks."""
    data, keys = prepared(seeds, folder)
    shape = 0.5 * (1 + np.cos(np.pi * np.arange(T) / T)).astype(np.float32)
    peaks = np.geomspace(0.002, 1.0, 10).astype(np.float32)
    full = lambda x: np.full((len(seeds), T), x, np.float32)
    tried = [Schedules(np.broadcast_to(p * shape, (len(seeds), T)), full(0.9), full(5e-4)) for p in peaks]
    scores = np.stack([np.asarray(validated(data, keys, s, T)) for s in tried])
    rates = peaks[scores.argmax(0)][:, None] * shape
    return Schedules(rates, full(0.9), full(5e-4))


@jax.jit
def online(data: Data, keys: Array, values: Schedules, sizes: Schedules) -> tuple[Schedules, Array]:
    """Hypergradient descent (Baydin et al., 2018) for all three kinds, with validation batches: after each step each
    value moves against its one-step hypergradient times a size [S]. The schedules [S, T] that arose, and the validation
    accuracy [S]."""
    init, loss, logits = network(HIDDEN, data.x.shape[-1])

    def one(d: Data, key: Array, values: Schedules, sizes: Schedules) -> tuple[Schedules, Array]:
        batches, (vx, vy) = parts(jax.random.fold_in(key, 0), d)
        limits = LIMITS._replace(tangent=None)

        def step(c: tuple[Weights, Schedules], t: Any) -> tuple[tuple[Weights, Schedules], Schedules]:
            rows = (t % (HELD // BATCH)) * BATCH + jnp.arange(BATCH)
            found, new, _ = fds.greedy_step(loss, c[0], batches(t), (vx[0][rows], vy[0][rows]), c[1], limits)
            hyper = jax.tree.map(lambda x, size, h: jnp.maximum(x - size * h, 0.0), c[1], sizes, found)
            return (new, hyper._replace(momentum=jnp.minimum(hyper.momentum, 0.999))), c[1]

        (end, _), seen = jax.lax.scan(step, (init(jax.random.fold_in(key, 1)), values), jnp.arange(T))
        return seen, (logits(end.params, vx[0]).argmax(-1) == vy[0]).mean()

    return jax.vmap(one)(data, keys, values, sizes)


def hypergradient_descent(seeds: tuple[int, ...], folder: str) -> Schedules:
    """The best of ten random first values and sizes."""
    data, keys = prepared(seeds, folder)
    u = np.stack([np.random.default_rng((seed, 3)).uniform(size=(10, 6)) for seed in seeds], 1).astype(np.float32)
    found = []
    for p in np.moveaxis(u, -1, 1):  # [6, S] of a setting
        values = Schedules(10 ** (3 * p[0] - 3), 0.99 * p[1], DECAY * p[2])
        sizes = Schedules(10 ** (4 * p[3] - 5), 10 ** (4 * p[4] - 5), 10 ** (4 * p[5] - 8))
        found.append(online(data, keys, values, sizes))
    of = np.stack([np.asarray(score) for _, score in found]).argmax(0)
    return jax.tree.map(lambda *x: jnp.stack([x[k][i] for i, k in enumerate(of)]), *(s for s, _ in found))


def hyper(mode: fds.Mode, rates: int = RATES) -> Callable[[tuple[int, ...], str], Schedules]:
    """A search by the outer loop of the method with hypergradients of a kind."""
    return lambda seeds, folder: stretched(descended(*prepared(seeds, folder), mode, rates))


GRADIENTS = T * (OUTER - 1) + PER_EPOCH
ARMS: dict[str, tuple[Callable[[tuple[int, ...], str], Schedules], float]] = {
    "FDS": (hyper(fds.forward_mode), GRADIENTS * (1 + 2 * (RATES + 2))),
    "greedy hypergradients": (hyper(fds.greedy_mode), 2 * GRADIENTS),
    "reverse mode, not shared": (hyper(fds.reverse_mode, T), 4 * GRADIENTS),
    "hypergradient descent": (hypergradient_descent, 10 * 2 * T),
    "random search": (lambda s, f: random_search(s, f, 10), 10 * T),
    "random search, 30 trainings": (lambda s, f: random_search(s, f, 30), 30 * T),
    "random search, 170 trainings": (lambda s, f: random_search(s, f, RANDOM), RANDOM * T),
    "Bayesian optimisation": (lambda s, f: bayesian(s, f, 10), 10 * T),
    "Bayesian optimisation, 30 trainings": (lambda s, f: bayesian(s, f, 30), 30 * T),
    "successive halving": (halved, 9 * T),
    "cosine, ten peaks": (cosine, 10 * T),
}
"""How schedules are found, and the arithmetic in gradients of a batch: a Hessian-vector product counts as two, a step
of reverse mode as four."""


def searched(arm: str, seeds: tuple[int, ...], fashion_mnist: str) -> Iterator[Row]:
    """Test accuracy of what a search finds, trained on all images for as many epochs and for five times as many."""
    folder = str(fashion_mnist)
    search, gradients = ARMS[arm]
    schedules = search(seeds, folder)
    data, keys = prepared(seeds, folder)
    own = stretched(schedules)
    same, longer = (np.asarray(retrained(data, keys, own, epochs)) for epochs in (EPOCHS, 5 * EPOCHS))
    for i, seed in enumerate(seeds):
        row = {"seed": seed, "test accuracy": float(same[i]), "test accuracy, 50 epochs": float(longer[i])}
        row |= {"gradients of the search": gradients, "momentum": float(own.momentum[i].mean())}
        row |= {"weight decay": float(own.weight_decay[i].mean())}
        at = (np.arange(RATES) + 0.5) * T / RATES
        yield row | {f"learning rate@{k + 1}": float(own.lr[i, int(t)]) for k, t in enumerate(at)}


THEOREM, MEMORY, SEARCH = "theorem 4.1", "memory", "search, clothes"
SLOW, FAST = "hypergradients, rate 0.01", "hypergradients, rate 0.1"
SHARED = "shared by 50 steps"
RIVALS = tuple(arm for arm in ARMS if arm != "FDS")
PAIRED: dict = dict(paired=True)
ACCURACY = "test accuracy"

claim = Claim(
    method="fds",
    paper=(
        "Micaelli and Storkey, Gradient-based Hyperparameter Optimization Over Long Horizons, NeurIPS 2021 (arXiv "
        "2007.07869)"
    ),
    statement=(
        "One value for many steps makes hypergradients far less noisy, forward mode needs no more memory for long "
        "trainings than for short ones, and ten trainings with it find schedules that beat greedy hypergradients and "
        "random search and come close to thirty random trainings."
    ),
    scope=(
        "Networks with one hidden layer, 500 steps, 6,000 images of Fashion-MNIST with 14x14 pixels. The paper trains "
        "residual networks on CIFAR-10 for up to 10,000 steps; its accuracies and wall-clock times could not be read. "
        "Trainings are counted, and the arithmetic of the search; times are not measured."
    ),
    scales={
        "small": Scale(
            experiments=(
                Experiment(THEOREM, tuple(SIMULATED), simulated),
                Experiment(SLOW, SEEN, lambda arm, seeds: fluctuation(0.01, arm, seeds)),
                Experiment(FAST, SEEN, lambda arm, seeds: fluctuation(0.1, arm, seeds)),
                Experiment(MEMORY, ("forward mode", "reverse mode"), grown),
                Experiment(SEARCH, tuple(ARMS), searched, needs=("fashion_mnist",)),
            ),
            checks=(
                *(Check(THEOREM, arm, "error over prediction", "near", 0.05, target=1.0) for arm in SIMULATED),
                Check(SLOW, SHARED, "relative error", "times_at_most", 1 / 3, "a value per step", **PAIRED),
                Check(FAST, SHARED, "relative error", "times_at_most", 1 / 3, "a value per step", **PAIRED),
                Check(FAST, SHARED, "right signs", "above", 0.0, "a value per step", **PAIRED),
                Check(FAST, SHARED, "right signs", "above", 0.0, f"greedy, {SHARED}", **PAIRED),
                Check(MEMORY, "forward mode", "memory, 1,600 steps over 100", "at_most", 1.1),
                Check(MEMORY, "reverse mode", "memory, 1,600 steps over 100", "at_least", 4.0),
                Check(SEARCH, "FDS", ACCURACY, "above", 0.01, "greedy hypergradients", **PAIRED),
                Check(SEARCH, "FDS", ACCURACY, "above", 0.01, "hypergradient descent", **PAIRED),
                Check(SEARCH, "FDS", ACCURACY, "above", 0.0, "random search", **PAIRED),
                Check(SEARCH, "FDS", ACCURACY, "above", -0.005, "random search, 30 trainings", **PAIRED),
                Check(SEARCH, "FDS", ACCURACY, "above", 0.0, "Bayesian optimisation", **PAIRED),
                Check(SEARCH, "FDS", ACCURACY, "above", 0.0, "successive halving", **PAIRED),
                Check(SEARCH, "FDS", ACCURACY, "above", 0.0, "reverse mode, not shared", **PAIRED),
                Check(SEARCH, "FDS", ACCURACY, "above", -0.005, "cosine, ten peaks", report=True, **PAIRED),
                Check(SEARCH, "FDS", ACCURACY, "above", -0.005, "random search, 170 trainings", report=True, **PAIRED),
                Check(
                    SEARCH,
                    "FDS",
                    ACCURACY,
                    "above",
                    -0.005,
                    "Bayesian optimisation, 30 trainings",
                    report=True,
                    **PAIRED,
                ),
                Check(SEARCH, "FDS", f"{ACCURACY}, 50 epochs", "above", 0.0, RIVALS, report=True, **PAIRED),
            ),
            minutes=7,
        ),
    },
    baselines=("a value per step", *RIVALS),
    ours="FDS",
)
