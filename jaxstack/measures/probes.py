"""Probes of Dec-POMDP reasoning in trained policies (Tessera, Hinckeldey, Zamboni, Abel & Storkey, AAMAS 2026).

Five quantities from trajectories of a team, each against a permutation null. O_t, A_t, H_t are agent i's observation,
action and history; tau_{t-1} is everything up to t-1; all logarithms are to base 2 in results.

    OAR  I(O_t; A_t) / H(A)                                            does the action depend on the observation
    HAR  I(H_t; A_t | O_t) / H(A | O_t)                                ... on more history than that
    PIF  I(tau^i_{t-1}, O^i_t; A^j_t | tau^j_{t-1}, O^j_t) / H(A^j | .)   does i know something that j acts on
    AA   I(A^i_t; A^j_t | O^i_t, O^j_t) / H(A^j | .)                   are actions coupled in the same step
    DAI  I(tau^i_{t-1}; A^j_t | tau^j_{t-1}) / H(A^j | .)              does i's past influence j's action

A recurrent policy's history is its state (H_t after reading O_t, so DAI takes H_{t-1}); a feed-forward policy's is the
window of the last k steps. These are different quantities: HAR of one is not comparable with HAR of the other. AA
conditions on observations only, so two recurrent agents with a common past show it without any convention.

A probe is averaged over sources i, then the largest over agents j counts, in the null too. Estimates have a positive
floor: only the comparison with the null says anything.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.core.config import Config, require, require_at_least, require_positive
from jaxstack.core.errors import UserError, unknown
from jaxstack.measures import information as info

PROBES = ("OAR", "HAR", "PIF", "PIF-obs", "AA", "DAI")
"""`PIF-obs` is PIF with windows of observations alone; for a recurrent policy it equals PIF and is left out."""

LN2 = float(np.log(2.0))


class Trajectories(NamedTuple):
    """Padded episodes of a team of N agents: E episodes of at most T steps."""

    obs: np.ndarray
    """[E, T, N, D] float32."""
    action: np.ndarray
    """[E, T, N] int32 for discrete actions, [E, T, N, K] float32 for continuous ones."""
    hidden: np.ndarray | None
    """[E, T, N, H] state of a recurrent policy after it read `obs`; None for a feed-forward policy."""
    valid: np.ndarray
    """[E, T] bool: steps that were played; a window never crosses a step that was not."""

    @property
    def discrete(self) -> bool:
        """Whether actions are ids."""
        return self.action.ndim == 3


class Probe(NamedTuple):
    """One probe of one team."""

    name: str
    bits: float
    norm: float
    """The value over its normaliser, in [0, 1]; NaN where the normaliser vanishes, see `notes`."""
    null: np.ndarray
    """[R] normalised values under the null."""
    p: float
    """Permutation p-value (1 + #{null >= value}) / (1 + R)."""
    flag: bool
    """The released rule: above the mean of five null values by `min_effect`. It is no test."""
    pairs: np.ndarray
    """[N, N] normalised value of source i and destination j; [N] for OAR and HAR."""
    rows: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Settings(Config):
    """How the probes are estimated; the defaults are those of the released diagnostics, but for the nulls."""

    window: int = 3
    """k, steps of a feed-forward policy's history."""
    neighbours: int = 25
    alpha: float = 0.5
    """Pseudo-count of each action in a posterior."""
    max_rows: int = 8000
    """Whole episodes are drawn until this many steps are reached."""
    null: Literal["permute", "shift"] = "permute"
    """permute: actions of all steps in random order; shift: each agent's episodes moved on by a random number of
    steps, which keeps their autocorrelation, so that slow policies do not look coupled."""
    null_reps: int = 200
    slow_null_reps: int = 20
    """Null values where actions stand in the windows (feed-forward PIF and DAI) or are continuous: there all
    neighbours have to be found again."""
    min_effect: float = 0.01
    components: int = 50
    """Principal components that are kept of larger blocks, where the estimator needs few columns."""
    seed: int = 0
    reference_compat: bool = False
    """The released behaviour: one argsort for ranks (which breaks the continuous estimates), sub-samples of random
    steps (which lose most windows), and real actions that are whole numbers taken as discrete."""

    def validate(self) -> None:
        require_at_least(self, 1, "window", "neighbours", "null_reps", "slow_null_reps", "components")
        require_at_least(self, 2, "max_rows")
        require_positive(self, "alpha")
        require(self, "min_effect", self.min_effect >= 0, "a number >= 0")


def trajectories(obs: Any, action: Any, hidden: Any = None, valid: Any = None) -> Trajectories:
    """Check and convert arrays of trajectories.

    Args:
        obs: [E, T, N, ...] observations, flattened to vectors.
        action: [E, T, N] integers, or [E, T, N, K] real actions.
        hidden: [E, T, N, H] recurrent states after reading `obs`, or None.
        valid: [E, T] bool; default all steps.

    Returns:
        `Trajectories` in float32 and int32.

    Raises:
        UserError: episodes of different lengths, shapes that do not fit, or entries of valid steps that are not finite.
    """
    obs, action = _even("obs", obs), _even("action", action)
    if obs.ndim < 4:
        raise UserError(f"obs: expected [episodes, steps, agents, ...], found shape {obs.shape}")
    obs = obs.reshape(*obs.shape[:3], -1)
    lead = obs.shape[:3]
    if action.shape[:3] != lead or action.ndim not in (3, 4):
        raise UserError(f"action: expected {list(lead)} or {[*lead, 'K']}, found {list(action.shape)}")
    if action.ndim == 3 and not np.issubdtype(action.dtype, np.integer):
        action = action[..., None]
    valid = np.ones(lead[:2], bool) if valid is None else np.asarray(valid, bool)
    if valid.shape != lead[:2]:
        raise UserError(f"valid: expected {list(lead[:2])}, found {list(valid.shape)}")
    if hidden is not None:
        hidden = _even("hidden", hidden)
        if hidden.ndim != 4 or hidden.shape[:3] != lead:
            raise UserError(f"hidden: expected {[*lead, 'H']}, found {list(hidden.shape)}")
    for name, x in (("obs", obs), ("action", action), ("hidden", hidden)):
        if x is None or np.issubdtype(x.dtype, np.integer):
            continue
        bad = ~np.isfinite(x.reshape(*lead, -1)) & valid[:, :, None, None]
        if bad.any():
            e, t, n, _ = np.argwhere(bad)[0]
            where = f"first at episode {e}, step {t}, agent {n}"
            raise UserError(f"{name}: {int(bad.sum())} of {bad.size} entries are not finite, {where}")
    kind = np.int32 if action.ndim == 3 else np.float32
    clean = lambda x: np.where(valid.reshape(*valid.shape, *[1] * (x.ndim - 2)), x, 0)
    return Trajectories(
        clean(obs).astype(np.float32),
        clean(action).astype(kind),
        None if hidden is None else clean(hidden).astype(np.float32),
        valid,
    )


def _even(name: str, x: Any) -> np.ndarray:
    """`x` as an array; lists of episodes of different lengths are refused, as their padding needs `valid`."""
    if isinstance(x, (list, tuple)) and len({len(episode) for episode in x}) > 1:
        lengths = [len(episode) for episode in x]
        found = f"found episodes of {min(lengths)} to {max(lengths)} steps"
        raise UserError(f"{name}: {found}, expected one length: pad them and tell the played steps by `valid`")
    return np.asarray(x)


def windows(x: Any, valid: Any, k: int) -> tuple[Any, Any]:
    """Stack the k steps before each step.

    Args:
        x: [E, T, ...], of numpy or jax; so are the results.
        valid: [E, T] bool.
        k: window length.

    Returns:
        ([E, T, k, ...] with x_{t-k..t-1}, [E, T] bool: step t and its whole window were played in one episode).
    """
    xp = np if isinstance(x, np.ndarray) else jnp
    shift = lambda v, s: xp.concatenate([xp.zeros_like(v[:, :s]), v[:, : v.shape[1] - s]], axis=1)
    steps = range(min(k, x.shape[1]), 0, -1)
    whole = functools.reduce(lambda a, b: a & b, (shift(valid, s) for s in steps), valid)
    whole = whole & (xp.arange(x.shape[1]) >= k)
    return xp.stack([shift(x, s) for s in range(k, 0, -1)] if k <= x.shape[1] else [xp.zeros_like(x)] * k, 2), whole


def probe(traj: Trajectories, name: str, settings: Settings = Settings()) -> Probe:
    """Estimate one probe of a team and its null.

    Args:
        traj: trajectories of greedy play.
        name: one of `PROBES`.
        settings: see `Settings`.

    Raises:
        UserError: an unknown probe, a team of one for PIF, AA and DAI, or too few rows.
    """
    if name not in PROBES:
        raise unknown("probe", name, PROBES)
    agents = traj.obs.shape[2]
    if agents < 2 and name not in ("OAR", "HAR"):
        raise UserError(f"{name}: expected a team of at least 2 agents")
    rng = np.random.default_rng(settings.seed)
    traj, notes = _prepared(traj, settings, rng)
    block = _Block(traj, name, settings)
    need = settings.neighbours + 1
    if len(block.rows[0]) < need:
        raise UserError(f"{name}: rows: expected at least {need}, found {len(block.rows[0])}")
    notes += block.notes()
    reps = settings.slow_null_reps if block.slow else settings.null_reps
    order = _null_orders(traj, reps, settings, rng)
    bits, norm, null = block.run(order)
    value = _over_agents(norm)
    if not np.isfinite(value):
        notes += ("the normaliser vanishes: actions are constant or determined by the condition",)
    spread = np.asarray([_over_agents(n) for n in null])
    p = (1.0 + (spread >= value).sum()) / (1.0 + reps) if np.isfinite(value) else float("nan")
    five = spread[:5].mean()
    flag = bool(value > five and value - five >= settings.min_effect)
    return Probe(name, _over_agents(bits), value, spread, float(p), flag, norm, len(block.rows[0]), notes)


def audit(traj: Trajectories, settings: Settings = Settings(), names: Sequence[str] = PROBES) -> dict[str, Probe]:
    """Run all probes that the team and its policy admit; a recurrent policy has no `PIF-obs`, one agent no pairs."""
    single, recurrent = traj.obs.shape[2] < 2, traj.hidden is not None
    admits = lambda n: not (single and n not in ("OAR", "HAR")) and not (recurrent and n == "PIF-obs")
    return {name: probe(traj, name, settings) for name in names if admits(name)}


class _Block:
    """The sample of one probe: which rows count, and what the estimator reads of each agent."""

    def __init__(self, traj: Trajectories, name: str, settings: Settings):
        self.traj, self.name, self.cfg = traj, name, settings
        self.agents = traj.obs.shape[2]
        self.classes = int(traj.action.max()) + 1 if traj.discrete else 0
        recurrent = traj.hidden is not None
        windowed = not recurrent and name in ("HAR", "PIF", "PIF-obs", "DAI")
        self.acts_inside = not recurrent and name in ("PIF", "DAI")
        self.slow = self.acts_inside or not traj.discrete
        past, whole = windows(traj.obs, traj.valid, settings.window if windowed else 1)
        use = whole if windowed or (recurrent and name == "DAI") else traj.valid
        self.rows = np.nonzero(use)
        row = lambda x: x[self.rows].reshape(len(self.rows[0]), self.agents, -1)
        now = row(traj.obs)
        window = row(np.moveaxis(past, 2, 3)) if windowed else np.zeros((len(self.rows[0]), self.agents, 0))
        self.x: np.ndarray | None = None
        """[n, N, d] the source's part, None for AA, whose source is the action itself."""
        self.z: np.ndarray | None = None
        """[n, N, d] the condition's part of each agent; AA joins those of both."""
        if name == "OAR":
            self.x = now
        elif name == "HAR":
            self.x, self.z = row(traj.hidden) if traj.hidden is not None else window, now
        elif name in ("PIF", "PIF-obs"):
            self.x = row(traj.hidden) if traj.hidden is not None else np.concatenate([window, now], -1)
            self.z = self.x
        elif name == "DAI":
            before = None if traj.hidden is None else windows(traj.hidden, traj.valid, 1)[0]
            self.x = window if before is None else row(before)
            self.z = self.x
        else:
            self.z = now

    def notes(self) -> tuple[str, ...]:
        """What a reader of the value must know about the sample."""
        out, n = [], len(self.rows[0])
        seen = self.traj.obs[self.rows]
        constant = int((np.ptp(seen, axis=0) == 0).sum())
        if constant:
            out.append(f"{constant} constant observation columns dropped")
        if self.classes > n / 25:
            out.append(f"{self.classes} action ids in {n} rows: posteriors are smoothed towards uniform")
        elif self.classes >= 20 and self.cfg.alpha * self.classes >= max(1.0, self.cfg.neighbours / 4):
            out.append(f"alpha * {self.classes} actions is large beside {self.cfg.neighbours} neighbours")
        return tuple(out)

    def run(self, order: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(bits, norm, null norms [R, ...]), each [N] or [N, N] with NaN on the diagonal; `order` [R, N, V] reorders
        each agent's actions of all valid steps."""
        own = self.name in ("OAR", "HAR")
        shape = (self.agents,) if own else (self.agents, self.agents)
        bits, norm = np.full(shape, np.nan), np.full(shape, np.nan)
        null = np.full((len(order), *shape), np.nan)
        for at in np.ndindex(*shape):
            source, target = (at[0], at[0]) if own else at
            if not own and source == target:
                continue
            nats, entropy, rep_nats, rep_entropy = self._pair(source, target, order)
            bits[at], norm[at] = nats / LN2, self._ratio(nats, entropy)
            null[(slice(None), *at)] = [self._ratio(a, b) for a, b in zip(rep_nats, rep_entropy)]
        return bits, norm, null

    def _ratio(self, nats: float, entropy: float) -> float:
        # of differential entropies only a clearly positive one can serve as a normaliser
        return float(np.clip(nats / entropy, 0.0, 1.0)) if entropy > (1e-12 if self.classes else 0.1) else float("nan")

    def _pair(self, source: int, target: int, order: np.ndarray) -> tuple[float, float, np.ndarray, np.ndarray]:
        """(nats, entropy) of the sample and [R] of its reordered ones."""
        # first the sample itself, then its reorderings
        given, taken = (self._actions(agent, order[:, agent]) for agent in (source, target))
        past = tuple(self._action_windows(a, order[:, a]) for a in (source, target)) if self.acts_inside else ()
        if not self.classes:
            found = [self._real(source, target, given[r], taken[r], [p[r] for p in past]) for r in range(len(taken))]
            nats, entropy = np.asarray(found).T
        elif self.name == "OAR":
            nats, entropy = _dependence(
                self._columns(self.x, source), taken, self.classes, self.cfg.components, **self._k
            )
        elif self.name == "AA":
            z = info.standardise(self._observed(source, target))
            nats, entropy = _coupling(z, given, taken, self.classes, **self._k)
        else:
            z, x = self._columns(self.z, target), self._columns(self.x, source)
            run = functools.partial(_conditional_each, past=past) if past else _conditional
            nats, entropy = run(z, x, taken, classes=self.classes, **self._k)
        nats, entropy = np.asarray(nats, np.float64), np.asarray(entropy, np.float64)
        return nats[0], entropy[0], nats[1:], entropy[1:]

    @property
    def _k(self) -> dict[str, Any]:
        return {"k": self.cfg.neighbours, "alpha": self.cfg.alpha}

    def _columns(self, x: np.ndarray | None, agent: int) -> Array:
        assert x is not None
        return info.standardise(jnp.asarray(x[:, agent]))

    def _observed(self, source: int, target: int) -> Array:
        assert self.z is not None
        return jnp.asarray(np.concatenate([self.z[:, source], self.z[:, target]], -1))

    def _played(self, agent: int, order: np.ndarray) -> np.ndarray:
        """[R + 1, E, T, ...] an agent's actions: as played, then reordered over the valid steps."""
        action, valid = self.traj.action[:, :, agent], self.traj.valid
        out = np.repeat(action[None], len(order) + 1, axis=0)
        for r, o in enumerate(order):
            out[r + 1][valid] = action[valid][o]
        return out

    def _actions(self, agent: int, order: np.ndarray) -> Array:
        """[R + 1, n, ...] the same at the probe's rows."""
        return jnp.asarray(self._played(agent, order)[:, self.rows[0], self.rows[1]])

    def _action_windows(self, agent: int, order: np.ndarray) -> Array:
        """[R + 1, n, k, ...] the actions of the window before each row."""
        past = [windows(a, self.traj.valid, self.cfg.window)[0] for a in self._played(agent, order)]
        return jnp.asarray(np.stack(past)[:, self.rows[0], self.rows[1]])

    def _real(self, source: int, target: int, given: Array, taken: Array, past: list[Array]) -> tuple[float, float]:
        """(nats, normaliser) of continuous actions; the normaliser is 0 where it cannot serve."""
        most, k = self.cfg.components, self.cfg.neighbours
        y = info.standardise(taken)
        whole = info.entropy_knn(y, k)
        if self.name == "OAR":
            assert self.x is not None
            x = info.standardise(jnp.asarray(self.x[:, source]))
            return float(info.mi_ksg(info.principal(x, most), y, min(k, 3))), float(whole)
        if self.name == "AA":
            x, z = given, self._observed(source, target)
        else:
            assert self.x is not None
            assert self.z is not None
            x, z = jnp.asarray(self.x[:, source]), jnp.asarray(self.z[:, target])
            if past:
                x, z = (jnp.concatenate([v, p.reshape(len(v), -1)], -1) for v, p in zip((x, z), past))
        rank = _sorting if self.cfg.reference_compat else info.ranks
        block = lambda v: info.standardise(rank(info.principal(info.standardise(v), most)))
        nats = info.cmi_ksg(block(x), block(taken), block(z), k)
        rest = float(whole - info.mi_ksg(y, info.principal(info.standardise(z), most), k))
        return float(nats), rest if rest > 1e-3 * abs(float(whole)) else 0.0


@functools.partial(jax.jit, static_argnames=("classes", "k", "alpha"))
def _conditional(z: Array, x: Array, taken: Array, classes: int, k: int, alpha: float) -> tuple[Array, Array]:
    """I(X; A | Z) and H(A | Z) [R] of each labelling `taken` [R, n]; neighbours are found once."""
    near = info.neighbours(z, info.candidates(len(z), k))
    both = info.joint(near, x, k)
    return jax.lax.map(lambda a: info.posterior_divergence(a, near.index[:, :k], both, classes, alpha), taken)


@functools.partial(jax.jit, static_argnames=("classes", "k", "alpha"))
def _coupling(z: Array, given: Array, taken: Array, classes: int, k: int, alpha: float) -> tuple[Array, Array]:
    """The same with X the one-hot action `given` [R, n]: only the re-ranking is repeated."""
    return info.label_divergence(info.neighbours(z, info.candidates(len(z), k)), given, taken, classes, k, alpha)


@functools.partial(jax.jit, static_argnames=("classes", "k", "alpha"))
def _conditional_each(
    z: Array, x: Array, taken: Array, past: tuple[Array, Array], classes: int, k: int, alpha: float
) -> tuple[Array, Array]:
    """The same with windows of actions `past` (of source and target) [R, n, k] in X and Z."""

    def one(rep: tuple[Array, tuple[Array, Array]]) -> tuple[Array, Array]:
        a, windows_ = rep
        codes = (info.standardise(jax.nn.one_hot(w, classes).reshape(len(w), -1)) for w in windows_)
        xs, zs = (jnp.concatenate([v, c], -1) for v, c in zip((x, z), codes))
        return info.cmi_discrete(zs, xs, a, classes, k, alpha)

    return jax.lax.map(one, (taken, past))


@functools.partial(jax.jit, static_argnames=("classes", "most", "k", "alpha"))
def _dependence(x: Array, taken: Array, classes: int, most: int, k: int, alpha: float) -> tuple[Array, Array]:
    """I(X; A) and H(A) [R]: Ross's estimator for up to `most` columns, else H(A) - H(A | X) on components."""
    whole = jax.vmap(lambda a: info.entropy(a, classes))(taken)
    if x.shape[1] <= most:
        return info.mi_ross_each(x, taken, classes), whole
    near = info.neighbours(info.principal(x, most), k).index
    rest = jax.lax.map(lambda a: info.posterior_divergence(a, near, near, classes, alpha)[1], taken)
    return jnp.maximum(whole - rest, 0.0), whole


def _sorting(x: Array) -> Array:
    """The released "ranks": a sorting permutation of each column, which is not its ranks."""
    return jnp.argsort(x, axis=0).astype(x.dtype)


def _prepared(traj: Trajectories, cfg: Settings, rng: np.random.Generator) -> tuple[Trajectories, tuple[str, ...]]:
    """The trajectories that are used: at most `max_rows` steps, action ids without gaps."""
    notes: tuple[str, ...] = ()
    steps = int(traj.valid.sum())
    if steps > cfg.max_rows and cfg.reference_compat:
        each = cfg.max_rows // len(traj.valid)
        score = np.where(traj.valid, rng.random(traj.valid.shape), -1.0)
        keep = (np.argsort(np.argsort(-score, axis=1), axis=1) < each) & traj.valid
        traj, notes = traj._replace(valid=keep), (f"{int(keep.sum())} random steps of {steps}",)
    elif steps > cfg.max_rows:
        order = rng.permutation(len(traj.valid))
        count = int(np.searchsorted(np.cumsum(traj.valid[order].sum(1)), cfg.max_rows, side="right"))
        chosen = np.sort(order[: max(count, 1)])
        notes = (f"{len(chosen)} whole episodes of {len(traj.valid)}",)
        traj = Trajectories(*(None if x is None else x[chosen] for x in traj))  # pyright: ignore[reportArgumentType]
    action = traj.action
    if not traj.discrete and cfg.reference_compat and action.shape[-1] == 1 and (action == np.round(action)).all():
        action = action[..., 0].astype(np.int32)
    if action.ndim == 3:
        _, ids = np.unique(action[traj.valid], return_inverse=True)
        compact = np.zeros_like(action)
        compact[traj.valid] = ids.reshape(-1, action.shape[2])
        traj = traj._replace(action=compact)
    return traj, notes


def _null_orders(traj: Trajectories, reps: int, cfg: Settings, rng: np.random.Generator) -> np.ndarray:
    """[R, N, V] for each repetition and agent an order of the V valid steps."""
    lengths = traj.valid.sum(1)
    steps, agents = int(lengths.sum()), traj.obs.shape[2]
    if cfg.null == "permute":
        return np.stack([[rng.permutation(steps) for _ in range(agents)] for _ in range(reps)])
    # whole episodes where they are equally long
    unit = int(lengths[0]) if (lengths == lengths[0]).all() else 1
    shift = unit * rng.integers(1, max(steps // unit, 2), (reps, agents))
    return (np.arange(steps) + shift[..., None]) % steps


def _over_agents(x: np.ndarray) -> float:
    """Mean over sources, then the largest over agents; NaN where no agent has a value."""
    if x.ndim == 2:
        seen = np.isfinite(x)
        x = np.where(seen.any(0), np.where(seen, x, 0.0).sum(0) / np.maximum(seen.sum(0), 1), np.nan)
    return float(np.nanmax(x)) if np.isfinite(x).any() else float("nan")
