"""Live progress on the host: a bar on a terminal, a line now and then elsewhere. JAXSTACK_PROGRESS=off silences it."""

import math
import os
import sys
import time
from typing import Any

from jaxstack.core.learner import Learner
from jaxstack.core.ledger import Ledger

SHOWN = ("eval/return", "rollout/return", "eval/accuracy", "loss/total")


class Progress:
    """Steps per second leave compile time out, which is shown apart."""

    def __init__(self, learner: Learner, num_steps: int, start: int, num_seeds: int, book: Ledger, on: bool):
        self.learner, self.num_steps, self.num_seeds, self.book = learner, num_steps, num_seeds, book
        self.on = on and os.environ.get("JAXSTACK_PROGRESS") != "off"
        self.live = self.on and sys.stdout.isatty()
        self._seconds, self._done, self._start = 0.0, 0, start
        self._printed = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        if self.on:
            self._print(
                f"{self.learner.name}: {self.num_steps} steps x {self.learner.samples_per_step} samples, "
                f"{self.num_seeds} seed(s)\n{self.book.summary()}"
            )
        if self.live:
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.completed}/{task.total}"),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=self.num_steps, completed=self._start)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, rows: list[dict[str, Any]], count: int, seconds: float) -> None:
        """After a chunk of `count` steps that took `seconds`."""
        self._seconds += seconds
        self._done += count
        if not self.on:
            return
        rate = self._done * self.learner.samples_per_step * self.num_seeds / max(self._seconds, 1e-9)
        text = f"{rate:,.0f} samples/s  {_headline(rows, self.learner.objective[0])}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif time.monotonic() - self._printed > 5 or step == self.num_steps:
            self._printed = time.monotonic()
            left = (self.num_steps - step) * self._seconds / self._done
            self._print(f"step {step}/{self.num_steps}  {text}  {left:.0f} s left")

    def say(self, message: str) -> None:
        """A message that matters even when progress is off."""
        if self._bar is not None:
            self._bar.console.print(message)
        else:
            self._print(message)

    def _print(self, text: str) -> None:
        print(text, flush=True)  # noqa: T201


def _headline(rows: list[dict[str, Any]], objective: str) -> str:
    for name in (objective, *SHOWN):
        values = [r[name] for r in rows if name in r and math.isfinite(r[name])]
        if values:
            return f"{name} {sum(values) / len(values):.3g}"
    return ""
