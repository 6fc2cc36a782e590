"""Commands in child processes that are forked from one which has imported jax but not started it: a start costs
tracing alone, not seconds of imports."""

import multiprocessing
import os
import sys
import time
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
IMPORTS = "orbax.checkpoint pandas safetensors.numpy tyro jaxstack.cli jaxstack.core.bundle jaxstack.core.runner"
FORKS.set_forkserver_preload([*IMPORTS.split(), "jaxstack.agents.ppo", "jaxstack.agents.hypermarl", "jaxstack.envs"])


def command(argv, log):
    """`jaxstack argv` with its output in `log`; exits with its code."""
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from jaxstack import cli

    sys.exit(cli.main(argv))


def start(argv, log):
    """A running child; `log` gets its output."""
    child = FORKS.Process(target=command, args=([str(a) for a in argv], str(log)), daemon=True)
    child.start()
    return child


def finish(child, seconds=500):
    """Its exit code, negative for a signal."""
    child.join(seconds)
    if child.is_alive():
        child.kill()
        child.join()
        raise AssertionError(f"the child did not end within {seconds} s")
    return child.exitcode


def run(argv, log):
    """Exit code of a command that runs to its end."""
    return finish(start(argv, log))


def wait_for(child, condition, seconds=500):
    """Until `condition()` holds; fails if the child ends before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert child.is_alive(), f"the child ended with {child.exitcode}"
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(0.002)


def stamp(path: Path) -> int:
    """When a file was last written; 0 if there is none."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
