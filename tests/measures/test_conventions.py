"""Conventions: scripted players in closed form, the verdicts, and the audit of pairs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack import agents
from jaxstack.core.errors import UserError
from jaxstack.envs.dispersion import Dispersion
from jaxstack.envs.follow_partner import FollowPartner
from jaxstack.measures import conventions, partners, probes

EPISODES = 20_000


def play(env, ego, partner=partners.constant(0), episodes=EPISODES, seed=0):
    """Mean reward per step of two scripted players, and the ego's memory after each step."""

    @jax.jit
    def run(key):
        k_reset, key = jax.random.split(key)
        state, ts = jax.vmap(env.reset)(jax.random.split(k_reset, episodes))
        start = (state, ts, ego.init(episodes), partner.init(episodes))

        def body(c, key):
            state, ts, own, theirs = c
            k_own, k_theirs, k_step = jax.random.split(key, 3)
            a, own = ego.act(k_own, own, ts.obs[:, 0])
            b, theirs = partner.act(k_theirs, theirs, ts.obs[:, 1])
            state, ts = jax.vmap(env.step)(jax.random.split(k_step, episodes), state, jnp.stack([a, b], -1))
            return (state, ts, own, theirs), (ts.reward[:, 0].mean(), own)

        return jax.lax.scan(body, start, jax.random.split(key, env.horizon))[1]

    rewards, memory = run(jax.random.key(seed))
    return float(rewards.mean()), memory


def test_scripted_players_reach_their_closed_forms():
    grounded = FollowPartner(partner="grounded")
    best, memory = play(grounded, partners.informed(4, 2))
    assert abs(best - (1 / 4 + 1 / 2 + 14) / 16) < 0.005
    assert abs(play(grounded, partners.window_one(4), episodes=200_000)[0] - (1 / 4 + 15 / 2) / 16) < 0.005
    assert abs(play(grounded, partners.constant(1))[0] - 0.25) < 0.005
    assert abs(play(FollowPartner(partner="grounded", types=1), partners.informed(4, 1))[0] - 0.953125) < 0.005
    hidden = FollowPartner(partner="grounded", see_action=False)
    assert abs(play(hidden, partners.informed(4, 2), episodes=200_000)[0] - 0.484375) < 0.005
    # the belief is uniform before the first pair (cue, next action), one-hot after it
    weights = np.asarray(memory.types)
    alive = (weights > -1).sum(-1)
    assert (alive[:2] == 2).all()
    assert (alive[2:] == 1).all()
    # the script as a player is the script of the environment
    as_player = [play(FollowPartner(), partners.informed(4, 2), partners.grounded(k, 4))[0] for k in range(2)]
    assert abs(np.mean(as_player) - best) < 0.005


def test_constants_tit_and_noise():
    env = FollowPartner()
    assert play(env, partners.constant(2), partners.constant(2), 100)[0] == 1.0
    assert play(env, partners.constant(2), partners.constant(3), 100)[0] == 0.0
    assert abs(play(env, partners.constant(2), partners.tit(4))[0] - (1 / 4 + 15) / 16) < 0.005
    assert abs(play(env, partners.constant(0), partners.noisy(0.5, 4))[0] - (0.5 + 0.5 / 4)) < 0.005
    with pytest.raises(UserError, match=r"eps=2: expected a number in \[0, 1\]"):
        partners.noisy(2, 4)


def test_other_play_removes_constants():
    """Relabelling one player's symbols leaves 1/M on average; relabelling both leaves a pair's return unchanged."""
    assert abs(play(FollowPartner(relabel=True), partners.constant(1), partners.constant(1))[0] - 0.25) < 0.01
    for order in itertools.permutations(range(3)):
        env = FollowPartner(symbols=3)
        assert play(env, partners.constant(order[1]), partners.constant(order[1]), 50)[0] == 1.0
    hits = [
        play(FollowPartner(symbols=3), partners.constant(1), partners.constant(o[1]), 50)[0]
        for o in itertools.permutations(range(3))
    ]
    assert np.mean(hits) == pytest.approx(1 / 3)


def test_verdicts():
    np.testing.assert_allclose(conventions.convention_index([1.0, 0.9], [0.25, 0.9], 0.25), [1.0, 0.0])
    assert np.isnan(conventions.convention_index(0.25, 0.25, 0.25))
    assert conventions.groundedness(0.921875, 0.25, 0.921875) == pytest.approx(1.0)
    matrix = np.where(np.eye(4, dtype=bool), 1.0, 0.0)
    matrix[0, 1] = matrix[1, 0] = 1.0  # two seeds share a convention
    drop = conventions.crossplay_drop(matrix, np.ones(4))
    assert drop.value == pytest.approx(1 - 2 / 12)
    assert drop.low < drop.value <= drop.high <= 1.0
    # the interval is over seeds: wider than one over the 12 pairs
    pairs = matrix[~np.eye(4, dtype=bool)]
    over_pairs = np.percentile(np.random.default_rng(0).choice(pairs, (5000, 12)).mean(1), [2.5, 97.5])
    assert drop.high - drop.low > np.ptp(over_pairs)
    with pytest.raises(UserError, match="at least 2 seeds"):
        conventions.crossplay_drop(np.ones((1, 1)), np.ones(1))


@pytest.fixture(scope="module")
def pairs():
    learner = agents.make(
        "ippo",
        env="follow_partner",
        sharing="none",
        gru=8,
        hidden=(8,),
        num_envs=4,
        num_steps=16,
        num_minibatches=1,
        total_steps=64,
    )
    states = jax.jit(jax.vmap(learner.init))(jax.vmap(jax.random.key)(jnp.arange(2)))
    return learner, states


def test_audit_of_untrained_pairs(pairs, tmp_path):
    learner, states = pairs
    env = FollowPartner()
    report = conventions.audit(
        env,
        learner,
        states,
        {"uniform": partners.noisy(1.0, 4)},
        episodes=64,
        settings=probes.Settings(null_reps=5, slow_null_reps=2, max_rows=256),
    )
    assert abs(report.chance - 0.25) < 0.05
    np.testing.assert_allclose(report.self_play, report.matrix.diagonal(), atol=1e-6)
    assert report.self_play_sampled == pytest.approx([0.25, 0.25], abs=0.08)
    # whatever agent 0 does, a uniform partner agrees by chance
    assert report.partners["uniform"] == pytest.approx([0.25, 0.25], abs=0.05)
    played = conventions.record(learner, states, env, jax.random.key(3), episodes=64)
    assert played[0].hidden.shape == (64, 16, 2, 8)
    rows = report.rows()
    assert {"self-play", "cross-play", "with uniform", "HAR", "constant"} <= set(rows[0])
    assert set(report.summary()) >= {"self-play", "self-play - cross-play", "with uniform"}
    assert report.figure(tmp_path / "matrix.png").stat().st_size > 1000
    # greedy play is deterministic given the key
    again = conventions.record(learner, states, env, jax.random.key(3), episodes=64)
    np.testing.assert_array_equal(again[1].obs, played[1].obs)


def test_audit_needs_two_agents(pairs):
    learner, states = pairs
    with pytest.raises(UserError, match="expected 2 agents, found 3"):
        conventions.audit(Dispersion(num_agents=3), learner, states, {})
    with pytest.raises(UserError, match="expected discrete actions"):
        conventions.audit(Dispersion(num_agents=2, continuous=True), learner, states, {})
