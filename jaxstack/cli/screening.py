"""`jaxstack screen-uwf`: ultra-widefield images in, probabilities and pictures out. Not a medical device."""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from jaxstack.cli.parsing import Commands, real

WIDTH = 480
"""Narrower images are drawn larger."""


def add_commands(commands: Commands) -> None:
    """Add the command of this file."""
    p = commands.add(
        "screen-uwf", _run, "Screen ultra-widefield images for seven diseases: probabilities, flags, maps, a row each."
    )
    p.add_argument("paths", metavar="PATH", nargs="+", help="images, or folders of images")
    p.add_argument("--model", metavar="RUN|WEIGHTS", required=True, help="of `train uwf-diseases`, or a state dict")
    p.add_argument(
        "--table",
        metavar="CSV",
        help="columns file, laterality (L or R) and, for auc.csv, patient and the eight labels; without it all images "
        "count as left eyes",
    )
    p.add_argument(
        "--point",
        choices=("sensitive", "specific"),
        default="specific",
        help="flags by the threshold that finds 95%% of the ill of the validation part, or leaves out 95%% of the "
        "healthy (default)",
    )
    p.add_argument("--threshold", type=real, metavar="T", help="flag probabilities of at least T instead")
    p.add_argument("--out", metavar="DIR", required=True, help="results.csv, overlays/, thresholds.csv, auc.csv")


class Screener(NamedTuple):
    """A trained network, or the mean over the seeds of a run."""

    probabilities: Any
    """Aligned images [B, H, W, 2] in 0..1 -> [B, 8]."""
    cam: Any
    """(image [H, W, 2], label) -> map [H, W] in 0..1."""
    size: tuple[int, int]
    config: Any
    """Of the run; None for weights."""


def networks(given: str) -> tuple[Any, Any, tuple[int, int], Any]:
    """The network that `--model` names, variables [S, ...] of its seeds, rows and columns, and the config of a run.

    Raises:
        UserError: for what is neither a run of uwf-diseases nor weights that fit.
    """
    import jax

    from jaxstack.cli import runs
    from jaxstack.core.errors import UserError
    from jaxstack.medical import uwf
    from jaxstack.nn.supervised import variables

    path = Path(given)
    if not path.exists():
        raise UserError(f"--model {given}: not found, expected a run of `jaxstack train uwf-diseases` or weights")
    if path.is_file():
        network, single = uwf.load_weights(path)
        return network, jax.tree.map(lambda x: x[None], single), uwf.RELEASED_SIZE, None
    learner, state = runs.trained(given, "uwf-diseases", uwf.Config)
    return uwf.network_of(learner.config), variables(state), learner.config.size, learner.config


def screener(given: str) -> Screener:
    """The networks that `--model` names. Raises `UserError`."""
    import jax

    from jaxstack.medical import uwf
    from jaxstack.medical.explain import grad_cam, normalised

    network, weights, size, config = networks(given)
    explain = grad_cam(uwf.parts_of(network))

    def cam(own: Any, image: Any, label: Any) -> Any:
        x = (image - own["pixels"]["mean"]) / own["pixels"]["std"]
        return normalised(explain(own, x, label))

    seeds = lambda f, *axes: jax.jit(lambda own, *args: jax.vmap(f, in_axes=(0, *axes))(own, *args).mean(0))
    predict = seeds(lambda own, x: uwf.probabilities(network, own, x), None)
    maps = seeds(cam, None, None)
    return Screener(lambda x: predict(weights, x), lambda x, label: maps(weights, x, label), size, config)


def thresholds(net: Screener, args: argparse.Namespace) -> Any:
    """Of the labels [8]: the one that is given, or an operating point of the validation part. Raises `UserError`."""
    import numpy as np

    from jaxstack.core.errors import UserError
    from jaxstack.medical import uwf
    from jaxstack.medical.multilabel import operating_points
    from jaxstack.medical.phantoms_uwf import LABELS

    if args.threshold is not None:
        if not 0.0 < args.threshold < 1.0:
            raise UserError(f"--threshold {args.threshold:g}: expected more than 0 and less than 1")
        return np.full(len(LABELS), args.threshold)
    if net.config is None:
        raise UserError("--threshold: expected one, as a file of weights has no validation part to choose it on")
    try:
        valid = uwf.parts(net.config)["valid"]
    except UserError as e:
        raise UserError(f"--threshold: expected one, as the run's validation part cannot be read ({e})") from e
    x = valid.images.astype(np.float32) / 255.0
    p = np.concatenate([np.asarray(net.probabilities(x[i : i + 50])) for i in range(0, len(x), 50)])
    return getattr(operating_points(p, valid.labels), args.point)


