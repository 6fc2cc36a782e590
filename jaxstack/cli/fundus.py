"""`jaxstack fit-quality` and `grade-fundus`: photographs of the fundus in, tables out. Not a medical device."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jaxstack.cli.parsing import Commands, whole

SIDE = 480
"""Pixels of the longer side of a picture in overlays/."""
FRAMES = {"Good": (60, 190, 90), "Usable": (235, 190, 60), "Bad": (220, 70, 60)}


def add_commands(commands: Commands) -> None:
    """Add the commands of this file."""
    p = commands.add("fit-quality", _fit, "Learn three classes of quality from a folder of photographs (QuickQual).")
    p.add_argument(
        "--data", metavar="DIR", required=True, help="with labels.csv: columns file, label (Good, Usable, Bad)"
    )
    p.add_argument("--backbone", default="efficientnet-lite0", metavar="NAME[=FILE]", help="or densenet121=FILE")
    p.add_argument("--size", type=whole, default=512, help="pixels of a side that the network is given (default: 512)")
    p.add_argument("--out", metavar="FILE", required=True, help="an NPZ file, for grade-fundus --quality")
    p = commands.add(
        "grade-fundus", _grade, "Grade photographs of the fundus: quality and a retinal trait, a row each."
    )
    p.add_argument("paths", metavar="PATH", nargs="+", help="photographs (PNG, JPEG, TIFF, BMP, DICOM), or folders")
    p.add_argument("--model", metavar="RUN|WEIGHTS", help="of `jaxstack train dart`, or a state dict: the trait")
    p.add_argument("--quality", metavar="FILE", help="of `jaxstack fit-quality`: three probabilities")
    p.add_argument("--out", metavar="DIR", required=True, help="results.csv, overlays/, run.yaml")
    p.add_argument("--resume", action="store_true", help="continue in DIR; files that have a row are not read again")


def _fit(args: argparse.Namespace, _: list[str]) -> None:
    from pathlib import Path

    import jax.numpy as jnp
    import numpy as np

    from jaxstack.core.errors import UserError
    from jaxstack.medical import quickqual

    if Path(args.out).suffix != ".npz":
        raise UserError(f"--out {args.out}: expected a name ending in .npz")
    if args.size < 32:
        raise UserError(f"--size {args.size}: expected at least 32 pixels")
    images, labels = quickqual.read_folder(args.data, args.size)
    features = quickqual.features_of(quickqual.backbone(args.backbone), images)
    scorer = quickqual.fit_quality(features, labels)
    quickqual.save_scorer(args.out, scorer, backbone=args.backbone, size=str(args.size))
    of_class = ", ".join(f"{n} {c}" for n, c in zip(np.bincount(labels, minlength=3), quickqual.CLASSES))
    found = quickqual.metrics(np.asarray(scorer.probabilities(jnp.asarray(features))), labels)
    print(f"{len(labels)} photographs ({of_class}); accuracy on these {found['accuracy']:.3f}: {args.out}")


class Grader(NamedTuple):
    """A part of a photograph's row."""

    columns: Callable[[Any], dict[str, Any]]
    """Pixels [H, W, 3] uint8 -> columns of the table. May raise `UserError`."""
    box: Callable[[Any], tuple[slice, slice] | None]
    """Pixels -> rows and columns that are looked at; None: all."""
    facts: dict[str, Any]
    """For run.yaml."""


def _trait(given: str) -> Grader:
    """The trait, by a run of dart or released weights."""
    import jax
    import numpy as np

    from jaxstack.cli import folders, runs
    from jaxstack.core.errors import UserError
    from jaxstack.medical import dart
    from jaxstack.medical.fundus import border_box, photograph
    from jaxstack.nn.supervised import variables

    path = Path(given)
    if not path.exists():
        raise UserError(f"--model {given}: not found, expected a run of `jaxstack train dart` or weights")
    if path.is_file():
        network, weights = dart.load_weights(path)
        facts = folders.model_facts("weights", path, weights, (network.hidden,), 1)
        predict, size = jax.jit(lambda x: dart.predict_fd(network, weights, x)[None]), dart.RELEASED_SIZE
    else:
        learner, state = runs.trained(given, "dart", dart.Config)
        facts = folders.model_facts("run", path, variables(state), learner.config.widths, len(state.step))
        seeds: Any = jax.vmap(learner.predict, in_axes=(0, None))
        predict, size = jax.jit(lambda x: seeds(state, x)), learner.config.size

    def columns(pixels: Any) -> dict[str, Any]:
        found = np.asarray(predict(photograph(pixels, size)[None].astype(np.float32) / 255.0))[:, 0]
        return {"trait": f"{found.mean():.6f}", "deviation_over_seeds": f"{found.std():.6f}", "seeds": len(found)}

    return Grader(columns, border_box, facts)


