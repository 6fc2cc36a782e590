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
    from jaxstack.core import runner
    from jaxstack.core.errors import UserError
    from jaxstack.medical import deepgpet
    from jaxstack.nn.supervised import variables
    from jaxstack.nn.vision.unet_mobilenet import UNetMobileNetV3

    if Path(model).is_file():
        net, given = deepgpet.load_weights(model)
        members = [given]
    else:
        learner, plan = runs.load(model)
        if not isinstance(learner.config, deepgpet.Config):
            raise UserError(f"--model {model}: found a run of {learner.name}, expected one of deepgpet")
        if len({*plan.get("settings", [0])}) > 1:
            raise UserError(f"--model {model}: found a sweep of several settings, expected a run of one")
        state, alive = runner.stored(learner, model)
        net = UNetMobileNetV3(1, learner.config.width, learner.config.decoder, learner.config.most_blocks)
        members = [variables(jax.tree.map(lambda x, i=i: x[i], state)) for i in np.flatnonzero(alive)]
    return lambda image: np.mean([deepgpet.segment(net, m, image, pad_mode, extra_cols) for m in members], 0)


def _segment(args: argparse.Namespace, _: list[str]) -> int:
    from pathlib import Path

    import numpy as np
    import pandas as pd
    from PIL import Image

    from jaxstack.core.errors import UserError
    from jaxstack.medical import deepgpet, io

    predict = segmenter(args.model, args.pad, args.extra_cols)
    files, rows, out = io.image_files(args.paths), [], Path(args.out)
    (out / "masks").mkdir(parents=True, exist_ok=True)
    names = [f"{p.stem}.png" for p in files]
    if doubled := next((n for n in names if names.count(n) > 1), None):
        raise UserError(f"{doubled}: found two files that would have this mask, expected names that differ")
    for path, name in zip(files, names):
        row: dict[str, Any] = {"file": str(path), "status": "ok", "reason": ""}
        try:
            mask = deepgpet.outlined(predict(io.read_scan(path).image))
            Image.fromarray(mask).save(out / "masks" / name)
            columns = mask.any(0)
            row |= {"columns": str(columns.sum()), "pixels": str(mask.sum()), "mean_rows": ""}
            if columns.any():
                row["mean_rows"] = f"{np.sum(mask) / columns.sum():.3f}"
            else:
                row["reason"] = "no choroid found"
        except UserError as e:
            row |= {"status": "skipped", "reason": str(e).removeprefix(f"{path}: ")}
            print(f"{path}: {row['reason']}, skipped")
        rows.append(row)
    pd.DataFrame(rows).to_csv(out / "results.csv", index=False)
    good = sum(row["status"] == "ok" for row in rows)
    print(f"{good} of {len(files)} files: {out / 'results.csv'}, masks/")
    return 0 if good else 2
