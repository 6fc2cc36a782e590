"""Explanations of one image: which pixels raise a label's logit. Four kinds behind one interface.

An explanation is a function (variables, image [H, W, C], label) -> map [H, W], at least 0 unless it is asked for
signed values, neither normalised nor smoothed. Networks are given as pure functions and run as in inference: statistics
that are stored, no dropout. `explained` makes the maps of many images.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxstack.core.errors import UserError

Kind = Literal["grad-cam", "gradient-input", "integrated-gradients", "occlusion"]
KINDS: tuple[Kind, ...] = ("grad-cam", "gradient-input", "integrated-gradients", "occlusion")


class Parts(NamedTuple):
    """A network cut after its last convolutions, as pure functions in inference mode."""

    features: Callable[[Any, Array], Array]
    """(variables, images [B, H, W, C]) -> maps [B, h, w, K]."""
    head: Callable[[Any, Array], Array]
    """(variables, maps [B, h, w, K]) -> logits [B, L]."""

    def predict(self, variables: Any, images: Array) -> Array:
        """Images [B, H, W, C] -> logits [B, L]."""
        return self.head(variables, self.features(variables, images))


@runtime_checkable
class Explain(Protocol):
    """(variables, image [H, W, C], label) -> map [H, W]."""

    def __call__(self, variables: Any, image: Array, label: Any, /) -> Array:
        """Explain one logit.

        Args:
            variables: of the network.
            image: [H, W, C].
            label: index of the logit; may be traced.

        Returns:
            [H, W].
        """
        ...


def upsampled(
    small: Float[Array, "h w"], size: Sequence[int], method: Literal["nearest", "bilinear"] = "nearest"
) -> Float[Array, "H W"]:
    """A map in `size` rows and columns; nearest makes blocks of equal values."""
    return jax.image.resize(small, tuple(size), method)


def normalised(found: Float[Array, "h w"]) -> Float[Array, "h w"]:
    """A map less its minimum, over the largest value then, with 1e-15 added: the released code's scaling to 0..1."""
    shifted = found - found.min()
    return shifted / (shifted.max() + 1e-15)


def grad_cam(parts: Parts, method: Literal["nearest", "bilinear"] = "nearest") -> Explain:
    """Grad-CAM (Selvaraju et al., 2017): relu(sum_k w_k A_k), w_k the mean over pixels of dlogit/dA_k.

    Args:
        parts: the network, cut at the maps A.
        method: how the map is brought to the image's size.
    """

    def explain(variables: Any, image: Array, label: Any) -> Array:
        maps = parts.features(variables, image[None])
        weights = jax.grad(lambda a: parts.head(variables, a)[0, label])(maps).mean((1, 2))
        cam = jax.nn.relu((maps[0] * weights[0]).sum(-1))
        return upsampled(cam, image.shape[:2], method)

    return explain


def _signed(found: Array, signed: bool) -> Array:
    return found if signed else jax.nn.relu(found)


def gradient_input(parts: Parts, baseline: Any = 0.0, signed: bool = False) -> Explain:
    """Gradient times input (Shrikumar et al., 2016): sum over channels of (x - b) dlogit/dx.

    Args:
        parts: the network.
        baseline: b, the image that holds nothing; broadcast to [H, W, C].
        signed: keep what speaks against the label as negative values.
    """

    def explain(variables: Any, image: Array, label: Any) -> Array:
        slope = jax.grad(lambda x: parts.predict(variables, x[None])[0, label])(image)
        return _signed(((image - baseline) * slope).sum(-1), signed)

    return explain


def integrated_gradients(parts: Parts, baseline: Any = 0.0, steps: int = 16, signed: bool = False) -> Explain:
    """Integrated gradients (Sundararajan et al., 2017): (x - b) times the mean gradient on the line from b to x.

    The integral is the midpoint rule. Signed maps sum to f(x) - f(b) as `steps` grows (completeness).

    Args:
        parts: the network.
        baseline: b, broadcast to [H, W, C].
        steps: points on the line, seen in one batch.
        signed: keep negative values.

    Raises:
        UserError: for less than one step.
    """
    if steps < 1:
        raise UserError(f"steps={steps}: expected at least 1")

    def explain(variables: Any, image: Array, label: Any) -> Array:
        at = (jnp.arange(steps, dtype=image.dtype) + 0.5) / steps
        line = baseline + at[:, None, None, None] * (image - baseline)
        slopes = jax.grad(lambda x: parts.predict(variables, x)[:, label].sum())(line)
        return _signed(((image - baseline) * slopes.mean(0)).sum(-1), signed)

    return explain


def occlusion(parts: Parts, fill: Any = 0.0, window: int = 8, stride: int = 4, signed: bool = False) -> Explain:
    """Occlusion (Zeiler and Fergus, 2014): how much the logit falls when a window is filled, mean over the windows that
    cover a pixel.

    Args:
        parts: the network.
        fill: what is put in, broadcast to [H, W, C].
        window: side in pixels; windows at the edge are cut off.
        stride: between windows, at most `window`, so that every pixel is covered.
        signed: keep negative values.

    Raises:
        UserError: for a stride that leaves pixels out.
    """
    if not 1 <= stride <= window:
        raise UserError(f"stride={stride}: expected 1 to window={window}")

    def explain(variables: Any, image: Array, label: Any) -> Array:
        rows, columns = (
            (np.arange(n)[None] >= at[:, None]) & (np.arange(n)[None] < at[:, None] + window)
            for n, at in ((n, np.arange(stride - window, n, stride)) for n in image.shape[:2])
        )
        # windows that begin before the edge cover it as often as the middle is covered
        masks = jnp.asarray((rows[:, None, :, None] & columns[None, :, None, :]).reshape(-1, *image.shape[:2]))
        whole = parts.predict(variables, image[None])[0, label]
        one = lambda mask: whole - parts.predict(variables, jnp.where(mask[..., None], fill, image)[None])[0, label]
        falls = jax.lax.map(one, masks, batch_size=min(64, len(masks)))
        return _signed(jnp.tensordot(falls, masks.astype(image.dtype), 1) / masks.sum(0), signed)

    return explain


def explainer(kind: Kind, parts: Parts, baseline: Any = 0.0, **options: Any) -> Explain:
    """An explanation by name.

    Args:
        kind: one of `KINDS`.
        parts: the network.
        baseline: the image that holds nothing, which Grad-CAM does not read.
        **options: of the function of that name.

    Raises:
        UserError: for an unknown kind.
    """
    if kind == "grad-cam":
        return grad_cam(parts, **options)
    known = {"gradient-input": gradient_input, "integrated-gradients": integrated_gradients, "occlusion": occlusion}
    if kind not in known:
        raise UserError(f"explanation={kind!r}: expected one of {', '.join(KINDS)}")
    return known[kind](parts, baseline, **options)


@partial(jax.jit, static_argnums=(0, 4))
def explained(
    explain: Explain,
    variables: Any,
    images: Float[Array, "n h w c"],
    labels: Int[Array, " l"],
    batch: int = 16,
) -> Float[Array, "n l h w"]:
    """Maps of many images, each for several labels, in batches.

    Args:
        explain: a function of this file, the same object in every call, as it is compiled once.
        variables: of the network.
        images: [N, H, W, C].
        labels: the logits [L] that are explained.
        batch: images at once.

    Returns:
        [N, L, H, W].
    """
    one = lambda image: jax.vmap(explain, in_axes=(None, None, 0))(variables, image, labels)
    return jax.lax.map(one, images, batch_size=min(batch, len(images)))
