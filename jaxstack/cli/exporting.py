"""`jaxstack export`: policies for other programs."""

import argparse

from jaxstack.cli import runs
from jaxstack.cli.parsing import Commands, row_flags


def add_commands(commands: Commands) -> None:
    """Add the commands of this file."""
    p = commands.add(
        "export", _export, "Write a trained policy for other programs; the written file is run and compared."
    )
    p.add_argument("run_dir", metavar="RUN")
    p.add_argument("out", metavar="PATH", help="a directory for a bundle, else a file")
    p.add_argument(
        "--format",
        choices=["bundle", "stablehlo", "onnx"],
        default="bundle",
        help="safetensors and JSON for load_policy, jax.export for cpu, cuda and tpu, or ONNX (needs jax2onnx)",
    )
    row_flags(p)


def _export(args: argparse.Namespace, _: list[str]) -> None:
    import tempfile

    from jaxstack import learners
    from jaxstack.core import bundle, export

    learner, state = runs.one_row(args)
    if args.format == "bundle":
        print(bundle.save_policy(args.out, learner, state))
        return
    with tempfile.TemporaryDirectory() as folder:
        policy = learners.load_policy(bundle.save_policy(folder, learner, state))
    spec = learner.env.spec
    mask = spec.action_space.n if spec.has_action_mask else None
    write = export.stablehlo if args.format == "stablehlo" else export.onnx
    print(write(policy, (spec.num_agents, *spec.obs_shape), args.out, mask, obs_dtype=spec.observation.dtype))
