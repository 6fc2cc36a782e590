"""Separable layers: structured maps of channels against a narrower dense net, with scaled weight decay and a teacher.

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
from jaxstack.nn import classifier
from jaxstack.nn.attention_transfer import Hypers, attention_maps, attention_weight
from jaxstack.nn.vision.separable import count_mult_adds
from jaxstack.nn.vision.wrn import WRN
from jaxstack.vision import separable_layers as sl

IMAGE, BATCH, UPDATES = (12, 12, 1), 32, 400
PARTS = {"train": 10_000, "valid": 2_000, "test": 4_000}
GROUP = 500
"""Images that are evaluated at a time."""
TUNING_SEED = 100
RATES = (0.05, 0.2)
DECAY, LARGE_DECAY = 5e-4, 5e-3
TEACHER = WRN(10, 2.0)
DENSE = TEACHER.clone(pointwise="dense")
SIZES = ("12%", "25%")
"""About that share of the weights that the dense maps have."""
MAPS: dict[str, tuple[str, tuple[float, float]]] = {
    "generic": ("generic", (0.055, 0.11)),
    "shuffle": ("shuffle", (4, 2)),
    "ACDC": ("acdc", (4, 9)),
    "tensor train": ("tt", (0.3, 0.44)),
    "Tucker": ("tucker", (0.35, 0.52)),
    "hashed": ("hashed", (0.12, 0.25)),
}
NARROWER, SECOND = "narrower", "second best map"
DECAYING = ("shuffle", "hashed")


def net_of(arm: str, size: str) -> WRN:
    """The network of an arm; the narrower one has at least as many parameters as any of the maps."""
    i = SIZES.index(size)
    if arm == NARROWER:
        most = max(net_of(name, size).param_count(IMAGE[2]) for name in MAPS)
        return sl.narrower(most, DENSE, IMAGE[2])
    kind, sizes = MAPS[arm]
    return TEACHER.clone(pointwise=kind, size=sizes[i])


def parallel(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """`function` of each item, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(function, items))


# Data and the teacher


class Data(NamedTuple):
    """Images uint8 and labels, on the device."""

    train: tuple[jax.Array, jax.Array]
    tests: tuple[jax.Array, jax.Array]
    """Validation, then test images, in groups [G, GROUP, ...]."""


def config(folder: str) -> classifier.Config:
    """Says which images and how they are normalised."""
    return classifier.Config(data=f"fashion-mnist={folder}", size=IMAGE[0], model="wrn-10-2")


@functools.cache
def data(folder: str) -> Data:
    """The images of all seeds."""
    own = config(folder)
    (train_x, train_y), valid, test = (classifier.arrays(own, part) for part in ("train", "valid", "test"))
    x, y = (np.concatenate([valid[i][: PARTS["valid"]], test[i][: PARTS["test"]]]) for i in (0, 1))
    split = lambda v: jnp.asarray(v.reshape(-1, GROUP, *v.shape[1:]))
    first = PARTS["train"]
    return Data((jnp.asarray(train_x[:first]), jnp.asarray(train_y[:first])), (split(x), split(y)))


