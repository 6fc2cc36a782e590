"""The small FCOS detector of jaxstack.nn.vision.detection and its loss in PyTorch, under the paths of the flax modules.

Only the child process of bench_vision.py imports this file.
"""

from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]

PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Detector(nn.Module):
    """The network, its targets and its loss; `strides` and `scale` as of the detector's config."""

    def __init__(self, arrays: dict[str, np.ndarray], size: int, strides: list[int], scale: float, radius: float):
        super().__init__()
        self.names = [name for name in arrays if name.startswith("params/")]
        turn = lambda x: np.ascontiguousarray(x.transpose(3, 2, 0, 1)) if x.ndim == 4 else x
        self.weights = nn.ParameterList([nn.Parameter(torch.from_numpy(turn(arrays[n]))) for n in self.names])
        self.places = {name.removeprefix("params/"): i for i, name in enumerate(self.names)}
        self.stats = {n.removeprefix("batch_stats/"): torch.from_numpy(x) for n, x in arrays.items() if "stats/" in n}
        self.levels, self.radius = len(strides), radius
        self.towers = sum(name.startswith("head/class_gn") for name in self.places) // 2
        xy, step, ends = [], [], [scale * s for s in strides[:-1]]
        for s in strides:
            line = (torch.arange(size // s) + 0.5) * s
            y, x = torch.meshgrid(line, line, indexing="ij")
            xy.append(torch.stack([x, y], -1).reshape(-1, 2))
            step.append(torch.full((len(xy[-1]),), float(s)))
        self.xy, self.step = torch.cat(xy), torch.cat(step)
        low, high = ([0.0, *ends], [*ends, float("inf")])
        counts = torch.tensor([len(v) for v in xy])
        self.low, self.high = (torch.tensor(v).repeat_interleave(counts) for v in (low, high))
        self.mean, self.std = (torch.tensor(v)[:, None, None] for v in (PIXEL_MEAN, PIXEL_STD))

    def at(self, name: str) -> Any:
        return self.weights[self.places[name]] if name in self.places else None

    def conv(self, name: str, x: Any, stride: int = 1) -> Any:
        kernel = self.at(f"{name}/kernel")
        return F.conv2d(x, kernel, self.at(f"{name}/bias"), stride, kernel.shape[-1] // 2)

    def norm(self, name: str, x: Any) -> Any:
        stats = self.stats[f"{name}/mean"], self.stats[f"{name}/var"]
        return F.batch_norm(x, *stats, self.at(f"{name}/scale"), self.at(f"{name}/bias"), True)

    def backbone(self, x: Any) -> list[Any]:
        x, found = F.relu(self.norm("backbone/bn", self.conv("backbone/conv", x, 2))), []
        for i in (1, 2, 3):
            h = F.relu(self.norm(f"backbone/bn{i}_1", self.conv(f"backbone/conv{i}_1", x, 2)))
            x = F.relu(h + self.norm(f"backbone/bn{i}_2", self.conv(f"backbone/conv{i}_2", h)))
            found.append(x)
        return found

    def tower(self, kind: str, x: Any) -> Any:
        for i in range(self.towers):
            x = self.conv(f"head/{kind}{i}", x)
            groups = min(32, max(1, x.shape[1] // 4))
            x = F.relu(F.group_norm(x, groups, self.at(f"head/{kind}_gn{i}/scale"), self.at(f"head/{kind}_gn{i}/bias")))
        return x

    def forward(self, images: Any) -> tuple[Any, Any, Any]:
        """Pixels [B, 3, H, W] in 0..255 -> class logits, boxes, quality logits of all locations."""
        taps = self.backbone((images / 255.0 - self.mean) / self.std)
        sums = [self.conv(f"neck/lateral{i}", x) for i, x in enumerate(taps)]
        for i in (1, 0):
            sums[i] = sums[i] + F.interpolate(sums[i + 1], scale_factor=2, mode="nearest")
        parts: tuple[list[Any], ...] = ([], [], [])
        flat = lambda x: x.permute(0, 2, 3, 1).flatten(1, 2)
        for i, x in enumerate(sums):
            x = self.conv(f"neck/out{i}", x)
            logits = self.conv("head/class_out", self.tower("class", x))
            box = flat(self.conv("head/box_out", self.tower("box", x)))
            values = flat(logits), box[..., :4] * self.at(f"head/scale{i}"), box[..., 4]
            for part, value in zip(parts, values):
                part.append(value)
        logits, raw, quality = (torch.cat(part, 1) for part in parts)
        far = raw.clamp(max=8.0).exp() * self.step[:, None]
        return logits, torch.cat([self.xy - far[..., :2], self.xy + far[..., 2:]], -1), quality

    def targets(self, boxes: Any, labels: Any, valid: Any) -> tuple[Any, Any, Any]:
        """FCOS's: labels [B, A], -1 for background, boxes [B, A, 4], centre-ness [B, A]."""
        xy, boxes_ = self.xy[None, :, None], boxes[:, None]
        sides = torch.cat([xy - boxes_[..., :2], boxes_[..., 2:] - xy], -1)
        reach = sides.amax(-1)
        near = (xy - 0.5 * (boxes_[..., :2] + boxes_[..., 2:])).abs() < self.radius * self.step[:, None, None]
        inside = (sides.amin(-1) > 0) & near.all(-1) & valid[:, None]
        inside &= (reach >= self.low[:, None]) & (reach <= self.high[:, None])
        area = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)[:, None]
        own = torch.where(inside, area, torch.inf).argmin(-1)
        positive = inside.any(-1)
        box = boxes.gather(1, own[..., None].expand(-1, -1, 4))
        own_sides = sides.gather(2, own[..., None, None].expand(-1, -1, 1, 4))[:, :, 0]
        first, second = own_sides[..., :2], own_sides[..., 2:]
        ratio = torch.minimum(first, second) / torch.maximum(first, second).clamp(min=1e-6)
        centre = torch.where(positive & (ratio > 0).all(-1), ratio.prod(-1), 0.0).sqrt()
        return torch.where(positive, labels.gather(1, own), -1), box, centre

    def loss(self, images: Any, boxes: Any, labels: Any, valid: Any) -> Any:
        """Focal loss, -log IoU weighted by centre-ness, and the cross entropy of centre-ness."""
        with torch.no_grad():
            labels, wanted, centre = self.targets(boxes, labels, valid)
        logits, found, quality = self(images)
        positive = labels >= 0
        count = positive.sum().clamp(min=1)
        one_hot = F.one_hot(labels.clamp(min=0), logits.shape[-1]).float() * positive[..., None]
        entropy = F.binary_cross_entropy_with_logits(logits, one_hot, reduction="none")
        p = logits.sigmoid()
        away = p * (1 - one_hot) + (1 - p) * one_hot
        weight = 0.25 * one_hot + 0.75 * (1 - one_hot)
        classes = (weight * away.square() * entropy).sum() / count
        low, high = torch.maximum(found[..., :2], wanted[..., :2]), torch.minimum(found[..., 2:], wanted[..., 2:])
        common = (high - low).clamp(min=0).prod(-1)
        area = lambda x: (x[..., 2:] - x[..., :2]).clamp(min=0).prod(-1)
        iou = common / (area(found) + area(wanted) - common).clamp(min=1e-6)
        error = -(iou.clamp(min=1e-6).log() * centre)
        of_boxes = torch.where(positive, error, 0.0).sum() / centre.sum().clamp(min=1e-6)
        of_quality = F.binary_cross_entropy_with_logits(quality, centre, reduction="none")
        return classes + of_boxes + torch.where(positive, of_quality, 0.0).sum() / count
