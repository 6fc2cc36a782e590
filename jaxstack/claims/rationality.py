"""Rationality: DQN trained in cliff walking with randomised actions, deployed without; and the theory in random MDPs.

Small scale: 48,000 steps with a horizon of 200, a gradient step every 4 steps. `full`: cliff walking and taxi with the
sizes of the paper.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxstack import agents, envs
from jaxstack.agents import dqn
from jaxstack.claims.harness import Check, Claim, Curve, Experiment, Row, Scale
from jaxstack.core import cache
from jaxstack.measures import rationality
from jaxstack.report import stats

# (mean eps of training, further options of the agent)
PLAIN = {f"eps {eps:g}": (eps, {}) for eps in (0.0, 0.1, 0.3, 0.5, 0.7)}
MATCHED = {
    "eps 0.2": (0.2, {}),
    "DR": (0.2, {"env_args": ("eps_spread=0.1",)}),
    "L2 1e-3": (0.2, {"l2": 1e-3}),
    "LN": (0.2, {"norm": "layer"}),
    "WN": (0.2, {"norm": "weight"}),
}
WEAKER = {f"L2 1e-{k}": (0.2, {"l2": 10.0**-k}) for k in (4, 5, 6, 7)}
LAST = 10
"""Checkpoints at the end whose mean decides: a single greedy policy reaches the goal or is stuck for ever."""

EVERY_NTH = 4
"""Of the checkpoints, those that curves show."""


def learner_of(arm: tuple[float, dict[str, Any]], env: str, horizon: int, **options: Any) -> Any:
    """DQN with the paper's sizes: a network of 128-128, gamma 1, batches of 64, targets copied every 500 steps."""
    eps, own = arm
    args = (f"horizon={horizon}", f"eps={eps}", *own.get("env_args", ()))
    return agents.make("dqn", env=env, gamma=1.0, **(options | own | {"env_args": args}))


def checkpoints(learner: Any, seeds: tuple[int, ...], points: int) -> Iterator[tuple[int, Any]]:
    """(environment steps, states [K, ...]) at so many equal distances of a run."""
    cache.enable()
    keys = jnp.stack([jax.random.key(s) for s in seeds])
    state = jax.jit(jax.vmap(lambda key: learner.init(key)))(keys)
    each = learner.num_steps // points
    some = lambda s: jax.lax.scan(lambda s, _: (learner.step(s)[0], None), s, None, length=each)[0]
    advance = jax.jit(jax.vmap(some), donate_argnums=0)
    for k in range(1, points + 1):
        state = advance(state)
        yield k * each * learner.samples_per_step, state


