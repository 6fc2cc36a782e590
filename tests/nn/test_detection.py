"""Boxes, suppression, targets, losses, average precision and the networks of dense detectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack.core.errors import UserError
from jaxstack.nn.vision import boxes as B
from jaxstack.nn.vision import detection as D
from jaxstack.nn.vision import detection_loss as L
from jaxstack.nn.vision.average_precision import THRESHOLDS, average_precision, mean_average_precision

HW, STRIDES = (16, 24), (4, 8, 16)
RNG = np.random.default_rng(0)


def random_boxes(count, hw=(64, 64), rng=RNG):
    at = rng.uniform(0, 40, (count, 2))
    size = rng.uniform(4, 24, (count, 2))
    return np.concatenate([at, at + size], 1).astype(np.float32)


def slow_iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    area = lambda x: (x[2] - x[0]) * (x[3] - x[1])
    return common / (area(a) + area(b) - common)


def test_locations_and_overlaps():
    xy = np.asarray(B.locations(HW, STRIDES))
    assert B.level_counts(HW, STRIDES) == (24, 6, 2)
    assert xy.shape == (32, 2)
    np.testing.assert_array_equal(xy[[0, 1, 6, 24, 30, 31]], [[2, 2], [6, 2], [2, 6], [4, 4], [8, 8], [24, 8]])
    a, b = random_boxes(6), random_boxes(5)
    want = [[slow_iou(x, y) for y in b] for x in a]
    np.testing.assert_allclose(B.iou(a[:, None], b), want, atol=1e-6)
    one, far, twice = jnp.array([[0.0, 0, 2, 2], [4, 0, 6, 2], [0, 0, 4, 2]])
    assert B.iou(one, far) == 0
    assert B.giou(one, far) == pytest.approx(-1 / 3)
    assert B.giou(one, twice) == pytest.approx(0.5)
    assert B.iou(jnp.zeros(4), jnp.zeros(4)) == 0
    np.testing.assert_allclose(B.from_distances(xy[:4], B.to_distances(xy[:4], a[:4])), a[:4], rtol=1e-5, atol=1e-5)


def test_suppression_is_greedy_and_by_class():
    boxes, labels = random_boxes(60), RNG.integers(0, 2, 60)
    scores = RNG.uniform(size=60).astype(np.float32)
    left, kept = list(np.argsort(-scores)), []
    left.remove(7)
    while left:
        best = left.pop(0)
        kept.append(best)
        left = [i for i in left if labels[i] != labels[best] or slow_iou(boxes[i], boxes[best]) <= 0.4]
    found, valid = B.nms(boxes, scores, jnp.asarray(labels), jnp.arange(60) != 7, 0.4, 60)
    assert np.asarray(found)[np.asarray(valid)].tolist() == kept
    assert not valid[len(kept) :].any()
    few, valid = B.nms(boxes, scores, jnp.asarray(labels), jnp.ones(60, bool), 0.4, 3)
    assert valid.all()
    assert len(few) == 3
    assert not B.nms(boxes, scores, jnp.asarray(labels), jnp.zeros(60, bool))[1].any()


def test_outputs_become_detections():
    """Two objects at the levels' locations, one above the threshold in two classes; a copy is suppressed."""
    counts = B.level_counts(HW, STRIDES)
    logits, quality = np.full((32, 3), -9.0, np.float32), np.full(32, 9.0, np.float32)
    boxes = np.zeros((32, 4), np.float32)
    logits[0, 1], boxes[0] = 3.0, [0, 0, 8, 8]
    logits[1, 1], boxes[1] = 2.0, [0, 0, 8, 7.5]
    logits[25, [0, 2]], boxes[25], quality[25] = (4.0, 1.0), [10, 2, 40, 30], 0.0
    found = jax.jit(lambda *x: B.postprocess(*x, counts, HW, most=10))(logits, quality, boxes)
    assert found.valid.tolist() == [True] * 3 + [False] * 7
    assert found.labels[:3].tolist() == [1, 0, 2]
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    want = sigmoid(np.array([3.0, 4.0, 1.0])) * sigmoid(np.array([9.0, 0.0, 0.0]))
    np.testing.assert_allclose(found.scores[:3], want, rtol=1e-5)
    np.testing.assert_array_equal(found.boxes[:3], [[0, 0, 8, 8], [10, 2, 24, 16], [10, 2, 24, 16]])
    assert not found.scores[3:].any()


