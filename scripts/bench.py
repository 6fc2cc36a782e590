"""All benchmarks, one after the other.

    python scripts/bench.py                                          tens of minutes on 2 cores
    python scripts/bench.py --jaxmarl PATH --purejaxrl PATH          with the peers; PATH is a clone
    python scripts/bench.py --torch-python PYTHON                    networks for images beside torch, torchvision, timm
    python scripts/bench.py --kla PATH --torch-python PYTHON         with the released KLA too
    python scripts/bench.py --naswot PATH --torch-python PYTHON      with the public code of NASWOT too
    python scripts/bench.py --peers-python PYTHON                    with one that has lbforaging, rware and jumanji
    python scripts/bench.py --probes-python PYTHON                   with one that has dec-pomdp-diagnostics
    python scripts/bench.py --jax-corl PATH --rejax PATH ...         learners from data, see bench_offline.py
    python scripts/bench.py --quick                                  under three minutes, beside the recorded figures
    python scripts/bench.py --record                                 and keep the results in docs/results/bench

`make bench` and `make bench-quick` call this; options go in ARGS, e.g. make bench ARGS="--jaxmarl ../JaxMARL".
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench_offline_peers import PEERS as OFFLINE_PEERS

ROOT = Path(__file__).resolve().parent.parent
RECORDED = ROOT / "docs" / "results" / "bench"


def commands(args: argparse.Namespace, out: Path) -> dict[str, list[str]]:
    """Name of the result -> script and its options."""
    peers = [x for name in ("jaxmarl", "purejaxrl") if (path := getattr(args, name)) for x in (f"--{name}", str(path))]
    agents = ["bench_agents.py", *peers, "--out", str(out / "agents.json")]
    envs = ["bench_envs.py", "--out", str(out / "envs.json")]
    sequence = ["bench_sequence.py", "--out", str(out / "sequence.json")]
    if not args.quick:
        given = lambda *names: [
            x for n in names if (value := getattr(args, n)) for x in (f"--{n.replace('_', '-')}", str(value))
        ]
        torch = given("kla", "torch_python") if args.kla else []
        more = {n: [f"bench_{n}.py", "--out", str(out / f"{n}.json")] for n in ("marl", "offline", "sweep", "scaling")}
        if args.torch_python:
            options = given("torch_python", "naswot")
            more["vision"] = ["bench_vision.py", *options, "--out", str(out / "vision.json")]
        more["marl"] += given("peers_python", "probes_python")
        more["offline"] += given(*OFFLINE_PEERS, "torch_python")
        more["medical"] = ["bench_medical.py", *given("torch_python"), "--out", str(out / "medical.json")]
        return {"agents": agents, "envs": envs, "sequence": [*sequence, *torch], **more}
    cases = ["mpe-16"] * bool(args.jaxmarl) + ["cartpole"] * bool(args.purejaxrl)
    few = ["--env", "jaxmarl/MPE_simple_spread_v3", "--widths", "1024", "--steps", "20000", "--repeats", "5"]
    layers = ["--cases", "mixers", "--mixers", "kla", "gla", "--lengths", "1024"]
    return {
        "agents": [*agents, "--cases", *(cases or ["seeds"])],
        "envs": [*envs, *few],
        "sequence": [*sequence, *layers],
    }


def ratios(file: Path) -> dict[str, float]:
    """The median ratios of a result file by the name of their row."""
    found = {}
    for row in json.loads(file.read_text())["rows"]:
        if "ratio_quartiles" in row:
            found[row["case"]] = row["ratio_quartiles"][1]
        for form, values in row.items():
            if isinstance(values, dict) and "pool_ratio_quartiles" in values:
                found[f"{row['env']}, {row['width']} wide, pool / {form}"] = values["pool_ratio_quartiles"][1]
    return found


def compare(out: Path, names: Any) -> None:
    """Today's ratios beside the recorded ones."""
    print(f"\n{'ratio':60s} {'today':>8s} {'recorded':>9s}")
    for name in names:
        file = RECORDED / f"{name}.json"
        recorded = ratios(file) if file.exists() else {}
        for key, value in ratios(out / f"{name}.json").items():
            old = f"{recorded[key]:9.2f}" if key in recorded else "        -"
            print(f"{key:60s} {value:8.2f} {old}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jaxmarl", type=Path, help="a clone of JaxMARL")
    parser.add_argument("--purejaxrl", type=Path, help="a clone of PureJaxRL")
    parser.add_argument("--kla", type=Path, help="a clone of the released package of Kalman Linear Attention")
    parser.add_argument("--naswot", type=Path, help="a clone of the public code of NASWOT")
    parser.add_argument("--torch-python", type=Path, help="has torch, torchvision and timm; for --kla also tyro")
    parser.add_argument("--peers-python", type=Path, help="a Python that has lbforaging, rware or jumanji")
    parser.add_argument("--probes-python", type=Path, help="a Python that has dec-pomdp-diagnostics")
    for peer in OFFLINE_PEERS:
        parser.add_argument(f"--{peer.replace('_', '-')}", type=Path, metavar="PATH", help="a clone of it")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    if args.quick and args.record:
        parser.error("--record: expected without --quick, whose sizes are others")
    for name in ("kla", "naswot", "corl", "ptgood"):
        if getattr(args, name) and args.torch_python is None:
            parser.error(f"--{name}: expected together with --torch-python")
    out = RECORDED if args.record else ROOT / "runs" / "bench"
    out.mkdir(parents=True, exist_ok=True)
    todo = commands(args, out)
    for name, command in todo.items():
        print(f"\n== {name}: {' '.join(command)}", flush=True)
        done = subprocess.run([sys.executable, str(ROOT / "scripts" / command[0]), *command[1:]])
        if done.returncode:
            return done.returncode
    compare(out, todo)
    return 0


if __name__ == "__main__":
    sys.exit(main())
