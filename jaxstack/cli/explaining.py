"""`jaxstack explain`: where a classifier of aligned images looks, over a whole folder, and whether that is faithful."""

import argparse
from pathlib import Path
from typing import Any

from jaxstack.cli.parsing import Commands, seed, whole

QS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def add_commands(commands: Commands) -> None:
    """Add the command of this file."""
    p = commands.add(
        "explain", _run, "Put explanations of a folder of aligned images together, and test them by erasing pixels."
    )
    p.add_argument("model", metavar="RUN|WEIGHTS", help="of `train uwf-diseases`, or a state dict")
    p.add_argument(
        "--labels",
        metavar="CSV",
        required=True,
        help="columns file, patient, laterality and the eight labels; half of the patients make the maps, the others "
        "the curves",
    )
    p.add_argument(
        "--kind",
        choices=("grad-cam", "gradient-input", "integrated-gradients", "occlusion"),
        default="grad-cam",
        help="explanation of one image (default: grad-cam)",
    )
    p.add_argument(
        "--mode",
        choices=("mean", "median", "trimmed", "contrast"),
        default="mean",
        help="how maps are put together (default: mean)",
    )
    p.add_argument(
        "--overall", choices=("prevalence", "equal", "any"), default="prevalence", help="the map of all labels"
    )
    p.add_argument(
        "--fill",
        choices=("mean", "mean-image", "blur", "noise"),
        default="mean",
        help="what erased pixels become (default: the mean of the channel)",
    )
    p.add_argument("--random", type=whole, default=5, metavar="N", help="random rankings, the control (default: 5)")
    p.add_argument("--seed", type=seed, default=0, help="of the halves, ties and random rankings")
    p.add_argument(
        "--out",
        metavar="DIR",
        required=True,
        help="maps.npz, maps.png, curves.csv, curves.png, summary.csv, results.csv (what each image was for), run.yaml",
    )


