"""Dif-fuse: diffusion models for counterfactuals and anomaly detection in brain images (Fontanella et al., TMI 2024).

Only labels of whole images are known. A diffusion model of healthy images, a classifier and an autoencoder are
learned. For an image x:

1. saliency S by latent counterfactuals of the classifier (`latent_counterfactuals`);
2. mask m: where S is above its 90th percentile, dilated (`percentile_mask`);
3. x is noised to level L by DDIM inversion. From there two chains come back: `rec` by DDIM, which reconstructs x, and
   `img` by DDPM; after each step img <- m img + (1 - m) rec, so that healthy tissue is painted inside m which meets
   the surroundings (`dif_fuse`);
4. the anomaly is |img - x|, after erosion, opening and closing (`anomaly_map`), cut at a threshold (`segment`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxstack.core import config as configs
from jaxstack.core.config import require, require_at_least
from jaxstack.core.errors import UserError
from jaxstack.core.learner import Key, Learner
from jaxstack.core.source import Source
from jaxstack.data.sources import ArrayData, SplitData
from jaxstack.medical import brain, io
from jaxstack.medical.latent_counterfactuals import Autoencoder, saliency_pair
from jaxstack.nn import diffusion
from jaxstack.nn.conv import Conv
from jaxstack.nn.diffusion import DenoisingUNet, EpsFn, Range, Schedule
from jaxstack.nn.supervised import Model, Optimiser, State, supervised, variables

Fuse = Literal["steps", "end", "noised"]
LEVELS = 1000
CLASSES = ("healthy", "lesion")


class Fused(NamedTuple):
    """What `dif_fuse` gives."""

    counterfactual: Array
    """The image without its lesion, [B, H, W, C]."""
    reconstruction: Array
    """The image as DDIM reconstructs it, [B, H, W, C]."""


def percentile_mask(
    saliency: Float[Array, "b h w c"], percentile: float = 90.0, independent: bool = False, dilate: int = 5
) -> Bool[Array, "b h w c"]:
    """The most salient pixels of each image, dilated by a square.

    Args:
        saliency: any non-negative scale.
        percentile: values strictly above this one are kept; a share of every image, whether it has a lesion or not.
        independent: a percentile per channel, not over all channels together.
        dilate: side of the square in pixels, odd; 1 leaves the mask. The release blurs with a 5x5 Gaussian and keeps
            what is not zero, which is this dilation.
    """
    axes = (1, 2) if independent else (1, 2, 3)
    kept = saliency > jnp.percentile(saliency, percentile, axis=axes, keepdims=True)
    return lax.reduce_window(kept, False, lax.bitwise_or, (1, dilate, dilate, 1), (1, 1, 1, 1), "SAME")


def dif_fuse(
    eps_fn: EpsFn,
    x: Float[Array, "b h w c"],
    mask: Bool[Array, "b h w c"],
    key: Key,
    schedule: Schedule,
    noise_level: int = 500,
    stride: int = 1,
    clip: Range | None = (0.0, 1.0),
    fuse: Fuse = "steps",
    fuse_from: int = -1,
    reference_indexing: bool = False,
) -> Fused:
    """Paint healthy tissue inside a mask.

    Args:
        eps_fn: (x [B, ...], times [B]) -> the noise in x, of a model of healthy images.
        x: images in the range of `clip`.
        mask: where the image may change. All true: DDPM everywhere; all false: DDIM alone.
        key: of the noise of DDPM.
        schedule: the full one.
        noise_level: L, the level in the full schedule that images are noised to; 1 changes nothing.
        stride: every stride-th level is visited.
        clip: range of clean images; None: not clipped. The release has images in 0..1 and clips to -1..1.
        fuse: `steps`, outside the mask the reconstruction after every step; `end`, only after the last one; `noised`,
            after every step the given image, noised to that level (Lugmayr et al., 2022).
        fuse_from: steps at indices above it fuse (only with `steps`).
        reference_indexing: as released: the clean image is taken for one at the second level, noised to level L + 1,
            and denoised from L - 1, so that even an exact model does not reconstruct x. By default x stands at the
            first level, and the ways up and down have the same levels.

    Returns:
        Images [B, H, W, C]; outside the mask both are bitwise equal, but for `noised`.

    Raises:
        UserError: for a level outside the schedule or a fusion that is not known.
    """
    if not 1 <= noise_level <= len(schedule.ab):
        raise UserError(f"noise_level={noise_level}: expected 1 to {len(schedule.ab)}")
    if fuse not in ("steps", "end", "noised"):
        raise UserError(f"fuse={fuse!r}: expected steps, end or noised")
    s = diffusion.respaced(schedule, stride)
    top = -(-noise_level // stride)
    up = jnp.arange(1, top) if reference_indexing else jnp.arange(top - 1)
    down = jnp.arange(top - 2, -1, -1) if reference_indexing else jnp.arange(top - 1, 0, -1)
    last = 0 if reference_indexing else 1
    start = diffusion.ddim_invert(s, eps_fn, x, up, clip)
    before = jnp.concatenate([jnp.ones(1), s.ab[:-1]])

    def step(images: tuple[Array, Array], given: tuple[Array, Key]) -> tuple[tuple[Array, Array], None]:
        t, key = given
        k_noise, k_known = jax.random.split(key)
        both = jnp.concatenate(images)
        clean, eps = diffusion.clean_and_noise(s, eps_fn, both, t, clip)
        half = len(x)
        noise = jnp.where(t > last, jax.random.normal(k_noise, x.shape, x.dtype), 0.0)
        img = diffusion.ddpm_to(s, clean[:half], images[0], t, noise)
        rec = diffusion.ddim_to(clean[half:], eps[half:], before[t])
        if fuse == "steps":
            img = jnp.where(mask | (t <= fuse_from), img, rec)
        elif fuse == "noised":
            noise = jax.random.normal(k_known, x.shape, x.dtype)
            known = jnp.sqrt(before[t]) * x + jnp.sqrt(1.0 - before[t]) * noise
            img = jnp.where(mask, img, jnp.where(t > last, known, x))
        return (img, rec), None

    (img, rec), _ = lax.scan(step, (start, start), (down, jax.random.split(key, len(down))))
    return Fused(jnp.where(mask, img, rec) if fuse == "end" else img, rec)


def _window(x: Array, size: int, largest: bool) -> Array:
    """Grey dilation or erosion by a square; beyond the border is nothing."""
    start, of = (-jnp.inf, lax.max) if largest else (jnp.inf, lax.min)
    return lax.reduce_window(x, start, of, (1, size, size), (1, 1, 1), "SAME")


def morphology_size(side: int) -> int:
    """The side of the release's 5x5 square at 256 pixels in images of another size: odd, at least 1."""
    return max(2 * round((5.0 * side / 256.0 - 1.0) / 2.0) + 1, 1)


