"""What a user types, as values: one reader of numbers, lists and words for the command line, options and YAML files.

YAML 1.1, which PyYAML reads, takes `5e-2` and `1e5` for text, `1:30` for 90, `010` for 8, `on` for true and
`2024-01-01` for a date. Here the core schema of YAML 1.2 holds (https://yaml.org/spec/1.2.2, section 10.3): numbers are
decimal, with an exponent or underscores between digits where one likes; true, false and null are the only words.
"""

import re
from collections.abc import Iterable
from typing import Any

import yaml

from jaxstack.core.errors import UserError

_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_INT = re.compile(rf"[-+]?{_DIGITS}$")
_FLOAT = re.compile(
    rf"[-+]?(?:{_DIGITS}\.(?:{_DIGITS})?(?:[eE][-+]?[0-9]+)?|\.{_DIGITS}(?:[eE][-+]?[0-9]+)?|{_DIGITS}[eE][-+]?[0-9]+"
    r"|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"
)
_WORDS = {
    "tag:yaml.org,2002:bool": (re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    "tag:yaml.org,2002:null": (re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    "tag:yaml.org,2002:int": (_INT, "-+0123456789"),
    "tag:yaml.org,2002:float": (_FLOAT, "-+0123456789."),
    "tag:yaml.org,2002:merge": (re.compile(r"<<$"), "<"),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 - filled below, of this class alone


class _Dumper(yaml.SafeDumper):
    """Also what YAML 1.1 would read as something else is quoted, so that any reader gives back what was written."""


for _tag, (_pattern, _first) in _WORDS.items():
    _Loader.add_implicit_resolver(_tag, _pattern, list(_first))
    _Dumper.add_implicit_resolver(_tag, _pattern, list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
_Loader.add_constructor(
    "tag:yaml.org,2002:float", lambda loader, node: float(re.sub(r"\.(?=inf|nan)", "", node.value.lower()))
)


def load(text: str, source: str) -> Any:
    """The value of a YAML text. Raises `UserError` naming `source` when it is no YAML."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as e:
        raise UserError(f"{source}: not valid YAML: {' '.join(str(e).split())[:200]}") from e


def dump(value: Any) -> str:
    """YAML text of plain dicts, lists and scalars, which `load` reads back to an equal value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


def dump_line(value: Any) -> str:
    """YAML of plain values in one line, which `load` reads back to an equal value."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10**9, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def number(text: str) -> int | float | None:
    """The number that `text` spells (`3`, `-1_000`, `5e-2`, `1e5`, `.5`, `inf`, `nan`), None where it spells none."""
    text = text.strip()
    try:
        return int(text) if _INT.match(text) else float(text)
    except ValueError:
        return None


def whole(text: str) -> int:
    """The whole number that `text` spells, also as `1e5`: for parsers. Raises `UserError` for another text."""
    value = number(text)
    if value is None or value != value or value in (float("inf"), -float("inf")) or int(value) != value:
        raise UserError(f"{text!r}: expected a whole number")
    return int(value)


def real(text: str) -> float:
    """The number that `text` spells: for parsers. Raises `UserError` for another text."""
    value = number(text)
    try:
        return float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, OverflowError):
        raise UserError(f"{text!r}: expected a number") from None


def parse(entries: Iterable[str], field: str) -> dict[str, Any]:
    """`("num_agents=4", "layout=small")` -> `{"num_agents": 4, "layout": "small"}`; lists become tuples.

    Raises `UserError` naming `field` for an entry without `=`, a name given twice and a value that is no YAML.
    """
    out: dict[str, Any] = {}
    for entry in entries:
        name, eq, value = entry.partition("=")
        if not eq or not name:
            raise UserError(f"{field}: {entry!r}: expected name=value")
        if name in out:
            raise UserError(f"{field}: {entry!r}: {name} is given twice")
        out[name] = as_tuple(load(value, f"{field}: {entry!r}"))
    return out


def as_tuple(value: Any) -> Any:
    """Lists, as YAML and JSON have them, as tuples."""
    return tuple(map(as_tuple, value)) if isinstance(value, list) else value


def registry() -> Any:
    """Rules for `tyro.cli(..., registry=)` by which its numbers are read as everywhere else."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    rules = ConstructorRegistry()

    @rules.primitive_rule
    def numbers(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        if info.type is int:
            return PrimitiveConstructorSpec(
                nargs=1,
                metavar="INT",
                instance_from_str=lambda args: whole(args[0]),
                is_instance=lambda x: isinstance(x, int) and not isinstance(x, bool),
                str_from_instance=lambda x: [str(x)],
            )
        if info.type is float:
            return PrimitiveConstructorSpec(
                nargs=1,
                metavar="FLOAT",
                instance_from_str=lambda args: real(args[0]),
                is_instance=lambda x: True if isinstance(x, float) else "~" if type(x) is int else False,
                str_from_instance=lambda x: [str(x)],
            )
        return None

    return rules
