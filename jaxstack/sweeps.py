"""Sweeps: settings x seeds as rows of one program, by the same runner that trains one setting.

Row (setting, seed) starts from `jax.random.key(seed)`, so all settings of a seed share their start, and
`runner.train(make_learner(**static), seeds=[seed], hypers=setting)` repeats a row alone (1e-5 relative, one step from
the same state; the sweep repeats itself bitwise). Numeric names are traced: their number and values never trigger
recompilation. Static names multiply: one program for each combination.
"""

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from jaxstack.core import config, runner
from jaxstack.core import options as texts
from jaxstack.core import space as spaces
from jaxstack.core.errors import UserError, unknown
from jaxstack.core.learner import Learner, better, require_one, rows_of
from jaxstack.core.sinks import Sink
from jaxstack.core.source import Source
from jaxstack.core.space import choice, grid, log_uniform, uniform
from jaxstack.report import plots, stats

__all__ = ["Sweep", "choice", "grid", "log_uniform", "sweep", "uniform"]

RESAMPLES = 10_000


class Sweep(NamedTuple):
    """What was swept and what came out, for one row (setting, seed) each. Failed rows (numbers not finite, see
    guard.py) have `alive` False and no final metrics; every summary counts them apart."""

    space: dict[str, spaces.Dimension]
    seeds: list[int]
    table: Any
    """pandas: setting (a number), a column for each swept name, seed, alive, step, samples, final metrics."""
    curves: Any
    """pandas: a row for each setting, seed and step, with all metrics."""
    programs: list[dict[str, Any]]
    """The compile ledger; `static` tells whose program it is."""
    runs: tuple[runner.Result, ...] = ()
    """The runner's results, one for each combination of static values; empty after `load`."""
    objective: tuple[str, str] = ("eval/return", "max")
    """The learner's: what settings are ranked by unless a metric is named."""

    @property
    def settings(self) -> Any:
        """pandas: a row for each setting, with the columns of the swept names."""
        return self.table.drop_duplicates("setting").set_index("setting")[list(self.space)]

    def state(self, setting: int, seed: int) -> Any:
        """The final state of one row. Raises `UserError` for a row that is none, or after `load`."""
        rows = self.table.index[(self.table.setting == setting) & (self.table.seed == seed)]
        if not self.runs or rows.empty:
            raise UserError(f"setting={setting}, seed={seed}: expected a row of a sweep made in this process")
        run, row = divmod(int(rows[0]), len(self.table) // len(self.runs))
        return rows_of(self.runs[run].state, row)

    def goal(self, metric: str | None = None, largest: bool | None = None) -> tuple[str, bool]:
        """(metric, whether larger is better); defaults: the objective, and for another metric the largest."""
        name, direction = self.objective
        metric = name if metric is None else metric
        if largest is None:
            largest = better(direction) > 0 if metric == name else True
        return metric, largest

    def summary(self, metric: str | None = None) -> Any:
        """pandas, a row for each setting: its values, `iqm` and `mean` over the runs that did not fail with 95%
        bootstrap intervals (`iqm_low`, ...; NaN for one run), and the numbers `runs` and `failed`."""
        scores = self._scores(self.goal(metric)[0])
        counts = np.asarray([len(s) for s in scores])
        out = self.settings.copy()
        for name, statistic in (("iqm", stats.iqm_by_task), ("mean", stats.by_task)):
            table = np.full((3, len(scores)), np.nan)
            for n in set(counts) - {0}:
                index = np.flatnonzero(counts == n)
                columns = np.stack([scores[i] for i in index], 1)
                table[:, index] = np.asarray(stats.bootstrap(statistic, columns, resamples=RESAMPLES))
            out[name], out[f"{name}_low"], out[f"{name}_high"] = table
        return out.assign(runs=counts, failed=len(self.seeds) - counts).reset_index()

    def ranking(self, metric: str | None = None, largest: bool | None = None) -> Any:
        """`summary`, best first: by IQM, settings with a failed run after those without, however good the others."""
        metric, largest = self.goal(metric, largest)
        table = self.summary(metric)
        key = -table.iqm if largest else table.iqm
        order = np.lexsort((key.fillna(np.inf), table.failed > 0))
        return table.iloc[order].reset_index(drop=True)

    def verdicts(self, metric: str | None = None, largest: bool | None = None) -> list[str]:
        """Say of each setting of the ranking, in its order, whether these seeds tell it from the best one.

        Args:
            metric: Default: the objective.
            largest: Whether larger is better.

        Returns:
            "best"; "tie" where the 95% interval of the probability that a seed of the best setting beats one of this
            setting includes 1/2; "behind"; "one seed" where nothing tells how runs vary; "failed" with a failed seed.
        """
        metric, largest = self.goal(metric, largest)
        scores, ranked = self._scores(metric), self.ranking(metric, largest)
        sign, order = 1.0 if largest else -1.0, ranked.setting.tolist()
        best, out = sign * scores[order[0]], []
        for place, (i, failed) in enumerate(zip(order, ranked.failed)):
            if failed:
                out.append("failed")
            elif place == 0:
                out.append("best")
            else:
                beats = stats.estimate(stats.improvement, best, sign * scores[i], resamples=RESAMPLES)
                out.append("one seed" if math.isnan(beats.low) else "tie" if beats.low <= 0.5 else "behind")
        return out

    def best(self, metric: str | None = None, largest: bool | None = None) -> dict[str, Any]:
        """The values of the first setting of the ranking: `make_learner(**best)`. Raises `UserError` if all failed."""
        metric, largest = self.goal(metric, largest)
        first = self.ranking(metric, largest).iloc[0]
        if not first.runs:
            raise UserError(f"{metric}: every run of the sweep failed")
        return self.settings.loc[[int(first.setting)]].to_dict("records")[0]

    def report(self, metric: str | None = None, largest: bool | None = None) -> str:
        """The ranking as text."""
        metric, largest = self.goal(metric, largest)
        rows: list[tuple[str, ...]] = [("", *self.space, f"IQM of {metric}", "mean", "runs", "failed", "")]
        verdicts = self.verdicts(metric, largest)
        for i, r in enumerate(self.ranking(metric, largest).to_dict("records"), 1):
            values = [_text(r[name]) for name in self.space]
            estimates = [str(_estimate(r, name)) if r["runs"] else "failed" for name in ("iqm", "mean")]
            rows.append((str(i), *values, *estimates, str(r["runs"]), str(r["failed"]), verdicts[i - 1]))
        widths = [max(map(len, column)) for column in zip(*rows)]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows)

    def to_xarray(self) -> Any:
        """An xarray Dataset of `alive` and the final metrics. A grid has a dimension for each swept name, a random
        search the dimension `setting` with the names as coordinates; the last one is `seed`. Needs xarray."""
        try:
            import xarray
        except ImportError as e:
            raise UserError("to_xarray: xarray is missing; pip install xarray") from e
        label = lambda v: v if isinstance(v, (bool, int, float, str)) else str(v)
        table, names = self.table, list(self.space)
        if spaces.is_grid(self.space):
            axes: list[tuple[str, list[Any]]] = [(n, list(_values(self.space[n]))) for n in names]
            where = [[values.index(v) for v in table[n]] for n, values in axes]
            coordinates: dict[str, Any] = {n: [label(v) for v in values] for n, values in axes}
        else:
            axes = [("setting", list(self.settings.index))]
            where = [list(table.setting)]
            coordinates = {n: ("setting", [label(v) for v in self.settings[n]]) for n in names}
            coordinates["setting"] = axes[0][1]
        axes, where = [*axes, ("seed", self.seeds)], [*where, [self.seeds.index(s) for s in table.seed]]
        data = {}
        for column in ["alive", *_metrics(table)]:
            array = np.zeros([len(values) for _, values in axes], table[column].to_numpy().dtype)
            array[tuple(where)] = table[column]
            data[column] = ([name for name, _ in axes], array)
        return xarray.Dataset(data, {**coordinates, "seed": self.seeds})

    def figure(self, path: str | Path, metric: str | None = None, largest: bool | None = None, title: str = "") -> Path:
        """The IQM of `metric`: over one numeric name with its interval as a band, over two names as a heat map (grid)
        or coloured points (random search), else the ranked settings with their intervals."""
        metric, largest = self.goal(metric, largest)
        ranked, names, label = self.ranking(metric, largest), list(self.space), f"IQM of {metric}"
        numeric = [n for n in names if ranked[n].dtype == float]
        logs = [n in numeric and _spans_decades(ranked[n]) for n in names]
        records = ranked.to_dict("records")
        if len(names) == 1 and numeric:
            return plots.dependence(
                ranked[names[0]], [_estimate(r) for r in records], path, names[0], label, logs[0], title
            )
        if len(names) == 2 and spaces.is_grid(self.space):
            rows, columns = (list(_values(self.space[n])) for n in names)
            values = np.full((len(rows), len(columns)), np.nan)
            for r in records:
                values[rows.index(r[names[0]]), columns.index(r[names[1]])] = r["iqm"]
            return plots.heat_map(values, path, rows, columns, label, (names[0], names[1]), title)
        if len(numeric) == len(names) == 2:
            x, y = names
            return plots.scatter(ranked[x], ranked[y], ranked.iqm, path, (x, y), label, (logs[0], logs[1]), title)
        done = [r for r in records if r["runs"]]
        if not done:
            raise UserError(f"{metric}: every run of the sweep failed")
        note = lambda r: f" ({r['failed']} failed)" if r["failed"] else ""
        rows = {", ".join(f"{n}={_text(r[n])}" for n in names) + note(r): _estimate(r) for r in done[::-1]}
        title = title or (f"{len(records) - len(done)} settings failed" if len(done) < len(records) else "")
        return plots.estimates(rows, path, label, title)

    def save(self, directory: str | Path) -> Path:
        """table.jsonl, curves.jsonl (non-finite numbers are null), space.yaml and ledger.json. Raises `UserError` when
        they cannot be written."""
        directory = Path(directory)
        files = {}
        try:
            objective = list(self.objective)
            content = {"space": spaces.to_plain(self.space), "seeds": self.seeds, "objective": objective}
            files["space.yaml"] = texts.dump(content)
            for name, frame in (("table", self.table), ("curves", self.curves)):
                rows = [{k: _json(v) for k, v in row.items()} for row in frame.to_dict("records")]
                files[f"{name}.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows)
            files["ledger.json"] = json.dumps(self.programs, indent=1)
            directory.mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (directory / name).write_text(text, encoding="utf-8")
        except (OSError, TypeError, yaml.YAMLError) as e:
            raise UserError(f"sweep {directory}: cannot be written ({e})") from e
        return directory

    @classmethod
    def load(cls, directory: str | Path) -> "Sweep":
        """A saved sweep, without the runs' states. Raises `UserError` naming a file that is missing or damaged."""
        directory = Path(directory)

        def read(name: str, parse: Callable[[str], Any]) -> Any:
            try:
                return parse((directory / name).read_text(encoding="utf-8"))
            except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as e:
                raise UserError(f"{directory / name}: no sweep's file ({' '.join(str(e).split())[:200]})") from e

        def plan(text: str) -> tuple[dict, list[int], tuple[str, str]]:
            data = texts.load(text, "space.yaml")
            metric, direction = data.get("objective", ("eval/return", "max"))
            return spaces.from_plain(data["space"]), list(data["seeds"]), (metric, direction)

        dimensions, seeds, objective = read("space.yaml", plan)
        table, curves = (read(f"{name}.jsonl", lambda text: _frame(text, dimensions)) for name in ("table", "curves"))
        return cls(dimensions, seeds, table, curves, read("ledger.json", json.loads), objective=objective)

    def _scores(self, metric: str) -> list[np.ndarray]:
        """Final values of each setting's runs that did not fail."""
        if not self.table.alive.any():  # such a sweep ends before its evaluation
            return [np.zeros(0)] * self.table.setting.nunique()
        if metric not in _metrics(self.table):
            raise unknown("metric of the sweep", metric, _metrics(self.table))
        good = self.table.alive & np.isfinite(self.table[metric])
        return [one[metric][good[one.index]].to_numpy() for _, one in self.table.groupby("setting")]


def sweep(
    make_learner: Callable[..., Learner],
    space: Mapping[str, spaces.Dimension],
    seeds: int | Sequence[int] = 1,
    num_steps: int | None = None,
    *,
    num: int | None = None,
    search_seed: int = 0,
    data: Source | None = None,
    run_dir: str | Path | None = None,
    plan: dict[str, Any] | None = None,
    options: runner.RunOptions = runner.RunOptions(),
    sinks: Callable[[str, dict[int, dict[str, Any]], Learner], Sequence[Sink]] | None = None,
    **changes: Any,
) -> Sweep:
    """Train every setting of `space` with every seed.

    The settings are the product of the lists of values or, when a name is drawn at random, `num` draws of the numeric
    names (the same for each combination of static ones).

    Args:
        make_learner: `make_learner(**static)` makes the learner; without arguments it tells which names are numeric,
            the fields of its `hypers`.
        space: Name of an option -> the values it takes.
        seeds: Seeds of each setting, or how many.
        num_steps: Steps of each run; default: the learner's own.
        num: Draws, where a name is random.
        search_seed: Of the draws.
        data: Source of batches; default: the learner's.
        run_dir: Where each combination of static options is a run of its own, `static_0`, ...; default: nowhere.
        plan: What is stored in each run beside what `resume` needs.
        options: Of the runner. A sweep that does not fit into memory is refused or, with `split_seeds`, run in groups
            of rows.
        sinks: Makes those of each program, called with its name (`static_0`, ...), the values of its settings by their
            number, and its learner. Rows have a column `setting`, which tells them apart.
        **changes: Fields of `options` by name.

    Returns:
        Scores, curves and runs of all settings.

    Raises:
        UserError: For whatever is wrong, before anything compiles.

    Example:
        result = sweep(lambda **o: make_agent("ippo", env="dispersion", **o), {"lr": grid(1e-4, 1e-3)}, seeds=4)
    """
    options = config.replace(options, **changes)
    seeds = runner.check_seeds(seeds)
    combinations, settings = _plan(make_learner, space, num, search_seed)
    learners = [make_learner(**c) for c in combinations]
    for learner in learners:
        _check_settings(learner, settings)
    rows = [(i, s) for i in range(len(settings)) for s in seeds]
    columns = {n: np.asarray([settings[i][n] for i, _ in rows], np.float32) for n in settings[0]}
    position = None if data is None else data.state()
    runs, programs, labels = [], [], []
    for k, (learner, static) in enumerate(zip(learners, combinations)):
        own = {k * len(settings) + i: static | setting for i, setting in enumerate(settings)}
        if data is not None:
            data.restore(position)
        run = runner.train(
            learner,
            num_steps,
            [s for _, s in rows],
            hypers=learner.hypers._replace(**columns) if columns else None,
            settings=[k * len(settings) + i for i, _ in rows],
            data=data,
            run_dir=None if run_dir is None else Path(run_dir) / f"static_{k}",
            plan={"options": config.to_dict(options)} | (plan or {}),
            options=options,
            sinks=() if sinks is None else sinks(f"static_{k}", own, learner),
        )
        runs.append(run)
        programs += [{"static": {n: _json(v) for n, v in static.items()}} | row for row in run.ledger.rows()]
        labels += own.values()
    table, curves = _tables(list(space), labels, seeds, runs)
    return Sweep(dict(space), seeds, table, curves, programs, tuple(runs), learners[0].objective)


def _plan(
    make_learner: Callable[..., Learner], dimensions: Any, num: int | None, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, float]]]:
    """(static combinations, numeric settings), checked."""
    signature = inspect.signature(make_learner)
    try:
        signature.bind()
    except TypeError as e:
        raise UserError("make_learner: expected to work without arguments, which tells what is numeric") from e
    default = make_learner()
    require_one(default, "a sweep")
    numeric = getattr(default.hypers, "_fields", ())
    kinds = [p.kind for p in signature.parameters.values()]
    static: list[str] | None = [n for n, p in signature.parameters.items() if p.kind != p.VAR_KEYWORD]
    if inspect.Parameter.VAR_KEYWORD in kinds:
        fields = getattr(default.config, "__dataclass_fields__", None)
        static = None if fields is None else [*static, *(n for n in fields if n != "hypers")]
    spaces.check(dimensions, numeric, static, num, default.name)
    return spaces.static_settings(dimensions, numeric), spaces.numeric_settings(dimensions, numeric, num, seed)


