"""BlockSwap: one type of convolution for each residual block, chosen by Fisher information for a budget of parameters.

Turner, Crowley, O'Boyle, Storkey and Gray, ICLR 2020 (arXiv 1906.04113). Random assignments of 23 cheap block types
(`jaxstack.nn.vision.substitutes`) to the blocks of a wide residual network are kept if their size is near the budget,
scored by one backward pass of a minibatch with random weights, and the best one is trained as the student of the
original network by attention transfer (`jaxstack.nn.attention_transfer`).
"""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.core import config as configs
from jaxstack.core.errors import UserError
from jaxstack.core.learner import Key, Learner
from jaxstack.nn import attention_transfer as transfer
from jaxstack.nn import classifier as classifiers
from jaxstack.nn.supervised import Hypers, Model, Optimiser, cross_entropy
from jaxstack.nn.vision import wrn
from jaxstack.nn.vision.layers import BatchNorm, conv, head
from jaxstack.nn.vision.substitutes import KINDS, block_params, fits, form_of

Reduction = Literal["sum", "mean"]
Candidate = Sequence[Any] | np.ndarray
"""Types by name, or by their places in `KINDS` [B]."""
Batches = Sequence[tuple[Array, Array]]
"""Minibatches: images [N, H, W, C] as the network takes them, and labels [N]."""
DRAW, DRAWS = 1 << 15, 128
"""Candidates that are drawn at once, and how often before it is given up."""


class Space(NamedTuple):
    """The networks that candidates are of: WRN-depth-width with a type for each block."""

    depth: int = 40
    width: float = 2.0
    classes: int = 10
    channels: int = 3
    """Of the images."""

    def blocks(self) -> list[tuple[int, int, int]]:
        """(channels in, channels out, stride) of each block."""
        outs, _, strides = wrn.block_features(self.depth, self.width)
        return list(zip([wrn.STEM, *outs[:-1]], outs, strides))

    def network(self, candidate: Candidate, reference_compat: bool = False) -> wrn.WRN:
        """The network of a candidate, numbers or names of types."""
        return wrn.WRN(self.depth, self.width, self.classes, kinds=names(candidate), reference_compat=reference_compat)


def names(candidate: Candidate) -> tuple[str, ...]:
    """Types by name. Raises `UserError` for an unknown one."""
    found = tuple(c if isinstance(c, str) else KINDS[int(c)] for c in candidate)
    for kind in found:
        form_of(kind)
    return found


def encode(candidate: Sequence[str]) -> np.ndarray:
    """Types by number [B], their places in `KINDS`."""
    return np.array([KINDS.index(kind) for kind in names(candidate)], np.int32)


# Candidates within a budget


@functools.cache
def _table(space: Space) -> np.ndarray:
    return np.array(
        [
            [block_params(kind, a, b, stride) if fits(kind, a, b) else -1 for kind in KINDS]
            for a, b, stride in space.blocks()
        ]
    )


def param_table(space: Space = Space()) -> np.ndarray:
    """Parameters [B, 23] of each type in the place of each block; -1 where its groups do not divide the channels."""
    return _table(space).copy()


def rest_params(space: Space = Space()) -> int:
    """Parameters outside of the blocks: stem, last BatchNorm, classifier; 1978 for WRN-40-2."""
    last = space.blocks()[-1][1]
    return 9 * space.channels * wrn.STEM + 2 * last + (last + 1) * space.classes


def candidate_params(candidates: Any, space: Space = Space()) -> np.ndarray:
    """Parameters [M] of candidates [M, B], in closed form. Raises `UserError` for a type that does not fit."""
    candidates, table = np.asarray(candidates), _table(space)
    if candidates.shape[-1] != len(table):
        raise UserError(f"candidates: found {candidates.shape[-1]} types, expected {len(table)}, one for each block")
    found = table[np.arange(len(table)), candidates]
    if (found < 0).any():
        bad = tuple(np.argwhere(found < 0)[0])
        raise UserError(f"candidates: {KINDS[candidates[bad]]} does not fit block {bad[-1]}")
    return found.sum(-1) + rest_params(space)


def budget_range(space: Space = Space()) -> tuple[int, int]:
    """Parameters of the smallest and of the largest candidate."""
    table, rest = _table(space), rest_params(space)
    least = np.where(table < 0, np.iinfo(np.int64).max, table).min(1).sum()
    return int(least) + rest, int(table.max(1).sum()) + rest


