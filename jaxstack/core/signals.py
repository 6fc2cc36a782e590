"""SIGINT and SIGTERM, collected so that a run can finish its chunk and save before it ends."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

_at_once: list[list[int]] = []
"""Signals of those that are collected with `at_once`."""
COMPILING = "stopped while compiling, before the first step; nothing was saved"


class Interrupted(Exception):
    """SIGINT or SIGTERM stopped the run while compiling or after a chunk; everything is saved. `signum` tells which."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


@contextlib.contextmanager
def collected(caught: list[int], at_once: bool = False) -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM so that the chunk can finish; a second one, or with `at_once` the first, acts at once.
    Who collects around it is told too. Main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    old: dict[int, Any] = {}

    def collect(number: int) -> Any:
        """Tell all who collect; returns the handler outside of them."""
        caught.append(number)
        outer = getattr(old[number], "collect", None)
        return old[number] if outer is None else outer(number)

    def note(number: int, _: Any) -> None:
        outside = collect(number)
        if at_once:
            raise Interrupted(number, COMPILING)
        signal.signal(number, outside)

    note.collect = collect
    if at_once:
        _at_once.append(caught)

    for s in (signal.SIGINT, signal.SIGTERM):
        old[s] = signal.signal(s, note)
    try:
        yield caught
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)
        if at_once:
            _at_once.remove(caught)


def check() -> None:
    """Raise `Interrupted` for a signal collected with `at_once` whose exception went lost, as it does in a callback of
    the garbage collector."""
    for caught in _at_once:
        if caught:
            raise Interrupted(caught[0], COMPILING)
