"""Agents by name: `make("hypermarl", env="dispersion", lr=3e-4)` gives a `Learner`."""

from typing import Any

from jaxstack import learners
from jaxstack.core.learner import Learner
from jaxstack.methods import AGENTS

__all__ = ["AGENTS", "config_class", "make"]


def config_class(name: str) -> Any:
    """The agent's frozen Config class; raises `UnknownName` with the nearest names."""
    return learners.config_class(name, AGENTS)


def make(name: str, config: Any = None, **changes: Any) -> Learner:
    """The agent's learner from a Config, from field values (hyperparameters among them), or both; `name` may be the
    `module:factory` of an agent of your own."""
    return learners.make(name, config, AGENTS, **changes)
