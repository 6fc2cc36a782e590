"""Speed of the cooperative multi-agent environments, against the packages that they re-write.

    python scripts/bench_marl.py                                    ours alone; a minute on 2 cores
    python scripts/bench_marl.py --peers-python PYTHON              and what of lbforaging, rware and jumanji it has
    python scripts/bench_marl.py --env lbf rware --repeats 9

play     random play, environment steps per second of CPU time (of all threads), 128 environments in rollouts of 128
         steps with auto-reset from a pool, as in bench_envs.py; `lbf` is 8 x 8 with 2 agents, 2 foods and sight 2,
         `rware` the tiny warehouse with 2 agents and sight 2. The Python packages play one environment, jumanji 128
         with its own auto-reset, all in a child process of PYTHON; their sizes are the same. Aims: at least 8 times the
         Python packages and as fast as jumanji; `lbf` 100 k, `rware` 30 k, the small ones 300 k steps per CPU-second.

Repeats alternate between all that is compared. Shown are medians, and ratios within a repeat with quartiles.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import bench_report
import jax
import numpy as np
from bench_child import Child
from bench_envs import ours

from jaxstack import envs
from jaxstack.core.errors import UserError

WIDTH, LENGTH = 128, 128
AIMS = {
    "lbf": 100e3,
    "rware": 30e3,
    **dict.fromkeys(
        ("boulder_push", "zone_spread", "hidden_corner", "follow_partner", "match_now", "repeat_last"), 300e3
    ),
}
"""Steps per CPU-second."""
PEERS = {"lbf": {"lbforaging": 8.0, "jumanji-lbf": 1.0}, "rware": {"robotic-warehouse": 8.0, "jumanji-rware": 1.0}}
"""How many times as fast as a peer ours should be."""
PEER_STEPS = {"lbforaging": 4_000, "robotic-warehouse": 2_000}
"""In one repeat; those not named play a rollout."""

Row = dict[str, Any]


class Player:
    """Rollouts of one of our environments."""

    def __init__(self, id: str) -> None:
        self.run, self.carry = ours(envs.make(id), WIDTH, LENGTH, "pool")
        self.count = 0

    def seconds(self, rollouts: int) -> float:
        """CPU seconds of so many rollouts."""
        begin = time.process_time()
        for _ in range(rollouts):
            self.count += 1
            self.carry, total = self.run(self.carry, jax.random.key(self.count))
        jax.block_until_ready((self.carry, total))
        taken = time.process_time() - begin
        if not np.isfinite(float(total)):
            raise UserError("outputs are not finite")
        return taken


def play(args: argparse.Namespace) -> list[Row]:
    players = {id: Player(id) for id in args.env}
    child = None
    if args.peers_python is not None:
        child = Child("peers", [str(args.peers_python), str(Path(__file__).with_name("bench_marl_peers.py"))])
    try:
        about = child.ask(do="about") if child else {}
        peers = {id: [p for p in PEERS.get(id, {}) if p in about] for id in args.env}
        rates: dict[str, list[float]] = {}
        for repeat in range(args.repeats + 1):  # the first one compiles
            for id, player in players.items():
                measured = {id: (args.rollouts * WIDTH * LENGTH, player.seconds(args.rollouts))}
                for peer in peers[id]:
                    assert child is not None
                    measured[peer] = child.ask(do="play", peer=peer, steps=PEER_STEPS.get(peer, 1))
                if repeat:
                    for name, (steps, seconds) in measured.items():
                        rates.setdefault(name, []).append(steps / seconds)
    finally:
        if child:
            child.close()
    rows = []
    for id in args.env:
        rows.append(rate_row(id, rates[id], AIMS.get(id)))
        for peer in peers[id]:
            rows.append(rate_row(peer, rates[peer], None) | {"version": about[peer]})
            ratio = np.asarray(rates[id]) / np.asarray(rates[peer])
            low, median, high = (float(q) for q in np.quantile(ratio, (0.25, 0.5, 0.75)))
            aim = PEERS[id][peer]
            print(f"{f'play, {id} / {peer}':40s} {median:12.1f} [{low:.1f}, {high:.1f}] (aim at least {aim:g})")
            rows.append({"case": f"play, {id} / {peer}", "ratio_quartiles": [low, median, high], "target": aim})
            rows[-1]["met"] = median >= aim
    return rows


def rate_row(name: str, rates: list[float], aim: float | None) -> Row:
    low, median, high = (float(q) for q in np.quantile(rates, (0.25, 0.5, 0.75)))
    text = "" if aim is None else f" (aim at least {aim / 1e3:g})"
    print(f"{f'play, {name}':40s} {median / 1e3:10.1f} k [{low / 1e3:.1f}, {high / 1e3:.1f}]{text}", flush=True)
    row: Row = {"case": f"play, {name}", "steps_per_cpu_s_quartiles": [low, median, high]}
    return row if aim is None else row | {"target": aim, "met": median >= aim}


CASES = {"play": play}


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--peers-python", type=Path, help="a Python that has lbforaging, rware or jumanji")
    parser.add_argument("--env", nargs="+", default=list(AIMS), metavar="ID", help="of play")
    parser.add_argument("--rollouts", type=int, default=8, help="of 128 steps of 128 environments, in a repeat of play")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_marl.json"))
    return parser


def main() -> None:
    parser = options()
    args = parser.parse_args()
    if args.repeats < 5:
        parser.error(f"--repeats {args.repeats}: expected at least 5, for quartiles")
    if args.rollouts < 1:
        parser.error(f"--rollouts {args.rollouts}: expected at least 1")
    rows: list[Row] = []
    for name in args.cases:
        rows += CASES[name](args)
        bench_report.write(args.out, rows, backend=jax.default_backend(), repeats=args.repeats)
    missed = [row["case"] for row in rows if not row.get("met", True)]
    print(f"aims missed: {len(missed)} of {sum('met' in row for row in rows)}", *missed, sep="\n  ")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
