"""Data sets made here: a behaviour is trained by PPO, DQN or SAC, and its episodes are recorded.

The same environment, quality, behaviour, seed and lengths give the same bytes. `random` plays uniformly; `expert` is
the trained policy; `medium` the policy of the first update whose score, between random play (0) and the expert (1),
reaches a third. `medium-replay` shares the episodes among policies on the way there, evenly spaced over the updates;
`medium-expert` has the episodes of both, as many transitions of each. Trained policies play as they were trained, by
sampling, DQN's with the exploration of its update; the log-probability of each action is recorded.
"""

import functools
import hashlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np

from jaxstack import envs
from jaxstack.agents import dqn, ppo, sac
from jaxstack.agents.team_ppo import Hypers
from jaxstack.core.errors import UserError
from jaxstack.core.learner import Key, Learner, Metrics, Policy
from jaxstack.core.runner import RunOptions, train
from jaxstack.data.offline import DatasetInfo, OfflineDataset, dataset
from jaxstack.envs import rollout, vector
from jaxstack.envs.base import Box, Discrete, Environment, uniform_log_prob

Quality = Literal["random", "medium-replay", "medium", "medium-expert", "expert"]
MEDIUM = 1 / 3
"""Share of the way from random play to the expert."""
SCORED = 100
"""Episodes behind the reference scores."""
ENVS, LENGTH = 16, 256
"""Environments and steps of an update of PPO."""
ROUNDS, EVERY = 100, 2
"""Gradient steps of an update of DQN and of SAC; environment steps between those of DQN."""
PLAY, SCORE, REPLAY = 1, 2, 3
"""Streams of keys: recorded episodes, those of the reference scores, and those of the policies before medium."""
POLICIES = 5
"""Of medium-replay, the last of them medium's."""


class Behaviour(NamedTuple):
    """A learner whose policies are recorded."""

    make: Callable[[str, tuple[str, ...], int], Learner]
    """(environment, its options, environment steps) -> learner. Nothing in it but its number of steps depends on the
    length of a run, so that a shorter run is the beginning of a longer one."""
    steps: int
    """Environment steps of a training, unless another number is asked for."""
    update: Callable[[], int]
    """Environment steps of an update, the least that can be asked for."""


def collect(
    env: str,
    quality: Quality,
    seed: int = 0,
    *,
    env_args: tuple[str, ...] = (),
    behaviour: str = "ppo",
    episodes: int = 100,
    steps: int | None = None,
) -> OfflineDataset:
    """Record episodes of a behaviour.

    Args:
        env: Id of an environment with one agent.
        quality: random, medium-replay, medium, medium-expert or expert.
        seed: Of training and of play.
        env_args: Options of the environment, each `name=value`.
        behaviour: What is trained: ppo, dqn (a fixed number of actions) or sac (real actions in finite bounds).
        episodes: Number of recorded episodes, for medium-expert of each policy.
        steps: Environment steps of the training; default: `BEHAVIOURS[behaviour].steps`. The expert is the last policy.

    Returns:
        The data set; `info` holds the scores of random play and, where a behaviour was trained, of the expert.

    Raises:
        UserError: For wrong arguments, an environment with several agents or without a horizon, an expert that is not
            better than random play, or a training that no update of which is past a third.
    """
    if quality not in get_args(Quality):
        raise UserError(f"quality={quality!r}: expected one of {', '.join(get_args(Quality))}")
    if behaviour not in BEHAVIOURS:
        raise UserError(f"behaviour={behaviour!r}: expected one of {', '.join(BEHAVIOURS)}")
    if episodes < 1:
        raise UserError(f"episodes={episodes}: expected at least 1")
    trainer = BEHAVIOURS[behaviour]
    steps = trainer.steps if steps is None else steps
    if steps < trainer.update():
        raise UserError(f"steps={steps}: expected at least {trainer.update()}, an update of {behaviour}")
    task = envs.make(env, **envs.parse_options(env_args))
    if task.spec.num_agents != 1 or task.spec.horizon is None:
        raise UserError(f"env={env!r}: expected one agent and a horizon, found {task.spec.num_agents} agents")
    key = jax.random.key(seed)
    random = _score(task, None, (), key)
    if quality == "random":
        source = f"{SCORED} episodes of random play"
        info = DatasetInfo(env, env_args, quality, random, score_source=source, seed=seed)
        return _record(task, None, (), key, episodes, info)
    name, learner = behaviour.upper(), trainer.make(env, env_args, steps)
    run = lambda count: train(learner, count, [seed], options=RunOptions(progress=False, eval_every=1))
    whole = run(learner.num_steps)
    assert learner.policy is not None
    expert = _score(task, learner.policy, _params(learner, whole.state), key)
    if expert <= random:
        raise UserError(
            f"{env}: {name} earns {expert:.4g} after {steps} steps, expected more than random play, {random:.4g}"
        )
    played = {"expert": whole.state}
    if quality != "expert":
        returns = whole.metrics["eval/return"].to_numpy()
        past = returns >= random + MEDIUM * (expert - random)
        if not past.any():
            raise UserError(
                f"{env}: {name} earns at most {returns.max():.4g}, expected a third of {random:.4g} to {expert:.4g}"
            )
        # the beginning of the run above
        last = int(past.argmax()) + 1
        if quality == "medium-replay":
            before = np.unique(np.linspace(1, last, POLICIES).round().astype(int))
            played = {str(count): run(int(count)).state for count in before}
        else:
            played["medium"] = run(last).state
            played = {name: played[name] for name in ("medium", "expert") if name in quality}
    params = [_params(learner, state) for state in played.values()]
    source = f"{SCORED} episodes of random play and of {name} after {steps} steps"
    info = DatasetInfo(env, env_args, quality, random, expert, source, seed, _digest(params))
    if quality == "medium-replay":
        counts = [len(x) for x in np.array_split(np.arange(episodes), len(params))]
        keys = [jax.random.fold_in(jax.random.fold_in(key, REPLAY), i) for i in range(len(params))]
        return joined([_record(task, learner.policy, *x, info) for x in zip(params, keys, counts) if x[-1]])
    parts = [_record(task, learner.policy, p, key, episodes, info) for p in params]
    return joined([shortened(part, min(p.size for p in parts)) for part in parts])


