import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_learners import ToyConfig, assert_same, regression

from jaxstack.core import runner, stages
from jaxstack.core.errors import UserError
from jaxstack.core.rundir import read_metrics, read_plan
from jaxstack.core.runner import Interrupted
from jaxstack.core.stages import Stage, Staged
from jaxstack.data.sources import ArrayData

ROWS = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)


def second(states):
    """Regression that starts from the weights of the first stage and also fits rows of a table."""
    toy = regression()

    def init(key, hypers, given):
        s = toy.init(key, hypers)
        return s._replace(params=jax.tree.map(jnp.copy, given["params"]))

    def step(s, batch):
        s, metrics = toy.step(s)
        w = s.params["w"] - 0.01 * (batch @ s.params["w"]) @ batch / len(batch)
        return s._replace(params=s.params | {"w": w}), metrics

    given = {"params": states["fit"].params}
    return toy._replace(init=init, step=step, name="second", takes_batch=True, given=given)


METHOD = Staged(
    "two",
    (
        Stage("fit", lambda states: regression(), steps=5),
        Stage("table", second, lambda config: ArrayData(ROWS, 8, per_seed=True), steps=6),
    ),
    ToyConfig(),
)
OPTIONS = dict(progress=False, chunk=2)


class Stop:
    """A sink that raises a signal when it sees a row."""

    def __init__(self, stage, step):
        self.at, self.rows, self.closed = (stage, step), [], 0

    def write(self, rows):
        self.rows += rows
        if any((r["stage"], r["step"]) == self.at for r in rows):
            signal.raise_signal(signal.SIGTERM)

    def close(self):
        self.closed += 1


@pytest.fixture(scope="module")
def whole():
    return stages.train(METHOD, 2, **OPTIONS)


def test_a_stage_starts_where_the_one_before_ended_and_metrics_name_it(whole):
    first = runner.train(regression(), 5, 2, **OPTIONS)
    assert_same(whole.states["fit"], first.state)
    assert_same(whole.state, whole.states["table"])
    alone = runner.train(second({"fit": first.state}), 6, 2, data=ArrayData(ROWS, 8, per_seed=True), **OPTIONS)
    assert_same(whole.state, alone.state)
    assert whole.metrics.groupby("stage", sort=False).step.max().to_dict() == {"fit": 5, "table": 6}
    assert whole.metrics.query("stage == 'table'")["loss/total"].tolist() == alone.metrics["loss/total"].tolist()
    assert whole.alive.tolist() == [True, True]


@pytest.mark.parametrize(
    ("stage", "step", "message"),
    [
        ("fit", 2, r"stopped in stage fit, after step 2 of 5; `jaxstack resume \S+/r` continues"),
        ("fit", 5, r"stopped before stage table; `jaxstack resume \S+/r` continues"),
        ("table", 4, r"stopped in stage table, after step 4 of 6; `jaxstack resume \S+/r` continues"),
    ],
)
def test_a_run_that_was_stopped_anywhere_goes_on_in_the_right_stage(whole, tmp_path, stage, step, message):
    sink, run = Stop(stage, step), tmp_path / "r"
    with pytest.raises(Interrupted, match=message) as e:
        stages.train(METHOD, 2, run_dir=run, sinks=[sink], **OPTIONS)
    assert e.value.signum == signal.SIGTERM
    assert sink.closed == 1
    assert read_plan(run)["stages"] == ["1_fit", "2_table"]
    again = Stop(None, 0)
    got = stages.resume(METHOD, run, sinks=[again], **OPTIONS)
    assert_same(got.state, whole.state)
    assert_same(got.states["fit"], whole.states["fit"])
    assert got.metrics.equals(whole.metrics)
    assert [r["loss/total"] for r in sink.rows + again.rows] == whole.metrics["loss/total"].tolist()
    samples = [r["samples"] for r in sink.rows + again.rows]
    assert samples == sorted(samples)  # they count on over the stages
    assert samples[-1] == 8 * 11
    stored = read_metrics(run)
    assert stored[["stage", "step", "seed", "loss/total"]].equals(
        whole.metrics[["stage", "step", "seed", "loss/total"]]
    )
    assert_same(stages.resume(METHOD, run, **OPTIONS).state, whole.state)  # a finished run reads its states
    assert_same(runner.load_state(stages.last(METHOD, run), run), whole.state)


def test_groups_of_seeds_get_their_own_rows_of_what_is_given(whole, tmp_path):
    split = stages.train(METHOD, 2, run_dir=tmp_path / "r", split_seeds=1, **OPTIONS)
    np.testing.assert_allclose(split.state.params["w"], whole.state.params["w"], rtol=1e-4)
    assert_same(stages.resume(METHOD, tmp_path / "r", **OPTIONS).state, split.state)


def test_what_is_given_has_a_row_a_seed():
    learner = second({"fit": regression().init(jax.random.key(0), regression().hypers)})
    with pytest.raises(
        UserError, match=r"second.given\['params'\]\['b'\]: shape \(\), expected \(2, ...\), one row per"
    ):
        runner.train(learner, 1, 2, data=ArrayData(ROWS, 8), **OPTIONS)


def test_bad_stages_are_named(tmp_path):
    twice = METHOD._replace(stages=METHOD.stages[:1] * 2)
    with pytest.raises(UserError, match=r"two: stages \['fit', 'fit'\]: expected at least one, each with a name"):
        stages.train(twice, **OPTIONS)
    other = METHOD._replace(stages=METHOD.stages[:1])
    stages.train(other, run_dir=tmp_path / "r", **OPTIONS)
    with pytest.raises(UserError, match=r"stages \['1_fit'\], expected those of the method, \['1_fit', '2_table'\]"):
        stages.resume(METHOD, tmp_path / "r", **OPTIONS)
    with pytest.raises(UserError, match="width: 4 -> 5"):
        stages.resume(other._replace(config=ToyConfig(width=5)), tmp_path / "r", **OPTIONS)
