"""Deep Q-learning (Mnih et al., 2015) for one agent with discrete actions; double, dueling and n-step as options.

A training step is `rounds` of: play `train_every` steps of each environment epsilon-greedily, store them, take one
gradient step on a batch of the replay buffer, copy the target network every `target_period` environment steps. All of
it is one program, the buffer part of the state. Targets bootstrap from the true next observation where an episode was
cut by its time limit, never where it terminated.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxstack.agents.configs import PlayConfig
from jaxstack.agents.rounds import rounds
from jaxstack.core import losses, replay
from jaxstack.core.config import require, require_at_least, require_positive, require_unit
from jaxstack.core.errors import UserError
from jaxstack.core.learner import Key, Learner, Metrics, Policy, as_hypers
from jaxstack.core.metrics import Mean
from jaxstack.core.replay import Replay, Transition
from jaxstack.envs import rollout, vector
from jaxstack.envs.base import Discrete, Spec, action_from, action_noise
from jaxstack.fast.noise import in_rows
from jaxstack.nn.init import orthogonal
from jaxstack.nn.networks import ACTIVATIONS, Activation
from jaxstack.nn.observations import Inputs, inputs_of

Norm = Literal["none", "layer", "weight"]


class Hypers(NamedTuple):
    """Numeric hyperparameters: traced, so a sweep over them compiles once."""

    lr: float = 1e-3
    gamma: float = 0.99
    l2: float = 0.0
    """Times the sum of squares of ALL parameters (biases and the scales of normalisations too), added to the loss."""
    eps_start: float = 1.0
    """Probability of a uniform action at the beginning; it falls linearly ..."""
    eps_end: float = 0.05
    """... to this one, then stays."""
    eps_share: float = 0.5
    """Share of the run in which it falls."""
    adam_eps: float = 1e-8


@dataclass(frozen=True)
class Config(PlayConfig):
    """Deep Q-learning; the defaults solve CartPole."""

    env: str = "gymnax/CartPole-v1"
    """Environment id, see `jaxstack list envs`."""
    total_steps: int = 100_000
    """Environment steps over all parallel environments."""
    num_envs: int = 1
    train_every: int = 4
    """Steps of each environment between two gradient steps."""
    rounds: int = 50
    """Gradient steps per training step, which is the unit of chunks, evaluations and checkpoints."""
    buffer_size: int = 50_000
    """Transitions that the replay buffer holds."""
    learning_starts: int = 1_000
    """Transitions from which on gradient steps are taken."""
    batch_size: int = 64
    target_period: int = 500
    """Environment steps between two copies of the network into the target network."""
    double: bool = False
    """Targets take the online network's best action (van Hasselt et al., 2016)."""
    dueling: bool = False
    """A value and advantages with mean zero instead of action values (Wang et al., 2016)."""
    n_step: int = 1
    """Rewards in a target, fewer where the episode ends."""
    loss: Literal["mse", "huber"] = "mse"
    hidden: tuple[int, ...] = (128, 128)
    activation: Activation = "relu"
    norm: Norm = "none"
    """layer: LayerNorm behind each hidden layer's weights; weight: each unit's weights have a length of their own
    (Salimans & Kingma, 2016), output layer included."""
    hypers: Hypers = Hypers()

    def validate(self) -> None:
        super().validate()
        require_at_least(self, 1, "train_every", "rounds", "buffer_size", "batch_size")
        require_at_least(self, 1, "target_period", "n_step", "learning_starts")
        require_at_least(self, 0, "hypers.lr", "hypers.l2", "hypers.adam_eps")
        require_unit(self, "hypers.gamma", "hypers.eps_start", "hypers.eps_end")
        require_positive(self, "hypers.eps_share")
        require(self, "hidden", all(h >= 1 for h in self.hidden), "layer widths >= 1")
        length = self.buffer_size // self.num_envs
        need = max(self.n_step, self.train_every)
        where = f"num_envs={self.num_envs}, train_every={self.train_every} and n_step={self.n_step}"
        require(self, "buffer_size", length >= need, f"at least {need * self.num_envs}, for {where}")
        room = self.num_envs * length
        require(self, "learning_starts", self.learning_starts <= room, f"at most {room}, what the buffer holds")
        once = self.num_envs * self.train_every * self.rounds
        fits = self.total_steps >= once
        require(self, "total_steps", fits, f"at least one training step, num_envs*train_every*rounds={once}")

    @property
    def num_updates(self) -> int:
        return self.total_steps // (self.num_envs * self.train_every * self.rounds)


class State(NamedTuple):
    """Complete training state."""

    hypers: Hypers
    params: Any
    target: Any
    opt_state: optax.OptState
    vec: vector.VecState
    buffer: Any
    key: Key
    step: Array
    total: Array
    """Training steps of the run, for the exploration schedule."""


