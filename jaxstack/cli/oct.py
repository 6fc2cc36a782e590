"""`jaxstack analyse-oct`: a folder of OCT B-scans in, a table and pictures out. Not a medical device."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from jaxstack.cli import folders
from jaxstack.cli.parsing import Commands, real, whole

MEASURES = ("thickness_left_um", "thickness_fovea_um", "thickness_right_um", "thickness_mean_um", "area_mm2")
COLUMNS = (
    *("file", "status", "reason", "flags", *MEASURES, "cvi", "cvi_of", "vessel_area_mm2"),
    *("fovea_x", "fovea_y", "fovea_score", "fovea_source", "um_x", "um_y", "scale_source"),
    *("thickness_px", "region_px", "vessel_px", "width_px", "height_px", "laterality", "model", "overlay"),
)
WINDOW = 4
"""Batches of scans that are read ahead."""
READERS = 2


def add_commands(commands: Commands) -> None:
    """Add the commands of this file."""
    p = commands.add(
        "analyse-oct", _analyse, "Measure the choroid in OCT B-scans: thickness, area, vascularity index, a row each."
    )
    p.add_argument(
        "paths",
        metavar="PATH",
        nargs="+",
        help="B-scans (PNG, JPEG, TIFF, BMP, DICOM, Heidelberg's .vol and .e2e), or folders of them",
    )
    p.add_argument(
        "--model",
        metavar="RUN|WEIGHTS",
        required=True,
        help="of `train choroidalyzer` or `train reachnet`, or a state dict",
    )
    p.add_argument("--out", metavar="DIR", required=True, help="results.csv, overlays/, run.yaml")
    p.add_argument("--scale-um", type=real, nargs=2, metavar=("X", "Y"), help="micrometres per pixel, across and down")
    p.add_argument("--scales", metavar="CSV", help="columns file, um_x, um_y and, optionally, fovea_x, fovea_y")
    p.add_argument("--require-scale", action="store_true", help="skip scans without a scale")
    p.add_argument(
        "--roi-um", type=real, default=3000.0, metavar="R", help="measure R to both sides of the fovea (3000)"
    )
    fovea = "auto: of --scales where it has one, else the network's; centre: the middle of the choroid"
    p.add_argument("--fovea", choices=("auto", "network", "centre"), default="auto", help=fovea)
    p.add_argument("--batch", type=whole, default=8, help="scans per call of the network (8)")
    p.add_argument(
        "--resume", action="store_true", help="continue in DIR; scans that have a row are not measured again"
    )


class Net(NamedTuple):
    """A trained network."""

    probabilities: Callable[[Any], Any]
    """Scans [B, H, W] float in 0..1 -> [B, H, W, 3]."""
    size: tuple[int, int] | None
    """Rows and columns that scans are resized to for it; None: none, they are padded."""
    multiple: int
    """Of rows and columns, that are padded to."""
    filters: tuple[int, int]
    """Of the fovea's signals."""
    facts: dict[str, Any]


def _net(given: str) -> Net:
    """The network of a run, the mean over its seeds, or of a file of weights. Raises `UserError`."""
    import jax

    from jaxstack.cli import runs
    from jaxstack.core.errors import UserError
    from jaxstack.medical import oct_networks
    from jaxstack.nn import supervised

    path = Path(given)
    if not path.exists():
        raise UserError(
            f"--model {given}: not found, expected a run of `jaxstack train choroidalyzer` or reachnet, or weights"
        )
    if path.is_file():
        network, variables = oct_networks.load_weights(path)
        facts = folders.model_facts("weights", path, variables, network.widths, 1)
        probabilities = lambda x: oct_networks.predict(network, variables, x)
        return Net(probabilities, None, network.multiple, oct_networks.FILTERS, facts)
    learner, state = runs.trained(given, "choroidalyzer or reachnet", oct_networks.ScanConfig)
    predict: Any = jax.vmap(learner.predict, in_axes=(0, None))
    config = learner.config
    network, seeds = config.network, len(state.step)
    facts = folders.model_facts("run", path, supervised.variables(state), network.widths, seeds)
    probabilities = lambda x: predict(state, x).mean(0)
    return Net(probabilities, config.size, network.multiple, config.fovea_filter, facts)


