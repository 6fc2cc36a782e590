"""Action distributions of a team, on top of distrax: the only file that touches it.

`Actions` turns an environment's action space into the size of the network's output and a distribution over [..., A]
actions whose log-probability and entropy leave out padded choices and dimensions of agents that have fewer.
"""

from functools import partial
from typing import Any, NamedTuple

import distrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.core.errors import UserError
from jaxstack.fast.noise import in_rows

MASKED = -1e9
"""Logit of an illegal action: finite, so that gradients stay finite."""


class Actions(NamedTuple):
    """Static description of a team's actions.

    kind: "discrete", "multi_discrete" or "continuous"; sizes: (n,), nvec, or (k,); valid [A, n] bool or None: which
    padded entries are real for each agent (a tuple of tuples, so that it hashes).
    """

    kind: str
    sizes: tuple[int, ...]
    valid: tuple[tuple[bool, ...], ...] | None = None

    @property
    def params(self) -> int:
        """Network outputs for an agent."""
        return sum(self.sizes)

    def noise(self, key: Array, shape: tuple[int, ...]) -> Array:
        """What `sample_from` needs for actions of `shape` [..., A]: standard Gumbel or normal numbers [..., A, params].

        Drawing the noise of a whole rollout at once costs a fraction of drawing it step by step.
        """
        draw = jax.random.normal if self.kind == "continuous" else jax.random.gumbel
        return in_rows(partial(draw, dtype=jnp.float32), key, (*shape, self.params))

    def distribution(self, raw: Array, log_std: Array | None, action_mask: Array | None = None) -> "TeamDistribution":
        """raw [..., A, params]; log_std [k] or [A, k] (continuous); action_mask [..., A, n] or None."""
        valid = None if self.valid is None else np.asarray(self.valid)
        if self.kind == "continuous":
            if log_std is None:
                raise UserError("continuous actions need log_std")
            return Normal(raw, jnp.exp(jnp.broadcast_to(log_std, raw.shape)), valid)
        if self.kind == "multi_discrete":
            return MultiCategorical(jnp.split(raw, np.cumsum(self.sizes)[:-1], axis=-1))
        mask = valid if action_mask is None else action_mask
        return MultiCategorical([raw if mask is None else jnp.where(mask, raw, MASKED)], squeeze=True)


class MultiCategorical:
    """Independent categoricals; `squeeze`: a single one whose actions have no last axis."""

    def __init__(self, logits: list[Array], squeeze: bool = False):
        # one row per sample: XLA's sums over a short last axis are several times slower on arrays of higher rank (CPU)
        self.logits = [x.reshape(-1, x.shape[-1]) for x in logits]
        self.lead, self.squeeze = logits[0].shape[:-1], squeeze

    def sample(self, key: Array) -> Array:
        return self.sample_from(
            jax.random.gumbel(key, (*self.lead, sum(x.shape[-1] for x in self.logits)), jnp.float32)
        )

    def sample_from(self, noise: Array) -> Array:
        """A sample made from standard Gumbel noise [..., A, params], see `Actions.noise`."""
        sizes = np.cumsum([x.shape[-1] for x in self.logits])[:-1]
        rows = jnp.split(noise.reshape(-1, noise.shape[-1]), sizes, axis=-1)
        return self._join([(x + z).argmax(-1) for x, z in zip(self.logits, rows)])

    def mode(self) -> Array:
        return self._join([x.argmax(-1) for x in self.logits])

    def log_prob(self, action: Array) -> Array:
        """[..., A]."""
        columns = [action] if self.squeeze else [action[..., i] for i in range(len(self.logits))]
        picked = [_log_prob(x, a.reshape(-1)) for x, a in zip(self.logits, columns)]
        return sum(picked[1:], picked[0]).reshape(self.lead)

    def entropy(self) -> Array:
        """[..., A], nats."""
        each = [_entropy(x) for x in self.logits]
        return sum(each[1:], each[0]).reshape(self.lead)

    def _join(self, parts: list[Array]) -> Array:
        parts = [p.astype(jnp.int32).reshape(self.lead) for p in parts]
        return parts[0] if self.squeeze else jnp.stack(parts, axis=-1)


def _chosen(x: Array, action: Array) -> Array:
    return action[:, None] == jnp.arange(x.shape[-1], dtype=jnp.int32)


# Derivatives by their closed forms: what a gradient passes back is elementwise, where that of log_softmax sums again
# over the short last axis.
@jax.custom_jvp
def _log_prob(logits: Array, action: Array) -> Array:
    """Logits [B, n] and actions [B] -> [B]."""
    return jnp.where(_chosen(logits, action), jax.nn.log_softmax(logits), 0.0).sum(-1)  # a gather would be slower


@_log_prob.defjvp
def _log_prob_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Any]) -> tuple[Array, Array]:
    logits, action = primals
    slope = _chosen(logits, action) - jnp.exp(jax.nn.log_softmax(logits))
    return _log_prob(logits, action), (slope * tangents[0]).sum(-1)


