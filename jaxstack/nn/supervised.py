"""Supervised learning of any flax linen module: BatchNorm statistics, dropout, averages of weights and statistics.

A training batch is a pair (inputs [B, ...], targets [B, ...]); `loss` and `metrics` tell their values for each example.
All settings that are numbers are traced; what holds weights is part of the state, so nothing large becomes a constant
of a program, a teacher's weights included.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxstack.core.devices import rows_over
from jaxstack.core.errors import UserError
from jaxstack.core.learner import Key, Learner, Metrics, as_hypers
from jaxstack.core.metrics import mean
from jaxstack.core.source import Batch, Source
from jaxstack.nn import optimisers


class Hypers(NamedTuple):
    """Numeric hyperparameters: traced, so a sweep over them compiles once."""

    lr: float = 0.1
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of a cosine."""
    weight_decay: float = 5e-4
    momentum: float = 0.9
    """Of SGD."""
    b1: float = 0.9
    b2: float = 0.999
    max_grad_norm: float = 1.0
    """Where gradients are clipped, if they are."""
    label_smoothing: float = 0.0
    ema_decay: float = 0.999
    """Of the averages of weights and statistics, if they are kept."""
    temperature: float = 4.0
    """Of distillation."""
    distil_weight: float = 0.9
    """Share of the teacher in the loss of distillation."""


@runtime_checkable
class Loss(Protocol):
    """(outputs, targets, hypers) -> the value of each example."""

    def __call__(self, outputs: Any, targets: Any, hypers: Any, /) -> Array:
        """Compare outputs with targets.

        Args:
            outputs: what the model gives, [B, ...].
            targets: [B, ...]; with a teacher the pair (targets, the teacher's outputs).
            hypers: the state's hyperparameters.

        Returns:
            Values [B].
        """
        ...


class Model(NamedTuple):
    """How a module is called: pure functions of its variables, `{"params": ..., "batch_stats": ..., ...}`."""

    init: Callable[[Key], Any]
    """key -> variables."""
    train: Callable[[Any, Any, Key], tuple[Any, Any]]
    """(variables, inputs, key of dropout) -> (outputs, the changed variables beside the parameters)."""
    apply: Callable[[Any, Any], Any]
    """(variables, inputs) -> outputs, with the statistics that are stored."""


def linen(
    module: nn.Module,
    example: Any,
    *,
    flags: Callable[[bool], dict[str, Any]] = lambda train: {"train": train},
    prepare: Callable[[Any], Any] = lambda x: x,
) -> Model:
    """A flax linen module as a `Model`.

    Args:
        module: any unbound module.
        example: inputs [1, ...] of the shape and type that it is trained with.
        flags: whether it trains -> keyword arguments of its call, `train=` by default; `lambda train: {}` for a module
            that knows no difference, `lambda train: {"deterministic": not train}` for another name.
        prepare: inputs -> what the module is given, e.g. bytes as floats; runs inside the program.
    """

    def init(key: Key) -> Any:
        return module.init({"params": key}, prepare(jnp.asarray(example)), **flags(False))

    def train(variables: Any, inputs: Any, key: Key) -> tuple[Any, Any]:
        others = [name for name in variables if name != "params"]
        return module.apply(variables, prepare(inputs), rngs={"dropout": key}, mutable=others, **flags(True))

    def apply(variables: Any, inputs: Any) -> Any:
        return module.apply(variables, prepare(inputs), **flags(False))

    return Model(init, train, apply)


class State(NamedTuple):
    """Complete training state."""

    hypers: Any
    params: Any
    stats: Any
    """Variables beside the parameters, such as BatchNorm's `batch_stats`."""
    ema: Any
    """Averages of parameters and of statistics, as variables; empty where none are kept."""
    teacher: Any
    """Variables of the teacher; empty without one."""
    opt_state: optax.OptState
    key: Key
    step: Array
    total: Array
    """Steps after which the learning rate's schedule ends."""


def variables(state: State) -> Any:
    """What a trained model is applied with: the averages where they are kept, else the last weights and statistics."""
    return state.ema or {"params": state.params, **state.stats}


def with_variables(learner: Learner, variables: Any, step: int, hypers: Any = None) -> State:
    """A state of a learner of `supervised` with given weights and statistics, as if after `step` steps.

    Args:
        learner: of the network that the variables are of.
        variables: {"params": ..., "batch_stats": ...}.
        step: steps that lie behind it; schedules end there.
        hypers: default: the learner's.
    """
    state = learner.init(jax.random.key(0), learner.hypers if hypers is None else hypers)
    own = jax.tree.map(jnp.asarray, dict(variables))
    params = own.pop("params")
    kept = jax.tree.map(jnp.copy, {"params": params, **own}) if state.ema else state.ema
    # arrays of their own: buffers of a state are donated one by one
    done, total = (jnp.array(step, jnp.int32) for _ in range(2))
    return state._replace(params=params, stats=own, ema=kept, step=done, total=total)


