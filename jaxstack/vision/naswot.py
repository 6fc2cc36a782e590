"""Neural architecture search without training: cells ranked at initialisation by how their ReLUs tell images apart.

Mellor, Turner, Storkey and Crowley, ICML 2021 (arXiv 2006.04647). One minibatch gives each ReLU unit's binary code over
its images; K[i, j] counts the units that agree on images i and j (equation 1), and the score is log |det K| (2). The
search space is NAS-Bench-201 (Dong and Yang, 2020) as data: a cell is six numbers, so all 15,625 cells run in one
program. Rivals with the same interface: number of parameters, gradient norm, SynFlow.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxstack.core.errors import UserError
from jaxstack.core.learner import Key
from jaxstack.data import augment
from jaxstack.nn.conv import conv2d
from jaxstack.nn.relu_codes import agreement
from jaxstack.nn.relu_codes import hamming_kernel as hamming_kernel
from jaxstack.nn.relu_codes import relu_codes as relu_codes
from jaxstack.nn.supervised import Hypers, Model, Optimiser, cross_entropy, supervised, variables

OPS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
NONE, SKIP, CONV1, CONV3, POOL = range(5)
EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
"""(from, to) of a cell's six edges; a node is the sum of what reaches it, node 3 the output."""
COUNT = len(OPS) ** len(EDGES)


# The search space


def encode_cell(text: str) -> np.ndarray:
    """`|op~0|+|op~0|op~1|+|op~0|op~1|op~2|` -> [6] int32 indices into `OPS`. Raises `UserError`."""
    nodes = text.strip().split("+")
    found = [re.findall(r"([^|~]+)~(\d)", node) for node in nodes]
    if [[int(i) for _, i in node] for node in found] != [[0], [0, 1], [0, 1, 2]]:
        raise UserError(f"cell {text!r}: expected |op~0|+|op~0|op~1|+|op~0|op~1|op~2|")
    names = [name for node in found for name, _ in node]
    for name in names:
        if name not in OPS:
            raise UserError(f"cell {text!r}: unknown operation {name!r}, expected one of {', '.join(OPS)}")
    return np.array([OPS.index(name) for name in names], np.int32)


def decode_cell(cell: Any) -> str:
    """[6] indices -> the cell's string."""
    ops = [OPS[int(i)] for i in cell]
    return "+".join("|" + "".join(f"{op}~{i}|" for i, op in enumerate(part)) for part in (ops[:1], ops[1:3], ops[3:]))


def all_cells() -> np.ndarray:
    """All [15625, 6] cells, the last edge changing fastest."""
    return np.stack(np.meshgrid(*[np.arange(5)] * 6, indexing="ij"), -1).reshape(-1, 6).astype(np.int32)


def cell_number(cell: Any) -> Any:
    """[..., 6] -> [...] its place in `all_cells`."""
    return (cell * (5 ** np.arange(6)[::-1])).sum(-1)


def sample_cells(key: Key, count: int) -> Array:
    """[count, 6] cells drawn uniformly, with replacement."""
    return jax.random.randint(key, (count, 6), 0, len(OPS), jnp.int32)


def mutate_cell(key: Key, cell: Array) -> Array:
    """The cell [6] with one edge's operation changed to another one."""
    k_edge, k_op = jax.random.split(key)
    edge = jax.random.randint(k_edge, (), 0, 6)
    step = jax.random.randint(k_op, (), 1, len(OPS))
    return cell.at[edge].set((cell[edge] + step) % len(OPS))


def connected(cell: Any) -> np.ndarray:
    """[..., 6] -> [...] whether the output depends on the input."""
    cell = np.asarray(cell)
    reach = [np.ones(cell.shape[:-1], bool)] + [np.zeros(cell.shape[:-1], bool) for _ in range(3)]
    for e, (i, j) in enumerate(EDGES):
        reach[j] = reach[j] | (reach[i] & (cell[..., e] != NONE))
    return reach[3]


class Skeleton(NamedTuple):
    """What a cell is put into: a stem, three stages of cells, a residual block with stride 2 between them, a head."""

    channels: int = 16
    """Of the first stage; doubled twice."""
    cells: int = 5
    """Per stage."""
    image: int = 32
    """Pixels on a side."""
    inputs: int = 3
    """Channels of an image."""
    classes: int = 10


