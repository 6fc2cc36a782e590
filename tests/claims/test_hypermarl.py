import math

import pytest

from jaxstack.claims import hypermarl
from jaxstack.core import space


@pytest.mark.parametrize(("tried", "count"), [(hypermarl.SPACES, 4), (hypermarl.WIDE, 8)])
def test_every_arm_of_dispersion_tries_as_many_settings(tried, count):
    assert list(tried) == list(hypermarl.DISPERSION_ARMS)
    assert {math.prod(len(d.values) for d in s.values()) for s in tried.values()} == {count}
    for arm, s in tried.items():
        learner = hypermarl.particles(arm, 2048, (4,), **{k: d.values[0] for k, d in s.items() if k != "lr"})
        numeric = space.numeric_settings(s, learner.hypers._fields, None, 0)
        assert len(numeric) * len(space.static_settings(s, learner.hypers._fields)) == count


def test_the_width_of_the_hypernetwork_is_tuned(monkeypatch):
    swept = []
    monkeypatch.setattr(hypermarl, "sweep", lambda make, tried, *_, **__: swept.append((make, tried)) or swept[0])
    monkeypatch.setattr(hypermarl.Tuning, "of", lambda *_, **__: None)
    hypermarl.dispersion("d", 4096, 2048, (4,), hypermarl.WIDE).tune("HyperMARL")
    ((make, tried),) = swept
    widths = [make(hyper_hidden=v).config.hyper_hidden for v in tried["hyper_hidden"].values]
    assert widths == [(64,), (256,)]


def test_dispersion_runs_the_tuned_form_and_stores_its_curve():
    experiment = hypermarl.dispersion("d", 2048 * 10, 2048, (4,), hypermarl.SPACES)
    rows = list(experiment.run("HyperMARL linear", (0, 1), tuned={"lr": 1e-3, "init": "normalised"}))
    assert [r["seed"] for r in rows] == [0, 1]
    points = [k for k in rows[0] if k.startswith("return@")]
    assert points == [f"return@{2048 * i:g}" for i in range(1, 11)]
    assert rows[0][points[-1]] == rows[0]["return"]
    task = hypermarl.particles("HyperMARL linear", 2048, (4,))
    assert rows[0]["parameters"] > 4 * task.config.hidden[0]


def test_games_are_tuned_on_seeds_of_their_own_and_run_with_the_chosen_rate():
    experiment = hypermarl.matrix_game("synchronisation", 2, 20, ("FuPS",))
    tuning = experiment.tune("FuPS")
    assert tuning.problem() is None
    assert not set(tuning.seeds) & set(range(100))
    assert len({s for scores in tuning.scores for s in scores}) == 6  # three rates, two seeds
    slow, fast = (list(experiment.run("FuPS", (0, 1), tuned={"lr": lr})) for lr in (0.0, 3e-2))
    assert 0 < slow[0]["reward"] < 1
    assert slow[0]["mean_reward"] != fast[0]["mean_reward"]
    assert fast[0]["reward"] != pytest.approx(fast[1]["reward"], abs=1e-6)
