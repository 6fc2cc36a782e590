"""QuickQual: frozen ImageNet features and a support vector machine tell the quality of fundus photographs.

Photographs are phantoms whose label is how well their vessels can be seen, measured with the truth at hand; each seed
has its own. The features are those of EfficientNet-Lite0 with its real ImageNet weights, which come in a package.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxstack.claims.harness import Check, Claim, Experiment, Row, Scale
from jaxstack.core.errors import UserError
from jaxstack.core.runner import train
from jaxstack.data.sources import HostData
from jaxstack.medical import phantoms, quickqual
from jaxstack.medical.fundus import Blocks, degraded, turned
from jaxstack.medical.segmentation import auc
from jaxstack.nn.supervised import Hypers, Optimiser, cross_entropy, linen, supervised
from jaxstack.report import stats

SIZE, TRAIN, TEST = 128, 260, 260
NINE = 9
PRIORS = (0.0, 0.25, 0.5, 0.75, 1.0)
SEVERITIES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
DRAWS = 8


class Set(NamedTuple):
    """Photographs and how bad they are."""

    images: np.ndarray
    """[M, N, N, 3] uint8."""
    visibility: np.ndarray
    """[M] contrast over noise of the vessels."""


class Data(NamedTuple):
    """A seed's photographs; labels 0 (Good), 1 (Usable), 2 (Bad) by tertiles of visibility in the training part."""

    train: Set
    test: Set
    labels: np.ndarray
    test_labels: np.ndarray


@jax.jit
def _photographed(key: jax.Array, images: jax.Array) -> jax.Array:
    """Brightness and gamma vary, then each is degraded with a severity of its own: [M, N, N, 3] in 0..1."""
    k_gamma, k_gain, k_worse = jax.random.split(key, 3)
    shape = (len(images), 1, 1, 1)
    gamma = jax.random.uniform(k_gamma, shape, minval=0.6, maxval=1.6)
    gain = jax.random.uniform(k_gain, shape, minval=0.6, maxval=1.1)
    return degraded(k_worse, jnp.clip(gain * images**gamma, 0.0, 1.0), 0.0, 1.0)


@lru_cache(8)
def data(seed: int) -> Data:
    """The photographs of a seed."""
    count = TRAIN + TEST
    clean, vessels = phantoms.fundus_set(30_000 + seed, count, SIZE)
    found = []
    for i, start in enumerate(range(0, count, 52)):
        x = clean[start : start + 52].astype(np.float32) / 255.0
        found.append(np.asarray(_photographed(jax.random.fold_in(jax.random.key(seed), i), x)))
    images = np.round(np.concatenate(found) * 255.0).astype(np.uint8)
    seen = quickqual.vessel_visibility(images, vessels)
    labels = quickqual.quality_labels(seen, seen[:TRAIN])
    return Data(Set(images[:TRAIN], seen[:TRAIN]), Set(images[TRAIN:], seen[TRAIN:]), labels[:TRAIN], labels[TRAIN:])


@lru_cache(16)
def features(seed: int, random: bool) -> tuple[np.ndarray, np.ndarray]:
    """Features of a seed's training and test photographs."""
    net = quickqual.backbone(random=seed if random else None)
    d = data(seed)
    return quickqual.features_of(net, d.train.images), quickqual.features_of(net, d.test.images)