def sample_candidates(key: Key, budget: float, tol: float = 0.025, n: int = 1000, space: Space = Space()) -> np.ndarray:
    """Types [n, B] int, drawn uniformly with replacement among those that fit, within `tol` of a budget.

    Args:
        key: of the draws.
        budget: parameters.
        tol: relative.
        n: candidates.
        space: what they are of.

    Raises:
        UserError: for a budget that no candidate has, with the range, or that too few random ones meet.
    """
    low, high = budget_range(space)
    if not low <= budget <= high:
        raise UserError(
            f"budget={budget:g}: expected {low} to {high} parameters, those of the smallest and the largest candidate"
        )
    if n < 1 or not tol > 0:
        raise UserError(f"n={n}, tol={tol:g}: expected at least 1 candidate, a tolerance above 0")
    table, rest = _table(space), rest_params(space)
    counts = (table >= 0).sum(1)
    fitting = np.argsort(table < 0, 1, kind="stable")  # a row's types that fit come first
    rows, found, total = np.arange(len(table)), [], 0
    for i in range(DRAWS):
        places = np.asarray(jax.random.randint(jax.random.fold_in(key, i), (DRAW, len(table)), 0, counts))
        drawn = fitting[rows, places]
        near = np.abs(table[rows, drawn].sum(1) + rest - budget) < tol * budget
        found.append(drawn[near])
        total += int(near.sum())
        if total >= n:
            return np.concatenate(found)[:n].astype(np.int32)
    raise UserError(
        f"budget={budget:g}: found {total} candidates within {tol:.1%} among {DRAWS * DRAW} random ones, expected {n}; "
        "take a larger tolerance"
    )


# Fisher potential


def mean_cross_entropy(logits: Array, labels: Array) -> Array:
    """The loss of the scores."""
    return cross_entropy(logits, labels, Hypers()).mean()


def fisher_information(activation: Array, grad: Array) -> Array:
    """Delta_c = 1/2 mean_n g_nc^2 with g_nc the sum over pixels of a dL/da: [N, H, W, C] twice -> [C]."""
    return 0.5 * jnp.square((activation * grad).sum((1, 2))).mean(0)


def fisher_potential(
    apply: Callable[[Any, Array, Any], tuple[Array, Sequence[Array]]],
    params: Any,
    batch: tuple[Array, Array],
    reduction: Reduction = "sum",
    loss: Callable[[Array, Array], Array] = mean_cross_entropy,
) -> tuple[Array, Array]:
    """Fisher potential of a network: the Fisher information of the outputs of its residual branches.

    The gradient by an output is the one by zeros that are added to it.

    Args:
        apply: (params, images, perturbations or None) -> (logits, outputs of the branches [N, H, W, C] with what was
            added), e.g. `observed(network)`.
        params: what `apply` takes.
        batch: images and labels.
        reduction: over a branch's channels; the paper's is the sum, a mean ranks wide stages lower.
        loss: (logits, labels) -> what is differentiated.

    Returns:
        (sum over the branches, each branch's [B]).
    """
    x, labels = batch
    zeros = [jnp.zeros(a.shape, a.dtype) for a in jax.eval_shape(lambda p: apply(p, x, None)[1], params)]

    def perturbed(zeros: list[Array]) -> tuple[Array, Sequence[Array]]:
        logits, branches = apply(params, x, zeros)
        return loss(logits, labels), branches

    grads, branches = jax.grad(perturbed, has_aux=True)(zeros)
    deltas = [fisher_information(a, g) for a, g in zip(branches, grads)]
    per_block = jnp.stack([d.sum() if reduction == "sum" else d.mean() for d in deltas])
    return per_block.sum(), per_block


def observed(network: nn.Module) -> Callable[[Any, Array, Any], tuple[Array, list[Array]]]:
    """A network whose blocks, block0, block1 and so on, tell their branches, as `fisher_potential` takes it: with the
    batch's statistics in BatchNorm."""

    def apply(variables: Any, x: Array, perturbations: Any) -> tuple[Array, list[Array]]:
        added = {}
        if perturbations is not None:
            added = {"perturbations": {f"block{i}": {"branch": v} for i, v in enumerate(perturbations)}}
        logits, kept = network.apply({**variables, **added}, x, True, mutable=["batch_stats", "branches"])
        branches: Any = kept["branches"]
        return logits, [branches[f"block{i}"]["branch"] for i in range(len(branches))]

    return apply


# The same in pieces: a program for each type and shape, so that thousands of candidates share a hundred


