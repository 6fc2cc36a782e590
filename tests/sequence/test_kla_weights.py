import importlib

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxstack.core.errors import UserError
from jaxstack.sequence import kla_weights
from jaxstack.sequence.kla_weights import layer_prefixes, load_layer, read_weights, save_layer

D, M, S, K = 6, 12, 4, 4


def released(seed=0, value="full", var="full", **extra):
    """A layer in the released layout; the shapes are written out, as the package declares them."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32) * 0.5
    widths = {"full": M, "conv": 0}
    rows = widths.get(value, value) + widths.get(var, var) + 2 * S
    out = {
        "delta": draw(M, S) - 2,
        "lambda_log": draw(M, S),
        "process_noise": rng.uniform(0.01, 1, (M, S)).astype(np.float32),
        "lambda_skip": np.asarray(-0.7, np.float32),
        "in_proj.weight": draw(2 * M, D),
        "conv.weight": draw(M, 1, K),
        "conv.bias": draw(M),
        "sensor_proj.weight": draw(rows, M),
        "out_proj.weight": draw(D, M),
    }
    out |= {f"{n}_expand.weight": draw(M, r) for n, r in (("value", value), ("var", var)) if isinstance(r, int)}
    return out | extra


def softplus(x):
    return np.logaddexp(0, x)


def silu(x):
    return x / (1 + np.exp(-x))


def forward(w, x, discretisation="ou"):
    """The released layer in plain numpy, float64, token by token in information form (lam, eta)."""
    w = {name: np.asarray(a, np.float64) for name, a in w.items()}
    a, delta = np.exp(w["lambda_log"]), softplus(w["delta"]) + 1e-7
    abar, p = np.exp(-a * delta), np.maximum(w["process_noise"], 1e-7)
    pbar = p / (2 * a) * (1 - np.exp(-2 * a * delta)) if discretisation == "ou" else p * delta
    out, out_var = np.zeros(x.shape), np.zeros(x.shape)
    for b in range(len(x)):
        window, lam, eta = np.zeros((K, M)), np.ones((M, S)), np.zeros((M, S))
        for t in range(x.shape[1]):
            stream, gate = np.split(w["in_proj.weight"] @ x[b, t], 2)
            window = np.concatenate([window[1:], stream[None]])
            z = silu((w["conv.weight"][:, 0] * window.T).sum(1) + w["conv.bias"])
            sensed = w["sensor_proj.weight"] @ z
            k, q = sensed[-2 * S : -S], sensed[-S:]
            k, q = k / np.linalg.norm(k), q / np.linalg.norm(q)
            up = w.get("var_expand.weight")
            rank = M if up is None else up.shape[1]
            raw, v = sensed[-2 * S - rank : -2 * S], sensed[: len(sensed) - 2 * S - rank]
            raw = raw if up is None else up @ raw
            if "value_expand.weight" in w:
                v = w["value_expand.weight"] @ v
            v = v if len(v) else z
            precision = 1 / (softplus(raw) + 1e-4)
            rho = 1 / (abar**2 + pbar * lam)
            lam, eta = lam * rho + np.outer(precision, k**2), abar * rho * eta + np.outer(precision * v, k)
            y = ((eta / lam) @ q + w["lambda_skip"] * z) * silu(gate)
            out[b, t] = w["out_proj.weight"] @ y
            out_var[b, t] = w["out_proj.weight"] ** 2 @ ((1 / lam) @ q**2 * silu(gate) ** 2)
    return out, out_var


@pytest.mark.parametrize(
    ("ranks", "discretisation"), [(("full", "full"), "ou"), (("conv", 1), "ou"), ((3, 2), "zoh"), (("full", 2), "zoh")]
)
def test_loaded_layer_computes_what_the_layout_means(tmp_path, ranks, discretisation):
    weights = released(1, *ranks)
    save_file({f"blocks.1.mixer.{name}": x for name, x in weights.items()}, tmp_path / "w.safetensors")
    module, variables = load_layer(tmp_path / "w.safetensors", prefix="blocks.1.mixer.", discretisation=discretisation)
    assert module.ranks() == ranks
    x = np.random.default_rng(2).normal(size=(2, 9, D)).astype(np.float32)
    out, out_var, _ = jax.jit(lambda v, x: module.apply(v, x, return_variance=True))(variables, x)
    want, want_var = forward(weights, x, discretisation)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    np.testing.assert_allclose(out_var, want_var, rtol=1e-5)


@pytest.mark.parametrize("variant", ["plain", "bias and vector skip", "bare", "no noise"])
def test_a_saved_layer_reads_back_to_the_bit(tmp_path, variant):
    weights = released(3, 3, 2)
    if variant == "bias and vector skip":
        rows = {n.replace("weight", "bias"): np.ones(x.shape[0], np.float32) for n, x in weights.items() if x.ndim == 2}
        weights |= {n: x for n, x in rows.items() if n.endswith("bias")}
        weights["lambda_skip"] = np.arange(M, dtype=np.float32)
    elif variant == "bare":
        weights = {n: x for n, x in weights.items() if not n.startswith(("conv", "lambda_skip"))}
        weights["in_proj.weight"] = weights["in_proj.weight"][:M]
    elif variant == "no noise":
        weights["process_noise"] *= 0
    module, variables = kla_weights.layer_from_torch(weights)
    path = tmp_path / "layer.safetensors"
    save_layer(path, module, variables, prefix="mixer.")
    again = read_weights(path)
    assert set(again) == {f"mixer.{name}" for name in weights}
    for name, x in weights.items():
        assert again[f"mixer.{name}"].shape == x.shape
        np.testing.assert_array_equal(again[f"mixer.{name}"], x)
    fresh = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 2, D), np.float32))
    assert jax.tree.map(np.shape, fresh) == jax.tree.map(np.shape, variables)


def test_prefixes_of_a_model():
    model = {"embedding.weight": 0, "blocks.0.mixer.lambda_log": 0, "blocks.1.mixer.lambda_log": 0}
    assert layer_prefixes(model) == ["blocks.0.mixer.", "blocks.1.mixer."]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("out_proj.weight"), "out_proj.weight: expected a matrix, found none"),
        (lambda w: w.pop("conv.bias"), "'conv.bias' is missing"),
        (lambda w: w.update({"conv.bias": np.zeros(5, np.float32)}), r"'conv.bias' has shape \(5,\): expected \(12,\)"),
        (lambda w: w.update({"conv.biass": np.zeros(12, np.float32)}), "did you mean 'conv.bias'"),
        (lambda w: w.update({"sensor_proj.weight": np.zeros((25, M), np.float32)}), "5 rows are left for v"),
        (lambda w: w.pop("delta"), "prefixes that hold a layer: ''"),
    ],
)
def test_wrong_weights_are_a_clear_error(tmp_path, change, message):
    weights = released()
    change(weights)
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=message) as error:
        load_layer(tmp_path / "w.safetensors")
    assert "w.safetensors" in str(error.value)


def test_wrong_files_and_switches_are_a_clear_error(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such file"):
        load_layer(tmp_path / "none.safetensors")
    wrong = (("w.txt", "expected a name ending"), ("w.npz", "not an NPZ file"), ("w.pt", "broken or no file"))
    for name, message in (*wrong, ("w.safetensors", "not a safetensors file")):
        (tmp_path / name).write_bytes(b"x" * 100)
        with pytest.raises(UserError, match=message):
            load_layer(tmp_path / name)
    with pytest.raises(UserError, match="unknown switch of a loaded layer 'discretization'"):
        kla_weights.layer_from_torch(released(), discretization="zoh")
    module, variables = kla_weights.layer_from_torch(released())
    other, _ = kla_weights.layer_from_torch(released(value="conv"))
    with pytest.raises(UserError, match="do not belong"):
        save_layer(tmp_path / "w.safetensors", other, variables)

    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(UserError, match="need torch"):
        save_layer(tmp_path / "v.pt", module, variables)
