import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_learners import ToyConfig, assert_same, classifier, regression

from jaxstack.core.checkpoint import Checkpoints, Retention
from jaxstack.core.errors import UserError
from jaxstack.core.rundir import read_metrics
from jaxstack.core.runner import load_state, resume, train
from jaxstack.data.sources import IteratorData

LEARNER = regression()


class Tree(NamedTuple):
    key: jax.Array
    x: jax.Array
    flags: jax.Array
    empty: jax.Array


def tree(value=1.0, impl=None):
    return Tree(
        jax.random.split(jax.random.key(3, impl=impl), 2),
        jnp.full((2, 3), value, jnp.bfloat16),
        jnp.array([True, False]),
        jnp.zeros((2, 0)),
    )


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_round_trip_with_typed_keys_and_empty_arrays(tmp_path, impl):
    store = Checkpoints(tmp_path / "c")
    store.save(3, tree(impl=impl), {"note": 1})
    store.wait()
    step, back, meta, problems = store.restore(jax.eval_shape(lambda: tree(impl=impl)))
    store.close()
    assert (step, meta, problems) == (3, {"note": 1}, [])
    assert_same(back, tree(impl=impl))
    assert jax.tree.map(lambda x: x.dtype, back) == jax.tree.map(lambda x: x.dtype, tree(impl=impl))


def test_keeps_the_last_and_the_best(tmp_path):
    open_store = lambda: Checkpoints(tmp_path / "c", Retention(keep_last=2, keep_best=1))
    store = open_store()
    for step, score in enumerate([0.0, 9.0, 1.0, 2.0, float("nan")], start=1):
        store.save(step, tree(), {}, score)
    store.wait()
    assert store.steps() == [2, 4, 5]
    store.close()
    store = open_store()  # scores are remembered by the next process
    store.save(6, tree(), {}, 3.0)
    store.wait()
    assert store.steps() == [2, 5, 6]
    store.close()
    assert sorted(p.stem for p in (tmp_path / "checksums").iterdir()) == ["2", "5", "6"]


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "bit flip": (lambda folder: flip(largest(folder)), "is damaged"),
    "truncation": (lambda folder: os.truncate(largest(folder), 5), "is damaged"),
    "missing file": (lambda folder: largest(folder).unlink(), "is missing"),
    "no checksums": (lambda folder: (folder.parents[1] / "checksums" / f"{folder.name}.json").unlink(), "not finished"),
    "bad checksums": (
        lambda folder: (folder.parents[1] / "checksums" / f"{folder.name}.json").write_text("{"),
        "checksum file is corrupt",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_noticed_and_the_previous_checkpoint_used(tmp_path, kind):
    damage, message = DAMAGE[kind]
    store = Checkpoints(tmp_path / "c")
    store.save(1, tree(1.0), {})
    store.save(2, tree(2.0), {})
    store.wait()
    damage(tmp_path / "c" / "2")
    step, back, _, problems = store.restore(jax.eval_shape(tree))
    assert step == 1
    assert message in problems[0]
    assert_same(back, tree(1.0))
    damage(tmp_path / "c" / "1")
    with pytest.raises(UserError, match=f"no usable checkpoint .*{message}"):
        store.restore(jax.eval_shape(tree))
    store.close()


def test_damaged_metrics_are_set_aside(tmp_path):
    store = Checkpoints(tmp_path / "c")
    store.save(1, tree(1.0), {}, best=1.0)
    store.save(2, tree(2.0), {}, best=2.0)
    store.close()
    (tmp_path / "c" / "2" / "metrics" / "metrics").write_text('{"best')
    store = Checkpoints(tmp_path / "c")
    step, back, _, problems = store.restore(jax.eval_shape(tree))
    store.close()
    assert step == 1
    assert "checkpoint 2: metrics/metrics is damaged" in problems[0]
    assert (tmp_path / "damaged" / "2").is_dir()
    assert_same(back, tree(1.0))


def test_another_shape_is_refused(tmp_path):
    store = Checkpoints(tmp_path / "c")
    store.save(1, {"x": jnp.ones(3)}, {})
    store.wait()
    with pytest.raises(UserError, match=r"\['x'\]"):
        store.restore({"x": jax.ShapeDtypeStruct((4,), jnp.float32)})
    store.close()


class Before(NamedTuple):
    lr: jax.Array


class Hypers(NamedTuple):
    lr: float = 0.1
    beta: float = 3.0


class Other(NamedTuple):
    lr: Any
    gain: Any


class Run(NamedTuple):
    hypers: Any
    params: dict[str, jax.Array]


def test_a_hyperparameter_that_a_stored_state_lacks_has_its_default(tmp_path):
    store = Checkpoints(tmp_path / "c")
    store.save(1, (Run(Before(jnp.full(2, 0.5)), {"w": jnp.ones(3)}), jnp.array([True])), {})
    store.wait()
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    hypers, alive = Hypers(shape(2), shape(2)), jax.ShapeDtypeStruct((1,), jnp.bool_)  # pyright: ignore
    _, (run, _), _, _ = store.restore((Run(hypers, {"w": shape(3)}), alive))
    assert_same(run, Run(Hypers(jnp.full(2, 0.5), jnp.full(2, 3.0)), {"w": jnp.ones(3)}))  # pyright: ignore
    with pytest.raises(UserError, match=r"lacks \[0\].params\['b'\]"):  # anything else that is missing is still refused
        store.restore((Run(hypers, {"w": shape(3), "b": shape(3)}), alive))
    with pytest.raises(UserError, match=r"lacks \[0\].hypers.gain"):  # as is a field without default
        store.restore((Run(Other(shape(2), shape(2)), {"w": shape(3)}), alive))
    store.close()


def test_a_failing_disk_is_an_error_that_names_what_is_intact(tmp_path):
    import resource

    store = Checkpoints(tmp_path / "c")
    store.save(1, tree(), {})
    store.wait()
    big = {"x": jnp.asarray(np.random.default_rng(0).normal(size=100_000), jnp.float32)}
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, old[1]))  # writes beyond fail as on a full disk
    try:
        with pytest.raises(UserError, match=r"checkpoint 2 could not be saved .*intact: \[1\]"):  # noqa: PT012
            store.save(2, big, {})
            store.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    again = Checkpoints(tmp_path / "c")
    assert again.restore(jax.eval_shape(tree))[0] == 1
    again.close()


