"""A trace of what the devices do, for TensorBoard's profiler plugin, XProf or https://ui.perfetto.dev."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax

from jaxstack.core import distributed


@contextlib.contextmanager
def trace(directory: str, now: bool = True) -> Iterator[None]:
    """Write what runs inside to `directory`, if that is given and it is time: one dispatch is enough to read, and the
    first may still allocate. Of several processes the first one writes."""
    if not directory or not now or not distributed.is_first():
        yield
        return
    with jax.profiler.trace(str(Path(directory)), create_perfetto_trace=True):
        yield
