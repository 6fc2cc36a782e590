"""Learning from a stream of tasks: plain SGD and the methods made against forgetting, one task at a time.

    sgd      CE(B), B the new batch
    er       CE over B and a replayed batch R together, one forward pass (Chaudhry et al., 2019)
    er-ace   CE(B), where classes of the past that B lacks do not compete, + CE(R) (Caccia et al., 2022)
    der++    CE(B) + alpha MSE(f(R), stored logits) + beta CE(R'), R and R' drawn apart (Buzzega et al., 2020)
    a-gem    the gradient of CE(B), less its part that would raise CE(R) (Chaudhry et al., 2019)
    gss      er with a memory of diverse gradients (Aljundi et al., 2019)
    ewc      CE(B) + penalty sum_i F_i (theta_i - theta*_i)^2; after a task F <- decay F + mean of squared gradients of
             log p(y | x), theta* <- theta (online EWC, Schwarz et al., 2018)

The memory is a reservoir to which each pass over a task offers every example, as in the released code of these methods
(Mammoth); GSS is offered each example once, in a task's last epoch. All is pure and of static shape: a stream is one
`jax.lax.scan` over `train_task`, seeds and settings are vmapped, and settings are traced.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from jaxstack.core import config as configs
from jaxstack.core.config import require, require_at_least, require_positive, require_unit
from jaxstack.core.learner import Key, as_hypers
from jaxstack.data import images
from jaxstack.data.digits import Split
from jaxstack.data.mixtures import Mixture
from jaxstack.learning import streams
from jaxstack.learning.streams import Replay
from jaxstack.nn import networks
from jaxstack.nn.supervised import Model, linen
from jaxstack.nn.vision import zoo

METHODS = Literal["sgd", "er", "er-ace", "der++", "a-gem", "gss", "ewc"]
WITHOUT_MEMORY = ("sgd", "ewc")


class Hypers(NamedTuple):
    """Numeric hyperparameters: traced, so a sweep over them compiles once."""

    lr: float = 0.1
    """Of SGD, without momentum and weight decay."""
    alpha: float = 0.5
    """DER++: weight of the stored logits."""
    beta: float = 0.5
    """DER++: weight of the labels of its second replayed batch."""
    penalty: float = 1.0
    """EWC: weight of the quadratic penalty."""
    decay: float = 1.0
    """EWC: of the Fisher information of earlier tasks."""
    ema: float = 0.95
    """Averages of weights with average=ema: weight of the past."""


@dataclass(frozen=True)
class Config(configs.Config):
    """A stream, a network and how it learns."""

    data: str = "digits"
    """digits, mnist-5k or fashion-mnist; NAME=PATH for files of one's own; mixture: 20 Gaussian classes in 24
    dimensions that overlap, without a file."""
    train_images: int = 0
    """Use so many training examples; 0: all (4,000 of mixture)."""
    spread: float = 1.7
    """Of data=mixture: deviation within a cluster. 0.9 is easy, 1.7 hard."""
    order: Literal["chunks", "random", "classes"] = "chunks"
    """chunks: parts of one distribution, each with the same number of every class; random: parts drawn at random;
    classes: groups of classes, one after another."""
    chunks: int = 10
    """Number of tasks; 1: all at once."""
    method: METHODS = "sgd"
    """sgd, or a method made against forgetting: see `jaxstack.learning.continual`."""
    epochs: int = 20
    """Passes over each chunk."""
    batch_size: int = 25
    drops: tuple[float, ...] = ()
    """Shares of a chunk's steps after which the learning rate is divided by ten."""
    memory: int = 200
    """Stored examples, of methods with a memory."""
    replay: int = 25
    """Of them in each step."""
    model: str = "mlp"
    """mlp, or a convolutional network as `jaxstack train classifier --model` names them."""
    hidden: tuple[int, ...] = (128, 128)
    """Of mlp."""
    split_seed: int = 0
    """Of the stream."""
    hypers: Hypers = Hypers()

    def validate(self) -> None:
        require_at_least(self, 1, "chunks", "epochs", "batch_size", "memory", "replay")
        require_at_least(self, 0, "split_seed", "train_images", "hypers.lr", "hypers.alpha", "hypers.beta")
        require_at_least(self, 0, "hypers.penalty")
        require_unit(self, "hypers.decay", "hypers.ema")
        require_positive(self, "spread")
        zoo.check_model(self)
        require(self, "drops", all(0 < d < 1 for d in self.drops), "shares between 0 and 1")
        require(self, "replay", self.replay <= self.memory, f"at most memory={self.memory}")
        classes = self.classes
        if self.order == "classes":
            require(self, "chunks", self.chunks <= classes, f"at most the {classes} classes with order=classes")
        require(self, "model", self.model == "mlp" or self.data != "mixture", "mlp with data=mixture")

    @property
    def classes(self) -> int:
        """C."""
        return Mixture().classes if self.data == "mixture" else images.class_facts(self.data).classes

    @property
    def stores(self) -> bool:
        """Whether the method has a memory."""
        return self.method not in WITHOUT_MEMORY


