"""Data sets of transitions for offline reinforcement learning: what they hold, returns-to-go, and batches of them.

Rows stand in the order in which they were played, episode after episode. `terminated` ends a task, `truncated` cuts an
episode whose value continues; a row with neither is followed by the next row of its episode.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxstack.core.errors import UserError
from jaxstack.data.scores import Reference, normalised_score, reference
from jaxstack.data.sources import RandomData

STD_FLOOR = 1e-3
"""Added to the deviation by which observations are divided, as TD3+BC has it (Fujimoto and Gu, 2021)."""


@dataclass(frozen=True)
class DatasetInfo:
    """What is known about a data set beside its rows."""

    env: str = ""
    """Id of the environment, or the data set's name elsewhere."""
    env_args: tuple[str, ...] = ()
    """Options of the environment, each `name=value`."""
    quality: str = ""
    """How its behaviour plays, such as `random` or `medium`."""
    random_score: float | None = None
    """Mean return of random play."""
    expert_score: float | None = None
    score_source: str = ""
    """Where both scores come from."""
    seed: int | None = None
    params_hash: str = ""
    """Of the weights that played."""
    stored_next: bool = True
    """Whether next observations were stored; otherwise they are those of the next row."""

    @property
    def scores(self) -> Reference | None:
        """Scores of the data set itself, else those of its task in `scores.REFERENCES`, else None."""
        if self.random_score is not None and self.expert_score is not None:
            return Reference(self.random_score, self.expert_score, self.score_source or "the data set")
        return reference(self.env)


