"""Compressed networks as deployed: their programs, sizes and work, a search for the fastest form, and times.

A `Net` is plain data. It is compiled with its weights as constants, in a `Form` (primitive, sparse matrices, what was
tuned), and timed beside the dense network with batches of one image, in this process or in one that may use fewer
cores.
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse import csr_matrix

from jaxstack.core.devices import available_cores
from jaxstack.core.errors import UserError
from jaxstack.nn import compression
from jaxstack.nn import lowering as low
from jaxstack.nn.compression import Quantised
from jaxstack.nn.conv_forms import Window, out_size
from jaxstack.nn.lowering import Choice, Layer
from jaxstack.nn.vision import zoo
from jaxstack.nn.vision.folding import Folded, fold_batchnorm
from jaxstack.report import timing

TYPES: dict[str, Any] = {"float16": jnp.float16, "bfloat16": jnp.bfloat16}


class Net(NamedTuple):
    """A compressed network, as plain data."""

    model: str
    classes: int
    widths: tuple[int, ...]
    """Empty: those of the literature."""
    kind: str
    """Its compression."""
    variables: Any
    quantised: Quantised | None = None


def network_of(net: Net) -> Any:
    """The unbound flax module."""
    return zoo.network(net.model, net.classes, mid_features=net.widths or None)


Choices = dict[str, Choice] | Choice
"""One for each layer by name, XLA's own for others; or one for all."""


def outputs(folded: Folded, net: Net, x: Any, choices: Choices = Choice(), simulated: bool = False) -> Any:
    """Logits of a network with folded norms, in the type of its compression; `simulated` as of `apply_int8`."""
    if net.kind == "int8":
        assert net.quantised is not None
        return compression.apply_int8(folded, net.variables, net.quantised, x, choices, simulated)
    dtype = TYPES.get(net.kind, jnp.float32)
    cast = jax.tree.map(lambda v: jnp.asarray(v, dtype), net.variables)
    of = lambda name: choices if isinstance(choices, Choice) else choices.get(name, Choice())
    compute = lambda name, x, kernel, window: low.multiplied(x, kernel, window, of(name))
    return low.apply_by(folded, cast, x.astype(dtype), compute).astype(jnp.float32)


def fast_choices(folded: Folded, variables: Any, image: Sequence[int]) -> dict[str, Choice]:
    """Choices for evaluation: XLA's own convolution is slow where it is depthwise."""
    layers = low.layers_of(folded, variables, image)
    return {v.name: Choice("direct") for v in layers if v.window and low.is_depthwise(v.kernel, v.window)}


# Size and work


class Ready(NamedTuple):
    """A network with folded norms, for images of one shape."""

    folded: Folded
    net: Net
    """With the folded variables."""
    layers: tuple[Layer, ...]


_READY: dict[tuple[int, tuple[int, ...]], tuple[Any, Folded, Any, tuple[Layer, ...]]] = {}


def ready_net(net: Net, image: Sequence[int]) -> Ready:
    """Fold the norms of a network, for images of a shape. The last networks are kept, as tracing takes time."""
    key = (id(net.variables), tuple(image))
    if key not in _READY:  # what is kept holds the variables, so that no others get their id
        x = jax.ShapeDtypeStruct(tuple(image), jnp.float32)
        folded, fewer = fold_batchnorm(network_of(net), net.variables, x)
        fewer = jax.tree.map(np.asarray, fewer)
        while len(_READY) >= 64:
            del _READY[next(iter(_READY))]
        _READY[key] = (net.variables, folded, fewer, low.layers_of(folded, fewer, image))
    _, folded, fewer, layers = _READY[key]
    return Ready(folded, net._replace(variables=fewer), layers)


def _kernel(variables: Any, name: str) -> np.ndarray:
    tree = variables["params"]
    for part in name.split("/"):
        tree = tree[part]
    return np.asarray(tree["kernel"])


def multiply_adds(net: Net, image: Sequence[int]) -> int:
    """Per image; removed weights are not counted."""
    _, own, layers = ready_net(net, (1, *image[1:]))
    if net.kind != "weights":
        return sum(layer.macs for layer in layers)
    return sum(layer.uses * int(np.count_nonzero(_kernel(own.variables, layer.name))) for layer in layers)


