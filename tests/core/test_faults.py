"""Damaged files, full disks, second processes, signals: what was saved stays, and one clear message says the rest."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import children
import jax
import jax.numpy as jnp
import pytest
from toy_learners import Hypers, assert_same, regression

from jaxstack import agents, cli
from jaxstack.cli import runs
from jaxstack.core import bundle, checkpoint, export, program, signals
from jaxstack.core.checkpoint import Checkpoints
from jaxstack.core.errors import UserError
from jaxstack.core.ledger import Ledger
from jaxstack.core.rundir import RunDir, read_plan
from jaxstack.core.runner import Interrupted, load_state, resume, train
from jaxstack.learners import load_policy

LEARNER = regression()
SMALL = "--num-envs 2 --num-steps 4 --num-minibatches 1 --num-epochs 1 --eval-every -1 --dispatch scan".split()
TRAIN = "train ppo --env matrix_game --env-args num_agents=1 num_actions=3".split() + SMALL


def flip(path):
    data = bytearray(path.read_bytes()) or bytearray(b"\0")
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "a flipped bit": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] or b"\0"),
    "missing": Path.unlink,
}


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def go(function, *args, **options):
    return function(LEARNER, *args, progress=False, eval_every=-1, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 6 steps with checkpoints of steps 4 and 6."""
    path = tmp_path_factory.mktemp("whole") / "r"
    return path, go(train, 6, 2, run_dir=path, checkpoint_every=2, chunk=2)


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole[0], tmp_path / "r")


def test_every_file_of_a_checkpoint_is_checked_and_what_is_damaged_is_kept(tmp_path):
    state = lambda value: {"x": jnp.full(4, value), "y": jnp.arange(3)}
    store = Checkpoints(tmp_path / "r" / "checkpoints")
    for step in (1, 2):
        store.save(step, state(float(step)), {"note": step}, best=float(step))
    store.close()
    parts = [p.relative_to(tmp_path / "r") for p in sorted((tmp_path / "r" / "checkpoints" / "2").rglob("*"))]
    parts = [p for p in parts if (tmp_path / "r" / p).is_file()]
    assert len(parts) > 8
    for i, part in enumerate([*parts, Path("checksums/2.json")]):
        for kind, damage in DAMAGE.items():
            copy = shutil.copytree(tmp_path / "r", tmp_path / f"{i}-{kind}")
            damage(copy / part)
            before = files(copy / "checkpoints" / "2")
            store = Checkpoints(copy / "checkpoints")
            step, back, meta, problems = store.restore(jax.eval_shape(lambda: state(0.0)))
            assert (step, meta["note"], len(problems)) == (1, 1, 1), (part, kind, problems)
            assert problems[0].startswith("checkpoint 2: ")
            assert_same(back, state(1.0))
            store.set_aside_after(step)
            store.save(2, state(3.0), {"note": 3}, best=1.0)
            store.close()
            assert files(copy / "damaged" / "2") == before, (part, kind)


def test_a_damaged_run_is_looked_at_without_moving_anything(run):
    flip(run / "checkpoints" / "6" / "meta" / "metadata")
    (run / "checkpoints" / "8.orbax-checkpoint-tmp").mkdir()  # as if a process were saving just now
    before = files(run)
    state = load_state(LEARNER, run)
    assert state.step.tolist() == [4, 4]
    assert files(run) == before
    assert (run / "checkpoints" / "8.orbax-checkpoint-tmp").is_dir()
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match=r"no usable checkpoint .*checkpoint 6: is missing"):
        load_state(LEARNER, run)


@pytest.mark.parametrize("kind", ["truncated", "missing"])
def test_a_damaged_plan_is_noticed_and_can_be_restored(run, kind):
    before = (run / "run.yaml").read_bytes()
    DAMAGE[kind](run / "run.yaml")
    with pytest.raises(UserError, match=r"run\.yaml.*`cp .*checksums/run\.yaml .*run\.yaml`"):
        go(resume, run)
    shutil.copy(run / "checksums" / "run.yaml", run / "run.yaml")
    assert (run / "run.yaml").read_bytes() == before
    assert go(resume, run).metrics.step.max() == 6


def test_every_flipped_bit_of_a_plan_is_noticed(run):
    data = (run / "run.yaml").read_bytes()
    start = data.index(b"\n")
    plan = read_plan(run)
    for i in range(start, len(data)):
        (run / "run.yaml").write_bytes(data[:i] + bytes([data[i] ^ (1 << i % 8)]) + data[i + 1 :])
        with pytest.raises(UserError, match=r"run\.yaml"):
            read_plan(run)
    (run / "run.yaml").write_bytes(data[start + 1 :])  # whoever changes it removes the first line
    assert read_plan(run) == plan