def _check_settings(learner: Learner, settings: list[dict[str, float]]) -> None:
    """Each setting must be one that the learner's config accepts."""
    if hasattr(learner.config, "hypers"):
        for setting in settings:
            config.replace(learner.config, **setting)


def _tables(names: list[str], labels: list[dict], seeds: list[int], runs: list[runner.Result]) -> tuple[Any, Any]:
    """(final table, curves). Final is the last step; rollout statistics, which a step without a finished episode does
    not have, are the last there were."""
    import pandas as pd

    curves = pd.concat([r.metrics for r in runs], ignore_index=True)
    curves = curves[["setting", "seed", "step", "samples", *_metrics(curves)]]
    groups = curves.groupby(["setting", "seed"])
    final, last = groups.nth(-1).set_index(["setting", "seed"]), groups.last()
    for name in _metrics(curves):
        if name.startswith("rollout/"):
            final[name] = last[name]
    rows = [(i, s) for i in range(len(labels)) for s in seeds]
    final = final.loc[rows].reset_index()
    losses = final[[n for n in _metrics(final) if n.startswith("loss/")]]
    alive = np.concatenate([r.alive for r in runs]) & np.isfinite(losses.to_numpy()).all(1)
    final.loc[~alive, _metrics(final)] = np.nan
    for at, name in enumerate(names, 1):
        final.insert(at, name, _column([labels[i][name] for i, _ in rows]))
    final.insert(final.columns.get_loc("seed") + 1, "alive", alive)
    return final, curves


