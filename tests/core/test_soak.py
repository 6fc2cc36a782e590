"""Runs that are killed at random moments, again and again, end exactly where an undisturbed run does.

20 kills here, JAXSTACK_SOAK_KILLS=100 (`make soak`) for more; they fall into training alone, whose checkpoints follow
upon each other so closely that most of the time one is being written.
"""

import os
import time

import children
import numpy as np
import pytest
from toy_learners import assert_same

from jaxstack.cli import runs
from jaxstack.core.runner import load_state

KILLS = -(-int(os.environ.get("JAXSTACK_SOAK_KILLS", "20")) // 3)
STEPS = 8 * KILLS
SMALL = (
    "--num-envs 2 --num-steps 4 --num-minibatches 1 --num-epochs 1 --hidden 4 --eval-every -1 --dispatch scan".split()
)
AGENTS = {
    "ppo": "ppo --env matrix_game --env-args num_agents=1 num_actions=3".split(),
    "recurrent hypermarl": "hypermarl --env matrix_game --gru 4 --hyper-hidden 4 --embedding-dim 2".split(),
}


def steps(path, seeds):
    """Steps whose metrics are written."""
    file = path / "metrics.jsonl"
    return file.read_bytes().count(b"\n") // seeds if file.exists() else 0


@pytest.mark.parametrize(("agent", "seeds"), [("ppo", 1), ("ppo", 8), ("recurrent hypermarl", 8)])
def test_a_run_killed_at_random_moments_ends_as_an_undisturbed_one(agent, seeds, tmp_path):
    argv = ["train", *AGENTS[agent], *SMALL, "--total-steps", 8 * STEPS, "--chunk", 2, "--checkpoint-every", 2]
    argv += ["--seeds", *range(seeds), "--run-dir"]
    log = tmp_path / "log"
    child = children.start([*argv, tmp_path / "whole"], log)
    children.wait_for(child, (tmp_path / "whole" / "ledger.json").exists)
    begun = time.monotonic()
    assert children.finish(child) == 0, log.read_text()
    life = (time.monotonic() - begun) / KILLS  # from the first chunk to the kill at most: all lives cannot be enough
    draw = np.random.default_rng()
    path, delays = tmp_path / "killed", []
    while len(delays) < KILLS:
        before = children.stamp(path / "ledger.json")
        child = children.start(["resume", path] if (path / "run.yaml").exists() else [*argv, path], log)
        children.wait_for(child, lambda before=before: children.stamp(path / "ledger.json") > before)
        delays.append(draw.uniform(0, life))
        # on a machine whose speed changes a life can get too far: no later than its share of the steps
        until = time.monotonic() + delays[-1]
        while time.monotonic() < until and steps(path, seeds) < 8 * len(delays) - 4:
            time.sleep(0.002)
        assert child.is_alive(), f"finished before kill {len(delays)} of {KILLS}, lives of {life} s"
        child.kill()
        assert children.finish(child) == -9
    assert children.run(["resume", path], log) == 0, log.read_text()
    what = f"killed {np.round(delays, 3).tolist()} s after the first chunk began:\n{log.read_text()}"
    assert (path / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes(), what
    learner, _ = runs.load(str(path))
    assert_same(load_state(learner, path), load_state(learner, tmp_path / "whole"))
