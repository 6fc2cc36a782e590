"""First imitate, then improve (Jelley et al., 2024): offline RL that begins from a cloned actor and its critic.

Stage 1 is supervised: the actor is cloned, and the critic regressed on the returns-to-go of the data, so that both
describe the behaviour that made it. Stage 2 is TD3+BC, EDAC or ReBRAC, unchanged, with weights, averages and optimiser
state of stage 1. Updates of both count.

The released code differs in ways that its authors did not mean; `reference_compat` gives them, see the page.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxstack.agents import offline, soft, td3
from jaxstack.agents.offline import Batch, State, Task
from jaxstack.core import config as configs
from jaxstack.core.config import require, require_at_least, require_unit
from jaxstack.core.learner import Key, Learner, Metrics
from jaxstack.core.stages import Stage, Staged
from jaxstack.data.offline import soft_returns_to_go
from jaxstack.nn.distributions import TanhNormal
from jaxstack.nn.ensembles import Critics, Net, conservative

NAME = "imitate-then-improve"
RANDOM_ACTIONS = 10
"""Of the conservative term."""
EPOCH = 1000
"""Updates of an epoch of the released code."""
BLOCK = 4096
"""States whose entropies are estimated at once."""


class Hypers(NamedTuple):
    """Numeric hyperparameters: traced, so a sweep over them compiles once. Each base reads its own."""

    lr: float = 3e-4
    gamma: float = 0.99
    tau: float = 0.005
    """Share of the new weights in an average."""
    alpha: float = 2.5
    """TD3+BC: weight of the value beside behaviour cloning."""
    policy_noise: float = 0.2
    noise_clip: float = 0.5
    beta1: float = 0.01
    """ReBRAC: weight of the actor's distance to the data."""
    beta2: float = 0.01
    """ReBRAC: weight of the target action's distance to the data's next action."""
    eta: float = 1.0
    """EDAC: weight of the critics' diversity."""


@dataclass(frozen=True)
class Config(offline.OfflineConfig):
    """Both stages; the widths are those of the released code."""

    base: Literal["td3_bc", "edac", "rebrac"] = "td3_bc"
    """Algorithm of the second stage."""
    variant: Literal["ac", "bc", "critic", "none"] = "ac"
    """What is pretrained: actor and critic, one of them, or nothing."""
    pretrain_steps: int = 10_000
    """Updates of the first stage, among the `num_updates` of the run."""
    returns: Literal["auto", "hard", "soft"] = "auto"
    """Returns-to-go of the rewards (hard), or with the entropies of the cloned actor (soft: the critic is regressed in
    the second half of the first stage); auto: soft for edac's ac, else hard."""
    td_component: float = 0.0
    """Share of the base's own critic loss in pretraining, lambda of the paper; each part is divided by its value."""
    conservative: float = 0.0
    """td3_bc, rebrac: weight of the conservative term in pretraining."""
    cloning: float = 0.0
    """edac: weight of behaviour cloning in the second stage (EDAC+BC)."""
    keep_conservative: bool = False
    """td3_bc: the conservative term stays in the second stage (TD3+BC+CQL)."""
    num_critics: int = 10
    """Of edac; the others have two."""
    actor_hidden: tuple[int, ...] = (256, 256, 256)
    layer_norm: bool = True
    """Normalise layers: before each ReLU without scale and shift; with rebrac after those of the critics."""
    reference_compat: bool = False
    """What the released code does differently, see the page."""
    hypers: Hypers = Hypers()

    def validate(self) -> None:
        super().validate()
        require_at_least(self, 0, "pretrain_steps", "conservative", "cloning")
        require_at_least(self, 1, "num_critics")
        require_unit(self, "td_component")
        require(
            self, "pretrain_steps", self.pretrain_steps < self.num_updates, f"less than num_updates={self.num_updates}"
        )
        edac = self.base == "edac"
        require(self, "conservative", not (edac and self.conservative), "0 with base edac, which has cloning")
        require(self, "cloning", edac or not self.cloning, f"0 with base {self.base}")
        require(self, "keep_conservative", not self.keep_conservative or self.base == "td3_bc", "false but for td3_bc")
        wants_both = self.returns != "soft" or (edac and self.variant == "ac")
        require(self, "returns", wants_both, "soft only with base edac and variant ac, whose actor gives entropies")

    @property
    def soft(self) -> bool:
        """Whether the critic is regressed on soft returns."""
        return self.returns == "soft" or (self.returns == "auto" and self.base == "edac" and self.variant == "ac")

    @property
    def pretrains(self) -> int:
        """Updates of the first stage."""
        if self.variant == "none" or not self.pretrain_steps:
            return 0
        # the release counts epochs from 0 up to and including the last
        return self.pretrain_steps + EPOCH * (self.reference_compat and self.base == "edac")


