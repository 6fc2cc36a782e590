"""Chunking: what is lost when data of one distribution come in parts, and what averages of weights bring back.

Twenty Gaussian classes that overlap, networks of 128-128 units, plain SGD for as many steps whatever the number of
chunks. Every arm tries six settings on seeds of its own; averages are read off the runs of the arm that they belong to.
Each seed has classes, weights and a stream of its own.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxstack.claims.harness import Check, Claim, Experiment, Row, Scale, Tuning
from jaxstack.learning import chunking, continual, streams
from jaxstack.learning.continual import Config, Hypers

LANES = 6
"""Runs of one program: six settings of one seed, or one setting of six seeds."""
TUNING_SEEDS = (100, 101)
EMAS = {"EMA 0.8": 0.8, "EMA 0.95": 0.95}
RATES = tuple({"lr": lr} for lr in (0.01, 0.02, 0.05, 0.1, 0.2, 0.4))
SETTINGS: dict[str, tuple[dict[str, float], ...]] = {
    "SGD": RATES,
    "ER": RATES,
    "ER-ACE": RATES,
    "DER++": tuple({"lr": lr, "alpha": a, "beta": b} for lr in (0.05, 0.1, 0.2) for a, b in ((0.2, 0.5), (0.5, 1.0))),
    "A-GEM": RATES,
    "GSS": RATES,
    "EWC": tuple({"lr": lr, "penalty": p} for lr in (0.05, 0.1, 0.2) for p in (0.1, 1.0)),
}
"""Six for each method."""


class Plan(NamedTuple):
    """A stream and a network's time on it."""

    data: str = "mixture"
    train: int = 4000
    """Examples, as many of each class."""
    chunks: int = 20
    order: str = "chunks"
    spread: float = 1.7
    epochs: int = 20
    pieces: int = 0
    """Examples of a chunk of an online stream; 0: whole tasks."""

    def config(self, method: str, seed: int = 0) -> Config:
        """Of a method named as in the claim."""
        return Config(
            data=self.data,
            train_images=self.train if self.data == "mixture" else 0,
            chunks=self.chunks,
            order=self.order,  # pyright: ignore[reportArgumentType]
            spread=self.spread,
            epochs=self.epochs,
            method=method.lower(),  # pyright: ignore[reportArgumentType]
            split_seed=seed,
        )


