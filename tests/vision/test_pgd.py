"""Prediction-guided distillation: weights and losses against closed forms and a reference in NumPy, invariances."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack.core import program, runner
from jaxstack.core.errors import UserError
from jaxstack.nn import classifier
from jaxstack.nn import detector as detectors
from jaxstack.vision import pgd
from jaxstack.vision import pgd_training as training

KEY = jax.random.key(0)
STRIDES, IMAGE = (4, 8), 32


def grid(scale=1.0):
    """Centres of the locations of two levels, [80, 2]."""
    found = []
    for stride in STRIDES:
        at = (np.arange(IMAGE // stride) + 0.5) * stride * scale
        found.append(np.stack(np.meshgrid(at, at), -1).reshape(-1, 2))
    return np.concatenate(found).astype(np.float32)


def scene(seed=0, images=3):
    """What a teacher predicts around two or three objects of each of three images; the last image has none."""
    rng = np.random.default_rng(seed)
    xy = grid()
    low = rng.uniform(0, 18, (images, 3, 2))
    gt = np.concatenate([low, low + rng.uniform(8, 14, (images, 3, 2))], -1).astype(np.float32)
    valid = np.array([[1, 1, 1], [1, 0, 1], [0, 0, 0]][:images], np.float32)
    labels = rng.integers(0, 4, (images, 3)).astype(np.int32)
    own = gt[np.arange(images)[:, None], rng.integers(0, 3, (images, len(xy)))]
    boxes = (own + rng.normal(0, 2.0, own.shape)).astype(np.float32)
    logits = rng.normal(-1, 2.0, (images, len(xy), 4)).astype(np.float32)
    return logits, boxes, gt, labels, valid, xy


def features(seed, images=3, channels=5):
    levels = [IMAGE // s for s in STRIDES]
    make = lambda key: [
        jax.nn.relu(jax.random.normal(jax.random.fold_in(key, n), (images, n, n, channels))) for n in levels
    ]
    return pgd.Features(make(jax.random.key(seed)), make(jax.random.key(seed + 100)))


# An independent reference: loops over objects and pixels


def np_maps(logits, boxes, gt, labels, valid, xy, topk, xi, ridge, released=False):
    """(weights, background) of one image."""
    w, background = np.zeros(len(xy)), np.ones(len(xy))
    at = xy[:, ::-1] if released else xy
    for j in range(len(gt)):
        if not valid[j]:
            continue
        x1, y1, x2, y2 = gt[j]
        inside = [x1 < x < x2 and y1 < y < y2 for x, y in at]
        q = np.zeros(len(xy))
        for i, (a, b, c, d) in enumerate(boxes[i] for i in range(len(xy))):
            wide, high = min(c, x2) - max(a, x1), min(d, y2) - max(b, y1)
            common = max(wide, 0) * max(high, 0)
            iou = common / (max(c - a, 0) * max(d - b, 0) + (x2 - x1) * (y2 - y1) - common)
            q[i] = (1 / (1 + np.exp(-logits[i, labels[j]]))) ** (1 - xi) * iou**xi
        ranked = q if released else q * inside
        best = [i for i in np.argsort(-ranked, kind="stable")[:topk] if released or ranked[i] > 0]
        sigma = np.cov(xy[best].T.astype(np.float64), bias=True).reshape(2, 2) + ridge * np.eye(2)
        for i in best:
            d = xy[i] - xy[best].mean(0)
            w[i] = max(w[i], inside[i] * np.exp(-0.5 * d @ np.linalg.inv(sigma) @ d))
        background[inside] = 0
    return w, background


def np_loss(fs, ft, w_cls, w_reg, background, c, crossed=False):
    """The whole loss by loops over levels, images and pixels."""
    total, start = 0.0, 0
    softmax = lambda z: np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    spatial = lambda f: f[..., 0].size * softmax(np.abs(f).mean(-1).reshape(-1) / c.tau).reshape(f.shape[:2])
    attention = lambda f: f.shape[-1] * np.apply_along_axis(softmax, -1, np.abs(f) / c.tau)
    for level, (s, t) in enumerate(zip(fs.cls, ft.cls)):
        s, t = np.asarray(s, np.float64), np.asarray(t, np.float64)
        n, h, w, _ = s.shape
        cut = slice(start, start + h * w)
        alpha = c.alpha * (1 + 0.25 * level)
        for i in range(n):
            error = spatial(t[i]) * (attention(t[i]) * (s[i] - t[i]) ** 2).sum(-1)
            for m in range(n) if crossed else (i,):
                for weight, map_ in ((alpha, w_cls), (c.beta * alpha, background)):
                    mask = map_[m, cut].reshape(h, w)
                    total += weight * (mask / max((mask > 0).sum(), 1) * error).sum() / n
            total += c.delta * np.abs(attention(s[i]) - attention(t[i])).sum() / (n * h * w)
            total += c.delta * np.abs(spatial(s[i]) - spatial(t[i])).sum() / n
        s, t = np.asarray(fs.reg[level], np.float64), np.asarray(ft.reg[level], np.float64)
        picked = [(i, p) for i in range(n) for p in range(h * w) if w_reg[i, start + p] > 0]
        for i, p in picked:
            a, b = s[i].reshape(h * w, -1)[p], t[i].reshape(h * w, -1)[p]
            error = w_reg[i, start + p] * (attention(b) * (a - b) ** 2).mean()
            apart = np.abs(attention(a) - attention(b)).sum()
            total += (c.gamma * c.alpha * error + c.delta * apart) / len(picked)
        start += h * w
    return total


@functools.partial(jax.jit, static_argnames=("topk", "region", "reference_compat"))
def maps_of(parts, settings=pgd.Settings(), topk=6, region="pgw", reference_compat=False):
    return pgd.weight_maps(*parts, settings, topk=topk, region=region, reference_compat=reference_compat)


maps_by_place = jax.jit(lambda parts, place: pgd.weight_maps(*parts, topk=6, region=place))
loss_of = jax.jit(jax.value_and_grad(pgd.pgd_loss, (0, 1), has_aux=True), static_argnames="cross_image_masks")
"""(((loss, terms), gradients by both networks' features))."""


@pytest.mark.parametrize("released", [False, True])
def test_maps_and_loss_are_those_of_a_reference(released):
    parts, settings = scene(), pgd.Settings(alpha=0.3, beta=0.4, delta=0.02)
    found = maps_of(parts, settings, reference_compat=released)
    each = [
        [np_maps(*(p[i] for p in parts[:-1]), parts[-1], 6, xi, settings.ridge, released) for i in range(3)]
        for xi in (settings.xi_cls, settings.xi_reg)
    ]
    cls, background = (np.stack([image[k] for image in each[0]]) for k in (0, 1))
    reg = np.stack([image[0] for image in each[1]])
    np.testing.assert_allclose(found.cls, cls, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.reg, reg, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(found.background, background)
    assert (cls > 0).any()
    assert (np.abs(cls - reg) > 1e-3).any()  # xi is another
    fs, ft = features(1), features(2)
    (loss, terms), (by_s, by_t) = loss_of(fs, ft, found, settings, cross_image_masks=released)
    np.testing.assert_allclose(loss, np_loss(fs, ft, cls, reg, background, settings, released), rtol=1e-4)
    assert set(terms) == {"cls/fg", "cls/bg", "cls/attention", "reg/fg", "reg/attention"}
    assert not any(jnp.abs(g).max() for g in jax.tree.leaves(by_t))  # the teacher is a constant
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(by_s))


def test_corners_of_a_square_have_the_value_of_their_distance():
    """mu = m, Sigma = a^2 I, so the squared Mahalanobis distance is 2."""
    corners = jnp.array([[[3.0, 3.0], [3.0, 9.0], [9.0, 3.0], [9.0, 9.0]]])
    values = pgd.gaussian_values(corners, jnp.ones((1, 4), bool), 0.0)
    np.testing.assert_allclose(values, np.exp(-1.0), rtol=1e-6)
    # a line has no area: the ridge decides, also for large coordinates, where a determinant would be rounding
    for scale in (1.0, 1000.0):
        line = scale * jnp.array([[[0.0, 0.0], [1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]])
        got = pgd.gaussian_values(line, jnp.ones((1, 4), bool), 1e-3)
        d = np.array([-1.5, -0.5, 0.5, 1.5])
        np.testing.assert_allclose(got[0], np.exp(-0.5 * d**2 / 1.25), rtol=2e-3)
    one = pgd.gaussian_values(corners, jnp.array([[True, False, False, False]]))
    np.testing.assert_array_equal(one, [[1.0, 0.0, 0.0, 0.0]])


def test_weights_of_one_location_and_of_objects_in_any_order():
    logits, boxes, gt, labels, valid, xy = scene()
    found = maps_of((logits, boxes, gt, labels, valid, xy), topk=1)
    for i in range(3):
        inside = pgd.inside_boxes(xy, gt[i], valid[i])
        q = pgd.quality(logits[i], boxes[i], gt[i], labels[i], valid[i], 0.8, xy)
        best = {int(q[:, j].argmax()) for j in range(3) if q[:, j].max() > 0}
        np.testing.assert_array_equal(found.cls[i], [float(a in best) for a in range(80)])
        assert not q[~inside].any()
    turn = [2, 0, 1]
    whole = maps_of((logits, boxes, gt, labels, valid, xy))
    turned = maps_of((logits, boxes, gt[:, turn], labels[:, turn], valid[:, turn], xy))
    jax.tree.map(np.testing.assert_array_equal, whole, turned)
    every = jnp.stack([pgd.inside_boxes(xy, g, v).any(1) for g, v in zip(gt, valid)])
    assert not whole.cls[~every].any()
    assert ((whole.cls >= 0) & (whole.cls <= 1)).all()
    # of objects that share locations the larger weight counts
    alone = [maps_of((logits, boxes, gt, labels, valid * np.eye(3, dtype=np.float32)[j], xy)).cls for j in range(3)]
    np.testing.assert_allclose(whole.cls, np.max(alone, 0), rtol=1e-6)
    # an image without objects: nothing but background
    assert not whole.cls[2].any()
    assert not whole.reg[2].any()
    assert (whole.background[2] == 1).all()


def test_quality_is_the_probability_or_the_iou_at_its_ends():
    logits, boxes, gt, labels, valid, xy = (x[0] if x.ndim > 2 or len(x) == 3 else x for x in scene())
    inside = pgd.inside_boxes(xy, gt, valid)
    at = lambda logits, xi: pgd.quality(logits, boxes, gt, labels, valid, xi, xy)
    p = jax.nn.sigmoid(logits)[:, labels]
    np.testing.assert_allclose(at(logits, 0.0), jnp.where(inside, p, 0), rtol=1e-6)
    iou = at(logits, 1.0)
    np.testing.assert_allclose(at(jnp.full_like(logits, jnp.inf), 0.3), iou**0.3 * inside, rtol=1e-5)
    np.testing.assert_allclose(at(logits, 0.8), inside * p**0.2 * iou**0.8, rtol=1e-5)


def test_ways_to_weigh_have_what_tells_them_apart():
    parts = scene()
    gt, valid, xy = parts[2], parts[4], parts[5]
    found = {region: np.asarray(maps_of(parts, region=region).cls) for region in pgd.REGIONS}
    every = np.stack([pgd.inside_boxes(xy, g, v).any(1) for g, v in zip(gt, valid)])
    np.testing.assert_array_equal(found["box"], every)
    np.testing.assert_array_equal(found["topk"], found["pgw"] > 0)
    np.testing.assert_array_equal(found["topk"], found["kde"] > 0)
    q = np.stack([pgd.quality(*(p[i] for p in parts[:5]), 0.8, xy).max(1) for i in range(3)])
    np.testing.assert_allclose(found["quality"], q, rtol=1e-6)
    x1, y1, x2, y2 = gt[1, 2]  # at a quarter of the side from the centre the value is that of one deviation
    spot = np.array([[(x1 + 3 * x2) / 4, (y1 + y2) / 2]], np.float32)
    one = pgd.box_gaussian_weights(pgd.inside_boxes(spot, gt[1, 2:], valid[1, 2:]), spot, gt[1, 2:])
    np.testing.assert_allclose(one, np.exp(-0.5), rtol=1e-5)
    # points of a symmetric cross: the middle is densest, the arms are equal
    cross = jnp.array([[[0.0, 0.0], [4.0, 0.0], [-4.0, 0.0], [0.0, 4.0], [0.0, -4.0], [77.0, 0.0]]])
    values = pgd.density_values(cross, jnp.array([[True] * 5 + [False]]))
    h2 = 5 ** (-1 / 3) * 64 / 10 + 1e-3
    middle = 1 + 4 * np.exp(-8 / h2)
    arm = 1 + np.exp(-8 / h2) + 2 * np.exp(-16 / h2) + np.exp(-32 / h2)
    np.testing.assert_allclose(values[0], [1.0, *[arm / middle] * 4, 0.0], rtol=1e-5)
    for place, region in enumerate(pgd.REGIONS):  # one program for all
        by_place = maps_by_place(parts, jnp.int32(place))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), by_place, maps_of(parts, region=region))
    for topk in (0, 81):
        with pytest.raises(UserError, match=rf"topk={topk}: expected 1 to 80, the number of locations"):
            maps_of(parts, topk=topk)
    with pytest.raises(UserError, match="region='disc'"):
        maps_of(parts, region="disc")


def test_equal_features_cost_nothing_and_images_do_not_mix():
    maps, settings = maps_of(scene()), pgd.Settings(alpha=0.3)
    fs, ft = features(1), features(2)
    (loss, _), (grads, _) = loss_of(ft, ft, maps, settings)
    assert loss == 0
    assert not any(jnp.abs(g).max() for g in jax.tree.leaves(grads))
    pick = lambda tree, i: jax.tree.map(lambda x: x[i : i + 1], tree)
    cls = settings._replace(reg_weight=0.0)
    whole = lambda crossed: loss_of(fs, ft, maps, cls, cross_image_masks=crossed)[0][0]
    each = [loss_of(pick(fs, i), pick(ft, i), pick(maps, i), cls)[0][0] for i in range(3)]
    np.testing.assert_allclose(whole(False), np.mean(each), rtol=1e-5)
    assert whole(True) > 1.2 * np.mean(each)  # the released form adds other images' masks
    # a batch of one, and one without objects, are finite, and the latter has no regression term
    (_, terms), grads = loss_of(pick(fs, 2), pick(ft, 2), pick(maps, 2), settings)
    assert terms["reg/fg"] == terms["reg/attention"] == terms["cls/fg"] == 0
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))
    both = [loss_of(fs, ft, maps, settings._replace(**{k: 0.0}))[0][0] for k in ("cls_weight", "reg_weight")]
    np.testing.assert_allclose(sum(both), loss_of(fs, ft, maps, settings)[0][0], rtol=1e-5)
    wide = pgd.Features(features(2, channels=6).cls, ft.reg)
    with pytest.raises(UserError, match=r"cls features: found .*5.* expected the teacher's .*6"):
        loss_of(fs, wide, maps, settings)


