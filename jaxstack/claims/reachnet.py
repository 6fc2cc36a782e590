"""REACHNet: training for one scanner alone, and what augmentation, resolutions and attention are worth on others.

B-scans are phantoms whose truth is known. All networks are trained on scanner A; they are tested on A, on more speckle
(B), on more shadows (C), at half the resolution (D) and with pixels 1.4 times as wide (E). Each seed has scans of its
own.
"""

import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from functools import partial as partial_of
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxstack.claims.harness import Check, Claim, Experiment, Row, Scale
from jaxstack.core.runner import train
from jaxstack.data.sources import HostData
from jaxstack.medical import choroid, oct_networks, reachnet
from jaxstack.medical.phantoms_oct import DEVICES, oct_set
from jaxstack.medical.segmentation import dice
from jaxstack.nn.vision.reachnet import ReachNet
from jaxstack.nn.vision.unet import UNet

SIZE, CROP = (128, 192), (96, 144)
A = DEVICES["A"]
TESTED = {
    "A": A,
    "B": A._replace(looks=(1.5, 3.0)),
    "C": A._replace(shadows=(5, 9)),
    "D": A._replace(size=(64, 96)),
    "E": A._replace(field=(1.4, 1.0)),
}
TRAIN_SEED, TEST_SEED = 60_000, 70_000

PLAIN, DOMAIN, SEVERAL, OURS = "plain U-Net", "domain augmentation", "several resolutions", "REACHNet"
RESIDUAL, DEEP = "REACHNet, residual", "REACHNet, deep"
FULL_RESOLUTION, RESOLUTIONS = (1.0,), (1.0, 0.75, 0.5)
OPTIONS: dict[str, dict[str, Any]] = {
    PLAIN: dict(augmentation="generic", resolutions=FULL_RESOLUTION, attention=False),
    DOMAIN: dict(augmentation="domain", resolutions=FULL_RESOLUTION, attention=False),
    SEVERAL: dict(augmentation="domain", resolutions=RESOLUTIONS, attention=False),
    OURS: dict(augmentation="domain", resolutions=RESOLUTIONS),
    RESIDUAL: dict(augmentation="domain", resolutions=RESOLUTIONS, residual=True),
    DEEP: dict(augmentation="domain", resolutions=RESOLUTIONS, channels="8_doublemax-64", factors=(2, 2, 2, 2)),
}
"""Each arm adds one thing to the one before; the last two change the whole."""


class Budget(NamedTuple):
    """What all networks of a scale share."""

    scans: int
    tests: int
    """Of each scanner."""
    updates: int
    batch: int


SMALL = Budget(200, 40, 240, 4)
FULL = Budget(400, 120, 2000, 8)


@lru_cache(40)
def drawn(seed: int, count: int, scanner: str) -> oct_networks.Scans:
    """Phantoms of a scanner."""
    found = oct_set(seed, count, TESTED[scanner])
    masks = found.region.astype(np.uint8) + 2 * found.vessels.astype(np.uint8)
    return oct_networks.Scans(np.round(found.image * 255.0).astype(np.uint8), masks, found.fovea.astype(np.float32))


def make(arm: str, budget: Budget) -> Any:
    """The learner of an arm; all seeds share its program."""
    return reachnet.reachnet(
        size=SIZE,
        crop=CROP,
        num_train=budget.scans,
        num_valid=1,
        batch_size=budget.batch,
        num_updates=budget.updates,
        **OPTIONS[arm],
    )


