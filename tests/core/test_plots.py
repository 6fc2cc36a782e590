import numpy as np
import pandas as pd
import pytest
from PIL import Image

from jaxstack.core import plots, stats
from jaxstack.core.errors import UserError


def frame(offset=0.0, seeds=3):
    rows = [
        {"seed": s, "samples": 10 * t, "step": t, "rollout/return": offset + t + s}
        for s in range(seeds)
        for t in range(1, 21)
    ]
    return pd.DataFrame(rows)


def test_curves_average_each_seed_over_equal_spans():
    at, scores = plots.curves(frame(), "rollout/return", points=4)
    np.testing.assert_array_equal(at, [50, 100, 150, 200])
    np.testing.assert_allclose(scores[0], [3.0, 8.0, 13.0, 18.0])
    np.testing.assert_allclose(scores[2] - scores[0], 2.0)


def test_curves_skip_missing_values_and_name_missing_metrics():
    data = frame()
    data.loc[data.step <= 5, "rollout/return"] = np.nan
    at, _ = plots.curves(data, "rollout/return", points=3)
    assert at[0] > 50
    with pytest.raises(UserError, match=r"rollout/retrn.*rollout/return"):
        plots.curves(data, "rollout/retrn")


def test_figures_are_drawn(tmp_path):
    runs = {"a": frame(), "b": frame(5.0)}
    scores = {"a": np.arange(5.0), "b": np.arange(5.0) + 1}
    table = {k: stats.estimate(stats.mean, v) for k, v in scores.items()}
    paths = [
        plots.learning_curves(runs, tmp_path / "curves.png", title="curves"),
        plots.estimates(table, tmp_path / "estimates.png", "score"),
        plots.profiles(scores, tmp_path / "profiles.png"),
        plots.improvements(scores, "a", tmp_path / "improvement.png"),
    ]
    for path in paths:
        pixels = np.asarray(Image.open(path).convert("L"))
        assert pixels.min() < 100, f"{path.name} is blank"
    with pytest.raises(UserError, match="against"):
        plots.improvements(scores, "c", tmp_path / "x.png")


def test_animations_hold_all_frames(tmp_path):
    frames = np.stack([np.full((16, 24, 3), 20 * i, np.uint8) for i in range(5)])
    with Image.open(plots.animation(frames, tmp_path / "a.gif")) as image:
        assert image.n_frames == 5
        assert image.size == (24, 16)
    page = plots.animation(frames, tmp_path / "a.html").read_text()
    assert "data:image/gif;base64," in page
    with pytest.raises(UserError, match="gif"):
        plots.animation(frames, tmp_path / "a.avi")
