"""Learners by name: from the registry, from a stored run, from a policy bundle."""

from pathlib import Path
from typing import Any

from jaxstack.core import bundle
from jaxstack.core import config as configs
from jaxstack.core.bundle import LoadedPolicy
from jaxstack.core.errors import UserError
from jaxstack.core.learner import Learner
from jaxstack.core.registry import Registry, own
from jaxstack.methods import LEARNERS


def config_class(name: str, registry: Registry = LEARNERS) -> Any:
    """The frozen Config class of a learner's module. Raises `UnknownName` with the nearest names."""
    module = registry.module(name)
    if not hasattr(module, "Config"):
        raise UserError(f"{registry.kind} {name!r}: module {module.__name__} has no Config")
    return module.Config


def make(name: str, config: Any = None, registry: Registry = LEARNERS, **changes: Any) -> Learner:
    """A learner by its name, or by `module:attribute` of its factory.

    Args:
        name: see `jaxstack list`.
        config: of the learner's Config class; default: its defaults.
        registry: where names are looked up.
        **changes: field values that differ, hyperparameters among them.

    Returns:
        The learner. One given by `module:attribute` has that as its name, by which stored runs and bundles find it.

    Raises:
        UserError: for an unknown name or option, or a value that does not fit.
    """
    config = config_class(name, registry)() if config is None else config
    learner = registry.load(name)(configs.replace(config, **changes) if changes else config)
    return learner._replace(name=name) if own(name) else learner


def from_plain(name: str, fields: Any, source: str) -> Learner:
    """A learner from its name and the plain fields of its config, as files store them. Raises `UserError` naming
    `source`."""
    return make(name, configs.from_dict(config_class(name), fields, source))


def load_policy(path: str | Path) -> LoadedPolicy:
    """A trained policy from its bundle, as `jaxstack export` and every run write it.

    Args:
        path: the bundle's directory.

    Returns:
        The policy; `act(obs [B, A, *obs_shape])` gives actions [B, A, ...].

    Raises:
        UserError: naming the file that is missing, damaged or does not fit.
    """
    return bundle.load_policy(path, from_plain)