def scores(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """All metrics, and the AUC of telling the worst third."""
    return quickqual.metrics(probabilities, labels) | {"AUC of the worst third": auc(probabilities[:, 2], labels == 2)}


class Scratch(nn.Module):
    """Four blocks of convolutions and a linear layer, from random weights."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        return nn.Dense(3)(Blocks()(x, train))


@lru_cache(1)
def scratch(seeds: tuple[int, ...]) -> list[np.ndarray]:
    """Test probabilities of a network trained from random weights on each seed's photographs: 25 epochs."""
    size, epochs = 26, 25
    per_epoch = TRAIN // size

    def batch(step: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        order = np.random.default_rng((seed, step // per_epoch)).permutation(TRAIN)
        rows = order[step % per_epoch * size :][:size]
        return data(seed).train.images[rows], data(seed).labels[rows].astype(np.int32)

    def augment(key: jax.Array, given: Any) -> Any:
        return turned(key, given[0].astype(jnp.float32) / 255.0), given[1]

    model = linen(Scratch(), jnp.zeros((1, SIZE, SIZE, 3)))
    learner = supervised(
        model,
        cross_entropy,
        optimiser=Optimiser("adamw"),
        num_steps=epochs * per_epoch,
        hypers=Hypers(lr=2e-3, weight_decay=1e-4),
        batch_size=size,
    )
    source = HostData(batch, per_seed=True, augment=augment)
    states = train(learner, seeds=seeds, data=source, eval_every=-1, progress=False).state
    raw = cast(Callable[..., Any], learner.predict)
    predict, found = jax.jit(lambda s, x: jax.nn.softmax(raw(s, x))), []
    for i, seed in enumerate(seeds):
        state = jax.tree.map(lambda x, i=i: x[i], states)
        found.append(np.asarray(predict(state, data(seed).test.images.astype(np.float32) / 255.0)))
    return found


def quality(arm: str, seeds: tuple[int, ...]) -> Iterator[Row]:
    """Three classes of quality on 260 photographs, learned from 260."""
    for i, seed in enumerate(seeds):
        d = data(seed)
        if arm == "trained from scratch":
            yield {"seed": seed} | scores(scratch(seeds)[i], d.test_labels)
            continue
        if arm == "hand-crafted":
            x, test = quickqual.hand_crafted(d.train.images), quickqual.hand_crafted(d.test.images)
        else:
            x, test = features(seed, arm == "random weights")
        if arm == "nine features":
            chosen = quickqual.select_features(x, d.labels, NINE)
            score = quickqual.fixed_prior_logistic(x[:, chosen], d.labels)(test[:, chosen])
            yield {"seed": seed, "AUC of the worst third": auc(np.asarray(score), d.test_labels == 2)}
            continue
        scorer = quickqual.fit_quality(x, d.labels)
        yield {"seed": seed} | scores(np.asarray(scorer.probabilities(jnp.asarray(test))), d.test_labels)


def prior(arm: str, seeds: tuple[int, ...]) -> Iterator[Row]:
    """The linear model on all features, by the prior that a usable photograph is bad."""
    value = float(arm.split()[-1])
    for seed in seeds:
        d, (x, test) = data(seed), features(seed, False)
        score = np.asarray(quickqual.fixed_prior_logistic(x, d.labels, value, 0.1)(test))
        yield {
            "seed": seed,
            "AUC of Bad": auc(score, d.test_labels == 2),
            "AUC of Usable and Bad": auc(score, d.test_labels >= 1),
            "rank correlation": stats.spearman(score, d.test_labels).value,
        }


def photograph(arm: str, seeds: tuple[int, ...]) -> Iterator[Row]:
    """scikit-image's photograph of a retina, made worse step by step: the score, 0 to 1, should only grow."""
    try:
        from skimage import data as pictures
    except ImportError as e:
        raise UserError("claim of quickqual: scikit-image is missing; pip install 'jaxstack[medical]'") from e
    eye = quickqual.preprocess_fundus(pictures.retina(), SIZE).astype(np.float32) / 255.0
    net = quickqual.backbone()
    for seed in seeds:
        x, labels = features(seed, False)[0], data(seed).labels
        if arm == "nine features":
            chosen = quickqual.select_features(x, labels, NINE)
            linear = quickqual.fixed_prior_logistic(x[:, chosen], labels)
            grade = lambda found, linear=linear, chosen=chosen: linear(found[:, chosen])
        else:
            scorer = quickqual.fit_quality(x, labels)
            grade = lambda found, scorer=scorer: scorer.probabilities(found) @ np.arange(3) / 2
        row, means = {"seed": seed}, []
        for n, severity in enumerate(SEVERITIES):
            key = jax.random.fold_in(jax.random.key(seed), n)
            worse = degraded(key, jnp.broadcast_to(eye, (DRAWS, *eye.shape)), severity, severity)
            images = np.round(np.asarray(worse) * 255.0).astype(np.uint8)
            means.append(float(np.mean(grade(quickqual.features_of(net, images)))))
            row[f"badness@{severity}"] = means[-1]
        yield row | {"inversions": int((np.diff(means) < 0).sum())}


Q, P, R = "quality", "prior", "photograph"
SCRATCH, HAND, RANDOM = "trained from scratch", "hand-crafted", "random weights"
small = Scale(
    experiments=(
        Experiment(Q, ("QuickQual", "nine features", RANDOM, HAND, SCRATCH), quality),
        Experiment(P, tuple(f"prior {p}" for p in PRIORS), prior),
        Experiment(R, ("QuickQual", "nine features"), photograph),
    ),
    checks=(
        Check(Q, "QuickQual", "AUC", "at_least", 0.92),
        Check(Q, "QuickQual", "AUC", "above", 0.06, other=RANDOM, paired=True),
        Check(Q, "QuickQual", "AUC", "above", 0.06, other=HAND, paired=True),
        Check(Q, "QuickQual", "AUC", "above", 0.05, other=SCRATCH, paired=True),
        Check(Q, "QuickQual", "accuracy", "above", 0.05, other=RANDOM, paired=True),
        Check(Q, "nine features", "AUC of the worst third", "at_least", 0.92),
        Check(R, "QuickQual", "inversions", "share_below", 1.0, target=1.0),
        Check(R, "nine features", "inversions", "share_below", 1.0, target=1.0),
        Check(P, "prior 0.5", "rank correlation", "above", 0.0, other="prior 0.0", paired=True, report=True),
        Check(P, "prior 0.5", "rank correlation", "above", 0.0, other="prior 1.0", paired=True, report=True),
        Check(P, "prior 0.5", "AUC of Bad", "above", 0.0, other="prior 0.0", paired=True, report=True),
        Check(P, "prior 0.5", "AUC of Usable and Bad", "above", 0.0, other="prior 1.0", paired=True, report=True),
    ),
    seeds=5,
    minutes=16,
)
claim = Claim(
    method="quickqual",
    paper="Engelmann, Storkey & Bernabeu (2023)",
    statement=(
        "Frozen ImageNet features and a support vector machine tell three classes of quality from 260 photographs "
        "(macro AUC of at least .92), better by .06 than features of random weights and hand-crafted statistics and by "
        ".05 than a network trained from scratch; nine of the features tell the worst third (AUC of at least .92)."
    ),
    scope=(
        "Phantoms of 128 pixels with degradations of our own; the label is how well the vessels can be seen. Features "
        "of EfficientNet-Lite0, whose ImageNet weights come in a package, not DenseNet-121's (the paper: 28,792 "
        "photographs of EyeQ at 512 pixels). No arm is tuned. MCF-Net and fine-tuning are not compared with."
    ),
    scales={"small": small},
    baselines=(RANDOM, HAND, SCRATCH),
    ours="QuickQual",
)
