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
    p.add_argument("paths", metavar="PATH", nargs="+", help="images (PNG, JPEG, TIFF, BMP, DICOM), or folders of them")
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
    p.add_argument(
        "--out", metavar="DIR", required=True, help="results.csv, overlays/, thresholds.csv, auc.csv, run.yaml"
    )
    p.add_argument("--resume", action="store_true", help="continue in DIR; files that have a row are not read again")


class Screener(NamedTuple):
    """A trained network, or the mean over the seeds of a run."""

    probabilities: Any
    """Aligned images [B, H, W, 2] in 0..1 -> [B, 8]."""
    cam: Any
    """(image [H, W, 2], label) -> map [H, W] in 0..1."""
    size: tuple[int, int]
    config: Any
    """Of the run; None for weights."""
    facts: dict[str, Any]
    """For run.yaml."""


def networks(given: str) -> tuple[Any, Any, tuple[int, int], Any, dict[str, Any]]:
    """The network that `--model` names, variables [S, ...] of its seeds, rows and columns, the config of a run, and
    what run.yaml says about them.

    Raises:
        UserError: for what is neither a run of uwf-diseases nor weights that fit.
    """
    import jax

    from jaxstack.cli import folders, runs
    from jaxstack.core.errors import UserError
    from jaxstack.medical import uwf
    from jaxstack.nn.supervised import variables

    path = Path(given)
    if not path.exists():
        raise UserError(f"--model {given}: not found, expected a run of `jaxstack train uwf-diseases` or weights")
    if path.is_file():
        network, single = uwf.load_weights(path)
        facts = folders.model_facts("weights", path, single, network.backbone.widths, 1)
        return network, jax.tree.map(lambda x: x[None], single), uwf.RELEASED_SIZE, None, facts
    learner, state = runs.trained(given, "uwf-diseases", uwf.Config)
    config, weights = learner.config, variables(state)
    facts = folders.model_facts("run", path, weights, config.widths, len(state.step))
    return uwf.network_of(config), weights, config.size, config, facts


def screener(given: str) -> Screener:
    """The networks that `--model` names. Raises `UserError`."""
    import jax

    from jaxstack.medical import uwf
    from jaxstack.medical.explain import grad_cam, normalised

    network, weights, size, config, facts = networks(given)
    explain = grad_cam(uwf.parts_of(network))

    def cam(own: Any, image: Any, label: Any) -> Any:
        x = (image - own["pixels"]["mean"]) / own["pixels"]["std"]
        return normalised(explain(own, x, label))

    seeds = lambda f, *axes: jax.jit(lambda own, *args: jax.vmap(f, in_axes=(0, *axes))(own, *args).mean(0))
    predict = seeds(lambda own, x: uwf.probabilities(network, own, x), None)
    maps = seeds(cam, None, None)
    return Screener(lambda x: predict(weights, x), lambda x, label: maps(weights, x, label), size, config, facts)


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
    from jaxstack.medical.phantoms_uwf import LABELS

    folders.check_out(Path(args.out), args.out, args.resume)
    table = uwf_data.read_labels(args.table, need_labels=False) if args.table else []
    rows = {row.path.resolve(): row for row in table}
    files = image_files(args.paths)
    given = {path.resolve() for path in files}
    folders.lost_rows(args.table, [row.path.name for path, row in rows.items() if path not in given])
    net = screener(args.model)
    points = thresholds(net, args)
    options: dict[str, Any] = {"thresholds": [None if np.isnan(t) else round(float(t), 6) for t in points]}
    options |= {"table": args.table and Path(args.table).name, "model": net.facts}
    session = folders.begun(args.out, options, "screen-uwf", args.resume)
    out, names = session.out, dict(zip(files, folders.names(files)))
    pd.DataFrame({"label": LABELS, "threshold": points}).to_csv(out / "thresholds.csv", index=False)

    def measure(path: Path) -> dict[str, Any]:
        image, row = uwf_data.read_uwf(path, net.size), rows.get(path.resolve())
        if args.table and row is None:
            raise UserError(f"{path}: no row in {args.table}")
        right = row is not None and row.right
        pixels = image[:, ::-1] if right else image
        x = pixels.astype(np.float32) / 255.0
        p = np.asarray(net.probabilities(x[None]))[0]
        flagged = p >= points
        # the disease that is farthest above its threshold
        first = int(np.nan_to_num(p[:-1] / points[:-1], nan=0.0).argmax())
        shown = picture(pixels, np.asarray(net.cam(x, first)), right)
        folders.save_picture(shown, out / "overlays" / f"{names[path]}.png")
        side = "assumed L" if row is None else "R" if right else "L"
        found: dict[str, Any] = {"laterality": side, "flags": " ".join(n for n, f in zip(LABELS, flagged) if f)}
        found |= {f"p_{name}": f"{value:.6f}" for name, value in zip(LABELS, p)}
        found["inconsistent"] = int(uwf.inconsistent(p[None], points)[0])
        found |= {"overlay": f"overlays/{names[path]}.png", "overlay_of": LABELS[first]}
        return found | {"model": net.facts["sha256"]}

    code = folders.write_table(files, session, measure, "; overlays/, thresholds.csv")
    _areas(out, rows)
    return code


def _areas(out: Path, rows: Any) -> None:
    """Write auc.csv of the images that have labels in the table."""
    import numpy as np
    import pandas as pd

    from jaxstack.medical.multilabel import auc_table
    from jaxstack.medical.phantoms_uwf import LABELS

    results = pd.read_csv(out / "results.csv", dtype={"file": str})
    good = results[results.status == "ok"]
    seen = [row for file in good.file if (row := rows.get(Path(file).resolve())) and row.labels is not None]
    if not seen:
        return
    p = np.asarray(good[[f"p_{name}" for name in LABELS]], float)
    labels, patients = np.array([row.labels for row in seen]), np.array([row.patient for row in seen])
    lines = [
        {
            "label": name,
            "images": len(p),
            "ill": int(labels[:, i].sum()),
            "auc": e.value,
            "low": e.low,
            "high": e.high,
        }
        for i, (name, e) in enumerate(auc_table(p, labels, LABELS, patients).items())
    ]
    pd.DataFrame(lines).to_csv(out / "auc.csv", index=False)
    shown = ", ".join(f"{r['label']} {r['auc']:.3f}" for r in lines if r["auc"] == r["auc"])
    print(f"AUC of {len(p)} images with labels: {shown}: {out / 'auc.csv'}")
