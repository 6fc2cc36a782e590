"""Libraries of environments, imported when one of theirs is made: quietly, and named where they are missing."""

import contextlib
import io
import sys
from collections.abc import Iterator

from jaxstack.core.errors import UserError


@contextlib.contextmanager
def importing(id: str) -> Iterator[None]:
    """Import what an environment needs, in a block.

    Lines that libraries print on import (optional parts that are not there) are dropped. JaxMARL leaves sys.stdout and
    sys.stderr as those of the process, which cuts off a notebook or whoever else had replaced them: they are put back.

    Args:
        id: Of the environment, for the message.

    Raises:
        UserError: Naming the library that is missing.
    """
    before = {name: getattr(sys, name) for name in ("stdout", "stderr", "__stdout__")}
    sink = io.StringIO()
    for name in ("stdout", "__stdout__"):
        setattr(sys, name, sink)
    try:
        yield
    except ModuleNotFoundError as e:
        name = (e.name or str(e)).partition(".")[0]
        raise UserError(f"{id}: the library {name} is missing; pip install {name}") from e
    finally:
        for name, stream in before.items():
            setattr(sys, name, stream)
