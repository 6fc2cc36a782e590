"""Typed, frozen configs: checked where they are made, one YAML form, one command-line form."""

import dataclasses
import sys
import types
import typing
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

from jaxstack.core.errors import UserError, unknown

C = TypeVar("C")


@dataclasses.dataclass(frozen=True)
class Config:
    """Base of every method's config: types are checked first, then `validate` checks values and combinations.

    Numeric hyperparameters (traced, sweepable) stand in one NamedTuple field called `hypers`.
    """

    def __post_init__(self) -> None:
        for field, hint in _hints(type(self)).items():
            value = _coerce(getattr(self, field), hint, f"{type(self).__qualname__}.{field}")
            object.__setattr__(self, field, value)
        self.validate()

    def validate(self) -> None:
        """Override: raise `UserError` through `require` for wrong values."""


def require(config: Any, field: str, ok: bool, expected: str) -> None:
    """Raise a `UserError` that names the field, its value and what is expected, unless `ok`."""
    if not ok:
        value: Any = config
        for part in field.split("."):
            value = getattr(value, part)
        raise UserError(f"{field}={value!r}: expected {expected}")


def require_positive(config: Any, *fields: str) -> None:
    """Each field must be > 0."""
    for field in fields:
        value = _get(config, field)
        require(config, field, value > 0, "a number > 0")


def require_at_least(config: Any, low: float, *fields: str) -> None:
    """Each field must be >= low."""
    for field in fields:
        require(config, field, _get(config, field) >= low, f"a number >= {low:g}")


def require_unit(config: Any, *fields: str) -> None:
    """Each field must lie in [0, 1]."""
    for field in fields:
        require(config, field, 0 <= _get(config, field) <= 1, "a number in [0, 1]")


def replace(config: C, **changes: Any) -> C:
    """`dataclasses.replace` that also reaches the hypers; unknown names raise with the nearest ones."""
    names = [f.name for f in dataclasses.fields(config)]  # pyright: ignore[reportArgumentType]
    hypers = getattr(config, "hypers", None)
    inner = {} if hypers is None else {k: changes.pop(k) for k in list(changes) if k in hypers._fields}
    for name in changes:
        if name not in names:
            raise unknown("option", name, [*names, *(hypers._fields if hypers is not None else ())])
    if inner and hypers is not None:
        changes["hypers"] = changes.get("hypers", hypers)._replace(**inner)
    return dataclasses.replace(config, **changes)  # pyright: ignore[reportArgumentType,reportReturnType,reportType]


def to_dict(config: Any) -> dict[str, Any]:
    """Plain dicts, lists and scalars, in field order."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def from_dict(cls: type[C], data: Any, source: str = "config") -> C:
    """Build `cls`; missing fields take their defaults. Raises `UserError` naming `source` and the field."""
    if not isinstance(data, dict):
        raise UserError(f"{source}: expected a mapping of fields, found {type(data).__name__}")
    hints = _hints(cls)
    for name in data:
        if name not in hints:
            raise unknown(f"field in {source}", str(name), hints)
    try:
        return cls(**{k: _coerce(v, hints[k], f"{source}: {k}") for k, v in data.items()})
    except UserError:
        raise
    except (TypeError, ValueError) as e:
        raise UserError(f"{source}: {e}") from e


def to_yaml(config: Any) -> str:
    """YAML text that `from_yaml` reads back to an equal config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def from_yaml(cls: type[C], text: str, source: str = "config") -> C:
    """Raises `UserError` naming `source` when the text is no YAML or does not fit `cls`."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise UserError(f"{source}: not valid YAML: {' '.join(str(e).split())}") from e
    return from_dict(cls, data, source)


def _get(config: Any, field: str) -> Any:
    for part in field.split("."):
        config = getattr(config, part)
    return config


def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _is_named_tuple(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {k: _plain(v) for k, v in zip(value._fields, value)}  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return value


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """`value` as `hint` asks, where nothing is lost (int -> float, list -> tuple, dict -> config); else `UserError`."""
    origin = get_origin(hint)
    if hint is Any:
        return value
    if origin is Literal:
        if value not in get_args(hint):
            raise UserError(f"{where}={value!r}: expected one of {', '.join(map(repr, get_args(hint)))}")
        return value
    if origin in (Union, types.UnionType):
        errors = []
        for option in get_args(hint):
            try:
                return _coerce(value, option, where)
            except UserError as e:
                errors.append(str(e).split(": expected ")[-1])
        raise UserError(f"{where}={value!r}: expected {' or '.join(dict.fromkeys(errors))}")
    if hint is type(None):
        if value is not None:
            raise UserError(f"{where}={value!r}: expected nothing (null)")
        return None
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where}={value!r}: expected a list")
        args = get_args(hint)
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(kinds) != len(value):
            raise UserError(f"{where}={value!r}: expected {len(kinds)} values")
        return tuple(_coerce(v, k, f"{where}[{i}]") for i, (v, k) in enumerate(zip(value, kinds)))
    if _is_named_tuple(hint):
        if isinstance(value, hint):
            value = value._asdict()  # pyright: ignore[reportAttributeAccessIssue]
        if not isinstance(value, dict):
            raise UserError(f"{where}={value!r}: expected a mapping of {hint.__name__} fields")
        inner = typing.get_type_hints(hint)
        for name in value:
            if name not in inner:
                raise unknown(f"field in {where}", str(name), inner)
        return hint(**{k: _coerce(v, inner[k], f"{where}.{k}") for k, v in value.items()})
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, where)  # pyright: ignore
    if hint is bool:
        ok, expected = isinstance(value, bool), "true or false"
    elif hint is int:
        ok, expected = isinstance(value, int) and not isinstance(value, bool), "a whole number"
    elif hint is float:
        if isinstance(value, str):  # YAML 1.1 reads 1e-5 as text
            try:
                value = float(value)
            except ValueError:
                raise UserError(f"{where}={value!r}: expected a finite number") from None
        ok = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        expected = "a finite number"
        value = float(value) if ok else value
    elif isinstance(hint, type):
        ok, expected = isinstance(value, hint), {str: "text"}.get(hint, hint.__name__)
    else:
        ok, expected = True, ""
    if not ok:
        raise UserError(f"{where}={value!r}: expected {expected}")
    return value
