"""MATE: a team learns, beside its policies, embeddings of the task it is in, and reads them (Schäfer et al., 2022).

The base is MAA2C: an actor and a critic per agent, n-step returns, a centralised critic of the joint observation and
the agent's embedding with a slowly moving target. Encoders read what agents observed, did and earned; one decoder
predicts the team's next transition from an embedding, see task_embedding.py. The policy's loss does not reach the
encoders. A run that starts from another (`--start-from`) adapts to its tasks with actors and critics alone: encoders,
decoder and gate stay as they are.

Decoder, gate and critics read joint observations, in training only; acting is decentralised except with `mode=cen`.
float32.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxstack.agents import team_ppo
from jaxstack.agents.mate_team import (
    Carry,
    Config,
    Hypers,
    Task,
    actor,
    distribution,
    flat,
    forgotten,
    make_task,
    policy,
    read_action,
    start_carry,
)
from jaxstack.agents.task_embedding import Batch, Coefs, mate_loss
from jaxstack.core import losses, memo, returns
from jaxstack.core.errors import UserError
from jaxstack.core.learner import Key, Learner, Metrics, as_hypers
from jaxstack.envs import rollout, vector
from jaxstack.envs.base import Environment, global_state
from jaxstack.measures import crossplay
from jaxstack.nn import team

__all__ = ["Config", "Hypers", "mate", "record"]


class State(NamedTuple):
    """Complete training state."""

    hypers: Hypers
    params: Any
    """`team` (actors and critics) and, with embeddings, `mate`."""
    target: Any
    """The critics' target."""
    opt_state: Any
    vec: vector.VecState
    carry: Carry
    key: Key
    step: Array
    total: Array
    """Updates over which learning rates fall."""


def mate(config: Config = Config()) -> Learner:
    """Raises `UserError` where config and environment do not fit."""
    return make_learner(make_task(config))


def make_learner(task: Task) -> Learner:
    """The learner; with a frozen task it starts from the states of another run, see `Learner.adapted`."""
    cfg = task.cfg

    def fresh(key: Key, hypers: Hypers = cfg.hypers) -> State:
        k_team, k_mate, k_env, key = jax.random.split(key, 4)
        hypers = as_hypers(hypers)
        draw = lambda k: team.init_modules(k, task.modules, task.shape)
        params = {"team": jax.vmap(draw)(jax.random.split(k_team, task.count))}
        if task.embedder is not None:
            params["mate"] = task.embedder.init(k_mate)
        opt_state = {name: tx.init(params[name]) for name, tx in optimisers(task, hypers).items()}
        return State(
            hypers,
            params,
            critic_of(params["team"]),
            opt_state,
            vector.init(task.vec, k_env),
            start_carry(task, cfg.num_envs),
            key,
            jnp.int32(0),
            jnp.int32(cfg.num_updates),
        )

    def continued(key: Key, hypers: Hypers, given: State) -> State:
        """What `given` learned, in environments of this run."""
        opt_state = {} if cfg.adapt_optimiser == "reset" else {"opt_state": given.opt_state}
        return fresh(key, hypers)._replace(params=given.params, target=given.target, **opt_state)

    def step(s: State) -> tuple[State, Metrics]:
        return update(task, s)

    return Learner(
        init=continued if task.frozen else fresh,
        step=step,
        hypers=cfg.hypers,
        config=cfg,
        name="mate",
        samples_per_step=cfg.num_envs * cfg.num_steps,
        evaluate=lambda state, key: evaluate(task, state, key),
        num_steps=cfg.num_updates,
        policy=policy(task),
        env=task.env,
        unchecked=lambda s: (s.vec.env, s.vec.ts.info),
        with_length=lambda s, steps: s._replace(total=jnp.full_like(s.total, steps)),
        over_envs=lambda s: (s.vec, s.carry),
        adapted=None if task.frozen else lambda: make_learner(task._replace(frozen=True)),
    )


def optimisers(task: Task, hypers: Hypers) -> dict[str, optax.GradientTransformation]:
    """Adam of the team and of what makes embeddings, without their learning rates; the second clips."""
    adam = optax.scale_by_adam(eps=hypers.adam_eps)
    if task.embedder is None:
        return {"team": adam}
    return {"team": adam, "mate": optax.chain(optax.clip_by_global_norm(hypers.mate_max_grad_norm), adam)}


def critic_of(weights: Any) -> Any:
    """The critics' part of the team's weights."""
    return {name: x for name, x in weights.items() if name.startswith("critic")}


