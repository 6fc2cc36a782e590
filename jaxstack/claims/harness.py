"""Claims: what a paper says, as experiments with baselines, margins and a verdict.

A `Claim` has scales; a `Scale` has experiments and checks. An `Experiment` runs one arm with given seeds and yields
one row per seed. `run_claim` appends rows to a file as they come and continues from there after a stop; it prints the
verdicts and stores everything as JSON and figures. Checks are decided by 95% bootstrap intervals over seeds.

A claim names all baselines of its paper that run here, gives every arm the same tuning budget (the record holds it),
and states no more than its checks decide.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxstack.claims import report
from jaxstack.claims.judging import Check, Row, Verdict, judge
from jaxstack.claims.store import Store, Tuning, digest, metrics_of
from jaxstack.core import rundir
from jaxstack.core.errors import UserError
from jaxstack.core.signals import Interrupted

__all__ = [
    "Check",
    "Claim",
    "Curve",
    "Experiment",
    "Row",
    "Scale",
    "Tuning",
    "Verdict",
    "judge",
    "run_claim",
]

RECORDS = Path("docs/results")
WORK = Path("runs/reproduce")


class Experiment(NamedTuple):
    """Arms that are run with the same data, budget and metrics."""

    name: str
    arms: tuple[str, ...]
    run: Callable[..., Iterable[Row]]
    """`run(arm, seeds, **options)` -> rows `{"seed": s, metric: number, ...}`, at least one for each of `seeds` (a
    tuple of ints). A generator's rows are stored as they come. `metric@x` is a point of a curve over x; `parameters` is
    the number of trained parameters. Options: `tuned`, the chosen setting (a dict) where there is a `tune`; a path by
    each name in `needs`."""
    needs: tuple[str, ...] = ()
    """Names of data sets that the user gives: `--data NAME=DIR`."""
    tune: Callable[..., Tuning | None] | None = None
    """`tune(arm, **paths)`: the arm's tuning, None where an arm has nothing to tune."""


class Scale(NamedTuple):
    """One size of a claim; `minutes` is its measured time on 2 CPU cores (`small`) or what is named in the scope."""

    experiments: tuple[Experiment, ...]
    checks: tuple[Check, ...]
    seeds: int = 5
    minutes: float = 0.0
    needs: tuple[str, ...] = ()
    """Data sets that all of its experiments need."""


class Curve(NamedTuple):
    """`metric@x` of an experiment's rows, drawn over x."""

    experiment: str
    metric: str
    axis: str = "length"
    scale: str = "log2"
    """log2, log or linear."""


class Claim(NamedTuple):
    """`small` takes minutes on 2 CPU cores, `full` is the paper's scale; `scope` tells what cannot be shown."""

    method: str
    paper: str
    statement: str
    scope: str
    scales: Mapping[str, Scale]
    baselines: tuple[str, ...] = ()
    """The rivals of the paper; at every scale each is the rival of at least one check."""
    ours: str = ""
    """Arms whose names begin so stand out in figures."""
    curves: tuple[Curve, ...] = ()