class Task(NamedTuple):
    """Static: the environment and everything derived from it."""

    cfg: Config
    vec: vector.VecEnv
    inputs: Inputs
    net: "QNetwork"
    buffer: Replay

    @property
    def spec(self) -> Spec:
        return self.vec.env.spec

    @property
    def per_round(self) -> int:
        """Environment steps of a round."""
        return self.cfg.num_envs * self.cfg.train_every


class WeightNormDense(nn.Module):
    """A dense layer w = g v / |v| with a norm for each unit (Salimans & Kingma, 2016); g begins at |v|, so that the
    layer begins as the one without normalisation."""

    features: int
    gain: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [B, D] -> [B, features]."""
        v = self.param("direction", orthogonal(self.gain), (x.shape[-1], self.features))
        g = self.param("length", lambda _: jnp.linalg.norm(v, axis=0))
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return x @ (g * v / jnp.linalg.norm(v, axis=0)) + bias


class QNetwork(nn.Module):
    """Action values of observations that are read as vectors."""

    hidden: tuple[int, ...]
    actions: int
    activation: Activation = "relu"
    norm: Norm = "none"
    dueling: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [B, ...] -> [B, actions]."""

        def dense(width: int, gain: float) -> nn.Module:
            if self.norm == "weight":
                return WeightNormDense(width, gain)
            return nn.Dense(width, kernel_init=orthogonal(gain))

        x = x.reshape(len(x), -1).astype(jnp.float32)
        for width in self.hidden:
            x = dense(width, 2**0.5)(x)
            if self.norm == "layer":
                x = nn.LayerNorm(epsilon=1e-5)(x)
            x = ACTIVATIONS[self.activation](x)
        out = dense(self.actions, 1.0)(x)
        if not self.dueling:
            return out
        return dense(1, 1.0)(x) + out - out.mean(-1, keepdims=True)


def make_task(cfg: Config) -> Task:
    """Raises `UserError` where config and environment do not fit."""
    env = cfg.make_env()
    spec = env.spec
    require(cfg, "env", spec.num_agents == 1, f"one agent, found {spec.num_agents}")
    if not isinstance(spec.action_space, Discrete):
        raise UserError(f"env={cfg.env!r}: expected Discrete actions, found {spec.action_space}")
    require(cfg, "env", not spec.has_action_mask, "an environment without action masks")
    inputs = inputs_of(spec, vector.start_shapes(env)[1].obs.dtype)
    net = QNetwork(cfg.hidden, spec.action_space.n, cfg.activation, cfg.norm, cfg.dueling)
    length = cfg.buffer_size // cfg.num_envs
    first = max(-(-cfg.learning_starts // cfg.num_envs), cfg.n_step)
    buffer = replay.trajectories(cfg.num_envs, length, cfg.batch_size, cfg.n_step, minimum=first)
    return Task(cfg, vector.vectorise(env, cfg.num_envs, cfg.auto_reset, cfg.pool_size), inputs, net, buffer)


def dqn(config: Config = Config()) -> Learner:
    """Raises `UserError` for an environment with several agents, continuous actions or action masks."""
    task = make_task(config)

    def init(key: Key, hypers: Hypers = config.hypers) -> State:
        k_net, k_env, key = jax.random.split(key, 3)
        hypers = as_hypers(hypers)
        vec = vector.init(task.vec, k_env)
        params = task.net.init(k_net, task.inputs.encode(vec.ts.obs[:, 0]))
        obs = vec.ts.obs[0, 0]
        no = jnp.bool_(False)
        buffer = task.buffer.init(Transition(obs, jnp.int32(0), jnp.float32(0), obs, no, no))
        total = jnp.int32(config.num_updates)
        return State(
            hypers,
            params,
            jax.tree.map(jnp.copy, params),
            optimiser(hypers).init(params),
            vec,
            buffer,
            key,
            jnp.int32(0),
            total,
        )

    def step(s: State) -> tuple[State, Metrics]:
        key = jax.random.fold_in(s.key, s.step)
        s, metrics = rounds(partial(one_round, task), s, key, config.rounds, s.step)
        s = s._replace(step=s.step + 1)
        return s, metrics | {"train/epsilon": epsilon(task, s)}

    return Learner(
        init=init,
        step=step,
        hypers=config.hypers,
        config=config,
        name="dqn",
        samples_per_step=task.per_round * config.rounds,
        evaluate=lambda state, key: evaluate(task, state, key),
        num_steps=config.num_updates,
        policy=policy(task),
        env=task.vec.env,
        unchecked=lambda s: (s.vec.env, s.vec.ts.info),  # what environments emit is checked instead, see rollout.checks
        with_length=lambda s, steps: s._replace(total=jnp.full_like(s.total, steps)),
        over_envs=lambda s: s.vec,
    )


def optimiser(hypers: Hypers) -> optax.GradientTransformation:
    """Adam."""
    return optax.chain(optax.scale_by_adam(eps=hypers.adam_eps), optax.scale_by_learning_rate(hypers.lr))


def epsilon(task: Task, s: State, number: Array | None = None) -> Array:
    """The probability of a uniform action in round `number` of the run; default: in the next one."""
    rounds = task.cfg.rounds
    number = s.step * rounds if number is None else number
    done = number.astype(jnp.float32) / (s.total.astype(jnp.float32) * rounds)
    share = jnp.clip(done / s.hypers.eps_share, 0.0, 1.0)
    return s.hypers.eps_start + share * (s.hypers.eps_end - s.hypers.eps_start)


def one_round(task: Task, s: State, key: Key, number: Array) -> tuple[State, Metrics]:
    """Play, store, take a gradient step where the buffer is ready, copy the target network where its time has come."""
    k_play, k_sample = jax.random.split(key)
    act, draw = actor(task, s.params, epsilon(task, s, number))
    played = rollout.collect(task.vec, act, k_play, s.vec, (), task.cfg.train_every, draw)
    steps = played.steps
    metrics: Metrics = rollout.statistics(steps) | rollout.checks(task.spec, played)
    metrics["rollout/reused_starts"] = played.reused.astype(jnp.float32)
    assert steps.final_obs is not None
    items = Transition(
        steps.ts.obs[:, :, 0],
        steps.action[:, :, 0],
        steps.reward[:, :, 0],
        steps.final_obs[:, :, 0],
        steps.terminated,
        steps.truncated,
    )
    buffer = task.buffer.add(s.buffer, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), items))
    batch = task.buffer.sample(buffer, k_sample).items
    (_, found), grads = jax.value_and_grad(loss, argnums=1, has_aux=True)(task, s.params, s.target, s.hypers, batch)
    updates, opt_state = optimiser(s.hypers).update(grads, s.opt_state)
    params = optax.apply_updates(s.params, updates)
    ready = task.buffer.ready(buffer)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(ready, new, old), (params, opt_state), (s.params, s.opt_state)
    )
    copies = lambda rounds: rounds * task.per_round // task.cfg.target_period
    target = jax.tree.map(lambda new, old: jnp.where(copies(number + 1) > copies(number), new, old), params, s.target)
    count = ready.astype(jnp.float32)
    metrics |= {name: Mean(jnp.where(ready, x, 0.0), count) for name, x in found.items()}
    return s._replace(params=params, target=target, opt_state=opt_state, vec=played.vec, buffer=buffer), metrics


