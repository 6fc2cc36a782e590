"""Soft actor-critic (Haarnoja et al., 2018) for one agent with real actions.

A training step is `rounds` of: play one step of each environment, store it, take `updates` gradient steps, each on a
batch of its own from the replay buffer. Play begins with uniformly random actions. Targets bootstrap from the true next
observation where an episode was cut by its time limit, never where it terminated.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxstack.agents import offline, soft
from jaxstack.agents.configs import PlayConfig
from jaxstack.agents.offline import Batch
from jaxstack.core import replay
from jaxstack.core.config import require, require_at_least, require_positive, require_unit
from jaxstack.core.guard import CHECK
from jaxstack.core.learner import Key, Learner, Metrics
from jaxstack.core.metrics import Mean
from jaxstack.core.replay import Replay
from jaxstack.envs import rollout, vector
from jaxstack.nn.ensembles import Critics, Net

LOG_STD = (-20.0, 2.0)
"""Bounds of the actor's log standard deviation."""


class Hypers(NamedTuple):
    """Numeric hyperparameters: traced, so a sweep over them compiles once."""

    lr: float = 1e-3
    gamma: float = 0.99
    tau: float = 0.005
    """Share of the new weights in an average."""


@dataclass(frozen=True)
class Config(PlayConfig):
    """Soft actor-critic; the defaults solve Pendulum."""

    env: str = "gymnax/Pendulum-v1"
    """Environment id, see `jaxstack list envs`: one agent with real actions in finite bounds."""
    total_steps: int = 20_000
    """Environment steps over all parallel environments."""
    num_envs: int = 1
    updates: int = 1
    """Gradient steps after a step of all environments."""
    rounds: int = 100
    """Steps of each environment per training step, which is the unit of chunks, evaluations and checkpoints."""
    buffer_size: int = 100_000
    """Transitions that the replay buffer holds."""
    learning_starts: int = 1_000
    """Transitions until which actions are uniformly random and nothing is learned."""
    batch_size: int = 256
    num_critics: int = 2
    actor_hidden: tuple[int, ...] = (64, 64)
    critic_hidden: tuple[int, ...] = (64, 64)
    layer_norm: bool = False
    """Normalise the critics' layers before each ReLU, without scale and shift."""
    eval_episodes: int = 10
    hypers: Hypers = Hypers()

    def validate(self) -> None:
        super().validate()
        require_at_least(self, 1, "updates", "rounds", "buffer_size", "batch_size", "learning_starts", "num_critics")
        require_unit(self, "hypers.gamma", "hypers.tau")
        require_positive(self, "hypers.lr")
        for name in ("actor_hidden", "critic_hidden"):
            require(self, name, all(h >= 1 for h in getattr(self, name)), "layer widths >= 1")
        room = self.buffer_size
        require(self, "buffer_size", room >= self.num_envs, f"at least num_envs={self.num_envs}")
        require(self, "batch_size", self.batch_size <= room, f"at most buffer_size={room}")
        require(self, "learning_starts", self.learning_starts <= room, f"at most buffer_size={room}")
        once = self.num_envs * self.rounds
        require(self, "total_steps", self.total_steps >= once, f"at least a training step, num_envs*rounds={once}")

    @property
    def num_updates(self) -> int:
        """Training steps."""
        return self.total_steps // (self.num_envs * self.rounds)


class State(NamedTuple):
    """Complete training state."""

    hypers: Any
    params: Any
    """{"actor", "critic", "log_alpha"}"""
    target: Any
    opt_state: Any
    mean: Array
    """[O] zeros, and `std` ones: observations are read as they are."""
    std: Array
    vec: vector.VecState
    buffer: Any
    key: Key
    step: Array


class Task(NamedTuple):
    """Static: the environment and everything derived from it."""

    nets: soft.Nets
    vec: vector.VecEnv
    buffer: Replay


def make_task(cfg: Config) -> Task:
    """Raises `UserError` where config and environment do not fit."""
    task = offline.make_task(cfg)
    critic = Net(cfg.critic_hidden, 1, "before" if cfg.layer_norm else "none")
    actor = Net(cfg.actor_hidden, 2 * task.action_size)
    nets = soft.Nets(task, actor, Critics(critic, cfg.num_critics), LOG_STD)
    buffer = replay.items(cfg.buffer_size, cfg.batch_size, cfg.learning_starts)
    return Task(nets, vector.vectorise(task.env, cfg.num_envs, cfg.auto_reset, cfg.pool_size), buffer)


