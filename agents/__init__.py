"""Agents by name: `make("hypermarl", env="dispersion", lr=3e-4)` gives a `Learner`."""

from importlib import import_module
from typing import Any

from jaxstack.core.learner import Learner
from jaxstack.core.registry import Registry

__all__ = ["AGENTS", "config_class", "make"]

AGENTS = Registry(
    "agent",
    {
        "ppo": "jaxstack.agents.ppo:ppo",
        "ippo": "jaxstack.agents.ippo:ippo",
        "mappo": "jaxstack.agents.mappo:mappo",
        "hypermarl": "jaxstack.agents.hypermarl:hypermarl",
        "happo": "jaxstack.agents.happo:happo",
        "dico": "jaxstack.agents.dico:dico",
        "kaleidoscope": "jaxstack.agents.kaleidoscope:kaleidoscope",
    },
)
"""Name -> factory; the factory's module holds its `Config`. `AGENTS.add(name, "module:factory")` registers another."""


def config_class(name: str) -> Any:
    """The agent's frozen Config class; raises `UnknownName` with the nearest names."""
    return import_module(AGENTS[name].split(":")[0]).Config


def make(name: str, config: Any = None, **changes: Any) -> Learner:
    """The agent's learner from a Config, from field values (hyperparameters among them), or both."""
    from jaxstack.core.config import replace

    config = config_class(name)() if config is None else config
    return AGENTS.load(name)(replace(config, **changes) if changes else config)
