"""`jaxstack segment-oct`: outlines of the choroid in a folder of OCT B-scans. Not a medical device."""

import argparse
from collections.abc import Callable
from typing import Any

from jaxstack.cli.parsing import Commands, whole


def add_commands(commands: Commands) -> None:
    """Add the commands of this file."""
    p = commands.add("segment-oct", _segment, "Outline the choroid in OCT B-scans: a mask and a row for each.")
    p.add_argument("paths", metavar="PATH", nargs="+", help="B-scans, as of analyse-oct, or folders of them")
    p.add_argument(
        "--model", metavar="RUN|WEIGHTS", required=True, help="of `jaxstack train deepgpet`, or a state dict"
    )
    p.add_argument("--pad", choices=("zero", "reflect"), default="zero", help="around scans, to multiples of 32")
    p.add_argument(
        "--extra-cols", type=whole, default=0, help="more columns on both sides (scans of the optic nerve: 256)"
    )
    p.add_argument("--out", metavar="DIR", required=True, help="results.csv, masks/, overlays/, run.yaml")
    p.add_argument("--resume", action="store_true", help="continue in DIR; files that have a row are not read again")


def segmenter(model: str, pad_mode: Any = "zero", extra_cols: int = 0) -> tuple[Callable[[Any], Any], dict[str, Any]]:
    """A function from a B-scan [H, W] (uint8, or float in 0..1) to the choroid's probabilities [H, W], and what
    run.yaml says about its networks.

    Args:
        model: a run of deepgpet, whose seeds are averaged, or a file of weights of the released network.
        pad_mode, extra_cols: see `deepgpet.padded`.

    Raises:
        UserError: for a run of another method, or a file that does not fit.
    """
    from pathlib import Path

    import numpy as np

    from jaxstack.cli import folders, runs
    from jaxstack.core.learner import rows_of
    from jaxstack.medical import deepgpet
    from jaxstack.nn.supervised import variables
    from jaxstack.nn.vision.unet_mobilenet import UNetMobileNetV3

    if Path(model).is_file():
        net, given = deepgpet.load_weights(model)
        members, kind = [given], "weights"
    else:
        learner, states = runs.trained(model, "deepgpet", deepgpet.Config)
        net = UNetMobileNetV3(1, learner.config.width, learner.config.decoder, learner.config.most_blocks)
        given, count = variables(states), len(states.step)
        members, kind = [rows_of(given, i) for i in range(count)], "run"
    facts = folders.model_facts(kind, Path(model), given, net.decoder, len(members))
    return lambda image: np.mean([deepgpet.segment(net, m, image, pad_mode, extra_cols) for m in members], 0), facts


def _segment(args: argparse.Namespace, _: list[str]) -> int:
    from pathlib import Path

    import numpy as np
    from PIL import Image

    from jaxstack.cli import folders
    from jaxstack.core.errors import UserError
    from jaxstack.medical import deepgpet, io, overlays

    if args.extra_cols < 0:
        raise UserError(f"--extra-cols {args.extra_cols}: expected at least 0")
    if not Path(args.model).exists():
        raise UserError(f"--model {args.model}: not found, expected a run of `jaxstack train deepgpet` or weights")
    folders.check_out(Path(args.out), args.out, args.resume)
    files = io.scan_items(args.paths)
    predict, facts = segmenter(args.model, args.pad, args.extra_cols)
    options = {"pad": args.pad, "extra_cols": args.extra_cols, "model": facts}
    session = folders.begun(args.out, options, "segment-oct", args.resume, ("masks", "overlays"))
    names = dict(zip(files, folders.names(files)))

    def measure(path: Path) -> dict[str, str]:
        image = io.read_scan(path).image
        mask = deepgpet.outlined(predict(image))
        Image.fromarray(mask).save(session.out / "masks" / f"{names[path]}.png")
        shown = overlays.overlay(image, mask, np.zeros_like(mask))
        folders.save_picture(shown, session.out / "overlays" / f"{names[path]}.png")
        columns, pixels = int(mask.any(0).sum()), int(mask.sum())
        mean = {"mean_rows": f"{pixels / columns:.3f}"} if columns else {"mean_rows": "", "reason": "no choroid found"}
        return {"columns": str(columns), "pixels": str(pixels), "model": facts["sha256"]} | mean

    return folders.write_table(files, session, measure, ", masks/, overlays/")
