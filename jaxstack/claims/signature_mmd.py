"""Sig-MMD and CSig-MMD: scores of whole trajectories, of which the second looks at tail events.

Truth is an autoregressive process whose level shifts in 6% of the trajectories. One forecaster has its bulk exactly and
never shifts; the other has the shifts and a bulk that is too narrow.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxstack.claims.harness import Check, Claim, Experiment, Row, Scale
from jaxstack.measures import forecast_scores as scores
from jaxstack.measures import signature_mmd as sig
from jaxstack.measures.signature_mmd import Grams, Kernel, TailWeights

STEPS, SAMPLES, TRAINING = 12, 400, 400
SHARE, SHIFT, SCALE = 0.06, (5.0, 6.0), 3.0
RBF, LINEAR = Kernel(order=2), Kernel("linear", order=2)
COARSE = Kernel(order=1)
"""Of lead-lag paths, which have twice as many steps."""
TAIL = 3.0
"""Threshold of the threshold-weighted CRPS, three deviations of the bulk."""
PLAIN: dict[str, bool] = {"basepoint": True, "time": True, "lead_lag": False}


def trajectories(rng: np.random.Generator, count: int, tail: bool = True, bulk: float = 1.0) -> np.ndarray:
    """Trajectories [N, 12, 1]: x_t = .8 x_{t-1} + .6 e_t from its stationary law, times `bulk`.

    With `tail` a level shift of 5 to 6 up or down at a random time, in 6% of them.
    """
    x = np.empty((count, STEPS))
    x[:, 0] = rng.normal(size=count)
    for t in range(1, STEPS):
        x[:, t] = 0.8 * x[:, t - 1] + 0.6 * rng.normal(size=count)
    x *= bulk
    size = rng.uniform(*SHIFT, count) * rng.choice((-1.0, 1.0), count) * (rng.uniform(size=count) < SHARE)
    start = rng.integers(0, STEPS, count)
    return (x + tail * size[:, None] * (np.arange(STEPS) >= start[:, None]))[..., None]


@lru_cache(32)
def drawn(seed: int) -> dict[str, np.ndarray]:
    """The observations, a training sample, and a sample of each forecaster."""
    rng = np.random.default_rng(seed)
    found = {"observed": trajectories(rng, SAMPLES), "training": trajectories(rng, TRAINING)}
    found |= {"truth": trajectories(rng, SAMPLES), "no tail": trajectories(rng, SAMPLES, tail=False)}
    found["bulk off"] = trajectories(rng, SAMPLES, bulk=0.75)
    # the right law at each time, no dependence between times
    found["shuffled"] = np.stack([rng.permutation(trajectories(rng, SAMPLES)[:, t]) for t in range(STEPS)], 1)
    return found


@lru_cache(32)
def masks(seed: int, missing: bool) -> dict[str, np.ndarray | None]:
    """Which stamps are present: all, or 70% at random and at least one."""
    rng = np.random.default_rng((seed, 1))
    found = {}
    for name, x in drawn(seed).items():
        present = rng.uniform(size=x.shape[:2]) < 0.7
        present[np.arange(len(x)), rng.integers(0, STEPS, len(x))] = True
        found[name] = present if missing else None
    return found


Options = tuple[tuple[str, bool], ...]
"""Of `make_paths`, hashable."""


@lru_cache(64)
def paths(seed: int, missing: bool, options: Options) -> dict[str, jax.Array]:
    """Paths of all samples, and the pivot. Call with float64 enabled."""
    present = masks(seed, missing)
    given: dict[str, Any] = dict(options)
    build = lambda x, mask: sig.make_paths(jnp.asarray(x / SCALE, jnp.float64), mask=mask, **given)
    found = {name: build(x, present[name]) for name, x in drawn(seed).items()}
    return found | {"pivot": build(np.zeros((1, STEPS, 1)), None)}


@lru_cache(512)
def gram(seed: int, missing: bool, options: Options, kernel: Kernel, first: str, second: str) -> jax.Array:
    """Gram matrix of two samples."""
    p = paths(seed, missing, options)
    return sig.signature_kernel_gram(p[first], None if first == second else p[second], kernel)


def of(seed: int, name: str, missing: bool = False, kernel: Kernel = RBF, **options: bool) -> Grams:
    """Gram matrices of the observations and a forecaster."""
    pairs = (("observed", "observed"), ("observed", name), (name, name))
    given = tuple((PLAIN | options).items())
    return Grams(*(gram(seed, missing, given, kernel, a, b) for a, b in pairs))


@lru_cache(64)
def weights(seed: int, missing: bool, hard: bool) -> dict[str, jax.Array]:
    """Tail weights of each sample, fitted on the training sample."""
    p = paths(seed, missing, tuple(PLAIN.items()))
    fitted = TailWeights.fit(p["training"], p["pivot"][0], kernel=RBF, beta=float("inf") if hard else None)
    return {name: fitted(x) for name, x in p.items() if name != "pivot"}


def sig_mmd(seed: int, name: str, missing: bool, unbiased: bool = True, **options: Any) -> float:
    """Sig-MMD^2 against the observations."""
    return float(sig.mmd2(of(seed, name, missing, **options), unbiased))


def csig_mmd(seed: int, name: str, missing: bool, hard: bool = False) -> float:
    """CSig-MMD^2 against the observations."""
    w, given = weights(seed, missing, hard), tuple(PLAIN.items())
    to_pivot = {n: gram(seed, missing, given, RBF, n, "pivot")[:, 0] for n in ("observed", name)}
    middle = gram(seed, missing, given, RBF, "pivot", "pivot")[0, 0]
    two = (w["observed"], w[name], to_pivot["observed"], to_pivot[name])
    return float(sig.mmd2(sig.censor(of(seed, name, missing), *two, middle)))


def mean_score(score: Callable[..., jax.Array], **options: Any) -> Callable[[int, str, bool], float]:
    """The mean over observations of a score of samples."""

    def of_forecaster(seed: int, name: str, missing: bool) -> float:
        x = {n: jnp.asarray(v) for n, v in drawn(seed).items()}
        each = jax.jit(lambda s, y: jax.lax.map(lambda one: score(s, one, **options), y, batch_size=50))
        return float(each(x[name], x["observed"]).mean())

    return of_forecaster


ARMS: dict[str, Callable[[int, str, bool], float]] = {
    "Sig-MMD": sig_mmd,
    "CSig-MMD": csig_mmd,
    "CSig-MMD, hard": lambda seed, name, missing: csig_mmd(seed, name, missing, True),
    "Sig-MMD, biased": lambda seed, name, missing: sig_mmd(seed, name, missing, unbiased=False),
    "Sig-MMD, linear": lambda seed, name, missing: sig_mmd(seed, name, missing, kernel=LINEAR),
    "Sig-MMD, no base point": lambda seed, name, missing: sig_mmd(seed, name, missing, basepoint=False),
    "Sig-MMD, no time": lambda seed, name, missing: sig_mmd(seed, name, missing, time=False),
    "Sig-MMD, lead-lag": lambda seed, name, missing: sig_mmd(seed, name, missing, kernel=COARSE, lead_lag=True),
    "CRPS": mean_score(scores.crps),
    "CRPS above 3": mean_score(scores.crps, chain=lambda x: jnp.maximum(jnp.abs(x), TAIL)),
    "energy score": mean_score(scores.energy_score),
    "variogram score": mean_score(scores.variogram_score),
}
SHAPES = tuple(name for name in ARMS if name.startswith("Sig-MMD, "))


def ranking(missing: bool) -> Callable[..., Iterator[Row]]:
    """How a score ranks the two forecasters, one without the tail and one with a bulk that is too narrow."""

    def run(arm: str, seeds: tuple[int, ...]) -> Iterator[Row]:
        for seed in seeds:
            with jax.enable_x64():
                value = {name: ARMS[arm](seed, name, missing) for name in ("truth", "no tail", "bulk off")}
            yield {
                "seed": seed,
                "bulk off less no tail": value["bulk off"] - value["no tail"],
                "tail first": float(value["bulk off"] < value["no tail"]),
                "truth first": float(value["truth"] < min(value["no tail"], value["bulk off"])),
                "size at the truth": abs(value["truth"]),
            }

    return run


def dependence(arm: str, seeds: tuple[int, ...]) -> Iterator[Row]:
    """A forecaster with the right law at each time and no dependence between times, against the truth."""
    for seed in seeds:
        with jax.enable_x64():
            value = {name: ARMS[arm](seed, name, False) for name in ("truth", "shuffled")}
            row = {"seed": seed, "excess": value["shuffled"] - value["truth"]}
            if arm == "Sig-MMD":
                row["p"] = float(sig.permutation_p(jax.random.key(seed), of(seed, "shuffled"), 200))
            else:
                row["relative excess"] = row["excess"] / abs(value["truth"])
        yield row


T, M, D = "tail", "tail, 30% of stamps missing", "dependence"
ORDER = "bulk off less no tail"
RIVALS = ("CRPS", "energy score", "variogram score")
small = Scale(
    experiments=(
        Experiment(T, tuple(ARMS), ranking(False)),
        Experiment(M, ("Sig-MMD", "CSig-MMD"), ranking(True)),
        Experiment(D, ("Sig-MMD", *RIVALS), dependence),
    ),
    checks=(
        Check(T, "Sig-MMD", ORDER, "share", 1.0, target=0.0),
        Check(T, "CSig-MMD", ORDER, "share_below", 1.0, target=0.0),
        Check(T, "CSig-MMD", "size at the truth", "share_below", 1.0, target=0.004),
        *(Check(T, "CSig-MMD", "tail first", "above", 0.5, other=rival, paired=True) for rival in RIVALS),
        Check(M, "Sig-MMD", ORDER, "share", 1.0, target=0.0),
        Check(M, "CSig-MMD", ORDER, "share_below", 1.0, target=0.0),
        Check(D, "Sig-MMD", "p", "share_below", 1.0, target=0.01),
        Check(D, "CRPS", "relative excess", "at_most", 0.02),
        Check(T, "CSig-MMD", "tail first", "above", 0.5, other="CRPS above 3", paired=True, report=True),
        Check(T, "CSig-MMD, hard", ORDER, "share_below", 1.0, target=0.0, report=True),
        *(Check(T, arm, ORDER, "share", 1.0, target=0.0, report=True) for arm in SHAPES),
        *(Check(T, arm, "truth first", "at_least", 1.0, report=True) for arm in ("Sig-MMD", "CSig-MMD")),
        *(Check(e, "Sig-MMD", ORDER, "at_least", 0.0, report=True) for e in (T, M)),
        *(Check(e, "CSig-MMD", ORDER, "at_most", 0.0, report=True) for e in (T, M)),
        Check(D, "energy score", "relative excess", "at_least", 0.0, report=True),
        Check(D, "variogram score", "relative excess", "at_least", 0.0, report=True),
    ),
    seeds=10,
    minutes=8,
)
claim = Claim(
    method="signature-mmd",
    paper="Redhead, Lee, Gu, Elvira & Storkey (2026)",
    statement=(
        "Sig-MMD prefers a forecaster with the exact bulk and no tail over one with the tail and a bulk that is a "
        "quarter too narrow, CSig-MMD the other way around, in every seed, also when 30% of the stamps are missing; "
        "CRPS, energy and variogram score do not put the tail first that often. Sig-MMD sees that times are shuffled, "
        "where the CRPS differs by at most 2%."
    ),
    scope=(
        "One synthetic process of 12 steps and one variable, 400 trajectories per sample (the paper: also real data "
        "and forecasts of foundation models). Kernel, depth, quantile and sharpness are those of a reimplementation "
        "that names the paper, as its text was not available. Lead-lag paths are solved at dyadic order 1, others at 2."
    ),
    scales={"small": small},
    baselines=(*RIVALS, "CRPS above 3"),
    ours="Sig-MMD",
)
