"""`jaxstack architectures`: cells of NAS-Bench-201 scored without training."""

import argparse

from jaxstack.cli.parsing import Commands, seed, whole


def add_commands(commands: Commands) -> None:
    """Add the commands of this file."""
    p = commands.add(
        "architectures",
        _architectures,
        "Score cells of NAS-Bench-201 at initialisation, or search for the best one (NASWOT).",
    )
    p.add_argument("action", choices=("score", "search"), help="score the given cells, or the best of random ones")
    p.add_argument("cells", metavar="CELL", nargs="*", help="|op~0|+|op~0|op~1|+|op~0|op~1|op~2|, for score")
    p.add_argument("--num", type=whole, default=100, help="random cells of a search")
    p.add_argument("--data", default="digits", metavar="NAME[=PATH]", help="digits, mnist-5k or fashion-mnist")
    p.add_argument("--images", type=whole, default=64, help="of the minibatch")
    p.add_argument("--size", type=whole, help="pixels on a side; default: the data's, at most 32")
    p.add_argument("--channels", type=whole, default=16, help="of the first stage")
    p.add_argument("--stage-cells", type=whole, default=1, help="cells per stage; the paper has 5")
    p.add_argument("--seed", type=seed, default=0, help="of cells, weights and minibatch")
    p.add_argument("--top", type=whole, default=5, help="cells of a search that are shown")


def _architectures(args: argparse.Namespace, _: list[str]) -> None:
    import jax
    import numpy as np

    from jaxstack.core.errors import UserError
    from jaxstack.data import images
    from jaxstack.vision import naswot

    if (args.action == "score") != bool(args.cells):
        raise UserError(f"architectures {args.action}: expected {'cells' if args.action == 'score' else 'no cells'}")
    x, _labels = images.load(args.data)
    for name, value, low, high in (("images", args.images, 1, len(x)), ("num", args.num, 1, naswot.COUNT)):
        if not low <= value <= high:
            raise UserError(f"--{name} {value}: expected {low} to {high}")
    size = min(x.shape[1], 32) // 4 * 4 if args.size is None else args.size
    if size < 4 or size % 4:
        raise UserError(f"--size {size}: expected a multiple of 4, as two stages halve it")
    if args.channels < 1 or args.stage_cells < 1:
        raise UserError("--channels, --stage-cells: expected at least 1")
    rows = np.random.default_rng(args.seed).choice(len(x), args.images, replace=False)
    batch = images.normalised(images.resized(x[rows], size))
    k_cells, k_score = jax.random.split(jax.random.key(args.seed))
    if args.action == "score":
        cells = np.stack([naswot.encode_cell(c) for c in args.cells])
    else:
        cells = np.asarray(naswot.sample_cells(k_cells, args.num))
    scoring = naswot.Scoring(naswot.Skeleton(args.channels, args.stage_cells, size, x.shape[3]))
    found = naswot.scores(k_score, cells, batch, scoring)
    order = np.argsort(-found, kind="stable")[: args.top] if args.action == "search" else np.arange(len(cells))
    params = naswot.num_params(cells, scoring.skeleton)
    print(f"{'score':>10} {'parameters':>11}  cell")
    for n in order:
        print(f"{found[n]:>10.2f} {params[n]:>11,}  {naswot.decode_cell(cells[n])}")
    if not np.isfinite(found).all():
        print(f"{(~np.isfinite(found)).sum()} of {len(found)} cells do not reach the output and score -inf")
