"""D4RL's locomotion tasks (Fu et al., 2020) at full scale: data sets of the user, by path, with the settings of the
released code; policies play in gymnasium's MuJoCo, on the host.

`--data hopper_medium=DIR` is a folder of Minari, or one that holds a single file of D4RL. Returns are normalised by
D4RL's constants. Learners take shapes and bounds of actions from brax, whose tasks have the same; nothing is played
there.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxstack import agents
from jaxstack.claims.harness import Check, Experiment, Row
from jaxstack.core import runner
from jaxstack.core.errors import UserError
from jaxstack.core.job import Moment
from jaxstack.core.runner import RunOptions
from jaxstack.data import minari
from jaxstack.data.files import SUFFIXES
from jaxstack.data.scores import REFERENCES, normalised_score


class Task(NamedTuple):
    """A locomotion task."""

    shapes: str
    """Environment with the same observations and actions."""
    played: str
    """Id of gymnasium, whose rewards and ends are those of D4RL's version 2."""


TASKS = {
    "halfcheetah": Task("brax/halfcheetah", "HalfCheetah-v4"),
    "hopper": Task("brax/hopper", "Hopper-v4"),
    "walker2d": Task("brax/walker2d", "Walker2d-v4"),
}
QUALITIES = ("random", "medium", "medium-replay", "medium-expert", "expert", "full-replay")
NARROW = ("medium", "medium-replay", "full-replay")
"""For which the released code weighs the value more."""
BASES = {"TD3+BC": "TD3+BC", "AC 0": "TD3+BC", "EDAC": "EDAC", "EDAC, AC": "EDAC"}
"""Each arm's base."""
EPISODES, STEPS = 10, 1000
"""Of an evaluation, and the most steps of an episode."""


class Budget(NamedTuple):
    """How much of the released settings is run."""

    share: float = 1.0
    """Of the updates."""
    evaluations: int = 100
    episodes: int = EPISODES
    width: int = 256
    critics: int = 50
    """At most."""


def settings(task: str, quality: str, arm: str, budget: Budget) -> dict[str, Any]:
    """Options of an arm, as the released code and its README have them (Jelley et al., 2024; An et al., 2021)."""
    medium = quality.startswith("medium")
    if BASES[arm] == "TD3+BC":
        alpha = {"halfcheetah": 20.0, "hopper": 10.0, "walker2d": 5.0}[task] if quality in NARROW else 2.5
        updates = (100_000 if task == "halfcheetah" else 500_000) if medium else 1_000_000
        own: dict[str, Any] = dict(base="td3_bc", alpha=alpha)
        pretrain = 10_000
    else:
        many = task == "hopper" or quality == "expert"
        narrow = quality in ("expert", "medium-expert")
        eta = (
            1.0 if task == "hopper" else 5.0 if narrow else 0.0 if (task, quality) == ("halfcheetah", "random") else 1.0
        )
        own = dict(base="edac", num_critics=min(50 if many else 10, budget.critics), eta=eta)
        updates, pretrain = 3_000_000, 20_000
    pretrained = arm != BASES[arm]
    own |= dict(variant="ac" if pretrained else "none", actor_hidden=(budget.width,) * 3)
    own |= dict(critic_hidden=(budget.width,) * (2 if own["base"] == "td3_bc" else 3))
    lengths = dict(num_updates=round(budget.share * updates))
    return own | lengths | dict(pretrain_steps=round(budget.share * pretrain) if pretrained else 0)


def stored(folder: Path) -> str:
    """The data set in a folder. Raises `UserError` where there is none, or several."""
    if minari.find(folder) is not None:
        return str(folder)
    found = sorted(x for x in Path(folder).iterdir() if x.suffix in SUFFIXES)
    if len(found) != 1:
        names = ", ".join(x.name for x in found) or "none"
        raise UserError(f"{folder}: found data sets {names}, expected one, or a folder of Minari")
    return str(found[0])


