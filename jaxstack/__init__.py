"""jaxstack: agents and sequence models in JAX, trained by one runner.

Importing this package imports nothing heavy and starts no backend; public names are resolved on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> (module, attribute); None means the module itself
_EXPORTS: dict[str, tuple[str, str | None]] = {
    "Learner": ("jaxstack.core.learner", "Learner"),
    "train": ("jaxstack.learners", "train"),
    "sweep": ("jaxstack.sweeps", "sweep"),
    "load_policy": ("jaxstack.learners", "load_policy"),
    "load_dataset": ("jaxstack.data.files", "load_dataset"),
    "make_env": ("jaxstack.envs", "make"),
    "check_env": ("jaxstack.envs", "check_env"),
    "make_agent": ("jaxstack.agents", "make"),
    "make_learner": ("jaxstack.learners", "make"),
    "UserError": ("jaxstack.core.errors", "UserError"),
    "agents": ("jaxstack.agents", None),
    "core": ("jaxstack.core", None),
    "envs": ("jaxstack.envs", None),
    "nn": ("jaxstack.nn", None),
    "sequence": ("jaxstack.sequence", None),
}

if TYPE_CHECKING:
    from jaxstack.agents import make as make_agent
    from jaxstack.core.errors import UserError
    from jaxstack.core.learner import Learner
    from jaxstack.data.files import load_dataset
    from jaxstack.envs import check_env
    from jaxstack.envs import make as make_env
    from jaxstack.learners import load_policy, train
    from jaxstack.learners import make as make_learner
    from jaxstack.sweeps import sweep

__all__ = [
    "Learner",
    "UserError",
    "__version__",
    "check_env",
    "load_dataset",
    "load_policy",
    "make_agent",
    "make_env",
    "make_learner",
    "sweep",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'jaxstack' has no attribute {name!r}")
    module, attribute = _EXPORTS[name]
    value = import_module(module)
    value = value if attribute is None else getattr(value, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