def weights_for(net: Net, macs: int, image: Sequence[int]) -> int:
    """How many of the largest weights of a dense network have at most so many multiply-adds."""
    _, _, layers = ready_net(net, (1, *image[1:]))
    kernels = [np.abs(_kernel(net.variables, layer.name)).reshape(-1) for layer in layers]
    uses = np.concatenate([np.full(len(k), layer.uses) for k, layer in zip(kernels, layers)])
    order = np.argsort(-np.concatenate(kernels), kind="stable")
    return int(np.searchsorted(np.cumsum(uses[order]), macs, "right"))


def stored_bytes(net: Net, image: Sequence[int]) -> int:
    """Bytes of the network with folded norms: float32, 2 bytes of the short floats, CSR where weights are removed; int8
    with its scales and biases of 4 bytes."""
    _, own, layers = ready_net(net, image)
    leaves = jax.tree.leaves(own.variables)
    if net.kind in TYPES:
        return 2 * sum(v.size for v in leaves)
    kernels = [_kernel(own.variables, layer.name) for layer in layers]
    rest = 4 * (sum(v.size for v in leaves) - sum(v.size for v in kernels))
    if net.kind == "weights":
        return rest + sum(low.csr_bytes(int(np.count_nonzero(v)), v.shape[-1]) for v in kernels)
    if net.kind == "int8":
        return rest + sum(v.size + 4 * v.shape[-1] + 4 for v in kernels)
    return rest + 4 * sum(v.size for v in kernels)


def parameter_count(net: Net) -> int:
    """Trained numbers that are not removed."""
    leaves = jax.tree.leaves(net.variables["params"])
    count = sum(v.size for v in leaves)
    if net.kind == "weights":
        count -= sum(int((np.asarray(v) == 0).sum()) for v in leaves if v.ndim > 1)
    return count


# Programs and their times


class Form(NamedTuple):
    """How a network is run."""

    primitive: str = "xla"
    sparse: str = ""
    tuned: bool = False


class Program(NamedTuple):
    """A compiled network: images [1, H, W, C] float -> logits. Weights are constants of it, as in deployment."""

    call: Callable[[Any], Any]
    computed: tuple[str, ...]
    """Types of its products, as compiled."""


def program(
    net: Net, form: Form, image: Sequence[int], plan: dict[str, Choice] | None = None, types: bool = True
) -> Program:
    """Compile a network in a form; `plan` has the choices of a tuned one."""
    folded, own, layers = ready_net(net, image)
    x = jax.ShapeDtypeStruct(tuple(image), jnp.float32)
    if form.sparse == "csr":
        return _host(folded, own, x)
    if form.sparse == "bcoo":
        plain = [v for v in layers if v.window and v.window.groups == 1]
        matrices = {v.name: low.as_bcoo(_kernel(own.variables, v.name)) for v in plain}

        def compute(name: str, x: Any, kernel: Any, window: Any) -> Any:
            if name not in matrices:
                return low.multiplied(x, kernel, window, Choice("direct"))
            return low.conv_gemm_bcoo(x, matrices[name], window=window)

        run = lambda x: low.apply_by(folded, own.variables, x, compute)
    else:
        choices = plan if plan is not None else Choice(form.primitive)
        run = lambda x: outputs(folded, own, x, choices)
    compiled = jax.jit(run).lower(x).compile()
    return Program(compiled, low.computed_types(compiled.as_text() or "") if types else ())


def _host(folded: Folded, own: Net, x: Any) -> Program:
    """Convolutions by SciPy's CSR on the host, depthwise and dense layers and all between in programs of XLA."""
    calls = {}

    def compute(name: str, x: Any, kernel: Any, window: Any) -> Any:
        if window is None or window.groups > 1:
            return low.multiplied(x, kernel, window, Choice("direct"))
        matrix = csr_matrix(low.as_matrix(_kernel(own.variables, name)))
        calls[name] = lambda seen: low.conv_gemm_csr(seen, matrix, window=window)
        out = (x.shape[0], *out_size(x.shape[1:3], window), kernel.shape[3])
        return low.host_conv_p.bind(x, name=name, out=out)

    apply = lambda x: low.apply_by(folded, own.variables, x, compute)
    jax.eval_shape(apply, x)  # fills `calls`
    return Program(low.host_program(apply, x, calls), ("f32",))