def player(task: str, learner: Any, episodes: int) -> Callable[[Any], np.ndarray]:
    """(states [S, ...]) -> mean returns [S] of greedy episodes, the same starts for all. Raises `UserError` without
    gymnasium."""
    try:
        import gymnasium
    except ImportError as e:
        raise UserError(f"{TASKS[task].played}: found no gymnasium, expected `pip install 'gymnasium[mujoco]'`") from e
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of newer versions, whose rewards are others
        worlds = [gymnasium.make(TASKS[task].played) for _ in range(episodes)]
    policy = learner.policy
    first = np.zeros(episodes, bool)
    one = lambda p, obs: policy.act(p, policy.init_carry(p, episodes), obs[:, None], None, first, None)[1][:, 0]
    act = jax.jit(lambda s, obs: one(policy.params(s), obs))

    def alone(state: Any) -> float:
        obs = np.stack([w.reset(seed=1000 + i)[0] for i, w in enumerate(worlds)]).astype(np.float32)
        total, alive = np.zeros(episodes), np.ones(episodes, bool)
        for _ in range(STEPS):
            action = np.asarray(act(state, obs))
            for i in np.flatnonzero(alive):
                seen, reward, terminated, truncated, _ = worlds[i].step(action[i])
                obs[i], alive[i] = seen, not (terminated or truncated)
                total[i] += float(reward)
            if not alive.any():
                break
        return float(total.mean())

    def play(states: Any) -> np.ndarray:
        count = len(jax.tree.leaves(states)[0])
        return np.array([alone(jax.tree.map(lambda x, i=i: x[i], states)) for i in range(count)])

    return play


@lru_cache(8)
def curves(
    task: str, quality: str, arm: str, path: str, seeds: tuple[int, ...], budget: Budget
) -> tuple[np.ndarray, np.ndarray]:
    """(updates [K], normalised scores [S, K]) of an arm, pretraining counted."""
    options = settings(task, quality, arm, budget) | dict(dataset=path, env=TASKS[task].shapes)
    method: Any = agents.make("imitate-then-improve", **options)
    every = max(1, int(options["num_updates"]) // budget.evaluations)
    states: dict[str, Any] = {}
    updates, found, before = [], [], 0
    for stage in method.stages:
        learner = stage.make(dict(states))
        play = player(task, learner, budget.episodes)

        def look(now: Moment, play: Callable = play, before: int = before) -> None:
            if now.step % every == 0 or now.step == now.num_steps:
                updates.append(before + now.step)
                found.append(play(now.state))

        run = RunOptions(progress=False, eval_every=-1, chunk=every)
        done = runner.train(learner, stage.steps, list(seeds), options=run, callbacks=[look])
        states[stage.name], before = done.state, before + int(stage.steps or 0)
    scores = np.vectorize(lambda x: normalised_score(x, REFERENCES[task]))
    return np.array(updates), scores(np.stack(found, 1))


def experiment(task: str, quality: str, budget: Budget = Budget()) -> Experiment:
    """All arms on one data set. An arm is measured by its updates to 90% of its base's final score; a seed that does
    not get there counts as one evaluation more than there are."""
    name = f"{task}-{quality}".replace("-", "_")

    def run(arm: str, seeds: tuple[int, ...], **paths: Path) -> Iterator[Row]:
        path = stored(paths[name])
        updates, scores = curves(task, quality, arm, path, seeds, budget)
        its, rivals = curves(task, quality, BASES[arm], path, seeds, budget)
        late = lambda x, share: x[:, -max(1, round(share * x.shape[1])) :]
        goal = 0.9 * late(rivals, 0.2).mean()
        beyond = updates[-1] + updates[-1] / budget.evaluations
        needed = lambda x, at: np.where((x >= goal).any(1), at[(x >= goal).argmax(1)], beyond)
        mine, common = needed(scores, updates), float(np.median(needed(rivals, its)))
        for i, seed in enumerate(seeds):
            yield {
                "seed": seed,
                "final_score": float(late(scores, 0.2)[i].mean()),
                "updates_to_90": float(mine[i]),
                "updates_to_90_by_median_of_base": float(mine[i] / common),
                "late_deviation": float(late(scores, 0.4)[i].std()),
                **{f"score@{u:g}": float(x) for u, x in zip(updates, scores[i])},
            }

    return Experiment(f"D4RL {task}-{quality}", tuple(BASES), run, needs=(name,))


EXPERIMENTS = tuple(experiment(task, quality) for task in TASKS for quality in QUALITIES)
CHECKS = tuple(
    check
    for e in EXPERIMENTS
    for arm, base in BASES.items()
    if arm != base
    for check in (
        Check(e.name, arm, "updates_to_90_by_median_of_base", "share_below", 0.5, target=0.5),
        Check(e.name, arm, "late_deviation", "below", 0.0, other=base, paired=True),
        Check(e.name, arm, "final_score", "above", 0.0, other=base, paired=True, report=True),
    )
)
