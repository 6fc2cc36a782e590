"""Speed of the sequence mixers: against each other, in decoding, with growing T, and against the released package.

    python scripts/bench_sequence.py                                         all cases but torch; minutes on 2 cores
    python scripts/bench_sequence.py --kla PATH --torch-python PYTHON        with it: a clone, a Python that has torch
    python scripts/bench_sequence.py --cases mixers --mixers kla gla mamba --lengths 1024
    python scripts/bench_sequence.py --tokens 512 --lengths 64 128 --scan-up-to 4096      a check that it works

mixers   forward and gradient (of the sum of squares of y, in parameters and x) of one layer of width D = 64, with B T
         constant and states of one size, see LAYERS; KLA over GLA and over Mamba, aim at most 2. Softmax attention is
         left out above T = 4096: its logits are [B, H, T, T].
scan     the form that method="auto" takes over the fastest form, at the sizes of scan_table.json, value and gradient;
         aim at most 1.2. The associative form, which XLA compiles slowly, runs only where the table has it within 1.4
         of the fastest.
decode   a token's cost through `step` after contexts of growing length; aim a flat line for KLA. Attention with a
         declared context that grows along, and with one fixed context.
growth   forward and gradient of KLA, B = 1, T = 2k to 32k; aim an exponent of 1.0 +- 0.1.
torch    the released PyTorch layer (Shaj et al., 2026) with our weights on the same x, in a child process, calls
         alternating; its default scan and its doubling scan; aim at least 3 times its faster one.

All is compiled ahead of time with the persistent cache off. Repeats alternate between what is compared; shown are
medians, ratios within a repeat with quartiles, compile seconds and XLA's peak memory.
"""

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_report
import bench_scan
import jax
import jax.numpy as jnp
import numpy as np
from bench_agents import Side, interleaved
from bench_child import Child

from jaxstack.core.errors import UserError
from jaxstack.report.timing import quartiles
from jaxstack.sequence import scan
from jaxstack.sequence.kla_weights import layer_to_torch
from jaxstack.sequence.trainer import make_mixer

FEATURES = 64
ATTENTION_UP_TO = 4096
ASSOCIATIVE_WITHIN = 1.4
KINDS = ("forward", "gradient")

LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "kla": ("kla", {}),
    "gla": ("gla", {"num_heads": 2, "expand_k": 1.0, "expand_v": 2.0}),
    "mamba": ("mamba", {"d_state": 32}),
    "mamba of N = 16": ("mamba", {"d_state": 16}),
    "mamba2": ("mamba2", {"d_state": 32}),
    "linear_attention": ("linear_attention", {"num_heads": 1}),
    "deltanet": ("deltanet", {"num_heads": 1}),
    "gated_deltanet": ("gated_deltanet", {"num_heads": 1, "expand_v": 1.25}),
    "mingru": ("mingru", {}),
    "s5": ("s5", {"d_state": 256, "blocks": 4}),
    "attention": ("attention", {}),
}
"""Row -> mixer and options. The measure is the state of KLA with its defaults (128 channels x 16 filters, precision and
mean, and the convolution's window: 4480 numbers); GLA has the paper's proportions at twice its width, Mamba with N = 16
has as many filters as KLA and half its state. minGRU and S5 hold a vector: a state as large would take a layer 35 times
as wide. Attention's cache holds T tokens."""

Row = dict[str, Any]


def layer(name: str, length: int) -> Any:
    mixer, options = LAYERS[name]
    return make_mixer(mixer, FEATURES, **options, **({"context": length} if mixer == "attention" else {}))


@functools.cache
def variables_of(name: str) -> Any:
    module = layer(name, 16)
    return jax.jit(module.init)(jax.random.key(1), draw(1, 16, FEATURES))


def state_bytes(module: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(module.init_state(1)))


def ahead(function: Callable, *arguments: Any) -> tuple[Callable, float, int]:
    """(program, compile seconds, peak bytes)"""
    begin = time.perf_counter()
    program = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - begin
    m = program.memory_analysis()
    assert m is not None, "this backend has no memory analysis"
    peak = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
    return program, seconds, peak


def compiled(function: Callable, *arguments: Any, calls: int = 1) -> Side:
    """`calls` calls a run."""
    program, seconds, peak = ahead(function, *arguments)

    def run(_: int) -> None:
        for _ in range(calls):
            jax.block_until_ready(program(*arguments))

    return Side(run, seconds, peak)


