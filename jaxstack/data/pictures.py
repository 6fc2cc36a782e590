"""Picture files, with their faults as one line."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from jaxstack.core.errors import UserError

MOST_PIXELS = 30_000_000


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """A picture of one frame, with every fault of the file as a `UserError` that begins with the path."""
    path, size = Path(path), 0
    try:
        size = path.stat().st_size
        if not size:
            raise UserError(f"{path}: empty file")
        with Image.open(path) as image:
            if image.width * image.height > MOST_PIXELS:
                raise UserError(
                    f"{path}: found {image.width} x {image.height} pixels, expected at most {MOST_PIXELS:,} in all"
                )
            frames = getattr(image, "n_frames", 1)
            if frames > 1:
                raise UserError(f"{path}: found {frames} frames, expected one image")
            yield image
    except UserError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as e:
        if "truncated" in str(e).lower():
            raise UserError(f"{path}: truncated, the file ends after {size / 1000:.1f} kB") from e
        reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
        reason = "not a picture of a known kind" if isinstance(e, Image.UnidentifiedImageError) else reason
        raise UserError(f"{path}: cannot be read as an image ({reason})") from e
