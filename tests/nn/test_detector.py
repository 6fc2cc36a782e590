"""The learner of detectors: its data, its measure, what a method that distils passes to it, bad options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack.core.errors import UserError
from jaxstack.core.source import Batch
from jaxstack.data import augment
from jaxstack.data.boxes import Truth, part
from jaxstack.nn import detector as D
from jaxstack.nn.torch_weights import to_torch
from jaxstack.nn.vision import detection
from jaxstack.nn.vision.average_precision import mean_average_precision
from jaxstack.nn.vision.detection import inherited

TINY = D.Config(size=32, width=2, channels=4, towers=1, train_images=8, eval_images=6, batch_size=4, num_updates=3)


def test_a_mirrored_image_keeps_its_boxes():
    images, truth = part("scenes", "train", 32, most=8).read(range(8))
    for seed in range(3):
        found, boxes = augment.flip_boxes(jax.random.key(seed), images, truth.boxes)
        turned = (np.asarray(found) != images).any((1, 2, 3))
        assert 0 < turned.sum() < 8
        np.testing.assert_array_equal(found[turned], images[turned, :, ::-1])
        np.testing.assert_array_equal(boxes[~turned], truth.boxes[~turned])
        one, mirrored = (np.asarray(b)[turned][:, 0] for b in (truth.boxes, boxes))
        np.testing.assert_array_equal(mirrored, np.stack([32 - one[:, 2], one[:, 1], 32 - one[:, 0], one[:, 3]], 1))


def test_large_sets_are_read_step_by_step(monkeypatch):
    """Every image once per epoch, in an order of each seed's own, with its own boxes."""
    monkeypatch.setattr(D, "IN_MEMORY", 0)
    source = D.source(D.configs.replace(TINY, flip=False))
    whole, truth = part("scenes", "train", 32, most=8).read(range(8))
    out = jax.tree.map(lambda x: np.zeros((4, *x.shape), x.dtype), source.item([0, 5]))
    source.items(0, 4, [0, 5], out)
    images, found = out
    assert images.shape == (4, 2, 4, 32, 32, 3)
    number = lambda x: [int(np.flatnonzero((whole == one).all((1, 2, 3)))[0]) for one in x]
    for seed in range(2):
        epochs = [[number(images[i, seed]) for i in pair] for pair in ((0, 1), (2, 3))]
        assert all(sorted(a + b) == list(range(8)) for a, b in epochs)
        np.testing.assert_array_equal(found.boxes[0, seed], truth.boxes[epochs[0][0]])
    assert (images[:, 0] != images[:, 1]).any()


def test_evaluation_is_the_measure_of_what_is_detected(monkeypatch):
    """In parts that do not divide the images, with one row that does not count; and the network's own loss."""
    monkeypatch.setattr(D, "AT_ONCE", 4)
    config = D.configs.replace(TINY, score_threshold=0.0, detections=20)
    learner = D.detector(config)
    # weights by which boxes have the size of objects: some of them are right
    state = jax.jit(learner.init)(jax.random.key(0), learner.hypers)
    images, truth = part("scenes", "valid", 32, most=6).read(range(6))
    mask = jnp.arange(6) < 5
    state = state._replace(params=jax.tree.map(lambda x: x * 1.0, state.params))
    head = state.params["head"]
    head["box_out"]["bias"] = jnp.array([0.5, 0.5, 0.5, 0.5, 0.0])
    head["class_out"]["kernel"] = head["class_out"]["kernel"] * 100.0
    found = jax.jit(learner.predict)(state, images)
    scores = jax.jit(learner.evaluate)(state, jax.random.key(0), Batch((images, truth), mask))
    value = {k: float(m.total / m.count) for k, m in scores.items()}
    lists = [[np.asarray(x)[i][np.asarray(found.valid)[i]] for x in found[:3]] for i in range(5)]
    truths = [(b[v], k[v]) for b, k, v in zip(*truth)][:5]
    want = mean_average_precision(lists, truths, 4)
    assert len(lists[0][0]) == 20
    assert value["eval/ap50"] > 0.0
    assert value["eval/map"] == pytest.approx(want.mean, abs=1e-6)
    assert value["eval/ap50"] == pytest.approx(want.ap50, abs=1e-6)
    assert np.isfinite(value["eval/loss"])