def slow_fcos(xy, strides, ranges, boxes, labels, valid, radius):
    out = np.full(len(xy), -1)
    for i, (x, y) in enumerate(xy):
        best = np.inf
        for box, label in zip(boxes[valid], labels[valid]):
            sides = x - box[0], y - box[1], box[2] - x, box[3] - y
            middle = max(abs(x - (box[0] + box[2]) / 2), abs(y - (box[1] + box[3]) / 2))
            size = (box[2] - box[0]) * (box[3] - box[1])
            fits = min(sides) > 0 and ranges[i][0] <= max(sides) <= ranges[i][1] and middle < radius * strides[i]
            if fits and size < best:
                best, out[i] = size, label
    return out


def test_fcos_targets():
    hw = (64, 64)
    xy, strides, ranges = B.locations(hw, STRIDES), B.location_strides(hw, STRIDES), L.fcos_ranges(hw, STRIDES, 2.0)
    assert np.unique(ranges, axis=0).tolist() == [[0, 8], [8, 16], [16, np.inf]]
    boxes, labels, valid = random_boxes(7), RNG.integers(0, 4, 7), np.arange(7) != 2
    found = L.fcos_targets(xy, strides, ranges, boxes, jnp.asarray(labels), jnp.asarray(valid))
    want = slow_fcos(*map(np.asarray, (xy, strides, ranges)), boxes, labels, valid, 1.5)
    np.testing.assert_array_equal(found.labels, want)
    assert 5 < (want >= 0).sum() < 100
    own = found.labels >= 0
    assert (found.centre[own] > 0).all()
    assert not found.centre[~own].any()
    # the middle of a box has 1; a quarter from the left sqrt(1/3)
    box = jnp.array([0.0, 0, 8, 8])
    np.testing.assert_allclose(L.centreness(jnp.array([[4.0, 4], [2, 4], [9, 4]]), box), [1, 3**-0.5, 0], rtol=1e-6)
    none = L.fcos_targets(xy, strides, ranges, boxes, jnp.asarray(labels), jnp.zeros(7, bool))
    assert (none.labels == -1).all()


def test_atss_targets():
    hw = (32, 32)
    anchors, counts = np.asarray(B.square_anchors(hw, STRIDES, 2.0)), B.level_counts(hw, STRIDES)
    boxes = np.array([[3, 4, 17, 18], [9, 8, 30, 29], [1, 1, 6, 5]], np.float32)
    labels, k = np.array([2, 0, 1]), 5
    overlap = np.array([[slow_iou(b, a) for a in anchors] for b in boxes])
    middle = (anchors[:, :2] + anchors[:, 2:]) / 2
    best, want = np.full(len(anchors), -1.0), np.full(len(anchors), -1)
    for j, box in enumerate(boxes[:2]):
        apart = np.hypot(*(middle - (box[:2] + box[2:]) / 2).T)
        near, start = [], 0
        for count in counts:
            near += list(start + np.argsort(apart[start : start + count], kind="stable")[:k])
            start += count
        least = overlap[j, near].mean() + overlap[j, near].std(ddof=1)
        for a in near:
            inside = (middle[a] > box[:2]).all() and (middle[a] < box[2:]).all()
            if overlap[j, a] >= least and inside and overlap[j, a] > best[a]:
                best[a], want[a] = overlap[j, a], labels[j]
    valid = jnp.array([True, True, False])
    found = jax.jit(lambda *x: L.atss_targets(anchors, counts, *x, topk=k))(boxes, labels, valid)
    np.testing.assert_array_equal(found.labels, want)
    assert set(want) == {-1, 0, 2}


@pytest.mark.parametrize("kind", ["fcos", "atss"])
def test_losses_are_zero_for_right_outputs_and_sums_over_the_batch(kind):
    hw = (32, 32)
    boxes = jnp.stack([random_boxes(2) * 0.5, random_boxes(2) * 0.5])
    labels, valid = jnp.array([[0, 2], [1, 1]]), jnp.array([[True, True], [False, False]])
    targets = D.targets_of(kind, hw, STRIDES, boxes, labels, valid)
    sure = jnp.where(jax.nn.one_hot(targets.labels, 3) > 0, 40.0, -40.0)
    quality = jax.scipy.special.logit(jnp.clip(targets.centre if kind == "fcos" else 1.0, 1e-6, 1 - 1e-6))
    quality = jnp.broadcast_to(quality, targets.centre.shape)
    parts = L.detector_losses(kind, sure, targets.boxes, quality, targets)
    assert float(parts.classes.sum() + parts.boxes.sum()) < 1e-5
    wrong = L.detector_losses(kind, -sure, targets.boxes + 3.0, quality, targets)
    assert float(wrong.classes[0]) > 10
    assert wrong.boxes[0] > 0.1
    # an image without objects has only a loss of classes; gradients are finite everywhere
    assert wrong.boxes[1] == wrong.quality[1] == 0
    total = lambda logits, own, q: sum(p.mean() for p in L.detector_losses(kind, logits, own, q, targets))
    grads = jax.grad(total, (0, 1, 2))(-sure, jnp.zeros_like(targets.boxes), quality)
    assert all(np.isfinite(g).all() for g in grads)
    # the batch's mean is the sum over its locations, over positive ones
    positive = (targets.labels >= 0).sum()
    focal = L.focal_loss(-sure, targets.labels).sum() / positive
    assert wrong.classes.mean() == pytest.approx(float(focal), rel=1e-5)


