"""What the stages of PTGOOD share: options, state, networks, imagined play, rates, one update of the policy."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from jaxstack.agents import conservative, offline, planning, soft
from jaxstack.agents.offline import Batch
from jaxstack.core import replay
from jaxstack.core.config import require, require_at_least
from jaxstack.core.learner import Key, Metrics
from jaxstack.core.metrics import Mean
from jaxstack.core.replay import Replay
from jaxstack.envs import terminations, vector
from jaxstack.nn import bottleneck, dynamics
from jaxstack.nn.bottleneck import ADAM, Encoders, Mixture
from jaxstack.nn.distributions import TanhNormal
from jaxstack.nn.dynamics import Dynamics, Rows
from jaxstack.nn.ensembles import Critics, Net, forward

LOG_STD = (-20.0, 2.0)
ALPHA = 0.1
"""Temperature that learning begins with."""
POLICY_EVERY = 2
"""Updates of the critics for one of actor, temperature and averages."""
FEATURES = 32
"""Of random network distillation."""
UNKNOWN = float(np.finfo(np.float32).min)
"""Return-to-go of a step of an unfinished episode: as a lower bound it changes nothing."""


class Hypers(NamedTuple):
    """Numeric hyperparameters: traced, so a sweep over them compiles once."""

    actor_lr: float = 1e-4
    critic_lr: float = 3e-4
    alpha_lr: float = 3e-4
    gamma: float = 0.99
    tau: float = 0.005
    """Share of the new weights in an average."""
    beta: float = 0.01
    """Bottleneck: weight of the information that a second view does not have."""
    noise: float = 0.3
    """Deviation of what planned actions are moved by."""
    bonus: float = 1.0
    """intrinsic, rnd: weight of the bonus in the reward."""
    ucb: float = 1.0
    """ucb_q, ucb_t: weight of the deviation."""
    conservative: float = 5.0
    """cal_ql: weight of the conservative term."""
    penalty: float = 0.0
    """Weight of the disagreement taken from imagined rewards."""


@dataclass(frozen=True)
class Config(offline.OfflineConfig):
    """All stages; the sizes are those of the released code, the tree is smaller."""

    strategy: Literal["ptgood", "disagreement", "naive", "random", "intrinsic", "rnd", "ucb_q", "ucb_t", "cal_ql"] = (
        "ptgood"
    )
    """How real actions are chosen: planned by rates or by the disagreement of the models; the policy's own (naive; with
    a bonus in the reward: intrinsic, rnd; with calibrated conservative critics and no models: cal_ql); uniform; the
    best of `candidates` by value and deviation."""
    num_updates: int = 50_000
    """Updates of the policy before play."""
    actor_hidden: tuple[int, ...] = (256, 256, 256)
    critic_hidden: tuple[int, ...] = (256, 256, 256)
    model_hidden: tuple[int, ...] = (200, 200, 200, 200)
    members: int = 7
    elites: int = 5
    fit_batch: int = 256
    """A tenth of the rows of a fit call."""
    fit_patience: int = 250
    """Fit calls without a better model that end the first fit."""
    fit_calls: int = 2000
    """The most fit calls of the first fit."""
    refit_patience: int = 5
    refit_calls: int = 50
    rollouts: int = 10_000
    """Imagined episodes of a refill; the release has 100,000."""
    horizon: int = 5
    """Steps of an imagined episode."""
    encoder_hidden: tuple[int, ...] = (256, 128, 64)
    codes: int = 8
    encoder_batch: int = 512
    encoder_steps: int = 30_000
    marginal: Literal["mixture", "normal"] = "mixture"
    """Of the codes: a mixture of normals that is fitted, or N(0, I)."""
    components: int = 32
    marginal_steps: int = 50_000
    block: int = 500
    """Steps of encoder or marginal per training step."""
    plan_width: int = 5
    plan_depth: int = 3
    candidates: int = 10
    """Actions among which ucb_q and ucb_t choose; of each kind in the conservative term of cal_ql."""
    online_steps: int = 51_000
    """Real steps, the random ones among them."""
    random_steps: int = 1000
    """Uniformly random real steps before all others; nothing but the models learns from them at first."""
    updates: int = 20
    """Of the policy after each real step."""
    refit_every: int = 1000
    refill_every: int = 250
    recode_every: int = 0
    """Real steps between two trainings of encoder and marginal; 0: only the first."""
    rounds: int = 250
    """Real steps per training step, which is the unit of chunks, evaluations and checkpoints."""
    reference_compat: bool = False
    """What the released code does differently, see the page."""
    hypers: Hypers = Hypers()

    def validate(self) -> None:
        super().validate()
        sizes = "members elites fit_batch fit_patience fit_calls refit_patience refit_calls rollouts horizon codes"
        more = "encoder_batch encoder_steps components marginal_steps block plan_width plan_depth candidates rounds"
        require_at_least(self, 1, *sizes.split(), *more.split(), "updates", "refit_every", "refill_every")
        require_at_least(self, 0, "random_steps", "recode_every")
        for name in ("model_hidden", "encoder_hidden"):
            require(self, name, all(h >= 1 for h in getattr(self, name)), "layer widths >= 1")
        require(self, "elites", self.elites <= self.members, f"1 to {self.members}")
        require(
            self, "random_steps", self.random_steps <= self.online_steps, f"at most online_steps={self.online_steps}"
        )
        whole = self.online_steps >= self.rounds and self.online_steps % self.rounds == 0
        require(self, "online_steps", whole, f"a multiple of rounds={self.rounds}")
        if self.strategy in ("ptgood", "disagreement"):
            widest = max(*self.model_hidden, *self.actor_hidden, *self.encoder_hidden)
            planning.check_size(self.plan_width, self.plan_depth, 2 * widest)


class Codes(NamedTuple):
    """Encoder and marginal."""

    params: Any
    opt_state: Any
    marginal: Mixture
    marginal_opt: Any
    mean: Array
    """[O + A] by which their inputs are standardised"""
    std: Array
    centre: Array
    """Mean rate over the imagined play, and its deviation"""
    spread: Array


class State(NamedTuple):
    """Complete training state, of every stage."""

    hypers: Any
    params: Any
    """{"actor", "critic", "log_alpha"}, with rnd the predictor too"""
    target: Any
    opt_state: Any
    mean: Array
    """[O] by which observations are standardised, the data set's"""
    std: Array
    model: dynamics.Model
    progress: dynamics.Progress
    codes: Codes
    imagined: Batch
    """[h N, ...]"""
    valid: Array
    """[h N] bool"""
    vec: Any
    buffer: Any
    """Real steps of the last stage"""
    key: Key
    step: Array


