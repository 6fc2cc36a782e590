"""Labels that are wrong at random: how they arise, losses made for them, and one network studied over epochs.

A transition matrix T [C, C] has the clean label in its rows: T[y, k] = P(noisy label k | clean label y).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.core import config as configs
from jaxstack.core.config import require, require_at_least, require_unit
from jaxstack.core.errors import UserError, unknown
from jaxstack.core.learner import Key
from jaxstack.data import images
from jaxstack.data.sources import SplitData
from jaxstack.nn import networks
from jaxstack.nn.supervised import Model, Optimiser, accuracy
from jaxstack.nn.vision import zoo

# --- noise ---------------------------------------------------------------------------------------------------------


def symmetric(rate: Any, classes: int, *, itself: bool = False) -> Array:
    """Every label becomes another one with probability `rate`, each other one alike.

    Args:
        rate: in 0..1; may be traced.
        classes: C.
        itself: the label is drawn anew from all classes instead, its own among them: it then changes with probability
            rate (C - 1) / C only. Papers use both conventions.

    Returns:
        T [C, C] float32.
    """
    rate = rate * (classes - 1) / classes if itself else rate
    eye = jnp.eye(classes, dtype=jnp.float32)
    return (1.0 - rate) * eye + rate / (classes - 1) * (1.0 - eye)


def pair(rate: Any, classes: int) -> Array:
    """Every label y becomes y + 1 (the last one 0) with probability `rate`: T [C, C] float32."""
    return asymmetric(rate, {y: (y + 1) % classes for y in range(classes)}, classes)


def asymmetric(rate: Any, to: Mapping[int, int], classes: int) -> Array:
    """Labels y in `to` become `to[y]` with probability `rate`, the others stay: T [C, C] float32.

    Raises `UserError` for a class outside 0..C-1.
    """
    if wrong := [y for pair in to.items() for y in pair if not 0 <= y < classes]:
        raise UserError(f"to={dict(to)}: found class {wrong[0]}, expected 0 to {classes - 1}")
    eye = np.eye(classes, dtype=np.float32)
    moved = eye[[to.get(y, y) for y in range(classes)]]
    return (1.0 - rate) * jnp.asarray(eye) + rate * jnp.asarray(moved)


def apply(key: Key, labels: Array, transition: Array) -> Array:
    """Draw noisy labels [N] int32 of clean ones [N] by T [C, C]."""
    return jax.random.categorical(key, jnp.log(transition)[labels]).astype(jnp.int32)


def instance_dependent(key: Key, inputs: Array, labels: Array, rate: float, classes: int) -> Array:
    """Draw noisy labels whose errors depend on the input (Xia et al., 2020).

    Each example has a rate of its own, normal around `rate` with deviation 0.1, cut to 0..1, and becomes another class
    by the softmax of a random linear map of its inputs, its own class left out.

    Args:
        key: of the noise.
        inputs: [N, D].
        labels: [N].
        rate: the mean rate.
        classes: C.

    Returns:
        Noisy labels [N] int32.
    """
    k_rate, k_map, k_flip, k_to = jax.random.split(key, 4)
    rates = jnp.clip(rate + 0.1 * jax.random.normal(k_rate, labels.shape), 0.0, 1.0)
    maps = jax.random.normal(k_map, (inputs.shape[-1], classes)) / jnp.sqrt(inputs.shape[-1])
    own = jax.nn.one_hot(labels, classes, dtype=bool)
    other = jax.random.categorical(k_to, jnp.where(own, -jnp.inf, inputs @ maps))
    return jnp.where(jax.random.uniform(k_flip, labels.shape) < rates, other, labels).astype(jnp.int32)


NOISE: dict[str, Callable[[Any, int], Array]] = {"symmetric": symmetric, "pair": pair}
"""Kinds of noise that a rate alone tells."""


def transition(noise: str, rate: Any, classes: int) -> Array:
    """T [C, C] of a kind of noise; raises `UserError` for an unknown one."""
    if noise not in NOISE:
        raise unknown("noise", noise, NOISE)
    return NOISE[noise](rate, classes)


# --- losses: logits [B, C], labels [B] -> [B] ------------------------------------------------------------


def _own(x: Array, labels: Array) -> Array:
    return jnp.take_along_axis(x, labels[:, None].astype(jnp.int32), 1)[:, 0]


def ce(logits: Array, labels: Array) -> Array:
    """Cross entropy in nats."""
    return -_own(jax.nn.log_softmax(logits), labels)


def mae(logits: Array, labels: Array) -> Array:
    """sum |one-hot - p| = 2 (1 - p_y): its population risk is affine in the clean one under symmetric noise (Ghosh et
    al., 2017)."""
    return 2.0 * (1.0 - _own(jax.nn.softmax(logits), labels))


def gce(logits: Array, labels: Array, q: Any = 0.7) -> Array:
    """Generalised cross entropy (1 - p_y^q) / q: CE for q -> 0, half of MAE for q = 1 (Zhang and Sabuncu, 2018)."""
    return -jnp.expm1(q * _own(jax.nn.log_softmax(logits), labels)) / q


def sce(logits: Array, labels: Array, alpha: Any = 0.1, beta: Any = 1.0, log_zero: float = -4.0) -> Array:
    """Symmetric cross entropy alpha CE + beta RCE with RCE = -log_zero (1 - p_y) (Wang et al., 2019)."""
    reverse = -log_zero * (1.0 - _own(jax.nn.softmax(logits), labels))
    return alpha * ce(logits, labels) + beta * reverse


def nce(logits: Array, labels: Array) -> Array:
    """Normalised cross entropy log p_y / sum_k log p_k, in 0..1 (Ma et al., 2020)."""
    logp = jax.nn.log_softmax(logits)
    return _own(logp, labels) / logp.sum(-1)


def nce_rce(logits: Array, labels: Array, log_zero: float = -4.0) -> Array:
    """Active and passive loss NCE + RCE (Ma et al., 2020)."""
    return nce(logits, labels) - log_zero * (1.0 - _own(jax.nn.softmax(logits), labels))


def nce_mae(logits: Array, labels: Array) -> Array:
    """Active and passive loss NCE + MAE (Ma et al., 2020)."""
    return nce(logits, labels) + mae(logits, labels)


def forward_ce(logits: Array, labels: Array, log_transition: Array) -> Array:
    """Forward-corrected cross entropy -log (T^T p)_y (Patrini et al., 2017), in logarithms throughout.

    Args:
        logits: of the clean label, [B, C].
        labels: noisy ones [B].
        log_transition: log T [C, C]; -inf where T is 0.

    Returns:
        Nats [B].
    """
    into = log_transition.T[labels]  # [B, C]: log T[k, label]
    # -inf on both sides of a maximum would give NaN gradients
    into = jnp.where(jnp.isneginf(into), -1e30, into)
    return -jax.nn.logsumexp(jax.nn.log_softmax(logits) + into, axis=-1)


def backward_ce(logits: Array, labels: Array, inverse: Array) -> Array:
    """Backward-corrected cross entropy [T^-1 (-log p)]_y (Patrini et al., 2017): its mean over noisy labels is the
    clean cross entropy; it can be negative. `inverse` is T^-1 [C, C]."""
    return -(inverse[labels] * jax.nn.log_softmax(logits)).sum(-1)


def elr(logits: Array, labels: Array, averages: Array, weight: Any = 3.0) -> Array:
    """Early-learning regularisation CE + weight log(1 - <p, t>) (Liu et al., 2020). `averages` t [B, C] are those of
    the examples' earlier predictions, see `elr_averages`; no gradient enters them."""
    inner = (jax.nn.softmax(logits) * jax.lax.stop_gradient(averages)).sum(-1)
    return ce(logits, labels) + weight * jnp.log1p(-jnp.clip(inner, 0.0, 1.0 - 1e-4))


