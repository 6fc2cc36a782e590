"""Rationality of agents where they are deployed (Qian, Storkey & He, 2026, arXiv 2602.04737).

An agent is trained in one MDP and deployed in another (marked +). An action is rational if it maximises the optimal
deployment value Q*+. The expected risk R sums what the agent's actions lose in deployment, the empirical risk Rhat what
they lose on T stored training episodes in terms of the training value Q*, and the gap |R - Rhat| is what the training
data do not tell. Everything is float64; stochastic policies count by expectation.

Which training value: the default `optimum="deployment"` is the paper's and its code's, the value under the TRAINING
kernel of the policy that is optimal in DEPLOYMENT. It is not the optimal training value, so Rhat is negative where the
agent is safer in training than that policy; it is not clipped. Show R, Rhat and the gap together.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxstack.core.errors import UserError
from jaxstack.core.learner import Learner, Policy
from jaxstack.envs.base import cached
from jaxstack.envs.tabular import TableEnv
from jaxstack.measures.rationality_bounds import (
    corollary4,
    corollary5,
    corollary6,
    discrete_metric,
    empirical_rademacher,
    growth,
    kernel_distance,
    lipschitz,
    policy_lipschitz,
    rademacher_by_ascent,
    rademacher_of_policies,
    theorem1,
    theorem2,
    theorem3,
    total_variation,
    wasserstein1,
)
from jaxstack.measures.tabular import (
    Mdp,
    as_policy,
    backward_induction,
    expected_return,
    mdp,
    mdp_of,
    occupancy,
    random_mdp,
    randomise,
    simulate,
)

__all__ = [
    "Bounds",
    "Mdp",
    "Report",
    "Values",
    "as_policy",
    "asymptotic_risk",
    "backward_induction",
    "bounds_of",
    "corollary4",
    "corollary5",
    "corollary6",
    "discrete_metric",
    "empirical_rademacher",
    "empirical_risk",
    "every_step",
    "expected_return",
    "expected_risk",
    "extrinsic_gap",
    "gap",
    "greedy_policy",
    "growth",
    "intrinsic_gap",
    "kernel_distance",
    "lipschitz",
    "mdp",
    "mdp_of",
    "metric_risk",
    "occupancy",
    "of_learner",
    "of_policy",
    "policy_lipschitz",
    "rademacher_by_ascent",
    "rademacher_of_policies",
    "random_mdp",
    "randomise",
    "rational_policy",
    "rational_value_loss",
    "sample_table",
    "simulate",
    "theorem1",
    "theorem2",
    "theorem3",
    "total_variation",
    "values",
    "wasserstein1",
]

TAU = 1e-6
"""Temperature of the rational policy, the paper's: ties split evenly."""


class Values(NamedTuple):
    """What risks are measured with."""

    deployment: Float[np.ndarray, "H S A"]
    """Q*+, the optimal action values in deployment."""
    training: Float[np.ndarray, "H S A"]
    """Q*, the training values, see `values`."""
    rational: Float[np.ndarray, "H S A"]
    """The rational policy: probabilities of the actions that maximise Q*+."""


def rational_policy(q: Any, temperature: float = TAU) -> Float[np.ndarray, "*B S A"]:
    """Return the softmax of action values with a small temperature: the greedy policy, ties split evenly.

    Args:
        q: Action values [..., A].
        temperature: In units of the values, above 0.
    """
    if not temperature > 0:
        raise UserError(f"temperature={temperature!r}: expected a number > 0")
    q = np.asarray(q, np.float64)
    weight = np.exp((q - q.max(-1, keepdims=True)) / temperature)
    return weight / weight.sum(-1, keepdims=True)


