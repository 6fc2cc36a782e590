"""Mixed teams: closed forms on matrix games, self-play on the diagonal, permutations; members across environments."""

import csv
import functools
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxstack import agents
from jaxstack.core.errors import UserError
from jaxstack.core.learner import Learner, Policy
from jaxstack.core.metrics import on_host
from jaxstack.envs.matrix_game import MatrixGame
from jaxstack.measures.crossplay import CrossPlay, cross_play, evaluate_many

SMALL = dict(num_envs=2, num_steps=4, num_minibatches=1, hidden=(8,), eval_episodes=5, total_steps=8)
KEY = jax.random.key(3)


class Fixed(NamedTuple):
    """A state whose policy plays `action` [A] whatever it sees."""

    action: Any


def always(*actions):
    """(learner, states [K]) of members that play the rows of `actions` [K][A]."""

    def act(params, carry, obs, action_mask, first, key):
        return carry, jnp.broadcast_to(params, obs.shape[:2])

    policy = Policy(params=lambda s: s.action, init_carry=lambda p, b: (), act=act)
    none = lambda *_: pytest.fail("trained")
    return Learner(none, none, (), name="fixed", policy=policy), Fixed(jnp.asarray(actions, jnp.int32))


def trained(agent="ippo", count=3, **options):
    """An untrained learner with `count` members whose networks are far apart."""
    learner = agents.make(
        agent, **(SMALL | dict(env="matrix_game", env_args=("num_agents=3", "horizon=6"), sharing="none") | options)
    )
    states = jax.jit(lambda k: jax.lax.map(learner.init, k))(jax.random.split(jax.random.key(0), count))
    return learner, states._replace(params=jax.tree.map(lambda x: 40.0 * x, states.params))


@functools.cache
def feed_forward():
    learner, states = trained()
    return learner, states, cross_play(learner, states, KEY, episodes=5)


@functools.cache
def recurrent():
    learner, states = trained(gru=4)
    return learner, states, cross_play(learner, states, KEY, episodes=5, greedy=False)


def payoff(kind, joint):
    """Mean over agents of one step, by counting."""
    same = [joint.count(a) for a in joint]
    return float(np.mean([1 / k if kind == "specialisation" else k / len(joint) for k in same]))


@pytest.mark.parametrize("kind", ["specialisation", "synchronisation"])
def test_fixed_members_give_the_closed_form(kind):
    game = MatrixGame(kind=kind, num_agents=3, horizon=4)
    actions = [[0, 1, 2], [1, 1, 1], [2, 0, 0]]
    got = cross_play(*always(*actions), env=game, episodes=2)
    for i, slot in enumerate(got.slots):
        for p, mine in enumerate(actions):
            for q, others in enumerate(actions):
                joint = [mine[a] if a == slot else others[a] for a in range(3)]
                np.testing.assert_allclose(got.returns[i, p, q], 4 * payoff(kind, joint), rtol=1e-5)
    np.testing.assert_allclose(got.matrix, got.returns.mean((0, 3)))
    low, high = got.interval()
    np.testing.assert_allclose(low, got.matrix, rtol=1e-5)
    np.testing.assert_allclose(high, got.matrix, rtol=1e-5)


def test_one_slot_is_that_agent_alone():
    game = MatrixGame(kind="synchronisation", num_agents=3, horizon=1)
    learner, states = always([0, 0, 0], [1, 1, 1])
    got = cross_play(learner, states, env=game, slots=[2], episodes=1)
    np.testing.assert_allclose(got.matrix, [[1, 5 / 9], [5 / 9, 1]], rtol=1e-5)
    summary = got.summary()
    assert summary["self-play"].value == pytest.approx(1)
    assert summary["cross-play"].value == pytest.approx(5 / 9)
    assert summary["self-play - cross-play"].value == pytest.approx(4 / 9)
    assert list(cross_play(learner, Fixed(states.action[:1]), env=game).summary()) == ["self-play"]


@pytest.mark.parametrize(("run", "greedy"), [(feed_forward, True), (recurrent, False)])
def test_the_diagonal_is_self_play_with_the_same_key(run, greedy):
    learner, states, got = run()
    (own,) = evaluate_many(learner, states, key=KEY, episodes=5, greedy=greedy).values()
    for slot in range(3):
        diagonal = got.returns[slot, np.arange(3), np.arange(3)]
        np.testing.assert_allclose(diagonal, own.returns.mean(-1), rtol=1e-5, atol=1e-6)
    assert len(np.unique(got.matrix.round(6))) > 4


@pytest.mark.parametrize(("run", "greedy"), [(feed_forward, True), (recurrent, False)])
def test_permuting_members_permutes_the_matrix(run, greedy):
    learner, states, got = run()
    order = np.asarray([2, 0, 1])
    other = cross_play(learner, jax.tree.map(lambda x: x[order], states), KEY, episodes=5, greedy=greedy, at_once=4)
    np.testing.assert_allclose(other.returns, got.returns[:, order][:, :, order], rtol=1e-5, atol=1e-6)


