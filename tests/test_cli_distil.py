"""`jaxstack distil` from a stored classifier to another one that every command reads, and one line for wrong input."""

import json

import jax
import numpy as np
import pytest

from jaxstack import cli
from jaxstack.core import program, runner
from jaxstack.core.errors import UserError
from jaxstack.data import images
from jaxstack.nn.classifier import classifier
from jaxstack.report import plots

SHORT = "--rounds 2 --batch-size 4 --student-steps 1 --generator-width 4 --few 1 --few-updates 1 --seed 5".split()


def stored(path, **options):
    """A classifier's run that nobody trained."""
    learner = classifier(num_updates=7, batch_size=16, **options)
    states, _ = program.initial(learner, [3, 4], None)
    return learner, states, runner.save(learner, states, [3, 4], path, {"eval/accuracy": [0.1, 0.2]})


def test_a_student_is_a_run_that_other_commands_take(tmp_path, capsys, monkeypatch):
    learner, states, teacher = stored(tmp_path / "teacher", model="lenet")
    for a, b in zip(jax.tree.leaves(runner.load_state(learner, teacher).params), jax.tree.leaves(states.params)):
        assert (np.asarray(a) == np.asarray(b)).all()
    student = tmp_path / "student"
    assert cli.main(["distil", str(teacher), "--out", str(student), "--train-seed", "4", *SHORT]) == 0
    printed = capsys.readouterr().out
    table = json.loads((student / "distil.json").read_text())
    assert [row["network"] for row in table["networks"]] == [
        "teacher",
        "student, zero-shot",
        "student, 1 images per class",
    ]
    assert {row["parameters"] for row in table["networks"]} == {61_706}  # LeNet's 62,006 with one channel, not three
    assert all(0 <= row["accuracy"] <= 1 for row in table["networks"])
    assert table["beta"] == pytest.approx(250 / 16)
    assert "student, zero-shot" in printed
    capsys.readouterr()
    assert cli.main(["evaluate", str(student)]) == 0
    assert "eval/accuracy" in capsys.readouterr().out
    assert cli.main(["resume", str(student), "--steps", "8"]) == 0
    units = []
    monkeypatch.setattr(plots, "learning_curves", lambda *_, unit, **__: units.append(unit))
    assert cli.main(["plot", str(student)]) == 0
    assert units == ["samples of each seed"]  # no environment's steps
    # the data are gone: the student is made all the same
    monkeypatch.setattr(images, "digits", lambda which, seed=0: (_ for _ in ()).throw(UserError("digits: gone")))
    again = tmp_path / "again"
    assert cli.main(["distil", str(teacher), "--out", str(again), *SHORT[:-6], "--seed", "5"]) == 0
    assert "accuracies were not measured: digits: gone" in capsys.readouterr().out
    assert json.loads((again / "distil.json").read_text())["networks"][1]["accuracy"] is None


def test_what_cannot_be_distilled_is_named(tmp_path, capsys):
    _, _, teacher = stored(tmp_path / "teacher", model="lenet")
    _, _, plain = stored(tmp_path / "mlp", model="mlp")
    out = ["--out", str(tmp_path / "out"), "--rounds", "1"]
    for argv, message in (
        ([str(plain), *out], "found the network mlp, expected one with stages: lenet or wrn-D-W"),
        ([str(teacher), *out, "--model", "cnn"], "--model: found the network cnn"),
        ([str(teacher), *out, "--model", "wrn-10-0.125"], "--model wrn-10-0.125: attention: found stages of"),
        ([str(teacher), *out, "--model", "resnet"], "model='resnet': expected one of"),
        ([str(teacher), "--out", str(teacher)], "holds a run already"),
        ([str(teacher), *out, "--rounds", "0"], "--rounds 0: expected at least 1"),
        ([str(teacher), *out, "--lr", "0"], "--lr 0.0"),
        ([str(tmp_path / "none"), *out], "no run found"),
    ):
        assert cli.main(["distil", *argv]) == 2
        printed = capsys.readouterr().err
        assert message in printed
        assert printed.count("\n") == 1
    assert not (tmp_path / "out").exists()
    learner, states, _ = stored(tmp_path / "third", model="lenet")
    with pytest.raises(UserError, match=r"state.step: found shape \(1,\), expected \(2,\)"):
        runner.save(learner, states._replace(step=states.step[:1]), [0, 1], tmp_path / "fourth")