def values(
    deployment: Mdp,
    training: Mdp,
    horizon: int,
    *,
    optimum: Literal["deployment", "training"] = "deployment",
    temperature: float = TAU,
) -> Values:
    """Compute the values and the rational policy of a pair of MDPs.

    Args:
        deployment: Where the agent acts.
        training: Where it was trained.
        horizon: H.
        optimum: Whose values under the training kernel are Q*: those of the policy that is optimal in deployment (the
            paper's choice), or of the one that is optimal in training.
        temperature: Of the rational policy.

    Raises:
        UserError: For MDPs of different sizes or an unknown choice.
    """
    if deployment.reward.shape != training.reward.shape:
        found = f"{deployment.reward.shape} in deployment, {training.reward.shape} in training"
        raise UserError(f"values: found states and actions {found}, expected the same")
    if optimum not in ("deployment", "training"):
        raise UserError(f"optimum={optimum!r}: expected 'deployment' or 'training'")
    q = backward_induction(deployment, horizon)
    rational = rational_policy(q, temperature)
    own = backward_induction(training, horizon, rational if optimum == "deployment" else None)
    return Values(q, own, rational)


def rational_value_loss(q: Any, policy: Any, rational: Any) -> Float[np.ndarray, "*B H S"]:
    """Compute what a policy's actions lose against the rational ones (section 3).

    L_h(s) = Q_h(s, a_rational) - Q_h(s, a_policy); with Q = Q*+ it is at least 0, and 0 for rational actions (Lemma 1).

    Args:
        q: Action values [H, S, A].
        policy: Probabilities [..., H, S, A].
        rational: Probabilities [H, S, A].
    """
    return ((np.asarray(rational) - np.asarray(policy)) * np.asarray(q)).sum(-1)


def sample_table(key: jax.Array, policy: Any) -> np.ndarray:
    """Draw one action for each state [..., S] from probabilities [..., S, A], as probabilities 0 and 1."""
    policy = np.asarray(policy, np.float64)
    bits = np.asarray(jax.random.uniform(key, policy.shape[:-1]), np.float64)
    sums = policy.cumsum(-1)
    action = np.minimum((bits[..., None] * sums[..., -1:] >= sums).sum(-1), policy.shape[-1] - 1)
    return np.eye(policy.shape[-1])[action]


def expected_risk(
    values: Values,
    deployment: Mdp,
    policy: Any,
    *,
    law: Literal["policy", "rational"] = "policy",
    by_step: bool = False,
    sampled: bool = False,
    key: jax.Array | None = None,
) -> np.ndarray:
    """Compute R = sum_h E[L_h(s)], exactly, by the state laws in deployment.

    With the laws of the policy itself, R equals the difference in return between the optimal policy and this one.

    Args:
        values: From `values`.
        deployment: Where the agent acts.
        policy: See `tabular.as_policy`; leading axes [...] are several policies.
        law: The states that count: those of the policy, or of the rational policy (R*, appendix E.2).
        by_step: Return R_h [..., H] instead of their sum [...].
        sampled: Draw one table of rational actions and one of the policy's (for a policy [S, A] the same in every step)
            instead of taking expectations, as the released code does. Needs `key`.
        key: Of the tables.
    """
    if law not in ("policy", "rational"):
        raise UserError(f"law={law!r}: expected 'policy' or 'rational'")
    rational, policy = _tables(values, deployment, policy, sampled, key)
    states = occupancy(deployment, policy if law == "policy" else rational, len(rational))
    risk = (states * rational_value_loss(values.deployment, policy, rational)).sum(-1)
    return risk if by_step else risk.sum(-1)


