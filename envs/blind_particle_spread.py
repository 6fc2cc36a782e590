"""Blind particle spread (Christianos et al., 2021): groups of agents must go to their group's landmark, unlabelled.

The group is not observed, so parameters shared by all cannot work; sharing within groups is best.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.core.config import Config, require, require_at_least
from jaxstack.envs.base import Discrete, Environment, Kind, Spec, TimeStep, first_step
from jaxstack.envs.particles import moves

VERSIONS = {
    "v1": (5, 5, 5),
    "v2": (10, 10, 10),
    "v3": (6,) * 5,
    "v4": (3, 3, 3, 12, 9),
    "v5": (5, 5, 5),
    "v6": (6,) * 5,
}


class State(NamedTuple):
    """Positions and velocities [N, 2], landmarks [G, 2], step."""

    pos: Array
    vel: Array
    landmarks: Array
    t: Array


@dataclass(frozen=True)
class BlindParticleSpread(Config, Environment):
    """Reward of an agent: minus the distance to its group's landmark. The time limit truncates.

    Versions v5 and v6 are v1 and v3 with the observation entries in another fixed order for each group.
    """

    version: Literal["v1", "v2", "v3", "v4", "v5", "v6"] = "v1"
    groups: tuple[int, ...] = ()
    """Sizes of the groups; given, they replace the version's."""
    horizon: int = 50

    def validate(self) -> None:
        require_at_least(self, 1, "horizon")
        require(self, "groups", all(g >= 1 for g in self.groups), "group sizes >= 1")

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.groups or VERSIONS[self.version]

    @property
    def group_of(self) -> np.ndarray:
        """[N] group of each agent."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    @property
    def orders(self) -> np.ndarray:
        """[G, D] order of the observation entries of each group."""
        dim = 4 + 2 * len(self.sizes)
        if self.version not in ("v5", "v6"):
            return np.tile(np.arange(dim), (len(self.sizes), 1))
        return np.stack([np.random.default_rng(g).permutation(dim) for g in range(len(self.sizes))])

    @property
    def spec(self) -> Spec:
        return Spec(
            id="blind_particle_spread",
            agents=tuple(f"agent_{i}" for i in range(sum(self.sizes))),
            obs_shape=(4 + 2 * len(self.sizes),),
            action_space=Discrete(5),
            horizon=self.horizon,
            truncates_at_horizon=True,
            can_terminate=False,
        )

    def reset(self, key: jax.Array) -> tuple[State, TimeStep]:
        k_pos, k_landmark = jax.random.split(key)
        count = sum(self.sizes)
        pos = jax.random.uniform(k_pos, (count, 2), jnp.float32, minval=-1.0, maxval=1.0)
        landmarks = jax.random.uniform(k_landmark, (len(self.sizes), 2), jnp.float32, minval=-3.0, maxval=3.0)
        state = State(pos, jnp.zeros((count, 2), jnp.float32), landmarks, jnp.int32(0))
        return state, self._see(state)

    def step(self, key: jax.Array, state: State, action: Array) -> tuple[State, TimeStep]:
        # as in MPE: the position moves with the old velocity
        pos = state.pos + 0.1 * state.vel
        vel = 0.75 * state.vel + 0.1 * 5.0 * moves(action)
        state = State(pos, vel, state.landmarks, state.t + 1)
        reward = -jnp.sqrt(jnp.sum(jnp.square(pos - state.landmarks[self.group_of]), -1))
        return state, self._see(state)._replace(reward=reward, truncated=state.t >= self.horizon)

    def _see(self, state: State) -> TimeStep:
        rel = (state.landmarks[None] - state.pos[:, None]).reshape(len(self.group_of), -1)
        obs = jnp.concatenate([state.vel, state.pos, rel], -1)
        obs = jnp.take_along_axis(obs, jnp.asarray(self.orders[self.group_of], jnp.int32), axis=-1)
        return first_step(self.spec, obs)

    def frame(self, state: State) -> np.ndarray:
        from jaxstack.envs import render2d

        return render2d.particles(
            np.asarray(state.pos),
            0.1,
            np.asarray(state.landmarks),
            0.15,
            extent=3.5,
            groups=self.group_of,
            landmark_groups=np.arange(len(self.sizes)),
        )

    def legend(self) -> tuple[Kind, ...]:
        return Kind("agents, coloured by group", 0), Kind("their landmarks", 0, "ring")
