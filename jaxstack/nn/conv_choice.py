"""Which form of a convolution runs on a CPU: what was tuned on this machine, else what was measured to be fast.

`jaxstack tune-conv` measures, `save_choices` keeps the choices beside the folder of compiled programs, and the first
convolution that a process lowers reads them.
"""

import functools
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array

from jaxstack.core import cache
from jaxstack.core.devices import available_cores
from jaxstack.core.errors import UserError
from jaxstack.nn.conv_forms import (
    CONV_FORMS,
    KERNEL_FORMS,
    Window,
    conv_dense,
    conv_depthwise,
    conv_pack,
    conv_point,
    conv_rows,
    conv_split,
    kernel_dense,
    kernel_depthwise,
    kernel_pack,
    multiply_adds,
    out_size,
)

FEW_GROUPS = 8
"""So many convolutions one after the other are faster than one of all groups."""
ONE_BLOCK = 64
"""Output channels that one core computes in YNNPACK's convolutions."""
MOST_WASTE = 16
"""Rows of an image for each one that `conv_rows` adds."""
MUCH_WORK = 1 << 22
"""Multiply-adds of a convolution for which it is worth while to wake other cores."""
FEW_ROWS = 1024
"""So many pixels of a batch are faster by a product per group than by one of all groups."""
TUNED: dict[str, str] = {}
"""What was measured to be fastest on this machine, by `signature`; see `jaxstack tune-conv`."""


def machine() -> dict[str, str]:
    """What choices hold for."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {"jax": jax.__version__, "backend": jax.default_backend(), "cpu": cpu, "cores": str(os.cpu_count())}


def choices_file() -> Path:
    """Where choices are kept: conv.json beside the folder of compiled programs."""
    return cache.default_dir().parent / "conv.json"


def save_choices(path: Path | None = None) -> Path:
    """Write what was tuned, with what the file held for the same machine. Raises `UserError`."""
    path = path or choices_file()
    load_choices(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": machine(), "choices": TUNED}, indent=1) + "\n", encoding="utf-8")
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror})") from e
    return path


def load_choices(path: Path | None = None) -> int:
    """Use the choices of a file, where they are this machine's; what this process tuned stays.

    Returns how many there are. Raises `UserError` for a broken file.
    """
    path = path or choices_file()
    if not path.exists():
        return 0
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        choices, forms = content["choices"], {"conv": CONV_FORMS, "kernel": KERNEL_FORMS}
        if not all(form in forms[name.split()[0]] for name, form in choices.items()):
            raise ValueError("unknown form")
        mine = content["machine"] == machine()
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
        raise UserError(f"{path}: is no file of choices ({e}); remove it") from e
    for name, form in choices.items() if mine else ():
        TUNED.setdefault(name, form)
    return len(choices) if mine else 0


@functools.cache
def _load_once() -> None:
    """The user's own choices, when the first convolution is lowered."""
    if os.environ.get("JAXSTACK_CACHE") != "off":
        load_choices()


def tuned(kind: str, first: Array, second: Array, window: Window) -> str | None:
    """The form that was chosen for these shapes, if any was."""
    _load_once()
    return TUNED.get(signature(kind, first, second, window))


def signature(kind: str, first: Any, second: Any, window: Window) -> str:
    """A name for "conv" (image, kernel) or "kernel" (image, cotangent) of given shapes, as in the file of choices."""
    shapes = "x".join(map(str, first.shape)), "x".join(map(str, second.shape))
    flat = [window.size, window.stride, window.spread, window.dilation, *window.padding]
    return " ".join([kind, *shapes, *(f"{a},{b}" for a, b in flat), str(window.groups), str(first.dtype)])


def conv_cpu(x: Array, kernel: Array, *, window: Window) -> Array:
    """The form that was tuned for these shapes, else the one that was measured to be fast: see docs/performance.md."""
    if form := tuned("conv", x, kernel, window):
        return CONV_FORMS[form](x, kernel, window=window)
    if window.groups > 1 and kernel.shape[2] == 1:
        return conv_depthwise(x, kernel, window=window)
    if 1 < window.groups <= FEW_GROUPS:
        return conv_split(x, kernel, window=window)
    if window.groups > 1 and x.shape[0] * math.prod(out_size(x.shape[1:3], window)) <= FEW_ROWS:
        return conv_pack(x, kernel, window=window)
    unpadded = window.spread == (1, 1) and window.padding == ((0, 0), (0, 0))
    if window.groups == 1 and window.size == (1, 1) and (window.stride == (1, 1) or unpadded):
        return conv_point(x, kernel, window=window)
    if window.groups == 1 and on_all_cores(x, kernel, window):
        return conv_rows(x, kernel, window=window)
    return conv_dense(x, kernel, window=window)


def kernel_cpu(x: Array, g: Array, *, window: Window) -> Array:
    """The form that was tuned for these shapes, else the one that was measured to be fast."""
    if form := tuned("kernel", x, g, window):
        return KERNEL_FORMS[form](x, g, window=window)
    if window.groups > 1 and x.shape[3] == window.groups:
        return kernel_depthwise(x, g, window=window)
    return (kernel_pack if window.groups > 1 else kernel_dense)(x, g, window=window)


def on_all_cores(x: Array, kernel: Array, window: Window) -> bool:
    """Whether `conv_rows` was measured to be faster: few output channels, many rows, work for several cores."""
    more = x.shape[1] - out_size(x.shape[1:3], window)[0] + 1
    return (
        len(available_cores()) > 1
        and window.stride == window.spread == (1, 1)
        and kernel.shape[3] <= ONE_BLOCK
        and 0 < more * MOST_WASTE <= x.shape[1]
        and multiply_adds(x.shape, kernel.shape, window) >= MUCH_WORK
    )
