"""Comparing forecasters: every score of each forecast for each observation, with intervals and permutation tests.

Scores of whole trajectories are Sig-MMD and CSig-MMD (`signature_mmd`), beside CRPS, threshold-weighted CRPS, energy
and variogram score (`forecast_scores`). All are better when smaller.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxstack.core.errors import UserError
from jaxstack.data.trajectories import Trajectories, aligned
from jaxstack.measures import forecast_scores
from jaxstack.measures import signature_mmd as sig
from jaxstack.report import stats


@dataclass(frozen=True)
class Settings:
    """How trajectories become paths, and what is computed of them."""

    kernel: sig.Kernel = sig.Kernel()
    median: bool = False
    """Take the median heuristic of the training data for sigma."""
    time: bool = True
    lead_lag: bool = False
    basepoint: bool = True
    normalize: bool = False
    depth: int = 2
    """Of the signatures in the tail weights."""
    alpha: float = 0.92
    beta: float | None = None
    threshold: tuple[float, ...] = ()
    """Above which the threshold-weighted CRPS looks: one number, or one for each variable; empty: no such score."""
    permutations: int = 500
    seed: int = 0


@dataclass(frozen=True)
class Comparison:
    """What `compare` found."""

    scores: dict[str, dict[str, Float[np.ndarray, " n"]]]
    """Forecaster -> score -> a number for each observation."""
    discrepancies: dict[str, dict[str, tuple[float, float]]]
    """Forecaster -> sig-mmd2, csig-mmd2 -> value and p-value; empty where each observation has its own forecast."""
    conditions: tuple[str, ...]
    """Names of the observations."""
    notes: tuple[str, ...] = field(default=())
    """Which scores are not there, and why."""

    def summary(self, block: int = 1, seed: int = 0) -> dict[str, dict[str, stats.Estimate]]:
        """Compute the mean of each forecaster's scores over observations, with a 95% block bootstrap interval.

        Args:
            block: Consecutive observations that are resampled together: as many as depend on each other.
            seed: Of the resampling.
        """
        return {name: {k: block_mean(v, block, seed) for k, v in own.items()} for name, own in self.scores.items()}

    def differences(self, first: str, block: int = 1, seed: int = 0) -> dict[str, dict[str, stats.Estimate]]:
        """Compute the mean difference of each other forecaster's scores to those of `first`, observation by
        observation, likewise."""
        base = self.scores[first]
        return {
            name: {k: block_mean(v - base[k], block, seed) for k, v in own.items() if k in base}
            for name, own in self.scores.items()
            if name != first
        }


def _of_blocks(x: Array) -> Array:
    """Mean of numbers whose blocks are given as [sum, count]."""
    return x[:, 0].sum() / x[:, 1].sum()


def block_mean(values: Float[np.ndarray, " n"], block: int = 1, seed: int = 0) -> stats.Estimate:
    """Compute the mean and its 95% interval by resampling blocks of consecutive numbers.

    Raises:
        UserError: For a block below 1 or above the count.
    """
    n = len(values)
    if not 1 <= block <= n:
        raise UserError(f"block={block}: expected 1 to {n}, the number of observations")
    starts = np.arange(0, n, block)
    table = np.stack([np.add.reduceat(values, starts), np.diff(starts, append=n)], 1)
    return stats.estimate(_of_blocks, table, paired=True, key=jax.random.key(seed))


def compare(
    observed: Trajectories,
    forecasts: Mapping[str, Trajectories],
    training: Trajectories | None = None,
    scale: Sequence[float] = (),
    settings: Settings = Settings(),
) -> Comparison:
    """Score forecasts. Call it with float64 enabled where differences are small.

    Args:
        observed: What happened: with conditions, one trajectory for each; else any number, of one law.
        forecasts: Name -> samples for the same conditions, or of the one law.
        training: Earlier trajectories: their mean and deviation scale the variables, and CSig-MMD takes its weights
            from them. Without, there is no CSig-MMD.
        scale: By which the variables are divided where there is no training data: one number, or one for each variable.
        settings: See `Settings`.

    Raises:
        UserError: For sets that do not fit together, or settings out of their range.
    """
    names = list(forecasts)
    observed, *samples = _matched(observed, forecasts)
    shift, unit = _scaling(training, scale, observed)
    threshold = _of_variables("threshold", settings.threshold, observed) if settings.threshold else None
    observed, *samples = aligned((observed, *samples))
    origin = observed.times[:, 0, 0]
    span = float((observed.times[:, 0, -1] - origin).max())

    def paths(s: Trajectories, start: np.ndarray) -> Array:
        flat = lambda x: x.reshape(-1, *x.shape[2:])
        values, times = (s.values - shift) / unit, s.times - start[:, None, None]
        made = sig.make_paths(jnp.asarray(flat(values)), flat(times), flat(s.mask), **options)
        return made.reshape(*s.values.shape[:2], *made.shape[1:])

    options: dict[str, Any] = {"time": settings.time, "lead_lag": settings.lead_lag, "basepoint": settings.basepoint}
    options["span"] = (0.0, span) if span > 0 else None
    length = observed.values.shape[2]
    zeros = jnp.zeros((1, length, len(shift)))
    pivot = sig.make_paths(zeros, np.linspace(0.0, span, length) if span > 0 else None, **options)[0]
    known = None
    if training is not None:
        training = _ordered("training", training, observed)
        known = paths(training, np.where(training.mask, training.times, np.inf).min((1, 2)))
        known = known.reshape(-1, *known.shape[2:])
    kernel = settings.kernel
    if settings.median:
        if known is None:
            raise UserError("sigma: the median heuristic needs training data")
        kernel = kernel._replace(sigma=sig.median_sigma(known))
    weights = None
    if known is not None:
        weights = sig.TailWeights.fit(known, pivot, settings.depth, settings.alpha, settings.beta, kernel)

    def tail(x: Array) -> tuple[Array, Array] | None:
        """Weights and kernels with the pivot [N, M] of paths [N, M, P, C]."""
        if weights is None:
            return None
        flat = x.reshape(-1, *x.shape[2:])
        found = weights(flat), sig.signature_kernel_gram(flat, pivot[None], kernel)[:, 0]
        return found[0].reshape(x.shape[:2]), found[1].reshape(x.shape[:2])

    x = paths(observed, origin)
    own = _own(x, kernel)
    middle = sig.signature_kernel(pivot, pivot, kernel)
    found, discrepancies, notes = {}, {}, []
    for number, (name, s) in enumerate(zip(names, samples)):
        y = paths(s, origin)
        given = (x, own, tail(x), y, tail(y))
        if observed.conditions:
            of = _scores_by_condition(given, middle, kernel, settings.normalize)
        else:
            grams = _grams(jax.tree.map(lambda v: v[0], given), middle, kernel, settings.normalize)
            of = {k: sig.kernel_score(g) for k, g in grams.items()}
            if observed.values.shape[1] > 1:
                key = jax.random.fold_in(jax.random.key(settings.seed), number)
                test = lambda g, key=key: float(sig.permutation_p(key, g, settings.permutations))
                discrepancies[name] = {f"{k}-mmd2": (float(sig.mmd2(grams[k])), test(grams[k])) for k in _known(grams)}
        if np.all(s.mask.all(axis=1, keepdims=True) | ~observed.mask):
            of |= _pointwise(s.values, observed.values, observed.mask, threshold)
        else:
            notes.append(f"{name}: samples lack stamps that were observed, so only scores of paths are computed")
        found[name] = {k: np.asarray(of[k]).ravel() for k in _known(of)}
        if odd := [k for k, v in found[name].items() if not np.isfinite(v).all()]:
            raise UserError(
                f"{name}: {odd[0]} is not finite: paths are too long for the kernel, expected a larger scale"
            )
    conditions = observed.conditions or tuple(map(str, range(observed.values.shape[1])))
    return Comparison(found, discrepancies, conditions, tuple(notes))


SCORES = ("sig", "csig", "crps", "tw-crps", "energy", "variogram")


def _known(of: Mapping[str, Any]) -> list[str]:
    return [k for k in SCORES if k in of]


@jax.jit(static_argnames=("kernel",))
def _own(x: Array, kernel: sig.Kernel) -> Array:
    """Gram matrices [N, K, K] of observed paths [N, K, P, C]."""
    return jax.lax.map(lambda paths: sig.signature_kernel_gram(paths, None, kernel), x)


@jax.jit(static_argnames=("kernel", "normalize"))
def _grams(given: Any, middle: Array, kernel: sig.Kernel, normalize: bool) -> dict[str, sig.Grams]:
    """Score -> Gram matrices, of observed paths [K, P, C] and samples [M, P, C] of one condition; each with its weights
    and kernels with the pivot, or None."""
    x, own, x_tail, y, y_tail = given
    g = sig.Grams(own, sig.signature_kernel_gram(x, y, kernel), sig.signature_kernel_gram(y, None, kernel))
    of = {"sig": sig.normalised(g) if normalize else g}
    if x_tail is not None:
        of["csig"] = sig.censor(g, x_tail[0], y_tail[0], x_tail[1], y_tail[1], middle, normalize)
    return of


@jax.jit(static_argnames=("kernel", "normalize"))
def _scores_by_condition(given: Any, middle: Array, kernel: sig.Kernel, normalize: bool) -> dict[str, Array]:
    of = lambda one: {k: sig.kernel_score(g) for k, g in _grams(one, middle, kernel, normalize).items()}
    return jax.lax.map(of, given)


@jax.jit
def _pointwise(samples: Array, observed: Array, mask: Array, threshold: Array | None) -> dict[str, Array]:
    """Score -> [N, K] from the numbers themselves, in the units of the data."""

    def one(x: Array, y: Array, mask: Array) -> dict[str, Array]:
        of = {
            "crps": forecast_scores.crps(x, y, mask=mask),
            "energy": forecast_scores.energy_score(x, y, mask=mask),
            "variogram": forecast_scores.variogram_score(x, y, mask=mask),
        }
        if threshold is not None:
            of["tw-crps"] = forecast_scores.crps(x, y, lambda v, low=threshold: jnp.maximum(v, low), mask=mask)
        return of

    within = lambda given: jax.lax.map(lambda own: one(given[0], *own), given[1:])
    return jax.lax.map(within, (samples, observed, mask))


def _of_variables(what: str, numbers: Sequence[float], observed: Trajectories) -> np.ndarray:
    count = len(observed.variables)
    if len(numbers) not in (1, count) or not np.isfinite(numbers).all():
        raise UserError(f"{what}: found {', '.join(map(str, numbers))}, expected 1 or {count} finite numbers")
    return np.broadcast_to(np.asarray(numbers, np.float64), count)


def _scaling(
    training: Trajectories | None, scale: Sequence[float], observed: Trajectories
) -> tuple[np.ndarray, np.ndarray]:
    """What is subtracted from variables, and by what they are divided then."""
    if (training is None) == (not len(scale)):
        raise UserError("training, scale: expected one of them, to scale the variables")
    if training is None:
        unit = _of_variables("scale", scale, observed)
        if not (unit > 0).all():
            raise UserError(f"scale: found {', '.join(map(str, scale))}, expected numbers > 0")
        return np.zeros(len(unit)), unit
    numbers = _ordered("training", training, observed).values[training.mask]
    unit = numbers.std(0)
    if not (unit > 0).all():
        raise UserError(f"training: variable {observed.variables[int(np.argmin(unit > 0))]} does not vary")
    return numbers.mean(0), unit


def _ordered(name: str, s: Trajectories, observed: Trajectories) -> Trajectories:
    """The set with its variables in the order of the observed ones; numbered variables keep theirs."""
    if s.variables == observed.variables:
        return s
    if set(s.variables) == set(observed.variables):
        return s._replace(
            values=s.values[..., [s.variables.index(v) for v in observed.variables]], variables=observed.variables
        )
    numbered = tuple(f"x{i}" for i in range(len(observed.variables)))
    if len(s.variables) == len(numbered) and numbered in (s.variables, observed.variables):
        return s
    raise UserError(f"{name}: found variables {', '.join(s.variables)}, expected {', '.join(observed.variables)}")


def _matched(observed: Trajectories, forecasts: Mapping[str, Trajectories]) -> tuple[Trajectories, ...]:
    """The observed set and the forecasts, all with the same conditions and variables in the same order."""
    if not forecasts:
        raise UserError("forecasts: found none, expected at least one")
    first, lead = next(iter(forecasts.items()))
    for name, s in forecasts.items():
        if bool(s.conditions) != bool(lead.conditions):
            kinds = ("samples of one law", "samples for each condition")
            found = kinds[bool(s.conditions)]
            raise UserError(f"{name}: found {found}, expected {kinds[not s.conditions]}, as of {first}")
        if s.values.shape[1] < 2:
            raise UserError(f"{name}: found 1 sample, expected at least 2")
    if not lead.conditions:
        if observed.conditions:
            raise UserError(f"{first}: found samples of one law, expected samples for each condition, as observed")
        return (observed, *(_ordered(name, s, observed) for name, s in forecasts.items()))
    count = len(lead.conditions)
    if not observed.conditions:
        if observed.values.shape[1] != count or not lead.numbered:
            found = observed.values.shape[1]
            raise UserError(f"observed: found {found} trajectories, expected one for each of {count} conditions")
        each = {k: getattr(observed, k).swapaxes(0, 1) for k in ("values", "times", "mask")}
        observed = observed._replace(**each, conditions=lead.conditions, numbered=True)
    if observed.values.shape[1] != 1:
        raise UserError(f"observed: found {observed.values.shape[1]} trajectories for a condition, expected one")
    out = [observed]
    for name, s in forecasts.items():
        if odd := sorted(set(s.conditions) ^ set(observed.conditions)):
            which = "is missing" if odd[0] in observed.conditions else "was not observed"
            raise UserError(f"{name}: condition {odd[0]} {which}")
        rows = [s.conditions.index(c) for c in observed.conditions]
        s = s._replace(values=s.values[rows], times=s.times[rows], mask=s.mask[rows], conditions=observed.conditions)
        out.append(_ordered(name, s, observed))
    return tuple(out)
