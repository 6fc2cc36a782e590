"""Deep class-conditional Gaussians for online continual learning (Lee and Storkey, "Approximate Bayesian
Class-Conditional Models under Continuous Representation Shift", AISTATS 2024).

An embedding z = f(x) in R^D learns from a stream that is seen once. Above it stands no trained head: class c has the
model z | c, m_c ~ N(m_c, s^2 I), and its posterior is computed anew from n_c stored examples whenever f has moved:

    (1) p(m_c | memory) = N(mean of z over the class, s^2 / n_c I)                       flat prior
    (2) p(z | c, memory) = N(mean, s^2 (1 + 1 / n_c) I)                                 m_c integrated out
    (3) p(c | z, memory) in proportion to (2), over the classes seen
    (4) f maximises sum_i log p(y_i | z_i, all others), batch and memory together: each example is left out of its own
        class's mean ("loo"), or one half is scored by the other ("split")
    (5) memory: of a class's stored and new examples, those whose mean is nearest to the mean of all of them, which
        makes KL( N(mu_A, s^2 / n) || N(mu_Q, s^2 / k) ) smallest for given n and k; chosen one after another

The paper's body could not be read and its released repository is empty: (1) to (5) are derived from the abstracts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from jaxstack.core import config as configs
from jaxstack.core.config import require, require_at_least, require_positive
from jaxstack.core.learner import Key, Learner, Metrics, as_hypers
from jaxstack.core.metrics import mean
from jaxstack.core.source import Batch
from jaxstack.data import images
from jaxstack.data.sources import ArrayData, SplitData
from jaxstack.learning import continual, streams
from jaxstack.nn import networks

# --- the model --------------------------------------------------------------------------------------------------------


class Posterior(NamedTuple):
    """Of the class means, (1)."""

    mean: Array
    """[C, D]"""
    count: Array
    """[C] examples; 0 for a class that has none."""


def posterior(z: Array, labels: Array, mask: Array, classes: int) -> Posterior:
    """Equation (1) from embeddings z [N, D], labels [N] and a mask [N] of those that count."""
    weight = mask.astype(z.dtype)
    count = jax.ops.segment_sum(weight, labels, classes)
    total = jax.ops.segment_sum(weight[:, None] * z, labels, classes)
    return Posterior(total / jnp.maximum(count, 1.0)[:, None], count)


def log_predictive(z: Array, model: Posterior, variance: Any, dims: bool = True) -> Array:
    """Equation (2): log N(z; mean_c, s^2 (1 + 1 / n_c) I) less a constant, [N, C]; -inf for classes without examples.
    `dims=False` leaves out the normaliser, which favours no class by its count: an ablation."""
    spread = variance * (1.0 + 1.0 / jnp.maximum(model.count, 1.0))
    distance = jnp.square(z[:, None] - model.mean[None]).sum(-1)
    scores = -distance / (2.0 * spread) - (0.5 * z.shape[-1] * jnp.log(spread) if dims else 0.0)
    return jnp.where(model.count > 0, scores, -jnp.inf)


def leave_one_out(z: Array, labels: Array, mask: Array, classes: int, variance: Any) -> tuple[Array, Array]:
    """Equation (4), each example left out of its own class.

    Args:
        z: [N, D].
        labels: [N].
        mask: [N] examples that count.
        classes: C.
        variance: s^2.

    Returns:
        log p(y_i | z_i, others) [N], and a mask [N] of those whose class has another example.
    """
    weight = mask.astype(z.dtype)
    own = jax.nn.one_hot(labels, classes, dtype=z.dtype) * weight[:, None]  # [N, C]
    count = own.sum(0)[None] - own
    total = (own.T @ z)[None] - own[:, :, None] * z[:, None]
    spread = variance * (1.0 + 1.0 / jnp.maximum(count, 1.0))
    distance = jnp.square(z[:, None] - total / jnp.maximum(count, 1.0)[..., None]).sum(-1)
    scores = -distance / (2.0 * spread) - 0.5 * z.shape[-1] * jnp.log(spread)
    # a finite number, as an infinite one has no gradient
    scores = jnp.where(count > 0, scores, -1e4)
    scored = mask & (jnp.take_along_axis(count, labels[:, None], 1)[:, 0] > 0)
    return jnp.take_along_axis(jax.nn.log_softmax(scores), labels[:, None], 1)[:, 0], scored


def split_halves(key: Key, z: Array, labels: Array, mask: Array, classes: int, variance: Any) -> tuple[Array, Array]:
    """Equation (4), a random half scored by the posterior of the other: as `leave_one_out`."""
    left = mask & jax.random.bernoulli(key, 0.5, mask.shape)
    model = posterior(z, labels, left, classes)
    scores = jnp.where(
        model.count > 0, log_predictive(z, model._replace(count=jnp.maximum(model.count, 1)), variance), -1e4
    )
    return jnp.take_along_axis(jax.nn.log_softmax(scores), labels[:, None], 1)[:, 0], mask & ~left & (
        model.count[labels] > 0
    )


def kl(mean: Array, count: Any, other: Array, size: Any, variance: Any) -> Array:
    """KL( N(mean, s^2 / count I) || N(other, s^2 / size I) ) of means [D]."""
    ratio = size / count
    distance = jnp.square(mean - other).sum() / variance
    return 0.5 * (len(mean) * (ratio - 1.0 - jnp.log(ratio)) + size * distance)


def kl_ranks(z: Array, mask: Array, picks: Any, swaps: int = 8) -> Array:
    """Equation (5): which examples are chosen, one after another, then improved by swaps of one against another.

    Args:
        z: embeddings [N, D].
        mask: [N] candidates.
        picks: how many are chosen; may be traced.
        swaps: at most so many, each the best there is.

    Returns:
        Ranks [N] int32 from 0; N for those that are not chosen.
    """
    count = len(z)
    target = (z * mask[:, None]).sum(0) / jnp.maximum(mask.sum(), 1)

    def pick(i: Any, c: tuple[Array, Array]) -> tuple[Array, Array]:
        ranks, total = c
        distance = jnp.square((total[None] + z) / (i + 1.0) - target[None]).sum(-1)
        free = mask & (ranks == count)
        at = jnp.argmin(jnp.where(free, distance, jnp.inf))
        taken = free[at]
        return ranks.at[at].set(jnp.where(taken, i, ranks[at])), total + jnp.where(taken, z[at], 0.0)

    def swap(_: Any, c: tuple[Array, Array]) -> tuple[Array, Array]:
        ranks, total = c
        chosen = ranks < count
        rest = total - chosen.sum() * target  # off the target, in sums
        without = rest[None] - z
        # |rest - z_i + z_j|^2 of every chosen i and free j
        distance = jnp.square(without).sum(-1)[:, None] + 2 * without @ z.T + jnp.square(z).sum(-1)[None]
        distance = jnp.where(chosen[:, None] & (mask & ~chosen)[None], distance, jnp.inf)
        i, j = jnp.unravel_index(distance.argmin(), distance.shape)
        better = distance[i, j] < jnp.square(rest).sum() * (1.0 - 1e-4)
        new = ranks.at[j].set(ranks[i]).at[i].set(count)
        return jnp.where(better, new, ranks), jnp.where(better, total - z[i] + z[j], total)

    start = (jnp.full(count, count, jnp.int32), jnp.zeros(z.shape[-1], z.dtype))
    greedy = jax.lax.fori_loop(0, picks, pick, start)
    return jax.lax.fori_loop(0, swaps, swap, greedy)[0]


# --- the memory -------------------------------------------------------------------------------------------------------


class Memory(NamedTuple):
    """M stored examples."""

    x: Array
    """[M, ...]"""
    y: Array
    """[M] int32"""
    used: Array
    """[M] bool"""
    priority: Array
    """[M] uniform numbers that a reservoir keeps the largest of."""


def stored(memory: Memory, ranks: Array, x: Array, y: Array, valid: Array, priority: Array, quota: Array) -> Memory:
    """The memory of the next step: of the candidates x [N, ...], those of a rank below the quota of their class."""
    size = len(memory.y)
    kept = valid & (ranks < quota)
    rows = jnp.argsort(~kept, stable=True)[:size]  # kept ones first
    return Memory(x[rows], y[rows], kept[rows], priority[rows])


def ranks_by_class(by: Array, y: Array, valid: Array) -> Array:
    """Rank [N] of each valid example among those of its class, the largest `by` first."""
    before = (by[None] > by[:, None]) | (
        (by[None] == by[:, None]) & (jnp.arange(len(by))[None] < jnp.arange(len(by))[:, None])
    )
    return (before & (y[None] == y[:, None]) & valid[None]).sum(1)


# --- the learner ------------------------------------------------------------------------------------------------------


class Hypers(NamedTuple):
    """Numeric hyperparameters: traced, so a sweep over them compiles once."""

    lr: float = 1e-3
    """Of Adam."""
    variance: float = 1.0
    """s^2."""


Loss = Literal["loo", "split", "er", "er-ace", "agem", "sgd", "frozen"]


@dataclass(frozen=True)
class Config(configs.Config):
    """Online learning of a stream of classes, one pass."""

    data: str = "digits"
    """digits, mnist-5k or fashion-mnist; NAME=PATH for files of one's own."""
    train_images: int = 0
    """Use so many training images; 0: all."""
    tasks: int = 5
    """The classes, in random order, come in so many groups; 1: all at once."""
    loss: Loss = "loo"
    """loo, split: the conditional marginal likelihood (4); er: experience replay, cross entropy of a linear head;
    er-ace: new examples compete with new classes alone (Caccia et al., 2022); agem: gradients that would raise the
    memory's loss are projected (Chaudhry et al., 2019); sgd: no memory; frozen: the embedding stays as it is."""
    head: Literal["gaussian", "linear"] = "gaussian"
    """What classifies: (3), or the linear head, which loo, split and frozen do not train."""
    selection: Literal["kl", "reservoir"] = "kl"
    """What stays in memory: (5), or a random sample of each class."""
    memory: int = 60
    """Stored examples; each class seen so far has an equal share."""
    grad_steps: int = 2
    """Gradient steps per batch."""
    hidden: tuple[int, ...] = (128,)
    embedding: int = 32
    """D."""
    batch_size: int = 10
    split_seed: int = 0
    """Of the order of classes and examples."""
    hypers: Hypers = Hypers()

    def validate(self) -> None:
        require_at_least(self, 1, "tasks", "memory", "grad_steps", "embedding", "batch_size")
        require_at_least(self, 0, "split_seed", "train_images", "hypers.lr")
        require_positive(self, "hypers.variance")
        classes = images.class_facts(self.data).classes
        require(self, "tasks", self.tasks <= classes, f"at most the {classes} classes")
        require(self, "memory", self.memory >= classes, f"at least one example for each of {classes} classes")
        trained = self.loss in ("er", "er-ace", "agem", "sgd")
        require(self, "head", trained or self.head == "gaussian", f"gaussian: loss={self.loss} trains no linear head")
        require(self, "head", self.loss != "sgd" or self.head == "linear", "linear: loss=sgd has no memory")

    @property
    def classes(self) -> int:
        """C."""
        return images.facts(self.data).classes