def draw(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape)


def passes(name: str, batch: int, length: int) -> dict[str, Side]:
    """Forward and gradient of one layer."""
    module, variables, x = layer(name, length), variables_of(name), draw(batch, length, FEATURES)
    forward = lambda variables, x: module.apply(variables, x)[0]
    loss = lambda variables, x: (forward(variables, x) ** 2).sum()
    gradient = jax.grad(loss, argnums=(0, 1))
    return {kind: compiled(f, variables, x) for kind, f in zip(KINDS, (forward, gradient))}


def ratio_row(case: str, over: list[float], under: list[float], target: float, least: bool = False) -> Row:
    """`target` is the most the ratio should be, or the least."""
    low, median, high = quartiles(over, under)
    aim = f"aim at {'least' if least else 'most'} {target}"
    print(f"{case:52s} {median:7.2f} [{low:.2f}, {high:.2f}] ({aim})", flush=True)
    met = median >= target if least else median <= target
    return {"case": case, "target": target, "met": met, "ratio_quartiles": [low, median, high]}


def exponent_row(case: str, sizes: list[int], seconds: list[list[float]], aim: float | None) -> Row:
    """Slope of log seconds over log size, within each repeat."""
    slopes = [np.polyfit(np.log(sizes), np.log(s), 1)[0] for s in zip(*seconds)]
    low, median, high = (float(q) for q in np.quantile(slopes, (0.25, 0.5, 0.75)))
    row: Row = {"case": case, "exponent_quartiles": [low, median, high]}
    text = ""
    if aim is not None:
        row |= {"target": aim, "met": abs(median - aim) <= 0.1}
        text = f" (aim {aim} +- 0.1)"
    print(f"{case:52s} {median:7.2f} [{low:.2f}, {high:.2f}]{text}", flush=True)
    return row


def time_row(case: str, side: Side, seconds: list[float], **more: Any) -> Row:
    row = {"case": case, "median_ms": 1e3 * float(np.median(seconds)), "compile_s": side.compile_seconds}
    row |= {"peak_mib": side.peak_bytes / 2**20, **more}
    print(f"{case:52s} {row['median_ms']:9.2f} ms {row['peak_mib']:8.1f} MiB {row['compile_s']:6.1f} s", flush=True)
    return row


# ---------------------------------------------------------------- cases


