"""Scaling of training over 1, 2, 4 and 8 devices of this machine's CPU, for seeds and for environments.

    python scripts/bench_scaling.py                              both, all device counts
    python scripts/bench_scaling.py --devices 1 2 --repeats 3 --updates 5

seeds: 8 seeds of PPO on CartPole with 64 environments each, spread over the devices (`devices`).
envs:  one seed with 512 environments, spread over the devices (`env_devices`).

The devices are forced on the host (XLA_FLAGS), each count in a process of its own, compiled ahead of time. The work is
the same for every count, so on C cores the best that can be had is C times the speed of one core; XLA uses several
threads on one device too. Shown are medians of environment steps per second over all seeds, and the parallel
efficiency: speed / (speed on one device * devices).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import bench_report

CHILD = "--child"
KINDS = {"seeds": (8, 64), "envs": (1, 512)}
"""Seeds, and environments of each."""


def measure(kind: str, count: int, updates: int, repeats: int) -> dict[str, Any]:
    """In the child: environment steps per second over all seeds."""
    import jax
    import numpy as np

    from jaxstack import agents
    from jaxstack.core import ledger, program

    assert jax.device_count() == count
    seeds, num_envs = KINDS[kind]
    size = num_envs * 32
    options = dict(num_envs=num_envs, num_steps=32, num_minibatches=4, num_epochs=2, total_steps=size * 10_000)
    learner = agents.make("ppo", env="gymnax/CartPole-v1", **options)
    book = ledger.Ledger()
    devices, env_devices = (count, 1) if kind == "seeds" else (1, count)
    programs = program.build(
        learner, range(seeds), book, chunk=updates, evaluate=False, devices=devices, env_devices=env_devices
    )
    state, alive = programs.init()
    seconds = []
    for repeat in range(repeats + 1):
        begin = time.perf_counter()
        state, alive, _ = programs.advance(state, alive, repeat * updates, updates)
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - begin)
    return {
        "kind": kind,
        "devices": count,
        "steps_per_s": seeds * size * updates / float(np.median(seconds[1:])),
        "seconds": seconds[1:],
        "compile_s": book.seconds,
        "peak_mib_a_device": max(p.peak_bytes for p in book.programs) / 2**20,
    }


def in_child(kind: str, count: int, args: argparse.Namespace) -> dict[str, Any]:
    env = dict(os.environ, JAX_PLATFORMS="cpu", JAX_ENABLE_COMPILATION_CACHE="false")
    env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}".strip()
    job = json.dumps([kind, count, args.updates, args.repeats])
    out = subprocess.run([sys.executable, __file__, CHILD, job], env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(out.stdout.splitlines()[-1])


def main() -> None:
    if sys.argv[1:2] == [CHILD]:
        print(json.dumps(measure(*json.loads(sys.argv[2]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--devices", nargs="+", type=int, choices=[1, 2, 4, 8], default=[1, 2, 4, 8])
    parser.add_argument("--updates", type=int, default=10, help="of one repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_scaling.json"))
    args = parser.parse_args()
    for option in ("updates", "repeats"):
        if getattr(args, option) < 1:
            parser.error(f"--{option} {getattr(args, option)}: expected at least 1")
    print(f"{os.cpu_count()} cores\nkind   devices  steps/s (k)  efficiency  compile s  peak MiB a device")
    rows: list[dict[str, Any]] = []
    for kind in args.kinds:
        for count in sorted(args.devices):
            row = in_child(kind, count, args)
            base = next((r for r in rows if r["kind"] == kind), row)
            row["efficiency"] = row["steps_per_s"] / base["steps_per_s"] * base["devices"] / count
            rows.append(row)
            print(
                f"{kind:6s} {count:7d} {row['steps_per_s'] / 1e3:12.1f} {row['efficiency']:11.2f} "
                f"{row['compile_s']:10.1f} {row['peak_mib_a_device']:10.1f}",
                flush=True,
            )
    bench_report.write(args.out, rows)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
