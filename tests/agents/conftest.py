import sys
from pathlib import Path

import pytest

from jaxstack import envs

sys.path.insert(0, str(Path(__file__).parent))  # probes, training


@pytest.fixture(autouse=True)
def probe_env(monkeypatch):
    """The id "probe", known to the tests of this folder only."""
    monkeypatch.setitem(envs.NATIVE._table, "probe", "probes:Probe")
