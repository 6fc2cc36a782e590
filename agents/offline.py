"""What learners from a data set share: options, batches, states, evaluation in the environment.

Observations are standardised by the data set's statistics and actions scaled to [-1, 1]; both are undone where the
policy acts. The environment is played for evaluation alone. float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from jaxstack.agents.configs import EnvConfig
from jaxstack.core import memo
from jaxstack.core.config import numbers, require, require_at_least, require_positive, require_unit
from jaxstack.core.errors import UserError
from jaxstack.core.learner import Key, Learner, Metrics, Policy, as_hypers
from jaxstack.data.files import load_dataset, main_file
from jaxstack.data.offline import OfflineData, OfflineDataset, check_fits, returns_to_go, state_statistics
from jaxstack.envs import rollout, vector
from jaxstack.envs.base import Box, Environment
from jaxstack.nn.observations import inputs_of


@dataclass(frozen=True)
class OfflineConfig(EnvConfig):
    """What every learner from a data set can set."""

    env: str = "gymnax/Pendulum-v1"
    """Environment in which the policy is evaluated: one agent with real actions."""
    dataset: str = ""
    """File of the data set, `.npz`, `.hdf5` or PTGOOD's `.json`, or a folder of Minari; `jaxstack info PATH` describes
    it."""
    num_updates: int = 100_000
    batch_size: int = 256
    actor_hidden: tuple[int, ...] = (256, 256)
    critic_hidden: tuple[int, ...] = (256, 256)
    normalise_obs: bool = True
    """Standardise observations by the data set's mean and deviation + 1e-3."""
    bootstrap_on_timeout: bool = True
    """Values continue behind a time limit; False treats it as a termination."""
    eval_episodes: int = 10

    def validate(self) -> None:
        super().validate()
        require_at_least(self, 1, "num_updates", "batch_size")
        for name in ("actor_hidden", "critic_hidden"):
            require(self, name, all(h >= 1 for h in getattr(self, name)), "layer widths >= 1")
        hypers = numbers(self)
        at_least = [n for n in hypers._fields if n not in ("gamma", "tau", *self.unbounded())]
        require_at_least(self, 0, *(f"hypers.{n}" for n in at_least))
        require_unit(self, *(f"hypers.{n}" for n in ("gamma", "tau") if n in hypers._fields))
        if "lr" in hypers._fields:
            require_positive(self, "hypers.lr")

    def unbounded(self) -> tuple[str, ...]:
        """Hyperparameters that may be negative."""
        return ()


class Batch(NamedTuple):
    """Transitions, leaves [B, ...]; of a data set [N, ...]."""

    obs: Array
    """[B, O], standardised"""
    action: Array
    """[B, A] in [-1, 1]"""
    reward: Array
    next_obs: Array
    last: Array
    """float32, 1 where nothing is bootstrapped"""
    next_action: Any = ()
    """[B, A] of the same episode's next row; this and what follows only in batches of a data set"""
    next_known: Any = ()
    """float32, 1 where there is one"""
    returns: Any = ()
    """Returns-to-go with the time limit's correction"""
    row: Any = ()
    """int32, number of the row in the learning view"""


class Shared(NamedTuple):
    """What all batches of a data set share."""

    mean: Array
    """[O]"""
    std: Array
    """[O]"""
    gamma: Array
    """Discount of `Batch.returns`"""


class State(NamedTuple):
    """Complete training state."""

    hypers: Any
    params: Any
    """{"actor", "critic", ...}; critics have a leading axis of members."""
    target: Any
    """Averages of those that have any."""
    opt_state: Any
    """By the same names."""
    mean: Array
    """[O] by which observations are standardised; the data set's, once a batch came."""
    std: Array
    key: Key
    step: Array
    aux: Any = ()
    """What a stage learns from besides, such as returns of its own [N]."""


class Task(NamedTuple):
    """Static: the environment and its sizes."""

    cfg: Any
    env: Environment
    obs_size: int
    action_size: int
    low: tuple[float, ...]
    high: tuple[float, ...]


def make_task(cfg: Any) -> Task:
    """The config's environment. Raises `UserError` for one with several agents, other actions or bounds missing."""
    env = cfg.make_env()
    spec = env.spec
    require(cfg, "env", spec.num_agents == 1, f"one agent, found {spec.num_agents}")
    space = spec.action_space
    if not isinstance(space, Box):
        raise UserError(f"env={cfg.env!r}: expected real actions, found {type(space).__name__}")
    inputs = inputs_of(spec, vector.start_shapes(env)[1].obs.dtype)
    require(cfg, "env", inputs.kind == "real", f"observations of real numbers, found {inputs.name}")
    low, high = (np.broadcast_to(np.asarray(b, np.float32), space.shape).reshape(-1) for b in (space.low, space.high))
    require(cfg, "env", bool(np.isfinite(low).all() and np.isfinite(high).all()), "actions with finite bounds")
    return Task(cfg, env, spec.obs_dim, low.size, tuple(low.tolist()), tuple(high.tolist()))