def num_params(cell: Any, skeleton: Skeleton = Skeleton()) -> np.ndarray:
    """[..., 6] -> [...] trained numbers of the whole network, in which an edge holds what its operation needs."""
    cell, c = np.asarray(cell), skeleton.channels
    ones, threes = (cell == CONV1).sum(-1), (cell == CONV3).sum(-1)
    total = 9 * skeleton.inputs * c + 2 * c + 0 * ones
    for stage in range(3):
        width = c * 2**stage
        total = total + skeleton.cells * (ones * (width**2 + 2 * width) + threes * (9 * width**2 + 2 * width))
        if stage:
            half = width // 2
            total = total + 9 * half * width + 9 * width**2 + half * width + 4 * width
    return total + 2 * 4 * c + (4 * c + 1) * skeleton.classes


def num_units(cell: Any, skeleton: Skeleton = Skeleton()) -> np.ndarray:
    """[..., 6] -> [...] ReLU units of the whole network, N_A."""
    convs = np.isin(np.asarray(cell), (CONV1, CONV3)).sum(-1)
    units, total = skeleton.channels * skeleton.image**2, 0 * convs
    for stage in range(3):
        here = units // 2**stage  # channels double, pixels fall to a quarter
        total = total + skeleton.cells * convs * here
        if stage:
            total = total + 2 * here + here  # both ReLUs of the block: before stride 2, and after
    return total + units // 4


# The network: every edge has the weights of all operations, and a cell says which are used