def part(config: Config, which: Split, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Examples [n, ...] and labels [n] for training, validation or test. `seed` is that of the centres of a mixture, or
    of the split of images. Raises `UserError`."""
    if config.data != "mixture":
        return images.part(config.data, which, seed, config.train_images)
    count = {"train": config.train_images or 4000, "valid": 1000, "test": 3000}[which]
    return Mixture(spread=config.spread, seed=seed).draw(count, ("train", "valid", "test").index(which))


def stream_of(config: Config, labels: np.ndarray) -> streams.Stream:
    """The tasks of a config. Raises `UserError` for a batch that is larger than a task."""
    rng = np.random.default_rng(config.split_seed)
    if config.order == "classes":
        found = streams.of_groups(streams.class_groups(rng, labels, config.classes, config.chunks))
    else:
        found = streams.iid_chunks(rng, labels, config.chunks, config.order == "chunks")
    size = found.rows.shape[1]
    require(config, "batch_size", config.batch_size <= size, f"at most the {size} examples of a chunk")
    return found


def example(config: Config) -> np.ndarray:
    """One example [1, ...] of the shape and type of the data."""
    if config.data == "mixture":
        return np.zeros((1, Mixture().dims), np.float32)
    return np.zeros((1, *images.facts(config.data).shape), np.uint8)


def model_of(config: Config) -> Model:
    """The network as pure functions of its variables and of examples."""
    if config.data != "mixture":
        return zoo.model_of(config.data, config.model, config.hidden)
    return linen(networks.MLP(config.hidden, config.classes, "relu"), example(config), flags=lambda train: {})


# --- state ------------------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """Complete training state; parts that a method has no use for are empty."""

    hypers: Hypers
    params: Any
    stats: Any
    """Variables beside the parameters, such as BatchNorm's."""
    memory: Any
    """`streams.Memory`."""
    seen: Array
    """[C] bool: classes so far."""
    anchor: Any
    """EWC: theta* and F."""
    average: Any
    """Averages of variables at the ends of tasks, for who keeps them."""
    key: Key
    step: Array
    """Tasks so far."""


def variables(s: State) -> Any:
    """The last weights and statistics."""
    return {"params": s.params, **s.stats}


def init(config: Config, key: Key, hypers: Hypers) -> State:
    """Fresh weights and an empty memory."""
    model = model_of(config)
    k_params, key = jax.random.split(key)
    stats = dict(model.init(k_params))
    params = stats.pop("params")
    memory: Any = ()
    if config.stores:
        memory = streams.empty(config.memory, example(config)[0], config.classes)
    # arrays of their own: buffers of a state are donated one by one
    anchor = (jax.tree.map(jnp.copy, params), jax.tree.map(jnp.zeros_like, params)) if config.method == "ewc" else ()
    seen = jnp.zeros(config.classes, bool)
    return State(as_hypers(hypers), params, stats, memory, seen, anchor, (), key, jnp.int32(0))


# --- losses -----------------------------------------------------------------------------------------------------------


def average(values: Array, mask: Array) -> Array:
    """Mean of those that count; 0 without any."""
    return jnp.where(mask, values, 0.0).sum() / jnp.maximum(mask.sum(), 1)


def competing(present: Array, seen: Array, first: Array) -> Array:
    """ER-ACE: which classes compete for new examples, [C]: those of the batch and those never seen; in the first task
    all."""
    return present | ~seen | first


def objective(
    config: Config, model: Model, s: State, params: Any, key: Key, batch: Any, first: Any, second: Any
) -> tuple[Array, tuple[Any, Array]]:
    """What a step minimises.

    Args:
        config: with the method.
        model: the network.
        s: the state, whose statistics, classes seen and penalty count.
        params: where the loss is taken.
        key: of dropout.
        batch: new examples: x [B, ...], y [B], mask [B].
        first, second: `Replay`s of methods with a memory.

    Returns:
        The loss; the changed statistics, and logits [B, C] of the new examples.
    """
    x, y, mask = batch
    count = len(y)
    cross = optax.softmax_cross_entropy_with_integer_labels
    alone = [x]  # batches with BatchNorm statistics of their own
    if config.method in ("er", "gss"):
        alone = [jnp.concatenate([x, first.x])]
    elif config.method == "er-ace":
        alone = [x, first.x]
    elif config.method == "der++":
        alone = [x, first.x, second.x]
    logits, stats = [], s.stats
    if s.stats:
        for one in alone:
            out, changed = model.train({"params": params, **stats}, one, key)
            logits.append(out)
            stats = {**stats, **changed}
    else:  # rows do not meet: one product for all
        whole = model.train({"params": params}, jnp.concatenate(alone), key)[0]
        logits = jnp.split(whole, np.cumsum([len(one) for one in alone])[:-1])
    if config.method in ("er", "gss"):
        loss = average(cross(logits[0], jnp.concatenate([y, first.y])), jnp.concatenate([mask, first.mask]))
    elif config.method == "er-ace":
        present = (jax.nn.one_hot(y, config.classes, dtype=bool) & mask[:, None]).any(0)
        open_to = competing(present, s.seen, s.step == 0)
        loss = average(cross(jnp.where(open_to, logits[0], -1e9), y), mask)
        # as released: nothing is replayed in the first task
        loss += jnp.where(s.step > 0, average(cross(logits[1], first.y), first.mask), 0.0)
    else:
        loss = average(cross(logits[0], y), mask)
    if config.method == "der++":
        old = average(jnp.square(logits[1] - first.logits).mean(-1), first.mask)
        loss += s.hypers.alpha * old + s.hypers.beta * average(cross(logits[2], second.y), second.mask)
    if config.method == "ewc":
        theta, fisher = s.anchor
        moved = jax.tree.map(lambda f, p, t: (f * jnp.square(p - t)).sum(), fisher, params, theta)
        loss += s.hypers.penalty * sum(jax.tree.leaves(moved))
    return loss, (stats, logits[0][:count])


def projected(grads: Any, old: Any) -> Any:
    """A-GEM: gradients, less their part along `old`, the gradient of the memory's loss, if it would raise that loss."""
    inner = lambda a, b: sum(jnp.vdot(p, q) for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b)))
    share = jnp.minimum(inner(grads, old), 0.0) / jnp.maximum(inner(old, old), 1e-12)
    return jax.tree.map(lambda g, o: g - share * o, grads, old)