def elr_averages(averages: Array, logits: Array, decay: float = 0.7) -> Array:
    """t <- decay t + (1 - decay) p, [B, C]."""
    return decay * averages + (1.0 - decay) * jax.lax.stop_gradient(jax.nn.softmax(logits))


LOSSES = ("ce", "mae", "gce", "sce", "nce_rce", "nce_mae", "fce", "backward", "elr")


def loss_of(name: str, assumed: Array, *, q: Any = 0.7, alpha: Any = 0.1, beta: Any = 1.0) -> Callable[..., Array]:
    """The loss of a name as a function (logits [B, C], noisy labels [B]) -> [B].

    Args:
        name: one of `LOSSES` but elr, which has a state of its own.
        assumed: T [C, C] that the corrections take for true.
        q: of gce.
        alpha: of sce.
        beta: of sce.

    Raises:
        UserError: for an unknown name.
    """
    if name == "fce":
        return lambda logits, labels: forward_ce(logits, labels, jnp.log(assumed))
    if name == "backward":
        inverse = jnp.linalg.inv(assumed)
        return lambda logits, labels: backward_ce(logits, labels, inverse)
    known: dict[str, Callable[..., Array]] = {
        "ce": ce,
        "mae": mae,
        "gce": lambda logits, labels: gce(logits, labels, q),
        "sce": lambda logits, labels: sce(logits, labels, alpha, beta),
        "nce_rce": nce_rce,
        "nce_mae": nce_mae,
    }
    if name not in known:
        raise unknown("loss", name, LOSSES)
    return known[name]


