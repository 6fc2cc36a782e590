"""Cleave's cost model and scheduler on drawn devices, beside other ways to train on them; workers that really train.

Times are those of the model: bytes over links, operations over speeds. A training step has 128 sequences of 1,024
tokens. Nothing is tuned: every way gets the best division of its work, which it computes.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from jaxstack.claims.harness import Check, Claim, Curve, Experiment, Row, Scale
from jaxstack.edge import cleave, cleave_baselines, cleave_devices
from jaxstack.edge.cleave import MODELS, Devices, Gemm
from jaxstack.edge.cleave_events import simulate
from jaxstack.edge.cleave_execution import Workers, sharded_matmul, tiled
from jaxstack.sequence import text

BATCH = (128, 1024)
"""Sequences, tokens of each."""
COUNTS = (8, 32, 128, 512, 2048)
CLOUD = 150e12
"""Operations per second of the accelerator that is compared with."""


def devices_of(seed: int, count: int, spread: float = 10.0) -> Devices:
    """Of a seed; the first ones of a larger number are not those of a smaller one."""
    return cleave_devices.drawn(count, spread, 1000 * seed + count)


# --- bytes per device -------------------------------------------------------------------------------------------------


def scaling(arm: str, seeds: tuple[int, ...]) -> Iterator[Row]:
    """How the mean bytes of a device change with their number: the slope between logarithms."""
    way, _, name = arm.partition(", ")
    for seed in seeds:
        sizes = []
        for count in COUNTS:
            devices = devices_of(seed, count)
            if way == "Cleave":
                step = cleave.plan_step(devices, MODELS[name], *BATCH)
                sizes.append(float((step.down + step.up).mean()))
            else:
                sizes.append(cleave_baselines.ring(devices, MODELS[name], *BATCH).bytes_each)
        row: dict[str, Any] = {"seed": seed, "slope": float(np.polyfit(np.log(COUNTS), np.log(sizes), 1)[0])}
        yield row | {f"GB of a device@{p}": s / 1e9 for p, s in zip(COUNTS, sizes)}


# --- time of a step ---------------------------------------------------------------------------------------------------


def alike(devices: Devices, work: Any, **options: Any) -> cleave.Plan:
    """Equal rectangles; heads of attention are divided by the cost model all the same."""
    return cleave.equal_split(devices, work) if isinstance(work, Gemm) else cleave.plan_chains(devices, work)


WAYS: dict[str, Callable[[Devices, cleave.Model], cleave.Step]] = {
    "Cleave": lambda d, m: cleave.plan_step(d, m, *BATCH),
    "Cleave with overlap": lambda d, m: cleave.plan_step(d, m, *BATCH, overlap=True),
    "equal split": lambda d, m: cleave.plan_step(d, m, *BATCH, planner=alike),
    "rows only": lambda d, m: cleave.plan_step(d, m, *BATCH, split="rows"),
    "columns only": lambda d, m: cleave.plan_step(d, m, *BATCH, split="columns"),
    "server with 12.5 GB/s": lambda d, m: cleave.plan_step(d, m, *BATCH, link=cleave.Link(12.5e9, 12.5e9)),
}
OTHERS = {
    "data parallel": cleave_baselines.data_parallel,
    "ring of tensors": cleave_baselines.ring,
    "pipeline": cleave_baselines.pipeline,
}


def timed(model: str, count: int) -> Callable[..., Iterator[Row]]:
    """Seconds of a step, and how far a plan is from the relaxed bound."""

    def run(arm: str, seeds: tuple[int, ...]) -> Iterator[Row]:
        for seed in seeds:
            devices = devices_of(seed, count)
            if arm in WAYS:
                step = WAYS[arm](devices, MODELS[model])
                row = {"seconds": step.seconds}
                if np.isfinite(step.relaxed):
                    row["over the bound"] = step.seconds / step.relaxed
            elif arm == "cloud":
                row = {"seconds": cleave_baselines.cloud(MODELS[model], *BATCH, CLOUD)}
            else:
                found = OTHERS[arm](devices, MODELS[model], *BATCH)
                row = {"seconds": found.seconds, "fits into memory": float(found.fits)}
            yield {"seed": seed} | row

    return run


# --- failures ---------------------------------------------------------------------------------------------------------


def recovering(model: str, count: int) -> Callable[..., Iterator[Row]]:
    """Seconds that one failure costs after it is noticed: of three devices in each product, and of a stage."""

    def run(arm: str, seeds: tuple[int, ...]) -> Iterator[Row]:
        for seed in seeds:
            devices, rng = devices_of(seed, count), np.random.default_rng(seed)
            if arm == "pipeline":
                yield {"seed": seed, "seconds": OTHERS[arm](devices, MODELS[model], *BATCH).restart}
                continue
            seconds = []
            for work in {w for _, _, w in cleave.works(MODELS[model], *BATCH) if isinstance(w, Gemm)}:
                plan = cleave.plan_gemm(devices, work)
                for device in rng.choice(plan.device, min(3, len(plan.device)), replace=False):
                    seconds.append(cleave.recovery(devices, plan, work, int(device)).makespan)
            yield {"seed": seed, "seconds": float(np.mean(seconds)), "largest": float(np.max(seconds))}

    return run


RATES = {"no failures": 0.0, "one per device and hour": 1 / 3600, "ten per device and hour": 10 / 3600}


def failing(arm: str, seeds: tuple[int, ...]) -> Iterator[Row]:
    """A layer of opt-1.3b, forward and backward, on 128 devices that leave for good."""
    products = [w for _, times, w in cleave.works(MODELS["opt-1.3b"], *BATCH) if isinstance(w, Gemm) and times > 1]
    for seed in seeds:
        devices = devices_of(seed, 128)
        planned = simulate(devices, products, np.full(128, np.inf))
        rate, rng = RATES[arm], np.random.default_rng(seed)
        fails = rng.exponential(1 / rate, 128) if rate else np.full(128, np.inf)
        found = simulate(devices, products, fails)
        yield {
            "seed": seed,
            "time over that without failures": found.seconds / planned.seconds,
            "bytes that came up over those planned": found.up / planned.up,
            "tasks lost": float(found.lost),
        }


# --- workers that train -----------------------------------------------------------------------------------------------

STEPS, FEATURES, HEADS, LENGTH, SEQUENCES = 200, 64, 2, 32, 4
TILE, WORKERS, DIES_EVERY = 32, 8, 20


def transformer(params: Any, tokens: Array, matmul: Callable[[Array, Array], Any]) -> Array:
    """Mean loss in nats of a character transformer of two layers; products of weights go through `matmul`."""
    norm = lambda x: (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)
    x = (params["embed"][tokens[:, :-1]] + params["place"]).reshape(-1, FEATURES)
    heads = lambda a: a.reshape(SEQUENCES, LENGTH, HEADS, -1).transpose(0, 2, 1, 3)
    mask = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))
    for layer in params["layers"]:
        q, k, v = map(heads, jnp.split(matmul(norm(x), layer["qkv"]), 3, -1))
        scores = jnp.where(mask, q @ k.mT / np.sqrt(FEATURES / HEADS), -1e9)
        mixed = (jax.nn.softmax(scores) @ v).transpose(0, 2, 1, 3).reshape(-1, FEATURES)
        x = x + matmul(mixed, layer["projection"])
        x = x + matmul(jax.nn.relu(matmul(norm(x), layer["up"])), layer["down"])
    logits = matmul(norm(x), params["output"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:].reshape(-1)).mean()


def initial(key: Array) -> Any:
    """Weights of the transformer."""
    keys = iter(jax.random.split(key, 11))
    of = lambda *shape: jax.random.normal(next(keys), shape) / np.sqrt(shape[0])
    d = FEATURES
    layer = lambda: {"qkv": of(d, 3 * d), "projection": of(d, d), "up": of(d, 2 * d), "down": of(2 * d, d)}
    embed, place, output = 0.1 * of(256, d) * 16, 0.1 * of(LENGTH, d), of(d, 256)
    return {"embed": embed, "place": place, "layers": [layer(), layer()], "output": output}


def trained(seed: int, matmul: Callable[[Array, Array], Any], before: Callable[[int], None]) -> np.ndarray:
    """Losses [STEPS] of training with Adam; `before` is called with each step's number."""
    corpus = np.asarray(text.load())
    tx = optax.adam(3e-3)
    params = initial(jax.random.key(seed))
    rng, state = np.random.default_rng(seed), tx.init(params)

    @jax.jit
    def step(params: Any, state: Any, tokens: Array) -> tuple[Any, Any, Array]:
        loss, grads = jax.value_and_grad(transformer)(params, tokens, matmul)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for i in range(STEPS):
        before(i)
        starts = rng.integers(len(corpus) - LENGTH - 1, size=SEQUENCES)
        tokens = np.stack([corpus[s : s + LENGTH + 1] for s in starts]).astype(np.int32)
        params, state, loss = step(params, state, tokens)
        losses.append(float(loss))
    return np.asarray(losses, np.float32)


