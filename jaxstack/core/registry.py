"""Names on the command line -> objects, loaded when asked for."""

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from jaxstack.core.errors import UserError, unknown


class Registry(Mapping[str, str]):
    """A table `name -> "module:attribute"`; nothing is imported until `load`.

    Names can be added at run time: `registry.add("mine", "my_package.mine:mine")`.
    """

    def __init__(self, kind: str, table: Mapping[str, str]):
        self.kind = kind
        self._table = dict(table)

    def __getitem__(self, name: str) -> str:
        if name not in self._table:
            raise unknown(self.kind, name, self._table)
        return self._table[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)

    def add(self, name: str, target: str) -> None:
        """Register `name`; raises `UserError` if it is taken by another target or not of the form module:attribute."""
        if target.count(":") != 1:
            raise UserError(f"{self.kind} {name!r}: target {target!r} must have the form 'module:attribute'")
        if self._table.get(name, target) != target:
            raise UserError(f"{self.kind} {name!r} is already registered as {self._table[name]!r}")
        self._table[name] = target

    def load(self, name: str) -> Any:
        """The object behind `name`; raises `UnknownName` with the nearest names."""
        module, attribute = self[name].split(":")
        return getattr(import_module(module), attribute)