class Tuned(NamedTuple):
    """What a search found for a layer's shape."""

    choice: Choice
    """The fastest when timed again."""
    first: dict[str, float]
    """Median seconds of every candidate in the search."""
    again: dict[str, tuple[float, ...]]
    """Seconds of fresh repeats: of each primitive untuned, and of the search's fastest."""


def untuned(layer: Layer) -> list[Choice]:
    """Each primitive as it is without a search."""
    if low.is_depthwise(layer.kernel, _window(layer)):
        return [Choice(), Choice("direct")]
    tile = (low.largest_divisor(_rows(layer), low.ROWS), low.largest_divisor(layer.kernel[3], low.LANES))
    return [Choice(), Choice("direct"), Choice("gemm"), Choice("spatial-pack", "nhwc", *tile)]


def search_space(layer: Layer) -> list[Choice]:
    """All choices for a layer: primitive, layout, tile."""
    if low.is_depthwise(layer.kernel, _window(layer)):
        return [Choice(), Choice("xla", "nchw"), Choice("direct")]
    divisors = lambda n: [d for d in range(1, n + 1) if n % d == 0]
    lanes = [d for d in divisors(layer.kernel[3]) if d >= min(8, layer.kernel[3])]
    tiles = [Choice("spatial-pack", "nhwc", r, d) for r in divisors(_rows(layer)) for d in lanes]
    both = [Choice(p, layout) for p in ("xla", "gemm") for layout in ("nhwc", "nchw")]
    return [*both, Choice("direct"), *tiles]


def _window(layer: Layer) -> Window:
    if layer.window is None:
        raise UserError(f"tune: {layer.name} is a dense layer, expected convolutions")
    return layer.window


def _rows(layer: Layer) -> int:
    return out_size(layer.image[1:3], _window(layer))[0]


def neighbours(choice: Choice, space: Sequence[Choice]) -> list[Choice]:
    """Choices of the same primitive that differ in one dial by one place."""
    same = [c for c in space if c.primitive == choice.primitive and c != choice]
    places = {dial: sorted({getattr(c, dial) for c in (*same, choice)}) for dial in ("layout", "rows", "lanes")}
    away = lambda c: sum(abs(p.index(getattr(c, d)) - p.index(getattr(choice, d))) for d, p in places.items())
    return [c for c in same if away(c) == 1]


def tune(
    layers: Iterable[Layer], trials: int = 12, seed: int = 0, repeats: int = 5, at_least: float = 0.003
) -> dict[str, Tuned]:
    """Search the fastest way to compute each convolution: random choices, then neighbours of the best.

    XLA's own convolution and the other primitives as they are come first. The fastest of a search has had luck as well,
    so it is timed again, in turn with all primitives as they are, and what is fastest then is chosen.

    Args:
        layers: convolutions; dense layers are left out. Layers of one shape share a search.
        trials: candidates per shape.
        seed: of the draws.
        repeats: of the second timing; each candidate of the search has 3.
        at_least: seconds that a repeat of the search lasts; those of the second timing four times as long.

    Returns:
        By the name of the layer.
    """
    if trials < 1:
        raise UserError(f"trials={trials}: expected at least 1")
    found: dict[Any, Tuned] = {}
    layers = [layer for layer in layers if layer.window is not None]
    for layer in layers:
        shape = (layer.image, layer.kernel, layer.window)
        if shape in found:
            continue
        rng = np.random.default_rng(seed)
        space, start = search_space(layer), untuned(layer)[:trials]
        first: dict[Choice, float] = {}
        for n in range(min(trials, len(space))):
            left = [c for c in space if c not in first]
            near = [c for c in neighbours(min(first, key=first.__getitem__), space) if c in left] if first else []
            pool = near if near and n >= (len(start) + trials) // 2 else left
            choice = start[n] if n < len(start) else pool[rng.integers(len(pool))]
            first[choice] = layer_times(layer, [choice], 3, at_least)[choice].median
        best = min(first, key=first.__getitem__)
        again = layer_times(layer, list(dict.fromkeys((*start, best))), repeats, 4 * at_least)
        chosen = min(again, key=lambda c: again[c].median)
        seconds = {str(c): t.seconds for c, t in again.items()}
        found[shape] = Tuned(chosen, {str(c): t for c, t in first.items()}, seconds)
    return {layer.name: found[layer.image, layer.kernel, layer.window] for layer in layers}


