"""The PPO update that ippo, mappo, ppo and hypermarl share; the networks are a `TeamNet`.

Proximal policy optimisation (Schulman et al., 2017) for teams (de Witt et al., 2020; Yu et al., 2022): T rollout steps
of N environments and A agents, generalised advantages with bootstrapping at truncation, E epochs of M minibatches.
A minibatch holds the same transitions for every agent, so samples stay grouped by agent. float32.

Agents that share parameters are a group (`TeamNet.groups`). Each group is a learner of its own: the loss is a sum of
means over each group's own samples, and advantages, values, observations and rewards are standardised, gradients
clipped and metrics averaged a group. An agent's return ends when it leaves `agent_mask` (dies), without bootstrap.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxstack.agents.ppo_config import Hypers, PPOConfig
from jaxstack.core import groups, losses, returns, running
from jaxstack.core.config import require
from jaxstack.core.groups import Groups
from jaxstack.core.learner import Key, Learner, Metrics, Policy, as_hypers
from jaxstack.envs import rollout, vector
from jaxstack.envs.base import Environment, global_state
from jaxstack.nn import networks
from jaxstack.nn.distributions import Actions, Normal, TeamDistribution, actions_of
from jaxstack.nn.minibatches import Samples, minibatch_sgd, sequences, transitions
from jaxstack.nn.observations import Inputs, inputs_of, joint_state, reading
from jaxstack.nn.team import TeamNet, TeamSpec


class Norms(NamedTuple):
    """Running statistics; () where a normalisation is off."""

    value: Any
    obs: Any
    reward: Any


class State(NamedTuple):
    """Complete training state."""

    hypers: Hypers
    params: Any
    aux_state: Any
    opt_state: optax.OptState
    vec: vector.VecState
    carry: tuple[Any, Any]
    """Recurrent states of actor and critic at `vec` [N, A, H]."""
    norms: Norms
    key: Key
    step: Array
    total: Array
    """Updates over which the learning rate falls."""


class Batch(NamedTuple):
    """A rollout made ready for gradient steps, leaves [T, B, A, ...] (central state [T, B, G])."""

    obs: Array
    critic_x: Array
    first: Array
    action: Array
    action_mask: Array | None
    agent_mask: Array
    """bool: agents that could act."""
    logp: Array
    value: Array
    advantage: Array
    target: Array
    start: Any
    """Recurrent states [B, A, H] of actor and critic before the first step."""


class Task(NamedTuple):
    """Static: the environment and everything derived from it."""

    cfg: PPOConfig
    vec: vector.VecEnv
    shape: TeamSpec
    team: TeamNet
    one_objective: bool = False
    """All agents maximise the team's mean return: one scale for all rewards, whatever the groups."""

    @property
    def groups(self) -> Groups:
        return self.team.groups

    @property
    def reward_groups(self) -> Groups:
        return () if self.one_objective else self.groups

    @property
    def advantage_groups(self) -> Groups:
        return tuple(range(self.shape.num_agents)) if self.cfg.advantage_norm == "agent" else self.groups

    @property
    def env(self) -> Environment:
        return self.vec.env

    @property
    def actions(self) -> Actions:
        return self.shape.actions

    @property
    def inputs(self) -> Inputs:
        """How an agent's observation is read."""
        return inputs_of(self.env.spec)


def make_env(cfg: PPOConfig) -> Environment:
    """The config's environment; raises `UserError` for unknown ids or options."""
    return cfg.make_env()


def team_shape(env: Environment, cfg: PPOConfig, central: bool) -> TeamSpec:
    """Sizes of the team's task; raises `UserError` where config and environment do not fit."""
    spec = env.spec
    inputs = inputs_of(spec, vector.start_shapes(env)[1].obs.dtype)
    seen = inputs.shape
    flat = "off" if cfg.cnn else "mlp"
    image = len(seen) == 3 or cfg.reader.partition("=")[0] != "cnn"
    require(cfg, "cnn" if cfg.cnn else "network", image, f"{flat}, as observations of {spec.id} are {spec.observation}")
    if cfg.reader:
        networks.check(cfg.reader, seen, cfg.activation)
    real = inputs.kind != "categories"
    require(cfg, "normalise_obs", real or not cfg.normalise_obs, f"off, as observations of {spec.id} are {inputs.name}")
    state = (spec.num_agents * math.prod(seen),) if spec.state_shape is None else (spec.state_dim,)
    return TeamSpec(spec.num_agents, seen, state if central else seen, central, actions_of(spec))


