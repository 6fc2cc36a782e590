"""Noise-bounded training: digits and images of Fashion-MNIST with wrong labels, losses with and without their floor.

A small network, 1,000 noisy examples, plain SGD at one rate for every arm; accuracy at the last epoch on clean test
labels, as the point of a floor is to need no stopping. Nothing is tuned.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxstack.claims.harness import Check, Claim, Experiment, Row, Scale
from jaxstack.learning import forward_correction, noisy_early_stopping, noisy_labels
from jaxstack.learning.noisy_labels import History, Study

TRAIN, VALID, EPOCHS = 1000, 300, 200


class Arm(NamedTuple):
    """What an arm trains with."""

    loss: str
    bound: bool = False
    off: float = 0.0
    """How far the assumed rate is from the true one."""
    stop: bool = False
    """The epoch is chosen by held-out noisy labels instead of being the last one."""
    batch: int = 50


ARMS = {
    "CE": Arm("ce"),
    "CE + floor": Arm("ce", True),
    "FCE": Arm("fce"),
    "FCE + floor": Arm("fce", True),
    "backward": Arm("backward"),
    "GCE": Arm("gce"),
    "SCE": Arm("sce"),
    "MAE": Arm("mae"),
    "FCE, early stopping": Arm("fce", stop=True),
    "FCE + floor, rate - 0.1": Arm("fce", True, -0.1),
    "FCE + floor, rate + 0.1": Arm("fce", True, 0.1),
    "FCE, batches of 200": Arm("fce", batch=200),
    "FCE + floor, batches of 200": Arm("fce", True, batch=200),
}


class Size(NamedTuple):
    """Of an experiment."""

    data: str = "digits"
    train: int = TRAIN
    valid: int = VALID
    epochs: int = EPOCHS


@lru_cache(maxsize=32)
def studied(size: Size, noise: str, rate: float, arm: Arm, seeds: tuple[int, ...]) -> tuple[History, float]:
    """Histories [S, E] of an arm, and its floor."""
    arrays, keys = noisy_labels.prepared(size.data, seeds, noise, rate, size.train, size.valid)
    assumed = noisy_labels.transition(noise, rate + arm.off, 10)
    floor = forward_correction.transition_floor(assumed)
    bound = forward_correction.bounded if arm.bound else None
    setting = Study(arm.loss, epochs=size.epochs, batch=arm.batch)
    run = jax.jit(jax.vmap(lambda key, d: noisy_labels.study(setting, key, d, assumed, floor, bound)))
    return jax.tree.map(np.asarray, run(keys, arrays)), float(floor)


def experiment(name: str, size: Size, noise: str, rate: float, arms: tuple[str, ...]) -> Experiment:
    """Accuracy of arms under one kind of noise."""
    needs = ("fashion_mnist",) if size.data == "fashion-mnist" else ()

    def run(arm: str, seeds: tuple[int, ...], fashion_mnist: str = "") -> Iterator[Row]:
        choice = ARMS[arm]._replace(stop=False)
        of = size._replace(data=f"{size.data}={fashion_mnist}") if fashion_mnist else size
        history, floor = studied(of, noise, rate, choice, seeds)
        for i, seed in enumerate(seeds):
            end = int(noisy_early_stopping.early_stop(jnp.asarray(history.valid[i]))) if ARMS[arm].stop else -1
            yield {
                "seed": seed,
                "accuracy": float(history.test[i, end]),
                "loss - floor": float(history.loss[i, end]) - floor,
                "accuracy on noisy labels": float(history.train[i, end]),
                "batches below the floor": float(history.below[i, end]),
            }

    return Experiment(name, arms, run, needs=needs)


MAIN, HARD, SPARSE, CLOTHES = (
    "digits, symmetric 0.4",
    "digits, symmetric 0.6",
    "digits, pair 0.3",
    "clothes, symmetric 0.4",
)
LARGE = "FCE + floor, batches of 200"
RIVALS = ("backward", "GCE", "SCE", "MAE")
FULL = "Fashion-MNIST, 20,000 images, symmetric 0.4"
FOUR = ("CE", "CE + floor", "FCE", "FCE + floor")
PAIRED: dict = dict(paired=True)

claim = Claim(
    method="forward-correction",
    paper="Toner and Storkey, Label Noise: Correcting the Forward-Correction, 2023 (arXiv 2307.13100)",
    statement=(
        "With 40% of 1,000 labels wrong, a floor under the training loss at the entropy that the noise makes "
        "unavoidable raises the last epoch's accuracy on clean labels, of forward-corrected and of plain cross "
        "entropy, and the loss settles at the floor."
    ),
    scope=(
        "Digits of 8x8 pixels and 1,000 images of Fashion-MNIST, networks of 128-128 units, synthetic noise whose "
        "rate is known. The paper's own tables, data sets and networks could not be read; full scale takes 20,000 "
        "images of Fashion-MNIST."
    ),
    scales={
        "small": Scale(
            experiments=(
                experiment(MAIN, Size(), "symmetric", 0.4, tuple(ARMS)),
                experiment(HARD, Size(), "symmetric", 0.6, FOUR),
                experiment(SPARSE, Size(), "pair", 0.3, FOUR),
                experiment(CLOTHES, Size("fashion-mnist", epochs=60), "symmetric", 0.4, FOUR),
            ),
            checks=(
                Check(MAIN, "FCE + floor", "accuracy", "above", 0.03, "FCE", **PAIRED),
                Check(MAIN, "CE + floor", "accuracy", "above", 0.04, "CE", **PAIRED),
                Check(MAIN, "FCE + floor", "loss - floor", "near", 0.15),
                Check(MAIN, "CE + floor", "loss - floor", "near", 0.15),
                Check(MAIN, "FCE", "loss - floor", "at_most", -0.15),
                Check(MAIN, "FCE + floor", "accuracy", "above", 0.0, RIVALS, **PAIRED),
                Check(CLOTHES, "FCE + floor", "accuracy", "above", 0.03, "FCE", **PAIRED),
                Check(HARD, "FCE + floor", "accuracy", "above", 0.0, "FCE", **PAIRED),
                Check(SPARSE, "FCE + floor", "accuracy", "within", 0.01, "FCE", **PAIRED),
                Check(HARD, "CE + floor", "accuracy", "above", 0.0, "CE", report=True, **PAIRED),
                Check(SPARSE, "CE + floor", "accuracy", "above", 0.0, "CE", report=True, **PAIRED),
                Check(CLOTHES, "CE + floor", "accuracy", "above", 0.0, "CE", report=True, **PAIRED),
                Check(MAIN, "FCE + floor", "accuracy", "above", 0.0, "FCE, early stopping", report=True, **PAIRED),
                Check(MAIN, "FCE + floor, rate - 0.1", "accuracy", "above", 0.0, "FCE", report=True, **PAIRED),
                Check(MAIN, "FCE + floor, rate + 0.1", "accuracy", "above", 0.0, "FCE", report=True, **PAIRED),
                Check(MAIN, LARGE, "loss - floor", "near", 0.15, report=True),
                Check(MAIN, LARGE, "accuracy", "above", 0.0, "FCE, batches of 200", report=True, **PAIRED),
            ),
        ),
        "full": Scale(
            experiments=(experiment(FULL, Size("fashion-mnist", 20_000, 5_000, 100), "symmetric", 0.4, tuple(ARMS)),),
            checks=(
                Check(FULL, "FCE + floor", "accuracy", "above", 0.03, "FCE", **PAIRED),
                Check(FULL, "CE + floor", "accuracy", "above", 0.04, "CE", **PAIRED),
                Check(FULL, "FCE + floor", "loss - floor", "near", 0.15),
                Check(FULL, "FCE + floor", "accuracy", "above", 0.0, RIVALS, **PAIRED),
                Check(FULL, "FCE + floor", "accuracy", "above", 0.0, "FCE, early stopping", report=True, **PAIRED),
            ),
        ),
    },
    baselines=("CE", "FCE", *RIVALS),
    ours="FCE + floor",
)
