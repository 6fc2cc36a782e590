"""Annotations of core, nn, measures and envs, shapes among them, hold when main functions run."""

import os
import subprocess
import sys
from pathlib import Path


def test_annotations_hold_where_functions_run():
    # a process of its own: the import hook changes every function of these packages
    child = Path(__file__).with_name("child_types.py")
    env = os.environ | {"PYTHONPATH": str(child.parents[1])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(child)], env=env, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "all checked"
