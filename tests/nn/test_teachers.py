"""A classifier that learns from another: the losses in closed form, and what a student's run is."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack import cli
from jaxstack.core import runner
from jaxstack.core.errors import UserError
from jaxstack.nn.attention_transfer import attention_distance
from jaxstack.nn.classifier import Hypers, arrays, classifier
from jaxstack.nn.supervised import cross_entropy
from jaxstack.nn.teachers import distil_loss, taught

KEY = jax.random.key(0)


def test_losses_are_their_closed_forms():
    k = jax.random.split(KEY, 4)
    student, teacher = ((jax.random.normal(k[i], (5, 4)), (jax.random.normal(k[i + 2], (5, 3, 3, 2)),)) for i in (0, 1))
    labels, h = jnp.arange(5) % 4, Hypers(temperature=2.0, distil_weight=0.7, beta=10.0, label_smoothing=0.1)
    plain = cross_entropy(student[0], labels, h)
    p, q = (np.asarray(jax.nn.softmax(x[0] / 2.0), np.float64) for x in (teacher, student))
    kd = 0.3 * plain + 0.7 * 4.0 * (p * np.log(p / q)).sum(-1)
    at = 3 * 0.25 * 10.0 * attention_distance(teacher[1], student[1])
    for kind, wanted in (("kd", kd), ("at", plain + at), ("kd+at", kd + at)):
        found = distil_loss(kind, 0.25)(student, (labels, taught(teacher, kind)), h)
        np.testing.assert_allclose(found, wanted, rtol=1e-4)


def stored(path, **options):
    """A run that nobody trained."""
    learner = classifier(**options)
    runner.save(learner, jax.vmap(lambda key: learner.init(key, learner.hypers))(KEY[None]), [0], str(path))
    return str(path)


def test_students_follow_their_teacher_and_give_logits(tmp_path, capsys):
    small = ["--features", "16", "--dropout", "0", "--shift", "0", "--lr", "0.05", "--batch-size", "64"]
    large = str(tmp_path / "teacher")
    assert cli.main(["train", "classifier", *small, "--features", "64", "--num-updates", "60", "--run-dir", large]) == 0
    run = str(tmp_path / "run")
    options = ["--teacher", large, "--distil-weight", "1", "--temperature", "2", "--augment", "mixup", "--num-updates"]
    assert cli.main(["train", "classifier", *small, *options, "80", "--seeds", "0", "1", "--run-dir", run]) == 0
    capsys.readouterr()
    assert cli.main(["evaluate", run]) == 0
    found = dict(re.findall(r"eval/(\w+): ([\d.]+)", capsys.readouterr().out))
    assert float(found["agreement"]) > 0.8  # labels have no weight
    assert float(found["auc"]) > 0.9
    assert cli.main(["export", run, str(tmp_path / "w.npz"), "--format", "weights"]) == 0
    for given, message in (
        (["--teacher", str(tmp_path / "no")], f"{tmp_path}/no"),
        (["--teacher", large, "--size", "16"], "found 10 classes for images [8, 8, 1], expected 10 classes for images"),
        (["--teacher", large, "--distil", "at"], "distil='at': found the network mlp, expected one of lenet"),
        (["--distil", "at"], "distil='at': expected none without --teacher RUN"),
        (["--teacher", large, "--temperature", "0"], "hypers.temperature=0.0: expected a number > 0"),
    ):
        capsys.readouterr()
        assert cli.main(["train", "classifier", "--run-dir", str(tmp_path / "none"), *given]) == 2
        printed = capsys.readouterr().err
        assert message in printed
        assert printed.count("\n") == 1


def test_stages_are_compared_and_must_fit(tmp_path):
    teacher = stored(tmp_path / "teacher", model="resnet-8", mid_features=(4,) * 6, shift=0)
    student = classifier(model="resnet-14", mid_features=(4,) * 9, shift=0, teacher=teacher, distil="kd+at", ema=True)
    state = jax.jit(student.init)(KEY, student.hypers)
    known = classifier(model="resnet-8", mid_features=(4,) * 6, shift=0)
    jax.tree.map(np.testing.assert_array_equal, state.teacher["params"], known.init(KEY, known.hypers).params)
    x, y = (v[:8] for v in arrays(student.config, "train"))
    after, metrics = jax.eval_shape(student.step, state, (x, y))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert {"train/accuracy", "train/agreement"} < set(metrics)
    assert jax.eval_shape(student.predict, state, x).shape == (8, 10)
    with pytest.raises(UserError, match=r"teacher=.*: attention: found stages of .* expected the teacher's"):
        classifier(model="resnet-18", shift=0, teacher=teacher, distil="at")
