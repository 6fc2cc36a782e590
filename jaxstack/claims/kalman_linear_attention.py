"""Kalman Linear Attention: a sequence mixer with process noise, against itself without it, and against other mixers.

Small scale: calibration of the filter's variance, tracking of a noisy walk whose optimal filter is known, associative
recall with and without noise, and two state-tracking problems, parity and words of the symmetric group S3. All mixers
have one block of width 32, a causal convolution over 4 tokens where their layer has one, and 256 state numbers.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxstack.claims.harness import Check, Claim, Curve, Experiment, Row, Scale
from jaxstack.core.runner import RunOptions, train
from jaxstack.sequence import state_tasks, trainer
from jaxstack.sequence.kla import discretise, kla_scan

OPTIONS = RunOptions(progress=False)

KLA, NO_NOISE = "KLA", "KLA, no process noise"
SHORT, SHORT_NO_NOISE = "KLA, short memories", "KLA, short memories, no process noise"
ZOH = "KLA, short memories, zero-order hold"

FILTER = ("d_state=8", "expand=1.0")  # 256 state numbers at width 32, as all arms below
FAST = (*FILTER, "delta_range=[0.1, 3.0]")

ARMS: dict[str, tuple[str, tuple[str, ...]]] = {
    KLA: ("kla", FILTER),
    NO_NOISE: ("kla", (*FILTER, "process_noise=0.0")),
    SHORT: ("kla", (*FAST, "process_noise=1.0")),
    SHORT_NO_NOISE: ("kla", (*FAST, "process_noise=0.0")),
    ZOH: ("kla", (*FAST, "process_noise=1.0", "discretisation=zoh")),
    "softmax attention": ("attention", ("num_heads=4", "context=512", "conv_size=4")),
    "linear attention": ("linear_attention", ("num_heads=4", "conv_size=4")),
    "GLA": ("gla", ("num_heads=2", "conv_size=4")),
    "Mamba": ("mamba", FILTER),
    "Mamba-2": ("mamba2", (*FILTER, "head_dim=8")),
    "DeltaNet": ("deltanet", ("num_heads=4",)),
    "Gated DeltaNet": ("gated_deltanet", ("num_heads=4", "expand_k=1.0", "expand_v=1.0")),
    "minGRU": ("mingru", ("expand=8.0", "use_conv=true")),
    "S5": ("s5", ("d_state=256",)),
}
"""Arm -> mixer and its options. Two starts of the learned dynamics: that of the released code, where states remember 10
to 1000 tokens and drift little, and short memories, a third of a token to ten, whose stationary variance is 1/2."""


def last_scores(learner: Any, seeds: tuple[int, ...]) -> dict[int, dict[str, float]]:
    """The evaluation after training of each seed."""
    metrics = train(learner, seeds=seeds, options=OPTIONS).metrics
    last = metrics[metrics.step == metrics.step.max()]
    return {
        int(row["seed"]): {k: float(v) for k, v in row.items() if str(k).startswith("eval/")}
        for _, row in last.iterrows()
    }


@functools.cache
def optimal_error(length: int, examples: int) -> float:
    """Mean squared error of the Kalman filter that knows the noisy walk's parameters."""
    task = state_tasks.Tracking(length=length)
    batch = jax.jit(lambda: task.sample(jax.random.key(1), examples))()
    return float(jnp.square(task.optimal(batch.tokens)[0] - batch.targets).mean())


def tracking(
    updates: int, arms: tuple[str, ...], length: int = 64, longer: int = 256, examples: int = 2048
) -> Experiment:
    """One block on the noisy walk. `mse / optimum` is the test error over that of the Kalman filter which knows the
    walk's parameters, at the trained length and, `at 4x length`, on sequences never seen so long."""

    def run(arm: str, seeds: tuple[int, ...]) -> Iterator[Row]:
        mixer, options = ARMS[arm]
        learner = trainer.sequence(
            task="tracking",
            task_args=(f"length={length}",),
            mixers=(mixer,),
            mixer_args=options,
            features=16,
            depth=1,
            mlp_ratio=0.0,
            batch_size=32,
            num_updates=updates,
            eval_examples=examples,
            eval_lengths=(longer,),
            lr=5e-3,
            weight_decay=0.0,
        )
        for seed, scores in last_scores(learner, seeds).items():
            yield {
                "seed": seed,
                "mse / optimum": scores["eval/loss"] / optimal_error(length, 4 * examples),
                "mse / optimum at 4x length": scores[f"eval/loss@{longer}"] / optimal_error(longer, 4 * examples),
            }

    return Experiment("tracking", arms, run)


