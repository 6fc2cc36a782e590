"""The environment protocol: pure functions, static shapes, an agent axis.

One protocol serves single-agent (A = 1) and multi-agent environments. Arrays that differ between agents are padded to
the largest size; `obs_sizes` and `action_sizes` say what is real. An environment never resets itself: auto-reset is
`jaxstack.envs.vector`, so that the true last observation exists and is kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial, wraps
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxstack.core.errors import UserError
from jaxstack.fast.noise import in_rows

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Discrete:
    """Whole numbers 0..n-1, one for each agent. Agents with fewer actions are told apart by the action mask."""

    n: int

    @property
    def shape(self) -> tuple[int, ...]:
        return ()

    @property
    def dtype(self) -> Any:
        return jnp.int32


@dataclass(frozen=True)
class MultiDiscrete:
    """Several whole numbers at once [len(nvec)]; entry i is in 0..nvec[i]-1."""

    nvec: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.nvec),)

    @property
    def dtype(self) -> Any:
        return jnp.int32


@dataclass(frozen=True)
class Box:
    """Real numbers; `low` and `high` are scalars or nested tuples of `shape`.

    With an integer `dtype` the numbers are still quantities (counts, coordinates), which a network reads as they are;
    the names of categories are `Discrete`.
    """

    shape: tuple[int, ...]
    low: float | tuple = -float("inf")
    high: float | tuple = float("inf")
    dtype: Any = jnp.float32

    def __repr__(self) -> str:
        return f"Box(shape={self.shape}, low={self.low}, high={self.high}, dtype={np.dtype(self.dtype).name})"


@dataclass(frozen=True)
class Image:
    """Pixels [H, W, C] of uint8, 0..255; networks read them divided by 255."""

    shape: tuple[int, ...]

    @property
    def dtype(self) -> Any:
        return jnp.uint8


def stated(dtype: Any) -> np.dtype:
    """The type of at most 32 bits that stands for `dtype`, whether or not JAX is set to 64 bits."""
    dtype = jnp.dtype(dtype)
    short = {"float64": "float32", "int64": "int32", "uint64": "uint32"}
    return np.dtype(short.get(dtype.name, dtype))


def cached(size: int) -> Callable[[F], F]:
    """Cache what a function returns, apart for programs of 32 and of 64 bits: what is made under `JAX_ENABLE_X64` holds
    arrays and programs of 64 bits."""

    def wrap(function: F) -> F:
        stored = lru_cache(size)(lambda wide, *args: function(*args))
        return wraps(function)(lambda *args: stored(bool(jax.config.jax_enable_x64), *args))  # pyright: ignore[reportReturnType]

    return wrap


def box_like(shape: tuple[int, ...], space: Any, dtype: Any) -> Box:
    """Observations of `shape` and `dtype` with the bounds of a library's space, where it has some.

    Bounds that differ within a vector are kept one by one, those of larger arrays as the lowest and the highest.
    """
    bounds = []
    for name, free, extreme in (("low", -np.inf, np.min), ("high", np.inf, np.max)):
        bound = np.asarray(getattr(space, name, free), np.float32)
        same = bound.size > 0 and bool((bound == bound.reshape(-1)[0]).all())
        each = len(shape) == 1 and bound.shape == shape and not same
        bounds.append(tuple(bound.tolist()) if each else float(extreme(bound)))
    return Box(shape, *bounds, stated(dtype))


Space = Discrete | MultiDiscrete | Box
ObsSpace = Discrete | MultiDiscrete | Box | Image


class TimeStep(NamedTuple):
    """What an environment says after `reset` or `step`; at an episode's end too, the observation is the true one."""

    obs: Array
    """[A, *obs_shape]; rows of agents with smaller observations are padded with zeros."""
    reward: Float[Array, "A"]
    terminated: Bool[Array, ""]
    """The task ended: no value beyond this step."""
    truncated: Bool[Array, ""]
    """The episode was cut (time limit): the value continues. Never true together with `terminated`."""
    agent_mask: Bool[Array, "A"]
    """Agents that can act now (dead or absent ones are False); their samples carry no policy gradient otherwise."""
    action_mask: Bool[Array, "A n"] | None
    """Legal actions, at least one true in each row; None when every action is always legal."""
    state: Array | None
    """[*state_shape] global state for centralised critics; None: the concatenated observations serve."""
    info: dict[str, Array]
    """Scalars about the transition, e.g. `won`; the same keys from reset and step."""


