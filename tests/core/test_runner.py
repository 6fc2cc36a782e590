import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_learners import Hypers, ToyConfig, assert_same, numbers, regression

from jaxstack.core import guard, program
from jaxstack.core.errors import UserError
from jaxstack.core.ledger import Ledger
from jaxstack.core.metrics import Mean
from jaxstack.core.rundir import read_metrics, read_plan
from jaxstack.core.runner import Interrupted, RunOptions, load_state, resume, start_from, train
from jaxstack.core.signals import collected

LEARNER = regression()


def run(steps=7, seeds=2, **options):
    return train(LEARNER, steps, seeds, progress=False, **options)


@pytest.fixture(scope="module")
def whole():
    return run(chunk=7)


@pytest.mark.parametrize("chunk", [1, 3, 5, 50])
def test_chunk_size_changes_no_bit(whole, chunk):
    got = run(chunk=chunk)
    assert_same(got.state, whole.state)
    assert got.metrics.equals(whole.metrics)


def test_rows_name_step_seed_and_samples(whole):
    assert whole.metrics[["step", "seed"]].to_numpy().tolist() == [[t, s] for t in range(1, 8) for s in range(2)]
    assert (whole.metrics.samples == 8 * whole.metrics.step).all()


def test_seed_s_starts_from_key_s_and_steps_like_the_plain_functions(whole):
    state = LEARNER.init(jax.random.key(1), jax.tree.map(jnp.float32, LEARNER.hypers))
    step = jax.jit(LEARNER.step)
    for t in range(7):
        state, metrics = step(state)
        mine = whole.metrics.query(f"seed == 1 and step == {t + 1}")
        np.testing.assert_allclose(mine["loss/total"], metrics["loss/total"], rtol=1e-4)
    for a, b in zip(numbers(state), numbers(jax.tree.map(lambda x: x[1], whole.state))):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_number_of_seeds_changes_rounding_only(whole):
    one = run(seeds=[1])
    np.testing.assert_allclose(one.metrics["loss/total"], whole.metrics.query("seed == 1")["loss/total"], rtol=1e-4)


def test_loop_dispatch_agrees_with_scan(whole):
    got = run(dispatch="loop", chunk=3)
    np.testing.assert_allclose(got.metrics["loss/total"], whole.metrics["loss/total"], rtol=1e-4)
    assert_same(got.state, run(dispatch="loop", chunk=7).state)


@pytest.mark.parametrize(("conv", "name"), [(True, "step"), (False, "chunk")])
def test_auto_dispatch_looks_for_convolutions(conv, name):
    book = Ledger()
    program.build(regression(conv=conv), [0], book, chunk=2)
    assert book.programs[0].name == name


def test_convolutions_are_found_inside_nested_programs():
    conv = lambda x: jax.lax.conv(x, jnp.ones((1, 1, 3)), (1,), "SAME")
    nested = jax.jit(lambda x: jax.lax.scan(lambda c, _: (jax.lax.cond(True, conv, lambda x: x, c), ()), x, length=2))
    assert program.convolves(nested, jnp.ones((1, 1, 4)))
    assert not program.convolves(jax.jit(jnp.sin), jnp.ones(3))


def test_a_sweep_over_hypers_is_one_compile():
    got = run(seeds=[0, 1, 2], hypers=Hypers(lr=jnp.array([0.1, 0.2, 0.3])))
    alone = run(seeds=[2], hypers=Hypers(lr=0.3))
    assert [p.name for p in got.ledger.programs] == ["chunk", "init", "evaluate"]
    np.testing.assert_allclose(
        got.metrics.query("seed == 2")["loss/total"], alone.metrics["loss/total"], rtol=1e-4, atol=1e-6
    )


def test_hypers_of_another_length_are_refused():
    with pytest.raises(UserError, match=r"lr: shape \(2,\), expected \(\) or \(3,\)"):
        run(seeds=3, hypers=Hypers(lr=jnp.ones(2)))


def test_states_are_donated_and_stops_do_not_recompile():
    book = Ledger()
    programs = program.build(LEARNER, [0, 1], book, chunk=4)
    state, alive = programs.init()
    known = len(book.programs)
    for done, count in ((0, 4), (4, 1), (5, 3)):
        old = (state, alive)
        state, alive, metrics = programs.advance(state, alive, done, count)
        assert all(x.is_deleted() for x in jax.tree.leaves(old))
        assert metrics["loss/total"].shape == (count, 2)
    assert len(book.programs) == known
    assert [p.traces for p in book.programs] == [1] * known
    assert book.programs[0].donated_bytes > 0