def relative(x: Array, compat: bool = False) -> Array:
    """x divided by its detached magnitude. The released code divides by the detached value itself, which turns the
    gradient where x < 0."""
    if compat:
        return x / jax.lax.stop_gradient(x)
    return x / jax.lax.stop_gradient(jnp.abs(x) + td3.TINY)


def mixture(monte_carlo: Array, temporal: Array, share: float, compat: bool = False) -> Array:
    """(1 - lambda) L_MC / sg(L_MC) + lambda L_TD / sg(L_TD): its value is 1, its gradient that of both parts."""
    return (1.0 - share) * relative(monte_carlo, compat) + share * relative(temporal, compat)


def imitate_then_improve(config: Config = Config()) -> Staged:
    """Raises `UserError` for an environment with several agents or other than real actions."""
    cfg = configs.replace(config, bootstrap_on_timeout=False) if config.reference_compat else config
    task = offline.make_task(cfg)
    make = _soft_stages if cfg.base == "edac" else _td3_stages
    return Staged(NAME, make(cfg, task), config)


# --- TD3+BC and ReBRAC


def td3_nets(cfg: Config, task: Task) -> td3.Nets:
    """Networks of td3_bc or rebrac with the config's widths."""
    if cfg.base == "rebrac":
        norm = "after" if cfg.layer_norm else "none"
        critics = Critics(Net(cfg.critic_hidden, 1, norm, bias=0.1, last=3e-3), td3.CRITICS)
        return td3.Nets(task, Net(cfg.actor_hidden, task.action_size, bias=0.1, last=1e-3), critics, regularised=True)
    norm = "before" if cfg.layer_norm else "none"
    critics = Critics(Net(cfg.critic_hidden, 1, norm), td3.CRITICS)
    return td3.Nets(task, Net(cfg.actor_hidden, task.action_size, norm), critics)


def pretrain_td3(cfg: Config, nets: td3.Nets, s: State, batch: Batch, key: Key) -> tuple[State, Metrics]:
    """One update of the first stage: cloning, regression on returns-to-go, averages."""
    params, opt_state, metrics = s.params, s.opt_state, {}
    k_noise, k_random = jax.random.split(key)
    if cfg.variant in ("ac", "bc"):
        cloning = lambda actor: jnp.square(nets.actor(actor, batch.obs) - batch.action).mean()
        metrics["loss/actor"], grads = jax.value_and_grad(cloning)(params["actor"])
        params, opt_state = offline.descend(params, opt_state, "actor", grads, s.hypers.lr)
    if cfg.variant in ("ac", "critic"):
        random = random_actions(k_random, batch)
        goal = td3.target_values(nets, s, batch, td3.draw(nets, k_noise, len(batch.obs))) if cfg.td_component else None
        fit = partial(critic_loss, cfg, nets.critics, batch, random, goal)
        metrics["loss/critic"], grads = jax.value_and_grad(fit)(s.params["critic"])
        params, opt_state = offline.descend(params, opt_state, "critic", grads, s.hypers.lr)
    # the release leaves the averaged actor at its start where the actor alone is pretrained
    parts = [] if cfg.reference_compat and cfg.variant == "bc" else [k.removeprefix("loss/") for k in metrics]
    averages = {k: optax.incremental_update(params[k], s.target[k], s.hypers.tau) for k in parts}
    target = s.target | averages
    return s._replace(params=params, opt_state=opt_state, target=target), metrics