def rows(seed: int) -> np.ndarray:
    """[UPDATES, BATCH] images that a run sees, in shuffled epochs."""
    rng, each = np.random.default_rng(seed), PARTS["train"] // BATCH
    epochs = -(-UPDATES // each)
    orders = [rng.permutation(PARTS["train"])[: each * BATCH].reshape(each, BATCH) for _ in range(epochs)]
    return np.concatenate(orders)[:UPDATES].astype(np.int32)


class Wrong(NamedTuple):
    """Percent of validation and of test images that are told wrong."""

    valid: float
    test: float


@functools.cache
def program(net: Any, scaled: bool, folder: str) -> Any:
    """The compiled training of a network: (key, hypers, rows, train images, labels, the teacher's maps, tests) ->
    (shares that are told wrong in each group, variables)."""
    own = config(folder)
    prepare = lambda x: classifier.prepared(own, x)
    learner = sl.student(net, IMAGE, scaled=scaled, prepare=prepare, num_updates=UPDATES, batch_size=BATCH)
    predict = learner.predict
    assert predict is not None

    def run(key: Any, hypers: Hypers, rows: Any, x: Any, y: Any, maps: Any, tests: Any) -> Any:
        def step(state: Any, at: Any) -> tuple[Any, tuple]:
            return learner.step(state, (x[at], (y[at], tuple(m[at] for m in maps))))[0], ()

        state = lax.scan(step, learner.init(key, hypers), rows)[0]
        wrong = lambda part: (predict(state, part[0])[0].argmax(-1) != part[1]).mean(dtype=jnp.float32)
        return lax.map(wrong, tests), {"params": state.params, **state.stats}

    d = data(folder)
    shape = lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype)
    maps = tuple(jax.ShapeDtypeStruct((PARTS["train"], side**2), jnp.float32) for side in map_sides())
    numbers = jax.tree.map(lambda _: jax.ShapeDtypeStruct((), jnp.float32), Hypers())
    orders = jax.ShapeDtypeStruct((UPDATES, BATCH), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    given = (key, numbers, orders, *jax.tree.map(shape, d.train), maps, jax.tree.map(shape, d.tests))
    return jax.jit(run).lower(*given).compile()


def map_sides() -> tuple[int, ...]:
    """Pixels on a side of the three stages."""
    return IMAGE[0], -(-IMAGE[0] // 2), -(-IMAGE[0] // 4)


def fit(net: Any, scaled: bool, folder: str, seed: int, hypers: Hypers, maps: Any) -> tuple[Wrong, Any]:
    """Train a network: (errors, variables)."""
    d = data(folder)
    numbers = jax.tree.map(jnp.float32, hypers)
    order = jnp.asarray(rows(seed))
    shares, found = program(net, scaled, folder)(jax.random.key(seed), numbers, order, *d.train, maps, d.tests)
    shares, cut = 100.0 * np.asarray(shares, np.float64), PARTS["valid"] // GROUP
    return Wrong(float(shares[:cut].mean()), float(shares[cut:].mean())), found


@functools.partial(jax.jit, static_argnums=0)
def _maps(own: classifier.Config, given: Any, x: jax.Array) -> tuple[jax.Array, ...]:
    taps: Any = lambda x: TEACHER.apply(given, classifier.prepared(own, x), taps=True)
    each = lambda x: attention_maps(taps(x)[1])
    found = lax.map(each, x.reshape(-1, GROUP, *x.shape[1:]))
    return tuple(m.reshape(len(x), -1) for m in found)


@functools.cache
def taught(folder: str, seed: int) -> tuple[tuple[jax.Array, ...], Wrong]:
    """The attention maps of a seed's teacher for all training images, and its errors."""
    nothing = tuple(jnp.zeros((PARTS["train"], side**2)) for side in map_sides())
    hypers = Hypers(lr=0.1, weight_decay=DECAY, beta=0.0)
    wrong, found = fit(TEACHER, False, folder, seed, hypers, nothing)
    return _maps(config(folder), found, data(folder).train[0]), wrong


# Students


class Run(NamedTuple):
    """What is trained."""

    arm: str
    size: str
    lr: float
    seed: int
    transfer: bool = True
    scaled: bool = True
    decay: float = DECAY

    @property
    def net(self) -> Any:
        return DENSE if self.arm == "dense" else net_of(self.arm, self.size)


@functools.cache
def trained(run: Run, folder: str) -> Wrong:
    """The errors of a student."""
    beta = attention_weight(IMAGE, 1000.0) if run.transfer else 0.0
    hypers = Hypers(lr=run.lr, weight_decay=run.decay, beta=beta)
    return fit(run.net, run.scaled, folder, run.seed, hypers, taught(folder, run.seed)[0])[0]


def train(runs: Sequence[Run], folder: str) -> list[Wrong]:
    """The errors of several, two at a time; what they share is made before."""
    data(folder)
    teacher: Any = TEACHER
    program(teacher, False, folder)
    parallel(lambda seed: taught(folder, seed), tuple(dict.fromkeys(run.seed for run in runs)))
    parallel(lambda own: program(*own, folder), tuple(dict.fromkeys((run.net, run.scaled) for run in runs)))
    return parallel(lambda run: trained(run, folder), runs)


@functools.cache
def tuned(arm: str, transfer: bool, folder: str) -> Tuning:
    """Two learning rates, by the validation error at the smallest size of a seed of their own."""
    wrong = train([Run(arm, SIZES[0], lr, TUNING_SEED, transfer) for lr in RATES], folder)
    settings, scores = tuple({"lr": lr} for lr in RATES), tuple((w.valid,) for w in wrong)
    return Tuning(settings, scores, (TUNING_SEED,), "validation error", largest=False, steps=UPDATES)


def rate(arm: str, transfer: bool, folder: str) -> float:
    return tuned(arm, transfer, folder).chosen["lr"]


# Equal parameters


def tune_maps(arm: str, fashion_mnist: str) -> Tuning | None:
    """The arm's learning rate."""
    return None if arm == SECOND else tuned(arm, True, str(fashion_mnist))


def students(arm: str, lr: float, seeds: Sequence[int], folder: str) -> dict[int, dict[str, Wrong]]:
    """Seed -> size -> errors of taught students; the dense network has one size alone."""
    sizes = SIZES[:1] if arm == "dense" else SIZES
    runs = [Run(arm, size, lr, seed) for seed in seeds for size in sizes]
    found: dict[int, dict[str, Wrong]] = {seed: {} for seed in seeds}
    for run, wrong in zip(runs, train(runs, folder)):
        found[run.seed][run.size] = wrong
    return found


def maps(arm: str, seeds: tuple[int, ...], fashion_mnist: str, tuned: dict[str, float]) -> Iterator[Row]:
    """Errors of students of about the same number of parameters, each with its own count and cost."""
    folder = str(fashion_mnist)
    if arm == SECOND:
        found = {name: students(name, rate(name, True, folder), seeds, folder) for name in MAPS}
        best = {size: second(found, size) for size in SIZES}
        for seed in seeds:
            yield {"seed": seed} | {f"error at {size}": found[best[size]][seed][size].test for size in SIZES}
        return
    for seed, by_size in students(arm, tuned["lr"], seeds, folder).items():
        row: Row = {"seed": seed}
        for size, wrong in by_size.items():
            net = DENSE if arm == "dense" else net_of(arm, size)
            count, cost = net.param_count(IMAGE[2]), count_mult_adds(net, (1, *IMAGE))
            if arm == "dense":
                row |= {"error": wrong.test}
            else:
                row |= {f"error at {size}": wrong.test, f"valid error at {size}": wrong.valid}
                row |= {f"parameters at {size}": count, f"multiply-adds at {size}": cost}
            row |= {f"test error, %@{count}": wrong.test, f"test error in %@{cost}": wrong.test}
        if arm == "dense":
            row["teacher's error"] = taught(folder, seed)[1].test
        yield row


def second(found: dict[str, dict[int, dict[str, Wrong]]], size: str) -> str:
    """The map with the second smallest mean validation error."""
    means = {name: np.mean([by[size].valid for by in runs.values()]) for name, runs in found.items()}
    return sorted(means, key=lambda name: means[name])[1]


# Weight decay and the teacher's attention


def decay(arm: str, seeds: tuple[int, ...], fashion_mnist: str) -> Iterator[Row]:
    """Errors at the smallest size with ten times the weight decay, scaled by the compression ratio or not."""
    folder, (name, kind) = str(fashion_mnist), arm.split(", ")
    lr = rate(name, True, folder)
    runs = [Run(name, SIZES[0], lr, seed, True, kind == "scaled", LARGE_DECAY) for seed in seeds]
    for run, wrong in zip(runs, train(runs, folder)):
        yield {"seed": run.seed, "error": wrong.test}


ALL = "all maps"


def tune_transfer(arm: str, fashion_mnist: str) -> Tuning | None:
    """The arm's learning rate, with the teacher or without."""
    name, kind = arm.split(", ")
    return None if name == ALL else tuned(name, kind == "taught", str(fashion_mnist))


def transfer(arm: str, seeds: tuple[int, ...], fashion_mnist: str, tuned: dict[str, float]) -> Iterator[Row]:
    """Errors at the smallest size with the teacher's attention or labels alone; "all maps" is the mean over them."""
    folder, (name, kind) = str(fashion_mnist), arm.split(", ")
    on = kind == "taught"
    names = tuple(MAPS) if name == ALL else (name,)
    runs = [Run(each, SIZES[0], rate(each, on, folder), seed, on) for seed in seeds for each in names]
    found = train(runs, folder)
    for seed in seeds:
        yield {"seed": seed, "error": float(np.mean([w.test for run, w in zip(runs, found) if run.seed == seed]))}


RIVALS = (f"{NARROWER}, taught", f"{NARROWER}, alone")
M, D, T = "equal parameters", "weight decay 5e-3", "transfer"
small = Scale(
    experiments=(
        Experiment(M, (*MAPS, NARROWER, SECOND, "dense"), maps, needs=("fashion_mnist",), tune=tune_maps),
        Experiment(D, tuple(f"{m}, {k}" for m in DECAYING for k in ("scaled", "plain")), decay, ("fashion_mnist",)),
        Experiment(
            T,
            tuple(f"{m}, {k}" for m in (*MAPS, NARROWER, ALL) for k in ("taught", "alone")),
            transfer,
            ("fashion_mnist",),
            tune_transfer,
        ),
    ),
    checks=(
        *(Check(M, SECOND, f"error at {size}", "below", 0.0, other=NARROWER, paired=True) for size in SIZES),
        # the two best maps by validation images, against the rival at its best: the teacher's attention may harm it
        *(Check(T, f"{name}, taught", "error", "below", 0.0, other=RIVALS, paired=True) for name in ("hashed", "ACDC")),
        Check(D, "shuffle, scaled", "error", "below", 0.5, other="shuffle, plain", paired=True),
        Check(D, "hashed, scaled", "error", "above", -0.5, other="hashed, plain", paired=True),
        Check(T, f"{ALL}, taught", "error", "below", 0.0, other=f"{ALL}, alone", paired=True),
        *(
            Check(M, name, f"error at {size}", "below", 0.0, other=NARROWER, paired=True, report=True)
            for size in SIZES
            for name in MAPS
        ),
        *(
            Check(T, f"{name}, taught", "error", "below", 0.0, other=f"{name}, alone", paired=True, report=True)
            for name in (*MAPS, NARROWER)
        ),
        *(
            Check(T, f"{name}, alone", "error", "below", 0.0, other=f"{NARROWER}, alone", paired=True, report=True)
            for name in MAPS
        ),
    ),
    seeds=5,
    minutes=45,
)
claim = Claim(
    method="separable-layers",
    paper="Gray, Crowley & Storkey (2019)",
    statement=(
        "At no more parameters than a narrower dense separable network at least two of six structured maps have no "
        "larger error, all taught by a teacher's attention, and at the smallest size hashing and ACDC have none either "
        "when the narrower network does without the teacher where that is better. With a weight decay of 5e-3, scaling "
        "it by the compression ratio lowers the error of the linear ShuffleNet by half a point or more and that of "
        "hashing by less. A teacher's attention lowers the error of the smallest networks in the mean over the maps."
    ),
    scope=(
        "WRN-10-2 on 10,000 images of Fashion-MNIST at 12x12 pixels without augmentation, batches of 32, 400 updates "
        "with a cosine, maps of about 12% and 25% of the weights of the dense ones; test errors on 4,000 images. The "
        "weight decay of the second experiment is ten times the paper's, as decay acts little in so few updates. The "
        "paper trains WRN-28-10, DARTS, WRN-50-2 and MobileNetV2 on CIFAR-10 and ImageNet."
    ),
    scales={"small": small},
    baselines=(NARROWER, *RIVALS, "shuffle, plain", "hashed, plain", f"{ALL}, alone"),
    curves=(
        Curve(M, "test error, %", "parameters", "log"),
        Curve(M, "test error in %", "multiply-adds of an image", "log"),
    ),
)