@functools.partial(jax.jit, static_argnums=0)
def _forward(block: wrn.Block, variables: Any, x: Array) -> tuple[Array, Array, Any]:
    """(output, the branch's, the pullback to parameters and input) of a block."""
    others = {k: v for k, v in variables.items() if k != "params"}

    def run(params: Any, x: Array) -> tuple[Array, Array]:
        kept: Any
        out, kept = block.apply({"params": params, **others}, x, True, mutable=["batch_stats", "branches"])
        return out, kept["branches"]["branch"]

    out, pull, branch = jax.vjp(run, variables["params"], x, has_aux=True)
    return out, branch, pull


@jax.jit
def _back(pull: Any, branch: Array, grad: Array) -> tuple[Array, Array]:
    """(gradient by a block's input, Fisher information of its branch): the branch is added to the output, so that both
    have one gradient."""
    return pull(grad)[1], fisher_information(branch, grad)


@jax.jit
def _back_squares(pull: Any, grad: Array) -> tuple[Array, Array]:
    """(gradient by a block's input, sum of the squared gradients by its parameters)."""
    by_params, by_input = pull(grad)
    return by_input, _squares(by_params)


_information = jax.jit(fisher_information)


def _squares(tree: Any) -> Array:
    return sum((jnp.square(v).sum() for v in jax.tree.leaves(tree)), jnp.float32(0.0))


@jax.jit
def _stem(kernel: Array, x: Array) -> Array:
    return conv(wrn.STEM).apply({"params": {"kernel": kernel}}, x)  # pyright: ignore[reportReturnType]


@jax.jit
def _stem_squares(kernel: Array, x: Array, grad: Array) -> Array:
    return _squares(jax.vjp(lambda kernel: _stem(kernel, x), kernel)[1](grad))


@jax.jit
def _top(variables: Any, x: Array, labels: Array) -> tuple[Array, Array]:
    """(gradient of the loss by the last block's output, sum of the squared gradients by the layers above)."""

    def loss(params: Any, x: Array) -> Array:
        own = {"params": params["bn"], "batch_stats": variables["batch_stats"]["bn"]}
        h, _ = BatchNorm().apply(own, x, True, mutable=["batch_stats"])
        last = params["Dense_0"]
        logits: Any = head(last["kernel"].shape[1]).apply({"params": last}, jax.nn.relu(h).mean((1, 2)))
        return mean_cross_entropy(logits, labels)

    by_params, by_input = jax.grad(loss, (0, 1))(variables["params"], x)
    return by_input, _squares(by_params)


def _drawn(shapes: Any, rng: np.random.Generator) -> Any:
    """Values of given shapes: kernels N(0, 2 / (k^2 C_out)), C_out all channels of grouped ones too, BN 1 and 0."""
    found = {}
    for name, shape in sorted(shapes.items()):
        if isinstance(shape, dict):
            found[name] = _drawn(shape, rng)
        elif name == "kernel":
            deviation = (2.0 / (shape[0] * shape[1] * shape[3])) ** 0.5
            found[name] = jnp.asarray((deviation * rng.standard_normal(shape)).astype(np.float32))
        else:
            found[name] = jnp.asarray(np.full(shape, name in ("scale", "var"), np.float32))
    return found


class Weights:
    """Random weights that depend on a key, a block's place and its type: candidates that agree in a block share them.

    Nothing is compiled for them. Args: a key, the space, `reference_compat` as of `wrn.WRN`.
    """

    def __init__(self, key: Key, space: Space = Space(), reference_compat: bool = False):
        self.space, self.reference_compat = space, reference_compat
        self._seed = [int(v) for v in np.asarray(jax.random.key_data(key)).ravel()]
        self._blocks: dict[tuple[int, str, int], Any] = {}
        self.stem = _drawn({"kernel": (3, 3, space.channels, wrn.STEM)}, np.random.default_rng(self._seed))
        last = space.blocks()[-1][1]
        dense = np.random.default_rng([*self._seed, 1]).uniform(-1, 1, (last, space.classes)) * last**-0.5
        zeros, ones = (jnp.asarray(np.full(last, v, np.float32)) for v in (0, 1))
        linear = {k: jnp.asarray(v.astype(np.float32)) for k, v in zip(("kernel", "bias"), (dense, 0 * dense[0]))}
        self.top: Any = {
            "params": {"bn": {"scale": ones, "bias": zeros}, "Dense_0": linear},
            "batch_stats": {"bn": {"mean": zeros, "var": ones}},
        }

    def blocks(self, candidate: Candidate) -> list[tuple[wrn.Block, Any]]:
        """(module, variables) of each block. Raises `UserError` for types that do not fit."""
        found = []
        types = wrn.block_units(self.space.depth, self.space.width, names(candidate), self.reference_compat)
        for i, ((kind, units), (before, out, stride)) in enumerate(zip(types, self.space.blocks())):
            block = wrn.Block(out, out, stride, kind=kind, units=units)
            if (i, kind, units) not in self._blocks:
                x = jnp.zeros((1, 4, 4, before))
                shapes = jax.eval_shape(lambda key, x=x, block=block: block.init(key, x), jax.random.key(0))
                rng = np.random.default_rng([*self._seed, 2 + i, KINDS.index(kind)])
                self._blocks[i, kind, units] = _drawn(jax.tree.map(lambda v: v.shape, shapes), rng)
            found.append((block, self._blocks[i, kind, units]))
        return found

    def variables(self, candidate: Candidate) -> dict[str, Any]:
        """All variables of a candidate's network."""
        blocks = {f"block{i}": v for i, (_, v) in enumerate(self.blocks(candidate))}
        parts = {c: {name: v[c] for name, v in blocks.items()} | self.top[c] for c in ("params", "batch_stats")}
        return {**parts, "params": {"stem": self.stem, **parts["params"]}}