def random_actions(key: Key, batch: Batch) -> Array:
    """Uniform actions [K, B, A] in the bounds."""
    shape = (RANDOM_ACTIONS, *batch.action.shape)
    return jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0)


def critic_loss(cfg: Config, critics: Critics, batch: Batch, random: Array, goal: Array | None, critic: Any) -> Array:
    """Loss of the first stage: on returns-to-go, with `goal` mixed with temporal differences, with the conservative
    term where the config has one."""
    error = lambda target: jnp.square(critics(critic, batch.obs, batch.action) - target).mean(-1).sum()
    loss = error(batch.returns)
    if goal is not None:
        loss = mixture(loss, error(jax.lax.stop_gradient(goal)), cfg.td_component, cfg.reference_compat)
    return with_conservative(cfg, critics, batch, random, critic, loss) if cfg.conservative else loss


def with_conservative(cfg: Config, critics: Critics, batch: Batch, random: Array, critic: Any, loss: Array) -> Array:
    """L / sg|L| + c R / sg|R| with the conservative term R."""
    term = conservative(critics, critic, batch.obs, batch.action, random)
    return relative(loss, cfg.reference_compat) + cfg.conservative * relative(term, cfg.reference_compat)


def _td3_stages(cfg: Config, task: Task) -> list[Stage]:
    nets = td3_nets(cfg, task)
    init = lambda key, hypers: td3.init(nets, key, hypers)

    def improve(s: State, batch: Batch, number: Array, key: Key) -> tuple[State, Metrics]:
        noise = td3.draw(nets, key, cfg.batch_size)
        if not cfg.keep_conservative:
            return td3.update(nets, s, batch, number, noise)
        random = random_actions(jax.random.fold_in(key, 1), batch)

        def loss(critic: Any, goal: Array) -> Array:
            fit = td3.regression(nets, critic, batch, goal)
            return with_conservative(cfg, nets.critics, batch, random, critic, fit)

        return td3.update(nets, s, batch, number, noise, loss)

    def pretrain(s: State, batch: Batch, number: Array, key: Key) -> tuple[State, Metrics]:
        return pretrain_td3(cfg, nets, s, batch, key)

    plan = [("imitate", cfg.pretrains, pretrain)] if cfg.pretrains else []
    return _stages(cfg, task, init, nets.actor, [*plan, ("improve", cfg.num_updates - _counted(cfg), improve)])


# --- EDAC


class ReleasedActor(TanhNormal):
    """Log-probabilities as the released code computes them, with log(1 - tanh(u)^2 + 1e-6)."""

    def _log_prob(self, u: Array) -> Array:
        return self.before.log_prob(u) - jnp.log(1.0 - jnp.square(jnp.tanh(u)) + 1e-6).sum(-1)


class CompatNets(soft.Nets):
    """Networks of EDAC with the release's log-probabilities."""

    def actor(self, params: Any, obs: Array) -> Any:
        dist = super().actor(params, obs)
        return ReleasedActor(dist.before.mean, jnp.log(dist.before.std))


def soft_nets(cfg: Config, task: Task) -> soft.Nets:
    """Networks of edac with the config's widths."""
    norm = "before" if cfg.layer_norm else "none"
    nets = soft.nets_of(task, cfg.actor_hidden, cfg.critic_hidden, cfg.num_critics, norm)
    return CompatNets(*nets) if cfg.reference_compat else nets


def imitate_soft(nets: soft.Nets, s: State, batch: Batch, noise: soft.Noise) -> tuple[State, Metrics]:
    """One update of the temperature, and of the actor on mean(alpha log pi(a~|s) - log pi(a|s)): cloning at the
    entropy that the base wants."""
    s = soft.temper(nets, s, batch, noise.temperature)
    alpha = jnp.exp(s.params["log_alpha"])

    def loss(actor: Any) -> Array:
        dist = nets.actor(actor, batch.obs)
        return (alpha * dist.sample_from(noise.actor)[1] - dist.log_prob(batch.action)).mean()

    value, grads = jax.value_and_grad(loss)(s.params["actor"])
    params, opt_state = offline.descend(s.params, s.opt_state, "actor", grads, s.hypers.lr)
    return s._replace(params=params, opt_state=opt_state), {"loss/actor": value, "train/alpha": alpha}


