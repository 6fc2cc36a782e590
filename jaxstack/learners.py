"""Learners by name: from the registry, from a stored run, from a policy bundle."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxstack.core import bundle, distributed, runner
from jaxstack.core import config as configs
from jaxstack.core.bundle import LoadedPolicy
from jaxstack.core.errors import UserError
from jaxstack.core.job import Callback, Result, RunOptions
from jaxstack.core.learner import Learner
from jaxstack.core.registry import Registry, own
from jaxstack.core.sinks import Sink
from jaxstack.core.source import Source
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


def train(
    learner: Learner | str,
    num_steps: int | None = None,
    seeds: int | Sequence[int] = 1,
    *,
    total_samples: int | None = None,
    hypers: Any = None,
    data: Source | None = None,
    run_dir: str | Path | None = None,
    options: RunOptions = RunOptions(),
    sinks: Sequence[Sink] = (),
    callbacks: Sequence[Callback] = (),
    **changes: Any,
) -> Result:
    """Train a learner with all seeds at once, see `core.runner.train`.

    Args:
        learner: What is trained: a learner, or a name as `make` takes it.
        num_steps: Its steps (PPO: updates); default: the learner's own.
        seeds: S seeds, or how many: 0, 1, ...
        total_samples: Samples per seed, instead of `num_steps`.
        hypers: Hyperparameters with scalar leaves, or leaves [S]: one setting per seed; default: the learner's.
        data: Source of batches; default: the learner's.
        run_dir: Where the run is stored, with the policy of its first seed; default: nowhere.
        options: Chunks, checkpoints, evaluation, devices.
        sinks: Where metrics go as they come.
        callbacks: Called with a `core.job.Moment` after each chunk; one may return a changed state.
        **changes: Fields of `options` by name; with the name of a learner, of its config too, but for one that is
            called like an argument above (PPO's `num_steps`), which `make` takes.

    Returns:
        The last states [S, ...], metrics as a table, which seeds are alive, and the ledger of compiled programs.

    Raises:
        UserError: For wrong arguments, a run that does not fit into memory, or when every seed went non-finite.

    Example:
        result = jaxstack.train("ippo", seeds=4, env="dispersion", total_steps=40_000)
    """
    own_options = {f.name for f in dataclasses.fields(RunOptions)}
    run = {k: v for k, v in changes.items() if k in own_options or not isinstance(learner, str)}
    if isinstance(learner, str):
        learner = make(learner, **{k: v for k, v in changes.items() if k not in run})
    given: dict[str, Any] = dict(total_samples=total_samples, hypers=hypers, data=data, run_dir=run_dir)
    given |= dict(sinks=sinks, callbacks=callbacks)
    result = runner.train(learner, num_steps, seeds, options=options, **given, **run)
    if run_dir is not None:
        state = distributed.fetch(result.state)
        if distributed.is_first():
            bundle.save_first(run_dir, learner, state, result.alive)
    return result


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
