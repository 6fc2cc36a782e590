"""What all of JaxMARL's environments share.

Only the library's transition is used, never its `step`, which computes a reset in every step and drops the last
observation. What else differs from the library stands in each family's notes, which become `Spec.notes`.
"""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.core.config import check_options, options_of
from jaxstack.core.errors import UserError, unknown
from jaxstack.envs.base import (
    Box,
    Discrete,
    Environment,
    Kind,
    MultiDiscrete,
    ObsSpace,
    Spec,
    TimeStep,
    action_limits,
    box_like,
    cached,
    first_step,
    like,
    runs,
    stated,
)
from jaxstack.envs.jaxmarl import (
    coin_game,
    hanabi,
    jaxnav,
    mabrax,
    mpe,
    overcooked,
    overcooked_v2,
    smax,
    storm,
    switch_riddle,
)
from jaxstack.envs.jaxmarl.family import Family
from jaxstack.envs.libraries import importing

FAMILIES: tuple[Family, ...] = tuple(
    family.FAMILY
    for family in (
        mpe,
        smax,
        overcooked,
        overcooked_v2,
        mabrax,
        hanabi,
        switch_riddle,
        coin_game,
        jaxnav,
        storm,
    )
)
FAMILY_OF: dict[str, Family] = {id: family for family in FAMILIES for id in family.ids}
IDS: tuple[str, ...] = tuple(FAMILY_OF)


class State(NamedTuple):
    """The library's state and our own step counter."""

    lib: Any
    t: Array


