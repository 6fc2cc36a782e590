"""PTGOOD, planning to go out of distribution (McInroe et al., 2024): which real steps to take after offline learning.

Stages: an ensemble of dynamics models is fitted to the data; soft actor-critic learns from data and imagined play; an
encoder and a marginal of its codes say what is in distribution for the policy; then the environment is played, each
action the first of a planned tree whose nodes have the highest rates, and everything keeps learning. Rewards and
policy stay as they are. Other `strategy`s choose actions as the baselines of the paper do.

Observations are standardised by the data set and actions lie in [-1, 1] everywhere but in the environment.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxstack.agents import offline, planning
from jaxstack.agents.offline import Batch
from jaxstack.agents.ptgood_parts import (
    POLICY_EVERY,
    UNKNOWN,
    Config,
    State,
    Task,
    descend,
    disagreement,
    draw_imagined,
    draw_rows,
    ended,
    fresh_codes,
    imagined,
    init,
    learn,
    make_task,
    policy,
    rates,
    real_rows,
    refill,
    start_states,
    table_of,
)
from jaxstack.agents.rounds import rounds, updates
from jaxstack.core import replay
from jaxstack.core.learner import Key, Learner, Metrics
from jaxstack.core.metrics import Mean
from jaxstack.core.stages import Stage, Staged
from jaxstack.data.offline import OfflineData, returns_to_go
from jaxstack.envs import rollout, vector
from jaxstack.nn import bottleneck, dynamics
from jaxstack.nn.bottleneck import ADAM
from jaxstack.nn.ensembles import forward

NAME = "ptgood"
REPEATS, SHORT = 3, 2
"""Imagined play that the encoder learns from: repeats of all starts, and steps."""
ENCODE, BEGIN = 2**30, 2**30 + 1
"""Streams of a stage's key."""


# --- learning before play


def fit_step(task: Task, s: State, data: Batch, number: Array) -> tuple[State, Metrics]:
    """Some fit calls; none once the model has stopped to improve."""
    cfg = task.cfg
    limit = jnp.minimum(s.progress.calls + calls_per_step(cfg), cfg.fit_calls)
    how: dict[str, Any] = dict(patience=cfg.fit_patience, max_calls=limit, batch=cfg.fit_batch)
    model, p = dynamics.fit(task.dyn, s.model, table_of(data), jnp.int32(len(data.reward)), s.key, s.progress, **how)
    found: Metrics = {"loss/model": p.best, "train/fit_calls": p.calls.astype(jnp.float32)}
    return s._replace(model=model, progress=p), found


