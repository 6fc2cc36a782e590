"""Acute ischaemic stroke on routine CT: is there a lesion, and on which side (Fontanella et al., 2023).

Scans are labelled as a whole; nobody outlines lesions. A scan is split at its mid-line into two halves that look the
same way; one network with shared weights sees the slices of both, pools them, and gives each half a logit. With
`compare` a half also sees what the other one has: a stroke is an asymmetry. The paper's methods are not public; what is
ours is told in docs/methods/stroke-ct.md.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxstack.core import config as configs
from jaxstack.core.config import require, require_at_least
from jaxstack.core.errors import UserError
from jaxstack.core.learner import Key, Learner
from jaxstack.core.source import Source
from jaxstack.data.augment import shift
from jaxstack.data.sources import ArrayData, SplitData
from jaxstack.medical.stroke_data import ATROPHY, CALCIFIED, OLD, SIDE, SIZE, UNKNOWN, Scans, phantom_scans, read_folder
from jaxstack.nn.conv import Conv
from jaxstack.nn.supervised import Model, Optimiser, State, linen, supervised, variables
from jaxstack.nn.vision.acat import SliceAttention, Trunk
from jaxstack.nn.vision.layers import BatchNorm, conv, fan_out_normal, head, larger, mean_pool

Pool = Literal["mean", "max", "attention"]
Compare = Literal["none", "difference", "concatenation", "cross-attention"]
Head = Literal["halves", "four-class"]
Backbone = Literal["small", "resnet-18", "resnet-50"]
TASKS = {"old": (OLD, 2), "size": (SIZE, 4), "atrophy": (ATROPHY, 1), "calcified": (CALCIFIED, 1)}
"""Auxiliary tasks: column of the labels, and logits: one per side, one per class, or one."""
SWAPPED = np.array([0, 2, 1, 3], np.int8)
"""Sides after left and right have changed places."""


class Outputs(NamedTuple):
    """What the network says about scans."""

    logits: Array
    """[B, 2] of a lesion on the left and on the right, or [B, 4] of none, left, right, both."""
    tasks: dict[str, Array]
    """[B, K] logits of the auxiliary tasks."""


class Small(nn.Module):
    """Convolutions, each with BatchNorm and ReLU: 4x4 with stride 2, then 3x3 after means over 2x2 pixels."""

    widths: Sequence[int] = (8, 16, 32, 64)

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n p q k"]:
        """Images -> features."""
        for i, width in enumerate(self.widths):
            layer = (
                conv(width, name=f"conv{i}")
                if i
                else Conv(width, (4, 4), 2, 1, use_bias=False, kernel_init=fan_out_normal, name="conv0")
            )
            x = jax.nn.relu(BatchNorm(name=f"bn{i}")(layer(mean_pool(x) if i else x), train))
        return x


class CrossAttention(nn.Module):
    """Slices of one half look at those of the other: softmax(Q K' / sqrt(C)) V with one head."""

    @nn.compact
    def __call__(self, own: Float[Array, "n t c"], other: Float[Array, "n t c"]) -> Float[Array, "n t c"]:
        """Features of slices -> the other half's, as each slice sees them."""
        c = own.shape[-1]
        q, k, v = (nn.Dense(c, use_bias=False, name=name)(x) for name, x in (("q", own), ("k", other), ("v", other)))
        weights = jax.nn.softmax(jnp.einsum("ntc,nsc->nts", q, k) / np.sqrt(c))
        return jnp.einsum("nts,nsc->ntc", weights, v)


class HalfBrainNet(nn.Module):
    """Shared weights over both halves of the head: exchanging the halves exchanges their logits."""

    backbone: Backbone = "small"
    widths: tuple[int, ...] = (8, 16, 32, 64)
    """Of `small`."""
    slice_pool: Pool = "mean"
    compare: Compare = "difference"
    """What a half is given of the other: nothing, own - other, the other, or the other's slices by attention."""
    head: Head = "halves"
    """A logit for each half, or four classes of the whole slices."""
    tasks: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x: Float[Array, "b 2 t h w"], train: bool = False) -> Outputs:
        """Halves in 0..1 -> logits."""
        whole = self.head == "four-class"
        if whole:
            x = jnp.concatenate([x[:, 0], x[:, 1, ..., ::-1]], -1)[:, None]
        b, sides, t, h, w = x.shape
        f = self._features(x.reshape(b * sides * t, h, w, 1), train).mean((1, 2)).reshape(b * sides, t, -1)
        if self.compare == "cross-attention":
            other = f.reshape(b, sides, t, -1)[:, ::-1].reshape(f.shape)
            f = jnp.concatenate([f, CrossAttention()(f, other)], -1)
        g = self._pooled(f, train).reshape(b, sides, -1)
        if self.compare in ("difference", "concatenation"):
            other = g[:, ::-1]
            g = jnp.concatenate([g, g - other if self.compare == "difference" else other], -1)
        logits = head(4)(g[:, 0]) if whole else head(1)(g)[..., 0]
        tasks = {}
        for name in self.tasks:
            of_sides = name == "old" and not whole
            layer = nn.Dense(1 if of_sides else TASKS[name][1], name=f"task_{name}")
            tasks[name] = layer(g)[..., 0] if of_sides else layer(g.mean(1))
        return Outputs(logits, tasks)

    def _features(self, x: Array, train: bool) -> Array:
        if self.backbone == "small":
            return Small(self.widths)(x, train)
        deep = self.backbone == "resnet-50"
        trunk = Trunk((3, 4, 6, 3) if deep else (2, 2, 2, 2), bottleneck=deep)
        x = trunk.begin(x, train)
        for stage in range(1, 5):
            x = trunk.stage(stage, x, train)
        return x

    def _pooled(self, f: Float[Array, "n t c"], train: bool) -> Float[Array, "n c"]:
        if self.slice_pool == "attention":
            return SliceAttention()(f, train)
        if self.slice_pool == "max":
            return functools.reduce(larger, jnp.unstack(f, axis=1))
        return f.mean(1)