def test_attentions_sum_to_their_size_and_flatten_with_temperature():
    f, t = (jax.random.normal(jax.random.key(i), (2, 3, 4, 5)) for i in (0, 1))
    np.testing.assert_allclose(pgd.spatial_attention(f, 0.8).sum((1, 2)), 12.0, rtol=1e-5)
    np.testing.assert_allclose(pgd.channel_attention(f, 0.8).sum(-1), 5.0, rtol=1e-5)
    w = (jax.random.uniform(KEY, (2, 3, 4)) > 0.5).astype(jnp.float32)
    loss, _ = pgd.cls_feature_loss(f, t, w, 1 - w, 1.0, 0.0, 0.0, 1e6)
    plain = (w * jnp.square(f - t).sum(-1)).sum((1, 2)) / w.sum((1, 2))
    np.testing.assert_allclose(loss, plain.mean(), rtol=1e-4)


def test_no_gradient_reaches_the_teacher_s_predictions():
    parts, fs, ft = scene(), features(1), features(2)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2))
    def grads(logits, boxes, ft):
        maps = pgd.weight_maps(logits, boxes, *parts[2:], topk=6)
        return pgd.pgd_loss(fs, ft, maps)[0]

    assert not any(jnp.abs(g).max() for g in jax.tree.leaves(grads(*parts[:2], ft)))


