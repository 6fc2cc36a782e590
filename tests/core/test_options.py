"""One reader of numbers: what people write is read as they mean it, and as YAML 1.2 says."""

import dataclasses
import math

import pytest
import tyro
import yaml
from hypothesis import given
from hypothesis import strategies as st

from jaxstack.core import options
from jaxstack.core.errors import UserError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-2", 0.05),
        ("1e5", 1e5),
        ("-1E-3", -1e-3),
        ("1_000_000", 1_000_000),
        ("-1_0.5", -10.5),
        ("3.", 3.0),
        (".5", 0.5),
        ("010", 10),
        (".inf", math.inf),
        ("1__0", "1__0"),
        ("1e", "1e"),
        ("1:30", "1:30"),
        ("on", "on"),
        ("2024-01-01", "2024-01-01"),
        ("true", True),
        ("", None),
        ("~", None),
        ("'1e5'", "1e5"),
        ("[1e-4, [2, x]]", [1e-4, [2, "x"]]),
    ],
)
def test_texts_are_read(text, value):
    got = options.load(text, "x")
    assert got == value
    assert type(got) is type(value)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), st.lists))
def test_what_is_written_is_read_back_by_us_and_by_any_other_reader(value):
    assert options.load(options.dump(value), "x") == value
    assert yaml.safe_load(options.dump(value)) == value


def test_numbers_for_parsers():
    assert options.whole("1e5") == 100_000
    assert type(options.whole("1e5")) is int
    assert options.real(" 1_0 ") == 10.0
    for wrong in ("1.5", "x", "", "inf", "nan"):
        with pytest.raises(UserError, match="expected a whole number"):
            options.whole(wrong)
    with pytest.raises(UserError, match="'fast': expected a number"):
        options.real("fast")


def test_entries_become_a_mapping():
    assert options.parse(("a=1e2", "b=[1, x]", "c=", "d=x=y"), "args") == {
        "a": 100.0,
        "b": (1, "x"),
        "c": None,
        "d": "x=y",
    }
    for entries, message in (
        (("a",), "args: 'a': expected name=value"),
        (("=1",), "expected name=value"),
        (("a=1", "a=2"), "a is given twice"),
        (("a=[1",), r"args: 'a=\[1': not valid YAML"),
    ):
        with pytest.raises(UserError, match=message):
            options.parse(entries, "args")


@dataclasses.dataclass
class Flags:
    count: int = 1
    rate: float = 1.0
    sizes: tuple[int, ...] = ()
    limit: int | None = None


def test_flags_read_the_same_numbers(capsys):
    got = tyro.cli(Flags, args="--count 1e5 --rate 1_0 --sizes 1e1 2 --limit 2e0".split(), registry=options.registry())
    assert got == Flags(100_000, 10.0, (10, 2), 2)
    with pytest.raises(SystemExit):
        tyro.cli(Flags, args=["--count", "1.5"], registry=options.registry())
    assert "--count: '1.5': expected a whole number" in capsys.readouterr().err