def read(path: str) -> OfflineDataset:
    """The data set of the option `dataset`, kept for the next learner. Raises `UserError`."""
    if not path:
        raise UserError("dataset='': expected the path of a data set, see `jaxstack collect --help`")
    file = main_file(path)
    stat = file.stat() if file.is_file() else None
    return _read(path, None if stat is None else (stat.st_mtime_ns, stat.st_size))


@lru_cache(2)
def _read(path: str, changed: Any) -> OfflineDataset:
    """`changed` tells files of one name apart."""
    return load_dataset(path)


class Rows(NamedTuple):
    """A data set as a learner reads it."""

    batch: Batch
    shared: Shared
    ends: tuple[np.ndarray, np.ndarray]
    """terminated and truncated [M] of all rows, in the order of play"""
    all_obs: np.ndarray
    """[M, O] of all rows, standardised"""
    all_rewards: np.ndarray
    """[M]"""
    kept: np.ndarray
    """[N] numbers of the rows in the learning view"""


def rows_of(
    task: Task, data: OfflineDataset, name: str, gamma: float, *, rolled: bool = False, correct: bool = True
) -> Rows:
    """Make transitions of a data set: standardised, scaled, with returns-to-go.

    Args:
        task: environment and options.
        data: the data set.
        name: what messages call it.
        gamma: discount of the returns-to-go.
        rolled: next observations as the released code makes them where none are stored: all rows, each followed by the
            next, standardised twice.
        correct: whether returns of cut episodes continue with their last reward; never with a discount of 1.

    Raises:
        UserError: where data set and environment do not fit.
    """
    cfg, shape = task.cfg, task.env.spec.action_space.shape
    low, high = np.asarray(task.low, np.float32), np.asarray(task.high, np.float32)
    check_fits(data, name, task.env.spec.id, task.env.spec.obs_shape, low.reshape(shape), high.reshape(shape))
    keep = np.flatnonzero(data.has_next | data.terminated)
    if rolled:
        keep = np.arange(data.size)
    if not len(keep):
        raise UserError(f"{name}: found no row whose next observation is known, expected at least one")
    view = data._replace(**{k: v[keep] for k, v in data.arrays().items()})
    mean, std = np.zeros(task.obs_size, np.float32), np.ones(task.obs_size, np.float32)
    flat = lambda x: x.reshape(len(x), -1).astype(np.float32)
    if cfg.normalise_obs:
        mean, std = (x.reshape(-1) for x in state_statistics(view))
    standard = lambda x: (flat(x) - mean) / std
    # the centre first: bounds that are symmetric then scale without rounding
    scaled = (flat(data.action) - (high + low) / 2) / ((high - low) / 2)
    following, known = data._replace(action=scaled).next_action()
    stops = view.terminated if cfg.bootstrap_on_timeout else view.terminated | view.truncated
    flags = data.terminated, data.truncated
    returns = memo.jit(lambda r, a, b: returns_to_go(r, a, b, gamma, correct and gamma < 1))(data.reward, *flags)
    next_obs = standard(view.next_obs)
    if rolled:
        next_obs = (np.roll(standard(view.obs), -1, axis=0) - mean) / std
    batch = Batch(
        obs=standard(view.obs),
        action=np.clip(scaled[keep], -1.0, 1.0),
        reward=view.reward,
        next_obs=next_obs,
        last=stops.astype(np.float32),
        next_action=np.clip(following[keep], -1.0, 1.0),
        next_known=known[keep].astype(np.float32),
        returns=np.asarray(returns)[keep],
        row=np.arange(len(keep), dtype=np.int32),
    )
    shared = Shared(mean, std, np.float32(gamma))  # pyright: ignore[reportArgumentType]
    return Rows(batch, shared, flags, standard(data.obs), data.reward, keep)  # pyright: ignore[reportArgumentType]


def source(task: Task, *, seed: int = 0, rolled: bool = False, correct: bool = True) -> Callable[[Any], OfflineData]:
    """What `Learner.source` is: batches of the config's data set; `seed` chooses another stream of draws, the others
    are those of `rows_of`."""

    def make(cfg: Any) -> OfflineData:
        data = read(cfg.dataset)
        # only data without next observations are rolled
        how = dict(rolled=rolled and not data.info.stored_next, correct=correct)
        rows = rows_of(task, data, cfg.dataset, cfg.hypers.gamma, **how)
        return OfflineData(rows.batch, rows.shared, cfg.batch_size, seed=seed)

    return make


def fresh(task: Task, hypers: Any, params: Any, target: Any, opt_state: Any, key: Key) -> State:
    """The state before the first batch."""
    zero, one = jnp.zeros(task.obs_size, jnp.float32), jnp.ones(task.obs_size, jnp.float32)
    # copies: buffers of a state are donated one by one
    target = jax.tree.map(jnp.copy, target)
    return State(as_hypers(hypers), params, target, opt_state, zero, one, key, jnp.int32(0))