def _analyse(args: argparse.Namespace, _: list[str]) -> int:
    import pandas as pd

    from jaxstack.core.errors import UserError
    from jaxstack.core.files import write_whole
    from jaxstack.medical import io

    if args.scale_um is not None and args.scales is not None:
        raise UserError("--scale-um, --scales: expected at most one of them")
    flag = None if args.scale_um is None else io.checked_scale(*args.scale_um, where="--scale-um")
    if not 0 < args.roi_um < 1e5:
        raise UserError(f"--roi-um {args.roi_um:g}: expected micrometres, 0 to 100,000")
    if args.batch < 1:
        raise UserError(f"--batch {args.batch}: expected at least 1")
    out = Path(args.out)
    folders.check_out(out, args.out, args.resume)
    table = {} if args.scales is None else io.read_scales(args.scales)
    files = io.scan_items(args.paths)
    net = _net(args.model)
    options = {"roi_um": args.roi_um, "scale_um": flag and list(flag), "fovea": args.fovea}
    options |= {"scales": args.scales and Path(args.scales).name, "require_scale": args.require_scale}
    options |= {"model": net.facts}
    session = folders.begun(args.out, options, "analyse-oct", args.resume, columns=COLUMNS)
    places = {str(p): name for p, name in zip(files, folders.names(files))}
    known = {str(p): _row_of(p, table, args.scales) for p in files}
    folders.lost_rows(args.scales, sorted(set(table) - {key for key, _ in known.values()}))
    rows = dict(session.known)
    left = [p for p in files if str(p) not in rows]
    work = _Work(net, args, flag, {p: row for p, (_, row) in known.items()}, out, places)

    def save() -> None:
        frame = pd.DataFrame([rows[str(p)] for p in files if str(p) in rows], columns=list(COLUMNS))
        write_whole(out / "results.csv", frame.to_csv(index=False))

    for found in _windows(work, left):
        rows |= found
        save()
    save()
    good = sum(rows[str(p)]["status"] == "ok" for p in files)
    session.store(status="finished", scans=len(files), measured=good)
    folders.parquet(out)
    print(f"{good} of {len(files)} files: {out / 'results.csv'}")
    return 0 if good else 2


def _row_of(path: Path, table: dict[str, Any], where: str | None) -> tuple[str | None, Any]:
    """(name in the table, its row) of a file: by the path from the table's folder, else by the name alone; of an image
    of a file with several by its own name, else by the file's."""
    from jaxstack.medical import io

    if where is None:
        return None, None
    folder = Path(where).resolve().parent
    names = []
    for each in dict.fromkeys((path, io.frame_of(path)[0])):
        full = each.resolve()
        names += [full.relative_to(folder).as_posix()] if full.is_relative_to(folder) else []
        names.append(each.name)
    return next(((name, table[name]) for name in names if name in table), (None, None))


class _Work(NamedTuple):
    net: Net
    args: argparse.Namespace
    flag: tuple[float, float] | None
    table: dict[str, Any]
    out: Path
    names: dict[str, str]


def _windows(work: _Work, files: Sequence[Path]) -> Iterator[dict[str, dict[str, Any]]]:
    """Rows by file, a few batches at a time; the next scans are read while the network works on the last."""
    step = WINDOW * work.args.batch
    parts = [files[i : i + step] for i in range(0, len(files), step)]
    run = _program(work.net)
    with ThreadPoolExecutor(READERS) as pool, folders.progress("scans", len(files)) as advance:
        submit = lambda part: [(p, pool.submit(_read, p, work)) for p in part]
        waiting = submit(parts[0]) if parts else []
        for i in range(len(parts)):
            now, waiting = waiting, submit(parts[i + 1]) if i + 1 < len(parts) else []
            yield _window(work, run, now, pool)
            advance(len(now))


