"""Checkpoints of a whole run through orbax: atomic, asynchronous, verified when read.

A state is stored as a flat table of arrays named by their paths, typed keys as their data, beside a manifest of
checksums, so that damage is noticed and the previous checkpoint used.
"""

import hashlib
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxstack.core.errors import UserError


@dataclass(frozen=True)
class Retention:
    """What is kept: the last `keep_last` checkpoints and the `keep_best` ones by `best_metric` (mean over seeds)."""

    keep_last: int = 2
    keep_best: int = 0
    best_metric: str = "eval/return"


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, directory: Path, retention: Retention = Retention()):
        import orbax.checkpoint as ocp

        logging.getLogger("absl").setLevel(logging.ERROR)
        self._ocp, self.directory, self.retention = ocp, directory.absolute(), retention
        self._set_aside = self._unreadable()
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
            ),
        )
        self._pending: int | None = None

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
        self._pending = step

    def wait(self) -> None:
        """Block until the last save is on the disk, then write its checksums."""
        if self._pending is None:
            return
        step, self._pending = self._pending, None
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
            folder = self.directory / str(step)
            self._write_manifest(step, {str(p.relative_to(folder)): _digest(p) for p in _files(folder)})
        except (OSError, ValueError) as e:
            raise self._failed(step, e) from e

    def restore(self, template: Any) -> tuple[int, Any, dict[str, Any], list[str]]:
        """The newest undamaged checkpoint: (step, state like `template`, meta, what was wrong with newer ones).

        Raises `UserError` when none can be used.
        """
        problems = list(self._set_aside)
        for step in reversed(self.steps()):
            problem = self.damage(step)
            if problem is None:
                try:
                    args = self._ocp.args
                    table = _shapes(template)
                    got = self._manager.restore(
                        step, args=args.Composite(state=args.StandardRestore(table), meta=args.JsonRestore())
                    )
                    return step, from_table(got["state"], template), dict(got["meta"]), problems
                except (OSError, ValueError, KeyError, TypeError) as e:
                    problem = f"cannot be read: {' '.join(str(e).split())[:300]}"
            problems.append(f"checkpoint {step}: {problem}")
        detail = "; ".join(problems) if problems else "there is none"
        raise UserError(f"{self.directory}: no usable checkpoint ({detail})")

    def damage(self, step: int) -> str | None:
        """What is wrong with a checkpoint's files, None if they match their checksums."""
        manifest = self._manifest(step)
        if not manifest.exists():
            return "was not finished (no checksums)"
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

    def drop_after(self, step: int) -> None:
        """Delete checkpoints newer than `step`: damaged ones that a resumed run will write again."""
        for s in self.steps():
            if s > step:
                shutil.rmtree(self.directory / str(s), ignore_errors=True)
                self._manifest(s).unlink(missing_ok=True)
        self._manager.reload()

    def close(self) -> None:
        self.wait()
        for old in self.directory.parent.glob("checksums/*.json"):
            if int(old.stem) not in self.steps():
                old.unlink(missing_ok=True)
        self._manager.close()

    def _unreadable(self) -> list[str]:
        """Move checkpoints whose metrics are no JSON out of orbax's sight, which fails on them; says which."""
        problems = []
        for file in sorted(self.directory.glob("*/metrics/metrics"), reverse=True):
            try:
                json.loads(file.read_bytes())
            except ValueError:
                folder = file.parents[1]
                aside = folder.parent.with_name("damaged") / folder.name
                shutil.rmtree(aside, ignore_errors=True)
                aside.parent.mkdir(exist_ok=True)
                folder.rename(aside)
                problems.append(f"checkpoint {folder.name}: metrics/metrics is damaged (moved to {aside})")
        return problems

    def _manifest(self, step: int) -> Path:
        return self.directory.parent / "checksums" / f"{step}.json"

    def _write_manifest(self, step: int, content: dict[str, str]) -> None:
        path = self._manifest(step)
        path.parent.mkdir(exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(content))
        part.replace(path)

    def _failed(self, step: int, error: Exception) -> UserError:
        text = " ".join(str(error).split())[:300]
        kept = [s for s in self.steps() if self.damage(s) is None]
        return UserError(f"{self.directory}: checkpoint {step} could not be saved ({text}); intact: {kept or 'none'}")


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


def from_table(table: dict[str, Any], template: Any) -> Any:
    """The state like `template`. Raises `KeyError` for a missing entry."""

    def leaf(path: Any, like: Any) -> Any:
        if not like.size:
            return jnp.zeros(like.shape, like.dtype)
        value = jnp.asarray(table[jax.tree_util.keystr(path)])
        if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(value, impl=_key_impl(like))
        if value.shape != like.shape or value.dtype != like.dtype:
            raise ValueError(f"{jax.tree_util.keystr(path)}: {value.shape} {value.dtype}, expected {like.shape}")
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