def make_learner(
    name: str,
    task: Task,
    init: Callable[[Key, Any], State],
    update: Callable[[State, Batch, Array, Key], tuple[State, Metrics]],
    actor: Callable[[Any, Array], Any],
    *,
    num_steps: int | None = None,
    data: Callable[[Any], OfflineData] | None = None,
    uses_returns: bool = False,
) -> Learner:
    """A learner from its initialiser, its update and its actor.

    Args:
        name: of the learner.
        task: environment and options.
        init: (key, hypers) -> state.
        update: (state, batch, number of the step from 0, key) -> (state with the same step, metrics).
        actor: (params, standardised observations [B, O]) -> actions [B, A] in [-1, 1], or a distribution with `mode`
            and `sample_from`.
        num_steps: default: the config's updates.
        data: default: the config's data set.
        uses_returns: whether the update reads `Batch.returns`, whose discount must then be the state's.
    """
    cfg = task.cfg

    def step(s: State, drawn: tuple[Batch, Shared, Array]) -> tuple[State, Metrics]:
        batch, shared, number = drawn
        s = s._replace(mean=shared.mean, std=shared.std)
        s, metrics = update(s, batch, number, jax.random.fold_in(s.key, s.step))
        if uses_returns:
            metrics["check/gamma, which is that of the returns-to-go, the config's"] = s.hypers.gamma == shared.gamma
        return s._replace(step=s.step + 1), metrics

    return Learner(
        init=init,
        step=step,
        hypers=cfg.hypers,
        config=cfg,
        name=name,
        samples_per_step=cfg.batch_size,
        evaluate=evaluation(task, actor),
        num_steps=cfg.num_updates if num_steps is None else num_steps,
        policy=policy_of(task, actor),
        env=task.env,
        source=source(task) if data is None else data,
    )


def policy_of(task: Task, actor: Callable[[Any, Array], Any], density: bool = False) -> Policy:
    """How an actor plays, see `make_learner`: its mode, with a key a sample; `density` says that `sample_from` gives
    the log-density of what is played."""

    def act(p: Any, carry: Any, obs: Array, action_mask: Any, first: Array, key: Key | None) -> tuple[Any, Array]:
        return carry, _environment_action(task, actor, p, obs, key)

    def sample(p: Any, carry: Any, obs: Array, action_mask: Any, first: Array, key: Key) -> tuple[Any, Array, Array]:
        dist, noise = _distribution(actor, p, obs), _noise(task, key, len(obs))
        action, log_prob = dist.sample_from(noise)
        half = (np.asarray(task.high, np.float32) - np.asarray(task.low, np.float32)) / 2
        return carry, in_bounds(task, action), (log_prob - np.log(half).sum())[:, None]

    return Policy(acting, lambda p, b: (), act, sample if density else None)


def evaluation(task: Task, actor: Callable[[Any, Array], Any]) -> Callable[[Any, Key], Metrics]:
    """(state, key) -> means over fresh episodes of an actor's mode."""

    def evaluate(s: Any, key: Key) -> Metrics:
        vec = vector.vectorise(task.env, task.cfg.eval_episodes)
        p = acting(s)
        play = lambda noise, carry, vs: (carry, _environment_action(task, actor, p, vs.ts.obs, None), ())
        steps = task.env.spec.horizon or task.cfg.eval_steps
        return rollout.evaluate(vec, play, key, (), steps, lambda key, steps: ())

    return evaluate


def acting(s: Any) -> dict[str, Any]:
    """What acting needs of a state."""
    return {"actor": s.params["actor"], "mean": s.mean, "std": s.std}


def _environment_action(task: Task, actor: Callable, p: Any, obs: Array, key: Key | None) -> Array:
    """Observations [B, 1, *obs_shape] -> actions [B, 1, *action_shape] in the environment's bounds."""
    out = _distribution(actor, p, obs)
    if hasattr(out, "mode"):
        out = out.mode() if key is None else out.sample_from(_noise(task, key, len(obs)))[0]
    return in_bounds(task, out)


def _distribution(actor: Callable, p: Any, obs: Array) -> Any:
    return actor(p["actor"], (obs.reshape(len(obs), -1).astype(jnp.float32) - p["mean"]) / p["std"])


def _noise(task: Task, key: Key, count: int) -> Array:
    return jax.random.normal(key, (count, task.action_size), jnp.float32)


def in_bounds(task: Task, action: Array) -> Array:
    """Actions [B, A] in [-1, 1] -> [B, 1, *action_shape] in the environment's bounds."""
    low, high = np.asarray(task.low, np.float32), np.asarray(task.high, np.float32)
    action = (high + low) / 2 + action * ((high - low) / 2)
    return action.reshape(len(action), 1, *task.env.spec.action_space.shape)


def descend(
    params: dict[str, Any], opt_state: dict[str, Any], name: str, grads: Any, lr: Array
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One step of Adam on `params[name]`: (params, opt_state) with that part changed."""
    updates, state = optax.adam(lr).update(grads, opt_state[name], params[name])
    return params | {name: optax.apply_updates(params[name], updates)}, opt_state | {name: state}


def adam_states(params: dict[str, Any]) -> dict[str, Any]:
    """Adam's state of each part of the parameters."""
    return {name: optax.adam(0.0).init(part) for name, part in params.items()}