@jax.custom_jvp
def _entropy(logits: Array) -> Array:
    """Logits [B, n] -> [B]."""
    logp = jax.nn.log_softmax(logits)
    return -(jnp.exp(logp) * logp).sum(-1)


@_entropy.defjvp
def _entropy_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (logits,), (dx,) = primals, tangents
    logp, entropy = jax.nn.log_softmax(logits), _entropy(logits)
    return entropy, (-jnp.exp(logp) * (logp + entropy[:, None]) * dx).sum(-1)


class Normal:
    """Diagonal normal over the last axis; `valid` [A, k] leaves out padded dimensions (their action is 0)."""

    def __init__(self, mean: Array, std: Array, valid: np.ndarray | None = None):
        self.each = distrax.Normal(mean, std)
        self.valid = valid

    def sample(self, key: Array) -> Array:
        return self.sample_from(jax.random.normal(key, self.mean.shape, jnp.float32))

    def sample_from(self, noise: Array) -> Array:
        """A sample made from standard normal noise [..., A, k], see `Actions.noise`."""
        return self._clean(self.mean + self.std * noise)

    def mode(self) -> Array:
        return self._clean(self.each.mode())

    def log_prob(self, action: Array) -> Array:
        """[..., A]."""
        return self._clean(self.each.log_prob(action)).sum(-1)

    def log_prob_within(self, action: Array, low: Array, high: Array) -> Array:
        """Return log-probabilities [..., A] of samples that were clipped to [low, high] [k] (Fujita and Maeda, 2018):
        in a dimension at a bound that of all beyond it, elsewhere the log-density."""
        below = jax.scipy.special.log_ndtr((low - self.mean) / self.std)
        above = jax.scipy.special.log_ndtr((self.mean - high) / self.std)
        inside = jnp.asarray(self.each.log_prob(action))
        return self._clean(jnp.where(action <= low, below, jnp.where(action >= high, above, inside))).sum(-1)

    def entropy(self) -> Array:
        """[..., A], nats."""
        return self._clean(self.each.entropy()).sum(-1)

    @property
    def mean(self) -> Array:
        return jnp.asarray(self.each.loc)

    @property
    def std(self) -> Array:
        return jnp.asarray(self.each.scale)

    def _clean(self, x: Any) -> Array:
        return x if self.valid is None else jnp.where(self.valid, x, 0.0)


class Bounded(Normal):
    """A normal whose samples are clipped to [-1, 1] where they are played."""

    def sample_from(self, noise: Array) -> tuple[Array, Array]:
        """Return actions [B, A] and the log-probabilities [B] of what was drawn."""
        drawn = super().sample_from(noise)
        return jnp.clip(drawn, -1.0, 1.0), self.log_prob(drawn)


TeamDistribution = MultiCategorical | Normal


class TanhNormal:
    """Diagonal normal squashed into (-1, 1) over the last axis: the actor of soft actor-critic (Haarnoja et al., 2018).

    The correction log(1 - tanh(u)^2) is 2 (log 2 - u - softplus(-2u)), exact also where tanh rounds to 1.
    """

    def __init__(self, mean: Array, log_std: Array):
        """`mean` and `log_std` [..., A] of the normal before the tanh."""
        self.before = Normal(mean, jnp.exp(log_std))

    def sample_from(self, noise: Array) -> tuple[Array, Array]:
        """Return actions [..., A] made of standard normal noise [..., A], and their log-probabilities [...]."""
        u = self.before.sample_from(noise)
        return jnp.tanh(u), self._log_prob(u)

    def log_prob(self, action: Array, margin: float = 1e-6) -> Array:
        """Return log-probabilities [...] of actions [..., A], clipped to +-(1 - margin)."""
        return self._log_prob(jnp.arctanh(jnp.clip(action, margin - 1.0, 1.0 - margin)))

    def mode(self) -> Array:
        """Return tanh of the mean [..., A]."""
        return jnp.tanh(self.before.mean)

    def _log_prob(self, u: Array) -> Array:
        return self.before.log_prob(u) - jnp.asarray(distrax.Tanh().forward_log_det_jacobian(u)).sum(-1)


def actions_of(spec: Any) -> Actions:
    """The `Actions` of an environment's `Spec` (envs.base), read by shape so that nn does not import envs."""
    space, sizes = spec.action_space, spec.action_sizes
    if hasattr(space, "nvec"):
        return Actions("multi_discrete", tuple(space.nvec))
    n = space.n if hasattr(space, "n") else int(np.prod(space.shape))
    valid = None
    if sizes and any(size != n for size in sizes):
        valid = tuple(tuple(bool(i < size) for i in range(n)) for size in sizes)
    return Actions("discrete" if hasattr(space, "n") else "continuous", (n,), valid)
