"""Images with boxes by name: `scenes`, which are drawn here, and `coco=DIR`, a folder of COCO's form.

A set has C classes of objects. Its boxes are (x1, y1, x2, y2) in pixels of the image that the network sees, the left
edge of the first pixel being 0; images of different numbers of objects are padded to one number G.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from jaxstack.core.errors import UserError, unknown
from jaxstack.data import coco, scenes

Split = Literal["train", "valid", "test"]
SEEDS = {"train": 0, "valid": 1, "test": 2}
COUNTS = {"train": 2000, "valid": 200, "test": 500}
"""Scenes of each part and the seeds that they are drawn from."""


class Truth(NamedTuple):
    """Objects of images; leading axes [N] of images may be there."""

    boxes: Any
    """[N, G, 4] float32."""
    labels: Any
    """[N, G] int32, 0..C-1."""
    valid: Any
    """[N, G] bool: False for padding."""


class Part(Protocol):
    """Images for training, validation or test."""

    @property
    def count(self) -> int:
        """How many there are, N."""
        ...

    @property
    def objects(self) -> int:
        """Most objects of an image, at least 1, G."""
        ...

    def read(self, rows: Sequence[int] | np.ndarray) -> tuple[np.ndarray, Truth]:
        """Images [n, size, size, 3] uint8 of these rows and their objects. Raises `UserError` for a broken file."""
        ...


class Drawn(NamedTuple):
    """Scenes in memory."""

    images: np.ndarray
    truth: Truth

    @property
    def count(self) -> int:
        return len(self.images)

    @property
    def objects(self) -> int:
        return self.truth.valid.shape[1]

    def read(self, rows: Sequence[int] | np.ndarray) -> tuple[np.ndarray, Truth]:
        return self.images[rows], Truth(*(x[rows] for x in self.truth))


class Files(NamedTuple):
    """Pictures of a folder, read when they are asked for."""

    pictures: tuple[coco.Picture, ...]
    size: int
    objects: int

    @property
    def count(self) -> int:
        return len(self.pictures)

    def read(self, rows: Sequence[int] | np.ndarray) -> tuple[np.ndarray, Truth]:
        n, g = len(rows), self.objects
        images = np.zeros((n, self.size, self.size, 3), np.uint8)
        truth = Truth(np.zeros((n, g, 4), np.float32), np.zeros((n, g), np.int32), np.zeros((n, g), bool))
        for i, row in enumerate(rows):
            picture = self.pictures[int(row)]
            rgb = coco.rgb(picture.path)
            if (rgb.height, rgb.width) != picture.hw:
                wanted = f"{picture.hw[1]} x {picture.hw[0]} as annotated"
                raise UserError(f"{picture.path}: found {rgb.width} x {rgb.height} pixels, expected {wanted}")
            images[i], scale = coco.fitted(rgb, self.size)
            k = len(picture.labels)
            truth.boxes[i, :k], truth.labels[i, :k], truth.valid[i, :k] = picture.boxes * scale, picture.labels, True
        return images, truth


def classes(name: str) -> tuple[str, ...]:
    """Names of a set's classes. Raises `UserError` for an unknown one, or a folder that is none."""
    kind, path = _split(name)
    return scenes.CLASSES if kind == "scenes" else _coco(path, "train").names


def part(name: str, which: Split, size: int, seed: int = 0, most: int = 0) -> Part:
    """Images of a set, and the boxes in them.

    Args:
        name: "scenes", or "coco=DIR"; see `coco.folder` for what DIR has.
        which: "train", "valid" or "test". Scenes of the parts come from seeds of their own (2,000, 200 and 500); of a
            folder's training images a tenth is for validation, and its val images are the test part.
        size: pixels of a side. Scenes are drawn in that size; pictures are shrunk or grown to it by their longer side,
            and zeros fill what is below or to the right of them.
        seed: of which pictures are for validation.
        most: the first images of the part alone, so many or as many as there are; 0: all.

    Raises:
        UserError: for an unknown set or part, or files that are missing or broken.
    """
    kind, path = _split(name)
    if which not in SEEDS:
        raise UserError(f"split={which!r}: expected 'train', 'valid' or 'test'")
    if kind == "scenes":
        found = scenes.scenes(SEEDS[which], min(most or COUNTS[which], COUNTS[which]), size)
        return Drawn(found.image, Truth(found.boxes, found.labels, found.valid))
    whole = _coco(path, "val" if which == "test" else "train")
    if which == "test" and (first := _coco(path, "train")).names != whole.names:
        raise UserError(
            f"{path}: found classes {list(whole.names)} of val, expected those of train, {list(first.names)}"
        )
    pictures = whole.pictures
    if which != "test":
        if len(pictures) < 2:
            raise UserError(f"{path}: found 1 image for training, expected at least 2, as one is for validation")
        order = np.random.default_rng(seed).permutation(len(pictures))
        held = -(-len(pictures) // 10)
        rows = order[:held] if which == "valid" else order[held:]
        pictures = tuple(pictures[i] for i in sorted(rows))
    return Files(pictures[: most or None], size, max(1, *(len(p.labels) for p in whole.pictures)))


def _split(name: str) -> tuple[str, str]:
    kind, _, path = name.partition("=")
    if kind not in ("scenes", "coco"):
        raise unknown("set of images with boxes", kind, ("scenes", "coco"))
    if (kind == "coco") != bool(path):
        raise UserError(f"{name}: expected scenes, which take no path, or coco=DIR")
    return kind, path


@lru_cache(4)
def _coco(path: str, which: str) -> coco.Annotated:
    return coco.folder(path, which)