def classified(
    name: str,
    task: str,
    task_args: tuple[str, ...],
    arms: tuple[str, ...],
    longer: tuple[int, ...] = (),
    **options: Any,
) -> Experiment:
    """`accuracy` on scored positions of test sequences at the trained length, and `accuracy@T` there and at lengths
    never trained on."""

    def run(arm: str, seeds: tuple[int, ...]) -> Iterator[Row]:
        mixer, mixer_args = ARMS[arm]
        learner = trainer.sequence(
            task=task,
            task_args=task_args,
            mixers=(mixer,),
            mixer_args=mixer_args,
            eval_lengths=longer,
            **({"eval_examples": 1024} | options),
        )
        trained = trainer.make_task(learner.config).length
        for seed, scores in last_scores(learner, seeds).items():
            row = {"accuracy": scores["eval/accuracy"], f"accuracy@{trained}": scores["eval/accuracy"]}
            yield {"seed": seed} | row | {f"accuracy@{n}": scores[f"eval/accuracy@{n}"] for n in longer}

    return Experiment(name, arms, run)


def calibration(sequences: int = 64, length: int = 256) -> Experiment:
    """Data drawn from the filter's own generative model (an Ornstein-Uhlenbeck process seen through noise of changing
    size): share of true states inside the central 90% interval of mean and variance. Without process noise in the
    filter, the same data make it overconfident."""

    def run(arm: str, seeds: tuple[int, ...]) -> Iterator[Row]:
        scale = {KLA: 1.0, NO_NOISE: 0.0}[arm]

        def coverage(key: jax.Array) -> jax.Array:
            k_start, k_drift, k_noise, k_size = jax.random.split(key, 4)
            abar, pbar = discretise(jnp.float32(1.0), jnp.float32(2.0), jnp.float32(0.1))
            shape = (length, sequences)
            advance = lambda z, e: (abar * z + jnp.sqrt(pbar) * e,) * 2
            start = jax.random.normal(k_start, (sequences,))
            z = jax.lax.scan(advance, start, jax.random.normal(k_drift, shape))[1].T[..., None]
            precision = jnp.exp(2.0 * jax.random.normal(k_size, z.shape))
            v = z + jax.random.normal(k_noise, z.shape) / jnp.sqrt(precision)
            one = jnp.ones_like(v)
            mean, var, _ = kla_scan(v, precision, one, one, abar[None, None], scale * pbar[None, None])
            return (jnp.abs(z - mean) < 1.6449 * jnp.sqrt(var)).mean()

        values = np.asarray(jax.jit(jax.vmap(coverage))(jax.vmap(jax.random.key)(jnp.asarray(seeds))))
        for seed, value in zip(seeds, values):
            yield {"seed": seed, "coverage": float(value)}

    return Experiment("calibration", (KLA, NO_NOISE), run)


SMALL: dict[str, Any] = dict(features=32, depth=1, batch_size=64, num_updates=1000, lr=4e-3)
FULL: dict[str, Any] = dict(
    features=128, depth=2, batch_size=128, num_updates=100_000, weight_decay=0.01, lr=1e-3, min_lr=1e-5
)
NOISY, MQAR, S3, PARITY = "recall in noise", "recall, 4 queries", "state tracking, S3", "state tracking, parity"
PAIRS = (KLA, NO_NOISE, SHORT, SHORT_NO_NOISE)
OTHERS = tuple(arm for arm, (mixer, _) in ARMS.items() if mixer != "kla")
ALL = (*PAIRS, *OTHERS)

