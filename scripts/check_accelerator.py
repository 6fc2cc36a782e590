"""One command for a machine with a GPU or TPU: does jaxstack train on it, right and fast? At most 8 minutes.

    python scripts/check_accelerator.py                        all checks; results in runs/accelerator.json
    python scripts/check_accelerator.py --jaxmarl PATH         and training beside JaxMARL's script; PATH is a clone
    python scripts/check_accelerator.py --checks kla physics   some
    python scripts/check_accelerator.py --tiny                 the same code at sizes for a CPU, the kernel interpreted

device       which devices JAX finds, their memory, versions.
train        IPPO and HyperMARL on MPE simple_spread with 1,024 and 4,096 environments, and IPPO with 8 seeds of 1,024:
             environment steps per second after compilation, seconds to compile, memory; losses are finite and returns
             rise.
kla          the scans of Kalman Linear Attention and its kernel, compiled, against the sequential form in float64 on
             the CPU: values and gradients; milliseconds of each form.
physics      a step of brax' hopper and ant by `jax.vmap` and with the batch last (fast/batch_last.py): equal up to
             rounding; milliseconds of both.
determinism  a run in two processes, with and without the flags of `jaxstack info --determinism`: with them its
             parameters have to be bitwise identical.
peer         with --jaxmarl: IPPO of both, in turn, in one process.

Each check is a process of its own, ended when the time is over; a check that was not begun or not ended is listed as
such. Exit code 0: all that ran holds; 1: something does not; 2: wrong input.
"""

import argparse
import functools
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

SCRIPTS = Path(__file__).resolve().parent
FLAGS = "--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"
Row = dict[str, Any]


class Sizes(NamedTuple):
    """How much the checks do."""

    agents: tuple[tuple[str, int, int], ...]
    """(learner, environments, seeds) of `train`."""
    steps: int
    """Per update and environment."""
    updates: int
    options: dict[str, Any]
    """Of every learner."""
    filters: tuple[tuple[int, int, int, int], ...]
    """(batch, length, channels, states) of `kla`."""
    robots: tuple[str, ...]
    widths: tuple[int, ...]
    """Robots side by side."""
    physics_steps: int
    seconds: float
    """That the repeats of a timing may take, at least three of them."""


FULL = Sizes(
    agents=(("ippo", 1024, 1), ("ippo", 4096, 1), ("hypermarl", 1024, 1), ("hypermarl", 4096, 1), ("ippo", 1024, 8)),
    steps=128,
    updates=10,
    options={"lr": 1e-3},
    filters=((8, 512, 256, 16), (8, 4096, 256, 16)),
    robots=("hopper", "ant"),
    widths=(1024, 4096),
    physics_steps=20,
    seconds=6.0,
)
TINY = Sizes(
    agents=(("ippo", 4, 1),),
    steps=25,
    updates=2,
    options={"env": "matrix_game", "lr": 1e-3, "hidden": (8,), "num_minibatches": 1, "num_epochs": 1},
    filters=((1, 6, 4, 2),),
    robots=("inverted_pendulum",),
    widths=(3,),
    physics_steps=2,
    seconds=0.05,
)
LONGEST_ASSOCIATIVE = 512
"""XLA compiles the associative form of longer ones for minutes."""
VALUES, GRADIENTS, PHYSICS = 1e-4, 1e-3, 1e-3
"""Largest difference, in units of the largest number of the array."""


def repeated(measure: Callable[[], float], seconds: float) -> list[float]:
    """What is measured, in seconds, 3 to 20 times, after one that is not counted, until `seconds` are over."""
    measure()
    taken: list[float] = []
    while len(taken) < 3 or (sum(taken) < seconds and len(taken) < 20):
        taken.append(measure())
    return taken


def milliseconds(function: Callable, inputs: Any, seconds: float, parts: int = 1) -> list[float]:
    """Quartiles of what one of `parts` equal parts of a call takes."""
    import jax

    from jaxstack.report.timing import timed

    once = lambda: timed(lambda: jax.block_until_ready(function(*inputs))).wall
    return quartiles_of([1e3 * s / parts for s in repeated(once, seconds)])


