"""JaxMARL 0.2 (Rutherford et al., 2024) behind our protocol: `jaxmarl/<id>`.

Only the library's transition is used, never its `step`, which computes a reset in every step and drops the last
observation. What else differs from the library stands in each `Spec.notes`.
"""

import contextlib
import io
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.core.config import check_options, options_of
from jaxstack.core.errors import UserError, unknown
from jaxstack.envs import brax_fast, mpe_fast, overcooked_fast, smax_fast, storm_fast
from jaxstack.envs.base import (
    Box,
    Discrete,
    Environment,
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

MPE = [
    "simple_v3",
    "simple_tag_v3",
    "simple_world_comm_v3",
    "simple_spread_v3",
    "simple_crypto_v3",
    "simple_speaker_listener_v4",
    "simple_push_v3",
    "simple_adversary_v3",
    "simple_reference_v3",
    "simple_facmac_v1",
    "simple_facmac_3a_v1",
    "simple_facmac_6a_v1",
    "simple_facmac_9a_v1",
]
SMAX = [
    "3m",
    "2s3z",
    "25m",
    "3s5z",
    "8m",
    "5m_vs_6m",
    "10m_vs_11m",
    "27m_vs_30m",
    "3s5z_vs_3s6z",
    "3s_vs_5z",
    "6h_vs_8z",
    "smacv2_5_units",
    "smacv2_10_units",
    "smacv2_20_units",
]
OVERCOOKED = ["cramped_room", "asymm_advantages", "coord_ring", "forced_coord", "counter_circuit"]
OVERCOOKED_V2 = [
    "cramped_room",
    "asymm_advantages",
    "coord_ring",
    "forced_coord",
    "counter_circuit",
    "cramped_room_v2",
    "asymm_advantages_recipes_center",
    "asymm_advantages_recipes_right",
    "asymm_advantages_recipes_left",
    "two_rooms",
    "two_rooms_both",
    "long_room",
    "fun_coordination",
    "more_fun_coordination",
    "fun_symmetries",
    "fun_symmetries_plates",
    "fun_symmetries1",
    "grounded_coord_simple",
    "grounded_coord_ring",
    "test_time_simple",
    "test_time_wide",
    "demo_cook_simple",
    "demo_cook_wide",
]
MABRAX = ["ant_4x2", "halfcheetah_6x1", "hopper_3x1", "humanoid_9|8", "walker2d_2x3"]
PHYSICS = (
    "rad moveable silent collide mass accel max_speed u_noise c_noise damping contact_force contact_margin".split()
)
"""What MPE's environments take beside the parameters in their signatures, an array over entities each."""
OTHERS = ["hanabi", "switch_riddle", "coin_game", "jaxnav", "storm", "storm_2p", "storm_np"]

IDS: tuple[str, ...] = (
    *(f"MPE_{name}" for name in MPE),
    *(f"smax/{name}" for name in SMAX),
    *(f"overcooked/{name}" for name in OVERCOOKED),
    *(f"overcooked_v2/{name}" for name in OVERCOOKED_V2),
    *MABRAX,
    *OTHERS,
)


class State(NamedTuple):
    """The library's state and our own step counter."""

    lib: Any
    t: Array


class Family(NamedTuple):
    """What the library does not say by itself; functions of (library environment, library state)."""

    horizon: Callable[[Any], int | None]
    terminal: Callable[[Any, Any, Array], Array] | None
    """(lib, state, its done flag) -> the task really ended; None: only the time limit ends an episode."""
    mask: Callable[[Any, Any], dict[str, Array]] | None = None
    state: Callable[[Any, Any], Array] | None = None
    alive: Callable[[Any, Any], Array] | None = None
    info: Callable[[Any, Any, dict], dict[str, Array]] = lambda lib, state, info: {}
    faster: Callable[..., Any] = lambda lib, **options: lib
    """(lib, the options it was made with) -> the same with methods in a form that runs faster"""
    notes: tuple[str, ...] = ()


def _mpe() -> Family:
    return Family(
        horizon=lambda lib: int(lib.max_steps),
        terminal=None,
        faster=mpe_fast.faster,
        notes=(
            "episodes have max_steps steps; the library tests its counter late and runs one more",
            "the time limit truncates",
        ),
    )


def _smax() -> Family:
    def units(state: Any) -> Array:
        return state.state.unit_alive

    def over(lib: Any, state: Any, done: Array) -> Array:
        allies, enemies = units(state)[: lib.num_allies], units(state)[lib.num_allies :]
        return ~allies.any() | ~enemies.any()

    def won(lib: Any, state: Any, info: dict) -> dict[str, Array]:
        allies, enemies = units(state)[: lib.num_allies], units(state)[lib.num_allies :]
        return {"won": (allies.any() & ~enemies.any()).astype(jnp.float32)}

    return Family(
        horizon=lambda lib: int(lib._env.max_steps),
        terminal=over,
        mask=lambda lib, state: lib.get_avail_actions(state),
        state=lambda lib, state: lib.get_world_state(state),
        alive=lambda lib, state: units(state)[: lib.num_allies],
        info=won,
        faster=smax_fast.faster,
        notes=("a decided battle terminates, the time limit truncates", "dead agents leave agent_mask"),
    )


def _overcooked() -> Family:
    def shaped(lib: Any, state: Any, info: dict) -> dict[str, Array]:
        values = info["shaped_reward"] if info else dict.fromkeys(lib.agents, 0.0)
        return {"shaped_reward": jnp.stack([jnp.asarray(values[a], jnp.float32) for a in lib.agents])}

    return Family(
        horizon=lambda lib: int(lib.max_steps),
        terminal=None,
        info=shaped,
        notes=(
            "the declared observation shape is transposed in the library; ours is the array's",
            "the time limit truncates",
        ),
    )


def _overcooked_v2() -> Family:
    return _overcooked()._replace(faster=overcooked_fast.faster)


def _hanabi() -> Family:
    return Family(
        horizon=lambda lib: None,
        terminal=lambda lib, state, done: done,
        mask=lambda lib, state: lib.get_legal_moves(state),
        info=lambda lib, state, info: {"score": state.score.astype(jnp.float32)},
        notes=("legal moves become the action mask", "reward['__all__'] is dropped"),
    )


def _riddle() -> Family:
    return Family(
        horizon=lambda lib: int(lib.max_steps),
        # only the prisoner in the room can end the game, by telling; the library's flag also counts the time limit
        terminal=None,
        notes=("telling terminates, the time limit truncates",),
    )


def _coin() -> Family:
    return Family(
        horizon=lambda lib: int(lib.num_inner_steps * lib.num_outer_steps),
        terminal=None,
        notes=("the time limit truncates", "the library moves the players to new cells after each inner episode"),
    )


def _jaxnav() -> Family:
    def over(lib: Any, state: Any, done: Array) -> Array:
        return jnp.all(state.goal_reached | state.move_term)

    return Family(
        horizon=lambda lib: int(lib.max_steps),
        terminal=over,
        alive=lambda lib, state: ~state.done & ~state.move_term,
        notes=("an episode terminates when every agent reached its goal or crashed; the time limit truncates",),
    )


def _storm() -> Family:
    return Family(
        horizon=lambda lib: int(lib.num_inner_steps * lib.num_outer_steps),
        terminal=None,
        faster=storm_fast.faster,
        notes=(
            "the time limit truncates",
            "the view and the inventory of an agent are flattened and joined",
            "the library's last step of an inner episode shows the next one's start and pays no reward",
        ),
    )


def _mabrax(length: int) -> Family:
    return Family(
        horizon=lambda lib: length,
        terminal=lambda lib, state, done: done,
        state=lambda lib, state: state.obs,
        faster=_mabrax_faster,
        notes=(
            "brax's own auto-reset is off: the library resets a second time and pays for physics in every step",
            "falling terminates, the time limit truncates",
            "the global state is brax's observation",
            "halfcheetah_6x1: root position is kept in the observation, as the index table assumes",
        ),
    )


def _mabrax_faster(lib: Any, **_: Any) -> Any:
    brax_fast.faster(lib.env)
    return lib


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
        with _quiet(self.name):
            obs, lib_state = self.lib.reset(key)
        state = State(lib_state, jnp.int32(0))
        return state, first_step(self.spec, self._obs(obs), **self._facts(lib_state, {}))

    def step(self, key: jax.Array, state: State, action: Array) -> tuple[State, TimeStep]:
        lib, family, spec = self.lib, self.family, self.spec
        with _quiet(self.name):
            obs, lib_state, rewards, dones, info = lib.step_env(key, state.lib, self._actions(action))
        lib_state = like(lib_state, state.lib)
        t = state.t + 1
        terminated = jnp.bool_(False)
        if self.name == "switch_riddle":
            told = action[state.lib.agent_in_room] == lib.game_actions["TELL"]
            terminated = jnp.asarray(told)
        elif family.terminal is not None:
            terminated = jnp.asarray(family.terminal(lib, lib_state, dones["__all__"]), bool).reshape(())
        truncated = jnp.bool_(False) if spec.horizon is None else (t >= spec.horizon) & ~terminated
        facts = self._facts(lib_state, info)
        reward = _rewards(spec, rewards)
        if self.shaped_reward:
            reward = reward + self.shaped_reward * facts["info"]["shaped_reward"]
        ts = first_step(spec, self._obs(obs), reward=reward, terminated=terminated, truncated=truncated, **facts)
        return State(lib_state, t), ts

    def frame(self, state: State) -> np.ndarray:
        from jaxstack.envs import render2d

        if self.name.startswith("MPE_"):
            rad = np.asarray(self.lib.rad)
            pos = np.asarray(state.lib.p_pos)
            return render2d.particles(
                pos[: self.spec.num_agents],
                rad[: self.spec.num_agents],
                pos[self.spec.num_agents :],
                rad[self.spec.num_agents :],
            )
        if self.name.startswith("smax/"):
            s = state.lib.state
            health = np.asarray(s.unit_health) / np.asarray(self.lib._env.unit_type_health)[np.asarray(s.unit_types)]
            size = (self.lib._env.map_width, self.lib._env.map_height)
            return render2d.battle(np.asarray(s.unit_positions), health, self.lib.num_allies, size)
        if self.name.startswith("overcooked/"):
            return render2d.grid(np.asarray(self.lib.get_obs(state.lib)["agent_0"]))
        return super().frame(state)

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
    if "shaped_reward" in options and not rest.startswith("overcooked"):
        raise UserError(f"shaped_reward={options['shaped_reward']}: only overcooked has a shaped reward")
    checked = check_options(options, _known(rest), f"environment 'jaxmarl/{rest}'") if options else {}
    shaped = checked.pop("shaped_reward", 0.0)
    env = JaxMARL(rest, tuple(sorted(checked.items())), shaped)
    return runs(env)  # builds the library's environment now, outside of any trace


@cached(64)
def _known(name: str) -> dict[str, Any]:
    """The options of an environment with their types. The library would ignore some misspelt ones."""
    from jaxmarl.environments.multi_agent_env import MultiAgentEnv

    lib, _ = library(name)
    known = options_of(type(lib), MultiAgentEnv)
    inner = getattr(lib, "_env", getattr(lib, "env", None))  # SMAX's opponents and MABrax pass options on to it
    known |= {} if inner is None else options_of(type(inner), MultiAgentEnv) | known
    known |= dict.fromkeys(PHYSICS, Any) if name.startswith("MPE_") else {}
    known |= {"shaped_reward": float} if name.startswith("overcooked") else {}
    taken = ("**", "agents", "layout", "scenario", "env_name", "auto_reset", "sys")
    return {k: hint for k, hint in known.items() if k not in taken}


@cached(64)
def _library(name: str, options: tuple[tuple[str, Any], ...]) -> tuple[Any, Family]:
    """Ours: the library's environment, with methods in a form that runs faster where there is one."""
    lib, family = library(name, options)
    with jax.ensure_compile_time_eval():
        return family.faster(lib, **dict(options)), family


def library(name: str, options: tuple[tuple[str, Any], ...] = ()) -> tuple[Any, Family]:
    """A new environment of the library's as it comes, and what it does not say by itself."""
    with warnings.catch_warnings(), jax.ensure_compile_time_eval():
        warnings.simplefilter("ignore")
        with _streams_kept():
            import jaxmarl

        kwargs = dict(options)
        if name.startswith("MPE_"):
            return jaxmarl.make(name, **kwargs), _mpe()
        if name.startswith("smax/"):
            from jaxmarl.environments.smax import map_name_to_scenario

            defaults = dict(see_enemy_actions=True, walls_cause_death=True, attack_mode="closest")
            scenario = map_name_to_scenario(name.split("/")[1])
            return jaxmarl.make("HeuristicEnemySMAX", scenario=scenario, **(defaults | kwargs)), _smax()
        if name.startswith("overcooked/"):
            from jaxmarl.environments.overcooked import overcooked_layouts

            return jaxmarl.make("overcooked", layout=overcooked_layouts[name.split("/")[1]], **kwargs), _overcooked()
        if name.startswith("overcooked_v2/"):
            return jaxmarl.make("overcooked_v2", layout=name.split("/")[1], **kwargs), _overcooked_v2()
        if name in MABRAX:
            length = int(kwargs.pop("episode_length", 1000))
            if name == "halfcheetah_6x1":
                kwargs.setdefault("exclude_current_positions_from_observation", False)
            return jaxmarl.make(name, episode_length=None, auto_reset=False, **kwargs), _mabrax(length)
        family = {"hanabi": _hanabi, "switch_riddle": _riddle, "coin_game": _coin, "jaxnav": _jaxnav}.get(
            name, _storm
        )()
        return jaxmarl.make(name, **kwargs), family


@contextlib.contextmanager
def _streams_kept() -> Iterator[None]:
    """JaxMARL prints two lines about optional submodules when it is imported, and leaves sys.stdout and sys.stderr as
    those of the process, which cuts off a notebook or whoever else had replaced them."""
    before = {name: getattr(sys, name) for name in ("stdout", "stderr", "__stdout__")}
    sink = io.StringIO()
    for name in ("stdout", "__stdout__"):
        setattr(sys, name, sink)
    try:
        yield
    finally:
        for name, stream in before.items():
            setattr(sys, name, stream)


@cached(64)
def _spec(env: JaxMARL) -> Spec:
    lib, family = _library(env.name, env.options)
    agents = tuple(str(a) for a in lib.agents)
    with _quiet(env.name):
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
    horizon = family.horizon(lib)
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
        can_terminate=family.terminal is not None or env.name == "switch_riddle",
        can_truncate=horizon is not None,
        truncates_at_horizon=horizon is not None,
        # padded actions of agents with fewer choices are illegal
        has_action_mask=family.mask is not None or (isinstance(space, Discrete) and len(set(counts)) > 1),
        # the shaped reward is each cook's own
        shared_reward=not env.shaped_reward
        and (env.name.startswith(("smax/", "hanabi", "switch", "overcooked")) or env.name in MABRAX),
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
def _quiet(name: str) -> Iterator[None]:
    """jaxnav's lidar and STORM's own step (where options rule out the faster form) write the integer 1 into a boolean
    array: exact, but jax warns about it while tracing."""
    with warnings.catch_warnings():
        if name == "jaxnav" or name.startswith("storm"):
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
