"""Phantoms of ultra-widefield images: what is drawn is where the truth says, patients, storage, the command."""

import csv
import hashlib

import numpy as np
import pytest
from PIL import Image

from jaxstack import cli
from jaxstack.core.errors import UserError
from jaxstack.medical.phantoms_uwf import DISEASES, HEALTHY, LABELS, aligned, patient, uwf, uwf_set


def test_a_seed_draws_the_same_eye_everywhere():
    eye = uwf(np.random.default_rng(0), diseases=("RVO", "Gla"))
    pixels = np.round(eye.image * 255).astype(np.uint8).tobytes() + eye.lesions.tobytes()
    assert hashlib.sha256(pixels).hexdigest()[:16] == "b96741ba4725f672"
    assert eye.image.dtype == np.float32
    assert eye.image.shape == (64, 80, 2)
    assert (eye.image >= 0).all()
    assert (eye.image <= 1).all()
    assert eye.labels.tolist() == [False, False, False, True, False, True, False, True]
    # a left eye: the disc is left of the macula, and the brightest place of the healthy eye
    healthy = uwf(np.random.default_rng(1), (96, 120), artefacts=False)
    assert healthy.disc[1] < healthy.macula[1] - 15
    brightest = np.unravel_index(healthy.image.sum(-1).argmax(), (96, 120))
    assert np.hypot(*(np.array(brightest) - healthy.disc)) < 4
    assert not healthy.labels.any()


def test_lesions_change_the_image_where_they_are_drawn_and_lie_at_their_places():
    """The same eye with and without a disease: what chance draws before and after it differs, so means over eyes."""
    plain = [uwf(np.random.default_rng((3, i)), artefacts=False) for i in range(12)]
    center = np.array([32, 40])
    for k, name in enumerate(DISEASES):
        ill = [uwf(np.random.default_rng((3, i)), diseases=(name,), artefacts=False) for i in range(12)]
        inside, beside, distances = [], [], []
        for a, b in zip(ill, plain):
            change = np.abs(a.image - b.image).sum(-1)
            mask = a.lesions[k]
            assert mask.any()
            assert not a.lesions[[j for j in range(7) if j != k]].any()
            inside.append(change[mask].mean())
            beside.append(np.median(change[~mask]))
            points = np.argwhere(mask) + 0.5
            anchor = {"RP": center, "RD": center, "Gla": a.disc, "RVO": a.disc}.get(name, a.macula)
            distances.append(np.hypot(*(points - anchor).T).mean())
        assert np.mean(inside) > 3 * np.mean(beside), name
        low, high = {"MH": (0, 6), "AMD": (2, 8), "Gla": (0, 4), "DR": (9, 17), "RVO": (7, 24)}.get(name, (18, 40))
        assert low <= np.mean(distances) <= high, name


def test_patients_have_two_eyes_and_right_ones_are_stored_mirrored():
    eyes = uwf_set(5, 7)
    assert eyes.patients.tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert eyes.right.tolist() == [False, True] * 3 + [False]
    assert (eyes.labels[:, -1] == eyes.labels[:, :-1].any(1)).all()
    assert (eyes.lesions.any((2, 3)) == eyes.labels[:, :-1]).all()
    images = aligned(eyes.images, eyes.right)
    np.testing.assert_array_equal(images[1], eyes.images[1, :, ::-1])
    np.testing.assert_array_equal(images[0], eyes.images[0])
    np.testing.assert_array_equal(aligned(images, eyes.right), eyes.images)
    again = uwf_set(5, 3)  # a longer set begins with the shorter one
    np.testing.assert_array_equal(again.images, eyes.images[:3])
    people = [patient(np.random.default_rng((1, i))) for i in range(4000)]
    well = np.mean([not (a or b) for a, b in people])
    assert abs(well - HEALTHY) < 0.025
    rates = [np.mean([name in eye for pair in people for eye in pair]) for name in DISEASES]
    assert min(rates) > 0.02
    assert max(rates) < 0.25
    assert np.mean([len(set(a) | set(b)) > 1 for a, b in people]) > 0.08


def test_the_command_writes_what_was_drawn(tmp_path, capsys):
    run = lambda *argv: cli.main([str(a) for a in argv])
    folder = tmp_path / "eyes"
    assert run("phantoms", "uwf", "--num", 8, "--size", 48, 64, "--seed", 2, "--out", folder) == 0
    eyes = uwf_set(2, 8, (48, 64))
    rows = list(csv.DictReader((folder / "labels.csv").read_text().splitlines()))
    assert [r["laterality"] for r in rows] == ["L", "R"] * 4
    assert len({r["patient"] for r in rows}) == 4
    np.testing.assert_array_equal([[int(r[c]) for c in LABELS] for r in rows], eyes.labels)
    picture = np.asarray(Image.open(folder / rows[3]["file"]))
    np.testing.assert_array_equal(picture[..., :2], eyes.images[3])
    assert not picture[..., 2].any()
    masks = list((folder / "lesions").glob("*.png"))
    assert len(masks) == eyes.labels[:, :-1].sum() > 0
    i, k = next((i, k) for i in range(1, 8, 2) for k in range(7) if eyes.labels[i, k])
    stored = np.asarray(Image.open(folder / "lesions" / f"eye{i:04d}-{DISEASES[k]}.png"))
    np.testing.assert_array_equal(stored[:, ::-1] > 0, eyes.lesions[i, k])
    assert run("phantoms", "uwf", "--size", 64, "--out", tmp_path / "b") == 2
    assert "--size 64: expected 2 for uwf" in capsys.readouterr().err


def test_bad_input_is_named():
    with pytest.raises(UserError, match="size=16 80: expected at least 32"):
        uwf(np.random.default_rng(0), (16, 80))
    with pytest.raises(UserError, match="diseases: found 'flu', expected some of MH, RP"):
        uwf(np.random.default_rng(0), diseases=("flu",))
