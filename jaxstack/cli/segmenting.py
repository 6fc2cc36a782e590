"""`jaxstack segment-oct`: outlines of the choroid in a folder of OCT B-scans. Not a medical device."""

import argparse
from collections.abc import Callable
from typing import Any

from jaxstack.cli.parsing import Commands, whole


def add_commands(commands: Commands) -> None:
    """Add the commands of this file."""
    p = commands.add("segment-oct", _segment, "Outline the choroid in OCT B-scans: a mask and a row for each.")
    p.add_argument("paths", metavar="PATH", nargs="+", help="images, or folders of images")
    p.add_argument(
        "--model", metavar="RUN|WEIGHTS", required=True, help="of `jaxstack train deepgpet`, or a state dict"
    )
    p.add_argument("--pad", choices=("zero", "reflect"), default="zero", help="around scans, to multiples of 32")
    p.add_argument(
        "--extra-cols", type=whole, default=0, help="more columns on both sides (scans of the optic nerve: 256)"
    )
    p.add_argument("--out", metavar="DIR", required=True, help="masks/ and results.csv")


def segmenter(model: str, pad_mode: Any = "zero", extra_cols: int = 0) -> Callable[[Any], Any]:
    """A function from a B-scan [H, W] (uint8, or float in 0..1) to the choroid's probabilities [H, W].

    Args:
        model: a run of deepgpet, whose seeds are averaged, or a file of weights of the released network.
        pad_mode, extra_cols: see `deepgpet.padded`.

    Raises:
        UserError: for a run of another method, or a file that does not fit.
    """
    from pathlib import Path

    import jax
    import numpy as np

    from jaxstack.cli import runs
    from jaxstack.medical import deepgpet
    from jaxstack.nn.supervised import variables
    from jaxstack.nn.vision.unet_mobilenet import UNetMobileNetV3

    if Path(model).is_file():
        net, given = deepgpet.load_weights(model)
        members = [given]
    else:
        learner, states = runs.trained(model, "deepgpet", deepgpet.Config)
        net = UNetMobileNetV3(1, learner.config.width, learner.config.decoder, learner.config.most_blocks)
        given, count = variables(states), len(states.step)
        members = [jax.tree.map(lambda x, i=i: x[i], given) for i in range(count)]
    return lambda image: np.mean([deepgpet.segment(net, m, image, pad_mode, extra_cols) for m in members], 0)


def _segment(args: argparse.Namespace, _: list[str]) -> int:
    from pathlib import Path

    from PIL import Image

    from jaxstack.cli import folders
    from jaxstack.medical import deepgpet, io

    predict = segmenter(args.model, args.pad, args.extra_cols)
    files, out = io.image_files(args.paths), Path(args.out)
    (out / "masks").mkdir(parents=True, exist_ok=True)
    names = dict(zip(files, folders.names(files)))

    def measure(path: Path) -> dict[str, str]:
        mask = deepgpet.outlined(predict(io.read_scan(path).image))
        Image.fromarray(mask).save(out / "masks" / f"{names[path]}.png")
        columns, pixels = int(mask.any(0).sum()), int(mask.sum())
        mean = {"mean_rows": f"{pixels / columns:.3f}"} if columns else {"mean_rows": "", "reason": "no choroid found"}
        return {"columns": str(columns), "pixels": str(pixels)} | mean

    return folders.write_table(files, out, measure, ", masks/")
