"""Checkpoints of a whole run through orbax: atomic, asynchronous, verified when read.

A state is stored as a flat table of arrays named by their paths, typed keys as their data, beside a manifest of
checksums, so that damage is noticed and the previous checkpoint used.
"""

import contextlib
import hashlib
import json
import logging
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxstack.core.errors import UserError
from jaxstack.core.files import set_aside, write_whole

UNFINISHED = "was not finished (no checksums)"


@dataclass(frozen=True)
class Retention:
    """What is kept: the last `keep_last` checkpoints and the `keep_best` ones of the largest score (see `save`)."""

    keep_last: int = 2
    keep_best: int = 0


class NoCheckpoint(UserError):
    """No checkpoint was finished yet: the run can only begin anew."""


class Checkpoints:
    """The checkpoints of one run directory. With `read_only` nothing there is moved, written or cleaned up, so that a
    run can be looked at while it continues."""

    def __init__(self, directory: Path, retention: Retention = Retention(), read_only: bool = False):
        import orbax.checkpoint as ocp

        logging.getLogger("absl").setLevel(logging.CRITICAL)  # what fails is raised
        if not isinstance(sys.unraisablehook, _Hush):
            sys.unraisablehook = _Hush(sys.unraisablehook)
        self._ocp, self.directory, self.retention = ocp, directory.absolute(), retention
        self._set_aside = [] if read_only else self._unreadable()
        self._background = ThreadPoolExecutor(1)
        self._pending: tuple[int, Future[None]] | None = None
        self._saved = False
        if read_only:
            options = ocp.CheckpointManagerOptions(
                read_only=True, create=False, save_interval_steps=0, multiprocessing_options=self._alone()
            )
            try:
                self._manager = ocp.CheckpointManager(self.directory, options=options)
            except ValueError as e:  # orbax reads all metrics at once
                raise UserError(f"{self.directory}: the metrics of a checkpoint are damaged ({e})") from e
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        policies = ocp.checkpoint_managers
        keep: list[Any] = [policies.LatestN(max(retention.keep_last, 1))]
        best = lambda metrics: metrics["best"]
        if retention.keep_best:
            keep.append(
                policies.BestN(get_metric_fn=best, n=retention.keep_best, keep_checkpoints_without_metrics=False)
            )
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keep),
                best_fn=best,  # without it orbax does not store the metrics
                cleanup_tmp_directories=True,
                create=False,
                multiprocessing_options=self._alone(),
            ),
        )

    def _alone(self) -> Any:
        """Of several processes only this one reads or writes here: orbax waits for no other."""
        me = jax.process_index()
        processes = {me} if jax.process_count() > 1 else None
        return self._ocp.options.MultiprocessingOptions(primary_host=me, active_processes=processes)

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, oldest first."""
        return sorted(self._manager.all_steps(read=True))

    def save(self, step: int, state: Any, meta: dict[str, Any], best: float | None = None) -> None:
        """Store in the background; the arrays are copied first, so `state` may be donated at once.

        Raises `UserError` when the disk is full; earlier checkpoints stay.
        """
        self.wait()
        if step in self.steps():
            return
        args = self._ocp.args
        try:
            self._manager.save(
                step,
                args=args.Composite(state=args.StandardSave(to_table(state)), meta=args.JsonSave(meta)),
                metrics=None if best is None or not np.isfinite(best) else {"best": float(best)},
            )
        except (OSError, ValueError) as e:
            raise self._failed(step, e) from e
        self._saved = True
        self._pending = step, self._background.submit(self._finish, step)

    def wait(self) -> None:
        """Block until the last save and its checksums are on the disk. Raises `UserError` when it failed."""
        if self._pending is None:
            return
        (step, saved), self._pending = self._pending, None
        try:
            saved.result()
        except (OSError, ValueError) as e:
            raise self._failed(step, e) from e

    def _finish(self, step: int) -> None:
        """In the background: a checkpoint counts from the moment its checksums are written."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()
        folder = self.directory / str(step)
        self._manifest(step).parent.mkdir(exist_ok=True)
        content = {str(p.relative_to(folder)): _digest(p) for p in _files(folder)}
        write_whole(self._manifest(step), json.dumps(content))

    def restore(
        self, template: Any, refuse: Callable[[dict[str, Any]], str | None] = lambda meta: None
    ) -> tuple[int, Any, dict[str, Any], list[str]]:
        """The newest undamaged checkpoint: (step, state like `template`, meta, what was wrong with newer ones).

        `refuse(meta)` says what speaks against a checkpoint; if it refuses all, the newest is taken nevertheless.
        Raises `NoCheckpoint` when none was ever finished, `UserError` when none can be used.
        """
        problems = self._set_aside + [f"checkpoint {s}: is missing" for s in self._lost()]
        unfinished, spare = 0, None
        for step in reversed(self.steps()):
            problem = self.damage(step)
            unfinished += problem == UNFINISHED
            if problem is None:
                try:
                    state, meta = self._read(step, template)
                except (OSError, ValueError, KeyError, TypeError) as e:
                    problem = f"cannot be read: {' '.join(str(e).split())[:300]}"
                else:
                    problem = refuse(meta)
                    if problem is None:
                        return step, state, meta, problems
                    spare = spare or (step, state, meta, [*problems, f"checkpoint {step}: {problem}"])
            problems.append(f"checkpoint {step}: {problem}")
        if spare is not None:
            return spare
        if len(problems) == unfinished:
            detail = "; ".join(problems) or "there is none"
            raise NoCheckpoint(f"{self.directory}: no usable checkpoint ({detail})")
        anew = "to begin anew, move checkpoints/* and checksums/*.json elsewhere"
        raise UserError(f"{self.directory}: no usable checkpoint ({'; '.join(problems)}); {anew}")

    def _read(self, step: int, template: Any) -> tuple[Any, dict[str, Any]]:
        args, shapes = self._ocp.args, _shapes(template)
        read = lambda entries: self._manager.restore(
            step, args=args.Composite(state=args.StandardRestore(entries), meta=args.JsonRestore())
        )
        try:
            got = read(shapes)
        except ValueError as e:
            table = self._ocp.StandardCheckpointer().metadata(self.directory / str(step) / "state").item_metadata
            stored = {name: shape for name, shape in shapes.items() if name in table.tree}
            if lacking := shapes.keys() - stored.keys() - _defaults(template).keys():
                raise ValueError(f"it lacks {', '.join(sorted(lacking)[:3])}") from e
            if len(stored) == len(shapes):
                raise
            got = read(stored)
        return from_table(got["state"], template), dict(got["meta"])

    def damage(self, step: int) -> str | None:
        """What is wrong with a checkpoint's files, None if they match their checksums."""
        manifest = self._manifest(step)
        if not manifest.exists():
            return UNFINISHED
        try:
            expected = json.loads(manifest.read_text())
        except ValueError:
            return "its checksum file is corrupt"
        folder = self.directory / str(step)
        for name, digest in expected.items():
            path = folder / name
            if not path.exists():
                return f"{name} is missing"
            if _digest(path) != digest:
                return f"{name} is damaged"
        return None

    def set_aside_after(self, step: int) -> None:
        """Move checkpoints newer than `step`, which a resumed run writes again, into `damaged/`."""
        for s in self.steps():
            if s > step:
                self._move(s)
        for s in self._lost():
            set_aside(self._manifest(s), self.directory.parent / "damaged")
        self._manager.reload()

    def close(self) -> None:
        """Wait for the last save. Raises `UserError` when it failed."""
        try:
            self.wait()
            # checksums of checkpoints that later ones replaced; without a save, a missing one is lost and must be told
            for old in self.directory.parent.glob("checksums/*.json") if self._saved else []:
                if int(old.stem) not in self.steps():
                    old.unlink(missing_ok=True)
        finally:
            self._background.shutdown()
            with contextlib.suppress(OSError, ValueError):  # orbax raises again what `wait` has told
                self._manager.close()

    def _lost(self) -> list[int]:
        """Steps newer than all checkpoints, newest first, that have checksums and nothing else."""
        known = [int(file.stem) for file in self.directory.parent.glob("checksums/*.json")]
        return sorted((s for s in known if s > max(self.steps(), default=0)), reverse=True)

    def _unreadable(self) -> list[str]:
        """Move checkpoints whose metrics are no JSON out of orbax's sight, which fails on them; says which."""
        problems = []
        for file in sorted(self.directory.glob("*/metrics/metrics"), reverse=True):
            try:
                json.loads(file.read_bytes())
            except ValueError:
                step = file.parents[1].name
                if not step.isdigit():  # of a save that a crash cut off; orbax removes it
                    continue
                problems.append(f"checkpoint {step}: metrics/metrics is damaged (moved to {self._move(int(step))})")
        return problems

    def _move(self, step: int) -> Path:
        """A checkpoint and its checksums to `damaged/`."""
        aside = set_aside(self.directory / str(step), self.directory.parent / "damaged")
        if self._manifest(step).exists():
            self._manifest(step).rename(aside.with_name(f"{aside.name}.json"))
        return aside

    def _manifest(self, step: int) -> Path:
        return self.directory.parent / "checksums" / f"{step}.json"

    def _failed(self, step: int, error: Exception) -> UserError:
        text = " ".join(str(error).split())[:300]
        kept = [s for s in self.steps() if self.damage(s) is None]
        return UserError(f"{self.directory}: checkpoint {step} could not be saved ({text}); intact: {kept or 'none'}")