class State(NamedTuple):
    """Complete training state."""

    hypers: Hypers
    params: Any
    opt_state: optax.OptState
    memory: Memory
    seen: Array
    """[C] bool: classes of earlier batches."""
    key: Key
    step: Array


def prepared(config: Config, x: Any) -> Array:
    """Images uint8 as rows of floats, less the set's mean, over its deviation."""
    return images.facts(config.data).scaled(x).reshape(len(x), -1)


class Nets(NamedTuple):
    """Pure functions of parameters."""

    embed: Callable[[Any, Array], Any]
    """(params, images [N, ...]) -> z [N, D]"""
    linear: Callable[[Any, Array], Any]
    """(params, z [N, D]) -> logits [N, C]"""


def nets(config: Config) -> Nets:
    """The embedding and the linear head."""
    body = networks.MLP(config.hidden, config.embedding, "relu")
    head = networks.MLP((), config.classes, "relu")
    return Nets(lambda p, x: body.apply(p["embedding"], prepared(config, x)), lambda p, z: head.apply(p["head"], z))


def scores(config: Config, s: State, x: Array) -> Array:
    """Class scores [N, C] of images [N, ...], -inf for classes that were not seen."""
    net = nets(config)
    z = net.embed(s.params, x)
    if config.head == "linear":
        return jnp.where(s.seen, net.linear(s.params, z), -jnp.inf)
    model = posterior(net.embed(s.params, s.memory.x), s.memory.y, s.memory.used, config.classes)
    return log_predictive(z, model, s.hypers.variance)


