"""DeepGPET: a network that learns the masks of a slow tracer agrees with it and is much faster.

Scans are phantoms of 128 x 192 pixels; each seed has its own for training and testing. GPET is given the true end
points, as an operator gives them; the network learns GPET's masks, never the truth.
"""

import time
from collections.abc import Iterator
from functools import lru_cache
from functools import partial as partial_of
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxstack.claims.harness import Check, Claim, Experiment, Row, Scale
from jaxstack.core.runner import train
from jaxstack.data.sources import HostData
from jaxstack.medical import choroid, deepgpet, gpet
from jaxstack.medical.phantoms_oct import DEVICES, Device, oct_set
from jaxstack.medical.segmentation import dice
from jaxstack.nn.supervised import variables
from jaxstack.nn.vision.unet_mobilenet import DECODER, UNetMobileNetV3, fresh

TRACER = gpet.Settings(height=0.025, length=0.25)
"""The best of 20 settings but for smaller bins, by Dice with the truth on phantoms that no arm sees."""
BATCH, TIMED = 8, 10
TRAIN_SEED, TEST_SEED, SHADOW_SEED, SPECKLE_SEED = 10_000, 20_000, 30_000, 40_000
SHADOWED = DEVICES["A"]._replace(shadows=(2, 4))
GRAINY = DEVICES["A"]._replace(looks=(2.0, 3.0))


class Budget(NamedTuple):
    """What all networks of a scale share."""

    scans: int
    tested: int
    updates: int
    width: float
    decoder: tuple[int, ...]
    most_blocks: int | None


SMALL = Budget(160, 100, 200, 0.25, (32, 24, 16, 16, 8), 1)
FULL = Budget(400, 100, 3000, 1.0, DECODER, None)


class Set(NamedTuple):
    """Scans with the truth, and GPET's masks."""

    scans: deepgpet.Scans
    fovea: np.ndarray
    scale: np.ndarray
    traced: np.ndarray


@lru_cache(16)
def drawn(seed: int, count: int, device: Device, traced: bool = True) -> Set:
    """Phantoms of a seed."""
    found = oct_set(seed, count, device)
    scans = deepgpet.Scans(np.round(found.image * 255.0).astype(np.uint8), found.region)
    masks = deepgpet.gpet_masks(scans, TRACER, seed) if traced else found.region
    return Set(scans, found.fovea, found.scale, masks)


