import numpy as np
import pandas as pd
import pytest
from PIL import Image

from jaxstack.core.errors import UserError
from jaxstack.report import plots, stats


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


def test_smoothing_is_a_mean_of_the_last_values():
    _, scores = plots.curves(frame(seeds=1), "rollout/return", points=20, smooth=4)
    np.testing.assert_allclose(scores[0, :4], [1.0, 1.5, 2.0, 2.5])
    np.testing.assert_allclose(scores[0, 4:], np.arange(5, 21) - 1.5)
    with pytest.raises(UserError, match="smooth=0"):
        plots.curves(frame(), "rollout/return", smooth=0)


def test_curves_are_labelled_and_told_apart(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plots, "_write", lambda figure, path: drawn.setdefault(str(path), figure) and path)
    lost = frame()
    runs = {f"run {i}": frame(i, seeds=1) for i in range(9)} | {"_own $x$": lost[(lost.seed > 0) | (lost.step < 9)]}
    plots.learning_curves(runs, "a.svg", title="ippo on lbf", smooth=2)
    (axes,) = drawn["a.svg"].axes
    assert axes.get_title(loc="left") == "ippo on lbf"
    assert axes.get_xlabel() == "environment steps of each seed"
    assert axes.get_ylabel() == "return per episode, mean over agents\n(rollout/return)\nmean of the last 2 values"
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 10
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[0] == "run 0 (1 seed)"
    assert labels[-1] == r" _own \$x\$ (3 seeds, 1 failed)"


def test_endings_of_figures(tmp_path):
    for name, start in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF")):
        path = plots.learning_curves({"a": frame(seeds=1)}, tmp_path / "new" / name)
        assert path.read_bytes().startswith(start)
    (tmp_path / "b.png").mkdir()
    for name, found in (("a.jpg", "found .jpg"), ("a", "found none"), ("b.png", "found a directory")):
        with pytest.raises(UserError, match=found):
            plots.learning_curves({"a": frame(seeds=1)}, tmp_path / name)


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


def test_panels_of_arms_and_curves(tmp_path, monkeypatch):
    """What is drawn: failed runs are counted and left out, axes have the scale and name that were asked for."""
    drawn = {}
    monkeypatch.setattr(plots, "_write", lambda figure, path: drawn.setdefault(str(path), figure) and path)
    nan = float("nan")
    plots.arm_panels([("e", "score", {"a": [1.0, 2.0, nan], "b": [nan], "c": [3.0, 3.5]})], "arms", lambda a: a == "a")
    (axes,) = drawn["arms"].axes
    assert [t.get_text() for t in axes.get_yticklabels()] == ["c", "b (1 failed)", "a (1 failed)"]  # the first on top
    points = [line for line in axes.lines if line.get_marker() == "o"]
    assert [list(line.get_xdata()) for line in points] == [[3.0, 3.5], [1.0, 2.0]]
    assert [line.get_color() for line in points] == [plots.COLOURS[6], plots.COLOURS[0]]
    table = {"a": ([1, 2, 4], [[1.0, 2.0, nan], [2.0, 3.0, 4.0]])}
    panels = [("e", "score", "time", scale, table) for scale in ("linear", "log", "log2")]
    plots.curve_panels(panels, "curves")
    for axes, scale in zip(drawn["curves"].axes, ("linear", "log", "log")):
        assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_xscale()) == ("time", "score", scale)
        assert list(axes.lines[0].get_xdata()) == [1, 2]  # a seed lacks the third point
        np.testing.assert_allclose(axes.lines[0].get_ydata(), [1.5, 2.5])
    with pytest.raises(UserError, match="scale='cubic'"):
        plots.curve_panels([("e", "score", "time", "cubic", table)], "x")
    with pytest.raises(UserError, match="found time 0 on a logarithmic axis"):
        plots.curve_panels([("e", "score", "time", "log", {"a": ([0, 1], [[1.0, 2.0]] * 2)})], "x")


def test_a_short_logarithmic_axis_has_few_plain_numbers():
    _, axes = plots._figure()
    axes.scatter([145_000, 288_000], [0.1, 6.0])
    for which in "xy":
        plots._log_axis(axes, which)
    axes.figure.canvas.draw()
    texts = [tick.get_text() for tick in axes.get_xticklabels(which="both") if tick.get_text()]
    assert 3 <= len(texts) <= 7
    assert "200,000" in texts
    assert "10^{0}" in "".join(tick.get_text() for tick in axes.get_yticklabels())  # over decades as usual
