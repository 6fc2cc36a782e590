"""The acceleration stack: size, accuracy and time of compressed networks, in several forms, on this machine's CPU.

Small scale: three small networks on Fashion-MNIST at 14x14 pixels (2x2 means), timed at 28x28 with batches of one.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from jaxstack.claims.harness import Check, Claim, Curve, Experiment, Row, Scale
from jaxstack.nn import compression, deployment
from jaxstack.nn import lowering as low
from jaxstack.nn.deployment import Form, Measured, Net, Tuned
from jaxstack.report import stats
from jaxstack.vision import dlas
from jaxstack.vision.dlas import StackConfig

MODELS = ("vgg-small", "resnet-8", "mobilenet-small")
WEIGHTS, CHANNELS = (50, 80, 90, 95), (25, 50)
"""Percent that are removed."""
LEVELS = tuple(sorted({*WEIGHTS, *CHANNELS}))
BEYOND = (98, 99)
"""Percent of the weights that are removed where only times are of interest: without fine-tuning."""
OTHERS = ("float16", "bfloat16", "int8")
KINDS = {"dense": "none"}
"""Compression of an arm that is not called by it."""
LOSS = 1.0
"""Points of validation accuracy that an operating point may lose."""
SETTINGS: dict[str, Any] = dict(
    size=14,
    time_size=28,
    train_images=10_000,
    test_images=2_000,
    updates=300,
    tune_updates=60,
    batch_size=32,
    trials=6,
)
SEEDS = 5
"""Seeds of training, and repeats of all times."""
TIMED_SEED = 0


def point(folder: str, model: str, kind: str = "none", percent: int = 0, seed: int = TIMED_SEED) -> StackConfig:
    """The point of a network and its compression."""
    own = StackConfig(dataset=f"fashion-mnist={folder}", model=model, seed=seed, repeats=SEEDS, **SETTINGS)
    return dataclasses.replace(own, compression=kind, level=percent / 100)


def parallel(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """`function` of each item, two at a time, in order."""
    with ThreadPoolExecutor(2) as pool:
        yield from pool.map(function, items)


def geometric(values: Sequence[float]) -> float:
    """The geometric mean."""
    return float(np.exp(np.mean(np.log(values))))


# Accuracy


@functools.cache
def quality(config: StackConfig) -> tuple[float, float, int]:
    """(validation accuracy in percent, test accuracy, bytes) of a point."""
    net = dlas.compressed(config)
    right = dlas.accuracies(config, net)
    return 100 * right["valid"], 100 * right["test"], deployment.stored_bytes(net, dlas.timed_image(config))


def removed(arm: str) -> tuple[int, ...]:
    """Percent that an arm's networks have lost."""
    return {"weights": WEIGHTS, "channels": CHANNELS}.get(arm, (0,))


def accuracy_row(arm: str, folder: str, seed: int) -> Row:
    """Test accuracies, and what is saved at the largest level within a point of the dense network."""
    percents = removed(arm)
    row: Row = {"seed": seed}
    tables = {}
    for model in MODELS:
        dense = quality(point(folder, model, seed=seed))
        found = {n: quality(point(folder, model, KINDS.get(arm, arm), n, seed)) for n in percents}
        tables[model] = found
        good = [n for n in percents if found[n][0] >= dense[0] - LOSS]
        row |= {f"{model}: accuracy@{n}": test for n, (_, test, _) in found.items() if n}
        row |= {f"{model}: accuracy": found[percents[0]][1]}
        row[f"{model}: level"] = max(good, default=0)
        row[f"{model}: bytes"] = (found[max(good)][2] if good else dense[2]) / dense[2]
    for n in LEVELS if percents == (0,) else percents:
        row[f"accuracy@{n}"] = float(np.mean([tables[m][n if n in percents else 0][1] for m in MODELS]))
    row["accuracy"] = float(np.mean([tables[m][percents[0]][1] for m in MODELS]))
    row["bytes at equal accuracy"] = geometric([row[f"{m}: bytes"] for m in MODELS])
    return row