# --- a network studied over epochs ----------------------------------------------------------------------------------


class Data(NamedTuple):
    """What a study sees; the clean labels of training and validation are used for reports alone."""

    x: Array
    """[N, D]"""
    noisy: Array
    """[N] int32"""
    valid_x: Array
    valid_noisy: Array
    valid_clean: Array
    test_x: Array
    test: Array


class Study(NamedTuple):
    """Static: a ReLU network, SGD, epochs."""

    loss: str = "ce"
    hidden: tuple[int, ...] = (128, 128)
    classes: int = 10
    epochs: int = 200
    batch: int = 50
    lr: float = 0.1


class History(NamedTuple):
    """Of each epoch, [E]."""

    loss: Array
    """Mean of the training loss over the epoch's batches, before any bound."""
    below: Array
    """Share of the batches whose loss was below the floor."""
    train: Array
    """Accuracy on the noisy training labels."""
    valid: Array
    """Accuracy on the noisy validation labels."""
    valid_loss: Array
    """The training loss on them."""
    valid_ce: Array
    """Cross entropy of the predictions p on them, whatever the training loss."""
    clean: Array
    """Accuracy on the clean validation labels."""
    test: Array
    """Accuracy on the test labels."""


Bound = Callable[[Array, Array], Array]
"""(mean loss, floor) -> what is minimised."""


def study(setting: Study, key: Key, data: Data, assumed: Array, floor: Array, bound: Bound | None = None) -> History:
    """Train a network from scratch and watch it, in one program; `jax.vmap` over keys, data, T and floors for many.

    Args:
        setting: network, loss, epochs.
        key: of the initial weights and the order of examples.
        data: see `Data`.
        assumed: T [C, C] that corrections assume.
        floor: scalar, for `bound` and `History.below`.
        bound: applied to each batch's mean loss; None: nothing.

    Returns:
        The history.
    """
    net = networks.MLP(setting.hidden, setting.classes, "relu")
    k_init, k_order = jax.random.split(key)
    params = net.init(k_init, data.x[:1])
    count = len(data.x) // setting.batch
    value = ce if setting.loss == "elr" else loss_of(setting.loss, assumed)
    accuracy = lambda logits, labels: (logits.argmax(-1) == labels).mean()

    def batch_loss(params: Any, rows: Array, averages: Array) -> tuple[Array, tuple[Array, Array]]:
        logits: Any = net.apply(params, data.x[rows])
        labels = data.noisy[rows]
        if setting.loss == "elr":
            averages = averages.at[rows].set(elr_averages(averages[rows], logits))
            mean = elr(logits, labels, averages[rows]).mean()
        else:
            mean = value(logits, labels).mean()
        return (mean if bound is None else bound(mean, floor)), (mean, averages)

    def update(carry: tuple[Any, Array], rows: Array) -> tuple[tuple[Any, Array], Array]:
        params, averages = carry
        (_, (mean, averages)), grads = jax.value_and_grad(batch_loss, has_aux=True)(params, rows, averages)
        return (jax.tree.map(lambda p, g: p - setting.lr * g, params, grads), averages), mean

    def epoch(carry: tuple[Any, Array], key: Key) -> tuple[tuple[Any, Array], History]:
        order = jax.random.permutation(key, len(data.x))[: count * setting.batch].reshape(count, setting.batch)
        carry, means = jax.lax.scan(update, carry, order)
        logits: Any = [net.apply(carry[0], x) for x in (data.x, data.valid_x, data.test_x)]
        return carry, History(
            means.mean(),
            (means < floor).mean(),
            accuracy(logits[0], data.noisy),
            accuracy(logits[1], data.valid_noisy),
            value(logits[1], data.valid_noisy).mean(),
            ce(logits[1], data.valid_noisy).mean(),
            accuracy(logits[1], data.valid_clean),
            accuracy(logits[2], data.test),
        )

    # examples' averages are needed by elr alone
    averages = jnp.zeros((len(data.x) if setting.loss == "elr" else 0, setting.classes))
    return jax.lax.scan(epoch, (params, averages), jax.random.split(k_order, setting.epochs))[1]


