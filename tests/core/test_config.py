import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from jaxstack.core import config
from jaxstack.core.errors import UnknownName, UserError, unknown
from jaxstack.core.learner import Learner, as_hypers, with_hypers


class Hypers(NamedTuple):
    lr: float = 1e-3
    steps: int = 2


@dataclass(frozen=True)
class Inner(config.Config):
    width: int = 3


@dataclass(frozen=True)
class Example(config.Config):
    name: str = "x"
    on: bool = False
    count: int = 1
    rate: float = 0.5
    mode: Literal["a", "b"] = "a"
    limit: int | None = None
    split: int | Literal["auto"] = 1
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[int, str] = (1, "y")
    anything: Any = None
    inner: Inner = field(default_factory=Inner)
    hypers: Hypers = Hypers()

    def validate(self):
        config.require_positive(self, "hypers.lr")
        config.require_at_least(self, 1, "count")
        config.require_unit(self, "rate")
        config.require(self, "name", self.name != "bad", "a good name")


FULL = Example("n", True, 3, 1, "b", 4, "auto", (), (2, "z"), "q", Inner(5), Hypers(1, 3))


@pytest.mark.parametrize("value", [Example(), FULL])
def test_yaml_round_trip(value):
    text = config.to_yaml(value)
    assert config.from_yaml(Example, text) == value
    assert list(yaml.safe_load(text)) == list(config.to_dict(value))


def test_harmless_conversions_are_made():
    got = config.from_yaml(Example, "{rate: 1, sizes: [4, 5], hypers: {lr: 1e-5}, inner: {width: 2}}")
    assert isinstance(got.rate, float)
    assert isinstance(got.hypers.lr, float)
    assert (got.sizes, got.hypers.lr, got.inner) == ((4, 5), 1e-5, Inner(2))
    assert hash(got) == hash(config.replace(got))


def test_numbers_are_read_as_people_write_them():
    got = config.from_yaml(Example, "{rate: 5e-2, count: 1e5, limit: 1_000, sizes: [1e1], hypers: {steps: 3e0}}")
    assert (got.rate, got.count, got.limit, got.sizes, got.hypers.steps) == (0.05, 100_000, 1000, (10,), 3)
    assert all(type(x) is int for x in (got.count, got.limit, got.sizes[0], got.hypers.steps))
    assert Example(count="2e2", rate="1e-2", limit=np.int64(4)) == Example(count=200, rate=0.01, limit=4)
    text = Example(name="1e5")
    assert config.from_yaml(Example, config.to_yaml(text)) == text


class Colour(enum.Enum):
    RED = "red"


class Below:
    def __init__(self, size: int = 3, *, colour: Colour = Colour.RED, sys=None):
        pass


class Above(Below):
    def __init__(self, weight=0.5, count=2, mode="a", flag=False, sizes: Sequence[float] = (), **rest):
        super().__init__(**rest)