def test_twice_the_size_has_the_same_weights():
    logits, boxes, gt, labels, valid, xy = scene()
    small = maps_of((logits, boxes, gt, labels, valid, xy))
    large = maps_of((logits, 2 * boxes, 2 * gt, labels, valid, 2 * xy))
    np.testing.assert_allclose(small.cls, large.cls, atol=1e-3)
    np.testing.assert_array_equal(small.background, large.background)
    q = [pgd.quality(logits[0], s * boxes[0], s * gt[0], labels[0], valid[0], 0.6, s * xy) for s in (1, 2)]
    np.testing.assert_allclose(*q, rtol=1e-5)


def test_a_student_has_the_teacher_s_neck_and_head():
    tree = lambda width, classes: {
        "params": {
            "backbone": {"stem": {"kernel": jnp.full((3, 3, 3, width), width * 1.0)}},
            "neck": {
                "lateral0": {"kernel": jnp.full((1, 1, width, 4), width * 1.0), "bias": jnp.full(4, width * 1.0)},
                "out0": {"kernel": jnp.full((3, 3, 4, 4), width * 1.0)},
            },
            "head": {"class_out": {"kernel": jnp.full((3, 3, 4, classes), width * 1.0)}},
        },
        "batch_stats": {"mean": jnp.full(2, width * 1.0)},
    }
    found = pgd.init_student(tree(2, 5), tree(6, 5))
    value = lambda *path: float(functools.reduce(lambda tree, name: tree[name], path, found).ravel()[0])
    assert value("params", "neck", "out0", "kernel") == value("params", "head", "class_out", "kernel") == 6.0
    assert value("params", "backbone", "stem", "kernel") == value("batch_stats", "mean") == 2.0
    assert value("params", "neck", "lateral0", "kernel") == 2.0  # reads a narrower backbone
    with pytest.raises(UserError, match=r"head/class_out/kernel \(3, 3, 4, 5\) for \(3, 3, 4, 7\)"):
        pgd.init_student(tree(2, 5), tree(6, 7))


