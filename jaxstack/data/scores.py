"""Reference scores by which returns are normalised: random play is 0, an expert 100."""

import re
from typing import NamedTuple

from jaxstack.core.errors import UserError

D4RL = "D4RL, d4rl/infos.py (Fu et al., 2020)"
ATARI = "Mnih et al. (2015), scores of random play and of a human tester"


class Reference(NamedTuple):
    """Mean undiscounted returns of a task, and where the numbers come from."""

    random: float
    expert: float
    source: str


REFERENCES: dict[str, Reference] = {
    "halfcheetah": Reference(-280.178953, 12135.0, D4RL),
    "hopper": Reference(-20.272305, 3234.3, D4RL),
    "walker2d": Reference(1.629008, 4592.3, D4RL),
    "ant": Reference(-325.6, 3879.7, D4RL),
    "pen": Reference(96.262799, 3076.8331017826877, D4RL),
    "hammer": Reference(-274.856578, 12794.134825156867, D4RL),
    "door": Reference(-56.512833, 2880.5693087298737, D4RL),
    "relocate": Reference(-6.425911, 4233.877797728884, D4RL),
    "maze2d-umaze": Reference(23.85, 161.86, D4RL),
    "maze2d-medium": Reference(13.13, 277.39, D4RL),
    "maze2d-large": Reference(6.7, 273.99, D4RL),
    "maze2d-open-dense": Reference(11.17817, 27.166538620695782, D4RL),
    "maze2d-umaze-dense": Reference(68.537689, 193.66285642381482, D4RL),
    "maze2d-medium-dense": Reference(44.264742, 297.4552547777125, D4RL),
    "maze2d-large-dense": Reference(30.569041, 303.4857382709002, D4RL),
    "antmaze": Reference(0.0, 1.0, D4RL),
    "kitchen": Reference(0.0, 4.0, D4RL),
    "atari-boxing": Reference(0.1, 12.1, ATARI),
    "atari-breakout": Reference(1.7, 30.5, ATARI),
    "atari-pong": Reference(-20.7, 14.6, ATARI),
}
"""Task -> scores. `reference("hopper-medium-v2")` finds its task."""


def reference(name: str) -> Reference | None:
    """Return the scores of a task or of one of its data sets, the longest name that begins `name`; None for others.

    Args:
        name: such as `hopper`, `hopper-medium-replay-v2`, `maze2d-umaze-dense-v1`; case and underscores do not matter.
    """
    text = name.lower().replace("_", "-")
    known = [task for task in REFERENCES if re.match(rf"{re.escape(task)}(-|$)", text)]
    return REFERENCES[max(known, key=len)] if known else None


def normalised_score(returns: float, scores: Reference) -> float:
    """Return 100 (R - R_random) / (R_expert - R_random) of an undiscounted return (Fu et al., 2020).

    Raises:
        UserError: where expert and random scores are equal.
    """
    if scores.expert == scores.random:
        raise UserError(f"reference scores: found {scores.random} for random and expert, expected two that differ")
    return 100.0 * (returns - scores.random) / (scores.expert - scores.random)