class Task(NamedTuple):
    """Static: networks, environment, and what ends it."""

    cfg: Config
    nets: soft.Nets
    dyn: Dynamics
    encoders: Encoders
    vec: vector.VecEnv
    buffer: Replay
    ends: terminations.Ends

    @property
    def env(self) -> offline.Task:
        """Environment and sizes."""
        return self.nets.task

    @property
    def rnd(self) -> Net:
        """Features of states and actions."""
        return Net(self.cfg.encoder_hidden, FEATURES)


class ReleasedNets(soft.Nets):
    """Networks of the released code, in which tanh brings log deviations into their bounds."""

    def actor(self, params: Any, obs: Array) -> TanhNormal:
        mean, raw = jnp.split(forward(self.actor_net, params, obs), 2, axis=-1)
        low, high = self.log_std
        return TanhNormal(mean, low + 0.5 * (high - low) * (jnp.tanh(raw) + 1.0))


def make_task(cfg: Config) -> Task:
    """Raises `UserError` where config and environment do not fit."""
    env = offline.make_task(cfg)
    actor = Net(cfg.actor_hidden, 2 * env.action_size, activation="elu")
    critics = Critics(Net(cfg.critic_hidden, 1, "before", activation="elu"), 2)
    return Task(
        cfg,
        (ReleasedNets if cfg.reference_compat else soft.Nets)(env, actor, critics, LOG_STD),
        Dynamics(env.obs_size, env.action_size, cfg.model_hidden, cfg.members, cfg.elites),
        Encoders(env.obs_size + env.action_size, cfg.encoder_hidden, cfg.codes),
        vector.vectorise(env.env, 1),
        replay.items(max(cfg.online_steps, cfg.batch_size), cfg.batch_size),
        terminations.of(cfg.env, env.env.spec.can_terminate),
    )


