"""Noisy early stopping: which epoch held-out noisy labels choose, beside what clean labels would have chosen.

Every rule chooses among the same epochs of the same runs. Digits and images of Fashion-MNIST with wrong labels, a
network of 128-128 units, plain SGD at one rate for every loss; nothing is tuned. Decision trees under pair noise show
where the rule fails.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxstack.claims.harness import Check, Claim, Experiment, Row, Scale
from jaxstack.learning import noisy_early_stopping, noisy_labels
from jaxstack.learning.noisy_labels import History, Study

TRAIN, VALID, EPOCHS = 1000, 300, 200
LOSSES = {"CE": "ce", "FCE": "fce", "GCE": "gce", "SCE": "sce", "MAE": "mae", "ELR": "elr"}
RULES = {
    "last epoch": lambda h: -1,
    "NES": lambda h: int(noisy_early_stopping.early_stop(jnp.asarray(h.valid))),
    "noisy loss": lambda h: int(np.argmin(h.valid_loss)),
    "noisy CE": lambda h: int(np.argmin(h.valid_ce)),
    "clean labels": lambda h: int(np.argmax(h.clean)),
    "training labels": lambda h: int(np.argmax(h.train)),
    "best test epoch": lambda h: int(np.argmax(h.test)),
}
"""How an epoch is chosen from one seed's history [E]; the last one looks at the test labels, as an upper bound."""


class Size(NamedTuple):
    """Of an experiment."""

    data: str = "digits"
    train: int = TRAIN
    valid: int = VALID
    epochs: int = EPOCHS


@lru_cache(maxsize=32)
def studied(size: Size, noise: str, rate: float, loss: str, seeds: tuple[int, ...]) -> History:
    """Histories [S, E]."""
    arrays, keys = noisy_labels.prepared(size.data, seeds, noise, rate, size.train, size.valid)
    kind = "symmetric" if noise == "instance" else noise
    assumed = noisy_labels.transition(kind, rate, 10)
    setting = Study(loss, epochs=size.epochs)
    run = jax.jit(jax.vmap(lambda key, d: noisy_labels.study(setting, key, d, assumed, jnp.float32(0))))
    return jax.tree.map(np.asarray, run(keys, arrays))


def outside(history: History, rate: float, valid: int) -> float:
    """Share of the epochs whose noisy validation accuracy is more than two deviations from what equation (4) predicts
    from the clean one."""
    expected = 1 - np.asarray(noisy_early_stopping.symmetric_risk(1 - history.clean, rate, 10))
    # given the clean accuracy, labels are flipped at random: the deviation of a mean of so many draws
    deviation = np.sqrt(expected * (1 - expected) / valid)
    return float((np.abs(history.valid - expected) > 2 * deviation).mean())


def experiment(name: str, noise: str, rate: float, losses: tuple[str, ...], size: Size = Size()) -> Experiment:
    """Accuracy of the epoch that each rule chooses, for several losses."""
    needs = ("fashion_mnist",) if size.data == "fashion-mnist" else ()

    def run(arm: str, seeds: tuple[int, ...], fashion_mnist: str = "") -> Iterator[Row]:
        loss, _, rule = arm.partition(", ")
        of = size._replace(data=f"{size.data}={fashion_mnist}") if fashion_mnist else size
        histories = studied(of, noise, rate, LOSSES[loss], seeds)
        for i, seed in enumerate(seeds):
            h = jax.tree.map(lambda x, i=i: x[i], histories)
            epoch = RULES[rule](h)
            row = {"seed": seed, "accuracy": float(h.test[epoch]), "epoch": epoch % size.epochs + 1.0}
            if rule == "NES" and noise == "symmetric":
                row["epochs outside"] = outside(h, rate, size.valid)
            yield row

    return Experiment(name, tuple(f"{loss}, {rule}" for loss in losses for rule in RULES), run, needs=needs)


def sizes(arm: str, seeds: tuple[int, ...], fashion_mnist: str) -> Iterator[Row]:
    """What NES loses to clean labels with fewer and more held-out images; training images are the same."""
    count = {"100 examples": 100, "300 examples": 300, "1,000 examples": 1000}[arm]
    histories = studied(Size(f"fashion-mnist={fashion_mnist}", valid=count, epochs=40), "symmetric", 0.6, "ce", seeds)
    for i, seed in enumerate(seeds):
        h = jax.tree.map(lambda x, i=i: x[i], histories)
        yield {"seed": seed, "regret": float(h.test[RULES["clean labels"](h)] - h.test[RULES["NES"](h)])}


def trees(arm: str, seeds: tuple[int, ...]) -> Iterator[Row]:
    """Depth of a decision tree under pair noise of 0.45, chosen by noisy or by clean held-out labels."""
    from sklearn.tree import DecisionTreeClassifier

    for seed in seeds:
        data, _ = noisy_labels.prepared("digits", (seed,), "pair", 0.45, TRAIN, VALID)
        d = jax.tree.map(lambda x: np.asarray(x[0]), data)
        found = []
        for depth in range(1, 21):
            tree = DecisionTreeClassifier(max_depth=depth, random_state=seed).fit(d.x, d.noisy)
            scores = {
                "noisy": (d.valid_x, d.valid_noisy),
                "clean": (d.valid_x, d.valid_clean),
                "test": (d.test_x, d.test),
            }
            found.append({k: float(tree.score(x, y)) for k, (x, y) in scores.items()})
        by = "noisy" if arm == "noisy labels" else "clean"
        depth = int(np.argmax([f[by] for f in found]))
        yield {"seed": seed, "accuracy": found[depth]["test"], "depth": depth + 1.0}


