import numpy as np

from jaxstack.claims import imitate_then_improve as study
from jaxstack.claims.harness import problems
from jaxstack.data.files import load_dataset


def test_data_are_those_that_the_claim_speaks_of():
    pump, random = (load_dataset(study.data(kind)[0]) for kind in ("noisy pump", "random"))
    for data in (pump, random):
        assert len(data.episode_returns()) == 100
        assert int((data.terminated | data.truncated).sum()) == 100
        assert np.bincount(data.episode).max() == 300
        # the true next observation, also where an episode ends
        inside = ~data.ends[:-1]
        np.testing.assert_array_equal(data.next_obs[:-1][inside], data.obs[1:][inside])
        assert (data.next_obs[data.terminated, 0] >= 0.45).all()
    assert 60 <= pump.terminated.sum() <= 80
    assert random.terminated.sum() == 0
    assert study.random_return() == random.episode_returns().mean()


def test_every_scale_is_whole_and_arms_differ_in_the_method_alone():
    for scale in study.claim.scales:
        assert problems(study.claim, scale) == []
    for arms in (study.BASE, study.EDAC):
        shared = {k for options in arms.values() for k in options} - {"base", "num_critics", "variant", "td_component"}
        assert not shared
    assert len(study.CHAINS) >= study.claim.scales["small"].seeds


def test_arms_are_measured_against_the_base_and_chains_meet_the_bound(monkeypatch):
    grid = np.arange(1, 11) * 500
    rising = lambda at: np.where(grid >= at, 90.0, 0.0)
    made = {"TD3+BC": np.stack([rising(4000), rising(4500)]), "AC 0": np.stack([rising(1500), np.zeros(10)])}
    monkeypatch.setattr(study, "curves", lambda arm, *rest: (grid, made[arm]))
    run = study.experiment("e", study.BASE, "noisy pump", True, study.Budget()).run
    base, ac = (list(run(arm, (0, 1))) for arm in ("TD3+BC", "AC 0"))
    assert [r["updates_to_90"] for r in base] == [4000, 4500]
    assert [r["updates_to_90"] for r in ac] == [1500, 5500]
    assert ac[0]["updates_to_90_by_median_of_base"] == 1500 / 4250
    assert (base[0]["final_return"], base[0]["return@500"]) == (90.0, 0.0)
    for arm in ("from zero", "from Monte-Carlo"):
        rows = list(study.chain(arm, tuple(range(10))))
        assert max(r["off_the_bound"] for r in rows) <= 1
        assert max(r["savings_off_the_bound"] for r in rows) <= 1