@functools.lru_cache(maxsize=16)
def on_one_machine(seed: int, tiles: bool) -> np.ndarray:
    """Losses with XLA's products, or with those of the workers' tiles."""
    product = sharded_matmul(functools.partial(tiled, tile=TILE)) if tiles else jnp.matmul
    return trained(seed, product, lambda i: None)


def working(arm: str, seeds: tuple[int, ...]) -> Iterator[Row]:
    """Eight workers of unequal speed; of those that die, one does so every 20 steps and comes back 10 steps later."""
    for seed in seeds:
        with Workers(cleave_devices.drawn(WORKERS, seed=seed), tile=TILE, scale=1e-3) as workers:

            def before(i: int, workers: Workers = workers) -> None:
                doomed = i // DIES_EVERY % WORKERS
                if arm == "workers that die" and i % DIES_EVERY == DIES_EVERY // 2:
                    workers.kill(doomed)
                elif arm == "workers that die" and i % DIES_EVERY == 0:
                    workers.join((doomed - 1) % WORKERS)

            losses = trained(seed, sharded_matmul(workers.product), before)
            lost = workers.lost
        yield {
            "seed": seed,
            "largest difference of losses from XLA": float(np.abs(losses - on_one_machine(seed, False)).max()),
            "bitwise equal": float(np.array_equal(losses, on_one_machine(seed, True))),
            "last loss": float(losses[-20:].mean()),
            "first loss": float(losses[0]),
            "tasks lost": float(lost),
        }


