"""Prediction-guided distillation: how a small detector of scenes gains by imitating a larger one, by where it imitates.

Small scale: FCOS on scenes of 32 pixels. Each seed has a teacher and scenes of its own, which all arms share.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial as partial_of
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxstack.claims.harness import Check, Claim, Experiment, Row, Scale, Tuning
from jaxstack.core.learner import Learner
from jaxstack.data.scenes import Scenery, scenes
from jaxstack.nn.supervised import Optimiser, linen, supervised, variables
from jaxstack.nn.vision import boxes as on_boxes
from jaxstack.nn.vision.average_precision import average_precision
from jaxstack.nn.vision.detection import Detector, Outputs, SmallBackbone, targets_of
from jaxstack.nn.vision.detection_loss import detector_losses
from jaxstack.vision import pgd

CLASSES, STRIDES, ASIDE = 4, (4, 8, 16), 50
TUNING_SEED = 100
TEACHER_LR = 5e-3
RATES, ALPHAS = (5e-3, 1e-2, 2e-2), (0.1, 0.5)
"""Learning rates and weights of the imitation that are tried, in all pairs."""
ALONE_RATES = (1.25e-3, 2.5e-3, *RATES, 4e-2)
"""Learning rates that are tried where there is nothing to imitate, as many."""
TEACHER, ALONE, START = "teacher", "student alone", "inheritance only"
OURS, BOX, BEST = "PGW", "whole box", "top K alike"
FRESH = ", fresh start"


class Arm(NamedTuple):
    """How a student is taught."""

    region: str | None
    """Where it imitates; None: nowhere."""
    inherits: bool = True
    """Whether its neck and head start from the teacher's."""
    topk: int = 9
    settings: tuple[tuple[str, float], ...] = ()
    """Fields of `pgd.Settings` that are other than the defaults."""


STUDENTS = {
    ALONE: Arm(None, False),
    START: Arm(None),
    BOX: Arm("box"),
    BEST: Arm("topk"),
    OURS: Arm("pgw"),
    "quality": Arm("quality"),
    "Gaussian in the box": Arm("box-gaussian"),
    "kernel density": Arm("kde"),
    BOX + FRESH: Arm("box", False),
    BEST + FRESH: Arm("topk", False),
    OURS + FRESH: Arm("pgw", False),
}
SWEEPS = {
    **{f"{OURS}, K={k}": Arm("pgw", topk=k) for k in (1, 3, 30)},
    **{f"{OURS}, xi={xi:g}": Arm("pgw", settings=(("xi_cls", xi), ("xi_reg", xi))) for xi in (0.0, 0.6, 0.8, 1.0)},
    f"{OURS}, classes only": Arm("pgw", settings=(("reg_weight", 0.0),)),
    f"{OURS}, boxes only": Arm("pgw", settings=(("cls_weight", 0.0),)),
}
SHARES = {"best 1%": 0.01, "best 5%": 0.05, "best 10%": 0.1, "all": 1.0}


class Budget(NamedTuple):
    """What all arms of a scale share."""

    size: int
    train: int
    test: int
    scenery: Scenery
    channels: int
    widths: tuple[int, int]
    """Of the teacher's and of the student's backbone."""
    updates: tuple[int, int]
    """Of the teacher and of students."""
    batch: int = 16


SMALL = Budget(
    32, 3000, 500, Scenery(most=2, half=(4.0, 9.0), noise=0.03, texture=0.1, contrast=0.3), 16, (16, 8), (2000, 800)
)
FULL = Budget(64, 2000, 500, Scenery(), 32, (32, 8), (8000, 3200))


class Hypers(NamedTuple):
    """Numbers of a detector's training."""

    lr: float = TEACHER_LR
    min_lr: float = 0.0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    max_grad_norm: float = 10.0
    region: float = 0.0
    """Place in `pgd.REGIONS`: one program serves all."""
    imitation: pgd.Settings = pgd.Settings()


# Data and networks


class Parts(NamedTuple):
    """Scenes of a seed, on the device: images and (boxes, labels, valid)."""

    train: tuple[Any, Any]
    test: tuple[Any, Any]