def padded(detections, most):
    out = [np.zeros((len(detections), most, 4), np.float32), *(np.zeros((len(detections), most)) for _ in range(3))]
    for i, (boxes, scores, labels) in enumerate(detections):
        order = np.argsort(-scores, kind="stable")
        for array, values in zip(out, (boxes, scores, labels, np.ones(len(scores)))):
            array[i, : len(scores)] = values[order]
    return B.Detections(out[0], out[1].astype(np.float32), out[2].astype(np.int32), out[3] > 0)


def both(detections, truths, classes=3):
    """The measure on lists, and its form inside a program, which must agree."""
    found = mean_average_precision(detections, truths, classes)
    boxes, _, labels, valid = padded([(b, np.ones(len(b)), c) for b, c in truths], 8)
    have = padded(detections, 20)
    area, there = jax.jit(lambda *x: average_precision(*x, classes))(have, boxes, labels, valid)
    mine = np.where(np.asarray(there)[:, None], area, np.nan)
    np.testing.assert_allclose(mine, found.classes, atol=1e-5)
    return found


def slow_precision(detections, truths, classes, threshold):
    """COCO's rules for one threshold, written out."""
    found = []
    for c in range(classes):
        rows, objects = [], 0
        for i, (boxes, labels) in enumerate(truths):
            real, taken = [tuple(b) for b, k in zip(boxes, labels) if k == c], set()
            objects += len(real)
            mine = [(s, tuple(b)) for b, s, k in zip(*detections[i]) if k == c]
            for s, b in sorted(mine, key=lambda r: -r[0]):
                options = [(slow_iou(b, g), j) for j, g in enumerate(real) if j not in taken]
                best = max(options, default=(0, -1))
                if options and best[0] >= threshold:
                    taken.add(best[1])
                rows.append((s, bool(options) and best[0] >= threshold))
        if not objects:
            continue
        rows.sort(key=lambda r: -r[0])
        points, right = [], 0
        for n, (_, hit) in enumerate(rows, 1):
            right += hit
            points.append((right / objects, right / n))
        area = [max((p for r, p in points if r >= i / 100 - 1e-9), default=0.0) for i in range(101)]
        found.append(np.mean(area))
    return np.mean(found)


def test_mean_average_precision_has_its_closed_forms_and_agrees_with_a_slow_one():
    one = lambda boxes, labels, score=0.9: (boxes, np.full(len(boxes), score), labels)
    truths = [(random_boxes(4), np.array([0, 1, 1, 0])) for _ in range(10)]
    right = [one(*t) for t in truths]
    assert both(right, truths).mean == pytest.approx(1.0)
    # doubled: the second of each comes after recall 1 if it scores less
    twice = [tuple(np.concatenate(x) for x in zip(one(*t), one(*t, score=0.3))) for t in truths]
    assert both(twice, truths).mean == pytest.approx(1.0)
    # IoU .62 with their objects: wider by 1 / .62
    wider = [one(b + (b[:, 2:3] - b[:, :1]) * [0, 0, 1 / 0.62 - 1, 0], k) for b, k in truths]
    apart = [(b + [[0, 200 * i, 0, 200 * i] for i in range(4)], k) for b, k in truths]
    wider = [one(b + (b[:, 2:3] - b[:, :1]) * np.array([0, 0, 1 / 0.62 - 1, 0]), k) for b, k in apart]
    found = both(wider, apart)
    assert found.mean == pytest.approx(0.3)
    assert found.ap50 == pytest.approx(1.0)
    # half of the objects, of each class
    half = [(d[0][:2], d[1][:2], d[2][:2]) for d in right]
    assert both(half, truths).mean == pytest.approx(51 / 101)
    # images without objects or detections, a class without objects, scores at random
    rng = np.random.default_rng(3)
    truths = [(random_boxes(n, rng=rng), rng.integers(0, 2, n)) for n in (3, 0, 5, 1, 2)]
    detections = [
        (b := np.concatenate([t + rng.normal(0, 1.5, t.shape), random_boxes(3, rng=rng)]), rng.uniform(size=len(b)), k)
        for (t, own), k in ((x, np.append(x[1], rng.integers(0, 3, 3))) for x in truths)
    ]
    detections[3] = (np.zeros((0, 4)), np.zeros(0), np.zeros(0, int))
    found = both(detections, truths)
    assert np.isnan(found.classes[2]).all()
    want = [slow_precision(detections, truths, 3, t) for t in THRESHOLDS]
    assert 0.05 < found.mean < 0.95
    np.testing.assert_allclose(np.nanmean(found.classes, 0), want, atol=1e-6)
    empty = both([(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int))], [(np.zeros((0, 4)), np.zeros(0, int))])
    assert np.isnan(empty.mean)
    with pytest.raises(UserError, match="detections: found 1 images, expected 2"):
        mean_average_precision(right[:1], truths[:2], 3)
    with pytest.raises(UserError, match="detections: found labels 0 to 1, expected 0 to 0"):
        mean_average_precision(right[:1], [(random_boxes(2), [0, 1])], 1)