def anomaly_map(
    image: Float[Array, "b h w"], other: Float[Array, "b h w"], size: int = 5, normalise: bool = True
) -> Float[Array, "b h w"]:
    """|image - other| after grey erosion, opening and closing by a square.

    Args:
        image: the counterfactual.
        other: the image itself, or (as released) its reconstruction.
        size: side of the square in pixels, odd; 1 for none.
        normalise: divide each difference by its maximum, as released. Healthy and diseased images then look alike: a
            threshold over several images needs the difference itself.
    """
    found = jnp.abs(image - other)
    if normalise:
        most = found.max((1, 2), keepdims=True)
        found = found / jnp.where(most > 0, most, 1.0)
    if size > 1:
        for largest in (False, False, True, True, False):
            found = _window(found, size, largest)
    return found


def segment(anomaly: Float[Array, "b h w"], threshold: float) -> Bool[Array, "b h w"]:
    """The anomaly's mask: what is above the threshold."""
    return anomaly > threshold


class Healthy(NamedTuple):
    """A Gaussian of healthy images, N(mu, V diag(s2) V^T + tau2 (I - V V^T))."""

    mu: Array
    """[D]."""
    basis: Array
    """V, [D, K] with orthonormal columns."""
    s2: Array
    """Variances along them, [K]."""
    tau2: Array
    """Variance in each other direction."""


