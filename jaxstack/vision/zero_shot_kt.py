"""Zero-shot knowledge transfer via adversarial belief matching: a student is taught by a teacher's weights alone.

Micaelli and Storkey, NeurIPS 2019 (arXiv 1905.09768). A generator searches for images on which student and teacher
disagree, and the student learns to agree on them; no data are seen. `zskt_round` is one pseudo batch,
`zero_shot` the learner that repeats it. Without a generator the images are noise: the baseline of noise distillation.
`transition_curves` compare two networks near decision boundaries. What learns with some images is in `few_shot_kt`.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array

from jaxstack.core.errors import UserError
from jaxstack.core.learner import Key, Learner, Metrics, as_hypers
from jaxstack.core.metrics import mean
from jaxstack.core.source import Batch, Source
from jaxstack.nn.attention_transfer import Outputs, attention_transfer_loss
from jaxstack.nn.conv import Conv
from jaxstack.nn.optimisers import adamw, learning_rate


class Net(NamedTuple):
    """A network as pure functions of its variables, `{"params": ..., "batch_stats": ...}`."""

    init: Callable[[Key], Any]
    """key -> variables."""
    apply: Callable[[Any, Array, bool], tuple[Outputs, Any]]
    """(variables, inputs [B, ...], whether BatchNorm takes and keeps the batch's statistics) -> (outputs, the
    collections beside the parameters)."""


def of_module(module: nn.Module, image: tuple[int, int, int]) -> Net:
    """A network of `jaxstack.nn.vision` as a `Net`.

    Args:
        module: unbound, called as `module(x, train, taps=True)` -> `Outputs`.
        image: rows, columns and channels of what it is given.
    """

    def apply(variables: Any, x: Array, train: bool) -> tuple[Outputs, Any]:
        others = {k: v for k, v in variables.items() if k != "params"}
        if not train:
            return module.apply(variables, x, False, taps=True), others  # pyright: ignore[reportReturnType]
        return module.apply(variables, x, True, taps=True, mutable=list(others))  # pyright: ignore[reportReturnType]

    return Net(lambda key: module.init(key, jnp.zeros((1, *image))), apply)


def shapes(net: Net, image: tuple[int, int, int]) -> Outputs:
    """Shapes of a network's outputs for two images."""
    x = jax.ShapeDtypeStruct((2, *image), jnp.float32)
    start = jax.eval_shape(net.init, jax.random.key(0))
    return jax.eval_shape(lambda v, x: net.apply(v, x, False)[0], start, x)


# Losses


def belief_divergence(
    logits_t: Array,
    logits_s: Array,
    tau: Any = 1.0,
    reduction: Literal["element_mean", "batch_mean", "none"] = "element_mean",
) -> Array:
    """Forward divergence KL(p || q) of the teacher's softmax p from the student's q, in nats (the paper's D_KL).

    Both sides stay logarithms: the generator needs the gradient by the teacher's logits, which with a softmax that
    underflows to zero would be NaN.

    Args:
        logits_t: of the teacher, [B, C].
        logits_s: of the student, [B, C].
        tau: temperature of both.
        reduction: "element_mean" averages over images and classes, as the released code does and its weight of the
            attention assumes; "batch_mean" over images; "none" gives [B].
    """
    p, q = jax.nn.log_softmax(logits_t / tau), jax.nn.log_softmax(logits_s / tau)
    each = optax.losses.kl_divergence_with_log_targets(q, p)
    if reduction == "none":
        return each
    if reduction == "batch_mean":
        return each.mean()
    if reduction == "element_mean":
        return each.mean() / logits_t.shape[-1]
    raise UserError(f"reduction={reduction!r}: expected 'element_mean', 'batch_mean' or 'none'")


def generator_loss(logits_t: Array, logits_s: Array, tau: Any = 1.0) -> Array:
    """L_G = -D(p || q): what the generator minimises."""
    return -belief_divergence(logits_t, logits_s, tau)


def student_loss(taught: Outputs, outputs: Outputs, tau: Any = 1.0, beta: Any = 250.0) -> Array:
    """L_S = D(p || q) + beta times the sum over stages of the attentions' distance.

    Args:
        taught: the teacher's outputs.
        outputs: the student's.
        tau: temperature.
        beta: weight of the attention, on the scale of `belief_divergence` averaged over classes.
    """
    divergence = belief_divergence(taught[0], outputs[0], tau)
    return divergence + beta * attention_transfer_loss(taught[1], outputs[1])


# The generator


