"""Devices of `jaxstack.edge.cleave`: drawn ones, and those of a table."""

from pathlib import Path

import numpy as np

from jaxstack.core.errors import UserError
from jaxstack.edge.cleave import Devices

COLUMNS = ("memory", "speed", "down", "up", "latency")
"""GB, TFLOP/s, MB/s, MB/s, ms."""
UNITS = (1e9, 1e12, 1e6, 1e6, 1e-3)
MIDDLE = (4.0, 2.0, 25.0, 5.0, 20.0)
"""Between phones and laptops: a downlink of five times the uplink."""


def drawn(count: int, spread: float = 10.0, seed: int = 0) -> Devices:
    """Devices around the middle of phones and laptops.

    Args:
        count: p.
        spread: largest over smallest speed, downlink and uplink, each log-uniform on its own; 1: all alike.
        seed: of the draws.

    Returns:
        Devices of 4 GB and 20 ms.
    """
    by = spread ** (np.random.default_rng(seed).uniform(size=(3, count)) - 0.5)
    factors = np.concatenate([np.ones((1, count)), by, np.ones((1, count))])
    return Devices(*(m * u * f for m, u, f in zip(MIDDLE, UNITS, factors)))


def read(path: str | Path) -> Devices:
    """A CSV table with a row per device and the columns memory (GB), speed (TFLOP/s), down, up (MB/s), latency (ms).

    Raises:
        UserError: for a file that is none, missing columns, and numbers that make no sense.
    """
    import pandas as pd

    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: cannot be read as a table of devices ({e})") from e
    if missing := [name for name in COLUMNS if name not in table]:
        raise UserError(f"{path}: found no column {missing[0]}, expected {', '.join(COLUMNS)}")
    if table.empty:
        raise UserError(f"{path}: found no devices, expected one row for each")
    for name in COLUMNS:
        values = np.asarray(pd.to_numeric(table[name], errors="coerce"), float)
        ok, expected = (values >= 0, "0 or more") if name == "latency" else (values > 0, "above 0")
        ok &= np.isfinite(values)
        if not ok.all():
            row = int(np.flatnonzero(~ok)[0])
            raise UserError(f"{path}: row {row + 2}: found {name}={table[name][row]}, expected a number {expected}")
    return Devices(*(table[name].to_numpy(float) * unit for name, unit in zip(COLUMNS, UNITS)))