def trained(learner: Any, seed: int) -> Any:
    """The state of a learner after training on the scans of a seed."""
    config = learner.config
    per_epoch = config.num_train // config.batch_size

    def batch(step: int, seed: int) -> Any:
        order = np.random.default_rng((seed, step // per_epoch)).permutation(config.num_train)
        rows = order[step % per_epoch * config.batch_size :][: config.batch_size]
        scans = oct_networks.Scans(*(x[rows] for x in drawn(TRAIN_SEED + seed, config.num_train, "A")))
        return reachnet.resolution_of(step, len(config.resolutions), seed), scans

    data = HostData(batch, per_seed=True, augment=reachnet.with_key)
    state = train(learner, seeds=[seed], data=data, eval_every=-1, progress=False, guard=False).state
    return jax.tree.map(lambda x: x[0], state)


@lru_cache(8)
def program(learner: Any) -> Callable[..., Any]:
    """(state, scans [B, H, W]) -> (probabilities, foveas), compiled once for each shape."""
    predict: Any = learner.predict

    def run(state: Any, images: Any) -> Any:
        p = predict(state, images)
        columns, rows = learner.config.fovea_filter
        return p[..., :2], jax.vmap(lambda one: oct_networks.fovea_from_prob(one, columns, rows).x)(p[..., 2])

    return jax.jit(run)


def accuracy(arm: str, seeds: tuple[int, ...], budget: Budget = SMALL) -> Iterator[Row]:
    """Dice of region (the largest component) and vessels on the scanner that was trained on and on four others."""
    learner = make(arm, budget)
    run = program(learner)
    for seed in seeds:
        state, means = trained(learner, seed), {}
        row: dict[str, Any] = {"seed": seed}
        for i, name in enumerate(TESTED):
            scans = drawn(TEST_SEED + 10 * seed + i, budget.tests, name)
            p, columns = jax.device_get(run(state, scans.images))
            region = np.stack([choroid.largest_component(m) for m in p[..., 0] >= 0.5])
            masks = {"region": region, "vessel": p[..., 1] >= 0.5}
            for bit, (what, mask) in enumerate(masks.items()):
                row[f"{what} Dice {name}"] = float(np.mean(dice(mask, scans.masks >> bit & 1)))
            row[f"Dice {name}"] = (row[f"region Dice {name}"] + row[f"vessel Dice {name}"]) / 2
            # over the scan's width, as scanners differ in pixels
            row[f"fovea error {name}"] = float(np.abs(columns - scans.fovea[:, 0]).mean() / scans.images.shape[2])
        others = [name for name in TESTED if name != "A"]
        for what in ("region Dice", "vessel Dice", "Dice", "fovea error"):
            means[f"{what} B-E"] = float(np.mean([row[f"{what} {name}"] for name in others]))
        parameters = sum(x.size for x in jax.tree.leaves(state.params))
        yield row | means | {"parameters": parameters}


SHALLOW, WIDE, DEPTH7 = "f = 4, 8 channels", "f = 4, 16 channels", "depth 7"
NETWORKS: dict[str, UNet] = {
    SHALLOW: ReachNet("8_quadruplemax-128"),
    WIDE: ReachNet("16_quadruplemax-128"),
    DEPTH7: UNet(),
}
REPEATS = 5


@lru_cache(1)
def programs() -> dict[str, Callable[[], Any]]:
    """Networks at 768 x 768 pixels, one scan at a time, with random weights."""
    x = jax.random.normal(jax.random.key(1), (1, 768, 768, 1))

    def made(network: UNet) -> Callable[[], Any]:
        small = jnp.zeros((1, network.multiple, network.multiple, 1))
        variables = jax.jit(network.init)(jax.random.key(0), small)
        apply = jax.jit(network.apply)
        run = lambda: jax.block_until_ready(apply(variables, x))
        run()  # compiled here
        return run

    return {name: made(network) for name, network in NETWORKS.items()}


@lru_cache(8)
def timed(seed: int) -> dict[str, float]:
    """Images per second of each network: medians over repeats, in each of which all take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in NETWORKS}
    for i in range(REPEATS):
        for name in np.roll(list(NETWORKS), seed + i):
            start = time.perf_counter()
            programs()[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: 1.0 / float(np.median(values)) for name, values in seconds.items()}


def speed(arm: str, seeds: tuple[int, ...]) -> Iterator[Row]:
    """How fast a network is; compiling is not counted, all networks have the same threads."""
    for seed in seeds:
        yield {"seed": seed, "images per second": timed(seed)[arm]}


ACC, SPEED = "accuracy", "speed"
CHECKS = (
    Check(ACC, OURS, "region Dice B-E", "above", 0.03, other=PLAIN, paired=True),
    Check(ACC, OURS, "vessel Dice B-E", "above", 0.03, other=PLAIN, paired=True),
    Check(ACC, SEVERAL, "Dice D", "above", 0.05, other=DOMAIN, paired=True),
    Check(ACC, OURS, "Dice A", "above", -0.01, other=PLAIN, paired=True),
    Check(ACC, OURS, "Dice B-E", "above", -0.005, other=SEVERAL, paired=True),
    Check(SPEED, SHALLOW, "images per second", "times_at_least", 1.2, other=DEPTH7, paired=True),
    Check(SPEED, WIDE, "images per second", "times_at_least", 1.2, other=DEPTH7, paired=True, report=True),
    Check(ACC, DOMAIN, "Dice B-E", "above", 0.0, other=PLAIN, paired=True, report=True),
    Check(ACC, SEVERAL, "Dice B-E", "above", 0.0, other=DOMAIN, paired=True, report=True),
    Check(ACC, OURS, "fovea error B-E", "below", 0.0, other=PLAIN, paired=True, report=True),
    *(Check(ACC, OURS, f"Dice {name}", "above", 0.0, other=PLAIN, paired=True, report=True) for name in "BCDE"),
)
MORE = tuple(
    Check(ACC, arm, "Dice B-E", "above", 0.0, other=OURS, paired=True, report=True) for arm in (RESIDUAL, DEEP)
)


def of_scale(budget: Budget, minutes: float, arms: tuple[str, ...], checks: tuple[Check, ...]) -> Scale:
    """The same experiments with other numbers of scans and updates."""
    experiments = (
        Experiment(ACC, arms, partial_of(accuracy, budget=budget)),
        Experiment(SPEED, tuple(NETWORKS), speed),
    )
    return Scale(experiments=experiments, checks=checks, seeds=5, minutes=minutes)


claim = Claim(
    method="reachnet",
    paper="Burke, Engelmann et al. (2024)",
    statement=(
        "Trained on one scanner, a network with domain-specific augmentation, several resolutions and attention on a "
        "grid of tokens outlines region and vessels of the choroid on four others (more speckle, more shadows, half "
        "the resolution, wider pixels) better by .03 of Dice than the plain network, and loses at most .01 on its own; "
        "several resolutions are worth .05 at half the resolution, attention costs nothing, and few large steps of "
        "resolution make it 1.2 times as fast as Choroidalyzer's network."
    ),
    scope=(
        "Phantoms of 128 x 192 pixels, not patients' scans; networks of at most 150,000 parameters (two steps of "
        "resolution by 4, at most 8 x 8 tokens), trained for 240 updates of 4 crops of 96 x 144 pixels, out of 200 "
        "scans. Each arm adds one thing to the one before; all have the same scans, updates and settings, none is "
        "tuned. The released configuration, loss and ranges of augmentation are not public. Speed is that of networks "
        "with three steps by 4 and attention on 12 x 12 tokens at 768 x 768, with random weights. The full scale has "
        "400 scans, 2,000 updates of 8, and the arms with residual connections and with four steps by 2; it was not "
        "run."
    ),
    scales={
        "small": of_scale(SMALL, 16, (OURS, SEVERAL, DOMAIN, PLAIN), CHECKS),
        "full": of_scale(FULL, 0, (OURS, SEVERAL, DOMAIN, PLAIN, RESIDUAL, DEEP), (*CHECKS, *MORE)),
    },
    baselines=(PLAIN, DOMAIN, SEVERAL, DEPTH7),
    ours=OURS,
)