def flip_swap(key: Key, x: Float[Array, "b 2 t h w"], labels: Int[Array, "b l"]) -> tuple[Array, Array]:
    """Exchange the halves of every other scan, at random, and the sides in its labels.

    That mirrors the head exactly, as both halves look the same way.

    Args:
        key: of the choice.
        x: halves.
        labels: columns as `jaxstack.medical.stroke_data.LABELS`.
    """
    swap = jax.random.bernoulli(key, 0.5, (len(x),))
    x = jnp.where(swap[:, None, None, None, None], x[:, ::-1], x)
    for column in (SIDE, OLD):
        side = labels[:, column]
        other = jnp.where(side < 0, side, jnp.asarray(SWAPPED)[side])
        labels = labels.at[:, column].set(jnp.where(swap, other, side))
    return x, labels


def on_sides(side: Int[Array, " b"]) -> Float[Array, "b 2"]:
    """none, left, right, both (0 to 3) -> 1 where there is a lesion on the left and on the right."""
    return jnp.stack([side & 1, side >> 1 & 1], -1).astype(jnp.float32)


def class_weights(labels: Any, classes: int) -> np.ndarray:
    """Inverse frequencies n / (K n_k) of classes 0 to K - 1, [K] float32; equal counts give ones, absent classes 1."""
    counts = np.bincount(np.asarray(labels, np.int64).ravel(), minlength=classes)
    return np.where(counts > 0, counts.sum() / (classes * np.maximum(counts, 1)), 1.0).astype(np.float32)


def class_weighted_bce(
    logits: Float[Array, "*b"], targets: Float[Array, "*b"], weights: Float[Array, "*b 2"]
) -> Float[Array, "*b"]:
    """Binary cross entropy times the weight of the target's class.

    Args:
        logits: any shape.
        targets: 0 or 1.
        weights: of the classes 0 and 1, as `class_weights` gives them.
    """
    return optax.sigmoid_binary_cross_entropy(logits, targets) * jnp.where(
        targets > 0, weights[..., 1], weights[..., 0]
    )


