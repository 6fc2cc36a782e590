"""How networks read observations: the one place where an observation's kind becomes real numbers.

Real numbers pass through, names of categories become one-hot vectors, pixels are divided by 255. Every network of a
team, the critic's global state and exported policies read observations through `encode`.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.core.errors import UserError
from jaxstack.nn.team import TeamNet


class Inputs(NamedTuple):
    """Static description of one agent's observation.

    kind: "real", "categories" or "image"; raw: its shape as the environment gives it; sizes: the number of values of
    each category; name: the space in words, for messages.
    """

    kind: Literal["real", "categories", "image"]
    raw: tuple[int, ...]
    sizes: tuple[int, ...] = ()
    name: str = "real numbers"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the encoded observation."""
        return (sum(self.sizes),) if self.kind == "categories" else self.raw

    def encode(self, obs: Array) -> Array:
        """Encode observations for a network.

        Args:
            obs: [..., *raw].

        Returns:
            [..., *shape]; float32 for categories and images, real numbers as they are.

        Raises:
            UserError: where the numbers are not of this kind.
        """
        if self.kind == "real":
            return obs
        if self.kind == "image":
            if obs.dtype != jnp.uint8:
                raise UserError(f"observations: found {obs.dtype}, expected uint8 for {self.name}")
            return obs.astype(jnp.float32) / 255.0
        if not jnp.issubdtype(obs.dtype, jnp.integer):
            raise UserError(f"observations: found {obs.dtype}, expected integers for {self.name}")
        columns = [obs] if not self.raw else [obs[..., i] for i in range(len(self.sizes))]
        return jnp.concatenate([jax.nn.one_hot(x, n, dtype=jnp.float32) for x, n in zip(columns, self.sizes)], -1)


def categories(space: Any) -> Inputs:
    """Describe numbers of a Discrete or MultiDiscrete space, to be read as one-hot vectors."""
    sizes = (space.n,) if hasattr(space, "n") else space.nvec
    return Inputs("categories", tuple(space.shape), tuple(map(int, sizes)), str(space))


def inputs_of(spec: Any, dtype: Any = None) -> Inputs:
    """Describe the observations of an environment's `Spec` (envs.base), read by shape so that nn does not import envs.

    Args:
        spec: the environment's facts.
        dtype: what the environment's observations really are; None: not checked.

    Returns:
        Their description.

    Raises:
        UserError: for observations that no network here can read, naming what would make them readable.
    """
    space = spec.observation
    where = f"environment {spec.id!r}: observations"
    if hasattr(space, "n") or hasattr(space, "nvec"):
        out = categories(space)
    elif type(space).__name__ == "Image":
        out = Inputs("image", tuple(space.shape), (), str(space))
    elif hasattr(space, "low"):
        out = Inputs("real", tuple(space.shape))
    else:
        raise UserError(f"{where}: found {space!r}, expected Discrete, MultiDiscrete, Box or Image")
    if dtype is None:
        return out
    dtype = jnp.dtype(dtype)
    whole = np.issubdtype(dtype, np.integer)
    if out.kind == "categories" and not whole:
        raise UserError(f"{where}: found {dtype}, expected integers for {out.name}")
    if out.kind == "image" and dtype != np.uint8:
        raise UserError(f"{where}: found {dtype}, expected uint8 for {out.name}")
    if out.kind == "real":
        if not (whole or dtype == np.bool_ or jnp.issubdtype(dtype, jnp.floating)):
            raise UserError(f"{where}: found {dtype}, expected real numbers, booleans or integers")
        if whole and not np.issubdtype(jnp.dtype(space.dtype), np.integer):
            raise UserError(
                f"{where}: found {dtype}, expected Spec(obs_space=...) to say what the integers are: Discrete(n), "
                f"MultiDiscrete(nvec), Image(shape) or Box(shape, dtype=jnp.{dtype})"
            )
    return out


def reading(net: TeamNet, inputs: Inputs, central: bool) -> TeamNet:
    """Let a team network take observations as the environment gives them.

    They are encoded where a network reads them, minibatch by minibatch, so that rollouts keep the small form.

    Args:
        net: a network of encoded observations.
        inputs: their description.
        central: whether the critic reads a global state, which `joint_state` makes, instead of observations.

    Returns:
        The same network over [T, B, A, *raw].
    """
    if inputs.kind == "real":
        return net
    actor_critic = net.actor_critic

    def critic(w: Any, carry: Any, x: Array, first: Array, **options: Any) -> tuple[Any, Array]:
        return net.critic(w, carry, x if central else inputs.encode(x), first, **options)

    return net._replace(
        materialise=lambda params, aux_state, obs: net.materialise(
            params, aux_state, None if obs is None else inputs.encode(obs)
        ),
        actor=lambda w, carry, obs, first: net.actor(w, carry, inputs.encode(obs), first),
        critic=critic,
        actor_critic=None
        if actor_critic is None
        else lambda w, carry, obs, first: actor_critic(w, carry, inputs.encode(obs), first),
    )


def joint_state(inputs: Inputs, obs: Array) -> Array:
    """Join the encoded observations of all agents, [..., A, *shape] -> [..., A * prod(shape)] float32."""
    return obs.reshape(*obs.shape[: obs.ndim - 1 - len(inputs.shape)], -1).astype(jnp.float32)
