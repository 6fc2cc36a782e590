"""Speed of networks for images and of the methods on them against PyTorch with the same weights.

    python scripts/bench_vision.py --torch-python PYTHON                       all cases; half an hour on 2 cores
    python scripts/bench_vision.py --torch-python PYTHON --naswot PATH         with the public code of NASWOT, a clone
    python scripts/bench_vision.py --torch-python PYTHON --cases train --threads 2 --add     one piece more of --out
    python scripts/bench_vision.py --torch-python PYTHON --tiny                a check that it works

forward     logits in evaluation, aim at least 1.0 times the speed of torch
train       forward, backward and SGD with momentum, aim 0.7
detector    a training step of the small FCOS detector on drawn scenes: targets, loss, gradient, clipped SGD, aim 0.7
fisher      Fisher potential of WRN-40-2 (BlockSwap), against a backward pass to all weights as in public code, aim 1.3
naswot      a score of a NAS-Bench-201 cell with new weights, against the clone's network and passes, aim 2
zero-shot   a round of zero-shot knowledge transfer from WRN-40-2 to WRN-16-1, aim 0.8
structured  separable convolutions with structured maps against plain torch forms of them, aim 1.0

PYTHON has torch, torchvision and timm and runs in a child process; calls alternate, with a short rest between them. The
rival is torch's default layout; channels-last stands beside it. Each number of threads has processes of its own, bound
to as many cores. Weights are arguments of our programs, BatchNorm is not folded. Networks for ImageNet see 128x128
pixels, the others 32x32.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Row = dict[str, Any]
REST = 0.005
"""Seconds between two turns: torch's threads look for work for a while after a call."""
FORWARD = ("wrn-40-2", "resnet-18", "mobilenet-v2", "densenet121", "mobilenet-v3-large", "efficientnet-lite0")
LARGE = ("densenet121", "mobilenet-v3-large", "efficientnet-lite0")
TRAINED = ("wrn-40-2", "resnet-18", "mobilenet-v2")
MAPS = ("dense", "generic", "lowrank", "shuffle", "acdc", "tt", "tucker", "hashed", "hashed-full")
CELL = "|nor_conv_3x3~0|+|nor_conv_3x3~0|avg_pool_3x3~1|+|skip_connect~0|nor_conv_3x3~1|skip_connect~2|"
SEEN = ("size", "scale", "radius")
"""Of a detector's config, what its loss reads."""
LAYOUTS = ("default", "channels_last")


class Job(NamedTuple):
    """One thing that both sides do."""

    case: str
    aim: float
    call: Callable[[], Any]
    """Ours; its result is waited for."""
    number: Callable[[], Any] | None
    """What torch's number is compared with; None: both draw weights of their own."""
    peers: dict[str, dict[str, Any]]
    """Name of a peer -> what the child is asked to make; the first one is the rival."""
    tolerance: float = 1e-3


def sizes(args: argparse.Namespace) -> dict[str, int]:
    if args.tiny:
        return dict(
            small=8,
            large=32,
            train=2,
            scenes=2,
            fisher=2,
            score=4,
            channels=4,
            cells=1,
            zero=4,
            rows=2,
            side=4,
            width=16,
        )
    return dict(
        small=32,
        large=128,
        train=32,
        scenes=16,
        fisher=128,
        score=64,
        channels=16,
        cells=5,
        zero=32,
        rows=32,
        side=16,
        width=64,
    )


@functools.cache
def variables_of(name: str, classes: int, side: int) -> Any:
    """A network and its variables: running statistics that are not those of the start."""
    import jax
    import jax.numpy as jnp

    from jaxstack.nn.vision import zoo

    network = zoo.network(name, classes)
    made = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, side, side, 3)))
    return network, made


def store(folder: Path, name: str, **arrays: Any) -> None:
    np.savez(folder / f"{name}.npz", allow_pickle=False, **{k: np.asarray(v) for k, v in arrays.items()})


