"""Data sets made by `jaxstack collect`: equal keys give equal bytes, rows are those that were played."""

from typing import get_args

import jax
import numpy as np
import pytest
from scipy.stats import norm

from jaxstack import cli
from jaxstack.agents import behaviour
from jaxstack.cli import collecting
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
    np.testing.assert_allclose(data.log_prob, -np.log(4.0), rtol=1e-6)  # uniform in +-2


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
    assert np.isfinite(both.log_prob).all()
    replay = behaviour.collect("gymnax/Pendulum-v1", "medium-replay", **options)
    assert [count for count, _ in runs] == [4, 1, 2]
    assert (replay.size, len(replay.episode_returns())) == (24, 4)
    inside = ~replay.ends[:-1]
    np.testing.assert_array_equal(replay.next_obs[:-1][inside], replay.obs[1:][inside])
    monkeypatch.setattr(behaviour, "_score", lambda *args: 0.0)
    with pytest.raises(UserError, match="expected more than random play"):
        behaviour.collect("gymnax/Pendulum-v1", "expert", **options)


@pytest.mark.parametrize("name", ["ppo", "dqn", "sac"])
def test_log_probabilities_are_those_of_the_policy(name, monkeypatch):
    monkeypatch.setattr(behaviour, "LENGTH", 6)
    monkeypatch.setattr(behaviour, "ROUNDS", 4)
    monkeypatch.setattr(behaviour, "SCORED", 4)
    monkeypatch.setattr(behaviour, "_score", lambda task, policy, params, key: 0.0 if policy is None else 1.0)
    kept = []
    monkeypatch.setattr(behaviour, "_digest", lambda params: kept.append(params[0]) or "")
    env = "gymnax/CartPole-v1" if name == "dqn" else "gymnax/Pendulum-v1"
    length = dict(env_args=("max_steps_in_episode=6",), steps=4 * 96 if name == "ppo" else 24)
    options = length | dict(behaviour=name, episodes=40)
    data, again = (behaviour.collect(env, "expert", **options) for _ in range(2))
    assert data.digest() == again.digest()
    assert data.log_prob.shape == data.reward.shape
    params = jax.tree.map(np.asarray, kept[0])
    policy = behaviour.BEHAVIOURS[name].make(env, length["env_args"], length["steps"]).policy
    carry = policy.init_carry(params, data.size)
    mode = policy.act(params, carry, data.obs[:, None], None, np.zeros(data.size, bool), None)[1][:, 0]
    action, mode = data.action.astype(np.float64), np.asarray(mode, np.float64)
    if name == "dqn":
        assert params["eps"] == pytest.approx(0.05)  # after half of the run
        assert 0 < (action != mode).sum() < data.size / 8
        want = np.log(0.05 / 2 + 0.95 * (action == mode))
    elif name == "ppo":
        std = np.exp(np.float64(params["weights"]["log_std"]))
        low, high = norm.logcdf((-2 - mode) / std), norm.logcdf((mode - 2) / std)
        inside = norm.logpdf(action, mode, std)
        at_bounds = np.abs(action) == 2
        assert 0 < at_bounds.sum() < data.size / 2
        want = np.where(action <= -2, low, np.where(action >= 2, high, inside))[:, 0]
    else:
        out = np.float64(sac_outputs(params, data.obs))
        u = np.arctanh(action / 2)
        np.testing.assert_allclose(mode, 2 * np.tanh(out[:, :1]), rtol=1e-4, atol=1e-5)
        dense = norm.logpdf(u, out[:, :1], np.exp(out[:, 1:])) - np.log1p(-np.square(action / 2))
        want = (dense - np.log(2.0))[:, 0]
    np.testing.assert_allclose(data.log_prob, want, rtol=2e-3, atol=2e-3)


def sac_outputs(params, obs):
    """Means and log-deviations before the tanh [N, 2]: layers of ReLUs."""
    layers = [params["actor"][k] for k in sorted(params["actor"])]
    x = (obs - params["mean"]) / params["std"]
    for layer in layers[:-1]:
        x = np.maximum(x @ layer["kernel"] + layer["bias"], 0)
    return x @ layers[-1]["kernel"] + layers[-1]["bias"]


def test_bad_input_is_named(capsys, tmp_path):
    assert tuple(behaviour.BEHAVIOURS) == collecting.BEHAVIOURS
    assert get_args(behaviour.Quality) == collecting.QUALITIES
    for env, quality, options, message in (
        (
            "gymnax/Pendulum-v1",
            "good",
            {},
            "quality='good': expected one of random, medium-replay, medium, medium-expert, expert",
        ),
        ("gymnax/Pendulum-v1", "random", dict(episodes=0), "episodes=0"),
        ("gymnax/Pendulum-v1", "expert", dict(behaviour="a2c"), "behaviour='a2c': expected one of ppo, dqn, sac"),
        ("gymnax/Pendulum-v1", "expert", dict(steps=5), "steps=5: expected at least 4096, an update of ppo"),
        ("gymnax/Pendulum-v1", "expert", dict(behaviour="dqn"), "expected Discrete actions"),
        ("gymnax/CartPole-v1", "expert", dict(behaviour="sac"), "expected real actions"),
        ("navigation", "random", {}, "expected one agent and a horizon"),
    ):
        with pytest.raises(UserError, match=message):
            behaviour.collect(env, quality, **options)
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "file").write_text("")
    for out, message in (  # all before anything is trained
        ("x.txt", "--out x.txt: expected a name ending in .npz, or in -v and a number for a folder of Minari"),
        (tmp_path / "folder.npz", "folder.npz: found a folder, expected the name of a file"),
        (tmp_path / "file" / "x.npz", "x.npz: cannot be written"),
        (tmp_path / "file" / "x-v0", "x-v0: cannot be written"),
    ):
        assert cli.main(["collect", "gymnax/Pendulum-v1", "--quality", "expert", "--out", str(out)]) == 2
        assert message in capsys.readouterr().err


def test_what_is_shortened_keeps_whole_episodes():
    rows = dict(obs=np.zeros((9, 1)), action=np.zeros((9, 1)), reward=np.arange(9), episode=[0, 0, 0, 1, 1, 2, 2, 2, 2])
    data = dataset("rows", **rows)
    for limit, kept in ((9, 9), (8, 5), (5, 5), (4, 3), (1, 3)):
        assert behaviour.shortened(data, limit).size == kept


@pytest.mark.slow
@pytest.mark.parametrize(
    ("env", "name", "steps"),
    [
        ("gymnax/Pendulum-v1", "ppo", 300_000),
        ("gymnax/Pendulum-v1", "sac", 20_000),
        ("gymnax/CartPole-v1", "dqn", 100_000),
    ],
)
def test_qualities_lie_where_their_names_say(env, name, steps):
    """Between random play (0) and the expert (1), which 100 other episodes scored."""
    options = dict(behaviour=name, steps=steps)
    made = {q: behaviour.collect(env, q, **options) for q in ("random", "medium", "expert")}
    scores = made["expert"].info.scores
    share = {q: normalised_score(float(d.episode_returns().mean()), scores) / 100 for q, d in made.items()}
    assert abs(share["random"]) <= 0.05
    assert 0.25 <= share["medium"] <= 0.45
    assert 0.9 <= share["expert"] <= 1.1