class Played(NamedTuple):
    """A rollout made ready for one gradient step, leaves [T, N, ...]."""

    obs: Array
    """[T, N, A, O]"""
    state: Array
    """[T, N, G] what critics see beside the embedding."""
    last: Array
    """[N, G] likewise after the last step."""
    cuts: tuple[Array, Array] | None
    """Steps [K, N] that were cut, T where none was, and the states [K, N, G] behind them."""
    x: Array
    """Transitions [T + 1, N, A, D], the last one before the rollout first; without embeddings of width 0."""
    forget: Array
    """[T + 1, N] where encoders begin anew before they read one."""
    first: Array
    last_first: Array
    """[N] whether the observation after the last step begins an episode."""
    next_obs: Array
    """[T, N, A, O]; that of another episode where one ended."""
    action: Array
    action_mask: Array | None
    agent_mask: Array
    reward: Array
    terminated: Array
    """[T, N, A], agents that are gone among them."""
    done: Array
    start: Any
    """Recurrent states of the actors before the first step."""
    encoder: Any
    """Encoders' states before the first transition of `x`."""


def update(task: Task, s: State) -> tuple[State, Metrics]:
    """One rollout and one gradient step of all networks."""
    cfg = task.cfg
    k_roll, k_mate = jax.random.split(jax.random.fold_in(s.key, s.step))
    act, draw = actor(task, s.params, training=True)
    played = rollout.collect(task.vec, act, k_roll, s.vec, s.carry, cfg.num_steps, draw, finals="cuts")
    metrics = rollout.statistics(played.steps, task.env.spec, task.cfg.agent_returns) | rollout.checks(
        task.env.spec, played
    )
    metrics |= {
        "rollout/reused_starts": played.reused.astype(jnp.float32),
        "rollout/lost_cuts": played.lost_cuts.astype(jnp.float32),
    }
    batch = prepare(task, s, played)
    trained = {k: v for k, v in s.params.items() if not (k == "mate" and task.frozen)}
    fixed = {k: v for k, v in s.params.items() if k not in trained}
    objective = lambda params: loss(task, params | fixed, s.target, s.hypers, batch, k_mate)
    grads, losses_ = jax.grad(objective, has_aux=True)(trained)
    rate = team_ppo.learning_rate(cfg, s.hypers, s.step, s.total)  # pyright: ignore[reportArgumentType]
    own = team_ppo.learning_rate(cfg, s.hypers._replace(lr=s.hypers.mate_lr), s.step, s.total)  # pyright: ignore
    rates = {"team": rate, "mate": own}
    params, opt_state = dict(s.params), dict(s.opt_state)
    for name, tx in optimisers(task, s.hypers).items():
        if name in grads:
            step, opt_state[name] = tx.update(grads[name], s.opt_state[name])
            params[name] = jax.tree.map(lambda p, u, r=rates[name]: p - r * u, s.params[name], step)
            metrics[f"train/{name}_grad_norm"] = optax.global_norm(grads[name])
    tau = s.hypers.tau
    target = jax.tree.map(lambda old, new: old + tau * (new - old), s.target, critic_of(params["team"]))
    s = s._replace(
        params=params, target=target, opt_state=opt_state, vec=played.vec, carry=played.carry, step=s.step + 1
    )
    return s, metrics | losses_ | {"train/lr": rate}


def prepare(task: Task, s: State, played: rollout.Rollout) -> Played:
    """Turn a rollout into what the loss reads."""
    cfg, steps, after = task.cfg, played.steps, played.vec
    obs = flat(task, jnp.concatenate([steps.ts.obs, after.ts.obs[None]]))

    def states(raw: Array, state: Array | None) -> Array:
        if state is not None:
            return global_state(task.env.spec, after.ts._replace(state=state))
        return raw.reshape(*raw.shape[:-2], -1)

    both = None if steps.ts.state is None else jnp.concatenate([steps.ts.state, after.ts.state[None]])  # pyright: ignore
    state = states(obs, both)
    cuts = None
    if played.cuts is not None:
        cuts = (played.cuts.step, states(flat(task, played.cuts.obs), played.cuts.state))
    gone = ~steps.final_mask
    if cfg.reference_compat:
        steps = steps._replace(terminated=steps.done)
    x = jnp.zeros((cfg.num_steps + 1, *obs.shape[1:-1], 0), jnp.float32)
    forget = jnp.zeros((cfg.num_steps + 1, cfg.num_envs), bool)
    if task.embedder is not None:
        reward = jnp.concatenate([s.vec.ts.reward[None], steps.reward]).astype(jnp.float32)
        now = jnp.concatenate([obs[:-1], read_action(task, steps.action)], -1)
        before = s.carry.seen
        if cfg.reference_compat:
            before = jnp.concatenate([obs[0], before[..., task.embedder.obs :]], -1)
        x = jnp.concatenate([jnp.concatenate([before[None], now]), reward[..., None]], -1)
        lost = forgotten(cfg, jnp.arange(cfg.num_steps + 1), True)
        forget = jnp.concatenate([jnp.zeros_like(steps.first[:1]), steps.first]) | lost[:, None]
    return Played(
        obs=obs[:-1],
        state=state[:-1],
        last=state[-1],
        cuts=cuts,
        x=x,
        forget=forget,
        first=steps.first,
        last_first=after.first,
        next_obs=obs[1:],
        action=steps.action,
        action_mask=steps.ts.action_mask,
        agent_mask=steps.ts.agent_mask,
        reward=steps.reward,
        terminated=steps.terminated[..., None] | gone,
        done=steps.done[..., None] | gone,
        start=s.carry.actor,
        encoder=s.carry.encoder,
    )


