"""`jaxstack phantoms`: images with known truth, to try the medical methods without data."""

import argparse
from typing import Any

from jaxstack.cli.parsing import Commands, real, seed, whole


def add_commands(commands: Commands) -> None:
    """Add the commands of this file."""
    p = commands.add("phantoms", _phantoms, "Draw images with known truth, to try methods without data.")
    p.add_argument(
        "kind",
        choices=("fundus", "oct", "uwf", "mri", "ct", "scenes"),
        help="photographs of the retina, B-scans of retina and choroid, ultra-widefield images with seven diseases, or "
        "slices of brains, half with a lesion; scenes: simple shapes, in COCO's form, for `train detector`",
    )
    p.add_argument("--num", type=whole, default=20, help="images (default: 20)")
    p.add_argument(
        "--size",
        type=whole,
        nargs="+",
        help="pixels: a side (fundus 128, mri, ct, scenes 64), or H W (oct 128 192, uwf 64 80)",
    )
    p.add_argument("--severity", type=real, nargs=2, metavar=("LOW", "HIGH"), help="fundus: degraded, 0-1 (0 0)")
    p.add_argument("--slices", type=whole, metavar="T", help="ct: whole scans of T slices as NIfTI, not single slices")
    p.add_argument("--device", choices=("A", "B", "C"), help="oct: the scanner, of three (A)")
    p.add_argument("--seed", type=seed, default=0)
    p.add_argument("--out", metavar="DIR", required=True, help="images, masks in folders, tables of the truth")


def _phantoms(args: argparse.Namespace, _: list[str]) -> None:
    from pathlib import Path

    from jaxstack.core.errors import UserError

    if args.num < 1:
        raise UserError(f"--num {args.num}: expected at least 1")
    sides = 2 if args.kind in ("oct", "uwf") else 1
    if args.size is not None and len(args.size) != sides:
        raise UserError(f"--size {' '.join(map(str, args.size))}: expected {sides} for {args.kind}")
    for name, kind in (("severity", "fundus"), ("device", "oct"), ("slices", "ct")):
        if args.kind != kind and getattr(args, name) is not None:
            raise UserError(f"--{name}: expected none, it is for {kind}")
    out = Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {args.out}: is there already and not an empty folder")
    of_slices = _brains if args.slices is None else _scans
    kinds = {"fundus": _fundus, "oct": _oct, "uwf": _uwf, "mri": _brains, "ct": of_slices, "scenes": _scenes}
    kinds[args.kind](args, out)


def _scenes(args: argparse.Namespace, out: Any) -> None:
    from jaxstack.cli.predicting import write_scenes

    write_scenes(out, args.num, args.size[0] if args.size else 64, args.seed)


def _scans(args: argparse.Namespace, out: Any) -> None:
    import csv

    import numpy as np

    from jaxstack.core.errors import UserError
    from jaxstack.medical import phantoms_ct
    from jaxstack.medical.volumes import write_volume

    if not 2 <= args.slices <= 36:
        raise UserError(f"--slices {args.slices}: expected 2 to 36")
    size = args.size[0] if args.size else 64
    scans = phantoms_ct.ct_set(args.seed, args.num, phantoms_ct.Design(slices=args.slices, size=size))
    pixel = phantoms_ct.VIEW_MM / size
    spacing = (float(phantoms_ct.gap_mm(args.slices)), pixel, pixel)
    (out / "masks").mkdir(parents=True, exist_ok=True)
    names = [f"scan{i:04d}.nii.gz" for i in range(args.num)]
    for name, hu, lesion in zip(names, scans.hu, scans.lesion):
        write_volume(out / name, hu, spacing)
        write_volume(out / "masks" / name, lesion.astype(np.uint8), spacing)
    with open(out / "scans.csv", "w", newline="") as file:
        csv.writer(file).writerows([phantoms_ct.TABLE, *phantoms_ct.rows(scans, names)])
    print(f"{args.num} phantoms: {out}; masks/ (of acute strokes), scans.csv (side, size, number, timing, old strokes)")


def _brains(args: argparse.Namespace, out: Any) -> None:
    import numpy as np
    from PIL import Image

    from jaxstack.medical.brain import brain_set

    size, lesions = args.size[0] if args.size else 64, args.num // 2
    # CT in the brain window, 40 +- 40 HU
    grey = lambda x: np.round(np.clip(x if args.kind == "mri" else x / 80.0, 0.0, 1.0) * 255.0).astype(np.uint8)
    for folder, lesion, count in (("healthy", False, args.num - lesions), ("lesion", True, lesions)):
        (out / folder).mkdir(parents=True, exist_ok=True)
        (out / "masks").mkdir(exist_ok=True)
        if not count:
            continue
        images, masks = brain_set(args.seed, count, size, args.kind, lesion)
        for i, (image, mask) in enumerate(zip(images, masks)):
            Image.fromarray(grey(image)).save(out / folder / f"{folder}{i:04d}.png")
            if lesion:
                Image.fromarray(mask).save(out / "masks" / f"{folder}{i:04d}.png")
    print(f"{args.num} phantoms: {out}; healthy/, lesion/, masks/ (of the lesions)")


