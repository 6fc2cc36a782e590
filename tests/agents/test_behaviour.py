"""Data sets made by `jaxstack collect`: equal keys give equal bytes, rows are those that were played."""

import jax
import numpy as np
import pytest

from jaxstack import cli
from jaxstack.agents import behaviour
from jaxstack.core.errors import UserError
from jaxstack.data.files import load_dataset
from jaxstack.data.offline import dataset
from jaxstack.data.scores import normalised_score

PENDULUM = dict(env_args=("max_steps_in_episode=6",), episodes=4)


def test_equal_keys_give_equal_bytes(tmp_path, capsys):
    argv = ["collect", "gymnax/Pendulum-v1", "--quality", "random", "--episodes", "4"]
    argv += ["--env-args", "max_steps_in_episode=6"]
    for name in ("a", "b"):
        assert cli.main([*argv, "--seed", "3", "--out", str(tmp_path / f"{name}.npz")]) == 0
    assert cli.main([*argv, "--seed", "4", "--out", str(tmp_path / "c.npz")]) == 0
    a, b, c = ((tmp_path / f"{name}.npz").read_bytes() for name in "abc")
    assert a == b != c
    assert "episodes = 4, terminated 0, truncated 4" in capsys.readouterr().out
    data = load_dataset(tmp_path / "a.npz")
    assert cli.main([*argv, "--seed", "3", "--out", str(tmp_path / "a-v0")]) == 0
    assert load_dataset(tmp_path / "a-v0").digest() == data.digest()
    assert data.size == 24
    assert data.info.env_args == ("max_steps_in_episode=6",)
    inside = ~data.ends[:-1]
    np.testing.assert_array_equal(data.next_obs[:-1][inside], data.obs[1:][inside])
    assert np.abs(data.action).max() <= 2.0
    assert data.action.std() > 0.5


def test_medium_is_the_first_update_past_a_third_and_repeats(monkeypatch):
    monkeypatch.setattr(behaviour, "LENGTH", 6)
    monkeypatch.setattr(behaviour, "SCORED", 16)
    scores = {None: -10.0}
    monkeypatch.setattr(behaviour, "_score", lambda task, policy, params, key: scores.get(policy, 20.0))
    real, runs = behaviour.train, []

    def train(learner, count, *args, **options):
        result = real(learner, count, *args, **options)
        runs.append((count, jax.tree.leaves(result.state.params)[0]))
        rising = result.metrics.assign(**{"eval/return": np.linspace(-10, 20, 4)[: len(result.metrics)]})
        return result._replace(metrics=rising)

    monkeypatch.setattr(behaviour, "train", train)
    options = PENDULUM | dict(steps=4 * 96)
    medium = [behaviour.collect("gymnax/Pendulum-v1", "medium", **options) for _ in range(2)]
    assert [count for count, _ in runs] == [4, 2, 4, 2]  # -10, 0, 10, 20: the second is a third of the way
    assert medium[0].digest() == medium[1].digest()
    assert medium[0].info.params_hash
    expert = behaviour.collect("gymnax/Pendulum-v1", "expert", **options)
    assert expert.digest() != medium[0].digest()
    assert (expert.info.random_score, expert.info.expert_score) == (-10.0, 20.0)
    both = behaviour.collect("gymnax/Pendulum-v1", "medium-expert", **options)
    assert both.size == medium[0].size + expert.size
    for k, v in medium[0].arrays().items():
        np.testing.assert_array_equal(both.arrays()[k], np.concatenate([v, expert.arrays()[k] + 4 * (k == "episode")]))
    runs.clear()
    replay = behaviour.collect("gymnax/Pendulum-v1", "medium-replay", **options)
    assert [count for count, _ in runs] == [4, 1, 2]
    assert (replay.size, len(replay.episode_returns())) == (24, 4)
    inside = ~replay.ends[:-1]
    np.testing.assert_array_equal(replay.next_obs[:-1][inside], replay.obs[1:][inside])
    monkeypatch.setattr(behaviour, "_score", lambda *args: 0.0)
    with pytest.raises(UserError, match="expected more than random play"):
        behaviour.collect("gymnax/Pendulum-v1", "expert", **options)


def test_bad_input_is_named(capsys):
    for env, quality, options, message in (
        (
            "gymnax/Pendulum-v1",
            "good",
            {},
            "quality='good': expected one of random, medium-replay, medium, medium-expert, expert",
        ),
        ("gymnax/Pendulum-v1", "random", dict(episodes=0), "episodes=0"),
        ("navigation", "random", {}, "expected one agent and a horizon"),
    ):
        with pytest.raises(UserError, match=message):
            behaviour.collect(env, quality, **options)
    assert cli.main(["collect", "gymnax/Pendulum-v1", "--quality", "random", "--out", "x.txt"]) == 2
    assert (
        "--out x.txt: expected a name ending in .npz, or in -v and a number for a folder of Minari"
        in capsys.readouterr().err
    )


def test_what_is_shortened_keeps_whole_episodes():
    rows = dict(obs=np.zeros((9, 1)), action=np.zeros((9, 1)), reward=np.arange(9), episode=[0, 0, 0, 1, 1, 2, 2, 2, 2])
    data = dataset("rows", **rows)
    for limit, kept in ((9, 9), (8, 5), (5, 5), (4, 3), (1, 3)):
        assert behaviour.shortened(data, limit).size == kept


@pytest.mark.slow
def test_qualities_lie_where_their_names_say():
    """On Pendulum, between random play (0) and the expert (1), which 100 other episodes scored."""
    made = {q: behaviour.collect("gymnax/Pendulum-v1", q, steps=300_000) for q in ("random", "medium", "expert")}
    scores = made["expert"].info.scores
    share = {q: normalised_score(float(d.episode_returns().mean()), scores) / 100 for q, d in made.items()}
    assert abs(share["random"]) <= 0.05
    assert 0.25 <= share["medium"] <= 0.45
    assert 0.9 <= share["expert"] <= 1.1
