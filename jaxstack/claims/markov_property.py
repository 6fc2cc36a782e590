"""Markov property: co-adapting pairs settle on conventions; the same learners ground their behaviour where they must.

The case study (follow_partner) is this project's: that of Tessera et al. (2025) is not public.
"""

from collections.abc import Iterator

import jax
import numpy as np

from jaxstack import agents, envs
from jaxstack.claims.harness import Check, Claim, Experiment, Row, Scale
from jaxstack.core.runner import RunOptions, train
from jaxstack.measures import conventions, partners, probes

OPTIONS = RunOptions(progress=False, eval_every=-1)
SYMBOLS, TYPES, HORIZON = 4, 2, 16
OPTIMUM = (1 / SYMBOLS + 1 / TYPES + HORIZON - 2) / HORIZON
"""Mean reward per step of the best reply to the grounded partner."""

ARMS = {"GRU": {"gru": 64, "hidden": (64,)}, "FF": {"hidden": (64, 64)}}


def learner_of(arm: str, partner: str, updates: int):
    """Independent PPO with the card's sizes: 64 episodes of 16 steps per update, gamma 0, as actions do not influence
    what comes later."""
    return agents.make(
        "ippo",
        env="follow_partner",
        env_args=(f"partner={partner}",),
        sharing="none",
        activation="relu",
        num_envs=64,
        num_steps=HORIZON,
        num_epochs=4,
        num_minibatches=1,
        total_steps=64 * HORIZON * updates,
        anneal_lr=False,
        lr=2e-3,
        gamma=0.0,
        lam=0.0,
        ent_coef=0.01,
        **ARMS[arm],
    )


def regime(name: str, partner: str, updates: int) -> Experiment:
    """Train pairs with `partner`, then audit them in play with themselves, each other and grounded partners."""

    def run(arm: str, seeds: tuple[int, ...]) -> Iterator[Row]:
        learner = learner_of(arm, partner, updates)
        result = train(learner, seeds=seeds, options=OPTIONS)
        env = envs.make("follow_partner")
        # the grounded partner as the environment draws it: the mean over its types
        zoo = {f"type {k}": partners.grounded(k, SYMBOLS) for k in range(TYPES)}
        report = conventions.audit(env, learner, result.state, zoo, key=jax.random.key(1), settings=probes.Settings())
        grounded = np.mean(list(report.partners.values()), axis=0)
        index = conventions.convention_index(report.self_play, grounded, 1 / SYMBOLS)
        for k, row in enumerate(report.rows()):
            yield {
                "seed": seeds[k],
                "self_play": row["self-play"],
                "self_play_sampled": row["self-play, sampled"],
                "cross_play": row["cross-play"],
                "grounded_partner": float(grounded[k]),
                "convention_index": float(index[k]),
                "groundedness": float(conventions.groundedness(grounded[k], 1 / SYMBOLS, OPTIMUM)),
                "most_used_action": row["most used action"],
                "OAR": row["OAR"],
                "HAR": row["HAR"],
                "AA": row["AA"],
            }

    return Experiment(name, tuple(ARMS), run)


A, B = "self-play", "grounded partner"


def scale(first: int, second: int, seeds: int, minutes: float) -> Scale:
    """Both regimes with so many updates."""
    return Scale(
        experiments=(regime(A, "learned", first), regime(B, "grounded", second)),
        checks=(
            *(Check(A, arm, "self_play", "at_least", 0.98) for arm in ARMS),
            *(Check(A, arm, "grounded_partner", "near", 0.03, target=1 / SYMBOLS) for arm in ARMS),
            *(Check(A, arm, "most_used_action", "at_least", 0.95) for arm in ARMS),
            *(Check(A, arm, "cross_play", "at_most", 0.6) for arm in ARMS),
            *(Check(A, arm, "convention_index", "at_least", 0.95) for arm in ARMS),
            Check(B, "GRU", "grounded_partner", "share", 0.8, target=0.85),
            Check(B, "FF", "grounded_partner", "near", 0.03, target=1 / SYMBOLS),
            Check(B, "GRU", "groundedness", "at_least", 0.89),
            Check(B, "GRU", "grounded_partner", "above", 0.5, other="FF", paired=True),
        ),
        seeds=seeds,
        minutes=minutes,
    )


claim = Claim(
    method="markov-property",
    paper="Tessera, Hinckeldey, Zamboni, Abel & Storkey (RLC 2025 workshop)",
    statement=(
        "Pairs that adapt to each other settle on constant conventions that ignore observations and memory and fail "
        "with a partner that does not adapt; the same recurrent learner infers that partner when trained with it."
    ),
    scope=(
        "A case study of this project (follow_partner: two agents, four symbols), as the paper's own is not public; "
        "independent PPO, feed-forward and GRU."
    ),
    scales={"small": scale(200, 1000, 5, 18.0), "full": scale(400, 8000, 10, 0.0)},
    baselines=("FF",),
    ours="GRU",
)