@dataclass(frozen=True)
class Spec:
    """Static facts of an environment."""

    id: str
    agents: tuple[str, ...]
    obs_shape: tuple[int, ...]
    action_space: Space
    obs_space: ObsSpace | None = None
    """What an agent's observation is, of shape `obs_shape`; None: real numbers, see `observation`."""
    obs_sizes: tuple[int, ...] = ()
    """True length of each agent's observation vector; empty: all equal `obs_shape`."""
    action_sizes: tuple[int, ...] = ()
    """True number of actions (Discrete) or action dimensions (Box) of each agent; empty: all equal."""
    state_shape: tuple[int, ...] | None = None
    """Shape of TimeStep.state; None: the concatenated observations [A * prod(obs_shape)] are the global state."""
    horizon: int | None = None
    """Longest episode in steps, None if unbounded."""
    can_terminate: bool = True
    can_truncate: bool = True
    truncates_at_horizon: bool = False
    """A promise: an episode is truncated after exactly `horizon` steps and nowhere else. Rollouts then keep one true
    last observation per horizon instead of one per step."""
    has_action_mask: bool = False
    shared_reward: bool = False
    """True when all agents get the same reward."""
    notes: tuple[str, ...] = field(default=())
    """Where this differs from the library it wraps, and why."""

    def __post_init__(self) -> None:
        if self.obs_space is not None and self.obs_space.shape != self.obs_shape:
            found = f"obs_space has shape {self.obs_space.shape}"
            raise UserError(f"environment {self.id!r}: {found}, expected obs_shape={self.obs_shape}")
        if self.truncates_at_horizon and self.horizon is None:
            raise UserError(f"environment {self.id!r}: horizon=None, expected a number, as truncates_at_horizon is set")

    @property
    def num_agents(self) -> int:
        return len(self.agents)

    @property
    def observation(self) -> ObsSpace:
        """`obs_space`, or an unbounded Box of `obs_shape` where none is given."""
        return Box(self.obs_shape) if self.obs_space is None else self.obs_space

    @property
    def obs_dim(self) -> int:
        return int(np.prod(self.obs_shape))

    @property
    def state_dim(self) -> int:
        return int(np.prod(self.state_shape)) if self.state_shape is not None else self.num_agents * self.obs_dim


class Kind(NamedTuple):
    """A kind of things that pictures show: what a legend says of it."""

    name: str
    colour: int | None = None
    """Number of the colour in `render2d.COLOURS`; None: dark, or no colour for a `note`."""
    shape: Literal["disc", "ring", "box", "note"] = "disc"