class Targets(NamedTuple):
    """What is learned of scans, with the weights of the training set, the same in all rows."""

    labels: Array
    """[B, 5], see `jaxstack.medical.stroke_data.LABELS`."""
    halves: Array
    """[B, 2]: weights of halves without and with a lesion."""
    classes: Array
    """[B, 4]: of none, left, right, both."""


def targets_of(scans: Scans, train: Scans | None = None) -> Targets:
    """Targets of scans, with the class weights of `train` (default: of the scans themselves)."""
    side = (scans if train is None else train).labels[:, SIDE]
    both = np.stack([side & 1, side >> 1 & 1], -1)
    rows = lambda w: np.broadcast_to(w, (len(scans.labels), len(w)))
    return Targets(scans.labels, rows(class_weights(both, 2)), rows(class_weights(side, 4)))  # pyright: ignore[reportArgumentType]


def loss(outputs: Outputs, targets: Targets, hypers: Any) -> Array:
    """Class-weighted cross entropy of the sides, plus `task_weight` times that of the auxiliary tasks, [B].

    Weights alone would teach probabilities as if all classes were equally frequent. Their logarithms are added to the
    logits here, so that the network's own logits are at the training set's frequencies (as logit adjustment, Menon et
    al., 2021) and 1/2 is the threshold of most right decisions.
    """
    side = targets.labels[:, SIDE]
    if outputs.logits.shape[-1] == 4:
        weight = jnp.take_along_axis(targets.classes, side[:, None].astype(jnp.int32), 1)[:, 0]
        balanced = outputs.logits + jnp.log(targets.classes)
        value = weight * optax.softmax_cross_entropy_with_integer_labels(balanced, side.astype(jnp.int32))
    else:
        balanced = outputs.logits + jnp.log(targets.halves[:, 1:] / targets.halves[:, :1])
        value = class_weighted_bce(balanced, on_sides(side), targets.halves[:, None]).mean(-1)
    for name, logits in outputs.tasks.items():
        label = targets.labels[:, TASKS[name][0]]
        known, label = label != UNKNOWN, jnp.maximum(label, 0)
        if name == "size":
            each = optax.softmax_cross_entropy_with_integer_labels(logits, label.astype(jnp.int32))
        else:
            wanted = on_sides(label) if name == "old" else label[:, None].astype(jnp.float32)
            each = optax.sigmoid_binary_cross_entropy(logits, wanted).mean(-1)
        value += hypers.task_weight * jnp.where(known, each, 0.0)
    return value


def side_probabilities(logits: Float[Any, "*b k"]) -> Float[Array, "*b 3"]:
    """Probabilities of a lesion on the left, on the right, anywhere; a half-by-half network's sides are independent."""
    logits = jnp.asarray(logits)
    if logits.shape[-1] == 4:
        p = jax.nn.softmax(logits)
        return jnp.stack([p[..., 1] + p[..., 3], p[..., 2] + p[..., 3], 1.0 - p[..., 0]], -1)
    left, right = jnp.moveaxis(jax.nn.sigmoid(logits), -1, 0)
    return jnp.stack([left, right, 1.0 - (1.0 - left) * (1.0 - right)], -1)


def scan_decision(logits: Float[Any, "*b k"], threshold: Any = 0.5) -> Int[Array, "*b"]:
    """none, left, right or both (0 to 3).

    Args:
        logits: of halves [..., 2]: each side whose probability is above the threshold. Of classes [..., 4]: none unless
            the probability of a lesion is above the threshold, else the most probable of the others.
        threshold: in 0..1.
    """
    logits = jnp.asarray(logits)
    if logits.shape[-1] == 4:
        present = 1.0 - jax.nn.softmax(logits)[..., 0] > threshold
        return jnp.where(present, 1 + logits[..., 1:].argmax(-1), 0)
    above = (jax.nn.sigmoid(logits) > threshold).astype(jnp.int32)
    return above[..., 0] + 2 * above[..., 1]


