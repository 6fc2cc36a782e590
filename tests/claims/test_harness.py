"""The harness with toy claims: verdicts, rows that survive a stop, data, tuning, records, bad input."""

import functools
import json
import math
from pathlib import Path

import pandas as pd
import pytest

from jaxstack import cli
from jaxstack.claims import CLAIMS, report, store
from jaxstack.claims.harness import Check, Claim, Curve, Experiment, Scale, Tuning, judge, problems, run_claim
from jaxstack.core.errors import UserError
from jaxstack.sweeps import Sweep, choice

ROOT = Path(__file__).resolve().parent.parent.parent


def rows(arm, values):
    return [{"experiment": "e", "arm": arm, "seed": i, "score": v} for i, v in enumerate(values)]


NOISE = [0.0, 3.0, 1.0, 4.0, 2.0]
TABLE = (
    rows("high", [2.0, 2.1, 1.9, 2.0, 2.0])
    + rows("low", [1.0, 1.1, 0.9, 1.0, 1.0])
    + rows("wide", [0, 4, 1, 3, 2])
    + rows("noisy", NOISE)
    + rows("noisy + 1", [v + 1 + d for v, d in zip(NOISE, (0.1, -0.1, 0.0, 0.1, -0.1))])
    + rows("sick", [1.0, math.nan, 1.0, 1.0, 1.0])
)


@pytest.mark.parametrize(
    ("check", "status"),
    [
        (Check("e", "high", "score", "at_least", 1.9), "holds"),
        (Check("e", "high", "score", "at_least", 2.0), "fails"),  # the interval reaches below
        (Check("e", "wide", "score", "at_least", 1.9), "fails"),  # mean 2, but uncertain
        (Check("e", "low", "score", "at_most", 1.1), "holds"),
        (Check("e", "high", "score", "above", 0.8, other="low"), "holds"),
        (Check("e", "wide", "score", "above", 0.8, other="low"), "fails"),
        (Check("e", "low", "score", "below", 0.8, other="high"), "holds"),
        (Check("e", "low", "score", "below", 1.0, other="high"), "fails"),
        (Check("e", "high", "score", "within", 1.2, other="low"), "holds"),
        (Check("e", "high", "score", "within", 0.5, other="low"), "fails"),
        (Check("e", "low", "score", "near", 0.1, target=1.0), "holds"),
        (Check("e", "low", "score", "near", 0.1, target=1.1), "fails"),
        # the same differences, lost between seeds and found seed by seed
        (Check("e", "noisy + 1", "score", "above", 0.8, other="noisy"), "fails"),
        (Check("e", "noisy + 1", "score", "above", 0.8, other="noisy", paired=True), "holds"),
        (Check("e", "noisy + 1", "score", "within", 1.1, other="noisy", paired=True), "holds"),
        (Check("e", "noisy + 1", "score", "signed_rank", 0.032, other="noisy", paired=True), "holds"),  # 5 of 5: 1/32
        (Check("e", "noisy + 1", "score", "signed_rank", 0.03, other="noisy", paired=True), "fails"),
        (Check("e", "noisy", "score", "signed_rank", 0.05, other="noisy + 1", paired=True), "fails"),
        (Check("e", "high", "score", "times_at_least", 1.8, other="low"), "holds"),
        (Check("e", "high", "score", "times_at_least", 2.0, other="low"), "fails"),
        (Check("e", "low", "score", "times_at_most", 0.55, other="high"), "holds"),
        (Check("e", "low", "score", "times_at_most", 0.5, other="high"), "fails"),
        (Check("e", "noisy", "score", "times_at_least", 0.1, other="high"), "fails"),  # a zero: no ratio
        (Check("e", "wide", "score", "share", 0.6, target=2.0), "holds"),  # 4, 3 and 2 of five seeds
        (Check("e", "wide", "score", "share", 0.8, target=2.0), "fails"),
        (Check("e", "wide", "score", "share_below", 0.4, target=1.0), "holds"),
        (Check("e", "noisy", "score", "beaten", 1.0, other="noisy + 1", paired=True), "holds"),
        (Check("e", "noisy + 1", "score", "beaten", 0.2, other="noisy", paired=True), "fails"),
        (Check("e", "low", "score", "beaten", 0.8, other=("noisy", "high"), paired=True), "holds"),
        (Check("e", "high", "score", "above", 0.5, other=("low", "noisy")), "fails"),  # noisy has mean 2
        (Check("e", "low", "score", "below", 0.5, other=("noisy + 1", "wide")), "fails"),
        (Check("e", "low", "score", "below", 0.5, other=("high", "noisy + 1")), "holds"),  # against 2, not 3
        (Check("e", "wide", "score", "at_least", 5.0, report=True), "report"),
        (Check("e", "sick", "score", "at_least", 0.5), "fails"),
        (Check("e", "high", "score", "above", 0.5, other="absent"), "not run"),
    ],
)
def test_verdicts_use_the_interval(check, status):
    verdict = judge(check, TABLE)
    assert verdict.status == status
    assert verdict.holds is (status == "holds")
    assert check.arm in check.describe()


