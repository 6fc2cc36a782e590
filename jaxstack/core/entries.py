"""What an option such as `--wrap frame_stack=4` or `--network "cnn={channels: [16, 32]}"` asks for."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxstack.core import config
from jaxstack.core import options as texts
from jaxstack.core.errors import UserError
from jaxstack.core.registry import Registry


def read(registry: Registry, entry: str, where: str, but: Sequence[str] = ()) -> tuple[Callable[..., Any], dict]:
    """Look up an entry.

    Args:
        registry: Where its name is looked up.
        entry: `name`, `name=value` of its first option, `name=[value, ...]` in order or `name={option: value}`; the
            name is one of the registry or `module:attribute` of one's own.
        where: What messages begin with.
        but: Names of arguments that are no options.

    Returns:
        What stands behind the name, and its options.

    Raises:
        UserError: For an unknown name or option, and a value that does not fit.
    """
    name, eq, text = entry.partition("=")
    factory = registry.load(name)
    known = {n: kind for n, kind in config.options_of(factory).items() if n not in but}
    value = texts.load(text, where) if eq else {}
    if not isinstance(value, dict):
        values = value if isinstance(value, list) else [value]
        if len(values) > len(known):
            raise UserError(f"{where}: found {len(values)} values, expected at most {len(known)}")
        value = dict(zip(known, values))
    given = {k: texts.as_tuple(v) for k, v in value.items()}
    return factory, config.check_options(given, known, f"{registry.kind} {name!r}")
