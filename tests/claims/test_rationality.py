import numpy as np

from jaxstack.claims import rationality


def test_arms_share_their_mean_randomisation_and_differ_in_one_thing():
    one = {arm: rationality.learner_of(v, "cliff_walking", 20) for arm, v in rationality.EVERY.items()}
    matched = {arm: one[arm].env.eps for arm in rationality.MATCHED}
    assert set(matched.values()) == {0.2}
    assert one["DR"].env.eps_spread == 0.1
    plain = one["eps 0.2"].config
    assert float(one["L2 1e-3"].hypers.l2) == 1e-3
    assert [one[arm].config.norm for arm in ("LN", "WN")] == ["layer", "weight"]
    assert all(x.config.total_steps == plain.total_steps for x in one.values())
    assert (plain.hidden, plain.batch_size, plain.target_period) == ((128, 128), 64, 500)
    assert plain.hypers.gamma == 1.0


def test_rows_hold_risks_curves_and_the_theory():
    sizes = dict(horizon=8, points=12, total_steps=960, rounds=10, hidden=(4,), learning_starts=64, batch_size=8)
    rows = list(rationality.training("t", "cliff_walking", rationality.EVERY, **sizes).run("DR", (0, 3)))
    assert [r["seed"] for r in rows] == [0, 3]
    for r in rows:
        assert [k for k in r if k.startswith("gap@")] == ["gap@320", "gap@640", "gap@960"]
        assert r["gap@960"] == r["final gap"] != r["gap"]
        np.testing.assert_allclose(r["final gap"], abs(r["final R"] - r["final Rhat"]))
        # nothing is lost against the best policy of 8 steps but what the return says
        np.testing.assert_allclose(r["R"], -8 - r["return"], atol=1e-4)
    theory = rationality.theory(2)
    for arm, metric in ((rationality.RANDOM, "looseness"), (rationality.GRID, "linearity")):
        (row,) = theory.run(arm, (0,))
        assert row["violations"] == 0
        assert row["error"] < 1e-8
        assert row[metric] > 0.9
