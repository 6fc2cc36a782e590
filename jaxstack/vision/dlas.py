"""The deep learning acceleration stack: one layer changed at a time, accuracy and time looked at together.

Gibson, Cano, Crowley, Storkey and O'Boyle, ACM TACO 2024 (arXiv 2311.08909), see acceleration as a stack: data, model,
compression, algorithm and data format, systems software, hardware. A `StackConfig` names a point of it, `run_stack`
trains, compresses, fine-tunes and times it beside the dense network, and `run_grid` does so for many, with results in a
file of JSON lines that it continues. Expected is the dense time times the share of multiply-adds that is left.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxstack.core import config as configs
from jaxstack.core import ledger
from jaxstack.core.config import require, require_at_least
from jaxstack.core.devices import available_cores
from jaxstack.core.errors import UserError
from jaxstack.data import images
from jaxstack.data.sources import shuffled_rows
from jaxstack.nn import classifier, compression
from jaxstack.nn.compression import Quantised
from jaxstack.nn.deployment import (
    Form,
    Net,
    fast_choices,
    measure_on,
    multiply_adds,
    network_of,
    outputs,
    parameter_count,
    stored_bytes,
)
from jaxstack.nn.supervised import variables as variables_of
from jaxstack.nn.vision import zoo
from jaxstack.nn.vision.folding import fold_batchnorm
from jaxstack.report import timing

REMOVING = ("weights", "channels")
PERIODS, RAMP = 5, 3
"""Masks are drawn anew so often in a fine-tuning; sparsity rises over the first of them."""
GROUP = 250
"""Images that are evaluated at a time."""


@dataclasses.dataclass(frozen=True)
class StackConfig(configs.Config):
    """A point of the stack, and how its network is trained."""

    dataset: str = "digits"
    """As the classifier's `data`: NAME or NAME=PATH."""
    model: str = "resnet-8"
    """As the classifier's."""
    compression: Literal["none", "weights", "channels", "float16", "bfloat16", "int8"] = "none"
    level: float = 0.0
    """Share of the weights, or of the channels of each space, that is removed."""
    primitive: Literal["xla", "direct", "gemm", "spatial-pack"] = "xla"
    """By which convolutions are computed."""
    sparse: Literal["", "csr", "bcoo"] = ""
    """Compute removed weights not at all: GEMM on SciPy's or JAX's sparse matrices."""
    tuned: bool = False
    """The fastest primitive, layout and tile that a search finds for each layer."""
    device: str = "cpu"
    """cpu, or cpu-N for N of its cores."""
    size: int = 0
    """Pixels on a side of what the network is trained with; 0: as they are."""
    time_size: int = 0
    """Pixels on a side of what is timed; 0: the same."""
    train_images: int = 0
    """0: all."""
    test_images: int = 0
    """Of the parts for validation and for testing each; 0: all."""
    updates: int = 1000
    """Of the dense network; rounded up to periods of a fifth of `tune_updates`."""
    tune_updates: int = 250
    """Fine-tuning, the same for all compressions and for the dense network."""
    batch_size: int = 64
    lr: float = 0.1
    tune_lr: float = 0.02
    calibration: int = 512
    """Training images that the scales of int8 come from."""
    trials: int = 12
    """Of the search for each layer's shape."""
    repeats: int = 5
    """Of each measurement."""
    seed: int = 0

    def validate(self) -> None:
        """Raise `UserError` for combinations that there are none of."""
        require(self, "level", 0.0 <= self.level < 1.0, "a share in [0, 1)")
        removes = self.compression in REMOVING
        require(self, "level", removes or not self.level, f"0 with compression={self.compression!r}")
        if self.sparse:
            require(self, "sparse", self.compression == "weights", "none without compression='weights'")
            require(self, "sparse", self.primitive == "gemm", "none without primitive='gemm'")
        if self.tuned:
            require(self, "tuned", self.compression in ("none", *REMOVING), "False for other types than float32")
            require(self, "tuned", self.primitive == "xla", "False with a primitive of one's own")
        require_at_least(self, 1, "updates", "tune_updates", "batch_size", "trials", "repeats")
        require_at_least(self, 0, "lr", "tune_lr", "time_size", "test_images", "calibration", "seed")
        if self.compression == "int8":
            require(self, "calibration", self.calibration > 0, "at least 1 image for the scales of int8")
        require(self, "device", re.fullmatch(r"cpu(-[1-9]\d*)?", self.device) is not None, "cpu or cpu-N")
        cores = len(available_cores())
        most = int(self.device.partition("-")[2] or 1)
        require(self, "device", most <= cores, f"at most cpu-{cores} on this machine")
        if self.compression == "channels" and not hasattr(zoo.network(self.model), "spaces"):
            require(
                self, "model", False, "vgg-small, resnet-8, -14, -20 or mobilenet-small with compression='channels'"
            )
        training(self)


