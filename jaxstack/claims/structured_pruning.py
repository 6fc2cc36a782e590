"""Structured pruning against training smaller networks: error and latency at equal size, with equal updates.

Small scale: WRN-10-2 on Fashion-MNIST at 12x12 pixels (2x2 means, a pixel cut off on all sides); 10,000 training, 2,000
validation and 4,000 test images.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxstack.claims.harness import Check, Claim, Curve, Experiment, Row, Scale, Tuning
from jaxstack.core.config import replace
from jaxstack.nn import classifier
from jaxstack.nn.classifier import Config
from jaxstack.nn.supervised import variables
from jaxstack.nn.vision import wrn
from jaxstack.report import timing
from jaxstack.vision import structured_pruning as sp

DEPTH, WIDTH, BATCH = 10, 2.0, 32
BASE, UPDATES = 600, 2
"""Updates of the network that is pruned, and between two removals."""
SHARES = (25, 50, 75)
"""Percent of the middle channels that are removed."""
SIZES = (50, 75)
"""Where networks of equal size are trained from scratch."""
IMAGES = {"train": 10_000, "valid": 2_000, "test": 4_000}
SEEDS, TUNING_SEED = (0, 1, 2, 3, 4), 100
CRITERIA = {"Fisher": "fisher", "L1": "l1", "random": "random"}
SCRATCH = ("Fisher, scratch", "copycat", "narrower", "bottleneck")
CANDIDATES = ("Fisher, scratch", "narrower", "bottleneck")
BEST = "reduced or scratch"
RATES = {"pruning": (8e-4, 8e-3), "scratch": (0.05, 0.1)}
MIDDLE = wrn.block_features(DEPTH, WIDTH)[0]
CHANNELS = sum(MIDDLE)
STEP = CHANNELS * SHARES[0] // 100
"""Removals from one share to the next."""


def config(folder: str, width: float = WIDTH, mid: Sequence[int] = (), updates: int = BASE, lr: float = 0.1) -> Config:
    """The classifier of a network: reflected edges, shifts by 2 of 12 pixels and mirrored images in training."""
    return Config(
        data=f"fashion-mnist={folder}",
        size=12,
        model=f"wrn-{DEPTH}-{width!r}",
        mid_features=tuple(mid),
        shift=2,
        edge="reflect",
        flip=True,
        nesterov=False,
        batch_size=BATCH,
        num_updates=updates,
        hypers=classifier.Hypers(lr=lr),
    )


@functools.cache
def data(folder: str) -> dict[str, Any]:
    """(images uint8, labels) of each part, on the device."""
    parts = {part: classifier.arrays(config(folder), part) for part in ("train", "valid", "test")}
    return {part: jax.device_put((x[: IMAGES[part]], y[: IMAGES[part]])) for part, (x, y) in parts.items()}


class Net(NamedTuple):
    """A trained network."""

    width: float
    mid: tuple[int, ...]
    variables: Any

    @property
    def parameters(self) -> int:
        return wrn.param_count(DEPTH, self.width, self.mid, channels=1)


@functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def _start(config: Config, key: jax.Array) -> Any:
    """A run's first state; runs once, so what is saved is compiling."""
    return classifier.classifier(config).init(key, config.hypers)


@functools.partial(jax.jit, static_argnums=0)
def _fit(config: Config, state: Any, k_data: jax.Array, rows: jax.Array, train: tuple[jax.Array, jax.Array]) -> Any:
    learner = classifier.classifier(config)

    def step(state: Any, at: jax.Array) -> tuple[Any, tuple]:
        key = jax.random.fold_in(k_data, state.step)
        return learner.step(state, classifier.augmented(config, key, (train[0][at], train[1][at])))[0], ()

    return variables(lax.scan(step, state, rows)[0])


def fit(folder: str, width: float, mid: Sequence[int], updates: int, lr: float, seed: int) -> Net:
    """Train a network from its initialisation with a cosine schedule."""
    own = config(folder, width, mid, updates, lr)
    rows = sp.shuffled_rows(IMAGES["train"], 1, updates, BATCH, seed)[0]
    k_init, k_data = jax.random.split(jax.random.key(seed))
    state = _start(own, k_init)
    return Net(width, tuple(mid), _fit(own, state, k_data, jnp.asarray(rows), data(folder)["train"]))


