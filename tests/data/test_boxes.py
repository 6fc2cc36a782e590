"""Scenes with exact boxes, folders of COCO's form, and what is wrong with them."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from jaxstack.core.errors import UserError
from jaxstack.data import boxes, coco, scenes
from jaxstack.data.scenes import Scenery


def test_scenes_are_reproducible_and_their_boxes_are_exact():
    found = scenes.scenes(3, 40)
    assert found.image.dtype == np.uint8
    assert found.image.shape == (40, 64, 64, 3)
    few = scenes.scenes(3, 5)
    for a, b in zip(few, found):
        np.testing.assert_array_equal(a, b[:5])
    assert (scenes.scenes(4, 5).image != few.image).any()
    # padding comes last and holds nothing
    assert (np.diff(found.valid.astype(int), axis=1) <= 0).all()
    assert found.valid[:, 0].all()
    assert not found.boxes[~found.valid].any()
    assert set(found.labels[found.valid]) == {0, 1, 2, 3}
    size = (found.boxes[..., 2:] - found.boxes[..., :2])[found.valid]
    assert 1 <= size.min() < 12 < 20 < size.max() <= 32
    # without noise and texture, one object's pixels are those that differ from the ground
    plain = scenes.scenes(5, 16, scenery=Scenery(most=1, noise=0.0, texture=0.0))
    for image, (box,) in zip(plain.image, plain.boxes):
        ground = np.median(image.reshape(-1, 3), 0)
        y, x = np.nonzero((image != ground).any(-1))
        np.testing.assert_array_equal(box, [x.min(), y.min(), x.max() + 1, y.max() + 1])
    with pytest.raises(UserError, match="size=20: expected at least 28"):
        scenes.scenes(0, 1, 20)


def test_an_object_below_others_keeps_what_is_seen_of_it():
    """With three large ones that all must be drawn, some are left out; ellipses are no objects."""
    scenery = Scenery(fewest=0, most=3, half=(12.0, 14.0), covered=0.3, distractors=1)
    found = scenes.scenes(0, 60, 48, scenery)
    count = found.valid.sum(1)
    assert {0, 1, 2} <= set(count)
    # without the rule three come as often as none
    assert (count == 3).sum() < 0.8 * (count == 0).sum()
    one = jax.eval_shape(scenes.make_scene, jax.random.key(0))
    assert [x.shape for x in one] == [(64, 64, 3), (4, 4), (4,), (4,)]


@pytest.fixture
def folder(tmp_path):
    """Two images, the second without objects, a crowd in the first."""
    (tmp_path / "annotations").mkdir()
    for name in ("train2017", "val2017"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((30, 60, 3), 200, np.uint8)).save(tmp_path / name / "a.png")
        Image.fromarray(np.full((40, 40), 100, np.uint8)).save(tmp_path / name / "b.png")
        write(tmp_path, name)
    return tmp_path


def write(root, name="train2017", **changes):
    box = dict(id=11, image_id=1, category_id=7, bbox=[6, 3, 30, 12])
    content = dict(
        images=[dict(id=1, file_name="a.png", width=60, height=30), dict(id=2, file_name="b.png", width=40, height=40)],
        annotations=[box, dict(box, id=12, iscrowd=1), dict(box, id=13, category_id=2, bbox=[0, 0, 60.5, 30])],
        categories=[dict(id=7, name="dog"), dict(id=2, name="cat")],
    )
    (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(content | changes))


def test_a_folder_of_cocos_form_is_read(folder):
    name = f"coco={folder}"
    assert boxes.classes(name) == ("cat", "dog")
    train, valid, test = (boxes.part(name, which, 32) for which in ("train", "valid", "test"))
    assert (train.count, valid.count, test.count, test.objects) == (1, 1, 2, 2)
    images, truth = test.read([0, 1, 0])
    assert images.shape == (3, 32, 32, 3)
    # 60 x 30 becomes 32 x 16, zeros below; the image without objects is a right one
    assert (images[0, :16] == 200).all()
    assert not images[0, 16:].any()
    assert (images[1] == 100).all()
    np.testing.assert_allclose(truth.boxes[0], np.array([[6, 3, 36, 15], [0, 0, 60, 30]]) * 32 / 60, rtol=1e-6)
    assert truth.labels[0].tolist() == [1, 0]
    assert truth.valid.tolist() == [[True, True], [False, False], [True, True]]
    assert boxes.part("scenes", "valid", 32, most=3).count == 3


def test_parts_of_other_classes_are_named(folder):
    write(folder, "val2017", categories=[dict(id=7, name="dog"), dict(id=2, name="cow")])
    with pytest.raises(UserError, match=r"found classes \['cow', 'dog'\] of val, expected those of train"):
        boxes.part(f"coco={folder}", "test", 32)


@pytest.mark.parametrize(
    ("bbox", "message"),
    [
        ([1, 1, 0, 5], "expected a width and a height above 0"),
        ([1, 1, float("nan"), 5], "expected four finite numbers"),
        ([50, 1, 20, 5], "expected one inside of the image's 60 x 30 pixels"),
        ([-9, 1, 20, 5], "expected one inside"),
        ([1, 1, 2], "expected four finite numbers"),
    ],
)
def test_a_wrong_box_is_named(folder, bbox, message):
    write(folder, annotations=[dict(id=5, image_id=1, category_id=7, bbox=bbox)])
    with pytest.raises(UserError, match=rf"instances_train2017.json: annotation 5: found bbox .*{message}"):
        coco.folder(folder, "train")


def test_a_wrong_folder_is_named(folder, tmp_path):
    read = lambda: coco.folder(folder, "train")
    write(folder, annotations=[dict(id=5, image_id=9, category_id=7, bbox=[1, 1, 2, 2])])
    with pytest.raises(UserError, match="annotation 5: found image_id 9"):
        read()
    write(folder, images=[])
    with pytest.raises(UserError, match="found 0 images, 2 categories"):
        read()
    write(folder, categories=None)
    with pytest.raises(UserError, match="is no JSON of COCO's form"):
        read()
    write(folder)
    picture = folder / "train2017" / "a.png"
    Image.fromarray(np.zeros((5, 5, 3), np.uint8)).save(picture)
    with pytest.raises(UserError, match=r"a.png: found 5 x 5 pixels, expected 60 x 30 as annotated"):
        boxes.Files(read().pictures, 32, 2).read([0])
    Image.fromarray(np.zeros((5, 5), np.uint16)).save(picture)
    with pytest.raises(UserError, match=r"a.png: found pixels of mode I;16, expected 8 bits"):
        coco.rgb(picture)
    picture.unlink()
    with pytest.raises(UserError, match=r"1 of its 2 images are missing, such as .*a.png"):
        read()
    (folder / "train2017" / "b.png").unlink()
    (folder / "train2017").rmdir()
    with pytest.raises(UserError, match=r"has no images, expected a folder .*train2017 or .*images"):
        read()
    (folder / "annotations" / "instances_train2017.json").unlink()
    with pytest.raises(UserError, match=r"annotations: found none, expected one file instances_train\*.json"):
        read()
    with pytest.raises(UserError, match="no such folder"):
        boxes.classes(f"coco={folder}/nothing")
    with pytest.raises(UserError, match="scenes, which take no path, or coco=DIR"):
        boxes.classes("coco")
    with pytest.raises(UserError, match="unknown set of images with boxes 'coca'"):
        boxes.classes("coca=x")