def empirical_risk(
    values: Values,
    training: Mdp,
    policy: Any,
    states: Any,
    valid: Any = None,
    *,
    running_snapshot: bool = False,
    sampled: bool = False,
    key: jax.Array | None = None,
) -> np.ndarray:
    """Compute Rhat = 1/T sum_t sum_h [Q*_h(s, a_rational) - Q*_h(s, a_policy)] on the stored states of T episodes.

    Args:
        values: From `values`.
        training: Where the episodes come from.
        policy: The fixed policy that is judged; with `running_snapshot` a policy for each episode [T, H, S, A].
        states: [T, H] state ids, or [..., T, H] for several policies [..., H, S, A].
        valid: [T, H] which of them are; default: all. (An ended episode in its terminal state adds nothing.)
        running_snapshot: Judge each episode by the policy of its own time and return the running means [T], as the
            released code does (there: every 20th episode).
        sampled: As in `expected_risk`; with `running_snapshot` anew for each episode.
        key: Of the tables.

    Raises:
        UserError: Without stored episodes, or for states that do not exist.
    """
    states = np.asarray(states)
    if states.ndim < 2 or 0 in states.shape:
        raise UserError(f"states: found {states.shape}, expected stored episodes [T, H], at least one")
    horizon, count = len(values.training), training.num_states
    if states.shape[-1] != horizon:
        raise UserError(f"states: found episodes of {states.shape[-1]} steps, expected the horizon {horizon}")
    if not np.issubdtype(states.dtype, np.integer) or states.min() < 0 or states.max() >= count:
        raise UserError(
            f"states: found {states.dtype} from {states.min()} to {states.max()}, expected ids 0..{count - 1}"
        )
    if running_snapshot:
        policies = np.asarray(policy)
        if policies.ndim != 4 or len(policies) != len(states):
            found = f"{policies.shape} for {len(states)} episodes"
            raise UserError(f"policy: found {found}, expected one per episode [T, H, S, A]")
        each = [
            empirical_risk(
                values,
                training,
                policies[t],
                states[t : t + 1],
                None if valid is None else np.asarray(valid)[t : t + 1],
                sampled=sampled,
                key=None if key is None else jax.random.fold_in(key, t),
            )
            for t in range(len(states))
        ]
        return np.cumsum(each) / np.arange(1, len(each) + 1)
    rational, policy = _tables(values, training, policy, sampled, key)
    loss = rational_value_loss(values.training, policy, rational)
    lead = np.broadcast_shapes(loss.shape[:-2], states.shape[:-2])
    loss = np.broadcast_to(loss, (*lead, *loss.shape[-2:]))
    index = np.broadcast_to(states, (*lead, *states.shape[-2:]))
    found = np.take_along_axis(loss, np.swapaxes(index, -1, -2), -1)  # [..., H, T]
    if valid is not None:
        found = np.where(np.swapaxes(np.asarray(valid, bool), -1, -2), found, 0.0)
    return found.mean(-1).sum(-1)


def asymptotic_risk(values: Values, training: Mdp, policy: Any, behaviour: Any = None) -> np.ndarray:
    """Compute the limit of the empirical risk for T -> infinity: the expectation over training episodes.

    Args:
        values: From `values`.
        training: Where the episodes come from.
        policy: The policy that is judged.
        behaviour: The policy that plays the episodes; default: the same.
    """
    rational, policy = _tables(values, training, policy, False, None)
    states = occupancy(training, policy if behaviour is None else behaviour, len(rational))
    return (states * rational_value_loss(values.training, policy, rational)).sum((-1, -2))


def metric_risk(q: Any, policy: Any, states: Any) -> np.ndarray:
    """Compute the rational value metric, which needs no oracle: 1/T sum_t sum_h [max_a Q_h(s, a) - Q_h(s, a_policy)].

    Args:
        q: Any learned values [H, S, A].
        policy: Probabilities [H, S, A] or [S, A].
        states: Stored states [T, H].
    """
    q, states = np.asarray(q, np.float64), np.asarray(states)
    if states.ndim != 2 or 0 in states.shape:
        raise UserError(f"states: found {states.shape}, expected stored episodes [T, H], at least one")
    loss = q.max(-1) - (np.broadcast_to(policy, q.shape) * q).sum(-1)
    return np.take_along_axis(loss, states.T, -1).mean(-1).sum()