def test_verdicts_say_what_decided_them():
    e = judge(Check("e", "high", "score", "times_at_least", 1.5, other="low"), TABLE).estimate
    assert e.value == pytest.approx(2.0)
    assert e.low < 2.0 < e.high
    assert judge(Check("e", "high", "score", "above", 0.0, other=("low", "noisy + 1")), TABLE).note == "best: noisy + 1"
    assert judge(Check("e", "sick", "score", "at_least", 0.5), TABLE).note == "not finite: 1 of 5 seeds of sick"
    share = judge(Check("e", "wide", "score", "share", 0.6, target=2.0), TABLE).estimate
    assert share.value == pytest.approx(0.6)
    assert share.low == pytest.approx(0.2307, abs=1e-4)  # Wilson, 3 of 5
    twice = TABLE[:5] + [r | {"seed": r["seed"] + 1} for r in rows("other", [1.0] * 5)]
    with pytest.raises(UserError, match="expected the same"):
        judge(Check("e", "high", "score", "above", 0.0, other="other", paired=True), twice)
    with pytest.raises(UserError, match="found metrics score in the rows of 'low'"):
        judge(Check("e", "low", "accuracy", "at_least", 0.0), TABLE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(rule="more"), "rule='more'"),
        (dict(other=""), "needs other arm"),
        (dict(rule="at_least"), "takes no other arm"),
        (dict(target=1.0), "takes no target"),
        (dict(rule="at_least", other="", paired=True), "compares no two arms"),
        (dict(rule="within", other=("low", "wide")), "takes one other arm"),
        (dict(rule="share", other="", value=2.0), "a share of the seeds"),
    ],
)
def test_malformed_checks_are_refused(change, message):
    check = Check("e", "high", "score", "above", 0.5, other="low")._replace(**change)
    with pytest.raises(UserError, match=message):
        judge(check, TABLE)


class Calls:
    """Counts calls; a list in the code of a claim would be part of its digest."""

    def __init__(self):
        self.list = []


CALLS, TUNED = Calls(), Calls()


def constant(arm, seeds, stop_after=None, level=1.0):
    """Rows one by one; raises after `stop_after` rows as a killed process would."""
    for i, seed in enumerate(seeds):
        if i == stop_after:
            raise KeyboardInterrupt
        CALLS.list.append((arm, seed))
        value = {"high": level, "low": 0.0}[arm] + 0.01 * seed
        yield {"seed": seed, "score": value, "score@2": value, "score@8": value + 1, "parameters": 10}


def toy(level=1.0, checks=(), experiments=(), **options):
    """One experiment of two arms, more if given."""
    first = Experiment("e", ("high", "low"), functools.partial(constant, level=level))
    small = Scale((first, *experiments), (Check("e", "high", "score", "above", 0.5, other="low"), *checks), seeds=3)
    return Claim(
        "toy", "nobody", "high beats low", "nothing", {"small": small}, curves=(Curve("e", "score", "time"),), **options
    )


@pytest.fixture
def run(tmp_path, capsys):
    CALLS.list.clear()

    def call(claim, **options):
        holds = run_claim(claim, out=tmp_path / "out", work=tmp_path / "work", **options)
        partial = tmp_path / "work" / "toy-small" / "toy-small.json"
        path = partial if options.get("only") or options.get("arms") else tmp_path / "out" / "toy-small.json"
        return holds, json.loads(path.read_text()), " ".join(capsys.readouterr().out.split())

    return call


def statuses(record):
    return [c["status"] for c in record["checks"]]