def damage_line(path, step, how):
    lines = path.read_bytes().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if json.loads(line)["step"] == step)
    lines[at] = {
        "torn": lines[at][:20],
        "lost": b"",
        "flipped": lines[at].replace(b'"loss/total": ', b'"loss/total": 1'),
    }[how]
    path.write_bytes(b"".join(lines))


@pytest.mark.parametrize("how", ["torn", "lost", "flipped"])
def test_damaged_metrics_are_written_again_from_the_checkpoint_before_them(whole, run, how, capsys):
    damage_line(run / "metrics.jsonl", 5, how)
    got = go(resume, run, checkpoint_every=2, chunk=2)
    said = capsys.readouterr().out
    assert "checkpoint 6: metrics.jsonl" in said
    assert "using the one of step 4" in said
    assert got.metrics.equals(whole[1].metrics)
    assert (run / "metrics.jsonl").read_bytes() == (whole[0] / "metrics.jsonl").read_bytes()
    assert files(run / "damaged" / "6") == files(whole[0] / "checkpoints" / "6")


@pytest.mark.parametrize("how", ["torn", "lost", "flipped"])
def test_metrics_damaged_before_all_checkpoints_are_kept_as_they_are(whole, run, how, capsys):
    damage_line(run / "metrics.jsonl", 1, how)
    before = (run / "metrics.jsonl").read_bytes()
    got = go(resume, run, 8)
    said = capsys.readouterr().out
    assert "checkpoint 6: metrics.jsonl" in said
    assert "using the one of step 6" in said
    assert (run / "damaged" / "metrics.jsonl").read_bytes() == before
    assert len(got.metrics) == 16 - {"torn": 2, "lost": 1, "flipped": 0}[how]  # a torn line runs into the next
    later = got.metrics[got.metrics.step > 1].reset_index(drop=True)
    assert later.equals(go(train, 8, 2).metrics[2:].reset_index(drop=True))


def test_missing_metrics_do_not_hinder(run, capsys):
    (run / "metrics.jsonl").unlink()
    assert go(resume, run, 7).metrics.step.tolist() == [7, 7]
    assert "metrics.jsonl is missing" in capsys.readouterr().out


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_records_are_set_aside_and_written_anew(run, kind, capsys):
    (run / "run.json").write_bytes((run / "run.json").read_bytes().replace(b"{", b"\xff"))
    if kind == "missing":
        (run / "run.json").unlink()
    DAMAGE[kind](run / "ledger.json")
    go(resume, run, 7)
    assert "run.json: missing or damaged" in capsys.readouterr().out
    facts = json.loads((run / "run.json").read_text())
    assert (facts["status"], facts["resumed_at_step"]) == ("finished", 6)
    assert facts["versions"]["jax"] == jax.__version__
    assert (kind == "missing") != (run / "damaged" / "run.json").exists()
    assert json.loads((run / "ledger.json").read_text())[0]["name"] == "chunk"


def test_a_run_without_checkpoint_begins_anew_with_its_own_hyperparameters(tmp_path, capsys):
    hypers = Hypers(lr=jnp.array([0.1, 0.3]))
    whole = go(train, 4, 2, hypers=hypers)
    sink = Stop(at=1)
    with pytest.raises(ZeroDivisionError):
        go(train, 4, 2, hypers=hypers, chunk=1, run_dir=tmp_path / "r", sinks=[sink])
    got = go(resume, tmp_path / "r")
    assert "from the beginning" in capsys.readouterr().out
    assert_same(got.state, whole.state)
    assert got.metrics.equals(whole.metrics)


def test_a_directory_without_plan_can_be_begun(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".run.yaml.part").write_text("agent: to")  # killed while it was written
    assert go(train, 2, run_dir=tmp_path).metrics.step.max() == 2


class Stop:
    """A sink that fails, or sends a signal, once step `at` was reported."""

    def __init__(self, at, signum=None):
        self.at, self.signum = at, signum

    def write(self, rows):
        if rows[-1]["step"] >= self.at:
            self.at = 10**9
            if self.signum is None:
                raise ZeroDivisionError
            signal.raise_signal(self.signum)

    def close(self):
        pass