def init(task: Task, key: Key, hypers: Any) -> State:
    """What the first stage begins with."""
    cfg, env = task.cfg, task.env
    k_soft, k_model, k_codes, k_env, k_rnd = jax.random.split(key, 5)
    base = soft.init(task.nets, k_soft, hypers)
    params: dict[str, Any] = base.params | {"log_alpha": jnp.float32(np.log(ALPHA))}
    target = base.target
    size = env.obs_size + env.action_size
    if cfg.strategy == "rnd":
        one = lambda k: task.rnd.init(k, jnp.zeros((1, size), jnp.float32))["params"]
        params, target = ({**x, "rnd": one(k)} for x, k in zip((params, target), jax.random.split(k_rnd)))
    obs, zero = jnp.zeros(env.obs_size, jnp.float32), jnp.float32(0.0)
    item = Batch(obs, jnp.zeros(env.action_size, jnp.float32), zero, obs, zero)
    room = cfg.rollouts * cfg.horizon
    return State(
        base.hypers,
        params,
        target,
        offline.adam_states(params),
        base.mean,
        base.std,
        task.dyn.init(k_model),
        dynamics.begin(),
        fresh_codes(task, k_codes),
        jax.tree.map(lambda x: jnp.zeros((room, *x.shape), x.dtype), item),
        jnp.zeros(room, bool),
        vector.init(task.vec, k_env),
        task.buffer.init(item._replace(returns=zero) if cfg.strategy == "cal_ql" else item),
        base.key,
        base.step,
    )


def fresh_codes(task: Task, key: Key) -> Codes:
    """Encoder and marginal before they learn."""
    cfg, size = task.cfg, task.encoders.inputs
    params = task.encoders.init(key)
    marginal = bottleneck.standard_normal(cfg.codes)
    if cfg.marginal == "mixture":
        blank = jnp.zeros((cfg.components, cfg.codes), jnp.float32)
        kind = bottleneck.ReleasedMixture if cfg.reference_compat else Mixture
        marginal = kind(jnp.zeros(cfg.components, jnp.float32), blank, blank)
    zero, one = jnp.zeros(size, jnp.float32), jnp.ones(size, jnp.float32)
    centre, spread = jnp.float32(0.0), jnp.float32(1.0)
    return Codes(params, ADAM.init(params), marginal, ADAM.init(marginal), zero, one, centre, spread)


# --- parts


def table_of(batch: Batch) -> Rows:
    """Transitions as the models read them."""
    return Rows(batch.obs, batch.action, batch.reward, batch.next_obs)


def real_rows(task: Task, s: State, data: Batch) -> tuple[Rows, Array]:
    """The data set's rows and the real steps behind them, and how many are valid."""
    held = jax.tree.map(lambda x: x[0], s.buffer.experience)
    joined = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), table_of(data), table_of(held))
    return joined, len(data.reward) + replay.held(s.buffer)


def policy(task: Task, s: State, obs: Array, key: Key) -> Array:
    """Sampled actions [B, A]."""
    noise = jax.random.normal(key, (len(obs), task.env.action_size), jnp.float32)
    return task.nets.actor(s.params["actor"], obs).sample_from(noise)[0]


def ended(task: Task, s: State, obs: Array) -> Array:
    """[B] bool, whether the task ends at standardised observations."""
    return task.ends(obs * s.std + s.mean)


def start_states(task: Task, rows: Batch, count: Array | int, amount: int, key: Key) -> Array:
    """Observations [amount, O] that were acted on, which no end of a task is.

    The released code takes only those of steps that did not end the task, and fails where all did.
    """
    index = jax.random.randint(key, (amount,), 0, count)
    if task.cfg.reference_compat:
        index = sample_valid((rows.last < 0.5) & (jnp.arange(len(rows.last)) < count), amount, key)
    return rows.obs[index]


def sample_valid(valid: Array, amount: int, key: Key) -> Array:
    """Numbers [amount] int32 of rows with `valid` [N], drawn uniformly with replacement."""
    total = jnp.cumsum(valid.astype(jnp.int32))
    return jnp.searchsorted(total, 1 + jax.random.randint(key, (amount,), 0, total[-1]))


def imagined(task: Task, s: State, starts: Array, horizon: int, key: Key) -> dynamics.Imagined:
    """Play of the policy in the models."""
    act = lambda obs, key: policy(task, s, obs, key)
    ends = lambda obs: ended(task, s, obs)
    return dynamics.imagine(task.dyn, s.model, act, ends, starts, horizon, key, s.hypers.penalty)


def refill(task: Task, s: State, rows: Batch, count: Array | int, key: Key) -> State:
    """Replace the imagined play, from starts among the first `count` rows."""
    k_start, k_play = jax.random.split(key)
    starts = start_states(task, rows, count, task.cfg.rollouts, k_start)
    play = imagined(task, s, starts, task.cfg.horizon, k_play)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), play)
    last = flat.terminated.astype(jnp.float32)
    return s._replace(imagined=Batch(**flat.rows._asdict(), last=last), valid=flat.valid)


