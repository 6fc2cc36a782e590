"""Layers of Kalman Linear Attention to and from the layout of the released PyTorch package (`kla`, v0.1.0, MIT).

    delta, lambda_log, process_noise [M, S]       lambda_skip [] or [M]
    in_proj.weight [2M, D] (values, then gate)    conv.weight [M, 1, K], conv.bias [M]
    sensor_proj.weight [value + variance + 2S, M] (v, log variance, k, q)
    value_expand.weight, var_expand.weight [M, rank] where a bottleneck is used       out_proj.weight [D, M]

Linear weights are [out, in] there and [in, out] here. In a whole model layer i has the prefix `blocks.i.mixer.`.
Files: .safetensors, .pt or .pth; torch is imported only where a .pt is written.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxstack.core.errors import UserError, unknown
from jaxstack.nn.torch_weights import Weights, read_weights
from jaxstack.sequence.kla import KalmanLinearAttention

_LINEAR = {"in_proj": "in_proj", "sensor": "sensor_proj", "out_proj": "out_proj"}
_EXPAND = {"value_expand": "value_expand", "var_expand": "var_expand"}


def load_layer(path: str | Path, *, prefix: str = "", **switches: Any) -> tuple[KalmanLinearAttention, dict[str, Any]]:
    """Read one layer -> (module, variables for `module.apply`).

    Sizes, ranks, gate, convolution, skip and bias follow from the shapes; a process noise of all zeros is the ablation
    without it. What shapes do not tell is given as fields of `KalmanLinearAttention`: read, discretisation, qk_norm,
    obs_var_min, obs_var_max, method, dtype. Raises `UserError` naming the file and the weight.
    """
    return layer_from_torch(read_weights(path), prefix=prefix, source=str(path), **switches)


def save_layer(path: str | Path, module: KalmanLinearAttention, variables: Mapping[str, Any], prefix: str = "") -> None:
    """Write one layer under `prefix` as .safetensors or .pt; the released package loads it with `load_state_dict`."""
    write_weights(path, layer_to_torch(module, variables, prefix))


def layer_prefixes(weights: Mapping[str, Any]) -> list[str]:
    """Prefixes under which `weights` holds a layer, in the order of the file's names."""
    return [name.removesuffix("lambda_log") for name in weights if name.split(".")[-1] == "lambda_log"]


def layer_from_torch(
    weights: Mapping[str, np.ndarray], *, prefix: str = "", source: str = "weights", **switches: Any
) -> tuple[KalmanLinearAttention, dict[str, Any]]:
    """`load_layer` from names and arrays in memory."""
    found = {k.removeprefix(prefix): np.asarray(v) for k, v in weights.items() if k.startswith(prefix)}
    if "delta" not in found:
        layers = ", ".join(map(repr, layer_prefixes(weights))) or "none"
        raise UserError(f"{source}: no weight {prefix + 'delta'!r}; prefixes that hold a layer: {layers}")
    fields = _fields(found, f"{source}: {prefix}")
    for name in switches:
        if name not in _SWITCHES:
            raise unknown("switch of a loaded layer", name, _SWITCHES)
    module = KalmanLinearAttention(**fields, **switches)
    expected = _layout(module)
    for name in found:
        if name not in expected:
            raise unknown(f"weight in {source}", prefix + name, [prefix + n for n in expected])
    for name, shape in expected.items():
        if name not in found:
            raise UserError(f"{source}: weight {prefix + name!r} is missing")
        if found[name].shape != shape:
            raise UserError(f"{source}: weight {prefix + name!r} has shape {found[name].shape}: expected {shape}")
    return module, {"params": _params(found, module)}


def layer_to_torch(module: KalmanLinearAttention, variables: Mapping[str, Any], prefix: str = "") -> Weights:
    """Names and float32 arrays of one layer in the released layout."""
    params = variables["params"]
    out = {name: params[name] for name in ("delta", "lambda_log")}
    noise = params.get("process_noise")
    out["process_noise"] = jnp.full_like(params["delta"], module.process_noise) if noise is None else noise
    if "lambda_skip" in params:
        out["lambda_skip"] = params["lambda_skip"]
    if "conv" in params:
        out["conv.weight"], out["conv.bias"] = params["conv"]["weight"].T[:, None], params["conv"]["bias"]
    for ours, theirs in (_LINEAR | _EXPAND).items():
        if ours in params:
            out[f"{theirs}.weight"] = params[ours]["kernel"].T
            if module.use_bias:
                out[f"{theirs}.bias"] = params[ours]["bias"]
    arrays = {prefix + name: np.ascontiguousarray(x, np.float32).reshape(np.shape(x)) for name, x in out.items()}
    expected = {prefix + name: shape for name, shape in _layout(module).items()}
    if {name: x.shape for name, x in arrays.items()} != expected:
        raise UserError("variables do not belong to this module: their names or shapes differ from its fields")
    return arrays


