"""Fitted-Q iteration on a tabular chain: how many iterations a better start saves, exactly.

The theory of imitate-then-improve (Jelley et al., 2024): after k iterations the error is at most gamma^k times that of
the start, so that eps is reached after log(eps / error) / log gamma iterations. On the chain here, whose end leads back
to its start and whose behaviour always steps on, the bound is met exactly. float64 on the host.
"""

import math
from typing import NamedTuple

import numpy as np

from jaxstack.core.errors import UserError


class Chain(NamedTuple):
    """A deterministic chain under a known behaviour."""

    reward: np.ndarray
    """[L] of the step from each state"""
    following: np.ndarray
    """[L] the state after it"""
    gamma: float


def ring(length: int, gamma: float) -> Chain:
    """Return L states in a circle; the step from the last to the first earns 1.

    Raises:
        UserError: for less than one state, or a discount that is not in (0, 1).
    """
    if length < 1:
        raise UserError(f"length={length}: expected at least 1")
    if not 0 < gamma < 1:
        raise UserError(f"gamma={gamma}: expected a number in (0, 1)")
    following = (np.arange(length) + 1) % length
    return Chain((following == 0).astype(np.float64), following, gamma)


def values(chain: Chain) -> np.ndarray:
    """Return Q of the behaviour [L], from its linear equations."""
    step = np.eye(len(chain.reward))[chain.following]
    return np.linalg.solve(np.eye(len(chain.reward)) - chain.gamma * step, chain.reward)


def monte_carlo(chain: Chain, horizon: int, timeout_correction: bool = True) -> np.ndarray:
    """Return the returns-to-go [L] of an episode from each state that is cut after `horizon` steps.

    Args:
        chain: the chain.
        horizon: steps of an episode, at least 1.
        timeout_correction: whether the last reward is taken to be earned for ever.
    """
    state, total = np.arange(len(chain.reward)), np.zeros(len(chain.reward))
    for t in range(horizon):
        endless = timeout_correction and t == horizon - 1
        total += chain.gamma**t * chain.reward[state] / (1.0 - chain.gamma if endless else 1.0)
        state = chain.following[state]
    return total


def iterations(chain: Chain, start: np.ndarray, eps: float) -> tuple[int, float]:
    """Return (iterations of Q <- r + gamma Q(next) until the largest error is at most eps, error of the start).

    Args:
        chain: the chain.
        start: Q before the first iteration [L].
        eps: accuracy, above 0.
    """
    goal, q, count = values(chain), np.asarray(start, np.float64), 0
    first = float(np.abs(q - goal).max())
    while np.abs(q - goal).max() > eps:
        q = chain.reward + chain.gamma * q[chain.following]
        count += 1
    return count, first


def predicted(eps: float, error: float, gamma: float) -> float:
    """Return log(eps / error) / log gamma, and 0 where the start is as accurate already."""
    return max(0.0, math.log(eps / error) / math.log(gamma)) if error > 0 else 0.0
