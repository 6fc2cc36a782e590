"""Chunking (Lee and Storkey, "Chunking: Continual Learning is not just about Distribution Shift", arXiv 2310.02206):
learning from data that come in chunks of one distribution, each of which is seen for a while and never again.

    (1) stream: the training set is cut into C_1 .. C_N, each with floor(n_c / N) examples of class c; E epochs on C_k,
        then on C_{k+1}. Epochs per chunk are the same for every N, so steps are too.
    (2) average of the weights theta_k (with BatchNorm statistics) at the ends of chunks, for prediction alone:
        mean  avg_k = ((k - 1) avg_{k-1} + theta_k) / k           = (1 / k) sum_{j <= k} theta_j
        EMA   avg_k = a avg_{k-1} + (1 - a) theta_k,  avg_1 = theta_1
        Training continues from theta_k.
    (3) chunking proportion (acc_offline - acc_chunks) / (acc_offline - acc_classes): which share of what continual
        learning loses is lost without any change of distribution. Same number of chunks as of groups of classes.

    The linear case. Least squares of each chunk forgets all others; Bayesian regression with prior N(m_0, V_0) and
    noise s^2 does not depend on chunks, and with large ones its mean is near the mean of the chunks' least squares:
    (4) V_k^-1 = V_{k-1}^-1 + X_k' X_k / s^2,    V_k^-1 m_k = V_{k-1}^-1 m_{k-1} + X_k' y_k / s^2
    (5) theta_k = (X_k' X_k)^-1 X_k' y_k

Read: the released code, the abstract and first page, summaries and reviews of the paper. Its (4) has another index in
print, which cannot be meant.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from jaxstack.core import config as configs
from jaxstack.core.learner import Key, Learner, Metrics
from jaxstack.core.metrics import mean
from jaxstack.core.source import Batch
from jaxstack.data.sources import ArrayData, SplitData
from jaxstack.learning import continual
from jaxstack.learning.continual import State
from jaxstack.nn.supervised import Model

# --- averages of weights ----------------------------------------------------------------------------------------------


def averaged(average: Any, new: Any, past: Any) -> Any:
    """Equation (2): `past` of the average and 1 - past of the new weights, leaf by leaf; counters have no average."""
    one = lambda a, x: past * a + (1.0 - past) * x if jnp.issubdtype(x.dtype, jnp.inexact) else x
    return jax.tree.map(one, average, new)


def past_of_mean(k: Any) -> Array:
    """Weight of the past, for the mean of k weights."""
    return (k - 1.0) / k


def past_of_ema(k: Any, ema: Any) -> Array:
    """Weight of the past after k chunks, for an exponential average that begins with the first weights."""
    return jnp.where(k > 1, ema, 0.0)


def proportion(offline: Any, chunks: Any, classes: Any) -> np.ndarray:
    """Equation (3), of accuracies [...]; NaN where continual learning loses nothing."""
    offline, chunks, classes = (np.asarray(a, np.float64) for a in (offline, chunks, classes))
    lost = offline - classes
    return np.where(lost == 0, np.nan, (offline - chunks) / np.where(lost == 0, 1.0, lost))


# --- the linear case --------------------------------------------------------------------------------------------------


class Belief(NamedTuple):
    """Of the weights of a linear regression, in the form that (4) adds up."""

    precision: Array
    """V^-1 [D, D]"""
    shift: Array
    """V^-1 m [D]"""

    @property
    def mean(self) -> Array:
        """m [D]"""
        return jnp.linalg.solve(self.precision, self.shift)


def believe(belief: Belief, x: Array, y: Array, variance: Any) -> Belief:
    """Equation (4) for a chunk x [n, D], y [n] with noise of this variance."""
    return Belief(belief.precision + x.T @ x / variance, belief.shift + x.T @ y / variance)


def least_squares(x: Array, y: Array) -> Array:
    """Equation (5): weights [D] of a chunk x [n, D], y [n], n >= D."""
    return jnp.linalg.solve(x.T @ x, x.T @ y)


# --- a stream in one scan ---------------------------------------------------------------------------------------------


class Study(NamedTuple):
    """What one pass over a stream of N chunks shows."""

    last: Any
    """Variables after the last chunk."""
    averages: Any
    """Those of each average of weights."""
    loss: Array
    """[N] mean training loss in a chunk's last epoch."""
    fit: Array
    """[N] training accuracy on a chunk at its end."""
    moved: Array
    """[N] distance of consecutive weights."""
    matrix: Array
    """[N, J] accuracy on the training data of J chosen chunks after each chunk; rows before a chunk are of no use."""
    averaged_matrix: Array
    """[N, J] the same with the mean of weights."""


def accuracy(model: Model, variables: Any, x: Array, y: Array, mask: Array | None = None, of: Any = None) -> Array:
    """Share of right predictions among examples of the mask. `of` [n, C]: which classes are asked for (where a task is
    told); default: all."""
    logits = model.apply(variables, x)
    right = (logits if of is None else jnp.where(of, logits, -jnp.inf)).argmax(-1) == y
    return continual.average(right.astype(jnp.float32), jnp.ones_like(right) if mask is None else mask)


