"""Seeds and environments over devices; the runs themselves are in child_devices.py, as devices are forced at start."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from toy_envs import tracker
from toy_learners import regression

from jaxstack.core import devices
from jaxstack.core.errors import UserError
from jaxstack.core.runner import RunOptions, train

HERE = Path(__file__).parent


def child(*args):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE)}
    env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    command = [sys.executable, str(HERE / "child_devices.py"), *map(str, args)]
    out = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert out.returncode == 0, out.stderr[-3000:]


def test_environments_spread_over_devices_and_checkpoints_move_between_layouts(tmp_path):
    child("toy", tmp_path / "r")


def test_a_ppo_step_over_devices_equals_one_device():
    child("ppo")


@pytest.mark.parametrize(
    ("learner", "options", "message"),
    [
        (tracker(), {"env_devices": 2}, "devices=1 times env_devices=2: expected at most 1, what this machine has"),
        (tracker(), {"env_devices": 0}, "env_devices=0: expected a number >= 1"),
    ],
)
def test_bad_layouts_are_named(learner, options, message):
    with pytest.raises(UserError, match=message):
        train(learner, 1, 2, progress=False, **options)


@pytest.mark.parametrize(
    ("learner", "layout", "message"),
    [
        (regression(), (1, 2), r"toy does not tell which of its arrays hold environments \(Learner.over_envs\)"),
        (tracker(), (1, 3), "env_devices=3: expected a divisor of num_envs=8"),
        (tracker(), (3, 2), "devices=3: expected a divisor of the 2 seeds"),
    ],
)
def test_layouts_that_do_not_divide_are_named(learner, layout, message, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 64)
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices() * 64)
    state = jax.eval_shape(jax.vmap(lambda k: learner.init(k, learner.hypers)), jax.random.split(jax.random.key(0)))
    with pytest.raises(UserError, match=message):
        devices.layout(learner, state, *layout)


def test_split_is_nothing_without_env_devices():
    x = jnp.arange(6)
    assert devices.split(x, 0, "x") is x
    assert RunOptions().env_devices == 1
