"""BlockSwap: networks of mixed cheap blocks with a high Fisher potential are better students than random ones.

Small scale: WRN-10-1 on Fashion-MNIST at 12x12 pixels (2x2 means, a pixel cut off on all sides), 10,000 training and
4,000 test images, none moved, so that the teacher looks at each once.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxstack.claims.harness import Check, Claim, Experiment, Row, Scale
from jaxstack.nn import attention_transfer as transfer
from jaxstack.nn import classifier as classifiers
from jaxstack.nn.attention_transfer import Hypers
from jaxstack.nn.supervised import Model, cross_entropy, supervised, variables
from jaxstack.nn.vision import wrn
from jaxstack.report import stats, timing
from jaxstack.vision import blockswap as bs

DEPTH, WIDTH, SIDE = 10, 1.0, 12
SPACE = bs.Space(DEPTH, WIDTH, 10, 1)
BLOCKS = len(wrn.block_features(DEPTH, WIDTH)[0])
BATCH, UPDATES, LR, SCORED = 64, 300, 0.1, 32
"""Updates are those of teachers and students alike; so many images give the scores."""
PARTS = {"train": 10_000, "test": 4_000}
SHARE, COUNT, FEW = 0.35, 60, 3
BUDGET = round(SHARE * wrn.param_count(DEPTH, WIDTH, channels=1))
BETA = transfer.attention_weight((SIDE, SIDE, 1), 1000.0)
TOP, RANDOM, BOTTOM = "Fisher, top 3", "random 3", "Fisher, bottom 3"
NORM, LARGEST, SCRATCH, NARROWER = "gradient norm", "parameters", "no teacher", "narrower WRN"
SINGLE = {"DConv alone": "DConv", NARROWER: "Conv"}
"""Networks of one type, as wide as the budget allows."""


def config(folder: str) -> classifiers.Config:
    """The teacher and its images."""
    return classifiers.Config(data=f"fashion-mnist={folder}", size=SIDE, model=f"wrn-{DEPTH}-{WIDTH!r}", shift=0)


@functools.cache
def data(folder: str) -> dict[str, Any]:
    """(images uint8, labels) of each part, on the device."""
    found = {part: classifiers.arrays(config(folder), part) for part in PARTS}  # pyright: ignore[reportArgumentType]
    return {part: jax.device_put((x[: PARTS[part]], y[: PARTS[part]])) for part, (x, y) in found.items()}


def rows(seed: int) -> jax.Array:
    """[UPDATES, BATCH] rows of the training images in shuffled epochs."""
    rng, each = np.random.default_rng(seed), PARTS["train"] // BATCH
    orders = [rng.permutation(PARTS["train"])[: each * BATCH].reshape(each, BATCH) for _ in range(-(-UPDATES // each))]
    return jnp.asarray(np.concatenate(orders)[:UPDATES])


def model_of(space: bs.Space, kinds: Sequence[str]) -> Model:
    """A network that tells its stages, for images uint8."""
    ready = lambda x: classifiers.prepared(config(""), x)
    return transfer.with_taps(space.network(kinds), jnp.zeros((1, SIDE, SIDE, 1), jnp.uint8), ready)


def fitted(learner: Any, hypers: Any, start: Any, at: jax.Array, train: Any) -> Any:
    """Variables after an update for each row of `at`, begun with given weights."""
    state = learner.init(jax.random.key(0), hypers)
    state = state._replace(params=start["params"], stats={k: v for k, v in start.items() if k != "params"})
    step = lambda state, at: (learner.step(state, jax.tree.map(lambda v: v[at], train))[0], ())
    return variables(lax.scan(step, state, at)[0])


def outputs(model: Model, variables: Any, images: jax.Array) -> Any:
    """(logits, attention maps) of many images."""

    def some(x: jax.Array) -> Any:
        logits, taps = model.apply(variables, x)
        return logits, transfer.attention_maps(taps)

    found = lax.map(some, images.reshape(-1, 500, *images.shape[1:]))
    return jax.tree.map(lambda v: v.reshape(len(images), *v.shape[2:]), found)


@jax.jit
def _teach(start: Any, at: jax.Array, train: Any, test: jax.Array) -> Any:
    """(the teacher's maps of the training images, its test logits)."""
    model = model_of(SPACE, ("Conv",) * BLOCKS)
    loss = lambda outputs, labels, hypers: cross_entropy(outputs[0], labels, hypers)
    last = fitted(supervised(model, loss, num_steps=UPDATES, hypers=Hypers(lr=LR)), Hypers(lr=LR), start, at, train)
    return outputs(model, last, train[0])[1], outputs(model, last, test)[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _study(space: bs.Space, kinds: tuple[str, ...], beta: Any, start: Any, at: Any, train: Any, test: Any) -> Any:
    """Test logits of a student; `train` holds images and (labels, the teacher's maps)."""
    model, hypers = model_of(space, kinds), Hypers(lr=LR, beta=beta)
    learner = transfer.taught(model, num_updates=UPDATES, batch_size=BATCH, hypers=Hypers(lr=LR))
    return outputs(model, fitted(learner, hypers, start, at, train), test)[0]


def wrong(logits: Any, labels: Any) -> float:
    """Percent of images told wrong."""
    return 100.0 * float((np.asarray(logits).argmax(-1) != np.asarray(labels)).mean())


@functools.cache
def teacher(folder: str, seed: int) -> tuple[Any, float]:
    """A seed's teacher: its attention maps of the training images, and its test error in percent."""
    (x, y), (test, labels) = data(folder).values()
    start = bs.Weights(jax.random.key(seed), SPACE).variables(("Conv",) * BLOCKS)
    maps, logits = _teach(start, rows(seed), (x, y), test)
    return maps, wrong(logits, labels)


@functools.cache
def scorer(folder: str, seed: int, minibatches: int = 1) -> bs.Scorer:
    """A seed's minibatches and weights for scores."""
    return bs.Scorer(jax.random.key(seed + 1000), minibatch(folder, seed, minibatches), SPACE)


def minibatch(folder: str, seed: int, count: int = 1) -> list[tuple[jax.Array, jax.Array]]:
    """A seed's images and labels for scores."""
    x, y = data(folder)["train"]
    return [(classifiers.prepared(config(folder), x[at]), y[at]) for at in rows(seed + 2000)[:count, :SCORED]]


@functools.cache
def candidates() -> np.ndarray:
    """Sixty candidates of the budget, all different; the same for all seeds, which share their programs."""
    drawn = bs.sample_candidates(jax.random.key(0), BUDGET, n=2 * COUNT, space=SPACE)
    return drawn[np.sort(np.unique(drawn, axis=0, return_index=True)[1])][:COUNT]


@functools.cache
def scores(folder: str, seed: int) -> np.ndarray:
    """Fisher potentials of a seed's candidates."""
    own = scorer(folder, seed)
    own.prepare(candidates())
    return np.array([own.fisher(candidate).sum() for candidate in candidates()])


@functools.cache
def norms(folder: str, seed: int) -> np.ndarray:
    """Gradient norms of a seed's candidates."""
    return np.array([scorer(folder, seed).gradient_norm(candidate) for candidate in candidates()])


def student(folder: str, seed: int, space: bs.Space, kinds: Sequence[str], beta: float = BETA) -> Callable[[], Any]:
    """What trains a student, and returns its test logits; its program is compiled when it runs first."""
    (x, y), (test, _) = data(folder).values()
    start = bs.Weights(jax.random.key(seed + 3000), space).variables(kinds)
    train = (x, (y, teacher(folder, seed)[0]))
    at = rows(seed + 4000)
    return lambda: jax.block_until_ready(_study(space, tuple(kinds), jnp.float32(beta), start, at, train, test))


@functools.cache
def error(folder: str, seed: int, space: bs.Space, kinds: tuple[str, ...], beta: float = BETA) -> float:
    """Test error of a student in percent."""
    return wrong(student(folder, seed, space, kinds, beta)(), data(folder)["test"][1])


def chosen(folder: str, arm: str, seed: int) -> list[tuple[bs.Space, tuple[str, ...], float]]:
    """(space, types, weight of the attention) of the networks that an arm trains."""
    if arm in SINGLE:
        width = bs.matching_width(SINGLE[arm], BUDGET, DEPTH, channels=1)
        return [(SPACE._replace(width=width), (SINGLE[arm],) * BLOCKS, BETA)]
    own, fisher = candidates(), scores(folder, seed)
    order = {
        TOP: lambda: np.argsort(-fisher)[:FEW],
        BOTTOM: lambda: np.argsort(fisher)[:FEW],
        RANDOM: lambda: np.random.default_rng(seed).choice(COUNT, FEW, replace=False),
        SCRATCH: lambda: np.argsort(-fisher)[:1],
        NORM: lambda: np.argsort(-norms(folder, seed))[:1],
        LARGEST: lambda: np.argsort(-bs.candidate_params(own, SPACE))[:1],
    }
    return [(SPACE, bs.names(own[place]), 0.0 if arm == SCRATCH else BETA) for place in order[arm]()]


def parallel(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """`function` of each item, two at a time: what is compiled takes most of the time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(function, items))


def errors(folder: str, seed: int, nets: Sequence[Any]) -> list[float]:
    """Test errors of networks that were chosen."""
    return parallel(lambda net: error(folder, seed, *net), nets)


def selection(arm: str, seeds: tuple[int, ...], fashion_mnist: str) -> Iterator[Row]:
    """Test errors of the students that an arm chooses among a seed's candidates."""
    folder = str(fashion_mnist)
    data(folder)
    teacher(folder, seeds[0])  # compiles, which two threads would do twice
    parallel(lambda seed: teacher(folder, seed), seeds[1:])
    for seed in seeds:
        own = chosen(folder, arm, seed)
        found = errors(folder, seed, own)
        row: Row = {"seed": seed, "error": float(np.mean(found)), "error of the first": found[0]}
        row["parameters"] = float(np.mean([count(space, kinds) for space, kinds, _ in own]))
        row["teacher's error"] = teacher(folder, seed)[1]
        yield row | (correlations(folder, seed) if arm == TOP else {})


def count(space: bs.Space, kinds: Sequence[str]) -> int:
    """Parameters of a network."""
    return wrn.param_count(space.depth, space.width, None, space.classes, space.channels, kinds)


def correlations(folder: str, seed: int) -> dict[str, float]:
    """Spearman's correlation of score and accuracy over all networks that are trained by their place in the order."""
    nets = list(dict.fromkeys(net for arm in (TOP, RANDOM, BOTTOM) for net in chosen(folder, arm, seed)))
    place = {bs.names(candidate): i for i, candidate in enumerate(candidates())}
    own = np.array([scores(folder, seed)[place[kinds]] for _, kinds, _ in nets])
    accuracy = -np.array(errors(folder, seed, nets))
    size = np.array([count(space, kinds) for space, kinds, _ in nets])
    return {
        "rank correlation": stats.spearman(own, accuracy).value,
        "rank correlation of parameters": stats.spearman(size, accuracy).value,
    }


def ablation(arm: str, seeds: tuple[int, ...], fashion_mnist: str) -> Iterator[Row]:
    """How far other scores order a seed's candidates as the Fisher potential does."""
    folder = str(fashion_mnist)
    for seed in seeds:
        own, fisher = candidates(), scores(folder, seed)
        first = scorer(folder, seed)
        if arm == "mean over channels":
            other = [first.fisher(c, "mean").sum() for c in own]
        elif arm == "another minibatch":
            two = scorer(folder, seed, 2)
            other = [two.fisher(c).sum() - f for c, f in zip(own, fisher)]
        elif arm == "other weights":
            again = bs.Scorer(jax.random.key(seed + 5000), minibatch(folder, seed), SPACE)
            other = [again.fisher(c).sum() for c in own]
        elif arm == NORM:
            other = norms(folder, seed)
        else:
            other = bs.candidate_params(own, SPACE)
        yield {"seed": seed, "rank correlation": stats.spearman(fisher, np.asarray(other)).value}


def cost(arm: str, seeds: tuple[int, ...], fashion_mnist: str) -> Iterator[Row]:
    """CPU seconds of scoring all candidates and of training one of them, both compiled."""
    folder = str(fashion_mnist)
    for seed in seeds:
        own, order = candidates(), np.argsort(-scores(folder, seed))
        if arm == SEARCH:
            one = scorer(folder, seed)
            run: Callable[[], Any] = lambda one=one, own=own: [one.fisher(c) for c in own]
        else:
            kinds = bs.names(own[order[0]])
            error(folder, seed, SPACE, kinds)  # compiles, if that was not done before
            run = student(folder, seed, SPACE, kinds)
        taken = timing.timed(run)
        yield {"seed": seed, "CPU seconds": taken.cpu, "seconds": taken.wall}


SELECTION, ORDER, COST = "selection", "order", "cost"
SEARCH, ONE = f"scores of {COUNT}", "one training"
OTHERS = ("another minibatch", "other weights", "mean over channels", NORM, LARGEST)
RIVALS = (NORM, LARGEST, *SINGLE, SCRATCH)
small = Scale(
    experiments=(
        Experiment(SELECTION, (TOP, RANDOM, BOTTOM, *RIVALS), selection, needs=("fashion_mnist",)),
        Experiment(ORDER, OTHERS, ablation, needs=("fashion_mnist",)),
        Experiment(COST, (SEARCH, ONE), cost, needs=("fashion_mnist",)),
    ),
    checks=(
        Check(SELECTION, TOP, "error", "below", 0.5, other=RANDOM, paired=True),
        Check(SELECTION, RANDOM, "error", "below", 0.0, other=BOTTOM, paired=True),
        Check(SELECTION, TOP, "rank correlation", "at_least", 0.3),
        Check(COST, SEARCH, "CPU seconds", "times_at_most", 0.1, other=ONE, paired=True),
        *(
            Check(SELECTION, TOP, "error of the first", "below", 0.0, other=rival, paired=True, report=True)
            for rival in RIVALS
        ),
        Check(SELECTION, TOP, "rank correlation of parameters", "at_least", 0.3, report=True),
        *(Check(ORDER, other, "rank correlation", "at_least", 0.5, report=True) for other in OTHERS),
    ),
    seeds=5,
    minutes=28,
)
claim = Claim(
    method="blockswap",
    paper="Turner, Crowley, O'Boyle, Storkey & Gray (ICLR 2020)",
    statement=(
        "Among 60 random networks of mixed blocks with 35% of the teacher's parameters, the three of the highest "
        "Fisher potential at initialisation become students with at least half a point less error than three random "
        "ones, and these are better than the three of the lowest; potential and accuracy are correlated (Spearman's "
        "rho of at least 0.3 over the networks that are trained), and all scores cost less than a tenth of one "
        "training."
    ),
    scope=(
        "WRN-10-1, three blocks, on 10,000 images of Fashion-MNIST at 12x12 pixels without augmentation, "
        "batches of 64; 300 updates of teachers and students, test errors on 4,000 images, one minibatch of "
        "32 for the scores (the paper: WRN-40-2 on CIFAR-10, ResNet-34 on ImageNet, 1,000 candidates, "
        "minibatches of 128, 200 epochs). All arms have the settings of the released code, none is tuned; the "
        "weight of the attention follows the number of pixels. The 60 candidates are the same for all seeds, "
        "which differ in minibatch, weights, teacher and training. The highest and lowest scores are "
        "over-represented where the correlation is measured."
    ),
    scales={"small": small},
    baselines=(RANDOM, BOTTOM, *RIVALS),
    ours="Fisher",
)
