"""First imitate, then improve: offline RL that begins from a cloned actor and its critic needs fewer updates.

Data are made here: gymnax/MountainCarContinuous-v0, 300 steps an episode, by a noisy controller that pumps energy, and
by uniformly random actions. Reward comes with the goal alone, so that temporal differences must carry it back over some
200 steps, which returns-to-go do at once.
"""

import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxstack import agents, envs
from jaxstack.agents.imitate_then_improve import counted
from jaxstack.claims import d4rl
from jaxstack.claims.harness import Check, Claim, Curve, Experiment, Row, Scale
from jaxstack.core import stages
from jaxstack.core.runner import RunOptions
from jaxstack.data.files import save_dataset
from jaxstack.data.offline import DatasetInfo, dataset
from jaxstack.envs import rollout, vector
from jaxstack.measures import fitted_q

ENV, ENV_ARGS, HORIZON = "gymnax/MountainCarContinuous-v0", ("max_steps_in_episode=300",), 300
EPISODES = 100
PUSH, JITTER = 0.285, 0.5
"""The controller pushes with PUSH in the direction of the velocity, plus normal noise of deviation JITTER: about 70% of
the episodes reach the goal."""

BASE: dict[str, dict[str, Any]] = {
    "TD3+BC": dict(variant="none"),
    "BC actor": dict(variant="bc"),
    "critic only": dict(variant="critic"),
    "AC 0": dict(variant="ac"),
    "AC 0.5": dict(variant="ac", td_component=0.5),
}
EDAC: dict[str, dict[str, Any]] = {
    "EDAC": dict(base="edac", num_critics=5, variant="none"),
    "EDAC, AC": dict(base="edac", num_critics=5, variant="ac"),
}
ARMS = BASE | EDAC
CHAINS = (
    (5, 0.9),
    (8, 0.9),
    (12, 0.95),
    (16, 0.95),
    (20, 0.97),
    (25, 0.97),
    (30, 0.98),
    (40, 0.98),
    (50, 0.99),
    (80, 0.99),
)
"""(length, discount), one for each seed."""
EPS = 1e-3

Data = Literal["noisy pump", "random"]


class Budget(NamedTuple):
    """What all arms of a scale share."""

    updates: int = 10_000
    pretrain: int = 2_000
    """Among the updates."""
    width: int = 64
    eval_every: int = 500


@lru_cache(4)
def data(kind: Data) -> tuple[str, Any]:
    """(file of the data set, the folder that is removed with the process)."""
    env = envs.make(ENV, **envs.parse_options(ENV_ARGS))
    vec = vector.vectorise(env, EPISODES, auto_reset="exact")

    def act(noise: jax.Array, carry: Any, vs: vector.VecState) -> tuple:
        if kind == "random":
            return carry, noise, ()
        push = PUSH * jnp.sign(vs.ts.obs[..., 1:] + 1e-8)
        return carry, jnp.clip(push + JITTER * noise, -1.0, 1.0), ()

    def draw(key: jax.Array, steps: int) -> jax.Array:
        shape = (steps, EPISODES, 1, 1)
        if kind == "random":
            return jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0)
        return jax.random.normal(key, shape, jnp.float32)

    def play(key: jax.Array) -> Any:
        k_start, key = jax.random.split(key)
        return rollout.collect(vec, act, key, vector.init(vec, k_start), (), HORIZON, draw).steps

    steps = jax.tree.map(np.asarray, jax.jit(play)(jax.random.key(0)))
    # the first episode of each environment, one after another
    first = np.cumsum(steps.done, 0) - steps.done == 0
    rows = lambda x: np.moveaxis(x, 0, 1)[np.moveaxis(first, 0, 1)]
    made = dataset(
        kind,
        DatasetInfo(ENV, ENV_ARGS, kind, seed=0),
        obs=rows(steps.ts.obs[:, :, 0]),
        action=rows(steps.action[:, :, 0]),
        reward=rows(steps.reward[:, :, 0]),
        next_obs=rows(steps.final_obs[:, :, 0]),
        terminated=rows(steps.terminated),
        truncated=rows(steps.truncated),
    )
    folder = tempfile.TemporaryDirectory(prefix="jaxstack-")
    return str(save_dataset(Path(folder.name) / "data.npz", made)), folder