class Scorer:
    """Scores candidates on the same minibatches with the same weights. Programs are compiled for each type and shape.

    Args:
        key: of the weights, see `Weights`.
        batches: the minibatches, one in the paper; scores are sums over them.
        space: what candidates are of.
        reference_compat: build a stage's blocks as the released code does when it scores, see `wrn.WRN`.
    """

    def __init__(self, key: Key, batches: Batches, space: Space = Space(), reference_compat: bool = False):
        if not batches:
            raise UserError("batches: found none, expected at least one minibatch")
        self.weights = Weights(key, space, reference_compat)
        self._labels = [jnp.asarray(y) for _, y in batches]
        self._images = [jnp.asarray(x) for x, _ in batches]
        self._starts = [_stem(self.weights.stem["kernel"], x) for x in self._images]

    def prepare(self, candidates: Any) -> int:
        """Compile what these candidates need, two programs at a time, and return the number of their blocks' types and
        shapes."""
        pieces = {}
        for candidate in candidates:
            shape = self._starts[0].shape
            for block, variables in self.weights.blocks(candidate):
                pieces[block, shape] = variables
                shape = (shape[0], *(-(-s // block.stride) for s in shape[1:3]), block.features)

        def run(piece: Any) -> None:
            (block, shape), variables = piece
            out, branch, pull = _forward(block, variables, jnp.zeros(shape))
            jax.block_until_ready(_back(pull, branch, out))

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(run, pieces.items()))
        return len(pieces)

    def fisher(self, candidate: Candidate, reduction: Reduction = "sum") -> np.ndarray:
        """The Fisher potential of each block [B]; a candidate's score is their sum."""
        blocks = self.weights.blocks(candidate)
        total = np.zeros(len(blocks))
        for h, labels in zip(self._starts, self._labels):
            trail = []
            for block, variables in blocks:
                h, branch, pull = _forward(block, variables, h)
                trail.append((branch, pull))
            grad, _ = _top(self.weights.top, h, labels)
            deltas = []
            for branch, pull in trail[:0:-1]:
                grad, delta = _back(pull, branch, grad)
                deltas.append(delta)
            deltas.append(_information(trail[0][0], grad))
            total += [np.asarray(d, np.float64).sum() / (len(d) if reduction == "mean" else 1) for d in deltas[::-1]]
        return total

    def gradient_norm(self, candidate: Candidate) -> float:
        """Norm of the loss's gradient by all parameters, summed over the minibatches: a rival score."""
        blocks, total = self.weights.blocks(candidate), 0.0
        for x, h, labels in zip(self._images, self._starts, self._labels):
            pulls = []
            for block, variables in blocks:
                h, _, pull = _forward(block, variables, h)
                pulls.append(pull)
            grad, squares = _top(self.weights.top, h, labels)
            found = [squares]
            for pull in pulls[::-1]:
                grad, squares = _back_squares(pull, grad)
                found.append(squares)
            found.append(_stem_squares(self.weights.stem["kernel"], x, grad))
            total += float(np.sqrt(sum(map(float, found))))
        return total


class Found(NamedTuple):
    """What a search saw."""

    candidates: np.ndarray
    """[M, B] int, places in `KINDS`."""
    parameters: np.ndarray
    """[M]."""
    scores: np.ndarray
    """[M]."""

    @property
    def order(self) -> np.ndarray:
        """Places of the candidates, the best one first."""
        return np.argsort(-self.scores, kind="stable")

    def names(self, place: int) -> tuple[str, ...]:
        """Types of the candidate that has this place in the order, 0 for the best."""
        return names(self.candidates[self.order[place]])


def search(
    key: Key,
    batches: Batches,
    budget: float,
    space: Space = Space(),
    n: int = 1000,
    tol: float = 0.025,
    reduction: Reduction = "sum",
    reference_compat: bool = False,
    tell: Callable[[int], None] = lambda done: None,
) -> Found:
    """Draw candidates within a budget of parameters and score them by Fisher potential.

    Args:
        key: of candidates and weights.
        batches: the minibatches, which all candidates see; the release draws one for each candidate.
        budget: parameters.
        space: the networks.
        n: candidates.
        tol: relative tolerance of the budget.
        reduction: see `fisher_potential`.
        reference_compat: score what the released code scores, see `Scorer`.
        tell: called after each candidate with their number so far.

    Raises:
        UserError: see `sample_candidates`.
    """
    k_draw, k_weights = jax.random.split(key)
    candidates = sample_candidates(k_draw, budget, tol, n, space)
    scorer, scores = Scorer(k_weights, batches, space, reference_compat), []
    for i, candidate in enumerate(candidates):
        scores.append(float(scorer.fisher(candidate, reduction).sum()))
        tell(i + 1)
    return Found(candidates, candidate_params(candidates, space), np.array(scores))


# Rivals of the same size


def matching_width(kind: str, target: int, depth: int, classes: int = 10, channels: int = 3, widest: int = 16) -> float:
    """The width, in 64ths, of the largest network with one type in all blocks that a number of parameters allows.

    Of "Conv" it is the narrower WRN. Widths whose channels the type's groups do not divide are left out.

    Raises:
        UserError: where every network has more parameters; the smallest is told.
    """
    found, least = None, None
    for parts in range(4, 64 * widest + 1):
        width = parts / 64
        blocks = Space(depth, width).blocks()
        if not all(fits(kind, before, out) for before, out, _ in blocks):
            continue
        count = wrn.param_count(depth, width, None, classes, channels, [kind] * len(blocks))
        least = count if least is None else min(least, count)
        if count <= target:
            found = width
        elif width > 1 and count > 4 * target:
            break
    if found is None:
        raise UserError(f"target={target}: expected at least {least}, the parameters of the smallest network of {kind}")
    return found


# The student


def student(
    config: classifiers.Config,
    teacher: classifiers.Config,
    teachers: Any,
    hypers: transfer.Hypers,
) -> Learner:
    """The learner of a classifier's network, SGD with a cosine, by attention transfer from a frozen one.

    Args:
        config: the student's classifier, with `kinds`.
        teacher: the teacher's.
        teachers: its variables, leaves [S, ...], a row for each seed.
        hypers: default hyperparameters; with `beta` 0 labels alone teach it, by the config's hyperparameters.
    """
    if hypers.beta == 0:
        return classifiers.classifier(config)
    return transfer.taught(
        _with_taps(config),
        _with_taps(teacher),
        teachers,
        num_updates=config.num_updates,
        batch_size=config.batch_size,
        hypers=hypers,
        optimiser=Optimiser("sgd", config.schedule, config.warmup, config.milestones, config.nesterov),
        config=config,
        name="blockswap",
        source=classifiers.source,
        eval_source=classifiers.eval_source,
    )


def _with_taps(config: classifiers.Config) -> Model:
    example = jnp.zeros((1, *classifiers.image_shape(config)), jnp.uint8)
    return transfer.with_taps(classifiers.network(config), example, lambda x: classifiers.prepared(config, x))


def student_config(
    config: classifiers.Config, kinds: Sequence[str], num_updates: int, batch_size: int, lr: float
) -> classifiers.Config:
    """A teacher's config with other types of blocks, and the paper's optimisation: SGD with a cosine, no averages."""
    return configs.replace(
        config,
        **classifiers.PLAIN | {"kinds": tuple(kinds)} | classifiers.UNTAUGHT,
        num_updates=num_updates,
        batch_size=batch_size,
        optimiser="sgd",
        schedule="cosine",
        warmup=0.0,
        nesterov=False,
        clip=False,
        ema=False,
        hypers=classifiers.Hypers(lr=lr),
    )
