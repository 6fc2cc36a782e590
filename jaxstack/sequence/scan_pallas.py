"""The Kalman filter of Kalman Linear Attention as one Pallas kernel per direction, for GPU (Triton) and TPU (Mosaic).

A program owns one (batch, block of channels) and walks through time with its state [S, channels] at hand, so that
nothing of size T M S is read, and the forward pass without gradients writes none either. The backward pass reads the
states before each step, which the forward pass for gradients stores, and runs the scalar adjoint of kla_filter.py.
On TPU time is cut into blocks, which the grid visits in order while the state stays in an output that all share; on
GPU a program loops over all of T. What the kernels compute per step is `filter_step` and `filter_step_grad`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from jaxstack.core.errors import UserError
from jaxstack.sequence.kla_filter import Token, filter_step, filter_step_grad, hold
from jaxstack.sequence.scan import own_adjoint

PLATFORMS = ("gpu", "tpu")


class _Plan(NamedTuple):
    """Static facts of a call: sizes after padding and blocks."""

    batch: int
    length: int
    d_state: int
    channels: int
    steps: int
    """Time steps of a block."""
    width: int
    """Channels of a block."""
    prior: bool
    interpret: bool
    platform: str


def kalman_filter(
    tokens: Token,
    keep: Array | None,
    abar: Array,
    pbar: Array,
    lam: Array,
    mean: Array,
    *,
    prior: bool = False,
    interpret: bool = False,
    platform: str | None = None,
) -> tuple[Array, Array, Array, Array]:
    """tokens: v, precision [B, T, M], k, q [B, T, S]; keep bool [B, T] or None; abar, pbar [M, S]; lam, mean [B, M, S]
    -> (y [B, T, M], its variance [B, T, M], last lam, last mean [B, M, S]); see `kla_scan`, which validates.

    platform: "gpu" or "tpu", by default that of the running backend; it decides the blocks.
    interpret: run the kernel as ordinary JAX operations, anywhere. Raises `UserError` on a CPU without it, for float64
    without it (no TPU has it), and for T = 0.
    """
    platform = platform or jax.default_backend()
    if platform in ("cuda", "rocm"):
        platform = "gpu"
    if not interpret and platform not in PLATFORMS:
        raise UserError(
            f"method='pallas' runs on {' and '.join(PLATFORMS)}, not {platform!r}; interpret=True emulates it"
        )
    if not interpret and abar.dtype != jnp.float32:
        raise UserError(f"method='pallas' computes in float32, found {abar.dtype}")
    batch, length, channels = tokens.v.shape
    if length == 0:
        raise UserError("method='pallas' needs at least one time step")
    plan = _plan(batch, length, channels, tokens.k.shape[-1], prior, interpret, platform)
    pad_t, pad_m, pad_s = plan.length - length, plan.channels - channels, plan.d_state - tokens.k.shape[-1]
    keep = jnp.ones((batch, length), bool) if keep is None else keep
    wide = lambda x: jnp.pad(x, ((0, 0), (0, pad_t), (0, pad_m)))[:, :, None, :]
    narrow = lambda x: jnp.pad(x, ((0, 0), (0, pad_t), (0, pad_s)))[:, :, :, None]
    token = Token(wide(tokens.v), wide(tokens.precision), narrow(tokens.k), narrow(tokens.q))
    keep = jnp.pad(keep, ((0, 0), (0, pad_t)))[:, :, None, None].astype(abar.dtype)
    # an added filter has k = q = 0: it observes nothing and no output reads it; abar = 1, pbar = 0 keep its state
    coefficient = lambda x, fill: jnp.pad(x.T, ((0, pad_s), (0, pad_m)), constant_values=fill)
    state = lambda x, fill: jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, pad_s), (0, pad_m)), constant_values=fill)
    y, var, lam, mean = _filter(
        token, keep, coefficient(abar, 1.0), coefficient(pbar, 0.0), state(lam, 1.0), state(mean, 0.0), plan
    )
    s = tokens.k.shape[-1]
    lam, mean = (x[:, :s, :channels].swapaxes(1, 2) for x in (lam, mean))
    return y[:, :length, 0, :channels], var[:, :length, 0, :channels], lam, mean


def _plan(batch: int, length: int, channels: int, d_state: int, prior: bool, interpret: bool, platform: str) -> _Plan:
    """GPU: power-of-two blocks (Triton's rule) of about 512 filters, all of T. TPU: lanes of 128, blocks of time small
    enough that the stored states of a block, two arrays [steps, S, 128], stay within 4 MB."""
    up = lambda n, m: -(-n // m) * m
    if platform == "tpu":
        d_state, width = up(d_state, 8), 128
        steps = min(max(2 ** int(math.log2(2**22 / (8 * width * d_state))), 1), up(length, 8))
    else:
        d_state = 2 ** math.ceil(math.log2(d_state))
        width, steps = min(max(512 // d_state, 16), 2 ** math.ceil(math.log2(max(channels, 1)))), length
    return _Plan(batch, up(length, steps), d_state, up(channels, width), steps, width, prior, interpret, platform)


def _compiler(plan: _Plan) -> Any:
    """On GPU the Triton path is asked for by name: Mosaic GPU, the default, wants blocks that fit shared memory."""
    if plan.interpret:
        return None
    if plan.platform == "tpu":
        from jax.experimental.pallas import tpu

        return tpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))
    from jax.experimental.pallas import triton

    return triton.CompilerParams(num_warps=4, num_stages=1)


# ---------------------------------------------------------------- calls


@own_adjoint(6)
def _filter(
    tokens: Token, keep: Array, abar: Array, pbar: Array, lam: Array, mean: Array, plan: _Plan
) -> tuple[Array, Array, Array, Array]:
    """Padded arrays: v, precision [B, T, 1, M]; k, q [B, T, S, 1]; keep [B, T, 1, 1]; abar, pbar [S, M];
    lam, mean [B, S, M] -> y, variance [B, T, 1, M], last lam, mean [B, S, M]."""
    y, var, lam, mean = _forward(tokens, keep, abar, pbar, lam, mean, plan, store=False)
    return y, var, lam, mean


def _filter_fwd(
    tokens: Token, keep: Array, abar: Array, pbar: Array, lam: Array, mean: Array, plan: _Plan
) -> tuple[Any, Any]:
    y, var, lam, mean, *states = _forward(tokens, keep, abar, pbar, lam, mean, plan, store=True)
    return (y, var, lam, mean), (tokens, keep, abar, pbar, *states)


def _forward(
    tokens: Token, keep: Array, abar: Array, pbar: Array, lam: Array, mean: Array, plan: _Plan, store: bool
) -> list[Array]:
    spec, dtype = _specs(plan, lambda t: t), lam.dtype
    b, t, s, m = plan.batch, plan.length, plan.d_state, plan.channels
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, dtype)
    outs = [(spec.wide, shape(b, t, 1, m))] * 2 + [(spec.state, shape(b, s, m))] * 2
    outs += [(spec.states, shape(b, t, s, m))] * 2 if store else []
    call = pl.pallas_call(
        functools.partial(_forward_kernel, plan),
        grid=spec.grid,
        in_specs=[*spec.tokens, spec.keep, spec.coefficient, spec.coefficient, spec.state, spec.state],
        out_specs=[o[0] for o in outs],
        out_shape=[o[1] for o in outs],
        interpret=plan.interpret,
        compiler_params=_compiler(plan),
    )
    return call(*tokens, keep, abar, pbar, lam, mean)


def _filter_bwd(plan: _Plan, saved: Any, cotangent: Any) -> Any:
    tokens, keep, abar, pbar, lams, means = saved
    d_y, d_var, d_lam, d_mean = cotangent
    blocks = plan.length // plan.steps
    spec, dtype = _specs(plan, lambda t: blocks - 1 - t), lams.dtype
    b, t, s, m = plan.batch, plan.length, plan.d_state, plan.channels
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, dtype)
    wide, state = (spec.wide, shape(b, t, 1, m)), (spec.state, shape(b, s, m))
    narrow = (spec.narrow_of_block, shape(m // plan.width, b, t, s, 1))
    outs = [wide, wide, narrow, narrow, state, state, state, state]
    call = pl.pallas_call(
        functools.partial(_backward_kernel, plan),
        grid=spec.grid,
        in_specs=[
            *(*spec.tokens, spec.keep, spec.coefficient, spec.coefficient, spec.states, spec.states),
            *(spec.wide, spec.wide, spec.state, spec.state),
        ],
        out_specs=[o[0] for o in outs],
        out_shape=[o[1] for o in outs],
        interpret=plan.interpret,
        compiler_params=_compiler(plan),
    )
    d_v, d_precision, d_k, d_q, d_lam, d_mean, d_abar, d_pbar = call(
        *tokens, keep, abar, pbar, lams, means, d_y, d_var, d_lam, d_mean
    )
    token = Token(d_v, d_precision, d_k.sum(0), d_q.sum(0))
    return token, jnp.zeros_like(keep), d_abar.sum(0), d_pbar.sum(0), d_lam, d_mean


_filter.defvjp(_filter_fwd, _filter_bwd)


class _Specs(NamedTuple):
    grid: tuple[int, int, int]
    wide: pl.BlockSpec
    tokens: list[pl.BlockSpec]
    keep: pl.BlockSpec
    coefficient: pl.BlockSpec
    state: pl.BlockSpec
    states: pl.BlockSpec
    narrow_of_block: pl.BlockSpec


def _specs(plan: _Plan, time: Callable[[Any], Any]) -> _Specs:
    """Blocks over the grid (batch, channel block, time block); `time` maps the grid's third index to a block."""
    c, s, w = plan.steps, plan.d_state, plan.width
    wide = pl.BlockSpec((1, c, 1, w), lambda b, m, t: (b, time(t), 0, m))
    narrow = pl.BlockSpec((1, c, s, 1), lambda b, m, t: (b, time(t), 0, 0))
    return _Specs(
        grid=(plan.batch, plan.channels // w, plan.length // c),
        wide=wide,
        tokens=[wide, wide, narrow, narrow],
        keep=pl.BlockSpec((1, c, 1, 1), lambda b, m, t: (b, time(t), 0, 0)),
        coefficient=pl.BlockSpec((s, w), lambda b, m, t: (0, m)),
        state=pl.BlockSpec((1, s, w), lambda b, m, t: (b, 0, m)),
        states=pl.BlockSpec((1, c, s, w), lambda b, m, t: (b, time(t), 0, m)),
        narrow_of_block=pl.BlockSpec((1, 1, c, s, 1), lambda b, m, t: (m, b, time(t), 0, 0)),
    )


# ---------------------------------------------------------------- kernels


def _forward_kernel(plan: _Plan, v, precision, k, q, keep, abar, pbar, lam0, mean0, y, var, lam, mean, *states) -> None:
    """`lam` and `mean`, the last states, carry the filter from one block of time to the next."""
    start = _carried(plan, (lam, mean), lambda: (lam0[0], mean0[0]))
    a, p = abar[...], pbar[...]

    def body(t: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        for store, x in zip(states, state):
            store[0, t] = x
        token = Token(v[0, t], precision[0, t], k[0, t], q[0, t])
        after_lam, after_mean, y[0, t], var[0, t] = filter_step(
            *state, token, *hold(a, p, keep[0, t]), prior=plan.prior
        )
        return after_lam, after_mean

    lam[0], mean[0] = jax.lax.fori_loop(0, plan.steps, body, start)


def _backward_kernel(
    plan: _Plan, v, precision, k, q, keep, abar, pbar, lams, means, d_y, d_var, d_last_lam, d_last_mean, *outs
) -> None:
    """From the last step to the first; the cotangents of state and coefficients stay in outputs of all time blocks."""
    d_v, d_precision, d_k, d_q, d_lam, d_mean, d_abar, d_pbar = outs
    zero = jnp.zeros(d_abar.shape[1:], d_abar.dtype)
    start = _carried(plan, outs[4:], lambda: (d_last_lam[0], d_last_mean[0], zero, zero))
    a, p = abar[...], pbar[...]

    def body(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        t = plan.steps - 1 - i
        to_lam, to_mean, to_abar, to_pbar = carry
        token, on = Token(v[0, t], precision[0, t], k[0, t], q[0, t]), keep[0, t]
        cotangent = (to_lam, to_mean, d_y[0, t], d_var[0, t])
        grad = filter_step_grad(lams[0, t], means[0, t], token, *hold(a, p, on), cotangent, prior=plan.prior)
        for out, x in zip((d_v, d_precision), grad.token[:2]):
            out[0, t] = x
        for out, x in zip((d_k, d_q), grad.token[2:]):
            out[0, 0, t] = x
        return grad.lam, grad.mean, to_abar + on * grad.abar, to_pbar + on * grad.pbar

    carry = jax.lax.fori_loop(0, plan.steps, body, start)
    d_lam[0], d_mean[0], d_abar[0], d_pbar[0] = carry


def _carried(plan: _Plan, outs: Sequence[Any], first: Callable[[], tuple[Array, ...]]) -> tuple[Array, ...]:
    """What the previous block of time left in `outs`, or `first()` in the first. With a single block (GPU) no value
    goes through memory: nothing there orders one thread's read after another's write."""
    if plan.steps == plan.length:
        return first()

    @pl.when(pl.program_id(2) == 0)
    def _start() -> None:
        for out, x in zip(outs, first()):
            out[0] = x

    return tuple(out[0] for out in outs)
