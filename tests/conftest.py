import os
from importlib.metadata import version

import pytest

# before jax starts: a compilation cache shared by all workers, no accelerator, no threads fighting over two cores
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAXSTACK_PROGRESS", "off")
os.environ.setdefault("MPLBACKEND", "agg")
# tests compile far longer than they compute; XLA's cheapest code generation halves their time
FAST_COMPILE = {"--xla_backend_optimization_level": "0"}
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # later ones do not know it, and end the process
    FAST_COMPILE["--xla_cpu_use_fusion_emitters"] = "false"
for flag, value in FAST_COMPILE.items():
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={value}".strip()
if os.environ.get("JAXSTACK_CACHE") != "off":
    cache = os.environ.get("JAXSTACK_CACHE") or os.path.expanduser("~/.cache/jaxstack/xla")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")


def pytest_configure(config):
    # slow tests and claims run only when asked for: -m slow, -m claim, -m "slow or claim"
    if not config.option.markexpr:
        config.option.markexpr = "not slow and not claim"


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item):
    # a worker that runs hundreds of tests would run out of memory mappings and die in XLA
    item.session.tests_run = count = getattr(item.session, "tests_run", 0) + 1
    if count % 8 == 0:
        from jaxstack.core import ledger

        ledger.spare_mappings(0.3)
