"""`jaxstack plan-edge`: how long a training step takes on devices at the edge, and who does what."""

import argparse
from typing import Any

from jaxstack.cli.parsing import Commands, real, seed, whole


def add_commands(commands: Commands) -> None:
    """Add the commands of this file."""
    p = commands.add(
        "plan-edge",
        _plan,
        "Plan a training step of a language model on phones and laptops (Cleave), beside other ways to train on them.",
    )
    p.add_argument(
        "--model",
        default="opt-1.3b",
        metavar="NAME|L,D,F,H,V",
        help="opt-1.3b, opt-13b, llama-70b; or layers, features, inner features, heads, vocabulary",
    )
    p.add_argument(
        "--devices", metavar="FILE", help="a CSV file: memory (GB), speed (TFLOP/s), down, up (MB/s), latency (ms)"
    )
    p.add_argument("--count", type=whole, default=128, help="devices that are drawn where no file is given")
    p.add_argument("--spread", type=real, default=10.0, help="of them: largest over smallest speed and links")
    p.add_argument("--seed", type=seed, default=0, help="of the draws")
    p.add_argument("--sequences", type=whole, default=128, help="of a batch")
    p.add_argument("--length", type=whole, default=1024, help="tokens of each")
    p.add_argument("--overlap", action="store_true", help="devices send, compute and receive at the same time")
    p.add_argument(
        "--server", type=real, metavar="GB/s", help="the parameter server's link, each way (default: no limit)"
    )
    p.add_argument("--cloud", type=real, default=150.0, metavar="TFLOP/s", help="an accelerator to compare with")
    p.add_argument("--out", metavar="FILE", help="a CSV file: bytes of each device")


def _plan(args: argparse.Namespace, _: list[str]) -> None:
    from pathlib import Path

    import numpy as np

    from jaxstack.core.errors import UserError
    from jaxstack.edge import cleave, cleave_baselines, cleave_devices

    for name in ("count", "sequences", "length"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: expected at least 1")
    if not 1 <= args.spread < np.inf:
        raise UserError(f"--spread {args.spread:g}: expected 1 or more, and finite")
    for name in ("server", "cloud"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} {value:g}: expected a number above 0")
    if args.out and Path(args.out).suffix != ".csv":
        raise UserError(f"--out {args.out}: expected a name ending in .csv")
    model = _model(args.model)
    devices = (
        cleave_devices.read(args.devices) if args.devices else cleave_devices.drawn(args.count, args.spread, args.seed)
    )
    link = cleave.Link() if args.server is None else cleave.Link(1e9 * args.server, 1e9 * args.server)
    shape = (model, args.sequences, args.length)
    step = cleave.plan_step(devices, *shape, overlap=args.overlap, link=link)
    total = step.down + step.up
    print(f"{args.model}: {model.parameters / 1e9:.3g} billion parameters, {devices.count} devices")
    rows: list[tuple[str, float, float, str]] = [("cleave", step.seconds, float(total.max()), "")]
    for name in ("data_parallel", "ring", "pipeline"):
        found = getattr(cleave_baselines, name)(devices, *shape)
        note = "" if found.fits else "does not fit into memory"
        rows.append((name.replace("_", " "), found.seconds, found.bytes_each, note))
    rows.append((f"cloud, {args.cloud:g} TFLOP/s", cleave_baselines.cloud(*shape, 1e12 * args.cloud), 0.0, ""))
    print(f"{'':20}{'seconds per step':>18}{'GB of a device':>18}")
    for name, seconds, size, note in rows:
        print(f"{name:20}{seconds:18.4g}{size / 1e9:18.4g}  {note}".rstrip())
    print(f"bound of the relaxed problem: {step.relaxed:.4g} s; devices without work: {int((total == 0).sum())}")
    if args.out:
        lines = [f"{i},{d:.0f},{u:.0f}" for i, (d, u) in enumerate(zip(np.asarray(step.down), np.asarray(step.up)))]
        try:
            Path(args.out).write_text("\n".join(["device,bytes down,bytes up", *lines]) + "\n", encoding="utf-8")
        except OSError as e:
            raise UserError(f"--out {args.out}: cannot be written ({e.strerror})") from e


def _model(text: str) -> Any:
    from jaxstack.core.errors import UserError
    from jaxstack.edge import cleave

    if text in cleave.MODELS:
        return cleave.MODELS[text]
    parts = text.split(",")
    if len(parts) != 5 or not all(x.isdecimal() and int(x) > 0 for x in parts) or int(parts[1]) % int(parts[3]):
        names = ", ".join(cleave.MODELS)
        raise UserError(f"--model {text}: expected {names}, or layers,features,inner,heads,vocabulary")
    layers, features, inner, heads, vocabulary = map(int, parts)
    return cleave.Model(layers, features, inner, heads, vocabulary)