def sac(config: Config = Config()) -> Learner:
    """Raises `UserError` for an environment with several agents or other than real actions in finite bounds."""
    task = make_task(config)
    env = task.nets.task

    def init(key: Key, hypers: Any = config.hypers) -> State:
        k_env, key = jax.random.split(key)
        base = soft.init(task.nets, key, hypers)
        obs, zero = jnp.zeros(env.obs_size, jnp.float32), jnp.float32(0)
        buffer = task.buffer.init(Batch(obs, jnp.zeros(env.action_size, jnp.float32), zero, obs, zero))
        given = {k: v for k, v in base._asdict().items() if k in State._fields}
        return State(**given, vec=vector.init(task.vec, k_env), buffer=buffer)

    def step(s: State) -> tuple[State, Metrics]:
        keys = jax.random.split(jax.random.fold_in(s.key, s.step), config.rounds)
        s, metrics = jax.lax.scan(lambda s, key: one_round(task, s, key), s, keys)
        together = {
            name: jnp.all(x) if name.startswith(CHECK) else jax.tree.map(lambda v: v.sum(0), x)
            for name, x in metrics.items()
        }
        return s._replace(step=s.step + 1), together

    return Learner(
        init=init,
        step=step,
        hypers=config.hypers,
        config=config,
        name="sac",
        samples_per_step=config.num_envs * config.rounds,
        evaluate=offline.evaluation(env, task.nets.actor),
        num_steps=config.num_updates,
        policy=offline.policy_of(env, task.nets.actor),
        env=env.env,
        unchecked=lambda s: (s.vec.env, s.vec.ts.info),  # what environments emit is checked instead, see rollout.checks
        over_envs=lambda s: s.vec,
    )


def one_round(task: Task, s: State, key: Key) -> tuple[State, Metrics]:
    """Play a step, store it, update where the buffer is ready."""
    k_play, k_learn = jax.random.split(key)
    played = play(task, s, k_play)
    steps = played.steps
    metrics: Metrics = rollout.statistics(steps) | rollout.checks(task.vec.env.spec, played)
    metrics["rollout/reused_starts"] = played.reused.astype(jnp.float32)
    buffer = task.buffer.add(s.buffer, transitions(steps))
    ready = task.buffer.ready(buffer)
    cfg = task.nets.task.cfg

    def update(s: State, key: Key) -> tuple[State, Metrics]:
        k_sample, k_noise = jax.random.split(key)
        batch = task.buffer.sample(buffer, k_sample).items
        noise = soft.draw(task.nets, k_noise, cfg.batch_size)
        return learn(task.nets, s, batch, noise)

    keys = jax.random.split(k_learn, cfg.updates)
    # neither environments nor buffer nor key pass through the loop of updates
    run = lambda s: jax.lax.scan(update, s, keys)
    learner = s._replace(vec=(), buffer=(), key=())
    blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(run, learner)[1])
    new, found = jax.lax.cond(ready, run, lambda s: (s, blank), learner)
    parts = {k: getattr(new, k) for k in ("params", "target", "opt_state")}
    count = ready.astype(jnp.float32) * cfg.updates
    metrics |= {name: Mean(x.sum(), count) for name, x in found.items()}
    return s._replace(**parts, vec=played.vec, buffer=buffer), metrics


def learn(nets: soft.Nets, s: Any, batch: Batch, noise: soft.Noise) -> tuple[Any, Metrics]:
    """One update of temperature, actor, critics and averages, from temporal differences alone."""
    regression = lambda critic, goal: soft.regression(nets, critic, batch, goal)
    s, metrics = soft.update(nets, s, batch, noise, critic_loss=regression)
    return s, metrics | {"loss/total": metrics["loss/critic"] + metrics["loss/actor"]}


def play(task: Task, s: State, key: Key) -> rollout.Rollout:
    """One step of each environment; extras are the actions in [-1, 1]."""
    cfg, size = task.nets.task.cfg, task.nets.task.action_size
    random = replay.held(s.buffer) < cfg.learning_starts

    def draw(key: Key, steps: int) -> tuple[Array, Array]:
        k_normal, k_uniform = jax.random.split(key)
        shape = (steps, cfg.num_envs, size)
        normal = jax.random.normal(k_normal, shape, jnp.float32)
        return normal, jax.random.uniform(k_uniform, shape, jnp.float32, -1.0, 1.0)

    def act(noise: tuple[Array, Array], carry: Any, vs: vector.VecState) -> tuple[Any, Array, Array]:
        normal, uniform = noise
        own = task.nets.actor(s.params["actor"], flat(vs.ts.obs[:, 0])).sample_from(normal)[0]
        action = jnp.where(random, uniform, own)
        return carry, offline.in_bounds(task.nets.task, action), action

    return rollout.collect(task.vec, act, key, s.vec, (), 1, draw)


def transitions(steps: rollout.Step) -> Batch:
    """Steps [T, N, ...] of a rollout whose extras are actions in [-1, 1] as T N items."""
    assert steps.final_obs is not None
    items = Batch(
        jax.vmap(flat)(steps.ts.obs[:, :, 0]),
        steps.extras,
        steps.reward[:, :, 0],
        jax.vmap(flat)(steps.final_obs[:, :, 0]),
        steps.terminated.astype(jnp.float32),
    )
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), items)


def flat(obs: Array) -> Array:
    """[B, *obs_shape] -> [B, O] float32."""
    return obs.reshape(len(obs), -1).astype(jnp.float32)
