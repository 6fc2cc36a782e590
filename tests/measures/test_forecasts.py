"""Scores of forecasts against loops, files of trajectories, comparisons of forecasters, and the command."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from jaxstack import cli
from jaxstack.core.errors import UserError
from jaxstack.data.trajectories import Trajectories, aligned, read_trajectories, trajectories
from jaxstack.measures import forecast_scores, forecasts
from jaxstack.measures import signature_mmd as sig
from jaxstack.measures.forecasts import Settings, compare
from jaxstack.measures.signature_mmd import Kernel

scores: Any = forecast_scores  # arrays of NumPy and wrong arguments are given on purpose

FAST = Settings(Kernel(order=0), permutations=50)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64():
        yield


def walks(count, seed, scale=1.0, length=4, width=2) -> Any:
    return scale * np.random.default_rng(seed).normal(size=(count, length, width)).cumsum(1)


def test_scores_equal_loops_over_samples():
    x, y = walks(5, 0), walks(1, 1)[0]
    mask = np.array([True, False, True, True])
    pairs = list(itertools.permutations(range(5), 2))
    crps = np.abs(x - y).mean(0) - np.mean([np.abs(x[i] - x[j]) for i, j in pairs], 0) / 2
    assert float(scores.crps(x, y)) == pytest.approx(crps.mean(), rel=1e-12)
    assert float(scores.crps(x, np.where(mask[:, None], y, np.nan), mask=mask)) == pytest.approx(crps[mask].mean())
    up = lambda v: np.maximum(v, 0.5)
    above = np.abs(up(x) - up(y)).mean(0) - np.mean([np.abs(up(x[i]) - up(x[j])) for i, j in pairs], 0) / 2
    assert float(scores.crps(x, y, lambda v: jnp.maximum(v, 0.5))) == pytest.approx(above.mean(), rel=1e-12)
    size = np.linalg.norm
    for keep, given in ((np.full(4, True), None), (mask, mask)):
        a, b = x[:, keep], y[keep]
        energy = np.mean([size(v - b) for v in a]) - np.mean([size(a[i] - a[j]) for i, j in pairs]) / 2
        assert float(scores.energy_score(x, y, mask=given)) == pytest.approx(energy, rel=1e-10)
        flat, own = a.reshape(5, -1), b.ravel()
        variogram = np.mean(
            [
                (abs(own[i] - own[j]) ** 0.7 - np.mean(np.abs(flat[:, i] - flat[:, j]) ** 0.7)) ** 2
                for i in range(len(own))
                for j in range(len(own))
            ]
        )
        assert float(scores.variogram_score(x, y, 0.7, mask=given)) == pytest.approx(variogram, rel=1e-10)
    # one number: energy score and CRPS agree; a normal law has a closed form
    one = np.random.default_rng(0).normal(size=(4000, 1, 1))
    closed = np.sqrt(2 / np.pi) - 1 / np.sqrt(np.pi)  # of N(0, 1) at 0
    assert float(scores.crps(one, np.zeros((1, 1)))) == pytest.approx(closed, abs=0.02)
    assert float(scores.energy_score(one[:50], np.zeros((1, 1)))) == pytest.approx(
        float(scores.crps(one[:50], np.zeros((1, 1)))), rel=1e-6
    )


def test_files_of_both_formats_say_the_same(tmp_path):
    values, times = walks(6, 0).reshape(2, 3, 4, 2), np.array([[0.0, 1, 2, 5], [10, 11, 12, 15]])[:, None]
    mask = np.random.default_rng(1).random((2, 3, 4)) < 0.7
    mask[..., 1] = True
    np.savez(tmp_path / "a.npz", values=np.where(mask[..., None], values, np.nan), times=times)
    rows = [
        {
            "condition": "ab"[n],
            "sample": f"s{m}",
            "time": times[n, 0, l],
            "u": values[n, m, l, 0],
            "v": values[n, m, l, 1],
        }
        for n, m, l in np.argwhere(mask)
    ]
    pd.DataFrame(rows).sample(frac=1, random_state=0).sort_values(["condition", "sample"], kind="stable").to_csv(
        tmp_path / "a.csv", index=False
    )
    npz, csv = read_trajectories(tmp_path / "a.npz"), read_trajectories(tmp_path / "a.csv")
    assert csv.conditions == ("a", "b")
    assert npz.conditions == ("0", "1")
    assert csv.variables == ("u", "v")
    a, b = aligned((npz, csv))
    np.testing.assert_array_equal(a.mask, b.mask)
    np.testing.assert_allclose(a.values, b.values, rtol=1e-12)
    np.testing.assert_array_equal(a.times, b.times)
    assert a.mask.sum() == mask.sum()
    # what two files have at different stamps comes to the same places
    early = trajectories(np.ones((1, 2, 2, 1)), times=[0.0, 2.0])
    late = trajectories(2 * np.ones((1, 1, 2, 1)), times=[1.0, 2.0])
    first, second = aligned((early, late))
    np.testing.assert_array_equal(first.times[0, 0], [0, 1, 2])
    np.testing.assert_array_equal(first.mask[0, 1], [True, False, True])
    np.testing.assert_array_equal(second.values[0, 0, :, 0], [0, 2, 2])


def test_comparing_forecasts_of_one_law():
    observed, training = trajectories(walks(9, 0)), trajectories(walks(30, 5))
    sets = {"a": trajectories(walks(8, 1)), "b": trajectories(walks(7, 2, scale=3.0))}
    found = compare(observed, sets, training, settings=FAST)
    mean, unit = training.values.mean((0, 1, 2)), training.values.std((0, 1, 2))
    path = lambda v: sig.make_paths((v - mean) / unit, span=(0.0, 3.0))
    x, t, pivot = path(walks(9, 0)), path(walks(30, 5)), sig.make_paths(np.zeros((1, 4, 2)))[0]
    weights = sig.TailWeights.fit(t, pivot, kernel=FAST.kernel)
    for name, s in sets.items():
        y = path(s.values[0])
        g, c = sig.grams(x, y, FAST.kernel), sig.censored_grams(x, y, weights)
        np.testing.assert_allclose(found.scores[name]["sig"], sig.kernel_score(g), rtol=1e-10)
        np.testing.assert_allclose(found.scores[name]["csig"], sig.kernel_score(c), rtol=1e-10, atol=1e-12)
        assert found.discrepancies[name]["sig-mmd2"][0] == pytest.approx(float(sig.mmd2(g)), rel=1e-10)
        assert found.discrepancies[name]["csig-mmd2"][0] == pytest.approx(float(sig.mmd2(c)), rel=1e-8)
        for score in ("crps", "energy", "variogram"):
            f = {"crps": scores.crps, "energy": scores.energy_score, "variogram": scores.variogram_score}[score]
            assert found.scores[name][score][4] == pytest.approx(float(f(s.values[0], walks(9, 0)[4])), rel=1e-10)
    assert found.discrepancies["a"]["sig-mmd2"][1] > 0.05
    assert found.discrepancies["b"]["sig-mmd2"][1] < 0.05
    less = found.differences("a")
    assert set(less) == {"b"}
    gap = less["b"]["crps"]
    assert gap.low < found.scores["b"]["crps"].mean() - found.scores["a"]["crps"].mean() < gap.high


def test_comparing_forecasts_for_each_condition():
    happened = walks(4, 0)
    origins = np.array([0.0, 7.0, 14.0, 21.0])[:, None, None] + np.arange(4.0)
    samples = np.stack([walks(5, 10 + n) for n in range(4)])
    known = trajectories(walks(30, 5).reshape(30, 1, 4, 2))
    present = np.ones((4, 4), bool)
    present[1, 0] = present[2, 3] = False
    observed = trajectories(np.where(present[..., None], happened, np.nan), times=origins[:, 0])
    sets = {"a": trajectories(samples, times=origins)}
    found = compare(observed, sets, known, settings=FAST)
    assert found.conditions == ("0", "1", "2", "3")
    assert not found.discrepancies
    mean, unit = known.values.mean((0, 1, 2)), known.values.std((0, 1, 2))
    path = lambda v, mask=None: sig.make_paths((v - mean) / unit, mask=mask, span=(0.0, 3.0))
    weights = sig.TailWeights.fit(path(walks(30, 5)), sig.make_paths(np.zeros((1, 4, 2)))[0], kernel=FAST.kernel)
    for n in range(4):
        y, own = path(samples[n]), path(happened[n : n + 1], present[n : n + 1])[0]
        assert found.scores["a"]["sig"][n] == pytest.approx(float(sig.sig_score(y, own, FAST.kernel)), rel=1e-10)
        assert found.scores["a"]["csig"][n] == pytest.approx(float(sig.csig_score(y, own, weights)), rel=1e-10)
        expected = float(scores.crps(samples[n], happened[n], mask=present[n]))
        assert found.scores["a"]["crps"][n] == pytest.approx(expected, rel=1e-10)
    # conditions are matched by name, variables too
    names = ("p", "q", "r", "s")
    named = observed._replace(
        **{k: getattr(observed, k).swapaxes(0, 1) for k in ("values", "times", "mask")},
        conditions=names,
        variables=("u", "v"),
    )
    order = [2, 0, 3, 1]
    mixed = trajectories(samples[order][..., ::-1], origins[order], None, tuple(names[i] for i in order), ("v", "u"))
    again = compare(named, {"a": mixed}, known, settings=FAST)
    for score, values in found.scores["a"].items():
        np.testing.assert_allclose(again.scores["a"][score], values, rtol=1e-10)
    # samples without a stamp that was observed have scores of paths alone
    lacking = trajectories(np.where(np.arange(4)[:, None] == 2, np.nan, samples), times=origins)
    part = compare(observed, {"a": lacking}, scale=[2.0], settings=FAST)
    assert set(part.scores["a"]) == {"sig"}
    assert "lack stamps" in part.notes[0]


def test_options_reach_the_paths():
    observed, sets = trajectories(walks(5, 0)), {"a": trajectories(walks(6, 1))}
    training = trajectories(walks(20, 5))
    x, y = walks(5, 0) / 2, walks(6, 1) / 2
    option: dict[str, Any] = {"time": False, "lead_lag": True, "basepoint": False}
    above = Settings(FAST.kernel, permutations=5, threshold=(1.0,), **option)
    found = compare(observed, sets, scale=[2.0, 2.0], settings=above).scores["a"]
    g = sig.grams(sig.make_paths(x, **option), sig.make_paths(y, **option), FAST.kernel)
    np.testing.assert_allclose(found["sig"], sig.kernel_score(g), rtol=1e-10)
    expected = [float(scores.crps(walks(6, 1), v, lambda v: jnp.maximum(v, 1.0))) for v in walks(5, 0)]
    np.testing.assert_allclose(found["tw-crps"], expected, rtol=1e-10)
    median = compare(observed, sets, training, settings=Settings(FAST.kernel, median=True, normalize=True))
    assert np.isfinite(median.scores["a"]["csig"]).all()


def test_block_intervals_are_wider_where_neighbours_depend():
    steps = np.repeat(np.random.default_rng(0).normal(size=30), 10)[:-5]
    alone, blocks = forecasts.block_mean(steps), forecasts.block_mean(steps, block=10)
    assert alone.value == pytest.approx(steps.mean(), abs=1e-6)
    assert blocks.value == pytest.approx(steps.mean(), abs=1e-6)
    ratio = (blocks.high - blocks.low) / (alone.high - alone.low)
    assert ratio == pytest.approx(np.sqrt(10), rel=0.15)


LAW = trajectories(walks(4, 0))
CASES = trajectories(walks(6, 0).reshape(3, 2, 4, 2))
BAD = [
    (lambda: trajectories(np.ones((3, 4))), "values: found shape [3, 4], expected [N, M, L, d] or [M, L, d]"),
    (lambda: trajectories([[["x"]]]), "values: expected numbers in rows of one length"),
    (lambda: trajectories(np.ones((3, 4, 1)), np.ones(3)), "times: found shape [3], expected [3, 4]"),
    (lambda: trajectories(np.ones((3, 4, 1)), [0, 1, 1, 2]), "times: found stamps that do not increase"),
    (lambda: trajectories(np.ones((1, 2, 1)), [0, np.nan]), "times: found a stamp that is not finite"),
    (lambda: trajectories(np.full((3, 4, 1), np.inf)), "values: found infinite numbers"),
    (lambda: trajectories(np.full((3, 4, 1), np.nan)), "trajectory 0 has no stamp"),
    (lambda: trajectories(np.ones((2, 2, 3, 1)), conditions=("a", "a")), "expected 2 different names"),
    (lambda: compare(LAW, {}, scale=[1]), "forecasts: found none, expected at least one"),
    (lambda: compare(LAW, {"f": LAW}), "training, scale: expected one of them"),
    (lambda: compare(LAW, {"f": LAW}, LAW, [1.0]), "training, scale: expected one of them"),
    (lambda: compare(LAW, {"f": LAW}, scale=[1.0, 2.0, 3.0]), "scale: found 1.0, 2.0, 3.0, expected 1 or 2"),
    (lambda: compare(LAW, {"f": LAW}, scale=[-1.0]), "scale: found -1.0, expected numbers > 0"),
    (
        lambda: compare(LAW, {"f": LAW, "g": CASES}, scale=[1.0]),
        "g: found samples for each condition, expected samples",
    ),
    (
        lambda: compare(CASES, {"f": LAW}, scale=[1.0]),
        "f: found samples of one law, expected samples for each condition",
    ),
    (lambda: compare(LAW, {"f": CASES}, scale=[1.0]), "observed: found 4 trajectories, expected one for each of 3"),
    (lambda: compare(CASES, {"f": CASES}, scale=[1.0]), "observed: found 2 trajectories for a condition, expected one"),
    (lambda: compare(LAW, {"f": trajectories(walks(1, 0))}, scale=[1.0]), "f: found 1 sample, expected at least 2"),
    (
        lambda: compare(LAW, {"f": trajectories(walks(3, 0, width=1))}, scale=[1.0]),
        "f: found variables x0, expected x0, x1",
    ),
    (lambda: compare(LAW, {"f": LAW}, trajectories(np.ones((4, 4, 2)))), "training: variable x0 does not vary"),
    (
        lambda: compare(LAW, {"f": LAW}, scale=[1.0], settings=Settings(median=True)),
        "sigma: the median heuristic needs",
    ),
    (lambda: compare(LAW, {"f": LAW}, scale=[1.0], settings=Settings(threshold=(1.0,) * 3)), "threshold: found 1.0"),
    (
        lambda: compare(LAW, {"f": LAW}, scale=[1e-60], settings=Settings(Kernel("linear", order=0))),
        "f: sig is not finite: paths are too long for the kernel",
    ),
    (lambda: forecasts.block_mean(np.ones(3), 4), "block=4: expected 1 to 3"),
    (lambda: scores.crps(np.ones((1, 2, 1)), np.ones((2, 1))), "samples: found 1, expected at least 2"),
    (lambda: scores.crps(np.ones((3, 2, 1)), np.ones((3, 1))), "samples: found shape [3, 2, 1], expected [M, 3, 1]"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[m[:40] for _, m in BAD])
def test_sets_that_do_not_fit_are_one_line(call, message):
    with pytest.raises(UserError) as e:
        call()
    assert message in str(e.value)
    assert "\n" not in str(e.value)


TABLES = [
    ("sample,x\n0,1\n", "found columns sample, x, expected time, variables"),
    ("time,x\n0,a\n", "column 'x': found a text, expected numbers"),
    ("time,x\n,1\n", "column 'time': found an empty field"),
    ("sample,time,x\n0,0,1\n,0,2\n", "column 'sample': found an empty field"),
    ("sample,time,x\n0,0,1\n0,0,2\n", "sample 0, time 0: found two rows, expected one"),
    ("condition,sample,time,x\na,0,0,1\na,1,0,1\nb,0,0,1\n", "condition b: found 1 samples, expected 2"),
    ("", "not a readable CSV file"),
]


@pytest.mark.parametrize(("text", "message"), TABLES, ids=[m[:30] for _, m in TABLES])
def test_tables_that_cannot_be_read_are_one_line(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError) as e:
        read_trajectories(tmp_path / "t.csv")
    assert message in str(e.value)
    assert str(e.value).startswith(f"{tmp_path}/t.csv: ")


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("seen.npz", values=walks(9, 0))
    np.savez("good.npz", values=walks(8, 1))
    np.savez("wide.npz", values=walks(8, 2, scale=2.0))
    np.savez("past.npz", values=walks(30, 5))
    options = ["--order", "0", "--permutations", "50", "--threshold", "1"]
    files = ["good.npz", "wide.npz", "--observed", "seen.npz"]
    assert cli.main(["score-forecasts", *files, "--training", "past.npz", *options, "--out", "all.csv"]) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert lines[0][0] == "9"
    assert [line[0] for line in lines[2:8]] == ["sig", "csig", "crps", "tw-crps", "energy", "variogram"]
    assert "less good.npz" in out
    assert "good.npz: sig-mmd2" in out
    table = pd.read_csv("all.csv")
    assert len(table) == 18
    with jax.enable_x64():
        direct = compare(
            *(read_trajectories("seen.npz"), {"w": read_trajectories("wide.npz")}),
            read_trajectories("past.npz"),
            settings=FAST,
        )
    wide = table[table.forecaster == "wide.npz"]
    np.testing.assert_allclose(wide["csig"], direct.scores["w"]["csig"], rtol=1e-10)
    for argv, message in (
        (files, "training, scale: expected one of them"),
        ([*files, "--scale", "1", "--sigma", "wide"], "--sigma wide: expected a number or median"),
        ([*files, "--scale", "1", "--order", "-1"], "order=-1: expected 0 to 10"),
        ([*files, "--scale", "1", "--permutations", "0"], "--permutations 0: expected at least 1"),
        ([*files, "--scale", "1", "--out", "all.txt"], "--out all.txt: expected a name ending in .csv"),
        ([*files, "--scale", "1", "--block", "10"], "block=10: expected 1 to 9"),
        (["good.npz", *files, "--scale", "1"], "good.npz: is named twice"),
        (["none.npz", "--observed", "seen.npz", "--scale", "1"], "none.npz: not found"),
        (["good.txt", "--observed", "seen.npz", "--scale", "1"], "good.txt: found a name ending in '.txt'"),
    ):
        assert cli.main(["score-forecasts", *argv]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
    np.savez("odd.npz", value=walks(8, 1))
    assert cli.main(["score-forecasts", "odd.npz", "--observed", "seen.npz", "--scale", "1"]) == 2
    assert "odd.npz: found arrays value, expected values, times and mask" in capsys.readouterr().err


def test_a_set_is_plain_arrays():
    assert isinstance(LAW, Trajectories)
    assert LAW.values.shape == (1, 4, 4, 2)
    assert LAW.conditions == ()
    assert CASES.conditions == ("0", "1", "2")