def test_evaluation_is_of_the_state_after_its_step_with_one_key(whole):
    got = run(eval_every=3, chunk=2).metrics.dropna(subset="eval/return")
    assert sorted(set(got.step)) == [3, 6, 7]
    assert (got["eval/step"] == got.step).all()
    assert got["eval/draw"].nunique() == 1
    assert whole.metrics["eval/return"].notna().sum() == 2
    assert "eval/return" not in run(eval_every=-1).metrics


def poisoned(chunk, seeds=(0, 1, 2), steps=(-1.0, 4.0, -1.0), **options):
    return run(seeds=list(seeds), hypers=Hypers(poison=jnp.array(steps)), chunk=chunk, **options)


def test_a_bad_seed_is_frozen_in_its_last_good_state_and_others_go_on(capsys):
    clean, got = poisoned(3, steps=(-1.0, -1.0, -1.0)), poisoned(3)
    assert got.alive.tolist() == [True, False, True]
    for s in (0, 2):
        pick = lambda x, s=s: x[s]
        assert_same(jax.tree.map(pick, clean.state.params), jax.tree.map(pick, got.state.params))
        columns = ["step", "loss/total", "train/w0"]
        mine, theirs = (r.metrics.query(f"seed == {s}")[columns].reset_index(drop=True) for r in (got, clean))
        assert mine.equals(theirs)
    # the same run, stopped before the bad step, has the same state
    short = train(LEARNER, 3, [0, 1, 2], hypers=Hypers(poison=jnp.array((-1.0, 4.0, -1.0))), progress=False)
    assert_same(jax.tree.map(lambda x: x[1], got.state), jax.tree.map(lambda x: x[1], short.state))
    assert got.metrics.query("seed == 1").step.tolist() == [1, 2, 3, 4]
    assert capsys.readouterr().out.count("seed 1: loss/total is not finite at step 4") == 1


def test_rows_of_a_frozen_seed_do_not_depend_on_the_chunk():
    assert poisoned(1).metrics.equals(poisoned(7).metrics)


def test_without_guard_a_bad_seed_runs_on():
    got = poisoned(3, guard=False)
    assert got.alive.all()
    assert np.isnan(got.metrics.query("seed == 1 and step == 4")["loss/total"]).all()


def test_all_seeds_dead_stops_with_an_error_and_keeps_the_state(tmp_path):
    with pytest.raises(UserError, match="loss/total is not finite in every seed, first at step 2"):
        poisoned(2, seeds=(0, 1), steps=(3.0, 2.0), run_dir=tmp_path / "r")
    assert json.loads((tmp_path / "r" / "run.json").read_text())["status"] == "failed"
    assert [p.name for p in (tmp_path / "r" / "checkpoints").iterdir()] == ["4"]


def test_the_guard_looks_at_the_whole_state_losses_and_what_it_is_told():
    bad, good = jnp.array([1.0, jnp.inf]), jnp.ones(2)

    def failing(old, metrics=None, **changes):
        found = guard.checks(old, old._replace(**changes), metrics or {}, unchecked=lambda s: s.key)
        return [name for name, ok in found.items() if not ok]

    state = LEARNER.init(jax.random.key(0), Hypers())._replace(params={"w": good}, opt_state=(good, good), key=good)
    assert failing(state, params={"w": good + 1}, step=state.step + 1, opt_state=(good + 1, good + 1)) == []
    assert failing(state, params={"w": bad}) == ["state.params['w'] is"]
    assert failing(state, opt_state=(good, bad)) == ["state.opt_state[1] is"]
    assert failing(state, opt_state=(jnp.full(guard.LARGE, jnp.inf), good)) == []  # a large buffer
    assert failing(state, key=bad) == []  # may hold anything
    # not finite from the start on: a best value so far, but never parameters
    state = state._replace(params={"w": bad}, opt_state=(bad, good))
    assert failing(state, params={"w": bad + 1}, opt_state=(bad + 1, good)) == ["state.params['w'] is"]
    state = state._replace(params={"w": good})
    metrics = {
        "loss/x": jnp.float32(jnp.nan),
        "train/x": jnp.float32(jnp.nan),
        "loss/y": Mean(jnp.float32(jnp.inf), good[0]),
    }
    metrics |= {"check/rewards of X": jnp.bool_(False), "check/observations of X": jnp.array([True, True])}
    assert failing(state, metrics) == ["rewards of X are", "loss/x is", "loss/y is"]


