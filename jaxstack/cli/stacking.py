"""`jaxstack dlas`: which compression is worth its accuracy on this machine."""

import argparse

from jaxstack.cli.parsing import Commands, real, seed, whole

COMPRESSIONS = ("weights", "channels", "float16", "bfloat16", "int8")
PRIMITIVES = ("xla", "direct", "gemm", "spatial-pack")


def add_commands(commands: Commands) -> None:
    """Add the commands of this file."""
    p = commands.add(
        "dlas",
        _dlas,
        "Train small networks, compress them, and time them in several forms beside the dense network. The same "
        "command continues where it was stopped.",
    )
    p.add_argument(
        "--models", nargs="+", default=["vgg-small", "resnet-8"], metavar="NAME", help="as of the classifier"
    )
    p.add_argument("--levels", nargs="+", type=real, default=[0.5, 0.9], help="shares of weights and channels removed")
    p.add_argument("--compressions", nargs="*", default=list(COMPRESSIONS), choices=COMPRESSIONS)
    p.add_argument("--primitives", nargs="+", default=list(PRIMITIVES), choices=PRIMITIVES, help="of the dense network")
    p.add_argument("--devices", nargs="+", default=["cpu"], metavar="DEVICE", help="cpu, or cpu-N for N of its cores")
    p.add_argument("--data", default="digits", metavar="NAME[=PATH]", help="digits, mnist-5k or fashion-mnist")
    p.add_argument("--size", type=whole, default=0, help="pixels on a side in training; default: the data's")
    p.add_argument("--time-size", type=whole, default=0, help="pixels on a side of what is timed; default: the same")
    p.add_argument("--train-images", type=whole, default=0, help="default: all")
    p.add_argument("--test-images", type=whole, default=0, help="of validation and test part each; default: all")
    p.add_argument("--updates", type=whole, default=1000, help="of the dense network")
    p.add_argument("--tune-updates", type=whole, default=250, help="of every compression, and of the dense network")
    p.add_argument("--batch-size", type=whole, default=64)
    p.add_argument("--calibration", type=whole, default=512, help="training images for the scales of int8")
    p.add_argument("--trials", type=whole, default=12, help="of the search for each layer's shape")
    p.add_argument("--repeats", type=whole, default=5, help="of each measurement")
    p.add_argument("--tolerance", type=real, default=0.01, help="accuracy that a compression may lose")
    p.add_argument("--seed", type=seed, default=0)
    p.add_argument("--out", required=True, metavar="DIR", help="results.jsonl, results.csv and stack.png")


def _dlas(args: argparse.Namespace, _: list[str]) -> None:
    from pathlib import Path

    import pandas as pd

    from jaxstack.core.errors import UserError
    from jaxstack.report import plots, stats
    from jaxstack.vision import dlas

    fields = ("size", "time_size", "train_images", "test_images", "updates", "tune_updates", "batch_size")
    shared = {name: getattr(args, name) for name in (*fields, "calibration", "trials", "repeats", "seed")}
    if args.tolerance < 0:
        raise UserError(f"--tolerance {args.tolerance:g}: expected 0 or more")
    grid = (args.models, args.levels, args.compressions, args.primitives, args.devices)
    points = dlas.grid(*grid, dataset=args.data, **shared)
    for point in points:
        dlas.data(point)  # refuses before anything is trained
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {out}: cannot be made ({e.strerror})") from e
    path = out / "results.jsonl"
    print(f"{len(points)} points: {path}")
    print(f"{'model':<16} {'point':<34} {'accuracy':>8} {'bytes':>9} {'M MACs':>7} {'ms':>8} {'expected':>8}  computed")

    def tell(c: dlas.StackConfig, r: dlas.StackResult) -> None:
        form = "tuned" if c.tuned else c.sparse or c.primitive
        level = f" {c.level:.4g}" if c.level else ""
        name = f"{c.compression}{level}, {form}{'' if c.device == 'cpu' else ', ' + c.device}"
        times = f"{1e3 * r.t_median:>8.3f} {1e3 * r.t_expected:>8.3f}"
        numbers = f"{r.accuracy:>8.2%} {r.bytes:>9,} {r.macs / 1e6:>7.3g} {times}"
        print(f"{c.model:<16} {name:<34} {numbers}  {' '.join(r.computed)}", flush=True)

    results = dlas.run_grid(points, path, tell)
    rows = dlas.table(results)
    pd.DataFrame(rows).to_csv(out / "results.csv", index=False)
    params, ms, accuracy = ([row[name] for row in rows] for name in ("params", "t_median", "accuracy"))
    axes = ("parameters", "ms per image")
    plots.scatter(params, ms, accuracy, out / "stack.png", axes, "accuracy", (True, True), points="network in a form")
    if len(rows) >= 4 and len({*params}) > 1:
        print(f"rank correlation of parameters and time over all points: {stats.spearman(params, ms)}")
    print(f"largest compression within {100 * args.tolerance:g} points of the dense network (validation images):")
    for (model, kind), point in dlas.operating_points(results, args.tolerance).items():
        r = results[point]
        form = "tuned" if point.tuned else point.sparse or point.primitive
        saved = f"{r.bytes:,} bytes, {r.t_dense / r.t_median:.2f} times as fast as the dense network"
        print(f"  {model}: {kind}{f' {point.level:.4g}' if point.level else ''}, {form}: {saved}")
    print(f"results: {path}, {out / 'results.csv'}, {out / 'stack.png'}")
