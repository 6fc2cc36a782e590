"""Which units of a network are on: the binary codes of its ReLUs, and how far they agree between images.

Mellor, Turner, Storkey and Crowley, ICML 2021 (arXiv 2006.04647), section 3. The codes are read off the network's
program, so any network of `jax.nn.relu` and `relu6` will do, of flax or not.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jaxtyping import Array

from jaxstack.core.errors import UserError

RELUS = ("relu", "relu6")
CALLS = ("jit", "pjit", "closed_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call")
"""Primitives that call one program once."""


def agreement(code: Array) -> Array:
    """Units [B, n] bool that agree, for each two images: [B, B] int32. Counts below 2^24 are exact in float32."""
    c = code.reshape(len(code), -1).astype(jnp.float32)
    return (c @ c.T + (1.0 - c) @ (1.0 - c).T).astype(jnp.int32)


def hamming_kernel(codes: Sequence[Array]) -> Array:
    """K_H (equation 1): units of all ReLUs less the Hamming distance of each two images' codes, [B, B] int32.

    Args:
        codes: [B, n] bool of each ReLU, folded one after the other.
    """
    total = agreement(codes[0])
    for code in codes[1:]:
        total = total + agreement(code)
    return total


def relu_codes(apply: Callable[[Any, Array], Any], variables: Any, x: Array) -> list[Array]:
    """Which units of each ReLU of a network are on, in the order in which it computes them: [B, n] bool each, of those
    ReLUs whose inputs are [B, ...].

    Args:
        apply: (variables, images) -> anything; with the batch's statistics, as the score wants it, such as
            `lambda v, x: network.apply(v, x, True, mutable=["batch_stats"])[0]`.
        variables: of the network.
        x: images [B, ...].

    Raises:
        UserError: for a network without ReLUs, or with one in a loop or branch.
    """
    program = jax.make_jaxpr(apply)(variables, x)

    def codes(variables: Any, x: Array) -> list[Array]:
        found: list[Array] = []
        _evaluate(program.jaxpr, program.consts, jax.tree.leaves((variables, x)), found)
        # others, such as of a norm's variances, are of no image
        return [code.reshape(len(x), -1) for code in found if code.ndim > 1 and len(code) == len(x)]

    result = jax.jit(codes)(variables, x)
    if not result:
        raise UserError("apply: found no ReLU, expected a network with jax.nn.relu or relu6")
    return result


def _has_relu(jaxpr: Any) -> bool:
    return any(
        eqn.params.get("name") in RELUS or any(map(_has_relu, core.jaxprs_in_params(eqn.params))) for eqn in jaxpr.eqns
    )


def _evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], found: list[Array]) -> list[Any]:
    """Outputs of a program; what comes into its ReLUs is compared with 0 and appended."""
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args)))
    read = lambda v: v.val if isinstance(v, core.Literal) else known[v]
    for eqn in jaxpr.eqns:
        values, params = [read(v) for v in eqn.invars], eqn.params
        if params.get("name") in RELUS:
            found.append(values[0] > 0)
        if eqn.primitive.name in CALLS:
            inner = params.get("jaxpr") or params["call_jaxpr"]
            closed = inner if isinstance(inner, core.ClosedJaxpr) else core.ClosedJaxpr(inner, ())
            out = _evaluate(closed.jaxpr, closed.consts, values, found)
        elif any(map(_has_relu, core.jaxprs_in_params(params))):
            raise UserError(f"apply: found a ReLU inside of {eqn.primitive.name}, expected none in loops or branches")
        else:
            out = eqn.primitive.bind(*values, **params)
            out = out if eqn.primitive.multiple_results else [out]
        known.update(zip(eqn.outvars, out))
    return [read(v) for v in jaxpr.outvars]
