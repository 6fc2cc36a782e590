"""The networks of jaxstack.nn.vision as PyTorch modules, with the names of their public state dicts.

torchvision's and timm's own modules where they have the network; else plain ones in the form that public code has. Only
child processes of bench_vision.py and parity_torch.py import this file, with a Python that has torch, torchvision and
timm.
"""

import math
import re
from typing import Any

import numpy as np
import timm  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
import torchvision  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]


def conv(before: int, after: int, size: int = 3, stride: int = 1, groups: int = 1) -> Any:
    return nn.Conv2d(before, after, size, stride, size // 2, groups=groups, bias=False)


def active(norm: Any, x: Any) -> Any:
    return F.relu(norm(x), inplace=True)


class LeNet(nn.Module):
    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(channels, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, classes)

    def forward(self, x: Any) -> Any:
        for layer in (self.conv1, self.conv2):
            x = F.max_pool2d(F.relu(layer(x)), 2)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x.flatten(1))))))


class WideBlock(nn.Module):
    """A pre-activation block; `branch` is what it last added to its shortcut."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(before), conv(before, after, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(after), conv(after, after)
        self.convShortcut = conv(before, after, 1, stride) if before != after or stride != 1 else None
        self.branch: Any = None

    def forward(self, x: Any) -> Any:
        h = active(self.bn1, x)
        self.branch = self.conv2(active(self.bn2, self.conv1(h)))
        return self.branch + (x if self.convShortcut is None else self.convShortcut(h))


class WideStage(nn.Module):
    def __init__(self, before: int, after: int, count: int, stride: int) -> None:
        super().__init__()
        each = [WideBlock(before if not i else after, after, 1 if i else stride) for i in range(count)]
        self.layer = nn.Sequential(*each)

    def forward(self, x: Any) -> Any:
        return self.layer(x)


class WideResNet(nn.Module):
    """`taps` are the outputs of its three stages in the last call."""

    def __init__(self, depth: int, width: float, classes: int, channels: int) -> None:
        super().__init__()
        count, widths = (depth - 4) // 6, [int(16 * width * 2**i) for i in range(3)]
        self.conv1 = conv(channels, 16)
        self.block1 = WideStage(16, widths[0], count, 1)
        self.block2 = WideStage(widths[0], widths[1], count, 2)
        self.block3 = WideStage(widths[1], widths[2], count, 2)
        self.bn1, self.fc = nn.BatchNorm2d(widths[2]), nn.Linear(widths[2], classes)
        self.taps: list[Any] = []

    def blocks(self) -> list[Any]:
        return [block for stage in (self.block1, self.block2, self.block3) for block in stage.layer]

    def forward(self, x: Any) -> Any:
        x, self.taps = self.conv1(x), []
        for stage in (self.block1, self.block2, self.block3):
            x = stage(x)
            self.taps.append(x)
        return self.fc(active(self.bn1, x).mean((2, 3)))


class DenseLayer(nn.Module):
    def __init__(self, before: int, growth: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(before), conv(before, 4 * growth, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(4 * growth), conv(4 * growth, growth)

    def forward(self, x: Any) -> Any:
        return torch.cat([x, self.conv2(active(self.bn2, self.conv1(active(self.bn1, x))))], 1)


class Transition(nn.Module):
    def __init__(self, before: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(before), conv(before, before // 2, 1)

    def forward(self, x: Any) -> Any:
        return F.avg_pool2d(self.conv1(active(self.bn1, x)), 2)


class DenseNetBC(nn.Module):
    def __init__(self, depth: int, growth: int, classes: int, channels: int) -> None:
        super().__init__()
        count, width = (depth - 4) // 6, 2 * growth
        self.conv1 = conv(channels, width)
        for stage in range(3):
            dense = nn.Sequential(*[DenseLayer(width + i * growth, growth) for i in range(count)])
            width += count * growth
            setattr(self, f"dense{stage + 1}", dense)
            if stage < 2:
                setattr(self, f"trans{stage + 1}", Transition(width))
                width //= 2
        self.bn1, self.fc = nn.BatchNorm2d(width), nn.Linear(width, classes)

    def forward(self, x: Any) -> Any:
        x = self.conv1(x)
        for name in ("dense1", "trans1", "dense2", "trans2", "dense3"):
            x = getattr(self, name)(x)
        return self.fc(active(self.bn1, x).mean((2, 3)))


class V1Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(before, before, 3, stride, before), nn.BatchNorm2d(before)
        self.conv2, self.bn2 = conv(before, after, 1), nn.BatchNorm2d(after)

    def forward(self, x: Any) -> Any:
        return active(self.bn2, self.conv2(active(self.bn1, self.conv1(x))))


class V2Block(nn.Module):
    def __init__(self, before: int, after: int, expansion: int, stride: int) -> None:
        super().__init__()
        wide, self.stride = expansion * before, stride
        self.conv1, self.bn1 = conv(before, wide, 1), nn.BatchNorm2d(wide)
        self.conv2, self.bn2 = conv(wide, wide, 3, stride, wide), nn.BatchNorm2d(wide)
        self.conv3, self.bn3 = conv(wide, after, 1), nn.BatchNorm2d(after)
        self.shortcut = nn.Sequential()
        if stride == 1 and before != after:
            self.shortcut = nn.Sequential(conv(before, after, 1), nn.BatchNorm2d(after))

    def forward(self, x: Any) -> Any:
        h = active(self.bn2, self.conv2(active(self.bn1, self.conv1(x))))
        h = self.bn3(self.conv3(h))
        return h + self.shortcut(x) if self.stride == 1 else h


V1 = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
V2 = [(1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]


class MobileNet(nn.Module):
    """MobileNetV1 or, with a last convolution, V2, in the forms that are common for CIFAR-10."""

    def __init__(self, version: int, classes: int, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(channels, 32), nn.BatchNorm2d(32)
        blocks, width = [], 32
        for after, stride in V1 if version == 1 else []:
            blocks.append(V1Block(width, after, stride))
            width = after
        for expansion, after, count, stride in V2 if version == 2 else []:
            for i in range(count):
                blocks.append(V2Block(width, after, expansion, 1 if i else stride))
                width = after
        self.layers = nn.Sequential(*blocks)
        if version == 2:
            self.conv2, self.bn2 = conv(width, 1280, 1), nn.BatchNorm2d(1280)
        self.version, self.linear = version, nn.Linear(1280 if version == 2 else width, classes)

    def forward(self, x: Any) -> Any:
        x = self.layers(active(self.bn1, self.conv1(x)))
        x = active(self.bn2, self.conv2(x)) if self.version == 2 else x
        return self.linear(x.mean((2, 3)))


class VGG(nn.Module):
    """torchvision's layers, then the mean over pixels and one linear layer."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.features = torchvision.models.vgg16_bn().features
        self.classifier = nn.Linear(512, classes)

    def forward(self, x: Any) -> Any:
        return self.classifier(self.features(x).mean((2, 3)))