def objective(config: Config, s: State, key: Key, params: Any, x: Array, y: Array) -> tuple[Array, Array]:
    """(mean loss of the batch x [B, ...], y [B] with the memory, loss of the memory alone, which agem needs)."""
    net, m, count = nets(config), s.memory, len(y)
    z = net.embed(params, jnp.concatenate([x, m.x]))
    labels = jnp.concatenate([y, m.y])
    valid = jnp.concatenate([jnp.ones(count, bool), m.used & (config.loss != "sgd")])
    if config.loss in ("loo", "split"):
        if config.loss == "loo":
            value, scored = leave_one_out(z, labels, valid, config.classes, s.hypers.variance)
        else:
            value, scored = split_halves(key, z, labels, valid, config.classes, s.hypers.variance)
        return -jnp.where(scored, value, 0.0).sum() / jnp.maximum(scored.sum(), 1), jnp.float32(0)
    logits = net.linear(params, z)
    new = jax.nn.one_hot(y, config.classes).sum(0) > 0
    if config.loss == "er-ace":
        logits = jnp.where(jnp.arange(len(z))[:, None] < count, jnp.where(new, logits, -1e4), logits)
    else:
        logits = jnp.where(s.seen | new, logits, -1e4)
    value = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    average = lambda rows: jnp.where(rows, value, 0.0).sum() / jnp.maximum(rows.sum(), 1)
    old = valid & (jnp.arange(len(z)) >= count)
    return average(valid & ~old if config.loss == "agem" else valid), average(old)