BYTES, LOST, LEAVING, REAL = "bytes of a device", "a failure, 128 devices", "devices that leave", "workers that train"
TIMES = {p: f"opt-1.3b, {p:,} devices" for p in (32, 128, 512, 2048)}
LARGE = "opt-13b, 512 devices"
PAIRED: dict = dict(paired=True)
MAIN = TIMES[512]

claim = Claim(
    method="cleave",
    paper=(
        "Xue, Madhyastha, Lee, Storkey, Burns and Marina, On Harnessing Idle Compute at the Edge for Foundation Model "
        "Training, 2025 (arXiv 2512.22142)"
    ),
    statement=(
        "With products split in rectangles, the bytes of a device fall like one over the root of the number of "
        "devices, where a ring's stay; the scheduler is within a tenth of its bound and twice as fast as equal shares "
        "on unequal devices, and four times as fast as other ways to train on them; a failure costs a hundredth of a "
        "pipeline's restart; workers that die train as one machine does."
    ),
    scope=(
        "A simulation by this project's cost model, on drawn devices whose links and speeds differ by a factor of ten; "
        "the paper's own cost model, traces and tables could not be read. Real training is that of a character "
        "transformer of two layers on threads."
    ),
    scales={
        "small": Scale(
            experiments=(
                Experiment(BYTES, tuple(f"{way}, {m}" for m in MODELS for way in ("Cleave", "ring")), scaling),
                *(Experiment(name, (*WAYS, *OTHERS, "cloud"), timed("opt-1.3b", p)) for p, name in TIMES.items()),
                Experiment(LARGE, ("Cleave", *OTHERS, "cloud"), timed("opt-13b", 512)),
                Experiment(LOST, ("Cleave", "pipeline"), recovering("opt-1.3b", 128)),
                Experiment(LEAVING, tuple(RATES), failing),
                Experiment(REAL, ("workers", "workers that die"), working),
            ),
            checks=(
                *(Check(BYTES, f"Cleave, {m}", "slope", "near", 0.05, target=-0.5) for m in MODELS),
                *(Check(BYTES, f"ring, {m}", "slope", "near", 0.1) for m in MODELS),
                *(Check(name, "Cleave", "over the bound", "at_most", 1.1) for name in TIMES.values()),
                *(
                    Check(name, "Cleave", "seconds", "times_at_most", 0.5, "equal split", **PAIRED)
                    for name in TIMES.values()
                ),
                Check(MAIN, "Cleave", "seconds", "times_at_most", 1.0, "rows only", **PAIRED),
                Check(MAIN, "Cleave", "seconds", "times_at_most", 1.0, "columns only", **PAIRED),
                *(Check(MAIN, "Cleave", "seconds", "times_at_most", 0.25, other, **PAIRED) for other in OTHERS),
                Check(LOST, "Cleave", "seconds", "times_at_most", 0.01, "pipeline", **PAIRED),
                Check(
                    LEAVING,
                    "one per device and hour",
                    "bytes that came up over those planned",
                    "near",
                    1e-6,
                    target=1.0,
                ),
                Check(REAL, "workers that die", "bitwise equal", "at_least", 1.0),
                Check(REAL, "workers that die", "largest difference of losses from XLA", "at_most", 1e-4),
                Check(REAL, "workers that die", "last loss", "at_most", 4.0),
                *(Check(LARGE, "Cleave", "seconds", "times_at_most", 0.25, o, report=True, **PAIRED) for o in OTHERS),
                Check(MAIN, "Cleave", "seconds", "times_at_most", 1.0, "cloud", report=True, **PAIRED),
                *(
                    Check(TIMES[2048], "Cleave", "seconds", "times_at_most", 1.0, other, report=True, **PAIRED)
                    for other in ("cloud", "pipeline", "server with 12.5 GB/s", "Cleave with overlap")
                ),
                *(
                    Check(LEAVING, arm, "time over that without failures", "at_most", 1.1, report=True)
                    for arm in RATES
                    if arm != "no failures"
                ),
            ),
            minutes=7,
        ),
    },
    baselines=("equal split", "rows only", "columns only", *OTHERS, "cloud"),
    ours="Cleave",
    curves=(Curve(BYTES, "GB of a device", "devices", "log2"),),
)
