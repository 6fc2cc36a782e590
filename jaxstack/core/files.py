"""Files that outlive a crash: replaced whole, and moved aside instead of deleted when they are damaged."""

import contextlib
import os
from pathlib import Path

from jaxstack.core.errors import UserError


def write_whole(path: Path, text: str) -> None:
    """Replace a file so that no reader, crash or full disk leaves half of it. Raises `UserError`."""
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as e:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({e.strerror})") from e


def free_name(path: Path, folder: Path) -> Path:
    """A name like `path`'s that nothing in `folder` has; makes the folder."""
    folder.mkdir(exist_ok=True)
    target, number = folder / path.name, 1
    while target.exists():
        number += 1
        target = folder / f"{path.name}-{number}"
    return target


def set_aside(path: Path, folder: Path) -> Path:
    """Move a file or directory into `folder`; returns its new path."""
    return path.rename(free_name(path, folder))
