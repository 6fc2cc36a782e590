"""Follow the partner: choose what the partner chooses, with a partner that adapts or one that does not.

Written for this project as the case study of `markov-property`; it is not the environment of Tessera et al. (2025),
whose case study is not public. Each step both agents draw cues c in {0..M-1} and see both of them; the team earns 1
where the (relabelled) actions agree. Two learning agents may agree on a constant, a convention that uses neither
observation nor memory. The grounded partner does not adapt: of a hidden type k in {0..K-1} it plays
(c_{t-1} + k) mod M of its own previous cue, and a uniform action first, so the best reply needs memory.

Best mean reward per step with the grounded partner, M = 4, K = 2, T = 16: without memory 1/M = .25; with memory of the
cue alone (1/M + (T-1)/K)/T = .484; with the type inferred from the first two actions (1/M + 1/K + T-2)/T = .9219.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.core.config import Config, require, require_at_least
from jaxstack.envs.base import Discrete, Environment, Kind, Spec, TimeStep, first_step


class State(NamedTuple):
    """Cues of this step and the one before [2] (-1 at the start), actions of the step before [2] (-1), and what is
    drawn once per episode: the script's type and first action, whether the script plays, the relabelling [M]."""

    cue: Array
    last_cue: Array
    last: Array
    type: Array
    opening: Array
    grounded: Array
    relabel: Array
    t: Array


@dataclass(frozen=True)
class FollowPartner(Config, Environment):
    """Agent 1 learns (`partner=learned`), or is a script that does not adapt (`grounded`), or is that script in a share
    `mixture` of the episodes (`mixed`; no observation tells which). Where the script plays, agent 1's action is
    replaced and its `agent_mask` is False, so a pair trained in one mode is evaluated in another without reshaping."""

    partner: Literal["learned", "grounded", "mixed"] = "learned"
    symbols: int = 4
    """M, the number of cues and actions."""
    types: int = 2
    """K, the number of types of the script; 1 asks for memory without inference."""
    horizon: int = 16
    """T; the time limit truncates."""
    mixture: float = 0.5
    """Share of grounded episodes with `partner=mixed`."""
    see_action: bool = True
    """Off: the partner's previous action is hidden, so its type cannot be inferred."""
    see_cue: bool = True
    """Off: the partner's cue is hidden."""
    relabel: bool = False
    """Other-play (Hu et al., 2020): agent 1's action symbols are permuted anew in each episode, unseen by both. Each
    agent sees the other's actions in its own symbols."""
    own_cue: bool = False
    """Reward only where the action also equals agent 0's cue of this step: observations are needed, memory is not."""

    def validate(self) -> None:
        require_at_least(self, 2, "symbols")
        require_at_least(self, 1, "types", "horizon")
        require(self, "types", self.types <= self.symbols, f"at most symbols={self.symbols}")
        require(self, "mixture", 0.0 <= self.mixture <= 1.0, "a number in [0, 1]")

    @property
    def spec(self) -> Spec:
        return Spec(
            id="follow_partner",
            agents=("agent_0", "agent_1"),
            obs_shape=(3 * self.symbols + 1,),
            action_space=Discrete(self.symbols),
            horizon=self.horizon,
            can_terminate=False,
            truncates_at_horizon=True,
            shared_reward=True,
            notes=("a case study of this project, not of the paper", "actions do not influence later cues"),
        )

    def reset(self, key: jax.Array) -> tuple[State, TimeStep]:
        k_cue, k_type, k_open, k_mode, k_relabel = jax.random.split(key, 5)
        m, none = self.symbols, jnp.full(2, -1, jnp.int32)
        share = {"learned": 0.0, "grounded": 1.0, "mixed": self.mixture}[self.partner]
        same = jnp.arange(m, dtype=jnp.int32)
        state = State(
            cue=jax.random.randint(k_cue, (2,), 0, m, jnp.int32),
            last_cue=none,
            last=none,
            type=jax.random.randint(k_type, (), 0, self.types, jnp.int32),
            opening=jax.random.randint(k_open, (), 0, m, jnp.int32),
            grounded=jax.random.uniform(k_mode, (), jnp.float32) < share,
            relabel=jax.random.permutation(k_relabel, same) if self.relabel else same,
            t=jnp.int32(0),
        )
        return state, self._see(state)

    def step(self, key: jax.Array, state: State, action: Array) -> tuple[State, TimeStep]:
        played = action.astype(jnp.int32).at[1].set(state.relabel[action[1]])
        played = played.at[1].set(jnp.where(state.grounded, self.script(state), played[1]))
        agree = played[0] == played[1]
        if self.own_cue:
            agree &= played[0] == state.cue[0]
        cue = jax.random.randint(key, (2,), 0, self.symbols, jnp.int32)
        state = state._replace(cue=cue, last_cue=state.cue, last=played, t=state.t + 1)
        reward = jnp.broadcast_to(agree.astype(jnp.float32), (2,))
        return state, self._see(state)._replace(reward=reward, truncated=state.t >= self.horizon)

    def script(self, state: State) -> Array:
        """The grounded partner's action: its opening, then its PREVIOUS cue shifted by its type."""
        return jnp.where(state.t == 0, state.opening, (state.last_cue[1] + state.type) % self.symbols)

    def _see(self, state: State) -> TimeStep:
        m = self.symbols
        # agent 1 reads the other's action in its own symbols: the inverse relabelling
        inverse = jnp.argsort(state.relabel).astype(jnp.int32)
        theirs = jnp.stack([state.last[1], jnp.where(state.last[0] < 0, -1, inverse[state.last[0]])])
        theirs = jnp.where((theirs < 0) | (not self.see_action), m, theirs)
        own, other = jax.nn.one_hot(state.cue, m), jax.nn.one_hot(state.cue[::-1], m) * self.see_cue
        obs = jnp.concatenate([own, other, jax.nn.one_hot(theirs, m + 1)], -1).astype(jnp.float32)
        present = jnp.stack([jnp.bool_(True), ~state.grounded])
        return first_step(self.spec, obs, agent_mask=present)

    def frame(self, state: State) -> np.ndarray:
        from jaxstack.envs import render2d

        return render2d.choices(np.asarray(state.last), self.symbols)

    def legend(self) -> tuple[Kind, ...]:
        return (Kind("rows: agents, columns: their last actions", shape="note"),)