def test_the_best_locations_are_left_when_others_are_silenced():
    xy = jnp.stack([jnp.arange(12.0) + 0.5, jnp.full(12, 5.0)], 1)
    gt = jnp.array([[0.0, 0.0, 10.0, 10.0]])
    inside = pgd.inside_boxes(xy, gt, jnp.ones(1))
    q = jnp.where(inside[:, 0], (jnp.arange(12.0) * 7 % 10 + 1) / 10, 0.0)[:, None]
    for share, count in ((0.01, 1), (0.1, 1), (0.11, 2), (0.5, 5), (1.0, 10)):
        left = pgd.audible(q, inside, share)
        assert left[:10].sum() == count
        assert left[10:].all()
        assert q[:10, 0][left[:10]].min() > q[:10, 0][~left[:10]].max(initial=0.0)


SMALL = dict(size=32, width=2, channels=4, towers=1, train_images=8, eval_images=6, batch_size=4, num_updates=3)


def test_a_student_is_taught_by_a_stored_detector(tmp_path):
    """Its first living seed teaches every seed of the student, whose head starts from it; inference is unchanged."""
    run = str(tmp_path / "teacher")
    learner = detectors.detector(**SMALL | dict(width=3))
    states, _ = jax.jit(lambda: program.initial(learner, [3, 4], None))()
    runner.save(learner, states, [3, 4], run, {})
    pupil = training.pgd(teacher=run, best=3, **SMALL)
    state = jax.eval_shape(pupil.init, KEY, pupil.hypers)
    assert state.params["backbone"]["conv"]["kernel"].shape == (3, 3, 3, 2)
    assert state.teacher["params"]["backbone"]["conv"]["kernel"].shape == (3, 3, 3, 3)
    state = jax.jit(pupil.init)(KEY, pupil.hypers)
    first = jax.tree.map(lambda x: x[0], states.params)
    jax.tree.map(np.testing.assert_array_equal, state.teacher["params"], first)
    jax.tree.map(np.testing.assert_array_equal, state.params["head"], first["head"])
    alone = jax.eval_shape(detectors.detector(**SMALL).predict, state, jnp.zeros((1, 32, 32, 3), jnp.uint8))
    assert alone == jax.eval_shape(pupil.predict, state, jnp.zeros((1, 32, 32, 3), jnp.uint8))
    for changes, message in (
        (dict(channels=8), r"teacher: found channels=4, expected 8 as of the student"),
        (
            dict(backbone="resnet-18"),
            r"teacher: found strides \(4, 8, 16\) of small, expected \(8, 16, 32\) of resnet-18",
        ),
        (dict(best=85), r"best=85: expected 1 to 84, the number of locations"),
        (dict(region="disc"), r"region=.disc.: expected one of .pgw"),
        (dict(teacher=str(tmp_path / "none")), r"none"),
    ):
        with pytest.raises(UserError, match=message):
            training.pgd(**SMALL | dict(teacher=run, best=3) | changes)
    other = classifier.classifier(features=(2,))
    start, _ = program.initial(other, [0], None)
    runner.save(other, start, [0], tmp_path / "other", {})
    with pytest.raises(UserError, match=r"other: found a run of classifier, expected one of detector"):
        training.pgd(teacher=str(tmp_path / "other"), **SMALL)


def test_atss_is_distilled_too():
    """Shapes alone: of another head, the teacher that a config names, and what a step measures."""
    config = training.Config(**SMALL | dict(kind="atss", best=3, teacher_width=4))
    large = training.teacher_config(config)
    assert (large.width, large.kind, large.num_updates) == (4, "atss", 3000)
    weights = jax.eval_shape(detectors.model_of(large).init, KEY)
    learner = training.student(config, large, weights)
    state = jax.eval_shape(learner.init, KEY, learner.hypers, weights)
    image = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.uint8)
    truth = detectors.Truth(jnp.zeros((4, 2, 4)), jnp.zeros((4, 2), jnp.int32), jnp.zeros((4, 2), bool))
    after, found = jax.eval_shape(learner.step, state, (image, truth))
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert {"train/imitation_loss", "train/boxes_loss", "loss/train"} <= set(found)
