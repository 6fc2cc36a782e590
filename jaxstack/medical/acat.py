"""ACAT: a classifier of scans steered by counterfactual saliency (Fontanella et al., ICML 2023).

Only labels of whole scans are known: healthy or lesion. In three stages

1. an autoencoder of slices is trained;
2. a plain classifier f is trained, with slices pooled by their mean;
3. latent counterfactuals of f towards both classes give a saliency map of every scan, once
   (`latent_counterfactuals`), and a network whose features are weighted by masks of that map (`nn.vision.acat`) is
   fine-tuned from the weights of f.

The same maps tell where the lesion is (`localise`). Scans are [slices, rows, columns] in 0..1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxstack.core import config as configs
from jaxstack.core.config import require, require_at_least
from jaxstack.core.errors import UserError
from jaxstack.core.learner import Key, Learner, rows_of
from jaxstack.core.source import Source
from jaxstack.core.stages import Stage, Staged
from jaxstack.data.sources import ArrayData, SplitData
from jaxstack.medical.acat_saliency import LOOK, Explainer, both_sides, in_parts
from jaxstack.medical.acat_scans import Drawn, Scans, phantoms, split_folder
from jaxstack.medical.latent_counterfactuals import Autoencoder, pair
from jaxstack.nn.best import Checked, keep_best
from jaxstack.nn.supervised import Model, Optimiser, State, linen, supervised, variables
from jaxstack.nn.vision.acat import FUSIONS, STEMS, AcatNet, Fusion, SlicePool, Stem, started_from


def class_weights(labels: Int[np.ndarray, " m"]) -> Float[np.ndarray, " 2"]:
    """Weights of the two classes in the loss, w_0 = n_1 / n and w_1 = n_0 / n. Raises `UserError` for one class."""
    few, many = int((labels == 0).sum()), int((labels == 1).sum())
    if not few or not many or few + many != len(labels):
        raise UserError(f"labels: found {few} of class 0 and {many} of class 1 of {len(labels)}, expected both alone")
    return np.array([many, few], np.float32) / len(labels)


# Data and options


class Hypers(NamedTuple):
    """Numeric hyperparameters: traced, so a sweep over them compiles once."""

    lr: float = 2e-3
    """Of the plain classifier; 1e-4 in the paper."""
    tune_lr: float = 2e-3
    """Of the last stage; 1e-5 in the paper."""
    autoencoder_lr: float = 4e-3
    min_lr: float = 1e-7
    weight_decay: float = 5e-5
    """Of classifiers, as PyTorch's Adam has it: part of the gradient."""
    b1: float = 0.9
    b2: float = 0.999