class Environment:
    """Base of all environments. Subclasses are frozen dataclasses (hashable: static under jit) and set `spec`.

    `reset` and `step` act on ONE environment; `jax.vmap` or `jaxstack.envs.vector` makes many.
    """

    @property
    def spec(self) -> Spec:
        raise UserError(f"{type(self).__name__} declares no spec")

    def reset(self, key: jax.Array) -> tuple[Any, TimeStep]:
        """Start an episode.

        Args:
            key: Of the start state.

        Returns:
            (state, its TimeStep with reward 0 and nothing ended).
        """
        raise UserError(f"{type(self).__name__} has no reset")

    def step(self, key: jax.Array, state: Any, action: Array) -> tuple[Any, TimeStep]:
        """Make one transition. Stepping an ended episode is undefined.

        Args:
            key: Of the transition.
            state: From `reset` or `step`.
            action: [A] numbers (Discrete), or [A, k] components (MultiDiscrete, Box).

        Returns:
            (next state, its TimeStep); the observation is the true next one, also at an episode's end.
        """
        raise UserError(f"{type(self).__name__} has no step")

    @property
    def parameters(self) -> Any:
        """Arrays that all copies of the environment share, such as a level of difficulty; `()` where there are none.

        Where there are some, every episode of a rollout begins with `reset(key, parameters)`, and `reset(key)` uses
        those given here. They are part of the training state, so that a callback can change them without a new
        program, see `envs.with_parameters`.
        """
        return ()

    @property
    def num_tasks(self) -> int:
        """How many named tasks there are, see `envs.tasks`; raises `UserError` where tasks have no names."""
        raise UserError(f"environment {self.spec.id!r} has no sets of tasks")

    def tasks(self, name: str) -> Any:
        """Look up a set of tasks, see `envs.tasks`.

        Args:
            name: Of a set, or of tasks, joined by commas.

        Returns:
            The tasks, a NamedTuple of arrays with a leading axis; row k fits `reset(key, theta)`.

        Raises:
            UserError: For an unknown name, or an environment without tasks.
        """
        raise UserError(f"environment {self.spec.id!r} has no sets of tasks")

    def task_of(self, state: Any) -> Array:
        """Read the number of the task, in 0..num_tasks-1, from states with any leading axes; raises `UserError` where
        tasks have no names."""
        raise UserError(f"environment {self.spec.id!r} has no sets of tasks")

    def frame(self, state: Any) -> np.ndarray:
        """Draw one state, on the host.

        Args:
            state: Without a batch axis.

        Returns:
            A picture [H, W, 3] of uint8.

        Raises:
            UserError: Where the environment cannot be drawn.
        """
        raise UserError(f"environment {self.spec.id!r} cannot be drawn")

    def legend(self) -> Sequence[Kind]:
        """Name what `frame` draws, in the order of a legend; empty where nothing needs a name."""
        return ()


def agent_kinds(spec: Spec) -> tuple[Kind, ...]:
    """The agents, each a disc in the colour of its number, for legends; of many agents one note."""
    if spec.num_agents > 8:
        return (Kind(f"discs: {spec.num_agents} agents", shape="note"),)
    return tuple(Kind(name, i) for i, name in enumerate(spec.agents))


def first_step(spec: Spec, obs: Array, **fields: Any) -> TimeStep:
    """Make the TimeStep of a reset: zero reward, nothing ended, every agent present.

    Args:
        spec: Of the environment.
        obs: Observations [A, *obs_shape].
        **fields: Replace fields of the TimeStep.

    Returns:
        The TimeStep.
    """
    base: dict[str, Any] = dict(
        obs=obs,
        reward=jnp.zeros(spec.num_agents, jnp.float32),
        terminated=jnp.bool_(False),
        truncated=jnp.bool_(False),
        agent_mask=jnp.ones(spec.num_agents, bool),
        action_mask=None,
        state=None,
        info={},
    )
    return TimeStep(**(base | fields))


def like(new: Any, old: Any) -> Any:
    """Give a library's state after a step the types of the state before it. Some libraries return Python numbers, or
    wider types where JAX is set to 64 bits, which a scan would refuse."""

    def one(x: Any, y: Any) -> Array:
        dtype = y.dtype if hasattr(y, "dtype") else jnp.result_type(y)
        return x if getattr(x, "dtype", None) == dtype else jnp.asarray(x, dtype)

    return jax.tree.map(one, new, old)


def runs(env: Any) -> Any:
    """Return a library's environment, once its spec could be made and, where JAX is set to 64 bits, its step be traced.

    Raises:
        UserError: where the library fails with 64 bits, with its message in one line.
    """
    wide = jax.config.jax_enable_x64

    def play(key: jax.Array) -> Any:
        state, ts = env.reset(key)
        return env.step(key, state, sample_action(env.spec, key, ts))

    try:
        _ = env.spec
        if wide:
            jax.eval_shape(play, jax.random.key(0))
    except (TypeError, ValueError, AttributeError) as e:
        if not wide:
            raise
        found = " ".join(str(e).split())[:200]
        raise UserError(f"{env.name}: JAX_ENABLE_X64 found on, expected off, as the library fails: {found}") from e
    return env