def split(name: str, seed: int, train: int, valid: int, test: int) -> tuple[np.ndarray, np.ndarray]:
    """A set of images as rows, in a seed's random parts one after another.

    Args:
        name: see `data.images.load`; all of its images are drawn from.
        seed: of the parts.
        train: examples to train on.
        valid: examples for validation.
        test: most test examples.

    Returns:
        Rows [N, D] float32 of mean 0 and deviation 1 over the training part, and labels [N] int32.

    Raises:
        UserError: for an unknown set, or too few examples.
    """
    parts = [images.part(name, which) for which in ("train", "valid", "test")]
    count = sum(len(p[1]) for p in parts)
    if train + valid >= count:
        raise UserError(f"{name}: found {count} images, expected more than train + valid = {train + valid}")
    rows = np.random.default_rng(seed).permutation(count)[: train + valid + test]
    x, y = (np.concatenate([p[i] for p in parts])[rows] for i in (0, 1))
    x = x.reshape(len(x), -1).astype(np.float32)
    return (x - x[:train].mean()) / x[:train].std(), y


def prepared(
    name: str, seeds: Sequence[int], noise: str, rate: float, train: int, valid: int, test: int = 2000
) -> tuple[Data, Array]:
    """The data of several seeds side by side, leaves [S, ...], and the keys [S] of their training.

    Args:
        name: see `data.images.load`.
        seeds: each has parts and noise of its own.
        noise: of `NOISE`, or "instance".
        rate: of the noise.
        train: examples to train on, per seed.
        valid: examples for validation, noisy like those for training.
        test: most test examples.

    Returns:
        The data and the keys.
    """
    classes, found, keys = images.facts(name).classes, [], []
    for seed in seeds:
        x, y = (jnp.asarray(a) for a in split(name, seed, train, valid, test))
        k_noise, k_train = jax.random.split(jax.random.key(seed))
        if noise == "instance":
            noisy = instance_dependent(k_noise, x, y, rate, classes)
        else:
            noisy = apply(k_noise, y, transition(noise, rate, classes))
        a, b, c = slice(train), slice(train, train + valid), slice(train + valid, None)
        found.append(Data(x[a], noisy[a], x[b], noisy[b], y[b], x[c], y[c]))
        keys.append(k_train)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found), jnp.stack(keys)


# --- what both learners have in common ------------------------------------------------------------------------------


class Hypers(NamedTuple):
    """Numeric hyperparameters: traced, so a sweep over them compiles once."""

    lr: float = 0.1
    min_lr: float = 0.0
    weight_decay: float = 0.0
    momentum: float = 0.0
    assumed: float = -1.0
    """The noise rate that corrections and floors assume; -1: that of `rate`."""
    q: float = 0.7
    """Of gce."""
    alpha: float = 0.1
    """Weight of the cross entropy in sce."""
    beta: float = 1.0
    """Weight of the reverse cross entropy in sce."""


