"""Train random cells of NAS-Bench-201 at small size and write their accuracies: `jaxstack/vision/cells.json`.

    python scripts/nas_table.py --data fashion-mnist --cells 60

8 channels, a cell per stage, 16x16 pixels, 4,000 training images, three epochs; test accuracy on 2,000 others. Cells
are appended as they come, so the command continues where it was stopped.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxstack.core import cache
from jaxstack.data import images
from jaxstack.vision import naswot

OUT = Path(__file__).parents[1] / "jaxstack/vision/cells.json"
SKELETON = naswot.Skeleton(channels=8, cells=1, image=16, inputs=1)
HOW = naswot.Training()
TRAIN, TEST = 4000, 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist", metavar="NAME[=PATH]")
    parser.add_argument("--cells", type=int, default=60)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    cache.enable()
    facts = {
        "data": args.data.partition("=")[0],
        "train_images": TRAIN,
        "test_images": TEST,
        "skeleton": SKELETON._asdict(),
        "training": HOW._asdict(),
    }
    table = json.loads(args.out.read_text()) if args.out.exists() else facts | {"cells": []}
    if {k: table[k] for k in facts} != facts:
        raise SystemExit(f"{args.out}: was made with other settings; remove it first")
    parts = [images.load(args.data, split) for split in ("train", "test")]
    train, test = (
        (jnp.asarray(images.normalised(images.resized(x[:n], SKELETON.image))), jnp.asarray(y[:n]))
        for (x, y), n in zip(parts, (TRAIN, TEST))
    )
    run = jax.jit(lambda key, cell: naswot.train_cell(key, cell, train, test, SKELETON, HOW))
    drawn = np.asarray(naswot.sample_cells(jax.random.key(0), args.cells))
    for n in range(len(table["cells"]), args.cells):
        accuracy = float(run(jax.random.key(n), jnp.asarray(drawn[n])))
        table["cells"].append({"cell": naswot.decode_cell(drawn[n]), "accuracy": round(accuracy, 4)})
        args.out.write_text(json.dumps(table, indent=1) + "\n")
        print(f"{n + 1}/{args.cells} {accuracy:.3f} {naswot.decode_cell(drawn[n])}", flush=True)


if __name__ == "__main__":
    main()
