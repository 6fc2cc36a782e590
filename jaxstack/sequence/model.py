"""Sequence models: an embedding, blocks of a mixer and a gated MLP, a head; any mixer, in any mixture.

    x = embed(tokens);  x += mixer(norm(x));  x += swiglu(norm(x));  logits = head(norm(x))

Norms are RMS norms (Zhang and Sennrich, 2019), the MLP is SwiGLU (Shazeer, 2020), and there are no position codes, as
in Shaj et al. (2026). The state of the whole model is the tuple of its mixers' states: `model.apply(..., tokens)` is a
prefill, `step` decodes one token in constant time for recurrent mixers, `generate` does both in one program.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from jaxstack.core.errors import UserError
from jaxstack.core.learner import Key
from jaxstack.sequence.kla import marginal_log_probs

DECAYED = ("kernel", "embedding")
"""Names of parameters that weight decay applies to: matrices of linear layers and embeddings. Biases, norms,
convolutions and the parameters of a mixer's dynamics (KLA's delta and lambda_log) are left alone."""

CAST = ("kernel", "embedding", "bias", "scale")
"""Names of parameters that low-precision compute casts; dynamics stay float32."""


class SwiGLU(nn.Module):
    """W_out (silu(W_gate x) * W_in x), hidden width `hidden`, no biases."""

    features: int
    hidden: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        gate, value = jnp.split(nn.Dense(2 * self.hidden, use_bias=False, name="in")(x), 2, axis=-1)
        return nn.Dense(self.features, use_bias=False, name="out")(jax.nn.silu(gate) * value)


class SequenceModel(nn.Module):
    """See the module's docstring. `mixers` are unbound modules as in mixer.py, one per block, all of width D."""

    mixers: tuple[Any, ...]
    num_tokens: int
    """Input vocabulary, or 0 for real inputs [B, T, F]."""
    num_targets: int
    """Classes, or 0 for one real output."""
    mlp_ratio: float = 8 / 3
    """Hidden width of the MLP over D; 0 leaves it out."""
    readout: Literal["each", "last"] = "each"
    """"last": an auto-encoder; every output is decoded from the state after the last token and a position code."""
    logit_cap: float = 0.0
    """Bounds logits smoothly, cap * tanh(logits / cap); 0 does not."""

    @property
    def features(self) -> int:
        return self.mixers[0].features

    def setup(self) -> None:
        d = self.features
        if any(m.features != d for m in self.mixers):
            raise UserError(f"mixers of widths {[m.features for m in self.mixers]}: expected one width")
        if self.readout not in ("each", "last"):
            raise UserError(f"readout={self.readout!r}: expected 'each' or 'last'")
        self.embed = nn.Embed(self.num_tokens, d) if self.num_tokens else nn.Dense(d)
        hidden = int(self.mlp_ratio * d)
        self.mlps = [SwiGLU(d, hidden) for _ in self.mixers] if hidden else []
        norm = lambda: nn.RMSNorm(epsilon=1e-5)
        self.mixer_norms = [norm() for _ in self.mixers]
        self.mlp_norms = [norm() for _ in self.mlps]
        self.final_norm = norm()
        self.head = nn.Dense(self.num_targets or 1, use_bias=False)
        if self.readout == "last":
            self.decoder = [layer for _ in range(2) for layer in (norm(), nn.Dense(d))]

    @nn.nowrap
    def init_state(self, batch: int) -> tuple[Any, ...]:
        """States of all mixers before any token; works on an unbound model."""
        return tuple(m.init_state(batch) for m in self.mixers)

    def __call__(
        self, tokens: Array, *, mask: Array | None = None, state: tuple[Any, ...] | None = None
    ) -> tuple[Array, tuple[Any, ...]]:
        """tokens [B, T] (or [B, T, F] reals) -> (logits [B, T, num_targets] or outputs [B, T], state).

        mask [B, T]: False marks padding, which changes nothing at other positions; what stands there, be it NaN or no
        token of the vocabulary, is replaced before anything reads it. Without a mask such tokens give NaN: data is
        checked on the host, by `check_tokens`. state: what an earlier call returned; a sequence may be fed in pieces
        (with readout="each").
        """
        x = self._embed(tokens, mask)
        state = (None,) * len(self.mixers) if state is None else state
        states = []
        for i, mixer in enumerate(self.mixers):
            y, s = mixer(self.mixer_norms[i](x).astype(x.dtype), mask=mask, state=state[i])
            x = self._after(i, x + y)
            states.append(s)
        if self.readout == "last":
            x = self._decode(x, mask)
        return self._read(x), tuple(states)

    def step(self, token: Array, state: tuple[Any, ...]) -> tuple[Array, tuple[Any, ...]]:
        """token [B] (or [B, F]) -> (logits [B, num_targets] or outputs [B], state). Raises `UserError` for an
        auto-encoder."""
        if self.readout == "last":
            raise UserError("readout='last' has no single steps: its outputs depend on the last token")
        x = self._embed(token)
        states = []
        for i, mixer in enumerate(self.mixers):
            y, s = mixer.step(self.mixer_norms[i](x).astype(x.dtype), state[i])
            x = self._after(i, x + y)
            states.append(s)
        return self._read(x), tuple(states)

    def belief(self, tokens: Array, *, mask: Array | None = None) -> tuple[Array, Array]:
        """Mean and variance [B, T, D] of the stream after the last mixer, which has to give a variance (KLA does);
        the stream it is added to counts as certain. Raises `UserError` for other mixers."""
        mixer = self.mixers[-1]
        if "return_variance" not in inspect.signature(type(mixer).__call__).parameters:
            raise UserError(f"the last mixer, {type(mixer).__name__}, gives no variance: expected one such as KLA")
        x = self._embed(tokens, mask)
        for i, earlier in enumerate(self.mixers[:-1]):
            y, _ = earlier(self.mixer_norms[i](x).astype(x.dtype), mask=mask)
            x = self._after(i, x + y)
        y, variance, _ = mixer(self.mixer_norms[-1](x).astype(x.dtype), mask=mask, return_variance=True)
        return x + y, variance

    def read(self, x: Array) -> Array:
        """What follows the last mixer: [..., T, D] -> logits [..., T, num_targets]."""
        return self._read(self._after(len(self.mixers) - 1, x))

    def _embed(self, tokens: Array, mask: Array | None = None) -> Array:
        kind, rank = (jnp.integer, 0) if self.num_tokens else (jnp.floating, 1)
        if not jnp.issubdtype(tokens.dtype, kind):
            expected = "whole numbers" if self.num_tokens else "real inputs"
            raise UserError(f"tokens of type {tokens.dtype}: expected {expected}")
        if tokens.ndim - rank not in (1, 2):
            raise UserError(f"tokens have shape {tokens.shape}: expected [batch, time] or [batch] and inputs last")
        if mask is not None:
            if mask.shape != tokens.shape[:2] or mask.dtype != jnp.bool_:
                raise UserError(f"mask has shape {mask.shape}, type {mask.dtype}: expected bool {tokens.shape[:2]}")
            tokens = jnp.where(mask.reshape(*mask.shape, *[1] * rank), tokens, 0)
        return self.embed(tokens)

    def _after(self, i: int, x: Array) -> Array:
        return x + self.mlps[i](self.mlp_norms[i](x).astype(x.dtype)) if self.mlps else x

    def _decode(self, x: Array, mask: Array | None) -> Array:
        length = x.shape[1]
        if mask is None:
            last = x[:, -1]
        else:
            at = length - 1 - jnp.argmax(mask[:, ::-1], axis=1)
            last = jnp.take_along_axis(x, at[:, None, None], axis=1)[:, 0]
        x = last[:, None] + position_code(length, self.features).astype(x.dtype)
        for norm, dense in zip(self.decoder[::2], self.decoder[1::2]):
            x = jax.nn.gelu(dense(norm(x).astype(x.dtype)))
        return x

    def _read(self, x: Array) -> Array:
        out = self.head(self.final_norm(x).astype(x.dtype)).astype(jnp.float32)
        if self.logit_cap:
            out = self.logit_cap * jnp.tanh(out / self.logit_cap)
        return out if self.num_targets else out[..., 0]


