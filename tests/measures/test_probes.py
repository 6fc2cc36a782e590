"""Probes on processes whose answer is known, windows, nulls, tables and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack.core.errors import UserError
from jaxstack.measures import information as info
from jaxstack.measures import probe_tables, probes
from jaxstack.measures.probes import Settings, trajectories
from jaxstack.measures.scripted import SCRIPTS, scripted

FEW = Settings(alpha=0.01, window=2, null_reps=20, slow_null_reps=5)
EXPECTED = {
    "reactive": {"OAR": (0.99, 1.0), "HAR": (0.0, 0.01), "AA": (0.0, 0.04)},
    "memory": {"HAR": (0.99, 1.0), "OAR": (0.0, 0.02)},
    "private": {"PIF": (0.1, 1.0), "HAR": (0.0, 0.07), "AA": (0.0, 0.04)},
    "sync": {"AA": (0.99, 1.0), "DAI": (0.0, 0.06)},
    "temporal": {"DAI": (0.99, 1.0), "AA": (0.0, 0.04), "PIF": (0.1, 1.0)},
    "independent": dict.fromkeys(("OAR", "HAR", "PIF", "AA", "DAI"), (0.0, 0.07)),
}


@pytest.mark.parametrize("kind", SCRIPTS)
def test_each_probe_lights_only_where_designed(kind):
    """Windows of two steps: of 125 candidates a window of three bits leaves 15 rows of one value, fewer than the 25
    neighbours, and columns of nearly equal deviation then decide by chance which other rows fill the posterior."""
    traj = scripted(kind, jax.random.key(0))
    for name, (low, high) in EXPECTED[kind].items():
        found = probes.probe(traj, name, FEW)
        assert low <= found.norm <= high, (name, found.norm)
        if kind == "independent":
            assert abs(found.norm - found.null.mean()) < 0.02
        elif low > 0.05:
            assert found.flag
            assert found.p <= 1 / 6 + 1e-9


def test_windows_never_cross_a_reset():
    x = np.arange(24).reshape(2, 12)
    past, whole = probes.windows(x, np.ones((2, 12), bool), 3)
    assert whole.sum(1).tolist() == [9, 9]
    np.testing.assert_array_equal(past[1, 5], [14, 15, 16])
    valid = np.ones((2, 12), bool)
    valid[0, 4] = False
    _, whole = probes.windows(x, valid, 3)
    assert np.flatnonzero(whole[0]).tolist() == [3, 8, 9, 10, 11]
    jitted, mask = jax.jit(lambda x, v: probes.windows(x, v, 3))(jnp.asarray(x), jnp.asarray(valid))
    np.testing.assert_array_equal(np.asarray(jitted)[whole], probes.windows(x, valid, 3)[0][whole])
    np.testing.assert_array_equal(mask, whole)


def test_recurrent_states_replace_windows_and_dai_reads_the_state_before():
    """H_t = (o_t, o_{t-1}): a policy a_t = o_{t-1} shows HAR; H_{t-1} of the other agent then tells its a_t."""
    rng = np.random.default_rng(0)
    o = rng.integers(0, 2, (150, 10, 2)).astype(np.float32)
    before = np.concatenate([np.zeros_like(o[:, :1]), o[:, :-1]], 1)
    hidden = np.stack([o, before], -1)
    action = before.astype(np.int32)
    traj = trajectories(o[..., None], action, hidden)
    found = probes.audit(traj, FEW)
    assert "PIF-obs" not in found
    assert found["HAR"].norm > 0.99
    assert found["OAR"].norm < 0.02
    # agent 0's own past state holds o_{t-1}, so the other's adds nothing
    assert found["DAI"].norm < 0.05
    follow = np.stack([action[..., 0], before[..., 0].astype(np.int32)], -1)
    led = probes.probe(trajectories(o[..., None], follow, hidden), "DAI", FEW)
    assert led.norm > 0.9
    assert led.pairs[0, 1] > 0.9 > led.pairs[1, 0]
    assert led.rows == 150 * 9


def test_the_null_of_independent_actions_is_their_value():
    """Value less null mean lies within .01 in nine of ten draws."""
    off = []
    for seed in range(20):
        traj = scripted("independent", jax.random.key(seed), episodes=100)
        found = probes.probe(traj, "AA", Settings(null_reps=10))
        off.append(found.norm - found.null.mean())
    assert np.mean(np.abs(off) <= 0.01) >= 0.9


def test_a_shifted_null_keeps_slow_policies_slow():
    """Two agents that each hold one action for whole episodes are not coupled, yet an i.i.d. null says so."""
    rng = np.random.default_rng(1)
    held = np.repeat(rng.integers(0, 2, (60, 1, 2)), 20, 1)
    traj = trajectories(rng.normal(size=(60, 20, 2, 1)), held)
    p = {null: probes.probe(traj, "AA", Settings(null=null, null_reps=99)).p for null in ("permute", "shift")}
    assert p["shift"] > 0.05 or p["shift"] > 3 * p["permute"]


def test_continuous_actions():
    """Y = X + noise through another agent's observation; the released ranks lose the rows and with them the value."""
    rng = np.random.default_rng(2)
    obs = rng.normal(size=(60, 10, 2, 1))
    action = np.stack([rng.normal(size=(60, 10)), obs[..., 1, 0] + 0.3 * rng.normal(size=(60, 10))], -1)[..., None]
    few = Settings(slow_null_reps=2)
    found = {n: probes.probe(trajectories(obs, action), n, few) for n in ("OAR", "AA")}
    assert found["OAR"].bits > 1.0
    assert found["AA"].norm < 0.1
    coupled = np.concatenate([action[:, :, 1:], action[:, :, 1:] + 0.1 * rng.normal(size=(60, 10, 1, 1))], 2)
    right = probes.probe(trajectories(rng.normal(size=(60, 10, 2, 1)), coupled), "AA", few)
    broken = probes.probe(
        trajectories(rng.normal(size=(60, 10, 2, 1)), coupled), "AA", Settings(slow_null_reps=2, reference_compat=True)
    )
    assert right.bits > 1.0 > 0.3 > broken.bits
    assert right.flag