class Optimiser(NamedTuple):
    """What of the optimisation is no number that can be swept in one program."""

    kind: str = "sgd"
    """sgd (momentum and decay as PyTorch's), adamw, or adam (decay in the gradient, as PyTorch's)."""
    schedule: optimisers.Schedule = "cosine"
    warmup: float = 0.0
    """Share of the steps in which the learning rate rises linearly."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Shares of the steps at which the schedule "steps" divides the learning rate by ten."""
    nesterov: bool = False
    clip: bool = False
    """Whether gradients are clipped at `max_grad_norm`."""
    decay: Callable[[Any], Any] | None = optimisers.weights_only
    """Parameters -> the tree of those that decay; None: all."""
    factors: Callable[[Any], Any] | None = None
    """Parameters -> a tree of what the weight decay of each is multiplied by, in place of `decay`."""
    cycles: int = 4
    """Of the schedule "restarts"."""

    def rate(self, hypers: Any, step: Any, num_steps: Any) -> Array:
        """Learning rate of a step, from 0."""
        options = dict(min_lr=hypers.min_lr, warmup=self.warmup, milestones=self.milestones)
        options |= dict(cycles=self.cycles)
        return optimisers.learning_rate(self.schedule, step, num_steps, hypers.lr, **options)

    def make(self, hypers: Any, num_steps: Any) -> optax.GradientTransformation:
        """The transformation. Raises `UserError` for an unknown kind."""
        rate = lambda step: self.rate(hypers, step, num_steps)
        shared = dict(weight_decay=hypers.weight_decay, mask=self.decay, factors=self.factors)
        shared |= dict(max_grad_norm=hypers.max_grad_norm if self.clip else None)
        if self.kind == "sgd":
            return optimisers.sgd(rate, momentum=hypers.momentum, nesterov=self.nesterov, **shared)
        if self.kind in ("adam", "adamw"):
            make = optimisers.adam if self.kind == "adam" else optimisers.adamw
            return make(rate, b1=hypers.b1, b2=hypers.b2, **shared)
        raise UserError(f"optimiser={self.kind!r}: expected 'sgd', 'adam' or 'adamw'")


def supervised(
    model: Model,
    loss: Loss,
    metrics: Mapping[str, Loss] | None = None,
    optimiser: Optimiser = Optimiser(),
    *,
    num_steps: int,
    hypers: Any = Hypers(),
    ema: bool = False,
    ema_from: float = 0.0,
    teacher: Callable[[Any, Any], Any] | None = None,
    teachers: Any = None,
    start: Callable[[Any, Any], Any] | None = None,
    reduce: Callable[[Array, Any], Array] = lambda values, hypers: values.mean(),
    data_parallel: int = 1,
    config: Any = None,
    name: str = "supervised",
    batch_size: int = 1,
    source: Callable[[Any], Source] | None = None,
    eval_source: Callable[[Any], Source] | None = None,
    objective: tuple[str, str] = ("eval/loss", "min"),
) -> Learner:
    """A learner that minimises the mean of `loss` over batches (inputs, targets).

    Args:
        model: e.g. `linen(module, example)`.
        loss: value of each example in training and, as `eval/loss`, in evaluation.
        metrics: further values of each example by name: means in training (`train/NAME`) and over the whole split
            (`eval/NAME`).
        optimiser: kind, schedule, clipping.
        num_steps: steps of a whole run, over which the schedule reaches.
        hypers: default hyperparameters, with the fields that `optimiser`, `loss` and `ema` read.
        ema: keep averages of weights and statistics, which evaluation and prediction then use.
        ema_from: share of the run's steps before which the average is the last weights.
        teacher: (variables, inputs) -> outputs, e.g. `Model.apply`, for a loss of distillation.
        teachers: the teacher's variables, leaves [S, ...], one for each seed; they are part of the state.
        start: (fresh variables, the teacher's variables) -> those that training begins with, e.g. with parts that the
            student inherits; without a teacher it is given ().
        reduce: (values [B], hypers) -> what a step minimises; default: their mean.
        data_parallel: devices that share the rows of a batch.
        config: the method's config, given to the sources.
        name: of the method.
        batch_size: examples per step, the unit of progress.
        source: config -> training batches; None: the runner is given them.
        eval_source: config -> `Batch`es of a split.
        objective: see `Learner`.

    Raises:
        UserError: for a teacher without variables, an unknown optimiser, or more devices than there are.
    """
    if (teacher is None) != (teachers is None):
        raise UserError("teacher, teachers: expected both, the function and its variables [S, ...], or neither")
    metrics = {} if metrics is None else dict(metrics)
    optimiser.make(hypers, num_steps)
    spread = rows_over(data_parallel)

    def init(key: Key, given: Any, taught: Any = ()) -> State:
        given = as_hypers(given)
        k_params, key = jax.random.split(key)
        fresh = model.init(k_params)
        fresh = fresh if start is None else start(fresh, taught)
        params = fresh["params"]
        stats = {k: v for k, v in fresh.items() if k != "params"}
        # copies: buffers of a state are donated one by one
        kept = jax.tree.map(jnp.copy, {"params": params, **stats}) if ema else {}
        opt_state = optimiser.make(given, num_steps).init(params)
        return State(given, params, stats, kept, taught, opt_state, key, jnp.int32(0), jnp.int32(num_steps))

    def wanted(s: State, inputs: Any, targets: Any) -> Any:
        return targets if teacher is None else (targets, jax.lax.stop_gradient(teacher(s.teacher, inputs)))

    def step(s: State, batch: Any) -> tuple[State, Metrics]:
        key, k_drop = jax.random.split(s.key)
        inputs, targets = spread(batch)
        targets = wanted(s, inputs, targets)

        def total(params: Any) -> tuple[Array, tuple[Any, Any, Array]]:
            outputs, stats = model.train({"params": params, **s.stats}, inputs, k_drop)
            values = loss(outputs, targets, s.hypers)
            return reduce(values, s.hypers), (outputs, stats, values.mean())

        (_, (outputs, stats, value)), grads = jax.value_and_grad(total, has_aux=True)(s.params)
        updates, opt_state = optimiser.make(s.hypers, s.total).update(grads, s.opt_state, s.params)
        params = optax.apply_updates(s.params, updates)
        stats = {**s.stats, **stats}
        average = s.ema
        if ema:
            d = s.hypers.ema_decay
            if ema_from:
                d = jnp.where(s.step < jnp.round(ema_from * s.total), 0.0, d)
            # indices and counts have no average
            one = lambda a, x: d * a + (1.0 - d) * x if jnp.issubdtype(x.dtype, jnp.inexact) else x
            average = jax.tree.map(one, s.ema, {"params": params, **stats})
        found = {f"train/{k}": mean(f(outputs, targets, s.hypers)) for k, f in metrics.items()}
        rate = optimiser.rate(s.hypers, s.step, s.total)
        found |= {"loss/train": value, "train/lr": rate, "train/grad_norm": optax.global_norm(grads)}
        return State(s.hypers, params, stats, average, s.teacher, opt_state, key, s.step + 1, s.total), found

    def evaluate(s: State, key: Key, batch: Batch) -> Metrics:
        inputs, targets = batch.data
        outputs, targets = model.apply(variables(s), inputs), wanted(s, inputs, targets)
        values = {"loss": loss, **metrics}
        # chosen, not multiplied: a row that fills the batch may be anything
        return {f"eval/{k}": mean(f(outputs, targets, s.hypers), batch.mask > 0) for k, f in values.items()}

    return Learner(
        init=init,
        step=step,
        hypers=hypers,
        config=config,
        name=name,
        samples_per_step=batch_size,
        evaluate=None if eval_source is None else evaluate,
        takes_batch=True,
        num_steps=num_steps,
        with_length=lambda s, steps: s._replace(total=jnp.full_like(s.total, steps)),
        objective=objective,
        source=source,
        eval_source=eval_source,
        predict=lambda s, inputs: model.apply(variables(s), inputs),
        given=teachers,
    )


