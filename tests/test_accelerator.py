"""scripts/check_accelerator.py at its tiny size: the same code as on a GPU, with the kernel interpreted."""

import argparse
import importlib
import json
from pathlib import Path

import pytest

from jaxstack.fast import batch_last

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture
def check(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("check_accelerator")


TINY = argparse.Namespace(tiny=True, jaxmarl=None, child=None)


def test_training_the_kernel_and_physics_hold_at_a_tiny_size(check, monkeypatch):
    monkeypatch.setattr(check, "repeated", lambda measure, seconds: [measure()])
    (row,) = check.train(check.TINY, TINY)
    assert row["met"]
    assert row["steps_per_s_quartiles"][1] > 0
    rows = {row["case"].rpartition(", ")[2]: row for row in check.kla(check.TINY, TINY)}
    assert list(rows) == ["sequential", "chunked", "associative", "pallas", "fastest"]
    assert rows["fastest"]["form"] in rows
    for form in ("sequential", "chunked", "associative", "pallas"):
        assert rows[form]["met"]
        assert rows[form]["value_error"] < 1e-5
        assert set(rows[form]["gradient_errors"]) == {"v", "precision", "k", "q", "abar", "pbar"}
        assert rows[form]["compiled"] is (form != "pallas")
    (row,) = check.physics(check.TINY, TINY)
    assert row["met"]
    assert set(row["ms_per_step_quartiles"]) == {"vmap", "batch last"}
    assert {"cpu"} == batch_last.BACKENDS


def test_processes_have_to_agree_where_flags_are_set(check, monkeypatch):
    sums = iter("abcdee")
    asked = []

    def child(name, args, seconds, variables):
        asked.append(variables["XLA_FLAGS"])
        return [{"sha256": next(sums), "s": 1.0}], ""

    monkeypatch.setenv("XLA_FLAGS", "--own")
    monkeypatch.setattr(check, "child", child)
    with_flags, without = check.determinism(check.TINY, TINY)
    assert (with_flags["met"], without["met"]) == (False, True)
    assert asked == [f"--own {check.FLAGS}"] * 2 + ["--own"] * 2
    assert next(check.determinism(check.TINY, TINY))["met"]


def test_what_does_not_run_or_end_is_listed(check, monkeypatch, tmp_path, capsys):
    def child(name, args, seconds):
        if name == "device":
            return [{"case": "device", "backend": "gpu", "devices": ["x"], "met": True, "text": "x"}], ""
        if name == "train":
            return [{"case": "train, a", "met": True, "text": "x"}], "the time was over"
        return [], "ended with 1: RuntimeError: no"

    monkeypatch.setattr(check, "child", child)
    out = tmp_path / "new" / "a.json"
    assert check.main(["--checks", "train", "kla", "--out", str(out)]) == 1
    report = json.loads(out.read_text())
    assert report["backend"] == "gpu"
    assert [(r["case"], r.get("met")) for r in report["rows"]] == [
        ("device", True),
        ("train, a", True),
        ("train", None),
        ("kla", False),
    ]
    text = capsys.readouterr().out
    assert "without result, as the time was over: train" in text
    assert "RuntimeError: no" in text
    assert check.main(["--checks", "train", "--out", str(out)]) == 0


def test_a_cpu_and_wrong_options_are_refused(check, monkeypatch, capsys):
    monkeypatch.setattr(
        check, "child", lambda *_: ([{"case": "device", "backend": "cpu", "met": False, "text": ""}], "")
    )
    assert check.main([]) == 2
    assert "found cpu, expected a GPU or TPU" in capsys.readouterr().err
    for argv in (["--minutes", "0"], ["--jaxmarl", "/nowhere"], ["--checks", "peer"]):
        with pytest.raises(SystemExit):
            check.main(argv)