def values(task: Task, params: Any, obs: Array) -> Float[Array, "B n"]:
    """Action values of observations [B, *obs_shape]."""
    return jnp.asarray(task.net.apply(params, task.inputs.encode(obs)))


def targets(task: Task, params: Any, target: Any, gamma: Array | float, batch: Transition) -> Float[Array, " B"]:
    """Compute n-step targets of stretches [B, n]: the rewards up to the stretch's first end of an episode, and behind
    them the target network's value of the true next observation, 0 where the episode terminated."""
    counts = replay.one_episode(batch.terminated | batch.truncated)
    discount = gamma ** jnp.arange(counts.shape[1], dtype=jnp.float32)
    reward = (batch.reward * discount * counts).sum(1)
    length = counts.sum(1, dtype=jnp.int32)
    last = lambda x: jnp.take_along_axis(x, (length - 1).reshape(-1, *[1] * (x.ndim - 1)), 1)[:, 0]
    after = last(batch.next_obs)
    q = values(task, target, after)
    best = values(task, params, after).argmax(-1) if task.cfg.double else q.argmax(-1)
    value = jnp.take_along_axis(q, best[:, None], -1)[:, 0]
    return reward + gamma**length * jnp.where(last(batch.terminated), 0.0, value)


def loss(task: Task, params: Any, target: Any, hypers: Hypers, batch: Transition) -> tuple[Array, dict[str, Array]]:
    """Mean squared (or Huber) error of Q(s, a) against its target, and the L2 term."""
    goal = jax.lax.stop_gradient(targets(task, params, target, hypers.gamma, batch))
    q = values(task, params, batch.obs[:, 0])
    taken = jnp.take_along_axis(q, batch.action[:, :1], -1)[:, 0]
    error = taken - goal
    each = losses.huber(error) if task.cfg.loss == "huber" else jnp.square(error)
    squares = sum(jnp.square(x).sum() for x in jax.tree.leaves(params))
    total = each.mean() + hypers.l2 * squares
    found = {"loss/total": total, "loss/td": each.mean(), "train/value": q.max(-1).mean()}
    return total, found