def accuracy(arm: str, seeds: tuple[int, ...], fashion_mnist: str) -> Iterator[Row]:
    """Accuracies of an arm's networks after as much fine-tuning as the dense one has."""
    folder = str(fashion_mnist)
    dlas.data(point(folder, MODELS[0]))  # two threads would read it twice
    own = lambda model: [quality(point(folder, model, KINDS.get(arm, arm), n, seeds[0])) for n in removed(arm)]
    list(parallel(own, MODELS))  # compiles, which threads of several seeds would do several times
    yield from parallel(lambda seed: accuracy_row(arm, folder, seed), seeds)


# Times


def equal_work(dense: Net, macs: int, image: Sequence[int]) -> Net:
    """The dense network without its smallest weights, so many that at most `macs` multiply-adds are left."""
    return without(dense, deployment.weights_for(dense, macs, image))


def without(dense: Net, count: int) -> Net:
    """The dense network with `count` of its weights, the largest."""
    params = dense.variables["params"]
    kept = compression.apply_masks(params, compression.masks_of_count(params, count))
    return dense._replace(kind="weights", variables={**dense.variables, "params": kept})


def networks(folder: str, model: str) -> dict[str, tuple[Net, tuple[Form, ...]]]:
    """By name: what is timed of a model, and in which forms."""
    of = lambda kind="none", percent=0: dlas.compressed(point(folder, model, kind, percent))
    image = dlas.timed_image(point(folder, model))
    dense, csr, bcoo = of(), Form("gemm", "csr"), Form("gemm", "bcoo")
    found = {"dense": (dense, (*(Form(p) for p in low.PRIMITIVES), Form(tuned=True)))}
    found |= {kind: (of(kind), (Form(), Form("gemm")) if kind == "int8" else (Form(),)) for kind in OTHERS}
    for n in WEIGHTS:
        found[f"weights {n}%"] = (of("weights", n), (csr, bcoo) if n in (WEIGHTS[0], WEIGHTS[-1]) else (csr,))
    whole = compression.weight_count(dense.variables["params"])
    for n in BEYOND:
        found[f"weights {n}%"] = (without(dense, compression.kept_count(whole, n / 100)), (csr,))
    for n in CHANNELS:
        small = of("channels", n)
        found[f"channels {n}%"] = (small, (Form(),))
        found[f"equal work {n}%"] = (equal_work(dense, deployment.multiply_adds(small, image), image), (csr,))
    return found


def form_name(form: Form) -> str:
    """For example "xla", "csr", "tuned"."""
    return "tuned" if form.tuned else form.sparse or form.primitive


@functools.cache
def measured(folder: str, model: str) -> dict[tuple[str, str], tuple[Net, Measured]]:
    """By network and form: what was timed, all of a model in turn."""
    config, nets = point(folder, model), networks(folder, model)
    jobs = [(name, net, form) for name, (net, forms) in nets.items() for form in forms]
    image = dlas.timed_image(config)
    found = deployment.measure(nets["dense"][0], [j[1:] for j in jobs], image, SEEDS, config.trials, 0.03)
    return {(name, form_name(form)): (net, one) for (name, net, form), one in zip(jobs, found)}


def relative(folder: str, name: str, form: str, repeat: int) -> float:
    """Time over that of the dense network in the same repeat, geometric mean over the models."""
    found = [measured(folder, model)[name, form][1] for model in MODELS]
    return geometric([one.seconds[repeat] / one.dense[repeat] for one in found])


TIMES = {
    **{f"dense, {form}": ("dense", form) for form in (*low.PRIMITIVES, "tuned")},
    **{kind: (kind, "xla") for kind in OTHERS},
    "int8, gemm": ("int8", "gemm"),
    **{f"channels {n}%": (f"channels {n}%", "xla") for n in CHANNELS},
    **{f"weights {n}%, csr": (f"weights {n}%", "csr") for n in (*WEIGHTS, *BEYOND)},
    **{f"weights {n}%, bcoo": (f"weights {n}%", "bcoo") for n in (WEIGHTS[0], WEIGHTS[-1])},
}