def test_whole_episodes_are_drawn_and_reference_mode_draws_steps():
    traj = scripted("memory", jax.random.key(1))
    ours = probes.probe(traj, "HAR", Settings(alpha=0.01, max_rows=1200, null_reps=5))
    theirs = probes.probe(traj, "HAR", Settings(alpha=0.01, max_rows=1200, null_reps=5, reference_compat=True))
    assert ours.rows == 100 * 9
    assert theirs.rows < 0.3 * ours.rows
    assert "100 whole episodes of 200" in ours.notes


def test_constant_actions_have_no_normaliser_and_ids_are_compacted():
    obs = np.random.default_rng(3).normal(size=(20, 10, 2, 3))
    obs[..., 2] = 7.0
    found = probes.probe(trajectories(obs, np.full((20, 10, 2), 4)), "OAR", FEW)
    assert np.isnan(found.norm)
    assert np.isnan(found.p)
    assert any("normaliser" in n for n in found.notes)
    assert any("2 constant observation columns" in n for n in found.notes)
    many = np.arange(400).reshape(20, 10, 2) % 17
    assert (
        "17 action ids in 200 rows: posteriors are smoothed towards uniform"
        in probes._Block(trajectories(obs, many), "AA", FEW).notes()
    )
    sparse = scripted("reactive", jax.random.key(0), episodes=40)
    wide = sparse._replace(action=sparse.action * 900)
    same = [probes.probe(t, "OAR", FEW).norm for t in (sparse, wide)]
    assert same[0] == same[1]