@pytest.mark.parametrize(("level", "holds"), [(1.0, True), (0.1, False)])
def test_a_claim_is_recorded_whether_it_holds_or_not(run, tmp_path, level, holds):
    held, record, out = run(toy(level))
    assert held is record["holds"] is holds
    assert statuses(record) == ["holds" if holds else "fails"]
    assert len(record["rows"]) == 6
    assert record["run"]["versions"]["jax"]
    assert record["experiments"][0]["tuning"].startswith("none")
    assert record["experiments"][0]["arms"]["high"]["seconds"] >= 0
    (means,) = record["means"]
    assert means["arms"]["high"]["estimate"][0] == pytest.approx(level + 0.01)
    assert means["arms"]["high"]["parameters"] == 10
    assert ("1 of 1 checks hold" if holds else "0 of 1 checks hold") in out
    for name in ("toy-small.png", "toy-small-curves.png"):
        assert (tmp_path / "out" / name).stat().st_size > 3000


def test_a_killed_claim_goes_on_without_running_finished_seeds_again(run, tmp_path, capsys):
    claim = toy()
    killed = lambda arm, seeds: constant(arm, seeds, stop_after=2 if arm == "low" else None)
    small = claim.scales["small"]
    stopped = claim._replace(scales={"small": small._replace(experiments=(small.experiments[0]._replace(run=killed),))})
    with pytest.raises(KeyboardInterrupt):
        run(stopped, keep_rows=True)
    assert "stopped; the same command continues" in capsys.readouterr().out
    assert CALLS.list == [("high", 0), ("high", 1), ("high", 2), ("low", 0), ("low", 1)]
    file = tmp_path / "work" / "toy-small" / "rows.jsonl"
    file.write_bytes(file.read_bytes() + b'{"kind": "row", "exper')  # killed while it wrote a line
    CALLS.list.clear()
    _, record, _ = run(claim, keep_rows=True)
    assert CALLS.list == [("low", 2)]
    assert len(record["rows"]) == 6
    assert len(record["earlier_runs"]) == 1
    CALLS.list.clear()
    run(claim, keep_rows=True)
    assert CALLS.list == []
    run(claim, keep_rows=True, seeds=4)  # only the new seeds
    assert CALLS.list == [("high", 3), ("low", 3)]
    CALLS.list.clear()
    run(claim, fresh=True, only=["e"], arms=["high"])
    assert [arm for arm, _ in CALLS.list] == ["high"] * 3


def test_rows_of_other_code_are_not_mixed_in(run):
    run(toy(1.0))
    CALLS.list.clear()
    _, record, out = run(toy(0.1))
    assert len(CALLS.list) == 6
    assert "its code changed" in out
    assert record["rows"][0]["score"] == pytest.approx(0.1)
    CALLS.list.clear()
    _, record, out = run(toy(2.0), keep_rows=True)
    assert CALLS.list == []
    assert record["rows"][0]["score"] == pytest.approx(0.1)
    assert "rows of other code: e: high, low" in out
    assert record["experiments"][0]["arms"]["high"]["other_code"]
    holds, record, _ = run(toy(2.0), only=["e"], arms=["high"])
    assert not holds
    assert statuses(record) == ["not run"]
    assert record["checks"][0]["note"] == "the stored rows are of other code"


def test_the_digest_sees_what_a_function_uses():
    def make(level, used=constant):
        def f(arm):
            return used(arm, (0,), level=level), ROOT

        return f

    assert store.digest(make(1.0)) == store.digest(make(1.0))
    assert store.digest(make(1.0)) != store.digest(make(2.0))
    assert store.digest(make(1.0)) != store.digest(make(1.0, rows))
    before = store.digest(toy_root)
    globals()["ROOT_LEVEL"] += 1
    assert store.digest(toy_root) != before


ROOT_LEVEL = 1


def toy_root():
    return [ROOT_LEVEL for _ in range(2)]


def with_data(arm, seeds, webkb):
    return [{"seed": s, "score": float(len(list(webkb.iterdir())))} for s in seeds]


def test_missing_data_leave_an_experiment_out_and_say_so(run, tmp_path):
    more = Experiment("graphs", ("high", "low"), with_data, needs=("webkb",))
    claim = toy(checks=(Check("graphs", "high", "score", "at_least", 0.5),), experiments=(more,))
    holds, record, out = run(claim)
    assert holds
    assert statuses(record) == ["holds", "not run"]
    assert record["experiments"][1]["status"] == "not run"
    assert "not run: graphs (data missing: --data webkb=DIR)" in out
    assert "The claim HOLDS WHERE IT WAS RUN at this scale: 1 of 1 checks hold, 1 not run" in out
    (tmp_path / "webkb").mkdir()
    (tmp_path / "webkb" / "a").touch()
    for options in (dict(data={"webkb": tmp_path / "webkb"}), {}):  # later its rows are there without the data
        holds, record, _ = run(claim, **options)
        assert holds
        assert statuses(record) == ["holds", "holds"]
    assert statuses(run(claim, fresh=True)[1]) == ["holds", "holds"]  # what cannot run again is not forgotten