class _Hush:
    """Hook for errors in callbacks: a save closes its event loop at its first error, and each of TensorStore's other
    writers would print a traceback when it finds the loop closed."""

    def __init__(self, inner: Callable[[Any], Any]):
        self.inner = inner

    def __call__(self, found: Any) -> None:
        if found.object is not None or str(found.exc_value) != "Event loop is closed":
            self.inner(found)


def to_table(state: Any) -> dict[str, Any]:
    """Flat table path -> array; typed keys become their data, empty arrays are left out."""
    table = {}
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        x = jnp.asarray(x)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        if x.size:
            # a copy on the host: the device buffer may be donated to the next chunk while this one is written
            table[jax.tree_util.keystr(path)] = np.array(x)
    return table


def _shapes(template: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """The table of a state that is given as shapes."""
    table = {}
    for path, x in jax.tree_util.tree_leaves_with_path(template):
        if x.size:
            is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
            table[jax.tree_util.keystr(path)] = jax.eval_shape(lambda k: jax.random.key_data(k), x) if is_key else x
    return table


def _defaults(template: Any) -> dict[str, float]:
    """Path -> default of each field of hyperparameters: what is stored before a learner has such a field lacks it."""
    found = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(template):
        if len(path) < 2 or getattr(path[-2], "name", None) != "hypers":
            continue
        node = template
        for key in path[:-1]:
            match key:
                case jax.tree_util.GetAttrKey(name):
                    node = getattr(node, name)
                case jax.tree_util.SequenceKey(i):
                    node = node[i]
                case jax.tree_util.DictKey(k):
                    node = node[k]
        default = getattr(type(node), "_field_defaults", {}).get(getattr(path[-1], "name", None))
        if isinstance(default, int | float):
            found[jax.tree_util.keystr(path)] = default
    return found


def from_table(table: dict[str, Any], template: Any) -> Any:
    """The state like `template`. A field of hyperparameters that is not in the table has its default.

    Raises `KeyError` for any other missing entry.
    """
    defaults = _defaults(template) if len(table) < len(_shapes(template)) else {}

    def leaf(path: Any, like: Any) -> Any:
        if not like.size:
            return jnp.zeros(like.shape, like.dtype)
        name = jax.tree_util.keystr(path)
        if name not in table and name in defaults:
            return jnp.full(like.shape, defaults[name], like.dtype)
        value = jnp.asarray(table[name])
        if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(value, impl=_key_impl(like))
        if value.shape != like.shape or value.dtype != like.dtype:
            raise ValueError(f"{name}: {value.shape} {value.dtype}, expected {like.shape}")
        # a buffer of its own, so that it can be donated
        return jnp.array(value, copy=True)

    return jax.tree_util.tree_map_with_path(leaf, template)


def _key_impl(like: Any) -> Any:
    """The generator of a key array or of its shape, which `jax.random.key_impl` reads from traced keys only."""
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), like)
    return found[0]


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
