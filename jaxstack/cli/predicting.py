"""`jaxstack predict`: what a trained detector finds in pictures, or the class that a trained classifier gives them."""

import argparse
import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxstack.cli.parsing import Commands, real, row_flags

COLORS = ((255, 214, 0), (0, 200, 255), (255, 96, 160), (120, 230, 90), (255, 140, 40), (180, 130, 255))
"""Of boxes, by class."""
WIDTH = 480
"""Smaller pictures are drawn larger."""
COLUMNS = ("file", "label", "score", "x1", "y1", "x2", "y2")


def add_commands(commands: Commands) -> None:
    """Add the command of this file."""
    p = commands.add(
        "predict", _run, "Apply a trained detector or classifier to pictures: tables, pictures with boxes."
    )
    p.add_argument("run_dir", metavar="RUN", help="of `jaxstack train detector`, `train pgd` or `train classifier`")
    p.add_argument("paths", metavar="PATH", nargs="+", help="pictures, or folders of pictures")
    p.add_argument("--threshold", type=real, metavar="T", help="detector: least score of a box (default: 0.2)")
    p.add_argument(
        "--out", metavar="DIR", required=True, help="results.csv; detector: boxes.csv, pictures/ with boxes drawn"
    )
    p.add_argument("--resume", action="store_true", help="continue a call that was interrupted")
    row_flags(p)


def _run(args: argparse.Namespace, _: list[str]) -> int:
    from jaxstack.cli import runs
    from jaxstack.core.errors import UserError
    from jaxstack.nn import classifier, detector

    learner, state = runs.one_row(args, acts=False)
    if isinstance(learner.config, detector.Config):
        threshold = 0.2 if args.threshold is None else args.threshold
        if not 0.0 <= threshold <= 1.0:
            raise UserError(f"--threshold {threshold:g}: expected 0 to 1")
        return _boxes(learner, state, args, threshold)
    if isinstance(learner.config, classifier.Config):
        if args.threshold is not None:
            raise UserError("--threshold: expected none, it is for detectors")
        return _classes(learner, state, args)
    raise UserError(f"{args.run_dir}: found a run of {learner.name}, expected one of a detector or a classifier")


def _begun(learner: Any, state: Any, args: argparse.Namespace, folders_in: Sequence[str], **options: Any) -> Any:
    """The files of a call and its session. Raises `UserError`."""
    from jaxstack.cli import folders
    from jaxstack.medical.io import image_files
    from jaxstack.nn.supervised import variables

    files = image_files(args.paths)
    options |= {"model": folders.model_facts(learner.name, Path(args.run_dir), variables(state), (3,), 1)}
    return files, folders.begun(args.out, options, "predict", args.resume, folders_in)


def _boxes(learner: Any, state: Any, args: argparse.Namespace, threshold: float) -> int:
    import jax
    import numpy as np

    from jaxstack.cli import folders
    from jaxstack.data import coco
    from jaxstack.nn.detector import class_names

    config, known = learner.config, class_names(learner.config)
    files, session = _begun(learner, state, args, ("pictures",), threshold=threshold)
    names = dict(zip(files, folders.names(files)))
    detect: Callable[..., Any] = jax.jit(learner.predict)
    table = session.out / "boxes.csv"
    old = list(csv.reader(table.read_text(encoding="utf-8").splitlines())) if session.known and table.exists() else []

    def add(rows: Sequence[Sequence[Any]], mode: Literal["w", "a"] = "a") -> None:
        with open(table, mode, newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)

    add([COLUMNS, *(row for row in old if row[0] in session.known)], "w")

    def measure(path: Path) -> dict[str, Any]:
        picture = coco.rgb(path)
        image, scale = coco.fitted(picture, config.size)
        found = jax.tree.map(lambda x: np.asarray(x[0]), detect(state, image[None]))
        width, height = picture.size
        kept = found.valid & (found.scores >= threshold)
        boxes = np.clip(found.boxes[kept] / scale, 0.0, [width, height, width, height])
        # nothing is left of a box in what fills up the square
        there = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        boxes, scores, labels = boxes[there], found.scores[kept][there], found.labels[kept][there]
        titles = [known[label] for label in labels]
        drawn(picture, boxes, [f"{t} {s:.2f}" for t, s in zip(titles, scores)], labels).save(
            session.out / "pictures" / f"{names[path]}.png"
        )
        found = zip(titles, scores, boxes)
        add([(str(path), title, f"{score:.4f}", *(f"{v:.2f}" for v in box)) for title, score, box in found])
        return {"width": width, "height": height, "boxes": len(boxes)}

    return folders.write_table(files, session, measure, "; boxes.csv, pictures/")


