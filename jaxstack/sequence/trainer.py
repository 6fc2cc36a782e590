"""Training of sequence models on a task: AdamW, warm-up and cosine, accumulation, bfloat16, sharding over devices.

Every step draws fresh examples on the device (or takes batches from a source, `takes_batch`), those of a task that
reads from arrays, such as text, from arguments of the program; the loss is the mean over
scored positions, cross entropy in nats or squared error. Parameters and the loss stay float32. Decoupled weight decay
(Loshchilov and Hutter, 2019) applies to linear weights and embeddings alone, see model.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxstack.core import config as configs
from jaxstack.core import options as texts
from jaxstack.core.config import require, require_at_least, require_positive, require_unit
from jaxstack.core.errors import UserError, unknown
from jaxstack.core.learner import Key, Learner, Metrics, as_hypers
from jaxstack.core.metrics import Mean
from jaxstack.core.registry import Registry
from jaxstack.data.sources import WholeData
from jaxstack.nn import optimisers
from jaxstack.sequence import parallel, tasks
from jaxstack.sequence.model import SequenceModel, cast, check_tokens, decay_mask, reinitialise
from jaxstack.sequence.tasks import Batch, Task


class Hypers(NamedTuple):
    """Numeric hyperparameters: traced, so a sweep over them compiles once."""

    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine."""
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    b1: float = 0.9
    b2: float = 0.98


@dataclass(frozen=True)
class Config(configs.Config):
    """What a sequence model's training can set."""

    task: str = "mqar"
    """See `jaxstack.sequence.tasks.TASKS`."""
    task_args: tuple[str, ...] = ()
    """Options of the task, each `name=value`."""
    mixers: tuple[str, ...] = ("kla",)
    """Mixers by name: one for all blocks, or one per block."""
    mixer_args: tuple[str, ...] = ()
    """Options of the mixers, each `option=value` for all or `mixer.option=value` for those of one name."""
    depth: int = 2
    """Number of blocks."""
    features: int = 64
    """Width D."""
    mlp_ratio: float = 8 / 3
    """Hidden width of the MLP over D; 0 leaves it out."""
    logit_cap: float = 0.0
    init_std: float = 0.0
    """Deviation of all linear weights and embeddings at the start (0.02 in Shaj et al.); 0: each layer's own choice."""
    batch_size: int = 64
    accumulate: int = 1
    """Parts a batch is computed in, one after another; the result does not depend on it."""
    num_updates: int = 1000
    warmup: float = 0.1
    """Share of the updates in which the learning rate rises linearly."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and linear weights in the forward and backward pass; scans stay float32."""
    train_examples: int = 0
    """Size of a fixed training set; 0 draws fresh examples for ever."""
    takes_batch: bool = False
    """Batches come from the runner's data source instead of the task."""
    eval_examples: int = 512
    eval_lengths: tuple[int, ...] = ()
    """Further lengths at which the trained model is evaluated."""
    data_parallel: int = 1
    """Devices that share a batch's rows."""
    sequence_parallel: int = 1
    """Devices that share a sequence's tokens."""
    hypers: Hypers = Hypers()

    def validate(self) -> None:
        require_at_least(self, 1, "depth", "features", "batch_size", "accumulate", "num_updates", "eval_examples")
        require_at_least(self, 1, "data_parallel", "sequence_parallel")
        require_at_least(self, 0, "mlp_ratio", "logit_cap", "init_std", "train_examples")
        require_at_least(self, 0, "hypers.lr", "hypers.min_lr", "hypers.weight_decay")
        require_positive(self, "hypers.max_grad_norm")
        require_unit(self, "warmup", "hypers.b1", "hypers.b2")
        require(self, "mixers", len(self.mixers) in (1, self.depth), f"one name, or depth={self.depth} names")
        rows = self.batch_size // self.accumulate
        require(self, "accumulate", self.batch_size % self.accumulate == 0, f"a divisor of {self.batch_size}")
        require(self, "data_parallel", rows % self.data_parallel == 0, f"a divisor of batch_size/accumulate={rows}")


MIXERS = Registry(
    "mixer",
    {
        "kla": "jaxstack.sequence.kla:KalmanLinearAttention",
        "mamba": "jaxstack.sequence.mamba:Mamba",
        "deltanet": "jaxstack.sequence.delta:DeltaNet",
        "gated_deltanet": "jaxstack.sequence.delta:GatedDeltaNet",
        "mingru": "jaxstack.sequence.mingru:MinGRU",
        "s5": "jaxstack.sequence.s5:S5",
        "attention": "jaxstack.sequence.attention:SoftmaxAttention",
        "linear_attention": "jaxstack.sequence.linear_attention:LinearAttention",
        "gla": "jaxstack.sequence.linear_attention:GatedLinearAttention",
        "mamba2": "jaxstack.sequence.mamba2:Mamba2",
    },
)
"""Name -> a mixer's class, see mixer.py."""


class State(NamedTuple):
    """Complete training state."""

    hypers: Hypers
    params: Any
    opt_state: optax.OptState
    key: Key
    step: Array
    total: Array
    """Updates after which the learning rate's schedule ends."""