def _metrics(frame: Any) -> list[str]:
    return [c for c in frame.columns if "/" in c]


def _values(dimension: spaces.Dimension) -> tuple[Any, ...]:
    return dimension.values if isinstance(dimension, spaces.Values) else ()


def _column(values: list[Any]) -> Any:
    """A pandas column that keeps whole numbers, tuples and None as they are."""
    import pandas as pd

    return pd.Series(values, dtype=float if all(isinstance(v, float) for v in values) else object)


def _estimate(row: dict[str, Any], name: str = "iqm") -> stats.Estimate:
    return stats.Estimate(row[name], row[f"{name}_low"], row[f"{name}_high"])


def _spans_decades(x: Any) -> bool:
    return bool(min(x) > 0 and max(x) >= 30 * min(x))


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _json(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _frame(text: str, names: Mapping[str, Any]) -> Any:
    """Rows of JSON; null is NaN, but in the columns of swept `names` None."""
    import pandas as pd

    rows = [json.loads(line) for line in text.splitlines()]
    frame = pd.DataFrame([{k: math.nan if v is None else v for k, v in row.items() if k not in names} for row in rows])
    for at, name in enumerate([n for n in names if n in rows[0]], 1):
        frame.insert(at, name, _column([texts.as_tuple(row[name]) for row in rows]))
    return frame