def choices(env: str, env_args: tuple[str, ...] = ()) -> Any:
    """What an agent of an environment can do, for `save_dataset`: lowest and highest real action, or how many there
    are."""
    space = envs.make(env, **envs.parse_options(env_args)).spec.action_space
    if isinstance(space, Box):
        return space.low, space.high
    return space.n if isinstance(space, Discrete) else space.nvec


def joined(parts: list[OfflineDataset]) -> OfflineDataset:
    """One data set of several with the same fields, their episodes numbered on."""
    arrays = {k: np.concatenate([p.arrays()[k] for p in parts]) for k in parts[0].arrays()}
    before = np.cumsum([0, *(int(p.episode[-1]) + 1 for p in parts[:-1])])
    arrays["episode"] = np.concatenate([p.episode + n for p, n in zip(parts, before)]).astype(np.int32)
    return parts[0]._replace(**arrays)


def shortened(data: OfflineDataset, rows: int) -> OfflineDataset:
    """The whole episodes that end within the first `rows` rows; at least one."""
    ends = np.flatnonzero(data.ends) + 1
    kept = ends[max(0, int((ends <= rows).sum()) - 1)]
    return data._replace(**{k: v[:kept] for k, v in data.arrays().items()})


def _ppo(env: str, env_args: tuple[str, ...], steps: int) -> Learner:
    """PPO for any small task, its learning rate constant."""
    config = ppo.Config(
        env=env,
        env_args=env_args,
        total_steps=steps,
        num_envs=ENVS,
        num_steps=LENGTH,
        num_minibatches=8,
        num_epochs=8,
        anneal_lr=False,
        normalise_obs=isinstance(envs.make(env, **envs.parse_options(env_args)).spec.observation, Box),
        normalise_reward=True,
        eval_greedy=False,
        eval_episodes=32,
        hypers=Hypers(lr=1e-3, gamma=0.95, ent_coef=0.0),
    )
    return ppo.ppo(config)


def _dqn(env: str, env_args: tuple[str, ...], steps: int) -> Learner:
    """Double DQN with a dueling head."""
    options: dict[str, Any] = dict(rounds=ROUNDS, train_every=EVERY, double=True, dueling=True, batch_size=128)
    options |= dict(eval_episodes=32, hypers=dqn.Hypers(lr=3e-4))
    learner = dqn.dqn(dqn.Config(env=env, env_args=env_args, total_steps=steps, **options))
    return _as_played(learner)._replace(with_length=None)  # exploration falls over `steps`, however few are run


def _sac(env: str, env_args: tuple[str, ...], steps: int) -> Learner:
    """Soft actor-critic."""
    config = sac.Config(env=env, env_args=env_args, total_steps=steps, rounds=ROUNDS, eval_episodes=32)
    return _as_played(sac.sac(config))