def quartiles_of(values: list[float]) -> list[float]:
    import numpy as np

    return [float(q) for q in np.quantile(values, (0.25, 0.5, 0.75))]


def device(sizes: Sizes, args: argparse.Namespace) -> Iterator[Row]:
    import jax

    found = jax.devices()
    memory = found[0].memory_stats() or {}
    yield {
        "case": "device",
        "backend": jax.default_backend(),
        "devices": [d.device_kind for d in found],
        "bytes": memory.get("bytes_limit"),
        "met": args.tiny or jax.default_backend() != "cpu",
        "text": f"{len(found)} x {found[0].device_kind} ({jax.default_backend()}), jax {jax.__version__}",
    }


def made(agent: str, num_envs: int, sizes: Sizes) -> Any:
    """A learner of `train` for all its updates."""
    from jaxstack import agents

    options = dict(env="jaxmarl/MPE_simple_spread_v3", num_envs=num_envs, num_steps=sizes.steps) | sizes.options
    return agents.make(agent, total_steps=num_envs * sizes.steps * sizes.updates, **options)


def train(sizes: Sizes, args: argparse.Namespace) -> Iterator[Row]:
    import jax
    import numpy as np

    from jaxstack.core import ledger, program

    for agent, num_envs, seeds in sizes.agents:
        book = ledger.Ledger()
        begin = time.perf_counter()
        built = program.build(
            made(agent, num_envs, sizes), list(range(seeds)), book, chunk=sizes.updates, evaluate=False
        )
        compiling = time.perf_counter() - begin
        found: dict[str, Any] = {}

        def run(built: Any = built, found: dict[str, Any] = found) -> float:
            state, alive = jax.block_until_ready(built.init())
            begin = time.perf_counter()
            *_, metrics = jax.block_until_ready(built.advance(state, alive, 0, sizes.updates))
            seconds = time.perf_counter() - begin
            found.update({k: np.asarray(v, np.float64) for k, v in metrics.items()})
            return seconds

        samples = num_envs * sizes.steps * sizes.updates * seeds
        rates = quartiles_of([samples / s for s in repeated(run, sizes.seconds)])
        returns = found["rollout/return"].mean(-1)
        finite = all(np.isfinite(v).all() for k, v in found.items() if "loss" in k) and bool(np.isfinite(returns).all())
        rises = args.tiny or bool(returns[-1] > returns[0])
        peak = max(p.peak_bytes for p in book.programs)
        yield {
            "case": f"train, {agent}, {num_envs} environments, {seeds} seed{'s' * (seeds > 1)}",
            "steps_per_s_quartiles": rates,
            "compile_s": compiling,
            "peak_bytes": peak,
            "returns": [float(returns[0]), float(returns[-1])],
            "met": finite and rises,
            "text": f"{rates[1] / 1e3:,.0f} k steps/s, compiled in {compiling:.0f} s, {peak / 2**20:,.0f} MiB, "
            f"return {returns[0]:.1f} -> {returns[-1]:.1f}{'' if finite else ', NOT FINITE'}",
        }