def quiet(function, *args, **options):
    return function(*args, progress=False, **options)


@pytest.mark.parametrize("dispatch", ["scan", "loop"])
def test_resume_is_the_uninterrupted_run_to_the_bit(tmp_path, dispatch):
    whole = quiet(train, LEARNER, 7, 2, run_dir=tmp_path / "a", eval_every=3, dispatch=dispatch)
    quiet(train, LEARNER, 4, 2, run_dir=tmp_path / "b", eval_every=3, chunk=3, dispatch=dispatch)
    got = quiet(resume, LEARNER, tmp_path / "b", 7, eval_every=3, chunk=2, dispatch=dispatch)
    assert_same(got.state, whole.state)
    columns = ["step", "seed", "samples", "loss/total", "train/w0"]
    assert got.metrics[columns].equals(whole.metrics[columns])
    assert read_metrics(tmp_path / "b")[columns].equals(read_metrics(tmp_path / "a")[columns])
    assert_same(load_state(LEARNER, tmp_path / "b"), whole.state)


def test_resume_after_damage_says_so_and_repeats_the_lost_part(tmp_path, capsys):
    whole = quiet(train, LEARNER, 6, 2, run_dir=tmp_path / "r", checkpoint_every=2)
    flip(largest(tmp_path / "r" / "checkpoints" / "6"))
    got = quiet(resume, LEARNER, tmp_path / "r")
    assert "is damaged; using the one of step 4" in capsys.readouterr().out
    assert_same(got.state, whole.state)
    assert got.metrics.equals(whole.metrics)
    assert json.loads((tmp_path / "r" / "run.json").read_text())["resumed_at_step"] == 4


def test_resume_with_another_config_names_the_fields(tmp_path):
    quiet(train, LEARNER, 2, run_dir=tmp_path / "r")
    with pytest.raises(UserError, match=r"config was changed .*\(width: 4 -> 5\)"):
        quiet(resume, regression(ToyConfig(width=5)), tmp_path / "r")
    with pytest.raises(UserError, match="no run found"):
        quiet(resume, LEARNER, tmp_path / "none")