def make_task(config: Config) -> Task:
    """The config's task. Raises `UserError`."""
    return tasks.make(config.task, **texts.parse(config.task_args, "task_args"))


def make_mixer(name: str, features: int, **options: Any) -> Any:
    """An unbound mixer of width `features`. Raises `UserError` for an unknown name or option."""
    cls = MIXERS.load(name)
    known = {k: hint for k, hint in configs.options_of(cls).items() if k not in ("parent", "name", "features")}
    return cls(features, **configs.check_options(options, known, f"mixer {name}"))


def make_model(config: Config, task: Task) -> SequenceModel:
    """An unbound model of the config for `task`. Raises `UserError` for an unknown mixer or option."""
    names = config.mixers * config.depth if len(config.mixers) == 1 else config.mixers
    options = texts.parse(config.mixer_args, "mixer_args")
    for option in options:
        owner = option.partition(".")[0]
        if "." in option and owner not in names:
            raise unknown("mixer in mixer_args", owner, names)

    def block(name: str) -> Any:
        shared = {k: v for k, v in options.items() if "." not in k}
        own = {k.partition(".")[2]: v for k, v in options.items() if k.partition(".")[0] == name and "." in k}
        mixer = make_mixer(name, config.features, **(shared | own))
        return mixer if mesh is None else parallel.shard_mixer(mixer, mesh)

    mesh = make_mesh(config)

    return SequenceModel(
        tuple(block(name) for name in names),
        task.num_tokens,
        task.num_targets,
        config.mlp_ratio,
        task.readout,
        config.logit_cap,
    )


def learning_rate(config: Config, hypers: Hypers, step: Any, total: Any = None) -> Array:
    """Linear warm-up to `lr`, then a cosine (Loshchilov and Hutter, 2017) to `min_lr` after `total` updates (default:
    the config's); step from 0."""
    total = config.num_updates if total is None else total
    return optimisers.learning_rate("cosine", step, total, hypers.lr, min_lr=hypers.min_lr, warmup=config.warmup)


def optimiser(config: Config, hypers: Hypers, total: Any = None) -> optax.GradientTransformation:
    """AdamW on clipped gradients, built inside each step from traced hyperparameters."""
    return optimisers.adamw(
        lambda step: learning_rate(config, hypers, step, total),
        b1=hypers.b1,
        b2=hypers.b2,
        weight_decay=hypers.weight_decay,
        max_grad_norm=hypers.max_grad_norm,
        mask=decay_mask,
    )


def forward(model: SequenceModel, config: Config, params: Any, tokens: Array) -> Array:
    """Outputs in float32 from float32 parameters, computed in the config's type."""
    if config.compute == "bfloat16":
        params = cast(params, jnp.bfloat16)
        tokens = tokens if model.num_tokens else tokens.astype(jnp.bfloat16)
    return model.apply({"params": params}, tokens)[0]  # pyright: ignore[reportReturnType]


def make_mesh(config: Config) -> jax.sharding.Mesh | None:
    """The devices of the config as a mesh; None for one device. Raises `UserError` if there are too few."""
    if config.data_parallel * config.sequence_parallel == 1:
        return None
    return parallel.make_mesh(config.data_parallel, config.sequence_parallel)


def _sharding(config: Config, task: Task) -> Callable[[Any, Batch], tuple[Any, Batch]]:
    """(params, batch) -> the same, laid out over the mesh: parameters everywhere, rows over `data`, tokens over
    `sequence`, where they divide evenly. XLA partitions what is computed from them."""
    mesh = make_mesh(config)
    if mesh is None:
        return lambda params, batch: (params, batch)
    if task.length % config.sequence_parallel:
        raise UserError(f"sequence_parallel={config.sequence_parallel}: expected a divisor of length={task.length}")

    def shard(params: Any, batch: Batch) -> tuple[Any, Batch]:
        rows, length = batch.mask.shape
        even = [name if n % mesh.shape[name] == 0 else None for n, name in ((rows, "data"), (length, "sequence"))]
        place = lambda *spec: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        constrain = lambda tree, to: jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, to), tree)
        return constrain(params, place()), constrain(batch, place(*even))

    return shard


def gradients(model: SequenceModel, config: Config, task: Task) -> Callable[[Any, Batch], tuple[Array, Any]]:
    """(params, batch) -> (mean loss over scored positions, its gradient), in `accumulate` parts."""
    shard = _sharding(config, task)

    def part(params: Any, batch: Batch) -> tuple[tuple[Array, Array], Any]:
        params, batch = shard(params, batch)

        def total(params: Any) -> tuple[Array, Array]:
            return tasks.loss_terms(forward(model, config, params, batch.tokens), batch)

        return jax.value_and_grad(total, has_aux=True)(params)

    def whole(params: Any, batch: Batch) -> tuple[Array, Any]:
        if config.accumulate == 1:
            (total, count), grads = part(params, batch)
        else:
            parts = jax.tree.map(lambda x: x.reshape(config.accumulate, -1, *x.shape[1:]), batch)
            zero = ((jnp.zeros(()), jnp.zeros(())), jax.tree.map(jnp.zeros_like, params))
            add = lambda sums, one: (jax.tree.map(jnp.add, sums, part(params, one)), None)
            ((total, count), grads), _ = jax.lax.scan(add, zero, parts)
        count = jnp.maximum(count, 1.0)
        return total / count, jax.tree.map(lambda g: g / count, grads)

    return whole