def evaluate_soft(
    cfg: Config, nets: soft.Nets, s: State, batch: Batch, returns: Array, noise: soft.Noise
) -> tuple[State, Metrics]:
    """One update of the critics on returns-to-go [B], with EDAC's diversity, and of their averages.

    Squared errors are summed over critics, as in the second stage; the release averages them, so that the diversity
    weighs N times as much in pretraining.
    """
    goal = soft.target_values(nets, s, batch, noise.target) if cfg.td_component else None
    each = nets.critics.size if cfg.reference_compat else 1

    def loss(critic: Any) -> Array:
        apart = s.hypers.eta * soft.penalty(nets, critic, batch)
        fit = soft.regression(nets, critic, batch, returns) / each + apart
        if goal is None:
            return fit
        temporal = soft.regression(nets, critic, batch, jax.lax.stop_gradient(goal)) + apart
        return mixture(fit, temporal, cfg.td_component, cfg.reference_compat)

    value, grads = jax.value_and_grad(loss)(s.params["critic"])
    params, opt_state = offline.descend(s.params, s.opt_state, "critic", grads, s.hypers.lr)
    target = optax.incremental_update({"critic": params["critic"]}, s.target, s.hypers.tau)
    return s._replace(params=params, opt_state=opt_state, target=target), {"loss/critic": value}


def soft_returns(cfg: Config, nets: soft.Nets, rows: offline.Rows, state: State) -> Array:
    """Soft returns-to-go [N] of the learning view from the actor of one seed's state: one action for each row.

    In the released code nothing follows the last step of a cut episode but its reward, and an open end of the data
    continues through the unused rows of its buffer, which are zeros.
    """
    key = jax.random.fold_in(state.key, 2**31 - 1)
    noise = jax.random.normal(key, (len(rows.all_obs) + 1, nets.task.action_size), jnp.float32)
    # one row of zeros behind the data: what the release reads there
    obs = jnp.concatenate([jnp.asarray(rows.all_obs), jnp.zeros((1, nets.task.obs_size), jnp.float32)])
    entropy = jax.lax.map(
        lambda x: -nets.actor(state.params["actor"], x[0]).sample_from(x[1])[1], (obs, noise), batch_size=BLOCK
    )
    terminated, truncated = map(jnp.asarray, rows.ends)
    alpha, gamma = jnp.exp(state.params["log_alpha"]), state.hypers.gamma
    entropy, beyond = entropy[:-1], entropy[-1]
    reward, endless = jnp.asarray(rows.all_rewards), 1.0 / (1.0 - gamma)
    if cfg.reference_compat:
        # the open end counts 1 / (1 - gamma) times below: what it then comes to is r + H + gamma H(0) / (1 - gamma)
        own = alpha * entropy[-1]
        last = (reward[-1] + own + gamma * alpha * beyond * endless) / endless - own
        reward = reward.at[-1].set(jnp.where((terminated | truncated)[-1], reward[-1], last))
    out = soft_returns_to_go(reward, entropy, terminated, truncated, gamma, alpha)
    if cfg.reference_compat:
        out = jnp.where(truncated, reward * endless, out)
    return out[jnp.asarray(rows.kept)]


