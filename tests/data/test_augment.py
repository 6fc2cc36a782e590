"""Changes of images with their masks and boxes, against closed forms, SciPy and Pillow; what `--augment` takes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy import ndimage

from jaxstack.core.errors import UserError
from jaxstack.data import augment
from jaxstack.data.augment import Sample
from jaxstack.nn.classifier import Config, facts, training_batch
from jaxstack.nn.supervised import Hypers, accuracy, cross_entropy

KEY = jax.random.key(0)
MASK = np.zeros((12, 16), np.int32)
MASK[3:7, 9:14] = 1
BOXES = jnp.array([[9.0, 3.0, 14.0, 7.0]])
SAMPLE = Sample(jnp.asarray(MASK, jnp.float32)[..., None], jnp.asarray(MASK), BOXES)


def around(mask):
    rows, columns = np.nonzero(np.asarray(mask))
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def agrees(sample):
    """The image, the mask and the box tell the same place."""
    np.testing.assert_allclose(sample.image[..., 0], sample.masks, atol=1e-4)
    np.testing.assert_allclose(sample.boxes[0], around(sample.masks), atol=1e-4)


def test_masks_and_boxes_go_with_the_image():
    agrees(augment.mirrored(SAMPLE, True))
    assert augment.mirrored(SAMPLE, True).boxes[0].tolist() == [2, 3, 7, 7]
    for at in ((0, 0), (2, 5), (6, 6)):  # the last two cut the object at an edge
        agrees(augment.cropped(SAMPLE, at, 3))
    gone = augment.cropped(SAMPLE._replace(boxes=BOXES - jnp.array([9.0, 0, 9, 0])), (3, 6), 3)
    assert gone.boxes[0, 0] == 0  # pushed to the edge
    agrees(augment.warped(SAMPLE, jnp.eye(2), (-4.0, 2.0)))
    quarter = jnp.array([[0.0, -1.0], [1.0, 0.0]])  # +x goes to +y
    square = Sample(*(x[:, 2:14] for x in SAMPLE[:2]), BOXES - jnp.array([2.0, 0, 2, 0]))
    agrees(augment.warped(square, quarter))
    assert augment.warped(square, quarter).boxes[0].tolist() == [5, 7, 9, 12]
    # batches are vmaps, one draw for each; half are mirrored
    keys, many = jax.random.split(KEY, 300), jax.tree.map(lambda x: jnp.stack([x] * 300), SAMPLE)
    for change in (functools.partial(augment.crop, most=2), augment.mirror, augment.affine):
        found = jax.jit(jax.vmap(change))(keys, many)
        one = change(keys[7], SAMPLE)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[7], b, atol=1e-5), found, one)
        places = len(np.unique(np.asarray(found.boxes), axis=0))
        assert places == 2 if change is augment.mirror else places > 8
    assert 0.4 < (jax.vmap(augment.mirror)(keys, many).boxes[:, 0, 0] == 2).mean() < 0.6


@pytest.mark.parametrize(("edge", "mode"), [("zeros", "grid-constant"), ("reflect", "mirror")])
def test_affine_maps_are_those_of_scipy(edge, mode):
    image = np.random.default_rng(0).random((9, 13, 2)).astype(np.float32)
    forward, offset = np.array([[0.8, -0.5], [0.4, 1.2]]), np.array([1.5, -0.75])
    back, middle = np.linalg.inv(forward)[::-1, ::-1], np.array([4.0, 6.0])  # rows first
    start = middle - back @ (middle + offset[::-1])
    wanted = np.stack([ndimage.affine_transform(c, back, start, order=1, mode=mode) for c in np.moveaxis(image, -1, 0)])
    found = augment.warped(Sample(jnp.asarray(image)), jnp.asarray(forward), offset, edge).image
    np.testing.assert_allclose(found, np.moveaxis(wanted, 0, -1), atol=1e-5)


def test_colours_are_those_of_pillow():
    image = np.random.default_rng(0).integers(40, 200, (6, 7, 3), np.uint8)
    picture, x = Image.fromarray(image), jnp.asarray(image / 255.0, jnp.float32)
    for place, kind in enumerate((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)):
        for factor in (0.6, 1.5):
            factors = [factor if i == place else 1.0 for i in range(3)]
            wanted = np.asarray(kind(picture).enhance(factor)) / 255.0
            np.testing.assert_allclose(augment.recoloured(x, *factors), wanted, atol=2 / 255)
    np.testing.assert_allclose(augment.recoloured(x, 1.0, 1.0, 1.0), x, atol=1e-6)


def test_squares_are_cut_at_the_edges():
    ones, keys = jnp.ones((8, 10, 2)), jax.random.split(KEY, 400)
    holes = np.asarray(jax.vmap(lambda k: augment.cutout(k, ones, 3))(keys)) == 0
    sizes = {holes[i, ..., 0].sum() for i in range(400)}
    assert sizes == {4, 6, 9}  # in a corner, at a side, inside
    assert (holes[..., 0] == holes[..., 1]).all()
    assert holes[..., 0].any(0).all()


def test_no_strength_changes_nothing_and_draws_are_each_images_own():
    images = jax.random.uniform(KEY, (8, 8, 8, 3))
    still = augment.parse(["affine=0", "blur=0", "colour=0", "erase=0"], 8)
    np.testing.assert_allclose(augment.changed(KEY, images, still), images, atol=1e-5)
    same = jnp.broadcast_to(images[:1], images.shape)
    for entry in ("affine", "blur", "colour", "cutout=3", "erase=1"):
        found = augment.changed(KEY, same, augment.parse([entry], 8))
        assert len(np.unique(np.asarray(found), axis=0)) >= 6
    assert augment.parse(["cutout", "mixup"], 32) == (("cutout", 8.0), ("mixup", 0.2))


def test_mixed_classes_are_learnt_by_their_shares():
    config = Config(shift=0, augment=("mixup=1",))
    x, y = jnp.arange(4 * 64, dtype=jnp.uint8).reshape(4, 8, 8, 1), jnp.array([1, 2, 3, 1])
    images, shares = training_batch(config, KEY, (x, y))
    assert float(shares[0, 1]) == pytest.approx(1.0)  # images 0 and 3 are of one class
    share = float(shares[1, 2])
    np.testing.assert_allclose(images[1], share * x[1] + (1 - share) * x[2], rtol=1e-5)
    logits, hypers = jax.random.normal(KEY, (4, 10)), Hypers(label_smoothing=0.1)
    each = [cross_entropy(logits, labels, hypers) for labels in (y, y[::-1])]
    np.testing.assert_allclose(
        cross_entropy(logits, shares, hypers), share * each[0] + (1 - share) * each[1], rtol=1e-5
    )
    assert (accuracy(shares, shares, hypers) == 1).all()
    plain = training_batch(Config(shift=0, augment=("blur=0",)), KEY, (x, y))
    np.testing.assert_allclose(plain[0], x, atol=1e-4)
    assert (plain[1] == y).all()
    assert facts(config).white == 16


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["affin"], "unknown augment 'affin': did you mean 'affine'"),
        (["crop=4"], "augment=crop=4: expected --shift PIXELS, an option of its own"),
        (["flip"], "augment=flip: expected --flip"),
        (["blur", "blur=2"], "augment=blur=2: found blur twice"),
        (["cutout=9"], "augment=cutout=9: expected a number, 1 to 8"),
        (["cutout=2.5"], "augment=cutout=2.5: expected a number, 1 to 8"),
        (["erase=x"], r"augment=erase=x: expected a number, 0 to 1 \(chance"),
        (["mixup=-1"], "augment=mixup=-1: expected a number, 0 or more"),
    ],
)
def test_entries_that_do_not_fit(entries, message):
    with pytest.raises(UserError, match=message):
        Config(augment=tuple(entries))


def test_mixup_needs_pairs():
    with pytest.raises(UserError, match="batch_size=63: expected an even number with mixup"):
        Config(augment=("mixup",), batch_size=63)
