"""Outputs of PyTorch, torchvision and timm for weights and images that a formula gives: what tests compare ours with.

    python scripts/parity_torch.py --torch-python PYTHON        writes tests/nn/torch_parity.npz

PYTHON has torch, torchvision and timm. For each network of `NETWORKS`: logits in evaluation, logits and changed running
statistics in training, and of each parameter's gradient its norm and its product with numbers of the formula; all
computed in float64. Tests read the file without torch.
"""

import argparse
import json
import subprocess
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

NETWORKS: dict[str, tuple[int, int]] = {
    "lenet": (32, 3),
    "wrn-16-2": (16, 3),
    "densenet-bc-22-12": (16, 3),
    "resnet-18": (16, 3),
    "resnet-34-imagenet": (64, 3),
    "resnet-50-imagenet": (64, 3),
    "vgg-16": (32, 3),
    "mobilenet-v1": (32, 3),
    "mobilenet-v2": (16, 3),
    "mobilenet-v3-large": (64, 3),
    "mobilenet-v3-large torch": (64, 3),
    "efficientnet-b0": (64, 3),
    "efficientnet-b0 tf": (64, 3),
    "efficientnet-lite0": (64, 3),
    "densenet121": (64, 3),
}
"""Name, with the form where there are two -> pixels on a side, channels."""
CLASSES, IMAGES = 10, 4
OUT = Path(__file__).resolve().parent.parent / "tests" / "nn" / "torch_parity.npz"


def numbers(name: str, shape: Sequence[int]) -> np.ndarray:
    """Numbers in [-1, 1), float32, that hang together by no simple rule: a multiplicative hash of name and place."""
    x = np.arange(int(np.prod(shape)), dtype=np.uint64) * np.uint64(2654435761) + np.uint64(zlib.crc32(name.encode()))
    low = np.uint64(2**32 - 1)
    for shift, factor in ((15, 2246822519), (13, 3266489917), (16, 668265263)):
        x = x & low
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    x = x & low
    return ((x ^ (x >> np.uint64(15))).astype(np.float64) / 2**31 - 1).astype(np.float32).reshape(shape)


def weights_of(shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """A state dict of given names and shapes: kernels 0.7 times as wide as He's, scales and variances around 1."""
    found = {}
    for name, shape in shapes.items():
        drawn, leaf = numbers(name, shape), name.rpartition(".")[2]
        if len(shape) > 1:
            found[name] = drawn * np.float32(0.7 * (6 / np.prod(shape[1:])) ** 0.5)
        elif leaf in ("weight", "running_var"):
            found[name] = np.float32(1.0) + np.float32(0.5) * drawn
        else:
            found[name] = np.float32(0.2) * drawn
    return found


def images_of(name: str) -> np.ndarray:
    """Images [N, C, H, W] of a network."""
    side, channels = NETWORKS[name]
    return numbers(f"images of {side}", (IMAGES, channels, side, side))


def network_of(name: str) -> Any:
    """Ours, unbound."""
    from jaxstack.nn.vision import zoo

    kind, _, form = name.partition(" ")
    made = zoo.network(kind, CLASSES)
    return made.clone(form=form) if form else made


def shapes_of(name: str) -> tuple[Any, Any, dict[str, tuple[int, ...]]]:
    """(our network, the shapes of its variables, names and shapes of its state dict)."""
    import jax
    import jax.numpy as jnp

    from jaxstack.nn.torch_weights import to_torch

    network, (side, channels) = network_of(name), NETWORKS[name]
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), jnp.zeros((1, side, side, channels))))
    state = to_torch(network, jax.tree.map(lambda s: np.broadcast_to(np.float32(0), s.shape), shapes))
    return network, shapes, {k: v.shape for k, v in state.items()}


def digests(gradients: Mapping[str, np.ndarray]) -> np.ndarray:
    """[parameters, 2]: norm of each gradient and its product with numbers of its name, by sorted names."""
    rows = []
    for name in sorted(gradients):
        g = np.asarray(gradients[name], np.float64)
        rows.append((np.linalg.norm(g), float((g * numbers(f"gradient of {name}", g.shape)).sum())))
    return np.array(rows, np.float32)


def statistics(state: Mapping[str, np.ndarray]) -> np.ndarray:
    """[statistics] product of each running mean and variance with numbers of its name, over their count's root."""
    names = sorted(k for k in state if "running_" in k)
    product = lambda k: (np.asarray(state[k], np.float64) * numbers(k, state[k].shape)).sum() / state[k].size ** 0.5
    return np.array([product(k) for k in names], np.float32)


def child(folder: Path) -> None:
    """What runs where torch is: folder/shapes.json -> folder/found.npz."""
    import timm  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]
    import torch_networks
    import torchvision  # pyright: ignore[reportMissingImports]

    found: dict[str, np.ndarray] = {}
    for name, shapes in json.loads((folder / "shapes.json").read_text()).items():
        module = torch_networks.load(name, weights_of(shapes), CLASSES).double()
        if name == "efficientnet-lite0":  # its public package's, where timm has 0.1
            for norm in (m for m in module.modules() if hasattr(m, "running_var")):
                norm.momentum = 0.01
        back = {v: k for k, v in _renamed(name, shapes).items()}
        x = torch.from_numpy(images_of(name)).double()
        module.eval()
        with torch.no_grad():
            found[f"{name}/eval"] = module(x).numpy().astype(np.float32)
        module.train()
        logits = module(x)
        found[f"{name}/train"] = logits.detach().numpy().astype(np.float32)
        (logits * torch.from_numpy(numbers("loss", tuple(logits.shape))).double()).sum().backward()
        own = {str(back.get(k, k)): v for k, v in module.named_parameters()}
        found[f"{name}/gradients"] = digests({k: v.grad.numpy() for k, v in own.items()})
        state = {str(back.get(k, k)): v.numpy() for k, v in module.state_dict().items() if "running_" in k}
        found[f"{name}/statistics"] = statistics(state)
        print(f"{name}: {len(own)} parameters, logits up to {np.abs(found[f'{name}/eval']).max():.2f}", flush=True)
    versions = {m.__name__: m.__version__ for m in (torch, torchvision, timm)}
    found["versions"] = np.array(json.dumps(versions))
    np.savez_compressed(folder / "found.npz", allow_pickle=False, **found)


def _renamed(name: str, shapes: Mapping[str, Any]) -> dict[str, str]:
    """Names of the state dict -> those of the module, where they differ."""
    import torch_networks

    return {k: next(iter(torch_networks.lite_names({k: 0}))) for k in shapes} if name == "efficientnet-lite0" else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", type=Path, help="a Python that has torch, torchvision and timm")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return
    if args.torch_python is None:
        parser.error("--torch-python: expected a Python that has torch, torchvision and timm")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "shapes.json").write_text(json.dumps({n: shapes_of(n)[2] for n in NETWORKS}))
        subprocess.run([str(args.torch_python), str(Path(__file__)), "--child", name], check=True)
        args.out.write_bytes((folder / "found.npz").read_bytes())
    print(f"{args.out}: {args.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