def fit_gaussian(images: Float[np.ndarray, "m ..."], components: int) -> Healthy:
    """The principal components of images, and the mean variance of the rest. Raises `UserError` for too many."""
    flat = images.reshape(len(images), -1)
    if not 1 <= components < min(flat.shape):
        raise UserError(f"components={components}: expected 1 to {min(flat.shape) - 1}")
    mu = flat.mean(0)
    _, s, v = np.linalg.svd(flat - mu, full_matrices=False)
    s2 = s**2 / (len(flat) - 1)
    rest = s2[components:].sum() / (flat.shape[1] - components)
    return Healthy(*(jnp.asarray(a, jnp.float32) for a in (mu, v[:components].T, s2[:components], rest)))


def exact_gaussian_denoiser(healthy: Healthy, schedule: Schedule) -> EpsFn:
    """E[eps | x_t] of images that are Gaussian: what a perfect network would tell.

    With y = x - sqrt(a) mu and c = V^T y: sqrt(1 - a) (V (c / (a s2 + 1 - a) - c / (a tau2 + 1 - a)) + y / (a tau2 +
    1 - a)), the score of N(sqrt(a) mu, a Sigma + (1 - a) I).
    """
    mu, basis, s2, tau2 = healthy

    def eps_fn(x: Array, times: Array) -> Array:
        a = schedule.ab[times][:, None]
        y = x.reshape(len(x), -1) - jnp.sqrt(a) * mu
        c, other = y @ basis, a * tau2 + 1.0 - a
        inner = (c / (a * s2 + 1.0 - a) - c / other) @ basis.T
        return (jnp.sqrt(1.0 - a) * (inner + y / other)).reshape(x.shape)

    return eps_fn


class Classifier(nn.Module):
    """Blocks (3x3 convolution, BatchNorm, ReLU, 2x2 maximum), the mean over pixels, two logits."""

    widths: tuple[int, ...] = (16, 32, 64)

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool = False) -> Float[Array, "b 2"]:
        """Images -> logits of healthy and lesion."""
        for width in self.widths:
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(Conv(width, use_bias=False)(x))
            x = nn.max_pool(jax.nn.relu(x), (2, 2), (2, 2))
        return nn.Dense(2)(x.mean((1, 2)))


