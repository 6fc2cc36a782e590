"""Probes of Dec-POMDP reasoning: they light where they are designed to, and history dependence is not utility.

Small scale: scripted processes with known answers, and two tasks of one size that differ in what their reward needs.
"""

from collections.abc import Iterator

import jax

from jaxstack import agents, envs
from jaxstack.claims.harness import Check, Claim, Experiment, Row, Scale
from jaxstack.core.runner import RunOptions, train
from jaxstack.measures import conventions, probes
from jaxstack.measures.scripted import SCRIPTS, scripted

OPTIONS = RunOptions(progress=False)


def processes(window: int) -> Experiment:
    """The five probes of each scripted process, 200 episodes of 12 steps; a seed draws the process anew.

    A window of k bits splits the 125 candidates of a posterior into 2^k values: with k = 3 fewer rows than the 25
    neighbours have one value, and which others fill the posterior is decided by columns' sample deviations.
    """

    def run(arm: str, seeds: tuple[int, ...]) -> Iterator[Row]:
        for seed in seeds:
            traj = scripted(arm, jax.random.key(seed))
            settings = probes.Settings(alpha=0.01, window=window, null_reps=200, slow_null_reps=20, seed=seed)
            found = probes.audit(traj, settings)
            yield {"seed": seed} | {n: p.norm for n, p in found.items()} | {f"p of {n}": p.p for n, p in found.items()}

    return Experiment(f"scripted, window {window}", SCRIPTS, run)


def memory(name: str, steps: int) -> Experiment:
    """Independent PPO without sharing, feed-forward and recurrent, then the probes of its greedy play.

    `return` is the mean reward per step of 256 greedy episodes.
    """

    def run(arm: str, seeds: tuple[int, ...]) -> Iterator[Row]:
        learner = agents.make(
            "ippo",
            env=name,
            sharing="none",
            gru=32 if arm == "RNN" else 0,
            hidden=(32,) if arm == "RNN" else (32, 32),
            num_envs=16,
            num_steps=128,
            total_steps=steps,
            lr=1e-3,
            eval_episodes=256,
        )
        result = train(learner, seeds=seeds, options=OPTIONS)
        last = result.metrics[result.metrics.step == result.metrics.step.max()]
        scores = {int(s): float(v) for s, v in zip(last["seed"], last[learner.objective[0]])}
        played = conventions.record(learner, result.state, envs.make(name), jax.random.key(1), episodes=200)
        for seed, traj in zip(seeds, played):
            found = probes.audit(traj, probes.Settings(null_reps=200, slow_null_reps=20, seed=seed), ("OAR", "HAR"))
            har = found["HAR"]
            yield {
                "seed": seed,
                "return": scores[seed] / 16,
                "OAR": found["OAR"].norm,
                "HAR": har.norm,
                "HAR bits": har.bits,
                "HAR over null": har.norm - float(har.null.mean()),
                "p of HAR": har.p,
            }

    return Experiment(name, ("FF", "RNN"), run)


NOW, LAST = "match_now", "repeat_last"


def lights(name: str) -> tuple[Check, ...]:
    """What the card's table says of each process."""
    near = lambda arm, probe: Check(name, arm, probe, "at_least", 0.98)
    off = lambda arm, probe, value: Check(name, arm, probe, "at_most", value)
    return (
        near("reactive", "OAR"),
        off("reactive", "HAR", 0.01),
        near("memory", "HAR"),
        off("memory", "OAR", 0.02),
        near("sync", "AA"),
        off("sync", "DAI", 0.06),
        near("temporal", "DAI"),
        off("temporal", "AA", 0.04),
        *(off("independent", probe, 0.07) for probe in ("OAR", "HAR", "PIF", "AA", "DAI")),
    )


def scale(steps: int, seeds: int, minutes: float) -> Scale:
    """Probe validity with windows that the estimator can resolve and with the released three steps, then the gap."""
    two, three = processes(2), processes(3)
    return Scale(
        experiments=(two, three, memory(LAST, steps), memory(NOW, steps)),
        checks=(
            *lights(two.name),
            *(c._replace(report=True) for c in lights(three.name)),
            Check(two.name, "temporal", "PIF", "at_least", 0.1, report=True),
            Check(LAST, "RNN", "return", "signed_rank", 0.032, other="FF", paired=True),
            Check(LAST, "RNN", "return", "above", 0.1, other="FF", paired=True),
            Check(LAST, "RNN", "return", "share", 1.0, target=0.6),
            Check(NOW, "RNN", "return", "within", 0.02, other="FF", paired=True),
            Check(LAST, "RNN", "HAR over null", "at_least", 0.01),
            Check(NOW, "RNN", "HAR over null", "at_least", 0.01),
        ),
        seeds=seeds,
        minutes=minutes,
    )


claim = Claim(
    method="decpomdp-probes",
    paper="Tessera, Hinckeldey, Zamboni, Abel & Storkey (AAMAS 2026)",
    statement=(
        "Five information-theoretic probes light up only on the behaviour they are meant for; recurrent policies "
        "depend on history both where memory pays and where it does not."
    ),
    scope=(
        "Six scripted processes of two agents and two small tasks of this project; the 37 scenarios of the paper need "
        "an accelerator."
    ),
    scales={"small": scale(300_000, 5, 19.0), "full": scale(1_000_000, 10, 0.0)},
    baselines=("FF",),
    ours="RNN",
)