def _soft_stages(cfg: Config, task: Task) -> list[Stage]:
    nets = soft_nets(cfg, task)
    init = lambda key, hypers: soft.init(nets, key, hypers)
    draw = lambda key: soft.draw(nets, key, cfg.batch_size)

    def imitate(s: State, batch: Batch, number: Array, key: Key) -> tuple[State, Metrics]:
        return imitate_soft(nets, s, batch, draw(key))

    def value(s: State, batch: Batch, number: Array, key: Key) -> tuple[State, Metrics]:
        return evaluate_soft(cfg, nets, s, batch, s.aux[batch.row], draw(key))

    def at_once(s: State, batch: Batch, number: Array, key: Key) -> tuple[State, Metrics]:
        noise, metrics = draw(key), {}
        if cfg.variant in ("ac", "bc"):
            s, metrics = imitate_soft(nets, s, batch, noise)
        if cfg.variant in ("ac", "critic"):
            s, more = evaluate_soft(cfg, nets, s, batch, batch.returns, noise)
            metrics |= more
        return s, metrics

    def improve(s: State, batch: Batch, number: Array, key: Key) -> tuple[State, Metrics]:
        noise = draw(key)
        if not cfg.cloning:
            return soft.update(nets, s, batch, noise)

        def loss(actor: Any, critic: Any, alpha: Array) -> Array:
            own = soft.actor_loss(nets, actor, critic, alpha, batch, noise.actor)
            cloning = jnp.square(nets.actor(actor, batch.obs).mode() - batch.action).mean()
            return relative(own, cfg.reference_compat) + cfg.cloning * relative(cloning, cfg.reference_compat)

        return soft.update(nets, s, batch, noise, loss)

    plan: list[tuple[str, int, Callable]] = []
    if cfg.pretrains and cfg.soft:
        half = cfg.pretrains // 2
        plan = [("imitate", half, imitate), ("value", cfg.pretrains - half, value)]
        plan = [part for part in plan if part[1]]
    elif cfg.pretrains:
        plan = [("imitate", cfg.pretrains, at_once)]
    plan.append(("improve", cfg.num_updates - _counted(cfg), improve))

    def given(name: str, states: Mapping[str, Any]) -> dict[str, Any]:
        if name != "value":
            return {}
        rows = offline.rows_of(task, offline.read(cfg.dataset), cfg.dataset, cfg.hypers.gamma)
        one = partial(soft_returns, cfg, nets, rows)
        # seed after seed: entropies of all rows of all seeds at once need not fit
        return {"aux": jax.jit(lambda s: jax.lax.map(one, s))(states["imitate"])}

    return _stages(cfg, task, init, nets.actor, plan, given)


# --- both


def _counted(cfg: Config) -> int:
    """Updates of the first stage that count among `num_updates`; the release's extra epoch does not."""
    return cfg.pretrain_steps if cfg.pretrains else 0


def _stages(
    cfg: Config,
    task: Task,
    init: Callable[[Key, Any], State],
    actor: Callable[[Any, Array], Any],
    plan: list[tuple[str, int, Callable]],
    given: Callable[[str, Mapping[str, Any]], dict[str, Any]] = lambda name, states: {},
) -> list[Stage]:
    """Stages of (name, updates, update): each begins with what the one before has learned."""

    def stage(index: int) -> Stage:
        name, steps, update = plan[index]

        def make(states: Mapping[str, Any]) -> Learner:
            hard = name == "imitate" and cfg.variant in ("ac", "critic") and not cfg.soft
            options: dict[str, Any] = dict(num_steps=steps, uses_returns=hard)
            rolled = cfg.reference_compat and cfg.base != "edac"
            correct = not (cfg.reference_compat and cfg.base == "edac")
            data = offline.source(task, seed=index, rolled=rolled, correct=correct)
            learner = offline.make_learner(NAME, task, init, update, actor, data=data, **options)
            if not index:
                return learner
            last = states[plan[index - 1][0]]
            kept = {k: getattr(last, k) for k in ("params", "target", "opt_state", "mean", "std")}

            def begin(key: Key, hypers: Any, given: Any) -> State:
                s = init(key, hypers)
                return s._replace(key=jax.random.fold_in(s.key, index), **given)

            return learner._replace(init=begin, given=kept | given(name, states))

        return Stage(name, make, steps=steps)

    return [stage(i) for i in range(len(plan))]


def counted(metrics: Any) -> Any:
    """Return the table of a run in stages with a column `updates`, which counts on over the stages.

    Args:
        metrics: `stages.Result.metrics`.
    """
    before, parts = 0, []
    for _, part in metrics.groupby("stage", sort=False):
        parts.append(part.assign(updates=part.step + before))
        before += int(part.step.max())
    import pandas as pd

    return pd.concat(parts, ignore_index=True)
