"""Runs over two processes of two forced host devices each, which exchange through gloo."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from toy_envs import tracker

from jaxstack import cli
from jaxstack.core import distributed
from jaxstack.core.errors import UserError
from jaxstack.core.rundir import read_metrics
from jaxstack.core.runner import resume, train

HERE = Path(__file__).parent
RUN = dict(progress=False, chunk=2)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(folder, *command):
    """Both processes, with logs in `folder`; PROCESS and PORT in the command are filled in."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE)}
    env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    port, children = str(free_port()), []
    for process in range(2):
        argv = [str(a).replace("PROCESS", str(process)).replace("PORT", port) for a in command]
        with open(folder / f"log{process}", "w") as log:
            children.append(subprocess.Popen([sys.executable, *argv], env=env, stdout=log, stderr=log))
    return children


def finish(children, folder, seconds=300):
    """Exit codes and logs."""
    try:
        codes = [c.wait(seconds) for c in children]
    finally:
        for c in children:
            c.kill()
    return codes, [(folder / f"log{i}").read_text() for i in range(2)]


def test_two_processes_equal_one(tmp_path):
    train(tracker(), 2, 4, run_dir=tmp_path / "alone", **RUN)
    children = launch(tmp_path, HERE / "child_processes.py", "PROCESS", "PORT", tmp_path)
    codes, logs = finish(children, tmp_path)
    assert codes == [0, 0], "\n".join(log[-2000:] for log in logs)
    first, second = (np.load(tmp_path / f"process{i}.npz") for i in range(2))
    for name in ("arr_0", "arr_1", "arr_2", "loss"):
        np.testing.assert_array_equal(first[name], second[name])
    four = train(tracker(), 4, 4, **RUN)
    np.testing.assert_allclose(first["arr_0"], four.state.params["w"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(first["arr_2"], four.state.params["w"], rtol=1e-5, atol=1e-5)
    # what they stored continues here, on one device
    six = resume(tracker(), tmp_path / "both", 6, **RUN)
    whole = train(tracker(), 6, 4, **RUN)
    np.testing.assert_allclose(six.metrics["loss/total"], whole.metrics["loss/total"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(first["loss"], whole.metrics.query("step <= 5")["loss/total"], rtol=1e-5, atol=1e-5)
    assert len(read_metrics(tmp_path / "both")) == 24


def test_a_signal_to_one_process_ends_all_after_the_same_chunk(tmp_path):
    run = tmp_path / "r"
    options = ["--env", "matrix_game", "--num-envs", "4", "--num-steps", "4", "--num-minibatches", "1", "--hidden", "4"]
    options += ["--total-steps", "160000000", "--seeds", "0", "1", "2", "3", "--devices", "4", "--chunk", "20"]
    processes = ["--coordinator", "127.0.0.1:PORT", "--num-processes", "2", "--process-id", "PROCESS"]
    children = launch(tmp_path, "-m", "jaxstack.cli", "train", "ippo", *options, *processes, "--run-dir", run)
    deadline = time.monotonic() + 300
    while not (run / "metrics.jsonl").exists():
        ended = [c.poll() for c in children]
        assert ended == [None, None], [(tmp_path / f"log{i}").read_text()[-2000:] for i in range(2)]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children[1].send_signal(signal.SIGTERM)
    codes, logs = finish(children, tmp_path)
    assert codes == [143, 143], logs
    status = json.loads((run / "run.json").read_text())
    assert status["status"] == "interrupted"
    assert [p.name for p in (run / "checkpoints").iterdir()] == [str(status["step"])]
    for log in logs:
        assert f"stopped after step {status['step']} of 10000000; `jaxstack resume {run}` continues" in log
    assert read_metrics(run).step.max() == status["step"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("h:1", None, 0), "num_processes=None, process_id=0: expected all three, or none"),
        (("h", 2, 0), "coordinator='h': expected HOST:PORT"),
        (("h:99999", 2, 0), "coordinator='h:99999': expected HOST:PORT"),
        (("h:1", 0, 0), "num_processes=0: expected a number >= 1"),
        (("h:1", 2, 2), "process_id=2: expected 0 to 1"),
    ],
)
def test_bad_addresses_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        distributed.start(*arguments)


def test_without_other_processes_everything_stays_as_it_is():
    x = np.arange(3)
    assert distributed.count() == 1
    assert distributed.is_first()
    assert distributed.fetch(x) is x
    assert distributed.share(x) is x
    assert distributed.largest(5) == 5
    assert distributed.on_first(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        distributed.on_first(lambda: 1 / 0)


def test_commands_of_the_guide_parse():
    text = (HERE.parents[1] / "docs" / "scaling.md").read_text().replace("\\\n", " ")
    layout = "--devices 4 --env-devices 4 --distributed"
    commands = re.findall(r"^ *jaxstack (train|resume) ([^#\n]*)", text.replace("$LAYOUT", layout), re.M)
    assert len(commands) >= 9
    for command, rest in commands:
        _, rest = cli.parser().parse_known_args([command, *rest.split()])
        if command == "resume":
            assert not rest
        else:
            assert cli.plan(rest[0], rest[1:])[1].run.devices >= 1