def run_claim(
    claim: Claim,
    scale: str = "small",
    seeds: int | None = None,
    out: Path = RECORDS,
    *,
    work: Path = WORK,
    only: Sequence[str] = (),
    arms: Sequence[str] = (),
    data: Mapping[str, Path] | None = None,
    fresh: bool = False,
    keep_rows: bool = False,
    quiet: bool = False,
) -> bool:
    """Run what is missing, print the verdicts, store `<method>-<scale>.json` and figures in `out`.

    Args:
        claim: the claim.
        scale: one of its scales.
        seeds: seeds 0 to seeds - 1 of each arm; default: the scale's number.
        out: folder of the record. A run limited by `only` or `arms` that leaves rows missing writes to `work` instead.
        work: rows are kept in `work/<method>-<scale>/rows.jsonl`.
        only: names of experiments; others are not run, but their stored rows count.
        arms: names of arms, likewise.
        data: name -> folder of data sets that experiments need.
        fresh: forget the stored rows of what is selected.
        keep_rows: use rows that were made by other claim code instead of running their arms again.
        quiet: print nothing.

    Returns:
        True when at least one check was decided and every decided check holds.

    Raises:
        UserError: wrong arguments, a malformed claim, or rows that are not what the experiment promises.
    """
    plan = chosen_scale(claim, scale)
    seeds = plan.seeds if seeds is None else seeds
    if seeds < 2:
        raise UserError(f"seeds={seeds}: expected at least 2, a claim is a statement over seeds")
    data = dict(data or {})
    _check_selection(plan, only, arms, data)
    from rich.console import Console

    console = Console(quiet=quiet)
    say = lambda text: console.print(text, highlight=False, soft_wrap=True, markup=False)
    run = rundir.environment()  # of the start: later the code may be another
    # paths are machine-specific
    run["command"] = [Path(a).name if Path(a).is_absolute() else a for a in run["command"]]
    folder = work / f"{claim.method}-{scale}"
    marks = [digest(e.run, e.tune) for e in plan.experiments]  # before anything runs: globals may change
    with Store(folder, fresh) as store:
        store.session(run)
        options = _Options(set(only), set(arms), data, fresh, keep_rows, tuple(range(seeds)), say)
        try:
            results = [_run(store, plan, e, mark, options) for e, mark in zip(plan.experiments, marks)]
        except (KeyboardInterrupt, Interrupted):
            say(f"stopped; the same command continues, finished rows are in {store.path}")
            raise
        rows = _rows(store, results, seeds)
        partial = bool(only or arms) and any(r.why for r in results)
        verdicts = [_judge(c, rows, results) for c in plan.checks]
        record = report.record(claim, scale, seeds, verdicts, results, store, rows)
    path = (folder if partial else out) / f"{claim.method}-{scale}"
    report.write(claim, record, rows, verdicts, path)
    report.show(console, record, path.with_suffix(".json"))
    if partial:
        say(f"Only a part of the claim was run: the record stands beside the rows, {out} is left as it was.")
    return record["holds"]


def chosen_scale(claim: Claim, scale: str) -> Scale:
    """The scale of that name, with its checks tested for names that do not exist.

    Raises:
        UserError: an unknown scale, or a malformed claim.
    """
    if scale not in claim.scales:
        raise UserError(f"scale={scale!r}: expected one of {', '.join(map(repr, claim.scales))}")
    if found := problems(claim, scale):
        raise UserError(f"claim {claim.method!r}: {found[0]}")
    return claim.scales[scale]


def problems(claim: Claim, scale: str) -> list[str]:
    """What is wrong with a scale of a claim: doubled names, checks of unknown arms, baselines without a check."""
    plan = claim.scales[scale]
    names = [e.name for e in plan.experiments]
    out = [f"experiment {n!r} is there twice" for n in dict.fromkeys(names) if names.count(n) > 1]
    arms = {e.name: e.arms for e in plan.experiments}
    out += [f"experiment {e!r} has an arm twice" for e, a in arms.items() if len(set(a)) < len(a) or not a]
    for check in plan.checks:
        if check.experiment not in arms:
            out.append(f"check of {check.experiment!r}: found no such experiment, expected one of {', '.join(arms)}")
        elif unknown := [a for a in check.arms if a not in arms[check.experiment]]:
            out.append(f"check of {check.experiment!r}: found no arm {unknown[0]!r}, expected one of its arms")
        elif problem := check.problem():
            out.append(f"check of {check.experiment!r}, {check.arm!r}, {check.metric!r}: {problem}")
    if not any(not c.report for c in plan.checks):
        out.append(f"scale {scale!r} has no check that decides")
    compared = {rival for c in plan.checks for rival in c.rivals}
    out += [f"baseline {b!r} is the rival of no check at scale {scale!r}" for b in claim.baselines if b not in compared]
    out += [
        f"needs {n!r}: expected a name like 'webkb'" for e in plan.experiments for n in e.needs if not n.isidentifier()
    ]
    return out


def _check_selection(plan: Scale, only: Sequence[str], arms: Sequence[str], data: Mapping[str, Path]) -> None:
    def known(option: str, given: Iterable[str], names: Iterable[str], what: str) -> None:
        names = list(dict.fromkeys(names))
        for name in given:
            if name not in names:
                expected = f"one of {', '.join(repr(n) for n in names)}" if names else "none"
                raise UserError(f"{option} {name}: found no such {what}, expected {expected}")

    known("--only", only, (e.name for e in plan.experiments), "experiment")
    chosen = [e for e in plan.experiments if not only or e.name in only]
    known("--arms", arms, (a for e in chosen for a in e.arms), "arm")
    known("--data", data, (n for e in plan.experiments for n in (*plan.needs, *e.needs)), "data set")
    for name, path in data.items():
        if not Path(path).is_dir():
            raise UserError(f"--data {name}={path}: found no such folder, expected one")


