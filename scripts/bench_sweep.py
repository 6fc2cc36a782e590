"""What a sweep costs against its runs one by one: 16 settings x 4 seeds of IPPO on MPE simple_spread_v3.

    python scripts/bench_sweep.py                             16 settings x 4 seeds, 5 updates
    python scripts/bench_sweep.py --updates 1 --settings 2 --seeds 2 --singles 2      a check that it works

The sweep's program and the program of one run are compiled ahead of time, with the persistent cache off, in one
process. Both do the same number of updates from the start; runs of the single program stand before and after each run
of the sweep, and the first of each is not counted. Shown are three ratios sweep / separate runs:

    execution     neither side's compiling counts
    shared        the sweep's compile, against one compile that all separate runs share (one process, one program)
    own           the sweep's compile, against a compile in each of the separate runs (a process each, no cache)

The aim is below 0.25.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import bench_report
import jax
import numpy as np
from bench_agents import Side, mpe, ours

from jaxstack.core import ledger, program, space
from jaxstack.report.timing import in_turn, quartiles, timed

AIM = 0.25


def swept(learner: Any, updates: int, settings: int, seeds: int) -> Side:
    """The runner's own program over all rows; learning rate and entropy coefficient are drawn at random."""
    drawn = {"lr": space.log_uniform(1e-4, 1e-3), "ent_coef": space.uniform(0.0, 0.05)}
    values = space.numeric_settings(drawn, list(drawn), settings, 0)
    rows = [(v, s) for v in values for s in range(seeds)]
    hypers = learner.hypers._replace(**{n: np.asarray([v[n] for v, _ in rows], np.float32) for n in drawn})
    book = ledger.Ledger()
    programs = program.build(learner, [s for _, s in rows], book, hypers=hypers, chunk=updates, evaluate=False)

    def run(_: int) -> None:
        state, alive = programs.init()
        jax.block_until_ready(programs.advance(state, alive, 0, updates))

    return Side(run, book.seconds, max(p.peak_bytes for p in book.programs))


def measure(sweep: Side, single: Side, repeats: int, singles: int) -> tuple[list[float], list[float]]:
    """Seconds of each sweep, and of the mean single run around it."""
    run = lambda side: lambda _: timed(partial(side.run, 0)).wall
    sides = {("before", i): run(single) for i in range(singles)} | {("sweep", 0): run(sweep)}
    sides |= {("after", i): run(single) for i in range(singles)}
    found = in_turn(sides, repeats)
    together = found.pop(("sweep", 0))
    return together, np.mean(list(found.values()), 0).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--updates", type=int, default=5, help="of 16 x 128 environment steps, in each run")
    parser.add_argument("--repeats", type=int, default=3, help="runs of the sweep that count")
    parser.add_argument("--singles", type=int, default=4, help="single runs before and after each sweep")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_sweep.json"))
    args = parser.parse_args()
    for option in ("settings", "seeds", "updates", "repeats", "singles"):
        if getattr(args, option) < 1:
            parser.error(f"--{option} {getattr(args, option)}: expected at least 1")
    jax.config.update("jax_enable_compilation_cache", False)
    case = mpe(16, args.updates, AIM)
    learner, rows = case.learner, args.settings * args.seeds
    single, sweep = ours(learner, args.updates), swept(learner, args.updates, args.settings, args.seeds)
    together, alone = measure(sweep, single, args.repeats, args.singles)
    ratios = {
        "execution": quartiles(together, [rows * t for t in alone]),
        "shared": quartiles(
            [t + sweep.compile_seconds for t in together], [rows * t + single.compile_seconds for t in alone]
        ),
        "own": quartiles(
            [t + sweep.compile_seconds for t in together], [rows * (t + single.compile_seconds) for t in alone]
        ),
    }
    print(f"{rows} rows x {args.updates} updates: {np.median(together):.2f} s; one run: {np.median(alone):.2f} s")
    print(f"compiling: sweep {sweep.compile_seconds:.1f} s, single run {single.compile_seconds:.1f} s")
    for name, (low, median, high) in ratios.items():
        print(f"sweep / {rows} separate runs, {name:9s}: {median:.3f} [{low:.3f}, {high:.3f}] (aim below {AIM})")
    bench_report.write(
        args.out,
        [{"case": f"sweep, {name}", "target": AIM, "ratio_quartiles": value} for name, value in ratios.items()],
        backend=jax.default_backend(),
        repeats=args.repeats,
        settings=args.settings,
        seeds=args.seeds,
        updates=args.updates,
        options=case.options,
        seconds={"sweep": together, "single": alone},
        compile_seconds={"sweep": sweep.compile_seconds, "single": single.compile_seconds},
        peak_mib={"sweep": sweep.peak_bytes / 2**20, "single": single.peak_bytes / 2**20},
    )
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