def embeddings(task: Task, params: Any, batch: Played) -> tuple[Array, Array]:
    """Embeddings [T, N, E, W] that the policies read in each step, 0 where an episode begins, and those [T, N, E, W]
    after each transition."""
    e = task.embedder
    if e is None:
        none = jnp.zeros((*batch.first.shape, task.count, 0), jnp.float32)
        return none, none
    _, every = e.encode(params["mate"], batch.encoder, batch.x, batch.forget)
    before = jnp.where(batch.first[..., None, None], 0.0, every[:-1])
    return before, every[1:]


def loss(task: Task, params: Any, target: Any, hypers: Hypers, batch: Played, key: Key) -> tuple[Array, Metrics]:
    """The sum of the policies' loss and that of the embeddings."""
    before, after = embeddings(task, params, batch)
    detached = task.frozen or task.cfg.detach
    read = jax.lax.stop_gradient((before, after)) if detached else (before, after)
    share = lambda x: x if task.embedder is None else task.embedder.for_agents(x)
    total, metrics = maa2c_loss(task, params["team"], target, hypers, batch, share(read[0]), share(read[1]))
    if task.embedder is None or task.frozen:
        return total, {"loss/total": total} | metrics
    joint = lambda x: x.reshape(*x.shape[:2], -1)
    known = after if task.cfg.leaks else before
    data = Batch(
        embedding=known,
        obs=joint(batch.obs),
        action=joint(batch.x[1:, ..., task.embedder.obs : -1]),
        next_obs=joint(batch.next_obs),
        reward=batch.reward,
        mask=~batch.done.any(-1),
    )
    coefs = Coefs(hypers.obs_coef, hypers.reward_coef, hypers.kl_coef)
    own, found = mate_loss(task.embedder, params["mate"], data, coefs, key, task.cfg.reference_compat)
    return total + own, {"loss/total": total + own} | metrics | found


def maa2c_loss(
    task: Task, weights: Any, target: Any, hypers: Hypers, batch: Played, before: Array, after: Array
) -> tuple[Array, Metrics]:
    """Policy gradient with n-step advantages, value loss and entropy: means over each agent's own samples, summed over
    agents. `before` and `after` [T, N, A, W] are embeddings before and after each transition."""
    critic, groups = task.net["critic"], tuple(range(task.count))
    value_of = lambda w, x, e: critic(w, (), see(x, e), jnp.zeros(x.shape[:2], bool))[1]
    value = value_of(weights, batch.state, before)
    target_value = lambda x, e: value_of(jax.lax.stop_gradient(target), x, e)
    goal = jax.lax.stop_gradient(bootstrapped(task, hypers, batch, after, target_value))
    x = jnp.concatenate([batch.obs, before], -1)
    _, raw = task.net["actor"](weights, batch.start, x, batch.first)
    dist = distribution(task, weights, raw, batch.action_mask)
    advantage = goal - value
    terms = {
        "loss/actor": -jax.lax.stop_gradient(advantage) * dist.log_prob(batch.action),
        "loss/critic": jnp.square(advantage),
        "train/entropy": dist.entropy(),
        "train/value": value,
    }
    means = losses.masked_means(terms, batch.agent_mask, groups)
    each = means["loss/actor"] + hypers.vf_coef * means["loss/critic"] - hypers.ent_coef * means["train/entropy"]
    explained = losses.explained_variance(value, goal, batch.agent_mask, groups)
    return each.sum(), jax.tree.map(jnp.mean, means) | {"train/explained_variance": explained}


def see(state: Array, embedding: Array) -> Array:
    """Critics' inputs [..., A, G + W] from states [..., G] and embeddings [..., A, W]."""
    wide = jnp.broadcast_to(state[..., None, :], (*embedding.shape[:-1], state.shape[-1]))
    return jnp.concatenate([wide, embedding], -1)


