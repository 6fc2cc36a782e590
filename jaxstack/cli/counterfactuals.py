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
    import pandas as pd
    from PIL import Image

    from jaxstack.cli import runs
    from jaxstack.core import runner
    from jaxstack.core.errors import UserError
    from jaxstack.medical.diffusion_counterfactual import read_grey
    from jaxstack.medical.io import image_files

    if not 0.0 < args.threshold < 1.0:
        raise UserError(f"--threshold {args.threshold:g}: expected more than 0 and less than 1")
    learner, plan = runs.load(args.model)
    if learner.name != "diffusion-counterfactual":
        raise UserError(f"--model {args.model}: found a run of {learner.name}, expected diffusion-counterfactual")
    if len({*plan.get("settings", [0])}) > 1:
        raise UserError(f"--model {args.model}: found a sweep of several settings, expected a run of one")
    state, alive = runner.stored(learner, args.model)
    state = jax.tree.map(lambda x: x[np.flatnonzero(alive)], state)
    explain = jax.jit(jax.vmap(learner.predict, in_axes=(0, None)))
    files, size, out = image_files(args.paths), learner.config.size, Path(args.out)
    for folder in ("healthy", "anomaly", "overlays"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    grey = lambda x: np.round(np.clip(x, 0.0, 1.0) * 255.0).astype(np.uint8)
    rows: list[dict[str, Any]] = []
    names: set[str] = set()
    for path in files:
        row: dict[str, Any] = {"file": str(path), "status": "ok", "reason": ""}
        try:
            image = read_grey(path, size)
            if path.stem in names:
                raise UserError(f"{path}: another file has the name {path.stem} too")
            names.add(path.stem)
            # the mean over seeds
            found = jax.tree.map(lambda x: np.asarray(x)[:, 0].mean(0), explain(state, image[None, ..., None]))
            healthy, above = found.counterfactual[..., 0], found.anomaly > args.threshold
            row |= {"p_lesion": f"{found.lesion:.6f}", "anomaly_max": f"{found.anomaly.max():.6f}"}
            row |= {"anomaly_px": int(above.sum()), "anomaly_share": f"{above.mean():.6f}", "side_px": size}
            picture = np.repeat(grey(image)[..., None], 3, 2)
            picture[above] = picture[above] // 2 + np.array([127, 0, 0], np.uint8)
            for folder, pixels in (("healthy", grey(healthy)), ("anomaly", grey(found.anomaly)), ("overlays", picture)):
                Image.fromarray(pixels).save(out / folder / f"{path.stem}.png")
        except UserError as e:
            row |= {"status": "skipped", "reason": str(e).removeprefix(f"{path}: ")}
            print(f"{path}: {row['reason']}, skipped")
        rows.append(row)
    pd.DataFrame(rows).to_csv(out / "results.csv", index=False)
    good = sum(row["status"] == "ok" for row in rows)
    print(f"{good} of {len(files)} files: {out / 'results.csv'}; healthy/, anomaly/, overlays/")
    return 0 if good else 2