class Generator(nn.Module):
    """Zero-shot knowledge transfer's, for 32x32 pixels in three channels."""

    def __init__(self, z: int = 100) -> None:
        super().__init__()
        self.linear = nn.Linear(z, 128 * 64)
        self.norms = nn.ModuleList([nn.BatchNorm2d(n) for n in (128, 128, 64, 3)])
        self.convs = nn.ModuleList([nn.Conv2d(a, b, 3, padding=1) for a, b in ((128, 128), (128, 64), (64, 3))])

    def forward(self, z: Any) -> Any:
        x = self.norms[0](self.linear(z).view(-1, 128, 8, 8))
        for i in range(2):
            x = F.interpolate(x, scale_factor=2)
            x = F.leaky_relu(self.norms[i + 1](self.convs[i](x)), 0.2, inplace=True)
        return self.norms[3](self.convs[2](x))


TIMM = {
    "mobilenet-v3-large": "tf_mobilenetv3_large_100",
    "mobilenet-v3-large torch": "mobilenetv3_large_100",
    "efficientnet-b0": "efficientnet_b0",
    "efficientnet-b0 tf": "tf_efficientnet_b0",
    "efficientnet-lite0": "tf_efficientnet_lite0",
}


def make(name: str, classes: int = 10, channels: int = 3) -> Any:
    """The module of a network as `jaxstack.nn.vision.zoo` names it; " torch" or " tf" behind it is its form."""
    if match := re.fullmatch(r"wrn-(\d+)-([\d.]+)", name):
        return WideResNet(int(match[1]), float(match[2]), classes, channels)
    if match := re.fullmatch(r"densenet-bc-(\d+)-(\d+)", name):
        return DenseNetBC(int(match[1]), int(match[2]), classes, channels)
    if match := re.fullmatch(r"resnet-(\d+)(-imagenet)?", name):
        made = getattr(torchvision.models, f"resnet{match[1]}")(num_classes=classes)
        if not match[2]:
            made.conv1, made.maxpool = conv(channels, 64), nn.Identity()
        return made
    if name in TIMM:
        return timm.create_model(TIMM[name], num_classes=classes)
    if name == "densenet121":
        return torchvision.models.densenet121(num_classes=classes)
    makers = {"lenet": lambda: LeNet(classes, channels), "vgg-16": lambda: VGG(classes)}
    makers |= {f"mobilenet-v{n}": lambda n=n: MobileNet(n, classes, channels) for n in (1, 2)}
    return makers[name]()