def test_a_network_has_levels_features_and_one_head_for_all():
    network, strides = D.backbone("small", 2)
    shapes = {}
    for kind in ("fcos", "atss"):
        net = D.Detector(network, 3, (*strides, 32), kind, channels=8)
        x = jnp.asarray(RNG.normal(size=(2, 64, 32, 3)), jnp.float32)
        out, given = jax.jit(net.init_with_output)(jax.random.key(0), x)
        count = sum(B.level_counts((64, 32), net.strides))
        assert out.logits.shape == (2, count, 3)
        assert out.boxes.shape == (2, count, 4)
        assert [f.shape[1:] for f in out.box_features] == [(16, 8, 8), (8, 4, 8), (4, 2, 8), (2, 1, 8)]
        assert float(min(f.min() for f in out.class_features)) == 0.0
        # at first every class has 0.01, and boxes are near one stride, or the anchors
        np.testing.assert_allclose(jax.nn.sigmoid(out.logits), 0.01, atol=0.005)
        first = D.decode(kind, jnp.zeros((count, 4)), (64, 32), net.strides)
        np.testing.assert_allclose(out.boxes[0] - first, 0.0, atol=4.0)
        shapes[kind] = given
    np.testing.assert_allclose(first, B.square_anchors((64, 32), net.strides, 2.0))
    moved = D.decode("atss", jnp.full((count, 4), 1.0), (64, 32), net.strides)[0]
    np.testing.assert_allclose(moved, 2.8 + 4.0 * np.exp(0.2) * np.array([-1, -1, 1, 1]), rtol=1e-5)
    # a student inherits what fits: all but the neck's 1x1 convolutions, whose backbone is another
    wide = D.Detector(D.backbone("small", 4)[0], 3, net.strides, "atss", channels=8)
    teacher = jax.tree.map(lambda a: jnp.full(a.shape, 2.0), jax.eval_shape(wide.init, jax.random.key(1), x))
    mine = D.inherited(shapes["atss"], teacher)["params"]
    same = lambda a, b: all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))
    assert same(mine["head"], teacher["params"]["head"])
    assert same(mine["neck"]["out1"], teacher["params"]["neck"]["out1"])
    assert same(mine["neck"]["lateral1"], shapes["atss"]["params"]["neck"]["lateral1"])
    assert same(mine["backbone"], shapes["atss"]["params"]["backbone"])
    narrow = D.Detector(network, 3, net.strides, channels=4)
    with pytest.raises(UserError, match="found a head of other shapes"):
        D.inherited(jax.eval_shape(narrow.init, jax.random.key(0), x), teacher, ("head",))
    with pytest.raises(UserError, match="images of 30 x 64 pixels: expected multiples of 16"):
        jax.eval_shape(net.init, jax.random.key(0), x[:, :, :30])
    # networks of full size, by shape
    for name, channels in (("resnet-18", 512), ("resnet-50", 2048), ("mobilenet-v3-large", 960)):
        network, strides = D.backbone(name)
        net = D.Detector(network, 80, (*strides, 64, 128), channels=256, towers=4)
        given = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 64, 96, 3)))
        out = jax.eval_shape(net.apply, given, jnp.zeros((1, 64, 96, 3)))
        assert out.logits.shape == (1, 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2 + 1, 80)
        assert given["params"]["neck"]["lateral2"]["kernel"].shape == (1, 1, channels, 256)
    with pytest.raises(UserError, match="backbone='vgg': expected small, resnet-18"):
        D.backbone("vgg")