def test_a_check_that_reports_decides_nothing_and_none_run_is_no_success(run):
    holds, record, out = run(toy(), arms=["low"])
    assert not holds
    assert statuses(record) == ["not run"]
    assert record["checks"][0]["note"] == "not selected"
    assert "The claim WAS NOT DECIDED at this scale" in out
    assert "Only a part of the claim was run" in out
    holds, record, out = run(toy(checks=(Check("e", "low", "score", "at_least", 9.0, report=True),)))
    assert holds
    assert statuses(record) == ["holds", "report"]
    assert record["checks"][1]["estimate"][0] == pytest.approx(0.01)
    assert "1 reported" in out


def tune(arm):
    TUNED.list.append(arm)
    if arm == "low":
        return None
    return Tuning(({"level": 1.0}, {"level": 3.0}, {"level": 9.0}), ((1.0,), (3.0,), (math.nan,)), (100,), "score")


def test_tuning_is_recorded_and_used_and_resumed(run):
    TUNED.list.clear()
    tuned = Experiment("t", ("high", "low"), lambda arm, seeds, tuned: constant(arm, seeds, **tuned), tune=tune)
    claim = toy(experiments=(tuned,), checks=(Check("t", "high", "score", "near", 0.1, target=3.01),))
    holds, record, out = run(claim)
    assert holds
    arm = record["experiments"][1]["arms"]["high"]
    assert arm["tuning"]["chosen"] == {"level": 3.0}
    assert arm["tuning"]["scores"] == [[1.0], [3.0], [None]]
    assert "t: high: tuned, 3 settings x 1 seeds" in out
    run(claim, seeds=4)
    assert TUNED.list == ["high", "low"]
    with pytest.raises(UserError, match=r"found seeds \[100\] of the runs, expected seeds of its own"):
        run(claim, seeds=101)


def test_unequal_tuning_is_said(run):
    uneven = lambda arm: Tuning(
        tuple({"level": float(i)} for i in range(1 + (arm == "high"))), ((1.0,),) * (1 + (arm == "high")), (9,), "score"
    )
    level = lambda arm, seeds, tuned: constant(arm, seeds, **tuned)
    _, record, out = run(toy(experiments=(Experiment("t", ("high", "low"), level, tune=uneven),)))
    assert record["experiments"][1]["tuning"] == "UNEQUAL: 1 settings x 1 seeds; 2 settings x 1 seeds"
    assert "tuning of t is UNEQUAL" in out


def test_tuning_chooses_by_the_mean_and_fails_if_all_failed():
    settings = ({"lr": 1}, {"lr": 2}, {"lr": 3})
    scores = ((1.0, 2.0), (1.8, 1.9), (9.0, math.nan))
    assert Tuning(settings, scores, (8, 9), "r").chosen == {"lr": 2}
    assert Tuning(settings, scores, (8, 9), "loss", largest=False).chosen == {"lr": 1}
    assert Tuning(settings, ((math.nan,), (1.0,), (1.0,)), (9,), "r").chosen == {"lr": 2}
    with pytest.raises(UserError, match="found no finite r"):
        _ = Tuning(settings, ((math.inf,),) * 3, (9,), "r").chosen


def test_tuning_of_a_sweep():
    rows = [(0, 1e-3, 7, True, 2.0), (0, 1e-3, 8, True, 4.0), (1, 1e-2, 7, True, 9.0), (1, 1e-2, 8, False, 9.0)]
    table = pd.DataFrame(rows, columns=["setting", "lr", "seed", "alive", "eval/return"])
    swept = Sweep({"lr": choice(1e-3, 1e-2)}, [7, 8], table, None, [])
    tuning = Tuning.of(swept, steps=5)  # by the learner's objective
    smallest = Tuning.of(swept._replace(objective=("eval/return", "min")))
    assert (smallest.metric, smallest.largest) == ("eval/return", False)
    assert tuning.settings == ({"lr": 1e-3}, {"lr": 1e-2})
    assert tuning.scores[0] == (2.0, 4.0)
    assert math.isnan(tuning.scores[1][1])
    assert tuning.chosen == {"lr": 1e-3}  # the other has a failed seed
    assert tuning.budget == "2 settings x 2 seeds x 5 steps"


