"""Classes that overlap: each a mixture of Gaussian clusters, drawn by a seed, of any difficulty."""

from typing import NamedTuple

import numpy as np


class Mixture(NamedTuple):
    """What is fixed of a set. Cluster centres are standard normal."""

    classes: int = 20
    dims: int = 24
    clusters: int = 3
    """Of each class."""
    spread: float = 1.7
    """Deviation within a cluster: 0.9 is easy, 1.7 hard."""
    seed: int = 0
    """Of the centres."""

    def draw(self, count: int, part: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Points float32 [count, dims] and labels int32 [count], classes alike, in random order.

        Args:
            count: how many.
            part: which draw: those of other numbers are independent of it.
        """
        centres = np.random.default_rng(self.seed).normal(size=(self.classes, self.clusters, self.dims))
        rng = np.random.default_rng((self.seed, part + 1))
        labels = rng.permutation(np.arange(count) % self.classes)
        middle = centres[labels, rng.integers(self.clusters, size=count)]
        points = middle + self.spread * rng.normal(size=(count, self.dims))
        return points.astype(np.float32), labels.astype(np.int32)