def gradient(config: Config, s: State, key: Key, params: Any, x: Array, y: Array) -> tuple[Array, Any]:
    """(loss, gradient) of a batch."""
    value, grads = jax.value_and_grad(lambda p: objective(config, s, key, p, x, y)[0])(params)
    if config.loss != "agem":
        return value, grads
    old = jax.grad(lambda p: objective(config, s, key, p, x, y)[1])(params)
    return value, continual.projected(grads, old)


def remembered(config: Config, s: State, key: Key, x: Array, y: Array) -> Memory:
    """Equation (5), or a reservoir, over memory and batch under the present embedding."""
    m = s.memory
    every = jnp.concatenate([m.x, x]), jnp.concatenate([m.y, y])
    valid = jnp.concatenate([m.used, jnp.ones(len(y), bool)])
    priority = jnp.concatenate([m.priority, jax.random.uniform(key, y.shape)])
    quota = config.memory // jnp.maximum(s.seen.sum(), 1)
    if config.selection == "reservoir":
        ranks = ranks_by_class(priority, every[1], valid)
    else:
        z = nets(config).embed(s.params, every[0])
        of = jax.vmap(lambda c: kl_ranks(z, valid & (every[1] == c), quota))(jnp.arange(config.classes))
        ranks = jnp.take_along_axis(of, every[1][None], 0)[0]
    return stored(m, ranks, *every, valid, priority, quota)


def step(config: Config, s: State, batch: tuple[Array, Array]) -> tuple[State, Metrics]:
    """One batch: gradient steps, then the memory."""
    x, y = batch
    y = y.astype(jnp.int32)
    k_loss, k_memory = jax.random.split(jax.random.fold_in(s.key, s.step))
    tx = optax.adam(s.hypers.lr)
    before = scores(config, s, x).argmax(-1) == y

    def update(c: tuple[Any, Any], key: Key) -> tuple[tuple[Any, Any], Array]:
        value, grads = gradient(config, s, key, c[0], x, y)
        updates, state = tx.update(grads, c[1], c[0])
        return (optax.apply_updates(c[0], updates), state), value

    params, opt_state, values = s.params, s.opt_state, jnp.zeros(1)
    if config.loss != "frozen":
        (params, opt_state), values = jax.lax.scan(
            update, (params, opt_state), jax.random.split(k_loss, config.grad_steps)
        )
    seen = s.seen | (jax.nn.one_hot(y, config.classes).sum(0) > 0)
    s = s._replace(params=params, opt_state=opt_state, seen=seen, step=s.step + 1)
    s = s._replace(memory=remembered(config, s, k_memory, x, y))
    return s, {"loss/train": values.mean(), "train/accuracy_before": mean(before), "train/stored": s.memory.used.sum()}