def check_tokens(tokens: Any, num_tokens: int, mask: Any = None, what: str = "tokens") -> None:
    """Raise `UserError` unless all unmasked tokens lie in 0..num_tokens-1 or, for num_tokens = 0, are finite reals.

    To be called on the host: inside a program, where values are unknown, nothing is checked.

    Args:
        tokens: any shape, whole numbers; or reals [..., F] for num_tokens = 0.
        num_tokens: size of the vocabulary, 0 for real inputs.
        mask: bool, the shape of `tokens` without F; False marks padding, where anything may stand.
        what: how the message names the tokens.
    """
    if isinstance(tokens, Tracer) or isinstance(mask, Tracer):
        return
    tokens = np.asarray(tokens)
    good = (tokens >= 0) & (tokens < num_tokens) if num_tokens else np.isfinite(tokens)
    if mask is not None:
        good |= ~np.asarray(mask).reshape(np.shape(mask) + (1,) * (tokens.ndim - np.ndim(mask)))
    if good.all():
        return
    at = tuple(int(i) for i in np.argwhere(~good)[0])
    expected = f"0 to {num_tokens - 1}, the vocabulary" if num_tokens else "finite numbers"
    raise UserError(f"{what}: found {tokens[at]} at {list(at)}, expected {expected}")


def position_code(length: int, features: int) -> Array:
    """Sines and cosines of Vaswani et al. (2017), section 3.5: [T, D]."""
    rate = 10_000.0 ** (-jnp.arange(0, features, 2) / features)
    angle = jnp.arange(length)[:, None] * rate
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], -1).reshape(length, -1)[:, :features]