def test_rows_that_break_the_promise_are_refused(run):
    def bad(row):
        return Experiment("b", ("high",), lambda arm, seeds: [{"seed": s} | row for s in seeds])

    with pytest.raises(TypeError, match="metric 'score': found str"):
        run(toy(experiments=(bad({"score": "good"}),)))
    with pytest.raises(UserError, match="b: high: found a row of seed 7"):
        run(toy(experiments=(bad({"seed": 7}),)))
    with pytest.raises(UserError, match=r"b: high: found no rows of seeds \[1, 2\]"):
        run(toy(experiments=(Experiment("b", ("high",), lambda arm, seeds: [{"seed": 0}]),)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(scale="huge"), "scale='huge': expected one of 'small'"),
        (dict(seeds=1), "seeds=1: expected at least 2"),
        (dict(only=["nope"]), "--only nope: found no such experiment, expected one of 'e'"),
        (dict(arms=["nope"]), "--arms nope: found no such arm, expected one of 'high', 'low'"),
        (dict(data={"x": Path(".")}), "--data x: found no such data set, expected none"),
    ],
)
def test_wrong_arguments(options, message, tmp_path):
    with pytest.raises(UserError) as e:
        run_claim(toy(), out=tmp_path, work=tmp_path, **options)
    assert message in str(e.value)
    assert not list(tmp_path.iterdir())


def test_damaged_rows_and_two_processes_are_refused(run, tmp_path):
    folder = tmp_path / "work" / "toy-small"
    with store.Store(folder), pytest.raises(UserError, match="in use by another process"):
        run(toy())
    (folder / "rows.jsonl").write_text('{"kind": "row"}\n')
    with pytest.raises(UserError, match="line 1 is damaged; --fresh starts anew"):
        run(toy())
    assert run(toy(), fresh=True)[0]


def test_malformed_claims_are_found():
    two = Experiment("e", ("a", "a"), constant, needs=("not a name",))
    checks = (Check("e", "b", "m", "at_least", 0.0), Check("f", "a", "m", "at_least", 0.0, report=True))
    claim = Claim("m", "", "", "", {"small": Scale((two, two), checks)}, baselines=("c",))
    found = "; ".join(problems(claim, "small"))
    for text in (
        "'e' is there twice",
        "arm twice",
        "no arm 'b'",
        "of 'f': found no such",
        "baseline 'c'",
        "'not a name'",
    ):
        assert text in found
    silent = toy()._replace(scales={"small": Scale(toy().scales["small"].experiments, ())})
    assert problems(silent, "small") == ["scale 'small' has no check that decides"]


def test_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CLAIMS, "_table", {"toy": f"{__name__}:claim"})
    monkeypatch.setitem(globals(), "claim", toy(0.1))
    argv = ["reproduce", "toy", "--out", "docs/results"]

    def call(*words):
        code = cli.main([*words])
        streams = capsys.readouterr()
        return code, " ".join((streams.out + streams.err).split())

    assert call("reproduce", "--all", "--list")[1].count("not run") == 1
    assert call(*argv)[0] == 1
    assert "DOES NOT HOLD" in call("reproduce", "--list")[1]
    assert "check: score of high >= low + 0.5" in call("reproduce", "toy", "--list")[1]
    assert call("reproduce", "--all", "--fresh")[0] == 1
    assert "--data nowhere: expected NAME=DIR" in call(*argv, "--data", "nowhere")[1]
    assert "expected one of METHOD, --all" in call("reproduce")[1]
    assert call(*argv, "--only", "e", "x")[0] == 2
    page = tmp_path / "docs" / "methods" / "toy.md"
    page.parent.mkdir()
    page.write_text(f"# Toy\n\n{report.BEGIN}\nold\n{report.END}\n\n## Data\nnone\n")
    code, out = call("reproduce", "--docs")
    assert code == 0
    assert out == "docs/results/README.md docs/methods/toy.md"
    text = page.read_text()
    assert "| e: score of high >= low + 0.5 | 0.100" in text
    assert "**fails**" in text
    assert text.endswith("## Data\nnone\n")
    assert "| [toy](../methods/toy.md) | small | 3 |" in (tmp_path / "docs" / "results" / "README.md").read_text()
    assert call("reproduce", "--docs") == (0, "")
    page.write_text("# Toy\n")
    assert "found no results part" in call("reproduce", "--docs")[1]


claim = None


@pytest.mark.parametrize("name", list(CLAIMS))
def test_every_registered_claim_is_well_formed(name):
    claim = CLAIMS.load(name)
    assert claim.method == name
    assert claim.baselines, "a claim names the baselines of its paper"
    for scale, plan in claim.scales.items():
        assert problems(claim, scale) == []
        assert plan.seeds >= 5
    assert "small" in claim.scales
