"""Images with boxes in COCO's form (Lin et al., 2014): a JSON file of annotations beside a folder of images."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from jaxstack.core.errors import UserError
from jaxstack.data.pictures import opened


class Picture(NamedTuple):
    """One image of a folder."""

    path: Path
    hw: tuple[int, int]
    """Rows and columns, as the annotations say."""
    boxes: np.ndarray
    """[G, 4] float32: x1, y1, x2, y2 in its pixels; G may be 0."""
    labels: np.ndarray
    """[G] int32."""


class Annotated(NamedTuple):
    """What a file of annotations says."""

    pictures: tuple[Picture, ...]
    names: tuple[str, ...]
    """Of the classes, in the order of their ids."""


def folder(root: str | Path, which: str) -> Annotated:
    """The training or validation images of a folder of COCO's form.

    Args:
        root: has annotations/instances_train*.json and annotations/instances_val*.json, and the images in a folder of
            what follows "instances_" (train2017 for instances_train2017.json) or in the folder images.
        which: "train" or "val".

    Raises:
        UserError: for a folder without such a file or with several, annotations without images, or as `read`.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder, expected one with annotations/instances_{which}*.json")
    found = sorted((root / "annotations").glob(f"instances_{which}*.json"))
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise UserError(f"{root / 'annotations'}: found {names}, expected one file instances_{which}*.json")
    places = (root / found[0].stem.removeprefix("instances_"), root / "images")
    there = [p for p in places if p.is_dir()]
    if not there:
        raise UserError(f"{found[0]}: has no images, expected a folder {places[0]} or {places[1]}")
    return read(found[0], there[0])


def read(annotations: str | Path, images: str | Path) -> Annotated:
    """Boxes of images; crowds are left out, images without objects stay.

    Args:
        annotations: JSON with the lists images (id, file_name, width, height), annotations (image_id, category_id, bbox
            as x, y, width, height) and categories (id, name).
        images: the folder of the files.

    Raises:
        UserError: for a file that is no such JSON, images that are not in the folder, and boxes that are empty, not
            finite or outside of their image, with the id of the annotation.
    """
    path, images = Path(annotations), Path(images)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kinds = sorted((int(c["id"]), str(c["name"])) for c in content["categories"])
        files = {
            entry["id"]: (images / str(entry["file_name"]), (int(entry["height"]), int(entry["width"])))
            for entry in content["images"]
        }
        objects = [
            (a.get("id", i), a["image_id"], int(a["category_id"]), [float(v) for v in a["bbox"]])
            for i, a in enumerate(content["annotations"])
            if not a.get("iscrowd", 0)
        ]
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from e
    except KeyError as e:
        raise UserError(f"{path}: found no {e.args[0]!r}, expected COCO's images, annotations and categories") from e
    except (ValueError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: is no JSON of COCO's form ({e})") from e
    if not kinds or not files:
        raise UserError(f"{path}: found {len(files)} images, {len(kinds)} categories, expected at least 1 of each")
    if missing := [p for p, _ in files.values() if not p.is_file()]:
        raise UserError(f"{path}: {len(missing)} of its {len(files)} images are missing, such as {missing[0]}")
    label = {number: i for i, (number, _) in enumerate(kinds)}
    own: dict[Any, list[tuple[list[float], int]]] = {number: [] for number in files}
    for number, image, kind, box in objects:
        where = f"{path}: annotation {number}"
        if image not in own or kind not in label:
            what = f"image_id {image}" if image not in own else f"category_id {kind}"
            raise UserError(f"{where}: found {what}, expected one of the file's")
        own[image].append((corners(box, files[image][1], where), label[kind]))
    pictures = tuple(
        Picture(
            file,
            hw,
            np.array([box for box, _ in own[number]], np.float32).reshape(-1, 4),
            np.array([kind for _, kind in own[number]], np.int32),
        )
        for number, (file, hw) in files.items()
    )
    return Annotated(pictures, tuple(name for _, name in kinds))


def corners(bbox: list[float], hw: tuple[int, int], where: str) -> list[float]:
    """COCO's x, y, width, height as x1, y1, x2, y2; up to a pixel outside of the image is cut off.

    Raises `UserError`, beginning with `where`, for a box that is empty, not finite or outside of its image.
    """
    if len(bbox) != 4 or not all(map(math.isfinite, bbox)):
        raise UserError(f"{where}: found bbox {bbox}, expected four finite numbers")
    x, y, w, h = bbox
    if w <= 0 or h <= 0:
        raise UserError(f"{where}: found bbox {bbox}, expected a width and a height above 0")
    if min(x, y) < -1 or x + w > hw[1] + 1 or y + h > hw[0] + 1 or x >= hw[1] or y >= hw[0]:
        raise UserError(f"{where}: found bbox {bbox}, expected one inside of the image's {hw[1]} x {hw[0]} pixels")
    return [max(x, 0.0), max(y, 0.0), min(x + w, float(hw[1])), min(y + h, float(hw[0]))]


def rgb(path: str | Path) -> Image.Image:
    """A picture of any common kind; grey and transparent ones become RGB.

    Raises `UserError` for a file that is no picture, is broken or has more than 8 bits.
    """
    with opened(path) as image:
        if image.mode.startswith(("I", "F")):
            raise UserError(f"{path}: found pixels of mode {image.mode}, expected 8 bits")
        return image.convert("RGB")


def fitted(picture: Image.Image, size: int) -> tuple[np.ndarray, float]:
    """A picture as [size, size, 3] uint8 whose longer side fills a side, zeros below or to the right of it.

    Args:
        picture: RGB.
        size: pixels of a side.

    Returns:
        The picture, and its pixels over those of the one that is given.
    """
    scale = size / max(picture.size)
    width, height = (max(1, round(n * scale)) for n in picture.size)
    small = picture if scale == 1.0 else picture.resize((width, height), Image.Resampling.BILINEAR)
    out = np.zeros((size, size, 3), np.uint8)
    out[:height, :width] = np.asarray(small)
    return out, scale
