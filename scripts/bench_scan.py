"""Compare the forms of the scans in jaxstack/sequence over a grid of sizes and write the table behind method="auto".

    python scripts/bench_scan.py                                  # print a table; minutes on 2 CPU cores
    python scripts/bench_scan.py --lengths 64 --lanes 64          # seconds
    python scripts/bench_scan.py --write                          # and store the winners for this backend

Every repeat times all forms one after the other, and what is shown is the median of the ratios to the sequential form
within a repeat, so that load on the machine hits all alike; milliseconds are the least seen. "grad" is value and
gradient; the winner is the form with the least grad time, unless it beats the sequential one by less than 5 %.
On GPU or TPU add --methods sequential chunked associative pallas (the Pallas kernel exists for kla).
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxstack.sequence.scan as scan
from jaxstack.core.errors import UserError
from jaxstack.report.timing import in_turn, timed
from jaxstack.sequence.kla import kla_scan

TABLE = Path(scan.__file__).with_name("scan_table.json")
RECURRENCES = ("affine", "moebius", "kla")
D_STATE = 16


def problem(recurrence: str, length: int, lanes: int, method: str) -> tuple[Any, tuple[Any, ...]]:
    """A scalar-valued function of arrays that uses every output, and its arguments."""
    rng = np.random.default_rng(0)
    draw = lambda low, high, *shape: jnp.asarray(rng.uniform(low, high, shape), jnp.float32)
    if recurrence == "affine":
        args = (draw(0.8, 1.0, length, lanes), draw(-1, 1, length, lanes))
        return lambda a, b: scan.affine_scan(a, b, method=method)[0].sum(), args
    if recurrence == "moebius":
        args = (draw(0, 1, length, lanes), draw(0.8, 1.0, lanes), draw(0, 0.01, lanes), jnp.ones(lanes))
        return lambda *x: scan.moebius_scan(*x, method=method)[0].sum(), args
    channels = max(lanes // D_STATE, 1)
    d_state = lanes // channels
    wide, narrow, state = (1, length, channels), (1, length, d_state), (channels, d_state)
    args = (
        *(draw(-1, 1, *wide), draw(0, 2, *wide), draw(-0.5, 0.5, *narrow), draw(-0.5, 0.5, *narrow)),
        *(draw(0.8, 1.0, *state), draw(0, 0.01, *state)),
    )
    return lambda *x: sum(o.sum() for o in kla_scan(*x, method=method)[:2]), args


def measure(recurrence: str, length: int, lanes: int, methods: list[str], repeats: int) -> dict[str, Any]:
    """{method: {fwd_ms, grad_ms, fwd_ratio, grad_ratio, compile_s}} with ratios to the first method."""
    calls, compile_s = {}, {}
    for method in methods:
        f, args = problem(recurrence, length, lanes, method)
        begin = time.perf_counter()
        for kind, g in (("fwd", f), ("grad", jax.value_and_grad(f, argnums=tuple(range(len(args)))))):
            calls[method, kind] = jax.jit(g).lower(*args).compile(), args
        compile_s[method] = time.perf_counter() - begin
    once = lambda f: lambda _: 1e3 * timed(lambda: jax.block_until_ready(f[0](*f[1]))).wall
    times = in_turn({name: once(f) for name, f in calls.items()}, repeats)
    ratio = lambda m, kind: statistics.median(x / y for x, y in zip(times[m, kind], times[methods[0], kind]))
    return {
        m: dict(
            {f"{kind}_ms": min(times[m, kind]) for kind in ("fwd", "grad")},
            **{f"{kind}_ratio": ratio(m, kind) for kind in ("fwd", "grad")},
            compile_s=compile_s[m],
        )
        for m in methods
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recurrences", nargs="+", default=list(RECURRENCES), choices=RECURRENCES)
    parser.add_argument("--lengths", nargs="+", type=int, default=[64, 512, 4096])
    parser.add_argument("--lanes", nargs="+", type=int, default=[16, 256, 4096], help="independent recurrences")
    parser.add_argument("--methods", nargs="+", default=["sequential", "chunked", "associative"])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--associative-up-to", type=int, default=512, help="longest T for it; XLA compiles it slowly")
    parser.add_argument("--write", action="store_true", help=f"store the winners in {TABLE.name}")
    options = parser.parse_args()
    if options.methods[0] != "sequential":
        raise UserError("--methods: expected 'sequential' first, the ratios refer to it")
    backend, table = jax.default_backend(), json.loads(TABLE.read_text())
    print(f"backend {backend}; ratios to the sequential form\n")
    print("recurrence  T      lanes  method       fwd ms  ratio   grad ms  ratio  compile s")
    for recurrence in options.recurrences:
        rows = []
        for length in options.lengths:
            for lanes in options.lanes:
                skip = {m for m in options.methods if m == "associative" and length > options.associative_up_to}
                skip |= {"pallas"} if recurrence != "kla" else set()
                methods = [m for m in options.methods if m not in skip]
                result = measure(recurrence, length, lanes, methods, options.repeats)
                for m, r in result.items():
                    print(
                        f"{recurrence:11} {length:<6} {lanes:<6} {m:12} {r['fwd_ms']:6.2f} {r['fwd_ratio']:6.2f}"
                        f"   {r['grad_ms']:7.2f} {r['grad_ratio']:6.2f}  {r['compile_s']:9.1f}",
                        flush=True,
                    )
                best = min(result, key=lambda m: result[m]["grad_ratio"])
                best = best if result[best]["grad_ratio"] < 0.95 else "sequential"
                ratios = {m: round(r["grad_ratio"], 2) for m, r in result.items()}
                rows.append({"length": length, "lanes": lanes, "best": best, "grad_ratio": ratios})
        table.setdefault(backend, {})[recurrence] = rows
    if options.write:
        TABLE.write_text(_text(table))
        print(f"\nwrote {TABLE}")


def _text(table: dict[str, Any]) -> str:
    """JSON with one line a row."""
    backends = []
    for backend, recurrences in table.items():
        parts = []
        for name, rows in recurrences.items():
            lines = ",\n".join(f"      {json.dumps(row)}" for row in rows)
            parts.append(f'    "{name}": [\n{lines}\n    ]')
        backends.append(f'  "{backend}": {{\n' + ",\n".join(parts) + "\n  }")
    return "{\n" + ",\n".join(backends) + "\n}\n"


if __name__ == "__main__":
    main()
