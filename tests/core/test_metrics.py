"""Means that are divided on the host."""

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from toy_learners import Hypers, regression

from jaxstack.core.metrics import Mean, mean, on_host
from jaxstack.core.runner import train


def test_means_are_divided_on_the_host_and_nan_over_nothing():
    x = jnp.array([[1.0, 2.0], [4.0, jnp.nan]])
    out = on_host({"all": mean(x[0]), "some": mean(x, where=jnp.isfinite(x)), "none": mean(x, where=False), "n": x[0]})
    assert out["all"] == 1.5
    np.testing.assert_allclose(out["some"], 7 / 3, rtol=1e-6)
    assert np.isnan(out["none"])
    assert out["n"].tolist() == [1.0, 2.0]
    assert mean(jnp.array([True, False, True, True]), where=jnp.array([True, True, False, False]))._asdict() == {
        "total": 1.0,
        "count": 2.0,
    }


def test_means_of_parts_add_up_to_that_of_the_whole():
    x, where = jnp.arange(12.0).reshape(3, 4), jnp.arange(12).reshape(3, 4) % 5 > 1
    parts = jax.vmap(mean)(x, where)  # [3]
    whole = on_host(mean(x, where))
    assert on_host(jax.tree.map(jnp.sum, parts)) == whole
    np.testing.assert_allclose(on_host(jax.tree.map(jnp.mean, parts)), whole, rtol=1e-6)
    assert on_host(parts).shape == (3,)


def rare(steps=(2, 4)):
    """A learner with a mean over something that there is in some steps only."""
    toy = regression()

    def step(s):
        s, metrics = toy.step(s)
        return s, metrics | {"train/rare": Mean(3.0 * s.step, jnp.isin(s.step, jnp.array(steps)) * 2.0)}

    def evaluate(s, key):
        return {"eval/return": Mean(s.step * 1.0, jnp.float32(4.0)), "eval/none": Mean(jnp.zeros(()), jnp.zeros(()))}

    return toy._replace(step=step, evaluate=evaluate)


def test_runs_sweeps_and_each_dispatch_store_numbers_where_there_are_some(tmp_path):
    with jax.debug_nans(True):
        runs = [
            train(rare(), 5, seeds, dispatch=how, chunk=2, progress=False, run_dir=tmp_path / f"{how}{seeds}")
            for how in ("scan", "loop")
            for seeds in (1, 2)
        ]
    for run in runs:
        for _, rows in run.metrics.groupby("seed"):
            np.testing.assert_array_equal(rows["train/rare"], [np.nan, 3.0, np.nan, 6.0, np.nan])
            np.testing.assert_array_equal(rows["eval/return"], [np.nan] * 4 + [1.25])
            assert rows["eval/none"].isna().all()
        stored = pd.read_json(run.run_dir / "metrics.jsonl", lines=True, precise_float=True)
        pd.testing.assert_frame_equal(stored, run.metrics, check_dtype=False)


def test_a_loss_over_nothing_is_no_reason_to_freeze_a_seed():
    """The guard looks at the sum and the count, not at the quotient."""
    toy = regression()

    def step(s):
        s, metrics = toy.step(s)
        return s, metrics | {"loss/rare": Mean(jnp.where(s.step == s.hypers.poison, jnp.inf, 0.0), jnp.zeros(()))}

    got = train(toy._replace(step=step), 4, 2, hypers=Hypers(poison=jnp.array([-1.0, 3.0])), progress=False)
    assert got.alive.tolist() == [True, False]
    assert got.metrics.query("seed == 0")["loss/rare"].isna().all()