def _run(args: argparse.Namespace, _: list[str]) -> int:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import pandas as pd

    from jaxstack.cli import folders
    from jaxstack.cli.screening import networks
    from jaxstack.core.errors import UserError
    from jaxstack.medical import global_maps, peppr, uwf, uwf_data
    from jaxstack.medical.explain import explainer
    from jaxstack.medical.multilabel import stratified_patient_split
    from jaxstack.medical.phantoms_uwf import LABELS, aligned
    from jaxstack.report import plots

    if args.random < 1:
        raise UserError(f"--random {args.random}: expected at least 1")
    folders.check_out(Path(args.out), args.out, False)
    try:
        network, weights, size, _, facts = networks(args.model)
    except UserError as e:
        raise UserError(str(e).removeprefix("--model ")) from None
    rows, skipped, found = uwf_data.read_labels(args.labels), [], []
    for row in rows:
        try:
            found.append((row, uwf_data.read_uwf(row.path, size)))
        except UserError as e:
            print(f"{e}, skipped")
            skipped.append((row.path, str(e).removeprefix(f"{row.path}: ")))
    if len({row.patient for row, _ in found}) < 2:
        raise UserError(f"--labels {args.labels}: found images of less than 2 patients, expected both halves")
    labels = np.array([row.labels for row, _ in found], bool)
    right, patients = np.array([row.right for row, _ in found]), np.array([row.patient for row, _ in found])
    images = aligned(np.stack([image for _, image in found]), right).astype(np.float32) / 255.0
    second = stratified_patient_split(patients, labels[:, :-1], (0.5, 0.5), args.seed) == 1
    parts, key = uwf.parts_of(network), jax.random.key(args.seed)
    scaled = jax.vmap(lambda own, x: (x - own["pixels"]["mean"]) / own["pixels"]["std"], in_axes=(0, None))
    own = explainer(args.kind, parts)

    def explain(given: Any, image: Any, label: Any) -> Any:
        """The mean over the seeds of a run; zero is the mean of the pixels."""
        return jax.vmap(lambda w, x: own(w, x, label))(given, scaled(given, image)).mean(0)

    def predict(given: Any, x: Any) -> Any:
        return jax.vmap(parts.predict)(given, scaled(given, x)).mean(0)

    overall: Any = len(LABELS) - 1 if args.overall == "any" else args.overall
    x, y = images[~second], labels[~second]
    batches = [(x[i : i + 50], y[i : i + 50]) for i in range(0, len(x), 50)]
    maps = global_maps.aggregate(explain, weights, batches, args.mode, overall)
    tested, truth = jnp.asarray(images[second]), labels[second]
    fill = peppr.fill_of(args.fill, tested, jnp.asarray(x), key)
    ranks = global_maps.pixel_ranks(jnp.asarray(maps.overall), key)
    rankings = {"map": [ranks], "inverse": [global_maps.inverse(ranks)]}
    centre = global_maps.centre_importance(size)
    rankings |= {"distance to the centre": [global_maps.pixel_ranks(jnp.asarray(centre), key)]}
    rankings |= {"random": peppr.random_ranks(size, args.random, key)}
    metrics = {"any-auc": peppr.label_auc(len(LABELS) - 1), **peppr.METRICS}
    curves: dict[tuple[str, str], Any] = {}
    for name, several in rankings.items():
        logits = [peppr.logits_at(predict, weights, tested, r, QS, fill) for r in several]
        for metric, f in metrics.items():
            curves[name, metric] = peppr.mean_curves([peppr.curves_of(z, truth, f, QS) for z in logits])
    chosen = {k: getattr(args, k) for k in ("kind", "mode", "overall", "fill", "random", "seed")}
    options = chosen | {"labels": Path(args.labels).name, "model": facts}
    session = folders.begun(args.out, options, "explain", False, ("",))
    out = session.out
    part = {row.path: "curves" if late else "maps" for (row, _), late in zip(found, second)}
    files = [{"file": str(p), "status": "ok", "reason": "", "part": name} for p, name in part.items()]
    files += [{"file": str(p), "status": "skipped", "reason": why, "part": ""} for p, why in skipped]
    pd.DataFrame(files).to_csv(out / "results.csv", index=False)
    lines = [
        {"ranking": name, "metric": metric, "share": q, "erased": e, "restored": r}
        for (name, metric), c in curves.items()
        for q, e, r in zip(c.qs, c.erase, c.restore)
    ]
    pd.DataFrame(lines).to_csv(out / "curves.csv", index=False)
    summary = [
        {"ranking": name, "metric": metric, **peppr.peppr_summary(c, curves["random", metric])._asdict()}
        for (name, metric), c in curves.items()
    ]
    pd.DataFrame(summary).to_csv(out / "summary.csv", index=False)
    arrays: dict[str, Any] = maps._asdict()
    np.savez(out / "maps.npz", labels=np.array(LABELS), **arrays)
    pictures = {**dict(zip(LABELS, maps.label_maps)), "all": maps.overall}
    plots.image_panels(pictures, out / "maps.png", x.mean((0, 3)))
    of = lambda metric, end: {name: (QS, [getattr(curves[name, metric], end)]) for name in rankings}
    panels = [
        (f"{side} pixels", metric, "share of pixels", "linear", of(metric, end))
        for metric in ("any-auc", "macro-auc")
        for side, end in (("erased", "erase"), ("restored", "restore"))
    ]
    plots.curve_panels(panels, out / "curves.png")
    first = next(s for s in summary if s["ranking"] == "map" and s["metric"] == "macro-auc")
    none = int(maps.skipped.sum())
    print(
        f"{len(x)} images for maps ({none} zero maps skipped), {len(truth)} for curves, {len(skipped)} skipped; PEPPR "
        f"of macro-auc {first['peppr']:.3f}, {first['above_random']:+.3f} to random: {out}"
    )
    session.store(status="finished", files=len(files), measured=len(found))
    return 0