class OfflineDataset(NamedTuple):
    """N transitions, host arrays in the order of play."""

    obs: np.ndarray
    """[N, *obs_shape] float32"""
    action: np.ndarray
    """[N, *action_shape] float32, or int32 for choices"""
    reward: np.ndarray
    """[N] float32"""
    next_obs: np.ndarray
    """[N, *obs_shape] the true next observation; where `has_next` is false, `obs` itself."""
    terminated: np.ndarray
    """[N] bool"""
    truncated: np.ndarray
    """[N] bool"""
    episode: np.ndarray
    """[N] int32, the number of each row's episode"""
    has_next: np.ndarray
    """[N] bool: the next observation is known. A row cut by a time limit in data without next observations has none."""
    log_prob: np.ndarray | None = None
    """[N] float32 of the action under the behaviour, where it is known"""
    info: DatasetInfo = DatasetInfo()

    @property
    def size(self) -> int:
        """Number of rows."""
        return len(self.reward)

    def arrays(self) -> dict[str, Any]:
        """Return the arrays that there are, by name."""
        return {k: v for k, v in self._asdict().items() if k != "info" and v is not None}

    @property
    def ends(self) -> np.ndarray:
        """[N] bool: the last row of each episode, flagged or not."""
        return np.append(self.episode[1:] != self.episode[:-1], True)

    def episode_returns(self) -> np.ndarray:
        """Undiscounted return of each episode."""
        starts = np.flatnonzero(np.append(True, self.episode[1:] != self.episode[:-1]))
        return np.add.reduceat(self.reward.astype(np.float64), starts)

    def learning_view(self) -> "OfflineDataset":
        """Return the rows that one can bootstrap from: those whose next observation is known or not needed."""
        keep = self.has_next | self.terminated
        return self if keep.all() else self._replace(**{k: v[keep] for k, v in self.arrays().items()})

    def next_action(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the action of the next row of the same episode [N, ...] and whether there is one [N] bool."""
        return np.roll(self.action, -1, axis=0), ~self.ends

    def digest(self) -> str:
        """Return the first 16 hex digits of the SHA-256 of all rows."""
        total = hashlib.sha256()
        for name, x in self.arrays().items():
            total.update(f"{name} {x.dtype} {x.shape}".encode())
            total.update(np.ascontiguousarray(x).tobytes())
        return total.hexdigest()[:16]

    def describe(self) -> list[str]:
        """Return lines for people: sizes, flags, returns, scores."""
        returns, info, action = self.episode_returns(), self.info, self.action
        ends = f"terminated {int(self.terminated.sum())}, truncated {int(self.truncated.sum())}"
        lines = [
            f"env = {' '.join([info.env or 'unknown', *info.env_args])}",
            *([f"quality = {info.quality}"] if info.quality else []),
            f"transitions = {self.size}, with a known end {int((self.has_next | self.terminated).sum())}",
            f"episodes = {len(returns)}, {ends}",
            f"observations = {self.obs.shape[1:]} {self.obs.dtype}",
            f"actions = {action.shape[1:]} {action.dtype}, {action.min():.4g} to {action.max():.4g}",
            f"reward = {self.reward.min():.4g} to {self.reward.max():.4g}",
            f"return = {returns.mean():.4g} on average, {returns.min():.4g} to {returns.max():.4g}",
            f"behaviour log-probabilities = {'no' if self.log_prob is None else 'yes'}",
            f"next observations = {'stored' if info.stored_next else 'those of the next row'}",
        ]
        if info.scores is not None:
            score = normalised_score(float(returns.mean()), info.scores)
            lines.append(
                f"normalised score = {score:.1f} (random {info.scores.random:.6g}, expert {info.scores.expert:.6g}; "
                f"{info.scores.source})"
            )
        if info.seed is not None:
            lines.append(f"seed = {info.seed}")
        if info.params_hash:
            lines.append(f"weights = {info.params_hash}")
        return [*lines, f"digest = {self.digest()}"]


def dataset(name: str, info: DatasetInfo = DatasetInfo(), **arrays: Any) -> OfflineDataset:
    """Make a data set from arrays and check it.

    Args:
        name: what messages call it, such as its file.
        info: what is known beside the rows.
        **arrays: fields of `OfflineDataset`. `terminated`, `truncated`, `episode`, `next_obs`, `has_next` and
            `log_prob` may be missing: episodes then end at the flags, and the next row holds the next observation.

    Raises:
        UserError: naming the array and the row that do not fit.
    """
    for key in ("obs", "action", "reward"):
        if arrays.get(key) is None:
            found = ", ".join(k for k, v in arrays.items() if v is not None)
            raise UserError(f"{name}: {key} is missing, found {found or 'nothing'}")
    arrays = {k: np.asarray(v) for k, v in arrays.items() if v is not None}
    count = len(arrays["obs"])
    if count == 0:
        raise UserError(f"{name}: found no rows, expected at least one")
    for key, x in arrays.items():
        if x.dtype == object or not (np.issubdtype(x.dtype, np.number) or x.dtype == bool):
            raise UserError(f"{name}: {key}: found {x.dtype}, expected numbers")
        if len(x) != count:
            raise UserError(f"{name}: {key}: found {len(x)} rows, expected {count}, as many as obs")
        bad = ~np.isfinite(x.reshape(count, -1)).all(1) if np.issubdtype(x.dtype, np.inexact) else np.zeros(count, bool)
        if bad.any():
            entries = int((~np.isfinite(x)).sum())
            plural = "entry is" if entries == 1 else "entries are"
            raise UserError(f"{name}: {key}: {entries} {plural} not finite, first at row {int(bad.argmax())}")
    obs, action = arrays["obs"], arrays["action"]
    obs = obs if obs.dtype == np.uint8 else obs.astype(np.float32)
    action = action.astype(np.int32 if np.issubdtype(action.dtype, np.integer) else np.float32)
    flag = lambda key: arrays.get(key, np.zeros(count, bool)).reshape(count).astype(bool)
    terminated, truncated = flag("terminated"), flag("truncated")
    if (both := terminated & truncated).any():
        raise UserError(
            f"{name}: terminated and truncated are both true in {int(both.sum())} rows, first at row "
            f"{int(both.argmax())}; expected one of them"
        )
    done = terminated | truncated
    if "episode" in arrays:
        episode = arrays["episode"].reshape(count).astype(np.int32)
        _check_episodes(name, episode, done)
    else:
        episode = np.append(0, np.cumsum(done)[:-1]).astype(np.int32)
    ends = np.append(episode[1:] != episode[:-1], True)
    if "next_obs" in arrays:
        next_obs, known = arrays["next_obs"], np.ones(count, bool)
        if next_obs.shape != obs.shape:
            raise UserError(f"{name}: next_obs: found shape {next_obs.shape}, expected {obs.shape}, that of obs")
    else:
        next_obs, known = np.where(_wide(ends, obs), obs, np.roll(obs, -1, axis=0)), ~ends
        info = replace(info, stored_next=False)
    known = flag("has_next") if "has_next" in arrays else known
    log_prob = arrays["log_prob"].reshape(count).astype(np.float32) if "log_prob" in arrays else None
    reward = arrays["reward"].reshape(count).astype(np.float32)
    rows = (obs, action, reward, next_obs.astype(obs.dtype), terminated, truncated, episode, known, log_prob)
    return OfflineDataset(*rows, info)


def _check_episodes(name: str, episode: np.ndarray, done: np.ndarray) -> None:
    change = np.flatnonzero(episode[1:] != episode[:-1]) + 1
    starts = episode[np.append(0, change)]
    if len(np.unique(starts)) < len(starts):
        seen: set[int] = set()
        for row, number in zip(np.append(0, change), starts):
            if int(number) in seen:
                raise UserError(
                    f"{name}: episode: the rows of episode {int(number)} are not together, it begins again at row "
                    f"{int(row)}"
                )
            seen.add(int(number))
    inside = done & np.append(episode[1:] == episode[:-1], False)
    if inside.any():
        row = int(inside.argmax())
        raise UserError(f"{name}: episode {int(episode[row])} continues after its end at row {row}")


def check_fits(data: OfflineDataset, name: str, env: str, obs_shape: Sequence[int], low: Any, high: Any) -> None:
    """Raise `UserError` where a data set does not fit an environment with real actions.

    Args:
        data: the data set.
        name: what messages call it.
        env: the environment's id.
        obs_shape: of one observation.
        low: lowest action [*action_shape].
        high: highest action.
    """
    shape = lambda x: f"[{', '.join(map(str, x.shape))}]"
    if data.obs.shape[1:] != tuple(obs_shape):
        raise UserError(f"{name}: obs {shape(data.obs)} do not fit {env}, whose observations are {tuple(obs_shape)}")
    low, high = np.asarray(low, np.float32), np.asarray(high, np.float32)
    if data.action.shape[1:] != low.shape:
        raise UserError(f"{name}: actions {shape(data.action)} do not fit {env}, whose actions are {low.shape}")
    room = 1e-5 * np.maximum(high - low, 1.0)
    outside = ((data.action < low - room) | (data.action > high + room)).reshape(data.size, -1).any(1)
    if outside.any():
        largest = float(data.action.reshape(-1)[np.abs(data.action).argmax()])
        bounds = lambda x: f"{x.min():g}" if x.min() == x.max() else str(tuple(x.tolist()))
        raise UserError(
            f"{name}: action: {100 * outside.mean():.3g}% of the rows are outside the bounds {bounds(low)} to "
            f"{bounds(high)} of {env}, the largest is {largest:.4g}"
        )


def state_statistics(data: OfflineDataset) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and deviation + 1e-3 of the observations [*obs_shape], by which learners standardise them."""
    obs = data.obs.astype(np.float64)
    return obs.mean(0).astype(np.float32), (obs.std(0) + STD_FLOOR).astype(np.float32)


def returns_to_go(
    reward: Float[Array, "N"],
    terminated: Bool[Array, "N"],
    truncated: Bool[Array, "N"],
    gamma: Float[Array, ""] | float,
    timeout_correction: bool = True,
) -> Float[Array, "N"]:
    """Return sum_k gamma^k r_{t+k} to the end of each row's episode (Jelley et al., 2024).

    Episodes end at `terminated`, `truncated` and the end of the data. With the correction the last reward of an episode
    that did not terminate counts 1 / (1 - gamma) times: the process is taken to earn it for ever.

    Args:
        reward: [N] in the order of play.
        terminated: [N] bool.
        truncated: [N] bool.
        gamma: discount, below 1 with the correction.
        timeout_correction: whether cut episodes continue with their last reward.
    """
    zero = jnp.zeros_like(reward)
    return soft_returns_to_go(reward, zero, terminated, truncated, gamma, 0.0, timeout_correction)


def soft_returns_to_go(
    reward: Float[Array, "N"],
    entropy: Float[Array, "N"],
    terminated: Bool[Array, "N"],
    truncated: Bool[Array, "N"],
    gamma: Float[Array, ""] | float,
    alpha: Float[Array, ""] | float,
    timeout_correction: bool = True,
) -> Float[Array, "N"]:
    """Return sum_{k>=0} gamma^k r_{t+k} + alpha sum_{k>=1} gamma^k H_{t+k}, the return of maximum-entropy RL.

    The entropy of the own step is left out, as in the target of a soft critic. With the correction the last reward and
    the last entropy of a cut episode count 1 / (1 - gamma) times.

    Args:
        reward: [N] in the order of play.
        entropy: [N] nats, or estimates -log pi(a|s) of it.
        terminated: [N] bool.
        truncated: [N] bool.
        gamma: discount, below 1 with the correction.
        alpha: temperature.
        timeout_correction: whether cut episodes continue with their last reward and entropy.
    """
    last = jnp.arange(len(reward)) == len(reward) - 1
    done = terminated | truncated | last
    endless = done & ~terminated if timeout_correction else jnp.zeros_like(done)
    own = alpha * entropy
    # a row's reward with its own entropy; an episode without end earns both for ever
    total = jnp.where(endless, (reward + own) / (1.0 - gamma), reward + own)

    def backward(after: Array, row: tuple[Array, Array]) -> tuple[Array, Array]:
        x, end = row
        here = x + jnp.where(end, 0.0, gamma * after)
        return here, here

    _, with_own = jax.lax.scan(backward, jnp.zeros((), total.dtype), (total, done), reverse=True)
    return with_own - own


class OfflineData(RandomData):
    """Rows drawn with replacement inside the program, and beside them arrays that all batches share.

    `batch` gives (rows [B, ...], shared, number of the step from 0). The statistics of a data set reach a learner with
    its batches, so that neither its program nor the policy it stores needs the file. The number has no axis of seeds,
    so that what happens every so many steps stays a branch where seeds are vmapped.
    """

    def __init__(self, rows: Any, shared: Any, batch_size: int, *, seed: int = 0):
        """`rows` leaves [N, ...]; `shared` any tree. Raises `UserError` as `RandomData`."""
        super().__init__(rows, batch_size, seed=seed)
        self.shared = shared

    computes_from = RandomData.computes_from

    def constants(self) -> Any:
        self.shared = jax.tree.map(jnp.asarray, self.shared)
        return super().constants(), self.shared

    def item(self, seeds: Sequence[int]) -> Any:
        return np.zeros((), np.int32)

    def items(self, start: int, count: int, seeds: Sequence[int], out: Any) -> None:
        out[:count] = np.arange(start, start + count)

    def _rows(self, constants: Any, item: Any, key: jax.Array) -> Any:
        rows, shared = constants
        return super()._rows(rows, item, key), shared, item


def _wide(flag: np.ndarray, like: np.ndarray) -> np.ndarray:
    return flag.reshape(-1, *[1] * (like.ndim - 1))
