"""Where tasks end, as functions of the next observation, for rollouts in learned models.

The conditions are those of the environments, as MOPO (Yu et al., 2020) lists them for Gym's MuJoCo tasks.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxstack.core.errors import UserError

Ends = Callable[[Float[Array, "B S"]], Bool[Array, " B"]]


def never(obs: Float[Array, "B S"]) -> Bool[Array, " B"]:
    """No end."""
    return jnp.zeros(len(obs), bool)


def hopper(obs: Float[Array, "B S"]) -> Bool[Array, " B"]:
    """Fallen, leaning or out of range: unless z > 0.7, |angle| < 0.2, all of obs[1:] within +-100 and finite."""
    fine = jnp.isfinite(obs).all(-1) & (jnp.abs(obs[:, 1:]) < 100).all(-1)
    return ~(fine & (obs[:, 0] > 0.7) & (jnp.abs(obs[:, 1]) < 0.2))


def walker2d(obs: Float[Array, "B S"]) -> Bool[Array, " B"]:
    """Unless 0.8 < z < 2 and |angle| < 1."""
    return ~((obs[:, 0] > 0.8) & (obs[:, 0] < 2.0) & (jnp.abs(obs[:, 1]) < 1.0))


def ant(obs: Float[Array, "B S"]) -> Bool[Array, " B"]:
    """Unless 0.2 <= z <= 1 and all is finite. The released code of PTGOOD has it the wrong way round."""
    return ~(jnp.isfinite(obs).all(-1) & (obs[:, 0] >= 0.2) & (obs[:, 0] <= 1.0))


def humanoid(obs: Float[Array, "B S"]) -> Bool[Array, " B"]:
    """Unless 1 < z < 2."""
    return ~((obs[:, 0] > 1.0) & (obs[:, 0] < 2.0))


def mountain_car(obs: Float[Array, "B S"]) -> Bool[Array, " B"]:
    """At the goal: position >= 0.45 with velocity >= 0."""
    return (obs[:, 0] >= 0.45) & (obs[:, 1] >= 0.0)


TERMINATIONS: dict[str, Ends] = {
    "gymnax/MountainCarContinuous-v0": mountain_car,
    **dict.fromkeys([f"gymnax/{x}" for x in ("Pendulum-v1", "Reacher-misc", "Swimmer-misc", "PointRobot-misc")], never),
    "hopper": hopper,
    "walker2d": walker2d,
    "ant": ant,
    "humanoid": humanoid,
    "never": never,
}
"""By environment id, or by task."""


def of(env: str, can_terminate: bool) -> Ends:
    """The ends of an environment: `never` for one that does not terminate.

    Raises:
        UserError: for one that does and whose ends are not known here.
    """
    if not can_terminate:
        return never
    name = env.removeprefix("brax/").partition("-")[0].lower()
    found = TERMINATIONS.get(env, TERMINATIONS.get(name))
    if found is None:
        raise UserError(f"env={env!r}: found no termination function, expected one of {', '.join(TERMINATIONS)}")
    return found
