"""The child process of bench_medical.py: the same networks and loops in PyTorch.

    python bench_medical_torch.py FOLDER        FOLDER has NAME.npz, weights and inputs

Commands come one a line on stdin, answers go one a line to stdout: {"do": "load", "name": N, "kind": K, "options": {}}
-> what runs; {"do": "output", "name": N} writes N_out.npy; {"do": "run", "name": N, "layout": L} -> seconds. Ends with
its input. Weights of networks come under the names of their state dicts, those of the loops under the paths of their
flax modules, kernels as flax has them.
"""

import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]

Arrays = dict[str, Any]


class ConvNormAct(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after)

    def forward(self, x: Any) -> Any:
        return F.relu(self.norm(self.conv(x)), inplace=True)


class Down(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = ConvNormAct(before, after), ConvNormAct(after, after)

    def forward(self, x: Any) -> Any:
        return self.conv2(self.conv1(F.max_pool2d(x, 2)))


class Up(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        self.upsample = nn.Sequential(nn.Conv2d(before, before // 2, 1), up)
        self.conv1, self.conv2 = ConvNormAct(before // 2 + after, after), ConvNormAct(after, after)

    def forward(self, x: Any, skip: Any) -> Any:
        return self.conv2(self.conv1(torch.cat([self.upsample(x), skip], 1)))


class Choroidalyzer(nn.Module):
    """The U-Net under its public names."""

    def __init__(self, channels: tuple[int, ...] = (8, 16, 32, 64, 64, 64, 64, 64)) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(channels))
        self.in_conv = ConvNormAct(1, channels[0])
        self.down_blocks = nn.ModuleList([Down(a, b) for a, b in pairs])
        self.up_blocks = nn.ModuleList([Up(b, a) for a, b in reversed(pairs)])
        self.out_conv = nn.Sequential(ConvNormAct(channels[0], channels[0]), nn.Conv2d(channels[0], 3, 1))

    def forward(self, x: Any) -> Any:
        x, skips = self.in_conv(x), []
        for down in self.down_blocks:
            skips.append(x)
            x = down(x)
        for up in self.up_blocks:
            x = up(x, skips.pop())
        return self.out_conv(x)


class DecoderBlock(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        layer = lambda a: nn.Sequential(
            nn.Conv2d(a, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(True)
        )
        self.conv1, self.conv2 = layer(before), layer(after)

    def forward(self, x: Any, skip: Any) -> Any:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.conv2(self.conv1(x if skip is None else torch.cat([x, skip], 1)))


class Encoder(nn.Module):
    """timm's tf_mobilenetv3_large_100, its maps at five resolutions."""

    def __init__(self) -> None:
        super().__init__()
        import timm  # pyright: ignore[reportMissingImports]

        whole = timm.create_model("tf_mobilenetv3_large_100", in_chans=1, num_classes=0)
        self.model = nn.ModuleDict(dict(conv_stem=whole.conv_stem, bn1=whole.bn1, blocks=whole.blocks))

    def forward(self, x: Any) -> list[Any]:
        x, found = self.model["bn1"](self.model["conv_stem"](x)), []
        for i, stage in enumerate(self.model["blocks"]):
            x = stage(x)
            if i in (0, 1, 2, 4, 6):
                found.append(x)
        return found


class DeepGPET(nn.Module):
    """segmentation-models-pytorch's U-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(), nn.Module()
        maps, widths = (960, 112, 40, 24, 16), (256, 128, 64, 32, 16)
        before = [a + b for a, b in zip((maps[0], *widths), (*maps[1:], 0))]
        self.decoder.blocks = nn.ModuleList([DecoderBlock(a, b) for a, b in zip(before, widths)])
        self.segmentation_head = nn.Sequential(nn.Conv2d(16, 1, 3, padding=1))

    def forward(self, x: Any) -> Any:
        *skips, x = self.encoder(x)
        for block, skip in zip(self.decoder.blocks, [*reversed(skips), None]):
            x = block(x, skip)
        return self.segmentation_head(x)


class Pooled(nn.Module):
    """torchvision's network up to the mean over pixels."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        import torchvision  # pyright: ignore[reportMissingImports]

        self.dense = kind == "densenet121"
        net = torchvision.models.densenet121() if self.dense else torchvision.models.resnet34()
        if self.dense:
            net.classifier = nn.Identity()
        else:
            net.conv1, net.fc = nn.Conv2d(2, 64, 7, 2, 3, bias=False), nn.Identity()
        self.net = net

    def forward(self, x: Any) -> Any:
        return self.net(x)

    def load_state_dict(self, given: Any, strict: bool = True) -> Any:
        return self.net.load_state_dict(given, strict=strict)


NETWORKS: dict[str, Callable[[], Any]] = {
    "choroidalyzer": Choroidalyzer,
    "deepgpet": DeepGPET,
    "densenet121": lambda: Pooled("densenet121"),
    "resnet34": lambda: Pooled("resnet34"),
}


def weighted(net: Any, arrays: Arrays) -> Any:
    """The network with weights, all of which must have a place; statistics' counters are PyTorch's own."""
    missing, unknown = net.load_state_dict(arrays, strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unknown:
        raise SystemExit(f"weights: {missing[:3]} are missing, {unknown[:3]} are unknown")
    return net


class Forward:
    def __init__(self, kind: str, arrays: Arrays) -> None:
        self.x = arrays.pop("x")
        self.net = weighted(NETWORKS[kind](), arrays).eval()
        self.layout = "default"

    def run(self, layout: str) -> Any:
        if layout != self.layout:
            form = torch.channels_last if layout == "channels last" else torch.contiguous_format
            self.net, self.x, self.layout = (
                self.net.to(memory_format=form),
                self.x.contiguous(memory_format=form),
                layout,
            )
        with torch.no_grad():
            return self.net(self.x)


class Step:
    """Cross entropy, its gradient and AdamW; the output is the loss."""

    def __init__(self, arrays: Arrays) -> None:
        self.x, self.y = arrays.pop("x"), arrays.pop("y")
        self.net = weighted(Choroidalyzer(), arrays).train()
        self.optimiser = torch.optim.AdamW(self.net.parameters(), 1e-3, weight_decay=1e-2)

    def run(self, layout: str) -> Any:
        self.optimiser.zero_grad()
        loss = F.binary_cross_entropy_with_logits(self.net(self.x), self.y)
        loss.backward()
        self.optimiser.step()
        return loss.detach()[None]


class Scope:
    """The weights below a path of flax, with the numbers that flax gives to unnamed modules, one after the other."""

    def __init__(self, arrays: Arrays, at: tuple[str, ...] = ()) -> None:
        self.arrays, self.at = arrays, at
        self.counts: dict[str, int] = {}

    def named(self, name: str) -> "Scope":
        return Scope(self.arrays, (*self.at, name))

    def next(self, kind: str) -> "Scope":
        number = self.counts.get(kind, 0)
        self.counts[kind] = number + 1
        return self.named(f"{kind}_{number}")

    def get(self, leaf: str, collection: str = "params") -> Any:
        root, *rest = self.at
        return self.arrays.get("/".join((root, collection, *rest, leaf) if root else (collection, *rest, leaf)))


def conv(s: Scope, x: Any, stride: int = 1) -> Any:
    return F.conv2d(x, s.get("kernel"), s.get("bias"), stride, s.get("kernel").shape[-1] // 2)


def norm(s: Scope, x: Any) -> Any:
    mean, var = (s.get(name, "batch_stats") for name in ("mean", "var"))
    return F.batch_norm(x, mean, var, s.get("scale"), s.get("bias"))


def groups(s: Scope, x: Any) -> Any:
    return F.group_norm(x, min(32, max(x.shape[1] // 4, 1)), s.get("scale"), s.get("bias"), 1e-5)


def dense(s: Scope, x: Any) -> Any:
    return F.linear(x, s.get("kernel"), s.get("bias"))


def turned(name: str, x: np.ndarray) -> Any:
    """flax's kernels as PyTorch's, images [B, H, W, C] as [B, C, H, W]."""
    if name.endswith("kernel"):
        x = x.transpose((3, 2, 0, 1) if x.ndim == 4 else (1, 0))
    elif x.ndim == 4:
        x = x.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(x))


def double(x: Any) -> Any:
    return F.interpolate(x, scale_factor=2, mode="nearest")


class Counterfactual:
    """Gradient steps on latents towards both classes."""

    def __init__(self, arrays: Arrays, steps: int, stages: list[int]) -> None:
        self.arrays, self.steps, self.stages = arrays, steps, stages
        self.x = arrays["images"]

    def block(self, s: Scope, x: Any, scale: int, up: bool) -> Any:
        larger = double if up and scale > 1 else lambda x: x
        stride = 1 if up else scale
        h = F.relu(norm(s.next("BatchNorm"), conv(s.next("Conv"), x, stride)))
        h = norm(s.next("BatchNorm"), conv(s.next("Conv"), larger(h)))
        if s.named("Conv_2").get("kernel") is not None:
            x = norm(s.next("BatchNorm"), conv(s.next("Conv"), larger(x), stride))
        return F.relu(h + x)

    def stack(self, kind: str, scales: list[int], x: Any) -> Any:
        for i, scale in enumerate(scales):
            x = self.block(Scope(self.arrays, ("auto", f"{kind}_{i}")), x, scale, kind == "decoder")
        return x

    def decode(self, z: Any) -> Any:
        return conv(Scope(self.arrays, ("auto", "last")), self.stack("decoder", [2, 1, 2, 1, 1, 1], z))

    def classify(self, x: Any) -> Any:
        s = Scope(self.arrays, ("cls",))
        for _ in range(3):
            x = F.max_pool2d(F.relu(norm(s.next("BatchNorm"), conv(s.next("Conv"), x))), 2)
        return dense(s.next("Dense"), x.mean((2, 3)))

    def run(self, layout: str) -> Any:
        with torch.no_grad():
            first = Scope(self.arrays, ("auto", "first")), Scope(self.arrays, ("auto", "first_norm"))
            z0 = self.stack("encoder", [1, 1, 2, 1, 2, 1], F.relu(norm(first[1], conv(first[0], self.x))))
            z0 = torch.cat([z0, z0])
        target = torch.arange(2).repeat_interleave(len(self.x))
        z = z0.clone()
        for _ in range(self.steps):
            z.requires_grad_()
            away = (z - z0).abs().flatten(1).mean(1)
            g = (100.0 * away + F.cross_entropy(self.classify(self.decode(z)), target, reduction="none")).sum()
            (slope,) = torch.autograd.grad(g, z)
            z = (z - 0.001 * slope).detach()
        with torch.no_grad():
            return self.decode(z).reshape(2, *self.x.shape).permute(0, 1, 3, 4, 2)


class Diffuse:
    """DDIM up, DDPM and DDIM down side by side; the output is the reconstruction."""

    def __init__(self, arrays: Arrays, features: int, multiples: list[int], top: int) -> None:
        self.arrays, self.features, self.multiples, self.top = arrays, features, multiples, top
        self.x, self.mask, self.times = arrays["images"], arrays["mask"].bool(), arrays["times"]
        self.ab, self.betas = (arrays[name].double() for name in ("ab", "betas"))

    def block(self, s: Scope, x: Any, time: Any, resize: Any = None) -> Any:
        h = F.silu(groups(s.next("GroupNorm"), x))
        if resize is not None:
            h, x = resize(h), resize(x)
        h = conv(s.next("Conv"), h)
        scale, shift = dense(s.next("Dense"), F.silu(time))[:, :, None, None].chunk(2, 1)
        h = F.silu(groups(s.next("GroupNorm"), h) * (1 + scale) + shift)
        h = conv(s.next("Conv"), h)
        return h + (x if x.shape[1] == h.shape[1] else conv(s.next("Conv"), x))

    def eps(self, x: Any, time: int) -> Any:
        s, half = Scope(self.arrays, ("",)), self.features // 2
        rates = torch.exp(-math.log(1e4) * torch.arange(half) / half)
        angles = torch.full((len(x), 1), float(time)) * rates
        t = dense(s.next("Dense"), torch.cat([angles.cos(), angles.sin()], 1))
        t = dense(s.next("Dense"), F.silu(t))
        h = conv(s.next("Conv"), x)
        kept, last = [h], len(self.multiples) - 1
        for level in range(last + 1):
            h = self.block(s.next("Block"), h, t)
            kept.append(h)
            if level < last:
                h = self.block(s.next("Block"), h, t, lambda x: F.avg_pool2d(x, 2))
                kept.append(h)
        h = self.block(s.next("Block"), h, t)
        h = self.block(s.next("Block"), h, t)
        for level in range(last, -1, -1):
            for _ in range(2):
                h = self.block(s.next("Block"), torch.cat([h, kept.pop()], 1), t)
            if level:
                h = self.block(s.next("Block"), h, t, double)
        return conv(s.next("Conv"), F.silu(groups(s.next("GroupNorm"), h)))

    def clean(self, x: Any, i: int) -> tuple[Any, Any]:
        a = float(self.ab[i])
        clean = ((x - math.sqrt(1 - a) * self.eps(x, int(self.times[i]))) / math.sqrt(a)).clamp(0, 1)
        return clean, (x - math.sqrt(a) * clean) / math.sqrt(1 - a)

    def run(self, layout: str) -> Any:
        ab, betas = self.ab.tolist(), self.betas.tolist()
        to = lambda clean, eps, a: math.sqrt(a) * clean + math.sqrt(1 - a) * eps
        with torch.no_grad():
            x = self.x
            for i in range(self.top - 1):
                x = to(*self.clean(x, i), ab[i + 1])
            img = rec = x
            for i in range(self.top - 1, 0, -1):
                clean, eps = self.clean(torch.cat([img, rec]), i)
                half, before, a, beta = len(x), ab[i - 1], ab[i], betas[i]
                mean = math.sqrt(before) * beta / (1 - a) * clean[:half]
                mean = mean + math.sqrt(1 - beta) * (1 - before) / (1 - a) * img
                img = mean + math.sqrt(beta) * torch.randn_like(img) if i > 1 else mean
                rec = to(clean[half:], eps[half:], before)
                img = torch.where(self.mask, img, rec)
            return rec.permute(0, 2, 3, 1)


def load(kind: str, folder: Path, name: str, options: Any) -> Any:
    with np.load(folder / f"{name}.npz") as file:
        arrays: Arrays = {key: np.array(value) for key, value in file.items()}
    if kind in ("counterfactual", "diffuse"):
        given = {key: turned(key, value) for key, value in arrays.items()}
        return Counterfactual(given, **options) if kind == "counterfactual" else Diffuse(given, **options)
    given = {key: torch.from_numpy(value) for key, value in arrays.items()}
    return Step(given) if kind == "step" else Forward(kind, given)


def main() -> None:
    folder = Path(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    loaded: dict[str, Any] = {}
    for line in sys.stdin:
        command = json.loads(line)
        name, answer = command["name"], True
        if command["do"] == "load":
            loaded[name] = load(command["kind"], folder, name, command["options"])
            answer = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        elif command["do"] == "output":
            np.save(folder / f"{name}_out.npy", loaded[name].run("default").numpy())
        else:
            begin = time.perf_counter()
            loaded[name].run(command["layout"])
            answer = time.perf_counter() - begin
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
