"""The options and the action of `jaxstack reproduce`."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

EPILOG = """\
Rows are kept in WORK/METHOD-SCALE/rows.jsonl as they come; the same command continues where it was stopped.

  jaxstack reproduce hypermarl                          run what is missing, print verdicts, write the record
  jaxstack reproduce hypermarl --only gradients --fresh one experiment anew; others keep their rows
  jaxstack reproduce METHOD --scale full --data NAME=DIR
  jaxstack reproduce METHOD --list                      its scales, experiments, arms and checks
  jaxstack reproduce --all --list                       the verdicts of all claims
  jaxstack reproduce --docs                             docs/results/README.md and the results in docs/methods

Exits with 0 when the claim holds, 1 when it does not, 2 for wrong input.
"""


def add_options(p: argparse.ArgumentParser, integer: Callable[[str], int] = int) -> None:
    """Add the options of `jaxstack reproduce` to its parser; `integer` reads whole numbers."""
    p.add_argument("method", nargs="?", metavar="METHOD")
    p.add_argument("--all", action="store_true", help="every claim, one after another")
    p.add_argument("--list", action="store_true", help="run nothing: show experiments and checks, or all verdicts")
    p.add_argument("--scale", default="small", help="small (default) or full")
    p.add_argument("--seeds", type=integer, help="default: the claim's own number")
    p.add_argument("--only", nargs="+", default=[], metavar="EXPERIMENT", help="run only these; see --list")
    p.add_argument("--arms", nargs="+", default=[], metavar="ARM", help="run only these arms")
    p.add_argument("--data", action="append", default=[], metavar="NAME=DIR", help="a data set; may be repeated")
    p.add_argument("--fresh", action="store_true", help="forget the stored rows of what is selected")
    p.add_argument("--keep-rows", action="store_true", help="use rows made by other claim code; the record says so")
    p.add_argument("--out", default="docs/results", metavar="DIR", help="records and figures; default: docs/results")
    p.add_argument("--work", default="runs/reproduce", metavar="DIR", help="rows; default: runs/reproduce")
    p.add_argument("--docs", action="store_true", help="write the generated pages from the records")


def reproduce(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code. Raises `UserError` for wrong input."""
    from jaxstack.claims import CLAIMS
    from jaxstack.core.errors import UserError

    modes = [args.method is not None, args.all, args.docs]
    if sum(modes) > 1 or not (any(modes) or args.list):
        raise UserError("reproduce: expected one of METHOD, --all, --list or --docs; `jaxstack list claims` has names")
    if args.all and (args.only or args.arms):
        raise UserError(f"--{'only' if args.only else 'arms'}: expected one METHOD, found --all")
    if args.docs:
        return _docs(Path(args.out))
    if args.list:
        return _list_claim(CLAIMS.load(args.method)) if args.method else _list_all(Path(args.out))
    from jaxstack.claims.harness import run_claim

    data = _data(args.data)
    held = []
    for method in CLAIMS if args.all else [args.method]:
        claim = CLAIMS.load(method)
        if args.all and args.scale not in claim.scales:
            continue
        own = data
        if args.all:
            plan = claim.scales[args.scale]
            own = {n: p for n, p in data.items() if any(n in (*plan.needs, *e.needs) for e in plan.experiments)}
        held.append(
            run_claim(
                claim,
                args.scale,
                args.seeds,
                Path(args.out),
                work=Path(args.work),
                only=args.only,
                arms=args.arms,
                data=own,
                fresh=args.fresh,
                keep_rows=args.keep_rows,
            )
        )
    if not held:
        raise UserError(f"scale={args.scale!r}: found no claim with such a scale, expected small or full")
    return 0 if all(held) else 1


def _data(given: list[str]) -> dict[str, Path]:
    from jaxstack.core.errors import UserError

    out = {}
    for text in given:
        name, sign, path = text.partition("=")
        if not (name and sign and path):
            raise UserError(f"--data {text}: expected NAME=DIR")
        if name in out:
            raise UserError(f"--data {name}: found twice, expected once")
        out[name] = Path(path).expanduser()
    return out


def _list_claim(claim: Any) -> int:
    from rich.console import Console

    say = lambda text: Console().print(text, highlight=False, soft_wrap=True, markup=False)
    say(f"{claim.method}: {claim.statement}\n{claim.paper}. {claim.scope}")
    for name, plan in claim.scales.items():
        time = f", about {plan.minutes:g} minutes" if plan.minutes else ""
        say(f"\nscale {name}: {plan.seeds} seeds{time}")
        for e in plan.experiments:
            needs = [f"--data {n}=DIR" for n in (*plan.needs, *e.needs)]
            say(f"  {e.name}{' (' + ', '.join(needs) + ')' if needs else ''}")
            say(f"    arms: {'; '.join(e.arms)}{'; each is tuned' if e.tune else ''}")
            for c in plan.checks:
                if c.experiment == e.name:
                    say(f"    {'report' if c.report else 'check'}: {c.describe().partition(': ')[2]}")
    return 0


def _list_all(folder: Path) -> int:
    from rich.console import Console
    from rich.table import Table

    from jaxstack.claims import CLAIMS, report

    found = {(r["method"], r["scale"]): r for r in (report.records(folder) if folder.is_dir() else [])}
    table = Table()
    for column in ("claim", "scale", "seeds", "minutes", "verdict", "checks", "record"):
        table.add_column(column, no_wrap=column in ("claim", "verdict"))
    for method in CLAIMS:
        claim = CLAIMS.load(method)
        for scale, plan in claim.scales.items():
            r = found.get((method, scale))
            if r is None:
                minutes = f"{plan.minutes:g} (expected)" if plan.minutes else "-"
                checks = f"{sum(not c.report for c in plan.checks)} checks"
                table.add_row(method, scale, str(plan.seeds), minutes, "not run", checks, "-")
                continue
            verdict = report.verdict(r) if r["holds"] else report.verdict(r).upper()
            # the record is of other checks when the claim was changed after its run
            same = [c["check"] for c in r["checks"]] == [c.describe() for c in plan.checks]
            name = f"{method}-{scale}.json{'' if same else ' (of other checks: run it again)'}"
            table.add_row(
                method,
                scale,
                str(r["seeds"]),
                f"{r['seconds'] / 60:.1f}",
                verdict,
                report.summary(r["counts"]),
                name,
            )
    Console().print(table, markup=False)
    return 0


def _docs(folder: Path) -> int:
    from rich.console import Console

    from jaxstack.claims import report

    changed = report.write_docs(folder, folder.parent / "methods")
    for path in changed:
        Console().print(str(path), highlight=False, soft_wrap=True, markup=False)
    return 0
