"""Where metrics go beside the run directory's own lines.

A sink is `write(rows)` and `close()`; rows are flat dicts with `step`, `samples`, `seed` and metrics.
"""

import math
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxstack.core.errors import UserError

Row = dict[str, Any]


@runtime_checkable
class Sink(Protocol):
    def write(self, rows: list[Row]) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files, one sub-directory per seed; a resumed run adds files to the existing ones.

    Raises `UserError` when tensorboardX is missing.
    """

    def __init__(self, directory: Path):
        try:
            from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
        except ImportError as e:
            raise UserError("tensorboard: tensorboardX is missing; pip install 'jaxstack[tensorboard]'") from e
        self._make = lambda seed: SummaryWriter(str(directory / f"seed_{seed}"))
        self._writers: dict[int, Any] = {}

    def write(self, rows: list[Row]) -> None:
        for row in rows:
            if row["seed"] not in self._writers:
                self._writers[row["seed"]] = self._make(row["seed"])
            for name, value in metrics_of(row).items():
                self._writers[row["seed"]].add_scalar(name, value, row["samples"])

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


class Wandb:
    """One Weights & Biases run per seed, in one group. Raises `UserError` when wandb is missing.

    Args:
        project: W&B project.
        group: W&B group of the runs.
        config: logged with each run.
        directory: local directory of wandb; default: wandb's own.
        id: prefix of the W&B run ids; a sink with the same id (of a resumed run) continues these runs.
        **options: of `wandb.init`: entity, tags, mode ...
    """

    def __init__(
        self,
        project: str,
        group: str,
        config: dict[str, Any],
        directory: Path | None = None,
        id: str | None = None,
        **options: Any,
    ):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as e:
            raise UserError("wandb: the package is missing; pip install 'jaxstack[wandb]'") from e
        self._wandb, self._runs, self._id = wandb, {}, id
        self._options = options | dict(project=project, group=group, config=config, dir=directory and str(directory))

    def write(self, rows: list[Row]) -> None:
        for row in rows:
            seed = row["seed"]
            if seed not in self._runs:
                again = {} if self._id is None else dict(id=f"{self._id}-seed-{seed}", resume="allow")
                options = self._options | again
                self._runs[seed] = self._wandb.init(name=f"seed_{seed}", reinit="create_new", **options)
            self._runs[seed].log(metrics_of(row), step=row["samples"])

    def close(self) -> None:
        for run in self._runs.values():
            run.finish()


def metrics_of(row: Row) -> dict[str, float]:
    """The finite metrics of a row."""
    return {k: v for k, v in row.items() if "/" in k and isinstance(v, float) and math.isfinite(v)}