def calls_per_step(cfg: Config) -> int:
    """Fit calls of one training step."""
    return -(-cfg.fit_calls // 20)


def pretrain_step(task: Task, s: State, data: Batch, number: Array) -> tuple[State, Metrics]:
    """One update, half of the data set and half imagined; cal_ql learns from the data set alone."""
    cfg = task.cfg
    if cfg.strategy == "cal_ql":
        k_real, k_learn = jax.random.split(jax.random.fold_in(s.key, s.step))
        batch = draw_rows(data, 2 * cfg.batch_size, k_real)
        return learn(task, s, batch, k_learn, (number + 1) % POLICY_EVERY == 0)
    k_fill, k_real, k_imagined, k_learn = jax.random.split(jax.random.fold_in(s.key, s.step), 4)
    fill = lambda s: refill(task, s, data, len(data.reward), k_fill)
    s = jax.lax.cond(number % cfg.refill_every == 0, fill, lambda s: s, s)
    parts = draw_rows(data, cfg.batch_size, k_real), draw_imagined(task, s, cfg.batch_size, k_imagined)
    return learn(task, s, joined(*parts), k_learn, (number + 1) % POLICY_EVERY == 0)


def joined(*parts: Batch) -> Batch:
    """One batch of several."""
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


def code_inputs(task: Task, s: State, data: Batch, rows: Batch, count: Array | int, key: Key) -> tuple[Array, Array]:
    """What the encoder learns from, and how much of it is valid: short imagined play of the policy from starts among
    the first `count` of `rows`, and the data set."""
    k_start, k_play = jax.random.split(key)
    starts = start_states(task, rows, count, REPEATS * task.cfg.rollouts, k_start)
    play = imagined(task, s, starts, SHORT, k_play)
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    valid = jnp.concatenate([jnp.ones(len(data.reward), bool), flat(play.valid)])
    x = jnp.concatenate([table_of(data).inputs, flat(play.rows.inputs)])
    return (x[jnp.argsort(~valid, stable=True)] - s.codes.mean) / s.codes.std, valid.sum()


def encode(task: Task, s: State, x: Array, count: Array, key: Key, steps: int) -> tuple[State, Array]:
    """Steps of the encoder."""
    c = s.codes
    how = dict(steps=steps, batch=task.cfg.encoder_batch, beta=s.hypers.beta)
    params, opt_state, losses = bottleneck.fit_encoders(task.encoders, c.params, c.opt_state, x, count, key, **how)
    return s._replace(codes=c._replace(params=params, opt_state=opt_state)), losses.mean()


def marginalise(
    task: Task, s: State, x: Array, count: Array, key: Key, steps: int, first: Array | bool
) -> tuple[State, Array]:
    """Steps of the marginal, whose components begin at codes where this is the `first` block."""
    c, cfg = s.codes, task.cfg
    k_first, k_fit = jax.random.split(key)
    z = task.encoders(c.params["e"], x).mean
    fresh = bottleneck.first_mixture(z, count, k_first, cfg.components, cfg.reference_compat)
    begin = lambda new, old: jax.tree.map(lambda a, b: jnp.where(first, a, b), new, old)
    marginal, opt_state = begin((fresh, ADAM.init(fresh)), (c.marginal, c.marginal_opt))
    marginal, opt_state, losses = bottleneck.fit_marginal(
        marginal, opt_state, z, count, k_fit, steps=steps, batch=cfg.encoder_batch
    )
    return s._replace(codes=c._replace(marginal=marginal, marginal_opt=opt_state)), losses.mean()


def centred(task: Task, s: State) -> State:
    """With mean and deviation of the rates over the imagined play."""
    r = rates(task, s, s.imagined.obs, s.imagined.action)
    count = s.valid.sum()
    mean = jnp.where(s.valid, r, 0.0).sum() / count
    var = jnp.where(s.valid, jnp.square(r - mean), 0.0).sum() / count
    return s._replace(codes=s.codes._replace(centre=mean, spread=jnp.sqrt(var)))


def encode_blocks(cfg: Config) -> tuple[int, int]:
    """Training steps of encoder and marginal."""
    return -(-cfg.encoder_steps // cfg.block), -(-cfg.marginal_steps // cfg.block) * (cfg.marginal == "mixture")


def encode_step(task: Task, s: State, data: Batch, number: Array) -> tuple[State, Metrics]:
    """A block of steps of the encoder or, behind those, of the marginal."""
    encoder, marginal = encode_blocks(task.cfg)
    s = s._replace(codes=s.codes._replace(mean=s.model.mean, std=s.model.std))
    x, count = code_inputs(task, s, data, data, len(data.reward), jax.random.fold_in(s.key, ENCODE))
    key, block = jax.random.fold_in(s.key, s.step), task.cfg.block
    none = Mean(jnp.float32(0.0), jnp.float32(0.0))
    one = lambda x: Mean(x, jnp.float32(1.0))

    def first(s: State) -> tuple[State, Mean, Mean]:
        s, loss = encode(task, s, x, count, key, block)
        return s, one(loss), none

    def second(s: State) -> tuple[State, Mean, Mean]:
        s, loss = marginalise(task, s, x, count, key, block, number == encoder)
        return s, none, one(loss)

    s, coded, fitted = jax.lax.cond(number < encoder, first, second, s) if marginal else first(s)
    s = centred(task, s)
    found = {"train/encoder": coded, "train/marginal": fitted, "train/rate": s.codes.centre}
    return s, found | {"train/rate_spread": s.codes.spread}


# --- play


def planned(task: Task, s: State, obs: Array, key: Key) -> Array:
    """Planned actions [B, A] for observations [B, O]."""
    cfg, env = task.cfg, task.env
    if cfg.strategy == "ptgood":
        score = lambda obs, action: rates(task, s, obs, action) - s.codes.centre
    else:
        score = lambda obs, action: disagreement(task, s, obs, action)
    parts = planning.Parts(
        lambda obs, z: task.nets.actor(s.params["actor"], obs).sample_from(z)[0],
        lambda e, obs, action: task.dyn.advance(s.model, task.dyn.elite(s.model, e), obs, action),
        score,
        lambda obs: ended(task, s, obs),
    )

    def one(key: Key, obs: Array) -> Array:
        levels = planning.draw(key, cfg.plan_width, cfg.plan_depth, env.action_size, cfg.elites)
        how = dict(released=cfg.reference_compat)
        return planning.plan(parts, levels, obs, s.hypers.noise, s.hypers.gamma, **how)[0]

    return jax.vmap(one)(jax.random.split(key, len(obs)), obs)


def bounded(task: Task, s: State, obs: Array, key: Key) -> Array:
    """The best of some actions of the policy by value plus the deviation of the critics (ucb_q), or by the smaller
    value plus the disagreement of the models (ucb_t)."""
    count = task.cfg.candidates
    many = jnp.repeat(obs, count, axis=0)
    action = policy(task, s, many, key)
    q = task.nets.critics(s.params["critic"], many, action)
    if task.cfg.strategy == "ucb_q":
        score = q.mean(0) + s.hypers.ucb * q.std(0)
    else:
        score = q.min(0) + s.hypers.ucb * disagreement(task, s, many, action)
    best = score.reshape(-1, count).argmax(1)
    return jnp.take_along_axis(action.reshape(len(obs), count, -1), best[:, None, None], 1)[:, 0]


def choose(task: Task, s: State, obs: Array, key: Key) -> Array:
    """Actions [B, A] of the strategy."""
    strategy = task.cfg.strategy
    if strategy in ("ptgood", "disagreement"):
        return planned(task, s, obs, key)
    if strategy in ("ucb_q", "ucb_t"):
        return bounded(task, s, obs, key)
    if strategy == "random":
        return jax.random.uniform(key, (len(obs), task.env.action_size), jnp.float32, -1.0, 1.0)
    return policy(task, s, obs, key)


def play(task: Task, s: State, key: Key, random: Array) -> rollout.Rollout:
    """One real step; extras are the standardised observations and the actions in [-1, 1]."""

    def act(key: Key, carry: Any, vs: vector.VecState) -> tuple[Any, Array, tuple[Array, Array]]:
        obs = (vs.ts.obs.reshape(1, -1).astype(jnp.float32) - s.mean) / s.std
        uniform = lambda key: jax.random.uniform(key, (1, task.env.action_size), jnp.float32, -1.0, 1.0)
        action = jax.lax.cond(random, uniform, lambda key: choose(task, s, obs, key), key)
        return carry, offline.in_bounds(task.env, action), (obs, action)

    return rollout.collect(task.vec, act, key, s.vec, (), 1)


def real_steps(s: State, played: rollout.Rollout) -> Batch:
    """Steps [1, 1, ...] of a rollout as one item [1, ...], without a return-to-go."""
    steps = played.steps
    assert steps.final_obs is not None
    obs, action = (x[0] for x in steps.extras)
    after = (steps.final_obs.reshape(1, -1).astype(jnp.float32) - s.mean) / s.std
    return Batch(obs, action, steps.reward.reshape(1), after, steps.terminated.reshape(1).astype(jnp.float32))


def with_returns(task: Task, s: State, played: rollout.Rollout) -> State:
    """The state once its last step was stored: where that ended an episode, the steps of this episode get their
    returns-to-go, which before were `UNKNOWN`. A cut episode continues with its last reward, as in the data set."""
    rows, held = s.buffer.experience, replay.held(s.buffer)
    room = rows.returns.shape[1]
    size = min(room, task.env.env.spec.horizon or room)
    start = jnp.maximum(held - size, 0)
    take = lambda x: jax.lax.dynamic_slice(x[0], (start,), (size,))
    index, known = start + jnp.arange(size), take(rows.returns)
    done, over = played.steps.done.reshape(()), played.steps.terminated.reshape(())
    last = index == held - 1
    gamma = s.hypers.gamma
    found = returns_to_go(take(rows.reward), last & over, last & ~over, gamma, task.cfg.hypers.gamma < 1)
    new = jnp.where(done & (index < held) & (known == UNKNOWN), found, known)
    returns = jax.lax.dynamic_update_slice(rows.returns, new[None], (0, start))
    return s._replace(buffer=s.buffer.replace(experience=rows._replace(returns=returns)))


def mixed(task: Task, s: State, data: Batch, key: Key) -> tuple[Batch, Batch]:
    """A batch of the data set, imagined play and real steps, a third each; and the first and last third alone, which
    is all of it for cal_ql."""
    size = task.cfg.batch_size
    k_offline, k_imagined, k_online = jax.random.split(key, 3)
    online = task.buffer.sample(s.buffer, k_online).items
    past = draw_rows(data, size, k_offline)
    real = joined(past, online)
    if task.cfg.strategy == "cal_ql":
        return real, real
    return joined(past, draw_imagined(task, s, size, k_imagined), online), real


def rewarded(task: Task, s: Any, batch: Batch, real: Batch) -> tuple[Any, Batch]:
    """The batch with the strategy's bonus in its rewards; the predictor of rnd learns from `real` transitions."""
    if task.cfg.strategy == "intrinsic":
        bonus = disagreement(task, s, batch.obs, batch.action)
    elif task.cfg.strategy == "rnd":
        inputs = lambda b: jnp.concatenate([b.obs, b.action], -1)
        gap = lambda p, x: jnp.square(forward(task.rnd, p, x) - forward(task.rnd, s.target["rnd"], x)).mean(-1)
        error = gap(s.params["rnd"], inputs(batch))
        bonus = error / (error.mean() + 1e-8)
        grads = jax.grad(lambda p: gap(p, inputs(real)).mean())(s.params["rnd"])
        s = descend(s, "rnd", grads, s.hypers.critic_lr)
    else:
        return s, batch
    return s, batch._replace(reward=batch.reward + s.hypers.bonus * jax.lax.stop_gradient(bonus))


def explore_round(task: Task, data: Batch, s: State, key: Key, number: Array) -> tuple[State, Metrics]:
    """One real step, the updates behind it, and what is due at this step."""
    cfg = task.cfg
    k_play, k_learn, k_fit, k_fill, k_code = jax.random.split(key, 5)
    played = play(task, s, k_play, number < cfg.random_steps)
    metrics: Metrics = rollout.statistics(played.steps) | rollout.checks(task.vec.env.spec, played)
    item = real_steps(s, played)
    if cfg.strategy == "cal_ql":
        item = item._replace(returns=jnp.full(1, UNKNOWN, jnp.float32))
    s = s._replace(vec=played.vec, buffer=task.buffer.add(s.buffer, item))
    if cfg.strategy == "cal_ql":
        s = with_returns(task, s, played)
    learns = number >= cfg.random_steps

    def update(s: State, key: Key, count: Array) -> tuple[State, Metrics]:
        k_batch, k_noise = jax.random.split(key)
        batch, real = mixed(task, s, data, k_batch)
        s, batch = rewarded(task, s, batch, real)
        # the released code asks the real step, so that odd ones leave actor and averages alone
        turn = number if cfg.reference_compat else count + 1
        return learn(task, s, batch, k_noise, turn % POLICY_EVERY == 0)

    s, found = updates(update, s, k_learn, cfg.updates, number, learns)
    metrics |= found
    due = lambda every: (number + 1 >= cfg.random_steps) & ((number + 1) % every == 0)

    def refit(s: State) -> State:
        rows, count = real_rows(task, s, data)
        how = dict(patience=cfg.refit_patience, max_calls=cfg.refit_calls, batch=cfg.fit_batch)
        model, progress = dynamics.fit(task.dyn, s.model, rows, count, k_fit, dynamics.begin(), **how)
        return s._replace(model=model, progress=progress)

    def fill(s: State) -> State:
        real = jax.tree.map(lambda x: x[0], s.buffer.experience)
        s = refill(task, s, real, replay.held(s.buffer), k_fill)
        # rates are measured against their mean where the policy goes now
        return centred(task, s) if cfg.strategy == "ptgood" else s

    def recode(s: State) -> State:
        k_new, k_x, k_code_, k_marginal = jax.random.split(k_code, 4)
        s = s._replace(codes=fresh_codes(task, k_new)._replace(mean=s.model.mean, std=s.model.std))
        real = jax.tree.map(lambda x: x[0], s.buffer.experience)
        x, count = code_inputs(task, s, data, real, replay.held(s.buffer), k_x)
        s, _ = encode(task, s, x, count, k_code_, cfg.encoder_steps)
        if cfg.marginal == "mixture":
            s, _ = marginalise(task, s, x, count, k_marginal, cfg.marginal_steps, True)
        return centred(task, s)

    same = lambda s: s
    if cfg.strategy == "cal_ql":
        return s, metrics
    s = jax.lax.cond(due(cfg.refit_every), refit, same, s)
    s = jax.lax.cond(due(cfg.refill_every), fill, same, s)
    if cfg.recode_every:
        s = jax.lax.cond(due(cfg.recode_every), recode, same, s)
    return s, metrics


def explore_step(task: Task, s: State, data: Batch, number: Array) -> tuple[State, Metrics]:
    """Some real steps."""
    return rounds(partial(explore_round, task, data), s, jax.random.fold_in(s.key, s.step), task.cfg.rounds, number)


# --- stages


def ptgood(config: Config = Config()) -> Staged:
    """Raises `UserError` for an environment with several agents, other than real actions, or unknown ends."""
    cfg, task = config, make_task(config)
    encoder, marginal = encode_blocks(cfg)
    plan = {
        "model": (-(-cfg.fit_calls // calls_per_step(cfg)), fit_step, 1),
        "pretrain": (cfg.num_updates, pretrain_step, 1),
        "encode": (encoder + marginal, encode_step, 1),
        "explore": (cfg.online_steps // cfg.rounds, explore_step, cfg.rounds),
    }
    order = list(plan)
    left_out = {"ptgood": (), "cal_ql": ("model", "encode")}.get(cfg.strategy, ("encode",))
    names = [name for name in order if name not in left_out]

    def stage(name: str) -> Stage:
        before = names[names.index(name) - 1] if name != names[0] else None
        # a stage has its own random numbers, whatever was before it
        make = partial(_learner, task, *plan[name], order.index(name), before)
        return Stage(name, make, steps=plan[name][0])

    return Staged(NAME, [stage(name) for name in names], config)


def source(task: Task, cfg: Config) -> OfflineData:
    """The data set whole, beside the number of the step."""
    rows = offline.rows_of(task.env, offline.read(cfg.dataset), cfg.dataset, cfg.hypers.gamma)
    kept = rows.batch._replace(next_action=(), next_known=(), row=())
    if cfg.strategy != "cal_ql":
        kept = kept._replace(returns=())
    return OfflineData({"row": rows.batch.row}, (kept, rows.shared), 1)


def _learner(
    task: Task, steps: int, advance: Any, samples: int, index: int, before: str | None, states: Mapping[str, Any]
) -> Learner:
    cfg = task.cfg

    def step(s: State, drawn: tuple) -> tuple[State, Metrics]:
        _, (data, shared), number = drawn
        s = s._replace(mean=shared.mean, std=shared.std)
        s, metrics = advance(task, s, data, number)
        if cfg.strategy == "cal_ql":
            metrics["check/gamma, which is that of the returns-to-go, the config's"] = s.hypers.gamma == shared.gamma
        return s._replace(step=s.step + 1), metrics

    def begin(key: Key, hypers: Any, given: Any = None) -> State:
        s = init(task, key, hypers)
        if given is None:
            return s
        # what an earlier stage did not have is as at the start
        parts = {k: getattr(s, k) | given[k] for k in ("params", "target", "opt_state")}
        return s._replace(**(given | parts), key=jax.random.fold_in(s.key, BEGIN + index))

    kept = None
    if before is not None:
        last = states[before]
        kept = {k: getattr(last, k) for k in State._fields if k not in ("hypers", "key", "step")}
    return Learner(
        init=begin,
        step=step,
        hypers=cfg.hypers,
        config=cfg,
        name=NAME,
        samples_per_step=samples,
        evaluate=offline.evaluation(task.env, task.nets.actor),
        num_steps=steps,
        policy=offline.policy_of(task.env, task.nets.actor),
        env=task.env.env,
        unchecked=lambda s: (s.vec.env, s.vec.ts.info),  # what environments emit is checked instead, see rollout.checks
        source=partial(source, task),
        given=kept,
    )
