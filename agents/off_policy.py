"""What learners share that play with real actions and learn from a replay buffer: sac and td3.

A training step is `rounds` of: play one step of each environment, store it, take `updates` gradient steps, each on a
batch of its own from the replay buffer. Play begins with uniformly random actions. Targets bootstrap from the true next
observation where an episode was cut by its time limit, never where it terminated.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxstack.agents import offline
from jaxstack.agents.configs import PlayConfig
from jaxstack.agents.offline import Batch
from jaxstack.agents.rounds import rounds, updates
from jaxstack.core import replay
from jaxstack.core.config import require, require_at_least, require_positive, require_unit
from jaxstack.core.learner import Key, Learner, Metrics, Policy
from jaxstack.core.replay import Replay
from jaxstack.envs import rollout, vector


@dataclass(frozen=True)
class OffPolicyConfig(PlayConfig):
    """Options of play, buffer and networks."""

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
    actor_hidden: tuple[int, ...] = (64, 64)
    critic_hidden: tuple[int, ...] = (64, 64)
    layer_norm: bool = False
    """Normalise the critics' layers before each ReLU, without scale and shift."""
    eval_episodes: int = 10
    hypers: Any = ()

    def validate(self) -> None:
        super().validate()
        require_at_least(self, 1, "updates", "rounds", "buffer_size", "batch_size", "learning_starts")
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
    """{"actor", "critic", ...}"""
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
    """Static: the environment, the buffer, and what makes one algorithm of it."""

    env: offline.Task
    vec: vector.VecEnv
    buffer: Replay
    explore: Callable[[State, Array, Array], Array]
    """(state, observations [B, O], standard normal numbers [B, A]) -> actions [B, A] in [-1, 1]"""
    learn: Callable[[State, Batch, Array, Key], tuple[State, Metrics]]
    """(state, batch, number of the update from 0, key) -> state after one update, metrics"""


def make_task(env: offline.Task, explore: Callable, learn: Callable) -> Task:
    """The environments and the buffer of a config."""
    cfg = env.cfg
    buffer = replay.items(cfg.buffer_size, cfg.batch_size, cfg.learning_starts)
    return Task(env, vector.vectorise(env.env, cfg.num_envs, cfg.auto_reset, cfg.pool_size), buffer, explore, learn)


def make_learner(
    name: str,
    task: Task,
    begin: Callable[[Key, Any], offline.State],
    actor: Callable[[Any, Array], Any],
    policy: Policy,
) -> Learner:
    """A learner from the state of its networks (`begin`), its actor (as in `offline.make_learner`) and its policy."""
    env, config = task.env, task.env.cfg

    def init(key: Key, hypers: Any = config.hypers) -> State:
        k_env, key = jax.random.split(key)
        base = begin(key, hypers)
        obs, zero = jnp.zeros(env.obs_size, jnp.float32), jnp.float32(0)
        buffer = task.buffer.init(Batch(obs, jnp.zeros(env.action_size, jnp.float32), zero, obs, zero))
        given = {k: v for k, v in base._asdict().items() if k in State._fields}
        return State(**given, vec=vector.init(task.vec, k_env), buffer=buffer)

    def step(s: State) -> tuple[State, Metrics]:
        key = jax.random.fold_in(s.key, s.step)
        s, metrics = rounds(partial(one_round, task), s, key, config.rounds, s.step)
        return s._replace(step=s.step + 1), metrics

    return Learner(
        init=init,
        step=step,
        hypers=config.hypers,
        config=config,
        name=name,
        samples_per_step=config.num_envs * config.rounds,
        evaluate=offline.evaluation(env, actor),
        num_steps=config.num_updates,
        policy=policy,
        env=env.env,
        unchecked=lambda s: (s.vec.env, s.vec.ts.info),  # what environments emit is checked instead, see rollout.checks
        over_envs=lambda s: s.vec,
    )


def one_round(task: Task, s: State, key: Key, number: Array | int) -> tuple[State, Metrics]:
    """Play a step, store it, update where the buffer is ready; `number` of the round from 0."""
    k_play, k_learn = jax.random.split(key)
    played = play(task, s, k_play)
    steps = played.steps
    metrics: Metrics = rollout.statistics(steps) | rollout.checks(task.vec.env.spec, played)
    metrics["rollout/reused_starts"] = played.reused.astype(jnp.float32)
    buffer = task.buffer.add(s.buffer, transitions(steps))
    ready = task.buffer.ready(buffer)

    def update(s: State, key: Key, number: Array) -> tuple[State, Metrics]:
        k_sample, k_learn = jax.random.split(key)
        return task.learn(s, task.buffer.sample(buffer, k_sample).items, number, k_learn)

    # neither environments nor buffer nor key pass through the loop of updates
    learner = s._replace(vec=(), buffer=(), key=())
    new, found = updates(update, learner, k_learn, task.env.cfg.updates, number, ready)
    parts = {k: getattr(new, k) for k in ("params", "target", "opt_state")}
    return s._replace(**parts, vec=played.vec, buffer=buffer), metrics | found


def play(task: Task, s: State, key: Key) -> rollout.Rollout:
    """One step of each environment; extras are the actions in [-1, 1]."""
    cfg, size = task.env.cfg, task.env.action_size
    random = replay.held(s.buffer) < cfg.learning_starts

    def draw(key: Key, steps: int) -> tuple[Array, Array]:
        k_normal, k_uniform = jax.random.split(key)
        shape = (steps, cfg.num_envs, size)
        normal = jax.random.normal(k_normal, shape, jnp.float32)
        return normal, jax.random.uniform(k_uniform, shape, jnp.float32, -1.0, 1.0)

    def act(noise: tuple[Array, Array], carry: Any, vs: vector.VecState) -> tuple[Any, Array, Array]:
        normal, uniform = noise
        action = jnp.where(random, uniform, task.explore(s, flat(vs.ts.obs[:, 0]), normal))
        return carry, offline.in_bounds(task.env, action), action

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