def shift(config: Config, before: State, after: State, x: Array, y: Array) -> tuple[Array, Array]:
    """What a step changes for examples of earlier classes, by the move of the embedding alone.

    Args:
        config: of the learner.
        before: the state before a step.
        after: the state after it.
        x: examples [N, ...].
        y: labels [N]; those of classes that were not seen before the step are left out.

    Returns:
        Changes of accuracy with the classifier of before on the new embedding, and with one that is computed anew from
        the same memory; for a linear head, which cannot be, the first twice. 0 where no class was seen before.
    """
    net = nets(config)
    rows = before.seen[y]
    accuracy = lambda s: jnp.where(rows, s.argmax(-1) == y, False).sum() / jnp.maximum(rows.sum(), 1)
    z_old, z_new = (net.embed(s.params, x) for s in (before, after))
    if config.head == "linear":
        fixed, old = (accuracy(jnp.where(before.seen, net.linear(before.params, z), -jnp.inf)) for z in (z_new, z_old))
        return fixed - old, fixed - old
    m = before.memory
    models = [posterior(net.embed(s.params, m.x), m.y, m.used, config.classes) for s in (before, after)]
    value = lambda z, model: accuracy(log_predictive(z, model, before.hypers.variance))
    old = value(z_old, models[0])
    return value(z_new, models[0]) - old, value(z_new, models[1]) - old


def init(config: Config, key: Key, hypers: Hypers) -> State:
    """An empty memory and fresh weights."""
    k_body, k_head, key = jax.random.split(key, 3)
    shape = images.facts(config.data).shape
    rows = jnp.zeros((1, *shape), jnp.uint8)
    body = networks.MLP(config.hidden, config.embedding, "relu").init(k_body, prepared(config, rows))
    head = networks.MLP((), config.classes, "relu").init(k_head, jnp.zeros((1, config.embedding)))
    params = {"embedding": body, "head": head}
    size = config.memory
    memory = Memory(
        jnp.zeros((size, *shape), jnp.uint8), jnp.zeros(size, jnp.int32), jnp.zeros(size, bool), jnp.zeros(size)
    )
    hypers = as_hypers(hypers)
    seen = jnp.zeros(config.classes, bool)
    return State(hypers, params, optax.adam(hypers.lr).init(params), memory, seen, key, jnp.int32(0))


def stream(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, ...] and labels [N] of the training part, group of classes after group, by `split_seed`."""
    x, y = images.part(config.data, "train", train_images=config.train_images)
    rng = np.random.default_rng(config.split_seed)
    rows = np.concatenate(streams.class_groups(rng, y, config.classes, config.tasks))
    return x[rows], y[rows]


def source(config: Config) -> ArrayData:
    """The stream, in order; the last examples that fill no batch are left out."""
    return ArrayData(stream(config), config.batch_size, shuffle=False)


def eval_source(config: Config) -> SplitData:
    """The validation part of all classes, once."""
    return SplitData(images.part(config.data, "valid"), 256)


def deepccg(config: Config = Config(), /, **changes: Any) -> Learner:
    """The learner of a config or of field values, hyperparameters among them; a run is one pass. Raises `UserError`."""
    config = configs.replace(config, **changes) if changes else config

    def evaluate(s: State, key: Key, batch: Batch) -> Metrics:
        x, y = batch.data
        return {"eval/accuracy": mean(scores(config, s, x).argmax(-1) == y, batch.mask > 0)}

    return Learner(
        init=lambda key, hypers=config.hypers: init(config, key, hypers),
        step=lambda s, batch: step(config, s, batch),
        hypers=config.hypers,
        config=config,
        name="deepccg",
        samples_per_step=config.batch_size,
        evaluate=evaluate,
        takes_batch=True,
        num_steps=len(stream(config)[1]) // config.batch_size,
        objective=("eval/accuracy", "max"),
        source=source,
        eval_source=eval_source,
        predict=lambda s, x: scores(config, s, x),
    )