class ZeroShotGenerator(nn.Module):
    """The paper's generator: noise [B, z] -> images [B, H, W, C] in the space of normalised pixels.

    There is no bound at its end: the last BatchNorm keeps each channel's mean and deviation near those of the data.
    1,051,145 parameters for 32x32 pixels in three channels.
    """

    image: tuple[int, int, int] = (32, 32, 3)
    """Rows, columns and channels; noise is first laid out on a quarter of the rows and columns, rounded up."""
    widths: tuple[int, int, int] = (128, 128, 64)
    """Channels of the three layers before the image."""

    @nn.compact
    def __call__(self, z: Array, train: bool = True) -> Array:
        """Make an image of each row of noise; with `train` BatchNorm takes and keeps the batch's statistics."""
        rows, columns, channels = self.image
        half, quarter = (-(-rows // 2), -(-columns // 2)), (-(-rows // 4), -(-columns // 4))
        # PyTorch's default: uniform in +-1/sqrt(fan in)
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        norm = lambda x: nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5)(x)
        conv = lambda width, x: Conv(width, padding=1, kernel_init=init)(x)
        x = nn.Dense(self.widths[0] * math.prod(quarter), kernel_init=init)(z)
        x = norm(x.reshape(-1, *quarter, self.widths[0]))
        for width, size in zip(self.widths[1:], (half, (rows, columns))):
            x = nn.leaky_relu(norm(conv(width, nearest(x, size))), 0.2)
        return norm(conv(channels, x))


def nearest(x: Array, size: tuple[int, int]) -> Array:
    """Images [B, H, W, C] in another size, each pixel that of the nearest one at its upper left."""
    for axis, new in zip((1, 2), size):
        old = x.shape[axis]
        x = jnp.repeat(x, 2, axis) if new == 2 * old else jnp.take(x, np.arange(new) * old // new, axis)
    return x


# Adversarial belief matching


class Hypers(NamedTuple):
    """Numeric hyperparameters: traced, so a sweep over them compiles once."""

    lr: float = 2e-3
    """The student's, of Adam; a cosine to zero over all rounds, as the generator's."""
    generator_lr: float = 1e-3
    tau: float = 1.0
    beta: float = 250.0
    """Weight of the attention."""
    max_grad_norm: float = 5.0
    """Where the gradients of both are clipped."""


class Setup(NamedTuple):
    """Networks and counts of a transfer; what decides shapes."""

    teacher: Net
    student: Net
    image: tuple[int, int, int]
    """Rows, columns, channels."""
    generator: ZeroShotGenerator | None
    """None: the images are standard normal noise."""
    batch_size: int = 128
    z_dim: int = 100
    generator_steps: int = 1
    """Per round, n_G."""
    student_steps: int = 10
    """Per round, n_S, all on the same images."""


class State(NamedTuple):
    """Complete training state."""

    hypers: Any
    params: Any
    """The student's."""
    stats: Any
    """The student's variables beside the parameters."""
    opt_state: Any
    generator: Any
    """Variables of the generator; empty for noise."""
    generator_opt: Any
    teacher: Any
    """Variables, which never change."""
    key: Key
    step: Array
    """Rounds done."""
    total: Array
    """Rounds after which the learning rates reach zero."""


def student_variables(state: State) -> Any:
    """What the trained student is applied with."""
    return {"params": state.params, **state.stats}


def optimiser(rate: Any, hypers: Any) -> optax.GradientTransformation:
    """Adam on clipped gradients with the learning rate of a round."""
    return adamw(lambda count: rate, max_grad_norm=hypers.max_grad_norm)


def begin(key: Key, hypers: Any, teacher: Any, setup: Setup, num_rounds: int) -> State:
    """The state before the first round, with fresh student and generator."""
    hypers = as_hypers(hypers)
    k_student, k_generator, key = jax.random.split(key, 3)
    student, generator = setup.student.init(k_student), {}
    if setup.generator is not None:
        generator = setup.generator.init(k_generator, jnp.zeros((2, setup.z_dim)))
    start = lambda params, rate: optimiser(rate, hypers).init(params)
    return State(
        hypers,
        student["params"],
        {k: v for k, v in student.items() if k != "params"},
        start(student["params"], hypers.lr),
        generator,
        start(generator["params"], hypers.generator_lr) if generator else (),
        teacher,
        key,
        jnp.int32(0),
        jnp.int32(num_rounds),
    )


def generated(generator: ZeroShotGenerator, params: Any, variables: Any, z: Array) -> tuple[Array, Any]:
    """(images, collections beside the parameters) of a generator that takes the batch's statistics, as it always
    does."""
    return generator.apply({**variables, "params": params}, z, True, mutable=["batch_stats"])


def adversarial_step(s: State, z: Array, setup: Setup) -> tuple[State, Metrics]:
    """One step of the generator on noise z [B, z_dim]; the student's BatchNorm sees its images too."""
    assert setup.generator is not None
    generator = setup.generator

    def loss(params: Any) -> tuple[Array, tuple[Any, Any]]:
        x, generator_stats = generated(generator, params, s.generator, z)
        (logits_t, _), _ = setup.teacher.apply(s.teacher, x, False)
        (logits_s, _), stats = setup.student.apply(student_variables(s), x, True)
        return generator_loss(logits_t, logits_s, s.hypers.tau), (generator_stats, stats)

    params = s.generator["params"]
    (value, (generator_stats, stats)), grads = jax.value_and_grad(loss, has_aux=True)(params)
    rate = learning_rate("cosine", s.step, s.total, s.hypers.generator_lr)
    updates, opt = optimiser(rate, s.hypers).update(grads, s.generator_opt, params)
    norm = optax.global_norm(grads)
    found: Metrics = {"loss/generator": value, "train/generator_grad_norm": norm}
    found |= {"check/gradients of the generator": jnp.isfinite(norm)}
    generator_variables = {**s.generator, **generator_stats, "params": optax.apply_updates(params, updates)}
    return s._replace(generator=generator_variables, generator_opt=opt, stats=stats), found


def student_phase(s: State, x: Array, setup: Setup) -> tuple[State, Metrics]:
    """n_S steps of the student on images x [B, H, W, C]; the teacher is asked once."""
    x = lax.stop_gradient(x)
    taught, _ = setup.teacher.apply(s.teacher, x, False)
    rate = learning_rate("cosine", s.step, s.total, s.hypers.lr)

    def update(carry: tuple[Any, Any, Any], _: None) -> tuple[tuple[Any, Any, Any], Array]:
        params, stats, opt = carry

        def loss(params: Any) -> tuple[Array, Any]:
            outputs, stats_ = setup.student.apply({"params": params, **stats}, x, True)
            return student_loss(taught, outputs, s.hypers.tau, s.hypers.beta), stats_

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt = optimiser(rate, s.hypers).update(grads, opt, params)
        return (optax.apply_updates(params, updates), stats, opt), value

    start = (s.params, s.stats, s.opt_state)
    (params, stats, opt), values = lax.scan(update, start, None, setup.student_steps)
    found: Metrics = {"loss/student": values[-1], "train/student_lr": rate}
    found |= {"train/teacher_confidence": jax.nn.softmax(taught[0]).max(-1).mean()}
    return s._replace(params=params, stats=stats, opt_state=opt), found


def zskt_round(s: State, key: Key, setup: Setup) -> tuple[State, Metrics]:
    """One pseudo batch: generator steps, then student steps on the images of the same noise.

    Args:
        s: the state.
        key: of the noise.
        setup: networks and counts.

    Returns:
        (state, metrics) with one more round done.
    """
    found: Metrics = {}
    if setup.generator is None:
        x = jax.random.normal(key, (setup.batch_size, *setup.image))
    else:
        z = jax.random.normal(key, (setup.batch_size, setup.z_dim))
        for _ in range(setup.generator_steps):
            s, found = adversarial_step(s, z, setup)
        x, stats = generated(setup.generator, s.generator["params"], s.generator, z)
        s = s._replace(generator={**s.generator, **stats})
    s, learned = student_phase(s, x, setup)
    return s._replace(step=s.step + 1), {**found, **learned}


def zero_shot(
    setup: Setup,
    teachers: Any,
    num_rounds: int,
    hypers: Hypers = Hypers(),
    eval_source: Callable[[Any], Source] | None = None,
    name: str = "zero-shot-kt",
) -> Learner:
    """The learner of a student without data.

    Args:
        setup: networks and counts.
        teachers: the teacher's variables, leaves [S, ...], one row per seed.
        num_rounds: pseudo batches of a whole run; the paper has 80,000 for CIFAR-10.
        hypers: default hyperparameters.
        eval_source: config -> `Batch`es (images as the networks take them, labels). There are no data to choose by:
            the last state counts, whatever is measured.
        name: of the learner.

    Raises:
        UserError: for counts below 1, or networks whose stages differ in size.
    """
    for field, value in (
        ("num_rounds", num_rounds),
        ("batch_size", setup.batch_size),
        ("z_dim", setup.z_dim),
        ("generator_steps", setup.generator_steps),
        ("student_steps", setup.student_steps),
    ):
        if value < 1:
            raise UserError(f"{field}={value}: expected at least 1")
    require_same_stages(setup)

    def step(s: State) -> tuple[State, Metrics]:
        key, k_noise = jax.random.split(s.key)
        return zskt_round(s._replace(key=key), k_noise, setup)

    def evaluate(s: State, key: Key, batch: Batch) -> Metrics:
        x, labels = batch.data
        answer = lambda net, variables, train: net.apply(variables, x, train)[0][0].argmax(-1)
        taught = answer(setup.teacher, s.teacher, False)
        learned = answer(setup.student, student_variables(s), False)
        batch_wise = answer(setup.student, student_variables(s), True)
        share = lambda hits: mean(hits.astype(jnp.float32), batch.mask > 0)
        return {
            "eval/accuracy": share(learned == labels),
            "eval/accuracy_batch_statistics": share(batch_wise == labels),
            "eval/agreement": share(learned == taught),
            "eval/teacher_accuracy": share(taught == labels),
        }

    return Learner(
        init=lambda key, hypers, teacher: begin(key, hypers, teacher, setup, num_rounds),
        step=step,
        hypers=hypers,
        name=name,
        samples_per_step=setup.batch_size,
        evaluate=None if eval_source is None else evaluate,
        num_steps=num_rounds,
        with_length=lambda s, steps: s._replace(total=jnp.full_like(s.total, steps)),
        objective=("loss/student", "min"),
        eval_source=eval_source,
        predict=lambda s, x: setup.student.apply(student_variables(s), x, False)[0][0],
        given=teachers,
    )


def require_same_stages(setup: Setup) -> None:
    """Raise `UserError` unless both networks take the images and their stages have the same sizes."""
    taught, learned = shapes(setup.teacher, setup.image), shapes(setup.student, setup.image)
    jax.eval_shape(attention_transfer_loss, taught[1], learned[1])
    if taught[0].shape != learned[0].shape:
        raise UserError(f"student: found {learned[0].shape[1]} classes, expected the teacher's {taught[0].shape[1]}")


# How well two networks agree near decision boundaries


def other_classes(labels: Any, classes: int) -> Array:
    """The classes [N, C - 1] that are not the label [N], from the next one on, cyclically."""
    return (jnp.asarray(labels)[:, None] + jnp.arange(1, classes)) % classes


def matching(logits_a: Any, logits_b: Any, count: int, seed: int = 0) -> np.ndarray:
    """Places [count] of images that both networks put into the same class, drawn by seed without replacement.

    Raises:
        UserError: where there are fewer.
    """
    same = np.flatnonzero(np.asarray(logits_a).argmax(-1) == np.asarray(logits_b).argmax(-1))
    if len(same) < count:
        raise UserError(f"images: found {len(same)} on which both networks agree, expected {count}")
    return np.random.default_rng(seed).choice(same, count, replace=False)


def transition_curves(
    apply_a: Callable[[Array], Array],
    apply_b: Callable[[Array], Array],
    x: Array,
    targets: Array,
    steps: int = 100,
    step_size: Any = 1.0,
) -> tuple[Array, Array]:
    """What both networks believe while images walk from their class to another one.

    Each image takes gradient steps that lower the first network's cross entropy with a target class.

    Args:
        apply_a: images [N, ...] -> logits [N, C] of the network whose gradient is followed, the student.
        apply_b: of the other one, the teacher.
        x: images [N, ...].
        targets: classes [N, J], one walk each, as `other_classes` of the class that both networks predict. The
            released code takes those of the true label.
        steps: K.
        step_size: of a step, xi.

    Returns:
        The target's probability before each step by the first and by the second network, [N, J, K] each.
    """

    def walk(target: Array) -> tuple[Array, Array]:
        own = lambda logits: jnp.take_along_axis(jax.nn.log_softmax(logits), target[:, None], 1)[:, 0]

        def step(x: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
            def ascend(x: Array) -> tuple[Array, Array]:
                values = own(apply_a(x))
                return values.sum(), values

            grads, values = jax.grad(ascend, has_aux=True)(x)
            return x + step_size * grads, (jnp.exp(values), jnp.exp(own(apply_b(x))))

        _, (a, b) = lax.scan(step, x, None, steps)
        return a.T, b.T

    return jax.vmap(walk, 1, 1)(targets)


def mean_transition_error(curves_a: Array, curves_b: Array) -> Array:
    """MTE: mean over images, classes and steps of |p_b - p_a| of `transition_curves`, in 0..1."""
    return jnp.abs(curves_b - curves_a).mean()