@dataclass(frozen=True)
class Config(configs.Config):
    """What training can set. The defaults are for phantoms; the paper has blocks=(3, 4, 6, 3),
    widths=(64, 128, 256, 512), bottleneck, stem=imagenet, stem_width=128, encoder=(6, 12, 16), depth=2."""

    data: str = "phantom"
    """`phantom` (CT scans drawn here), or a folder of CT volumes with scans.csv or the folders healthy/ and lesion/."""
    template: str = "mni"
    """Of phantoms: `mni` (needs nilearn) or `ellipses`."""
    slices: int = 5
    """Of a scan."""
    size: int = 48
    """Pixels of a side, a multiple of 8."""
    num_train: int = 800
    """Phantoms."""
    num_valid: int = 150
    """Phantoms; of a folder a tenth of the patients of each class."""
    present: float = 0.6
    """Share of phantoms with a lesion."""
    contrast: tuple[float, float] = (9.0, 14.0)
    """How much darker lesions of phantoms are, in HU."""
    atrophied: float = 0.0
    """Share of phantoms with wider CSF spaces."""
    window: tuple[float, float] = (10.0, 45.0)
    """Hounsfield units that become 0 and 1, within 0 to 80."""
    fusion: Fusion = "acat"
    """How the saliency is used; see `nn.vision.acat`."""
    slice_pool: SlicePool | None = None
    """Of the last stage: attention or mean; None: as the fusion has it."""
    mask_stages: tuple[int, ...] = (1, 2, 3)
    blocks: tuple[int, int, int, int] = (1, 1, 1, 1)
    widths: tuple[int, int, int, int] = (8, 16, 32, 64)
    bottleneck: bool = False
    stem: Stem = "strided"
    encoder: tuple[int, int, int] = (8, 8, 16)
    """Widths of the autoencoder."""
    stem_width: int = 8
    """Of its first layer; 128 as released."""
    depth: int = 1
    """Blocks of each of its stages."""
    alpha: float = 100.0
    """Weight of the latents' distance."""
    beta: float = 0.3
    """Step size in the latent space."""
    steps: int = 20
    """Of each counterfactual."""
    reference_compat: bool = False
    """As released: one side of the saliency is not normalised, slices are summed."""
    flip: bool = True
    """Flip training scans along both axes, each by chance."""
    batch_size: int = 16
    autoencoder_batch: int = 2
    """Scans; many small steps learn more in the same time than few large ones."""
    autoencoder_updates: int = 6000
    num_updates: int = 1000
    """Of the plain classifier."""
    tune_updates: int = 500
    """Of the last stage."""
    data_seed: int = 0
    """Of the phantoms, or of the choice of a folder's validation part."""
    hypers: Hypers = Hypers()

    def validate(self) -> None:
        require_at_least(self, 1, "slices", "num_train", "num_valid", "stem_width", "depth", "steps", "batch_size")
        require_at_least(self, 1, "autoencoder_batch")
        require_at_least(self, 1, "autoencoder_updates", "num_updates", "tune_updates")
        require_at_least(self, 0, "alpha", "beta", "data_seed")
        require_at_least(self, 0, *(f"hypers.{name}" for name in Hypers._fields))
        require(self, "size", self.size >= 32 and self.size % 8 == 0, "a multiple of 8, at least 32")
        require(self, "present", 0 < self.present < 1, "more than 0 and less than 1")
        low, high = self.contrast
        require(self, "contrast", 0 <= low <= high, "0 <= LOW <= HIGH, in HU")
        low, high = self.window
        require(self, "window", 0 <= low < high <= 80, "0 <= LOW < HIGH <= 80, in HU")
        require(self, "atrophied", 0 <= self.atrophied <= 1, "0 to 1")
        require(self, "fusion", self.fusion in FUSIONS, f"one of {', '.join(FUSIONS)}")
        require(self, "stem", self.stem in STEMS, f"one of {', '.join(STEMS)}")
        require(self, "slice_pool", self.slice_pool in (None, "attention", "mean"), "attention or mean")
        stages = [*self.mask_stages]
        require(self, "mask_stages", bool(stages) and stages == sorted({*stages} & {1, 2, 3}), "some of 1 2 3")
        for field in ("blocks", "widths", "encoder"):
            require(self, field, min(getattr(self, field)) >= 1, "numbers >= 1")
        fewest = self.data != "phantom" or self.batch_size <= self.num_train
        require(self, "batch_size", fewest, f"at most num_train={self.num_train}")
        fewest = self.data != "phantom" or self.autoencoder_batch <= self.num_train
        require(self, "autoencoder_batch", fewest, f"at most num_train={self.num_train}")


def of_config(config: Config, seed: int, count: int) -> Drawn:
    """Phantoms as the config has them."""
    c = config
    return phantoms(seed, count, c.slices, c.size, c.present, c.contrast, c.atrophied, c.window, c.template)


def parts(config: Config) -> tuple[Scans, Scans]:
    """Scans for training and for validation. Raises `UserError`."""
    if config.data != "phantom":
        return split_folder(config.data, config.slices, config.size, config.window, config.data_seed)
    images, labels = of_config(config, config.data_seed, config.num_train + config.num_valid).scans
    cut = lambda rows: Scans(images[rows], labels[rows])
    return cut(slice(config.num_train)), cut(slice(config.num_train, None))


# Learners


def plain_net(config: Config) -> AcatNet:
    """The plain classifier."""
    return network(config, "none", "mean")


def network(config: Config, fusion: Fusion, slice_pool: SlicePool | None = None) -> AcatNet:
    """The network of a fusion, without its weights."""
    return AcatNet(
        fusion,
        slice_pool,
        config.mask_stages,
        config.blocks,
        config.widths,
        config.bottleneck,
        config.stem,
        summed=config.reference_compat,
    )


def explainer(config: Config) -> Explainer:
    """The networks that make saliency maps."""
    return Explainer(plain_net(config), Autoencoder(1, config.stem_width, config.encoder, config.depth), config.steps)


def weighted_cross_entropy(logits: Array, targets: Mapping[str, Array], hypers: Any) -> Array:
    """Cross entropy [B] times the weight of each label, over the batch's mean weight, as PyTorch averages it."""
    logp = jax.nn.log_softmax(logits)
    entropy = -jnp.take_along_axis(logp, targets["label"][:, None], 1)[:, 0]
    return entropy * targets["weight"] / targets["weight"].mean()


