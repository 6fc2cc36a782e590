"""Losses in closed form, the generator, what a round changes and what it must not, transition curves, the toy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxstack.core import runner
from jaxstack.core.errors import UserError
from jaxstack.data.sources import ArrayData, SplitData
from jaxstack.nn import attention_transfer as transfer
from jaxstack.nn.conv import Conv
from jaxstack.vision import few_shot_kt, zero_shot_toy
from jaxstack.vision import zero_shot_kt as kt

KEY = jax.random.key(0)
IMAGE = (6, 5, 2)
IMAGES = np.random.default_rng(0).normal(size=(12, *IMAGE)).astype(np.float32)


class TwoStages(nn.Module):
    """Two convolutions with BatchNorm, the second with stride 2."""

    width: int
    classes: int = 4

    @nn.compact
    def __call__(self, x, train=False, *, taps=False):
        found = []
        for stride in (1, 2):
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(Conv(self.width, stride=stride, padding=1)(x))
            x = nn.relu(x)
            found.append(x)
        logits = nn.Dense(self.classes)(x.mean((1, 2)))
        return (logits, tuple(found)) if taps else logits


TEACHER, STUDENT = (kt.of_module(TwoStages(width), IMAGE) for width in (4, 3))
GENERATOR = kt.ZeroShotGenerator(IMAGE, (4, 4, 4))
SETUP = kt.Setup(TEACHER, STUDENT, IMAGE, GENERATOR, batch_size=8, z_dim=5, student_steps=3)


def logits(seed, count=6, classes=4, scale=3.0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, classes)) * scale, jnp.float32)


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), a, b))


def test_divergence_is_the_closed_form_on_either_scale():
    t, s = logits(0), logits(1)
    p, q = (
        np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (np.asarray(t, np.float64), np.asarray(s, np.float64))
    )
    each = (p * np.log(p / q)).sum(-1)
    assert kt.belief_divergence(t, s, reduction="none") == pytest.approx(each, rel=1e-5)
    mean, element = (kt.belief_divergence(t, s, reduction=r) for r in ("batch_mean", "element_mean"))
    assert mean == pytest.approx(each.mean(), rel=1e-5)
    assert element * 4 == pytest.approx(float(mean), rel=1e-6)
    a = 1.7
    belief = 1 / (1 + np.exp(-a))
    entropy = -(belief * np.log(belief) + (1 - belief) * np.log(1 - belief))
    found = kt.belief_divergence(jnp.array([[a, 0.0]]), jnp.zeros((1, 2)), reduction="batch_mean")
    assert found == pytest.approx(np.log(2) - entropy, rel=1e-5)
    assert kt.belief_divergence(2 * t, 2 * s, tau=2.0) == pytest.approx(float(kt.belief_divergence(t, s)), rel=1e-6)
    with pytest.raises(UserError, match="reduction='sum': expected 'element_mean'"):
        kt.belief_divergence(t, s, reduction="sum")


def test_gradients_vanish_where_both_agree_and_stay_finite_where_the_teacher_saturates():
    both = jax.grad(kt.belief_divergence, (0, 1))
    t = logits(0)
    assert kt.belief_divergence(t, t) == pytest.approx(0.0, abs=1e-7)
    for gradient in both(t, t):
        assert np.abs(gradient).max() < 1e-7
    by_teacher, by_student = both(jnp.array([[0.0, 200.0, 0.0]]), jnp.zeros((1, 3)))
    assert (np.asarray(by_teacher) == 0).all()
    assert np.isfinite(by_student).all()
    # the form that is not used: its gradient is NaN there, and a generator would stand still
    naive = lambda t, s: optax.losses.kl_divergence(jax.nn.log_softmax(s), jax.nn.softmax(t)).mean()
    assert np.isnan(jax.grad(naive)(jnp.array([[0.0, 200.0, 0.0]]), jnp.zeros((1, 3)))).any()


def test_attention_sees_where_and_neither_scale_nor_order_of_channels():
    rng = np.random.default_rng(0)
    a = jnp.asarray(rng.normal(size=(3, 4, 5, 6)), jnp.float32)
    assert np.square(transfer.attention_map(a)).sum(-1) == pytest.approx(1.0, rel=1e-5)
    assert transfer.attention_map(a).shape == (3, 20)
    for other in (2.5 * a, a[..., ::-1], -a, jnp.concatenate([a, a], -1)):
        assert transfer.attention_transfer_loss([a], [other]) == pytest.approx(0.0, abs=1e-12)
    b = jnp.asarray(rng.normal(size=(3, 4, 5, 2)), jnp.float32)
    one = lambda x: (x**2).mean(-1).reshape(3, -1) / np.linalg.norm((x**2).mean(-1).reshape(3, -1), axis=-1)[:, None]
    expected = np.square(one(np.asarray(a)) - one(np.asarray(b))).mean()
    assert transfer.attention_transfer_loss([a], [b]) == pytest.approx(expected, rel=1e-5)
    assert transfer.attention_transfer_loss([a, b], [b, a]) == pytest.approx(2 * expected, rel=1e-5)
    assert transfer.attention_transfer_loss([], []) == 0.0
    zeros = jax.grad(lambda x: transfer.attention_transfer_loss([a], [x]))(jnp.zeros_like(a))
    assert np.isfinite(zeros).all()
    with pytest.raises(
        UserError, match=r"attention: found stages of \[\(4, 5\)\].*expected the teacher's \[\(2, 5\)\]"
    ):
        transfer.attention_transfer_loss([a[:, :2]], [a])


def test_the_generator_has_the_papers_size_and_the_statistics_of_normalised_pixels():
    counted = lambda g: sum(x.size for x in jax.tree.leaves(jax.eval_shape(g.init, KEY, jnp.zeros((2, 100)))["params"]))
    assert counted(kt.ZeroShotGenerator()) == 1_051_145
    generator = kt.ZeroShotGenerator((14, 14, 1), (8, 8, 8))
    x, _ = jax.jit(lambda z: generator.init_with_output(KEY, z))(jax.random.normal(KEY, (64, 10)))
    assert x.shape == (64, 14, 14, 1)
    assert np.mean(x) == pytest.approx(0.0, abs=1e-4)
    assert np.std(x) == pytest.approx(1.0, abs=1e-3)
    rows = jnp.arange(4.0).reshape(1, 4, 1, 1)
    assert kt.nearest(rows, (8, 1)).ravel().tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert kt.nearest(rows, (7, 1)).ravel().tolist() == [0, 0, 1, 1, 2, 2, 3]


def test_a_round_moves_the_generator_up_and_the_student_down_and_leaves_the_teacher():
    teacher = TEACHER.init(jax.random.key(1))
    s = kt.begin(KEY, kt.Hypers(generator_lr=0.05), teacher, SETUP, 10)
    z = jax.random.normal(KEY, (8, 5))
    first, found = jax.jit(lambda s: kt.adversarial_step(s, z, SETUP))(s)
    assert same(first.params, s.params)
    assert same(first.teacher, teacher)
    assert not same(first.generator["params"], s.generator["params"])
    assert not same(first.stats, s.stats)  # the student's BatchNorm saw the images

    def losses(s):
        x, _ = kt.generated(GENERATOR, s.generator["params"], s.generator, z)
        taught, outputs = TEACHER.apply(teacher, x, False)[0], STUDENT.apply(kt.student_variables(s), x, True)[0]
        whole = kt.student_loss(taught, outputs, 1.0, 0.0)
        return kt.generator_loss(taught[0], outputs[0]), whole, kt.student_loss(taught, outputs, 1.0, 250.0)

    before, whole, with_attention = jax.jit(losses)(s)
    assert before == -whole
    assert found["loss/generator"] == pytest.approx(float(before), rel=1e-5)
    assert with_attention > whole
    assert jax.jit(losses)(first)[0] < before
    x, _ = kt.generated(GENERATOR, first.generator["params"], first.generator, z)
    second, found = jax.jit(lambda s: kt.student_phase(s, x, SETUP))(first)
    assert same(second.generator, first.generator)
    assert same(second.teacher, teacher)
    assert not same(second.params, first.params)
    assert np.isfinite(found["loss/student"])


def test_learners_of_images_and_of_noise_learn_to_agree():
    """Both run through the runner with seeds; schedules end with the run."""
    teachers = jax.vmap(TEACHER.init)(jax.random.split(KEY, 2))
    labels = np.zeros(len(IMAGES), np.int32)
    test = lambda config: SplitData((IMAGES, labels), 8)
    options = runner.RunOptions(progress=False, eval_every=-1)
    for setup in (SETUP, SETUP._replace(generator=None)):
        learner = kt.zero_shot(setup, teachers, 12, kt.Hypers(lr=0.02), test)
        result = runner.train(learner, seeds=2, options=options)
        of = lambda step, table=result.metrics: table[table.step == step]
        assert (of(12)["loss/student"].to_numpy() < of(1)["loss/student"].to_numpy()).all()
        assert of(1)["train/student_lr"].iloc[0] == pytest.approx(0.02)
        assert of(12)["train/student_lr"].iloc[0] == pytest.approx(0.02 * 0.5 * (1 + np.cos(np.pi * 11 / 12)), rel=1e-4)
        assert same(result.state.teacher, teachers)
        found = runner.evaluate(learner, result.state)
        taught = np.asarray(jax.vmap(lambda one: TEACHER.apply(one, IMAGES, False)[0][0])(teachers))
        assert found["eval/teacher_accuracy"] == pytest.approx((taught.argmax(-1) == 0).mean(1), abs=1e-6)
        learned = np.asarray(jax.vmap(learner.predict, in_axes=(0, None))(result.state, IMAGES))
        agreement = (learned.argmax(-1) == taught.argmax(-1)).mean(1)
        assert found["eval/agreement"] == pytest.approx(agreement, abs=1e-6)


def test_wrong_settings_are_named():
    with pytest.raises(UserError, match="student_steps=0: expected at least 1"):
        kt.zero_shot(SETUP._replace(student_steps=0), {}, 1)
    with pytest.raises(UserError, match="num_rounds=0"):
        kt.zero_shot(SETUP, {}, 0)
    more = kt.of_module(TwoStages(3, classes=5), IMAGE)
    with pytest.raises(UserError, match="student: found 5 classes, expected the teacher's 4"):
        kt.zero_shot(SETUP._replace(student=more), {}, 1)


def linear(weight):
    return lambda x: x.reshape(len(x), -1) @ weight


def test_transition_error_is_that_of_walks_between_classes():
    rng = np.random.default_rng(0)
    a, b = (linear(jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)) for _ in range(2))
    x = jnp.asarray(rng.normal(size=(5, 3, 2)), jnp.float32)
    own = a(x).argmax(-1)
    targets = kt.other_classes(own, 4)
    assert sorted([*targets[0].tolist(), int(own[0])]) == [0, 1, 2, 3]
    curves = jax.jit(lambda x, t, a, b: kt.transition_curves(a, b, x, t, 20, 0.5), static_argnums=(2, 3))
    p_a, p_b = curves(x, targets, a, b)
    assert p_a.shape == p_b.shape == (5, 3, 20)
    start = jnp.take_along_axis(jax.nn.softmax(a(x)), targets, 1)
    assert p_a[:, :, 0] == pytest.approx(np.asarray(start), abs=1e-6)
    assert (np.diff(p_a, axis=-1) > 0).all()  # a linear network: every step helps
    assert kt.mean_transition_error(*curves(x, targets, a, a)) == 0.0
    error = float(kt.mean_transition_error(p_a, p_b))
    assert 0.0 < error < 1.0
    # classes of another order: the same walks
    order = jnp.array([2, 0, 3, 1])
    place = jnp.argsort(order)
    c, d = (lambda x, f=f: f(x)[:, order] for f in (a, b))
    again = kt.mean_transition_error(*curves(x, kt.other_classes(place[own], 4), c, d))
    assert again == pytest.approx(error, abs=1e-5)
    same_class = kt.matching(a(x), b(x), 1)
    assert a(x)[same_class].argmax() == b(x)[same_class].argmax()
    with pytest.raises(UserError, match=r"images: found \d on which both networks agree, expected 6"):
        kt.matching(a(x), b(x), 6)


def test_losses_with_labels_are_those_of_the_baselines():
    h = few_shot_kt.FewShotHypers()
    (x, t), labels = (logits(0), logits(1)), np.arange(6) % 4
    taps = [jnp.asarray(np.random.default_rng(n).normal(size=(6, 3, 3, 2)), jnp.float32) for n in range(2)]
    softmax = lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    p, q = softmax(np.asarray(t) / 4), softmax(np.asarray(x) / 4)
    entropy = -np.log(softmax(np.asarray(x))[np.arange(6), labels])
    expected = 0.1 * entropy + 2 * 0.9 * 16 * (p * np.log(p / q)).mean(-1)
    expected += 3000 * np.asarray(transfer.attention_distance(taps[:1], taps[1:]))
    found = few_shot_kt.kd_at((x, tuple(taps[:1])), (labels, (t, tuple(taps[1:]))), h)
    assert found == pytest.approx(expected, rel=1e-4)
    assert few_shot_kt.labels_alone((x, ()), (labels, ()), h) == pytest.approx(entropy, rel=1e-5)
    guess, variance = taps[0], jnp.array([0.5, 2.0])
    nll = 0.5 * (np.square(np.asarray(guess - taps[1])) / np.asarray(variance) + np.log(np.asarray(variance)))
    found = few_shot_kt.vid((x, (), [(guess, variance)]), (labels, (t, (taps[1],))), h)
    assert found == pytest.approx(entropy + nll.reshape(6, -1).mean(-1), rel=1e-4)
    rows = few_shot_kt.few_images(labels, 1, 0)
    assert sorted(labels[rows]) == [0, 1, 2, 3]
    with pytest.raises(UserError, match="images per class: found 3, expected 1 to 1, those of class 2"):
        few_shot_kt.few_images(np.array([0, 0, 0, 2]), 3, 0)


@pytest.mark.parametrize("loss", ["vid", "kd+at"])
def test_a_few_images_teach_a_student_from_scratch_and_one_that_was_taught_without(loss):
    teachers = jax.vmap(TEACHER.init)(jax.random.split(KEY, 2))
    data = (IMAGES, np.arange(12, dtype=np.int32) % 4)
    start = jax.vmap(STUDENT.init)(jax.random.split(jax.random.key(1), 2)) if loss == "kd+at" else None
    learner = few_shot_kt.few_shot(
        TEACHER,
        STUDENT,
        IMAGE,
        teachers,
        loss,
        num_updates=20,
        batch_size=12,
        start=start,
        source=lambda config: ArrayData(data, 12),
        eval_source=lambda config: SplitData(data, 8),
    )
    if start is not None:
        begun = learner.init(KEY, learner.hypers, jax.tree.map(lambda x: x[1], learner.given))
        assert same(begun.params, jax.tree.map(lambda x: x[1], start["params"]))
    result = runner.train(learner, seeds=2, options=runner.RunOptions(progress=False))
    first, last = (result.metrics[result.metrics.step == n]["loss/train"].to_numpy() for n in (1, 20))
    assert (last < 0.9 * first).all()
    if start is None:
        raw = result.state.params["regressors"]["variance_0"]
        assert raw.shape == (2, 4)
        assert not (np.asarray(raw) == np.log(np.expm1(5.0)).astype(np.float32)).all()
        with pytest.raises(UserError, match="start: found variables of a student, loss='vid' expected none"):
            few_shot_kt.few_shot(TEACHER, STUDENT, IMAGE, teachers, "vid", num_updates=1, batch_size=1, start={})


def test_the_toy_has_its_blobs_and_points_that_search_beat_points_that_stay():
    (x, y), (test, _) = zero_shot_toy.blobs(0, 100)
    assert (len(x), len(test)) == (420, 180)
    hole = x[y == 0] - np.where(x[y == 0][:, 1:] > 0, 1.0, -1.0) * np.array([[0.0, 1.0]])
    assert np.square(hole).sum(1).min() > 0.3**2 - 1e-3
    teacher = jax.jit(lambda key, x, y: zero_shot_toy.train_teacher(key, x, y, 10))(KEY, *zero_shot_toy.blobs(0)[0])
    ours = lambda **how: jax.jit(
        lambda: zero_shot_toy.match(KEY, teacher, test, zero_shot_toy.Matching(epochs=30, start=0.0, **how), 15)
    )()
    searching, points = ours(points="adversarial")
    staying, _ = ours(points="frozen")
    assert searching.shape == (2,)
    assert np.abs(points).max() <= 3.0
    assert searching[-1] > staying[-1]
