"""Loss terms per sample; reduce them with `masked_mean`. `groups` names the group of each agent, see groups.py.

Arguments of other shapes or types raise `AssertionError`, which names the argument.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num

from jaxstack.core import shapes
from jaxstack.core.groups import Groups, number, sums

Number = Float[Array, ""] | float
Weight = Num[Array, "..."] | Bool[Array, "..."]
"""What each entry counts, of a shape that broadcasts to that of the entries."""


def ppo_clip(
    logp: Float[Array, "*B"] | float,
    old_logp: Float[Array, "*B"] | float,
    advantage: Float[Array, "*B"] | float,
    clip: Number,
) -> Float[Array, "*B"]:
    """Evaluate PPO's clipped surrogate, negated (Schulman et al., 2017, eq. 7).

    -min(r A, clip(r, 1 - clip, 1 + clip) A) with r = exp(logp - old_logp).

    Args:
        logp: Log-probabilities of the actions under the policy that is trained, of any shape [...].
        old_logp: Those under the policy that acted [...].
        advantage: Advantages [...].
        clip: Largest useful distance of the ratio from 1.

    Returns:
        Loss terms [...].

    Example:
        loss = masked_mean(ppo_clip(dist.log_prob(action), old_logp, advantage, 0.2), alive)
    """
    shapes.assert_same_shape(logp=logp, old_logp=old_logp, advantage=advantage)
    shapes.assert_float(logp=logp, old_logp=old_logp, advantage=advantage)
    shapes.assert_rank(0, clip=clip)
    ratio = jnp.exp(logp - old_logp)
    return -jnp.minimum(ratio * advantage, jnp.clip(ratio, 1.0 - clip, 1.0 + clip) * advantage)


def clipped_value(
    value: Float[Array, "*B"] | float,
    old_value: Float[Array, "*B"] | float,
    target: Float[Array, "*B"] | float,
    clip: Number,
) -> Float[Array, "*B"]:
    """Evaluate PPO's value loss: half the larger of the squared errors of the value and of the clipped value.

    Args:
        value: Values under the critic that is trained, of any shape [...].
        old_value: Those when the data were collected [...].
        target: Value targets [...].
        clip: Largest distance of the clipped value from `old_value`; infinite: no clipping.

    Returns:
        Loss terms [...].
    """
    shapes.assert_same_shape(value=value, old_value=old_value, target=target)
    shapes.assert_float(value=value, old_value=old_value, target=target)
    shapes.assert_rank(0, clip=clip)
    clipped = old_value + jnp.clip(value - old_value, -clip, clip)
    return 0.5 * jnp.maximum(jnp.square(value - target), jnp.square(clipped - target))


def huber(error: Float[Array, "*B"], delta: Number = 1.0) -> Float[Array, "*B"]:
    """Evaluate the Huber loss (Huber, 1964): quadratic within +-delta, linear outside.

    Args:
        error: Errors of any shape [...].
        delta: Where the quadratic part ends.

    Returns:
        Loss terms [...].
    """
    shapes.assert_float(error=error)
    shapes.assert_rank(0, delta=delta)
    size = jnp.abs(error)
    inside = jnp.minimum(size, delta)
    return 0.5 * jnp.square(inside) + delta * (size - inside)


def masked_mean(x: Float[Array, "..."], weight: Weight) -> Float[Array, ""]:
    """Average over all axes.

    Args:
        x: Values of any shape.
        weight: What each value counts, of a shape that broadcasts to theirs.

    Returns:
        The weighted mean; 0 when no weight is left.
    """
    shapes.assert_float(x=x)
    shapes.assert_broadcasts(jnp.shape(x), weight=weight)
    weight = jnp.broadcast_to(weight, x.shape).astype(x.dtype)
    return (x * weight).sum() / jnp.maximum(weight.sum(), 1e-8)


def masked_means(
    terms: dict[str, Float[Array, "*B"]], weight: Weight, groups: Groups = ()
) -> dict[str, Float[Array, "*G"]]:
    """Average several terms of one shape by one sum, each as `masked_mean` does.

    Args:
        terms: Arrays of one shape; with several groups [..., A].
        weight: What each entry counts, of a shape that broadcasts to theirs.
        groups: The group of each agent.

    Returns:
        Scalars, or with several groups the means [G] over each group's own entries.
    """
    shapes.assert_same_shape(**terms)
    shapes.assert_float(**terms)
    first = next(iter(terms.values()))
    shapes.assert_broadcasts(jnp.shape(first), weight=weight)
    _check_agents(next(iter(terms)), first, groups)
    stacked = jnp.stack([*terms.values()])
    weight = jnp.broadcast_to(weight, stacked.shape[1:]).astype(stacked.dtype)
    if number(groups) == 1:
        axes = tuple(range(1, stacked.ndim))
        means = (stacked * weight).sum(axes) / jnp.maximum(weight.sum(), 1e-8)
    else:
        axes = tuple(range(1, stacked.ndim - 1))
        count = sums(weight.sum(tuple(a - 1 for a in axes)), groups)
        means = sums((stacked * weight).sum(axes), groups) / jnp.maximum(count, 1e-8)
    return dict(zip(terms, means, strict=True))


def standardise(x: Float[Array, "*B"], weight: Weight, eps: float = 1e-8, groups: Groups = ()) -> Float[Array, "*B"]:
    """Subtract the weighted mean over all axes and divide by the weighted standard deviation plus `eps`.

    Args:
        x: Values; with several groups [..., A].
        weight: What each value counts, of a shape that broadcasts to theirs.
        eps: Added to the standard deviation.
        groups: The group of each agent, whose own moments standardise its values.

    Returns:
        Standardised values, also where the weight is 0.
    """
    mean, var = moments(x, weight, groups)
    return (x - mean) / (jnp.sqrt(var) + eps)


def explained_variance(
    value: Float[Array, "*B"], target: Float[Array, "*B"], weight: Weight, groups: Groups = ()
) -> Float[Array, ""]:
    """Measure how much of the targets' variance the values explain: 1 - Var[target - value] / Var[target].

    Args:
        value: Predictions; with several groups [..., A].
        target: What they shall be, of the same shape.
        weight: What each entry counts, of a shape that broadcasts to theirs.
        groups: The group of each agent.

    Returns:
        The mean over agents, each with its own group's variances.
    """
    shapes.assert_same_shape(value=value, target=target)
    shapes.assert_float(value=value, target=target)
    left, whole = (moments(x, weight, groups)[1] for x in (target - value, target))
    return (1.0 - left / jnp.maximum(whole, 1e-8)).mean()


def moments(
    x: Float[Array, "..."], weight: Weight, groups: Groups = ()
) -> tuple[Float[Array, "*A"], Float[Array, "*A"]]:
    """Compute the weighted mean and variance over all axes.

    Args:
        x: Values; with several groups [..., A].
        weight: What each value counts, of a shape that broadcasts to theirs.
        groups: The group of each agent.

    Returns:
        (mean, variance): scalars, or with several groups those of each agent's group [A].
    """
    _check_agents("x", x, groups)

    def mean(x: Array) -> Array:
        if number(groups) == 1:
            return masked_mean(x, weight)
        return masked_means({"x": x}, weight, groups)["x"][np.asarray(groups)]

    centre = mean(x)
    return centre, mean(jnp.square(x - centre))


def _check_agents(name: str, x: Array, groups: Groups) -> None:
    if number(groups) > 1 and jnp.shape(x)[-1:] != (len(groups),):
        found = f"found shape {jnp.shape(x)}"
        raise AssertionError(f"argument {name}: expected a last axis of {len(groups)} agents, as groups has; {found}")