def study(
    config: continual.Config,
    key: Key,
    hypers: Any,
    data: tuple[Array, Array],
    rows: Array,
    mask: Array,
    *,
    emas: Mapping[str, float] | None = None,
    watch: tuple[int, ...] = (0,),
) -> Study:
    """Learn a stream in one scan, keep averages, look back at earlier chunks.

    Args:
        config: the learner; its stream is given by the arrays.
        key: of weights, orders and draws.
        hypers: may be traced.
        data: training examples [n, ...] and labels [n].
        rows: [N, m] rows of each chunk.
        mask: [N, m] those that count.
        emas: names and weights of the past of exponential averages, beside "mean".
        watch: chunks whose training accuracy is followed.
    """
    model, (x, y) = continual.model_of(config), data
    pasts = {"mean": past_of_mean, **{k: lambda n, a=a: past_of_ema(n, a) for k, a in (emas or {}).items()}}
    s = continual.init(config, key, hypers)
    look = lambda v: jnp.stack([accuracy(model, v, x[rows[j]], y[rows[j]], mask[j]) for j in watch])

    def chunk(c: tuple[State, Any], given: Any) -> tuple[tuple[State, Any], Any]:
        before, averages = c
        at, kept = given
        s, losses = continual.train_task(config, model, before, x[at], y[at], kept)
        now, k = continual.variables(s), s.step.astype(jnp.float32)
        averages = {name: averaged(averages[name], now, past(k)) for name, past in pasts.items()}
        moved = optax.global_norm(jax.tree.map(jnp.subtract, s.params, before.params))
        fit = accuracy(model, now, x[at], y[at], kept)
        return (s, averages), (losses[-1].mean(), fit, moved, look(now), look(averages["mean"]))

    start = dict.fromkeys(pasts, continual.variables(s))
    (s, averages), found = jax.lax.scan(chunk, (s, start), (rows, mask))
    return Study(continual.variables(s), averages, *found)


# --- the learner ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config(continual.Config):
    """Learning of chunks of one distribution, or of groups of classes; a step is a chunk."""

    average: Literal["none", "mean", "ema"] = "mean"
    """What predicts: the last weights, or the average of those at the ends of chunks. Training is the same."""


def past(config: Config, s: State) -> Array:
    """Weight of the past at the end of a chunk."""
    k = s.step.astype(jnp.float32)
    return past_of_mean(k) if config.average == "mean" else past_of_ema(k, s.hypers.ema)


def variables(config: Config, s: State) -> Any:
    """What predicts."""
    return continual.variables(s) if config.average == "none" else s.average


def step(config: Config, s: State, batch: tuple[Array, Array, Array]) -> tuple[State, Metrics]:
    """One chunk (x [n, ...], y [n], mask [n]): all epochs, then the average."""
    x, y, mask = batch
    model, before = continual.model_of(config), s.params
    s, losses = continual.train_task(config, model, s, x, y, mask)
    if config.average != "none":
        s = s._replace(average=averaged(s.average, continual.variables(s), past(config, s)))
    fit = model.apply(continual.variables(s), x).argmax(-1) == y
    moved = optax.global_norm(jax.tree.map(jnp.subtract, s.params, before))
    return s, {"loss/train": losses[-1].mean(), "train/accuracy": mean(fit, mask), "train/moved": moved}


def init(config: Config, key: Key, hypers: Any) -> State:
    """Fresh weights, of which the average is a copy."""
    s = continual.init(config, key, hypers)
    return s._replace(average=() if config.average == "none" else jax.tree.map(jnp.copy, continual.variables(s)))


def source(config: Config) -> ArrayData:
    """The chunks, one per step."""
    x, y = continual.part(config, "train")
    rows, mask = continual.stream_of(config, y)
    return ArrayData((x[rows.ravel()], y[rows.ravel()], mask.ravel()), rows.shape[1], shuffle=False)


def eval_source(config: Config) -> SplitData:
    """The validation part of all classes, once."""
    return SplitData(continual.part(config, "valid"), 256)


def chunking(config: Config = Config(), /, **changes: Any) -> Learner:
    """The learner of a config or of field values, hyperparameters among them; a run is one pass over the chunks.
    Raises `UserError`."""
    config = configs.replace(config, **changes) if changes else config
    model = continual.model_of(config)

    def evaluate(s: State, key: Key, batch: Batch) -> Metrics:
        x, y = batch.data
        right = lambda v: mean(model.apply(v, x).argmax(-1) == y, batch.mask > 0)
        return {
            "eval/accuracy": right(variables(config, s)),
            "eval/last_accuracy": right(continual.variables(s)),
        }

    return Learner(
        init=lambda key, hypers=config.hypers: init(config, key, hypers),
        step=lambda s, batch: step(config, s, batch),
        hypers=config.hypers,
        config=config,
        name="chunking",
        samples_per_step=config.epochs * stream_size(config),
        evaluate=evaluate,
        takes_batch=True,
        num_steps=config.chunks,
        objective=("eval/accuracy", "max"),
        source=source,
        eval_source=eval_source,
        predict=lambda s, x: model.apply(variables(config, s), x),
    )


def stream_size(config: Config) -> int:
    """Examples per chunk. Raises `UserError` for a batch that is larger."""
    return continual.stream_of(config, continual.part(config, "train")[1]).rows.shape[1]