@lru_cache(maxsize=8)
def drawn(plan: Plan, seed: int) -> dict[str, Any]:
    """Arrays of a seed: training examples, the stream, which task each class belongs to, held-out parts."""
    config = plan.config("SGD", seed)
    x, y = continual.part(config, "train", seed)
    if plan.data != "mixture":  # as many of each class: the number of steps is then the same for all seeds and chunks
        rows = streams.balanced(y, plan.train // config.classes)
        x, y = x[rows], y[rows]
    stream = continual.stream_of(config, y)
    groups = np.zeros(config.classes, np.int32)
    if plan.order == "classes":
        for task, (rows, mask) in enumerate(zip(*stream)):
            groups[np.unique(y[rows[mask]])] = task
    if plan.pieces:
        stream = streams.in_pieces(stream, plan.pieces)
    held = {which: continual.part(config, which, seed) for which in ("valid", "test")}
    held = {which: (x[:3000], y[:3000]) for which, (x, y) in held.items()}
    return {"train": (x, y), "rows": stream.rows, "mask": stream.mask, "groups": groups, **held}


@lru_cache(maxsize=32)
def program(config: Config) -> Any:
    """Runs of one config with `LANES` keys, settings and sets of arrays."""
    model = continual.model_of(config)

    def run(key: jax.Array, hypers: Hypers, d: dict[str, Any]) -> dict[str, Any]:
        found = chunking.study(config, key, hypers, d["train"], d["rows"], d["mask"], emas=EMAS)
        own = lambda y: d["groups"][y][:, None] == d["groups"][None]
        out: dict[str, Any] = {}
        for name, v in {"last": found.last, **found.averages}.items():
            x, y = d["test"]
            out[name] = {
                "accuracy": chunking.accuracy(model, v, x, y),
                "task accuracy": chunking.accuracy(model, v, x, y, of=own(y)),
                "validation": chunking.accuracy(model, v, *d["valid"]),
            }
        for name, matrix in {"last": found.matrix, "mean": found.averaged_matrix}.items():
            out[name]["first chunk forgotten"] = matrix[0, 0] - matrix[-1, 0]
        out["last"] |= {"fit": found.fit.mean(), "loss": found.loss.mean(), "moved": found.moved.mean()}
        return out

    return jax.jit(jax.vmap(run))


def ran(plan: Plan, method: str, runs: list[tuple[dict[str, float], int]]) -> list[dict[str, Any]]:
    """What each run (setting, seed) gives."""
    # what decides the stream alone: programs are shared
    config = plan._replace(order="chunks", spread=1.7, chunks=1, train=0).config(method)
    if plan.pieces:
        config = Config(data=plan.data, epochs=plan.epochs, method=config.method, batch_size=plan.pieces)
    out: list[dict[str, Any]] = []
    for start in range(0, len(runs), LANES):
        some = runs[start : start + LANES]
        filled = some + some[-1:] * (LANES - len(some))
        keys = jnp.stack([jax.random.key(seed) for _, seed in filled])
        settings = [Hypers(**setting) for setting, _ in filled]
        hypers: Any = jax.tree.map(lambda *v: jnp.asarray(v, jnp.float32), *settings)
        arrays = jax.tree.map(lambda *a: np.stack(a), *(drawn(plan, seed) for _, seed in filled))
        found = jax.tree.map(np.asarray, program(config)(keys, hypers, arrays))
        out += [jax.tree.map(lambda a, i=i: float(a[i]), found) for i in range(len(some))]
    return out


@lru_cache(maxsize=256)
def tuned(plan: Plan, method: str) -> Tuning:
    """Six settings by the validation accuracy of the last weights."""
    settings = SETTINGS[method]
    columns = [ran(plan, method, [(s, seed) for s in settings]) for seed in TUNING_SEEDS]
    table = tuple(tuple(c[i]["last"]["validation"] for c in columns) for i in range(len(settings)))
    return Tuning(settings, table, TUNING_SEEDS, "validation accuracy")


@lru_cache(maxsize=256)
def results(plan: Plan, method: str, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """Of a method with its tuned setting."""
    return ran(plan, method, [(tuned(plan, method).chosen, seed) for seed in seeds])


def with_path(plan: Plan, fashion_mnist: str) -> Plan:
    """The plan with the user's folder."""
    return plan._replace(data=f"fashion-mnist={fashion_mnist}") if fashion_mnist else plan


def split(arm: str) -> tuple[str, str]:
    """'ER, mean' -> ('ER', 'mean'); without a second part the last weights."""
    name, _, readout = arm.partition(", ")
    return name, readout or "last"


READ = ("accuracy", "first chunk forgotten", "fit", "loss", "moved")


def sizes(name: str, plan: Plan, counts: tuple[int, ...], emas: bool = True, needs: tuple[str, ...] = ()) -> Experiment:
    """SGD with several numbers of chunks."""
    readouts = ("", ", mean", *(f", {e}" for e in EMAS if emas))
    of = {("1 chunk" if n == 1 else f"{n} chunks"): n for n in counts}
    arms = tuple(k + r for k, n in of.items() for r in (readouts if n > 1 else ("",)))

    def at(arm: str, path: str) -> Plan:
        return with_path(plan._replace(chunks=of[split(arm)[0]]), path)

    def run(arm: str, seeds: tuple[int, ...], tuned: dict[str, float], fashion_mnist: str = "") -> Iterator[Row]:
        for seed, found in zip(seeds, results(at(arm, fashion_mnist), "SGD", seeds)):
            yield {"seed": seed} | {k: v for k, v in found[split(arm)[1]].items() if k in READ}

    return Experiment(
        name, arms, run, needs=needs, tune=lambda arm, fashion_mnist="": tuned(at(arm, fashion_mnist), "SGD")
    )


def methods(name: str, plan: Plan, which: tuple[str, ...], readouts: tuple[str, ...] = ("mean",)) -> Experiment:
    """Several methods on one stream; with classes one after another also the chunking proportion."""
    arms = tuple(m + r for m in which for r in ("", *(f", {r}" for r in readouts)))

    def run(arm: str, seeds: tuple[int, ...], tuned: dict[str, float]) -> Iterator[Row]:
        method, readout = split(arm)
        found = results(plan, method, seeds)
        offline = chunks = None
        if plan.order == "classes" and not plan.pieces and readout == "last":
            offline = results(plan._replace(chunks=1, order="chunks"), "SGD", seeds)
            chunks = results(plan._replace(order="chunks"), method, seeds)
        for i, seed in enumerate(seeds):
            kept = ("accuracy", "task accuracy") if plan.order == "classes" else READ
            row: Row = {"seed": seed} | {k: v for k, v in found[i][readout].items() if k in kept}
            if offline and chunks:
                three = (r[i]["last"]["accuracy"] for r in (offline, chunks, found))
                row["proportion"] = float(chunking.proportion(*three))
            yield row

    return Experiment(name, arms, run, tune=lambda arm: tuned(plan, split(arm)[0]))


def linear(arm: str, seeds: tuple[int, ...]) -> Iterator[Row]:
    """Squared error of the weights of a linear regression, 600 examples in 60 chunks of 10, 5 weights."""
    for seed in seeds:
        rng = np.random.default_rng(seed)
        with jax.enable_x64():
            x, true = jnp.asarray(rng.normal(size=(600, 5))), jnp.asarray(rng.normal(size=5))
            y = x @ true + 0.5 * jnp.asarray(rng.normal(size=600))
            xs, ys = x.reshape(60, 10, 5), y.reshape(60, 10)
            belief = chunking.Belief(jnp.eye(5), jnp.zeros(5))
            each = jax.vmap(chunking.least_squares)(xs, ys)
            if arm == "last chunk":
                found = each[-1]
            elif arm == "mean of chunks":
                found = each.mean(0)
            elif arm == "least squares of all":
                found = chunking.least_squares(x, y)
            elif arm == "Bayes, chunk by chunk":
                found = jax.lax.scan(lambda b, c: (chunking.believe(b, *c, 0.25), None), belief, (xs, ys))[0].mean
            else:
                found = chunking.believe(belief, x, y, 0.25).mean
            yield {"seed": seed, "error": float(jnp.square(found - true).sum())}


LINEAR_ARMS = ("last chunk", "mean of chunks", "least squares of all", "Bayes, chunk by chunk", "Bayes, all at once")
ALL = tuple(SETTINGS)
RIVALS = ALL[1:]
AVERAGED = ("DER++", "ER", "A-GEM", "GSS")
HARD, EASY, DIGITS = "hard mixture", "easy mixture", "digits"
CLOTHES, LINEAR = "clothes, 2,000 images", "linear regression"
SHORT = Plan(train=2000, chunks=10)
CHUNKS, CLASSES, ONLINE = "methods, 10 chunks", "methods, 10 x 2 classes", "methods, 10 x 2 classes, one pass"
FULL = "Fashion-MNIST"
PAIRED: dict = dict(paired=True)

claim = Claim(
    method="chunking",
    paper="Lee and Storkey, Chunking: Continual Learning is not just about Distribution Shift, 2023 (arXiv 2310.02206)",
    statement=(
        "A network that sees data of one distribution in chunks forgets much of what was particular to earlier ones "
        "and loses accuracy; methods made against forgetting help little there, and this loss is a good part of what "
        "they lose when classes come one after another. Averages of weights at the ends of chunks bring some of it "
        "back."
    ),
    scope=(
        "Twenty Gaussian classes, 1,000 digits and 2,000 images of Fashion-MNIST, networks of 128-128 units, plain "
        "SGD; the paper has ResNets on CIFAR and Tiny ImageNet. Full scale takes 20,000 images of Fashion-MNIST."
    ),
    scales={
        "small": Scale(
            experiments=(
                sizes(HARD, Plan(), (1, 5, 20, 80)),
                methods(CHUNKS, SHORT, ALL),
                methods(CLASSES, SHORT._replace(order="classes"), ALL),
                methods(
                    ONLINE,
                    SHORT._replace(order="classes", epochs=1, pieces=25),
                    AVERAGED,
                    ("mean", "EMA 0.95"),
                ),
                sizes(EASY, Plan(spread=0.9), (1, 20), emas=False),
                sizes(DIGITS, Plan("digits", 1000), (1, 20), emas=False),
                sizes(CLOTHES, Plan("fashion-mnist", 2000, epochs=10), (1, 20), needs=("fashion_mnist",)),
                Experiment(LINEAR, LINEAR_ARMS, linear),
            ),
            checks=(
                Check(HARD, "1 chunk", "accuracy", "above", 0.05, "20 chunks", **PAIRED),
                Check(HARD, "20 chunks, mean", "accuracy", "above", 0.04, "20 chunks", **PAIRED),
                Check(HARD, "80 chunks, mean", "accuracy", "above", 0.02, "80 chunks", **PAIRED),
                Check(HARD, "20 chunks", "first chunk forgotten", "at_least", 0.4),
                Check(HARD, "20 chunks", "fit", "at_least", 0.95),
                *(Check(CHUNKS, m, "accuracy", "below", -0.02, "SGD", **PAIRED) for m in RIVALS),
                Check(CHUNKS, "SGD, mean", "accuracy", "above", 0.0, RIVALS, **PAIRED),
                *(Check(CHUNKS, f"{m}, mean", "accuracy", "above", 0.0, m, **PAIRED) for m in AVERAGED),
                *(Check(CLASSES, f"{m}, mean", "accuracy", "above", 0.0, m, **PAIRED) for m in AVERAGED),
                *(Check(ONLINE, f"{m}, EMA 0.95", "accuracy", "above", 0.0, m, **PAIRED) for m in AVERAGED),
                Check(CLASSES, "DER++", "proportion", "at_least", 0.25),
                Check(EASY, "20 chunks, mean", "accuracy", "within", 0.02, "20 chunks", **PAIRED),
                Check(DIGITS, "20 chunks, mean", "accuracy", "within", 0.02, "20 chunks", **PAIRED),
                Check(CLOTHES, "1 chunk", "accuracy", "above", 0.02, "20 chunks", **PAIRED),
                Check(CLOTHES, "20 chunks, mean", "accuracy", "above", 0.0, "20 chunks", **PAIRED),
                Check(LINEAR, "mean of chunks", "error", "below", 0.0, "last chunk", **PAIRED),
                Check(LINEAR, "Bayes, chunk by chunk", "error", "within", 1e-10, "Bayes, all at once", **PAIRED),
                Check(HARD, "20 chunks, EMA 0.8", "accuracy", "above", 0.0, "20 chunks", report=True, **PAIRED),
                Check(HARD, "20 chunks, EMA 0.95", "accuracy", "above", 0.0, "20 chunks", report=True, **PAIRED),
                Check(HARD, "1 chunk", "accuracy", "above", 0.0, "20 chunks, mean", report=True, **PAIRED),
                *(
                    Check(CLASSES, f"{m}, mean", "task accuracy", "above", 0.0, m, report=True, **PAIRED)
                    for m in AVERAGED
                ),
                Check(CLASSES, "DER++", "proportion", "near", 0.25, target=0.5, report=True),
                Check(LINEAR, "mean of chunks", "error", "times_at_most", 2.0, "least squares of all", report=True),
            ),
            seeds=6,
        ),
        "full": Scale(
            experiments=(
                sizes(FULL, Plan("fashion-mnist", 20_000), (1, 20, 100), needs=("fashion_mnist",)),
                methods(CHUNKS, Plan(chunks=10), ALL),
            ),
            checks=(
                Check(FULL, "1 chunk", "accuracy", "above", 0.02, "100 chunks", **PAIRED),
                Check(FULL, "100 chunks, mean", "accuracy", "above", 0.0, "100 chunks", **PAIRED),
                *(Check(CHUNKS, m, "accuracy", "below", -0.02, "SGD", **PAIRED) for m in RIVALS),
                Check(CHUNKS, "SGD, mean", "accuracy", "above", 0.0, RIVALS, **PAIRED),
            ),
            seeds=6,
        ),
    },
    baselines=ALL,
    ours="SGD, mean",
)