def test_the_guard_rolls_back_all_but_large_buffers():
    size = guard.LARGE
    state = LEARNER.init(jax.random.key(0), Hypers())._replace(
        params={"w": jnp.zeros(size)}, opt_state=(jnp.zeros(size), jnp.zeros(size + 1), jnp.zeros(3), jax.random.key(1))
    )

    def step(s):
        opt_state = (*(x + 1 for x in s.opt_state[:3]), jax.random.key(2))
        return s._replace(params={"w": s.params["w"] + 1}, opt_state=opt_state), {"loss/x": jnp.float32(jnp.nan)}

    alive, causes = jax.tree.map(lambda x: x[0], guard.start(1)), []
    new, alive, _ = jax.jit(guard.guarded(step, None, causes))(state, alive, 5)
    assert (bool(alive.ok), int(alive.failed_step), causes[alive.cause]) == (False, 5, "loss/x is")
    assert [float(x[0]) for x in (new.params["w"], *new.opt_state[:3])] == [0.0, 0.0, 1.0, 0.0]
    assert_same(new.opt_state[3], state.opt_state[3])


def test_split_seeds_gives_the_same_runs(whole):
    got = train(LEARNER, 7, 3, split_seeds=2, progress=False)
    assert len(jax.tree.leaves(got.state.params)[0]) == 3
    assert got.metrics.seed.unique().tolist() == [0, 1, 2]
    first = got.metrics.query("seed < 2").reset_index(drop=True)
    assert first.equals(whole.metrics)


def test_split_seeds_keeps_one_run_a_group(tmp_path):
    got = train(LEARNER, 2, 3, split_seeds=2, progress=False, run_dir=tmp_path / "r")
    folders = [p.name for p in (tmp_path / "r").iterdir() if (p / "metrics.jsonl").exists()]
    assert sorted(folders) == read_plan(tmp_path / "r")["groups"] == ["seeds_0_1", "seeds_2"]
    assert got.run_dir == tmp_path / "r"
    assert_same(load_state(LEARNER, tmp_path / "r"), got.state)
    assert read_metrics(tmp_path / "r").equals(got.metrics)


def test_a_run_that_does_not_fit_is_refused_before_it_starts_or_split(tmp_path, monkeypatch):
    from jaxstack.core import ledger

    book = Ledger()
    program.build(LEARNER, [0, 1, 2, 3], book, chunk=1)
    limit = book.programs[0].peak_bytes - 1
    monkeypatch.setattr(ledger, "available_bytes", lambda: limit)
    with pytest.raises(UserError, match=r"3 of 4 seeds fit at once: split_seeds=3"):
        run(1, seeds=4, run_dir=tmp_path / "r")
    assert not (tmp_path / "r").exists()
    got = run(1, seeds=4, split_seeds="auto")
    assert got.metrics.seed.tolist() == [0, 1, 2, 3]
    limit = 1
    with pytest.raises(UserError, match="even one seed does not fit"):
        run(1, seeds=4, split_seeds="auto")