def picture(image: Any, cam: Any, right: bool) -> Any:
    """An image [H, W, 2] uint8 beside itself with the map [H, W] in 0..1 tinted, as it is stored."""
    import numpy as np
    from PIL import Image

    larger = max(1, -(-WIDTH // image.shape[1]))
    grown = lambda x: np.repeat(np.repeat(x, larger, 0), larger, 1)
    color = np.concatenate([image, np.zeros_like(image[..., :1])], -1).astype(np.float32)
    heat = cam[..., None] * np.array([0.0, 60.0, 255.0])
    tinted = color * (1.0 - 0.5 * cam[..., None]) + heat
    both = [x[:, ::-1] if right else x for x in (color, tinted)]
    return Image.fromarray(grown(np.clip(np.concatenate(both, 1), 0.0, 255.0).astype(np.uint8)))


def _run(args: argparse.Namespace, _: list[str]) -> int:
    import numpy as np
    import pandas as pd

    from jaxstack.cli import folders
    from jaxstack.core.errors import UserError
    from jaxstack.medical import uwf, uwf_data
    from jaxstack.medical.io import image_files
    from jaxstack.medical.multilabel import auc_table
    from jaxstack.medical.phantoms_uwf import LABELS

    table = uwf_data.read_labels(args.table, need_labels=False) if args.table else []
    known = {row.path.resolve(): row for row in table}
    files, out, net = image_files(args.paths), Path(args.out), screener(args.model)
    points = thresholds(net, args)
    (out / "overlays").mkdir(parents=True, exist_ok=True)
    pd.DataFrame({"label": LABELS, "threshold": points}).to_csv(out / "thresholds.csv", index=False)
    names, seen = dict(zip(files, folders.names(files))), []

    def measure(path: Path) -> dict[str, Any]:
        image, row = uwf_data.read_uwf(path, net.size), known.get(path.resolve())
        if args.table and row is None:
            raise UserError(f"{path}: no row in {args.table}")
        right = row is not None and row.right
        pixels = image[:, ::-1] if right else image
        x = pixels.astype(np.float32) / 255.0
        p = np.asarray(net.probabilities(x[None]))[0]
        flagged = p >= points
        # the disease that is farthest above its threshold
        first = int(np.nan_to_num(p[:-1] / points[:-1], nan=0.0).argmax())
        picture(pixels, np.asarray(net.cam(x, first)), right).save(out / "overlays" / f"{names[path]}.png")
        if row is not None and row.labels is not None:
            seen.append((p, row.labels, row.patient))
        side = "assumed L" if row is None else "R" if right else "L"
        found: dict[str, Any] = {"laterality": side, "flags": " ".join(n for n, f in zip(LABELS, flagged) if f)}
        found |= {f"p_{name}": f"{value:.6f}" for name, value in zip(LABELS, p)}
        found["inconsistent"] = int(uwf.inconsistent(p[None], points)[0])
        return found | {"overlay": f"overlays/{names[path]}.png", "overlay_of": LABELS[first]}

    code = folders.write_table(files, out, measure, "; overlays/, thresholds.csv")
    if seen:
        p, labels, patients = (np.array(x) for x in zip(*seen))
        areas = auc_table(p, labels, LABELS, patients)
        rows = [
            {
                "label": name,
                "images": len(p),
                "ill": int(labels[:, i].sum()),
                "auc": e.value,
                "low": e.low,
                "high": e.high,
            }
            for i, (name, e) in enumerate(areas.items())
        ]
        pd.DataFrame(rows).to_csv(out / "auc.csv", index=False)
        shown = ", ".join(f"{r['label']} {r['auc']:.3f}" for r in rows if r["auc"] == r["auc"])
        print(f"AUC of {len(p)} images with labels: {shown}: {out / 'auc.csv'}")
    return code
