import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))  # toy_learners, shared by the tests of the runner