class StackResult(NamedTuple):
    """What came out at a point of the stack."""

    accuracy: float
    """Of the test images."""
    valid_accuracy: float
    """Of the images by which operating points are chosen."""
    macs: int
    """Multiply-adds per image that are left."""
    params: int
    """Trained numbers that are not removed."""
    bytes: int
    """On disk, BatchNorm folded; removed weights as CSR."""
    t_min: float
    """Seconds per image, batch 1."""
    t_median: float
    t_dense: float
    """Median of the dense float32 network by XLA in the same run."""
    t_expected: float
    """t_dense times the share of multiply-adds that is left."""
    computed: tuple[str, ...]
    """Types in which the compiled program computes products."""
    plan: dict[str, str]
    """What was tuned, by layer."""

    @property
    def efficiency(self) -> float:
        """Measured over expected speed-up."""
        return self.t_expected / self.t_median


# Training and compression


def training(config: StackConfig, widths: Sequence[int] = ()) -> classifier.Config:
    """The classifier of a point, with other widths where channels are gone. Raises `UserError`."""
    return classifier.Config(
        data=config.dataset,
        size=config.size,
        train_images=config.train_images,
        model=config.model,
        mid_features=tuple(widths),
        batch_size=config.batch_size,
    )


@functools.lru_cache(4)
def _data(dataset: str, size: int, train: int, test: int) -> dict[str, Any]:
    own = classifier.Config(data=dataset, size=size, train_images=train)
    found = {}
    for part in ("train", "valid", "test"):
        x, y = classifier.arrays(own, part)
        count = len(x) if part == "train" or not test else test
        if count > len(x):
            raise UserError(f"test_images={test}: expected at most {len(x)}, the images of the {part} part")
        found[part] = jax.device_put((x[:count], y[:count]))
    return found


def data(config: StackConfig) -> dict[str, Any]:
    """(images uint8, labels) of the parts for training, validation and testing. Raises `UserError`."""
    found = _data(config.dataset, config.size, config.train_images, config.test_images)
    if config.compression == "int8":
        most = len(found["train"][0])
        require(config, "calibration", config.calibration <= most, f"at most {most}, the training images")
    return found


@functools.partial(jax.jit, static_argnums=0)
def _fit(own: classifier.Config, state: Any, key: Any, rows: Any, periods: Any, kept: Any, train: Any) -> Any:
    """Train for some periods; each begins with masks of `kept[n]` weights. One program for all lengths and counts."""
    learner = classifier.classifier(own)

    def update(carry: Any, at: Any) -> Any:
        state, masks = carry
        batch = classifier.augmented(own, jax.random.fold_in(key, state.step), (train[0][at], train[1][at]))
        state = learner.step(state, batch)[0]
        return (state._replace(params=compression.apply_masks(state.params, masks)), masks), ()

    def period(n: Any, state: Any) -> Any:
        masks = compression.masks_of_count(state.params, kept[n])
        state = state._replace(params=compression.apply_masks(state.params, masks))
        return lax.scan(update, (state, masks), rows[n])[0][0]

    return variables_of(lax.fori_loop(0, periods, period, state))