class _Options(NamedTuple):
    only: set[str]
    arms: set[str]
    data: dict[str, Path]
    fresh: bool
    keep_rows: bool
    seeds: tuple[int, ...]
    say: Callable[[str], None]


def _run(store: Store, plan: Scale, experiment: Experiment, mark: str, o: _Options) -> report.Ran:
    """Run the arms of an experiment that are selected, can run, and have no complete rows of the present code."""
    needs = tuple(dict.fromkeys((*plan.needs, *experiment.needs)))
    missing = [n for n in needs if n not in o.data]
    why = {}
    for arm in experiment.arms:
        key = (experiment.name, arm)
        wanted = (not o.only or experiment.name in o.only) and (not o.arms or arm in o.arms)
        if wanted and o.fresh and not missing:
            store.drop(*key)
        old = store.arms.get(key)
        stale = old is not None and old.digest != mark and not o.keep_rows
        if old is not None and not stale and set(o.seeds) <= set(old.rows):
            continue
        if not wanted:
            why[arm] = "the stored rows are of other code" if stale else "not selected"
        elif missing:
            why[arm] = f"data missing: {', '.join(f'--data {n}=DIR' for n in missing)}"
        else:
            if stale:
                o.say(f"{experiment.name}: {arm}: runs again, its code changed (--keep-rows keeps its rows)")
                store.drop(*key)
            # rows that are kept and new ones are of one arm: they share its mark
            own = mark if old is None or stale else old.digest
            _run_arm(store, experiment, arm, own, o.seeds, {n: o.data[n] for n in needs}, o.say)
    return report.Ran(experiment.name, experiment.arms, why, mark)


def _run_arm(
    store: Store,
    experiment: Experiment,
    arm: str,
    mark: str,
    seeds: tuple[int, ...],
    paths: dict[str, Path],
    say: Callable[[str], None],
) -> None:
    name = f"{experiment.name}: {arm}"
    key = (experiment.name, arm)
    options: dict[str, Any] = dict(paths)
    if experiment.tune is not None:
        if key not in store.arms or not store.arms[key].tuned:
            start = time.perf_counter()
            tuning = experiment.tune(arm, **paths)
            if tuning is not None:
                if problem := tuning.problem():
                    raise UserError(f"tuning of {name}: found {problem}")
                _ = tuning.chosen
            seconds = time.perf_counter() - start
            store.tuning(*key, mark, tuning, seconds)
            say(f"{seconds:6.0f} s  {name}: {f'tuned, {tuning.budget}' if tuning else 'nothing to tune'}")
        tuning = store.arms[key].tuning
        if tuning is not None and set(tuning.seeds) & set(seeds):
            both = sorted(set(tuning.seeds) & set(seeds))
            raise UserError(f"tuning of {name}: found seeds {both} of the runs, expected seeds of its own")
        options["tuned"] = {} if tuning is None else tuning.chosen
    have = store.arms[key].rows if key in store.arms else {}
    left = tuple(s for s in seeds if s not in have)
    start = time.perf_counter()
    for row in experiment.run(arm, left, **options):
        seed = row.get("seed")
        if seed not in left:
            raise UserError(f"{name}: found a row of seed {seed}, expected one of {list(left)}")
        store.row(*key, mark, int(seed), metrics_of(row))
    lost = [s for s in left if s not in store.arms[key].rows] if key in store.arms else list(left)
    if lost:
        raise UserError(f"{name}: found no rows of seeds {lost}, expected one for each seed")
    seconds = time.perf_counter() - start
    store.done(*key, mark, left, seconds)
    say(f"{seconds:6.0f} s  {name}")


def _rows(store: Store, results: list[report.Ran], seeds: int) -> list[Row]:
    """Rows of the complete arms, in the claim's order."""
    out = []
    for r in results:
        for arm in r.arms:
            if arm not in r.why:
                rows = store.arms[r.name, arm].rows
                out += [{"experiment": r.name, "arm": arm, "seed": s} | rows[s] for s in range(seeds)]
    return out


def _judge(check: Check, rows: list[Row], results: list[report.Ran]) -> Verdict:
    verdict = judge(check, rows)
    if verdict.status != "not run":
        return verdict
    why = next(r.why for r in results if r.name == check.experiment)
    return verdict._replace(note="; ".join(dict.fromkeys(f"{why[a]}" for a in check.arms if a in why)))
