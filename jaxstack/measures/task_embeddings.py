"""What task embeddings know: the accuracy of a linear probe for the task, and figures by task (after Schäfer et al.,
2022, arXiv 2207.02249)."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxstack.core.errors import UserError
from jaxstack.report import plots


def probe_task_id(
    embeddings: Float[Array, "episodes width"],
    task_ids: Int[Array, " episodes"],
    held_out: float = 0.5,
    l2: float = 1e-3,
    steps: int = 100,
) -> Float[Array, ""]:
    """Fit a multinomial logistic regression from embeddings to tasks and measure its accuracy on held-out episodes.

    The first episodes are fitted (by L-BFGS, embeddings standardised by their moments), the last are held out; episodes
    must be exchangeable. Tasks without a fitted episode are never predicted.

    Args:
        embeddings: One per episode.
        task_ids: Number of each episode's task, from 0.
        held_out: Share of the episodes that are held out.
        l2: Weight of the squared coefficients, intercepts not among them, beside the mean log-likelihood.
        steps: Iterations of L-BFGS.

    Returns:
        The share of held-out episodes whose task has the largest probability.

    Raises:
        UserError: For fewer than two episodes in a part, or other shapes.
    """
    x, y = jnp.asarray(embeddings, jnp.float32), jnp.asarray(task_ids)
    if x.ndim != 2 or y.shape != x.shape[:1] or not jnp.issubdtype(y.dtype, jnp.integer):
        raise UserError(f"probe_task_id: found {x.shape} and {y.dtype}{y.shape}, expected [episodes, width] and ids")
    fitted = len(x) - round(held_out * len(x))
    if not 2 <= fitted <= len(x) - 2:
        raise UserError(f"probe_task_id: found {len(x)} episodes, {fitted} fitted, expected at least 2 in each part")
    return _accuracy(x, y, fitted, int(y.max()) + 1, l2, steps)


@partial(jax.jit, static_argnums=(2, 3, 5))
def _accuracy(x: Array, y: Array, fitted: int, classes: int, l2: float, steps: int) -> Array:
    mean, std = x[:fitted].mean(0), x[:fitted].std(0)
    x = (x - mean) / (std + 1e-6)
    present = jnp.zeros(classes, bool).at[y[:fitted]].set(True)

    def logits(w: dict[str, Array], x: Array) -> Array:
        return jnp.where(present, x @ w["slope"] + w["intercept"], -1e9)

    def loss(w: dict[str, Array]) -> Array:
        logp = jax.nn.log_softmax(logits(w, x[:fitted]))
        return -jnp.take_along_axis(logp, y[:fitted, None], 1).mean() + 0.5 * l2 * jnp.square(w["slope"]).sum()

    solver = optax.lbfgs()
    w = {"slope": jnp.zeros((x.shape[1], classes), jnp.float32), "intercept": jnp.zeros(classes, jnp.float32)}
    value_and_grad = optax.value_and_grad_from_state(loss)

    def body(c: tuple, _: None) -> tuple[tuple, None]:
        w, state = c
        value, grad = value_and_grad(w, state=state)
        updates, state = solver.update(grad, state, w, value=value, grad=grad, value_fn=loss)
        return (optax.apply_updates(w, updates), state), None

    (w, _), _ = jax.lax.scan(body, (w, solver.init(w)), None, length=steps)
    return (logits(w, x[fitted:]).argmax(-1) == y[fitted:]).mean(dtype=jnp.float32)


def principal_components(x: Any, count: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Project rows on the directions of largest variance (Pearson, 1901).

    Args:
        x: Rows [rows, width], centred here.
        count: Directions.

    Returns:
        (coordinates [rows, count], share of the variance along each [count]); zeros beyond the rank of `x`.
    """
    x = np.asarray(x, np.float64)
    x = x - x.mean(0)
    _, s, v = np.linalg.svd(x, full_matrices=False)
    # the sign of a direction is arbitrary: its largest entry is positive
    v = v * np.sign(v[np.arange(len(v)), np.abs(v).argmax(1)])[:, None]
    pad = max(count - len(s), 0)
    share = np.pad(np.square(s[:count]) / max(np.square(s).sum(), 1e-30), (0, pad))
    return np.pad(x @ v[:count].T, ((0, 0), (0, pad))), share


def figure(
    embeddings: dict[str, Any], task_ids: Any, path: str | Path, names: Sequence[str] = (), title: str = ""
) -> Path:
    """Draw embeddings by task: their first two principal components, and t-SNE below where scikit-learn is installed.

    Args:
        embeddings: [rows, width] by the name of a panel, such as an agent or a step.
        task_ids: [rows], the same for all panels.
        path: Of the picture; its ending gives the format.
        names: Of the tasks, by number.
        title: Of the figure.

    Returns:
        The path.
    """
    panels: list[dict[str, np.ndarray]] = [{}]
    for name, x in embeddings.items():
        at, share = principal_components(x)
        panels[0][f"{name}: principal components ({share[0]:.0%}, {share[1]:.0%} of the variance)"] = at
    if (near := _tsne(embeddings)) is not None:
        panels.append({f"{name}: t-SNE": at for name, at in near.items()})
    return plots.clusters(panels, np.asarray(task_ids), path, names, title)


def _tsne(embeddings: dict[str, Any]) -> dict[str, np.ndarray] | None:
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        return None
    count = min(len(x) for x in embeddings.values())
    if count < 4:
        return None
    near = TSNE(2, perplexity=min(30.0, (count - 1) / 3), init="pca", random_state=0)
    return {n: near.fit_transform(np.asarray(x, np.float32)) for n, x in embeddings.items()}