def test_total_samples_and_defaults_give_steps():
    assert train(LEARNER, total_samples=17, progress=False).metrics.step.max() == 3
    assert train(LEARNER, progress=False).metrics.step.max() == LEARNER.config.num_updates
    with pytest.raises(UserError, match="one of the two"):
        train(LEARNER, 1, total_samples=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "num_steps=0"),
        ({"seeds": 0}, "seeds=0"),
        ({"seeds": [1, 1]}, r"seeds=\[1, 1\]"),
        ({"chunk": -1}, "chunk=-1"),
        ({"chunks": 3}, "did you mean 'chunk'"),
        ({"dispatch": "fast"}, "expected one of"),
        ({"devices": 99, "seeds": 99}, "devices=99: expected at most"),
        ({"data": object()}, "generates its own batches"),
        ({"max_compiles": 1}, "max_compiles=1: 'init' would be one more compile after chunk"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(UserError, match=message):
        run(**options)


class Recorder:
    def __init__(self, at=None, signum=None):
        self.rows, self.closed, self.at, self.signum = [], 0, at, signum

    def write(self, rows):
        self.rows += rows
        if self.at is not None and rows[-1]["step"] >= self.at:
            self.at = None
            signal.raise_signal(self.signum)

    def close(self):
        self.closed += 1


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_chunk_saves_and_tells_how_to_go_on(tmp_path, signum):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    sink = Recorder(at=4, signum=signum)
    with pytest.raises(Interrupted, match="stopped after step 4 of 7; `jaxstack resume ") as e:
        run(chunk=2, run_dir=tmp_path / "r", sinks=[sink])
    assert e.value.signum == signum
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert json.loads((tmp_path / "r" / "run.json").read_text())["status"] == "interrupted"
    assert sink.closed == 1
    assert (tmp_path / "r" / "checkpoints" / "4").is_dir()


@pytest.mark.parametrize(("seed", "done"), [(0, 0), (2, 1)])
def test_a_stopped_run_in_groups_resumes_as_one(tmp_path, seed, done):
    rates = LEARNER.hypers._replace(lr=np.array([0.1, 0.05, 0.2], np.float32))
    path, options = tmp_path / "r", dict(seeds=[0, 1, 2], split_seeds=2, chunk=2, hypers=rates)

    class Stopping(Recorder):
        def write(self, rows):
            if rows[0]["seed"] == seed:
                super().write(rows)

    sink = Stopping(at=4, signum=signal.SIGTERM)
    told = f"stopped with {done} of 2 groups of seeds done; `jaxstack resume {path}` continues"
    with pytest.raises(Interrupted, match=told):
        run(**options, run_dir=path, sinks=[sink])
    assert sink.closed == 1
    assert json.loads((path / "run.json").read_text())["status"] == "interrupted"
    assert read_metrics(path).seed.unique().tolist() == [0, 1, 2][: 2 + done]  # what there is so far
    with pytest.raises(UserError, match=f"`jaxstack resume {path}` continues it"):
        run(**options, run_dir=path)
    whole = run(**options)
    for _ in range(2):  # the second time nothing is left to do
        got = resume(LEARNER, path, progress=False)
        assert_same(got.state, whole.state)
        assert got.metrics.equals(whole.metrics)
        assert json.loads((path / "run.json").read_text())["status"] == "finished"
    assert read_metrics(path).equals(whole.metrics)


def test_a_run_in_groups_that_is_stopped_while_compiling_can_be_resumed(tmp_path, monkeypatch):
    build, path = program.build, tmp_path / "r"
    monkeypatch.setattr(program, "build", lambda *a, **o: (signal.raise_signal(signal.SIGTERM), build(*a, **o))[1])
    with pytest.raises(Interrupted, match="stopped with 0 of 3 groups"):
        run(2, seeds=3, split_seeds=1, run_dir=path)
    monkeypatch.undo()
    assert resume(LEARNER, path, progress=False).metrics.equals(run(2, seeds=3, split_seeds=1).metrics)


def test_signals_are_left_alone_outside_the_main_thread():
    seen = []

    def body():
        with collected([]) as stop:
            seen.append((stop, signal.getsignal(signal.SIGINT)))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [([], before)]


def test_a_second_signal_acts_at_once():
    # whoever starts the tests in the background may have it ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    caught = []

    def twice():
        with collected(caught):
            signal.raise_signal(signal.SIGINT)
            assert caught == [signal.SIGINT]
            signal.raise_signal(signal.SIGINT)

    try:
        with pytest.raises(KeyboardInterrupt):
            twice()
    finally:
        signal.signal(signal.SIGINT, before)


def test_sinks_get_every_row_and_are_closed_once(whole):
    sink = Recorder()
    run(chunk=3, sinks=[sink])
    assert [[r["step"], r["seed"]] for r in sink.rows] == whole.metrics[["step", "seed"]].to_numpy().tolist()
    assert sink.closed == 1


MESH = """
import sys; sys.path.insert(0, sys.argv[1])
import jax, numpy as np
from toy_learners import regression
from jaxstack.core.runner import train, resume
a = train(regression(), 4, 8, progress=False, chunk=2)
b = train(regression(), 4, 8, progress=False, chunk=2, devices=8, run_dir=sys.argv[2], checkpoint_every=2)
assert len(b.state.params["w"].sharding.device_set) == 8
np.testing.assert_allclose(a.metrics["loss/total"], b.metrics["loss/total"], rtol=1e-4)
c = resume(regression(), sys.argv[2], 6, devices=4, progress=False)
assert len(c.state.params["w"].sharding.device_set) == 4
d = train(regression(), 6, 8, progress=False)
np.testing.assert_allclose(c.metrics["loss/total"], d.metrics["loss/total"], rtol=1e-4)
"""


def test_seeds_spread_over_devices(tmp_path):
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", MESH, here, str(tmp_path / "r")]
    out = subprocess.run(command, env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]


def test_options_are_a_config():
    assert RunOptions(split_seeds="auto").split_seeds == "auto"
    with pytest.raises(UserError, match="split_seeds"):
        RunOptions(split_seeds=0)
    assert ToyConfig().width == 4


def test_a_run_starts_from_the_parameters_of_another():
    old = train(regression(), 4, [3, 5], progress=False).state
    new = start_from(regression(), old)
    begun = train(new, 1, [3, 5], hypers=Hypers(lr=0.0), progress=False)
    jax.tree.map(np.testing.assert_array_equal, begun.state.params, old.params)
    assert (np.asarray(begun.state.step) == 1).all()
    goes_on = train(new, 2, [3, 5], progress=False).state.params
    assert any(bool((a != b).any()) for a, b in zip(jax.tree.leaves(goes_on), jax.tree.leaves(old.params)))
    with pytest.raises(UserError, match=r"params.*: found shape \(\d+.*\), expected shape \(\d+"):
        start_from(regression(ToyConfig(width=5)), old)
    with pytest.raises(UserError, match="expected none"):
        start_from(regression(), old._replace(params=old.params | {"more": jnp.zeros((2, 3))}))
