"""A detector of objects in images: FCOS or ATSS on a small network, a ResNet or a MobileNet.

Data sets: `scenes` (shapes on textured ground, drawn here), and `coco=DIR`, a folder of COCO's form. Images are squares
of `size` pixels; the validation part is evaluated by COCO's mean average precision, the test part with
`eval_split="test"`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.core import config as configs
from jaxstack.core.config import require, require_at_least, require_positive, require_unit
from jaxstack.core.errors import UserError
from jaxstack.core.learner import Key, Learner, Metrics
from jaxstack.core.metrics import mean
from jaxstack.core.source import Batch, Source
from jaxstack.data import augment, boxes
from jaxstack.data.boxes import Truth
from jaxstack.data.sources import ArrayData, HostData, SplitData
from jaxstack.nn.supervised import Loss, Model, Optimiser, State, linen, supervised, variables
from jaxstack.nn.torch_weights import from_torch, read_weights
from jaxstack.nn.vision import detection
from jaxstack.nn.vision.average_precision import average_precision
from jaxstack.nn.vision.boxes import Detections, level_counts, postprocess
from jaxstack.nn.vision.detection import Detector, Outputs
from jaxstack.nn.vision.detection_loss import Kind, Losses, detector_losses

PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet, in 0..1: what pixels are normalised by."""
AT_ONCE = 50
"""Images that evaluation and prediction pass through the network at once."""
IN_MEMORY = 2**30
"""Bytes of training images that are kept on the device; larger sets are read from their files step by step."""


class Hypers(NamedTuple):
    """Numeric hyperparameters: traced, so a sweep over them compiles once."""

    lr: float = 0.08
    min_lr: float = 0.0
    weight_decay: float = 1e-4
    momentum: float = 0.9
    max_grad_norm: float = 35.0


@dataclass(frozen=True)
class Config(configs.Config):
    """What a detector's training can set."""

    data: str = "scenes"
    """scenes, or coco=DIR with annotations/instances_train*.json, annotations/instances_val*.json and their images."""
    classes: tuple[str, ...] = ()
    """Names of the classes; default: those of the data, which a stored run then needs no more to predict. Scenes have
    their own."""
    size: int = 64
    """Pixels of a side of what the network sees; a picture's longer side is brought to it."""
    train_images: int = 0
    """Use so many training images; 0: all."""
    eval_images: int = 0
    """Evaluate so many images; 0: all."""
    eval_split: Literal["valid", "test"] = "valid"
    split_seed: int = 0
    """Of the parts of a folder for training and validation."""
    kind: Kind = "fcos"
    """fcos: boxes by distances, with centre-ness; atss: boxes from anchors, with a branch for their IoU."""
    backbone: str = "small"
    """small, resnet-18, resnet-34, resnet-50 or mobilenet-v3-large."""
    width: int = 8
    """Channels of the small backbone's first stages; the third has twice, the fourth four times as many."""
    backbone_weights: str = ""
    """A state dict that the backbone begins with, such as ImageNet's of torchvision (resnet) or timm (mobilenet)."""
    frozen_norm: bool = False
    """The backbone's BatchNorm uses its stored statistics, as with weights of ImageNet."""
    levels: int = 3
    """Of the pyramid, 3 to 5: strides 4, 8, 16, 32, 64 with the small backbone, 8 to 128 with the others."""
    channels: int = 32
    """Of the pyramid and the head; the literature: 256."""
    towers: int = 2
    """Convolutions of each of the head's towers; the literature: 4."""
    scale: float = 2.0
    """Pixels of an object over its level's stride: ends of FCOS's ranges, sides of ATSS's anchors; for COCO: 8."""
    radius: float = 1.5
    """Of FCOS's centre sampling, in strides."""
    topk: int = 9
    """Candidates of each level in ATSS."""
    flip: bool = True
    """Mirror every other training image left to right."""
    warmup: float = 0.05
    """Share of the updates in which the learning rate rises linearly."""
    milestones: tuple[float, ...] = (8 / 12, 11 / 12)
    """Shares of the updates at which the learning rate is divided by ten."""
    score_threshold: float = 0.05
    """Least probability of a class that counts as a detection."""
    nms_iou: float | None = None
    """IoU above which the weaker of two detections of a class is dropped; default: 0.5 (fcos), 0.6 (atss)."""
    detections: int = 100
    """Of an image at most."""
    batch_size: int = 16
    num_updates: int = 3000
    """24 epochs of the 2,000 scenes."""
    hypers: Hypers = Hypers()

    def validate(self) -> None:
        if not self.classes and (names := boxes.classes(self.data)) != boxes.classes("scenes"):
            object.__setattr__(self, "classes", names)
        require_at_least(self, 1, "batch_size", "num_updates", "width", "channels", "towers", "topk", "detections")
        require_at_least(self, 0, "train_images", "eval_images", "split_seed", "hypers.lr", "hypers.weight_decay")
        require_unit(self, "warmup", "score_threshold", "hypers.momentum")
        own = self.backbone != "small" or not self.backbone_weights
        require(self, "backbone_weights", own, "none for the small backbone")
        require(self, "levels", 3 <= self.levels <= 5, "3 to 5")
        require(self, "nms_iou", self.nms_iou is None or 0 < self.nms_iou <= 1, "more than 0 and at most 1")
        require_positive(self, "scale", "radius", "hypers.max_grad_norm")

        step = detection.backbone(self.backbone)[1][2]
        require(self, "size", self.size >= 32 and self.size % step == 0, f"a multiple of {step}, at least 32")