def test_members_of_a_team_are_played_as_a_loop_by_hand_plays_them():
    learner, states, _ = recurrent()
    slot, p, q = 1, 2, 0
    got = cross_play(learner, states, slots=[slot], episodes=1)  # greedy in a game without chance: no random numbers
    env, policy = MatrixGame(num_agents=3, horizon=6), learner.policy
    params = [policy.params(jax.tree.map(lambda x, i=i: x[i], states)) for i in (p, q)]
    carries = [policy.init_carry(w, 1) for w in params]
    act = jax.jit(lambda w, carry, obs, first: policy.act(w, carry, obs, None, first, None))
    state, ts = env.reset(jax.random.key(0))
    total = 0.0
    for t in range(6):
        chosen = []
        for i in range(2):
            carries[i], action = act(params[i], carries[i], ts.obs[None], jnp.full(1, t == 0))
            chosen.append(np.asarray(action[0]))
        joint = chosen[1].copy()
        joint[slot] = chosen[0][slot]
        state, ts = env.step(jax.random.key(0), state, jnp.asarray(joint))
        total += float(ts.reward.mean())
    np.testing.assert_allclose(got.matrix[p, q], total, rtol=1e-5)


def test_many_members_in_one_environment_are_the_learners_own_evaluation():
    learner, states, _ = feed_forward()
    (got,) = evaluate_many(learner, states, key=KEY, episodes=5).values()
    assert got.returns.shape == (3, 5, 3)
    own = on_host(jax.jit(jax.vmap(learner.evaluate, in_axes=(0, None)))(states, KEY))
    np.testing.assert_allclose(got.returns.mean((1, 2)), own["eval/return"], rtol=1e-5)
    np.testing.assert_allclose(got.length.mean(1), own["eval/length"], rtol=1e-5)
    (split,) = evaluate_many(learner, states, key=KEY, episodes=5, at_once=2).values()
    np.testing.assert_allclose(split.returns, got.returns, rtol=1e-5)


class Traced(MatrixGame):
    traces = 0

    def reset(self, key):
        type(self).traces += 1
        return super().reset(key)


def test_each_environment_is_traced_once_however_many_members():
    actions = [[a % 2, a // 2 % 2] for a in range(4)]
    games = {"long": Traced(num_agents=2, horizon=3), "short": Traced(num_agents=2, horizon=1)}
    learner, states = always(*actions)
    got = evaluate_many(learner, states, games, episodes=2)
    for name, length in (("long", 3), ("short", 1)):
        expected = [length * payoff("specialisation", a) for a in actions]
        np.testing.assert_allclose(got[name].returns.mean((1, 2)), expected, rtol=1e-5)
        assert (got[name].length == length).all()
    assert Traced.traces == 2
    cross_play(learner, states, env=games["long"], episodes=2)
    assert Traced.traces == 3


def test_the_matrix_is_drawn_and_written(tmp_path):
    got = CrossPlay(np.arange(8.0).reshape(1, 2, 2, 2), (0,))
    path = got.figure(tmp_path / "m.png", ["a", "b"])
    assert np.asarray(Image.open(path).convert("L")).min() < 100
    got.save(path, ["a", "b"], {"env": "x"})
    rows = list(csv.reader((tmp_path / "m.csv").read_text().splitlines()))
    assert rows == [["", "a", "b"], ["a", "0.5", "2.5"], ["b", "4.5", "6.5"]]
    content = json.loads((tmp_path / "m.json").read_text())
    assert content["matrix"] == [[0.5, 2.5], [4.5, 6.5]]
    assert content["env"] == "x"
    one = CrossPlay(np.ones((1, 2, 2, 1)), (0,))
    one.save(path)
    assert json.loads((tmp_path / "m.json").read_text())["low"] == [[None, None], [None, None]]
    with pytest.raises(UserError, match="cannot be written"):
        one.save(path / "under" / "a_file.png")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, s: cross_play(x._replace(policy=None), s), "ippo: has no policy"),
        (lambda x, s: cross_play(x, s, slots=[3]), r"slots=\(3,\): expected agents 0 to 2"),
        (lambda x, s: cross_play(x, s, slots=[]), "slots="),
        (lambda x, s: cross_play(x, s, episodes=0), "episodes=0"),
        (lambda x, s: cross_play(x, s, at_once=0), "at_once=0"),
        (lambda x, s: cross_play(x, jax.tree.map(lambda v: v[0], s)), "states: expected leaves with one leading axis"),
        (lambda x, s: evaluate_many(x, s, ["dispersion"]), "dispersion: num_agents=4, expected 3"),
        (lambda x, s: evaluate_many(x, s, ["dispersoin"]), "did you mean 'dispersion'"),
        (lambda x, s: evaluate_many(x, s, ["dispersion", "dispersion"]), "expected a mapping of names"),
        (lambda x, s: evaluate_many(x._replace(env=None), s), "environments: expected at least one"),
        (lambda x, s: cross_play(x._replace(env=None), s, env=MatrixGame(num_agents=1)), "at least 2 agents"),
    ],
)
def test_bad_input_is_named(call, message):
    learner, states, _ = feed_forward()
    with pytest.raises(UserError, match=message):
        call(learner, states)