def accuracy(logits: Array, targets: Mapping[str, Array], hypers: Any) -> Array:
    """1 where the larger logit is the label's."""
    return (logits.argmax(-1) == targets["label"]).astype(jnp.float32)


def flipped(key: Key, batch: tuple[Any, Any]) -> tuple[Any, Any]:
    """Each scan, and what belongs to it, flipped along rows and along columns with probability 1/2 each."""
    inputs, targets = batch
    many = len(jax.tree.leaves(inputs)[0])
    flags = jax.random.bernoulli(key, 0.5, (2, many))

    def one(x: Array) -> Array:
        for axis, flag in zip((-2, -1), flags):
            x = jnp.where(flag.reshape(-1, *[1] * (x.ndim - 1)), jnp.flip(x, axis), x)
        return x

    return jax.tree.map(one, inputs), targets


def _targets(labels: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    return {"label": labels, "weight": weights[labels]}


def checked_source(config: Config, train: Scans, valid: Scans, maps: Any = None) -> Checked:
    """Training batches with held-out scans beside them; `maps` are saliency maps [M, R, S, N, N] of both."""
    weights = class_weights(train.labels)
    inputs = lambda i, s: s.images if maps is None else {"images": s.images, "maps": maps[i]}
    rows = [(inputs(i, s), _targets(s.labels, weights)) for i, s in enumerate((train, valid))]
    return Checked(rows[0], rows[1], config.batch_size, augment=flipped if config.flip else None)


def split_source(train: Scans, valid: Scans, maps: Any = None) -> SplitData:
    """Validation scans; arguments as of `checked_source`."""
    inputs = valid.images if maps is None else {"images": valid.images, "maps": maps[1]}
    return SplitData((inputs, _targets(valid.labels, class_weights(train.labels))), LOOK)


def autoencoder_learner(config: Config) -> Learner:
    """Stage 1: the mean squared error of slices."""
    net = linen(
        explainer(config).autoencoder,
        jnp.zeros((1, 1, config.size, config.size)),
        prepare=lambda x: x.reshape(-1, *x.shape[2:], 1),
    )
    error = lambda out, x: jnp.square(out.reshape(x.shape) - x).mean((1, 2, 3))

    def fit(given: Any, x: Array, key: Key) -> tuple[Array, Any]:
        out, stats = net.train(given, x, key)
        return error(out, x), stats

    model = Model(net.init, fit, lambda given, x: error(net.apply(given, x), x))
    return supervised(
        model,
        lambda errors, targets, hypers: errors,
        optimiser=Optimiser("adam", "cosine", decay=None),
        num_steps=config.autoencoder_updates,
        hypers=config.hypers._replace(lr=config.hypers.autoencoder_lr, weight_decay=0.0),
        config=config,
        name="autoencoder",
        batch_size=config.autoencoder_batch,
        source=lambda config: images_source(config, parts(config)[0]),
        eval_source=lambda config: split_source(*parts(config)),
    )


def images_source(config: Config, train: Scans) -> Source:
    """Training scans alone, for the autoencoder."""
    return ArrayData((train.images, train.labels), config.autoencoder_batch, augment=flipped if config.flip else None)


def _classifier(config: Config, model: Model, steps: int, hypers: Hypers, name: str) -> Learner:
    """A learner of scans, without its sources; the best weights on the held-out scans are kept by its caller."""
    return supervised(
        model,
        weighted_cross_entropy,
        {"accuracy": accuracy},
        Optimiser("adam", "cosine", decay=None),
        num_steps=steps,
        hypers=hypers,
        config=config,
        name=name,
        batch_size=config.batch_size,
        # named here, so that the learner can evaluate; the stages give their own
        eval_source=lambda config: split_source(*parts(config)),
        objective=("eval/accuracy", "max"),
    )


def _best(learner: Learner, model: Model) -> Learner:
    def score(given: Any, held_out: tuple[Any, Any]) -> Array:
        inputs, targets = held_out
        one = lambda x: model.apply(given, jax.tree.map(lambda v: v[None], x))[0]
        return accuracy(jax.lax.map(one, inputs, batch_size=LOOK), targets, None).mean()

    return keep_best(learner, score)


def plain_learner(config: Config) -> Learner:
    """Stage 2: the plain classifier; the best weights on the validation scans stay."""
    model = linen(plain_net(config), jnp.zeros((1, config.slices, config.size, config.size)), prepare=_channel)
    learner = _best(_classifier(config, model, config.num_updates, config.hypers, "plain"), model)
    return learner._replace(source=lambda config: checked_source(config, *parts(config)))


def _channel(x: Array) -> Array:
    return x[..., None]


class Explained(NamedTuple):
    """What a trained model tells of scans [B, S, N, N]."""

    lesion: Array
    """Probability of a lesion, [B]."""
    saliency: Array
    """In 0..1 of each scan."""
    start: Array
    """As the autoencoder gives the scan back."""
    healthy: Array
    """Moved towards healthy."""
    ill: Array
    """Moved towards lesion."""


def tuning_learner(config: Config) -> Learner:
    """Stage 3: the network with masks, from the weights of the plain classifier.

    Its `init` is given {"plain": variables, "autoencoder": variables, "row": int32}, and its inputs are {"images"
    [B, S, N, N], "maps" [B, R, S, N, N]}, of which it reads the maps of its row.
    """
    net = network(config, config.fusion, config.slice_pool)
    inner = linen(net, jnp.zeros((1, config.slices, config.size, config.size, 2)))
    own = lambda given: {k: given[k] for k in ("params", "batch_stats")}

    def join(given: Any, inputs: Any) -> Array:
        maps = jnp.take(inputs["maps"], given["row"], axis=1, mode="clip")
        return jnp.stack([inputs["images"], maps], -1)

    model = Model(
        inner.init,
        lambda given, inputs, key: inner.train(own(given), join(given, inputs), key),
        lambda given, inputs: inner.apply(own(given), join(given, inputs)),
    )
    hypers = config.hypers._replace(lr=config.hypers.tune_lr)
    fresh = _classifier(config, model, config.tune_updates, hypers, "acat")

    def init(key: Key, hypers: Any, given: Any) -> State:
        s = fresh.init(key, hypers)
        # copies: buffers of a state are donated one by one
        given = jax.tree.map(jnp.copy, given)
        start = jax.tree.map(jnp.copy, started_from({"params": s.params, **s.stats}, given["plain"]))
        kept = {"plain": given["plain"], "autoencoder": given["autoencoder"], "row": given["row"]}
        return s._replace(params=start["params"], stats={"batch_stats": start["batch_stats"], **kept})

    def predict(state: State, images: Array) -> Explained:
        given = variables(state)
        found = both_sides(explainer(config), given["plain"], given["autoencoder"], images, config.alpha, config.beta)
        saliency = pair(found, config.reference_compat)
        logits = inner.apply(own(given), jnp.stack([images, saliency], -1))
        return Explained(jax.nn.softmax(logits)[:, 1], saliency, *found)

    return _best(fresh._replace(init=init), model)._replace(predict=predict)


def saliency_maps(config: Config, plain: Any, autoencoder: Any, images: np.ndarray) -> np.ndarray:
    """ACAT's saliency of scans [M, S, N, N], computed once: `latent_counterfactuals.pair`, on the host.

    Args:
        config: networks, alpha, beta, steps.
        plain: variables of the plain classifier.
        autoencoder: variables of the autoencoder.
        images: scans.
    """
    look = lambda x: pair(
        both_sides(explainer(config), plain, autoencoder, x, config.alpha, config.beta), config.reference_compat
    )
    return in_parts(look, images)


def acat(config: Config = Config(), /, **changes: Any) -> Staged:
    """The method of a config or of field values, hyperparameters among them; `predict` of its last learner gives
    `Explained`. Raises `UserError`."""
    config = configs.replace(config, **changes) if changes else config

    def tune(states: Mapping[str, Any]) -> Learner:
        plain, auto = variables(states["plain"]), variables(states["autoencoder"])
        count = len(states["plain"].step)

        @cache
        def maps() -> tuple[np.ndarray, np.ndarray]:
            rows = [rows_of((plain, auto), i) for i in range(count)]
            of = lambda images: np.stack([saliency_maps(config, row[0], row[1], images) for row in rows], 1)
            train, valid = parts(config)
            return of(train.images), of(valid.images)

        return tuning_learner(config)._replace(
            given={"plain": plain, "autoencoder": auto, "row": jnp.arange(count)},
            source=lambda config: checked_source(config, *parts(config), maps()),
            eval_source=lambda config: split_source(*parts(config), maps()),
        )

    stages = (
        Stage("autoencoder", lambda states: autoencoder_learner(config), steps=config.autoencoder_updates),
        Stage("plain", lambda states: plain_learner(config), steps=config.num_updates),
        Stage("acat", tune, steps=config.tune_updates),
    )
    return Staged("acat", stages, config)
