"""Stored runs for the commands that read them."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Member(NamedTuple):
    """One row of a run: a learner that was trained."""

    run: str
    """As the user typed it."""
    setting: str
    """"setting 0 (lr=0.001)", empty in a run of one setting."""
    seed: int


def load(run_dir: str) -> tuple[Any, dict[str, Any]]:
    """The learner (of a method in stages that of the last one) and plan of a stored run. Raises `UserError`."""
    from jaxstack.core import stages

    learner, plan = load_any(run_dir)
    return stages.last(learner, run_dir) if isinstance(learner, stages.Staged) else learner, plan


def load_any(run_dir: str) -> tuple[Any, dict[str, Any]]:
    """The learner or the method in stages, and the plan, of a stored run. Raises `UserError`."""
    from jaxstack import learners
    from jaxstack.core import distributed
    from jaxstack.core.rundir import read_plan

    plan = distributed.share(distributed.on_first(lambda: read_plan(run_dir)))
    return learners.from_plain(plan["agent"], plan["config"], f"{run_dir}/run.yaml: config"), plan


def trained(run_dir: str, method: str, config: type) -> tuple[Any, Any]:
    """The learner of a method's run of one setting and the states of its living seeds, leaves [S, ...].

    Args:
        run_dir: the run.
        method: its name, for the message.
        config: of the method, by which its runs are known.

    Raises:
        UserError: naming what does not fit, in the words of `--model`.
    """
    import numpy as np

    from jaxstack.core import runner
    from jaxstack.core.errors import UserError
    from jaxstack.core.learner import rows_of

    learner, plan = load(run_dir)
    if not isinstance(learner.config, config):
        raise UserError(f"--model {run_dir}: found a run of {learner.name}, expected one of {method}")
    if len({*plan.get("settings", [0])}) > 1:
        raise UserError(f"--model {run_dir}: found a sweep of several settings, expected a run of one")
    state, alive = runner.stored(learner, run_dir)
    return learner, rows_of(state, np.flatnonzero(alive))


def started(learner: Any, run_dir: str, seeds: Sequence[int]) -> Any:
    """The learner of a run that starts from a stored one: each seed from its own row there, or all from its only row.

    Raises:
        UserError: naming what does not fit, in the words of `--start-from`.
    """
    import numpy as np

    from jaxstack.core import runner
    from jaxstack.core.errors import UserError
    from jaxstack.core.learner import require_one, rows_of

    where = f"--start-from {run_dir}"
    require_one(learner, where)
    old, plan = load(run_dir)
    if old.name != learner.name:
        raise UserError(f"{where}: found a run of {old.name}, expected one of {learner.name}")
    have = list(plan["seeds"])
    if len({*plan.get("settings", [0])}) > 1:
        raise UserError(f"{where}: found a sweep of several settings, expected a run of one")
    if len(have) > 1 and (missing := [s for s in seeds if s not in have]):
        raise UserError(f"{where}: found seeds {have}, expected one seed or {missing} among them")
    rows = np.asarray([have.index(s) if len(have) > 1 else 0 for s in seeds])
    state, alive = runner.stored(old, run_dir)
    if failed := [have[row] for row in rows if not alive[row]]:
        raise UserError(f"{where}: found numbers that are not finite in seed {failed[0]}, expected finite ones")
    try:
        return runner.start_from(learner, rows_of(state, rows))
    except UserError as e:
        raise UserError(f"{where}: {e}") from None


def programs(run_dir: str) -> dict[str, list[Member]]:
    """Folder -> rows of each run of a directory: one, or those of a sweep's programs."""
    from jaxstack.core import rundir

    plans = {str(part): rundir.read_plan(part) for part in rundir.parts(run_dir)}
    names = {part: rundir.setting_names(plan, list(plans.values())) for part, plan in plans.items()}
    return {p: [Member(run_dir, *row) for row in zip(names[p], plan["seeds"])] for p, plan in plans.items()}


def place(plan: dict[str, Any]) -> str:
    """The environment, task or data of a run, empty where its config names none."""
    config = plan["config"]
    return str(next((config[k] for k in ("env", "task", "data") if config.get(k)), ""))