def kla(sizes: Sizes, args: argparse.Namespace) -> Iterator[Row]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxstack.sequence.kla import kla_scan

    names = ("v", "precision", "k", "q", "abar", "pbar")
    rng = np.random.default_rng(0)
    for batch, length, channels, states in sizes.filters:
        wide, narrow = (batch, length, channels), (batch, length, states)
        drawn = [rng.uniform(*x) for x in ((-1, 1, wide), (0, 2, wide), (-0.5, 0.5, narrow), (-0.5, 0.5, narrow))]
        drawn += [rng.uniform(0.8, 1.0, (channels, states)), rng.uniform(0, 0.01, (channels, states))]

        def loss(*x: Any, **options: Any) -> Any:
            y, var, _ = kla_scan(*x, **options)
            # a mean over time and batch would hide what is wrong at few places
            return (y * jnp.sin(jnp.arange(y.size).reshape(y.shape))).sum() + var.sum(), (y, var)

        def call(**options: Any) -> Any:
            whole = jax.value_and_grad(functools.partial(loss, **options), argnums=tuple(range(6)), has_aux=True)
            return jax.jit(whole)

        with jax.default_device(jax.devices("cpu")[0]), jax.enable_x64(True):
            (_, outputs), grads = call(method="sequential")(*[jnp.asarray(x, jnp.float64) for x in drawn])
            right = [np.asarray(x) for x in (*outputs, *grads)]
        inputs = [jnp.asarray(x, jnp.float32) for x in drawn]
        best: tuple[float, str] = (math.inf, "")
        for form in ("sequential", "chunked", "associative", "pallas"):
            if form == "associative" and length > LONGEST_ASSOCIATIVE:
                continue
            case = f"kla, B = {batch}, T = {length}, {channels} x {states}, {form}"
            options: dict[str, Any] = {"method": form, "interpret": form == "pallas" and args.tiny}
            begin = time.perf_counter()
            try:
                forward = jax.jit(lambda *x, o=options: loss(*x, **o)[1]).lower(*inputs).compile()
                both = call(**options).lower(*inputs).compile()
            except Exception as e:  # whatever a compiler of another version raises is a result
                why = " ".join(f"{type(e).__name__}: {e}".split())[:300]
                yield {"case": case, "met": False, "error": why, "text": f"does not compile: {why}"}
                continue
            compiling = time.perf_counter() - begin
            (_, outputs), grads = both(*inputs)
            apart = [
                float(np.abs(np.asarray(x) - y).max() / np.abs(y).max()) for x, y in zip((*outputs, *grads), right)
            ]
            values, gradients = max(apart[:2]), max(apart[2:])
            timed = {"forward": forward, "gradient": both}
            ms = {k: milliseconds(f, inputs, sizes.seconds / 2) for k, f in timed.items()}
            best = min(best, (ms["gradient"][1], form))
            yield {
                "case": case,
                "compiled": not options["interpret"],
                "value_error": values,
                "gradient_error": gradients,
                "gradient_errors": dict(zip(names, apart[2:])),
                "ms_quartiles": ms,
                "compile_s": compiling,
                "met": values <= VALUES and gradients <= GRADIENTS,
                "text": f"forward {ms['forward'][1]:.3g} ms, with gradient {ms['gradient'][1]:.3g} ms, "
                f"errors {values:.1e} and {gradients:.1e}{', interpreted' * options['interpret']}",
            }
        yield {
            "case": f"kla, B = {batch}, T = {length}, fastest",
            "form": best[1],
            "text": f'{best[1]}; `python scripts/bench_scan.py --write` stores such figures for method="auto"',
        }


def physics(sizes: Sizes, args: argparse.Namespace) -> Iterator[Row]:
    import jax
    import numpy as np
    from brax import envs as brax_envs

    from jaxstack.fast import batch_last

    for robot in sizes.robots:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own, of its files
            lib: Any = brax_envs.get_environment(robot, backend="spring")
        step = lib.pipeline_step
        reset = jax.jit(jax.vmap(lambda key, lib=lib: lib.reset(key).pipeline_state))
        for width in sizes.widths:
            keys = jax.random.split(jax.random.key(0), width)
            start = jax.block_until_ready(reset(keys))
            actions = jax.random.uniform(jax.random.key(1), (sizes.physics_steps, width, lib.action_size), minval=-1)

            def play(one: Callable, start: Any = start, actions: Any = actions) -> Any:
                return jax.jit(lambda s, a: jax.lax.scan(lambda s, a: (jax.vmap(one)(s, a), None), s, a)[0])

            before = set(batch_last.BACKENDS)
            forms, compiling = {}, {}
            try:
                batch_last.BACKENDS.add(jax.default_backend())
                for name, one in (("vmap", step), ("batch last", batch_last.batch_last(step))):
                    begin = time.perf_counter()
                    forms[name] = play(one).lower(start, actions).compile()
                    compiling[name] = time.perf_counter() - begin
            finally:
                batch_last.BACKENDS.clear()
                batch_last.BACKENDS.update(before)
            ends = {k: np.asarray(f(start, actions).x.pos) for k, f in forms.items()}
            apart = float(np.abs(ends["vmap"] - ends["batch last"]).max() / np.abs(ends["vmap"]).max())
            parts = sizes.physics_steps
            ms = {k: milliseconds(f, (start, actions), sizes.seconds / 2, parts) for k, f in forms.items()}
            yield {
                "case": f"physics, {robot}, {width} side by side",
                "ms_per_step_quartiles": ms,
                "compile_s": compiling,
                "error": apart,
                "met": apart <= PHYSICS,
                "text": f"a step in {ms['vmap'][1]:.3g} ms by vmap, {ms['batch last'][1]:.3g} ms with the batch last "
                f"(compiled in {compiling['vmap']:.0f} and {compiling['batch last']:.0f} s), error {apart:.1e}",
            }