def actor(task: Task, params: Any, eps: Array | float) -> tuple[rollout.Act, rollout.Draw]:
    """How to act epsilon-greedily, and how to draw the random numbers of all steps."""
    uniform = lambda key, shape: in_rows(lambda k, s: jax.random.uniform(k, s, jnp.float32), key, shape)

    def draw(key: Key, steps: int) -> tuple[Array, Array]:
        k_coin, k_action = jax.random.split(key)
        shape = (steps, task.vec.num_envs)
        return uniform(k_coin, shape), action_noise(task.spec, k_action, shape)

    def act(noise: tuple[Array, Array], carry: Any, vs: vector.VecState) -> tuple[Any, Array, tuple]:
        coin, other = noise
        greedy = values(task, params, vs.ts.obs[:, 0]).argmax(-1).astype(jnp.int32)[:, None]
        return carry, jnp.where((coin < eps)[:, None], action_from(task.spec, other), greedy), ()

    return act, draw


def evaluate(task: Task, s: State, key: Key) -> Metrics:
    """Fresh greedy episodes with the current parameters."""
    cfg = task.cfg
    vec = vector.vectorise(task.vec.env, cfg.eval_episodes)

    def act(noise: Any, carry: Any, vs: vector.VecState) -> tuple[Any, Array, tuple]:
        return carry, values(task, s.params, vs.ts.obs[:, 0]).argmax(-1).astype(jnp.int32)[:, None], ()

    steps = task.spec.horizon or cfg.eval_steps
    return rollout.evaluate(vec, act, key, (), steps, lambda key, steps: ())


def policy(task: Task) -> Policy:
    """The greedy policy; with a key the epsilon-greedy one of the training step."""

    def act(p: Any, carry: Any, obs: Array, action_mask: Array | None, first: Array, key: Key | None):
        greedy = values(task, p["net"], obs[:, 0]).argmax(-1).astype(jnp.int32)[:, None]
        if key is None:
            return carry, greedy
        k_coin, k_action = jax.random.split(key)
        coin = jax.random.uniform(k_coin, (len(obs), 1), jnp.float32)
        other = action_from(task.spec, action_noise(task.spec, k_action, (len(obs),)))
        return carry, jnp.where(coin < p["eps"], other, greedy)

    def sample(p: Any, carry: Any, obs: Array, action_mask: Array | None, first: Array, key: Key):
        carry, action = act(p, carry, obs, action_mask, first, key)
        greedy = act(p, carry, obs, action_mask, first, None)[1]
        chance = p["eps"] / task.net.actions + (1.0 - p["eps"]) * (action == greedy)
        return carry, action, jnp.log(chance)

    params = lambda s: {"net": s.params, "eps": epsilon(task, s)}
    return Policy(params=params, init_carry=lambda p, b: (), act=act, sample=sample)


def stored_episodes(learner: Learner, state: State, newest: int | None = None) -> list[np.ndarray]:
    """Return the states of the whole episodes in the replay buffers, for measures of rationality.

    Args:
        learner: A DQN in an environment whose observations are state ids, with a horizon H.
        state: Its states [K, ...].
        newest: Look at so many of each seed's latest environment steps; default: all that the buffer holds.

    Returns:
        For each of K seeds the state ids [T, H], oldest first; behind an episode's end stands the number of states.

    Raises:
        UserError: For other observations, or a seed without a whole episode.
    """
    spec = learner.env.spec
    if not isinstance(spec.observation, Discrete) or spec.horizon is None:
        raise UserError(f"{learner.name}: observations of {spec.id} are {spec.observation}, expected ids and a horizon")
    index, full = np.asarray(state.buffer.current_index), np.asarray(state.buffer.is_full)
    stored = state.buffer.experience
    seen, ended = np.asarray(stored.obs), np.asarray(stored.terminated | stored.truncated)
    found = []
    for k, at in enumerate(index):
        episodes = []
        for obs, end in zip(seen[k], ended[k], strict=True):
            obs, end = (np.roll(x, -at) if full[k] else x[:at] for x in (obs, end))
            keep = len(obs) if newest is None else min(newest // len(seen[k]), len(obs))
            whole = keep == len(obs) and not full[k]  # from the run's first step on
            obs, end = obs[len(obs) - keep :], end[len(end) - keep :]
            stops = np.flatnonzero(end) + 1
            starts = np.concatenate([[0], stops]) if whole else stops
            for a, b in zip(starts, stops if whole else stops[1:]):
                row = np.full(spec.horizon, spec.observation.n, np.int32)
                row[: b - a] = obs[a:b]
                episodes.append(row)
        if not episodes:
            raise UserError(f"stored episodes: found none in the buffer of row {k}, expected at least one")
        found.append(np.stack(episodes))
    return found