def test_resume_with_lost_checkpoints_is_refused_and_without_any_begins_anew(tmp_path, capsys):
    import shutil

    whole = quiet(train, LEARNER, 2, run_dir=tmp_path / "r")
    shutil.rmtree(tmp_path / "r" / "checkpoints" / "2")
    with pytest.raises(UserError, match=r"no usable checkpoint .*checkpoint 2: is missing.*to begin anew, move"):
        quiet(resume, LEARNER, tmp_path / "r")
    (tmp_path / "r" / "checksums" / "2.json").unlink()
    got = quiet(resume, LEARNER, tmp_path / "r")
    assert "there is none); from the beginning" in capsys.readouterr().out
    assert_same(got.state, whole.state)
    assert got.metrics.equals(whole.metrics)


def test_a_frozen_seed_stays_frozen_after_resume(tmp_path):
    from toy_learners import Hypers

    hypers = Hypers(poison=jnp.array([2.0, -1.0]))
    quiet(train, LEARNER, 4, 2, hypers=hypers, run_dir=tmp_path / "r")
    got = quiet(resume, LEARNER, tmp_path / "r", 6, hypers=hypers)
    assert got.alive.tolist() == [False, True]
    whole = quiet(train, LEARNER, 6, 2, hypers=hypers)
    assert_same(got.state, whole.state)
    assert got.metrics[["step", "seed"]].equals(whole.metrics[["step", "seed"]])


class Stream:
    """A host iterator whose position is bytes, as grain's."""

    def __init__(self, length=100):
        self.at, self.length = 0, length

    def __next__(self):
        if self.at >= self.length:
            raise StopIteration
        self.at += 1
        rng = np.random.default_rng(self.at)
        return rng.normal(size=(8, 3)).astype(np.float32), rng.integers(0, 2, 8)

    def get_state(self):
        return json.dumps(self.at).encode()

    def set_state(self, state):
        self.at = json.loads(state.decode())


def test_the_position_of_an_iterator_is_resumed(tmp_path):
    learner = classifier(3, 2)
    whole = quiet(train, learner, 6, data=IteratorData(Stream()))
    quiet(train, learner, 3, data=IteratorData(Stream()), run_dir=tmp_path / "r", chunk=2)
    got = quiet(resume, learner, tmp_path / "r", 6, data=IteratorData(Stream()))
    assert_same(got.state, whole.state)
    with pytest.raises(UserError, match="ended before step 5"):
        quiet(train, learner, 6, data=IteratorData(Stream(length=4)))


KILLED = """
import sys; sys.path.insert(0, sys.argv[1])
from toy_learners import regression
from jaxstack.core.runner import train
train(regression(), 1_000_000, 2, run_dir=sys.argv[2], chunk=50, checkpoint_every=100, eval_every=-1)
"""


def test_a_killed_run_resumes_to_the_bit(tmp_path):
    run = tmp_path / "r"
    here = str(Path(__file__).parent)
    process = subprocess.Popen([sys.executable, "-c", KILLED, here, str(run)], stdout=subprocess.DEVNULL)
    give_up = time.monotonic() + 120
    while len(list(run.glob("checksums/*.json"))) < 2 and process.poll() is None and time.monotonic() < give_up:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = int(read_last_line(run / "metrics.jsonl"))
    got = quiet(resume, LEARNER, run, reached + 5, eval_every=-1)
    whole = quiet(train, LEARNER, reached + 5, 2, eval_every=-1)
    assert_same(got.state, whole.state)
    assert got.metrics.equals(whole.metrics)


def read_last_line(path):
    return json.loads([line for line in path.read_text().splitlines() if line.endswith("}")][-1])["step"]


def test_errno_of_a_full_disk_is_reported(tmp_path, monkeypatch):
    store = Checkpoints(tmp_path / "c")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store._manager, "save", full)
    with pytest.raises(UserError, match=r"No space left on device.*intact: none"):
        store.save(1, tree(), {})
    store.close()
