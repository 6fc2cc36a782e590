"""Trials on a local Ray: one start for all tests, as it takes long."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from jaxstack.core import cluster
from jaxstack.core.errors import UserError

# Ray starts its processes by fork, and earlier tests of this process have started JAX's threads
pytestmark = pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called:RuntimeWarning")

SETTINGS = [{"width": w, "log": None} for w in range(5)]


@pytest.fixture(scope="module", autouse=True)
def ray_here():
    import ray

    before = os.environ.get("RAY_USAGE_STATS_ENABLED")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    start = lambda: ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        start()
    except Exception as e:  # ray waits 30 s for its own process, too short on a machine that is busy
        if "timed out during startup" not in str(e):
            raise
        ray.shutdown()
        start()
    yield ray
    ray.shutdown()
    if before is None:
        del os.environ["RAY_USAGE_STATS_ENABLED"]
    else:
        os.environ["RAY_USAGE_STATS_ENABLED"] = before


def squares():
    """A trial that notes each attempt; number 2 hangs the first time."""

    def trial(width, log):
        import os
        import time
        from pathlib import Path

        folder = Path(log) / str(width)
        folder.mkdir(exist_ok=True)
        attempts = len(list(folder.iterdir()))
        (folder / f"{os.getpid()}-{time.time_ns()}").touch()
        if width == 2 and attempts == 0:
            time.sleep(600)
        return {"square": width * width, "nan": float("nan")}

    return trial


def attempts(log: Path) -> dict[int, int]:
    return {int(p.name): len(list(p.iterdir())) for p in log.iterdir()}


def test_a_killed_worker_loses_no_trial_and_repeats_none(tmp_path):
    log, out = tmp_path / "log", tmp_path / "out"
    log.mkdir()
    trials = [t | {"log": str(log)} for t in SETTINGS]
    killed = []

    def kill():
        until = time.monotonic() + 120
        while time.monotonic() < until and not killed:
            for file in log.glob("2/*"):
                pid = int(file.name.split("-")[0])
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
            time.sleep(0.05)

    killer = threading.Thread(target=kill)
    killer.start()
    seen = []
    got = cluster.run_trials(squares(), trials, out, progress=lambda done, total: seen.append((done, total)))
    killer.join()
    assert len(killed) == 1
    assert [r["square"] for r in got] == [0, 1, 4, 9, 16]
    assert attempts(log) == {0: 1, 1: 1, 2: 2, 3: 1, 4: 1}
    assert seen == [(i, 5) for i in range(1, 6)]
    stored = [json.loads(f.read_text()) for f in out.iterdir()]
    assert sorted(s["trial"]["width"] for s in stored) == [0, 1, 2, 3, 4]

    # a driver that is started again, with one trial's result missing and a new trial
    (out / cluster._name(trials[4])).unlink()
    more = cluster.run_trials(squares(), [*trials[::-1], {"width": 7, "log": str(log)}], out)
    assert [r["square"] for r in more] == [16, 9, 4, 1, 0, 49]
    assert attempts(log) == {0: 1, 1: 1, 2: 2, 3: 1, 4: 2, 7: 1}


def test_failing_trials_are_named_after_the_others_are_done(tmp_path):
    def trial(width):
        if width == 1:
            raise RuntimeError("too narrow")
        return {"width": width} if width else [width]

    with pytest.raises(UserError, match="2 of 3 trials failed") as e:
        cluster.run_trials(trial, [{"width": w} for w in range(3)], tmp_path)
    assert "too narrow" in str(e.value)
    assert "result of type list: expected a dict" in str(e.value)
    assert [json.loads(f.read_text())["result"] for f in tmp_path.iterdir()] == [{"width": 2}]


def test_bad_trials_and_files_are_refused(tmp_path):
    run = lambda trials, **options: cluster.run_trials(lambda **_: {}, trials, tmp_path, **options)
    with pytest.raises(UserError, match=r"trials\[1\]={'a': 1}: is equal to trials\[0\]"):
        run([{"a": 1}, {"a": 1}])
    with pytest.raises(UserError, match="expected arguments that JSON can hold"):
        run([{"a": object()}])
    with pytest.raises(UserError, match="retries=-1"):
        run([], retries=-1)
    assert run([]) == []
    file = tmp_path / cluster._name({"a": 1})
    file.write_text('{"trial": {"a": 2}, "result": {}}')
    with pytest.raises(UserError, match=r"holds the trial {'a': 2}, expected {'a': 1}"):
        run([{"a": 1}])
    file.write_text("{")
    with pytest.raises(UserError, match="is no result of a trial"):
        run([{"a": 1}])


@pytest.mark.parametrize(
    ("address", "given"),
    [(None, {"include_dashboard": False}), ("auto", {"address": "auto"})],
    ids=["local", "cluster"],
)
def test_ray_is_started_without_dashboard_or_joined(address, given):
    calls = []

    class Ray:
        is_initialized = staticmethod(lambda: False)
        init = staticmethod(lambda **options: calls.append(options))

    cluster._connect(Ray, address)
    assert calls == [given | {"log_to_driver": False, "configure_logging": False}]
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