@contextlib.contextmanager
def small_disk(path):
    """Yields (folder, fill(child, left), clear(child)): a file system of 4 MB where one may be mounted, else a limit on
    the size of the child's files, whose errors differ in nothing but their text."""
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)], capture_output=True, check=False
    )
    if mounted.returncode:
        yield path, lambda child, left: resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (left, left)), lambda: None
        return

    def fill(child, left):
        free = os.statvfs(path)
        with contextlib.suppress(OSError):  # the child may have been faster
            (path / "filler").write_bytes(b"x" * max(free.f_bavail * free.f_frsize - left, 0))

    try:
        yield path, fill, (path / "filler").unlink
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.parametrize("what", ["metrics", "checkpoint"])
def test_a_full_disk_is_one_error_and_the_run_goes_on_once_there_is_space(what, tmp_path):
    width, every, left = (4, 200, 0) if what == "metrics" else (192, 20, 200_000)
    with small_disk(tmp_path / "disk") as (disk, fill, clear):
        run, log = disk / "r", tmp_path / "log"
        argv = [*TRAIN, "--hidden", width, "--total-steps", 8 * 100_000, "--chunk", 10, "--checkpoint-every", every]
        child = children.start([*argv, "--run-dir", run], log)
        children.wait_for(child, lambda: list(run.glob("checksums/*.json")))
        fill(child, left)
        assert children.finish(child) == 2, log.read_text()
        errors = [line for line in log.read_text().splitlines() if line.startswith("jaxstack: ")]
        assert len(errors) == 1
        assert "Traceback" not in log.read_text()
        # which of the two meets the full disk first depends on the machine; `left` makes it likely to be `what`
        assert "metrics.jsonl: cannot be written (" in errors[0] or " could not be saved (" in errors[0]
        learner, _ = runs.load(str(run))
        saved = int(load_state(learner, run).step[0])
        assert saved > 0
        assert saved % every == 0
        clear()
        (run / "run.json").touch()
        before = children.stamp(run / "ledger.json")
        child = children.start(["resume", run], log)
        children.wait_for(child, lambda: children.stamp(run / "ledger.json") > before)
        children.wait_for(child, lambda: (run / "checksums" / f"{saved + every}.json").exists())
        os.kill(child.pid, signal.SIGINT)
        assert children.finish(child) == 130, log.read_text()
        assert json.loads((run / "run.json").read_text())["resumed_at_step"] == saved
        steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, len(steps) + 1))


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path, capsys, monkeypatch):
    run, log = tmp_path / "r", tmp_path / "log"
    argv = [*TRAIN, "--hidden", "4", "--total-steps", str(8 * 10**7), "--checkpoint-every", "10", "--run-dir", str(run)]
    child = children.start(argv, log)
    children.wait_for(child, lambda: list(run.glob("checksums/*.json")))
    monkeypatch.setattr(program, "build", lambda *_, **__: pytest.fail("refused only after compiling"))
    assert cli.main(["resume", str(run)]) == 2
    assert "in use by another process" in capsys.readouterr().err
    assert cli.main(argv) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert runs.load(str(run))[0].name == "ppo"
    child.kill()
    assert children.finish(child) == -9
    RunDir.open(run).close()
    monkeypatch.undo()
    child = children.start(["resume", run], log)
    before = children.stamp(run / "ledger.json")
    children.wait_for(child, lambda: children.stamp(run / "ledger.json") > before)
    os.kill(child.pid, signal.SIGTERM)
    assert children.finish(child) == 143, log.read_text()
    assert (
        f"jaxstack: stopped after step {steps_of(run)} of 10000000; `jaxstack resume {run}` continues"
        in log.read_text()
    )


def steps_of(run):
    return json.loads((run / "run.json").read_text())["step"]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_compiling_leaves_a_run_that_can_be_resumed(signum, code, tmp_path, capsys, monkeypatch):
    run = tmp_path / "r"
    build = program.build
    raise_signal = lambda *args, **options: (signal.raise_signal(signum), build(*args, **options))[1]
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(program, "build", raise_signal)
    argv = [*TRAIN, "--hidden", "4", "--total-steps", "16", "--run-dir", str(run)]
    assert cli.main(argv) == code
    assert f"stopped after step 0 of 2; `jaxstack resume {run}` continues" in capsys.readouterr().err
    assert cli.main(["resume", str(run)]) == code
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    monkeypatch.undo()
    assert cli.main(["resume", str(run)]) == 0
    assert steps_of(run) == 2


INTERRUPTED = """
import os, signal, sys, threading
from jaxstack import cli
from jaxstack.core import aside

begin = aside.begin

def then_interrupt(name, work):
    if name == "chunk":
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    return begin(name, work)

aside.begin = then_interrupt
sys.exit(cli.main())
"""