def uniform_fan_in(key: Key, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    """PyTorch's default: uniform in +-1/sqrt(fan in)."""
    bound = float(np.prod(shape[:-1])) ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def he_normal(key: Key, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    """Normal with variance 2 / fan in."""
    return jax.random.normal(key, shape, dtype) * float(2 / np.prod(shape[:-1])) ** 0.5


INITS: dict[str, Callable[..., Array]] = {
    "uniform": uniform_fan_in,
    "he": he_normal,
    "orthogonal": nn.initializers.orthogonal(),
}


class CellNetwork(nn.Module):
    """A NAS-Bench-201 network whose cell is data. `__call__(x, cell, train)` -> logits; with `score` also K.

    Args (of the call): images [B, H, W, C] float, cell [6] int, whether BatchNorm takes the batch's statistics.
    """

    skeleton: Skeleton = Skeleton()
    initial: str = "uniform"
    """Name in `INITS`."""
    score: bool = False
    """Return (logits, K [B, B] int32 of the paper's definition, K of the last ReLU alone)."""
    norm: bool = True
    """BatchNorm; without it SynFlow's network."""

    @nn.compact
    def __call__(self, x: Array, cell: Array, train: bool = False) -> Any:
        batch, kernels = len(x), []

        def relu(x: Array, times: Any = 1) -> Array:
            if self.score:
                kernels.append(times * agreement(x > 0))
            return jax.nn.relu(x)

        def norm(x: Array) -> Array:
            if not self.norm:
                return x
            return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5)(x)

        def weights(name: str, *shape: int) -> Array:
            return self.param(name, INITS[self.initial], shape)

        def node(nodes: list[Array], to: int, name: str) -> Array:
            parts = []
            for e, (i, j) in enumerate(EDGES):
                if j != to:
                    continue
                c = x.shape[-1]
                one, three = weights(f"{name}_{e}_1x1", 1, 1, c, c), weights(f"{name}_{e}_3x3", 3, 3, c, c)
                ops = (
                    lambda x, one, three: jnp.zeros_like(x),
                    lambda x, one, three: x,
                    lambda x, one, three: conv2d(jax.nn.relu(x), one),
                    lambda x, one, three: conv2d(jax.nn.relu(x), three),
                    lambda x, one, three: nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False),
                )
                y = lax.switch(cell[e], ops, nodes[i], one, three)
                conv = (cell[e] == CONV1) | (cell[e] == CONV3)
                parts.append(jnp.where(conv, norm(y), y))
            return functools.reduce(jnp.add, parts)

        c, inputs = self.skeleton.channels, x.shape[-1]
        x = norm(conv2d(x, weights("stem", 3, 3, inputs, c)))
        for stage in range(3):
            if stage:
                c = 2 * c
                y = norm(conv2d(relu(x), weights(f"down{stage}_a", 3, 3, c // 2, c), 2, 1))
                y = norm(conv2d(relu(y), weights(f"down{stage}_b", 3, 3, c, c)))
                shortcut = nn.avg_pool(x, (2, 2), (2, 2))
                x = y + conv2d(shortcut, weights(f"down{stage}_shortcut", 1, 1, c // 2, c))
            for n in range(self.skeleton.cells):
                nodes = [x]
                for to in (1, 2, 3):
                    nodes.append(node(nodes, to, f"cell{stage}_{n}"))
                if (
                    self.score
                ):  # the ReLU of an edge sees its first node, so equal codes are counted, not computed again
                    for i in range(3):
                        edges = [cell[e] for e, (a, _) in enumerate(EDGES) if a == i]
                        kernels.append(sum((op == CONV1) | (op == CONV3) for op in edges) * agreement(nodes[i] > 0))
                x = nodes[3]
        x = relu(norm(x))
        logits = nn.Dense(self.skeleton.classes, kernel_init=INITS[self.initial])(x.mean((1, 2)))
        if not self.score:
            return logits
        return logits, functools.reduce(jnp.add, kernels, jnp.zeros((batch, batch), jnp.int32)), kernels[-1]


# Scores


def naswot_score(kernel: Any) -> np.ndarray:
    """log |det K| of [..., B, B] in float64 (equation 2); -inf where images cannot be told apart."""
    sign, value = np.linalg.slogdet(np.asarray(kernel, np.float64))
    return np.where((sign == 0) | ~np.isfinite(value), -np.inf, value)


class Scoring(NamedTuple):
    """How cells are scored."""

    skeleton: Skeleton = Skeleton()
    init: str = "uniform"
    relu_weights: Literal["paper", "reference"] = "paper"
    """"reference": the released hooks count each ReLU twice, but for the last one."""
    repeats: int = 1
    """Mean over so many draws of weights and, where there is any, noise."""
    noise: float = 0.0
    """Standard deviation of Gaussian noise on the images."""
    cutout: int = 0
    """Side of a square of zeros at a random place of each image."""
    dropout: float = 0.0
    """Share of the images' channels set to zero, each with its own draw."""
    same: bool = False
    """All images are copies of the first one, so noise and cutout alone tell them apart."""


def perturbed(key: Key, x: Array, scoring: Scoring) -> Array:
    """Images [B, H, W, C] with a scoring's noise, squares and missing channels."""
    k_noise, k_cut, k_drop = jax.random.split(key, 3)
    x = jnp.broadcast_to(x[:1], x.shape) if scoring.same else x
    if scoring.noise:
        x = x + scoring.noise * jax.random.normal(k_noise, x.shape)
    if scoring.cutout:
        centre = jax.random.randint(k_cut, (len(x), 2), 0, jnp.array(x.shape[1:3]))
        x = jax.vmap(augment.with_square, (0, 0, None))(x, centre, scoring.cutout)
    if scoring.dropout:
        x = x * jax.random.bernoulli(k_drop, 1.0 - scoring.dropout, (len(x), 1, 1, x.shape[3]))
    return x


@functools.partial(jax.jit, static_argnums=3)
def _kernels(keys: Array, cells: Array, x: Array, scoring: Scoring) -> Array:
    network = CellNetwork(scoring.skeleton, scoring.init, score=True)

    def one(given: tuple[Array, Array]) -> Array:
        key, cell = given
        k_init, k_noise = jax.random.split(key)
        (_, whole, last), _ = network.init_with_output(k_init, perturbed(k_noise, x, scoring), cell, True)
        return whole if scoring.relu_weights == "paper" else 2 * whole - last

    return lax.map(one, (keys, cells))


def kernels(key: Key, cells: Any, images: Any, scoring: Scoring = Scoring()) -> Array:
    """K [N, B, B] int32 of N cells (equation 1), each with weights of its own; one program for all cells.

    Args:
        key: of weights and noise.
        cells: [N, 6].
        images: [B, H, W, C] float, normalised, of the skeleton's size and channels.
        scoring: skeleton and settings.

    Raises:
        UserError: for images of another size, images that are not finite, or cells outside the space.
    """
    cells, images = np.asarray(cells, np.int32), np.asarray(images, np.float32)
    side, inputs = scoring.skeleton.image, scoring.skeleton.inputs
    if images.ndim != 4 or images.shape[1:] != (side, side, inputs) or not len(images):
        raise UserError(f"images: found shape {list(images.shape)}, expected [B, {side}, {side}, {inputs}]")
    if not np.isfinite(images).all():
        raise UserError("images: expected finite values")
    if cells.ndim != 2 or cells.shape[1] != 6 or cells.min(initial=0) < 0 or cells.max(initial=0) >= len(OPS):
        raise UserError(f"cells: expected [N, 6] numbers 0 to 4, found {list(cells.shape)}")
    return _kernels(jax.random.split(key, len(cells)), jnp.asarray(cells), jnp.asarray(images), scoring)


def scores(key: Key, cells: Any, images: Any, scoring: Scoring = Scoring()) -> np.ndarray:
    """Scores [N] of N cells on a minibatch: see `kernels`. Cells that the input does not pass get -inf."""
    found = []
    for k in jax.random.split(key, scoring.repeats):
        found.append(naswot_score(kernels(k, cells, images, scoring)))
    return np.where(connected(cells), np.mean(found, 0), -np.inf)


@functools.partial(jax.jit, static_argnums=4)
def _gradient_norms(keys: Array, cells: Array, x: Array, y: Array, scoring: Scoring) -> Array:
    network = CellNetwork(scoring.skeleton, scoring.init)

    def one(given: tuple[Array, Array]) -> Array:
        key, cell = given
        start = network.init(key, x, cell, True)

        def loss(params: Any) -> Array:
            logits, _ = network.apply({**start, "params": params}, x, cell, True, mutable=["batch_stats"])
            return -jax.nn.log_softmax(logits)[jnp.arange(len(y)), y].mean()

        return jnp.sqrt(sum(jnp.square(g).sum() for g in jax.tree.leaves(jax.grad(loss)(start["params"]))))

    return lax.map(one, (keys, cells))


def gradient_norms(key: Key, cells: Any, images: Any, labels: Any, scoring: Scoring = Scoring()) -> np.ndarray:
    """Norms [N] of the gradient of the cross entropy on a labelled minibatch at initialisation."""
    args = (jnp.asarray(cells), jnp.asarray(images, jnp.float32), jnp.asarray(labels, jnp.int32))
    return np.asarray(_gradient_norms(jax.random.split(key, len(cells)), *args, scoring), np.float64)


@functools.partial(jax.jit, static_argnums=2)
def _synflow(keys: Array, cells: Array, scoring: Scoring) -> Array:
    network = CellNetwork(scoring.skeleton, scoring.init, norm=False)
    side, inputs = scoring.skeleton.image, scoring.skeleton.inputs
    x = jnp.ones((1, side, side, inputs))

    def one(given: tuple[Array, Array]) -> Array:
        key, cell = given
        params = jax.tree.map(jnp.abs, network.init(key, x, cell)["params"])
        output = lambda p: jnp.log(jnp.sum(network.apply({"params": p}, x, cell)))  # pyright: ignore[reportArgumentType]
        # the sum of |theta dR/dtheta| in the log domain: log R plus that of d log R
        relative = jax.grad(output)(params)
        return output(params) + jnp.log(sum((p * g).sum() for p, g in zip(*map(jax.tree.leaves, (params, relative)))))

    return lax.map(one, (keys, cells))


def synflow(key: Key, cells: Any, scoring: Scoring = Scoring()) -> np.ndarray:
    """log of SynFlow [N] (Tanaka et al., 2020): sum of |theta dR/dtheta|, R the sum of outputs of a network of absolute
    weights without BatchNorm for an image of ones. -inf where no weight of the cells matters."""
    found = np.asarray(_synflow(jax.random.split(key, len(cells)), jnp.asarray(cells), scoring), np.float64)
    return np.where(np.isfinite(found), found, -np.inf)


# Search


def random_search(values: Any, count: int, repeats: int, seed: int = 0) -> np.ndarray:
    """Places [repeats] of the best of `count` cells drawn with replacement, by `values` [N]; NaN is never chosen."""
    values = np.where(np.isnan(values), -np.inf, values)
    drawn = np.random.default_rng(seed).integers(0, len(values), (repeats, count))
    return drawn[np.arange(repeats), values[drawn].argmax(1)]


class Evolution(NamedTuple):
    """Every cell that was trained, in order."""

    cells: Array
    """[cycles, 6]."""
    values: Array
    """[cycles] accuracies that the search saw."""

    @property
    def best(self) -> Array:
        """[6]."""
        return self.cells[self.values.argmax()]


def regularised_evolution(
    key: Key, train: Callable[[Array], Array], cycles: int, population: int = 10, tournament: int = 5, start: Any = None
) -> Evolution:
    """Regularised evolution (Real et al., 2019): mutate the best of a random few, the oldest leaves.

    Args:
        key: a random key.
        train: cell [6] -> accuracy, traced; a table look-up, say.
        cycles: trainings in all, those of the first population among them.
        population: cells that are alive.
        tournament: cells of which the best is mutated, drawn without replacement.
        start: first cells [population, 6]; default: drawn. With the best by score it is AREA (algorithm 2), else REA.

    Raises:
        UserError: for more cells in a tournament or a population than there are.
    """
    if not 1 <= tournament <= population <= cycles:
        raise UserError(
            f"tournament={tournament}, population={population}, cycles={cycles}: expected 1 <= tournament "
            "<= population <= cycles"
        )
    k_start, key = jax.random.split(key)
    start = sample_cells(k_start, population) if start is None else jnp.asarray(start, jnp.int32)
    if start.shape != (population, 6):
        raise UserError(f"start: found shape {list(start.shape)}, expected [{population}, 6]")
    cells = jnp.zeros((cycles, 6), jnp.int32).at[:population].set(start)
    values = jnp.full(cycles, -jnp.inf).at[:population].set(jax.vmap(train)(start))

    def cycle(n: Array, found: Evolution) -> Evolution:
        k_draw, k_mutate = jax.random.split(jax.random.fold_in(key, n))
        alive = n - population + jax.random.choice(k_draw, population, (tournament,), replace=False)
        parent = alive[found.values[alive].argmax()]
        child = mutate_cell(k_mutate, found.cells[parent])
        return Evolution(found.cells.at[n].set(child), found.values.at[n].set(train(child)))

    return lax.fori_loop(population, cycles, cycle, Evolution(cells, values))


def area_start(cells: Any, values: Any, population: int = 10) -> np.ndarray:
    """The `population` cells [..., population, 6] of the highest `values` [..., N] among `cells` [..., N, 6], best
    first; AREA draws N = 20."""
    best = np.argsort(-np.asarray(values), -1, kind="stable")[..., :population]
    return np.take_along_axis(np.asarray(cells), best[..., None], -2)


# Training a cell, for tables of accuracies and searches that train


class Training(NamedTuple):
    """How a cell is trained: SGD with Nesterov momentum 0.9 and a cosine schedule."""

    epochs: int = 3
    batch_size: int = 64
    lr: float = 0.1
    weight_decay: float = 5e-4


def train_cell(
    key: Key, cell: Array, train: tuple[Array, Array], test: tuple[Array, Array], skeleton: Skeleton, how: Training
) -> Array:
    """Train a cell's network and return its accuracy on other images; traced, one program for all cells.

    Args:
        key: of weights and the order of images.
        cell: [6] int.
        train: images [N, H, W, C] float and labels [N]; what is left of N over the batch size is not used.
        test: images and labels.
        skeleton: the network.
        how: optimisation.

    Returns:
        Accuracy in 0..1, with the running statistics of BatchNorm.
    """
    network = CellNetwork(skeleton)
    x, y = train
    steps = len(x) // how.batch_size

    def forward(variables: Any, x: Array, key: Key) -> tuple[Array, Any]:
        return network.apply(variables, x, cell, True, mutable=["batch_stats"])

    model = Model(
        lambda key: network.init(key, x[:2], cell, True),
        forward,
        lambda variables, x: network.apply(variables, x, cell),
    )
    learner = supervised(
        model, cross_entropy, optimiser=Optimiser(nesterov=True), num_steps=how.epochs * steps, hypers=Hypers()
    )
    k_init, k_order = jax.random.split(key)
    state = learner.init(k_init, Hypers(lr=how.lr, weight_decay=how.weight_decay), ())

    def step(state: Any, rows: Array) -> tuple[Any, tuple]:
        return learner.step(state, (x[rows], y[rows]))[0], ()

    orders = [
        jax.random.permutation(k, len(x))[: steps * how.batch_size] for k in jax.random.split(k_order, how.epochs)
    ]
    state, _ = lax.scan(step, state, jnp.concatenate(orders).reshape(-1, how.batch_size))
    blocks = [model.apply(variables(state), test[0][i : i + 500]).argmax(-1) for i in range(0, len(test[0]), 500)]
    return (jnp.concatenate(blocks) == test[1]).mean(dtype=jnp.float32)
