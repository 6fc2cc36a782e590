"""The claim of PTGOOD: its data, its measures and what its arms share."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from jaxstack.claims import ptgood as study
from jaxstack.claims.harness import problems
from jaxstack.data.files import load_dataset


def test_data_never_reach_the_goal():
    data = load_dataset(study.data()[0])
    assert data.size == study.EPISODES * study.HORIZON
    assert not data.terminated.any()
    assert int(data.truncated.sum()) == study.EPISODES
    assert data.next_obs[:, 0].max() < 0.45
    inside = ~data.ends[:-1]
    np.testing.assert_array_equal(data.next_obs[:-1][inside], data.obs[1:][inside])
    same = np.corrcoef(data.action[:-1][inside, 0], data.action[1:][inside, 0])[0, 1]
    assert same == pytest.approx(study.SMOOTH, abs=0.05)
    # held-out data are others of the same kind
    assert (study.play(1).action != data.action).mean() > 0.9


def test_every_scale_is_whole_and_arms_differ_in_the_strategy_alone():
    for scale in study.claim.scales:
        assert problems(study.claim, scale) == []
    stages = {arm: [s.name for s in study.method(arm, study.Budget()).stages] for arm in study.ARMS}
    assert stages["PTGOOD"] == stages["depth 1"] == stages["N(0, I)"] == ["model", "pretrain", "encode", "explore"]
    assert stages["Cal-QL"] == ["pretrain", "explore"]
    assert all(s == ["model", "pretrain", "explore"] for arm, s in stages.items() if len(s) == 3)


def test_play_is_measured_by_goals_and_cells():
    assert study.cells(np.float32([[-1.2, -0.07], [0.6, 0.07], [-0.3, 0.001]])).tolist() == [0, 399, 210]
    obs = np.tile(np.float32([-0.5, 0.0]), (2, 20, 1))
    obs[1, 10:, 0] = 0.3
    held = SimpleNamespace(obs=obs[:, None], last=np.zeros((2, 1, 20)))
    held.last[1, 0, 14] = 1
    state = SimpleNamespace(buffer=SimpleNamespace(experience=held), mean=np.zeros((2, 2)), std=np.ones((2, 2)))
    table = pd.DataFrame({"seed": [3, 4, 3, 4], "eval/return": [np.nan, np.nan, 1.0, 2.0]})
    rows = list(study.measured(study.seen(SimpleNamespace(state=state, metrics=table)), (3, 4)))
    assert [r["reached"] for r in rows] == [0, 1]
    assert [r["steps_to_goal"] for r in rows] == [20, 15]
    assert [r["cells"] for r in rows] == [1, 2]
    assert (rows[1]["cells@10"], rows[1]["cells@12"], rows[1]["final_return"]) == (1, 2, 2)


def test_auroc_counts_pairs():
    inside, outside = np.float64([0, 1, 2]), np.float64([1, 3])
    assert study.auroc(inside, outside) == pytest.approx((1 + 0.5 + 0 + 3) / 6)