def gap(expected: Any, empirical: Any) -> np.ndarray:
    """Compute the rational risk gap |R - Rhat|."""
    return np.abs(np.asarray(expected) - np.asarray(empirical))


def _tables(values: Values, base: Mdp, policy: Any, sampled: bool, key: jax.Array | None) -> tuple[Any, np.ndarray]:
    """(rational policy, policy) [..., H, S, A], as they are or drawn."""
    if sampled != (key is not None):
        raise UserError(
            f"sampled={sampled}: found {'no key' if sampled else 'a key'}, expected key only if sampled=True"
        )
    rational, horizon = values.rational, len(values.rational)
    if key is not None:
        k_rational, k_policy = jax.random.split(key)
        rational = sample_table(k_rational, rational)
        if not np.issubdtype(np.asarray(policy).dtype, np.integer):
            policy = sample_table(k_policy, policy)
    return rational, as_policy(policy, base, horizon)


# the parts of the gap, Lemma 2


def _largest(weight: np.ndarray, policies: np.ndarray | None) -> float:
    """sum_h max over policies of |sum_s,a weight_h(s, a) pi_h(a | s)|: over those given [N, H, S, A], or over all."""
    if policies is not None:
        return float(np.abs((weight * policies).sum((-1, -2))).max(0).sum())
    high, low = weight.max(-1).sum(-1), weight.min(-1).sum(-1)
    return float(np.maximum(high, -low).sum())


def _with_own(values: Values, base: Mdp, policy: np.ndarray, policies: Any) -> np.ndarray | None:
    """The finite set with the judged and the rational policy in it: Lemma 2 needs both."""
    if policies is None:
        return None
    return np.concatenate([as_policy(policies, base, len(policy)), policy[None], values.rational[None]])


def extrinsic_gap(values: Values, deployment: Mdp, training: Mdp, policy: Any, policies: Any = None) -> float:
    """Compute the part of the gap that the changed environment causes (Lemma 2).

    sum_h sup_pi |E_{s ~ D+_h} Q*+_h(s, a^pi) - E_{s ~ D_h} Q*_h(s, a^pi)|, with the state laws of the judged policy.

    Args:
        values: From `values`.
        deployment: Where the agent acts.
        training: Where it was trained.
        policy: The judged policy.
        policies: The set [N, H, S, A] of the supremum, to which the judged and the rational policy are added; None: all
            policies, in closed form.
    """
    horizon = len(values.rational)
    pi = as_policy(policy, training, horizon)
    there, here = (occupancy(m, pi, horizon)[..., None] for m in (deployment, training))
    weight = there * values.deployment - here * values.training
    return _largest(weight, _with_own(values, training, pi, policies))


def intrinsic_gap(values: Values, training: Mdp, policy: Any, states: Any, policies: Any = None) -> float:
    """Compute the part of the gap that few training episodes cause (Lemma 2).

    sum_h sup_pi |E_{s ~ D_h} Q*_h(s, a^pi) - 1/T sum_t Q*_h(s_h^t, a^pi)|. Then |R - Rhat| <= 2 extrinsic + 2
    intrinsic.

    Args:
        values: From `values`.
        training: Where the episodes come from.
        policy: The judged policy, which played them.
        states: Stored states [T, H].
        policies: As in `extrinsic_gap`.
    """
    horizon = len(values.rational)
    pi = as_policy(policy, training, horizon)
    states = np.asarray(states)
    stored = np.stack([np.bincount(s, minlength=training.num_states) / len(states) for s in states.T])
    weight = (occupancy(training, pi, horizon) - stored)[..., None] * values.training
    return _largest(weight, _with_own(values, training, pi, policies))