def evaluation(model: SequenceModel, config: Config, task: Task) -> Callable[..., Metrics]:
    """Loss, accuracy and perplexity on `eval_examples` test examples, at the task's length and at `eval_lengths`
    (name@length); (state, key) -> metrics or, for a task that reads, (state, key, its test data as a batch)."""

    shard = _sharding(config, task)

    def one(task: Task, params: Any, key: Key, data: Any) -> Metrics:
        def part(key: Key) -> tuple[Array, Array, Array]:
            weights, batch = shard(params, task.sample(key, rows, test=True, data=data))
            out = forward(model, config, weights, batch.tokens)
            total, count = tasks.loss_terms(out, batch)
            right = tasks.accuracy(out, batch) * count if task.num_targets else jnp.zeros(())
            return total, count, right

        rows = min(config.batch_size, config.eval_examples)
        total, count, right = jax.lax.map(part, jax.random.split(key, -(-config.eval_examples // rows)))
        loss = total.sum() / count.sum()
        metrics: Metrics = {"eval/loss": loss}
        if task.num_targets:
            metrics["eval/accuracy"] = right.sum() / count.sum()
            metrics["eval/perplexity"] = jnp.exp(loss)
        return metrics

    others = [configs.replace(task, length=n) for n in config.eval_lengths]

    def evaluate(state: State, key: Key, batch: Any = None) -> Metrics:
        data = None if batch is None else batch.data
        metrics = one(task, state.params, key, data)
        for other in others:
            found = one(other, state.params, jax.random.fold_in(key, other.length), data)
            metrics |= {f"{name}@{other.length}": value for name, value in found.items()}
        if batch is None:
            return metrics
        return {name: Mean(jnp.asarray(value), jnp.float32(1.0)) for name, value in metrics.items()}

    return evaluate


def check_batch(batch: Batch, task: Task) -> None:
    """Raise `UserError` unless tokens, and targets at scored positions, are of the task's vocabulary and classes (or
    finite where they are real numbers); on the host."""
    check_tokens(batch.tokens, task.num_tokens, what="data: tokens")
    check_tokens(batch.targets, task.num_targets, batch.mask, "data: targets")


def build(model: SequenceModel, task: Task, config: Config) -> Learner:
    """A learner for any model and task; of the config, what describes them is not used."""
    gradient = gradients(model, config, task)
    draw = tasks.finite(task, config.train_examples) if config.train_examples else task.sample
    example = jax.eval_shape(lambda: task.sample(jax.random.key(0), 1))

    def init(key: Key, hypers: Any = None) -> State:
        hypers = as_hypers(config.hypers if hypers is None else hypers)
        k_params, k_std, key = jax.random.split(key, 3)
        params = model.init(k_params, jnp.zeros(example.tokens.shape, example.tokens.dtype))["params"]
        if config.init_std:
            params = reinitialise(params, k_std, config.init_std)
        opt_state = optimiser(config, hypers).init(params)
        return State(hypers, params, opt_state, key, jnp.int32(0), jnp.int32(config.num_updates))

    def step(state: State, batch: Any = None) -> tuple[State, Metrics]:
        """`batch` is one of the runner's data, or what the task reads."""
        key, k_data = jax.random.split(state.key)
        batch = batch if isinstance(batch, Batch) else draw(k_data, config.batch_size, data=batch)
        loss, grads = gradient(state.params, batch)
        updates, opt_state = optimiser(config, state.hypers, state.total).update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics: Metrics = {
            "loss/train": loss,
            "train/grad_norm": optax.global_norm(grads),
            "train/lr": learning_rate(config, state.hypers, state.step, state.total),
        }
        return state._replace(params=params, opt_state=opt_state, key=key, step=state.step + 1), metrics

    own = task.reads and not config.takes_batch
    return Learner(
        init=init,
        step=step,
        hypers=config.hypers,
        config=config,
        name="sequence",
        samples_per_step=config.batch_size * task.length,
        evaluate=evaluation(model, config, task),
        takes_batch=config.takes_batch,
        num_steps=config.num_updates,
        with_length=lambda s, steps: s._replace(total=jnp.full_like(s.total, steps)),
        objective=("eval/accuracy", "max") if task.num_targets else ("eval/loss", "min"),
        source=(lambda _: WholeData(task.data(False))) if own else None,
        eval_source=(lambda _: WholeData(task.data(True), batches=1)) if task.reads else None,
        check_data=None if own else lambda batch: check_batch(batch, task),
    )


def sequence(config: Config = Config(), /, **changes: Any) -> Learner:
    """The learner of a config or of field values, hyperparameters among them. Raises `UserError`."""
    config = configs.replace(config, **changes) if changes else config
    task = make_task(config)
    return build(make_model(config, task), task, config)