def tuned_threshold(logits: Any, sides: Any) -> float:
    """The threshold of .025, .05, ... .975 with the most right decisions on scans; of equal ones the nearest to .5."""
    grid = np.linspace(0.025, 0.975, 39)
    right = [float((np.asarray(scan_decision(logits, t)) == np.asarray(sides)).mean()) for t in grid]
    return float(max(zip(right, -np.abs(grid - 0.5), grid))[2])


class Hypers(NamedTuple):
    """Numeric hyperparameters: traced, so a sweep over them compiles once."""

    lr: float = 3e-3
    min_lr: float = 0.0
    weight_decay: float = 1e-4
    b1: float = 0.9
    b2: float = 0.999
    max_grad_norm: float = 1.0
    task_weight: float = 0.3
    """Of the auxiliary tasks."""


@dataclass(frozen=True)
class Config(configs.Config):
    """What training can set."""

    data: str = "phantom"
    """`phantom` (scans drawn here), or a folder of NIfTI files or DICOM series with scans.csv: columns file, side and,
    as far as known, patient, split, old, size, number, timing, atrophy, calcified, background."""
    slices: int = 7
    """Chosen from each scan; ACAT takes 11 of the same trial's scans."""
    size: int = 64
    """Pixels of a side of the square around the brain."""
    view_mm: float = 230.0
    """Millimetres of that side."""
    num_train: int = 900
    """Of phantoms; of a folder 70% of the patients, or the split of its table."""
    num_valid: int = 150
    """Of phantoms; of a folder 15% of the patients."""
    backbone: Backbone = "small"
    """small, resnet-18 or resnet-50."""
    widths: tuple[int, ...] = (8, 16, 32, 64)
    """Channels of the small backbone's convolutions."""
    slice_pool: Pool = "mean"
    """mean, max or attention."""
    compare: Compare = "difference"
    """What a half is given of the other: none, difference, concatenation or cross-attention."""
    head: Head = "halves"
    """halves: a logit for each; four-class: none, left, right, both from whole slices."""
    tasks: tuple[str, ...] = ()
    """Auxiliary tasks, of old, size, atrophy, calcified."""
    flip: bool = True
    """Exchange the halves of every other training scan, and its sides."""
    shift: int = 1
    """Training scans are moved by up to so many pixels, both halves alike."""
    turn: float = 0.0
    """Training scans are turned as a whole by up to so many degrees: 10 as the sister study has it."""
    zoom: float = 0.0
    """And enlarged or made smaller by up to this share: .1 likewise."""
    jitter: int = 0
    """And their slices chosen up to so many slices of the volume lower or higher: 1 likewise."""
    gain: float = 0.02
    """Training scans are multiplied by 1 +- this inside the brain."""
    offset: float = 0.02
    """And brighter or darker by up to this, in widths of the window."""
    noise: float = 0.01
    """Deviation of the noise that is added, likewise."""
    schedule: Literal["cosine", "constant"] = "cosine"
    batch_size: int = 32
    num_updates: int = 336
    data_seed: int = 0
    """Of the phantoms, or of the split of a folder's patients."""
    hypers: Hypers = Hypers()

    def validate(self) -> None:
        require_at_least(self, 1, "slices", "num_train", "num_valid", "num_updates")
        require_at_least(self, 0, "shift", "jitter", "data_seed", "hypers.lr", "hypers.min_lr", "hypers.weight_decay")
        require_at_least(self, 0, "hypers.task_weight", "gain", "offset", "noise")
        require(self, "turn", 0 <= self.turn <= 180, "0 to 180 degrees")
        require(self, "zoom", 0 <= self.zoom < 1, "0 to less than 1")
        for name, options in (("backbone", Backbone), ("slice_pool", Pool), ("compare", Compare), ("head", Head)):
            known = options.__args__
            require(self, name, getattr(self, name) in known, f"one of {', '.join(known)}")
        require(self, "size", self.size >= 32 and self.size % 16 == 0, "a multiple of 16, at least 32")
        require(self, "view_mm", self.view_mm > 0, "a positive number")
        require(self, "widths", 0 < len(self.widths) <= 5 and min(self.widths) >= 1, "one to five widths >= 1")
        require(self, "tasks", set(self.tasks) <= set(TASKS), f"some of {', '.join(TASKS)}")
        alone = self.head == "halves" or self.compare == "none"
        require(self, "compare", alone, "none with --head four-class")
        fewest = self.data != "phantom" or self.batch_size <= self.num_train
        require(self, "batch_size", fewest, f"at most num_train={self.num_train}")
        require(self, "batch_size", self.batch_size >= 2, "at least 2, BatchNorm needs several scans")


