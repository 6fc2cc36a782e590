import json
import math
import multiprocessing
import subprocess
import sys

import jax
import numpy as np
import pandas as pd
import pytest

from jaxstack.core import cache
from jaxstack.core.errors import UserError
from jaxstack.core.rundir import RunDir, environment, read_metrics, read_plan

PLAN = {"agent": "toy", "config": {"width": 4}, "seeds": [0], "num_steps": 3}


@pytest.fixture
def run(tmp_path):
    run = RunDir.create(tmp_path / "a" / "r", PLAN)
    yield run
    run.close()


def test_a_new_run_records_plan_and_environment(run):
    assert read_plan(run.path) == PLAN
    facts = json.loads((run.path / "run.json").read_text())
    assert facts["status"] == "running"
    assert facts["versions"]["jax"] == jax.__version__
    assert {"jaxlib", "flax", "optax", "numpy", "python", "jaxstack"} <= set(facts["versions"])
    assert facts["device"].startswith("cpu")
    run.status("finished", step=3)
    assert json.loads((run.path / "run.json").read_text()) == facts | {"status": "finished", "step": 3}


def test_the_git_commit_is_stored_inside_a_repository_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment()["git_commit"] is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "--no-verify", "-m", "x"], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert environment()["git_commit"] == head


def _try(path, queue):
    try:
        RunDir.open(path).close()
        queue.put("opened")
    except UserError as e:
        queue.put(str(e))


def test_two_processes_cannot_hold_one_directory(run):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_try, args=(run.path, queue))
    process.start()
    assert "in use by another process" in queue.get(timeout=120)
    process.join()
    run.close()
    RunDir.open(run.path).close()


def test_wrong_directories_are_refused(run, tmp_path):
    with pytest.raises(UserError, match="holds a run already; `jaxstack resume"):
        RunDir.create(run.path, PLAN)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="not empty and not a run"):
        RunDir.create(foreign, PLAN)
    assert [p.name for p in foreign.iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="is a file"):
        RunDir.create(foreign / "thesis.tex", PLAN)
    with pytest.raises(UserError, match="cannot be written"):
        RunDir.create("/proc/jaxstack/run", PLAN)
    with pytest.raises(UserError, match="no run found"):
        RunDir.open(foreign)


def test_metrics_read_with_one_pandas_call_and_null_for_nan(run):
    values = np.random.default_rng(0).normal(size=50).astype(np.float32).astype(float)
    rows = [{"step": i, "seed": 0, "loss/total": v} for i, v in enumerate(values)]
    run.append(rows)
    run.append([{"step": 50, "seed": 0, "loss/total": math.nan}, {"step": 51, "seed": 0, "loss/total": math.inf}])
    frame = read_metrics(run.path)
    assert frame["loss/total"][:50].tolist() == values.tolist()
    assert frame["loss/total"][50:].isna().all()
    assert len(pd.read_json(run.path / "metrics.jsonl", lines=True)) == 52
    for line in (run.path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_cut_drops_later_and_torn_lines(run):
    run.append([{"step": t, "seed": s, "x/y": math.nan} for t in (1, 2, 3) for s in (0, 1)])
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "se')
    kept = run.cut(2)
    assert [(r["step"], r["seed"]) for r in kept] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert all(math.isnan(r["x/y"]) for r in kept)
    assert read_metrics(run.path).step.tolist() == [1, 1, 2, 2]


def test_a_broken_plan_and_missing_metrics_are_named(run):
    with pytest.raises(UserError, match="no metrics found"):
        read_metrics(run.path)
    (run.path / "run.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"run\.yaml: not valid YAML"):
        read_plan(run.path)
    (run.path / "run.yaml").write_text("a: 1")
    with pytest.raises(UserError, match="expected the fields agent, config, num_steps and seeds"):
        read_plan(run.path)


CACHE = """
import jax
from jaxstack.core import cache
print(cache.enable(), jax.config.jax_compilation_cache_dir)
"""


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"XDG_CACHE_HOME": "{tmp}"}, "{tmp}/jaxstack/xla {tmp}/jaxstack/xla"),
        ({"JAXSTACK_CACHE": "{tmp}/mine"}, "{tmp}/mine {tmp}/mine"),
        ({"JAXSTACK_CACHE": "off"}, "None None"),
        ({"JAX_COMPILATION_CACHE_DIR": "{tmp}/user"}, "{tmp}/user {tmp}/user"),
    ],
)
def test_the_compilation_cache_can_be_switched(tmp_path, monkeypatch, variables, expected):
    for name in ("JAXSTACK_CACHE", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(tmp=tmp_path))
    out = subprocess.run([sys.executable, "-c", CACHE], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == expected.format(tmp=tmp_path)


def test_default_cache_directory_is_in_the_home(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(cache.default_dir()) == "/home/someone/.cache/jaxstack/xla"