def make_task(cfg: PPOConfig, env: Environment, shape: TeamSpec, team: TeamNet) -> Task:
    if not cfg.normalise_obs:  # else they are encoded before their statistics are taken, see `observe`
        team = reading(team, inputs_of(env.spec), shape.central)
    return Task(cfg, vector.vectorise(env, cfg.num_envs, cfg.auto_reset, cfg.pool_size), shape, team)


def observe(task: Task, norm: Any, obs: Array) -> Array:
    """Standardise observations where the config asks for it; otherwise the team's networks read them as they are."""
    if not task.cfg.normalise_obs:
        return obs
    return running.apply(running.of_agents(norm, task.groups), task.inputs.encode(obs))


def make_learner(
    name: str, task: Task, update: Callable | None = None, init_opt: Callable[[Task, Hypers, Any], Any] | None = None
) -> Learner:
    """The learner of a team network; `update(task, state, batch, key) -> (state, metrics)` replaces PPO's epochs and
    `init_opt(task, hypers, params)` its optimiser state."""
    cfg = task.cfg
    update = update or ppo_epochs

    def init(key: Key, hypers: Hypers = cfg.hypers) -> State:
        k_net, k_env, key = jax.random.split(key, 3)
        hypers = as_hypers(hypers)
        params = task.team.init(k_net)
        spec = task.env.spec
        obs_stats = running.init_groups(task.inputs.shape, task.groups) if cfg.normalise_obs else ()
        reward = running.init_reward(cfg.num_envs, spec.num_agents, task.reward_groups) if cfg.normalise_reward else ()
        norms = Norms(running.init_groups((), task.groups) if cfg.normalise_value else (), obs_stats, reward)
        vec = vector.init(task.vec, k_env)
        opt_state = (
            optimiser(cfg, hypers, task.groups).init(params) if init_opt is None else init_opt(task, hypers, params)
        )
        carry = task.team.carry(cfg.num_envs)
        return State(
            hypers,
            params,
            task.team.init_aux_state(),
            opt_state,
            vec,
            carry,
            norms,
            key,
            jnp.int32(0),
            jnp.int32(cfg.num_updates),
        )

    def step(s: State) -> tuple[State, Metrics]:
        k_roll, k_update = jax.random.split(jax.random.fold_in(s.key, s.step))
        s, batch, metrics = gather_batch(task, s, k_roll)
        metrics["train/lr"] = learning_rate(cfg, s.hypers, s.step, s.total)
        s, losses_ = update(task, s, batch, k_update)
        return s._replace(step=s.step + 1), metrics | losses_

    return Learner(
        init=init,
        step=step,
        hypers=cfg.hypers,
        config=cfg,
        name=name,
        samples_per_step=cfg.num_envs * cfg.num_steps,
        evaluate=lambda state, key: evaluate(task, state, key),
        num_steps=cfg.num_updates,
        policy=policy(task),
        env=task.env,
        unchecked=lambda s: (s.vec.env, s.vec.ts.info),  # what environments emit is checked instead, see rollout.checks
        with_length=lambda s, steps: s._replace(total=jnp.full_like(s.total, steps)),
        over_envs=lambda s: (
            s.vec._replace(parameters=()),
            s.carry,
            s.norms.reward.ret if cfg.normalise_reward else (),
        ),
    )


def learning_rate(cfg: PPOConfig, hypers: Hypers, done: Array, total: Array | float) -> Array:
    """The rate after `done` of `total` steps: falls linearly to zero, then stays, or is constant."""
    if not cfg.anneal_lr:
        return jnp.asarray(hypers.lr)
    # a run that is continued beyond its end must not climb the loss
    return hypers.lr * jnp.maximum(1.0 - done.astype(jnp.float32) / total, 0.0)


def optimiser(
    cfg: PPOConfig, hypers: Hypers, of: Groups = (), total: Array | None = None
) -> optax.GradientTransformation:
    """Clipping by the gradient's norm, then Adam with a learning rate that may fall to zero over `total` updates
    (default: the config's). With agents in several groups `of`, each group's gradient is clipped by its own norm;
    Adam's moments are elementwise, so each group's are its own."""
    total = jnp.int32(cfg.num_updates) if total is None else total
    steps = total.astype(jnp.float32) * (cfg.num_epochs * cfg.num_minibatches)
    clip = groups.clip_by_norms if groups.number(of) > 1 else optax.clip_by_global_norm
    return optax.chain(
        clip(hypers.max_grad_norm),
        optax.scale_by_adam(eps=hypers.adam_eps),
        optax.scale_by_learning_rate(lambda count: learning_rate(cfg, hypers, count, steps)),
    )


