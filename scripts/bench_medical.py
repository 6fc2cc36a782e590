"""Speed of the medical methods: networks, a training step and sampling loops against PyTorch, measures, a whole folder.

    python scripts/bench_medical.py                               what needs no PyTorch; minutes on 2 cores
    python scripts/bench_medical.py --torch-python PYTHON         all; a Python that has torch, torchvision and timm
    python scripts/bench_medical.py --cases forward --networks densenet121 --torch-python PYTHON
    python scripts/bench_medical.py --tiny                        a check that it works

forward  evaluation of one image: Choroidalyzer's U-Net at 768 x 768 (aim at least 1.0 times PyTorch's images per
         second, in its default layout; channels last is shown), DeepGPET's network at 768 x 768 (1.2), DenseNet-121 at
         512 x 512 (1.0), ResNet-34 of two channels at 384 x 512 (0.9).
step     a training step of the U-Net on four scans of 256 x 256: cross entropy, its gradient, AdamW (0.6).
counterfactuals, diffuse    latent counterfactuals of 8 images of 64 x 64 towards both classes in 20 steps, and the
         fused sampling of Dif-fuse (4 images, every 20th of 500 levels up and down), against the same loops (1.0).
metrics  thickness and area of 32 masks of 496 x 768, vmapped, against a loop in NumPy (10).
analyse  `jaxstack analyse-oct` with the U-Net on a folder of scans of 768 x 768: seconds per further image, with
         reading and overlays; aim at most the paper's 0.299.

PyTorch runs in a child process with the same weights, by way of nn/torch_weights.py or as they are; its outputs are
compared first. All of ours is compiled ahead of time with the persistent cache off. Repeats alternate; shown are
medians, and ratios within a repeat with quartiles.
"""

import argparse
import contextlib
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import bench_report
import jax
import jax.numpy as jnp
import numpy as np
import optax
from bench_agents import Side, interleaved
from bench_child import Child
from bench_sequence import compiled, ratio_row, time_row
from flax.traverse_util import flatten_dict
from PIL import Image

from jaxstack import cli
from jaxstack.medical import choroid, latent_counterfactuals, phantoms_oct
from jaxstack.medical import diffusion_counterfactual as dc
from jaxstack.nn import diffusion
from jaxstack.nn.torch_weights import to_torch
from jaxstack.nn.vision.densenet import DenseNet121
from jaxstack.nn.vision.resnet import ResNet
from jaxstack.nn.vision.unet import RELEASED, UNet
from jaxstack.nn.vision.unet_mobilenet import UNetMobileNetV3

Row = dict[str, Any]
PAPER_SECONDS = 0.299
"""Of Choroidalyzer per image, on a laptop."""


class Network(NamedTuple):
    """What is evaluated."""

    module: Any
    size: tuple[int, int]
    channels: int
    target: float
    tiny: tuple[int, int]


NETWORKS = {
    "choroidalyzer": Network(UNet(RELEASED), (768, 768), 1, 1.0, (128, 128)),
    "deepgpet": Network(UNetMobileNetV3(), (768, 768), 1, 1.2, (64, 64)),
    "densenet121": Network(DenseNet121(0), (512, 512), 3, 1.0, (64, 64)),
    "resnet34": Network(ResNet(34, 0, "imagenet"), (384, 512), 2, 0.9, (64, 64)),
}


