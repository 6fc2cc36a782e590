"""The claim of REACHNet: arms that differ in one thing, scanners that differ in what they say, metrics of the truth."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from jaxstack.claims import reachnet as study


def test_each_arm_adds_one_thing_and_networks_stay_small():
    configs = [study.make(arm, study.SMALL).config for arm in (study.PLAIN, study.DOMAIN, study.SEVERAL, study.OURS)]
    changed = [{f for f in vars(a) if getattr(a, f) != getattr(b, f)} for a, b in itertools.pairwise(configs)]
    assert changed == [{"augmentation"}, {"resolutions"}, {"attention"}]
    for config in configs:
        network = config.network
        start = jax.eval_shape(lambda n=network: n.init(jax.random.key(0), jnp.zeros((1, 16, 16, 1))))
        assert sum(x.size for x in jax.tree.leaves(start["params"])) <= 150_000
    assert {name: net.multiple for name, net in study.NETWORKS.items()} == dict(zip(study.NETWORKS, (64, 64, 128)))


def test_scanners_differ_as_they_say_and_the_truth_has_perfect_metrics(monkeypatch):
    scans = {name: study.drawn(1, 3, name) for name in study.TESTED}
    assert scans["D"].images.shape == (3, 64, 96)
    rough = lambda name: np.abs(np.diff(scans[name].images.astype(float), axis=1)).mean()
    assert rough("B") > 1.3 * rough("A")
    dark = [scans[name].images.mean() for name in "AC"]
    assert dark[1] < dark[0]
    ratio = study.TESTED["E"].scale() / study.A.scale()
    np.testing.assert_allclose(ratio, [1.4, 1.0])
    np.testing.assert_allclose(study.TESTED["D"].scale() / study.A.scale(), 2.0)
    # networks that know the truth, and ones that find nothing
    for found, value in ((1.0, 1.0), (0.0, 0.0)):
        known = {}

        def run(state, images, found=found, known=known):
            own = known[images.tobytes()]
            p = np.stack([own.masks & 1, own.masks >> 1], -1) * found
            return p, own.fovea[:, 0]

        for i, name in enumerate(study.TESTED):
            own = study.drawn(study.TEST_SEED + 30 + i, 2, name)
            known[own.images.tobytes()] = own
        monkeypatch.setattr(study, "program", lambda learner, run=run: run)
        monkeypatch.setattr(study, "trained", lambda learner, seed: SimpleNamespace(params=np.zeros(7)))
        (row,) = study.accuracy(study.PLAIN, (3,), study.SMALL._replace(tests=2))
        for metric in ("region Dice", "vessel Dice", "Dice"):
            assert {row[f"{metric} {name}"] for name in (*study.TESTED, "B-E")} == {value}
        assert row["fovea error B-E"] == 0.0
        assert (row["seed"], row["parameters"]) == (3, 7)