def predictive(
    model: SequenceModel, params: Any, tokens: Array, key: Key, num_samples: int = 16, *, mask: Array | None = None
) -> Array:
    """log-probabilities [B, T, num_targets] averaged over the last mixer's uncertainty by `num_samples` draws (Shaj et
    al., 2026, Monte-Carlo read-out). Raises `UserError` for a last mixer without variance, an auto-encoder, or (outside
    a program) unmasked tokens that are not of the vocabulary."""
    if model.readout == "last" or not model.num_targets:
        raise UserError("the Monte-Carlo read-out needs classes at each position")
    check_tokens(tokens, model.num_tokens, mask)
    bound = {"params": params}
    mean, variance = model.apply(bound, tokens, mask=mask, method="belief")  # pyright: ignore[reportGeneralTypeIssues]
    head = lambda x: model.apply(bound, x, method="read")
    return marginal_log_probs(head, mean, variance, key, num_samples)  # pyright: ignore[reportArgumentType]


# ---------------------------------------------------------------- parameters


def _name(path: tuple[Any, ...]) -> str:
    return path[-1].key if path else ""


def decay_mask(params: Any) -> Any:
    """True where weight decay applies, see `DECAYED`."""
    return jax.tree_util.tree_map_with_path(lambda p, _: _name(p) in DECAYED, params)


def cast(params: Any, dtype: Any) -> Any:
    """Weights of linear layers, embeddings and norms in `dtype`; parameters of dynamics as they are."""
    return jax.tree_util.tree_map_with_path(lambda p, x: x.astype(dtype) if _name(p) in CAST else x, params)


def reinitialise(params: Any, key: Key, std: float) -> Any:
    """Redraw every linear weight and embedding, those inside mixers too, from N(0, std^2) (Shaj et al., 2026)."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    keys = jax.random.split(key, len(leaves))
    new = [
        std * jax.random.normal(k, x.shape, x.dtype) if _name(p) in DECAYED else x for k, (p, x) in zip(keys, leaves)
    ]
    return jax.tree.unflatten(tree, new)


def count_parameters(params: Any) -> int:
    """Number of weights."""
    return sum(x.size for x in jax.tree.leaves(params))


def state_bytes(model: SequenceModel) -> int:
    """Memory of the decoding state of one sequence."""
    shapes = jax.eval_shape(lambda: model.init_state(1))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))


# ---------------------------------------------------------------- sampling


def sample_token(key: Key, logits: Array, temperature: float = 1.0, top_k: int = 0) -> Array:
    """logits [..., V] -> tokens [...]; temperature 0 takes the likeliest, top_k > 0 chooses among the k likeliest."""
    if temperature == 0.0:
        return logits.argmax(-1).astype(jnp.int32)
    if top_k:
        least = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits / temperature).astype(jnp.int32)


def generate(
    model: SequenceModel,
    params: Any,
    prompt: Array,
    steps: int,
    key: Key,
    *,
    mask: Array | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
) -> Array:
    """Continue prompts [B, T] by `steps` tokens [B, steps]: parallel prefill, then one step per token, one program.

    mask [B, T]: False marks padding of shorter prompts, best on the left; every row needs a token. Raises `UserError`
    for an empty prompt or row, a token that is not of the vocabulary, a negative temperature or top_k, a model of other
    targets than its inputs, or more tokens than attention has context.
    """
    if prompt.ndim != 2 or prompt.shape[1] < 1:
        raise UserError(f"prompt has shape {prompt.shape}: expected [batch, time >= 1]")
    if temperature < 0 or top_k < 0 or steps < 0:
        raise UserError(f"temperature={temperature}, top_k={top_k}, steps={steps}: expected numbers >= 0")
    if model.num_tokens != model.num_targets:
        raise UserError(f"model of {model.num_tokens} tokens and {model.num_targets} targets: cannot be fed its output")
    for mixer in model.mixers:
        context = getattr(mixer, "context", None)
        if context is not None and prompt.shape[1] + steps > context:
            total = f"a prompt of {prompt.shape[1]} tokens and steps={steps}"
            raise UserError(f"{type(mixer).__name__}.context={context}: {total} do not fit")
    check_tokens(prompt, model.num_tokens, mask, "prompt")
    if mask is not None and not isinstance(mask, Tracer) and not np.asarray(mask).any(axis=1).all():
        raise UserError(f"mask: row {int(np.asarray(mask).any(axis=1).argmin())} is all padding, expected a token")
    run = _generator(model, steps, temperature, top_k)  # pyright: ignore[reportArgumentType]  modules are hashable
    return run(params, prompt, mask, key)


@functools.lru_cache(maxsize=16)
def _generator(model: SequenceModel, steps: int, temperature: float, top_k: int) -> Callable[..., Array]:
    @jax.jit
    def run(params: Any, prompt: Array, mask: Array | None, key: Key) -> Array:
        logits, state = model.apply({"params": params}, prompt, mask=mask)
        if mask is None:
            logits = logits[:, -1]
        else:
            at = prompt.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
            logits = jnp.take_along_axis(logits, at[:, None, None], axis=1)[:, 0]

        def step(carry: tuple[Any, Any], key: Key) -> tuple[tuple[Any, Any], Array]:
            logits, state = carry
            token = sample_token(key, logits, temperature, top_k)
            logits, state = model.apply({"params": params}, token, state, method="step")
            return (logits, state), token

        _, tokens = jax.lax.scan(step, (logits, state), jax.random.split(key, steps))
        return tokens.T

    return run
