"""The claim of Choroidalyzer: what its metrics say of the truth, of a shifted fovea and of Niblack's settings."""

import numpy as np

from jaxstack.claims import choroidalyzer as study


def test_the_truth_has_perfect_metrics_and_settings_are_chosen_on_training_scans(monkeypatch):
    test = study.tested(7, 4)
    assert list(test.inside) == [True] * 4 + [False] * 4
    assert len({tuple(s) for s in test.scale.tolist()}) == 3  # three scanners
    region, vessel = test.scans.masks & 1 > 0, test.scans.masks & 2 > 0
    row = study.compared(test, study.Found(region, vessel, test.scans.fovea))
    for part in ("", "outside "):
        for name in ("region Dice", "vessel Dice", "measured", "r thickness", "r area", "r CVI"):
            np.testing.assert_allclose(row[part + name], 1.0, rtol=1e-5)
        for name in ("fovea error", "error thickness", "error area", "error CVI"):
            np.testing.assert_allclose(row[part + name], 0.0, atol=1e-6)
    assert row["region Dice lost outside"] == 0.0
    away = study.compared(test, study.Found(region, vessel, np.full_like(test.scans.fovea, np.nan)))
    assert away["error area"] > 0.0
    empty = study.compared(test, study.Found(0 * region > 0, vessel, test.scans.fovea))
    assert (empty["measured"], empty["r area"], empty["region Dice"]) == (0.0, 0.0, 0.0)
    # the best of the settings, on scans of the training seed
    monkeypatch.setattr(study, "WINDOWS", (3, 51))
    monkeypatch.setattr(study, "DEVIATIONS", (-2.0, 0.05))
    monkeypatch.setattr(study, "TRIED", 2)
    assert study.niblack_settings(9_999, 4) == (51, 0.05)
