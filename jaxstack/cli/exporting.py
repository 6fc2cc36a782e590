"""`jaxstack export`: policies, and weights of classifiers, for other programs."""

import argparse

from jaxstack.cli import runs
from jaxstack.cli.parsing import Commands, row_flags


def add_commands(commands: Commands) -> None:
    """Add the commands of this file."""
    p = commands.add(
        "export",
        _export,
        "Write a trained policy, or a classifier's weights, for other programs; the written file is run and compared.",
    )
    p.add_argument("run_dir", metavar="RUN")
    p.add_argument("out", metavar="PATH", help="a directory for a bundle, else a file")
    p.add_argument(
        "--format",
        choices=["bundle", "stablehlo", "onnx", "weights"],
        default="bundle",
        help="safetensors and JSON for load_policy, jax.export for cpu, cuda and tpu, or ONNX (needs jax2onnx); of a "
        "classifier weights: a state dict of PyTorch's names, .npz or .safetensors",
    )
    p.add_argument("--fold", action="store_true", help="of weights: BatchNorm folded into the layers before it")
    row_flags(p)


def _export(args: argparse.Namespace, _: list[str]) -> None:
    import tempfile

    from jaxstack import learners
    from jaxstack.core import bundle, export
    from jaxstack.core.errors import UserError

    if args.fold and args.format != "weights":
        raise UserError(f"--fold: found with --format {args.format}, expected weights")
    if args.format == "weights":
        _weights(args)
        return
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


def _weights(args: argparse.Namespace) -> None:
    from pathlib import Path

    import jax
    import numpy as np
    from safetensors.numpy import save_file

    from jaxstack.core.errors import UserError
    from jaxstack.nn import classifier
    from jaxstack.nn.supervised import variables
    from jaxstack.nn.torch_weights import from_torch, read_weights, to_torch
    from jaxstack.nn.vision.folding import fold_batchnorm

    out = Path(args.out)
    if out.suffix not in (".npz", ".safetensors"):
        raise UserError(f"{out}: expected a name ending in .npz or .safetensors with --format weights")
    learner, state = runs.one_row(args, acts=False)
    if learner.name != "classifier":
        raise UserError(f"{args.run_dir}: found a run of {learner.name}, expected one of classifier")
    network, given = classifier.network(learner.config), jax.tree.map(np.asarray, dict(variables(state)))
    x = np.random.default_rng(0).integers(0, 256, (4, *classifier.image_shape(learner.config)), np.uint8)
    x = classifier.prepared(learner.config, x)
    wanted, apply = np.asarray(network.apply(given, x)), network.apply
    if args.fold:
        count = len(jax.tree.leaves(given.get("batch_stats", {}))) // 2
        folded, given = fold_batchnorm(network, given, x)
        apply = folded.apply
        print(f"{len(folded.pairs)} of {count} BatchNorms are folded")
    arrays = to_torch(network, given)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".npz":
        np.savez(out, allow_pickle=False, **arrays)
    else:
        save_file(arrays, out)
    found = np.asarray(apply(from_torch(network, read_weights(out), given, str(out)), x))
    far = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    if not far <= 1e-4:
        raise UserError(f"{out}: gives outputs that differ by {far:.1e} from the run's, expected at most 1e-4")
    print(f"{out}: {len(arrays)} arrays, {out.stat().st_size / 1e6:.2f} MB; outputs differ by {far:.1e} of the largest")