def test_bad_input():
    obs, action = np.zeros((3, 4, 2, 5)), np.zeros((3, 4, 2), int)
    bad = obs.copy()
    bad[0, 3, 1, 2] = np.nan
    bad[2, 0, 0, :2] = np.inf
    for call, text in (
        (
            lambda: trajectories(bad, action),
            r"obs: 3 of 120 entries are not finite, first at episode 0, step 3, agent 1",
        ),
        (lambda: trajectories(obs[0], action), r"obs: expected \[episodes, steps, agents"),
        (lambda: trajectories(obs, action[:, :3]), r"action: expected \[3, 4, 2\]"),
        (lambda: trajectories(obs, action, np.zeros((3, 5, 2, 8))), r"hidden: expected \[3, 4, 2, 'H'\], found"),
        (lambda: trajectories(obs, action, None, np.ones((3, 5))), r"valid: expected \[3, 4\], found \[3, 5\]"),
        (lambda: trajectories([obs[0], obs[1, :2]], action[:2]), "obs: found episodes of 2 to 4 steps, expected one"),
        (lambda: trajectories(obs, [*action[:2], action[2, :1]]), "action: found episodes of 1 to 4 steps"),
        (lambda: trajectories(obs, action, [obs[0], obs[1], obs[2, :3]]), "hidden: found episodes of 3 to 4 steps"),
        (lambda: probes.probe(trajectories(obs, action), "OAR"), "rows: expected at least 26, found 12"),
        (lambda: probes.probe(trajectories(obs, action), "oar"), "OAR"),
        (lambda: probes.probe(trajectories(obs[:, :, :1], action[:, :, :1]), "AA"), "at least 2 agents"),
        (lambda: Settings(null_reps=0), "null_reps"),
        (lambda: scripted("nope", jax.random.key(0)), "nope"),
    ):
        with pytest.raises(UserError, match=text):
            call()
    padded = bad.copy()
    valid = np.ones((3, 4), bool)
    valid[0, 3] = valid[2, 0] = False
    assert np.isfinite(trajectories(padded, action, None, valid).obs).all()


def test_memory_gap_and_decision_table():
    gap = probe_tables.memory_gap({s: 1.0 + s for s in range(5)}, {s: 0.5 + s * 0.9 for s in range(5)})
    assert gap.p == pytest.approx(1 / 32)
    assert gap.positive == 5
    assert gap.benefits
    ten = probe_tables.memory_gap({s: 1.0 + s for s in range(10)}, dict.fromkeys(range(10), 0.0))
    assert ten.p == pytest.approx(1 / 1024)
    with pytest.raises(UserError, match=r"unpaired: \[3, 4\]"):
        probe_tables.memory_gap({1: 0.0, 3: 0.0}, {1: 0.0, 4: 0.0})

    def run(flag, p=0.001):
        one = probes.Probe("HAR", 0.0, 0.5, np.zeros(5), p, flag, np.zeros(2), 100)
        return {n: one._replace(name=n) for n in ("HAR", "PIF", "AA", "DAI")}

    some = probe_tables.Scenario("a", "MPE", [run(True)], [gap])
    none = probe_tables.Scenario("b", "MPE", [run(True), run(False)], [gap._replace(benefits=False)])
    table = probe_tables.decision_table([some, none])
    assert table == [
        {
            "suite": "MPE",
            "memory": "50% (1/2)",
            "teammate information": "100% (2/2)",
            "synchronous coordination": "100% (2/2)",
            "temporal coordination": "100% (2/2)",
        }
    ]
    many = {str(i): run(True, p)["AA"] for i, p in enumerate((0.001, 0.02, 0.03, 0.5, np.nan))}
    assert probe_tables.discoveries(many) == {"0": True, "1": True, "2": True, "3": False, "4": False}


def test_eight_thousand_rows_of_300_columns_stay_below_two_gib():
    """XLA's own count of arguments, outputs and temporaries, with 200 null values; nothing is run."""
    of = lambda *shape, dtype=np.float32: jax.ShapeDtypeStruct(shape, dtype)
    rows, taken = of(8000, 300), of(201, 8000, dtype=np.int32)
    past = (of(201, 8000, 2, dtype=np.int32),) * 2
    how: dict = dict(classes=5, k=25, alpha=1.0)
    for function, args, options in (
        (probes._conditional, (rows, rows, taken), how),
        (probes._coupling, (rows, taken, taken), how),
        (probes._conditional_each, (rows, rows, taken, past), how),
        (probes._dependence, (rows, taken), how | {"most": 50}),
        (info.cmi_ksg, (rows, rows, rows), {"k": 25}),
    ):
        memory = function.lower(*args, **options).compile().memory_analysis()
        peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        assert 8000 * 300 * 4 < peak < 2 * 2**30, function