def strides(config: Config) -> tuple[int, ...]:
    """Of the pyramid's levels."""
    found = list(detection.backbone(config.backbone)[1])
    while len(found) < config.levels:
        found.append(2 * found[-1])
    return tuple(found)


def class_names(config: Config) -> tuple[str, ...]:
    """Of what is detected, in the order of the labels."""
    return config.classes or boxes.classes("scenes")


def network(config: Config) -> Detector:
    """The unbound network of a config."""
    net, _ = detection.backbone(config.backbone, config.width)
    shape = strides(config), config.kind, config.channels, config.towers, config.scale, config.frozen_norm
    return Detector(net, len(class_names(config)), *shape)


def backbone_weights(config: Config) -> Any:
    """Variables of the backbone, {"params": ..., "batch_stats": ...}, in the file that the config names.

    What the file has of a classifier's head is left out. Raises `UserError` for a file that is none or does not fit.
    """
    net, _ = detection.backbone(config.backbone)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, config.size, config.size, 3)))
    path = config.backbone_weights
    of_head = ("fc.", "classifier.", "conv_head.")
    weights = {name: x for name, x in read_weights(path).items() if not name.startswith(of_head)}
    return from_torch(net, weights, shapes, path)


def from_file(config: Config) -> Callable[[Any, Any], Any]:
    """(fresh variables, ...) -> the same with the backbone of the config's file, which is read when the program runs:
    neither a constant of it, nor needed once training has begun."""

    def start(fresh: Any, taught: Any) -> Any:
        own = {kind: fresh[kind]["backbone"] for kind in ("params", "batch_stats")}
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), own)
        found = jax.pure_callback(lambda: backbone_weights(config), shapes, vmap_method="sequential")
        return {**fresh, **{kind: {**fresh[kind], "backbone": found[kind]} for kind in found}}

    return start


def prepared(images: Any) -> Array:
    """Images uint8 as the network is given them: less ImageNet's mean, over its deviation."""
    x = images.astype(jnp.float32) / 255.0
    return (x - jnp.asarray(PIXEL_MEAN, jnp.float32)) / jnp.asarray(PIXEL_STD, jnp.float32)


def model_of(config: Config) -> Model:
    """The network as pure functions of its variables and of uint8 images [B, size, size, 3]."""
    example = jnp.zeros((1, config.size, config.size, 3), jnp.uint8)
    return linen(network(config), example, prepare=prepared)


def truth_of(targets: Any) -> Truth:
    """The objects among what a loss is given, which may come with a teacher's outputs."""
    return targets if isinstance(targets, Truth) else targets[0]


def losses(config: Config, outputs: Outputs, targets: Any) -> Losses:
    """The parts of the detector's own loss, [B] each."""
    hw = (config.size, config.size)
    options: dict[str, Any] = dict(scale=config.scale, radius=config.radius, topk=config.topk)
    wanted = detection.targets_of(config.kind, hw, strides(config), *truth_of(targets), **options)
    return detector_losses(config.kind, outputs.logits, outputs.boxes, outputs.quality, wanted)


def loss_of(config: Config) -> Loss:
    """The detector's own loss: (outputs, targets, hypers) -> [B]; targets are a `Truth`, or a pair of one and a
    teacher's outputs."""

    def loss(outputs: Outputs, targets: Any, hypers: Any) -> Array:
        parts = losses(config, outputs, targets)
        return parts.classes + parts.boxes + parts.quality

    return loss


def metrics_of(config: Config) -> dict[str, Loss]:
    """The parts of the detector's own loss, by name."""
    one = lambda name: lambda outputs, targets, hypers: getattr(losses(config, outputs, targets), name)
    return {f"{name}_loss": one(name) for name in Losses._fields}


def detect(config: Config, outputs: Outputs) -> Detections:
    """What outputs of images detect: arrays with a leading axis of images."""
    hw = (config.size, config.size)
    nms_iou = {"fcos": 0.5, "atss": 0.6}[config.kind] if config.nms_iou is None else config.nms_iou
    options: dict[str, Any] = dict(score_threshold=config.score_threshold, nms_iou=nms_iou, most=config.detections)
    counts = level_counts(hw, strides(config))
    one = lambda logits, quality, found: postprocess(logits, quality, found, counts, hw, **options)
    return jax.vmap(one)(outputs.logits, outputs.quality, outputs.boxes)


