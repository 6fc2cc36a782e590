"""Errors that a user can mend. The command line prints them as one line and exits with 2."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Wrong input: the message names the field or file, the value found, and what was expected."""


class UnknownName(UserError, KeyError):
    """A name that is in no table; the message offers the nearest ones."""

    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0])


def unknown(kind: str, name: str, known: Iterable[str]) -> UnknownName:
    """`UnknownName` with the nearest known names, or all of them when they are few."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    lowered = {n.lower(): n for n in names}
    near = near or [lowered[n] for n in difflib.get_close_matches(name.lower(), list(lowered), n=3, cutoff=0.4)]
    if near:
        hint = f"did you mean {' or '.join(repr(n) for n in near)}?"
    elif len(names) <= 20:
        hint = f"known: {', '.join(names)}"
    else:
        hint = f"there are {len(names)}; see `jaxstack list`"
    return UnknownName(f"unknown {kind} {name!r}: {hint}")