def times(arm: str, seeds: tuple[int, ...], fashion_mnist: str) -> Iterator[Row]:
    """Time of a network and form over the dense network by XLA; a seed is a repeat."""
    folder, (name, form) = str(fashion_mnist), TIMES[arm]
    for seed in seeds:
        row: Row = {"seed": seed, "relative time": relative(folder, name, form, seed)}
        types = set()
        for model in MODELS:
            net, one = measured(folder, model)[name, form]
            types |= set(one.computed)
            row[f"{model}: ms"] = 1e3 * one.seconds[seed]
            row[f"{model}: M multiply-adds"] = deployment.multiply_adds(net, (1, 28, 28, 1)) / 1e6
        yield row | {"computed in float32": float(types == {"f32"})}


ALL, FASTEST = "all points", "fastest form of each"


def ranks(arm: str, seeds: tuple[int, ...], fashion_mnist: str) -> Iterator[Row]:
    """Rank correlation of parameters and time over points of all models, and the time over that of a point with more
    parameters, of the pair in which that ratio of medians is the largest."""
    sizes, seconds = [], []
    for model in MODELS:
        best: dict[str, tuple[Net, tuple[float, ...]]] = {}
        for (name, form), (net, one) in measured(str(fashion_mnist), model).items():
            key = name if arm == FASTEST else f"{name}, {form}"
            # as if nothing was removed, zeros take the dense network's time
            ways = [one.seconds, one.dense] if arm == FASTEST and net.kind == "weights" else [one.seconds]
            for seconds_of in ways:
                if key not in best or np.median(seconds_of) < np.median(best[key][1]):
                    best[key] = (net, seconds_of)
        sizes += [deployment.parameter_count(net) for net, _ in best.values()]
        seconds += [own for _, own in best.values()]
    params, table = np.asarray(sizes), np.asarray(seconds)
    medians = np.median(table, 1)
    ratio = np.where(params[:, None] < params[None, :], medians[:, None] / medians[None, :], 0.0)
    slow, fast = np.unravel_index(ratio.argmax(), ratio.shape)
    for seed in seeds:
        own = table[:, seed]
        correlation = stats.spearman(params, own).value
        yield {"seed": seed, "rank correlation": correlation, "inversion": float(own[slow] / own[fast])}


def crossing(percents: Sequence[int], ratios: Sequence[float]) -> float:
    """Where ratios that fall over percents reach 1, between two points on a line of their logarithms; 100: nowhere."""
    logs = np.log(ratios)
    if logs[0] <= 0:
        return float(percents[0])
    for i in range(1, len(logs)):
        if logs[i] <= 0:
            return float(percents[i - 1] + (percents[i] - percents[i - 1]) * logs[i - 1] / (logs[i - 1] - logs[i]))
    return 100.0


CSR, DENSE = "CSR", "dense"


def break_even(arm: str, seeds: tuple[int, ...], fashion_mnist: str) -> Iterator[Row]:
    """Time of networks without so many percent of the weights, as CSR, over the dense network by XLA."""
    folder, percents = str(fashion_mnist), (*WEIGHTS, *BEYOND)
    for seed in seeds:
        if arm == DENSE:
            yield {"seed": seed} | {f"relative time@{n}": 1.0 for n in percents}
            continue
        row: Row = {"seed": seed}
        row |= {f"relative time@{n}": relative(folder, f"weights {n}%", "csr", seed) for n in percents}
        for model in MODELS:
            own = [measured(folder, model)[f"weights {n}%", "csr"][1] for n in percents]
            row[f"{model}: crossing"] = crossing(percents, [one.seconds[seed] / one.dense[seed] for one in own])
        yield row | {"crossing": crossing(percents, [row[f"relative time@{n}"] for n in percents])}


