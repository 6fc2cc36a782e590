"""Where chunks of steps end, and the rows of metrics that they give."""

import numpy as np

from jaxstack.core.job import Job, RunOptions
from jaxstack.core.sinks import Row


def until(step: int, num_steps: int, chunk: int, options: RunOptions) -> int:
    """Steps to the next stop: end of chunk, evaluation, checkpoint or run."""
    stops = [num_steps - step, chunk - step % chunk]
    stops += [every - step % every for every in (options.eval_every, options.checkpoint_every) if every > 0]
    return min(stops)


def due(step: int, num_steps: int, every: int) -> bool:
    return step == num_steps or (every > 0 and step % every == 0)


def rows_of(job: Job, start: int, metrics: dict, extra: dict, failed: np.ndarray) -> list[Row]:
    """A row for each step and seed, for a frozen seed up to the step it failed in; evaluations go to the last step."""
    lists = {k: v.astype(float).tolist() for k, v in metrics.items()}
    rows = []
    count = len(next(iter(lists.values()))) if lists else 0
    for i in range(count):
        step = start + i + 1
        for s, seed in enumerate(job.seeds):
            if 0 < failed[s] < step:
                continue
            row: Row = {"step": step, "samples": step * job.learner.samples_per_step, "seed": seed}
            row |= {} if job.settings is None else {"setting": job.settings[s]}
            row |= {k: v[i][s] for k, v in lists.items()}
            if i == count - 1:
                row |= {k: float(v[s]) for k, v in extra.items()}
            rows.append(row)
    return rows
