"""PEPPR: global maps of aligned images are faithful, where it is known what they must show.

Blobs at known places, the classifier of ultra-widefield phantoms, and a network that has learned nothing.
"""

from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import ndimage

from jaxstack.claims import uwf_diseases
from jaxstack.claims.harness import Check, Claim, Curve, Experiment, Row, Scale
from jaxstack.core.learner import Learner
from jaxstack.core.runner import train
from jaxstack.data.sources import HostData
from jaxstack.medical import global_maps, peppr, uwf
from jaxstack.medical.explain import Explain, Kind, Parts, explained, explainer, grad_cam
from jaxstack.medical.phantoms_uwf import DISEASES, uwf_set
from jaxstack.medical.segmentation import auc
from jaxstack.nn.conv import Conv
from jaxstack.nn.supervised import Hypers, Optimiser, linen, supervised
from jaxstack.nn.vision.layers import BatchNorm

SIDE, LABELS = 48, 3
PLACES, DISTRACTOR = ((12, 12), (14, 36), (36, 22)), (36, 40)
"""Of the blobs, (row, column)."""
SIGMA, SUPPORT = 2.5, 5.0
"""Of a blob, and the radius in which it is a fifth of its height or more; pixels."""
SEED = 80_000
OURS, RANDOM, INVERSE, CENTRE, IMAGE = "global map", "random", "inverse", "distance to the centre", "image by image"
GRADIENT = "gradient x input"
KINDS: dict[str, Kind] = {OURS: "grad-cam", GRADIENT: "gradient-input"}
GRID = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
FEW = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)
"""Fractions for the blobs and for the retina."""


class Budget(NamedTuple):
    """Of a scale."""

    train: int
    valid: int
    test: int
    updates: int
    rankings: int
    """Random ones, whose mean is the control."""
    retina: uwf_diseases.Budget


SMALL = Budget(3000, 200, 150, 470, 3, uwf_diseases.SMALL._replace(updates=1200))
FULL = Budget(3000, 600, 1000, 1880, 5, uwf_diseases.FULL)