def drawn(module: Any, *examples: Any) -> Any:
    """Variables of a network that keep activations of about 1: the residual nets' gains are low."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *examples)
    rng = np.random.default_rng(0)

    def leaf(path: Any, x: Any) -> Any:
        kind = path[-1].key
        if kind in ("scale", "var"):
            return rng.uniform(0.5, 1.5, x.shape).astype(np.float32)
        spread = 0.7 * np.sqrt(2.0 / np.prod(x.shape[:-1])) if kind == "kernel" else 0.1
        return (spread * rng.normal(size=x.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def plain(tree: Any) -> dict[str, np.ndarray]:
    """Leaves by their path, for a file."""
    return {"/".join(path): np.asarray(x) for path, x in flatten_dict(tree).items()}  # pyright: ignore[reportArgumentType]


class Peer:
    """The child process, with a folder of arrays for each thing that it loads."""

    def __init__(self, python: Path) -> None:
        script = Path(__file__).with_name("bench_medical_torch.py")
        self.folder = tempfile.TemporaryDirectory()
        self.child = Child("torch", [str(python), str(script), self.folder.name])

    def load(self, name: str, kind: str, arrays: dict[str, np.ndarray], **options: Any) -> dict[str, Any]:
        """Send arrays; gives what runs there."""
        np.savez(Path(self.folder.name) / f"{name}.npz", allow_pickle=False, **arrays)
        return self.child.ask(do="load", name=name, kind=kind, options=options)

    def output(self, name: str) -> np.ndarray:
        """What it computes."""
        self.child.ask(do="output", name=name)
        return np.load(Path(self.folder.name) / f"{name}_out.npy")

    def side(self, name: str, layout: str = "default") -> Side:
        """Its run, timed inside the child."""
        first = self.child.ask(do="run", name=name, layout=layout)
        return Side(lambda _: self.child.ask(do="run", name=name, layout=layout) and None, first, 0)

    def close(self) -> None:
        self.child.close()
        self.folder.cleanup()


def compared(case: str, ours: Any, theirs: np.ndarray, about: dict[str, Any], tolerance: float) -> Row:
    """The largest difference over the largest output. Raises `AssertionError` where the two compute other things."""
    mine = np.asarray(ours)
    error = float(np.abs(mine - theirs).max() / np.abs(theirs).max())
    assert mine.shape == theirs.shape, f"{case}: found shapes {mine.shape} and {theirs.shape}"
    assert error < tolerance, f"{case}: outputs differ by {error:.1e} of the largest"
    print(f"{case:52s} outputs differ by {error:.1e} of the largest ({about['torch']}, {about['threads']} threads)")
    return {"case": f"{case}, difference", "relative": error, "peer": about}


def against(case: str, mine: Side, peer: Peer, name: str, target: float, repeats: int, layouts: Any = ()) -> list[Row]:
    """Times of both sides, and the ratio."""
    sides = {"jaxstack": mine, "torch": peer.side(name)}
    sides |= {f"torch, {layout}": peer.side(name, layout) for layout in layouts}
    seconds = interleaved(sides, repeats)
    rows = [time_row(f"{case}, {key}", side, seconds[key]) for key, side in sides.items()]
    rows.append(ratio_row(f"{case}, torch / jaxstack", seconds["torch"], seconds["jaxstack"], target, least=True))
    for layout in layouts:
        row = ratio_row(
            f"{case}, torch {layout} / jaxstack", seconds[f"torch, {layout}"], seconds["jaxstack"], 0.0, True
        )
        rows.append({k: v for k, v in row.items() if k not in ("target", "met")})
    return rows


# ---------------------------------------------------------------- cases


def forward(args: argparse.Namespace, peer: Peer) -> list[Row]:
    rows = []
    for name in args.networks:
        net = NETWORKS[name]
        height, width = net.tiny if args.tiny else net.size
        x = np.random.default_rng(1).normal(size=(1, height, width, net.channels)).astype(np.float32)
        given = drawn(net.module, jnp.zeros((1, *net.tiny, net.channels)))
        if name in ("densenet121", "resnet34"):
            run: Callable = lambda v, x, module=net.module: pooled(module.apply(v, x))
        else:
            run = net.module.apply
        side = compiled(run, given, jnp.asarray(x))
        arrays = to_torch(net.module, given) | {"x": x.transpose(0, 3, 1, 2)}
        about = peer.load(name, name, arrays)
        case = f"forward, {name}, {height} x {width}"
        out = peer.output(name)
        out = out.transpose(0, 2, 3, 1) if out.ndim == 4 else out
        rows.append(compared(case, jax.jit(run)(given, x), out, about, 1e-3))
        rows += against(case, side, peer, name, net.target, args.repeats, ("channels last",))
    return rows


def pooled(maps: Any) -> Any:
    """The mean over pixels, of networks that end in maps."""
    return maps.mean((1, 2)) if maps.ndim == 4 else maps


def step(args: argparse.Namespace, peer: Peer) -> list[Row]:
    size = 128 if args.tiny else 256
    module, rng = UNet(RELEASED), np.random.default_rng(2)
    x = rng.normal(size=(4, size, size, 1)).astype(np.float32)
    y = (rng.uniform(size=(4, size, size, 3)) < 0.3).astype(np.float32)
    given = drawn(module, jnp.zeros((1, 128, 128, 1)))
    optimiser = optax.adamw(1e-3, weight_decay=1e-2)

    def loss(params: Any, stats: Any, x: Any, y: Any) -> Any:
        logits, new = module.apply({"params": params, **stats}, x, train=True, mutable=list(stats))
        return optax.sigmoid_binary_cross_entropy(logits, y).mean(), new

    def update(state: Any, x: Any, y: Any) -> Any:
        params, stats, moments = state
        (value, stats), slope = jax.value_and_grad(loss, has_aux=True)(params, stats, x, y)
        change, moments = optimiser.update(slope, moments, params)
        return (optax.apply_updates(params, change), stats, moments), value

    stats = {k: v for k, v in given.items() if k != "params"}
    state = (given["params"], stats, optimiser.init(given["params"]))
    side = compiled(update, state, jnp.asarray(x), jnp.asarray(y))
    turned = lambda a: a.transpose(0, 3, 1, 2)
    about = peer.load("step", "step", to_torch(module, given) | {"x": turned(x), "y": turned(y)})
    case = f"step, choroidalyzer, 4 x {size} x {size}"
    first = jax.jit(update)(state, x, y)[1]
    rows = [compared(case, np.asarray(first)[None], peer.output("step"), about, 1e-3)]
    return rows + against(case, side, peer, "step", 0.6, args.repeats)


def counterfactuals(args: argparse.Namespace, peer: Peer) -> list[Row]:
    rng = np.random.default_rng(3)
    size, count, steps = (16, 2, 3) if args.tiny else (64, 8, 20)
    stem = 8 if args.tiny else 128
    autoencoder: Any = latent_counterfactuals.Autoencoder(stem=stem)
    classifier: Any = dc.Classifier()
    images = rng.uniform(size=(count, size, size, 1)).astype(np.float32)
    one = jnp.zeros((1, size, size, 1))
    auto, cls = drawn(autoencoder, one), drawn(classifier, one)

    def search(auto: Any, cls: Any, images: Any) -> Any:
        decode = lambda z: autoencoder.apply(auto, z, method="decode")
        encode = lambda x: autoencoder.apply(auto, x, method="encode")
        found = latent_counterfactuals.sides(
            lambda x: classifier.apply(cls, x), encode, decode, images, 100.0, 0.001, steps
        )
        return jnp.stack([found.towards_0, found.towards_1])

    case = f"loops, counterfactuals, {count} x {size} x {size}, {steps} steps"
    arrays = plain({"auto": auto, "cls": cls}) | {"images": images}
    about = peer.load("counterfactual", "counterfactual", arrays, steps=steps, stages=[2, 2, 2])
    side = compiled(search, auto, cls, jnp.asarray(images))
    ours = jax.jit(search)(auto, cls, images)
    rows = [compared(case, ours, peer.output("counterfactual"), about, 1e-3)]
    return rows + against(case, side, peer, "counterfactual", 1.0, args.repeats)


def diffuse(args: argparse.Namespace, peer: Peer) -> list[Row]:
    rng = np.random.default_rng(3)
    size, count = (16, 2) if args.tiny else (64, 4)
    features, multiples, stride = (8, (1, 2), 100) if args.tiny else (32, (1, 2, 4), 20)
    unet = diffusion.DenoisingUNet(features, multiples, 1, ())
    given = drawn(unet, jnp.zeros((1, size, size, 1)), jnp.zeros(1, jnp.int32))
    images = rng.uniform(size=(count, size, size, 1)).astype(np.float32)
    schedule = diffusion.make_schedule()
    mask = rng.uniform(size=images.shape) < 0.3

    def fused(given: Any, images: Any, mask: Any, key: Any) -> Any:
        eps_fn: Any = lambda x, t: unet.apply(given, x, t)
        return dc.dif_fuse(eps_fn, images, mask, key, schedule, 500, stride)

    case = f"loops, Dif-fuse, {count} x {size} x {size}, {2 * (-(-500 // stride) - 1)} steps"
    levels = diffusion.respaced(schedule, stride)
    arrays = plain(given) | {"images": images, "mask": mask, "times": np.asarray(levels.times, np.int64)}
    arrays |= {"ab": np.asarray(levels.ab), "betas": np.asarray(levels.betas)}
    about = peer.load("diffuse", "diffuse", arrays, features=features, multiples=list(multiples), top=-(-500 // stride))
    key = jax.random.key(0)
    side = compiled(fused, given, jnp.asarray(images), jnp.asarray(mask), key)
    # the reconstruction has no noise of its own
    ours = jax.jit(fused)(given, images, mask, key).reconstruction
    rows = [compared(case, ours, peer.output("diffuse"), about, 5e-3)]
    return rows + against(case, side, peer, "diffuse", 1.0, args.repeats)


def looped(top: Any, bottom: Any, valid: Any, fovea: Any, scale: Any, height: int, radius: float) -> tuple[Any, float]:
    """Thickness at three places and area of one scan in plain NumPy, as `choroid.choroid_metrics` defines them."""
    x, (sx, sy) = np.arange(len(valid)), scale
    at = np.flatnonzero(valid)
    first, last = at[0], at[-1]
    top, bottom = (y[np.clip(x, first, last)].astype(float) for y in (top, bottom))
    far = np.where(valid, (x - fovea[0]) ** 2 + (top - fovea[1]) ** 2, np.inf)
    ref = int(far.argmin())
    steps = np.where((x[:-1] >= first) & (x[:-1] < last), np.hypot(sx, sy * np.diff(top)), 0.0)
    along = np.concatenate([[0.0], np.cumsum(steps)])
    along -= along[ref]
    inside = np.flatnonzero((np.abs(along) <= radius + 0.01) & (x >= first) & (x <= last))
    places, thickness, sides = (inside[0], ref, inside[-1]), [], []
    rows = np.arange(height)
    for place in places:
        a, b = max(place - 15, first), min(place + 15, last)
        lean = -(top[b] - top[a]) / max(b - a, 1) * (sy / sx) ** 2
        start = top[place] - 0.5
        gap = np.where(rows >= start, rows - np.interp(place + lean * (rows - start), x, bottom + 0.5), -np.inf)
        i = int((gap >= 0).argmax())
        row = rows[i] - gap[i] / (gap[i] - gap[i - 1])
        thickness.append(np.hypot(sx * lean, sy) * (row - start))
        sides.append(place + lean * (rows - start))
    y = rows[:, None]
    roi = valid & (y >= top) & (y <= bottom) & (x >= sides[0][:, None]) & (x < sides[-1][:, None])
    return np.array(thickness), float(roi.sum() * sx * sy * 1e-6)


def metrics(args: argparse.Namespace, peer: Peer | None) -> list[Row]:
    count, size = (4, (96, 144)) if args.tiny else (32, (496, 768))
    scans = phantoms_oct.oct_set(0, count, phantoms_oct.DEVICES["A"]._replace(size=size))
    traces = [np.asarray(t) for t in jax.jit(jax.vmap(choroid.boundaries))(scans.region)]
    fovea, scale = (np.asarray(a, np.float32) for a in (scans.fovea, scans.scale))
    radius = 2500.0

    def every(top: Any, bottom: Any, valid: Any, fovea: Any, scale: Any) -> Any:
        one = lambda *a: choroid.choroid_metrics(*a, height=size[0], macula_um=radius)
        found = jax.vmap(one)(top, bottom, valid, fovea, scale)
        return found.thickness_um, found.area_mm2

    def loop() -> list[tuple[Any, float]]:
        top, bottom, valid = traces
        one = lambda i: looped(top[i], bottom[i], valid[i], fovea[i], scale[i], size[0], radius)
        return [one(i) for i in range(count)]

    thickness, area = jax.jit(every)(*traces, fovea, scale)
    expected = loop()
    np.testing.assert_allclose(thickness, np.stack([t for t, _ in expected]), rtol=2e-3)
    np.testing.assert_allclose(area, [a for _, a in expected], rtol=2e-3)
    case = f"metrics, {count} masks of {size[0]} x {size[1]}"
    sides = {
        "vmapped": compiled(every, *map(jnp.asarray, (*traces, fovea, scale))),
        "NumPy": Side(lambda _: loop() and None, 0.0, 0),  # pyright: ignore[reportArgumentType]
    }
    seconds = interleaved(sides, args.repeats)
    rows = [time_row(f"{case}, {key}", side, seconds[key]) for key, side in sides.items()]
    return [*rows, ratio_row(f"{case}, NumPy / vmapped", seconds["NumPy"], seconds["vmapped"], 10.0, least=True)]


def analyse(args: argparse.Namespace, peer: Peer | None) -> list[Row]:
    """Folders of two lengths, so that what is done once does not count; the program comes from a cache of this case."""
    few, many, side = (2, 4, 128) if args.tiny else (8, 24, 768)
    module = UNet(RELEASED)
    given = drawn(module, jnp.zeros((1, 128, 128, 1)))
    scans = phantoms_oct.oct_set(0, 2, phantoms_oct.DEVICES["A"]._replace(size=(side, side)))
    per_image = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "net.npz", allow_pickle=False, **to_torch(module, given))
        for count in (few, many):
            (folder / str(count)).mkdir()
            for i in range(count):
                picture = Image.fromarray(np.round(scans.image[i % 2] * 255).astype(np.uint8))
                picture.save(folder / str(count) / f"{i}.png")

        def run(count: int, out: Path) -> float:
            begin = time.perf_counter()
            argv = ["analyse-oct", str(folder / str(count)), "--model", str(folder / "net.npz"), "--out", str(out)]
            with contextlib.redirect_stdout(io.StringIO()):
                assert cli.main([*argv, "--scale-um", "11.49", "3.87", "--batch", "4"]) == 0
            return time.perf_counter() - begin

        jax.config.update("jax_compilation_cache_dir", str(folder / "cache"))
        jax.config.update("jax_enable_compilation_cache", True)
        run(few, folder / "first")
        for repeat in range(args.repeats):
            short, long = (run(count, folder / f"out{repeat}_{count}") for count in (few, many))
            per_image.append((long - short) / (many - few))
        jax.config.update("jax_enable_compilation_cache", False)
    case = f"analyse, per image of {side} x {side}"
    row = time_row(case, Side(lambda _: None, 0.0, 0), per_image)
    low, median, high = (float(q) for q in np.quantile(per_image, (0.25, 0.5, 0.75)))
    met = median <= PAPER_SECONDS
    print(f"{case:52s} {median:7.3f} s [{low:.3f}, {high:.3f}] (aim at most {PAPER_SECONDS})")
    return [row | {"seconds_quartiles": [low, median, high], "target": PAPER_SECONDS, "met": met}]


CASES = {
    "forward": forward,
    "step": step,
    "counterfactuals": counterfactuals,
    "diffuse": diffuse,
    "metrics": metrics,
    "analyse": analyse,
}
WITH_TORCH = ("forward", "step", "counterfactuals", "diffuse")


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS), help="of forward")
    parser.add_argument("--torch-python", type=Path, help="a Python that has torch, torchvision and timm")
    parser.add_argument("--tiny", action="store_true", help="small images, to see that it works")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_medical.json"))
    parser.add_argument("--add", action="store_true", help="keep the rows of --out that this call does not measure")
    return parser


def main() -> None:
    parser = options()
    args = parser.parse_args()
    if args.repeats < 5 and not args.tiny:
        parser.error(f"--repeats {args.repeats}: expected at least 5, for quartiles")
    jax.config.update("jax_enable_compilation_cache", False)
    print(f"{'':52s}    median        peak compile")
    rows: list[Row] = bench_report.rows_of(args.out) if args.add else []
    peer = None if args.torch_python is None else Peer(args.torch_python)
    facts: dict[str, Any] = dict(backend=jax.default_backend(), repeats=args.repeats)
    try:
        for name in args.cases:
            if name in WITH_TORCH and peer is None:
                print(f"{name} left out: needs --torch-python PYTHON")
                continue
            begin = time.perf_counter()
            new = CASES[name](args, peer)  # pyright: ignore[reportArgumentType]
            named = {row["case"] for row in new}
            rows = [row for row in rows if row["case"] not in named] + new
            print(f"-- {name}: {time.perf_counter() - begin:.0f} s\n", flush=True)
            bench_report.write(args.out, rows, **facts)
    finally:
        if peer is not None:
            peer.close()
    missed = [row["case"] for row in rows if not row.get("met", True)]
    print(f"aims missed: {len(missed)} of {sum('met' in row for row in rows)}", *missed, sep="\n  ")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