def cross_entropy(logits: Array, labels: Array, hypers: Any) -> Array:
    """Softmax cross entropy in nats [B] of logits [B, C] and labels [B], or shares of the classes [B, C], of which
    `label_smoothing` goes evenly to all C classes (Szegedy et al., 2016)."""
    logp = jax.nn.log_softmax(logits)
    if labels.ndim == 2:
        own = (labels * logp).sum(-1)
    else:
        own = jnp.take_along_axis(logp, labels[:, None].astype(jnp.int32), 1)[:, 0]
    return -(1.0 - hypers.label_smoothing) * own - hypers.label_smoothing * logp.mean(-1)


def accuracy(logits: Array, labels: Array, hypers: Any) -> Array:
    """1 where the largest of logits [B, C] is the label [B], or the largest of shares [B, C]; labels may come with a
    teacher's outputs."""
    labels = labels[0] if isinstance(labels, tuple) else labels
    labels = labels.argmax(-1) if labels.ndim == 2 else labels
    return (logits.argmax(-1) == labels).astype(jnp.float32)


def squared_error(outputs: Array, targets: Array, hypers: Any) -> Array:
    """Mean squared error [B] over all axes but the first."""
    return jnp.square(outputs - targets).reshape(len(outputs), -1).mean(-1)


def distillation(logits: Array, targets: tuple[Array, Array], hypers: Any) -> Array:
    """(1 - a) CE(labels) + a T^2 KL(teacher || student) at temperature T, a = `distil_weight` (Hinton et al., 2015).

    Both sides of the divergence stay logarithms: a softmax that underflows would give NaN gradients.

    Args:
        logits: of the student, [B, C].
        targets: labels [B] and the teacher's logits [B, C].
        hypers: with `temperature`, `distil_weight` and `label_smoothing`.
    """
    labels, teacher = targets
    t, a = hypers.temperature, hypers.distil_weight
    p, q = jax.nn.log_softmax(teacher / t), jax.nn.log_softmax(logits / t)
    divergence = (jnp.exp(p) * (p - q)).sum(-1)
    return (1.0 - a) * cross_entropy(logits, labels, hypers) + a * t**2 * divergence