def parts(config: Config) -> tuple[Scans, Scans]:
    """Scans for training and for validation, of different patients. Raises `UserError`."""
    c = config
    if c.data == "phantom":
        draw = lambda seed, count: phantom_scans(seed, count, c.slices, c.size, jitter=c.jitter)
        return draw(2 * c.data_seed, c.num_train), draw(2 * c.data_seed + 1, c.num_valid)
    scans, part = read_folder(c.data, c.slices, c.size, c.view_mm, c.data_seed, c.jitter)
    for i, name in enumerate(("train", "valid")):
        if not (part == i).any():
            raise UserError(f"{c.data}: found no scans of the part {name}, expected at least 1")
    return scans.part(part == 0), scans.part(part == 1)


def turned(x: Float[Array, "b 2 t h w"], degrees: Float[Array, " b"], zoom: Float[Array, " b"]) -> Array:
    """Each head as a whole turned by `degrees`, counterclockwise as displayed, and `zoom` times as large, about the
    middle of its square; then split at the middle again. Bilinear, zeros come in."""
    b, _, t, size, half = x.shape
    whole = jnp.concatenate([x[:, 0], x[:, 1, ..., ::-1]], -1).reshape(b, t, size * size)
    middle = (size - 1) / 2
    y, z = (v.ravel() - middle for v in jnp.meshgrid(*[jnp.arange(size, dtype=jnp.float32)] * 2, indexing="ij"))
    c, s = (f(jnp.deg2rad(degrees))[:, None] / zoom[:, None] for f in (jnp.cos, jnp.sin))
    rows, columns = c * y + s * z + middle, c * z - s * y + middle
    top, left = jnp.floor(rows), jnp.floor(columns)
    out = jnp.zeros_like(whole)
    for down in (0, 1):
        for right in (0, 1):
            i, j = top + down, left + right
            weight = (1.0 - jnp.abs(rows - i)) * (1.0 - jnp.abs(columns - j))
            inside = (i >= 0) & (i < size) & (j >= 0) & (j < size)
            at = jnp.where(inside, i * size + j, 0).astype(jnp.int32)
            out += jnp.where(inside, weight, 0.0)[:, None] * jnp.take_along_axis(whole, at[:, None], 2)
    out = out.reshape(b, t, size, size)
    return jnp.stack([out[..., :half], out[..., ::-1][..., :half]], 1)


