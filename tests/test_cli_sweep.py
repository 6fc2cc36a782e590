"""`jaxstack sweep`, `evaluate` of many runs, `crossplay`: real runs, written files, a clear line for bad input."""

import csv
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from jaxstack import cli, load_policy
from jaxstack.core import rundir, runner
from jaxstack.core.errors import UserError
from jaxstack.report import plots
from jaxstack.sweeps import Sweep

SMALL = (
    "--env matrix_game --env-args num_agents=2 horizon=4 --num-envs 2 --num-steps 4 --num-minibatches 1 "
    "--num-epochs 1 --hidden 4 --eval-episodes 2 --total-steps 16"
).split()


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    out = tmp_path_factory.mktemp("sweeps") / "s"
    argv = ["sweep", "ippo", *SMALL, "--sweep", "lr=1e-4,3e-3", "--sweep", "ent-coef=0,0.05", "--seeds", "0", "3"]
    argv += ["--hidden", "5", "--tensorboard"]
    assert cli.main([*argv, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory, swept):
    """Two runs of one config, and the sweep's of another."""
    base = tmp_path_factory.mktemp("runs")
    assert cli.main(["train", "ippo", *SMALL, "--seeds", "0", "1", "--run-dir", str(base / "a")]) == 0
    shutil.copytree(base / "a", base / "b")
    (base / "c").symlink_to(swept / "runs" / "static_0")
    return base


def fails(capsys, *argv):
    """The message of exit code 2."""
    try:
        code = cli.main(list(argv))
    except SystemExit as e:
        code = e.code
    out = capsys.readouterr()
    assert code == 2
    assert "Traceback" not in out.err + out.out
    return " ".join(out.err.split())


def test_a_sweep_writes_its_table_figure_and_config(swept):
    result = Sweep.load(swept)
    assert list(result.space) == ["lr", "ent_coef"]
    assert len(result.table) == 8
    assert result.table.alive.all()
    assert [p["name"] for p in result.programs] == ["chunk", "init", "evaluate"]
    assert (swept / "figure.png").read_bytes().startswith(b"\x89PNG")
    config = yaml.safe_load((swept / "config.yaml").read_text())
    assert config["hidden"] == [5]
    assert {"command", "versions", "git_commit"} <= set(json.loads((swept / "sweep.json").read_text()))


def test_a_sweeps_directory_stands_for_its_runs(swept, tmp_path, capsys):
    """Also of several programs: here the second is the first with other settings and another static option."""
    several = tmp_path / "several"
    for k in (0, 1):
        shutil.copytree(swept / "runs" / "static_0", several / "runs" / f"static_{k}")
    folder = several / "runs" / "static_1"
    text = (folder / "run.yaml").read_text().partition("\n")[2].replace("eval_episodes: 2", "eval_episodes: 3")
    plan = yaml.safe_load(text)
    text = yaml.safe_dump(plan | {"settings": [s + 4 for s in plan["settings"]]}, sort_keys=False)
    (folder / "run.yaml").write_text(text)
    shutil.rmtree(folder / "checksums")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r | {"setting": r["setting"] + 4}) + "\n" for r in rows))
    assert cli.main(["plot", str(several), "--out", str(tmp_path / "c.svg")]) == 0
    svg = (tmp_path / "c.svg").read_text()
    assert "setting 7 (lr=0.003, ent_coef=0.05, eval_episodes=3)" in svg
    assert "ippo on matrix_game" in svg
    assert cli.main(["compare", str(several), "--out", str(tmp_path / "cmp")]) == 0
    capsys.readouterr()
    assert cli.main(["info", str(several)]) == 0
    assert capsys.readouterr().out.count("status finished") == 2
    one = str(swept)
    assert cli.main(["evaluate", one, "--episodes", "2"]) == 0
    assert f"{SETTINGS[3]}  eval/return" in capsys.readouterr().out
    assert cli.main(["export", one, str(tmp_path / "p"), "--setting", "3"]) == 0
    assert cli.main(["render", one, "--setting", "0", "--out", str(tmp_path / "e.gif"), "--max-steps", "2"]) == 0
    for argv, message in (
        (["render", str(several)], "--setting: expected one of 0, 1, 2, 3, 4, 5, 6, 7, as it is a sweep"),
        (["export", str(several), "p", "--setting", "8"], "--setting 8: expected one of"),
        (["resume", one], f"{one}: found a sweep, expected a run: {one}/runs/static_0"),
        (["crossplay", one, "--out", "x.bmp"], "x.bmp: found .bmp, expected a file that ends in .png, .svg or .pdf"),
    ):
        assert message in fails(capsys, *argv)


def test_sinks_of_a_sweep_hold_each_setting_and_seed(swept):
    folders = sorted((swept / "runs" / "static_0-tensorboard").glob("*/*"))
    assert [f"{f.parent.name}/{f.name}" for f in folders] == [f"setting_{i}/seed_{s}" for i in range(4) for s in (0, 3)]
    plan = rundir.read_plan(swept / "runs" / "static_0")
    assert plan["sinks"] == {"tensorboard": {}}