def test_options_are_those_of_the_signatures_with_their_types():
    known = config.options_of(Above)
    assert set(known) == {"weight", "count", "mode", "flag", "sizes", "size", "colour", "sys"}
    assert set(config.options_of(Above, Below)) == {"weight", "count", "mode", "flag", "sizes", "**"}
    values = {"weight": 1, "count": 1e1, "size": "1e1", "colour": "red", "sizes": [1, 2]}
    got = config.check_options(values, known, "a thing")
    assert got == {"weight": 1.0, "count": 10, "size": 10, "colour": Colour.RED, "sizes": (1.0, 2.0)}
    assert type(got["count"]) is int
    assert config.check_options({"count": 1.5}, known, "a thing") == {"count": 1.5}  # no type says that it is whole
    for wrong, message in (
        ({"weigth": 1}, "unknown option of a thing 'weigth': did you mean 'weight'"),
        ({"weight": "x"}, "a thing: weight='x': expected a finite number"),
        ({"flag": 1}, "a thing: flag=1: expected true or false"),
        ({"size": 1.5}, "a thing: size=1.5: expected a whole number"),
        ({"colour": "blue"}, "a thing: colour='blue': expected one of red"),
        ({"sizes": 3}, "a thing: sizes=3: expected a list"),
    ):
        with pytest.raises(UserError, match=message):
            config.check_options(wrong, known, "a thing")
    assert config.check_options({"new": 1}, config.options_of(Above, Below), "a thing") == {"new": 1}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": 3}, "name=3: expected text"),
        ({"name": "bad"}, "name='bad': expected a good name"),
        ({"on": 1}, "on=1: expected true or false"),
        ({"count": 1.5}, "count=1.5: expected a whole number"),
        ({"count": True}, "count=True: expected a whole number"),
        ({"count": 0}, "count=0: expected a number >= 1"),
        ({"count": None}, "count=None: expected a whole number"),
        ({"rate": "fast"}, "rate='fast': expected a finite number"),
        ({"rate": float("nan")}, "rate=nan: expected a finite number"),
        ({"rate": "inf"}, "rate=inf: expected a finite number"),
        ({"rate": 10**400}, "rate=1000*: expected a finite number"),
        ({"rate": 2}, r"rate=2.0: expected a number in \[0, 1\]"),
        ({"mode": "c"}, "mode='c': expected one of 'a', 'b'"),
        ({"limit": "many"}, r"limit='many': expected a whole number or nothing \(null\)"),
        ({"split": "all"}, "split='all': expected a whole number or one of 'auto'"),
        ({"sizes": 3}, "sizes=3: expected a list"),
        ({"sizes": (1, "two")}, r"sizes\[1\]='two': expected a whole number"),
        ({"pair": (1,)}, r"pair=\(1,\): expected 2 values"),
        ({"inner": {"width": "w"}}, "inner: width='w': expected a whole number"),
        ({"inner": {"widht": 1}}, "unknown field in .*inner 'widht': did you mean 'width'"),
        ({"hypers": {"lr": "x"}}, "hypers.lr='x': expected a finite number"),
        ({"hypers": {"lrr": 1}}, "'lrr': did you mean 'lr'"),
        ({"hypers": 3}, "hypers=3: expected a mapping of Hypers fields"),
        ({"hypers": Hypers(lr=0.0)}, "hypers.lr=0.0: expected a number > 0"),
    ],
)
def test_wrong_values_are_named_where_they_are_made_and_read(fields, message):
    with pytest.raises(UserError, match=message):
        Example(**fields)
    with pytest.raises(UserError, match=message):
        config.from_dict(Example, fields, "file.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "c.yaml: not valid YAML"),
        ("", "c.yaml: expected a mapping of fields, found NoneType"),
        ("- 1", "c.yaml: expected a mapping of fields, found list"),
        ("cuont: 1", "unknown field in c.yaml 'cuont': did you mean 'count'"),
        ("3: 1", "unknown field in c.yaml '3'"),
    ],
)
def test_wrong_files_are_named(text, message):
    with pytest.raises(UserError, match=message):
        config.from_yaml(Example, text, "c.yaml")


def test_replace_reaches_hypers_and_checks_again():
    got = config.replace(Example(), count=4, lr=0.1)
    assert (got.count, got.hypers) == (4, Hypers(0.1, 2))
    assert config.replace(Example(), hypers=Hypers(0.5, 6), steps=7).hypers == Hypers(0.5, 7)
    with pytest.raises(UserError, match="lr=-1"):
        config.replace(Example(), lr=-1.0)
    with pytest.raises(UnknownName, match="unknown option 'lrr': did you mean 'lr'"):
        config.replace(Example(), lrr=1.0)
    assert config.replace(Inner(), width=9) == Inner(9)


def test_unknown_names_offer_the_nearest_or_all():
    assert str(unknown("agent", "PPO", ["ppo", "ippo"])).startswith("unknown agent 'PPO': did you mean 'ppo'")
    assert str(unknown("thing", "qqq", ["abc", "def"])) == "unknown thing 'qqq': known: abc, def"
    assert "there are 30" in str(unknown("thing", "qqq", [f"abc{i}" for i in range(30)]))
    error = unknown("thing", "x", [])
    assert isinstance(error, KeyError)
    assert isinstance(error, ValueError)


def learner():
    return Learner(init=lambda key, hypers: None, step=lambda s: (s, {}), hypers=Hypers(), name="toy")


def test_hypers_become_float32_scalars():
    got = as_hypers(Hypers(1, 2))
    assert [x.dtype for x in got] == [jnp.float32] * 2
    assert [x.shape for x in got] == [()] * 2


def test_changed_hypers_are_checked():
    assert with_hypers(learner(), lr=0.5) == Hypers(0.5, 2)
    with pytest.raises(UnknownName, match="unknown hyperparameter of toy 'lrate': did you mean 'lr'"):
        with_hypers(learner(), lrate=1.0)
    with pytest.raises(UserError, match=r"toy\.lr=nan must be finite"):
        with_hypers(learner(), lr=float("nan"))