def chosen_slices(x: Any, jitter: int, which: Any) -> Any:
    """The slices of scans [B, 2, (2 jitter + 1) T, h, w] that are moved by `which` - jitter, [B] or a number."""
    b, sides, many, h, w = x.shape
    x = x.reshape(b, sides, 2 * jitter + 1, many // (2 * jitter + 1), h, w)
    return x[np.arange(b), :, which]


def augmented(key: Key, x: Any, labels: Any, config: Config) -> tuple[Array, Array]:
    """Training copies of halves uint8 [B, 2, T, h, w] and labels [B, 5]: other slices are chosen, heads turned and
    enlarged, halves exchanged and moved, and inside the brain there are gain, offset and noise."""
    k_flip, k_shift, k_gain, k_noise = jax.random.split(key, 4)
    # keys of their own, so that the others' draws do not depend on them
    k_jitter, k_turn, k_zoom = jax.random.split(jax.random.fold_in(key, 1), 3)
    count = len(x)
    if config.jitter:
        x = chosen_slices(x, config.jitter, jax.random.randint(k_jitter, (count,), 0, 2 * config.jitter + 1))
    x = x.astype(jnp.float32) / 255.0
    if config.turn or config.zoom:
        degrees, zoom = (jax.random.uniform(k, (count,), minval=-1.0) for k in (k_turn, k_zoom))
        x = turned(x, config.turn * degrees, 1.0 + config.zoom * zoom)
    if config.flip:
        x, labels = flip_swap(k_flip, x, labels)
    if config.shift:
        b, sides, t, h, w = x.shape
        flat = jnp.moveaxis(x.reshape(b, sides * t, h, w), 1, -1)
        x = jnp.moveaxis(shift(k_shift, flat, config.shift), -1, 1).reshape(x.shape)
    gain, offset = jax.random.uniform(k_gain, (2, len(x), 1, 1, 1, 1), minval=-1.0)
    noise = config.noise * jax.random.normal(k_noise, x.shape)
    changed = x * (1.0 + config.gain * gain) + config.offset * offset + noise
    return jnp.where(x > 0, jnp.clip(changed, 1e-3, 1.0), 0.0), labels


def augment(config: Config) -> Any:
    """(key, (halves uint8, targets)) -> (halves in 0..1, targets): the copies that the network learns from."""

    def of_batch(key: Key, batch: tuple[Array, Targets]) -> tuple[Array, Targets]:
        x, labels = augmented(key, batch[0], batch[1].labels, config)
        return x, batch[1]._replace(labels=labels)

    return of_batch


def source(config: Config) -> Source:
    """Copies of the training part; each step draws new ones."""
    scans, _ = parts(config)
    return ArrayData((scans.halves, targets_of(scans)), config.batch_size, per_seed=True, augment=augment(config))


def eval_source(config: Config) -> Source:
    """The validation part, as it is."""
    train, valid = parts(config)
    halves = chosen_slices(valid.halves, config.jitter, config.jitter) if config.jitter else valid.halves
    return SplitData((halves, targets_of(valid, train)), 50)


def correct(outputs: Outputs, targets: Targets, hypers: Any) -> Array:
    """1 where presence and side are both right at a threshold of 1/2, [B]."""
    return (scan_decision(outputs.logits) == targets.labels[:, SIDE]).astype(jnp.float32)


def network(config: Config) -> HalfBrainNet:
    """The unbound network of a config."""
    c = config
    return HalfBrainNet(c.backbone, c.widths, c.slice_pool, c.compare, c.head, c.tasks)


def model_of(config: Config) -> Model:
    """The network as pure functions of its variables and of halves, uint8 or in 0..1."""
    example = jnp.zeros((1, 2, config.slices, config.size, config.size // 2), jnp.uint8)
    as_float = lambda x: x.astype(jnp.float32) / 255.0 if x.dtype == jnp.uint8 else x
    return linen(network(config), example, prepare=as_float)


def stroke_ct(config: Config = Config(), /, **changes: Any) -> Learner:
    """The learner of a config or of field values, hyperparameters among them. Raises `UserError`."""
    config = configs.replace(config, **changes) if changes else config
    model = model_of(config)

    def predict(state: State, halves: Array) -> Array:
        """Halves [B, 2, T, S, S / 2], uint8 or in 0..1 -> logits [B, 2] or [B, 4]."""
        return model.apply(variables(state), halves).logits

    learner = supervised(
        model,
        loss,
        {"accuracy": correct},
        Optimiser("adamw", config.schedule),
        num_steps=config.num_updates,
        hypers=config.hypers,
        config=config,
        name="stroke-ct",
        batch_size=config.batch_size,
        source=source,
        eval_source=eval_source,
        objective=("eval/accuracy", "max"),
    )
    return learner._replace(predict=predict)
