"""Figures: learning curves, profiles, estimates; rendered episodes as GIF, HTML or MP4. Nothing needs a display."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxstack.core.errors import UserError
from jaxstack.report import stats

# Okabe and Ito's colours, told apart with any colour vision
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")
DASHES = ("-", "--", ":", "-.")
"""Of the first eight curves, of the next eight, ..."""
FIGURES, ANIMATIONS = (".png", ".svg", ".pdf"), (".gif", ".html", ".mp4")
"""Endings of files that can be written."""
UNITS = {
    "return": "return per episode, mean over agents",
    "length": "length of an episode in steps",
    "finished": "share of episodes that ended in time",
    "accuracy": "share of right answers",
    "loss": "loss",
    "perplexity": "perplexity",
}
"""What a metric's name, behind its group, stands for; others are shown by their name alone."""


def curves(
    frame: Any, metric: str, x: str = "samples", points: int = 60, smooth: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Average each seed of one run's metrics over equal spans.

    Args:
        frame: of the run, a row per step and seed.
        metric: its name.
        x: column whose range is split into spans.
        points: how many spans, K; fewer where there are fewer values.
        smooth: each value is replaced by the mean of its seed's last `smooth` values before spans are averaged.

    Returns:
        (ends of the spans [K], scores [S, K]); spans in which a seed has no value are left out.

    Raises:
        UserError: when the metric is missing or has no values, for `smooth` < 1, or for a sweep's rows of several
            settings, which have no mean.
    """
    if smooth < 1:
        raise UserError(f"smooth={smooth}: expected at least 1")
    if "setting" in frame and frame.setting.nunique() > 1:
        raise UserError(f"metrics of {frame.setting.nunique()} settings: expected one, frame[frame.setting == 0]")
    if metric not in frame:
        known = ", ".join(c for c in frame.columns if "/" in c)
        raise UserError(f"metric {metric!r} is not in the run; it has {known}")
    data = frame[["seed", x, metric]].dropna()
    if data.empty:
        raise UserError(f"metric {metric!r} has no values")
    at = np.sort(data[x].unique())
    edges = np.array_split(at, min(points, len(at)))
    spans = [(e[0], e[-1]) for e in edges]
    columns = []
    for _, one in data.groupby("seed"):
        one = one.sort_values(x)
        values = one[metric] if smooth == 1 else one[metric].rolling(smooth, min_periods=1).mean()
        columns.append([values[(one[x] >= lo) & (one[x] <= hi)].mean() for lo, hi in spans])
    scores = np.asarray(columns, np.float64)
    good = np.isfinite(scores).all(0)
    if not good.any():
        raise UserError(f"metric {metric!r} has no span in which every seed has a finite value")
    return np.asarray([hi for _, hi in spans])[good], scores[:, good]


def learning_curves(
    runs: Mapping[str, Any],
    path: str | Path,
    metric: str = "rollout/return",
    x: str = "samples",
    title: str = "",
    *,
    smooth: int = 1,
    unit: str = "",
) -> Path:
    """Draw the mean over seeds with 95% bootstrap bands.

    Args:
        runs: label -> metrics frame of a run.
        path: the file to write, .png, .svg or .pdf.
        metric: what is drawn.
        x: "samples" or "step".
        title: above the figure.
        smooth: as of `curves`.
        unit: of `x`; default: environment steps, or updates, of each seed.

    Returns:
        `path`.

    Raises:
        UserError: another ending, or as `curves`.
    """
    figure_path(path)
    labels = {}
    for name, frame in runs.items():
        seeds, end = frame.groupby("seed").step.max(), frame.step.max()
        lost = f", {(seeds < end).sum()} failed" if (seeds < end).any() else ""
        labels[name] = f"{name} ({len(seeds)} seed{'s' * (len(seeds) > 1)}{lost})"
    columns = max(1, min(3, 100 // max(map(len, labels.values()))))
    figure, axes = _figure(height=4.1 + 0.19 * -(-len(runs) // columns))
    for i, (name, frame) in enumerate(runs.items()):
        at, scores = curves(frame, metric, x, smooth=smooth)
        style: dict[str, Any] = dict(color=COLOURS[i % len(COLOURS)], linestyle=DASHES[i // len(COLOURS) % len(DASHES)])
        lone: dict[str, Any] = dict(marker="o") if len(at) == 1 else {}
        axes.plot(at, scores.mean(0), label=_text(labels[name]), linewidth=2, **style, **lone)
        if len(scores) > 1:
            _, low, high = stats.bootstrap(_column_mean, scores, resamples=2000)
            low, high = np.asarray(low), np.asarray(high)
            axes.fill_between(at, low, high, color=style["color"], alpha=0.2, linewidth=0)
    axes.set_xlabel(unit or {"samples": "environment steps of each seed", "step": "updates of each seed"}.get(x, x))
    known = UNITS.get(metric.rpartition("/")[2])
    shown = f"{known}\n({metric})" if known else metric
    axes.set_ylabel(shown + (f"\nmean of the last {smooth} values" if smooth > 1 else ""))
    axes.set_title("mean over seeds, 95% interval", fontsize=8, loc="right", color="#555555")
    return _save(figure, axes, path, title, columns=columns)


def estimates(table: Mapping[str, stats.Estimate], path: str | Path, label: str, title: str = "") -> Path:
    """Point estimates with intervals, a row each."""
    figure, axes = _figure(height=1.2 + 0.45 * len(table))
    for i, ((name, e), colour) in enumerate(zip(table.items(), _cycle())):
        axes.plot([e.low, e.high], [i, i], color=colour, linewidth=8, alpha=0.35, solid_capstyle="butt")
        axes.plot([e.value], [i], "|", color=colour, markersize=18, markeredgewidth=3)
        axes.annotate(name, (e.value, i), (0, 12), textcoords="offset points", ha="center", fontsize=9)
    axes.set_yticks([])
    axes.set_ylim(-0.7, len(table) - 0.2)
    axes.set_xlabel(f"{label}, with 95% interval")
    return _save(figure, axes, path, title, legend=False)


def arm_panels(
    tables: Sequence[tuple[str, str, Mapping[str, Sequence[float]]]],
    path: str | Path,
    ours: Callable[[str], bool] = lambda arm: False,
) -> Path:
    """Draw the runs, mean and 95% interval of every arm, one panel per table.

    Args:
        tables: (title, metric, arm -> scores of its runs); scores that are not finite are left out and counted.
        path: the file to write.
        ours: which arms stand out.

    Returns:
        `path`.
    """
    from matplotlib.ticker import MaxNLocator

    columns = min(3, len(tables))
    lines = -(-len(tables) // columns)
    most = max(len(arms) for _, _, arms in tables)
    figure = _canvas(4.2 * columns, 0.9 + (0.8 + 0.32 * most) * lines)
    for i, (title, metric, arms) in enumerate(tables):
        axes = figure.add_subplot(lines, columns, i + 1)
        names = []
        for y, (arm, scores) in enumerate(reversed(list(arms.items()))):
            values = np.asarray(scores, np.float64)
            good = values[np.isfinite(values)]
            lost = len(values) - len(good)
            names.append(f"{arm} ({lost} failed)" if lost else arm)
            if not len(good):
                continue
            e = stats.estimate(stats.mean, good)
            colour = COLOURS[0] if ours(arm) else COLOURS[6]
            axes.plot([e.low, e.high], [y, y], color=colour, linewidth=7, alpha=0.3, solid_capstyle="butt")
            axes.plot(good, np.full(len(good), y), "o", color=colour, markersize=3, alpha=0.6)
            axes.plot([e.value], [y], "|", color=colour, markersize=12, markeredgewidth=2.5)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_title(title, fontsize=9, loc="left")
        axes.set_xlabel(metric, fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
        left, right = axes.get_xlim()
        pad = max(0.0, 0.01 - (right - left) / 2)  # arms that agree to three digits look alike
        axes.set_xlim(left - pad, right + pad)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.25)
    return _write(figure, path)


def image_panels(pictures: Mapping[str, Any], path: str | Path, beneath: Any = None) -> Path:
    """Draw maps [H, W] as colours, one panel each, with the largest value in the title.

    Args:
        pictures: title -> map; each has a colour scale of its own, from 0 to its largest value.
        path: the file to write.
        beneath: a grey image [H, W] that shines through, or None.

    Returns:
        `path`.
    """
    columns = min(3, len(pictures))
    lines = -(-len(pictures) // columns)
    height, width = np.shape(next(iter(pictures.values())))
    figure = _canvas(3.2 * columns, (3.2 * height / width + 0.45) * lines)
    for i, (title, picture) in enumerate(pictures.items()):
        axes = figure.add_subplot(lines, columns, i + 1)
        if beneath is not None:
            axes.imshow(beneath, cmap="gray")
        top = float(np.max(picture))
        axes.imshow(picture, cmap="inferno", vmin=0.0, vmax=top if top > 0 else 1.0, alpha=0.65)
        axes.set_title(f"{title} ({top:.2f})", fontsize=9, loc="left")
        axes.set_axis_off()
    return _write(figure, path)


def curve_panels(
    panels: Sequence[tuple[str, str, str, str, Mapping[str, tuple[Sequence[float], Any]]]], path: str | Path
) -> Path:
    """Draw curves with 95% intervals over runs, one line per arm, one panel per entry.

    Args:
        panels: (title, metric, axis name, scale, arm -> (positions [K], scores [S, K])); the scale is "linear", "log"
            or "log2". Positions where a score is not finite are left out.
        path: the file to write.

    Returns:
        `path`.

    Raises:
        UserError: another scale, or a position that is not positive on a logarithmic one.
    """
    figure = _canvas(5.0 * len(panels), 4.6)
    for i, (title, metric, name, scale, arms) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        ticks = sorted({float(x) for at, _ in arms.values() for x in at})
        if scale not in ("linear", "log", "log2"):
            raise UserError(f"scale={scale!r}: expected 'linear', 'log' or 'log2'")
        if scale != "linear" and ticks[0] <= 0:
            raise UserError(f"{title}: found {name} {ticks[0]:g} on a logarithmic axis, expected positive numbers")
        for j, (arm, (at, table)) in enumerate(arms.items()):
            scores = np.asarray(table, np.float64)
            good = np.isfinite(scores).all(0)
            if not good.any():
                continue
            x = np.asarray(at, np.float64)[good]
            value, low, high = (np.asarray(v) for v in stats.bootstrap(stats.by_task, scores[:, good]))
            colour, dash = COLOURS[j % len(COLOURS)], ("-", "--", ":")[j // len(COLOURS) % 3]
            axes.plot(x, value, label=arm, marker="o", markersize=3, color=colour, linestyle=dash)
            axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
        if scale == "log2":
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        else:
            axes.set_xscale(scale)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel(name)
        axes.set_ylabel(metric)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    return _write(figure, path)


def dependence(
    x: Any, table: Sequence[stats.Estimate], path: str | Path, name: str, label: str, log: bool = False, title: str = ""
) -> Path:
    """Estimates over a numeric quantity `x`, with their intervals as a band; a NaN estimate is marked as failed."""
    figure, axes = _figure()
    order = np.argsort(x)
    at = np.asarray(x, np.float64)[order]
    value, low, high = np.asarray(table, np.float64).reshape(-1, 3)[order].T
    good = np.isfinite(value)
    axes.plot(at[good], value[good], "o-", color=COLOURS[0], linewidth=2, label="estimate, 95% interval")
    axes.fill_between(at[good], low[good], high[good], color=COLOURS[0], alpha=0.2, linewidth=0)
    if not good.all():
        bottom = axes.get_xaxis_transform()
        axes.plot(
            at[~good], np.zeros((~good).sum()), "x", color=COLOURS[1], transform=bottom, clip_on=False, label="failed"
        )
    if log:
        _log_axis(axes, "x")
    axes.set_xlabel(name)
    axes.set_ylabel(label)
    return _save(figure, axes, path, title)


def heat_map(
    values: Any,
    path: str | Path,
    rows: Sequence[Any],
    columns: Sequence[Any],
    label: str,
    names: tuple[str, str] = ("", ""),
    title: str = "",
) -> Path:
    """A matrix [R, C] with its numbers; NaN cells read "failed". `names` are those of rows and columns."""
    values = np.asarray(values, np.float64)
    figure, axes = _figure(2.5 + 0.8 * len(columns), 1.8 + 0.55 * len(rows))
    axes.grid(False)
    image = axes.imshow(np.ma.masked_invalid(values), cmap="viridis", aspect="auto")
    middle = np.nanmean([np.nanmin(values), np.nanmax(values)]) if np.isfinite(values).any() else 0.0
    for (i, j), v in np.ndenumerate(values):
        text, colour = (f"{v:.3g}", "white" if v <= middle else "black") if np.isfinite(v) else ("failed", COLOURS[1])
        axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(columns)), [_short(c) for c in columns], rotation=30 if len(columns) > 6 else 0)
    axes.set_yticks(range(len(rows)), [_short(r) for r in rows])
    axes.set_ylabel(names[0])
    axes.set_xlabel(names[1])
    figure.colorbar(image, ax=axes, label=label)
    return _save(figure, axes, path, title, legend=False)


def scatter(
    x: Any,
    y: Any,
    values: Any,
    path: str | Path,
    names: tuple[str, str],
    label: str,
    log: tuple[bool, bool] = (False, False),
    title: str = "",
    points: str = "setting",
) -> Path:
    """Points coloured by `values`, `points` says what they are; NaN ones are crosses marked as failed."""
    figure, axes = _figure()
    x, y, values = (np.asarray(v, np.float64) for v in (x, y, values))
    good = np.isfinite(values)
    drawn = axes.scatter(x[good], y[good], c=values[good], cmap="viridis", s=60, label=points)
    if not good.all():
        axes.scatter(x[~good], y[~good], marker="x", color=COLOURS[1], s=60, label="failed")
    for which, wanted in zip("xy", log):
        if wanted:
            _log_axis(axes, which)
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])
    figure.colorbar(drawn, ax=axes, label=label)
    return _save(figure, axes, path, title)


def clusters(
    panels: Sequence[Mapping[str, Any]], groups: Any, path: str | Path, names: Sequence[str] = (), title: str = ""
) -> Path:
    """Points of the plane, coloured by their group: a row of panels per mapping from a panel's title to [P, 2]; the
    groups [P] are those of all panels, `names` theirs by number."""
    groups = np.asarray(groups)
    width = max(len(row) for row in panels)
    figure = _canvas(4.2 * width, 3.6 * len(panels))
    axes = figure.subplots(len(panels), width, squeeze=False)
    for line, row in zip(axes, panels, strict=True):
        for ax, (told, points) in zip(line, row.items(), strict=True):
            for g in np.unique(groups):
                own = np.asarray(points)[groups == g]
                label = names[g] if g < len(names) else f"group {g}"
                colour = COLOURS[int(g) % len(COLOURS)]
                ax.scatter(own[:, 0], own[:, 1], s=9, alpha=0.7, color=colour, label=label, linewidths=0)
            ax.set_title(told, fontsize=8)
            ax.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, markerscale=2, frameon=False)
    if title:
        figure.suptitle(title, fontsize=11)
    return _write(figure, path)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def profiles(scores: Mapping[str, Any], path: str | Path, title: str = "") -> Path:
    """Share of runs above a score, with 95% bands (Agarwal et al., 2021)."""
    figure, axes = _figure()
    tables = {k: stats.table(v) for k, v in scores.items()}
    low = min(float(t.min()) for t in tables.values())
    high = max(float(t.max()) for t in tables.values())
    taus = np.linspace(low, high, 101)
    for (label, t), colour in zip(tables.items(), _cycle()):
        value, lo, hi = stats.bootstrap(_Profile(tuple(taus.tolist())), t, resamples=2000)
        axes.plot(taus, np.asarray(value), color=colour, label=label, linewidth=2)
        axes.fill_between(taus, np.asarray(lo), np.asarray(hi), color=colour, alpha=0.2, linewidth=0)
    axes.set_xlabel("score")
    axes.set_ylabel("share of runs above")
    return _save(figure, axes, path, title)


def improvements(scores: Mapping[str, Any], against: str, path: str | Path, title: str = "") -> Path:
    """Probability that each of `scores` beats `against`, with intervals."""
    if against not in scores:
        raise UserError(f"against={against!r}: expected one of {', '.join(scores)}")
    table = {
        f"{name} > {against}": stats.estimate(stats.improvement, s, scores[against], resamples=2000)
        for name, s in scores.items()
        if name != against
    }
    return estimates(table, path, "probability of improvement", title)


def animation(frames: np.ndarray, path: str | Path, fps: int = 10) -> Path:
    """Frames [T, H, W, 3] uint8 to .gif, .html (a page that needs nothing else) or .mp4 (extra `video`).

    Raises `UserError` for other endings or a missing encoder.
    """
    from PIL import Image

    path = _checked(path, ANIMATIONS)
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = np.asarray(frames, np.uint8)
    if path.suffix == ".mp4":
        return _mp4(frames, path, fps)
    images = [Image.fromarray(f) for f in frames]
    target: Any = path if path.suffix == ".gif" else io.BytesIO()
    images[0].save(target, format="GIF", save_all=True, append_images=images[1:], duration=int(1000 / fps), loop=0)
    if path.suffix == ".html":
        data = base64.b64encode(target.getvalue()).decode()
        path.write_text(
            f'<!doctype html><meta charset="utf-8"><title>{path.stem}</title>'
            f'<img alt="episode" src="data:image/gif;base64,{data}">\n',
            encoding="utf-8",
        )
    return path


def _mp4(frames: np.ndarray, path: Path, fps: int) -> Path:
    try:
        import imageio_ffmpeg  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise UserError(f"{path}: MP4 needs imageio-ffmpeg; pip install 'jaxstack[video]', or choose .gif") from e
    height, width = frames.shape[1:3]
    writer = imageio_ffmpeg.write_frames(str(path), (width, height), fps=fps)
    writer.send(None)
    for frame in frames:
        writer.send(np.ascontiguousarray(frame))
    writer.close()
    return path


def figure_path(path: str | Path) -> Path:
    """Return `path` if a figure can be written there; raises `UserError` naming it otherwise."""
    return _checked(path, FIGURES)


def animation_path(path: str | Path) -> Path:
    """Likewise of an animation."""
    return _checked(path, ANIMATIONS)


def _checked(path: str | Path, endings: Sequence[str]) -> Path:
    path = Path(path)
    if path.suffix not in endings:
        found = f"found {path.suffix}" if path.suffix else "found none"
        raise UserError(f"{path}: {found}, expected a file that ends in {', '.join(endings[:-1])} or {endings[-1]}")
    if path.is_dir():
        raise UserError(f"{path}: found a directory, expected a file")
    return path


def _column_mean(x: Any) -> Any:
    return x.mean(0)


class _Profile(tuple):  # hashable thresholds
    def __new__(cls, taus: tuple[float, ...]) -> "_Profile":
        return super().__new__(cls, taus)

    def __call__(self, x: Any) -> Any:
        import jax.numpy as jnp

        return stats.profile(x, jnp.asarray(tuple(self)))


def _cycle() -> Any:
    import itertools

    return itertools.cycle(COLOURS)


def _canvas(width: float, height: float, dpi: int = 110) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _log_axis(axes: Any, which: str) -> None:
    """Make an axis, "x" or "y", logarithmic; one of less than a decade has a few plain numbers instead of powers."""
    from matplotlib import ticker

    getattr(axes, f"set_{which}scale")("log")
    low, high = getattr(axes, f"get_{which}lim")()
    if high < 10 * low:
        axis = getattr(axes, f"{which}axis")
        axis.set_major_locator(ticker.MaxNLocator(5))
        axis.set_minor_locator(ticker.NullLocator())
        axis.set_major_formatter(ticker.StrMethodFormatter("{x:,g}"))


def _figure(width: float = 7.0, height: float = 4.2) -> tuple[Any, Any]:
    figure = _canvas(width, height, dpi=120)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _text(label: str) -> str:
    """A label as matplotlib shows it: one that begins with _ would be left out, and dollars would be read as TeX."""
    return (" " * label.startswith("_") + label).replace("$", r"\$")


def _save(figure: Any, axes: Any, path: str | Path, title: str, legend: bool = True, columns: int = 3) -> Path:
    if legend:
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns, fontsize=9)
    if title:
        axes.set_title(_text(title), fontsize=11, loc="left")
    return _write(figure, path)


def _write(figure: Any, path: str | Path) -> Path:
    path = figure_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror})") from e
    return path
