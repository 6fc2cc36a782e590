"""Data sets of transitions: files there and back, bad input, returns-to-go in closed form, batches, scores."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxstack
from jaxstack import cli
from jaxstack.core.errors import UserError
from jaxstack.data import offline, scores
from jaxstack.data.files import load_dataset, save_dataset
from jaxstack.data.offline import DatasetInfo, OfflineData, dataset, returns_to_go, soft_returns_to_go


def made(lengths=(4, 3, 5), last="truncated", seed=0, **changes):
    """Episodes of 3 numbers and 2 actions: all but the last terminate."""
    rng = np.random.default_rng(seed)
    count = sum(lengths)
    ends = np.cumsum(lengths) - 1
    flags = np.zeros((2, count), bool)
    flags[0, ends[:-1]] = True
    if last:
        flags[["terminated", "truncated"].index(last), ends[-1]] = True
    obs = rng.normal(size=(count, 3)).astype(np.float32)
    rows = dict(
        obs=obs,
        action=rng.uniform(-1, 1, (count, 2)),
        reward=rng.normal(size=count),
        next_obs=obs + 1,
        terminated=flags[0],
        truncated=flags[1],
    )
    return rows | changes


INFO = DatasetInfo("gymnax/Pendulum-v1", ("max_steps_in_episode=5",), "medium", -1200.0, -150.0, "here", 3, "abc")


def test_npz_there_and_back_and_equal_data_give_equal_bytes(tmp_path, capsys):
    data = dataset("made", INFO, **made(), log_prob=np.arange(12))
    path = save_dataset(tmp_path / "medium.npz", data)
    again = jaxstack.load_dataset(path)
    assert again.info == data.info
    for name, x in data.arrays().items():
        np.testing.assert_array_equal(getattr(again, name), x)
        assert getattr(again, name).dtype == x.dtype
    assert save_dataset(tmp_path / "again.npz", again).read_bytes() == path.read_bytes()
    assert again.digest() == data.digest() != dataset("other", INFO, **made(seed=1)).digest()
    assert list(again.episode) == [0] * 4 + [1] * 3 + [2] * 5
    np.testing.assert_allclose(again.episode_returns(), [data.reward[a:b].sum() for a, b in ((0, 4), (4, 7), (7, 12))])
    assert cli.main(["info", str(path)]) == 0
    said = capsys.readouterr().out
    for line in (
        "transitions = 12",
        "episodes = 3, terminated 2, truncated 1",
        "actions = (2,) float32",
        "weights = abc",
    ):
        assert line in said
    score = scores.normalised_score(float(data.episode_returns().mean()), scores.Reference(-1200, -150, ""))
    assert f"normalised score = {score:.1f}" in said


@pytest.mark.parametrize("stored", [True, False])
def test_d4rl_hdf5_with_and_without_next_observations(tmp_path, stored):
    h5py = pytest.importorskip("h5py")
    rows = made()
    path = tmp_path / "hopper-medium-v2.hdf5"
    keys = dict(observations="obs", actions="action", rewards="reward", terminals="terminated", timeouts="truncated")
    keys |= dict(next_observations="next_obs") if stored else {}
    with h5py.File(path, "w") as file:
        for key, name in keys.items():
            file[key] = rows[name]
        file["infos/action_log_probs"] = np.zeros(12)
    data = load_dataset(path)
    assert data.size == 12
    assert data.info.stored_next == stored
    assert data.info.scores == scores.REFERENCES["hopper"]
    assert data.log_prob is not None
    view = data.learning_view()
    # without next observations the row that the time limit cut has nothing to bootstrap from
    assert view.size == (12 if stored else 11)
    if stored:
        np.testing.assert_array_equal(view.next_obs, rows["next_obs"])
    else:
        going_on = ~(view.terminated | view.truncated)
        np.testing.assert_array_equal(view.next_obs[going_on], rows["obs"][1:][going_on])
    with h5py.File(path, "a") as file:
        del file["actions"], file["timeouts"], file["infos"]
    with pytest.raises(
        UserError, match=r"hopper-medium-v2.hdf5: key 'actions' is missing, found .*observations.*rewards"
    ):
        load_dataset(path)
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a readable HDF5 file"):
        load_dataset(path)


def test_folders_of_minari(tmp_path, monkeypatch, capsys):
    h5py = pytest.importorskip("h5py")
    folder = tmp_path / "task" / "small-v0"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "metadata.json").write_text(json.dumps({"dataset_id": "task/small-v0", "data_format": "hdf5"}))

    def write(change=lambda file: None):
        with h5py.File(folder / "data" / "main_data.hdf5", "w") as file:
            # more than ten: numbers decide the order, not names
            for k in range(11):
                group = file.create_group(f"episode_{k}")
                group["observations"] = np.arange(3.0)[:, None] + 10 * k
                group["actions"] = np.full((2, 1), 0.1 * k)
                group["rewards"] = np.float32([k, -k])
                group["terminations"] = [False, k % 2 == 0]
                group["truncations"] = [False, True]
            change(file)

    write()
    data = load_dataset(folder)
    assert data.info.env == "task/small-v0"
    assert data.episode.tolist() == [k for k in range(11) for _ in range(2)]
    assert data.reward.tolist() == [r for k in range(11) for r in (k, -k)]
    np.testing.assert_array_equal(data.obs[:, 0], [10 * k + t for k in range(11) for t in range(2)])
    np.testing.assert_array_equal(data.next_obs, data.obs + 1)
    assert data.terminated.sum() == 6
    assert data.truncated.sum() == 5
    assert data.has_next.all()
    # by its id
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    assert load_dataset("task/small-v0").digest() == data.digest()
    assert cli.main(["info", str(folder)]) == 0
    assert "transitions = 22" in capsys.readouterr().out

    def shorter(file):
        del file["episode_3/rewards"]
        file["episode_3/rewards"] = [1.0]

    def parts(file):
        del file["episode_0/observations"]
        file.create_group("episode_0/observations/image")

    def missing(file):
        del file["episode_2/actions"]

    for change, message in (
        (shorter, "episode_3: observations: found 3, expected 2, one more than rewards"),
        (parts, "episode_0: observations: found parts image, expected one array"),
        (missing, "episode_2: key 'actions' is missing, found observations, rewards"),
        (lambda file: file.clear(), "found no episodes"),
    ):
        write(change)
        with pytest.raises(UserError, match=message):
            load_dataset(folder)


def test_the_json_of_ptgood_tells_cut_episodes_by_their_observations(tmp_path, capsys):
    obs = [[0.0], [1.0], [5.0], [6.0], [7.0]]
    fields = dict(observations=obs, actions=[[0.1]] * 5, rewards=[0, 1, 2, 3, 4])
    fields |= dict(next_observations=[[1.0], [2.0], [6.0], [9.0], [8.0]], terminals=[0, 0, 0, 1, 0])
    file = tmp_path / "walker.json"
    file.write_text(json.dumps(fields))
    data = load_dataset(file)
    assert data.terminated.tolist() == [False, False, False, True, False]
    assert data.truncated.tolist() == [False, True, False, False, False]
    assert data.episode.tolist() == [0, 0, 1, 1, 2]
    assert data.reward.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(data.next_obs[:, 0], [1, 2, 6, 9, 8])
    assert cli.main(["info", str(file)]) == 0
    assert "episodes = 3, terminated 1, truncated 1" in capsys.readouterr().out
    for change, message in (
        (dict(rewards=None), "walker.json: key 'rewards' is missing, found actions, next_observations, observations"),
        (dict(actions=[[1], [2, 3]]), "walker.json: actions: expected numbers in rows of one length"),
        (dict(rewards=["a"] * 5), "walker.json: rewards: expected numbers"),
        (dict(terminals=[0]), "walker.json: .*terminated"),
    ):
        file.write_text(json.dumps({k: v for k, v in (fields | change).items() if v is not None}))
        with pytest.raises(UserError, match=message):
            load_dataset(file)
    for text in ("{", "[1]"):
        file.write_text(text)
        with pytest.raises(UserError, match=r"walker\.json: (not a readable JSON file|key 'observations' is missing)"):
            load_dataset(file)


def test_bad_input_is_named(tmp_path):
    bad = made()["reward"]
    bad[[5, 7]] = np.nan, np.inf
    cases = [
        (dict(reward=bad), "x: reward: 2 entries are not finite, first at row 5"),
        (dict(reward=np.zeros(3)), "x: reward: found 3 rows, expected 12, as many as obs"),
        (dict(reward=None), "x: reward is missing, found obs, action, next_obs, terminated, truncated"),
        (dict(obs=np.zeros((0, 3))), "x: found no rows"),
        (dict(obs=np.array([object()] * 12)), "x: obs: found object, expected numbers"),
        (dict(next_obs=np.zeros((12, 2))), "x: next_obs: found shape (12, 2), expected (12, 3), that of obs"),
        (dict(truncated=made()["terminated"]), "terminated and truncated are both true in 2 rows, first at row 3"),
        (
            dict(episode=[0] * 4 + [1] * 3 + [0] * 5),
            "episode: the rows of episode 0 are not together, it begins again at row 7",
        ),
        (dict(episode=[0] * 12), "episode 0 continues after its end at row 3"),
    ]
    for changes, message in cases:
        with pytest.raises(UserError) as e:
            dataset("x", **made(**changes))
        assert message in str(e.value)
    data = dataset("x", **made())
    fits = lambda shape=(3,), low=(-1.0, -1.0), high=(1.0, 1.0): offline.check_fits(data, "x", "env", shape, low, high)
    fits()
    with pytest.raises(UserError, match=r"x: obs \[12, 3\] do not fit env, whose observations are \(4,\)"):
        fits((4,))
    with pytest.raises(UserError, match=r"x: actions \[12, 2\] do not fit env, whose actions are \(1,\)"):
        fits(low=(-1.0,), high=(1.0,))
    with pytest.raises(
        UserError, match=r"action: 100% of the rows are outside the bounds -0.1 to 0.1 of env, the larg"
    ):
        fits(low=(-0.1, -0.1), high=(0.1, 0.1))
    for name, message in (("x.txt", "expected one of .npz"), ("x.npz", "found no such file")):
        with pytest.raises(UserError, match=message):
            load_dataset(tmp_path / name)
    np.savez(tmp_path / "p.npz", **made(reward=np.array([{}] * 12)))
    with pytest.raises(UserError, match=r"p.npz: reward: found pickled objects, expected numbers"):
        load_dataset(tmp_path / "p.npz")
    np.savez(tmp_path / "u.npz", **made(), rewards=np.zeros(12))
    with pytest.raises(UserError, match=r"u.npz: found array 'rewards', expected only"):
        load_dataset(tmp_path / "u.npz")
    for info in (json.dumps({"format": 7}), "{", json.dumps({"format": 1, "colour": 3})):
        np.savez(tmp_path / "i.npz", **made(), info=np.array(info))
        with pytest.raises(UserError, match=r"i.npz: (format 7, expected 1|info: not a description)"):
            load_dataset(tmp_path / "i.npz")
    (tmp_path / "b.npz").write_bytes(b"PK nothing")
    with pytest.raises(UserError, match="not a readable NPZ file"):
        load_dataset(tmp_path / "b.npz")
    with pytest.raises(UserError, match=r"expected a name ending in .npz, or in -v"):
        save_dataset(tmp_path / "x.h5", data)


def direct(reward, entropy, terminated, truncated, gamma, alpha, correct):
    """Sums of each episode, written out."""
    out, start = [], 0
    done = terminated | truncated
    done[-1] = True
    for end in np.flatnonzero(done):
        r, h = reward[start : end + 1].astype(np.float64), entropy[start : end + 1].astype(np.float64)
        if correct and not terminated[end]:
            r, h = np.append(r, [r[-1]] * 4000), np.append(h, [h[-1]] * 4000)
        for t in range(end + 1 - start):
            k = np.arange(len(r) - t)
            out.append((gamma**k * r[t:]).sum() + alpha * (gamma**k * h[t:])[1:].sum())
        start = end + 1
    return np.array(out)


def test_returns_to_go_equal_their_sums_and_closed_forms():
    one, no = jnp.ones(4), jnp.zeros(4, bool)
    last = no.at[3].set(True)
    assert float(returns_to_go(one, last, no, 0.9)[0]) == pytest.approx(3.439)
    for truncated in (last, no):  # a time limit, the end of the data
        np.testing.assert_allclose(returns_to_go(one, no, truncated, 0.9), [10.0] * 4, rtol=1e-5)
        assert float(returns_to_go(one, no, truncated, 0.9, False)[0]) == pytest.approx(3.439)
    # r = 0, H = 1, alpha = 1: gamma / (1 - gamma) where the episode has no end
    np.testing.assert_allclose(soft_returns_to_go(0 * one, one, no, last, 0.9, 1.0), [9.0] * 4, rtol=1e-5)
    data = dataset("x", **made((6, 1, 9, 4)))
    rng = np.random.default_rng(1)
    entropy = rng.normal(size=data.size).astype(np.float32)
    flags = data.terminated, data.truncated
    for correct in (True, False):
        soft = jax.jit(lambda g, a, c=correct: soft_returns_to_go(data.reward, entropy, *flags, g, a, c))(0.97, 0.3)
        np.testing.assert_allclose(soft, direct(data.reward, entropy, *flags, 0.97, 0.3, correct), rtol=2e-4, atol=1e-4)
        hard = returns_to_go(data.reward, *flags, 0.97, correct)
        np.testing.assert_allclose(hard, direct(data.reward, 0 * entropy, *flags, 0.97, 0.0, correct), rtol=2e-4)
        np.testing.assert_array_equal(hard, soft_returns_to_go(data.reward, 0 * entropy, *flags, 0.97, 5.0, correct))
        np.testing.assert_allclose(returns_to_go(2 * data.reward, *flags, 0.97, correct), 2 * hard, rtol=1e-6)


def test_batches_are_drawn_inside_and_bring_the_statistics():
    data = dataset("x", **made())
    mean, std = offline.state_statistics(data)
    np.testing.assert_allclose(mean, data.obs.mean(0), rtol=1e-5)
    np.testing.assert_allclose(std, data.obs.std(0) + 1e-3, rtol=1e-5)
    source = OfflineData({"row": np.arange(12), "obs": data.obs}, {"mean": mean}, 500)
    items = source.item([0, 1])
    assert items.shape == ()
    items = np.zeros(3, np.int32)
    source.items(5, 3, [0, 1], items)
    draw = jax.jit(lambda c, k: source.batch(c, items[1], k))
    rows, shared, number = draw(source.constants(), jax.random.key(0))
    assert int(number) == 6
    np.testing.assert_array_equal(rows["obs"], data.obs[rows["row"]])
    np.testing.assert_array_equal(shared["mean"], mean)
    assert set(np.asarray(rows["row"])) == set(range(12))
    other, *_ = draw(source.constants(), jax.random.key(1))
    assert bool(jnp.any(other["row"] != rows["row"]))
    # the action after a row, where its episode has one
    action, known = data.next_action()
    np.testing.assert_array_equal(action[known], data.action[1:][known[:-1]])
    assert list(np.flatnonzero(~known)) == [3, 6, 11]


def test_scores_are_found_by_the_longest_name():
    for name, task in (
        ("hopper-medium-replay-v2", "hopper"),
        ("maze2d_umaze_dense-v1", "maze2d-umaze-dense"),
        ("maze2d-umaze-v1", "maze2d-umaze"),
        ("antmaze-large-diverse-v2", "antmaze"),
        ("ant-random-v2", "ant"),
    ):
        assert scores.reference(name) is scores.REFERENCES[task]
    assert scores.reference("hopperish") is None
    hopper = scores.REFERENCES["hopper"]
    assert scores.normalised_score(hopper.random, hopper) == 0.0
    assert scores.normalised_score(hopper.expert, hopper) == 100.0
    assert all(r.source and r.expert > r.random for r in scores.REFERENCES.values())
    with pytest.raises(UserError, match="expected two that differ"):
        scores.normalised_score(1.0, scores.Reference(2.0, 2.0, ""))