CHECKS = (
    Check("calibration", KLA, "coverage", "near", 0.01, target=0.9),
    Check("calibration", NO_NOISE, "coverage", "at_most", 0.5),
    Check("tracking", SHORT, "mse / optimum", "at_most", 1.25),
    Check("tracking", NO_NOISE, "mse / optimum", "above", 0.1, other=KLA),
    Check("tracking", SHORT_NO_NOISE, "mse / optimum", "above", 0.3, other=SHORT),
    Check("tracking", ZOH, "mse / optimum", "above", 0.0, other=SHORT),
    Check("tracking", SHORT, "mse / optimum at 4x length", "at_most", 1.25),
    Check("tracking", SHORT_NO_NOISE, "mse / optimum at 4x length", "above", 0.5, other=SHORT),
    Check(NOISY, KLA, "accuracy", "at_least", 0.9),
    Check(NOISY, KLA, "accuracy@96", "at_least", 0.9),
    Check(NOISY, SHORT, "accuracy", "above", 0.1, other=SHORT_NO_NOISE),
    Check(NOISY, KLA, "accuracy@96", "above", -0.02, other="GLA"),
    Check(NOISY, KLA, "accuracy@96", "above", -0.02, other="Mamba"),
    Check(MQAR, KLA, "accuracy", "at_least", 0.9),
    Check(MQAR, KLA, "accuracy", "above", -0.02, other="GLA"),
    Check(MQAR, KLA, "accuracy", "above", -0.02, other="Mamba"),
    Check(S3, KLA, "accuracy", "above", 0.05, other=NO_NOISE),
    Check(S3, KLA, "accuracy", "above", 0.0, other="GLA"),
    Check(S3, KLA, "accuracy", "above", 0.0, other="Mamba"),
    Check(PARITY, KLA, "accuracy@64", "above", 0.05, other=NO_NOISE),
)

claim = Claim(
    method="kalman-linear-attention",
    ours="KLA",
    baselines=("GLA", "Mamba"),
    paper="Shaj, Barker, Scannell, Szecsenyi, Crowley & Storkey (ICML 2026)",
    statement=(
        "Process noise turns a linear recurrence into a filter that weighs tokens by its own confidence; this helps it "
        "filter, forget and track states."
    ),
    scope=(
        "One block of width 16 or 32, 600 or 1000 steps; mixers of equal state size, not of equal parameters; no "
        "language modelling. The paper's state tracking (A5) takes 100,000 steps of larger models."
    ),
    scales={
        "small": Scale(
            experiments=(
                calibration(),
                tracking(600, (KLA, NO_NOISE, SHORT, SHORT_NO_NOISE, ZOH)),
                classified(S3, "group", ("length=6", "group=S3"), ALL, longer=(12, 24), **SMALL),
                classified(PARITY, "parity", ("length=16",), PAIRS, longer=(64,), **SMALL),
                classified(MQAR, "mqar", ("vocab=32", "length=24", "pairs=4"), (*PAIRS[:3], *OTHERS), **SMALL),
                classified(NOISY, "noisy_recall", ("length=48", "noise=0.4"), ALL, longer=(96, 192), **SMALL),
            ),
            checks=CHECKS,
            minutes=142,
        ),
        "full": Scale(
            experiments=(
                calibration(1024, 4096),
                tracking(20_000, (KLA, NO_NOISE, SHORT, SHORT_NO_NOISE, ZOH)),
                classified(S3, "group", ("length=16", "group=S3"), ALL, longer=(12, 24, 64), **FULL),
                classified("state tracking, A5", "group", ("length=16", "group=A5"), ALL, longer=(64,), **FULL),
                classified(PARITY, "parity", ("length=40",), ALL, longer=(64, 256), **FULL),
                classified(MQAR, "mqar", ("vocab=8192", "length=256", "pairs=16"), ALL, **FULL),
                classified(NOISY, "noisy_recall", ("length=128", "noise=0.4"), ALL, longer=(96, 512), **FULL),
            ),
            checks=CHECKS,
        ),
    },
    curves=(Curve(S3, "accuracy"), Curve(NOISY, "accuracy")),
)
