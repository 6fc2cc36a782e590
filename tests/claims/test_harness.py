import json

import numpy as np
import pytest

from jaxstack.claims import CLAIMS
from jaxstack.claims.harness import Check, Claim, judge, run_claim
from jaxstack.core.errors import UserError


def rows(arm, values):
    return [{"experiment": "e", "arm": arm, "seed": i, "score": v} for i, v in enumerate(values)]


TABLE = rows("high", [2.0, 2.1, 1.9, 2.0, 2.0]) + rows("low", [1.0, 1.1, 0.9, 1.0, 1.0]) + rows("wide", [0, 4, 1, 3, 2])


@pytest.mark.parametrize(
    ("check", "holds"),
    [
        (Check("e", "high", "score", "at_least", 1.9), True),
        (Check("e", "high", "score", "at_least", 2.0), False),  # the interval reaches below
        (Check("e", "wide", "score", "at_least", 1.9), False),  # mean 2, but uncertain
        (Check("e", "low", "score", "at_most", 1.1), True),
        (Check("e", "high", "score", "above", 0.8, other="low"), True),
        (Check("e", "wide", "score", "above", 0.8, other="low"), False),
        (Check("e", "high", "score", "within", 1.2, other="low"), True),
        (Check("e", "high", "score", "within", 0.5, other="low"), False),
        (Check("e", "low", "score", "near", 0.1, target=1.0), True),
        (Check("e", "low", "score", "near", 0.1, target=1.1), False),
    ],
)
def test_verdicts_use_the_interval(check, holds):
    assert judge(check, TABLE).holds is holds


def toy(value):
    return Claim(
        "toy",
        "nobody",
        "high beats low",
        "nothing",
        small=(lambda seeds: rows("high", np.full(seeds, value)) + rows("low", np.zeros(seeds)),),
        full=(),
        checks=(Check("e", "high", "score", "above", 0.5, other="low"),),
    )


@pytest.mark.parametrize(("value", "holds"), [(1.0, True), (0.1, False)])
def test_a_claim_is_recorded_whether_it_holds_or_not(tmp_path, value, holds):
    assert run_claim(toy(value), out=tmp_path) is holds
    record = json.loads((tmp_path / "toy-small.json").read_text())
    assert record["holds"] is holds
    assert record["verdicts"][0]["holds"] is holds
    assert len(record["rows"]) == 10
    assert record["run"]["versions"]["jax"]
    assert (tmp_path / "toy-small.png").stat().st_size > 3000


def test_an_experiment_without_verdicts_does_not_hold(tmp_path):
    empty = toy(1.0)._replace(checks=())
    with pytest.raises((UserError, ValueError)):
        run_claim(empty, out=tmp_path)


def test_wrong_arguments():
    with pytest.raises(UserError, match="scale"):
        run_claim(toy(1.0), scale="huge")
    with pytest.raises(UserError, match="seeds"):
        run_claim(toy(1.0), seeds=1)
    with pytest.raises(UserError, match="no results of arm 'x'"):
        judge(Check("e", "x", "score", "at_least", 0.0), TABLE)


def test_every_registered_claim_loads_and_its_checks_name_real_arms():
    for name in CLAIMS:
        claim = CLAIMS.load(name)
        assert claim.method == name
        assert claim.checks
        assert claim.small
        assert claim.seeds >= 5