class Values(NamedTuple):
    """The critic's view of a rollout."""

    x: Array
    """What it was given [T, N, ...]."""
    carry: Any
    """Its recurrent states after the last step [N, A, H]."""
    now: Array
    """Values [T, N, A], in units of the return."""
    after: Array
    """Values of the true next observations [T, N, A], in the same units."""


def gather_batch(task: Task, s: State, key: Key) -> tuple[State, Batch, Metrics]:
    """One rollout with the current parameters, and its values, advantages and targets."""
    weights, _ = task.team.materialise(s.params, s.aux_state, None)
    played, metrics = collect(task, s, weights, key)
    valued = bootstrap(task, s, weights, played)
    norms, value, advantage_, target = advantage(task, s, played, valued)
    steps = played.steps
    batch = Batch(
        obs=observe(task, s.norms.obs, steps.ts.obs),
        critic_x=valued.x,
        first=steps.first,
        action=steps.action,
        action_mask=steps.ts.action_mask,
        agent_mask=steps.ts.agent_mask,
        logp=steps.extras,
        value=value,
        advantage=advantage_,
        target=target,
        start=s.carry,
    )
    if task.cfg.normalise_obs:
        seen = task.inputs.encode(steps.ts.obs)
        norms = norms._replace(obs=running.update_groups(s.norms.obs, seen, batch.agent_mask, task.groups))
    return s._replace(vec=played.vec, carry=(played.carry, valued.carry), norms=norms), batch, metrics


def collect(task: Task, s: State, weights: Any, key: Key) -> tuple[rollout.Rollout, Metrics]:
    """Play T steps with the current policy: (the rollout, its metrics)."""
    act, draw = _actor(task, weights, s.norms.obs)
    played = rollout.collect(task.vec, act, key, s.vec, s.carry[0], task.cfg.num_steps, draw, finals="cuts")
    stats = rollout.statistics(played.steps, task.env.spec, task.cfg.agent_returns) | rollout.checks(
        task.env.spec, played
    )
    stats |= {
        "rollout/reused_starts": played.reused.astype(jnp.float32),
        "rollout/lost_cuts": played.lost_cuts.astype(jnp.float32),
    }
    return played, stats


def bootstrap(task: Task, s: State, weights: Any, played: rollout.Rollout) -> Values:
    """Value every observation of a rollout and the one after it, also where an episode was cut by its time limit."""
    steps, vec = played.steps, played.vec

    def critic_x(obs: Array, state: Array | None) -> Array:
        obs = observe(task, s.norms.obs, obs)
        if not task.shape.central:
            return obs
        if state is not None:
            return global_state(task.env.spec, steps.ts._replace(state=state))
        return joint_state(task.inputs, obs if task.cfg.normalise_obs else task.inputs.encode(obs))

    x = critic_x(steps.ts.obs, steps.ts.state)
    last = critic_x(vec.ts.obs[None], None if vec.ts.state is None else vec.ts.state[None])
    carries, value = values(task, weights, s.carry[1], x, steps.first)
    carry = jax.tree.map(lambda h: h[-1], carries)
    _, after = task.team.critic(weights, carry, last, vec.first[None])
    next_value = jnp.concatenate([value[1:], after])
    if played.cuts is not None:
        next_value = value_of_cut(task, weights, played.cuts, carries, next_value, critic_x)
    own = running.of_agents(s.norms.value, task.groups)
    return Values(x, carry, running.unapply(own, value), running.unapply(own, next_value))


def advantage(task: Task, s: State, played: rollout.Rollout, valued: Values) -> tuple[Norms, Array, Array, Array]:
    """Generalised advantages of a rollout: (running statistics of rewards and returns with this rollout in them, and
    values, advantages and targets [T, N, A], values and targets in the critic's units)."""
    cfg, hypers, steps, norms, reward, value = (
        task.cfg,
        s.hypers,
        played.steps,
        s.norms,
        played.steps.reward,
        valued.now,
    )
    alive = steps.ts.agent_mask
    # an agent that is gone after a step has no value there, whether the team continues or not
    terminated = steps.terminated[..., None] | ~steps.final_mask
    done = steps.done[..., None] | ~steps.final_mask
    if cfg.normalise_reward:
        scaled = running.scale_reward(norms.reward, reward, done, hypers.gamma, alive, task.reward_groups)
        norms, reward = norms._replace(reward=scaled[0]), scaled[1]
    out, target = returns.gae(reward, value, valued.after, terminated, done, hypers.gamma, hypers.lam)
    if cfg.normalise_value:
        norms = norms._replace(value=running.update_groups(norms.value, target, alive, task.groups))
        own = running.of_agents(norms.value, task.groups)
        value, target = (running.apply(own, x, clip=jnp.inf) for x in (value, target))
    return norms, value, out, target