def digest(sizes: Sizes, args: argparse.Namespace) -> Iterator[Row]:
    """A run's parameters, as a checksum: a part of `determinism`, in a process of its own."""
    import jax
    import numpy as np

    from jaxstack.core import runner

    agent, num_envs, _ = sizes.agents[0]
    begin = time.perf_counter()
    learner = made(agent, num_envs, sizes)
    state = runner.train(learner, min(5, sizes.updates), 1, progress=False, eval_every=-1).state
    leaves = b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(state.params))
    yield {"case": "digest", "sha256": hashlib.sha256(leaves).hexdigest(), "s": time.perf_counter() - begin}


def determinism(sizes: Sizes, args: argparse.Namespace) -> Iterator[Row]:
    for name, flags in (("with flags", FLAGS), ("without", "")):
        xla = " ".join(filter(None, (os.environ.get("XLA_FLAGS", ""), flags)))
        runs = []
        for _ in range(2):
            # the cache would hide what autotuning changes from process to process
            found, why = child("digest", args, math.inf, {"XLA_FLAGS": xla, "JAXSTACK_CACHE": "off"})
            if why:
                yield {"case": f"determinism, {name}", "met": not flags, "error": why, "text": why}
                break
            runs += found
        else:
            same = len({r["sha256"] for r in runs}) == 1
            yield {
                "case": f"determinism, {name}",
                "flags": flags,
                "identical": same,
                "seconds": [r["s"] for r in runs],
                "met": same or not flags,
                "text": f"two processes are bitwise {'identical' if same else 'DIFFERENT'}",
            }


def peer(sizes: Sizes, args: argparse.Namespace) -> Iterator[Row]:
    import bench_agents

    from jaxstack.report.timing import in_turn, quartiles, timed

    for num_envs in sorted({n for _, n, _ in sizes.agents}):
        case = bench_agents.mpe(num_envs, sizes.updates, 1.0)
        case = case._replace(options=case.options | {"num_steps": sizes.steps})
        sides = {
            "ours": bench_agents.ours(case.learner, sizes.updates),
            "jaxmarl": bench_agents.jaxmarl_mpe(case, args),
        }
        seconds = in_turn({k: lambda n, s=s: timed(lambda: s.run(n)).wall for k, s in sides.items()}, 5)
        ratio = quartiles(seconds["jaxmarl"], seconds["ours"])
        samples = num_envs * sizes.steps * sizes.updates
        rates = {k: quartiles_of([samples / s for s in v]) for k, v in seconds.items()}
        yield {
            "case": f"peer, ippo, {num_envs} environments, ours / JaxMARL",
            "ratio_quartiles": ratio,
            "steps_per_s_quartiles": rates,
            "compile_s": {k: s.compile_seconds for k, s in sides.items()},
            "text": f"{ratio[1]:.2f} [{ratio[0]:.2f}, {ratio[2]:.2f}] times JaxMARL's "
            f"{rates['jaxmarl'][1] / 1e3:,.0f} k steps/s",
        }


CHECKS = {"device": device, "train": train, "kla": kla, "physics": physics, "peer": peer, "determinism": determinism}
PARTS = CHECKS | {"digest": digest}


