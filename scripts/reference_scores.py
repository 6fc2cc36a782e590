"""Reference scores: tune the learning rate, train with fresh seeds, and write the table of docs/reference-scores.md.

    python scripts/reference_scores.py run DIR               all cases, an hour on 2 busy cores; what is done is skipped
    python scripts/reference_scores.py run DIR --only lbf    some, by name
    python scripts/reference_scores.py table DIR             the table from the directories, into the page
    python scripts/reference_scores.py table DIR --print     or on the screen

A case is a learner, an environment and a few rates. `run` sweeps the rates with the seeds 100, 101 and 102
(`DIR/sweep-NAME`), takes the best setting of the sweep's ranking, and trains it with the seeds 0 to 4 (`DIR/NAME`), all
by the `jaxstack` command. `table` reads nothing but those directories.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxstack.core import rundir
from jaxstack.core.errors import UserError
from jaxstack.report import stats
from jaxstack.sweeps import Sweep

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference-scores.md"
BEGIN, END = "<!-- scores: written by scripts/reference_scores.py -->", "<!-- end of scores -->"
TUNING, FRESH = ("100", "101", "102"), ("0", "1", "2", "3", "4")
RATES = "3e-4,1e-3,3e-3"
RECORDED = (
    ("hypermarl", "specialisation, 4 agents", "reward"),
    ("hypermarl", "dispersion, 1M steps", "return"),
    ("mate", "hidden corner", "train_return"),
    ("imitate-then-improve", "TD3+BC, layer norm", "final_return"),
)
"""(method, experiment, metric) of records whose scores are no new runs."""


RECORDS = "From the records of claims (`jaxstack reproduce METHOD` runs them again):"


class Case(NamedTuple):
    """A learner with its options; `rates` of the sweep, none where they are taken as they stand."""

    family: str
    command: str
    rates: str = RATES


CASES = {
    "cartpole": Case("gymnax, classic control", "ppo --env gymnax/CartPole-v1 --num-steps 64 --total-steps 1e5"),
    "match-now": Case("cue tasks", "ippo --env match_now --hidden 32 --num-steps 64 --total-steps 5e4"),
    "lbf": Case("cooperative grids", "ippo --env lbf --num-envs 32 --num-steps 64 --total-steps 2e5"),
    "acrobot": Case("gymnax, classic control", "ppo --env gymnax/Acrobot-v1 --total-steps 2e5"),
    "pendulum": Case("gymnax, classic control", "sac --env gymnax/Pendulum-v1 --total-steps 15000", rates=""),
    "repeat-last": Case("cue tasks", "ippo --env repeat_last --gru 32 --hidden 32 --num-steps 64 --total-steps 1e5"),
    "inverted-pendulum": Case("brax, spring", "ppo --env brax/inverted_pendulum --num-envs 32 --total-steps 2e5"),
    "breakout": Case("gymnax, MinAtar", "ppo --env gymnax/Breakout-MinAtar --num-envs 32 --total-steps 4e5"),
}


def run(args: argparse.Namespace) -> None:
    for name in args.only or CASES:
        if name not in CASES:
            raise UserError(f"--only {name}: expected some of {', '.join(CASES)}")
        case, folder = CASES[name], args.directory / name
        learner, *options = case.command.split()
        if case.rates:
            tuned = args.directory / f"sweep-{name}"
            if not (tuned / "table.jsonl").exists():
                _jaxstack("sweep", learner, *options, "--sweep", f"lr={case.rates}", "--seeds", *TUNING, "--out", tuned)
            options += ["--lr", f"{Sweep.load(tuned).best()['lr']:g}"]
        if not rundir.finished(folder):
            _jaxstack("train", learner, *options, "--seeds", *FRESH, "--run-dir", folder)


def _jaxstack(*words: Any) -> None:
    command = [sys.executable, "-m", "jaxstack.cli", *map(str, words)]
    print("+ jaxstack", *words, flush=True)
    if code := subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise SystemExit(code)


def row(folder: Path, tuned: Path | None) -> list[str]:
    """Environment, command, rates, seeds, return at the start and at the end of a run."""
    plan, frame = rundir.read_plan(folder), rundir.read_metrics(folder)
    words = json.loads((folder / "run.json").read_text(encoding="utf-8"))["command"]
    at = words.index("train")
    told = words[at : words.index("--seeds")] if "--seeds" in words else words[at:]
    metric = plan["objective"][0]
    last = frame[frame.step == frame.step[frame[metric].notna()].max()]
    scores = np.asarray(last[metric], np.float64)
    good = scores[np.isfinite(scores)]
    first = frame[frame["rollout/return"].notna()].groupby("seed")["rollout/return"].first().mean()
    lost = "" if len(good) == len(scores) else f", {len(scores) - len(good)} failed"
    rates = "as it stands"
    if tuned is not None:
        sweep = Sweep.load(tuned)
        tie = "tie" in sweep.verdicts()
        rates = ", ".join(f"{v:g}" for v in sweep.settings["lr"]) + (" (the best ties with others)" if tie else "")
    return [
        plan["config"]["env"],
        f"`jaxstack {' '.join(told)}`",
        rates,
        f"{len(good)}{lost}",
        f"{first:.4g}",
        f"{stats.estimate(stats.mean, good)}" if len(good) else "",
    ]


def recorded() -> list[list[str]]:
    """Scores that records of claims hold, with the settings that their tuning chose."""
    head = ["experiment of `jaxstack reproduce`", "arm", "tuned", "chosen", "seeds", "score"]
    lines = [head, ["---"] * len(head)]
    for method, experiment, metric in RECORDED:
        record = json.loads((PAGE.parent / "results" / f"{method}-small.json").read_text(encoding="utf-8"))
        (arms,) = (e["arms"] for e in record["experiments"] if e["name"] == experiment)
        (means,) = (m["arms"] for m in record["means"] if (m["experiment"], m["metric"]) == (experiment, metric))
        for arm, found in means.items():
            tuning = arms[arm].get("tuning") or {}
            chosen = ", ".join(f"{k}={v}" for k, v in tuning.get("chosen", {}).items()) or "as the claim states"
            value = stats.Estimate(*found["estimate"])
            where = f"[{method}](results/{method}-small.json): {experiment}, {metric}"
            lines.append([where, arm, tuning.get("budget", "no"), chosen, str(found["seeds"]), str(value)])
    return lines


def marked(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table(args: argparse.Namespace) -> None:
    """The tables of all cases that have a finished run, and of the records."""
    head = ["family", "environment", "command", "learning rates tried", "seeds", "at the start", "at the end"]
    lines = [head, ["---"] * len(head)]
    for name, case in CASES.items():
        folder, tuned = args.directory / name, args.directory / f"sweep-{name}"
        if rundir.finished(folder):
            lines.append([case.family, *row(folder, tuned if case.rates else None)])
    if len(lines) == 2:
        raise UserError(f"{args.directory}: found no finished run, expected some of {', '.join(CASES)}")
    text = f"{marked(lines)}\n\n{RECORDS}\n\n{marked(recorded())}"
    if args.print:
        print(text)
        return
    page = PAGE.read_text(encoding="utf-8")
    if BEGIN not in page or END not in page:
        raise UserError(f"{PAGE.name}: expected the lines {BEGIN!r} and {END!r}")
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    print(f"{len(lines) - 2} rows written to {PAGE.name}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    p = commands.add_parser("run")
    p.add_argument("directory", type=Path, metavar="DIR")
    p.add_argument("--only", nargs="+", metavar="NAME")
    p.set_defaults(do=run)
    p = commands.add_parser("table")
    p.add_argument("directory", type=Path, metavar="DIR")
    p.add_argument("--print", action="store_true")
    p.set_defaults(do=table)
    args = parser.parse_args(argv)
    try:
        args.do(args)
    except UserError as e:
        print(f"reference_scores.py: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
