"""Action distributions of a team, on top of distrax: the only file that touches it.

`Actions` turns an environment's action space into the size of the network's output and a distribution over [..., A]
actions whose log-probability and entropy leave out padded choices and dimensions of agents that have fewer.
"""

from typing import Any, NamedTuple

import distrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.core.errors import UserError

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
        self.parts = [distrax.Categorical(logits=x) for x in logits]
        self.squeeze = squeeze

    def sample(self, key: Array) -> Array:
        parts = [p.sample(seed=k) for p, k in zip(self.parts, jax.random.split(key, len(self.parts)))]
        return self._join(parts)

    def mode(self) -> Array:
        return self._join([jnp.asarray(p.mode()) for p in self.parts])

    def log_prob(self, action: Array) -> Array:
        """[..., A]."""
        columns = [action] if self.squeeze else [action[..., i] for i in range(len(self.parts))]
        logp = [jax.nn.log_softmax(p.logits, axis=-1) for p in self.parts]
        picked = [jnp.take_along_axis(l, a[..., None], axis=-1)[..., 0] for l, a in zip(logp, columns)]
        return sum(picked[1:], picked[0])

    def entropy(self) -> Array:
        """[..., A], nats."""
        each = [jnp.asarray(p.entropy()) for p in self.parts]
        return sum(each[1:], each[0])

    def _join(self, parts: list[Array]) -> Array:
        parts = [p.astype(jnp.int32) for p in parts]
        return parts[0] if self.squeeze else jnp.stack(parts, axis=-1)


class Normal:
    """Diagonal normal over the last axis; `valid` [A, k] leaves out padded dimensions (their action is 0)."""

    def __init__(self, mean: Array, std: Array, valid: np.ndarray | None = None):
        self.each = distrax.Normal(mean, std)
        self.valid = valid

    def sample(self, key: Array) -> Array:
        return self._clean(self.each.sample(seed=key))

    def mode(self) -> Array:
        return self._clean(self.each.mode())

    def log_prob(self, action: Array) -> Array:
        """[..., A]."""
        return self._clean(self.each.log_prob(action)).sum(-1)

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


TeamDistribution = MultiCategorical | Normal


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
