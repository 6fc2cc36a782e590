"""What bounds the rational risk gap: distances of laws, complexity of policies, Theorems 1-3 and Corollaries 4-6.

Of Qian, Storkey & He (2026, arXiv 2602.04737). The bounds presume rewards in [0, 1]; with long horizons they say
nothing. Distances between states are an argument: the paper names none for its experiments.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from scipy import optimize, sparse

from jaxstack.core.errors import UserError
from jaxstack.measures.tabular import Mdp, as_policy, check_probabilities, in_float64, occupancy

BLOCK = 20_000
"""Variables of one linear program."""


def discrete_metric(count: int) -> Float[np.ndarray, "S S"]:
    """Return the 0/1 distances, with which the Wasserstein distance is the total variation."""
    return 1.0 - np.eye(count)


def total_variation(mu: Any, nu: Any) -> np.ndarray:
    """Compute the total variation [...] between laws [..., S]."""
    return 0.5 * np.abs(np.asarray(mu, np.float64) - np.asarray(nu, np.float64)).sum(-1)


def wasserstein1(mu: Any, nu: Any, cost: Any) -> np.ndarray:
    """Compute the Wasserstein-1 distance exactly, by linear programming.

    Args:
        mu: Laws [..., S].
        nu: Laws [..., S] or of a shape that broadcasts to it.
        cost: Distances between states [S, S].

    Returns:
        Distances [...].

    Raises:
        UserError: For laws that do not sum to 1, or a cost of another shape.
    """
    mu, nu, cost = (np.asarray(x, np.float64) for x in (mu, nu, cost))
    check_probabilities(mu=mu, nu=nu)
    mu, nu = np.broadcast_arrays(mu, nu)
    if cost.shape != (mu.shape[-1],) * 2 or not np.isfinite(cost).all() or cost.min(initial=0.0) < 0:
        raise UserError(f"cost: found shape {cost.shape}, expected {(mu.shape[-1],) * 2} finite distances >= 0")
    pairs = [_supports(m, n, cost) for m, n in zip(mu.reshape(-1, mu.shape[-1]), nu.reshape(-1, nu.shape[-1]))]
    out, block, size = [], [], 0
    for pair in pairs:
        block.append(pair)
        size += pair[2].size
        if size >= BLOCK:
            out, block, size = [*out, *_transport(block)], [], 0
    return np.asarray([*out, *_transport(block)]).reshape(mu.shape[:-1])


def _supports(mu: np.ndarray, nu: np.ndarray, cost: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows, cols = np.flatnonzero(mu > 0), np.flatnonzero(nu > 0)
    return mu[rows] / mu[rows].sum(), nu[cols] / nu[cols].sum(), cost[np.ix_(rows, cols)]


def _transport(pairs: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> list[float]:
    """Costs of the best transport plans. All in one program: a call costs more than a small program."""
    if not pairs:
        return []
    rows, cols, wanted = [], [], []
    row = col = 0
    for mu, nu, _ in pairs:
        i, j = (x.ravel() for x in np.indices((len(mu), len(nu))))
        flow = np.arange(len(i))
        # one condition is implied by the others, and rounding would make them contradict each other
        needed = j < len(nu) - 1
        rows += [row + i, row + len(mu) + j[needed]]
        cols += [col + flow, col + flow[needed]]
        wanted += [mu, nu[:-1]]
        row, col = row + len(mu) + len(nu) - 1, col + len(i)
    rows, cols = np.concatenate(rows), np.concatenate(cols)
    sums = sparse.csr_array((np.ones(len(rows)), (rows, cols)), shape=(row, col))
    costs = np.concatenate([c.ravel() for _, _, c in pairs])
    found = optimize.linprog(costs, A_eq=sums, b_eq=np.concatenate(wanted), method="highs")
    if found.status != 0:
        raise UserError(f"wasserstein1: the linear program failed: {found.message}")
    ends = np.cumsum([c.size for _, _, c in pairs])[:-1]
    return [float(x.sum()) for x in np.split(found.x * costs, ends)]


def kernel_distance(p: Any, q: Any, cost: Any) -> float:
    """Compute W1(p, q) = sup over states and actions of W1(p(.|s, a), q(.|s, a)), kernels [S, A, S]."""
    return float(wasserstein1(p, q, cost).max())


# complexity


class Estimate(NamedTuple):
    """A Monte-Carlo mean and its standard error."""

    value: float
    error: float


def empirical_rademacher(key: jax.Array, values: Any, num_sigma: int = 1000) -> Estimate:
    """Estimate 1/T E_sigma[sup_f sum_t sigma_t f(s^t)] over a finite set of functions, by Monte Carlo over the signs.

    Args:
        key: Of the signs.
        values: f(s^t) [F, T].
        num_sigma: Draws of the signs.
    """
    values = _two_axes(values)
    return _mean(_signs(key, num_sigma, values.shape[1]) @ values.T / values.shape[1])


def rademacher_of_policies(
    key: jax.Array, q: Any, states: Any, policies: Any = None, num_sigma: int = 1000
) -> list[Estimate]:
    """Estimate the complexity of {s -> sum_a pi(a|s) Q_h(s, a)} on stored states, for each step h.

    Args:
        key: Of the signs.
        q: Training values [H, S, A].
        states: [T, H].
        policies: The set [N, H, S, A]; None: all policies, whose supremum has a closed form: with the signs of each
            state summed up, the best action of each state.
        num_sigma: Draws of the signs.

    Returns:
        H estimates.
    """
    q, states = np.asarray(q, np.float64), np.asarray(states)
    count = len(states)
    sigma = _signs(key, num_sigma, count)
    out = []
    for h, seen in enumerate(states.T):
        if policies is not None:
            values = (np.asarray(policies)[:, h] * q[h]).sum(-1)[:, seen]
            out.append(_mean(sigma @ values.T / count))
            continue
        places, which = np.unique(seen, return_inverse=True)
        sums = sigma @ np.eye(len(places))[which]  # [num_sigma, places]
        best = (sums[..., None] * q[h, places]).max(-1)
        out.append(_mean(best.sum(-1, keepdims=True) / count))
    return out


def rademacher_by_ascent(
    key: jax.Array,
    function: Callable[[Any, Array], Array],
    params: Any,
    inputs: Any,
    *,
    num_sigma: int = 32,
    steps: int = 200,
    lr: float = 1e-2,
) -> Estimate:
    """Estimate the complexity of a class of functions by gradient ascent: for each draw of the signs Adam maximises
    1/T sum_t sigma_t f(s^t). What ascent misses is missing: a lower estimate of the supremum.

    Args:
        key: Of the signs.
        function: (parameters, inputs) -> f(s^t) [T]; bounded, else there is no supremum.
        params: Where ascent begins.
        inputs: What `function` takes, T in the first axis.
        num_sigma: Draws of the signs.
        steps: Of ascent.
        lr: Of Adam.
    """
    count = len(jax.tree.leaves(inputs)[0])
    tx = optax.adam(lr)
    sigma = _signs(key, num_sigma, count)

    @in_float64()
    def climb(sigma: Array, params: Any, inputs: Any) -> Array:
        def one(signs: Array) -> Array:
            score = lambda p: (signs * function(p, inputs)).sum() / count

            def up(c: tuple[Any, Any, Array], _: None) -> tuple[tuple[Any, Any, Array], None]:
                p, opt, best = c
                value, grad = jax.value_and_grad(score)(p)
                update, opt = tx.update(jax.tree.map(jnp.negative, grad), opt, p)
                return (optax.apply_updates(p, update), opt, jnp.maximum(best, value)), None

            (last, _, best), _ = jax.lax.scan(up, (params, tx.init(params), jnp.float64(-jnp.inf)), None, length=steps)
            return jnp.maximum(best, score(last))

        return jax.vmap(one)(sigma)

    return _mean(climb(sigma, params, inputs)[:, None])


def _signs(key: jax.Array, num_sigma: int, count: int) -> np.ndarray:
    if num_sigma < 2:
        raise UserError(f"num_sigma={num_sigma}: expected at least 2")
    return np.asarray(jax.random.rademacher(key, (num_sigma, count), jnp.int8), np.float64)


def _two_axes(values: Any) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or 0 in values.shape:
        raise UserError(f"values: found shape {values.shape}, expected [functions, states]")
    return values


def _mean(scores: np.ndarray) -> Estimate:
    """Of the largest score in each row."""
    best = scores.max(-1)
    return Estimate(float(best.mean()), float(best.std(ddof=1) / np.sqrt(len(best))))


# constants


def lipschitz(q: Any, cost: Any) -> float:
    """Compute Ls: the largest |Q_h(s, a) - Q_h(s', a')| / d(s, s') over s != s', so that s -> Q_h(s, a^pi) is
    Ls-Lipschitz for every policy pi.

    Args:
        q: Action values [H, S, A].
        cost: Distances [S, S], positive off the diagonal.
    """
    q, cost = np.asarray(q, np.float64), np.asarray(cost, np.float64)
    apart = ~np.eye(len(cost), dtype=bool)
    if not (cost[apart] > 0).all():
        raise UserError("cost: found states at distance 0, expected distances > 0 between different states")
    rise = np.maximum(q.max(-1)[:, :, None] - q.min(-1)[:, None], q.max(-1)[:, None] - q.min(-1)[:, :, None])
    return float((rise[:, apart] / cost[apart]).max())


def growth(deployment: Mdp, training: Mdp, policy: Any, horizon: int, cost: Any, unit: float | None = None) -> float:
    """Compute Lp: by how much W1 between the state laws of deployment and training grows in a step, at most, in units
    of W1 between the kernels (`unit`, where it is known). Infinite where the kernels are equal and it grows all the
    same."""
    pi = as_policy(policy, training, horizon)
    apart = wasserstein1(occupancy(deployment, pi, horizon), occupancy(training, pi, horizon), cost)
    rise = float(np.maximum(np.diff(apart), 0.0).max(initial=0.0))
    unit = kernel_distance(deployment.kernel, training.kernel, cost) if unit is None else unit
    if rise <= 1e-9:  # what linear programs are solved to
        return 0.0
    return rise / unit if unit > 0 else float("inf")


def policy_lipschitz(q: Any, training: Mdp, policies: Any) -> float:
    """Compute L_Pi over a finite set: the largest |E_{D_h^pi} f - E_{D_h^pi'} f| / TV(pi, pi') over pairs of policies,
    steps h and f(s) = sum_a pi''(a|s) Q_h(s, a), with TV the largest over steps and states.

    Args:
        q: Training values [H, S, A].
        training: Where the policies play.
        policies: [N, H, S, A].
    """
    q, policies = np.asarray(q, np.float64), np.asarray(policies, np.float64)
    f = (policies * q).sum(-1)
    means = np.einsum("nhs,mhs->hnm", occupancy(training, policies, len(q)), f)
    apart = np.abs(means[:, :, None] - means[:, None]).max((0, 3))
    size = total_variation(policies[:, None], policies[None]).max((-1, -2))
    return float((apart[size > 0] / size[size > 0]).max(initial=0.0))


# bounds


def theorem1(ls: float, lp: float, w_start: float, w_kernel: float, horizon: int) -> float:
    """Bound the extrinsic part: Ls H W1(p0+, p0) + H^2 Ls (Lp + 1) W1(p+, p)."""
    return ls * horizon * w_start + horizon**2 * ls * (lp + 1.0) * w_kernel


def theorem1_law(ls: float, lp: float, w_start: float, w_kernel: float, h: int) -> float:
    """Bound what the changed state law adds in step h = 1..H (Lemma 3): Ls [W1(p0+, p0) + (h - 1) Lp W1(p+, p)]."""
    return ls * (w_start + (h - 1) * lp * w_kernel)


def theorem1_value(ls: float, w_kernel: float, h: int, horizon: int) -> float:
    """Bound what the changed values add in step h = 1..H (Lemma 3): (H - h) Ls W1(p+, p)."""
    return (horizon - h) * ls * w_kernel


def concentration(horizon: int, episodes: float, delta: float) -> float:
    """Return H^2 sqrt(log(4 H / delta) / (2 T)), 0 for infinitely many episodes."""
    if not 0 < delta < 1 or not episodes > 0:
        raise UserError(f"delta={delta}, episodes={episodes}: expected a number in (0, 1), and at least one episode")
    return horizon**2 * float(np.sqrt(np.log(4.0 * horizon / delta) / (2.0 * episodes)))


def theorem2(
    l_pi: float, rademacher: Any, horizon: int, num_actions: int, episodes: float, delta: float = 0.05
) -> float:
    """Bound the intrinsic part with probability 1 - delta: L_Pi H sqrt(2 log |A|) + 2 sum_h Rad_h + 3 H^2
    sqrt(log(4 H / delta) / (2 T)).

    Args:
        l_pi: See `policy_lipschitz`.
        rademacher: Rad_h [H].
        horizon: H.
        num_actions: |A|.
        episodes: T; infinite: Corollary 6.
        delta: In (0, 1).
    """
    policy = l_pi * horizon * float(np.sqrt(2.0 * np.log(num_actions)))
    return policy + 2.0 * float(np.sum(rademacher)) + 3.0 * concentration(horizon, episodes, delta)


def theorem3(extrinsic: float, intrinsic: float) -> float:
    """Bound the gap by the bounds of Theorems 1 and 2: beta1 W1(p0+, p0) + beta2 W1(p+, p) + 2 L_Pi H sqrt(2 log |A|)
    + 4 sum_h Rad_h + 6 H^2 sqrt(log(4 H / delta) / (2 T)), which is twice their sum."""
    return 2.0 * (extrinsic + intrinsic)


def corollary4(bound: float, horizon: int, eps: float) -> float:
    """Bound the gap of `metric_risk` with learned values at most `eps` from Q*, whose best action is rational."""
    return bound + 2.0 * horizon * eps


def corollary5(bound: float, horizon: int, phi: float) -> float:
    """Bound the gap where the rewards of deployment and training differ by at most `phi`."""
    return bound + horizon * (horizon + 1) * phi


def corollary6(extrinsic: float, l_pi: float, rademacher: Any, horizon: int, num_actions: int) -> float:
    """Bound the gap for infinitely many training episodes: Theorem 3 without the concentration term."""
    return theorem3(extrinsic, theorem2(l_pi, rademacher, horizon, num_actions, float("inf")))
