"""Folders of Minari: written and read again, read by the library where it is there, its other formats, bad input."""

import json

import numpy as np
import pytest

from jaxstack import cli
from jaxstack.core.errors import UserError
from jaxstack.data import minari
from jaxstack.data.files import load_dataset, save_dataset
from jaxstack.data.offline import DatasetInfo, dataset

INFO = DatasetInfo("gymnax/Pendulum-v1", ("max_steps_in_episode=5",), "medium", -1200.0, -150.0, "here", 3, "abc")


def played(discrete=False, **changes):
    """Two episodes of 3 and 2 steps, the first terminated."""
    walk = np.arange(7, dtype=np.float32)[:, None] * [1.0, -0.5]
    obs, after = np.delete(walk, [3, 6], 0), np.delete(walk, [0, 4], 0)
    action = np.array([0, 2, 1, 0, 1]) if discrete else np.linspace(-1, 1, 5)[:, None]
    rows = dict(obs=obs, next_obs=after, action=action, reward=np.arange(5) / 3, log_prob=-np.arange(5.0))
    rows |= dict(terminated=[0, 0, 1, 0, 0], truncated=[0, 0, 0, 0, 1], episode=[4, 4, 4, 9, 9])
    return dataset("played", INFO, **(rows | changes))


@pytest.mark.parametrize("discrete", [False, True])
def test_a_folder_there_and_back(tmp_path, monkeypatch, capsys, discrete):
    pytest.importorskip("h5py")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    data = played(discrete)
    path = save_dataset(tmp_path / "walk" / "medium-v0", data, 3 if discrete else (-2.0, 2.0))
    again = load_dataset("walk/medium-v0")
    assert again.info == INFO
    assert again.episode.tolist() == [0, 0, 0, 1, 1]
    for name, x in (data._replace(episode=again.episode)).arrays().items():
        np.testing.assert_array_equal(again.arrays()[name], x)
        assert again.arrays()[name].dtype == x.dtype
    about = json.loads((path / minari.META).read_text())
    assert (about["dataset_id"], about["total_episodes"], about["total_steps"]) == ("walk/medium-v0", 2, 5)
    space = json.loads(about["action_space"])
    assert space["n"] == 3 if discrete else (space["low"], space["high"], space["shape"]) == ([-2.0], [2.0], [1])
    more = save_dataset(tmp_path / "other" / "medium-v0", again, 3 if discrete else (-2.0, 2.0))
    assert (more / minari.HDF5).read_bytes() == (path / minari.HDF5).read_bytes()
    assert cli.main(["info", "walk/medium-v0"]) == 0
    assert "env = gymnax/Pendulum-v1 max_steps_in_episode=5" in capsys.readouterr().out


def test_what_minari_cannot_hold_is_named(tmp_path):
    pytest.importorskip("h5py")
    walk = played()
    moved = walk.next_obs.copy()
    moved[1] += 1
    cases = (
        (played(next_obs=moved), r"a-v0: next_obs: row 1 is followed by another observation, expected that of row 2"),
        (played(next_obs=None), r"a-v0: found 1 rows without a known next observation, first at row 4"),
    )
    for data, message in cases:
        with pytest.raises(UserError, match=message):
            save_dataset(tmp_path / "a-v0", data)
    assert save_dataset(tmp_path / "a-v0", played(next_obs=None).learning_view()).is_dir()
    for name, message in (("a-v0", "found a data set of Minari, expected a new name"), ("a", "expected a name ending")):
        with pytest.raises(UserError, match=f"{name}: {message}"):
            save_dataset(tmp_path / name, walk)
    about = json.loads((tmp_path / "a-v0" / minari.META).read_text())
    image = json.dumps(dict(type="Box", dtype="uint8", shape=[64, 64, 3], low=0, high=255))
    for change, message in (
        ({"data_format": "csv"}, "data_format: found 'csv', expected one of hdf5, arrow, parquet"),
        ({"observation_space": image, "jpeg_encoding": True}, r"found images \(64, 64, 3\) as JPEG, expected numbers"),
        ({"action_space": "{"}, "action_space: not readable"),
    ):
        (tmp_path / "a-v0" / minari.META).write_text(json.dumps(about | change))
        with pytest.raises(UserError, match=message):
            load_dataset(tmp_path / "a-v0")


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # of missing links and authors
@pytest.mark.parametrize("form", ["hdf5", "arrow", "parquet"])
def test_the_library_reads_what_is_written_and_writes_what_is_read(tmp_path, monkeypatch, form):
    library, spaces = pytest.importorskip("minari"), pytest.importorskip("gymnasium").spaces
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    data = played()
    save_dataset(tmp_path / "walk" / "medium-v0", data, (-2.0, 2.0))
    theirs = library.load_dataset("walk/medium-v0")
    assert theirs.action_space == spaces.Box(-2, 2, (1,))
    buffers = []
    for number, episode in enumerate(theirs.iterate_episodes()):
        rows = data.episode == [4, 9][number]
        np.testing.assert_array_equal(episode.observations[:-1], data.obs[rows])
        np.testing.assert_array_equal(episode.observations[1:], data.next_obs[rows])
        for name, x in (("actions", data.action), ("rewards", data.reward), ("terminations", data.terminated)):
            np.testing.assert_array_equal(getattr(episode, name), x[rows])
        np.testing.assert_array_equal(episode.infos["log_prob"][1:], data.log_prob[rows])
        parts = {k: getattr(episode, k) for k in ("observations", "actions", "rewards", "terminations", "truncations")}
        parts["infos"] = episode.infos
        buffers.append(library.data_collector.EpisodeBuffer(**parts))
    made = dict(action_space=theirs.action_space, observation_space=theirs.observation_space, data_format=form)
    library.create_dataset_from_buffers("walk/made-v0", buffers, **made)
    got = load_dataset("walk/made-v0")
    assert got.info.env == "walk/made-v0"
    for name in ("obs", "action", "reward", "next_obs", "terminated", "truncated", "log_prob"):
        np.testing.assert_array_equal(got.arrays()[name], data.arrays()[name])