def write_weights(path: str | Path, weights: Weights) -> None:
    """Write names and arrays as .safetensors or .pt. Raises `UserError` for another ending, or no torch for .pt."""
    path = Path(path)
    if path.suffix == ".safetensors":
        from safetensors.numpy import save_file

        save_file(weights, path)
        return
    torch = _torch(path)
    torch.save({name: torch.from_numpy(x.copy()) for name, x in weights.items()}, path)


def _torch(path: Path) -> Any:
    if path.suffix not in (".pt", ".pth"):
        raise UserError(f"{path}: expected a name ending in .safetensors, .pt or .pth")
    try:
        return importlib.import_module("torch")
    except ImportError as e:
        raise UserError(f"{path}: {path.suffix} files need torch (pip install torch); .safetensors does not") from e


_SWITCHES = ("read", "discretisation", "qk_norm", "obs_var_min", "obs_var_max", "method", "dtype")


def _fields(found: Mapping[str, np.ndarray], where: str) -> dict[str, Any]:
    """Module fields that the shapes tell."""
    for name in ("delta", "lambda_log", "process_noise", "in_proj.weight", "sensor_proj.weight", "out_proj.weight"):
        if found.get(name, np.zeros(0)).ndim != 2:
            raise UserError(f"{where}{name}: expected a matrix, found {found[name].shape if name in found else 'none'}")
    (channels, d_state), features = found["delta"].shape, found["in_proj.weight"].shape[1]
    rank = lambda name: found[name].shape[-1] if name in found else None
    var = rank("var_expand.weight") or "full"
    width = found["sensor_proj.weight"].shape[0] - 2 * d_state - (channels if var == "full" else int(var))
    value = rank("value_expand.weight") or {0: "conv", channels: "full"}.get(width)
    if value is None:
        raise UserError(f"{where}sensor_proj.weight: {width} rows are left for v; expected 0 or {channels}")
    exact = int(channels / features * features) == channels
    skip = found.get("lambda_skip")
    return dict(
        features=features,
        d_state=d_state,
        expand=channels / features if exact else (channels + 0.5) / features,
        value_rank=value,
        var_rank=var,
        process_noise=0.01 if found["process_noise"].any() else 0.0,
        use_conv="conv.weight" in found,
        conv_size=found["conv.weight"].shape[-1] if "conv.weight" in found else 4,
        use_gate=found["in_proj.weight"].shape[0] == 2 * channels,
        skip="none" if skip is None else "scalar" if skip.ndim == 0 else "vector",
        use_bias="in_proj.bias" in found,
    )


def _layout(module: KalmanLinearAttention) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the released layer for this module's fields."""
    d, m, s = module.features, module.channels, module.d_state
    value, var = module.ranks()
    wide = {"full": m, "conv": 0}
    widths = [wide[r] if isinstance(r, str) else r for r in (value, var)]
    linear = {"in_proj": (2 * m if module.use_gate else m, d), "sensor_proj": (sum(widths) + 2 * s, m)}
    linear |= {f"{n}_expand": (m, r) for n, r in (("value", value), ("var", var)) if isinstance(r, int)}
    linear["out_proj"] = (d, m)
    out: dict[str, tuple[int, ...]] = dict.fromkeys(("delta", "lambda_log", "process_noise"), (m, s))
    if module.skip != "none":
        out["lambda_skip"] = () if module.skip == "scalar" else (m,)
    if module.use_conv:
        out |= {"conv.weight": (m, 1, module.conv_size), "conv.bias": (m,)}
    out |= {f"{name}.weight": shape for name, shape in linear.items()}
    return out | ({f"{name}.bias": shape[:1] for name, shape in linear.items()} if module.use_bias else {})


def _params(found: Mapping[str, np.ndarray], module: KalmanLinearAttention) -> dict[str, Any]:
    array = lambda x: jnp.asarray(np.ascontiguousarray(x), jnp.float32).reshape(np.shape(x))
    names = ["delta", "lambda_log", *(["process_noise"] if module.process_noise else [])]
    params: dict[str, Any] = {name: array(found[name]) for name in names}
    if "lambda_skip" in found:
        params["lambda_skip"] = array(found["lambda_skip"])
    if module.use_conv:
        params["conv"] = {"weight": array(found["conv.weight"][:, 0].T), "bias": array(found["conv.bias"])}
    for ours, theirs in (_LINEAR | _EXPAND).items():
        if f"{theirs}.weight" in found:
            params[ours] = {"kernel": array(found[f"{theirs}.weight"].T)}
            if module.use_bias:
                params[ours]["bias"] = array(found[f"{theirs}.bias"])
    return params
