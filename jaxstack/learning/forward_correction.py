"""Noise-bounded training losses (Toner and Storkey, "Label Noise: Correcting the Forward-Correction", 2023).

Only the average noise rate is known. Forward-corrected cross entropy is consistent, yet on a finite noisy sample it
falls below what the population allows, by memorising wrong labels. The mean noisy risk of any prediction q obeys

    (1) E[-log q(noisy label | x)] = E_x[ H(p(. | x)) + KL(p(. | x) || q(. | x)) ] >= E_x H(p(. | x))
    (2) where the clean label is a function of x, H(p(. | x)) = H(T[y, :]); for symmetric noise of rate r over C classes
        B(r, C) = -(1 - r) log(1 - r) - r log(r / (C - 1)), the largest entropy that leaves 1 - r to one label
    (3) bounded loss: L' = |L - B| + B of a batch's mean L; its gradient turns round below the floor B
    (4) generalised forward correction: any loss l is -log F(p)_y up to a normaliser, F(p)_y = exp(-l(p, y)) / sum_k ...

Only the abstract and parts of the paper could be read: that the bound acts on a batch's mean, and by an absolute value,
is this project's choice (after flooding, Ishida et al., 2020); `max` and a floor per example are options.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxstack.core import config as configs
from jaxstack.core.config import require
from jaxstack.core.learner import Learner
from jaxstack.data.sources import ArrayData
from jaxstack.learning import noisy_labels
from jaxstack.nn.supervised import supervised

Mode = Literal["flood", "clip", "none"]


def symmetric_floor(rate: Any, classes: int) -> Array:
    """B(r, C) of equation (2), in nats: 0 for r = 0, log C for r = (C - 1) / C. `rate` may be traced."""
    rate = jnp.asarray(rate, jnp.float32)
    return -xlogx(1.0 - rate) - xlogx(rate) + rate * jnp.log(classes - 1.0)


def transition_floor(transition: Array, prior: Array | None = None) -> Array:
    """sum_y prior_y H(T[y, :]) in nats: the floor of a known T [C, C]; `prior` [C] defaults to equal classes."""
    entropies = -xlogx(transition).sum(-1)
    return entropies.mean() if prior is None else (prior * entropies).sum()


def xlogx(x: Array) -> Array:
    """x log x, 0 at 0."""
    return x * jnp.log(jnp.where(x > 0, x, 1.0))


def generic_floor(loss: Callable[[Array, Array], Array], transition: Array, steps: int = 60) -> Array:
    """The floor of another loss under symmetric noise: min over p of sum_k T[0, k] loss(p, k).

    The minimum is looked for among p = (a, (1 - a) / (C - 1), ...) by golden section, which finds it where the risk has
    one minimum in a.

    Args:
        loss: (logits [B, C], labels [B]) -> [B].
        transition: T [C, C].
        steps: of the search; each narrows it by 0.618.

    Returns:
        A scalar, in units of the loss.
    """
    classes = len(transition)
    labels = jnp.arange(classes, dtype=jnp.int32)

    def risk(a: Array) -> Array:
        p = jnp.concatenate([a[None], jnp.full(classes - 1, (1.0 - a) / (classes - 1))])
        logits = jnp.broadcast_to(jnp.log(p), (classes, classes))
        return (transition[0] * loss(logits, labels)).sum()

    ratio = (5**0.5 - 1) / 2

    def narrow(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        smaller = risk(left) < risk(right)
        return jnp.where(smaller, low, left), jnp.where(smaller, right, high)

    low, high = jax.lax.fori_loop(0, steps, narrow, (jnp.float32(1e-6), jnp.float32(1.0 - 1e-6)))
    return risk((low + high) / 2)


def bounded(loss: Array, floor: Array | float, mode: Mode = "flood") -> Array:
    """Equation (3). flood: |L - B| + B; clip: max(L, B), without gradient below; none: L. Any shape; pass a batch's
    mean for a floor of batches, values [B] for one of examples."""
    if mode == "flood":
        return jnp.abs(loss - floor) + floor
    return jnp.maximum(loss, floor) if mode == "clip" else loss


def noise_model(loss: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """Equation (4): the loss -log F(p)_y with F(p)_y = exp(-l(p, y)) / sum_k exp(-l(p, k)); (logits [B, C], labels [B])
    -> [B]."""

    def corrected(logits: Array, labels: Array) -> Array:
        every = lambda k: loss(logits, jnp.full(len(logits), k, jnp.int32))
        values = jax.vmap(every, out_axes=1)(jnp.arange(logits.shape[-1]))
        return jnp.take_along_axis(values, labels[:, None], 1)[:, 0] + jax.nn.logsumexp(-values, axis=-1)

    return corrected


def estimate_anchors(probabilities: Array, quantile: float = 0.97) -> Array:
    """Estimate T [C, C] from predictions of noisy labels [N, C] (Patrini et al., 2017).

    Row i is the prediction at the example that stands at the `quantile` of P(noisy label i): a largest value would be
    an outlier. Rows sum to 1.
    """
    order = jnp.argsort(probabilities, axis=0)
    at = order[round(quantile * (len(probabilities) - 1))]
    rows = probabilities[at]
    return rows / rows.sum(-1, keepdims=True)


@dataclass(frozen=True)
class Config(noisy_labels.Config):
    """Forward correction with a floor under the training loss."""

    loss: Literal["ce", "mae", "gce", "sce", "nce_rce", "nce_mae", "fce", "backward"] = "fce"
    """Floors exist for ce and fce."""
    bound: Mode = "flood"
    """What happens below the floor: flood (the gradient turns round), clip (it is zero), none."""
    per_example: bool = False
    """A floor under each example's loss instead of under the batch's mean."""

    def validate(self) -> None:
        super().validate()
        floored = self.loss in ("ce", "fce") or self.bound == "none"
        require(self, "bound", floored, f"none with loss={self.loss}: the floor is in nats of a label's probability")

    @property
    def assumes(self) -> bool:
        return super().assumes or self.bound != "none"

    def floor(self, hypers: noisy_labels.Hypers) -> Array:
        """B of the assumed noise."""
        return transition_floor(self.assumed_transition(hypers))


def source(config: Config) -> ArrayData:
    """Noisy training batches, in shuffled epochs of each seed's own."""
    return ArrayData(noisy_labels.parts(config)["train"], config.batch_size, per_seed=True)


def forward_correction(config: Config = Config(), /, **changes: Any) -> Learner:
    """The learner of a config or of field values, hyperparameters among them; it predicts with the clean head, p and
    not T^T p. Raises `UserError`."""
    config = configs.replace(config, **changes) if changes else config
    plain = noisy_labels.training_loss(config)

    def loss(logits: Array, labels: Array, hypers: Any) -> Array:
        values = plain(logits, labels, hypers)
        floored = config.per_example and config.bound != "none"
        return bounded(values, config.floor(hypers), config.bound) if floored else values

    def reduce(values: Array, hypers: Any) -> Array:
        mean = values.mean()
        floored = not config.per_example and config.bound != "none"
        return bounded(mean, config.floor(hypers), config.bound) if floored else mean

    options = noisy_labels.learner_options(config)
    return supervised(
        noisy_labels.model_of(config), loss, reduce=reduce, source=source, name="forward-correction", **options
    )