def layer_times(
    layer: Layer, choices: Sequence[Choice], repeats: int, at_least: float = 0.003
) -> dict[Choice, timing.Timing]:
    """Times of a convolution by choice, in turn; kernels are constants."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal(layer.image, np.float32))
    kernel = rng.standard_normal(layer.kernel, np.float32)
    window = _window(layer)
    ready = {
        c: jax.jit(lambda x, c=c: low.lowered(x, jnp.asarray(kernel), window=window, choice=c)).lower(x).compile()
        for c in choices
    }
    return timing.calls_in_turn(ready, [(x,), (x + 1.0,)], repeats, at_least, calls=100)


class Measured(NamedTuple):
    """Times of a network in a form, and of the dense one beside it."""

    seconds: tuple[float, ...]
    dense: tuple[float, ...]
    computed: tuple[str, ...]
    plan: dict[str, Tuned]


def measure(
    dense: Net,
    jobs: Sequence[tuple[Net, Form]],
    image: Sequence[int],
    repeats: int = 5,
    trials: int = 12,
    at_least: float = 0.01,
) -> list[Measured]:
    """Time networks in forms and the dense float32 network by XLA, all in turn, batch 1."""
    rng = np.random.default_rng(0)
    args = [(jnp.asarray(rng.standard_normal(image, np.float32)),) for _ in range(2)]
    ready: dict[Any, Program] = {"dense": program(dense, Form(), image)}
    plans: dict[int, dict[str, Tuned]] = {}
    for n, (net, form) in enumerate(jobs):
        if form.tuned:
            plans[n] = tune(ready_net(net, image).layers, trials, repeats=repeats)
        choices = {name: found.choice for name, found in plans[n].items()} if n in plans else None
        # the dense network is not timed twice
        ready[n] = ready["dense"] if net is dense and form == Form() else program(net, form, image, choices)
    calls = {name: found.call for name, found in ready.items() if name == "dense" or found is not ready["dense"]}
    times = timing.calls_in_turn(calls, args, repeats, at_least, calls=100)
    return [
        Measured(times.get(n, times["dense"]).seconds, times["dense"].seconds, ready[n].computed, plans.get(n, {}))
        for n in range(len(jobs))
    ]


def measure_on(device: str, *args: Any, **options: Any) -> list[Measured]:
    """`measure` in this process, or on cpu-N in one of its own that may use so many cores.

    Raises:
        UserError: when that process fails, with its last line.
    """
    _, _, cores = device.partition("-")
    if not cores:
        return measure(*args, **options)
    if not hasattr(os, "sched_setaffinity"):
        raise UserError(f"device={device!r}: this system cannot keep a process on some cores, expected cpu")
    call = (available_cores()[: int(cores)], args, options)
    command = [sys.executable, "-c", "from jaxstack.nn.deployment import _child; _child()"]
    done = subprocess.run(command, input=pickle.dumps(call), capture_output=True)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise UserError(f"device={device!r}: the measuring process failed ({lines[-1]})")
    found = pickle.loads(done.stdout)
    if isinstance(found, str):
        raise UserError(found)
    return found


def _child() -> None:
    """Measure what comes in, on some cores; before anything starts XLA's threads."""
    cores, args, options = pickle.load(sys.stdin.buffer)
    os.sched_setaffinity(0, cores)
    try:
        found: Any = measure(*args, **options)
    except UserError as e:
        found = str(e)
    sys.stdout.buffer.write(pickle.dumps(found))
