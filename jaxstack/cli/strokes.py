"""`jaxstack detect-stroke`: CT scans of the head in, a table with presence and side of strokes out. Not a medical
device."""

import argparse
from typing import Any

from jaxstack.cli.parsing import Commands, real


def add_commands(commands: Commands) -> None:
    """Add the command of this file."""
    p = commands.add(
        "detect-stroke", _detect, "Find acute strokes and their sides in CT scans of the head, a row each."
    )
    p.add_argument(
        "paths", metavar="PATH", nargs="+", help="NIfTI files, folders of a DICOM series, or folders of both"
    )
    p.add_argument("--model", metavar="RUN", required=True, help="a run of `jaxstack train stroke-ct`")
    p.add_argument("--threshold", type=real, default=0.5, help="of a side's probability, 0-1 (default: 0.5)")
    p.add_argument(
        "--labels", metavar="CSV", help="the truth, as scans.csv in training: accuracy by subgroup is written, too"
    )
    p.add_argument("--out", metavar="DIR", required=True, help="results.csv, overlays/, run.yaml")
    p.add_argument("--resume", action="store_true", help="continue in DIR; scans with a row are not measured again")


def _detect(args: argparse.Namespace, _: list[str]) -> int:
    from pathlib import Path

    import jax
    import numpy as np

    from jaxstack.cli import folders, runs
    from jaxstack.core.errors import UserError
    from jaxstack.medical import stroke_ct, stroke_data
    from jaxstack.medical.head_ct import prepare
    from jaxstack.medical.phantoms_ct import SIDES
    from jaxstack.medical.volumes import read_volume, scan_paths
    from jaxstack.nn.supervised import variables

    if not 0.0 < args.threshold < 1.0:
        raise UserError(f"--threshold {args.threshold:g}: expected more than 0 and less than 1")
    folders.check_out(Path(args.out), args.out, args.resume)
    truth = None if args.labels is None else stroke_data.read_scans_table(Path(args.labels))
    learner, state = runs.trained(args.model, "stroke-ct", stroke_ct.Config)
    config = learner.config
    predict = jax.jit(jax.vmap(learner.predict, in_axes=(0, None)))
    files = scan_paths(args.paths)
    facts = folders.model_facts("run", Path(args.model), variables(state), config.widths, len(state.step))
    options = {"threshold": args.threshold, "model": facts}
    session = folders.begun(args.out, options, "detect-stroke", args.resume)
    known, out = session.known, session.out
    names = dict(zip(files, folders.names(files)))
    decisions = {path: SIDES.index(known[str(path)]["decision"]) for path in files if str(path) in known}

    def measure(path: Path) -> dict[str, Any]:
        volume = read_volume(path)
        try:
            found = prepare(volume, config.slices, config.size, config.view_mm)
        except UserError as e:
            raise UserError(f"{path}: {e}") from e
        logits = np.asarray(predict(state, found.halves[None]))[:, 0]
        sides = np.asarray(stroke_ct.side_probabilities(logits))
        # the mean over seeds, as logits, so that the rule of the decision is the same
        mean = logits.mean(0)
        decision = decisions[path] = int(stroke_ct.scan_decision(mean, args.threshold))
        left, right, present = np.asarray(stroke_ct.side_probabilities(mean))
        _overlay(found.halves, decision).save(out / "overlays" / f"{names[path]}.png")
        row = {"decision": SIDES[decision], "p_left": f"{left:.6f}", "p_right": f"{right:.6f}"}
        row |= {"p_any": f"{present:.6f}", "deviation_over_seeds": f"{sides[:, 2].std():.6f}", "seeds": len(logits)}
        row |= {"slices": len(volume.hu), "gap_mm": f"{volume.spacing[0]:.3f}"}
        row |= {"pixel_mm": f"{volume.spacing[2]:.4f}", "tilt_degrees": f"{found.line.tilt:.2f}"}
        row |= {"brain_cm3": f"{_litres(found.mask, volume.spacing, found.slices):.0f}", "source": volume.source}
        return row | {"model": facts["sha256"]}

    code = folders.write_table(files, session, measure, "; overlays/, run.yaml")
    if truth is not None:
        _audit(decisions, truth, Path(str(args.labels)), out)
    return code


def _litres(mask: Any, spacing: tuple[float, float, float], slices: list[int]) -> float:
    """Volume of the brain in the chosen slices and between them, cm^3."""
    step = slices[1] - slices[0] if len(slices) > 1 else 1
    return float(mask.sum()) * spacing[0] * step * spacing[1] * spacing[2] / 1000.0


def _overlay(halves: Any, decision: int) -> Any:
    """The slices side by side, straightened, the patient's left at the left; a bar above each half with a lesion."""
    import numpy as np
    from PIL import Image

    t, size, half = halves.shape[1:]
    larger = max(1, 128 // size)
    bar = 4
    picture = np.zeros((size * larger + bar, t * size * larger, 3), np.uint8)
    for i in range(t):
        whole = np.concatenate([halves[0, i], halves[1, i, :, ::-1]], 1)
        grey = np.repeat(np.repeat(whole, larger, 0), larger, 1)
        at = i * size * larger
        picture[bar:, at : at + size * larger] = grey[..., None]
        middle = at + half * larger
        picture[bar::4, middle] = (250, 220, 60)
        for side, start in ((1, at), (2, middle)):
            if decision & side:
                picture[:bar, start + 2 : start + half * larger - 2] = (230, 60, 60)
    return Image.fromarray(picture)


def _audit(decisions: Any, truth: Any, labels: Any, out: Any) -> None:
    """Write subgroups.csv and cross.csv of the scans that have a row in the table."""
    import numpy as np

    from jaxstack.medical.audit import cross_table, subgroup_report
    from jaxstack.medical.stroke_data import SIDE, labelled

    folder = labels.resolve().parent
    rows = {(folder / row["file"]).resolve(): row for row in truth}
    known = [path for path in decisions if path.resolve() in rows]
    lost = len(rows) - len(known)
    if lost or len(known) < len(decisions):
        print(f"{labels}: {lost} rows without a scan, {len(decisions) - len(known)} scans without a row")
    if not known:
        return
    table, patients, factors = labelled([rows[path.resolve()] for path in known], str(labels))
    found, side = np.array([decisions[path] for path in known]), table[:, SIDE]
    report = subgroup_report(found, side, factors, patients)
    report.to_csv(out / "subgroups.csv", index=False)
    text = f"presence and side right in {report.accuracy[0]:.1%} of {report.scans[0]} scans"
    print(f"{text} (always none or the most frequent side: {report.majority[0]:.1%}): {out / 'subgroups.csv'}")
    pair = [name for name in ("size", "timing", "old", "number") if name in factors][:2]
    if len(pair) == 2:
        cross_table(found, side, factors, pair).to_csv(out / "cross.csv", index=False)