@dataclass(frozen=True)
class JaxMARL(Environment):
    """One JaxMARL environment. `name` without the family prefix; `options` for its constructor."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()
    shaped_reward: float = 0.0
    """Overcooked: weight of the shaped reward that is added to the reward."""

    @property
    def lib(self) -> Any:
        return _library(self.name, self.options)[0]

    @property
    def family(self) -> Family:
        return _library(self.name, self.options)[1]

    @property
    def spec(self) -> Spec:
        return _spec(self)

    def reset(self, key: jax.Array) -> tuple[State, TimeStep]:
        with _quiet(self.family):
            obs, lib_state = self.lib.reset(key)
        state = State(lib_state, jnp.int32(0))
        return state, first_step(self.spec, self._obs(obs), **self._facts(lib_state, {}))

    def step(self, key: jax.Array, state: State, action: Array) -> tuple[State, TimeStep]:
        lib, family, spec = self.lib, self.family, self.spec
        with _quiet(self.family):
            obs, lib_state, rewards, dones, info = lib.step_env(key, state.lib, self._actions(action))
        lib_state = like(lib_state, state.lib)
        t = state.t + 1
        terminated = jnp.bool_(False)
        if family.terminal is not None:
            over = family.terminal(lib, state.lib, action, lib_state, dones["__all__"])
            terminated = jnp.asarray(over, bool).reshape(())
        truncated = jnp.bool_(False) if spec.horizon is None else (t >= spec.horizon) & ~terminated
        facts = self._facts(lib_state, info)
        reward = _rewards(spec, rewards)
        if self.shaped_reward:
            reward = reward + self.shaped_reward * facts["info"]["shaped_reward"]
        ts = first_step(spec, self._obs(obs), reward=reward, terminated=terminated, truncated=truncated, **facts)
        return State(lib_state, t), ts

    def frame(self, state: State) -> np.ndarray:
        if self.family.frame is not None:
            return self.family.frame(self.lib, state.lib, self.spec.num_agents)
        return super().frame(state)

    def legend(self) -> tuple[Kind, ...]:
        return self.family.legend(self.spec)

    def _obs(self, obs: Any) -> Array:
        rows = _stack(_per_agent(obs, self.spec.agents), self.spec.obs_shape)
        return rows.astype(stated(rows.dtype))

    def _facts(self, lib_state: Any, info: dict) -> dict[str, Any]:
        lib, family = self.lib, self.family
        out: dict[str, Any] = {"info": family.info(lib, lib_state, info)}
        if family.mask is not None:
            masks = family.mask(lib, lib_state)
            out["action_mask"] = jnp.stack([masks[a] for a in lib.agents]).astype(bool)
        elif self.spec.has_action_mask:
            out["action_mask"] = jnp.asarray(action_limits(self.spec))
        if family.state is not None:
            out["state"] = jnp.asarray(family.state(lib, lib_state), jnp.float32).reshape(-1)
        if family.alive is not None:
            out["agent_mask"] = family.alive(lib, lib_state)
        return out

    def _actions(self, action: Array) -> Any:
        lib, spec = self.lib, self.spec
        if isinstance(spec.action_space, Box):
            low, high = np.asarray((spec.action_space.low, spec.action_space.high), np.float32)
            action = jnp.clip(action, low, high)
            sizes = spec.action_sizes or (spec.action_space.shape[0],) * spec.num_agents
            return {a: action[i, : sizes[i]] for i, a in enumerate(lib.agents)}
        return {a: action[i] for i, a in enumerate(lib.agents)}


def make(rest: str, **options: Any) -> JaxMARL:
    """`jaxmarl/<rest>`; raises `UnknownName` with the nearest ids, `UserError` for options the library refuses."""
    if rest not in IDS:
        raise unknown("environment", f"jaxmarl/{rest}", [f"jaxmarl/{i}" for i in IDS])
    if "shaped_reward" in options and "shaped_reward" not in FAMILY_OF[rest].options:
        raise UserError(f"shaped_reward={options['shaped_reward']}: only overcooked has a shaped reward")
    checked = check_options(options, _known(rest), f"environment 'jaxmarl/{rest}'") if options else {}
    shaped = checked.pop("shaped_reward", 0.0)
    env = JaxMARL(rest, tuple(sorted(checked.items())), shaped)
    return runs(env)  # builds the library's environment now, outside of any trace


@cached(64)
def _known(name: str) -> dict[str, Any]:
    """The options of an environment with their types. The library would ignore some misspelt ones."""
    with importing(f"jaxmarl/{name}"):
        from jaxmarl.environments.multi_agent_env import MultiAgentEnv

    lib, family = library(name)
    known = options_of(type(lib), MultiAgentEnv)
    inner = getattr(lib, "_env", getattr(lib, "env", None))  # SMAX's opponents and MABrax pass options on to it
    known |= {} if inner is None else options_of(type(inner), MultiAgentEnv) | known
    known |= family.options
    taken = ("**", "agents", "layout", "scenario", "env_name", "auto_reset", "sys")
    return {k: hint for k, hint in known.items() if k not in taken}


@cached(64)
def _library(name: str, options: tuple[tuple[str, Any], ...]) -> tuple[Any, Family]:
    """Ours: the library's environment, with methods in a form that runs faster where there is one."""
    lib, family = library(name, options)
    with jax.ensure_compile_time_eval():
        return family.fast(lib, **dict(options)), family


def library(name: str, options: tuple[tuple[str, Any], ...] = ()) -> tuple[Any, Family]:
    """Return a new, unmodified environment of the library and its family."""
    family = FAMILY_OF[name]
    with warnings.catch_warnings(), jax.ensure_compile_time_eval():
        warnings.simplefilter("ignore")
        with importing(f"jaxmarl/{name}"):
            import jaxmarl  # noqa: F401
        return family.make(name, dict(options)), family


