"""Sweeps: rows are runs, one compile serves all numeric settings, failures stay visible, bad spaces are named."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import stats as scipy_stats
from toy_learners import Hypers, ToyConfig, assert_same, classifier, numbers, regression

import jaxstack
from jaxstack import agents
from jaxstack.core import ledger, runner
from jaxstack.core import space as spaces
from jaxstack.core.errors import UserError
from jaxstack.data.sources import IteratorData
from jaxstack.report import stats
from jaxstack.sweeps import Sweep, choice, grid, log_uniform, sweep, uniform

RATES = (0.05, 0.1, 0.2)


def make(width=4):
    return regression(ToyConfig(width=width))


def run(space, seeds=2, num_steps=4, **options):
    return sweep(make, space, seeds, num_steps, progress=False, **options)


@pytest.fixture(scope="module")
def whole():
    return run({"lr": grid(*RATES), "width": choice(2, 4)}, [5, 3])


def test_a_grid_is_the_product_of_settings_and_seeds(whole):
    assert jaxstack.sweep is sweep
    rows = whole.table[["setting", "lr", "width", "seed"]].to_numpy().tolist()
    settings = [(lr, width) for width in (2, 4) for lr in RATES]
    assert rows == [[i, lr, width, seed] for i, (lr, width) in enumerate(settings) for seed in (5, 3)]
    assert whole.table.alive.all()
    assert (whole.table.step == 4).all()
    assert len(whole.curves) == 4 * len(whole.table)
    last = whole.curves[whole.curves.step == 4].reset_index(drop=True)
    for name in ("loss/total", "eval/return"):
        assert last[name].tolist() == whole.table[name].tolist()


def test_a_row_alone_takes_the_same_step_within_rounding():
    got = run({"lr": grid(*RATES), "width": choice(2, 4)}, [5, 3], num_steps=1)
    for row in got.table.iloc[[3, 8]].to_dict("records"):
        hypers = Hypers(lr=row["lr"])
        alone = runner.train(make(row["width"]), 1, [row["seed"]], hypers=hypers, progress=False, eval_every=-1)
        mine = got.state(row["setting"], row["seed"])
        for a, b in zip(numbers(mine), numbers(jax.tree.map(lambda x: x[0], alone.state)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(row["loss/total"], alone.metrics["loss/total"].item(), rtol=1e-5)


def test_an_agents_row_alone_takes_the_same_step_within_rounding():
    small = dict(env="matrix_game", num_envs=4, num_steps=8, num_minibatches=2, num_epochs=1, hidden=(8,))
    ippo = functools.partial(agents.make, "ippo", total_steps=64, eval_episodes=2, **small)
    options = runner.RunOptions(progress=False, eval_every=-1)
    got = sweep(ippo, {"lr": grid(1e-3, 1e-2), "ent_coef": grid(0.0, 0.05)}, [2, 7], 1, options=options)
    hypers = ippo().hypers._replace(lr=1e-2, ent_coef=0.05)
    alone = runner.train(ippo(), 1, [7], hypers=hypers, options=options)
    (row,) = got.table.query("lr == 1e-2 and ent_coef == 0.05 and seed == 7").to_dict("records")
    mine = numbers(got.state(row["setting"], 7))
    for a, b in zip(mine, numbers(jax.tree.map(lambda x: x[0], alone.state)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_settings_of_a_seed_share_its_start():
    got = run({"lr": grid(0.0, 0.1)}, [5, 3])
    start = make().init(jax.random.key(3), Hypers()).params
    np.testing.assert_allclose(got.state(0, 3).params["w"], start["w"], rtol=1e-6)
    first = got.curves[got.curves.step == 1]
    losses = [first[first.setting == i]["loss/total"].to_numpy() for i in (0, 1)]
    np.testing.assert_array_equal(*losses)
    assert losses[0][0] != losses[0][1]


def test_a_repeated_sweep_is_the_same_to_the_bit(whole):
    again = run(whole.space, whole.seeds)
    assert again.table.equals(whole.table)
    assert again.curves.equals(whole.curves)
    for one, two in zip(again.runs, whole.runs, strict=True):
        assert_same(one.state, two.state)


def test_the_number_of_settings_does_not_change_the_number_of_programs(whole):
    names = ["chunk", "init", "evaluate"]
    for space, num in (({"lr": grid(0.1)}, None), ({"lr": uniform(0, 1), "poison": grid(-1, -2)}, 20)):
        got = run(space, num=num)
        assert [p["name"] for p in got.programs] == names
        assert [p["traces"] for p in got.programs] == [1, 1, 1]
    assert [p["name"] for p in whole.programs] == 2 * names
    assert [p["static"] for p in whole.programs] == 3 * [{"width": 2}] + 3 * [{"width": 4}]
    assert whole.state(0, 5).params["w"].shape == (2,)
    assert whole.state(5, 5).params["w"].shape == (4,)


@pytest.mark.parametrize("at_once", [5, 1])
def test_a_split_changes_rounding_only_and_compiles_each_size_once(at_once):
    space = {"lr": grid(*RATES), "poison": grid(-1, -2)}
    one, split = run(space), run(space, split_seeds=at_once)
    labels = ["setting", "lr", "poison", "seed", "alive", "step", "samples"]
    assert split.table[labels].equals(one.table[labels])
    for name in ("loss/total", "eval/return"):
        np.testing.assert_allclose(split.table[name], one.table[name], rtol=1e-4)
    for a, b in zip(numbers(split.runs[0].state), numbers(one.runs[0].state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert len(split.programs) == 3


def test_what_does_not_fit_is_refused_or_split_by_the_measured_program(monkeypatch):
    space = {"lr": uniform(0.01, 0.2)}
    measured = run(space, 2, num=8).programs[0]["peak_bytes"]
    limit = measured // 2
    monkeypatch.setattr(ledger, "available_bytes", lambda: limit)
    with pytest.raises(UserError, match=r"of 16 seeds fit at once: split_seeds="):
        run(space, 2, num=8)
    got = run(space, 2, num=8, split_seeds="auto")
    assert len(got.table) == 16
    assert all(p["peak_bytes"] <= limit for p in got.programs if p["name"] == "chunk")


def test_groups_of_a_split_see_the_same_batches():
    class Counter:
        def __init__(self):
            self.at = 0

        def __next__(self):
            self.at += 1
            x = np.random.default_rng(self.at).normal(size=(8, 64))
            return x.astype(np.float32), np.arange(8)

        def get_state(self):
            return self.at

        def set_state(self, state):
            self.at = state

    one, split = (
        sweep(classifier, {"lr": grid(0.1, 0.2)}, 2, 3, data=IteratorData(Counter()), progress=False, split_seeds=n)
        for n in (None, 1)
    )
    np.testing.assert_allclose(split.table["loss/total"], one.table["loss/total"], rtol=1e-4)


def test_failed_rows_are_frozen_and_shown(capsys):
    got = run({"poison": grid(-1, 3), "lr": grid(0.1, 0.2)})
    assert got.table.alive.tolist() == (got.table.poison == -1).tolist()
    assert got.table[~got.table.alive][["loss/total", "eval/return", "train/w0"]].isna().all(axis=None)
    assert set(got.table[~got.table.alive].step) == {3}
    assert capsys.readouterr().out.count("setting 2, seed 1: loss/total is not finite at step 3") == 1
    summary = got.summary("eval/return")
    assert summary.runs.tolist() == [2, 2, 0, 0]
    assert summary.failed.tolist() == [0, 0, 2, 2]
    assert summary[summary.runs == 0][["iqm", "mean", "iqm_low", "mean_high"]].isna().all(axis=None)
    lines = got.report("eval/return").splitlines()
    assert [("failed" in line) for line in lines[1:]] == [False, False, True, True]
    assert got.best("eval/return")["poison"] == -1
    bad = run({"poison": grid(1, 2)})
    assert not bad.table.alive.any()
    assert bad.summary("eval/return").failed.tolist() == [2, 2]
    with pytest.raises(UserError, match="every run of the sweep failed"):
        bad.best("eval/return")


def test_without_the_guard_a_non_finite_row_is_still_failed():
    assert run({"poison": grid(-1, 4)}, guard=False).table.alive.tolist() == [True, True, False, False]


def by_hand(scores, alive=None):
    """A sweep over lr with given final scores [settings, seeds]."""
    scores = np.asarray(scores, float)
    rows = [
        {"setting": i, "lr": 0.1 * (i + 1), "seed": s, "alive": True if alive is None else alive[i][s], "step": 1}
        | {"eval/return": v}
        for (i, s), v in np.ndenumerate(scores)
    ]
    space = {"lr": grid(*(0.1 * (i + 1) for i in range(len(scores))))}
    return Sweep(space, list(range(scores.shape[1])), pd.DataFrame(rows), pd.DataFrame(rows), [])


def test_summary_is_the_trimmed_mean_of_the_runs_with_its_interval():
    scores = np.random.default_rng(0).normal(size=(3, 8)) + np.arange(3)[:, None]
    summary = by_hand(scores).summary("eval/return")
    np.testing.assert_allclose(summary.iqm, scipy_stats.trim_mean(scores, 0.25, axis=1), rtol=1e-5)
    np.testing.assert_allclose(summary["mean"], scores.mean(1), rtol=1e-5)
    # percentile bootstrap of a mean, by NumPy
    draws = np.random.default_rng(1).integers(0, 8, (20_000, 8))
    for i in range(3):
        low, high = np.quantile(scores[i][draws].mean(1), (0.025, 0.975))
        np.testing.assert_allclose((summary.mean_low[i], summary.mean_high[i]), (low, high), atol=0.05)
    one = by_hand([[1.0], [2.0]]).summary("eval/return")
    assert one.iqm.tolist() == [1.0, 2.0]
    assert one.iqm_low.isna().all()


def test_a_setting_with_a_failed_run_ranks_after_all_others_and_averages_the_rest():
    scores = [[9.0, np.nan, 9.0], [1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    alive = [[True, False, True], [True] * 3, [True] * 3]
    got = by_hand(scores, alive)
    ranking = got.ranking("eval/return")
    assert ranking.setting.tolist() == [2, 1, 0]
    assert ranking.runs.tolist() == [3, 3, 2]
    assert ranking["mean"].tolist() == [5.0, 2.0, 9.0]
    assert got.best("eval/return") == {"lr": pytest.approx(0.3)}
    assert got.best("eval/return", largest=False) == {"lr": 0.2}
    with pytest.raises(UserError, match=r"eval/retrn.*did you mean 'eval/return'"):
        got.summary("eval/retrn")


def test_ties_are_reported_as_ties():
    scores = [[1.0, 2.0, 3.0, 4.0], [11.0, 12.0, 13.0, 14.0], [10.5, 12.0, 13.0, 14.5], [90.0, np.nan, 90.0, 90.0]]
    got = by_hand(scores, [[True] * 4] * 3 + [[True, False, True, True]])
    assert got.ranking().setting.tolist() == [1, 2, 0, 3]
    assert got.verdicts() == ["best", "tie", "behind", "failed"]
    assert got.verdicts(largest=False) == ["best", "behind", "behind", "failed"]
    assert [line.split()[-1] for line in got.report().splitlines()[1:]] == got.verdicts()
    assert by_hand([[1.0], [2.0]]).verdicts() == ["best", "one seed"]


def draws(space, num, seed=0):
    spaces.check(space, Hypers._fields, (), num, "toy")
    return pd.DataFrame(spaces.numeric_settings(space, Hypers._fields, num, seed))


def test_the_objective_ranks_unless_a_metric_is_named(tmp_path):
    small = by_hand([[3.0], [1.0], [2.0]])._replace(objective=("eval/return", "min"))
    small.save(tmp_path)
    for one in (small, Sweep.load(tmp_path)):
        assert one.ranking().setting.tolist() == [1, 2, 0]
        assert one.best() == one.best("eval/return", largest=False)
        assert one.ranking(largest=True).setting.tolist() == [0, 2, 1]
        assert one.report() == one.report("eval/return", largest=False)


def test_draws_depend_on_seed_name_and_number_alone():
    space = {"lr": log_uniform(1e-5, 1e-2), "poison": grid(-1, 3, 5)}
    table = draws(space, 50)
    assert table.equals(draws(space, 50))
    assert table[:20].equals(draws(space, 20))
    assert table.lr.equals(draws({"lr": space["lr"]}, 50).lr)
    assert not table.lr.equals(draws(space, 50, seed=1).lr)
    assert set(table.poison) == {-1, 3, 5}


def test_draws_have_their_distribution():
    table = draws({"lr": log_uniform(1e-5, 1e-1), "poison": uniform(-2, 6)}, 4000)
    assert table.lr.between(1e-5, 1e-1).all()
    uniforms = [(np.log10(table.lr) + 5) / 4, (table.poison + 2) / 8]
    for u in uniforms:
        assert scipy_stats.kstest(u, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(*uniforms)[0, 1]) < 0.06


def test_the_table_holds_what_the_program_saw():
    got = run({"lr": log_uniform(1e-3, 1e-1)}, num=3)
    seen = np.asarray(got.runs[0].state.hypers.lr)
    np.testing.assert_array_equal(seen, got.table.lr.to_numpy().astype(np.float32))
    assert (seen.astype(float) == got.table.lr).all()


def test_xarray_has_a_dimension_a_name_or_a_dimension_of_settings(whole, monkeypatch):
    data = whole.to_xarray()
    assert dict(data.sizes) == {"lr": 3, "width": 2, "seed": 2}
    for row in whole.table.to_dict("records"):
        cell = data["eval/return"].sel(lr=row["lr"], width=row["width"], seed=row["seed"])
        assert float(cell) == row["eval/return"]
    random = run({"lr": uniform(0.1, 0.2)}, num=3).to_xarray()
    assert dict(random.sizes) == {"setting": 3, "seed": 2}
    assert random.lr.dims == ("setting",)
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(UserError, match="xarray is missing"):
        whole.to_xarray()


def test_a_saved_sweep_reads_back(whole, tmp_path):
    got = Sweep.load(whole.save(tmp_path / "s"))
    pd.testing.assert_frame_equal(got.table, whole.table)
    pd.testing.assert_frame_equal(got.curves, whole.curves)
    assert got[:2] == whole[:2]
    assert got.programs == whole.programs
    assert got.best("eval/return") == whole.best("eval/return")
    with pytest.raises(UserError, match="made in this process"):
        got.state(0, 5)
    (tmp_path / "s" / "curves.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"curves\.jsonl: no sweep's file"):
        Sweep.load(tmp_path / "s")
    with pytest.raises(UserError, match=r"space\.yaml: no sweep's file"):
        Sweep.load(tmp_path)


def test_static_values_keep_their_kind(tmp_path):
    def learner(width=4, note=None):
        assert isinstance(width, int)
        assert note in (None, (1, 2))
        return regression(ToyConfig(width=width))

    got = sweep(learner, {"note": choice(None, (1, 2)), "width": choice(2, 3)}, 1, 1, progress=False)
    for one in (got, Sweep.load(got.save(tmp_path))):
        assert one.settings.note.tolist() == [None, None, (1, 2), (1, 2)]
        learner(**one.best("eval/return"))


def test_figures_fit_the_number_of_names(whole, tmp_path):
    three = {"lr": grid(0.1, 0.2), "poison": grid(-1, 2), "width": choice(2, 4)}
    cases = {
        "curve": run({"lr": log_uniform(1e-3, 0.1), "poison": grid(-1.0)}, num=4)._replace(space={"lr": grid()}),
        "map": run({"lr": grid(0.1, 0.2), "poison": grid(-1, 2)}),
        "points": run({"lr": uniform(0.1, 0.2), "poison": uniform(-1, 4)}, num=4),
        "ranks": run(three),
        "static": run({"width": choice(2, 4)}),
    }
    sizes = set()
    for name, one in cases.items():
        path = one.figure(tmp_path / f"{name}.png", "eval/return")
        pixels = np.asarray(Image.open(path).convert("L"))
        assert pixels.min() < 100, f"{name} is blank"
        sizes.add(pixels.tobytes())
    assert len(sizes) == len(cases)


def test_runs_are_kept_in_directories_and_resume_with_their_settings(tmp_path):
    got = run({"lr": grid(0.1, 0.2)}, run_dir=tmp_path, checkpoint_every=2)
    again = runner.resume(make(), tmp_path / "static_0", 6, progress=False)
    assert again.metrics.setting.unique().tolist() == [0, 1]
    assert again.metrics[again.metrics.step <= 4][["setting", "seed"]].equals(got.curves[["setting", "seed"]])
    longer = run({"lr": grid(0.1, 0.2)}, num_steps=6)
    assert_same(again.state, longer.runs[0].state)


def test_rows_of_the_runner_must_differ():
    with pytest.raises(UserError, match="different pairs"):
        runner.train(make(), 1, [0, 0], settings=[1, 1], progress=False)
    with pytest.raises(UserError, match="a seed for each setting"):
        runner.train(make(), 1, [0, 1], settings=[1], progress=False)
    with pytest.raises(UserError, match="different seeds"):
        runner.train(make(), 1, [0, 0], progress=False)


@pytest.mark.parametrize(
    ("space", "options", "message"),
    [
        ({"lrr": grid(0.1)}, {}, "unknown hyperparameter or option of toy 'lrr': did you mean 'lr'"),
        ({"widht": choice(2)}, {}, "did you mean 'width'"),
        ({}, {}, "at least one name"),
        ([0.1], {}, "at least one name"),
        ({"lr": grid()}, {}, "lr: expected at least one value"),
        ({"lr": [0.1]}, {}, r"lr=\[0.1\]: expected grid"),
        ({"lr": grid(0.1, 0.1)}, {}, "lr=.*different values"),
        ({"lr": grid(0.1, float("nan"))}, {}, "lr=nan: expected a finite number"),
        ({"lr": grid("fast")}, {}, "lr='fast': expected a finite number"),
        ({"lr": grid(True)}, {}, "lr=True: expected a finite number"),
        ({"lr": grid(1e39)}, {}, "lr=1e.39: expected a finite number"),
        ({"lr": uniform(1, 1)}, {"num": 2}, r"lr=uniform\(1, 1\): expected low < high"),
        ({"lr": uniform(0, float("inf"))}, {"num": 2}, "expected finite ends"),
        ({"lr": log_uniform(0, 1)}, {"num": 2}, r"log_uniform\(0, 1\): expected low > 0"),
        ({"width": uniform(1, 4)}, {"num": 2}, "width=.*choice"),
        ({"lr": uniform(0, 1)}, {}, "num=None: expected a number of settings >= 1, as lr is drawn"),
        ({"lr": uniform(0, 1)}, {"num": 0}, "num=0"),
        ({"lr": uniform(0, 1)}, {"num": 2, "search_seed": -1}, "search_seed=-1"),
        ({"lr": grid(0.1)}, {"num": 2}, "num=2: expected none"),
        ({"lr": grid(0.1)}, {"seeds": [1, 1]}, r"seeds=\[1, 1\]"),
        ({"lr": grid(0.1)}, {"seeds": 0}, "seeds=0"),
        ({"width": choice("wide")}, {}, "width='wide': expected a whole number"),
        ({"lr": grid(0.1)}, {"chunks": 3}, "did you mean 'chunk'"),
    ],
)
def test_bad_spaces_are_named_before_anything_compiles(space, options, message, monkeypatch):
    monkeypatch.setattr(ledger.Ledger, "compile", lambda *_, **__: pytest.fail("compiled"))
    with pytest.raises(UserError, match=message):
        run(space, **options)


def test_what_the_config_refuses_is_named_before_anything_compiles(monkeypatch):
    monkeypatch.setattr(ledger.Ledger, "compile", lambda *_, **__: pytest.fail("compiled"))
    ippo = functools.partial(agents.make, "ippo", env="matrix_game")
    with pytest.raises(UserError, match=r"hypers.gamma=1.5: expected a number in \[0, 1\]"):
        sweep(ippo, {"gamma": grid(0.9, 1.5)})
    with pytest.raises(UserError, match="num_minibatches=7"):
        sweep(ippo, {"num_minibatches": choice(4, 7)})
    with pytest.raises(UserError, match="did you mean 'ent_coef'"):
        sweep(ippo, {"ent_coeff": grid(0.1)})
    with pytest.raises(UserError, match="make_learner: expected to work without arguments"):
        sweep(lambda width: make(width), {"width": choice(2)})


def test_command_line_entries():
    entries = [
        "lr=1e-4,3e-4",
        "ent-coef=uniform:0:0.05",
        "clip=log_uniform:1e-2:1",
        "hidden=[64],[64, 64]",
        "env=a,b/c",
    ]
    assert spaces.parse(entries) == {
        "lr": grid(1e-4, 3e-4),
        "ent_coef": uniform(0, 0.05),
        "clip": log_uniform(1e-2, 1),
        "hidden": choice((64,), (64, 64)),
        "env": choice("a", "b/c"),
    }
    for entry in ("lr", "=1", "lr=uniform:1", "lr=uniform:a:b", "lr=[1"):
        with pytest.raises(UserError, match="--sweep"):
            spaces.parse([entry])
    with pytest.raises(UserError, match="given twice"):
        spaces.parse(["lr=1", "lr=2"])


def test_statistics_of_a_sweep_are_those_of_report_stats(whole):
    summary = whole.summary("eval/return")
    scores = whole.table[whole.table.setting == 4]["eval/return"].to_numpy()
    mine = summary.iloc[4]
    expected = stats.estimate(stats.iqm, scores, resamples=10_000)
    np.testing.assert_allclose([mine.iqm, mine.iqm_low, mine.iqm_high], expected, rtol=1e-5)
    assert jnp.isfinite(jnp.asarray(mine.iqm))
