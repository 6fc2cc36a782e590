"""The team of MATE: its config, its networks, what it remembers between two steps, and how it acts.

The base is MAA2C: an actor and a critic per agent that share nothing. Encoders read what agents observed, did and
earned (task_embedding.py); actors and critics read their embeddings. What must outlast a step, the encoders' states and
the last transition, rides in the carry of rollouts and policies.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from jaxstack.agents.configs import RolloutConfig
from jaxstack.agents.task_embedding import Embedder
from jaxstack.core.config import require, require_at_least, require_positive, require_unit
from jaxstack.core.learner import Key, Policy
from jaxstack.envs import rollout, vector
from jaxstack.envs.base import Box, Environment
from jaxstack.envs.wrappers import TaskId
from jaxstack.nn import team
from jaxstack.nn.distributions import Actions, TeamDistribution, actions_of
from jaxstack.nn.networks import MLP, Activation, Torso, initial_carry
from jaxstack.nn.observations import Inputs, categories, inputs_of
from jaxstack.nn.team import Arch, Modules, TeamSpec


class Hypers(NamedTuple):
    """Numeric hyperparameters: traced, so a sweep over them compiles once."""

    lr: float = 3e-4
    """Of actors and critics."""
    gamma: float = 0.99
    tau: float = 0.01
    """Share of the critic that its target takes per update."""
    vf_coef: float = 0.5
    ent_coef: float = 0.01
    adam_eps: float = 1e-8
    mate_lr: float = 1e-4
    """Of encoders, decoder and gate."""
    mate_max_grad_norm: float = 0.5
    obs_coef: float = 1.0
    reward_coef: float = 1.0
    kl_coef: float = 3e-4
    """Per transition. The released 0.1, there times the batch (`reference_compat`), lets the embeddings of
    hidden_corner collapse."""


@dataclass(frozen=True)
class Config(RolloutConfig):
    """MATE on an environment whose task changes from episode to episode."""

    mode: Literal["none", "oracle", "ind", "cen", "mix"] = "mix"
    """Embeddings: none (MAA2C alone), oracle (none, but the task's number is observed), ind (an encoder per agent), cen
    (one encoder of joint transitions, which acting needs too), mix (as ind, trained as a mixture)."""
    env: str = "hidden_corner"
    """Environment id, see `jaxstack list envs`."""
    num_envs: int = 10
    num_steps: int = 5
    """Rollout length of one update, and rewards in a return."""
    hidden: tuple[int, ...] = (128, 128)
    """Layers of actor and critic. In a recurrent actor a layer of the GRU's width and the GRU replace the first."""
    activation: Activation = "relu"
    gru: int = 128
    """Width of the actors' recurrent states; 0 is feed-forward. Critics are feed-forward."""
    emb_dim: int = 3
    """Numbers in z; the policy reads twice as many, mean and log variance."""
    encoder_hidden: int = 64
    decoder_hidden: tuple[int, ...] = (64, 64)
    mixer_hidden: tuple[int, ...] = (64,)
    deterministic: bool = False
    """Encoders output z itself, without sample and KL."""
    probabilistic: bool = False
    """The decoder predicts means and deviations; its loss is the Gaussian negative log-likelihood."""
    detach: bool = True
    """Off: the policy's loss trains the encoders too."""
    leak: bool = False
    """The embedding reads the transition whose reward it must predict, as in the released code."""
    lose_memory: bool = False
    """The encoders' states are lost after the first step of each rollout, and for ind and mix always, as in the
    released code."""
    reference_compat: bool = False
    """All that the released code does otherwise: `leak`, `lose_memory`, the KL summed over the batch, a gate without
    gradient, the present observation beside the last action in the first step of a rollout, each return's mask one step
    late, time limits taken as terminations."""
    standardise_reward: bool = False
    """Rewards of an update less their mean, by their deviation, for each agent; for the returns alone."""
    anneal_lr: bool = False
    """Learning rates to 0 linearly over the run."""
    adapt_optimiser: Literal["reset", "keep"] = "reset"
    """The optimiser of actors and critics in a run that starts from another: anew, or as it was."""
    hypers: Hypers = Hypers()

    def validate(self) -> None:
        super().validate()
        require_at_least(self, 1, "emb_dim", "encoder_hidden")
        require_at_least(self, 0, "hypers.lr", "hypers.mate_lr", "hypers.ent_coef", "hypers.vf_coef")
        require_at_least(self, 0, "hypers.adam_eps", "hypers.obs_coef", "hypers.reward_coef", "hypers.kl_coef")
        for field in ("decoder_hidden", "mixer_hidden"):
            require(self, field, all(h >= 1 for h in getattr(self, field)), "layer widths >= 1")
        require_unit(self, "hypers.gamma", "hypers.tau")
        require_positive(self, "hypers.mate_max_grad_norm")

    @property
    def embeds(self) -> bool:
        return self.mode in ("ind", "cen", "mix")

    @property
    def leaks(self) -> bool:
        return self.leak or self.reference_compat

    @property
    def forgets(self) -> bool:
        return self.lose_memory or self.reference_compat


class Carry(NamedTuple):
    """What a team remembers between two steps; () where a mode or a feed-forward actor has none."""

    actor: Any
    """[N, A, H]"""
    encoder: Any
    """States [N, E, H] of the encoders before the last transition."""
    seen: Any
    """The last observation and action [N, A, D - 1] as networks read them."""
    reward: Any
    """[N, A] of the last transition."""
    embedding: Any
    """[N, A, W] that the actors read last."""


class Task(NamedTuple):
    """Static: the environment and everything derived from it."""

    cfg: Config
    vec: vector.VecEnv
    inputs: Inputs
    actions: Actions
    action_inputs: Inputs | None
    """How networks read actions; None: as they are."""
    embedder: Embedder | None
    modules: Modules
    shape: TeamSpec
    frozen: bool = False
    """Encoders, decoder and gate are not trained."""

    @property
    def env(self) -> Environment:
        return self.vec.env

    @property
    def count(self) -> int:
        return self.shape.num_agents

    @property
    def joint(self) -> int:
        """Numbers of the critics' view without the embedding."""
        return self.shape.critic_shape[0] - self.width

    @property
    def width(self) -> int:
        return 0 if self.embedder is None else self.embedder.width

    @property
    def net(self) -> dict[str, Any]:
        """`actor` and `critic` over weights with a leading axis of agents; each critic has an input of its own."""
        arch = Arch(self.cfg.hidden, self.cfg.activation, self.cfg.gru)
        return team.per_agent_functions(self.modules, self.shape, arch)


def make_task(cfg: Config, frozen: bool = False) -> Task:
    """The environment with the sizes of all networks; raises `UserError` where they do not fit."""
    env = cfg.make_env()
    env = TaskId(env) if cfg.mode == "oracle" else env
    spec = env.spec
    inputs = inputs_of(spec, vector.start_shapes(env)[1].obs.dtype)
    actions = actions_of(spec)
    read = None if isinstance(spec.action_space, Box) else categories(spec.action_space)
    obs = math.prod(inputs.shape)
    width = math.prod(spec.action_space.shape) if read is None else read.shape[0]
    embedder = None
    if cfg.embeds:
        sizes = spec.obs_sizes if inputs.kind == "real" else ()
        embedder = Embedder(
            cfg.mode,  # pyright: ignore[reportArgumentType]
            spec.num_agents,
            obs,
            width,
            cfg.emb_dim,
            cfg.encoder_hidden,
            cfg.decoder_hidden,
            cfg.mixer_hidden,
            cfg.deterministic,
            cfg.probabilistic,
            sizes,
        )
    extra = 0 if embedder is None else embedder.width
    state = spec.num_agents * obs if spec.state_shape is None else spec.state_dim
    shape = TeamSpec(spec.num_agents, (obs + extra,), (state + extra,), False, actions)
    gain = 2.0**0.5  # on the last layers too, as in the paper's released code
    modules = Modules(
        Torso(1, cfg.gru, activation=cfg.activation),
        MLP(cfg.hidden[1:] if cfg.gru else cfg.hidden, actions.params, cfg.activation, gain),
        Torso(1),
        MLP(cfg.hidden, 1, cfg.activation, gain),
    )
    vec = vector.vectorise(env, cfg.num_envs, cfg.auto_reset, cfg.pool_size)
    return Task(cfg, vec, inputs, actions, read, embedder, modules, shape, frozen)


def start_carry(task: Task, count: int) -> Carry:
    """What a team remembers before its first step in `count` environments."""
    actor = initial_carry(task.cfg.gru, count, task.count)
    e = task.embedder
    if e is None:
        return Carry(actor, (), (), (), ())
    zeros = lambda *shape: jnp.zeros((count, task.count, *shape), jnp.float32)
    return Carry(actor, e.start(count), zeros(e.obs + e.action), zeros(), zeros(e.width))


def observe(
    task: Task, params: Any, carry: Carry, obs: Array, first: Array, forget: Array | bool = False, odd: Any = False
) -> tuple[Any, Array]:
    """Embeddings of the history that `carry` holds the last transition of.

    Args:
        task: The task.
        params: With encoders.
        carry: Of the last step.
        obs: Present observations [N, A, O] as networks read them.
        first: [N] which environments begin an episode: their embedding is 0.
        forget: Whether the encoders begin anew with this transition (`lose_memory`).
        odd: Whether the present observation stands beside the last action (`reference_compat`).

    Returns:
        (states of the encoders [N, E, H], embeddings of the agents [N, A, W]).
    """
    e = task.embedder
    if e is None:
        return (), jnp.zeros((*obs.shape[:2], 0), jnp.float32)
    seen = jnp.where(odd, jnp.concatenate([obs, carry.seen[..., e.obs :]], -1), carry.seen)
    x = jnp.concatenate([seen, carry.reward[..., None]], -1)
    forget = jnp.broadcast_to(jnp.asarray(forget), first.shape)
    h, embedding = e.encode(params["mate"], carry.encoder, x[None], forget[None])
    clear = lambda x: jnp.where(first.reshape(-1, *[1] * (x.ndim - 1)), 0.0, x)
    return clear(h), clear(e.for_agents(embedding[0]))


def flat(task: Task, obs: Array) -> Array:
    """Observations [..., A, *raw] as networks read them [..., A, O] float32."""
    lead = obs.shape[: obs.ndim - len(task.inputs.raw)]
    return task.inputs.encode(obs).astype(jnp.float32).reshape(*lead, -1)


def read_action(task: Task, action: Array) -> Array:
    """Actions [..., A, *shape] as networks read them [..., A, K] float32."""
    if task.action_inputs is not None:
        return task.action_inputs.encode(action)
    return action.astype(jnp.float32)


def distribution(task: Task, weights: Any, raw: Array, action_mask: Array | None) -> TeamDistribution:
    return task.actions.distribution(raw, weights.get("log_std"), action_mask)


def decide(
    task: Task,
    params: Any,
    carry: Carry,
    obs: Array,
    action_mask: Array | None,
    first: Array,
    forget: Array | bool = False,
    odd: Array | bool = False,
) -> tuple[Carry, TeamDistribution]:
    """One step of the team: (what it remembers, without the action that is yet to be chosen; its distribution)."""
    obs = flat(task, obs)
    h, embedding = observe(task, params, carry, obs, first, forget, odd)
    x = jnp.concatenate([obs, embedding], -1)
    actor, raw = task.net["actor"](params["team"], carry.actor, x[None], first[None])
    carry = carry._replace(actor=actor)
    if task.embedder is not None:
        carry = carry._replace(encoder=h, seen=obs, embedding=embedding)
    return carry, distribution(task, params["team"], raw[0], action_mask)


def acted(task: Task, carry: Carry, action: Array) -> Carry:
    """What the team remembers once it has chosen."""
    if task.embedder is None:
        return carry
    return carry._replace(seen=jnp.concatenate([carry.seen, read_action(task, action)], -1))


def rewarded(carry: Carry, reward: Array) -> Carry:
    """The same once the reward [N, A] of the transition is known."""
    return carry if isinstance(carry.reward, tuple) else carry._replace(reward=reward.astype(jnp.float32))


def actor(task: Task, params: Any, greedy: bool = False, training: bool = False) -> tuple[rollout.Act, rollout.Draw]:
    """How to act, and how to draw the random numbers of all steps."""
    cfg = task.cfg

    def draw(key: Key, steps: int) -> tuple[Any, Array]:
        noise = () if greedy else task.actions.noise(key, (steps, task.vec.num_envs, task.count))
        return noise, jnp.arange(steps, dtype=jnp.int32)

    def act(numbers: tuple[Any, Array], carry: Carry, vs: vector.VecState) -> tuple[Carry, Array, tuple]:
        noise, index = numbers
        forget = forgotten(cfg, index, training)
        odd = (index == 0) & training & cfg.reference_compat
        carry = rewarded(carry, vs.ts.reward)
        carry, dist = decide(task, params, carry, vs.ts.obs, vs.ts.action_mask, vs.first, forget, odd)
        action = dist.mode() if greedy else dist.sample_from(noise)
        return acted(task, carry, action), action, ()

    return act, draw


def forgotten(cfg: Config, index: Array, training: bool) -> Array:
    """Whether encoders begin anew in step `index` of a rollout. Right: never but at an episode's start. The released
    code stores their states at index 0 alone, and those of ind and mix never."""
    always = cfg.mode != "cen"
    return jnp.asarray(cfg.forgets) & (always | (training & (index > 0)))


def policy(task: Task) -> Policy:
    """Acting alone. Encoders read rewards: who plays tells them by `Policy.rewarded`."""

    def params(s: Any) -> Any:
        out = {"team": {k: v for k, v in s.params["team"].items() if not k.startswith("critic")}}
        if task.embedder is not None:
            out["mate"] = {k: s.params["mate"][k] for k in ("encoder", "head")}
        return out

    def act(p: Any, carry: Carry, obs: Array, action_mask: Array | None, first: Array, key: Key | None):
        forget = forgotten(task.cfg, jnp.int32(0), False)
        carry, dist = decide(task, p, carry, obs, action_mask, first, forget)
        action = dist.mode() if key is None else dist.sample(key)
        return acted(task, carry, action), action

    return Policy(params=params, init_carry=lambda p, b: start_carry(task, b), act=act, rewarded=rewarded)