@cached(64)
def _spec(env: JaxMARL) -> Spec:
    lib, family = _library(env.name, env.options)
    agents = tuple(str(a) for a in lib.agents)
    with _quiet(family):
        obs, lib_state = jax.eval_shape(lib.reset, jax.random.key(0))
    seen = jax.eval_shape(lambda obs: _per_agent(obs, agents), obs)
    shapes = [tuple(x.shape) for x in seen]
    equal = len(set(shapes)) == 1
    sizes = tuple(int(np.prod(s)) for s in shapes)
    spaces = [_action_space(lib, a) for a in lib.agents]
    if hasattr(spaces[0], "n"):
        counts = tuple(int(s.n) for s in spaces)
        space: Discrete | Box = Discrete(max(counts))
    else:
        counts = tuple(int(np.prod(s.shape)) for s in spaces)
        low, high = float(np.min(spaces[0].low)), float(np.max(spaces[0].high))
        space = Box((max(counts),), low, high)
    state_shape = None
    if family.state is not None:
        state_shape = (int(np.prod(jax.eval_shape(lambda s: family.state(lib, s), lib_state).shape)),)  # pyright: ignore
    horizon = family.horizon(lib, dict(env.options))
    return Spec(
        id=f"jaxmarl/{env.name}",
        agents=agents,
        obs_shape=shapes[0] if equal else (max(sizes),),
        action_space=space,
        obs_space=_obs_space(lib, shapes[0], seen[0].dtype) if equal else None,
        obs_sizes=() if equal else sizes,
        action_sizes=() if len(set(counts)) == 1 else counts,
        state_shape=state_shape,
        horizon=horizon,
        can_terminate=family.terminal is not None,
        can_truncate=horizon is not None,
        truncates_at_horizon=horizon is not None,
        # padded actions of agents with fewer choices are illegal
        has_action_mask=family.mask is not None or (isinstance(space, Discrete) and len(set(counts)) > 1),
        # the shaped reward is each cook's own
        shared_reward=family.shared_reward and not env.shaped_reward,
        notes=family.notes,
    )


def _action_space(lib: Any, agent: Any) -> Any:
    """Two of the STORM games take no agent argument."""
    try:
        return lib.action_space(agent)
    except TypeError:
        return lib.action_space()


def _obs_space(lib: Any, shape: tuple[int, ...], dtype: Any) -> ObsSpace:
    """The space that the library declares, with the shape and type of the arrays that it really gives."""
    try:
        space = lib.observation_space(lib.agents[0])
    except TypeError:
        space = lib.observation_space()
    if hasattr(space, "num_categories") and np.shape(space.num_categories) == shape:
        return MultiDiscrete(tuple(int(n) for n in space.num_categories))
    if hasattr(space, "n") and shape == ():
        return Discrete(int(space.n))
    return box_like(shape, space, dtype)


def _key(obs: dict, index: int, agent: str) -> Any:
    return agent if agent in obs else index


@contextlib.contextmanager
def _quiet(family: Family) -> Iterator[None]:
    with warnings.catch_warnings():
        if family.writes_integers:
            warnings.filterwarnings("ignore", message="scatter inputs have incompatible types", category=FutureWarning)
        yield


def _per_agent(obs: Any, agents: tuple[str, ...]) -> list[Array]:
    """One array an agent from the library's four forms: a dict by agent, an array [A, ...], a tuple of parts by agent
    (storm_2p), or parts that each hold all agents (storm: views [A, ...], inventories [5, A])."""
    if isinstance(obs, dict) and "observations" in obs:
        views, inventories = obs["observations"], obs["inventory"]
        return [_join(views[i], inventories[:, i]) for i in range(len(agents))]
    if isinstance(obs, tuple):
        return [_join(part["observation"], part["inventory"]) for part in obs]
    if isinstance(obs, dict):
        return [obs[_key(obs, i, a)] for i, a in enumerate(agents)]
    return list(obs)


def _join(view: Array, inventory: Array) -> Array:
    return jnp.concatenate([jnp.ravel(view).astype(jnp.float32), jnp.ravel(inventory).astype(jnp.float32)])


def _stack(rows: list[Array], shape: tuple[int, ...]) -> Array:
    if all(r.shape == shape for r in rows):
        return jnp.stack(rows)
    width = shape[0]
    return jnp.stack([jnp.pad(r.reshape(-1), (0, width - r.size)) for r in rows])


def _rewards(spec: Spec, rewards: Any) -> Array:
    if isinstance(rewards, dict):
        rewards = jnp.stack([jnp.asarray(rewards[_key(rewards, i, a)]).reshape(()) for i, a in enumerate(spec.agents)])
    return jnp.asarray(rewards).reshape(spec.num_agents).astype(jnp.float32)