MAIN, HARD, PAIR, OWN = "symmetric 0.4", "symmetric 0.6", "pair 0.3", "instance-dependent 0.4"
FULL = "Fashion-MNIST, 20,000 images, symmetric 0.4"
HELD_OUT, TREES = "held-out examples, clothes, symmetric 0.6", "decision trees, pair 0.45"
PAIRED: dict = dict(paired=True)

claim = Claim(
    method="noisy-early-stopping",
    paper="Toner and Storkey, Noisy Early Stopping for Noisy Labels, 2024 (arXiv 2409.06830)",
    statement=(
        "With 40% of the labels wrong at random, the epoch that 300 held-out noisy labels choose is far better than "
        "the last one and nearly as good as what clean labels choose; choosing by cross entropy on noisy labels is "
        "not, and under pair noise noisy labels can choose a worse model."
    ),
    scope=(
        "Digits and Fashion-MNIST, networks of 128-128 units, 1,000 training examples, synthetic noise. The "
        "paper's own tables, shares of held-out examples and networks could not be read; full scale takes 20,000 "
        "images of Fashion-MNIST."
    ),
    scales={
        "small": Scale(
            experiments=(
                experiment(MAIN, "symmetric", 0.4, ("CE", "FCE", "GCE", "SCE", "MAE", "ELR")),
                experiment(HARD, "symmetric", 0.6, ("CE", "FCE", "GCE")),
                experiment(PAIR, "pair", 0.3, ("CE", "FCE")),
                experiment(OWN, "instance", 0.4, ("CE",)),
                Experiment(
                    HELD_OUT, ("100 examples", "300 examples", "1,000 examples"), sizes, needs=("fashion_mnist",)
                ),
                Experiment(TREES, ("noisy labels", "clean labels"), trees),
            ),
            checks=(
                Check(MAIN, "CE, NES", "accuracy", "above", 0.15, "CE, last epoch", **PAIRED),
                Check(MAIN, "CE, NES", "accuracy", "above", -0.015, "CE, clean labels", **PAIRED),
                Check(MAIN, "FCE, NES", "accuracy", "above", -0.015, "FCE, clean labels", **PAIRED),
                Check(MAIN, "GCE, NES", "accuracy", "above", -0.015, "GCE, clean labels", **PAIRED),
                Check(HARD, "CE, NES", "accuracy", "above", -0.05, "CE, clean labels", **PAIRED),
                Check(HARD, "CE, NES", "accuracy", "above", 0.15, "CE, last epoch", **PAIRED),
                Check(MAIN, "FCE, NES", "accuracy", "above", 0.08, "FCE, noisy CE", **PAIRED),
                Check(MAIN, "GCE, NES", "accuracy", "above", 0.08, "GCE, noisy CE", **PAIRED),
                Check(MAIN, "CE, NES", "accuracy", "above", 0.15, "CE, training labels", **PAIRED),
                Check(MAIN, "CE, NES", "epochs outside", "at_most", 0.15),
                Check(HELD_OUT, "1,000 examples", "regret", "below", 0.0, "100 examples", **PAIRED),
                Check(TREES, "noisy labels", "accuracy", "below", 0.0, "clean labels", **PAIRED),
                Check(PAIR, "CE, NES", "accuracy", "above", 0.0, "CE, last epoch", report=True, **PAIRED),
                Check(PAIR, "CE, NES", "accuracy", "above", -0.015, "CE, clean labels", report=True, **PAIRED),
                Check(PAIR, "FCE, NES", "accuracy", "above", -0.015, "FCE, clean labels", report=True, **PAIRED),
                Check(OWN, "CE, NES", "accuracy", "above", -0.015, "CE, clean labels", report=True, **PAIRED),
                Check(MAIN, "CE, NES", "accuracy", "above", 0.0, "CE, noisy CE", report=True, **PAIRED),
                Check(MAIN, "FCE, NES", "accuracy", "above", 0.0, "FCE, noisy loss", report=True, **PAIRED),
                Check(MAIN, "GCE, NES", "accuracy", "above", 0.0, "GCE, noisy loss", report=True, **PAIRED),
                Check(MAIN, "CE, NES", "accuracy", "above", -0.015, "CE, best test epoch", report=True, **PAIRED),
            ),
        ),
        "full": Scale(
            experiments=(experiment(FULL, "symmetric", 0.4, ("CE", "FCE"), Size("fashion-mnist", 20_000, 5_000, 100)),),
            checks=(
                Check(FULL, "CE, NES", "accuracy", "above", 0.15, "CE, last epoch", **PAIRED),
                Check(FULL, "CE, NES", "accuracy", "above", -0.015, "CE, clean labels", **PAIRED),
                Check(FULL, "CE, NES", "accuracy", "above", 0.0, "CE, training labels", **PAIRED),
                Check(FULL, "FCE, NES", "accuracy", "above", 0.0, "FCE, noisy CE", **PAIRED),
            ),
        ),
    },
    baselines=("CE, last epoch", "CE, training labels", "FCE, noisy CE", "CE, clean labels"),
    ours="CE, NES",
)