def draw_imagined(task: Task, s: State, amount: int, key: Key) -> Batch:
    """Imagined transitions before and at ends."""
    index = sample_valid(s.valid, amount, key)
    return jax.tree.map(lambda x: x[index], s.imagined)


def draw_rows(rows: Batch, amount: int, key: Key) -> Batch:
    """Transitions of the data set."""
    index = jax.random.randint(key, (amount,), 0, len(rows.reward))
    return jax.tree.map(lambda x: x[index], rows)


def rates(task: Task, s: State, obs: Array, action: Array) -> Array:
    """[B] nats."""
    c = s.codes
    x = (jnp.concatenate([obs, action], -1) - c.mean) / c.std
    return bottleneck.rate(task.encoders, c.params, c.marginal, x)


def disagreement(task: Task, s: State, obs: Array, action: Array) -> Array:
    """[B] of all members."""
    return dynamics.disagreement(task.dyn.predict(s.model, obs, action)[0])


def descend(s: Any, name: str, grads: Any, lr: Array) -> Any:
    """One step of Adam on one part of the parameters."""
    params, opt_state = offline.descend(s.params, s.opt_state, name, grads, lr)
    return s._replace(params=params, opt_state=opt_state)


def calibrated(task: Task, s: Any, batch: Batch, key: Key) -> tuple[Array, Callable[[Any], Array]]:
    """What Cal-QL (Nakamoto et al., 2023) changes in the critics' loss, as its authors' code has it.

    Returns:
        Targets [B] r + gamma (1 - last) max_j min_i Q'_i(s', a_j) over actions of the policy, without entropy, and the
        weighted conservative term as a function of the critics' parameters, in which the policy's actions count at
        least the return-to-go of the row.
    """
    nets, count = task.nets, task.cfg.candidates
    k_term, k_goal = jax.random.split(key)
    noise = conservative.draw(nets, k_term, len(batch.reward), count)
    actions, density = conservative.candidates(nets, s, batch, noise)
    after = jnp.tile(batch.next_obs, (count, 1))
    values = nets.critics(s.target["critic"], after, policy(task, s, after, k_goal)).min(0)
    goal = batch.reward + s.hypers.gamma * (1.0 - batch.last) * values.reshape(count, -1).max(0)
    apart = lambda critic: conservative.term(nets, critic, batch, actions, density, batch.returns)
    return goal, lambda critic: s.hypers.conservative * apart(critic)


def learn(task: Task, s: Any, batch: Batch, key: Key, due: Array) -> tuple[Any, Metrics]:
    """One update of the critics and, where it is due, of actor, temperature and averages.

    `due` [] bool has no axis of seeds, so that vmapped seeds skip what is not due.
    """
    nets, h = task.nets, s.hypers
    if task.cfg.strategy == "cal_ql":
        key, k_more = jax.random.split(key)
        goal, apart = calibrated(task, s, batch, k_more)
        noise = soft.draw(nets, key, len(batch.reward))
    else:
        noise = soft.draw(nets, key, len(batch.reward))
        goal, apart = soft.target_values(nets, s, batch, noise.target), lambda critic: 0.0
    goal = jax.lax.stop_gradient(goal)
    loss, grads = jax.value_and_grad(lambda c: soft.regression(nets, c, batch, goal) + apart(c))(s.params["critic"])
    s = descend(s, "critic", grads, h.critic_lr)

    def improve(s: Any) -> tuple[Any, Mean]:
        alpha, critic = jnp.exp(s.params["log_alpha"]), s.params["critic"]
        fit = lambda actor: soft.actor_loss(nets, actor, critic, alpha, batch, noise.actor)
        value, grads = jax.value_and_grad(fit)(s.params["actor"])
        s = descend(s, "actor", grads, h.actor_lr)
        slope = jax.grad(soft.temperature_loss, 1)(
            nets, s.params["log_alpha"], s.params["actor"], batch, noise.temperature
        )
        s = descend(s, "log_alpha", slope, h.alpha_lr)
        averages = optax.incremental_update({"critic": critic}, {"critic": s.target["critic"]}, h.tau)
        return s._replace(target=s.target | averages), Mean(value, jnp.float32(1.0))

    s, value = jax.lax.cond(due, improve, lambda s: (s, Mean(jnp.float32(0.0), jnp.float32(0.0))), s)
    return s, {"loss/critic": loss, "train/actor": value, "train/alpha": jnp.exp(s.params["log_alpha"])}