def images(count: int, side: int, classes: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((count, side, side, 3), np.float32)
    return x, rng.integers(0, classes, count).astype(np.int32)


def both(kind: str, **ask: Any) -> dict[str, dict[str, Any]]:
    return {layout: dict(kind=kind, layout=layout, **ask) for layout in LAYOUTS}


def compiled(function: Callable, *arguments: Any, **options: Any) -> Callable:
    import jax

    return jax.jit(function, **options).lower(*arguments).compile()


def forward(args: argparse.Namespace, folder: Path) -> Any:
    import jax
    import jax.numpy as jnp

    from jaxstack.nn.torch_weights import to_torch

    for name in args.networks:
        classes, side = (1000, sizes(args)["large"]) if name in LARGE else (10, sizes(args)["small"])
        network, variables = variables_of(name, classes, side)
        store(folder, "weights", **to_torch(network, variables))
        for count in args.batches:
            x, y = images(count, side, classes)
            store(folder, "batch", x=x, y=y)
            x = jnp.asarray(x)
            run = compiled(lambda v, x, network=network: network.apply(v, x), variables, x)
            call = lambda run=run, v=variables, x=x: run(v, x)
            number = lambda call=call: np.asarray(jax.block_until_ready(call()))[0]
            case = f"forward, {name}, batch {count}"
            yield Job(case, 1.0, call, number, both("forward", network=name, classes=classes))


def train(args: argparse.Namespace, folder: Path) -> Any:
    import jax.numpy as jnp

    from jaxstack.nn.supervised import Hypers, Optimiser, cross_entropy, linen, supervised
    from jaxstack.nn.torch_weights import to_torch

    side, count = sizes(args)["small"], sizes(args)["train"]
    for name in (n for n in TRAINED if n in args.networks):
        network, variables = variables_of(name, 10, side)
        store(folder, "weights", **to_torch(network, variables))
        x, y = images(count, side, 10)
        store(folder, "batch", x=x, y=y)
        batch = (jnp.asarray(x), jnp.asarray(y))
        model, optimiser = linen(network, batch[0][:1]), Optimiser("sgd", "constant", decay=None)
        hypers = Hypers(lr=0.01, weight_decay=5e-4)
        learner = supervised(model, cross_entropy, optimiser=optimiser, num_steps=1000, hypers=hypers)
        ask = both("train", network=name, classes=10)
        yield stepped(f"train step, {name}, batch {count}", learner, variables, batch, ask)


def stepped(case: str, learner: Any, variables: Any, batch: Any, peers: dict[str, dict[str, Any]]) -> Job:
    """A job whose call is a step of a supervised learner, from one state to the next."""
    import jax
    import jax.numpy as jnp

    from jaxstack.nn.supervised import with_variables

    state = with_variables(learner, jax.tree.map(jnp.copy, variables), 0)
    step = compiled(learner.step, state, batch, donate_argnums=0)
    held = [step(state, batch)]
    first = float(held[0][1]["loss/train"])

    def call() -> Any:
        held[0] = step(held[0][0], batch)
        return held[0]

    return Job(case, 0.7, call, lambda: first, peers)


def detector(args: argparse.Namespace, folder: Path) -> Any:
    import jax
    import jax.numpy as jnp
    from flax.traverse_util import flatten_dict

    from jaxstack.data import boxes
    from jaxstack.nn import detector as detectors
    from jaxstack.nn.supervised import Optimiser, variables

    count = sizes(args)["scenes"]
    config = detectors.Config(batch_size=count)
    config = detectors.configs.replace(config, hypers=detectors.Hypers(lr=0.01))
    optimiser = Optimiser("sgd", "constant", clip=True)
    learner = detectors.learner_of(config, metrics={}, optimiser=optimiser)
    given = variables(jax.jit(learner.init)(jax.random.key(0), config.hypers))
    x, truth = boxes.part(config.data, "train", config.size, config.split_seed, count).read(range(count))
    store(folder, "weights", **{"/".join(path): leaf for path, leaf in flatten_dict(given).items()})
    store(folder, "batch", x=x, boxes=truth.boxes, labels=truth.labels, valid=truth.valid)
    batch = jax.tree.map(jnp.asarray, (x, truth))
    ask = both("detector", strides=detectors.strides(config), **{k: getattr(config, k) for k in SEEN})
    yield stepped(f"detector step, FCOS, width {config.width}, batch {count}", learner, given, batch, ask)


def fisher(args: argparse.Namespace, folder: Path) -> Any:
    import jax.numpy as jnp

    from jaxstack.nn.torch_weights import to_torch
    from jaxstack.vision.blockswap import fisher_potential, observed

    name, side, count = "wrn-40-2", sizes(args)["small"], sizes(args)["fisher"]
    network, variables = variables_of(name, 10, side)
    store(folder, "weights", **to_torch(network, variables))
    x, y = images(count, side, 10)
    store(folder, "batch", x=x, y=y)
    batch = (jnp.asarray(x), jnp.asarray(y))
    run = compiled(lambda v, batch: fisher_potential(observed(network), v, batch)[0], variables, batch)
    asks = {form: both("fisher", network=name, classes=10, form=form) for form in ("public", "branches")}
    peers = {"default": asks["public"]["default"], "channels_last": asks["public"]["channels_last"]}
    peers["gradients of branches alone"] = asks["branches"]["default"]
    call = lambda: run(variables, batch)
    yield Job(f"Fisher potential, {name}, batch {count}", 1.3, call, call, peers)


def naswot(args: argparse.Namespace, folder: Path) -> Any:
    import jax

    from jaxstack.vision import naswot as ours

    if args.naswot is None:
        print("naswot left out: needs --naswot PATH")
        return
    s = sizes(args)
    x, y = images(s["score"], s["small"], 10)
    store(folder, "batch", x=x, y=y)
    cells = ours.encode_cell(CELL)[None]
    scoring = ours.Scoring(ours.Skeleton(s["channels"], s["cells"], s["small"], 3, classes=1), relu_weights="reference")
    keys = iter(jax.random.split(jax.random.key(0), 10_000))
    call = lambda: ours.scores(next(keys), cells, x, scoring)[0]
    ask = dict(kind="naswot", layout="default", channels=s["channels"], cells=s["cells"], cell=CELL)
    what = f"{s['channels']} channels, {s['cells']} cells per stage, batch {s['score']}"
    yield Job(f"NASWOT score, {what}", 2.0, call, call, {"default": ask}, tolerance=0.02)


def zero_shot(args: argparse.Namespace, folder: Path) -> Any:
    import jax

    from jaxstack.nn.torch_weights import to_torch
    from jaxstack.vision import zero_shot_kt as kt

    s, image = sizes(args), (32, 32, 3)
    names = {"teacher": "wrn-16-1" if args.tiny else "wrn-40-2", "student": "wrn-10-1" if args.tiny else "wrn-16-1"}
    nets = {}
    for role, name in names.items():
        nets[role] = variables_of(name, 10, image[0])
        store(folder, role, **to_torch(nets[role][0], nets[role][1]))
    teacher, student = (kt.of_module(nets[r][0], image) for r in names)
    setup = kt.Setup(teacher, student, image, kt.ZeroShotGenerator(image), s["zero"])
    state = kt.begin(jax.random.key(0), kt.Hypers(), nets["teacher"][1], setup, 1000)
    run = compiled(lambda state, key: kt.zskt_round(state, key, setup), state, jax.random.key(1))
    keys, held = iter(jax.random.split(jax.random.key(2), 10_000)), [state]

    def call() -> Any:
        held[0], found = run(held[0], next(keys))
        return found["loss/student"]

    ask = dict(**names, classes=10, batch=s["zero"], steps=setup.student_steps)
    what = f"{names['teacher']} to {names['student']}, batch {s['zero']}"
    yield Job(f"zero-shot round, {what}", 0.8, call, None, both("zero_shot", **ask))


def structured(args: argparse.Namespace, folder: Path) -> Any:
    import jax
    import jax.numpy as jnp

    from jaxstack.nn.vision.separable import DEPTHWISE, STRUCTURED, SeparableConv

    s = sizes(args)
    shape = (s["rows"], s["side"], s["side"], s["width"])
    x, g = (jax.random.normal(jax.random.key(i), shape) for i in (0, 1))
    for kind in MAPS:
        layer = SeparableConv(s["width"], pointwise=kind)
        variables: Any = layer.init(jax.random.key(2), x)
        arrays = dict(variables["params"][STRUCTURED]) | dict(variables.get("hash", {}).get(STRUCTURED, {}))
        if DEPTHWISE in variables["params"]:
            arrays["depthwise"] = variables["params"][DEPTHWISE]["kernel"]
        store(folder, "batch", x=x, g=g, **{f"p/{k}": v for k, v in arrays.items()})
        others = {k: v for k, v in variables.items() if k != "params"}
        apply = lambda p, x, others, layer=layer: layer.apply({"params": p, **others}, x)
        given = (variables["params"], x, others)
        once = compiled(apply, *given)

        def back(p: Any, x: Any, others: Any, g: Any, apply: Callable = apply) -> Any:
            return jax.vjp(lambda p, x: apply(p, x, others), p, x)[1](g)[::-1]

        twice = compiled(back, *given, g)
        calls = {"forward": lambda once=once, a=given: once(*a), "gradient": lambda f=twice, a=given: f(*a, g)[0]}
        for name, call in calls.items():
            number = lambda call=call: np.asarray(jnp.asarray(call())[0, 0, 0])
            ask = both("structured", **{"map": kind, "pass": name})
            yield Job(f"structured, {kind}, {name}", 1.0, call, number, ask)


CASES = {
    "forward": forward,
    "train": train,
    "detector": detector,
    "fisher": fisher,
    "naswot": naswot,
    "zero-shot": zero_shot,
    "structured": structured,
}


def measured(job: Job, peer: Any, repeats: int) -> Row:
    """Check that both sides compute the same, then time them in turn."""
    import jax

    from jaxstack.report.timing import in_turn, quartiles

    key = lambda name: f"{job.case}/{name}"
    theirs = {name: peer.ask(do="make", key=key(name), **ask) for name, ask in job.peers.items()}
    row: Row = {"case": job.case, "target": job.aim}
    if job.number is not None:
        mine = np.asarray(job.number())
        far = max(float(np.abs(np.asarray(v) - mine).max() / np.abs(mine).max()) for v in theirs.values())
        row["relative_difference"] = far
        if not far <= job.tolerance:
            raise SystemExit(f"{job.case}: found results {far:.1e} apart, expected at most {job.tolerance:.0e}")

    def own(calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            jax.block_until_ready(job.call())
        return (time.perf_counter() - begin) / calls

    runs: dict[str, Callable[[int], float]] = {"ours": own}
    runs |= {n: lambda calls, n=n: peer.ask(do="run", key=key(n), calls=calls) for n in job.peers}
    once = {name: min(run(1), run(1)) for name, run in runs.items()}
    calls = {name: max(1, min(50, round(0.03 / seconds))) for name, seconds in once.items()}

    def measure(name: str) -> float:
        time.sleep(REST)
        return runs[name](calls[name])

    seconds = in_turn({name: lambda _, n=name: measure(n) for name in runs}, repeats, warm_up=False)
    ratios = {name: quartiles(seconds[name], seconds["ours"]) for name in job.peers}
    row |= {"ratio_quartiles": ratios["default"], "met": ratios["default"][1] >= job.aim}
    row["other_ratios_quartiles"] = {name: r for name, r in ratios.items() if name != "default"}
    row["median_ms"] = {name: 1e3 * float(np.median(s)) for name, s in seconds.items()}
    peer.ask(do="drop")
    low, median, high = ratios["default"]
    beside = "".join(f", {name} {r[1]:.2f}" for name, r in row["other_ratios_quartiles"].items())
    times = f"{row['median_ms']['ours']:.2f} ms, torch {row['median_ms']['default']:.2f}"
    print(f"{job.case:58s} {median:6.2f} [{low:.2f}, {high:.2f}] (aim {job.aim}){beside}; {times}", flush=True)
    return row


def worker(args: argparse.Namespace) -> list[Row]:
    """All cases with one number of threads, in this process."""
    import jax
    from bench_child import Child

    jax.config.update("jax_enable_compilation_cache", False)
    (threads,), rows = args.threads, []
    with tempfile.TemporaryDirectory() as name:
        script = Path(__file__).with_name("bench_vision_torch.py")
        clone = [str(args.naswot)] if args.naswot else []
        peer = Child("torch", [str(args.torch_python), str(script), name, str(threads), *clone])
        try:
            about = peer.ask(do="about")
            print(f"{threads} threads, torch {about['torch']}", flush=True)
            for case in args.cases:
                for job in CASES[case](args, Path(name)):
                    row = measured(job, peer, args.repeats)
                    row["case"] = f"{job.case}, {threads} thread{'s' * (threads > 1)}"
                    rows.append(row | {"threads": threads, "repeats": args.repeats, "peer": about})
        finally:
            peer.close()
    return rows


def bound(threads: int) -> None:
    """Leave this process and its children as many cores as threads, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < threads:
            raise SystemExit(f"--threads {threads}: found {len(cores)} cores, expected as many")
        os.sched_setaffinity(0, cores[:threads])


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", type=Path, required=True, help="has torch, torchvision and timm")
    parser.add_argument("--naswot", type=Path, help="a clone of the public code of NASWOT")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--networks", nargs="+", choices=FORWARD, default=list(FORWARD), help="of forward and train")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32], help="of forward")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="sizes that say nothing about speed")
    parser.add_argument("--add", action="store_true", help="keep the rows of --out that are not measured anew")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_vision.json"))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser


def main() -> int:
    parser = options()
    args = parser.parse_args()
    if args.worker:
        args.worker.write_text(json.dumps(worker(args)))
        return 0
    if args.naswot is not None and not args.naswot.is_dir():
        parser.error(f"--naswot {args.naswot}: expected the directory of a clone")
    if args.repeats < 5 and not args.tiny:
        parser.error(f"--repeats {args.repeats}: expected at least 5, for quartiles")
    import bench_report

    old = json.loads(args.out.read_text()) if args.add and args.out.exists() else {"rows": [], "pieces": []}
    rows: dict[str, Row] = {row["case"]: row for row in old["rows"]}
    given, pieces = sys.argv[1:], old["pieces"]
    for threads in args.threads:
        with tempfile.TemporaryDirectory() as name:
            found = Path(name) / "rows.json"
            command = [sys.executable, __file__, *given, "--threads", str(threads), "--worker", str(found)]
            done = subprocess.run(command, preexec_fn=lambda n=threads: bound(n))
            if done.returncode:
                return done.returncode
            rows |= {row["case"]: row for row in json.loads(found.read_text())}
    pieces.append([Path(a).name if Path(a).is_absolute() else a for a in given])
    bench_report.write(args.out, list(rows.values()), pieces=pieces)
    missed = [case for case, row in rows.items() if not row["met"]]
    print(f"aims missed: {len(missed)} of {len(rows)}", *missed, sep="\n  ")
    print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