class Hypers(NamedTuple):
    """Numeric hyperparameters: traced, so a sweep over them compiles once. One rate for all three networks: Adam's
    steps of each do not depend on the others."""

    lr: float = 1e-3
    min_lr: float = 0.0
    weight_decay: float = 1e-4
    b1: float = 0.9
    b2: float = 0.999
    ema_decay: float = 0.995
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class Config(configs.Config):
    """What training can set. The defaults are for phantoms of 32 pixels; the release's U-Net has features=128,
    multiples=(1, 1, 2, 2, 4, 4), num_blocks=2, attention=(32, 16, 8) at 256 pixels."""

    data: str = "phantom"
    """`phantom` (brain slices drawn here), or a folder with the folders healthy/ and lesion/ of grey images."""
    template: str = "mni"
    """Of phantoms: `mni` (needs nilearn) or `ellipses`."""
    size: int = 32
    """Pixels of a side, a multiple of 8."""
    num_train: int = 1500
    """Phantoms of each class."""
    num_valid: int = 100
    """Phantoms of each class; of a folder every tenth image."""
    features: int = 16
    """Channels of the U-Net's first level."""
    multiples: tuple[int, ...] = (1, 2)
    """Channels of each of its levels over those of the first."""
    num_blocks: int = 1
    attention: tuple[int, ...] = ()
    """Sides of images that have attention."""
    stem: int = 32
    """Channels of the autoencoder's first layer; 128 as released."""
    depth: int = 2
    """Blocks of each of its stages."""
    widths: tuple[int, ...] = (16, 32, 64)
    """Of the classifier; three of them."""
    noise_level: int = 500
    """L."""
    stride: int = 20
    """Every stride-th level is visited."""
    percentile: float = 90.0
    """Of the saliency."""
    dilate: int = 5
    """Side of the square that dilates the mask, odd."""
    alpha: float = 100.0
    """Weight of the latents' distance."""
    beta: float = 0.001
    """Step size in the latent space."""
    steps: int = 20
    """Of each counterfactual."""
    batch_size: int = 16
    num_updates: int = 3000
    data_seed: int = 0
    """Of the phantoms, or of the choice of a folder's validation part."""
    hypers: Hypers = Hypers()

    def validate(self) -> None:
        require_at_least(
            self,
            1,
            "num_train",
            "num_valid",
            "features",
            "num_blocks",
            "stem",
            "depth",
            "stride",
            "steps",
            "batch_size",
        )
        require_at_least(self, 1, "num_updates")
        require_at_least(self, 0, "data_seed", "alpha", "beta", "hypers.lr", "hypers.min_lr", "hypers.weight_decay")
        require(self, "size", self.size >= 16 and self.size % 8 == 0, "a multiple of 8, at least 16")
        require(self, "template", self.template in brain.TEMPLATES, " or ".join(brain.TEMPLATES))
        levels = len(self.multiples)
        fits = levels >= 1 and min(self.multiples) >= 1 and self.size % 2 ** (levels - 1) == 0
        require(self, "multiples", fits, f"levels that halve {self.size} pixels, each >= 1")
        require(self, "widths", len(self.widths) == 3 and min(self.widths) >= 1, "three widths >= 1")
        require(self, "noise_level", 1 <= self.noise_level <= LEVELS, f"1 to {LEVELS}")
        require(self, "percentile", 0 <= self.percentile < 100, "0 to 100")
        require(self, "dilate", self.dilate >= 1 and self.dilate % 2 == 1, "an odd number >= 1")
        fewest = self.data != "phantom" or self.batch_size <= 2 * self.num_train
        require(self, "batch_size", fewest, f"at most 2 num_train={2 * self.num_train}")


def read_grey(path: str | Path, size: int) -> np.ndarray:
    """An image file as grey [size, size] float32 in 0..1, divided by its maximum as the release does.

    Raises:
        UserError: as `io.read_scan`, and where all of it is black; the message names the file.
    """
    found = io.resized(io.read_scan(path).image, (size, size))
    if not found.max() > 0:
        raise UserError(f"{path}: all pixels are black")
    return found / found.max()


class Slices(NamedTuple):
    """Images [M, N, N, 1] float32 in 0..1 and labels [M] int32, 1 with a lesion."""

    images: np.ndarray
    labels: np.ndarray


def joined(healthy: np.ndarray, lesions: np.ndarray) -> Slices:
    """Images [A, N, N] without and [B, N, N] with a lesion as one set."""
    labels = np.arange(len(healthy) + len(lesions)) >= len(healthy)
    return Slices(np.concatenate([healthy, lesions])[..., None], labels.astype(np.int32))


def _read_folder(folder: str, size: int) -> Slices:
    parts = []
    for name in CLASSES:
        place = Path(folder) / name
        files = sorted(p for p in place.iterdir() if p.is_file()) if place.is_dir() else []
        if len(files) < 10:
            raise UserError(f"{place}: found {len(files)} files, expected at least 10 images of the class {name}")
        parts.append(np.stack([read_grey(f, size) for f in files]))
    return joined(parts[0], parts[1])


@lru_cache(8)
def phantom_slices(seed: int, count: int, size: int, template: str = "mni") -> tuple[Slices, np.ndarray]:
    """`count` phantoms of each class, and the masks of the lesions [count, N, N]."""
    healthy, _ = brain.brain_set(seed, count, size, source=template)
    lesions, masks = brain.brain_set(seed, count, size, lesion=True, source=template)
    return joined(healthy, lesions), masks