def blobs(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Smooth noise with a blob at the place of each label that an image has, and in every other image a distractor.

    Returns:
        Images [M, 48, 48, 1] float32 and labels [M, 3] bool. A blob is moved by up to 2 pixels in a fifth of the cases.
    """
    rng = np.random.default_rng((SEED, seed))
    labels = rng.uniform(size=(count, LABELS)) < 0.4
    there = np.concatenate([labels, rng.uniform(size=(count, 1)) < 0.5], 1)
    y, x = np.mgrid[:SIDE, :SIDE]
    noise = ndimage.gaussian_filter(rng.normal(size=(count, SIDE, SIDE)), (0, 3, 3))
    images = 0.25 * noise / noise.std() + 0.1 * rng.normal(size=noise.shape)
    moved = rng.integers(-2, 3, (count, LABELS + 1, 2)) * (rng.uniform(size=(count, LABELS + 1, 1)) < 0.2)
    height = rng.uniform(0.5, 1.0, (count, LABELS + 1)) * there
    for k, place in enumerate((*PLACES, DISTRACTOR)):
        at = (np.array(place) + moved[:, k])[:, :, None, None]
        images += height[:, k, None, None] * np.exp(-0.5 * ((y - at[:, 0]) ** 2 + (x - at[:, 1]) ** 2) / SIGMA**2)
    return images[..., None].astype(np.float32), labels


class Network(nn.Module):
    """Four 3x3 convolutions with BatchNorm, a mean over pixels and a linear layer: 17 thousand parameters."""

    def setup(self) -> None:
        widths, strides = (16, 16, 32, 32), (2, 1, 2, 1)
        self.convolutions = [Conv(w, stride=s, padding=1, use_bias=False) for w, s in zip(widths, strides)]
        self.norms = [BatchNorm() for _ in widths]
        self.last = nn.Dense(LABELS)

    def features(self, x: Any, train: bool = False) -> Any:
        """Images -> maps [B, 12, 12, 32]."""
        for conv, norm in zip(self.convolutions, self.norms):
            x = jax.nn.relu(norm(conv(x), train))
        return x

    def head(self, maps: Any) -> Any:
        """Maps -> logits."""
        return self.last(maps.mean((1, 2)))

    def __call__(self, x: Any, train: bool = False) -> Any:
        """Images -> logits."""
        return self.head(self.features(x, train))


NETWORK = Network()
PARTS = Parts(
    lambda given, x: NETWORK.apply(given, x, method="features"),  # pyright: ignore[reportArgumentType]
    lambda given, a: NETWORK.apply(given, a, method="head"),  # pyright: ignore[reportArgumentType]
)
EXPLAIN: dict[str, Explain] = {name: explainer(kind, PARTS) for name, kind in KINDS.items()}


def _loss(logits: Any, labels: Any, hypers: Any) -> Any:
    return optax.sigmoid_binary_cross_entropy(logits, labels.astype(jnp.float32)).mean(-1)


@lru_cache(2)
def learner_of(budget: Budget) -> Learner:
    """Of the blobs' network."""
    return supervised(
        linen(NETWORK, np.zeros((1, SIDE, SIDE, 1), np.float32)),
        _loss,
        optimiser=Optimiser("adamw"),
        num_steps=budget.updates,
        hypers=Hypers(lr=5e-3, weight_decay=1e-4),
        batch_size=32,
    )


class Looked(NamedTuple):
    """A trained network and what it is looked at with."""

    variables: Any
    valid: tuple[np.ndarray, np.ndarray]
    """Maps come from these images,"""
    test: tuple[np.ndarray, np.ndarray]
    """and curves from these."""
    training: np.ndarray


@lru_cache(16)
def seen(seed: int, learned: bool, budget: Budget) -> Looked:
    """The blobs of a seed and a network, which has learned or not."""
    images, labels = blobs(seed, budget.train + budget.valid + budget.test)
    cuts = (budget.train, budget.train + budget.valid)
    (x, *more), (y, *labels_of) = np.split(images, cuts), np.split(labels, cuts)
    per_epoch = budget.train // 32

    def batch(step: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        order = np.random.default_rng((seed, step // per_epoch)).permutation(budget.train)
        rows = order[step % per_epoch * 32 :][:32]
        return x[rows], y[rows]

    learner = learner_of(budget)
    if learned:
        data = HostData(batch, per_seed=True)
        state = train(learner, seeds=[seed], data=data, eval_every=-1, progress=False, guard=False).state
        given = jax.tree.map(lambda v: v[0], {"params": state.params, **state.stats})
    else:
        state = learner.init(jax.random.key(seed), learner.hypers)
        given = {"params": state.params, **state.stats}
    return Looked(given, (more[0], labels_of[0]), (more[1], labels_of[1]), x)


def maps(name: str, looked: Looked) -> global_maps.GlobalExplanation:
    """Global maps of the validation images by an explanation."""
    x, y = looked.valid
    batches = [(x[i : i + 50], y[i : i + 50]) for i in range(0, len(x), 50)]
    return global_maps.aggregate(EXPLAIN[name], looked.variables, batches)


def rankings(arm: str, seed: int, overall: Any, budget: Budget) -> list[Any]:
    """The rankings of pixels of an arm: one, or several random ones."""
    key, size = jax.random.fold_in(jax.random.key(SEED), seed), np.shape(overall)
    if arm == RANDOM:
        return peppr.random_ranks((size[0], size[1]), budget.rankings, key)
    if arm == CENTRE:
        overall = global_maps.centre_importance((size[0], size[1]))
    ranks = global_maps.pixel_ranks(jnp.asarray(overall), key)
    return [global_maps.inverse(ranks) if arm == INVERSE else ranks]


def image_ranks(looked: Looked) -> Any:
    """A ranking for each test image by its own maps, summed over the labels that it has."""
    x, y = looked.test
    own = explained(EXPLAIN[OURS], looked.variables, jnp.asarray(x), jnp.arange(LABELS))
    wanted = jnp.asarray(y | ~y.any(1, keepdims=True))[..., None, None]
    keys = jax.random.split(jax.random.key(SEED), len(x))
    return jax.vmap(global_maps.pixel_ranks)((own * wanted).sum(1), keys)


def faithful(arm: str, seeds: tuple[int, ...], budget: Budget = SMALL, learned: bool = True) -> Iterator[Row]:
    """Curves of the blobs' network by a ranking, and how its map meets what was drawn."""
    y, x = np.mgrid[:SIDE, :SIDE]
    inside = [np.hypot(y - r, x - c) <= SUPPORT for r, c in (*PLACES, DISTRACTOR)]
    for seed in seeds:
        looked = seen(seed, learned, budget)
        found = maps(arm if arm in KINDS else OURS, looked)
        images, labels = looked.test
        ranks = [image_ranks(looked)] if arm == IMAGE else rankings(arm, seed, found.overall, budget)
        row: dict[str, Any] = {"seed": seed}
        for fill in ("mean", "mean-image") if arm in (OURS, RANDOM) else ("mean",):
            instead = peppr.fill_of(fill, jnp.asarray(images), jnp.asarray(looked.training), jax.random.key(seed))
            of = partial(peppr.peppr_curves, PARTS.predict, looked.variables, jnp.asarray(images), labels, fill=instead)
            curves = peppr.mean_curves([of(r, peppr.macro_auc, GRID) for r in ranks])
            summary, name = peppr.peppr_summary(curves, curves), "" if fill == "mean" else ", mean image"
            row[f"PEPPR{name}"] = summary.peppr
            if fill == "mean":
                row |= {f"erased@{q}": v for q, v in zip(curves.qs, curves.erase)}
                row |= {f"restored@{q}": v for q, v in zip(curves.qs, curves.restore)}
                row["AUC"] = float(curves.restore[-1])
                row["restored by 5%"] = float(curves.restore[1] / curves.restore[-1])
        if arm in KINDS and learned:
            row["AUC of the blob"] = min(auc(found.label_maps[k], inside[k]) for k in range(LABELS))
            shares = [found.label_maps[k][inside[-1]].mean() / found.label_maps[k][inside[k]].mean() for k in range(3)]
            row["distractor over blob"] = float(max(shares))
            row["zero maps"] = int(found.skipped.sum())
        yield row


@lru_cache(2)
def _retina(budget: uwf_diseases.Budget) -> tuple[Explain, Any]:
    """Grad-CAM and logits of the classifier, of images in 0..1."""
    network: Any = uwf.network_of(uwf_diseases.learner_of(budget).config)
    parts = uwf.parts_of(network)
    scaled = lambda given, x: (x - given["pixels"]["mean"]) / given["pixels"]["std"]
    explain = grad_cam(parts, "bilinear")
    return lambda given, x, label: explain(given, scaled(given, x), label), lambda given, x: parts.predict(
        given, scaled(given, x)
    )


@lru_cache(8)
def retinal_maps(seed: int, budget: Budget) -> tuple[Any, global_maps.GlobalExplanation]:
    """The classifier of a seed and its maps of the validation images."""
    given = uwf_diseases.trained(seed, uwf_diseases.OURS, budget.retina).ema
    _, valid, _ = uwf_diseases.drawn(seed, budget.retina)
    x = valid.images.astype(np.float32) / 255.0
    batches = [(x[i : i + 50], valid.labels[i : i + 50]) for i in range(0, len(x), 50)]
    return given, global_maps.aggregate(_retina(budget.retina)[0], given, batches)


def peaks(found: global_maps.GlobalExplanation, lesions: np.ndarray) -> dict[str, float]:
    """Distance in pixels from the peak of each disease's map to where its lesions [M, 7, H, W] lie most often: pixels
    with at least half of the largest share."""
    shares, row = lesions.mean(0), {}
    for k, name in enumerate(DISEASES):
        peak = np.unravel_index(found.label_maps[k].argmax(), found.label_maps[k].shape)
        places = np.argwhere(shares[k] >= 0.5 * shares[k].max())
        row[f"distance {name}"] = float(np.hypot(*(places - np.array(peak)).T).min())
    return row | {"peaks within 8 px": float(sum(d <= 8.0 for d in row.values()))}


def retina(arm: str, seeds: tuple[int, ...], budget: Budget = SMALL) -> Iterator[Row]:
    """The same with the classifier of ultra-widefield phantoms."""
    _, predict = _retina(budget.retina)
    for seed in seeds:
        given, found = retinal_maps(seed, budget)
        _, _, test = uwf_diseases.drawn(seed, budget.retina)
        images = test.images[: budget.test].astype(np.float32) / 255.0
        mean = jnp.asarray(uwf.moments(uwf_diseases.learner_of(budget.retina).config)[0])
        row: dict[str, Any] = {"seed": seed}
        if arm == OURS:
            row |= peaks(found, uwf_set(uwf_diseases.SEED + seed, budget.test, uwf_diseases.SIZE).lesions)
        of = partial(peppr.peppr_curves, predict, given, jnp.asarray(images), test.labels[: budget.test])
        ranks = rankings(arm, seed, found.overall, budget)
        curves = peppr.mean_curves([of(r, peppr.macro_auc, FEW, mean) for r in ranks])
        row |= {f"erased@{q}": v for q, v in zip(curves.qs, curves.erase)}
        row |= {f"restored@{q}": v for q, v in zip(curves.qs, curves.restore)}
        row["lost by 10%"] = float(curves.erase[0] - curves.erase[FEW.index(0.1)])
        yield row | {"PEPPR": peppr.peppr_summary(curves, curves).peppr}


A, B, C = "blobs", "retina", "random weights"
CHECKS = (
    Check(A, OURS, "AUC of the blob", "at_least", 0.95),
    Check(A, OURS, "distractor over blob", "at_most", 0.25),
    Check(A, OURS, "PEPPR", "above", 0.20, other=RANDOM, paired=True),
    Check(A, INVERSE, "PEPPR", "below", 0.10, other=RANDOM, paired=True),
    Check(A, OURS, "restored by 5%", "at_least", 0.90),
    Check(A, OURS, "PEPPR", "above", 0.0, other=CENTRE, paired=True),
    Check(B, OURS, "peaks within 8 px", "at_least", 5.0),
    Check(B, OURS, "lost by 10%", "times_at_least", 2.0, other=RANDOM, paired=True),
    Check(C, OURS, "PEPPR", "within", 0.05, other=RANDOM, paired=True),
    Check(A, OURS, "PEPPR, mean image", "above", 0.20, other=RANDOM, paired=True, report=True),
    Check(A, IMAGE, "PEPPR", "above", 0.0, other=OURS, paired=True, report=True),
    Check(A, GRADIENT, "PEPPR", "above", 0.20, other=RANDOM, paired=True, report=True),
    Check(A, GRADIENT, "AUC of the blob", "at_least", 0.95, report=True),
    Check(B, OURS, "PEPPR", "above", 0.0, other=RANDOM, paired=True, report=True),
    Check(B, OURS, "PEPPR", "above", 0.0, other=CENTRE, paired=True, report=True),
)


def of_scale(budget: Budget, minutes: float) -> Scale:
    """The same experiments with other numbers of images and updates."""
    return Scale(
        experiments=(
            Experiment(A, (OURS, RANDOM, INVERSE, CENTRE, IMAGE, GRADIENT), partial(faithful, budget=budget)),
            Experiment(B, (OURS, RANDOM, CENTRE), partial(retina, budget=budget)),
            Experiment(C, (OURS, RANDOM), partial(faithful, budget=budget, learned=False)),
        ),
        checks=CHECKS,
        seeds=5,
        minutes=minutes,
    )


claim = Claim(
    method="peppr",
    paper="Engelmann, Storkey & Bernabeu (arXiv 2112.09591, 2021)",
    statement=(
        "Grad-CAM maps put together over aligned images show where the evidence of a label lies (AUC of at least .95 "
        "as detectors of blobs at known places, a blob that tells nothing below a quarter of them; at least 5 of 7 "
        "diseases of the retina within 8 pixels). PEPPR tells that they are faithful: .20 above random rankings, the "
        "inverse ranking .10 below, 90% of the performance restored by 5% of the pixels; for the retina the first "
        "tenth costs twice what a random one does. With random weights it stays within .05 of random."
    ),
    scope=(
        "Drawn images: blobs of 48 pixels with three labels, a network of four convolutions; the retina is the "
        "classifier of `uwf-diseases` on phantoms of 64 x 80 pixels, trained half as long. Maps come from validation "
        "images, curves from test images, the mean of random rankings is the control, erased pixels become the "
        "training mean (and, for blobs, the mean image). Only the abstract of the paper is public: grid, fill, metric "
        "and controls are ours."
    ),
    scales={"small": of_scale(SMALL, 10), "full": of_scale(FULL, 0)},
    baselines=(RANDOM, CENTRE),
    ours=OURS,
    curves=(Curve(A, "erased", "share of pixels", "linear"), Curve(A, "restored", "share of pixels", "linear")),
)