class Bounds(NamedTuple):
    """The gap of a policy, its parts, and what Theorems 1-3 and Corollary 6 bound them by."""

    gap: float
    asymptotic_gap: float
    """For infinitely many episodes."""
    extrinsic: float
    intrinsic: float
    theorem1: float
    """Of the extrinsic part."""
    theorem2: float
    """Of the intrinsic part, with probability 1 - delta."""
    theorem3: float
    """Of the gap."""
    corollary6: float
    """Of the asymptotic gap."""


def bounds_of(
    values: Values,
    deployment: Mdp,
    training: Mdp,
    policy: Any,
    policies: Any,
    states: Any,
    cost: Any,
    key: jax.Array,
    *,
    delta: float = 0.05,
    num_sigma: int = 1000,
) -> Bounds:
    """Evaluate the theory on a pair of MDPs that differ in their kernels and starts, with all its constants exact.

    Args:
        values: From `values`.
        deployment: Where the agent acts, rewards in [0, 1].
        training: Where it was trained, with the same rewards.
        policy: The judged policy.
        policies: The class Pi [N, H, S, A]; the judged and the rational policy are added.
        states: Stored training states [T, H], played by the judged policy.
        cost: Distances between states [S, S].
        key: Of the Rademacher signs.
        delta: Probability with which the concentration may fail.
        num_sigma: Draws of the signs.

    Raises:
        UserError: For rewards that differ or lie outside [0, 1].
    """
    rewards = deployment.reward
    if np.abs(rewards - training.reward).max() > 1e-12:
        raise UserError("rewards: found other ones in training, expected the same; corollary5 bounds what they add")
    if rewards.min() < 0 or rewards.max() > 1:
        raise UserError(f"rewards: found {rewards.min():g} to {rewards.max():g}, expected 0 to 1")
    horizon = len(values.rational)
    pi = as_policy(policy, training, horizon)
    every = _with_own(values, training, pi, policies)
    risk = expected_risk(values, deployment, pi)
    start = float(wasserstein1(deployment.start, training.start, cost))
    kernel = kernel_distance(deployment.kernel, training.kernel, cost)
    ls, lp = lipschitz(values.deployment, cost), growth(deployment, training, pi, horizon, cost, kernel)
    l_pi = policy_lipschitz(values.training, training, every)
    rad = [e.value for e in rademacher_of_policies(key, values.training, states, every, num_sigma)]
    one = theorem1(ls, lp, start, kernel, horizon)
    two = theorem2(l_pi, rad, horizon, training.num_actions, len(states), delta)
    return Bounds(
        gap=float(gap(risk, empirical_risk(values, training, pi, states))),
        asymptotic_gap=float(gap(risk, asymptotic_risk(values, training, pi))),
        extrinsic=extrinsic_gap(values, deployment, training, pi, every),
        intrinsic=intrinsic_gap(values, training, pi, states, every),
        theorem1=one,
        theorem2=two,
        theorem3=theorem3(one, two),
        corollary6=corollary6(one, l_pi, rad, horizon, training.num_actions),
    )


# trained agents


class Report(NamedTuple):
    """The rationality of K policies, arrays [K]."""

    expected: np.ndarray
    """R."""
    empirical: np.ndarray
    """Rhat."""
    gap: np.ndarray
    """|R - Rhat|."""
    returns: np.ndarray
    """Expected return in deployment."""


def of_policy(policy: Any, deployment: TableEnv, training: TableEnv, states: Any, **options: Any) -> Report:
    """Measure policies of an environment with tables.

    Args:
        policy: Probabilities [..., S, A], the same in every step.
        deployment: Where the agent acts; its horizon is H.
        training: Where it was trained.
        states: Stored training states [..., T, H] or [T, H], or a list of them, one [T_k, H] for each of K policies; S
            stands for an ended episode.
        **options: Of `values`.

    Raises:
        UserError: Without stored episodes, or for environments that differ in more than eps.
    """
    there, here, horizon = mdp_of(deployment), mdp_of(training), deployment.horizon
    found = values(there, here, horizon, **options)
    pi = every_step(policy, horizon)
    if isinstance(states, list):
        empirical = np.stack([empirical_risk(found, here, p, seen) for p, seen in zip(pi, states, strict=True)])
    else:
        empirical = empirical_risk(found, here, pi, states)
    expected = expected_risk(found, there, pi)
    return Report(expected, empirical, gap(expected, empirical), expected_return(there, pi, horizon))