def values(task: Task, weights: Any, carry: Any, x: Array, first: Array) -> tuple[Any, Array]:
    """The critic on a rollout x [T, N, A, ...]: (its recurrent states after every step, values [T, N, A]).

    Time goes in blocks of a minibatch's size: over all samples at once the hidden layers would be the peak of an
    update's memory.
    """
    blocks = math.gcd(len(x), task.cfg.num_minibatches)

    def block(carry: Any, part: tuple[Array, Array]) -> tuple[Any, tuple[Any, Array]]:
        carries, value = task.team.critic(weights, carry, *part, return_all_states=True)
        return jax.tree.map(lambda h: h[-1], carries), (carries, value)

    parts = (y.reshape(blocks, -1, *y.shape[1:]) for y in (x, first))
    out = jax.lax.scan(block, carry, tuple(parts))[1]
    return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), out)


def value_of_cut(
    task: Task, weights: Any, cuts: rollout.TruncatedFinals, carries: Any, next_value: Array, critic_x: Callable
) -> Array:
    """`next_value` [T, N, A] with the values of the TRUE next inputs where an episode was cut by its time limit (behind
    it stands the next episode's first value)."""
    length, count = next_value.shape[:2]
    index = (cuts.step * count + jnp.arange(count, dtype=jnp.int32)).reshape(-1)  # beyond the end where nothing was cut
    before = jax.tree.map(lambda x: x.reshape(length * count, *x.shape[2:]).at[index].get(mode="clip"), carries)
    flat = lambda x: None if x is None else x.reshape(1, -1, *x.shape[2:])
    x, never = critic_x(flat(cuts.obs), flat(cuts.state)), jnp.zeros((1, index.size), bool)
    _, value = task.team.critic(weights, before, x, never)
    out = next_value.reshape(length * count, -1).at[index].set(value[0], mode="drop")
    return out.reshape(next_value.shape)


def ppo_epochs(task: Task, s: State, batch: Batch, key: Key) -> tuple[State, Metrics]:
    """E epochs over M shuffled minibatches."""
    cfg = task.cfg
    tx = optimiser(cfg, s.hypers, task.groups, s.total)
    # before the epochs: their minibatches are drawn from copies of these arrays
    explained = losses.explained_variance(batch.value, batch.target, batch.agent_mask, task.groups)
    params, opt_state, aux_state, metrics = minibatch_sgd(
        lambda params, aux_state, mb: loss(task, params, aux_state, s.hypers, mb),
        tx,
        s.params,
        s.opt_state,
        samples(task, batch),
        key,
        epochs=cfg.num_epochs,
        minibatches=cfg.num_minibatches,
        aux_state=s.aux_state,
        num_groups=groups.number(task.groups),
    )
    return s._replace(params=params, aux_state=aux_state, opt_state=opt_state), metrics | {
        "train/explained_variance": explained
    }


def samples(task: Task, batch: Batch) -> Samples:
    """What minibatches are drawn from: transitions [1, B/M, ...], or for recurrent networks whole sequences
    [T, N/M, ...] with their first recurrent states."""
    agents = task.shape.num_agents
    if not task.cfg.gru:
        return transitions(batch, agents)
    whole = sequences(batch._replace(start=()), batch.start, agents)

    def take(index: Array) -> Batch:
        mb, start = whole.take(index)
        return mb._replace(start=start)

    return whole._replace(take=take)


def loss(task: Task, params: Any, aux_state: Any, hypers: Hypers, mb: Batch) -> tuple[Array, tuple[Any, Metrics]]:
    """Clipped surrogate + value loss - entropy bonus, averaged over the samples of agents that could act: over each
    group's own, and summed over groups, so that a group's gradient is that of a learner of its own. Metrics are means
    over groups."""
    cfg, team = task.cfg, task.team
    weights, aux_state = team.materialise(params, aux_state, mb.obs)
    dist, value = distribution_and_value(task, weights, mb)
    advantage = mb.advantage
    if cfg.normalise_advantage:
        advantage = losses.standardise(advantage, mb.agent_mask, groups=task.advantage_groups)
    logp = dist.log_prob(mb.action)
    log_ratio = logp - mb.logp
    ratio = jnp.exp(log_ratio)
    if cfg.clip_value:
        critic = losses.clipped_value(value, mb.value, mb.target, hypers.clip)
    else:
        critic = 0.5 * jnp.square(value - mb.target)
    terms = {
        "loss/actor": losses.ppo_clip(logp, mb.logp, advantage, hypers.clip),
        "loss/critic": critic,
        "train/entropy": dist.entropy(),
        "train/kl": ratio - 1.0 - log_ratio,
        "train/clip_fraction": (jnp.abs(ratio - 1.0) > hypers.clip).astype(jnp.float32),
    }
    means = losses.masked_means(terms, mb.agent_mask, task.groups)
    each = means["loss/actor"] + hypers.vf_coef * means["loss/critic"] - hypers.ent_coef * means["train/entropy"]
    penalty = team.penalty(params, aux_state)
    metrics = {"loss/total": each.mean() + penalty} | jax.tree.map(jnp.mean, means)
    return each.sum() + penalty, (aux_state, metrics)


