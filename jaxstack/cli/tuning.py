"""`jaxstack tune-conv`: which form of a convolution is fastest on this machine."""

import argparse

from jaxstack.cli.parsing import Commands, whole


def add_commands(commands: Commands) -> None:
    """Add the commands of this file."""
    p = commands.add(
        "tune-conv",
        _tune,
        "Time the forms of 3x3 convolutions and of their gradients, and let every later program of this machine use "
        "the fastest.",
    )
    p.add_argument("--channels", type=whole, default=64, help="of input and output")
    p.add_argument("--groups", type=whole, nargs="+", default=[1], metavar="G")
    p.add_argument("--side", type=whole, default=32, help="pixels on a side")
    p.add_argument("--batch", type=whole, default=1)
    p.add_argument("--stride", type=whole, default=1)
    p.add_argument("--repeats", type=whole, default=5)


def _tune(args: argparse.Namespace, _: list[str]) -> None:
    from jaxstack.core.errors import UserError
    from jaxstack.nn import conv_choice
    from jaxstack.vision import grouped_convolutions as gc

    for name in ("channels", "side", "batch", "stride", "repeats"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: expected at least 1")
    if min(args.groups) < 1:
        raise UserError(f"--groups {min(args.groups)}: expected at least 1")
    cases = [gc.Case(args.batch, args.side, args.channels, g, stride=args.stride) for g in args.groups]
    work = [gc.multiply_adds(*case.shapes, case.window) for case in cases]  # refuses before anything is timed
    for case, count in zip(cases, work):
        size = f"{case.side}x{case.side}, batch {case.batch}, {count / 1e6:.3g} M multiply-adds"
        print(f"{case.channels} channels, {case.groups} groups, {size}")
        found = gc.tune(case, args.repeats)
        for title, times in found.items():
            ranked = sorted(times.items(), key=lambda t: t[1].median)
            print(f"  {title}: " + ", ".join(f"{form} {1e3 * t.median:.3g} ms" for form, t in ranked))
    print(f"kept in {conv_choice.save_choices()}")
