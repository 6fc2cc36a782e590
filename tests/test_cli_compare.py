"""`jaxstack compare` on written runs: ranks, ties, failed seeds, and clear lines."""

import json

import numpy as np
import pandas as pd
import pytest

from jaxstack import cli
from jaxstack.cli.runs import last_scores
from jaxstack.core.rundir import RunDir


def run(path, last, metric="eval/return", direction="max", env="dispersion", settings=None):
    """A run directory whose seeds end with the scores `last`."""
    seeds = list(range(len(last)))
    plan = dict(agent="ippo", config={"env": env}, seeds=seeds, num_steps=2, objective=[metric, direction])
    if settings:
        plan |= {"settings": settings, "hypers": {".lr": [0.1 * s for s in settings]}}
    directory = RunDir.create(path, plan)
    for step in (1, 2, 3):
        rows = [{"step": step, "samples": 8 * step, "seed": s, "loss/total": 1.0} for s in seeds]
        for row, score in zip(rows, last):
            row |= {"setting": settings[row["seed"]]} if settings else {}
            row |= {metric: score * step / 2} if step < 3 else {}  # training goes on after the last evaluation
        directory.append(rows)
    directory.close()
    return str(path)


def compared(out):
    return pd.read_csv(out / "comparison.csv").set_index("run")


def test_runs_are_ranked_with_ties_and_failed_seeds(tmp_path, capsys):
    scores = {
        "good": [10, 11, 12, 13, 14],
        "close": [9, 11, 12, 13, 14.5],
        "bad": [1, 2, 3, 4, 5],
        "lost": [90, np.nan, 95],
    }
    runs = [run(tmp_path / name, last) for name, last in scores.items()]
    out = tmp_path / "out"
    assert cli.main(["compare", *runs, "--out", str(out)]) == 0
    table = compared(out)
    assert table.index.tolist() == ["good", "close", "bad", "lost"]
    assert table.verdict.tolist()[:3] == ["best", "tie with good", "behind good"]
    assert table.verdict["lost"] == "1 failed"
    assert table.loc["bad", "best_is_better"] == 1.0
    assert table.loc["good", "iqm"] == pytest.approx(12.0)
    assert table.loc["bad", ["seeds", "failed"]].tolist() == [5, 0]
    assert table.loc["lost", ["seeds", "failed", "mean"]].tolist() == [2, 1, 92.5]
    assert (table.loc[["good", "bad"], "iqm_low"] <= table.loc[["good", "bad"], "iqm"]).all()
    text = capsys.readouterr().out
    assert "IQM of eval/return" in text
    assert "2 (+ 1 failed)" in text
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_smaller_is_better_where_the_objective_says_so(tmp_path):
    runs = [run(tmp_path / name, last, "eval/loss", "min") for name, last in {"a": [3.0, 4.0], "b": [1.0, 2.0]}.items()]
    assert cli.main(["compare", *runs, "--out", str(tmp_path / "out")]) == 0
    assert compared(tmp_path / "out").index.tolist() == ["b", "a"]
    assert cli.main(["compare", *runs, "--metric", "loss/total", "--out", str(tmp_path / "out")]) == 0
    assert compared(tmp_path / "out").verdict.tolist()[1].startswith("tie with")


def test_settings_of_a_sweep_are_compared(tmp_path, capsys):
    sweep = tmp_path / "sweep"
    run(sweep / "runs" / "program_0", [1.0, 2.0, 8.0, 9.0], settings=[0, 0, 1, 1])
    assert cli.main(["compare", str(sweep), "--out", str(tmp_path / "out")]) == 0
    assert compared(tmp_path / "out").index[0] == "setting 1 (lr=0.1)"


def test_wrong_input_is_one_line(tmp_path, capsys):
    one, other = run(tmp_path / "one", [1.0, 2.0]), run(tmp_path / "other", [1.0, 2.0], env="navigation")
    dead = run(tmp_path / "dead", [np.nan, np.nan])
    for argv, message in (
        ([one], "compare: found 1 run, expected two or more"),
        (
            [one, other, "--metric", "eval/won"],
            "--metric eval/won: one has no such values; it has loss/total, eval/return",
        ),
        ([one, dead], "dead has no such values"),
        ([one, str(tmp_path / "nowhere")], "no metrics found"),
    ):
        assert cli.main(["compare", *argv, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert cli.main(["compare", one, other, "--out", str(tmp_path / "out")]) == 0
    assert (
        "note: these runs are of different environments: one: dispersion, other: navigation" in capsys.readouterr().out
    )
    assert json.loads(compared(tmp_path / "out").to_json())["verdict"]["other"].startswith("tie with one")


def test_scores_of_a_method_in_stages_are_those_of_the_last_stage_that_has_them():
    rows = [{"stage": "a", "step": t, "seed": 0, "eval/return": 100.0 + t} for t in range(1, 9)]
    rows += [{"stage": "b", "step": t, "seed": 0, "eval/return": float(t)} for t in (1, 2)]
    rows += [{"stage": "c", "step": 1, "seed": 0, "loss/total": 0.5}]
    assert last_scores(pd.DataFrame(rows), "eval/return") == [2.0]