def distribution(task: Task, weights: Any, mb: Batch, raw: Array | None = None) -> TeamDistribution:
    """The team's action distributions [T, B, A] on a batch; `raw` where the actor's outputs are known already."""
    if raw is None:
        _, raw = task.team.actor(weights, mb.start[0], mb.obs, mb.first)
    return task.actions.distribution(raw, task.team.log_std(weights), mb.action_mask)


def distribution_and_value(task: Task, weights: Any, mb: Batch) -> tuple[TeamDistribution, Array]:
    """Return action distributions and values [T, B, A]; a common torso runs once for both."""
    if task.team.actor_critic is not None:
        raw, value = task.team.actor_critic(weights, mb.start[0], mb.obs, mb.first)
        return distribution(task, weights, mb, raw), value
    return distribution(task, weights, mb), task.team.critic(weights, mb.start[1], mb.critic_x, mb.first)[1]


def evaluate(task: Task, s: State, key: Key) -> Metrics:
    """Fresh episodes with the current parameters, greedy unless the config says otherwise."""
    cfg = task.cfg
    weights, _ = task.team.materialise(s.params, s.aux_state, None)
    vec = vector.vectorise(task.env, cfg.eval_episodes)
    act, draw = _actor(task._replace(vec=vec), weights, s.norms.obs, cfg.eval_greedy)
    steps = task.env.spec.horizon or cfg.eval_steps
    return rollout.evaluate(vec, act, key, task.team.carry(cfg.eval_episodes)[0], steps, draw, cfg.agent_returns)


def policy(task: Task) -> Policy:
    """Acting alone: generated weights are stored, so that no hypernetwork runs at execution."""

    def params(s: State) -> Any:
        weights, _ = task.team.materialise(s.params, s.aux_state, None)
        return {"weights": weights, "obs_norm": s.norms.obs}

    def distribution_of(p: Any, carry: Any, obs: Array, action_mask: Array | None, first: Array):
        obs = observe(task, p["obs_norm"], obs)
        carry, raw = task.team.actor(p["weights"], carry, obs[None], first[None])
        return carry, task.actions.distribution(raw[0], task.team.log_std(p["weights"]), action_mask)

    def act(p: Any, carry: Any, obs: Array, action_mask: Array | None, first: Array, key: Key | None):
        carry, dist = distribution_of(p, carry, obs, action_mask, first)
        return carry, dist.mode() if key is None else dist.sample(key)

    def sample(p: Any, carry: Any, obs: Array, action_mask: Array | None, first: Array, key: Key):
        carry, dist = distribution_of(p, carry, obs, action_mask, first)
        action, space = dist.sample(key), task.env.spec.action_space
        if not isinstance(dist, Normal):
            return carry, action, dist.log_prob(action)
        low, high = (jnp.broadcast_to(jnp.asarray(b, jnp.float32), space.shape) for b in (space.low, space.high))
        action = jnp.clip(action, low, high)
        return carry, action, dist.log_prob_within(action, low, high)

    return Policy(params=params, init_carry=lambda p, b: task.team.carry(b)[0], act=act, sample=sample)


def _actor(task: Task, weights: Any, obs_norm: Any, greedy: bool = False) -> tuple[rollout.Act, rollout.Draw]:
    """How to act, and how to draw the random numbers of all steps [T, N, A, ...]."""

    def draw(key: Key, steps: int) -> Array | tuple:
        return () if greedy else task.actions.noise(key, (steps, task.vec.num_envs, task.shape.num_agents))

    def act(noise: Any, carry: Any, vs: vector.VecState) -> tuple[Any, Array, Array]:
        obs = observe(task, obs_norm, vs.ts.obs)
        carry, raw = task.team.actor(weights, carry, obs[None], vs.first[None])
        dist = task.actions.distribution(raw[0], task.team.log_std(weights), vs.ts.action_mask)
        action = dist.mode() if greedy else dist.sample_from(noise)
        return carry, action, dist.log_prob(action)

    return act, draw