LITE = (
    ("_conv_stem", "conv_stem"),
    ("_conv_head", "conv_head"),
    ("_fc", "classifier"),
    ("_bn0", "bn1"),
    ("_bn1", "bn2"),
)


def lite_names(weights: dict[str, Any]) -> dict[str, Any]:
    """A state dict of EfficientNet-Lite0 as its package has it, by timm's names."""
    counts, places = (1, 2, 2, 3, 3, 4, 1), []
    for stage, count in enumerate(counts):
        places += [f"blocks.{stage}.{i}" for i in range(count)]
    found = {}
    for name, value in weights.items():
        first, _, rest = name.partition(".")
        if first != "_blocks":
            found[f"{dict(LITE)[first]}.{rest}"] = value
            continue
        number, layer, leaf = rest.split(".")
        plain = number == "0"  # no expansion
        names = {"_expand_conv": "conv_pw", "_depthwise_conv": "conv_dw"}
        names |= {"_project_conv": "conv_pw" if plain else "conv_pwl"}
        names |= {f"_bn{i}": f"bn{i if plain else i + 1}" for i in range(3)}
        found[f"{places[int(number)]}.{names[layer]}.{leaf}"] = value
    return found


def load(name: str, weights: dict[str, np.ndarray], classes: int = 10, channels: int = 3) -> Any:
    """The network with given weights: every name and shape has to fit, but for the count of batches."""
    module = make(name, classes, channels)
    state = {k: torch.from_numpy(np.array(v)) for k, v in weights.items()}
    state = lite_names(state) if name == "efficientnet-lite0" else state
    state |= {k: v for k, v in module.state_dict().items() if k.endswith("num_batches_tracked")}
    module.load_state_dict(state, strict=True)
    return module


# Structured maps of channels between a depthwise convolution and the next layer


def _riffle(x: Any) -> Any:
    return torch.cat([x[..., ::2], x[..., 1::2]], -1)


def structured_matrix(kind: str, p: dict[str, Any], c_in: int, c_out: int) -> Any:
    """The matrix [C_in, C_out] of a map from the arrays that `jaxstack.nn.structured` names."""
    if kind == "dense":
        return p["kernel"]
    if kind == "acdc":
        product = torch.eye(c_out)
        for a, d in zip(p["a"], p["d"]):
            product = _riffle(_riffle((product * a) @ p["forward"]) * d @ p["inverse"])
        return product.T
    if kind == "hashed":
        return p["theta"][p["index"]]
    cores = [p[f"core_{i}"] for i in range(3)] if "core_0" in p else []
    if kind == "tt":
        whole = torch.tensordot(torch.tensordot(cores[0], cores[1], 1), cores[2], 1)
        return whole[0, ..., 0].reshape(c_out, c_in).T
    core = p["core"]
    for axis in range(3):
        core = torch.movedim(torch.tensordot(p[f"factor_{axis}"], core, ([1], [axis])), 0, axis)
    return core.reshape(c_out, c_in).T


def separable(kind: str, p: dict[str, Any], x: Any, c_out: int) -> Any:
    """A separable convolution with a structured map: [N, C_in, H, W] -> [N, C_out, H, W]."""
    c_in = x.shape[1]
    if kind == "hashed-full":
        return F.conv2d(x, p["theta"][p["index"]].permute(3, 2, 0, 1), padding=1)
    depth = p["depthwise"].permute(3, 2, 0, 1)
    around = lambda x: F.conv2d(x, depth, padding=1, groups=x.shape[1])
    pixel = lambda x, matrix: F.conv2d(x, matrix.T[:, :, None, None])
    if kind == "generic":
        return pixel(pixel(around(x), p["reduce"]), p["expand"])
    if kind == "lowrank":
        rank = p["factor"].shape[0]
        left = p["factor"].reshape(rank, c_out // c_in, c_in).sum(1).T
        return pixel(pixel(around(x), left), p["factor"])
    if kind == "shuffle":
        groups = p["reduce"].shape[0]
        grouped = lambda x, kernel: F.conv2d(x, kernel.transpose(1, 2).flatten(0, 1)[:, :, None, None], groups=groups)
        middle = F.channel_shuffle(grouped(x, p["reduce"]), groups)
        return grouped(around(middle), p["expand"])
    return pixel(around(x), structured_matrix(kind, p, c_in, c_out))


def cosines(n: int) -> tuple[Any, Any]:
    """DCT-II without normalisation, rows for unit vectors, and its inverse."""
    i, k = np.arange(n)[:, None], np.arange(n)[None]
    forward = 2 * np.cos(math.pi * k * (2 * i + 1) / (2 * n))
    return torch.from_numpy(forward).float(), torch.from_numpy(np.linalg.inv(forward)).float()