def example_gradients(model: Model, s: State, x: Array, y: Array) -> Any:
    """Gradients of log p(y | x) of each example, leaves [B, ...], with the stored statistics."""

    def log_p(params: Any, x: Array, y: Array) -> Array:
        return jax.nn.log_softmax(model.apply({"params": params, **s.stats}, x[None]))[0, y]

    return jax.vmap(jax.grad(log_p), (None, 0, 0))(s.params, x, y)


def likeness(model: Model, s: State, batch: Any, stored: Replay) -> Array:
    """GSS: the largest cosine of each new example's gradient with those of the stored ones, plus one, [B]; 0.1 while
    none is stored."""
    tables = []
    for x, y in ((batch[0], batch[1]), (stored.x, stored.y)):
        grads = jax.tree.leaves(example_gradients(model, s, x, y))
        flat = jnp.concatenate([g.reshape(len(y), -1) for g in grads], 1)
        tables.append(flat / jnp.maximum(jnp.linalg.norm(flat, axis=1, keepdims=True), 1e-12))
    cosine = jnp.where(stored.mask[None], tables[0] @ tables[1].T, -2.0).max(1)
    return jnp.where(stored.mask.any(), cosine + 1.0, 0.1)


# --- steps and tasks --------------------------------------------------------------------------------------------------


