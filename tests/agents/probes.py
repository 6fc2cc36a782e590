"""Probe environments whose optimal policy and values are known in closed form, with any number of agents."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxstack.envs.base import Box, Discrete, Environment, Spec, first_step


class ProbeState(NamedTuple):
    t: Any
    cue: Any


@dataclass(frozen=True)
class Probe(Environment):
    """kind:
    one      reward 1, one step                                      value 1
    obs      reward = observation (+-1), one step                    value = observation
    delayed  reward 1 at the second and last step                    values gamma, 1
    endless  reward 1 for ever, truncated after 5 steps              value 1 / (1 - gamma)
    action   reward +1 for action 1, else -1, one step               policy: action 1
    match    reward +1 if the action equals the cue in view, else -1 policy: the cue
    memory   the cue is seen one step before it must be repeated     policy: the last cue (needs memory)
    role     agent i must play action i % 2; all see the same        policy: the role (needs an identity)
    pay      reward = action (0 or 1), one step; that of the last agent times `last`
    target   reward -(a - 0.5 * cue)^2, real-valued actions          policy: mean 0.5 * cue
    """

    kind: str = "match"
    count: int = 1
    last: float = 1.0

    @property
    def spec(self) -> Spec:
        box = Box((1,), -1.0, 1.0)
        return Spec(
            id=f"probe_{self.kind}",
            agents=tuple(f"agent_{i}" for i in range(self.count)),
            obs_shape=(2,),
            action_space=box if self.kind == "target" else Discrete(2),
            horizon={"delayed": 2, "endless": 5, "memory": 2}.get(self.kind, 1),
            can_terminate=self.kind != "endless",
            can_truncate=self.kind == "endless",
        )

    def _obs(self, s: ProbeState) -> jax.Array:
        cue = jnp.where((self.kind == "memory") & (s.t > 0), 0, 2 * s.cue - 1).astype(jnp.float32)
        if self.kind in ("one", "delayed", "endless", "role", "action", "pay"):
            cue = jnp.full(
                self.count, float(self.kind in ("role", "pay"))
            )  # zeros would hide all weights but the biases
        t = jnp.broadcast_to(s.t if self.kind in ("delayed", "memory") else 0, (self.count,)).astype(jnp.float32)
        return jnp.stack([cue, t], -1)

    def reset(self, key):
        s = ProbeState(jnp.int32(0), jax.random.bernoulli(key, 0.5, (self.count,)).astype(jnp.int32))
        return s, first_step(self.spec, self._obs(s))

    def step(self, key, state, action):
        sign = lambda good: jnp.where(good, 1.0, -1.0)
        ones = jnp.ones(self.count)
        last = state.t + 1 >= (self.spec.horizon or 1)
        reward = {
            "one": lambda: ones,
            "obs": lambda: 2.0 * state.cue - 1.0,
            "delayed": lambda: ones * (state.t == 1),
            "endless": lambda: ones,
            "action": lambda: sign(action == 1),
            "pay": lambda: action * ones.at[-1].set(self.last),
            "match": lambda: sign(action == state.cue),
            "memory": lambda: jnp.where(last, sign(action == state.cue), 0.0),
            "role": lambda: sign(action == jnp.arange(self.count) % 2),
            "target": lambda: -jnp.square(action[:, 0] - 0.5 * (2.0 * state.cue - 1.0)),
        }[self.kind]()
        state = ProbeState(state.t + 1, state.cue)
        ts = first_step(self.spec, self._obs(state), reward=reward.astype(jnp.float32))
        endless = self.kind == "endless"
        return state, ts._replace(terminated=last & (not endless), truncated=last & endless)
