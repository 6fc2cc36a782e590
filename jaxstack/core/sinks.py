"""Where metrics go beside the run directory's own lines.

A sink is `write(rows)` and `close()`; rows are flat dicts with `step`, `samples`, `seed` and metrics.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxstack.core.errors import UserError

Row = dict[str, Any]


@runtime_checkable
class Sink(Protocol):
    def write(self, rows: list[Row]) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files, one sub-directory per seed, or per setting and seed of a sweep; a resumed run adds files to the
    existing ones.

    Raises `UserError` when tensorboardX is missing.
    """

    def __init__(self, directory: Path):
        try:
            from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
        except ImportError as e:
            raise UserError("tensorboard: tensorboardX is missing; pip install 'jaxstack[tensorboard]'") from e
        self._make = lambda own: SummaryWriter(str(directory.joinpath(*own)))
        self._writers: dict[tuple[str, ...], Any] = {}

    def write(self, rows: list[Row]) -> None:
        for row in rows:
            own = _owner(row)
            if own not in self._writers:
                self._writers[own] = self._make(own)
            for name, value in metrics_of(row).items():
                self._writers[own].add_scalar(name, value, row["samples"])

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


class Wandb:
    """One Weights & Biases run per seed, or per setting and seed of a sweep, in one group.

    Raises `UserError` when wandb is missing.

    Args:
        project: W&B project.
        group: W&B group of the runs.
        config: logged with each run.
        directory: local directory of wandb; default: wandb's own.
        settings: values by number of a sweep's setting, logged with its runs; default: those of no sweep.
        id: prefix of the W&B run ids; a sink with the same id (of a resumed run) continues these runs.
        **options: of `wandb.init`: entity, tags, mode ...
    """

    def __init__(
        self,
        project: str,
        group: str,
        config: dict[str, Any],
        directory: Path | None = None,
        settings: Mapping[int, dict[str, Any]] | None = None,
        id: str | None = None,
        **options: Any,
    ):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as e:
            raise UserError("wandb: the package is missing; pip install 'jaxstack[wandb]'") from e
        self._wandb, self._runs, self._id = wandb, {}, id
        self._config, self._settings = config, settings or {}
        self._options = options | dict(project=project, group=group, dir=directory and str(directory))

    def write(self, rows: list[Row]) -> None:
        for row in rows:
            own = _owner(row)
            if own not in self._runs:
                name = "-".join((self._id or "", *own)).replace("_", "-")
                again = {} if self._id is None else dict(id=name, resume="allow")
                config = self._config | self._settings.get(row.get("setting", -1), {})
                options = self._options | again | dict(config=config)
                self._runs[own] = self._wandb.init(name="/".join(own), reinit="create_new", **options)
            self._runs[own].log(metrics_of(row), step=row["samples"])

    def close(self) -> None:
        for run in self._runs.values():
            run.finish()


def _owner(row: Row) -> tuple[str, ...]:
    """Whose row it is: a seed's or, in a sweep, a setting's and seed's."""
    seed = f"seed_{row['seed']}"
    return (seed,) if "setting" not in row else (f"setting_{row['setting']}", seed)


def metrics_of(row: Row) -> dict[str, float]:
    """The finite metrics of a row."""
    return {k: v for k, v in row.items() if "/" in k and isinstance(v, float) and math.isfinite(v)}
