"""`jaxstack counterfactual`: the healthy version of slices or scans, and what is anomalous. Not a medical device."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxstack.cli.parsing import Commands, real

FOLDERS = ("healthy", "anomaly", "overlays")
THRESHOLDS = {"diffusion-counterfactual": 0.1, "acat": 0.5}
"""Of the anomaly: a change of brightness, or the saliency, whose maximum is 1 in every scan."""

Measure = Callable[[Path], dict[str, Any]]


def add_commands(commands: Commands) -> None:
    """Add the command of this file."""
    about = "Make the healthy version of images and a map of their anomalies (Dif-fuse: grey images; ACAT: CT scans)."
    p = commands.add("counterfactual", _run, about)
    p.add_argument("paths", metavar="PATH", nargs="+", help="images, or NIfTI files and DICOM series; or their folders")
    p.add_argument(
        "--model", metavar="RUN", required=True, help="a run of `jaxstack train diffusion-counterfactual` or `acat`"
    )
    p.add_argument("--threshold", type=real, help="of the anomaly, 0-1 (default: 0.1 of the brightness; acat: 0.5)")
    p.add_argument("--out", metavar="DIR", required=True, help="results.csv, healthy/, anomaly/, overlays/, run.yaml")
    p.add_argument("--resume", action="store_true", help="continue in DIR; files that have a row are not read again")


def _run(args: argparse.Namespace, _: list[str]) -> int:
    from jaxstack.cli import folders, runs
    from jaxstack.core.errors import UserError
    from jaxstack.medical.io import scan_items
    from jaxstack.medical.volumes import scan_paths
    from jaxstack.nn.supervised import variables

    if args.threshold is not None and not 0.0 < args.threshold < 1.0:
        raise UserError(f"--threshold {args.threshold:g}: expected more than 0 and less than 1")
    folders.check_out(Path(args.out), args.out, args.resume)
    name, learner, state = _model(args.model, runs)
    files = (scan_paths if name == "acat" else scan_items)(args.paths)
    threshold = args.threshold or THRESHOLDS[name]
    facts = folders.model_facts("run", Path(args.model), variables(state), learner.config.widths, len(state.step))
    options = {"threshold": threshold, "method": name, "model": facts}
    session = folders.begun(args.out, options, "counterfactual", args.resume, FOLDERS)
    explain = (_scans if name == "acat" else _slices)(
        learner, state, threshold, session.out, dict(zip(files, folders.names(files)))
    )
    measure = lambda path: explain(path) | {"model": facts["sha256"]}
    return folders.write_table(files, session, measure, "; healthy/, anomaly/, overlays/")


def _model(run: str, runs: Any) -> tuple[str, Any, Any]:
    """The method's name, learner and states of a run."""
    from jaxstack.medical import acat, diffusion_counterfactual

    method, _ = runs.load_any(run)
    if isinstance(method.config, acat.Config):
        return "acat", *runs.trained(run, "acat", acat.Config)
    name = "diffusion-counterfactual"
    return name, *runs.trained(run, f"{name} or acat", diffusion_counterfactual.Config)


def _save(out: Path, name: str, image: Any, healthy: Any, anomaly: Any, above: Any) -> None:
    """Grey pictures [H, W] in 0..1, and the image with what is above the threshold in red."""
    import numpy as np
    from PIL import Image

    grey = lambda x: np.round(np.clip(x, 0.0, 1.0) * 255.0).astype(np.uint8)
    picture = np.repeat(grey(image)[..., None], 3, 2)
    picture[above] = picture[above] // 2 + np.array([127, 0, 0], np.uint8)
    for folder, pixels in zip(FOLDERS, (grey(healthy), grey(anomaly), picture)):
        Image.fromarray(pixels).save(out / folder / f"{name}.png")


def _slices(learner: Any, state: Any, threshold: float, out: Path, names: dict[Path, str]) -> Measure:
    """Dif-fuse."""
    import jax
    import numpy as np

    from jaxstack.medical.diffusion_counterfactual import read_grey

    explain, size = jax.jit(jax.vmap(learner.predict, in_axes=(0, None))), learner.config.size

    def measure(path: Path) -> dict[str, Any]:
        image = read_grey(path, size)
        # the mean over seeds
        found = jax.tree.map(lambda x: np.asarray(x)[:, 0].mean(0), explain(state, image[None, ..., None]))
        above = found.anomaly > threshold
        _save(out, names[path], image, found.counterfactual[..., 0], found.anomaly, above)
        row = {"p_lesion": f"{found.lesion:.6f}", "anomaly_max": f"{found.anomaly.max():.6f}"}
        return row | {"anomaly_px": int(above.sum()), "anomaly_share": f"{above.mean():.6f}", "side_px": size}

    return measure


def _scans(learner: Any, state: Any, threshold: float, out: Path, names: dict[Path, str]) -> Measure:
    """ACAT: slices side by side, from the foot to the head."""
    import jax
    import numpy as np

    from jaxstack.medical.acat_scans import read_scan

    explain, config = jax.jit(jax.vmap(learner.predict, in_axes=(0, None))), learner.config

    def measure(path: Path) -> dict[str, Any]:
        scan = read_scan(path, config.slices, config.size, config.window)
        # the mean over seeds
        found = jax.tree.map(lambda x: np.asarray(x)[:, 0].mean(0), explain(state, scan.image[None]))
        above = found.saliency > threshold
        wide = lambda slices: np.concatenate([*slices], 1)
        # what the classifier wants changed, without what the autoencoder loses
        healthy = scan.image + found.healthy - found.start
        _save(out, names[path], *map(wide, (scan.image, healthy, found.saliency, above)))
        row = {
            "p_lesion": f"{found.lesion:.6f}",
            "change_max": f"{np.abs(found.healthy - found.start).max():.6f}",
            "anomaly_px": int(above.sum()),
            "anomaly_share": f"{above.mean():.6f}",
            "anomaly_mm2": f"{above.sum() * scan.pixel_mm2:.3f}",
        }
        return row | {"slices": " ".join(map(str, scan.slices)), "side_px": config.size}

    return measure