def parallel(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """`function` of each item, two at a time, in order."""
    with ThreadPoolExecutor(2) as pool:
        yield from pool.map(function, items)


@functools.cache
def data(budget: Budget, seed: int) -> Parts:
    """Scenes of a seed's own for training and test; those of the tuning seed choose settings."""

    def drawn(number: int, count: int) -> tuple[Any, Any]:
        found = scenes(number, count, budget.size, budget.scenery)
        return jax.device_put((found.image, (found.boxes, found.labels, found.valid)))

    return Parts(drawn(10_000 + seed, budget.train), drawn(20_000 + seed, budget.test))


def detector(budget: Budget, width: int) -> Detector:
    """FCOS on three levels, with a backbone of a width."""
    return Detector(SmallBackbone(width), CLASSES, STRIDES, channels=budget.channels)


def side(budget: Budget) -> tuple[int, int]:
    return budget.size, budget.size


def learner_of(budget: Budget, student: bool, topk: int = 9) -> Learner:
    """Of batches (images, truth), a student's (images, (truth, what the teacher says of them))."""
    model = linen(
        detector(budget, budget.widths[student]),
        np.zeros((1, *side(budget), 3), np.uint8),
        prepare=lambda x: (x.astype(jnp.float32) / 255.0 - 0.5) / 0.25,
    )
    xy = on_boxes.locations(side(budget), STRIDES)

    def loss(outputs: Outputs, targets: Any, hypers: Any) -> jax.Array:
        truth, taught = targets if student else (targets, None)
        wanted = targets_of("fcos", side(budget), STRIDES, *truth)
        parts = detector_losses("fcos", outputs.logits, outputs.boxes, outputs.quality, wanted)
        found = parts.classes + parts.boxes + parts.quality
        if taught is None:
            return found
        region = hypers.region.astype(jnp.int32)
        return found + pgd.imitation_loss(outputs, truth, taught, xy, hypers.imitation, topk=topk, region=region)[0]

    optimiser, steps = Optimiser("adam", "cosine", 0.05, clip=True, decay=None), budget.updates[student]
    return supervised(model, loss, optimiser=optimiser, num_steps=steps, hypers=Hypers())


def order(budget: Budget, student: bool, seed: int) -> np.ndarray:
    """Rows [updates, batch] of shuffled epochs."""
    rng, updates = np.random.default_rng((seed, student)), budget.updates[student]
    epoch = lambda: rng.permutation(budget.train)[: budget.train // budget.batch * budget.batch]
    each = budget.train // budget.batch
    rows = np.concatenate([epoch() for _ in range(-(-updates // each))])
    return rows.reshape(-1, budget.batch)[:updates].astype(np.int32)


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options={"xla_backend_optimization_level": 0})
def _start(budget: Budget, student: bool, key: jax.Array, hypers: Any) -> Any:
    """A run's first state; runs once, so what is saved is compiling."""
    return learner_of(budget, student).init(key, hypers)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _fit(budget: Budget, student: bool, topk: int, state: Any, rows: jax.Array, batches: Any) -> Any:
    step = learner_of(budget, student, topk).step
    one = lambda state, at: (step(state, jax.tree.map(lambda x: x[at], batches))[0], ())
    return variables(lax.scan(one, state, rows)[0])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _outputs(budget: Budget, width: int, given: Any, images: jax.Array) -> Outputs:
    x = (images.astype(jnp.float32) / 255.0 - 0.5) / 0.25
    split = x.reshape(-1, ASIDE, *x.shape[1:])
    found = lax.map(lambda part: detector(budget, width).apply(given, part), split)
    return jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), found)


@functools.partial(jax.jit, static_argnums=0)
def _precision(budget: Budget, logits: jax.Array, quality: jax.Array, boxes: jax.Array, truth: Any) -> Any:
    options: Any = dict(counts=on_boxes.level_counts(side(budget), STRIDES), image_hw=side(budget), top_n=100, most=20)
    found = lax.map(lambda image: on_boxes.postprocess(*image, **options), (logits, quality, boxes), batch_size=ASIDE)
    each, there = average_precision(found, *truth, classes=CLASSES)
    return jnp.where(there[:, None], each, 0.0).sum(0) / there.sum()


def precision(budget: Budget, outputs: Outputs, truth: Any) -> dict[str, float]:
    """mAP over thresholds .5 to .95, and at .5, in 0..1."""
    each = _precision(budget, outputs.logits, outputs.quality, outputs.boxes, truth)
    return {"mAP": float(each.mean()), "AP50": float(each[0])}


# Runs


@functools.cache
def teacher(budget: Budget, seed: int) -> Any:
    """Variables of a seed's teacher, trained once."""
    state = _start(budget, False, jax.random.key(seed), Hypers())
    return _fit(budget, False, 0, state, jnp.asarray(order(budget, False, seed)), data(budget, seed).train)


@functools.cache
def taught(budget: Budget, seed: int) -> pgd.Taught:
    """What a seed's teacher says of its training scenes: it is asked once, as it is frozen."""
    return pgd.taught(_outputs(budget, budget.widths[0], teacher(budget, seed), data(budget, seed).train[0]))


@functools.cache
def student(budget: Budget, arm: Arm, lr: float, alpha: float, seed: int) -> dict[str, float]:
    """Precision of a student on the seed's test scenes, and its parameters."""
    silent = dict(cls_weight=0.0, reg_weight=0.0) if arm.region is None else {}
    imitation = pgd.Settings(**{"alpha": alpha} | silent | dict(arm.settings))
    region = 0 if arm.region is None else pgd.REGIONS.index(arm.region)
    hypers = Hypers(lr=lr, region=region, imitation=imitation)
    state = _start(budget, True, jax.random.key(seed + 1000), hypers)
    if arm.inherits:
        started = pgd.init_student({"params": state.params}, teacher(budget, seed))
        state = state._replace(params=started["params"])
    (images, truth), test = data(budget, seed)
    batches = (images, (truth, taught(budget, seed)))
    found = _fit(budget, True, arm.topk, state, jnp.asarray(order(budget, True, seed)), batches)
    count = sum(x.size for x in jax.tree.leaves(found["params"]))
    outputs = _outputs(budget, budget.widths[1], found, test[0])
    return precision(budget, outputs, test[1]) | {"parameters": count}


def prepare(budget: Budget, seeds: Sequence[int]) -> None:
    """Have what several threads would otherwise make at the same time."""
    list(parallel(lambda seed: taught(budget, seed), seeds))


def tune(arm: str, budget: Budget = SMALL) -> Tuning | None:
    """Six settings each: learning rates and weights of the imitation, or learning rates where nothing is imitated."""
    if arm == TEACHER:
        return None
    own = (STUDENTS | SWEEPS)[arm]
    settings = [{"lr": lr} for lr in ALONE_RATES]
    if own.region is not None:
        settings = [{"lr": lr, "alpha": alpha} for lr in RATES for alpha in ALPHAS]
    prepare(budget, (TUNING_SEED,))
    run = lambda s: student(budget, own, s["lr"], s.get("alpha", 0.0), TUNING_SEED)["mAP"]
    scores = tuple((score,) for score in parallel(run, settings))
    return Tuning(tuple(settings), scores, (TUNING_SEED,), "mAP", steps=budget.updates[1])


def distillation(arm: str, seeds: tuple[int, ...], tuned: dict[str, float], budget: Budget = SMALL) -> Iterator[Row]:
    """Precision of the teacher and of students on test scenes."""
    prepare(budget, seeds)
    if arm == TEACHER:
        for seed in seeds:
            given, test = teacher(budget, seed), data(budget, seed).test
            found = precision(budget, _outputs(budget, budget.widths[0], given, test[0]), test[1])
            yield {"seed": seed, "parameters": sum(x.size for x in jax.tree.leaves(given["params"]))} | found
        return
    own, lr, alpha = (STUDENTS | SWEEPS)[arm], tuned["lr"], tuned.get("alpha", 0.0)
    for seed, found in zip(seeds, parallel(lambda seed: student(budget, own, lr, alpha, seed), seeds)):
        yield {"seed": seed} | found


@functools.partial(jax.jit, static_argnums=0)
def _silenced(budget: Budget, outputs: Outputs, truth: Any, share: jax.Array) -> jax.Array:
    xy = on_boxes.locations(side(budget), STRIDES)

    def one(logits: jax.Array, predicted: jax.Array, gt: jax.Array, labels: jax.Array, valid: jax.Array) -> jax.Array:
        q = pgd.quality(logits, predicted, gt, labels, valid, 0.8, xy)
        return jnp.where(pgd.audible(q, pgd.inside_boxes(xy, gt, valid), share)[:, None], logits, -100.0)

    return jax.vmap(one)(outputs.logits, outputs.boxes, *truth)


def silencing(arm: str, seeds: tuple[int, ...], budget: Budget = SMALL) -> Iterator[Row]:
    """The teacher's precision when all but the best locations of each object say nothing."""
    prepare(budget, seeds)
    for seed in seeds:
        images, truth = data(budget, seed).test
        outputs = _outputs(budget, budget.widths[0], teacher(budget, seed), images)
        whole = precision(budget, outputs, truth)["mAP"]
        logits = _silenced(budget, outputs, truth, jnp.float32(SHARES[arm]))
        found = precision(budget, outputs._replace(logits=logits), truth)
        yield {"seed": seed, "kept": found["mAP"] / max(whole, 1e-6)} | found


D, S = "distillation", "silencing"
above = lambda arm, other, value=0.0, **options: Check(
    D, arm, "mAP", "above", value, other=other, paired=True, **options
)
CHECKS = (
    above(OURS, BOX),
    above(OURS, ALONE, 0.03),
    above(START, ALONE, report=True),
    *(above(OURS, other, report=True) for other in (START, BEST, "quality", "Gaussian in the box", "kernel density")),
    above(BOX, START, report=True),
    above(OURS + FRESH, ALONE, report=True),
    *(above(OURS + FRESH, other + FRESH, report=True) for other in (BOX, BEST)),
    above(TEACHER, ALONE, report=True),
    *(Check(S, arm, "kept", "at_least", 0.9, report=True) for arm in SHARES),
)


def of_scale(budget: Budget, minutes: float, sweeps: bool) -> Scale:
    """The same experiments with other networks and numbers of scenes and updates."""
    arms = (TEACHER, *STUDENTS, *(SWEEPS if sweeps else ()))
    extra = tuple(above(arm, OURS, report=True) for arm in SWEEPS) if sweeps else ()
    return Scale(
        experiments=(
            Experiment(D, arms, partial_of(distillation, budget=budget), tune=partial_of(tune, budget=budget)),
            Experiment(S, tuple(SHARES), partial_of(silencing, budget=budget)),
        ),
        checks=(*CHECKS, *extra),
        seeds=5,
        minutes=minutes,
    )


claim = Claim(
    method="pgd",
    paper="Yang, Ochal, Storkey & Crowley (ECCV 2022)",
    statement=(
        "A small detector that imitates a larger one at the locations of its best predictions, weighted by a Gaussian "
        "of their positions, and starts from its neck and head, has a mAP at least that of one that imitates whole "
        "boxes, and at least 3 points above one that learns alone."
    ),
    scope=(
        "Scenes of 32 pixels with one or two shapes of four classes; FCOS on three levels of 16 channels, two "
        "convolutions per tower, backbones of width 16 (teacher, 2,000 updates of 16) and 8 (students, 800), K=9; "
        "3,000 scenes for training and 500 for test for each seed (the paper: COCO, five detectors, ResNet-101 and "
        "-50). Six settings of learning rate and weight of the imitation are tried for each arm on a seed of its own, "
        "six learning rates where nothing is imitated. The full scale has 64 pixels, up to four objects, 32 channels, "
        "widths 32 and 8, and the sweeps of K, xi and single branches; it was not run."
    ),
    scales={"small": of_scale(SMALL, 12, False), "full": of_scale(FULL, 0, True)},
    baselines=(ALONE, START, BOX, BEST, "quality", "Gaussian in the box", "kernel density"),
    ours=OURS,
)
