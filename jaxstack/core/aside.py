"""Compiling in threads of its own, so that a signal may end the wait for it.

XLA's compiler, called from the main thread, releases its caller's objects when a signal's handler raises, but keeps
using them: the process then ends with a segmentation fault, at once or at its exit (seen with jaxlib 0.10.2 on CPU).
Other threads do not handle signals.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from jaxstack.core import signals

_PREFIX = "compile "


def begin(name: str, work: Callable[[], Any]) -> Future[Any]:
    """Begin to compile, unless a signal came before; `result()` of what is returned waits for it, in the main thread
    until a signal's handler raises."""
    signals.check()
    thread = ThreadPoolExecutor(1, f"{_PREFIX}{name}")
    future = thread.submit(work)
    thread.shutdown(wait=False)
    return future


def running() -> bool:
    """Whether something is being compiled: a process that ends itself the usual way would wait for it."""
    return any(t.name.startswith(_PREFIX) for t in threading.enumerate())
