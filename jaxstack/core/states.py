"""States of runs: read, stored, evaluated, started from."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxstack.core import guard, ledger, memo, program
from jaxstack.core.checkpoint import Checkpoints
from jaxstack.core.errors import UserError
from jaxstack.core.job import check_seeds, plain_config, steps_of
from jaxstack.core.learner import Key, Learner, as_hypers
from jaxstack.core.rundir import RunDir, closing, read_plan
from jaxstack.core.sinks import Row


def stored_hypers(learner: Learner, plan: dict[str, Any]) -> Any:
    """The hyperparameters that were given to `train` beside the config, None for the config's own."""
    if "hypers" not in plan:
        return None
    return jax.tree_util.tree_map_with_path(
        lambda path, _: np.asarray(plan["hypers"][jax.tree_util.keystr(path)], np.float32), learner.hypers
    )


def evaluate(learner: Learner, state: Any, key: Key | None = None) -> dict[str, np.ndarray]:
    """What the learner measures of a state [S, ...], by name [S]; over its whole `eval_source`, where it has one.

    Args:
        learner: with an `evaluate`.
        state: as `train` and `load_state` return it.
        key: of what is drawn; default: the one of all runs, so that evaluations of a run are repeated.

    Raises:
        UserError: for a learner without evaluation.
    """
    with memo.programs(learner._replace(given=None, hypers=None)) as store:
        begun = program.evaluating(learner, jax.eval_shape(lambda: state), ledger.Ledger(), key=key, store=store)
        if begun is None:
            raise UserError(f"{learner.name}: has no evaluation")
        return begun()(state)


def load_state(learner: Learner, run_dir: str | Path) -> Any:
    """The newest stored state [S, ...] of a run, for evaluation. Raises `UserError` when there is none."""
    return stored(learner, run_dir)[0]


def stored(learner: Learner, run_dir: str | Path) -> tuple[Any, np.ndarray]:
    """The newest stored (state [S, ...], alive [S]) of a run, of its last stage where it has stages. Raises `UserError`
    when there is none."""
    plan = read_plan(run_dir)
    if "groups" in plan:
        groups = [stored(learner, Path(run_dir) / name) for name in plan["groups"]]
        return side_by_side([state for state, _ in groups]), np.concatenate([alive for _, alive in groups])
    if "stages" in plan:
        return stored(learner, Path(run_dir) / plan["stages"][-1])
    # shapes alone: rows of what is given are those of another number of seeds in a group
    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(plan["seeds"]), *x.shape[1:]), x.dtype), learner.given)
    template = program.shapes_of(learner, plan["seeds"], None, rows)
    with contextlib.closing(Checkpoints(Path(run_dir) / "checkpoints", read_only=True)) as store:
        _, (state, alive), _, _ = store.restore(template)
    return state, np.asarray(alive.failed_step) == 0


def start_from(learner: Learner, states: Any) -> Learner:
    """Make the learner of a run that starts from what another run of such a learner has learned.

    It takes over `params`, or what the method says (`Learner.adapted`); environments, random numbers, steps and
    hyperparameters are those of the new run.

    Args:
        learner: What is trained; its config may differ from that of the other run in whatever has no part in the shapes
            of `params`.
        states: The other run's, leaves [S, ...], one row per seed of the new run.

    Returns:
        The learner, for `train` with S seeds.

    Raises:
        UserError: Naming the parameter that does not fit.
    """
    fresh = jax.eval_shape(learner.init, jax.random.key(0), as_hypers(learner.hypers))
    shapes = lambda tree: {jax.tree_util.keystr(k): x for k, x in jax.tree_util.tree_leaves_with_path(tree)}
    found, expected = shapes(states.params), shapes(fresh.params)
    for name in sorted([*expected, *found], key=lambda name: name in found and name in expected):
        have = f"shape {found[name].shape[1:]}" if name in found else "none"
        want = f"shape {expected[name].shape}" if name in expected else "none"
        if have != want:
            raise UserError(f"params{name}: found {have}, expected {want}")
    if learner.adapted is not None:
        return learner.adapted()._replace(given=states)

    def init(key: Key, hypers: Any, params: Any) -> Any:
        return learner.init(key, hypers)._replace(params=params)

    return learner._replace(init=init, given=states.params)


def side_by_side(states: Sequence[Any]) -> Any:
    """States [S, ...] of several runs as those of one."""
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *states)


def save(
    learner: Learner, states: Any, seeds: Sequence[int], run_dir: str | Path, metrics: dict[str, Any] | None = None
) -> Path:
    """Store states that were not made by `train` as a finished run, for all that reads runs.

    Args:
        learner: Whose states they are; its `num_steps` are the run's.
        states: Leaves [S, ...], one row per seed, with the shapes of the learner's own.
        seeds: S numbers by which the rows are called.
        run_dir: Empty or new.
        metrics: Of the last step, name -> [S].

    Returns:
        The directory.

    Raises:
        UserError: For a directory with content, or states that do not fit.
    """
    seeds, num_steps = check_seeds(seeds), steps_of(learner, None, None)
    template = program.shapes_of(learner, seeds)[0]
    shapes = lambda tree: {jax.tree_util.keystr(k): x.shape for k, x in jax.tree_util.tree_leaves_with_path(tree)}
    found, expected = shapes(states), shapes(template)
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            raise UserError(f"state{name}: found shape {found.get(name)}, expected {expected.get(name)}")
    plan = {"agent": learner.name, "config": plain_config(learner), "seeds": seeds, "num_steps": num_steps}
    run = RunDir.create(run_dir, plan | {"objective": list(learner.objective)})
    with closing(run):
        values = {k: np.asarray(v, np.float64) for k, v in (metrics or {}).items()}
        row: Row = {"step": num_steps, "samples": num_steps * learner.samples_per_step}
        run.append([row | {"seed": s} | {k: float(v[i]) for k, v in values.items()} for i, s in enumerate(seeds)])
        with contextlib.closing(Checkpoints(run.checkpoints)) as store:
            store.save(num_steps, (states, guard.start(len(seeds))), {"data": None, "metrics": run.mark()})
        run.status("finished", step=num_steps)
    return Path(run_dir)
