"""Real text as bytes: corpora, train/validation split, windows, perplexity.

Without a path the corpus is the reference documentation that ships with Python (`pydoc_data.topics`, 0.47 MB of
English and code, PSF licence), so that nothing is downloaded. The first part of a corpus trains, its end validates.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.core.config import require, require_at_least
from jaxstack.core.errors import UserError
from jaxstack.core.learner import Key
from jaxstack.sequence.model import check_tokens
from jaxstack.sequence.tasks import Batch, Task

VOCAB = 256


def encode(text: str) -> np.ndarray:
    """UTF-8 bytes [N] as int32."""
    return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)


def decode(tokens: Array | np.ndarray) -> str:
    """Bytes [N] -> text; what is no UTF-8 becomes the replacement character. Raises `UserError` for other numbers."""
    check_tokens(tokens, VOCAB)
    return np.asarray(tokens).astype(np.uint8).tobytes().decode("utf-8", errors="replace")


def load(path: str | Path = "") -> np.ndarray:
    """A corpus as uint8 [N]: a file of any kind (memory-mapped), the .txt files of a folder in order of their names
    joined by newlines, or Python's documentation for "". Raises `UserError` for a path without text."""
    if not str(path):
        return _documentation()
    path = Path(path)
    try:
        if path.is_dir():
            files = sorted(path.glob("*.txt"))
            if not files:
                raise UserError(f"corpus {path}: holds no .txt files")
            return np.frombuffer(b"\n".join(f.read_bytes() for f in files), np.uint8)
        if path.stat().st_size == 0:
            raise UserError(f"corpus {path}: is empty")
        return np.memmap(path, np.uint8, mode="r")
    except OSError as e:
        raise UserError(f"corpus {path}: cannot be read ({e.strerror})") from e


def _documentation() -> np.ndarray:
    from pydoc_data.topics import topics

    return np.frombuffer("\n".join(topics[name] for name in sorted(topics)).encode("utf-8"), np.uint8)


def split(corpus: np.ndarray, valid_fraction: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """(training part, validation part): the last `valid_fraction` of the corpus validates. Raises `UserError` unless
    the fraction lies in (0, 1)."""
    if not 0 < valid_fraction < 1:
        raise UserError(f"valid_fraction={valid_fraction!r}: expected a number between 0 and 1")
    cut = len(corpus) - max(round(len(corpus) * valid_fraction), 1)
    return corpus[:cut], corpus[cut:]


@dataclass(frozen=True)
class Text(Task):
    """Next-byte prediction on windows of length + 1 bytes at random places; `test` draws from the validation part.

    The corpus stays on the device; one that does not fit there goes through the runner's data, as
    `data.sources.HostData(windows(corpus, ...))`.
    """

    length: int = 128
    path: str = ""
    """A file or a folder of .txt files; see `load`."""
    valid_fraction: float = 0.1

    reads: ClassVar[bool] = True

    @property
    def num_tokens(self) -> int:
        return VOCAB

    def validate(self) -> None:
        require_at_least(self, 1, "length")
        for part in self.parts():
            require(
                self, "length", self.length < len(part), f"less than {len(part)}, the bytes of a part of the corpus"
            )

    def parts(self) -> tuple[np.ndarray, np.ndarray]:
        """Training and validation bytes."""
        return split(load(self.path), self.valid_fraction)

    def data(self, test: bool) -> np.ndarray:
        """Training or validation bytes [N]."""
        return self.parts()[test]

    def example(self, key: Key, test: bool) -> Batch:
        return self.draw(key, test, self.data(test))

    def draw(self, key: Key, test: bool, data: Any) -> Batch:
        data = jnp.asarray(data)
        start = jax.random.randint(key, (), 0, data.shape[0] - self.length)
        window = jax.lax.dynamic_slice_in_dim(data, start, self.length + 1).astype(jnp.int32)
        return Batch(window[:-1], window[1:], jnp.ones(self.length, bool))


def windows(corpus: np.ndarray, length: int, batch_size: int, seed: int = 0) -> Callable[[int], Batch]:
    """step -> `batch_size` windows (numpy) at random places, for `data.sources.HostData`; reads what it returns."""
    if not 1 <= length < len(corpus):
        raise UserError(f"length={length!r}: expected 1 to {len(corpus) - 1}, less than the bytes of the corpus")

    def batch(step: int) -> Batch:
        starts = np.random.default_rng((seed, step)).integers(0, len(corpus) - length, batch_size)
        window = np.stack([corpus[s : s + length + 1] for s in starts]).astype(np.int32)
        return Batch(window[:, :-1], window[:, 1:], np.ones((batch_size, length), bool))

    return batch


def blocks(corpus: np.ndarray, length: int, batch_size: int) -> list[Batch]:
    """The whole corpus once, in order: batches of windows that do not overlap in what they predict.

    Every byte but the first is a target exactly once; the last batch is filled up with unscored rows.
    """
    if len(corpus) < 2:
        raise UserError(f"corpus of {len(corpus)} bytes: expected at least 2")
    predicted = len(corpus) - 1
    rows = -(-predicted // length)
    rows += -rows % batch_size
    padded = np.zeros(rows * length + 1, np.int32)
    padded[: len(corpus)] = corpus
    tokens, targets = padded[:-1].reshape(rows, length), padded[1:].reshape(rows, length)
    mask = (np.arange(rows * length) < predicted).reshape(rows, length)
    parts = range(0, rows, batch_size)
    return [Batch(*(x[i : i + batch_size] for x in (tokens, np.where(mask, targets, 0), mask))) for i in parts]


def perplexity(nats: float) -> float:
    """Return exp of a mean cross entropy in nats per byte."""
    return math.exp(nats)


def bits_per_byte(nats: float) -> float:
    """Convert nats to bits."""
    return nats / math.log(2.0)