def _read(path: Path, work: _Work) -> Any:
    """(scan, its scale and where it comes from, the image as the network is given it)."""
    from jaxstack.core.errors import UserError
    from jaxstack.medical import io

    scan = io.read_scan(path)
    row = work.table.get(str(path))
    given = ((row and row.scale, "table"), (work.flag, "flag"), (scan.scale, "file"))
    scale, source = next(((s, name) for s, name in given if s is not None), (None, ""))
    if source == "file":
        scale = io.checked_scale(*scale, where=f"{path}: pixel spacing")  # pyright: ignore[reportOptionalIterable]
    if scale is None and work.args.require_scale:
        raise UserError(f"{path}: no scale in --scales, --scale-um or the file")
    return scan, (scale, source), scan.image if work.net.size is None else io.resized(scan.image, work.net.size)


def _program(net: Net) -> Callable[..., Any]:
    """(scans [B, H, W], rows and columns of each before padding [B, 2]) -> (probabilities [B, H, W, 3], foveas),
    compiled once for each shape."""
    import jax
    import jax.numpy as jnp

    from jaxstack.medical.oct_networks import FOVEA, fovea_from_prob

    def run(x: Any, sizes: Any) -> Any:
        p = net.probabilities(x)
        columns, rows = (min(k, 2 * n - 1) for k, n in zip(net.filters, (x.shape[2], x.shape[1])))
        down, across = (jnp.arange(n) < sizes[:, i, None] for i, n in enumerate(x.shape[1:]))
        inside = down[:, :, None] & across[:, None]
        return p, jax.vmap(lambda one: fovea_from_prob(one, columns, rows))(jnp.where(inside, p[..., FOVEA], 0.0))

    return jax.jit(run)


def _window(
    work: _Work, run: Callable[..., Any], reads: Sequence[tuple[Path, Future[Any]]], pool: ThreadPoolExecutor
) -> dict[str, dict[str, Any]]:
    import jax
    import numpy as np

    from jaxstack.core.errors import UserError

    rows: dict[str, dict[str, Any]] = {}
    shapes: dict[tuple[int, ...], list[tuple[Path, Any]]] = {}
    for path, future in reads:
        try:
            found = future.result()
        except UserError as e:
            reason = str(e).removeprefix(f"{path}: ")
            rows[str(path)] = dict.fromkeys(COLUMNS, "") | {"file": str(path), "status": "skipped", "reason": reason}
            print(f"{path}: {reason}, skipped")
            continue
        padded = tuple(n + -n % work.net.multiple for n in found[2].shape)
        shapes.setdefault(padded, []).append((path, found))
    writes = []
    for padded, items in shapes.items():
        for start in range(0, len(items), work.args.batch):
            part = items[start : start + work.args.batch]
            # grey, which is what is padded with inside the network
            images = np.full((work.args.batch, *padded), 0.5, np.float32)
            sizes = np.ones((work.args.batch, 2), np.int32)
            for i, (_, (_, _, x)) in enumerate(part):
                images[i, : x.shape[0], : x.shape[1]], sizes[i] = x, x.shape
            p, foveas = jax.device_get(run(images, sizes))
            for i, (path, (scan, scale, x)) in enumerate(part):
                own = p[i, : x.shape[0], : x.shape[1]]
                fovea = tuple(float(v[i]) for v in foveas)
                row, picture = _measured(work, path, scan, scale, own, fovea)
                rows[str(path)] = row
                writes.append(pool.submit(folders.save_picture, picture, work.out / row["overlay"]))
    for write in writes:
        write.result()
    return rows