def update(config: Config, model: Model, s: State, key: Key, batch: Any, rate: Any, last: Any) -> tuple[State, Array]:
    """One batch (x [B, ...], y [B], mask [B]): a gradient step at a learning rate, then the memory. `last`: whether it
    is of a task's last epoch. Returns the state and the loss."""
    x, y, mask = batch
    k_model, k_first, k_second, k_keep = jax.random.split(key, 4)
    first: Any = ()
    second: Any = ()
    if config.stores:
        first = streams.draw(s.memory, k_first, config.replay)
    if config.method == "der++":
        second = streams.draw(s.memory, k_second, config.replay)
    of = lambda p: objective(config, model, s, p, k_model, batch, first, second)
    (loss, (stats, logits)), grads = jax.value_and_grad(of, has_aux=True)(s.params)
    if config.method == "a-gem":
        stored = (first.x, first.y, first.mask)
        old = jax.grad(lambda p: objective(config, model, s, p, k_model, stored, (), ())[0])(s.params)
        grads = projected(grads, old)
    memory: Any = s.memory
    if config.method == "gss":
        keep = lambda m: streams.greedy_diverse(m, k_keep, x, y, likeness(model, s, batch, first), mask)
        memory = jax.lax.cond(last, keep, lambda m: m, s.memory)
    elif config.stores:
        memory = streams.reservoir(s.memory, k_keep, x, y, jax.lax.stop_gradient(logits), mask)
    params = jax.tree.map(lambda p, g: p - rate * g, s.params, grads)
    seen = s.seen | (jax.nn.one_hot(y, config.classes, dtype=bool) & mask[:, None]).any(0)
    return s._replace(params=params, stats=stats, memory=memory, seen=seen), loss


def train_task(config: Config, model: Model, s: State, x: Array, y: Array, mask: Array) -> tuple[State, Array]:
    """All epochs over one task, with a fresh schedule.

    Args:
        config: epochs, batch size, method.
        model: the network.
        s: the state before the task; its key and number of tasks decide all that is drawn.
        x: [n, ...].
        y: [n].
        mask: [n] examples that count.

    Returns:
        The state after it, and losses [epochs, n // batch_size]. What fills no batch is left out of an epoch.
    """
    count, size = len(y), config.batch_size
    each = count // size
    y = y.astype(jnp.int32)

    def epoch(s: State, at: Array) -> tuple[State, Array]:
        k_order, k_steps = jax.random.split(jax.random.fold_in(jax.random.fold_in(s.key, s.step), at))
        order = jax.random.permutation(k_order, count)[: each * size].reshape(each, size)

        def one(s: State, given: Any) -> tuple[State, Array]:
            i, rows, key = given
            progress = (at * each + i) / (config.epochs * each)
            drops = (progress >= jnp.asarray(config.drops)).sum() if config.drops else 0
            rate = s.hypers.lr * 0.1**drops
            return update(config, model, s, key, (x[rows], y[rows], mask[rows]), rate, at == config.epochs - 1)

        return jax.lax.scan(one, s, (jnp.arange(each), order, jax.random.split(k_steps, each)))

    s, losses = jax.lax.scan(epoch, s, jnp.arange(config.epochs))
    return finished(config, model, s, x, y, mask), losses


def finished(config: Config, model: Model, s: State, x: Array, y: Array, mask: Array) -> State:
    """The end of a task, where EWC takes its Fisher information and weights."""
    if config.method == "ewc":
        count, size = len(y), config.batch_size
        rows = jnp.arange(-(-count // size) * size)
        inside = (rows < count).reshape(-1, size)
        rows = jnp.minimum(rows, count - 1).reshape(-1, size)

        def block(total: Any, given: Any) -> tuple[Any, None]:
            rows, inside = given
            grads = example_gradients(model, s, x[rows], y[rows])
            counts = (inside & mask[rows]).astype(jnp.float32)
            return jax.tree.map(lambda t, g: t + jnp.tensordot(counts, jnp.square(g), 1), total, grads), None

        total, _ = jax.lax.scan(block, jax.tree.map(jnp.zeros_like, s.params), (rows, inside))
        mean = jax.tree.map(lambda t: t / jnp.maximum(mask.sum(), 1), total)
        fisher = jax.tree.map(lambda old, new: s.hypers.decay * old + new, s.anchor[1], mean)
        s = s._replace(anchor=(jax.tree.map(jnp.copy, s.params), fisher))
    return s._replace(step=s.step + 1)
