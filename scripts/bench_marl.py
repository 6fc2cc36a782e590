"""Speed of the cooperative multi-agent environments and of the probes, against the packages that they re-write.

    python scripts/bench_marl.py --cases play                       ours alone; a minute on 2 cores
    python scripts/bench_marl.py --peers-python PYTHON              and what of lbforaging, rware and jumanji it has
    python scripts/bench_marl.py --cases play --env lbf rware --repeats 9
    python scripts/bench_marl.py --cases probes parity --probes-python PYTHON     against dec-pomdp-diagnostics
    python scripts/bench_marl.py --cases mate --mate PATH --mate-python PYTHON    against MATE's official code

play     random play, environment steps per second of CPU time (of all threads), 128 environments in rollouts of 128
         steps with auto-reset from a pool, as in bench_envs.py; `lbf` is 8 x 8 with 2 agents, 2 foods and sight 2,
         `rware` the tiny warehouse with 2 agents and sight 2. The Python packages play one environment, jumanji 128
         with its own auto-reset, all in a child process of PYTHON; their sizes are the same. Aims: at least 8 times the
         Python packages and as fast as jumanji; `lbf` 100 k, `rware` 30 k, the small ones 300 k steps per CPU-second.

probes   the six estimates of a feed-forward audit (OAR, HAR, PIF with and without actions, AA, DAI) of two agents on
         8,000 steps with 18 observation columns and 5 actions: seconds of CPU time and of the clock.
         dec-pomdp-diagnostics audits the same arrays in a child process of PYTHON, both with 5 null values; then ours
         with 200 against 5 where no action stands in the windows, and the same with 128 columns of hidden states.
         Compilation is not counted. Aims: at least 3 times as fast as the package and under 60 s; 200 null values in at
         most 3 times the time of 5.
parity   values of both on the same arrays, ours with reference_compat=True: real and binary observations, hidden
         states, real actions, 1,600 steps. No aims: docs/methods/decpomdp-probes.md tells why what differs does.
mate     training of MATE with mixed embeddings, 10 environments x 5 steps, `lbf` 8 x 8 with 2 agents and 2 foods,
         layers and recurrent states of 128: environment steps per second, compilation not counted. PATH is a clone of
         uoe-agents/MATE, PYTHON has torch, gymnasium and lbforaging, see bench_marl_mate.py. Aim: at least 5
         times the official code.

Repeats alternate between all that is compared. Shown are medians, and ratios within a repeat with quartiles.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import bench_agents
import bench_report
import jax
import numpy as np
from bench_child import Child
from bench_envs import ours

from jaxstack import agents, envs
from jaxstack.core.errors import UserError
from jaxstack.measures import probes as measure
from jaxstack.report.timing import Taken, in_turn, quartiles, timed

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

    def rate(self, rollouts: int) -> float:
        """Steps per CPU second of so many rollouts."""
        total = jax.numpy.zeros(())

        def play() -> None:
            nonlocal total
            for _ in range(rollouts):
                self.count += 1
                self.carry, total = self.run(self.carry, jax.random.key(self.count))
            jax.block_until_ready((self.carry, total))

        taken = timed(play).cpu
        if not np.isfinite(float(total)):
            raise UserError("outputs are not finite")
        return rollouts * WIDTH * LENGTH / taken


def play(args: argparse.Namespace) -> list[Row]:
    players = {id: Player(id) for id in args.env}
    child = None
    if args.peers_python is not None:
        child = Child("peers", [str(args.peers_python), str(Path(__file__).with_name("bench_marl_peers.py"))])

    def of_peer(peer: str, _: int) -> float:
        assert child is not None
        steps, seconds = child.ask(do="play", peer=peer, steps=PEER_STEPS.get(peer, 1))
        return steps / max(seconds, 1e-9)

    try:
        about = child.ask(do="about") if child else {}
        peers = {id: [p for p in PEERS.get(id, {}) if p in about] for id in args.env}
        measures: dict[str, Callable[[int], float]] = {}
        for id, player in players.items():
            measures[id] = lambda _, player=player: player.rate(args.rollouts)
            measures |= {peer: partial(of_peer, peer) for peer in peers[id]}
        rates = in_turn(measures, args.repeats)  # the first one compiles
    finally:
        if child:
            child.close()
    rows = []
    for id in args.env:
        rows.append(rate_row(id, rates[id], AIMS.get(id)))
        for peer in peers[id]:
            rows.append(rate_row(peer, rates[peer], None) | {"version": about[peer]})
            low, median, high = ratio = quartiles(rates[id], rates[peer])
            aim = PEERS[id][peer]
            print(f"{f'play, {id} / {peer}':40s} {median:12.1f} [{low:.1f}, {high:.1f}] (aim at least {aim:g})")
            rows.append({"case": f"play, {id} / {peer}", "ratio_quartiles": ratio, "target": aim})
            rows[-1]["met"] = median >= aim
    return rows


def rate_row(name: str, rates: list[float], aim: float | None) -> Row:
    low, median, high = (float(q) for q in np.quantile(rates, (0.25, 0.5, 0.75)))
    text = "" if aim is None else f" (aim at least {aim / 1e3:g})"
    print(f"{f'play, {name}':40s} {median / 1e3:10.1f} k [{low / 1e3:.1f}, {high / 1e3:.1f}]{text}", flush=True)
    row: Row = {"case": f"play, {name}", "steps_per_cpu_s_quartiles": [low, median, high]}
    return row if aim is None else row | {"target": aim, "met": median >= aim}


def arrays(
    kind: str, episodes: int, steps: int, columns: int = 18, choices: int = 5, hidden: int = 128
) -> dict[str, np.ndarray]:
    """A team of two whose actions depend on observations, the own past and the partner's last action.

    `kind` is real, binary (2 columns and 2 actions: many ties), hidden (leaky sums of the observations as recurrent
    states) or moves (real actions of 2 columns).
    """
    rng = np.random.default_rng(0)
    width = 2 if kind == "binary" else columns
    noise = rng.normal(size=(episodes, steps, 2, width))
    obs = np.zeros_like(noise)
    for t in range(steps):  # a slow walk
        obs[:, t] = (0.7 * obs[:, t - 1] if t else 0.0) + noise[:, t]
    if kind == "binary":
        obs, choices = (obs > 0).astype(float), 2
    read = rng.normal(size=(2, 2, width, choices)) / np.sqrt(width)
    action = np.zeros((episodes, steps, 2), int)
    for t in range(steps):
        score = np.einsum("enw,nwc->enc", obs[:, t], read[0]) + 0.5 * rng.gumbel(size=(episodes, 2, choices))
        if t:
            score += np.einsum("enw,nwc->enc", obs[:, t - 1], read[1])
            score += 0.5 * np.eye(choices)[action[:, t - 1, ::-1]]
        action[:, t] = score.argmax(-1)
    out = {"obs": obs.astype(np.float32), "action": action}
    if kind == "moves":
        real = np.einsum("etnw,nwc->etnc", obs, read[0])[..., :2] + 0.3 * rng.normal(size=(episodes, steps, 2, 2))
        out["action"] = np.tanh(real).astype(np.float32)
    if kind == "hidden":
        state, mix = np.zeros((episodes, 2, hidden)), rng.normal(size=(width, hidden)) / np.sqrt(width)
        out["hidden"] = np.zeros((episodes, steps, 2, hidden), np.float32)
        for t in range(steps):
            state = np.tanh(0.8 * state + obs[:, t] @ mix)
            out["hidden"][:, t] = state
    return out


def probes(args: argparse.Namespace) -> list[Row]:
    episodes, steps = args.probe_rows // 50, 50
    team = {kind: measure.trajectories(**arrays(kind, episodes, steps)) for kind in ("real", "hidden")}
    quick = {"real": ("OAR", "HAR", "PIF-obs", "AA"), "hidden": ("OAR", "HAR", "PIF", "AA", "DAI")}
    todo: dict[str, Callable[[], Any]] = {"real, 5 null values": lambda: audit(team["real"], 5)}
    for kind, names in quick.items():
        for reps in (5, 200):
            todo[f"{kind}, {len(names)} probes, {reps} null values"] = lambda k=kind, n=names, r=reps: audit(
                team[k], r, n
            )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "real.npz"
        np.savez(path, **arrays("real", episodes, steps))  # pyright: ignore[reportArgumentType]
        child = probe_child(args)
        try:
            version = child.ask(do="about").get("dec-pomdp-diagnostics") if child else None
            measures: dict[str, Callable[[int], Taken]] = {
                n: lambda _, call=call: timed(call) for n, call in todo.items()
            }

            def package(repeat: int) -> Taken:
                answer = child.ask(do="audit", arrays=str(path), null_reps=5) if child and repeat else {}
                return Taken(answer.get("wall_s", 0.0), answer.get("cpu_s", 0.0))

            if child:
                measures["package"] = package
            taken = in_turn(measures, args.repeats)  # the first one compiles
        finally:
            if child:
                child.close()
    rows = [seconds_row(name, s, 60.0 if name.startswith("real, 5") else None) for name, s in taken.items()]
    if version:
        rows[-1]["version"] = version
        rows.append(ratio_row("package / ours", taken["package"], taken["real, 5 null values"], 3.0, at_least=True))
    for kind, names in quick.items():
        many, few = (taken[f"{kind}, {len(names)} probes, {reps} null values"] for reps in (200, 5))
        rows.append(ratio_row(f"{kind}, 200 / 5 null values", many, few, 3.0, at_least=False))
    return rows


def audit(team: measure.Trajectories, reps: int, names: Sequence[str] = measure.PROBES, compat: bool = False) -> Any:
    settings = measure.Settings(null_reps=reps, slow_null_reps=reps, reference_compat=compat)
    return measure.audit(team, settings, names)


def seconds_row(name: str, seconds: list[Taken], most: float | None) -> Row:
    wall, cpu = (np.quantile(v, (0.25, 0.5, 0.75)).tolist() for v in zip(*seconds))
    print(f"{f'probes, {name}':48s} {cpu[1]:7.2f} s CPU, {wall[1]:7.2f} s", flush=True)
    row: Row = {"case": f"probes, {name}", "cpu_s_quartiles": cpu, "wall_s_quartiles": wall}
    return row if most is None else row | {"target": most, "met": wall[1] <= most}


def ratio_row(name: str, above: list[Taken], below: list[Taken], aim: float, at_least: bool) -> Row:
    low, median, high = quartiles([t.cpu for t in above], [t.cpu for t in below])
    bound = "at least" if at_least else "at most"
    print(f"{f'probes, {name}':48s} {median:7.2f} [{low:.2f}, {high:.2f}] (aim {bound} {aim:g})", flush=True)
    met = median >= aim if at_least else median <= aim
    return {"case": f"probes, {name}", "ratio_quartiles": [low, median, high], "target": aim, "met": met}


def parity(args: argparse.Namespace) -> list[Row]:
    child, rows = probe_child(args), []
    if child is None:
        raise UserError("--probes-python: parity: expected a Python that has dec-pomdp-diagnostics")
    try:
        with tempfile.TemporaryDirectory() as folder:
            for kind in ("real", "binary", "hidden", "moves"):
                path, drawn = Path(folder) / f"{kind}.npz", arrays(kind, args.probe_rows // 250, 50)
                np.savez(path, **drawn)  # pyright: ignore[reportArgumentType]
                answer = child.ask(do="audit", arrays=str(path), null_reps=5)["values"]
                for name, found in audit(measure.trajectories(**drawn), 5, compat=True).items():
                    theirs = answer[name]
                    ours = {"bits": found.bits, "norm": found.norm, "null": float(found.null.mean())}
                    rows.append({"case": f"parity, {kind}, {name}", "ours": ours, "package": theirs})
                    text = "  ".join(f"{k} {ours[k]:.6f} {theirs[k]:.6f}" for k in ours)
                    print(f"{rows[-1]['case']:28s} {text}", flush=True)
    finally:
        child.close()
    return rows


def probe_child(args: argparse.Namespace) -> Child | None:
    if args.probes_python is None:
        return None
    return Child("probes", [str(args.probes_python), str(Path(__file__).with_name("bench_marl_peers.py"))])


def mate(args: argparse.Namespace) -> list[Row]:
    missing = [f"--{n.replace('_', '-')}" for n in ("mate", "mate_python") if getattr(args, n) is None]
    if missing:
        raise UserError(f"{', '.join(missing)}: expected for the case mate, see --help")
    steps = 50 * args.mate_updates
    options: dict[str, Any] = dict(env="lbf", mode="mix", num_envs=10, num_steps=5, total_steps=steps, emb_dim=10)
    side = bench_agents.ours(agents.make("mate", hidden=(128, 128), gru=128, **options), args.mate_updates)
    assert side.updates is not None
    start = side.updates
    child = Child("mate", [str(args.mate_python), str(Path(__file__).with_name("bench_marl_mate.py")), str(args.mate)])

    def official(_: int) -> Taken:
        played, wall, cpu = child.ask(do="train", mode="mix", updates=args.mate_updates)
        assert played == steps
        return Taken(wall, cpu)

    try:
        about = child.ask(do="about")
        taken = in_turn({"ours": lambda n: timed(start(n)), "official": official}, args.repeats)
    finally:
        child.close()
    rows: list[Row] = []
    for name, clock in (("second", lambda t: t.wall), ("CPU-second", lambda t: t.cpu)):
        seconds = {side: [clock(t) for t in found] for side, found in taken.items()}
        rates = {k: np.quantile(steps / np.asarray(v), (0.25, 0.5, 0.75)).tolist() for k, v in seconds.items()}
        low, median, high = ratio = quartiles(seconds["official"], seconds["ours"])
        case = f"mate, ours / official, steps per {name}"
        print(f"{case:48s} {median:7.2f} [{low:.2f}, {high:.2f}] (aim at least 5)", flush=True)
        print(f"{'':12s}ours {rates['ours'][1] / 1e3:.2f} k, official {rates['official'][1] / 1e3:.2f} k", flush=True)
        row = {"case": case, "rates_quartiles": rates, "ratio_quartiles": ratio, "target": 5.0, "met": median >= 5.0}
        rows.append(row | {"versions": about, "updates": args.mate_updates})
    return rows


CASES = {"play": play, "probes": probes, "parity": parity, "mate": mate}


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=["play", "probes"])
    parser.add_argument("--peers-python", type=Path, help="a Python that has lbforaging, rware or jumanji")
    parser.add_argument("--probes-python", type=Path, help="a Python that has dec-pomdp-diagnostics")
    parser.add_argument("--mate", type=Path, metavar="PATH", help="a clone of uoe-agents/MATE")
    parser.add_argument("--mate-python", type=Path, help="a Python that has torch, gymnasium and lbforaging")
    parser.add_argument("--mate-updates", type=int, default=200, help="of 50 environment steps, in a repeat of mate")
    parser.add_argument("--probe-rows", type=int, default=8000, help="steps that the probes read; parity a fifth")
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
    if args.probe_rows < 500:
        parser.error(f"--probe-rows {args.probe_rows}: expected at least 500")
    rows: list[Row] = []
    for name in args.cases:
        rows += CASES[name](args)
        bench_report.write(args.out, rows, backend=jax.default_backend(), repeats=args.repeats)
    missed = [row["case"] for row in rows if not row.get("met", True)]
    print(f"aims missed: {len(missed)} of {sum('met' in row for row in rows)}", *missed, sep="\n  ")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
