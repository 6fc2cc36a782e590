"""Rationality: the card's identities and bounds, environments with tables, and measures of trained agents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxstack import envs
from jaxstack.core.errors import UserError
from jaxstack.measures import rationality as ra
from jaxstack.measures.rationality_bounds import theorem1_law, theorem1_value

CLIFF, TAXI = envs.make("cliff_walking"), envs.make("taxi")
EXACT = dict(rtol=0, atol=1e-9)


def random_policies(rng, count, horizon, base):
    return rng.dirichlet(np.ones(base.num_actions), (count, horizon, base.num_states))


def test_optimal_values_of_the_environments():
    for horizon, want in ((12, -12.0), (13, -13.0), (40, -13.0)):
        q = ra.backward_induction(ra.mdp_of(CLIFF), horizon)
        assert q.dtype == np.float64
        assert q[0, 36].max() == want
    taxi = ra.mdp_of(TAXI)
    assert taxi.kernel.shape == (501, 6, 501)
    best = ra.backward_induction(taxi, 60)[0].max(-1)
    np.testing.assert_allclose(best @ taxi.start, 7.93, **EXACT)
    # training values are those of the policy that is optimal in deployment, not the training optimum
    found = ra.values(ra.mdp_of(CLIFF), ra.mdp_of(CLIFF, 0.1), 100)
    own = (found.rational[0, 36] * found.training[0, 36]).sum()
    optimum = ra.values(ra.mdp_of(CLIFF), ra.mdp_of(CLIFF, 0.1), 100, optimum="training").training[0, 36].max()
    np.testing.assert_allclose((own, optimum), (-50.800033, -20.707677), atol=1e-6)


@pytest.mark.parametrize(("env", "want"), [(CLIFF, 0.075), (TAXI, 0.1 * 5 / 6)])
def test_randomised_kernels_are_apart_by_eps_times_one_less_a_share(env, want):
    base, slippery = ra.mdp_of(env), ra.mdp_of(env, 0.1)
    np.testing.assert_allclose(ra.total_variation(base.kernel, slippery.kernel).max(), want, **EXACT)
    # the same by linear programs with the 0/1 metric, where the supremum is
    s, a = np.unravel_index(ra.total_variation(base.kernel, slippery.kernel).argmax(), base.reward.shape)
    metric = ra.discrete_metric(base.num_states)
    np.testing.assert_allclose(ra.wasserstein1(base.kernel[s, a], slippery.kernel[s, a], metric), want, **EXACT)
    assert ra.kernel_distance(base.kernel[:4], base.kernel[:4], metric) < 1e-9


def test_the_rational_policy_loses_nothing():
    for base in (ra.mdp_of(CLIFF), ra.random_mdp(np.random.default_rng(0))):
        horizon = 20
        found = ra.values(base, base, horizon)
        pi = found.rational
        assert np.abs(ra.rational_value_loss(found.deployment, pi, pi)).max() == 0
        assert ra.expected_risk(found, base, pi) == 0
        assert ra.expected_risk(found, base, pi, law="rational") == 0
        # greedy ties too, up to rounding, and nothing is gained by other actions (Lemma 1)
        greedy = found.deployment.argmax(-1)
        np.testing.assert_allclose(ra.expected_risk(found, base, greedy), 0.0, **EXACT)
        every = np.eye(base.num_actions)[:, None, None]
        every = np.broadcast_to(every, (base.num_actions, horizon, *base.reward.shape))
        assert ra.rational_value_loss(found.deployment, every, pi).min() >= -1e-9


def test_without_a_change_and_on_the_same_states_the_gap_is_zero():
    base, rng = ra.mdp_of(CLIFF), np.random.default_rng(1)
    found = ra.values(base, base, 30)
    actions = rng.integers(0, 4, (30, 49))
    states = ra.simulate(jax.random.key(0), base, actions, 30, 1)  # nothing is random
    risk, empirical = ra.expected_risk(found, base, actions), ra.empirical_risk(found, base, actions, states)
    assert risk > 1
    assert risk == empirical == ra.asymptotic_risk(found, base, actions)
    assert ra.gap(risk, empirical) == 0
    by_step = ra.expected_risk(found, base, actions, by_step=True)
    assert by_step.shape == (30,)
    np.testing.assert_allclose(by_step.sum(), risk, **EXACT)


def test_the_risk_is_the_difference_in_return():
    """Deterministic and stochastic kernels and policies, one by one and with leading axes; the strongest test."""
    rng = np.random.default_rng(2)
    cases = [(ra.mdp_of(CLIFF, eps), 25) for eps in (0.0, 0.3)] + [(ra.random_mdp(rng, 6, 3), 8), (ra.mdp_of(TAXI), 6)]
    for base, horizon in cases:
        found = ra.values(base, base, horizon)
        best = ra.backward_induction(base, horizon)[0].max(-1) @ base.start
        policies = random_policies(rng, 2, horizon, base)
        risks = ra.expected_risk(found, base, policies)
        # tau splits near ties: what that costs is below tau times the horizon
        want = best - ra.expected_return(base, policies, horizon)
        np.testing.assert_allclose(risks, want, rtol=1e-12, atol=2e-6 * horizon)
        fixed = rng.integers(0, base.num_actions, base.num_states)
        one = best - ra.expected_return(base, fixed, horizon)
        np.testing.assert_allclose(ra.expected_risk(found, base, fixed), one, rtol=1e-12, atol=2e-6 * horizon)
        np.testing.assert_allclose(ra.occupancy(base, policies, horizon).sum(-1), 1.0, **EXACT)


def test_stored_episodes_tend_to_the_asymptotic_risk_and_snapshots_are_running_means():
    rng = np.random.default_rng(3)
    there = ra.random_mdp(rng)
    here, horizon = ra.random_mdp(rng, like=there), 6
    found = ra.values(there, here, horizon)
    policy, other = random_policies(rng, 2, horizon, here)
    states = ra.simulate(jax.random.key(4), here, policy, horizon, 20_000)
    counts = np.stack([np.bincount(s, minlength=5) for s in states.T]) / len(states)
    np.testing.assert_allclose(counts, ra.occupancy(here, policy, horizon), atol=0.02)
    limit = ra.asymptotic_risk(found, here, policy)
    np.testing.assert_allclose(ra.empirical_risk(found, here, policy, states), limit, atol=0.03)
    judged = ra.asymptotic_risk(found, here, other, behaviour=policy)
    np.testing.assert_allclose(ra.empirical_risk(found, here, other, states), judged, atol=0.03)
    # definition, step by step
    few = states[:7]
    loss = ra.rational_value_loss(found.training, policy, found.rational)
    want = np.mean([sum(loss[h, s] for h, s in enumerate(episode)) for episode in few])
    np.testing.assert_allclose(ra.empirical_risk(found, here, policy, few), want, **EXACT)
    valid = np.arange(horizon)[None] < np.arange(7)[:, None]
    cut = np.mean([sum(loss[h, s] for h, s in enumerate(e[:n])) for n, e in enumerate(few)])
    np.testing.assert_allclose(ra.empirical_risk(found, here, policy, few, valid), cut, **EXACT)
    # as released: a policy for each episode, running means, sampled tables
    three = np.stack([policy, other, policy])
    each = [ra.empirical_risk(found, here, p, few[t : t + 1]) for t, p in enumerate(three)]
    got = ra.empirical_risk(found, here, three, few[:3], running_snapshot=True)
    np.testing.assert_allclose(got, np.cumsum(each) / [1, 2, 3], **EXACT)
    drawn = [
        float(ra.expected_risk(found, there, policy, sampled=True, key=k))
        for k in jax.random.split(jax.random.key(5), 200)
    ]
    assert len(set(drawn)) > 100
    # a table for each step is met once in an episode, so its mean is the expectation
    np.testing.assert_allclose(np.mean(drawn), ra.expected_risk(found, there, policy), atol=4 * np.std(drawn) / 14)
    again = ra.empirical_risk(found, here, three, few[:3], running_snapshot=True, sampled=True, key=jax.random.key(1))
    assert again.shape == (3,)
    assert not np.allclose(again, got)
    table = ra.sample_table(jax.random.key(0), np.broadcast_to([0.2, 0.0, 0.8], (50_000, 3)))
    np.testing.assert_allclose(table.mean(0), [0.2, 0.0, 0.8], atol=0.01)


def test_the_gap_lies_within_its_parts_and_the_extrinsic_one_is_linear_in_small_eps():
    rng = np.random.default_rng(6)
    for seed in range(20):
        there = ra.random_mdp(rng)
        here, horizon = ra.random_mdp(rng, like=there), 4
        found = ra.values(there, here, horizon)
        policies = random_policies(rng, 4, horizon, here)
        states = ra.simulate(jax.random.key(seed), here, policies[0], horizon, 5)
        risk, empirical = (
            ra.expected_risk(found, there, policies[0]),
            ra.empirical_risk(found, here, policies[0], states),
        )
        for every in (policies, None):
            extrinsic = ra.extrinsic_gap(found, there, here, policies[0], every)
            intrinsic = ra.intrinsic_gap(found, here, policies[0], states, every)
            assert ra.gap(risk, empirical) <= 2 * extrinsic + 2 * intrinsic + 1e-9  # Lemma 2
            if every is not None:
                smaller = extrinsic, intrinsic
        assert smaller[0] <= extrinsic + 1e-9
        assert smaller[1] <= intrinsic + 1e-9
    base, horizon = ra.mdp_of(CLIFF), 20
    fixed = np.full((49, 4), 0.25)
    parts = [
        ra.extrinsic_gap(ra.values(base, m, horizon), base, m, fixed) / eps
        for eps, m in ((e, ra.mdp_of(CLIFF, e)) for e in (1e-3, 1e-4))
    ]
    np.testing.assert_allclose(parts[0], parts[1], rtol=0.02)


def test_wasserstein_distances():
    rng = np.random.default_rng(7)
    mu, nu = rng.dirichlet(np.ones(8), 30), rng.dirichlet(np.ones(8), 30)
    mu[0, 2:] = 0
    mu[0] /= mu[0].sum()
    line = np.abs(np.arange(8)[:, None] - np.arange(8)[None]).astype(float)
    want = np.abs(mu.cumsum(-1) - nu.cumsum(-1)).sum(-1)
    np.testing.assert_allclose(ra.wasserstein1(mu, nu, line), want, atol=1e-8)
    places = np.arange(8)
    assert abs(ra.wasserstein1(mu[1], nu[1], line) - stats.wasserstein_distance(places, places, mu[1], nu[1])) < 1e-8
    np.testing.assert_allclose(ra.wasserstein1(mu, nu, ra.discrete_metric(8)), ra.total_variation(mu, nu), atol=1e-8)
    np.testing.assert_allclose(ra.wasserstein1(mu, mu, line), 0.0, atol=1e-8)
    one, two = np.eye(49)[36], np.eye(49)[24]  # the start of the cliff and the cell above
    assert ra.wasserstein1(one, two, CLIFF.distances()) == 1.0
    with pytest.raises(UserError, match=r"mu: probabilities sum to 0\.9, expected 1"):
        ra.wasserstein1([0.5, 0.4], [0.5, 0.5], np.ones((2, 2)))
    with pytest.raises(UserError, match=r"cost: found shape \(3, 3\), expected \(2, 2\)"):
        ra.wasserstein1([0.5, 0.5], [0.5, 0.5], np.ones((3, 3)))


def test_rademacher_complexities():
    key, rng = jax.random.key(8), np.random.default_rng(8)
    f = rng.normal(size=12)
    signs = np.array(np.meshgrid(*[[-1, 1]] * 12)).reshape(12, -1)
    one = ra.empirical_rademacher(key, f[None], 4000)
    assert abs(one.value) < 4 * one.error  # 0 in expectation
    pair = ra.empirical_rademacher(key, [f, -f], 4000)
    assert abs(pair.value - np.abs(f @ signs).mean() / 12) < 4 * pair.error
    many = rng.normal(size=(5, 12))
    whole = ra.empirical_rademacher(key, many, 500)
    np.testing.assert_allclose(ra.empirical_rademacher(key, 3 * many, 500).value, 3 * whole.value, **EXACT)
    hull = np.concatenate([many, rng.dirichlet(np.ones(5), 50) @ many])
    np.testing.assert_allclose(ra.empirical_rademacher(key, hull, 500).value, whole.value, **EXACT)
    # over all policies in closed form: what all deterministic ones give
    q, states = rng.random((2, 3, 2)), rng.integers(0, 3, (6, 2))
    tables = np.eye(2)[np.array(np.meshgrid(*[[0, 1]] * 3)).reshape(3, -1).T]  # [8, 3, 2]
    tables = np.broadcast_to(tables[:, None], (8, 2, 3, 2))
    closed, listed = (ra.rademacher_of_policies(key, q, states, p, 300) for p in (None, tables))
    np.testing.assert_allclose([e.value for e in closed], [e.value for e in listed], **EXACT)
    # ascent on softmax policies reaches nearly that, and never more
    q0, seen = jnp.asarray(q[0]), states[:, 0]
    climbed = ra.rademacher_by_ascent(
        key, lambda p, s: (jax.nn.softmax(p)[s] * q0[s]).sum(-1), np.zeros((3, 2)), seen, num_sigma=300, lr=0.3
    )
    assert 0.97 * closed[0].value <= climbed.value <= closed[0].value + 1e-9


def test_the_bounds_hold_in_random_mdps():
    """200 pairs of MDPs with 5 states and 4 steps, rewards in [0, 1], constants exact."""
    rng, horizon = np.random.default_rng(9), 4
    cost = np.abs(np.arange(5)[:, None] - np.arange(5)[None]).astype(float)
    keys = jax.random.split(jax.random.key(9), 200)
    for key in keys:
        there = ra.random_mdp(rng)
        here = ra.random_mdp(rng, like=there, share=rng.uniform(0.01, 1.0))
        found = ra.values(there, here, horizon)
        policies = random_policies(rng, 4, horizon, here)
        states = ra.simulate(key, here, policies[0], horizon, 20)
        b = ra.bounds_of(found, there, here, policies[0], policies, states, cost, key, num_sigma=50)
        assert b.gap <= b.theorem3 + 1e-8
        assert b.extrinsic <= b.theorem1 + 1e-8
        assert b.intrinsic <= b.theorem2 + 1e-8
        assert b.asymptotic_gap <= b.corollary6 + 1e-8
        assert b.gap <= 2 * (b.extrinsic + b.intrinsic) + 1e-9
        assert b.gap > 0


def test_bounds_in_numbers():
    assert ra.theorem1(2.0, 0.5, 0.1, 0.2, 4) == pytest.approx(2 * 4 * 0.1 + 16 * 2 * 1.5 * 0.2)
    tail = 16 * np.sqrt(np.log(16 / 0.05) / 40)
    assert ra.theorem2(0.3, [1.0, 2.0], 4, 3, 20, 0.05) == pytest.approx(
        0.3 * 4 * np.sqrt(2 * np.log(3)) + 6.0 + 3 * tail
    )
    assert ra.theorem3(1.0, 2.0) == 6.0
    assert ra.corollary4(1.0, 4, 0.5) == 5.0
    assert ra.corollary5(1.0, 4, 0.5) == 11.0
    assert ra.corollary6(1.0, 0.0, [0.5], 4, 3) == 4.0
    # the steps of Lemma 3 add up to no more than Theorem 1
    steps = sum(theorem1_law(2, 1.5, 0.1, 0.2, h) + theorem1_value(2, 0.2, h, 4) for h in range(1, 5))
    assert steps <= ra.theorem1(2, 1.5, 0.1, 0.2, 4)
    # learned values that are the true ones, whose best action is rational: the metric is the empirical risk
    base = ra.random_mdp(np.random.default_rng(10))
    found = ra.values(base, base, 4)
    policy = random_policies(np.random.default_rng(10), 1, 4, base)[0]
    states = ra.simulate(jax.random.key(0), base, policy, 4, 9)
    empirical = ra.empirical_risk(found, base, policy, states)
    np.testing.assert_allclose(ra.metric_risk(found.training, policy, states), empirical, atol=1e-5)


def test_bad_input_is_named():
    base = ra.mdp_of(CLIFF)
    found = ra.values(base, base, 5)
    uniform = np.full((49, 4), 0.25)
    with pytest.raises(UserError, match=r"states: found \(0, 5\), expected stored episodes \[T, H\], at least one"):
        ra.empirical_risk(found, base, uniform, np.zeros((0, 5), int))
    with pytest.raises(UserError, match="states: found episodes of 4 steps, expected the horizon 5"):
        ra.empirical_risk(found, base, uniform, np.zeros((2, 4), int))
    with pytest.raises(UserError, match=r"states: found int64 from 0 to 49, expected ids 0\.\.48"):
        ra.empirical_risk(found, base, uniform, np.array([[0, 0, 0, 0, 49]]))
    with pytest.raises(UserError, match=r"policy: found shape \(48, 4\), expected \[\.\.\., 5, 49, 4\] or \[49, 4\]"):
        ra.expected_risk(found, base, uniform[:48])
    with pytest.raises(UserError, match=r"policy: probabilities sum to 0\.5, expected 1"):
        ra.expected_risk(found, base, uniform / 2)
    with pytest.raises(UserError, match="found actions 0 to 4, expected 0 to 3"):
        ra.expected_risk(found, base, np.full(49, 4) * np.eye(49, dtype=int)[0])
    with pytest.raises(UserError, match="sampled=True: found no key"):
        ra.expected_risk(found, base, uniform, sampled=True)
    with pytest.raises(UserError, match=r"eps=1\.5: expected a number in \[0, 1\]"):
        ra.randomise(base, 1.5)
    with pytest.raises(UserError, match="kernel: probabilities sum to 2"):
        ra.mdp(2 * base.kernel, base.reward, base.start)
    with pytest.raises(UserError, match="rewards: found -100 to 0, expected 0 to 1"):
        ra.bounds_of(found, base, base, uniform, None, np.zeros((1, 5), int), CLIFF.distances(), jax.random.key(0))