def test_an_interrupt_in_the_compiler_ends_the_process_with_one_line(tmp_path):
    """Raised inside XLA's compiler, it would leave it with objects that are gone: a segmentation fault."""
    run = tmp_path / "r"
    argv = [*TRAIN, "--hidden", "64", "64", "--num-epochs", "4", "--total-steps", "16", "--run-dir", str(run)]
    env = os.environ | {"JAXSTACK_CACHE": "off"}
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, *argv], capture_output=True, text=True, env=env)
    assert done.returncode == 130, done.stderr
    assert done.stderr == f"jaxstack: stopped after step 0 of 2; `jaxstack resume {run}` continues\n"


def test_a_signal_that_the_compiler_swallows_is_not_lost(tmp_path, monkeypatch):
    build = program.build

    def swallowing(*args, **options):
        with contextlib.suppress(Interrupted):
            signal.raise_signal(signal.SIGTERM)
        return build(*args, **options)

    monkeypatch.setattr(program, "build", swallowing)
    with pytest.raises(Interrupted, match="nothing was saved: the run has no directory"):
        go(train, 4)
    with pytest.raises(Interrupted, match="stopped after step 0 of 4; `jaxstack resume"):
        go(train, 4, run_dir=tmp_path / "r")


def test_a_signal_that_was_swallowed_is_seen_when_the_next_program_is_compiled():
    caught = []
    with signals.collected(caught, at_once=True):
        with contextlib.suppress(Interrupted):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(Interrupted, match="stopped while compiling"):
            Ledger().compile("next", jnp.sin, 1.0)
    assert Ledger().compile("next", jnp.sin, 1.0)(1.0) == jnp.sin(1.0)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_a_checkpoint_lets_it_finish(signum, whole, tmp_path, monkeypatch):
    write = checkpoint.write_whole

    def slow(path, text):
        if path.name == "2.json":
            signal.raise_signal(signum)
        write(path, text)

    monkeypatch.setattr(checkpoint, "write_whole", slow)
    with pytest.raises(Interrupted, match=r"stopped after step [24] of 6") as e:
        go(train, 6, 2, run_dir=tmp_path / "r", checkpoint_every=2, chunk=2)
    assert e.value.signum == signum
    assert Checkpoints(tmp_path / "r" / "checkpoints").damage(2) is None
    monkeypatch.undo()
    got = go(resume, tmp_path / "r", checkpoint_every=2, chunk=2)
    assert_same(got.state, whole[1].state)
    assert got.metrics.equals(whole[1].metrics)


def test_a_signal_during_the_last_checkpoint_ends_nothing(whole, tmp_path, monkeypatch):
    write = checkpoint.write_whole

    def signalled(path, text):
        signal.raise_signal(signal.SIGTERM)
        write(path, text)

    monkeypatch.setattr(checkpoint, "write_whole", signalled)
    got = go(train, 6, 2, run_dir=tmp_path / "r")
    assert_same(got.state, whole[1].state)
    assert_same(load_state(LEARNER, tmp_path / "r"), whole[1].state)


def test_an_error_outlives_the_save_that_was_under_way(tmp_path):
    with pytest.raises(ZeroDivisionError):
        go(train, 6, 2, run_dir=tmp_path / "r", checkpoint_every=1, chunk=1, sinks=[Stop(at=3)])
    assert load_state(LEARNER, tmp_path / "r").step.tolist() == [2, 2]


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    learner = agents.make("ippo", env="matrix_game", hidden=(8,), num_envs=2, num_steps=4, num_minibatches=1)
    init = jax.jit(learner.init)
    save = lambda seed: bundle.save_policy(tmp_path_factory.mktemp("policy"), learner, init(jax.random.key(seed)))
    return [load_policy(save(seed)) for seed in (0, 1)]


def test_an_export_that_is_another_policy_or_damaged_is_refused(policies, tmp_path, monkeypatch):
    one, two = policies
    other = export.stablehlo(two, (4, 16), tmp_path / "two").read_bytes()
    write = Path.write_bytes
    for data, message in (
        (other, "differs from the policy's by"),
        (other[: len(other) // 2], "not an exported policy"),
    ):
        monkeypatch.setattr(Path, "write_bytes", lambda path, _, data=data: write(path, data))
        with pytest.raises(UserError, match=message):
            export.stablehlo(one, (4, 16), tmp_path / "one")
        assert [p.name for p in sorted(tmp_path.iterdir())] == ["two", "two.json"]
