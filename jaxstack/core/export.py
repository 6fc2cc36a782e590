"""Trained policies for other programs: StableHLO for any XLA runtime, ONNX for the rest.

The exported function is the greedy policy with its weights inside,

    (obs [B, A, *obs_shape], first [B] bool, *carry[, action_mask [B, A, n]]) -> (*carry, action [B, A, ...])

with a free batch size B. What was written is read back and run; if it does not run, or its outputs differ from the
policy's, it is deleted and an error raised.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxstack.core.bundle import LoadedPolicy
from jaxstack.core.errors import UserError

PLATFORMS = ("cpu", "cuda", "tpu")
TOLERANCE = 1e-5
"""Largest difference of continuous actions and carries; discrete actions must be equal."""


def stablehlo(
    policy: LoadedPolicy,
    obs_shape: Sequence[int],
    path: str | Path,
    mask_size: int | None = None,
    platforms: Sequence[str] = PLATFORMS,
    obs_dtype: Any = jnp.float32,
) -> Path:
    """Write `path` (`jax.export` bytes, one file for all `platforms`) and `path`.json with its signature.

    obs_shape: [A, ...] of one environment; mask_size: n of the action mask, None for a policy without one; obs_dtype:
    integers for observations that name categories, uint8 for images. Read it with `load_stablehlo`, or any runtime for
    StableHLO. Raises `UserError` for an unknown platform, a file that cannot be
    written, or outputs that differ.
    """
    from jax import export

    for platform in platforms:
        if platform not in PLATFORMS:
            raise UserError(f"platform {platform!r}: expected some of {', '.join(PLATFORMS)}")
    function, inputs = _function(policy), _inputs(policy, tuple(obs_shape), mask_size, obs_dtype)
    (batch,) = export.symbolic_shape("batch")
    shapes = [jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in inputs(1)]
    exported = export.export(jax.jit(function), platforms=tuple(platforms))(*shapes)
    path = Path(path)
    signature = {
        "inputs": [{"shape": ["batch", *x.shape[1:]], "dtype": str(x.dtype)} for x in inputs(1)],
        "outputs": [{"shape": [str(d) for d in a.shape], "dtype": str(a.dtype)} for a in exported.out_avals],
        "order": "obs, first, carry..., action_mask (if any) -> carry..., action",
        "platforms": list(platforms),
        "agent": policy.spec["agent"],
        "jax": jax.__version__,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(exported.serialize()))
        path.with_name(path.name + ".json").write_text(json.dumps(signature, indent=1))
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror})") from e
    if jax.default_backend() in [{"cuda": "gpu"}.get(p, p) for p in platforms]:
        _verify(path, lambda *xs: load_stablehlo(path)(*xs), function, inputs)
    return path


def load_stablehlo(path: str | Path) -> Callable[..., Sequence[Any]]:
    """The function of a file that `stablehlo` wrote. Raises `UserError` when it is missing or damaged."""
    from jax import export

    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: not found")
    try:
        exported = export.deserialize(bytearray(path.read_bytes()))
    except Exception as e:  # the reader of the format raises whatever the damaged bytes lead to
        raise UserError(f"{path}: not an exported policy ({type(e).__name__})") from e
    return jax.jit(exported.call)


def onnx(
    policy: LoadedPolicy,
    obs_shape: Sequence[int],
    path: str | Path,
    mask_size: int | None = None,
    obs_dtype: Any = jnp.float32,
) -> Path:
    """Write `path` through jax2onnx and run it with onnxruntime.

    Both packages must be installed; jax2onnx declares an older orbax than the runner's, which it does not need here
    (docs/export.md). Raises `UserError` when they are missing or the outputs differ.
    """
    try:
        import jax2onnx  # pyright: ignore[reportMissingImports]
        import onnxruntime  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise UserError(f"ONNX needs jax2onnx and onnxruntime, see docs/export.md ({e.name} is missing)") from e
    function, inputs = _function(policy), _inputs(policy, tuple(obs_shape), mask_size, obs_dtype)
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror})") from e
    shapes = [jax.ShapeDtypeStruct(("B", *x.shape[1:]), x.dtype) for x in inputs(1)]  # pyright: ignore[reportArgumentType]
    jax2onnx.to_onnx(function, shapes, return_mode="file", output_path=str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]
    run = lambda *xs: session.run(None, dict(zip(names, map(np.asarray, xs))))
    _verify(path, run, function, inputs)
    return path


def _function(policy: LoadedPolicy) -> Callable[..., tuple[Any, ...]]:
    act = policy.learner.policy
    if act is None:
        raise UserError(f"{policy.learner.name} has no policy to export")
    structure = jax.tree.structure(act.init_carry(policy.params, 1))

    def function(obs: Any, first: Any, *rest: Any) -> tuple[Any, ...]:
        carry = jax.tree.unflatten(structure, rest[: structure.num_leaves])
        mask = rest[structure.num_leaves] if len(rest) > structure.num_leaves else None
        carry, action = act.act(policy.params, carry, obs, mask, first, None)
        return (*jax.tree.leaves(carry), action)

    return function


def _inputs(
    policy: LoadedPolicy, obs_shape: tuple[int, ...], mask_size: int | None, obs_dtype: Any
) -> Callable[[int], list[Any]]:
    """batch -> random inputs."""

    def draw(batch: int) -> list[Any]:
        rng = np.random.default_rng(batch)
        carry = [jnp.zeros_like(x) for x in jax.tree.leaves(policy.init_carry(batch))]
        obs = rng.normal(size=(batch, *obs_shape))
        if jnp.issubdtype(obs_dtype, jnp.integer):
            obs = np.abs(16 * obs)  # small whole numbers
        out = [jnp.asarray(obs, obs_dtype), jnp.asarray(rng.random(batch) < 0.3)]
        out += [jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in carry]
        if mask_size is not None:
            mask = rng.random((batch, obs_shape[0], mask_size)) < 0.7
            mask[..., 0] = True  # something is always allowed
            out.append(jnp.asarray(mask))
        return out

    return draw


def _verify(path: Path, run: Callable, function: Callable, inputs: Callable[[int], list[Any]]) -> None:
    """Compare the written function with the policy at two batch sizes; deletes what was written where they differ."""
    try:
        for batch in (1, 5):
            xs = inputs(batch)
            for i, (got, want) in enumerate(zip(run(*xs), function(*xs), strict=True)):
                got, want = np.asarray(got), np.asarray(want)
                exact = np.issubdtype(want.dtype, np.integer)
                if got.shape != want.shape:
                    raise UserError(f"{path}: output {i} has shape {got.shape}, the policy's {want.shape}")
                error = np.abs(got.astype(np.float64) - want.astype(np.float64)).max(initial=0.0)
                if not error <= (0 if exact else TOLERANCE):
                    raise UserError(
                        f"{path}: output {i} differs from the policy's by {error:.3g}; nothing was exported"
                    )
    except Exception as e:  # the runtime of the format raises whatever the written bytes lead to
        for written in (path, path.with_name(path.name + ".json")):
            written.unlink(missing_ok=True)
        if isinstance(e, UserError):
            raise
        raise UserError(f"{path}: does not run ({type(e).__name__}); nothing was exported") from e