def mixers(args: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    print("state bytes a sequence: ", end="")
    print(", ".join(f"{n} {state_bytes(layer(n, 1024))}{' at T = 1024' * (n == 'attention')}" for n in args.mixers))
    for length in args.lengths:
        batch = max(args.tokens // length, 1)
        names = [n for n in args.mixers if n != "attention" or length <= ATTENTION_UP_TO]
        if len(names) < len(args.mixers):
            print(f"attention left out at T = {length}")
        sides = {(n, kind): side for n in names for kind, side in passes(n, batch, length).items()}
        # attention touches a gigabyte of memory: what runs right after it pays for pages that the others find at hand
        seconds = {}
        for alone in (False, True):
            group = {key: side for key, side in sides.items() if (key[0] == "attention") == alone}
            seconds |= interleaved(group, args.repeats)
        at = f"mixers, T = {length}"
        for (name, kind), side in sides.items():
            more = {"batch": batch, "state_bytes": state_bytes(layer(name, length)), "options": LAYERS[name][1]}
            rows.append(time_row(f"{at}, {name}, {kind}", side, seconds[name, kind], **more))  # pyright: ignore
        for other in (n for n in names if LAYERS[n][0] in ("gla", "mamba") and "kla" in names):
            for kind in KINDS:
                over, under = seconds["kla", kind], seconds[other, kind]  # pyright: ignore
                rows.append(ratio_row(f"{at}, kla / {other}, {kind}", over, under, 2.0))
    return rows


def scans(args: argparse.Namespace) -> list[Row]:
    table = json.loads(bench_scan.TABLE.read_text()).get(jax.default_backend())
    if table is None:
        raise UserError(f"scan: {bench_scan.TABLE.name} has no sizes for {jax.default_backend()!r}; see bench_scan.py")
    rows = []
    for recurrence in bench_scan.RECURRENCES:
        for row in table[recurrence]:
            length, lanes = row["length"], row["lanes"]
            if length * lanes > args.scan_up_to:
                continue
            slow = row["grad_ratio"].get("associative", np.inf) > ASSOCIATIVE_WITHIN * min(row["grad_ratio"].values())
            forms = ["sequential", "chunked", *(["associative"] if not slow else [])]
            sides = {form: scan_side(recurrence, length, lanes, form) for form in forms}
            seconds = interleaved(sides, args.repeats)
            best = min(forms, key=lambda form: np.median(seconds[form]))
            chosen = scan.choose(recurrence, "auto", length, lanes)
            case = f"scan, {recurrence}, {length} x {lanes}, {chosen} / {best}"
            rows.append(ratio_row(case, seconds[chosen], seconds[best], 1.2))
            rows[-1]["compile_s"] = {form: side.compile_seconds for form, side in sides.items()}
    return rows


def scan_side(recurrence: str, length: int, lanes: int, form: str) -> Side:
    function, arguments = bench_scan.problem(recurrence, length, lanes, form)
    gradient = jax.value_and_grad(function, argnums=tuple(range(len(arguments))))
    return compiled(gradient, *arguments, calls=max(1, min(50, 2**20 // (length * lanes))))


def decode(args: argparse.Namespace) -> list[Row]:
    sides: dict[str, Side] = {}
    where: dict[str, list[str]] = {}
    longest = max(args.contexts)
    for name in ("kla", "gla", "mamba", "attention", "attention, fixed context"):
        kind, _, fixed = name.partition(",")
        for length in args.contexts:
            key = f"decode, after {length} tokens, {name}"
            declared = length if kind == "attention" and not fixed else longest
            sides[key] = decode_side(kind, length, declared + args.steps, args.steps)
            where.setdefault(name, []).append(key)
    seconds = {k: [s / args.steps for s in v] for k, v in interleaved(sides, args.repeats).items()}
    rows = [time_row(key, side, seconds[key]) for key, side in sides.items()]
    for name, keys in where.items():
        aim = 0.0 if name == "kla" else None
        rows.append(exponent_row(f"decode, exponent, {name}", args.contexts, [seconds[k] for k in keys], aim))
    return rows


def decode_side(name: str, length: int, context: int, steps: int) -> Side:
    """`steps` tokens after `length` others, batch 1. The cache of attention is filled with noise, other states by the
    tokens themselves, in pieces."""
    program, seconds, peak = decoder(name, context, steps)
    module, variables = layer(name, context), variables_of(name)
    state = module.init_state(1)
    if name == "attention":
        state = state._replace(k=draw(*state.k.shape), v=draw(*state.v.shape), count=jnp.full(1, length, jnp.int32))
    else:
        for part in jnp.split(draw(1, length, FEATURES), list(range(64, length, 64)), axis=1):
            state = prefill(name)(variables, part, state)
    xs = draw(steps, 1, FEATURES)
    return Side(lambda _: jax.block_until_ready(program(variables, xs, state)), seconds, peak)


@functools.cache
def prefill(name: str) -> Callable:
    return jax.jit(lambda variables, x, state: layer(name, 64).apply(variables, x, state=state)[1])


@functools.cache
def decoder(name: str, context: int, steps: int) -> tuple[Callable, float, int]:
    """Compiled for `steps` tokens; `context` is what attention declares."""
    module = layer(name, context)

    def run(variables: Any, xs: jax.Array, state: Any) -> Any:
        def body(state: Any, x: jax.Array) -> Any:
            y, state = module.apply(variables, x, state, method="step")
            return state, y

        return jax.lax.scan(body, state, xs)

    return ahead(run, variables_of(name), draw(steps, 1, FEATURES), module.init_state(1))


def growth(args: argparse.Namespace) -> list[Row]:
    sides = {n: passes("kla", 1, n) for n in args.growth}
    flat = {f"growth, T = {n}, {kind}": side for n, by_kind in sides.items() for kind, side in by_kind.items()}
    seconds = interleaved(flat, args.repeats)
    rows = [time_row(key, side, seconds[key]) for key, side in flat.items()]
    for kind in KINDS:
        series = [seconds[f"growth, T = {n}, {kind}"] for n in args.growth]
        rows.append(exponent_row(f"growth, exponent, {kind}", args.growth, series, 1.0))
    return rows


def torch_peer(args: argparse.Namespace, folder: Path) -> Child:
    """The released layer in a child process."""
    script = Path(__file__).with_name("bench_sequence_torch.py")
    return Child("torch", [str(args.torch_python), str(script), str(args.kla), str(folder)])


def torch(args: argparse.Namespace) -> list[Row]:
    batch, length = args.torch_size
    module, variables, x = layer("kla", length), variables_of("kla"), draw(batch, length, FEATURES)
    mine = passes("kla", batch, length)
    at = f"torch, B = {batch}, T = {length}"
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "weights.npz", allow_pickle=False, **layer_to_torch(module, variables))
        np.save(folder / "x.npy", np.asarray(x))
        peer = torch_peer(args, folder)
        try:
            about = peer.ask(do="load", d_state=module.d_state, expand=module.expand)
            theirs = np.asarray(peer.ask(do="output"))
            y, _ = module.apply(variables, x)
            error = float(np.abs(theirs - np.asarray(y[0, -8:])).max())
            print(f"torch {about['torch']}, {about['threads']} threads; largest |difference| of y {error:.1e}")
            rows.append({"case": f"{at}, difference of y", "max_abs": error, "peer": about})
            forms = [(kind, form) for kind in KINDS for form in args.torch_scans]
            first = {f: peer.ask(do=f[0], scan=f[1]) for f in forms}
            sides = {f"{at}, jaxstack, {kind}": side for kind, side in mine.items()}
            asked = lambda f: lambda _: peer.ask(do=f[0], scan=f[1]) and None
            sides |= {f"{at}, {f[1]} scan, {f[0]}": Side(asked(f), first[f], 0) for f in forms}
            seconds = interleaved(sides, args.repeats)
        finally:
            peer.close()
    rows += [time_row(key, side, seconds[key]) for key, side in sides.items()]
    for kind in KINDS:
        names = [f"{at}, {form} scan, {kind}" for form in args.torch_scans]
        best = min(names, key=lambda n: np.median(seconds[n]))
        mine_seconds = seconds[f"{at}, jaxstack, {kind}"]
        rows.append(ratio_row(f"{best} / jaxstack", seconds[best], mine_seconds, 3.0, least=True))
    return rows


CASES = {"mixers": mixers, "scan": scans, "decode": decode, "growth": growth, "torch": torch}


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--kla", type=Path, help="a clone of the released package")
    parser.add_argument("--torch-python", type=Path, help="a Python that has torch, numpy and tyro")
    parser.add_argument("--mixers", nargs="+", choices=list(LAYERS), default=list(LAYERS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 1024, 4096, 16384], help="T of mixers")
    parser.add_argument("--tokens", type=int, default=16384, help="B T of mixers")
    parser.add_argument("--scan-up-to", type=int, default=2**24, help="greatest length x lanes of scan")
    parser.add_argument("--contexts", nargs="+", type=int, default=[64, 256, 1024, 4096, 16384], help="of decode")
    parser.add_argument("--steps", type=int, default=64, help="tokens decoded in a repeat")
    parser.add_argument("--growth", nargs="+", type=int, default=[2048, 4096, 8192, 16384, 32768], help="T of growth")
    parser.add_argument("--torch-size", nargs=2, type=int, default=[1, 256], metavar=("B", "T"))
    parser.add_argument("--torch-scans", nargs="+", choices=["auto", "doubling"], default=["auto", "doubling"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_sequence.json"))
    return parser


def main() -> None:
    parser = options()
    args = parser.parse_args()
    if (args.kla is None) != (args.torch_python is None):
        parser.error("--kla, --torch-python: expected both or neither")
    if args.kla is not None and not args.kla.is_dir():
        parser.error(f"--kla {args.kla}: expected the directory of a clone")
    if args.repeats < 5:
        parser.error(f"--repeats {args.repeats}: expected at least 5, for quartiles")
    jax.config.update("jax_enable_compilation_cache", False)
    print(f"{'':52s}    median        peak compile")
    rows: list[Row] = []
    facts: dict[str, Any] = dict(backend=jax.default_backend(), repeats=args.repeats)
    for name in args.cases:
        if name == "torch" and args.kla is None:
            print("torch left out: needs --kla PATH --torch-python PYTHON")
            continue
        begin = time.perf_counter()
        rows += CASES[name](args)
        print(f"-- {name}: {time.perf_counter() - begin:.0f} s\n", flush=True)
        bench_report.write(args.out, rows, **facts)
    missed = [row["case"] for row in rows if not row.get("met", True)]
    print(f"aims missed: {len(missed)} of {sum('met' in row for row in rows)}", *missed, sep="\n  ")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
