"""NASWOT: scores at initialisation rank cells of NAS-Bench-201; their number of parameters is the rival to beat.

Small scale: 60 cells that this project trained on Fashion-MNIST (`scripts/nas_table.py`), scored on its images; and,
with a table of the benchmark's accuracies, 4,000 of its cells scored at a hundredth of the paper's work.
"""

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxstack.claims.harness import Check, Claim, Experiment, Row, Scale
from jaxstack.core.errors import UserError
from jaxstack.data import images
from jaxstack.report import stats
from jaxstack.vision import naswot
from jaxstack.vision.naswot import Scoring, Skeleton

OWN = Scoring(Skeleton(channels=8, cells=1, image=16, inputs=1))
BATCH = 64
BENCH = Scoring(Skeleton(channels=4, cells=1, image=16))
BENCH_BATCH = 32
ARMS = ("score", "params", "gradient norm", "SynFlow", "random")


def ranked(values: Any) -> np.ndarray:
    """Values with -inf below all others."""
    values = np.asarray(values, np.float64)
    finite = values[np.isfinite(values)]
    return np.where(np.isfinite(values), values, finite.min() - 1.0)


def minibatch(folder: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Training images [64, 16, 16, 1] of a seed, and labels."""
    x, y = images.load(f"fashion-mnist={folder}")
    rows = np.random.default_rng(seed).choice(len(x), BATCH, replace=False)
    return images.normalised(images.resized(x[rows], OWN.skeleton.image)), y[rows]


def of_arm(arm: str, seed: int, cells: np.ndarray, x: np.ndarray, y: np.ndarray, scoring: Scoring) -> np.ndarray:
    """What an arm ranks cells by."""
    key = jax.random.key(seed)
    if arm == "params":
        return naswot.num_params(cells, scoring.skeleton).astype(np.float64)
    if arm == "gradient norm":
        return naswot.gradient_norms(key, cells, x, y, scoring)
    if arm == "SynFlow":
        return ranked(naswot.synflow(key, cells, scoring))
    if arm == "random":
        return np.random.default_rng(seed).uniform(size=len(cells))
    if arm == "score, Gaussian images":
        x = np.random.default_rng(seed + 1000).normal(size=x.shape).astype(np.float32)
    return ranked(naswot.scores(key, cells, x, scoring))


def own_table(arm: str, seeds: tuple[int, ...], fashion_mnist: str) -> Iterator[Row]:
    """Rank correlation with accuracies of 60 cells that were trained on 4,000 images of Fashion-MNIST."""
    table = json.loads(resources.files("jaxstack.vision").joinpath("cells.json").read_text())
    cells = np.stack([naswot.encode_cell(row["cell"]) for row in table["cells"]])
    accuracy = np.array([row["accuracy"] for row in table["cells"]])
    for seed in seeds:
        x, y = minibatch(fashion_mnist, seed)
        values = of_arm(arm, seed, cells, x, y, OWN)
        tau = stats.kendall(values, accuracy)
        row = {"seed": seed, "tau": tau.value, "lower end of tau": tau.low}
        if arm == "score, Gaussian images":
            row["correlation with images"] = stats.spearman(values, of_arm("score", seed, cells, x, y, OWN)).value
        yield row


def read_table(folder: str) -> tuple[np.ndarray, np.ndarray]:
    """Test accuracies after 200 epochs and validation accuracies after 12, [15625] on CIFAR-10 in the order of
    `naswot.all_cells`, from the file nb201_accuracies.npz of a folder. Raises `UserError`."""
    path = Path(folder) / "nb201_accuracies.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            cell, test = file["cell"], file["test200"][:, 0]
            column = file["acc12_columns"].tolist().index("cifar10-valid")
            valid = file["acc12"][:, column]
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"{path}: expected arrays cell, test200, acc12 and acc12_columns ({e})") from e
    if cell.shape != (naswot.COUNT, 6):
        raise UserError(f"{path}: cell: found shape {list(cell.shape)}, expected [{naswot.COUNT}, 6]")
    place = np.argsort(naswot.cell_number(cell.astype(np.int64)))
    return test[place], valid[place]


def bench_images(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Standard normal images [32, 16, 16, 3] and random labels of a seed."""
    rng = np.random.default_rng(seed)
    side = BENCH.skeleton.image
    return rng.normal(size=(BENCH_BATCH, side, side, 3)).astype(np.float32), rng.integers(0, 10, BENCH_BATCH)


def bench(arm: str, seeds: tuple[int, ...], nas_table: str) -> Iterator[Row]:
    """Kendall's tau on 1,000 cells; the accuracy of the best of N by an arm's ranking of 4,000, over 200 searches."""
    test, _ = read_table(nas_table)
    for seed in seeds:
        some = np.random.default_rng(seed + 500).choice(naswot.COUNT, 4000, replace=False)
        values = of_arm(arm, seed, naswot.all_cells()[some], *bench_images(seed), BENCH)
        row: dict[str, Any] = {"seed": seed, "tau": stats.kendall(values[:1000], test[some[:1000]]).value}
        for count in (10, 100, 1000):
            # a fixed random ranking would choose the same few cells in every search
            drawn = 1 if arm == "random" else count
            row[f"best of {count}"] = float(test[some[naswot.random_search(values, drawn, 200, seed)]].mean())
        yield row


def evolution(arm: str, seeds: tuple[int, ...], nas_table: str) -> Iterator[Row]:
    """200 searches of 20, 40 and 80 trainings: accuracy after 12 epochs is seen, after 200 reported."""
    test, valid = read_table(nas_table)
    table = jnp.asarray(valid)
    train = lambda cell: table[naswot.cell_number(cell)]
    repeats, population = 200, 10
    search = lambda key, cells: naswot.regularised_evolution(key, train, 80, population, 5, cells)
    searches = jax.jit(jax.vmap(search))
    for seed in seeds:
        keys = jax.random.split(jax.random.key(seed), repeats)
        drawn = np.stack([np.asarray(naswot.sample_cells(jax.random.fold_in(k, 1), 20)) for k in keys])
        start = drawn[:, :population]
        if arm == "AREA":
            values = of_arm("score", seed, drawn.reshape(-1, 6), *bench_images(seed), BENCH).reshape(repeats, -1)
            start = naswot.area_start(drawn, values, population)
        found = searches(keys, jnp.asarray(start))
        row: dict[str, Any] = {"seed": seed}
        for trained in (20, 40, 80):
            first = np.asarray(found.values)[:, :trained].argmax(1)
            best = np.asarray(found.cells)[np.arange(repeats), first]
            row[f"{trained} trainings"] = float(test[naswot.cell_number(best)].mean())
        yield row


TABLE, BENCH201, SEARCH = "own table", "NAS-Bench-201", "evolution"
small = Scale(
    experiments=(
        Experiment(TABLE, (*ARMS, "score, Gaussian images"), own_table, needs=("fashion_mnist",)),
        Experiment(BENCH201, ARMS, bench, needs=("nas_table",)),
        Experiment(SEARCH, ("AREA", "REA"), evolution, needs=("nas_table",)),
    ),
    checks=(
        Check(TABLE, "score", "lower end of tau", "at_least", 0.0),
        Check(TABLE, "score", "tau", "above", 0.0, other="random", paired=True),
        Check(TABLE, "score, Gaussian images", "correlation with images", "at_least", 0.9),
        Check(BENCH201, "score", "tau", "at_least", 0.5),
        Check(BENCH201, "score", "best of 100", "at_least", 92.4),
        Check(BENCH201, "random", "best of 100", "at_most", 88.0),
        Check(BENCH201, "score", "tau", "above", 0.0, other="gradient norm", paired=True),
        Check(SEARCH, "AREA", "20 trainings", "above", 0.1, other="REA", paired=True),
        Check(TABLE, "score", "tau", "above", 0.0, other="params", paired=True, report=True),
        Check(BENCH201, "score", "tau", "above", 0.0, other="params", paired=True, report=True),
        Check(BENCH201, "score", "tau", "above", 0.0, other="SynFlow", paired=True, report=True),
        Check(BENCH201, "score", "best of 100", "above", 0.0, other="params", paired=True, report=True),
    ),
    seeds=5,
    minutes=33,
)
claim = Claim(
    method="naswot",
    paper="Mellor, Turner, Storkey & Crowley (ICML 2021)",
    statement=(
        "The score at initialisation ranks cells of NAS-Bench-201 (Kendall's tau of at least 0.5 with accuracies on "
        "CIFAR-10), better than the gradient norm; the best of 100 by score is far above a random cell, and a first "
        "population chosen by score helps evolution with 20 trainings. The number of parameters and SynFlow, which the "
        "paper does not compare with, are reported beside it."
    ),
    scope=(
        "NAS-Bench-201 alone, scored with 4 channels, a cell per stage, 16x16 Gaussian images in batches of 32 (the "
        "paper: 16, 5, CIFAR-10 images, 128), and 60 cells trained for three epochs on Fashion-MNIST at 16x16."
    ),
    scales={"small": small},
    baselines=("params", "gradient norm", "SynFlow", "random", "REA"),
)