@functools.partial(jax.jit, static_argnums=0)
def _wrong(config: Config, variables: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    apply = classifier.model_of(config).apply
    each = lambda part: (apply(variables, part[0]).argmax(-1) != part[1]).mean(dtype=jnp.float32)
    split = lambda v: v.reshape(-1, 250, *v.shape[1:])
    return lax.map(each, (split(x), split(y)))


def errors(folder: str, net: Net) -> dict[str, float]:
    """Percent of validation and test images that are told wrong."""
    own = replace(config(folder), model=f"wrn-{DEPTH}-{net.width!r}", mid_features=net.mid)
    parts = data(folder)
    x, y = (jnp.concatenate([parts[part][i] for part in ("valid", "test")]) for i in (0, 1))
    wrong = 100.0 * np.asarray(_wrong(own, net.variables, x, y))
    cut = IMAGES["valid"] // 250
    return {"valid": float(wrong[:cut].mean()), "test": float(wrong[cut:].mean())}


@functools.cache
def base(folder: str, seed: int) -> Net:
    """The network that all criteria prune, trained once for each seed."""
    return fit(folder, WIDTH, MIDDLE, BASE, 0.1, seed)


@functools.partial(jax.jit, static_argnums=0)
def _prune(
    config: Config,
    state: sp.State,
    rows: jax.Array,
    criterion: jax.Array,
    lr: jax.Array,
    train: tuple[jax.Array, jax.Array],
) -> sp.State:
    tuning = sp.Tuning(lr, config.hypers.momentum, config.hypers.weight_decay)

    def change(key: jax.Array, x: jax.Array) -> jax.Array:
        return classifier.prepared(config, classifier.augmented(config, key, (x, None))[0])

    return sp.prune_and_tune(classifier.network(config), train, state, rows, criterion, tuning, change)[0]


@functools.cache
def pruned(folder: str, arm: str, lr: float, seed: int) -> dict[int, tuple[Net, sp.Masks]]:
    """By percent removed: the network, with masked channels that no later layer reads, and its masks."""
    own = replace(config(folder), edge="zeros")
    state = sp.begin(base(folder, seed).variables, MIDDLE, jax.random.key(seed + 1000), sp.Tuning(lr))
    rows = sp.shuffled_rows(IMAGES["train"], len(SHARES) * STEP, UPDATES, BATCH, seed + 1000)
    criterion, found = jnp.int32(sp.criterion_number(CRITERIA[arm])), {}
    for i, share in enumerate(SHARES):
        part = jnp.asarray(rows[i * STEP : (i + 1) * STEP])
        state = _prune(own, state, part, criterion, jnp.float32(lr), data(folder)["train"])
        found[share] = (
            Net(WIDTH, tuple(MIDDLE), sp.folded({"params": state.params, **state.stats}, state.masks)),
            state.masks,
        )
    return found


def size_of(masks: sp.Masks) -> int:
    """Parameters of a compressed network."""
    return sp.param_count(DEPTH, WIDTH, sp.widths(masks), channels=1)


def parallel(function: Callable[[Any], Any], seeds: Sequence[Any]) -> Iterator[Any]:
    """`function` of each seed, two at a time, in order."""
    with ThreadPoolExecutor(2) as pool:
        yield from pool.map(function, seeds)


@functools.cache
def fishers(folder: str) -> tuple[dict[int, tuple[Net, sp.Masks]], ...]:
    """What the claim's seeds have left after Fisher pruning."""
    lr = _rate("Fisher", folder)
    list(parallel(lambda seed: base(folder, seed), SEEDS))
    return tuple(parallel(lambda seed: pruned(folder, "Fisher", lr, seed), SEEDS))


def shape(folder: str, arm: str, share: int, seed: int) -> tuple[float, tuple[int, ...]]:
    """(width, middle channels) of a network that is trained from scratch.

    No reduced network has more parameters than any of the claim's networks that Fisher pruning left.
    """
    if arm == "Fisher, scratch":
        lr = _rate("Fisher", folder)
        return WIDTH, sp.widths(pruned(folder, "Fisher", lr, seed)[share][1])
    target = min(size_of(found[share][1]) for found in fishers(folder))
    if arm == "narrower":
        width = sp.narrower(target, DEPTH, channels=1)
        return width, tuple(wrn.block_features(DEPTH, width)[0])
    if arm == "bottleneck":
        return WIDTH, sp.bottleneck(target, DEPTH, WIDTH, channels=1)
    left = np.mean([sp.widths(found[SIZES[0]][1]) for found in fishers(folder)], 0)
    return WIDTH, sp.copycat(left / MIDDLE, target, DEPTH, WIDTH, channels=1)


@functools.cache
def scratch(folder: str, arm: str, share: int, lr: float, seed: int) -> Net:
    """A network trained as long as the pruned one in all: base and tuning."""
    width, mid = shape(folder, arm, share, seed)
    removals = STEP * (SHARES.index(share) + 1)
    return fit(folder, width, mid, BASE + removals * UPDATES, lr, seed)


def prepare(arm: str, folder: str, seeds: Sequence[int]) -> None:
    """Have what several threads would otherwise make at the same time."""
    data(folder)
    list(parallel(lambda seed: base(folder, seed), seeds))
    if arm not in CRITERIA:
        for share in SIZES:
            shape(folder, arm, share, seeds[0])


@functools.cache
def tuned(arm: str, folder: str) -> Tuning | None:
    """Two learning rates each, by the validation error at 75% of a seed of their own."""
    if arm == BEST:
        return None
    share, kind = SHARES[-1], "pruning" if arm in CRITERIA else "scratch"
    prepare(arm, folder, (TUNING_SEED,))
    if arm in CRITERIA:
        net = lambda lr: pruned(folder, arm, lr, TUNING_SEED)[share][0]
    else:
        net = lambda lr: scratch(folder, arm, share, lr, TUNING_SEED)
    scores = [(errors(folder, found)["valid"],) for found in parallel(net, RATES[kind])]
    settings = tuple({"lr": lr} for lr in RATES[kind])
    return Tuning(settings, tuple(scores), (TUNING_SEED,), "validation error", largest=False)


def tune(arm: str, fashion_mnist: str) -> Tuning | None:
    """The arm's learning rate."""
    return tuned(arm, str(fashion_mnist))


@functools.cache
def measured(folder: str, arm: str, lr: float, seed: int) -> dict[int, tuple[dict[str, float], int]]:
    """By percent removed: (errors, parameters)."""
    if arm in CRITERIA:
        found = pruned(folder, arm, lr, seed)
        return {share: (errors(folder, net), size_of(masks)) for share, (net, masks) in found.items()}
    nets = {share: scratch(folder, arm, share, lr, seed) for share in SIZES}
    return {share: (errors(folder, net), net.parameters) for share, net in nets.items()}


def pruning(arm: str, seeds: tuple[int, ...], fashion_mnist: str, tuned: dict[str, float]) -> Iterator[Row]:
    """Errors and parameters when so many percent of the middle channels are gone, or in a network of that size."""
    folder = str(fashion_mnist)
    if arm == BEST:
        rates = {name: _rate(name, folder) for name in CANDIDATES}
        for name in CANDIDATES:
            prepare(name, folder, seeds)
        each = lambda seed: {name: measured(folder, name, lr, seed) for name, lr in rates.items()}
        for seed, found in zip(seeds, parallel(each, seeds)):
            row: dict[str, Any] = {"seed": seed}
            for share in SIZES:  # chosen by validation images
                best = min(found, key=lambda name: found[name][share][0]["valid"])
                row |= {f"error@{share}": found[best][share][0]["test"], f"parameters@{share}": found[best][share][1]}
            yield row
        return
    prepare(arm, folder, seeds)
    for seed, found in zip(seeds, parallel(lambda seed: measured(folder, arm, tuned["lr"], seed), seeds)):
        row = (
            {"seed": seed, "error@0": errors(folder, base(folder, seed))["test"]} if arm in CRITERIA else {"seed": seed}
        )
        for share, (wrong, count) in found.items():
            row |= {
                f"error@{share}": wrong["test"],
                f"valid error@{share}": wrong["valid"],
                f"parameters@{share}": count,
            }
        yield row


def _rate(arm: str, folder: str) -> float:
    found = tuned(arm, folder)
    assert found is not None
    return found.chosen["lr"]


@functools.cache
def latencies(folder: str, seed: int) -> dict[str, dict[str, float]]:
    """Milliseconds per batch of 28x28 images by arm; the networks of a seed and size take turns."""
    found: dict[str, dict[str, float]] = {"compressed": {}, "narrower": {}, "bottleneck": {}}
    for share in SIZES:
        masks = fishers(folder)[seed][share][1]
        target = size_of(masks)
        width = sp.narrower(target, DEPTH, channels=1)
        shapes = {
            "compressed": (WIDTH, sp.widths(masks)),
            "narrower": (width, tuple(wrn.block_features(DEPTH, width)[0])),
            "bottleneck": (WIDTH, sp.bottleneck(target, DEPTH, WIDTH, channels=1)),
        }
        models = {name: classifier.model_of(replace(config(folder, *own), size=28)) for name, own in shapes.items()}
        given = {name: model.init(jax.random.key(seed)) for name, model in models.items()}
        forms = {name: lambda given, x, name=name, models=models: models[name].apply(given[name], x) for name in models}
        for size in (1, 32):
            images = np.random.default_rng(seed).integers(0, 256, (4, size, 28, 28, 1), np.uint8)
            times = timing.interleaved(forms, [(given, jnp.asarray(x)) for x in images], repeats=30, at_least=0.02)
            for name, own in times.items():
                found[name][f"batch {size} at {share}%"] = 1e3 * own.median
                found[name][f"parameters at {share}%"] = wrn.param_count(DEPTH, *shapes[name], channels=1)
    return found


def latency(arm: str, seeds: tuple[int, ...], fashion_mnist: str) -> Iterator[Row]:
    """Time of compiled inference of networks with as many parameters, at most, as the compressed one."""
    for seed in seeds:
        yield {"seed": seed} | latencies(str(fashion_mnist), seed)[arm]


P, L = "pruning", "latency"
small = Scale(
    experiments=(
        Experiment(P, (*CRITERIA, *SCRATCH, BEST), pruning, needs=("fashion_mnist",), tune=tune),
        Experiment(L, ("compressed", "narrower", "bottleneck"), latency, needs=("fashion_mnist",)),
    ),
    checks=(
        Check(P, "Fisher", "error@75", "below", 1.0, other="random", paired=True),
        Check(P, BEST, "error@50", "below", 0.0, other="Fisher", paired=True),
        Check(P, BEST, "error@75", "below", 0.0, other="Fisher", paired=True),
        Check(P, BEST, "error@50", "below", 0.0, other="L1", paired=True),
        Check(P, BEST, "error@75", "below", 0.0, other="L1", paired=True),
        *(
            Check(L, "narrower", f"batch {size} at {share}%", "times_at_most", 0.9, other="compressed", paired=True)
            for share in SIZES
            for size in (1, 32)
        ),
        Check(P, "Fisher", "error@75", "below", 0.0, other="L1", paired=True, report=True),
        *(
            Check(P, arm, f"error@{share}", "below", 0.0, other="Fisher", paired=True, report=True)
            for share in SIZES
            for arm in SCRATCH
        ),
        *(
            Check(L, "bottleneck", f"batch {size} at {share}%", "times_at_most", 0.9, "compressed", 0.0, True, True)
            for share in SIZES
            for size in (1, 32)
        ),
    ),
    seeds=5,
    minutes=17,
)
claim = Claim(
    method="structured-pruning",
    paper="Crowley, Turner, Storkey & O'Boyle (2018)",
    statement=(
        "When three quarters of the middle channels are removed one by one with training in between, the Fisher "
        "criterion leaves at least a point less error than random removal. A network of no more parameters that is "
        "trained from scratch for as many updates in all, of reduced width or with the middle channels that pruning "
        "found, is at least as good as prune-and-tune at 50% and 75%, and a narrower network is at least 10% faster "
        "than the compressed one of equal size."
    ),
    scope=(
        "WRN-10-2 on 10,000 images of Fashion-MNIST at 12x12 pixels, batches of 32; 600 updates of the base network "
        "and 2 (the paper: 100) between two removals; test errors on 4,000 images; latency on the CPU of the record at "
        "28x28. The paper prunes WRN-40-2, DenseNet-BC-100-12 and ResNet-34 on CIFAR-10 and ImageNet."
    ),
    scales={"small": small},
    baselines=("random", "Fisher", "L1", "compressed"),
    curves=(Curve(P, "error", "middle channels removed, %", "linear"),),
)