@lru_cache(4)
def trained(seed: int, speckle: bool, budget: Budget) -> tuple[UNetMobileNetV3, Any]:
    """The network and its variables after training on GPET's masks."""
    learner = deepgpet.deepgpet(
        num_train=budget.scans,
        num_valid=1,
        width=budget.width,
        decoder=budget.decoder,
        most_blocks=budget.most_blocks,
        speckle=speckle,
        schedule="cosine",
        lr=3e-3,
        ema_decay=0.95,
        batch_size=BATCH,
        num_updates=budget.updates,
    )
    per_epoch = budget.scans // BATCH

    def batch(step: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        found = drawn(TRAIN_SEED + seed, budget.scans, DEVICES["A"])
        order = np.random.default_rng((seed, step // per_epoch)).permutation(budget.scans)
        rows = order[step % per_epoch * BATCH :][:BATCH]
        return found.scans.images[rows], found.traced[rows]

    data = HostData(batch, per_seed=True, augment=deepgpet.augment(learner.config))
    state = train(learner, seeds=(seed,), data=data, eval_every=-1, progress=False).state
    network = UNetMobileNetV3(1, budget.width, budget.decoder, budget.most_blocks)
    return network, variables(jax.tree.map(lambda x: x[0], state))


def measured(masks: np.ndarray, found: Set) -> choroid.Choroid:
    """Thickness at three places and area around the fovea, in 3 mm on both sides; where a trace ends too early, at its
    end."""
    crop = lambda m: choroid.smart_crop(choroid.boundaries(m))
    one = lambda m, f, s: choroid.choroid_metrics(*crop(m), f, s, height=masks.shape[1], n_avg=3, force=True)
    return jax.jit(jax.vmap(one))(masks, found.fovea, found.scale)


def correlation(x: Any, y: Any) -> float:
    """Pearson's r over the finite pairs."""
    x, y = np.ravel(x), np.ravel(y)
    kept = np.isfinite(x) & np.isfinite(y)
    return float(np.corrcoef(x[kept], y[kept])[0, 1])


def outlined(arm: str, seed: int, found: Set, budget: Budget) -> np.ndarray:
    """The masks of an arm on scans."""
    if arm == "GPET":
        return found.traced
    network, given = trained(seed, arm != "no speckle", budget)
    return np.stack([deepgpet.outlined(deepgpet.segment(network, given, image)) for image in found.scans.images])


def accuracy(arm: str, seeds: tuple[int, ...], budget: Budget = SMALL) -> Iterator[Row]:
    """Agreement with GPET and with the truth on test scans, with 2 to 4 shadows, and with more speckle."""
    for seed in seeds:
        found = drawn(TEST_SEED + seed, budget.tested, DEVICES["A"])
        masks = outlined(arm, seed, found, budget)
        values, theirs, truth = (measured(m, found) for m in (masks, found.traced, found.scans.masks))
        row: dict[str, Any] = {
            "seed": seed,
            "Dice with truth": float(np.mean(dice(masks, found.scans.masks))),
            "r thickness with truth": correlation(values.thickness_um, truth.thickness_um),
            "r area with truth": correlation(values.area_mm2, truth.area_mm2),
            "thickness error in um": float(np.nanmean(np.abs(values.thickness_um - truth.thickness_um))),
            "area error in mm2": float(np.nanmean(np.abs(values.area_mm2 - truth.area_mm2))),
        }
        for name, value in deepgpet.boundary_errors(masks, found.scans.masks).items():
            row[f"{name} boundary in px"] = float(np.nanmean(value))
        if arm != "GPET":
            row["Dice with GPET"] = float(np.mean(dice(masks, found.traced)))
            row["r thickness with GPET"] = correlation(values.thickness_um, theirs.thickness_um)
            row["r area with GPET"] = correlation(values.area_mm2, theirs.area_mm2)
            grainy = drawn(SPECKLE_SEED + seed, 50, GRAINY, False)
            row["Dice with truth, much speckle"] = float(
                np.mean(dice(outlined(arm, seed, grainy, budget), grainy.scans.masks))
            )
        dark = drawn(SHADOW_SEED + seed, 30, SHADOWED)
        errors = deepgpet.boundary_errors(outlined(arm, seed, dark, budget), dark.scans.masks)
        absolute = [np.nanmean(errors[f"{side} absolute"]) for side in ("top", "bottom")]
        yield row | {"boundary error in shadow, px": float(np.mean(absolute))}


def speed(arm: str, seeds: tuple[int, ...], budget: Budget = SMALL) -> Iterator[Row]:
    """Seconds per scan, one after the other, from pixels to the mask."""
    network = UNetMobileNetV3(1, budget.width, budget.decoder, budget.most_blocks)
    given = fresh(network, jax.random.key(0))
    for seed in seeds:
        scans = drawn(TEST_SEED + seed, TIMED, DEVICES["A"], False).scans
        run = lambda scans: [deepgpet.outlined(deepgpet.segment(network, given, image)) for image in scans.images]
        if arm == "GPET":
            run = lambda scans: deepgpet.gpet_masks(scans, TRACER)
        run(deepgpet.Scans(scans.images[:1], scans.masks[:1]))  # what is compiled is compiled here
        start = time.perf_counter()
        run(scans)
        yield {"seed": seed, "scans per second": TIMED / (time.perf_counter() - start)}


A, S = "accuracy", "speed"
CHECKS = (
    Check(A, "DeepGPET", "Dice with GPET", "at_least", 0.93),
    Check(A, "DeepGPET", "r thickness with GPET", "at_least", 0.85),
    Check(A, "DeepGPET", "r area with GPET", "at_least", 0.88),
    Check(S, "DeepGPET", "scans per second", "times_at_least", 10.0, other="GPET"),
    Check(A, "DeepGPET", "boundary error in shadow, px", "below", -1.0, other="GPET", paired=True),
    Check(A, "DeepGPET", "Dice with truth", "above", 0.0, other="GPET", paired=True, report=True),
    Check(A, "DeepGPET", "r thickness with truth", "above", 0.0, other="GPET", paired=True, report=True),
    Check(A, "DeepGPET", "Dice with truth, much speckle", "above", 0.0, other="no speckle", paired=True, report=True),
)


def of_scale(budget: Budget, minutes: float) -> Scale:
    """The same experiments with another network and other numbers of scans and updates."""
    return Scale(
        experiments=(
            Experiment(S, ("DeepGPET", "GPET"), partial_of(speed, budget=budget)),
            Experiment(A, ("DeepGPET", "GPET", "no speckle"), partial_of(accuracy, budget=budget)),
        ),
        checks=CHECKS,
        seeds=5,
        minutes=minutes,
    )


claim = Claim(
    method="deepgpet",
    paper="Burke, Engelmann et al. (TVST 2023)",
    statement=(
        "A U-Net that learns GPET's masks agrees with GPET on scans it has not seen (Dice at least .93, Pearson's r of "
        "thickness at least .85 and of area .88), is at least ten times as fast, and on scans with shadows its "
        "boundaries are at most one pixel worse than GPET's."
    ),
    scope=(
        "Phantoms of 128 x 192 pixels, not patients' scans; a quarter of the encoder's channels and one block of each "
        "stage, no ImageNet weights, 160 scans of training and 200 updates of 8 (the paper: the whole encoder, about "
        "600 scans, 60 epochs). GPET is ours, in NumPy, is given the true end points and a setting chosen with the "
        "truth on phantoms of their own; nobody corrects its masks. No network has tuned settings. The full scale has "
        "the whole network, 400 scans and 60 epochs, and was not run."
    ),
    scales={"small": of_scale(SMALL, 7), "full": of_scale(FULL, 0)},
    baselines=("GPET", "no speckle"),
    ours="DeepGPET",
)