def bootstrapped(task: Task, hypers: Hypers, batch: Played, after: Array, target_value: Any) -> Array:
    """Returns [T, N, A] to the end of the rollout, of the episode or of its time limit, with the target critic's value
    of the true observation there."""
    cfg = task.cfg
    length, envs = batch.first.shape
    last = jnp.where(batch.last_first[:, None, None], 0.0, after[-1])
    end = target_value(batch.last[None], last[None])[0]
    reward = batch.reward
    if cfg.standardise_reward:
        centred = reward - reward.mean((0, 1))
        reward = centred / (reward.std((0, 1)) + 1e-5)
    if cfg.reference_compat:
        return late_mask_returns(reward, ~batch.first[..., None], end, hypers.gamma)
    following = jnp.zeros_like(reward).at[-1].set(end)
    if batch.cuts is not None:
        step, state = batch.cuts
        row = jnp.minimum(step, length - 1)
        behind = after[row, jnp.arange(envs)]
        value = target_value(state, behind)
        following = following.at[step, jnp.arange(envs)].set(value, mode="drop")
    # with lam = 1 the values between are not used
    return returns.lambda_returns(reward, following, batch.terminated, batch.done, hypers.gamma, 1.0)


def late_mask_returns(reward: Array, mask: Array, end: Array, gamma: Any) -> Array:
    """Returns as the paper's released code computes them: R_t = r_t + gamma m_t R_{t+1}, where m_t says that step t did
    not begin an episode. So returns flow over an episode's end, and stop after its first step.

    Args:
        reward: [T, N, A].
        mask: m [T, N, 1] bool.
        end: Value after the last step [N, A].
        gamma: Discount.
    """

    def body(after: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        out = now[0] + gamma * now[1] * after
        return out, out

    return jax.lax.scan(body, end, (reward, mask.astype(reward.dtype)), reverse=True)[1]


def evaluate(task: Task, s: State, key: Key) -> Metrics:
    """Fresh episodes with the current parameters, greedy unless the config says otherwise."""
    cfg = task.cfg
    vec = vector.vectorise(task.env, cfg.eval_episodes)
    act, draw = actor(task._replace(vec=vec), s.params, cfg.eval_greedy)
    steps = task.env.spec.horizon or cfg.eval_steps
    return rollout.evaluate(vec, act, key, start_carry(task, cfg.eval_episodes), steps, draw, cfg.agent_returns)


class Recorded(NamedTuple):
    """Play of K trained teams, an episode in each of N environments: leaves [K, N, ...]."""

    embedding: Array
    """[K, N, T, A, W] that each agent acted on in each step."""
    task: Array
    """[K, N] number of the episode's task."""
    alive: Array
    """[K, N, T] whether the episode still ran."""
    returns: Array
    """[K, N, A]"""


def record(
    learner: Learner, states: Any, key: Key, env: Environment | None = None, episodes: int = 256, greedy: bool = False
) -> Recorded:
    """Play and keep the embeddings, for `measures.task_embeddings`.

    Args:
        learner: A MATE learner with embeddings.
        states: Of K trained teams, leaves [K, ...].
        key: Of tasks, starts and actions; the same for all teams.
        env: What they play, with named tasks; default: the learner's own.
        episodes: N.
        greedy: The likeliest actions instead of samples.

    Returns:
        What happened.

    Raises:
        UserError: For a learner without embeddings, or an environment whose tasks have no names.
    """
    if not getattr(learner.config, "embeds", False):
        raise UserError(f"{learner.name}: found mode={learner.config.mode!r}, expected ind, cen or mix")
    env = learner.env if env is None else env
    _ = env.num_tasks
    policy = crossplay.policy_of(learner)
    steps, vec = crossplay.longest(learner, env), vector.vectorise(env, episodes)

    def one(params: Any) -> Recorded:
        act = crossplay.act_with(policy, params, greedy)
        k_act, k_start, k_env = vector.rollout_keys(vec, key, steps, starts=episodes)
        vs = vector.start(vec, k_start)

        def body(c: tuple, keys: tuple[Key, Key]) -> tuple[tuple, tuple]:
            vs, carry, alive, total = c
            carry, action, _ = act(keys[0], carry, vs)
            env_state, ts = jax.vmap(env.step)(keys[1], vs.env, action)
            total = total + jnp.where(alive[:, None], ts.reward, 0.0)
            vs = vs._replace(env=env_state, ts=ts, first=jnp.zeros_like(vs.first))
            return (vs, carry, alive & ~(ts.terminated | ts.truncated), total), (carry.embedding, alive)

        start = (vs, policy.init_carry(params, episodes), jnp.ones(episodes, bool), jnp.zeros_like(vs.ts.reward))
        last, (embedding, alive) = jax.lax.scan(body, start, (jax.random.split(k_act, steps), k_env))
        return Recorded(jnp.moveaxis(embedding, 0, 1), env.task_of(vs.env), alive.T, last[3])

    return memo.jit(lambda states: jax.vmap(one)(jax.vmap(policy.params)(states)))(states)