@lru_cache(8)
def curves(arm: str, kind: Data, norm: bool, seeds: tuple[int, ...], budget: Budget) -> tuple[np.ndarray, np.ndarray]:
    """(updates [K], mean returns of ten greedy episodes [S, K]) of an arm, kept for those that are measured by it."""
    options = ARMS[arm] | dict(layer_norm=norm, dataset=data(kind)[0], env=ENV, env_args=ENV_ARGS)
    sizes = dict(actor_hidden=(budget.width,) * 2, critic_hidden=(budget.width,) * 2, batch_size=256, eval_episodes=10)
    lengths = dict(num_updates=budget.updates, pretrain_steps=0 if arm in ("TD3+BC", "EDAC") else budget.pretrain)
    method: Any = agents.make("imitate-then-improve", **options, **sizes, **lengths)
    run = RunOptions(progress=False, eval_every=budget.eval_every, chunk=budget.eval_every)
    result = stages.train(method, list(seeds), options=run)
    goal, _ = result.learner.objective
    table = counted(result.metrics)
    table = table[table[goal].notna()]
    grid = table.pivot_table(index="seed", columns="updates", values=goal).loc[list(seeds)]
    return grid.columns.to_numpy(), grid.to_numpy()


def last(returns: np.ndarray, share: float) -> np.ndarray:
    """The evaluations [S, K'] in the last share of the updates."""
    return returns[:, -max(1, round(share * returns.shape[1])) :]


def experiment(name: str, arms: dict[str, Any], kind: Data, norm: bool, budget: Budget) -> Experiment:
    """Arms on one data set. An arm is measured by its updates, pretraining counted, to 90% of the way from random play
    to the base algorithm's final score; a seed that does not get there counts as one evaluation more than there are."""
    base = next(iter(arms))

    def run(arm: str, seeds: tuple[int, ...]) -> Iterator[Row]:
        updates, returns = curves(arm, kind, norm, seeds, budget)
        _, rivals = curves(base, kind, norm, seeds, budget)
        start = random_return()
        goal = start + 0.9 * (last(rivals, 0.2).mean() - start)
        there = lambda r: np.where((r >= goal).any(1), updates[(r >= goal).argmax(1)], updates[-1] + budget.eval_every)
        needed, common = there(returns), float(np.median(there(rivals)))
        for i, seed in enumerate(seeds):
            yield {
                "seed": seed,
                "final_return": float(last(returns, 0.2)[i].mean()),
                "updates_to_90": float(needed[i]),
                "updates_to_90_by_median_of_base": float(needed[i] / common),
                "mean_return": float(returns[i].mean()),
                "late_deviation": float(last(returns, 0.4)[i].std()),
                **{f"return@{u:g}": float(r) for u, r in zip(updates, returns[i])},
            }

    return Experiment(name, tuple(arms), run)


@lru_cache(1)
def random_return() -> float:
    """Mean return of random play."""
    from jaxstack.data.files import load_dataset

    return float(load_dataset(data("random")[0]).episode_returns().mean())


def gain(budget: Budget) -> Experiment:
    """What AC 0 adds to TD3+BC's mean return over all updates, on both data sets."""

    def run(arm: str, seeds: tuple[int, ...]) -> Iterator[Row]:
        kind: Data = "random" if arm == "random" else "noisy pump"
        mine, base = (curves(a, kind, True, seeds, budget)[1].mean(1) for a in ("AC 0", "TD3+BC"))
        for seed, value in zip(seeds, mine - base):
            yield {"seed": seed, "gain": float(value)}

    return Experiment("gain of AC 0", ("random", "noisy pump"), run)


