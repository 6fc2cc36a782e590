import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # toy_learners, shared by the tests of the runner


@pytest.fixture(autouse=True)
def nothing_compiled():
    """What a test finds compiled does not depend on the tests before it."""
    from jaxstack.core import memo

    memo.forget()