def _measured(
    work: _Work, path: Path, scan: Any, scaled: Any, p: Any, fovea: tuple[float, ...]
) -> tuple[dict[str, Any], Any]:
    """The row and the overlay of a scan from its probabilities [h, w, 3] and (x, y, score) of the fovea there."""
    import numpy as np

    from jaxstack.medical import choroid, choroidalyzer, io, overlays

    (height, width), (scale, source), flags = scan.image.shape, scaled, []
    if p.shape[:2] != scan.image.shape:
        x, y = ((fovea[i] + 0.5) * n / m - 0.5 for i, (n, m) in enumerate(((width, p.shape[1]), (height, p.shape[0]))))
        fovea = (x, y, fovea[2])
        p = np.stack([io.resized(np.ascontiguousarray(p[..., i]), (height, width)) for i in range(2)], -1)
    mask, vessel = (p[..., i] >= choroidalyzer.THRESHOLDS[i] for i in range(2))
    region = choroid.largest_component(mask)
    if not region.any():
        flags.append("no_region")
    elif region.sum() < 0.9 * mask.sum():
        flags.append("region_split")
    at, whence = _fovea(work, path, fovea, (height, width), flags)
    columns = np.flatnonzero(region.any(0))
    if at is not None and len(columns) and not columns[0] <= at[0] <= columns[-1]:
        flags.append("fovea_off_region")
    pixels, vessels = int(region.sum()), int((region & vessel).sum())
    if pixels and not vessels:
        flags.append("no_vessels")
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "") | {"file": str(path), "status": "ok", "scale_source": source}
    row |= {"fovea_score": f"{fovea[2]:.4f}", "fovea_source": whence}
    if at is not None:
        row |= {"fovea_x": f"{at[0]:.1f}", "fovea_y": f"{at[1]:.1f}"}
    row |= {"thickness_px": f"{pixels / max(len(columns), 1):.2f}", "region_px": pixels, "vessel_px": vessels}
    row |= {"width_px": width, "height_px": height, "laterality": scan.laterality, "model": work.net.facts["sha256"]}
    row["overlay"] = f"overlays/{work.names[str(path)]}.png"
    found = None
    if scale is None:
        flags.append("no_scale")
        row |= {"reason": "no scale: give --scale-um or --scales", "cvi_of": "region"}
        row["cvi"] = f"{vessels / max(pixels, 1):.5f}"
    else:
        at_or_nan = (np.nan, np.nan) if at is None else at
        found = choroidalyzer.measured(
            region, vessel, np.asarray(at_or_nan, np.float32), np.asarray(scale, np.float32), work.args.roi_um
        )
        if pixels and not found.ok:
            flags.append("region_too_short")
        thickness = [float(t) for t in found.thickness_um]
        if not np.isfinite(thickness).all():
            flags.append("thickness_missing")
        known = [t for t in thickness if np.isfinite(t)]
        values = [*thickness, float(np.mean(known)) if known else np.nan]
        row |= {name: f"{v:.1f}" if np.isfinite(v) else "" for name, v in zip(MEASURES, values)}
        row |= {"area_mm2": f"{float(found.area_mm2):.6f}", "vessel_area_mm2": f"{float(found.vessel_area_mm2):.6f}"}
        row |= {"cvi": f"{float(found.cvi):.5f}", "cvi_of": "window", "um_x": f"{scale[0]:g}", "um_y": f"{scale[1]:g}"}
    row["flags"] = " ".join(flags)
    return row, overlays.overlay(scan.image, region, vessel, at, *overlays.points(found))


def _fovea(
    work: _Work, path: Path, fovea: tuple[float, ...], shape: tuple[int, int], flags: list[str]
) -> tuple[tuple[float, float] | None, str]:
    """(x, y) or None for the middle of the choroid, and where it comes from; adds to `flags`."""
    from jaxstack.medical import choroidalyzer

    if work.args.fovea == "centre":
        return None, "centre"
    row = work.table.get(str(path))
    if work.args.fovea == "auto" and row is not None and row.fovea is not None:
        if 0 <= row.fovea[0] < shape[1] and 0 <= row.fovea[1] < shape[0]:
            return row.fovea, "table"
        flags.append("fovea_outside")
    if fovea[2] >= choroidalyzer.THRESHOLDS[choroidalyzer.FOVEA]:
        return (fovea[0], fovea[1]), "network"
    flags.append("fovea_not_found")
    return None, "centre"
