"""scripts/reference_scores.py writes its tables from run directories and records."""

import importlib
import json
from pathlib import Path

import pandas as pd
import pytest

from jaxstack.core.rundir import RunDir
from jaxstack.sweeps import Sweep, grid

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("reference_scores")


@pytest.fixture
def runs(tmp_path):
    """A tuned run of the case `cartpole`, whose third seed failed."""
    plan = dict(agent="ppo", config={"env": "gymnax/CartPole-v1"}, seeds=[0, 1, 2], num_steps=2)
    run = RunDir.create(tmp_path / "cartpole", plan | {"objective": ["eval/return", "max"]})
    for step in (1, 2):
        rows = [
            {"step": step, "samples": 8 * step, "seed": s, "rollout/return": 20.0 + s + 100 * (step - 1)}
            for s in range(3)
        ]
        for row, last in zip(rows, (400.0, 500.0, float("nan"))):
            row |= {"eval/return": last} if step == 2 else {}
        run.append(rows)
    command = "jaxstack train ppo --env gymnax/CartPole-v1 --lr 0.003 --seeds 0 1 2 --run-dir x".split()
    run.write_json("run.json", {"command": command, "status": "finished"})
    run.close()
    scores = {0.001: (1.0, 2.0, 3.0), 0.003: (11.0, 12.0, 13.0)}
    table = [
        {"setting": i, "lr": lr, "seed": s, "alive": True, "eval/return": v}
        for i, (lr, own) in enumerate(scores.items())
        for s, v in enumerate(own)
    ]
    Sweep({"lr": grid(*scores)}, [0, 1, 2], pd.DataFrame(table), pd.DataFrame(table), []).save(
        tmp_path / "sweep-cartpole"
    )
    return tmp_path


def test_the_table_is_made_of_runs_and_records(script, runs, tmp_path, monkeypatch, capsys):
    (row,) = [script.row(runs / "cartpole", runs / "sweep-cartpole")]
    assert row[:4] == [
        "gymnax/CartPole-v1",
        "`jaxstack train ppo --env gymnax/CartPole-v1 --lr 0.003`",
        "0.001, 0.003",
        "2, 1 failed",
    ]
    assert row[4] == "21"
    assert row[5].startswith("450.000 [400.000, 500.000]")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n")
    real = script.PAGE
    monkeypatch.setattr(script, "PAGE", page)
    (tmp_path / "results").symlink_to(real.parent / "results")
    assert script.main(["table", str(runs)]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{script.END}\nafter\n")
    assert "old" not in text
    assert "| gymnax, classic control | gymnax/CartPole-v1 |" in text
    record = json.loads((real.parent / "results" / "hypermarl-small.json").read_text())
    (arms,) = (
        m["arms"] for m in record["means"] if (m["experiment"], m["metric"]) == ("dispersion, 1M steps", "return")
    )
    score = f"{arms['HyperMARL']['estimate'][0]:.3f}"
    (line,) = [x for x in text.splitlines() if "dispersion, 1M steps" in x and "| HyperMARL |" in x]
    assert f"| {score} [" in line
    assert "lr=" in line


def test_what_is_missing_is_one_line(script, tmp_path, capsys):
    assert script.main(["table", str(tmp_path)]) == 2
    assert script.main(["run", str(tmp_path), "--only", "chess"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "found no finished run" in lines[0]
    assert "--only chess: expected some of cartpole" in lines[1]


def test_cases_name_learners_environments_and_options_that_exist(script):
    from jaxstack import cli

    for case in script.CASES.values():
        name, *options = case.command.split()
        learner, _ = cli.plan(name, options)
        assert learner.name == name