def efficiency(arm: str, seeds: tuple[int, ...], fashion_mnist: str) -> Iterator[Row]:
    """Measured over expected speed-up at equal multiply-adds; weights in the faster of CSR and dense form."""
    folder = str(fashion_mnist)
    for seed in seeds:
        row: Row = {"seed": seed}
        for n in CHANNELS:
            found = []
            for model in MODELS:
                small, one = measured(folder, model)[f"channels {n}%", "xla"]
                net, own = small, one.seconds[seed] / one.dense[seed]
                if arm == "weights":
                    net, csr = measured(folder, model)[f"equal work {n}%", "csr"]
                    own = min(1.0, csr.seconds[seed] / csr.dense[seed])
                whole = deployment.multiply_adds(measured(folder, model)["dense", "xla"][0], (1, 28, 28, 1))
                found.append(deployment.multiply_adds(net, (1, 28, 28, 1)) / whole / own)
                row[f"{model}: efficiency@{n}"] = found[-1]
            row[f"efficiency@{n}"] = geometric(found)
        yield row | {"efficiency": geometric([row[f"efficiency@{n}"] for n in CHANNELS])}


# Which form is best


@functools.cache
def plans(folder: str, model: str) -> tuple[dict[str, Tuned], dict[str, Tuned]]:
    """The searches of a model's layers on one core, in a process of its own, and on all cores."""
    config = point(folder, model)
    image, dense = dlas.timed_image(config), dlas.compressed(config)
    job = [(dense, Form(tuned=True))]
    (alone,) = deployment.measure_on("cpu-1", dense, job, image, repeats=SEEDS, trials=config.trials)
    return alone.plan, measured(folder, model)["dense", "tuned"][1].plan


Pair = tuple[dict[str, Any], str, str]
"""(seconds by choice, one choice, the other)."""


def slower(pairs: Sequence[Pair], at: Callable[[Any], float]) -> float:
    """How much slower the second choice is than the first, geometric mean over pairs."""
    return geometric([at(seconds[other]) / at(seconds[one]) for seconds, one, other in pairs])


def differences(folder: str) -> dict[str, list[tuple[float, list[Pair]]]]:
    """For each arm the layers whose best choice is another: (slowdown in the search, pairs of the second timing)."""
    found: dict[str, list[tuple[float, list[Pair]]]] = {"tuning": [], "cores": []}
    once = lambda v: float(v)
    for model in MODELS:
        alone, both = plans(folder, model)
        config = point(folder, model)
        for layer in deployment.ready_net(dlas.compressed(config), dlas.timed_image(config)).layers:
            if layer.name not in both:
                continue
            plain = [str(c) for c in deployment.untuned(layer)]
            one, two = alone[layer.name], both[layer.name]
            best = lambda tuned, among: min(among, key=tuned.first.__getitem__)
            default, any_form = best(two, plain), best(two, two.first)
            if default.split()[0] != any_form.split()[0]:
                pair = (any_form, default)
                found["tuning"].append((slower([(two.first, *pair)], once), [(two.again, *pair)]))
            first, second = best(one, plain), best(two, plain)
            if first != second:
                ways = ((one, first, second), (two, second, first))
                score = slower([(t.first, a, b) for t, a, b in ways], once)
                found["cores"].append((score, [(t.again, a, b) for t, a, b in ways]))
    return found


EITHER = "tuning or cores"


def forms(arm: str, seeds: tuple[int, ...], fashion_mnist: str) -> Iterator[Row]:
    """How much slower the other setup's best primitive is at one layer; the layer is chosen by the times of the search,
    the slowdown is that of the second timing. 1: every layer has the same best primitive."""
    table = differences(str(fashion_mnist))
    layers = [*table["tuning"], *table["cores"]] if arm == EITHER else table[arm]
    chosen = max(layers, key=lambda found: found[0], default=None)
    for seed in seeds:
        value = 1.0 if chosen is None else slower(chosen[1], lambda seconds, n=seed: seconds[n])
        yield {"seed": seed, "slowdown by the other choice": value, "layers": float(len(layers))}


