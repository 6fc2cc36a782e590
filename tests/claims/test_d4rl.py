"""D4RL at full scale: settings of the data sets, data by path, play in gymnasium, rows of an arm."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack.claims import d4rl
from jaxstack.core.errors import UserError
from jaxstack.core.learner import Policy
from jaxstack.data.files import save_dataset
from jaxstack.data.offline import dataset

TINY = d4rl.Budget(share=1e-4, evaluations=2, episodes=2, width=4, critics=2)


def test_settings_are_those_of_the_released_code():
    of = lambda *what: d4rl.settings(*what, d4rl.Budget())
    got = of("halfcheetah", "medium-replay", "AC 0")
    assert (got["alpha"], got["num_updates"], got["pretrain_steps"], got["variant"]) == (20.0, 100_000, 10_000, "ac")
    assert (of("hopper", "medium", "TD3+BC")["alpha"], of("hopper", "medium", "TD3+BC")["pretrain_steps"]) == (10.0, 0)
    assert of("hopper", "medium-expert", "TD3+BC")["alpha"] == 2.5
    assert of("walker2d", "full-replay", "TD3+BC")["num_updates"] == 1_000_000
    edac = {q: of("halfcheetah", q, "EDAC") for q in d4rl.QUALITIES}
    assert [edac[q]["eta"] for q in d4rl.QUALITIES] == [0, 1, 1, 5, 5, 1]
    assert [edac[q]["num_critics"] for q in d4rl.QUALITIES] == [10, 10, 10, 10, 50, 10]
    assert (of("hopper", "expert", "EDAC")["num_critics"], of("hopper", "expert", "EDAC")["eta"]) == (50, 1)
    assert of("walker2d", "random", "EDAC, AC")["pretrain_steps"] == 20_000


def test_policies_play_whole_episodes_in_gymnasium():
    gymnasium = pytest.importorskip("gymnasium")
    lean = lambda p, carry, obs, mask, first, key: (carry, jnp.full((len(obs), 1, 3), p) * obs[..., :1])
    learner = SimpleNamespace(policy=Policy(lambda s: s, lambda p, b: (), lean))
    got = d4rl.player("hopper", learner, 2)(jnp.float32([0.0, 0.3]))
    want = []
    for p in (0.0, 0.3):
        total = []
        for seed in (1000, 1001):
            world = gymnasium.make("Hopper-v4")
            obs, total_ = world.reset(seed=seed)[0], 0.0
            for _ in range(1000):
                obs, reward, terminated, truncated, _ = world.step(np.full(3, p * obs[0], np.float32))
                total_ += reward
                if terminated or truncated:
                    break
            total.append(total_)
        want.append(np.mean(total))
    np.testing.assert_allclose(got, want, rtol=1e-2)


def test_rows_of_an_arm_come_from_a_data_set_by_path(tmp_path, monkeypatch):
    pytest.importorskip("gymnasium")
    monkeypatch.setattr(d4rl, "STEPS", 3)
    with pytest.raises(UserError, match="found data sets none, expected one"):
        d4rl.stored(tmp_path)
    rng = np.random.default_rng(0)
    rows = dict(obs=rng.normal(size=(60, 11)), next_obs=rng.normal(size=(60, 11)), reward=rng.normal(size=60))
    rows |= dict(action=rng.uniform(-1, 1, (60, 3)), truncated=np.arange(60) % 20 == 19)
    save_dataset(tmp_path / "hopper-medium-v2.npz", dataset("rows", **rows))
    one = d4rl.experiment("hopper", "medium", TINY)
    (row,) = one.run("TD3+BC", (3,), hopper_medium=tmp_path)
    scores = {k: v for k, v in row.items() if k.startswith("score@")}
    assert [*scores] == ["score@25", "score@50"]
    assert all(0.5 < v < 1.0 for v in scores.values())  # about a point a step: 20 of 3255
    assert row["final_score"] == scores["score@50"]