def child(name: str, args: argparse.Namespace, seconds: float, variables: dict[str, str] | None = None) -> Any:
    """Rows of a check that runs in a process of its own, and what ended it early, if anything did."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        command = [sys.executable, str(SCRIPTS / "check_accelerator.py"), "--child", name, "--rows", str(rows)]
        command += ["--tiny"] * args.tiny + (["--jaxmarl", str(args.jaxmarl)] if args.jaxmarl else [])
        said = Path(folder) / "stderr"
        variables = os.environ | (variables or {})
        if (platforms := variables.get("JAX_PLATFORMS")) and "cpu" not in platforms:
            variables["JAX_PLATFORMS"] = f"{platforms},cpu"  # where the right numbers are computed
        with open(said, "wb") as errors:
            # a check is a group of its own, so that what it starts ends with it
            outer: dict[str, Any] = dict(start_new_session=not args.child)
            process = subprocess.Popen(command, env=variables, stdout=errors, stderr=errors, **outer)
            try:
                code = process.wait(None if math.isinf(seconds) else max(seconds, 1.0))
                why = "" if code == 0 else f"ended with {code}: {_last_line(said)}"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()
                why = "the time was over"
        lines = rows.read_text(encoding="utf-8").splitlines() if rows.exists() else []
        return [json.loads(line) for line in lines], why


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "no message"


def checked(name: str, args: argparse.Namespace, seconds: float) -> list[Row]:
    """A check's rows, printed as they are known."""
    if seconds <= 0:
        rows, why = [], "not begun: the time was over"
    else:
        rows, why = child(name, args, seconds)
    if why:
        late = why.endswith("the time was over")
        rows.append({"case": name, "text": why, "ended_early": True} | ({} if late else {"met": False}))
    for row in rows:
        mark = {True: "holds", False: "FAILS", None: ""}[row.get("met")]
        print(f"{mark:6s} {row['case']:58s} {row['text']}", flush=True)
    return rows


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checks", nargs="+", choices=list(CHECKS), help="default: all")
    parser.add_argument("--jaxmarl", type=Path, help="a clone of JaxMARL")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU; the kernel is interpreted")
    parser.add_argument("--minutes", type=float, default=8.0, help="the most that all checks may take")
    parser.add_argument("--out", type=Path, default=Path("runs/accelerator.json"))
    parser.add_argument("--child", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    begin = time.monotonic()
    parser = options()
    args = parser.parse_args(argv)
    if args.minutes <= 0:
        parser.error(f"--minutes {args.minutes:g}: expected more than 0")
    if args.jaxmarl and not (args.jaxmarl / "baselines" / "IPPO").is_dir():
        parser.error(f"--jaxmarl {args.jaxmarl}: expected a clone of JaxMARL (baselines/IPPO is missing)")
    if args.checks and "peer" in args.checks and not args.jaxmarl:
        parser.error("--checks peer: expected together with --jaxmarl PATH")
    if args.child:
        with open(args.rows, "w", encoding="utf-8") as file:
            for row in PARTS[args.child](TINY if args.tiny else FULL, args):
                print(json.dumps(row), file=file, flush=True)
        return 0
    names = args.checks or [n for n in CHECKS if n != "peer" or args.jaxmarl]
    names = ["device", *(n for n in names if n != "device")]
    rows: list[Row] = []
    for name in names:
        rows += checked(name, args, 60 * args.minutes - (time.monotonic() - begin))
        if name == "device" and not rows[0].get("met"):
            found = rows[0].get("backend") or rows[0]["text"]
            print(f"check_accelerator.py: found {found}, expected a GPU or TPU (--tiny runs on a CPU)", file=sys.stderr)
            return 2
    import bench_report

    facts = {k: rows[0].get(k) for k in ("backend", "devices")}
    bench_report.write(args.out, rows, **facts, tiny=args.tiny, seconds=time.monotonic() - begin)
    failed = [row["case"] for row in rows if row.get("met") is False]
    late = [row["case"] for row in rows if row.get("ended_early") and row["case"] not in failed]
    print(f"{len(failed)} of {sum('met' in row for row in rows)} do not hold", *failed, sep="\n  ")
    if late:
        print(f"without result, as the time was over: {', '.join(late)}")
    print(f"written to {args.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