def training(
    name: str, env: str, arms: dict[str, tuple[float, dict[str, Any]]], horizon: int, points: int, **options: Any
) -> Experiment:
    """Train, and measure the greedy policy of every checkpoint in the environment without randomisation.

    R is exact. Rhat judges the checkpoint's policy on the whole episodes among the last half of the run's number of
    steps (and what the buffer holds of them). `gap`, `R`, `Rhat` and `return` are means over the last 10 checkpoints,
    `final ...` those of the last one, `gap@x` and `return@x` those after x steps, `correlation` is Pearson's over the
    checkpoints.
    """

    def run(arm: str, seeds: tuple[int, ...]) -> Iterator[Row]:
        learner = learner_of(arms[arm], env, horizon, **options)
        deployment = envs.make(env, horizon=horizon)
        assert isinstance(deployment, rationality.TableEnv)
        steps, reports = [], []
        for step, state in checkpoints(learner, seeds, points):
            stored = dqn.stored_episodes(learner, state, newest=learner.config.total_steps // 2)
            steps.append(step)
            reports.append(rationality.of_learner(learner, state, deployment, states=stored))
        curves = rationality.Report(*(np.stack(x) for x in zip(*reports, strict=True)))  # [points, K]
        names = {"R": curves.expected, "Rhat": curves.empirical, "gap": curves.gap, "return": curves.returns}
        for k, seed in enumerate(seeds):
            row: Row = {"seed": seed}
            row |= {n: float(x[-LAST:, k].mean()) for n, x in names.items()}
            row |= {f"final {n}": float(x[-1, k]) for n, x in names.items()}
            # no correlation where a seed never leaves the start
            varies = np.ptp(curves.returns[:, k]) > 0
            found = stats.pearson(curves.gap[:, k], curves.returns[:, k]).value if varies else np.nan
            row["correlation"] = float(found)
            for n in ("gap", "return"):
                some = list(zip(steps, names[n][:, k], strict=True))[EVERY_NTH - 1 :: EVERY_NTH]
                row |= {f"{n}@{t}": float(x) for t, x in some}
            yield row

    return Experiment(name, tuple(arms), run)


RANDOM, GRID = "random MDPs", "cliff walking tables"


def theory(draws: int) -> Experiment:
    """Bounds and identities with exact constants. `violations`: how many of Lemma 2, Theorems 1 to 3 and Corollary 6
    fail in so many pairs of random MDPs; `error`: the largest error of an identity; `looseness`: the bound of Theorem
    3 over the gap, median; `linearity`: of the extrinsic part in small eps."""

    def random(seed: int) -> Row:
        rng, horizon = np.random.default_rng(seed), 4
        cost = np.abs(np.subtract.outer(np.arange(5), np.arange(5))).astype(float)
        violations, error, loose = 0, 0.0, []
        for key in jax.random.split(jax.random.key(seed), draws):
            there = rationality.random_mdp(rng)
            here = rationality.random_mdp(rng, like=there, share=rng.uniform(0.01, 1.0))
            found = rationality.values(there, here, horizon, temperature=1e-12)
            policies = rng.dirichlet(np.ones(3), (4, horizon, 5))
            states = rationality.simulate(key, here, policies[0], horizon, 20)
            b = rationality.bounds_of(found, there, here, policies[0], policies, states, cost, key)
            lemma = 2 * (b.extrinsic + b.intrinsic)
            pairs = (
                (b.gap, b.theorem3),
                (b.gap, lemma),
                (b.extrinsic, b.theorem1),
                (b.intrinsic, b.theorem2),
                (b.asymptotic_gap, b.corollary6),
            )
            violations += sum(value > bound + 1e-8 for value, bound in pairs)
            loose.append(b.theorem3 / b.gap)
            error = max(error, difference(there, found, policies, horizon), *line(rng, cost))
        return {"violations": float(violations), "error": error, "looseness": float(np.median(loose))}

    def difference(base: Any, found: Any, policies: Any, horizon: int) -> float:
        """R = V*(start) - V^pi(start), the performance-difference identity."""
        best = rationality.expected_return(base, found.rational, horizon)
        lost = best - rationality.expected_return(base, policies, horizon)
        return float(np.abs(rationality.expected_risk(found, base, policies) - lost).max())

    def line(rng: np.random.Generator, cost: np.ndarray) -> list[float]:
        """On a line W1 is the distance of the distribution functions; with the 0/1 metric it is the total variation."""
        mu, nu = rng.dirichlet(np.ones(5), 2)
        want = np.abs(np.cumsum(mu - nu)).sum(), rationality.total_variation(mu, nu)
        got = [rationality.wasserstein1(mu, nu, c) for c in (cost, rationality.discrete_metric(5))]
        return [float(abs(a - b)) for a, b in zip(got, want)]

    def grid(seed: int) -> Row:
        rng, horizon, cliff = np.random.default_rng(seed), 30, envs.make("cliff_walking")
        assert isinstance(cliff, rationality.TableEnv)
        base = rationality.mdp_of(cliff)
        found, actions = rationality.values(base, base, horizon), rng.integers(0, 4, (horizon, 49))
        states = rationality.simulate(jax.random.key(seed), base, actions, horizon, 1)
        risk = rationality.expected_risk(found, base, actions)
        slippery = rationality.mdp_of(cliff, 0.1)
        apart = rationality.total_variation(base.kernel, slippery.kernel).max()
        errors = [
            rationality.backward_induction(base, horizon)[0, 36].max() + 13.0,
            rationality.gap(risk, rationality.empirical_risk(found, base, actions, states)),
            rationality.expected_risk(found, base, found.rational),
            rationality.expected_risk(found, base, found.rational, law="rational"),
            apart - 0.1 * (1.0 - 1.0 / 4.0),
            difference(base, found, actions, horizon),
        ]
        parts = []
        for eps in (1e-3, 1e-4):
            here = rationality.mdp_of(cliff, eps)
            values = rationality.values(base, here, horizon)
            parts.append(rationality.extrinsic_gap(values, base, here, actions) / eps)
        return {"violations": 0.0, "error": max(abs(float(e)) for e in errors), "linearity": parts[0] / parts[1]}

    def run(arm: str, seeds: tuple[int, ...]) -> Iterator[Row]:
        for seed in seeds:
            yield {"seed": seed} | (random(seed) if arm == RANDOM else grid(seed))

    return Experiment("theory", (RANDOM, GRID), run)


def checks(name: str, weaker: bool = False) -> tuple[Check, ...]:
    """Growth with eps by the mean of the last 10 checkpoints decides; single policies are shown beside."""
    steps = list(zip(("eps 0.3", "eps 0.5", "eps 0.7"), ("eps 0.1", "eps 0.3", "eps 0.5")))
    regularised = ("L2 1e-3", *(WEAKER if weaker else ()))
    return (
        *(Check(name, high, "gap", "times_at_least", 1.3, other=low) for high, low in steps),
        Check(name, "DR", "gap", "times_at_most", 1.0, other="eps 0.2"),
        *(Check(name, high, "final gap", "times_at_least", 1.3, other=low, report=True) for high, low in steps),
        Check(name, "DR", "final gap", "times_at_most", 1.0, other="eps 0.2", report=True),
        *(Check(name, arm, "gap", "times_at_most", 0.85, other="eps 0.2", report=True) for arm in regularised),
        *(Check(name, arm, "gap", "times_at_most", 1.0, other="eps 0.2", report=True) for arm in ("LN", "WN")),
        # R and Rhat beside the gap
        Check(name, "eps 0", "R", "at_least", 0.0, report=True),
        Check(name, "eps 0.7", "Rhat", "at_most", 0.0, report=True),
        Check(name, "eps 0.1", "correlation", "at_most", 0.0, report=True),
    )


THEORY = (
    Check("theory", RANDOM, "violations", "at_most", 0.0),
    Check("theory", RANDOM, "error", "at_most", 1e-8),
    Check("theory", GRID, "error", "at_most", 1e-8),
    Check("theory", GRID, "linearity", "near", 0.02, target=1.0),
)
SMALL, CLIFF, TAXI = "cliff walking, 48k steps", "cliff walking, 500k steps", "taxi, 500k steps"
EVERY = PLAIN | MATCHED
BIG = dict(horizon=500, points=50, total_steps=500_000, rounds=500, train_every=1)

claim = Claim(
    method="rationality",
    paper="Qian, Storkey & He (ICML 2026)",
    statement=(
        "In cliff walking the rational risk gap of DQN grows with the randomisation of actions in training, at least "
        "1.3x each from eps .1 to .3, .5 and .7, and is no larger with domain randomisation than at the same mean eps. "
        "Theorems 1 to 3 and Corollary 6 hold in 200 random MDPs with exact constants."
    ),
    scope=(
        "48,000 steps with a horizon of 200 at small scale. The training value is the paper's, that of the policy that "
        "is optimal in deployment: at large eps the gap measures mainly how far this value shifts. That "
        "regularisers shrink the gap, the paper's direction, is reported with its intervals and decides nothing."
    ),
    scales={
        "small": Scale(
            experiments=(
                theory(20),
                training(SMALL, "cliff_walking", EVERY, horizon=200, points=48, total_steps=48_000),
            ),
            checks=(*THEORY, *checks(SMALL)),
            seeds=10,
            minutes=18.0,
        ),
        "full": Scale(
            experiments=(
                theory(20),
                training(CLIFF, "cliff_walking", EVERY | WEAKER, **BIG),
                training(TAXI, "taxi", EVERY | WEAKER, **BIG),
            ),
            checks=(*THEORY, *checks(CLIFF, weaker=True), *checks(TAXI, weaker=True)),
            seeds=5,
        ),
    },
    baselines=("eps 0.2",),
    curves=tuple(
        Curve(name, metric, "environment steps", "linear")
        for name in (SMALL, CLIFF, TAXI)
        for metric in ("gap", "return")
    ),
)