def test_a_method_gives_its_loss_its_teacher_and_where_to_start():
    """The teacher is data of each seed's state; its head is what the student starts with; gradients flow to neither."""
    wide = D.configs.replace(TINY, width=4)
    teacher = D.model_of(wide)
    keys = jax.random.split(jax.random.key(7), 2)
    taught = jax.jit(jax.vmap(teacher.init))(keys)

    def loss(outputs, targets, hypers):
        truth, (_, _, _, features, _) = targets
        assert isinstance(truth, Truth)
        pairs = zip(outputs.class_features, features)
        imitation = sum(jnp.square(a - b).mean((1, 2, 3)) for a, b in pairs)
        return D.loss_of(TINY)(outputs, truth, hypers) + imitation

    learner = D.learner_of(TINY, loss=loss, teacher=teacher.apply, teachers=taught, start=inherited, name="pupil")
    own = jax.tree.map(lambda x: x[1], taught)
    state = jax.jit(learner.init)(jax.random.key(0), learner.hypers, own)
    for a, b in zip(jax.tree.leaves(state.params["head"]), jax.tree.leaves(own["params"]["head"]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert state.params["backbone"]["conv"]["kernel"].shape == (3, 3, 3, 2)
    batch = part("scenes", "train", 32, most=4).read(range(4))
    after, metrics = jax.jit(learner.step)(state, batch)
    assert metrics["loss/train"] > sum(float(m.total / m.count) for k, m in metrics.items() if "_loss" in k)
    for a, b in zip(jax.tree.leaves(after.teacher), jax.tree.leaves(own), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (after.params["head"]["class0"]["kernel"] != state.params["head"]["class0"]["kernel"]).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(data="scene"), "unknown set of images with boxes 'scene': did you mean 'scenes'"),
        (dict(size=40), "size=40: expected a multiple of 16, at least 32"),
        (dict(backbone="vgg"), "backbone='vgg': expected small"),
        (
            dict(classes=("cat",)),
            r"classes=\('cat',\): expected \('disc', 'square', 'triangle', 'cross'\), those of scenes",
        ),
        (dict(levels=2), "levels=2: expected 3 to 5"),
        (dict(nms_iou=0.0), "nms_iou=0.0: expected more than 0"),
        (dict(scale=0.0), "scale=0.0: expected a number > 0"),
        (dict(train_images=9000), "train_images=9000: expected at most the 2000 images of train"),
        (dict(eval_split="test", eval_images=501), "eval_images=501: expected at most the 500 images of test"),
        (dict(batch_size=9, train_images=8), "batch_size=9: expected 1 to 8"),
    ],
)
def test_bad_options_are_named(changes, message):
    def sources(**config):
        learner = D.detector(**config)
        return learner.source(learner.config), learner.eval_source(learner.config)

    with pytest.raises(UserError, match=message):
        sources(**dict(size=32) | changes)


def test_a_backbone_begins_with_the_weights_of_a_file(tmp_path):
    """Those of a classifier, whose head is left out; here of a network that is as small as a name allows."""
    config = D.Config(backbone="resnet-18", backbone_weights=str(tmp_path / "net.npz"))
    net, _ = detection.backbone("resnet-18")
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    rng = np.random.default_rng(0)
    whole = jax.tree.map(lambda x: np.float16(rng.normal()) * np.ones(x.shape, np.float32), shapes)
    arrays = to_torch(net, whole)
    np.savez(config.backbone_weights, **arrays, **{"fc.weight": np.zeros((10, 512)), "fc.bias": np.zeros(10)})
    fresh = {kind: {"backbone": own, "neck": {}} for kind, own in shapes.items()}
    fresh = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), fresh)
    found = jax.jit(jax.vmap(lambda _: D.from_file(config)(fresh, ())))(jnp.arange(2))
    for kind in whole:
        for a, b in zip(jax.tree.leaves(found[kind]["backbone"]), jax.tree.leaves(whole[kind]), strict=True):
            np.testing.assert_array_equal(a, np.stack([b, b]))
    # before what a student inherits
    seen = []
    learner = D.learner_of(config, start=lambda fresh, taught: seen.append(fresh) or fresh)
    program = str(jax.make_jaxpr(learner.init)(jax.random.key(0), learner.hypers))
    assert set(seen[0]["params"]) == {"backbone", "neck", "head"}
    assert "pure_callback" in program
    del arrays["layer4.0.conv1.weight"]
    np.savez(config.backbone_weights, **arrays)
    with pytest.raises(UserError, match=r"net.npz: layer4.0.conv1.weight is missing"):
        D.source(config)
    with pytest.raises(UserError, match="expected none for the small backbone"):
        D.Config(backbone_weights="x")


def test_levels_and_strides():
    assert D.strides(D.Config(levels=5)) == (4, 8, 16, 32, 64)
    assert D.strides(D.Config(levels=4, backbone="resnet-18")) == (8, 16, 32, 64)
    net = D.network(D.Config(kind="atss", levels=4, classes=("cat", "dog")))
    assert (net.classes, net.kind, net.strides) == (2, "atss", (4, 8, 16, 32))