def frames(run_dirs: Sequence[str], by_stage: bool = True) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Label -> (metrics, plan) of each run, of each setting of a sweep and, by default, of each stage of a run."""
    from jaxstack.core import rundir

    found: dict[str, tuple[Any, dict[str, Any]]] = {}
    for label, run_dir in dict(zip(rundir.labels(run_dirs), run_dirs)).items():
        prefix = f"{label}, " if len(run_dirs) > 1 else ""
        rows = {} if not rundir.is_sweep(run_dir) else programs(run_dir)
        for part in rundir.parts(run_dir):
            frame, plan = rundir.read_metrics(part), rundir.read_plan(part)
            if by_stage and "stage" in frame:
                stages = {f"{label}, {name}": frame[frame.stage == name] for name in frame.stage.unique()}
                found |= {name: (own, plan) for name, own in stages.items()}
            elif "setting" not in frame:
                found[label] = frame, plan
            else:
                names = [m.setting for m in rows[str(part)]] if rows else rundir.setting_names(plan)
                for setting, name in dict(zip(plan["settings"], names)).items():
                    found[prefix + name] = frame[frame.setting == setting], plan
    return found


def groups(run_dirs: Sequence[str]) -> list[tuple[Any, list[Member], Any]]:
    """(learner, members, states [K, ...]) of the runs whose learner and config are equal, but for the hyperparameters,
    which do not act."""
    from jaxstack.core import config, runner, states

    found: dict[str, list[tuple[Any, list[Member], Any]]] = {}
    for run_dir in {Path(r).absolute(): r for r in run_dirs}.values():
        for part, own in programs(run_dir).items():
            learner, plan = load(part)
            key = repr((plan["agent"], config.to_dict(learner.config) | {"hypers": None}))
            found.setdefault(key, []).append((learner, own, runner.load_state(learner, part)))
    return [
        (g[0][0], [m for _, own, _ in g for m in own], states.side_by_side([state for _, _, state in g]))
        for g in found.values()
    ]


def last_scores(frame: Any, metric: str) -> list[float]:
    """A run's score for each seed, of the last step at which any seed has the metric, in a method in stages of the last
    stage that has it; NaN where it is not finite."""
    if "stage" in frame:
        frame = frame[frame.stage == frame.stage[frame[metric].notna()].iloc[-1]]
    rows = frame[frame.step == frame.step[frame[metric].notna()].max()]
    return rows.sort_values("seed")[metric].astype(float).tolist()


def one_row(args: argparse.Namespace, acts: bool = True) -> tuple[Any, Any]:
    """(learner, state without an axis of seeds) of the row that `--setting` and `--train-seed` choose. Raises
    `UserError`, with `acts` also for a learner without a policy."""
    from jaxstack.core import runner
    from jaxstack.core.errors import UserError
    from jaxstack.core.learner import rows_of

    run_dir = _program(args)
    learner, plan = load(run_dir)
    if acts:
        needs_policy(learner, args.command)
    seeds, settings = plan["seeds"], plan.get("settings")
    rows = range(len(seeds))
    if args.setting is not None:
        if settings is None or args.setting not in settings:
            has = "no settings" if settings is None else f"settings {', '.join(map(str, dict.fromkeys(settings)))}"
            raise UserError(f"--setting {args.setting}: expected one of the run's, which has {has}")
        rows = [i for i in rows if settings[i] == args.setting]
    elif settings is not None and len({*settings}) > 1:
        raise UserError(f"--setting: expected one of {', '.join(map(str, dict.fromkeys(settings)))}, as it is a sweep")
    seed = seeds[rows[0]] if args.train_seed is None else args.train_seed
    if seed not in (own := [seeds[i] for i in rows]):
        raise UserError(f"--train-seed {seed}: expected one of the run's seeds {own}")
    row = rows[own.index(seed)]
    return learner, rows_of(runner.load_state(learner, run_dir), row)


def _program(args: argparse.Namespace) -> str:
    """The run of `args.run_dir`: itself, or that of a sweep's programs which has the chosen setting."""
    from jaxstack.core import rundir
    from jaxstack.core.errors import UserError

    parts = [str(part) for part in rundir.parts(args.run_dir)]
    if len(parts) == 1:
        return parts[0]
    settings = {s: part for part in parts for s in rundir.read_plan(part)["settings"]}
    if args.setting not in settings:
        given = "" if args.setting is None else f" {args.setting}"
        raise UserError(f"--setting{given}: expected one of {', '.join(map(str, settings))}, as it is a sweep")
    return settings[args.setting]


def needs_policy(learner: Any, what: str) -> None:
    """Raise `UserError` for a learner that does not act in an environment."""
    from jaxstack.core.errors import UserError

    if learner.policy is None or learner.env is None:
        raise UserError(f"{learner.name} has no policy: {what} needs one")