@lru_cache(4)
def _parts(data: str, template: str, size: int, num_train: int, num_valid: int, seed: int) -> tuple[Slices, Slices]:
    if data == "phantom":
        count = num_train + num_valid
        whole, _ = phantom_slices(seed, count, size, template)
        valid = np.arange(2 * count) % count >= num_train
    else:
        whole = _read_folder(data, size)
        valid = np.random.default_rng(seed).permutation(len(whole.labels)) % 10 == 0
    part = lambda rows: Slices(whole.images[rows], whole.labels[rows])
    return part(~valid), part(valid)


def parts(config: Config) -> tuple[Slices, Slices]:
    """Slices for training and for validation. Raises `UserError`."""
    return _parts(config.data, config.template, config.size, config.num_train, config.num_valid, config.data_seed)


def rows(slices: Slices) -> tuple[np.ndarray, np.ndarray]:
    """Training rows ([M, 2, N, N, 1], labels [M]): beside each image a healthy one, all healthy ones equally often."""
    healthy = slices.images[slices.labels == 0]
    return np.stack([np.resize(healthy, slices.images.shape), slices.images], 1), slices.labels


def source(config: Config) -> Source:
    """The training part, in shuffled epochs."""
    return ArrayData(rows(parts(config)[0]), config.batch_size, per_seed=True)


def eval_source(config: Config) -> Source:
    """The validation part."""
    return SplitData(rows(parts(config)[1]), 100)


class Nets(NamedTuple):
    """The three networks of a config."""

    unet: DenoisingUNet
    autoencoder: Autoencoder
    classifier: Classifier


def networks(config: Config) -> Nets:
    """The networks, without their weights."""
    unet = DenoisingUNet(config.features, config.multiples, config.num_blocks, config.attention)
    return Nets(unet, Autoencoder(stem=config.stem, depth=config.depth), Classifier(config.widths))


def _model(config: Config, schedule: Schedule) -> Model:
    """All three networks as one: their losses of each row. Variables are {collection: {network: ...}}."""
    nets: Any = networks(config)
    one = jnp.zeros((1, config.size, config.size, 1))

    def init(key: Key) -> Any:
        k = jax.random.split(key, 3)
        made = {
            "unet": nets.unet.init(k[0], one, jnp.zeros(1, jnp.int32)),
            "autoencoder": nets.autoencoder.init(k[1], one),
            "classifier": nets.classifier.init(k[2], one),
        }
        return {c: {n: v[c] for n, v in made.items() if c in v} for c in ("params", "batch_stats")}

    def losses(given: Any, inputs: Array, t: Array, noise: Array, train: bool) -> tuple[dict[str, Array], Any]:
        healthy, images = inputs[:, 0], inputs[:, 1]
        eps_fn = lambda x, times: nets.unet.apply({"params": given["params"]["unet"]}, x, times)
        out: dict[str, Array] = {"denoising": diffusion.denoising_error(schedule, eps_fn, healthy, t, noise)}
        stats = {}

        def run(name: str, net: nn.Module, x: Array) -> Array:
            own = {c: given[c][name] for c in ("params", "batch_stats")}
            found, changed = net.apply(own, x, train=train, mutable=["batch_stats"] if train else [])
            stats[name] = changed.get("batch_stats", own["batch_stats"])
            return found

        again = run("autoencoder", nets.autoencoder, healthy)
        out["reconstruction"] = jnp.square(again - healthy).mean((1, 2, 3))
        out["logits"] = run("classifier", nets.classifier, images)
        return out, {"batch_stats": stats}

    def train(given: Any, inputs: Array, key: Key) -> tuple[Any, Any]:
        k_t, k_noise = jax.random.split(key)
        t = jax.random.randint(k_t, (len(inputs),), 0, LEVELS)
        return losses(given, inputs, t, jax.random.normal(k_noise, inputs[:, 0].shape), True)

    def apply(given: Any, inputs: Array) -> Any:
        # levels spread evenly and the same noise each time, so that evaluations can be compared
        t = (jnp.arange(len(inputs)) * 389) % LEVELS
        noise = jax.random.normal(jax.random.key(0), inputs[:, 0].shape)
        return losses(given, inputs, t, noise, False)[0]

    return Model(init, train, apply)