def drawn(picture: Any, boxes: Any, titles: Sequence[str], labels: Any) -> Any:
    """A picture with boxes and what is in them.

    Args:
        picture: PIL's, RGB.
        boxes: [N, 4] x1, y1, x2, y2 in its pixels.
        titles: N texts, the strongest box's first.
        labels: [N], which choose the colours.

    Returns:
        A picture of its size, or a whole multiple of it where it is small.
    """
    from PIL import Image, ImageDraw

    larger = max(1, -(-WIDTH // picture.width))
    out = picture.resize((picture.width * larger, picture.height * larger), Image.Resampling.NEAREST)
    draw, line = ImageDraw.Draw(out), max(2, out.width // 240)
    # the strongest, which come first, on top
    for box, title, label in reversed(list(zip(boxes, titles, labels))):
        color, (x1, y1, x2, y2) = COLORS[int(label) % len(COLORS)], (float(v) * larger for v in box)
        draw.rectangle([x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)], outline=color, width=line)
        left, top, right, bottom = draw.textbbox((x1, y1), title)
        # above the box, or inside where there is no room
        up = y1 - (bottom - top) - 4 if y1 >= bottom - top + 4 else y1 + line
        at = (min(max(0.0, x1), max(0.0, out.width - (right - left) - 4)), up)
        draw.rectangle([at[0], at[1], at[0] + right - left + 4, at[1] + bottom - top + 4], fill=color)
        draw.text((at[0] + 2, at[1] + 2 - (top - y1)), title, fill=(0, 0, 0))
    return out


def _classes(learner: Any, state: Any, args: argparse.Namespace) -> int:
    import jax
    import numpy as np

    from jaxstack.cli import folders
    from jaxstack.core.errors import UserError
    from jaxstack.data import images, pictures

    files, session = _begun(learner, state, args, ())
    config = learner.config
    facts = images.facts(config.data)
    rows, columns, channels = facts.shape
    logits: Callable[..., Any] = jax.jit(learner.predict)

    def measure(path: Path) -> dict[str, Any]:
        from PIL import Image

        with pictures.opened(path) as image:
            if image.mode.startswith(("I", "F")):
                raise UserError(f"{path}: found pixels of mode {image.mode}, expected 8 bits")
            plain = image.convert("L" if channels == 1 else "RGB")
        if plain.size != (columns, rows):
            plain = plain.resize((columns, rows), Image.Resampling.BILINEAR)
        x = np.asarray(plain, np.float32).reshape(1, rows, columns, channels) * (facts.white / 255.0)
        x = images.sized(np.round(x).astype(np.uint8), config.size)
        p = np.asarray(jax.nn.softmax(logits(state, x)[0]))
        return {"label": int(p.argmax()), "probability": f"{p.max():.4f}"}

    return folders.write_table(files, session, measure)


def write_scenes(out: Path, count: int, size: int, seed: int) -> None:
    """Draw scenes into a folder of COCO's form: `count` for training, a quarter of that, at least 2, for validation.

    Raises:
        UserError: for sides into which no object fits.
    """
    import json

    from PIL import Image

    from jaxstack.data.scenes import CLASSES, scenes

    number = 0
    (out / "annotations").mkdir(parents=True)
    for which, many, own in (("train", max(2, count), 2 * seed), ("val", max(2, count // 4), 2 * seed + 1)):
        found, objects, files = scenes(own, many, size), [], []
        (out / which).mkdir()
        for i in range(many):
            files.append({"id": i, "file_name": f"scene{i:05d}.png", "width": size, "height": size})
            Image.fromarray(found.image[i]).save(out / which / files[-1]["file_name"])
            for (x1, y1, x2, y2), label in zip(found.boxes[i][found.valid[i]].tolist(), found.labels[i].tolist()):
                number += 1
                box = {"id": number, "image_id": i, "category_id": label + 1, "bbox": [x1, y1, x2 - x1, y2 - y1]}
                objects.append(box | {"area": (x2 - x1) * (y2 - y1), "iscrowd": 0})
        kinds = [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)]
        content = {"images": files, "annotations": objects, "categories": kinds}
        (out / "annotations" / f"instances_{which}.json").write_text(json.dumps(content), encoding="utf-8")
    print(f"{max(2, count)} scenes for training, {max(2, count // 4)} for validation: {out}")
