"""`jaxstack score-forecasts`: samples of forecasts against what was observed."""

import argparse
from typing import Any

from jaxstack.cli.parsing import Commands, real, seed, whole


def add_commands(commands: Commands) -> None:
    """Add the commands of this file."""
    p = commands.add(
        "score-forecasts",
        _score,
        "Score forecasts of whole trajectories by Sig-MMD, CSig-MMD (tails), CRPS, energy and variogram score.",
    )
    p.add_argument("files", metavar="FILE", nargs="+", help="samples of a forecaster: .npz or .csv, see the page")
    p.add_argument("--observed", metavar="FILE", required=True, help="what happened, likewise")
    p.add_argument("--training", metavar="FILE", help="earlier trajectories: scale the variables, say what is a tail")
    p.add_argument("--scale", type=real, nargs="+", default=(), metavar="X", help="instead: divide each variable by X")
    group = p.add_argument_group("paths and kernel")
    group.add_argument("--kernel", choices=("rbf", "linear"), default="rbf", help="static kernel (default: rbf)")
    group.add_argument("--sigma", default="1", metavar="X|median", help="exp(-|a - b|^2 / X) (default: 1)")
    group.add_argument("--order", type=whole, default=2, help="dyadic refinement of the solver (default: 2)")
    group.add_argument("--lead-lag", action="store_true", help="add each variable one step behind")
    group.add_argument("--no-time", action="store_true", help="leave the time channel out")
    group.add_argument("--no-basepoint", action="store_true", help="do not begin at 0: levels are not seen")
    group.add_argument("--normalize", action="store_true", help="divide the kernel by sqrt(k(x, x) k(y, y))")
    group = p.add_argument_group("tails")
    group.add_argument("--depth", type=whole, default=2, help="of the signature that tells tails (default: 2)")
    group.add_argument("--alpha", type=real, default=0.92, help="quantile where the tail begins (default: 0.92)")
    group.add_argument("--beta", type=real, help="sharpness; inf: weights of 0 and 1 (default: 25.6 / distance)")
    group.add_argument(
        "--threshold", type=real, nargs="+", default=(), metavar="X", help="of a CRPS that looks above X"
    )
    group = p.add_argument_group("uncertainty")
    group.add_argument("--block", type=whole, default=1, help="consecutive conditions that depend on each other")
    group.add_argument("--permutations", type=whole, default=500, help="of the test of equal laws (default: 500)")
    group.add_argument("--seed", type=seed, default=0, help="of intervals and permutations")
    p.add_argument("--out", metavar="FILE", help="a CSV file: every score of every observation")


def _score(args: argparse.Namespace, _: list[str]) -> None:
    from pathlib import Path

    import jax

    from jaxstack.core import options
    from jaxstack.core.errors import UserError
    from jaxstack.core.rundir import labels
    from jaxstack.data.trajectories import read_trajectories
    from jaxstack.measures import forecasts
    from jaxstack.measures.signature_kernel import Kernel

    if args.permutations < 1:
        raise UserError(f"--permutations {args.permutations}: expected at least 1")
    if args.out and Path(args.out).suffix != ".csv":
        raise UserError(f"--out {args.out}: expected a name ending in .csv")
    if twice := [f for f in args.files if args.files.count(f) > 1]:
        raise UserError(f"{twice[0]}: is named twice")
    median = args.sigma == "median"
    sigma = 1.0 if median else options.number(args.sigma)
    if sigma is None:
        raise UserError(f"--sigma {args.sigma}: expected a number or median")
    settings = forecasts.Settings(
        Kernel(args.kernel, float(sigma), args.order),
        median=median,
        time=not args.no_time,
        lead_lag=args.lead_lag,
        basepoint=not args.no_basepoint,
        normalize=args.normalize,
        depth=args.depth,
        alpha=args.alpha,
        beta=args.beta,
        threshold=tuple(args.threshold),
        permutations=args.permutations,
        seed=args.seed,
    )
    sets = {name: read_trajectories(name) for name in args.files}
    observed = read_trajectories(args.observed)
    training = None if args.training is None else read_trajectories(args.training)
    with jax.enable_x64():
        found = forecasts.compare(observed, sets, training, args.scale, settings)
    short = dict(zip(args.files, labels(args.files)))
    _print(found, short, args.block, args.seed)
    if args.out:
        _write(args.out, found, short)


def _print(found: Any, short: dict[str, str], block: int, seed: int) -> None:
    """A table of means with intervals, one of differences to the first forecaster, and tests of equal laws."""
    from jaxstack.report.stats import Estimate

    def table(title: str, of: dict[str, dict[str, Estimate]]) -> None:
        rows = list(dict.fromkeys(k for own in of.values() for k in own))
        if not rows:
            return
        columns = [[short[n], *(str(of[n].get(k, "-")) for k in rows)] for n in of]
        widths = [max(map(len, column)) for column in columns]
        left = max(map(len, (title, *rows)))
        for i, name in enumerate((title, *rows)):
            print("  ".join([name.ljust(left), *(c[i].rjust(w) for c, w in zip(columns, widths))]))

    first = next(iter(found.scores))
    print(f"{len(found.conditions)} observations; means with 95% intervals, smaller is better")
    table("score", found.summary(block, seed))
    if len(found.scores) > 1:
        print()
        table(f"less {short[first]}", found.differences(first, block, seed))
    if any(found.discrepancies.values()):
        print()
        for name, own in found.discrepancies.items():
            print(f"{short[name]}: " + ", ".join(f"{k} {v:.3g} (equal laws: p = {p:.3g})" for k, (v, p) in own.items()))
    for note in found.notes:
        print(note)


def _write(path: str, found: Any, short: dict[str, str]) -> None:
    import pandas as pd

    from jaxstack.core.errors import UserError

    rows = [
        pd.DataFrame({"condition": found.conditions, "forecaster": short[n]} | own) for n, own in found.scores.items()
    ]
    try:
        pd.concat(rows).to_csv(path, index=False)
    except OSError as e:
        raise UserError(f"--out {path}: cannot be written ({e.strerror})") from e
    print(f"every observation's scores: {path}")