@dataclass(frozen=True)
class Config(configs.Config):
    """Training on labels that are noisy, or are made noisy."""

    data: str = "digits"
    """digits, mnist-5k or fashion-mnist; NAME=PATH for files of one's own."""
    train_images: int = 0
    """Use so many training images; 0: all."""
    noise: Literal["symmetric", "pair", "none"] = "symmetric"
    """What is done to the labels for training and validation: each changes to another one with probability `rate`
    (symmetric), or to the next (pair); none: they are noisy as they come, or clean."""
    rate: float = 0.4
    noise_seed: int = 0
    assumed_noise: Literal["same", "symmetric", "pair"] = "same"
    """The kind of noise that corrections and floors assume; same: that of `noise`. Its rate is the hyperparameter
    `assumed`."""
    loss: Literal["ce", "mae", "gce", "sce", "nce_rce", "nce_mae", "fce", "backward"] = "ce"
    model: str = "mlp"
    """mlp, or a convolutional network as `jaxstack train classifier --model` names them."""
    hidden: tuple[int, ...] = (128, 128)
    """Of mlp."""
    batch_size: int = 50
    num_updates: int = 2000
    schedule: Literal["constant", "cosine"] = "constant"
    split_seed: int = 0
    hypers: Hypers = Hypers()

    def validate(self) -> None:
        require_at_least(self, 1, "batch_size", "num_updates")
        require_at_least(self, 0, "split_seed", "noise_seed", "train_images", "hypers.lr", "hypers.weight_decay")
        require_unit(self, "rate", "hypers.momentum")
        require(self, "hypers.assumed", self.hypers.assumed in (-1,) or 0 <= self.hypers.assumed <= 1, "0 to 1, or -1")
        require(self, "hypers.q", self.hypers.q > 0, "a positive number")
        images.class_facts(self.data)
        zoo.check_model(self)
        if self.assumes:
            told = self.noise != "none" or (self.assumed_noise != "same" and self.hypers.assumed >= 0)
            require(
                self, "noise", told, "symmetric or pair, or assumed_noise and assumed, which tell what the labels have"
            )

    @property
    def assumes(self) -> bool:
        """Whether the noise must be known."""
        return self.loss in ("fce", "backward")

    def assumed_transition(self, hypers: Hypers) -> Array:
        """T [C, C] that corrections and floors assume."""
        kind = self.noise if self.assumed_noise == "same" else self.assumed_noise
        return transition(
            kind, jnp.where(hypers.assumed < 0, self.rate, hypers.assumed), images.facts(self.data).classes
        )


def parts(config: Config) -> dict[str, images.Images]:
    """Images uint8 and labels of "train" and "valid", both noisy, and of "test". Raises `UserError`."""
    classes = images.facts(config.data).classes
    out = {}
    for i, which in enumerate(("train", "valid", "test")):
        x, y = images.part(config.data, which, config.split_seed, config.train_images)  # pyright: ignore[reportArgumentType]
        if which != "test" and config.noise != "none":
            key = jax.random.fold_in(jax.random.key(config.noise_seed), i)
            y = np.asarray(apply(key, jnp.asarray(y), transition(config.noise, config.rate, classes)))
        out[which] = (x, y)
    return out


def eval_source(config: Config) -> SplitData:
    """The test part, whose labels are clean."""
    return SplitData(parts(config)["test"], 256)


def model_of(config: Config) -> Model:
    """The network of a config as pure functions of its variables and of uint8 images."""
    return zoo.model_of(config.data, config.model, config.hidden)


def training_loss(config: Config) -> Callable[[Array, Array, Hypers], Array]:
    """The config's loss as the supervised learner takes it."""

    def loss(logits: Array, labels: Array, hypers: Hypers) -> Array:
        assumed = config.assumed_transition(hypers) if config.assumes else jnp.eye(logits.shape[-1])
        return loss_of(config.loss, assumed, q=hypers.q, alpha=hypers.alpha, beta=hypers.beta)(logits, labels)

    return loss


def learner_options(config: Config) -> dict[str, Any]:
    """Arguments of `supervised` that both learners share."""
    return dict(
        metrics={"accuracy": accuracy},
        optimiser=Optimiser("sgd", config.schedule),
        num_steps=config.num_updates,
        hypers=config.hypers,
        config=config,
        batch_size=config.batch_size,
        eval_source=eval_source,
        objective=("eval/accuracy", "max"),
    )