BEHAVIOURS = {
    "ppo": Behaviour(_ppo, 500_000, lambda: ENVS * LENGTH),
    "dqn": Behaviour(_dqn, 100_000, lambda: ROUNDS * EVERY),
    "sac": Behaviour(_sac, 20_000, lambda: ROUNDS),
}


def _as_played(learner: Learner) -> Learner:
    """A learner that is evaluated as its episodes are recorded, with its exploration."""
    policy, task = learner.policy, learner.env
    assert policy is not None

    def evaluate(state: Any, key: Key) -> Metrics:
        count = learner.config.eval_episodes
        vec, params = vector.vectorise(task, count), policy.params(state)
        act, draw = _act(policy, params, vec)
        return rollout.evaluate(vec, act, key, policy.init_carry(params, count), task.spec.horizon, draw)

    return learner._replace(evaluate=evaluate)


def _params(learner: Any, state: Any) -> Any:
    return learner.policy.params(jax.tree.map(lambda x: x[0], state))


def _digest(params: Any) -> str:
    """First 16 hex digits of the SHA-256 of the weights."""
    total = hashlib.sha256()
    for x in jax.tree.leaves(params):
        total.update(np.ascontiguousarray(x).tobytes())
    return total.hexdigest()[:16]


def _act(policy: Policy | None, params: Any, vec: vector.VecEnv) -> tuple[Any, Any]:
    """How a behaviour acts in `rollout`, and its random numbers; extras are the log-probabilities of its actions."""
    if policy is None:
        uniform, draw = rollout.random_policy(vec)

        def random(noise: jax.Array, carry: Any, vs: vector.VecState) -> tuple[Any, jax.Array, jax.Array]:
            log_prob = uniform_log_prob(vec.env.spec, (vec.num_envs,), vs.ts.action_mask)
            return *uniform(noise, carry, vs)[:2], log_prob

        return random, draw
    sample = policy.sample
    assert sample is not None

    def act(key: jax.Array, carry: Any, vs: vector.VecState) -> tuple[Any, jax.Array, jax.Array]:
        return sample(params, carry, vs.ts.obs, vs.ts.action_mask, vs.first, key)

    return act, jax.random.split


def _score(task: Environment, policy: Policy | None, params: Any, key: jax.Array) -> float:
    """Mean return of a behaviour."""
    return float(_mean_return(task, policy, params, jax.random.fold_in(key, SCORE), SCORED))


@functools.partial(jax.jit, static_argnames=("task", "policy", "episodes"))
def _mean_return(task: Environment, policy: Policy | None, params: Any, key: jax.Array, episodes: int) -> jax.Array:
    vec = vector.vectorise(task, episodes)
    act, draw = _act(policy, params, vec)
    carry = () if policy is None else policy.init_carry(params, episodes)
    return rollout.episodes(vec, act, key, carry, task.spec.horizon or 1, draw).returns.mean()


@functools.partial(jax.jit, static_argnames=("task", "policy", "episodes"))
def _played(
    task: Environment, policy: Policy | None, params: Any, k_start: jax.Array, k_play: jax.Array, episodes: int
) -> rollout.Step:
    """As many steps of each environment as an episode can have; one program for all weights of a policy."""
    vec = vector.vectorise(task, episodes, auto_reset="exact")
    act, draw = _act(policy, params, vec)
    carry = () if policy is None else policy.init_carry(params, episodes)
    vs = vector.init(vec, k_start)
    return rollout.collect(vec, act, k_play, vs, carry, task.spec.horizon or 1, draw).steps


def _record(
    task: Environment, policy: Policy | None, params: Any, key: jax.Array, episodes: int, info: DatasetInfo
) -> OfflineDataset:
    """The first episode in each of so many environments, one after another."""
    k_start, k_play = jax.random.split(jax.random.fold_in(key, PLAY))
    steps = jax.tree.map(np.asarray, _played(task, policy, params, k_start, k_play, episodes))
    first = (np.cumsum(steps.done, 0) - steps.done == 0).T
    rows = lambda x: np.moveaxis(x, 0, 1)[first]
    return dataset(
        info.env,
        info,
        obs=rows(steps.ts.obs[:, :, 0]),
        action=rows(steps.action[:, :, 0]),
        reward=rows(steps.reward[:, :, 0]),
        next_obs=rows(steps.final_obs[:, :, 0]),
        terminated=rows(steps.terminated),
        truncated=rows(steps.truncated),
        log_prob=rows(steps.extras[:, :, 0]),
    )
