"""Names on the command line -> objects, loaded when asked for."""

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from jaxstack.core.errors import UserError, unknown


class Registry(Mapping[str, str]):
    """A table `name -> "module:attribute"`; nothing is imported until `load`.

    A name of the form `module:attribute` stands for itself. Names can be added at run time:
    `registry.add("mine", "my_package.mine:mine")`, which adds them to the registry `within`, too.
    """

    def __init__(self, kind: str, table: Mapping[str, str], within: "Registry | None" = None):
        self.kind = kind
        self._table = dict(table)
        self._within = within
        self._added: set[str] = set()

    def __getitem__(self, name: str) -> str:
        if name in self._table:
            return self._table[name]
        if own(name):
            return name
        raise unknown(self.kind, name, self._table)

    def __contains__(self, name: object) -> bool:
        return name in self._table

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)

    def add(self, name: str, target: str, overwrite: bool = False) -> None:
        """Register a name.

        Args:
            name: The name.
            target: `module:attribute`.
            overwrite: Replace another target of that name, as notebooks do.

        Raises:
            UserError: If the name is taken by another target, or the target has another form.
        """
        if not own(target):
            raise UserError(f"{self.kind} {name!r}: target {target!r} must have the form 'module:attribute'")
        if self._table.get(name, target) != target and not overwrite:
            taken = self._table[name]
            raise UserError(f"{self.kind} {name!r} is already registered as {taken!r}; overwrite=True replaces it")
        if self._within is not None:
            self._within.add(name, target, overwrite)
        self._table[name] = target
        self._added.add(name)

    def load(self, name: str) -> Any:
        """The object behind `name`. Raises `UnknownName` with the nearest names, `UserError` where a user's module or
        its attribute is not found."""
        module, _, attribute = self[name].partition(":")
        found = self.module(name)
        if not hasattr(found, attribute):
            raise unknown(f"attribute of module {module}", attribute, [n for n in vars(found) if n[0] != "_"])
        return getattr(found, attribute)

    def module(self, name: str) -> Any:
        """The module that holds the object behind `name`; raises as `load` does."""
        module = self[name].partition(":")[0]
        try:
            return import_module(module)
        except ModuleNotFoundError as e:
            built_in = name in self._table and name not in self._added
            if built_in or e.name is None or not f"{module}.".startswith(f"{e.name}."):
                raise
            raise UserError(f"{self.kind} {name!r}: no module named {e.name!r} is found") from e


def own(name: str) -> bool:
    """Whether `name` has the form `module:attribute`."""
    module, colon, attribute = name.partition(":")
    return bool(colon) and attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))