def global_state(spec: Spec, ts: TimeStep) -> Array:
    """[..., state_dim] float32: the environment's global state, or all observations side by side."""
    if ts.state is not None:
        lead = ts.state.shape[: ts.state.ndim - len(spec.state_shape or ())]
        return ts.state.reshape(*lead, spec.state_dim).astype(jnp.float32)
    lead = ts.obs.shape[: ts.obs.ndim - 1 - len(spec.obs_shape)]
    return ts.obs.reshape(*lead, spec.state_dim).astype(jnp.float32)


def action_noise(spec: Spec, key: jax.Array, lead: tuple[int, ...] = ()) -> Array:
    """What `action_from` needs for actions of `lead`: numbers in [0, 1), [*lead, A] or [*lead, A, k]. For all steps of
    a rollout at once they cost a fraction of what they cost step by step."""
    return in_rows(
        partial(jax.random.uniform, dtype=jnp.float32), key, (*lead, spec.num_agents, *spec.action_space.shape)
    )


def action_from(spec: Spec, noise: Array, action_mask: Array | None = None) -> Array:
    """Uniform legal actions [..., A] or [..., A, k] from `action_noise`; action_mask [..., A, n] of a TimeStep."""
    space = spec.action_space
    if isinstance(space, Discrete):
        if action_mask is not None:
            # one number for an agent: noise for every action would be several times more expensive
            place = jnp.cumsum(action_mask, axis=-1, dtype=jnp.int32)
            skip = (noise * place[..., -1]).astype(jnp.int32)
            return jnp.sum(place <= skip[..., None], axis=-1, dtype=jnp.int32)
        return (noise * np.asarray(spec.action_sizes or space.n)).astype(jnp.int32)
    if isinstance(space, MultiDiscrete):
        return (noise * np.asarray(space.nvec)).astype(jnp.int32)
    low, high = np.clip(space.low, -1e3, None), np.clip(space.high, None, 1e3)
    return jnp.asarray(low + noise * (high - low), jnp.float32)


def uniform_log_prob(spec: Spec, lead: tuple[int, ...] = (), action_mask: Array | None = None) -> Array:
    """Log-probabilities [*lead, A] of what `action_from` makes of uniform noise: log-densities where actions are
    real."""
    space = spec.action_space
    if isinstance(space, Discrete):
        count = np.asarray(spec.action_sizes or space.n) if action_mask is None else action_mask.sum(-1)
        each = -jnp.log(jnp.asarray(count, jnp.float32))
    elif isinstance(space, MultiDiscrete):
        each = -jnp.log(jnp.asarray(space.nvec, jnp.float32)).sum()
    else:
        low, high = np.clip(space.low, -1e3, None), np.clip(space.high, None, 1e3)
        each = -jnp.log(jnp.broadcast_to(jnp.asarray(high - low, jnp.float32), space.shape)).sum()
    return jnp.broadcast_to(each, (*lead, spec.num_agents))


def sample_action(spec: Spec, key: jax.Array, ts: TimeStep) -> Array:
    """Uniform legal actions for ONE timestep: [A] or [A, k]."""
    return action_from(spec, action_noise(spec, key), ts.action_mask)


def action_limits(spec: Spec) -> np.ndarray | None:
    """[A, n] bool: which padded actions (Discrete) or dimensions (Box) are real; None when all are."""
    if not spec.action_sizes:
        return None
    n = spec.action_space.n if isinstance(spec.action_space, Discrete) else spec.action_space.shape[0]
    if all(size == n for size in spec.action_sizes):
        return None
    return np.arange(n)[None] < np.asarray(spec.action_sizes)[:, None]