def _quality(file: str) -> Grader:
    """Quality, by a file of fit-quality."""
    import jax.numpy as jnp
    import numpy as np

    from jaxstack.core.errors import UserError
    from jaxstack.medical import quickqual

    scorer, facts = quickqual.load_scorer(file)
    net, size = quickqual.backbone(facts["backbone"]), int(facts["size"])

    def columns(pixels: Any) -> dict[str, Any]:
        if quickqual.bright_box(pixels) is None:
            raise UserError(f"image: no pixel is brighter than 15 of 255, brightest mean {pixels.mean(2).max():g}")
        image = quickqual.preprocess_fundus(pixels, size)
        features = quickqual.features_of(net, image[None], batch=1)
        p = np.asarray(scorer.probabilities(jnp.asarray(features)))[0]
        found = {"quality": quickqual.CLASSES[int(p.argmax())]}
        found |= {f"p_{c.lower()}": f"{value:.6f}" for c, value in zip(quickqual.CLASSES, p)}
        if net.name == "densenet121":
            found["meme"] = f"{float(quickqual.meme_score(jnp.asarray(features))[0]):.6f}"
        return found

    return Grader(columns, quickqual.bright_box, {"name": Path(file).name, "sha256": _digest(file)})


def _digest(file: str) -> str:
    import hashlib

    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


def picture(pixels: Any, boxes: Any, row: dict[str, Any]) -> Any:
    """A photograph [H, W, 3] uint8 with the parts that were looked at, a frame in the colour of its quality, and its
    values below."""
    from PIL import Image, ImageDraw

    height, width = pixels.shape[:2]
    by = SIDE / max(height, width)
    size = (max(1, round(width * by)), max(1, round(height * by)))
    out = Image.new("RGB", (max(size[0], 300), size[1] + 18))
    out.paste(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
    draw = ImageDraw.Draw(out)
    for rows, columns in filter(None, boxes):
        at = (columns.start * by, rows.start * by, columns.stop * by - 1, rows.stop * by - 1)
        draw.rectangle(at, outline=(80, 200, 255))
    if (quality := row.get("quality")) is not None:
        draw.rectangle((0, 0, size[0] - 1, size[1] - 1), outline=FRAMES[quality], width=4)
    shown = ("quality", "p_good", "p_usable", "p_bad", "meme", "trait")
    text = "  ".join(f"{k.removeprefix('p_')} {v[:5] if k != 'quality' else v}" for k in shown if (v := row.get(k)))
    draw.text((4, size[1] + 3), text, fill=(255, 255, 255))
    return out


def _grade(args: argparse.Namespace, _: list[str]) -> int:
    from jaxstack.cli import folders
    from jaxstack.core.errors import UserError
    from jaxstack.medical import io
    from jaxstack.medical.fundus import read_pixels

    if args.model is None and args.quality is None:
        raise UserError("--model, --quality: expected at least one of them")
    folders.check_out(Path(args.out), args.out, args.resume)
    files = io.image_files(args.paths)
    kinds = {"quality": (_quality, args.quality), "model": (_trait, args.model)}
    graders = {name: make(given) for name, (make, given) in kinds.items() if given is not None}
    options = {name: graders[name].facts if name in graders else None for name in kinds}
    session = folders.begun(args.out, options, "grade-fundus", args.resume)
    names = dict(zip(files, folders.names(files)))
    digest = " ".join(g.facts["sha256"] for g in graders.values())

    def measure(path: Path) -> dict[str, Any]:
        pixels = read_pixels(path)
        try:
            row = {k: v for g in graders.values() for k, v in g.columns(pixels).items()}
        except UserError as e:
            raise UserError(f"{path}: {str(e).removeprefix('image: ')}") from e
        overlay = f"overlays/{names[path]}.png"
        shown = picture(pixels, [g.box(pixels) for g in graders.values()], row)
        folders.save_picture(shown, session.out / overlay)
        return row | {"model": digest, "overlay": overlay}

    return folders.write_table(files, session, measure, "; overlays/")