A, T, R, B, E, F = "accuracy", "time", "size and time", "sparse weights", "equal work", "primitives"
NEED = ("fashion_mnist",)
small = Scale(
    experiments=(
        Experiment(A, ("dense", "weights", "channels", *OTHERS), accuracy, needs=NEED),
        Experiment(T, tuple(TIMES), times, needs=NEED),
        Experiment(R, (ALL, FASTEST), ranks, needs=NEED),
        Experiment(B, (CSR, DENSE), break_even, needs=NEED),
        Experiment(E, ("channels", "weights"), efficiency, needs=NEED),
        Experiment(F, (EITHER, "tuning", "cores"), forms, needs=NEED),
    ),
    checks=(
        Check(R, ALL, "rank correlation", "at_most", 0.9),
        Check(R, ALL, "inversion", "at_least", 1.2),
        Check(B, CSR, "relative time@50", "times_at_least", 1.0, other=DENSE, paired=True),
        Check(E, "channels", "efficiency", "above", 0.0, other="weights", paired=True),
        Check(F, EITHER, "slowdown by the other choice", "at_least", 1.02),
        Check(A, "weights", "accuracy@50", "above", -0.5, other="dense", paired=True),
        Check(A, "int8", "accuracy", "above", -1.0, other="dense", paired=True),
        Check(B, CSR, "crossing", "at_most", 99.0, report=True),
        Check(R, FASTEST, "rank correlation", "at_most", 0.9, report=True),
        Check(R, FASTEST, "inversion", "at_least", 1.2, report=True),
        *(Check(F, arm, "slowdown by the other choice", "at_least", 1.02, report=True) for arm in ("tuning", "cores")),
        *(
            Check(A, arm, "bytes at equal accuracy", "times_at_most", 1.0, "weights", 0.0, True, True)
            for arm in ("channels", *OTHERS)
        ),
        *(Check(T, arm, "computed in float32", "at_least", 1.0, report=True) for arm in OTHERS),
        *(
            Check(T, arm, "relative time", "times_at_most", 1.0, "dense, xla", 0.0, True, True)
            for arm in (*OTHERS, "int8, gemm", "channels 50%", "weights 90%, csr", "dense, tuned")
        ),
    ),
    seeds=SEEDS,
    minutes=8,
)
claim = Claim(
    method="dlas",
    paper="Gibson, Cano, Crowley, Storkey & O'Boyle (ACM TACO 2024)",
    statement=(
        "Size, accuracy and time of compressed networks need not go together: over networks and forms the rank "
        "correlation of parameters and time is at most 0.9, and some network with fewer parameters takes over 1.2 "
        "times as long. With half of the weights removed CSR is slower than the dense network; at equal multiply-adds "
        "removed channels give more of the expected speed-up than removed weights; and for some layer the best "
        "primitive is another with tuning or on another number of cores. Half of the weights cost at most half a point "
        "of accuracy, int8 at most a point."
    ),
    scope=(
        "VGG-small, ResNet-8 and MobileNet-small on 10,000 images of Fashion-MNIST at 14x14 pixels, 300 updates and 60 "
        "of fine-tuning in batches of 32; accuracies over five seeds on 2,000 test images, means over the networks. "
        "Times of the networks of seed 0 at 28x28, batch 1, five repeats in turn, on one and two cores of the "
        "record's CPU. Of the paper only the abstract was read: networks, levels and margins are ours (the paper: "
        "seven networks on CIFAR-10 and ImageNet, four devices)."
    ),
    scales={"small": small},
    baselines=(DENSE, "weights", "dense, xla"),
    curves=(
        Curve(A, "accuracy", "removed, %", "linear"),
        Curve(B, "relative time", "weights removed, %", "linear"),
        Curve(E, "efficiency", "channels removed, %", "linear"),
    ),
)