def _trained(config: StackConfig, widths: Sequence[int], start: Any, updates: int, lr: float, kept: Any) -> Any:
    """Variables after so many updates; `kept`: period -> number of weights, None: all."""
    own, train = training(config, widths), data(config)["train"]
    learner = classifier.classifier(own)
    each = -(-config.tune_updates // PERIODS)
    most = max(PERIODS, -(-config.updates // each))
    periods = -(-updates // each)
    seed = config.seed + (0 if start is None else 1_000_003)  # fine-tuning sees other batches than training
    k_init, k_data = jax.random.split(jax.random.key(seed))
    rows = shuffled_rows(len(train[0]), most, each, config.batch_size, seed)
    state = _start(own)(k_init, jnp.float32(lr))
    if start is not None:
        fresh = jax.tree.map(jnp.asarray, dict(start))
        state = state._replace(params=fresh.pop("params"), stats=fresh)
    state = learner.with_length(state, periods * each)  # pyright: ignore[reportOptionalCall]
    whole = compression.weight_count(state.params)
    counts = np.full(most, whole, np.int32)
    if kept is not None:
        counts[:] = [kept(n, whole) for n in range(most)]
    found = _fit(own, state, k_data, jnp.asarray(rows), jnp.int32(periods), jnp.asarray(counts), train)
    return jax.tree.map(np.asarray, found)


@functools.lru_cache(64)
def _start(own: classifier.Config) -> Callable[[Any, Any], Any]:
    """(key, learning rate) -> a run's first state; runs once per seed, so what is saved is compiling."""
    learner = classifier.classifier(own)
    begin = lambda key, lr: learner.init(key, learner.hypers._replace(lr=lr))
    return jax.jit(begin, compiler_options=ledger.known_options(tuple(ledger.CHEAP.items())))


def _shared(config: StackConfig, **changes: Any) -> StackConfig:
    """The config of what several points share: what does not matter for it is at rest."""
    rest = dict(primitive="xla", sparse="", tuned=False, device="cpu", trials=1, repeats=1, time_size=0)
    return dataclasses.replace(config, **(rest | changes))


def base(config: StackConfig) -> Any:
    """Variables of the dense network that all compressions start from."""
    return _base(_shared(config, compression="none", level=0.0, tune_lr=0.0, calibration=0))


@functools.lru_cache(256)
def _base(config: StackConfig) -> Any:
    return _trained(config, (), None, config.updates, config.lr, None)


def compressed(config: StackConfig) -> Net:
    """The network of a point after its fine-tuning; types other than float32 are cast from the dense one, which is
    fine-tuned as long."""
    return _compressed(_shared(config))


@functools.lru_cache(256)
def _compressed(config: StackConfig) -> Net:
    kind, level, classes = config.compression, config.level, images.facts(config.dataset).classes
    if kind not in (*REMOVING, "none"):
        dense = compressed(_shared(config, compression="none"))
        if kind != "int8":
            return dense._replace(kind=kind)
        train = data(config)["train"][0]
        shape = (dense.model, dense.classes, dense.widths)
        found = _quantised(training(config), shape, dense.variables, train[: config.calibration])
        return dense._replace(kind=kind, quantised=jax.tree.map(np.asarray, found))
    widths, start = (), base(config)
    if kind == "channels" and level:
        dense = zoo.network(config.model, classes)
        widths, start = compression.channel_prune(dense, start, level)
    kept = (lambda n, whole: schedule(n, level, whole)) if kind == "weights" and level else None
    found = _trained(config, widths, start, config.tune_updates, config.tune_lr, kept)
    return Net(config.model, classes, widths, kind, found)


def schedule(period: int, level: float, whole: int) -> int:
    """Weights that a period of fine-tuning keeps: sparsity rises by Zhu and Gupta's cubic to `level`."""
    if period + 1 >= RAMP:
        return compression.kept_count(whole, level)
    return compression.kept_count(whole, float(compression.gradual_sparsity(period + 1, RAMP, level)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _quantised(own: classifier.Config, shape: Any, variables: Any, x: Any) -> Quantised:
    net, x = Net._make((*shape, "none", variables, None)), classifier.prepared(own, x)
    folded, fewer = fold_batchnorm(network_of(net), variables, x)
    return compression.quantize_int8(folded, fewer, x)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _right(own: classifier.Config, shape: Any, variables: Any, quantised: Any, x: Any, y: Any) -> Any:
    net = Net._make((*shape, variables, quantised))

    def some(part: Any) -> Any:
        x = classifier.prepared(own, part[0])
        folded, fewer = fold_batchnorm(network_of(net), variables, x)
        ready = net._replace(variables=fewer)
        logits = outputs(folded, ready, x, fast_choices(folded, fewer, x.shape), simulated=True)
        return jnp.where(part[1] >= 0, logits.argmax(-1) == part[1], False).sum()

    return lax.map(some, (x, y)).sum()


def _grouped(v: Any, fill: int) -> Any:
    """Rows in groups [G, GROUP, ...], the last one filled."""
    v = jnp.pad(v, ((0, -len(v) % GROUP), *((0, 0),) * (v.ndim - 1)), constant_values=fill)
    return v.reshape(-1, GROUP, *v.shape[1:])


def accuracies(config: StackConfig, net: Net) -> dict[str, float]:
    """Shares of the validation and test images that are told right; int8 by its integers, computed in float32."""
    found = {}
    for part in ("valid", "test"):
        x, y = data(config)[part]
        shape = (net.model, net.classes, net.widths, "none" if net.kind in REMOVING else net.kind)
        groups = (_grouped(x, 0), _grouped(y, -1))
        found[part] = int(_right(training(config), shape, net.variables, net.quantised, *groups)) / len(x)
    return found


# Points and grids


def timed_image(config: StackConfig) -> tuple[int, int, int, int]:
    """Shape of what is timed."""
    rows, columns, channels = classifier.image_shape(training(config))
    side = config.time_size
    return (1, side or rows, side or columns, channels)


def run_stack(config: StackConfig) -> StackResult:
    """Train, compress, fine-tune, evaluate and time one point, beside the dense network.

    Args:
        config: the point. Networks that several points share are trained once per process.

    Raises:
        UserError: for data that is missing, or a point that there is none of.
    """
    return _run([config])[0]


def _run(group: Sequence[StackConfig]) -> list[StackResult]:
    """Points of one network and device, timed in turn."""
    first = group[0]
    net, dense = compressed(first), compressed(_shared(first, compression="none", level=0.0))
    image, right = timed_image(first), accuracies(first, net)
    jobs = [(net, Form(c.primitive, c.sparse, c.tuned)) for c in group]
    times = measure_on(first.device, dense, jobs, image, repeats=first.repeats, trials=first.trials)
    macs, whole = multiply_adds(net, image), multiply_adds(dense, image)
    sizes = (macs, parameter_count(net), stored_bytes(net, image))
    found = []
    for one in times:
        own, other = timing.Timing(one.seconds), timing.Timing(one.dense)
        plan = {name: str(layer.choice) for name, layer in one.plan.items()}
        expected = other.median * (macs / whole)
        seconds = (own.best, own.median, other.median, expected)
        found.append(StackResult(right["test"], right["valid"], *sizes, *seconds, one.computed, plan))
    return found


def run_grid(
    points: Iterable[StackConfig],
    path: str | Path | None = None,
    tell: Callable[[StackConfig, StackResult], None] = lambda config, result: None,
) -> dict[StackConfig, StackResult]:
    """Run many points; those of one network and device are timed in turn.

    Args:
        points: the grid.
        path: of a file of JSON lines that results are appended to as they come; what it holds is not run again.
        tell: called for each result that is new.

    Returns:
        Results of all points, in their order.

    Raises:
        UserError: for a file that is damaged, or as `run_stack`.
    """
    points = list(dict.fromkeys(points))
    found = read_results(path) if path is not None and Path(path).exists() else {}
    groups: dict[StackConfig, list[StackConfig]] = {}
    for point in points:
        if point not in found:
            alike = dataclasses.replace(point, primitive="xla", sparse="", tuned=False)
            groups.setdefault(alike, []).append(point)
    for group in groups.values():
        for point, result in zip(group, _run(group)):
            found[point] = result
            if path is not None:
                _append(Path(path), point, result)
            tell(point, result)
    return {point: found[point] for point in points}


def _append(path: Path, config: StackConfig, result: StackResult) -> None:
    line = json.dumps({"config": dataclasses.asdict(config), "result": result._asdict()})
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror})") from e


def read_results(path: str | Path) -> dict[StackConfig, StackResult]:
    """The results in a file of `run_grid`; a last line that was cut off is removed from it.

    Raises:
        UserError: for a file that cannot be read, or another damaged line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        if not text.endswith("\n") and text:  # the process died while it wrote
            text = text[: text.rfind("\n") + 1]
            path.write_text(text, encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read ({e})") from e
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            content = json.loads(line)
            result = StackResult(**content["result"])
            found[StackConfig(**content["config"])] = result._replace(computed=tuple(result.computed))
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{path}: line {number} is damaged, expected a result of the stack as JSON") from e
    return found


def grid(
    models: Sequence[str],
    levels: Sequence[float],
    compressions: Sequence[str] = ("weights", "channels", "float16", "bfloat16", "int8"),
    primitives: Sequence[str] = ("xla", "direct", "gemm", "spatial-pack"),
    devices: Sequence[str] = ("cpu",),
    **shared: Any,
) -> list[StackConfig]:
    """The points that are of use of a factorial grid: the dense network by every primitive and tuned; weights removed,
    run as if they were there, as CSR and as BCOO; fewer channels, as they are and tuned; other types by XLA, int8 by
    GEMM too.

    Args:
        models: names of networks.
        levels: shares of weights and channels that are removed.
        compressions: beside none.
        primitives: of the dense network.
        devices: see `StackConfig`.
        **shared: further fields of all points.

    Raises:
        UserError: for a point that there is none of.
    """
    removed = [dict(primitive="xla"), dict(primitive="gemm", sparse="csr"), dict(primitive="gemm", sparse="bcoo")]
    forms: dict[str, list[dict[str, Any]]] = {
        "none": [*(dict(primitive=p) for p in primitives), dict(tuned=True)],
        "weights": removed,
        "channels": [{}, dict(tuned=True)],
        "int8": [dict(primitive="xla"), dict(primitive="gemm")],
    }
    found = []
    for model in models:
        for device in devices:
            for kind in dict.fromkeys(("none", *compressions)):
                for level in levels if kind in REMOVING else (0.0,):
                    point = dict(model=model, device=device, compression=kind, level=level)
                    found += [StackConfig(**{**shared, **point, **form}) for form in forms.get(kind, [{}])]
    return found


def table(results: dict[StackConfig, StackResult]) -> list[dict[str, Any]]:
    """Results as rows: what tells the points apart, then the numbers; times in milliseconds."""
    names = ("model", "compression", "level", "primitive", "sparse", "tuned", "device", "seed")
    rows = []
    for config, r in results.items():
        row: dict[str, Any] = {name: getattr(config, name) for name in names}
        row |= {"accuracy": r.accuracy, "macs": r.macs, "params": r.params, "bytes": r.bytes}
        times = {"t_min": r.t_min, "t_median": r.t_median, "t_dense": r.t_dense, "t_expected": r.t_expected}
        row |= {name: 1e3 * seconds for name, seconds in times.items()}
        rows.append(row | {"efficiency": r.efficiency, "computed": " ".join(r.computed)})
    return rows


def operating_points(
    results: dict[StackConfig, StackResult], tolerance: float = 0.01
) -> dict[tuple[str, str], StackConfig]:
    """The largest compression at nearly the dense accuracy, for comparisons at equal accuracy and not at equal ratio.

    Args:
        results: of a grid with the dense network of every model.
        tolerance: accuracy on validation images that may be lost.

    Returns:
        (model, compression) -> the point of the largest level, and of the least time at that level; a compression that
        loses more at every level is left out.
    """
    best: dict[tuple[str, str], StackConfig] = {}
    for config, result in results.items():
        dense = [r.valid_accuracy for c, r in results.items() if c.model == config.model and c.compression == "none"]
        if not dense:
            raise UserError(f"results: found no dense network of {config.model}, expected one to compare with")
        if result.valid_accuracy < max(dense) - tolerance:
            continue
        key = (config.model, config.compression)
        rank = lambda c: (c.level, -results[c].t_median)
        if key not in best or rank(config) > rank(best[key]):
            best[key] = config
    return best
