"""A small data set of gymnax/Pendulum-v1's shapes, for tests of learners from data."""

import numpy as np

from jaxstack.data.files import save_dataset
from jaxstack.data.offline import DatasetInfo, dataset

ENV = "gymnax/Pendulum-v1"


def rows(count=48, length=12, seed=0):
    """Episodes cut after `length` rows, every second one terminated instead."""
    rng = np.random.default_rng(seed)
    obs = rng.normal(size=(count, 3)).astype(np.float32)
    ends = np.arange(count) % length == length - 1
    terminated = ends & (np.arange(count) // length % 2 == 1)
    return dict(
        obs=obs,
        action=rng.uniform(-2, 2, (count, 1)).astype(np.float32),
        reward=rng.normal(size=count).astype(np.float32),
        next_obs=obs + 0.1,
        terminated=terminated,
        truncated=ends & ~terminated,
    )


def write(path, **options):
    """The same as a file; returns its name."""
    return str(save_dataset(path, dataset("tiny", DatasetInfo(ENV), **rows(**options))))
