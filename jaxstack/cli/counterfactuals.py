"""`jaxstack counterfactual`: the healthy version of brain slices, a map of what is anomalous. Not a medical device."""

import argparse
from typing import Any

from jaxstack.cli.parsing import Commands, real


def add_commands(commands: Commands) -> None:
    """Add the command of this file."""
    p = commands.add(
        "counterfactual", _run, "Make the healthy version of grey images and a map of their anomalies (Dif-fuse)."
    )
    p.add_argument("paths", metavar="PATH", nargs="+", help="images, or folders of images")
    p.add_argument("--model", metavar="RUN", required=True, help="a run of `jaxstack train diffusion-counterfactual`")
    p.add_argument("--threshold", type=real, default=0.1, help="of the anomaly, 0-1 of the brightness (default: 0.1)")
    p.add_argument("--out", metavar="DIR", required=True, help="results.csv, healthy/, anomaly/, overlays/")


def _run(args: argparse.Namespace, _: list[str]) -> int:
    from pathlib import Path

    import jax
    import numpy as np
    from PIL import Image

    from jaxstack.cli import folders, runs
    from jaxstack.core.errors import UserError
    from jaxstack.medical.diffusion_counterfactual import Config, read_grey
    from jaxstack.medical.io import image_files

    if not 0.0 < args.threshold < 1.0:
        raise UserError(f"--threshold {args.threshold:g}: expected more than 0 and less than 1")
    learner, state = runs.trained(args.model, "diffusion-counterfactual", Config)
    explain = jax.jit(jax.vmap(learner.predict, in_axes=(0, None)))
    files, size, out = image_files(args.paths), learner.config.size, Path(args.out)
    for folder in ("healthy", "anomaly", "overlays"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    names = dict(zip(files, folders.names(files)))
    grey = lambda x: np.round(np.clip(x, 0.0, 1.0) * 255.0).astype(np.uint8)

    def measure(path: Path) -> dict[str, Any]:
        image = read_grey(path, size)
        # the mean over seeds
        found = jax.tree.map(lambda x: np.asarray(x)[:, 0].mean(0), explain(state, image[None, ..., None]))
        above = found.anomaly > args.threshold
        picture = np.repeat(grey(image)[..., None], 3, 2)
        picture[above] = picture[above] // 2 + np.array([127, 0, 0], np.uint8)
        pictures = {"healthy": grey(found.counterfactual[..., 0]), "anomaly": grey(found.anomaly), "overlays": picture}
        for folder, pixels in pictures.items():
            Image.fromarray(pixels).save(out / folder / f"{names[path]}.png")
        row = {"p_lesion": f"{found.lesion:.6f}", "anomaly_max": f"{found.anomaly.max():.6f}"}
        return row | {"anomaly_px": int(above.sum()), "anomaly_share": f"{above.mean():.6f}", "side_px": size}

    return folders.write_table(files, out, measure, "; healthy/, anomaly/, overlays/")