def test_a_random_sweep_prints_the_ranking(tmp_path, capsys):
    argv = ["sweep", "ippo", *SMALL, "--sweep", "lr=log_uniform:1e-4:1e-2", "--sweep", "hidden=[4],[3,3]"]
    argv += ["--num", "2", "--seeds", "0", "1", "--split-seeds", "2", "--eval-every", "-1"]
    argv += ["--metric", "loss/total", "--smallest"]
    assert cli.main([*argv, "--out", str(tmp_path / "s")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["lr", "hidden", "IQM", "of", "loss/total", "mean", "runs", "failed"]
    scores = [float(re.search(r"(-?[\d.]+) \[", line).group(1)) for line in lines[1:5]]
    assert scores == sorted(scores)
    assert lines[5].startswith("best: lr=0.00")
    assert sum("(3, 3)" in line for line in lines[1:5]) == 2
    result = Sweep.load(tmp_path / "s")
    assert [p["name"] for p in result.programs] == 2 * ["chunk", "init"]


def test_help_explains_spaces(capsys):
    for command in ("sweep", "crossplay", "evaluate"):
        with pytest.raises(SystemExit) as e:
            cli.main([command, "--help"])
        assert e.value.code == 0
        text = capsys.readouterr().out
        assert text.startswith(f"usage: jaxstack {command}")
        if command == "sweep":
            assert "--sweep lr=log_uniform:1e-5:1e-2" in text
            assert "jaxstack train LEARNER" in text


def scores(text, start):
    (line,) = [x for x in text.splitlines() if x.startswith(start)]
    return json.loads(line.split("by seed: ")[1])


SETTINGS = [
    f"setting {i} (lr={lr}, ent_coef={c})"
    for i, (lr, c) in enumerate([("0.0001", "0"), ("0.0001", "0.05"), ("0.003", "0"), ("0.003", "0.05")])
]


def test_runs_are_evaluated_together_as_each_alone(runs, capsys):
    argv = [str(runs / n) for n in "abc"]  # c is a sweep: 4 settings x 2 seeds
    assert cli.main(["evaluate", *argv, "--episodes", "3"]) == 0
    text = capsys.readouterr().out
    found = [scores(text, f"{run}  matrix_game  eval/return") for run in argv[:2]]
    assert list(map(len, found)) == [2, 2]
    assert found[0] == found[1]
    swept = [scores(text, f"{argv[2]}  {setting}  matrix_game  eval/return") for setting in SETTINGS]
    assert list(map(len, swept)) == [2, 2, 2, 2]
    assert cli.main(["evaluate", argv[2], "--episodes", "3"]) == 0
    text = capsys.readouterr().out
    alone = [scores(text, f"{setting}  eval/return") for setting in SETTINGS]
    np.testing.assert_allclose(alone, swept, atol=2e-3)
    assert cli.main(["evaluate", argv[0], "--episodes", "3"]) == 0
    np.testing.assert_allclose(scores(capsys.readouterr().out, "eval/return"), found[0], atol=2e-3)


def test_a_run_is_evaluated_in_other_environments(runs, capsys):
    long, short = "matrix_game:num_agents=2:horizon=4", "matrix_game:num_agents=2:horizon=1"
    assert cli.main(["evaluate", str(runs / "a"), "--env", long, "--env", short, "--episodes", "2"]) == 0
    text = capsys.readouterr().out
    assert all(1 < s <= 4 for s in scores(text, f"{runs / 'a'}  {long}  eval/return"))
    assert all(s <= 1 for s in scores(text, f"{runs / 'a'}  {short}  eval/return"))


def test_crossplay_writes_the_matrix_of_all_members(runs, tmp_path, capsys):
    out = tmp_path / "m.png"
    argv = ["crossplay", str(runs / "a"), str(runs / "b"), "--episodes", "3", "--sample", "--at-once", "5"]
    assert cli.main([*argv, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "self-play - cross-play: " in text
    assert out.read_bytes().startswith(b"\x89PNG")
    rows = list(csv.reader(out.with_suffix(".csv").read_text().splitlines()))
    names = ["a, seed 0", "a, seed 1", "b, seed 0", "b, seed 1"]
    assert rows[0] == ["", *names]
    content = json.loads(out.with_suffix(".json").read_text())
    assert content["members"] == names
    assert content["env"] == "matrix_game"
    assert np.asarray(content["by_slot"]).shape == (2, 4, 4)
    matrix = np.asarray([r[1:] for r in rows[1:]], float)
    np.testing.assert_array_equal(matrix, content["matrix"])
    np.testing.assert_allclose(matrix[:2, :2], matrix[2:, 2:], rtol=1e-5)  # b is a copy of a


def test_members_of_a_sweep_are_named_by_setting(swept, tmp_path, capsys):
    run = swept / "runs" / "static_0"
    assert cli.main(["crossplay", str(run), "--episodes", "1", "--slots", "0", "--out", str(tmp_path / "m.png")]) == 0
    content = json.loads((tmp_path / "m.json").read_text())
    assert content["members"] == [f"{setting}, seed {seed}" for setting in SETTINGS for seed in (0, 3)]
    assert content["slots"] == [0]


def test_a_sweeps_settings_are_drawn_and_exported_apart(swept, tmp_path, monkeypatch, capsys):
    run = str(swept / "runs" / "static_0")
    drawn = []
    monkeypatch.setattr(plots, "learning_curves", lambda frames, *_, **__: drawn.append(frames))
    assert cli.main(["plot", run]) == 0
    assert list(drawn[0]) == SETTINGS
    assert all(frame.setting.unique().tolist() == [i] for i, frame in enumerate(drawn[0].values()))
    with pytest.raises(UserError, match="4 settings: expected one"):
        plots.curves(rundir.read_metrics(run), "loss/total")
    assert "--setting: expected one of 0, 1, 2, 3" in fails(capsys, "export", run, str(tmp_path / "p"))
    assert "--setting 4: expected one" in fails(capsys, "render", run, "--setting", "4")
    assert cli.main(["export", run, str(tmp_path / "p"), "--setting", "2", "--train-seed", "3"]) == 0
    want = Sweep.load(swept).table
    assert list(want[(want.setting == 2) & (want.seed == 3)].index) == [5]
    learner, _ = cli.plan("ippo", [*SMALL, "--hidden", "5"])
    state = jax.tree.map(lambda x: x[5], runner.load_state(learner, run))
    jax.tree.map(np.testing.assert_array_equal, load_policy(tmp_path / "p").params, learner.policy.params(state))


def test_a_resumed_sweep_reports_each_setting(swept, tmp_path, capsys):
    run = tmp_path / "static_0"
    shutil.copytree(swept / "runs" / "static_0", run)
    assert cli.main(["resume", str(run)]) == 0
    text = capsys.readouterr().out
    assert f"policy of {SETTINGS[0]}, seed 0: {run}/policy" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sweep"], "LEARNER"),
        (["sweep", "ippo"], "--sweep: expected at least one NAME=VALUES"),
        (["sweep", "ipo", "--sweep", "lr=1"], "did you mean 'ippo'"),
        (["sweep", "ippo", *SMALL, "--sweep", "lrr=1e-3"], "did you mean 'lr'"),
        (["sweep", "ippo", *SMALL, "--sweep", "lr"], "--sweep lr: expected NAME=VALUE"),
        (["sweep", "ippo", *SMALL, "--sweep", "lr=fast"], "lr='fast': expected a finite number"),
        (["sweep", "ippo", *SMALL, "--sweep", "lr=-1"], "hypers.lr=-1.0: expected a number >= 0"),
        (["sweep", "ippo", *SMALL, "--sweep", "lr=uniform:0:1"], "num=None"),
        (["sweep", "ippo", *SMALL, "--sweep", "lr=log_uniform:0:1", "--num", "2"], "expected low > 0"),
        (["sweep", "ippo", *SMALL, "--sweep", "num_minibatches=1,3"], "num_minibatches=3"),
        (["sweep", "ippo", *SMALL, "--sweep", "lr=1e-3", "--run-dir", "x"], "--run-dir: expected without"),
        (["sweep", "ippo", *SMALL, "--sweep", "lr=1e-3", "--seeds", "1", "1"], "seeds="),
        (["sweep", "ippo", *SMALL, "--sweep", "lr=1e-3", "--no-such-option"], "no-such-option"),
        (["evaluate", "nowhere", "nowhere2"], "no run found"),
        (["crossplay", "nowhere"], "no run found"),
        (["crossplay"], "RUN"),
    ],
)
def test_wrong_input_is_one_clear_message(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = fails(capsys, *argv)
    assert message in text.replace("│ ", "")
    assert not list(Path(tmp_path).iterdir())


def test_wrong_choices_for_stored_runs_are_named(runs, swept, capsys):
    a, c = str(runs / "a"), str(runs / "c")
    assert "found 2 different ones" in fails(capsys, "crossplay", a, c)
    assert "expected agents 0 to 1" in fails(capsys, "crossplay", a, "--slots", "2")
    assert "num_agents=4, expected 2" in fails(capsys, "evaluate", a, "--env", "matrix_game")
    assert "expected name=value" in fails(capsys, "evaluate", a, "--env", "matrix_game:4")
    assert "--episodes 0" in fails(capsys, "evaluate", a, c, "--episodes", "0")
    assert "is not empty" in fails(capsys, "sweep", "ippo", *SMALL, "--sweep", "lr=1", "--out", str(swept))