def every_step(policy: Any, horizon: int) -> np.ndarray:
    """Policies [..., S, A] of an environment as those [..., H, S + 1, A] of its MDP, whose last state is the end."""
    policy = np.asarray(policy, np.float64)
    end = np.full((*policy.shape[:-2], 1, policy.shape[-1]), 1.0 / policy.shape[-1])
    whole = np.concatenate([policy, end], -2)[..., None, :, :]
    return np.broadcast_to(whole, (*policy.shape[:-2], horizon, *whole.shape[-2:]))


def greedy_policy(learner: Learner, state: Any) -> Float[np.ndarray, "K S A"]:
    """Return the greedy actions of a learner in all states of its environment, as probabilities.

    Args:
        learner: With a feed-forward policy of one agent in a `TableEnv`.
        state: Its states [K, ...], as `train` and `load_state` return them.

    Raises:
        UserError: For a learner of another environment or with memory.
    """
    env, policy = learner.env, learner.policy
    if not isinstance(env, TableEnv) or policy is None:
        name = getattr(getattr(env, "spec", None), "id", None)
        raise UserError(f"{learner.name}: found environment {name!r}, expected one with tables: cliff_walking or taxi")
    count, actions = env.tables.next_state.shape
    return np.eye(actions)[np.asarray(_acting(policy, count, learner.name)(state))]


@cached(16)
def _acting(policy: Policy, count: int, name: str) -> Any:
    """States [K, ...] -> greedy actions [K, count]; one program for all calls."""

    @jax.jit
    @jax.vmap
    def act(state: Any) -> Array:
        params = policy.params(state)
        carry = policy.init_carry(params, count)
        if jax.tree.leaves(carry):
            raise UserError(f"{name}: found a recurrent policy, expected one without memory")
        seen = jnp.arange(count, dtype=jnp.int32)[:, None]
        return policy.act(params, carry, seen, None, jnp.ones(count, bool), None)[1][:, 0]

    return act


def of_learner(
    learner: Learner,
    state: Any,
    deployment: TableEnv,
    training: TableEnv | None = None,
    *,
    states: Any = None,
    episodes: int = 200,
    key: jax.Array | None = None,
    **options: Any,
) -> Report:
    """Measure the greedy policies of a trained learner: R, Rhat and their gap.

    Args:
        learner: Trained in a `TableEnv`.
        state: Its states [K, ...], as `train` and `load_state` return them.
        deployment: Where it acts.
        training: Where it was trained; default: the learner's environment.
        states: Stored training states, see `of_policy` and `jaxstack.agents.dqn.stored_episodes`; default: those of
            new episodes that the greedy policies play in training.
        episodes: T of new episodes.
        key: Of new episodes; default: that of seed 0.
        **options: Of `values`.

    Example:
        result = jaxstack.train(jaxstack.make_agent("dqn", env="cliff_walking", env_args=("eps=0.1",)), seeds=5)
        report = rationality.of_learner(learner, result.state, jaxstack.make_env("cliff_walking"))
    """
    policy = greedy_policy(learner, state)
    trained: Any = learner.env if training is None else training
    if states is None:
        here, horizon = mdp_of(trained), deployment.horizon
        keys = jax.random.split(jax.random.key(0) if key is None else key, len(policy))
        play = lambda k, pi: simulate(k, here, every_step(pi, horizon), horizon, episodes)
        states = np.stack([play(k, pi) for k, pi in zip(keys, policy, strict=True)])
    return of_policy(policy, deployment, trained, states, **options)