def chain(arm: str, seeds: tuple[int, ...]) -> Iterator[Row]:
    """Fitted-Q iteration from zero and from the Monte-Carlo estimate, exactly."""
    for seed in seeds:
        length, gamma = CHAINS[seed % len(CHAINS)]
        task = fitted_q.ring(length, gamma)
        zero, mc = (
            fitted_q.iterations(task, q, EPS) for q in (np.zeros(length), fitted_q.monte_carlo(task, 2 * length))
        )
        count, error = zero if arm == "from zero" else mc
        saved = np.log(mc[1] / zero[1]) / np.log(gamma)
        yield {
            "seed": seed,
            "iterations": float(count),
            "off_the_bound": abs(count - fitted_q.predicted(EPS, error, gamma)),
            "savings_off_the_bound": abs(zero[0] - mc[0] - saved),
        }


WITH, WITHOUT, RANDOM, SOFT = "TD3+BC, layer norm", "TD3+BC, no norm", "random data", "EDAC N=5"


def faster(name: str, arm: str, base: str, between: str = "") -> tuple[Check, ...]:
    """The claim's checks of an arm against its base."""
    checks = (
        Check(name, arm, "updates_to_90_by_median_of_base", "share_below", 0.5, target=0.5),
        Check(name, arm, "updates_to_90", "below", 0.0, other=base, paired=True),
        Check(name, arm, "late_deviation", "below", 0.0, other=base, paired=True),
        Check(name, arm, "final_return", "above", 0.0, other=base, paired=True, report=True),
        Check(name, arm, "mean_return", "above", 0.0, other=base, paired=True, report=True),
    )
    if between:
        checks += (
            Check(name, between, "updates_to_90", "below", 0.0, other=base, paired=True),
            Check(name, arm, "updates_to_90", "below", 0.0, other=between, paired=True),
        )
    return checks


def scale(budget: Budget, seeds: int, minutes: float) -> Scale:
    """All experiments with one budget."""
    some = {k: BASE[k] for k in ("TD3+BC", "AC 0")}
    return Scale(
        experiments=(
            experiment(WITH, BASE, "noisy pump", True, budget),
            experiment(RANDOM, some, "random", True, budget),
            gain(budget),
            experiment(WITHOUT, BASE, "noisy pump", False, budget),
            experiment(SOFT, EDAC, "noisy pump", False, budget),
            Experiment("chain", ("from zero", "from Monte-Carlo"), chain),
        ),
        checks=(
            *faster(WITH, "AC 0", "TD3+BC", "BC actor"),
            *faster(WITHOUT, "AC 0", "TD3+BC", "BC actor"),
            *faster(SOFT, "EDAC, AC", "EDAC"),
            *(
                Check(name, arm, "updates_to_90", "below", 0.0, other="TD3+BC", paired=True, report=True)
                for name in (WITH, WITHOUT)
                for arm in ("critic only", "AC 0.5")
            ),
            Check("gain of AC 0", "random", "gain", "below", 0.0, other="noisy pump", paired=True),
            *(Check("chain", arm, "off_the_bound", "at_most", 1.0) for arm in ("from zero", "from Monte-Carlo")),
            Check("chain", "from Monte-Carlo", "savings_off_the_bound", "at_most", 1.0),
        ),
        seeds=seeds,
        minutes=minutes,
    )


FULL = scale(Budget(100_000, 20_000, 256, 2_500), 10, 0.0)

claim = Claim(
    method="imitate-then-improve",
    paper="Jelley, McInroe, Devlin & Storkey (2024)",
    statement=(
        "Starting TD3+BC or EDAC from a cloned actor and a critic regressed on returns-to-go reaches the base "
        "algorithm's score in at most half of its updates, pretraining counted, and is steadier; cloning the actor "
        "alone lies between; on random data the gain shrinks."
    ),
    scope=(
        "One sparse task with data of a noisy controller and of random play, small networks. D4RL's tasks are played "
        "at full scale alone, where their data are given by path. Exact fitted-Q iterations on a chain."
    ),
    scales={
        "small": scale(Budget(), 10, 59.0),
        "full": FULL._replace(experiments=(*FULL.experiments, *d4rl.EXPERIMENTS), checks=(*FULL.checks, *d4rl.CHECKS)),
    },
    baselines=("TD3+BC", "EDAC"),
    ours="AC",
    curves=tuple(Curve(name, "return", "updates", "linear") for name in (WITH, WITHOUT, SOFT)),
)
