"""Losses of labels, values and pixels against closed forms; a classifier of each kind of set; its weights as a file."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxstack import cli
from jaxstack.nn import losses, optimisers
from jaxstack.nn.classifier import Hypers
from jaxstack.nn.torch_weights import read_weights

KEY = jax.random.key(0)


def test_losses_have_their_closed_forms():
    logits, labels = jax.random.normal(KEY, (6, 3)), jnp.array([[1, 0, 1]] * 6, jnp.float32)
    plain = optax.sigmoid_binary_cross_entropy(logits, labels).mean(-1)
    np.testing.assert_allclose(losses.label_cross_entropy(logits, labels, Hypers()), plain, rtol=1e-5)
    two_sides = Hypers(positive_smoothing=0.2, negative_smoothing=0.05)
    wanted = optax.sigmoid_binary_cross_entropy(logits, jnp.array([[0.8, 0.05, 0.8]] * 6)).mean(-1)
    np.testing.assert_allclose(losses.label_cross_entropy(logits, labels, two_sides), wanted, rtol=1e-5)
    right = (np.asarray(logits) > 0) == (np.asarray(labels) > 0)
    np.testing.assert_allclose(losses.label_accuracy(logits, labels, None), right.mean(1), rtol=1e-6)
    assert (losses.all_labels(logits, labels, None) == right.all(1)).all()
    assert jnp.isfinite(jax.grad(lambda x: losses.label_cross_entropy(x, labels, Hypers()).sum())(1e4 * logits)).all()
    maps, masks = jax.random.normal(KEY, (2, 4, 5, 3)), jax.random.randint(KEY, (2, 4, 5), 0, 3)
    each = optax.softmax_cross_entropy_with_integer_labels(maps, masks).mean((1, 2))
    np.testing.assert_allclose(losses.pixel_cross_entropy(maps, masks, Hypers()), each, rtol=1e-5)
    hits = (np.asarray(maps).argmax(-1) == np.asarray(masks)).mean((1, 2))
    np.testing.assert_allclose(losses.pixel_accuracy(maps, masks, None), hits, rtol=1e-6)
    np.testing.assert_allclose(losses.absolute_error(logits, labels, None), jnp.abs(logits - labels).mean(1), rtol=1e-6)


def test_restarts_begin_at_the_peak_each_time():
    at = lambda step: float(optimisers.learning_rate("restarts", step, 100, 2.0, cycles=4, min_lr=0.5))
    assert [at(t) for t in (0, 25, 50, 75)] == pytest.approx([2.0] * 4)
    assert at(100) == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["labels", "values"])
def test_a_classifier_learns_what_its_files_tell(kind, tmp_path, capsys):
    rng = np.random.default_rng(0)
    halves = rng.random((80, 2)) - 0.5
    x = np.round(255 * (halves + 0.5)).astype(np.uint8)[:, :, None, None].repeat(2, 2).repeat(4, 3).reshape(80, 4, 4)
    np.savez(tmp_path / "set.npz", x=x, y=(halves > 0).astype(int) if kind == "labels" else halves)
    run, options = str(tmp_path / "run"), ["--features", "16", "--shift", "0", "--dropout", "0", "--batch-size", "16"]
    options += ["--optimiser", "adam", "--schedule", "restarts", "--cycles", "2", "--lr", "0.02", "--num-updates", "60"]
    assert cli.main(["train", "classifier", "--data", f"npz={tmp_path}/set.npz", "--run-dir", run, *options]) == 0
    capsys.readouterr()
    assert cli.main(["evaluate", run]) == 0
    found = dict(line.split(" (")[0].split(": ") for line in capsys.readouterr().out.splitlines() if ": " in line)
    if kind == "labels":
        assert float(found["eval/label_accuracy"]) > 0.75
        assert float(found["eval/auc"]) > 0.85
        assert cli.main(["export", run, str(tmp_path / "w.npz"), "--format", "weights", "--fold"]) == 0
        assert "1 of 1 BatchNorms are folded" in capsys.readouterr().out
        assert set(read_weights(tmp_path / "w.npz")) == {f"Dense_{i}.{n}" for i in (0, 1) for n in ("weight", "bias")}
        assert cli.main(["export", run, str(tmp_path / "w.pt"), "--format", "weights"]) == 2
        assert "expected a name ending in .npz or .safetensors" in capsys.readouterr().err
        assert cli.main(["export", run, str(tmp_path / "w"), "--fold"]) == 2
        assert "--fold: found with --format bundle, expected weights" in capsys.readouterr().err
    else:
        assert float(found["eval/absolute_error"]) < 0.15  # of the mean alone: 0.25
