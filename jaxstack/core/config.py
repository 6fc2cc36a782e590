"""Typed, frozen configs: checked where they are made, one YAML form, one command-line form."""

import collections.abc
import contextlib
import contextvars
import dataclasses
import enum
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin

import numpy as np

from jaxstack.core import options as texts
from jaxstack.core.errors import UserError, unknown

C = TypeVar("C")
_watches: contextvars.ContextVar[tuple[list[type], ...]] = contextvars.ContextVar("watches", default=())


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

    if not TYPE_CHECKING:  # with it, any attribute would pass

        def __getattribute__(self, name: str) -> Any:
            if name == "hypers":
                for found in _watches.get():
                    found.append(type(self))
            return object.__getattribute__(self, name)


@contextlib.contextmanager
def watched() -> Iterator[list[type]]:
    """Note which classes of configs have their numbers (`hypers`) read in the block: what is traced there then depends
    on their values."""
    found: list[type] = []
    before = _watches.set((*_watches.get(), found))
    try:
        yield found
    finally:
        _watches.reset(before)


def numbers(config: Any) -> Any:
    """The numeric hyperparameters of a method's config, a NamedTuple."""
    return config.hypers


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
    return {f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


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
    return texts.dump(to_dict(config))


def from_yaml(cls: type[C], text: str, source: str = "config") -> C:
    """Raises `UserError` naming `source` when the text is no YAML or does not fit `cls`."""
    return from_dict(cls, texts.load(text, source), source)


def options_of(factory: Callable[..., Any], base: type = object) -> dict[str, Any]:
    """The options that `factory` takes by name, with their types.

    They are those of its signature and, as long as a class passes others on (`**kwargs`), of the classes below it, up
    to `base`. A parameter without annotation has the type of its default, where a whole number stands for any number.
    The entry "**" says that others, which no signature names, are taken too.
    """
    found: dict[str, Any] = {}
    passes_on = True
    for owner in factory.__mro__ if isinstance(factory, type) else [factory]:
        if owner is base or not passes_on:
            break
        if isinstance(owner, type) and "__init__" not in vars(owner):
            continue
        call: Any = vars(owner)["__init__"] if isinstance(owner, type) else owner
        parameters = list(inspect.signature(call).parameters.values())
        try:
            hints = typing.get_type_hints(call)
        except (NameError, AttributeError, TypeError):  # names that only a type checker knows
            hints = {}
        for p in parameters[1:] if isinstance(owner, type) else parameters:
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
                found.setdefault(p.name, hints.get(p.name, _type_of(p.default)))
        passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return found | ({"**": Any} if passes_on and found else {})


def check_options(values: Mapping[str, Any], known: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """`values` as the types `known` (by name, see `options_of`) ask. Raises `UserError` naming `owner` and the option
    that is unknown or does not fit."""
    for name in values:
        if name not in known and "**" not in known:
            raise unknown(f"option of {owner}", name, known)
    return {name: _coerce(value, known.get(name, Any), f"{owner}: {name}") for name, value in values.items()}


def _type_of(default: Any) -> Any:
    if default is inspect.Parameter.empty or default is None:
        return Any
    kind = type(default)
    if kind is int:
        return int | float
    return kind if kind in (bool, float, str) else Any


def _get(config: Any, field: str) -> Any:
    for part in field.split("."):
        config = getattr(config, part)
    return config


def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _is_named_tuple(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields")


def plain(value: Any) -> Any:
    """A field's value as dicts, lists and scalars."""
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {k: plain(v) for k, v in zip(value._fields, value)}  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(value, tuple):
        return [plain(v) for v in value]
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
    if origin in (list, collections.abc.Sequence):  # of libraries; as a tuple, which is hashable
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where}={value!r}: expected a list")
        return tuple(_coerce(v, get_args(hint)[0], f"{where}[{i}]") for i, v in enumerate(value))
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
    if isinstance(hint, type) and issubclass(hint, enum.Enum) and isinstance(value, str):
        names = {str(m.value): m for m in hint} | dict(hint.__members__)
        if value not in names:
            raise UserError(f"{where}={value!r}: expected one of {', '.join(str(m.value) for m in hint)}")
        return names[value]
    if hint in (bool, int, float) and isinstance(value, np.generic):
        value = value.item()
    if hint in (int, float) and isinstance(value, str):
        number = texts.number(value)
        value = value if number is None else number
    if hint is bool:
        ok, expected = isinstance(value, bool), "true or false"
    elif hint is int:
        if isinstance(value, float) and value.is_integer():  # 1e5
            value = int(value)
        ok, expected = isinstance(value, int) and not isinstance(value, bool), "a whole number"
    elif hint is float:
        ok = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        expected = "a finite number"
        value = float(value) if ok else value
    elif isinstance(hint, type):
        ok, expected = isinstance(value, hint), "text" if hint is str else hint.__name__
    else:
        ok, expected = True, ""
    if not ok:
        raise UserError(f"{where}={value!r}: expected {expected}")
    return value