def _part(config: Config, which: boxes.Split, count: str) -> boxes.Part:
    """A part of the data, of as many images as the field `count` says. Raises `UserError`."""
    names, most = boxes.classes(config.data), getattr(config, count)
    require(config, "classes", class_names(config) == names, f"{names}, those of {config.data}")
    part = boxes.part(config.data, which, config.size, config.split_seed, most)
    require(config, count, part.count >= most, f"at most the {part.count} images of {which}")
    return part


def source(config: Config) -> Source:
    """Batches (images, `Truth`) of the training part, in shuffled epochs of each seed's own."""
    if config.backbone_weights:
        backbone_weights(config)  # what is wrong with it is said before a program runs
    part = _part(config, "train", "train_images")
    mirror = lambda key, batch: _mirrored(key, *batch)
    change = mirror if config.flip else None
    if part.count * config.size**2 * 3 <= IN_MEMORY:
        return ArrayData(part.read(range(part.count)), config.batch_size, per_seed=True, augment=change)
    if config.batch_size > part.count:
        raise UserError(f"batch_size={config.batch_size}: expected 1 to {part.count}, the number of examples")
    each = part.count // config.batch_size

    @lru_cache(64)
    def order(seed: int, epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(part.count)

    def batch(step: int, seed: int) -> Any:
        epoch, at = divmod(step, each)
        return part.read(order(seed, epoch)[at * config.batch_size : (at + 1) * config.batch_size])

    return HostData(batch, per_seed=True, augment=change)


def _mirrored(key: Key, images: Array, truth: Truth) -> tuple[Array, Truth]:
    images, found = augment.flip_boxes(key, images, truth.boxes)
    return images, truth._replace(boxes=found)


def eval_source(config: Config) -> Source:
    """The part that is evaluated, as one batch: average precision is no mean over batches."""
    part = _part(config, config.eval_split, "eval_images")
    return SplitData(part.read(range(part.count)), part.count)


def in_parts(function: Callable[[Any], Any], inputs: Any, at_once: int = AT_ONCE) -> Any:
    """A function of a batch, of so many rows at once: inputs [N, ...] -> outputs [N, ...]. The first rows fill up the
    last part."""
    count = len(jax.tree.leaves(inputs)[0])
    size = min(at_once, count)
    rows = jnp.arange(-(-count // size) * size).reshape(-1, size) % count
    found = jax.lax.map(lambda own: function(jax.tree.map(lambda x: x[own], inputs)), rows)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], found)


def measured(config: Config, model: Model, weights: Any, batch: Batch) -> Metrics:
    """Mean average precision (`map`), that at an IoU of 0.5 (`ap50`) and the detector's own loss of a whole split.

    Args:
        config: of the detector.
        model: its network.
        weights: variables.
        batch: images and their `Truth`.
    """

    def part(data: Any) -> tuple[Detections, Array]:
        outputs = model.apply(weights, data[0])
        return detect(config, outputs), loss_of(config)(outputs, data[1], None)

    found, loss = in_parts(part, batch.data)
    truth, counts = batch.data[1], batch.mask > 0
    found = found._replace(valid=found.valid & counts[:, None])
    there = truth.valid & counts[:, None]
    area, known = average_precision(found, truth.boxes, truth.labels, there, len(class_names(config)))
    return {
        "eval/map": mean(area, known[:, None]),
        "eval/ap50": mean(area[:, 0], known),
        "eval/loss": mean(loss, counts),
    }


def learner_of(config: Config, **options: Any) -> Learner:
    """The learner of a config; a method that distils gives `loss`, `teacher`, `teachers` and `start`.

    Args:
        config: of the detector.
        **options: as of `supervised`, in place of the detector's own: `loss` (`loss_of`), `metrics` (`metrics_of`),
            `name`, `hypers`, `source` and so on.
    """
    model = model_of(config)
    given: dict[str, Any] = dict(
        loss=loss_of(config),
        metrics=metrics_of(config),
        optimiser=Optimiser("sgd", "steps", config.warmup, config.milestones, clip=True),
        num_steps=config.num_updates,
        hypers=config.hypers,
        config=config,
        name="detector",
        batch_size=config.batch_size,
        source=source,
        eval_source=eval_source,
        objective=("eval/map", "max"),
    )
    given |= options
    if config.backbone_weights:
        first, then = from_file(config), given.get("start") or (lambda fresh, taught: fresh)
        given["start"] = lambda fresh, taught: then(first(fresh, taught), taught)
    learner = supervised(model, **given)

    def evaluate(s: State, key: Key, batch: Batch) -> Metrics:
        return measured(config, model, variables(s), batch)

    def predict(s: State, images: Array) -> Detections:
        """Images [B, size, size, 3] uint8 -> detections in their pixels."""
        return in_parts(lambda x: detect(config, model.apply(variables(s), x)), images)

    return learner._replace(evaluate=evaluate, predict=predict)


def detector(config: Config = Config(), /, **changes: Any) -> Learner:
    """The learner of a config or of field values, hyperparameters among them. Raises `UserError`."""
    return learner_of(configs.replace(config, **changes) if changes else config)
