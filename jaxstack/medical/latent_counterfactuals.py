"""Saliency of a classifier by counterfactuals in the latent space of an autoencoder (Fontanella et al., ICML 2023).

For each target class t, gradient descent from z0 = E(x) on g(z) = CE(f(D(z)), t) + alpha mean|z - z0| gives z_t; the
saliency is the mean of the two |D(z_t) - D(z0)|, each divided by its maximum.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxstack.nn.conv import Conv


class _Block(nn.Module):
    """Basic residual block; `scale` 2 halves (stride) or doubles (nearest) the image."""

    features: int
    scale: int = 1
    up: bool = False

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        norm = lambda x: nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5)(x)
        conv = lambda width, side, stride=1: Conv(
            width, (side, side), stride, padding=side // 2, use_bias=False, kernel_init=nn.initializers.he_normal()
        )
        larger = lambda x: x.repeat(self.scale, 1).repeat(self.scale, 2) if self.up and self.scale > 1 else x
        stride = 1 if self.up else self.scale
        # the decoder's blocks change the width in their second convolution, the encoder's in their first
        h = jax.nn.relu(norm(conv(x.shape[-1] if self.up else self.features, 3, stride)(x)))
        h = norm(conv(self.features, 3)(larger(h)))
        if self.scale > 1 or x.shape[-1] != self.features:
            x = norm(conv(self.features, 1, stride)(larger(x)))
        return jax.nn.relu(h + x)


class Autoencoder(nn.Module):
    """A convolutional autoencoder without a bottleneck of its own: z has a quarter of the image's side.

    With the released widths the encoder has 23,840 parameters, the decoder 21,964 for one channel.
    """

    channels: int = 1
    stem: int = 128
    widths: tuple[int, int, int] = (6, 12, 16)
    depth: int = 2
    """Blocks of each stage."""

    def setup(self) -> None:
        a, b, c = self.widths
        self.first = Conv(self.stem, padding=1, use_bias=False, kernel_init=nn.initializers.he_normal())
        self.first_norm = nn.BatchNorm(momentum=0.9, epsilon=1e-5)
        more = self.depth - 1
        stage = lambda width, scale, up: [_Block(width, scale, up), *(_Block(width, up=up) for _ in range(more))]
        self.encoder = [*stage(a, 1, False), *stage(b, 2, False), *stage(c, 2, False)]
        self.decoder = [*stage(c, 2, True), *stage(b, 2, True), *stage(b, 1, True)]
        self.last = Conv(self.channels, padding=1, use_bias=False)

    def encode(self, x: Float[Array, "b h w c"], train: bool = False) -> Float[Array, "b h4 w4 z"]:
        """Images with sides that are multiples of 4 -> z."""
        x = jax.nn.relu(self.first_norm(self.first(x), use_running_average=not train))
        for block in self.encoder:
            x = block(x, train)
        return x

    def decode(self, z: Float[Array, "b h4 w4 z"], train: bool = False) -> Float[Array, "b h w c"]:
        """z -> images."""
        for block in self.decoder:
            z = block(z, train)
        return self.last(z)

    def __call__(self, x: Float[Array, "b h w c"], train: bool = False) -> Float[Array, "b h w c"]:
        """Images -> their reconstructions."""
        return self.decode(self.encode(x, train), train)


def counterfactual(
    apply_cls: Callable[[Array], Array],
    apply_dec: Callable[[Array], Array],
    z0: Float[Array, "b ..."],
    target: Int[Array, " b"],
    alpha: float = 100.0,
    beta: float = 0.001,
    steps: int = 20,
) -> Float[Array, "b ..."]:
    """Latents that the classifier takes for another class: plain gradient steps, each image by itself.

    Args:
        apply_cls: images -> logits [B, C], in evaluation mode.
        apply_dec: latents -> images.
        z0: latents of the images.
        target: class that each is moved towards.
        alpha: weight of the mean absolute distance from z0; of one latent's of n it is alpha / n.
        beta: step size.
        steps: how many.
    """

    def objective(z: Array) -> Array:
        logp = jax.nn.log_softmax(apply_cls(apply_dec(z)))
        # |z - z0| with slope 0 at 0, where every latent starts; jnp.abs has slope 1 there
        away = ((z - z0) * jax.lax.stop_gradient(jnp.sign(z - z0))).reshape(len(z), -1).mean(-1)
        # a sum over images: the gradient of each is its own
        return (alpha * away - jnp.take_along_axis(logp, target[:, None], 1)[:, 0]).sum()

    step = lambda z, _: (z - beta * jax.grad(objective)(z), None)
    return jax.lax.scan(step, z0, None, steps)[0]


class Sides(NamedTuple):
    """Images as the autoencoder gives them back."""

    start: Array
    """Of the image itself."""
    towards_0: Array
    """Of the latents moved towards class 0."""
    towards_1: Array
    """Of the latents moved towards class 1."""


def sides(
    apply_cls: Callable[[Array], Array],
    apply_enc: Callable[[Array], Array],
    apply_dec: Callable[[Array], Array],
    x: Float[Array, "b *image"],
    alpha: float = 100.0,
    beta: float = 0.001,
    steps: int = 20,
) -> Sides:
    """Counterfactuals of images, or of scans of several slices, towards both classes of two.

    Args:
        apply_cls: images -> logits [B, 2].
        apply_enc: images -> latents.
        apply_dec: latents -> images.
        x: images.
        alpha: see `counterfactual`.
        beta: see `counterfactual`.
        steps: see `counterfactual`.
    """
    z0 = apply_enc(x)
    # both classes at once: each image moves by itself
    target = jnp.repeat(jnp.arange(2), len(x))
    z = counterfactual(apply_cls, apply_dec, jnp.concatenate([z0, z0]), target, alpha, beta, steps)
    return Sides(apply_dec(z0), *jnp.split(apply_dec(z), 2))


def scaled(saliency: Float[Array, "b *image"]) -> Float[Array, "b *image"]:
    """Each image divided by its maximum; zeros stay zeros."""
    most = saliency.max(tuple(range(1, saliency.ndim)), keepdims=True)
    return saliency / jnp.where(most > 0, most, 1.0)


def pair(found: Sides, reference_compat: bool = False) -> Float[Array, "b *image"]:
    """The mean of both differences, each divided by its maximum, then divided by its own.

    Args:
        found: what `sides` gives.
        reference_compat: as released, leave the difference towards class 0 unnormalised.

    Returns:
        For each image at most 1; all zeros where no latent moved.
    """
    towards_0, towards_1 = jnp.abs(found.towards_0 - found.start), jnp.abs(found.towards_1 - found.start)
    return scaled(scaled(towards_1) + (towards_0 if reference_compat else scaled(towards_0)))


def saliency_pair(
    apply_cls: Callable[[Array], Array],
    apply_enc: Callable[[Array], Array],
    apply_dec: Callable[[Array], Array],
    x: Float[Array, "b *image"],
    alpha: float = 100.0,
    beta: float = 0.001,
    steps: int = 20,
    reference_compat: bool = False,
) -> Float[Array, "b *image"]:
    """Saliency in 0..1 from counterfactuals towards both classes: `pair` of `sides`, whose arguments these are."""
    return pair(sides(apply_cls, apply_enc, apply_dec, x, alpha, beta, steps), reference_compat)
