"""The claim of the acceleration stack: crossings, equal work, choices that are made before they are measured."""

import jax
import numpy as np
import pytest

from jaxstack.claims import dlas as study
from jaxstack.nn import deployment
from jaxstack.nn.conv_forms import window_of
from jaxstack.nn.deployment import Choice, Net, Tuned
from jaxstack.nn.vision import zoo


def test_crossings_lie_between_the_points_around_them():
    assert study.crossing((50, 90), (4.0, 0.25)) == pytest.approx(70)
    assert study.crossing((50, 80, 90), (8.0, 2.0, 0.5)) == pytest.approx(85)
    assert study.crossing((50, 90), (3.0, 1.1)) == 100
    assert study.crossing((50, 90), (0.9, 0.5)) == 50


def test_removed_weights_have_the_work_of_removed_channels():
    network = zoo.network("vgg-small", 3, mid_features=(2, 3, 2, 3, 4, 4))
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32)))
    draw = lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
    dense = Net("vgg-small", 3, (2, 3, 2, 3, 4, 4), "none", jax.tree.map(draw, shapes))
    image = (1, 8, 8, 1)
    whole = deployment.multiply_adds(dense, image)
    for macs in (whole // 4, whole // 2, whole):
        found = deployment.multiply_adds(study.equal_work(dense, macs, image), image)
        assert macs - 64 < found <= macs  # the most that one weight has


def test_layers_are_chosen_by_the_search_and_measured_again(monkeypatch):
    layer = deployment.Layer("a", (1, 4, 4, 4), (3, 3, 4, 8), window_of((1, 4, 4, 4), (3, 3, 4, 8), 1))
    tile = "spatial-pack 2x8"
    first = {"xla": 2.0, "direct": 3.0, "gemm": 4.0, "spatial-pack 4x8": 5.0, tile: 1.0}
    again = {
        "xla": (3.0, 1.0),
        "direct": (6.0, 6.0),
        "gemm": (8.0, 8.0),
        "spatial-pack 4x8": (9.0, 9.0),
        tile: (2.0, 2.0),
    }
    both = Tuned(Choice(), first, again)
    alone = both._replace(first={**first, "direct": 1.5}, again={**again, "direct": (1.0, 1.0)})
    monkeypatch.setattr(study, "MODELS", ("resnet-8",))
    monkeypatch.setattr(study, "plans", lambda folder, model: ({"a": alone}, {"a": both}))
    monkeypatch.setattr(study.dlas, "compressed", lambda config: None)
    monkeypatch.setattr(study.deployment, "ready_net", lambda net, image: deployment.Ready(None, None, (layer,)))
    rows = {arm: list(study.forms(arm, (0, 1), "")) for arm in ("tuning", "cores", study.EITHER)}
    values = lambda arm: [row["slowdown by the other choice"] for row in rows[arm]]
    assert values("tuning") == pytest.approx([1.5, 0.5])  # a lucky search shows
    assert values("cores") == pytest.approx([np.sqrt(3 * 2), np.sqrt(1 * 6)])
    assert values(study.EITHER) == values("tuning")  # which the search saw as the larger: 2 against 1.4


def test_half_of_the_weights_is_a_level_of_the_claim():
    assert study.WEIGHTS[0] == 50
    assert set(study.removed("weights")) == set(study.WEIGHTS)
    assert study.removed("int8") == (0,)
    assert study.claim.scales["small"].seeds == study.SEEDS
    config = study.point("x", "resnet-8", "weights", 95, 3)
    assert (config.level, config.seed, config.dataset) == (0.95, 3, "fashion-mnist=x")