def _whole(outputs: Any, labels: Array, hypers: Any) -> Array:
    logp = jax.nn.log_softmax(outputs["logits"])
    entropy = -jnp.take_along_axis(logp, labels[:, None], 1)[:, 0]
    return outputs["denoising"] + outputs["reconstruction"] + entropy


METRICS: dict[str, Callable[..., Array]] = {
    "denoising": lambda outputs, labels, hypers: outputs["denoising"],
    "reconstruction": lambda outputs, labels, hypers: outputs["reconstruction"],
    "accuracy": lambda outputs, labels, hypers: (outputs["logits"].argmax(-1) == labels).astype(jnp.float32),
}


class Explained(NamedTuple):
    """What a trained model tells of images [B, N, N, 1]."""

    counterfactual: Array
    reconstruction: Array
    saliency: Array
    mask: Array
    anomaly: Array
    """[B, N, N]: |counterfactual - image| after morphology, not divided by its maximum."""
    lesion: Array
    """Probability of a lesion, [B]."""


def saliency_of(config: Config, given: Any, images: Array) -> Array:
    """Saliency [B, N, N, 1] by the learned classifier and autoencoder; `given` as `supervised.variables`."""
    nets: Any = networks(config)
    of = lambda name: {c: given[c][name] for c in ("params", "batch_stats")}
    auto = of("autoencoder")
    return saliency_pair(
        lambda x: nets.classifier.apply(of("classifier"), x),
        lambda x: nets.autoencoder.apply(auto, x, method="encode"),
        lambda z: nets.autoencoder.apply(auto, z, method="decode"),
        images,
        config.alpha,
        config.beta,
        config.steps,
    )


def reconstructed(config: Config, given: Any, images: Array) -> Array:
    """Images [B, N, N, 1] as the learned autoencoder of healthy ones gives them back."""
    autoencoder: Any = networks(config).autoencoder
    return autoencoder.apply({c: given[c]["autoencoder"] for c in ("params", "batch_stats")}, images)


def denoiser_of(config: Config, given: Any) -> EpsFn:
    """The learned model of healthy images as `eps_fn`."""
    unet: Any = networks(config).unet
    return lambda x, times: unet.apply({"params": given["params"]["unet"]}, x, times)


def explain(config: Config, given: Any, images: Float[Array, "b n n 1"], key: Key) -> Explained:
    """The healthy version of images in 0..1 and their anomalies, by a trained model's variables."""
    saliency = saliency_of(config, given, images)
    mask = percentile_mask(saliency, config.percentile, dilate=config.dilate)
    fused = dif_fuse(
        denoiser_of(config, given),
        images,
        mask,
        key,
        diffusion.make_schedule(LEVELS),
        config.noise_level,
        config.stride,
    )
    size = morphology_size(config.size)
    anomaly = anomaly_map(fused.counterfactual[..., 0], images[..., 0], size, normalise=False)
    own = {c: given[c]["classifier"] for c in ("params", "batch_stats")}
    classifier: Any = networks(config).classifier
    lesion = jax.nn.softmax(classifier.apply(own, images))[:, 1]
    return Explained(fused.counterfactual, fused.reconstruction, saliency, mask, anomaly, lesion)


def diffusion_counterfactual(config: Config = Config(), /, **changes: Any) -> Learner:
    """The learner of a config or of field values, hyperparameters among them; `predict` is `explain`, with the same
    noise each time. Raises `UserError`."""
    config = configs.replace(config, **changes) if changes else config
    schedule = diffusion.make_schedule(LEVELS)

    def predict(state: State, images: Array) -> Explained:
        return explain(config, variables(state), images, jax.random.key(0))

    learner = supervised(
        _model(config, schedule),
        _whole,
        METRICS,
        Optimiser("adamw", "cosine"),
        num_steps=config.num_updates,
        hypers=config.hypers,
        ema=True,
        config=config,
        name="diffusion-counterfactual",
        batch_size=config.batch_size,
        source=source,
        eval_source=eval_source,
    )
    return learner._replace(predict=predict)