def _oct(args: argparse.Namespace, out: Any) -> None:
    import csv

    import numpy as np
    from PIL import Image

    from jaxstack.medical.phantoms_oct import DEVICES, oct_set

    device = DEVICES[args.device or "A"]
    scans = oct_set(args.seed, args.num, device if args.size is None else device._replace(size=tuple(args.size)))
    for folder in ("region", "vessels"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    scales: list[tuple[str, ...]] = [("file", "um_x", "um_y", "fovea_x", "fovea_y")]
    truth: list[tuple[str, ...]] = [("file", "mean_thickness_um", "area_mm2", "cvi")]
    found = zip(scans.thickness_um().mean(-1), scans.area_mm2(), scans.cvi())
    for i, values in enumerate(found):
        name = f"scan{i:04d}.png"
        Image.fromarray(np.round(scans.image[i] * 255.0).astype(np.uint8)).save(out / name)
        Image.fromarray(scans.region[i]).save(out / "region" / name)
        Image.fromarray(scans.vessels[i]).save(out / "vessels" / name)
        scales.append((name, *(f"{v:.6f}" for v in (*scans.scale[i], *scans.fovea[i]))))
        truth.append((name, *(f"{v:.6f}" for v in values)))
    for table, rows in (("scales.csv", scales), ("truth.csv", truth)):
        with open(out / table, "w", newline="") as file:
            csv.writer(file).writerows(rows)
    print(f"{args.num} phantoms: {out}; region/, vessels/, scales.csv (and foveas), truth.csv (of the whole choroid)")


def _uwf(args: argparse.Namespace, out: Any) -> None:
    import csv

    import numpy as np
    from PIL import Image

    from jaxstack.medical.phantoms_uwf import DISEASES, LABELS, aligned, uwf_set

    eyes = uwf_set(args.seed, args.num, tuple(args.size) if args.size else (64, 80))
    (out / "lesions").mkdir(parents=True, exist_ok=True)
    table: list[tuple[Any, ...]] = [("file", "patient", "laterality", *LABELS)]
    # as stored: right eyes are mirrored, their lesions too
    lesions = aligned(np.moveaxis(eyes.lesions, 1, -1), eyes.right)
    for i, image in enumerate(eyes.images):
        name = f"eye{i:04d}.png"
        Image.fromarray(np.concatenate([image, np.zeros_like(image[..., :1])], -1)).save(out / name)
        for k in np.flatnonzero(eyes.labels[i, : len(DISEASES)]):
            Image.fromarray(lesions[i, ..., k]).save(out / "lesions" / f"eye{i:04d}-{DISEASES[k]}.png")
        table.append((name, f"p{eyes.patients[i]:04d}", "R" if eyes.right[i] else "L", *eyes.labels[i].astype(int)))
    with open(out / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows(table)
    print(f"{args.num} phantoms: {out}; lesions/ (a mask for each disease of an eye), labels.csv (patients and labels)")


def _fundus(args: argparse.Namespace, out: Any) -> None:
    import csv

    import jax
    import numpy as np
    from PIL import Image

    from jaxstack.core.errors import UserError
    from jaxstack.medical import dart, phantoms, quickqual

    low, high = args.severity or (0.0, 0.0)
    if not 0.0 <= low <= high <= 1.0:
        raise UserError(f"--severity {low:g} {high:g}: expected 0 <= LOW <= HIGH <= 1")
    images, vessels = phantoms.fundus_set(args.seed, args.num, args.size[0] if args.size else 128)
    values = dart.dimensions(vessels)
    if high > 0:
        images = np.asarray(dart.copies(jax.random.key(args.seed), images, low, high))
    seen = quickqual.vessel_visibility(images, vessels)
    labels = quickqual.quality_labels(seen, seen)
    (out / "vessels").mkdir(parents=True, exist_ok=True)
    traits, quality = [("file", "value", "density")], [("file", "label", "visibility")]
    for i, (image, mask) in enumerate(zip(images, vessels)):
        name = f"eye{i:04d}.png"
        Image.fromarray(image).save(out / name)
        Image.fromarray(mask).save(out / "vessels" / name)
        traits.append((name, f"{values[i]:.6f}", f"{mask.mean():.6f}"))
        quality.append((name, quickqual.CLASSES[labels[i]], f"{seen[i]:.6f}"))
    for table, rows in (("traits.csv", traits), ("labels.csv", quality)):
        with open(out / table, "w", newline="") as file:
            csv.writer(file).writerows(rows)
    print(f"{args.num} phantoms: {out}; vessels/, traits.csv (fractal dimensions of the vessels), labels.csv (quality)")
