"""Environments as text: wrappers by name, and what an object is called, so that a run can store and rebuild it.

env = envs.wrap(envs.make("dispersion"), "time_limit=50", "frame_stack=4")
envs.described(env)      # ("dispersion", (), ("time_limit=50", "frame_stack=4"))
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxstack.core import options as texts
from jaxstack.core.entries import read
from jaxstack.core.errors import UserError
from jaxstack.core.registry import Registry, own
from jaxstack.envs.base import Environment
from jaxstack.envs.wrappers import Wrapper

WRAPPERS = Registry(
    "wrapper",
    {
        "time_limit": "jaxstack.envs.wrappers:TimeLimit",
        "agent_id": "jaxstack.envs.wrappers:AgentId",
        "task_id": "jaxstack.envs.wrappers:TaskId",
        "task_weights": "jaxstack.envs.wrappers:TaskWeights",
        "frame_stack": "jaxstack.envs.wrappers:FrameStack",
        "reward_scale": "jaxstack.envs.wrappers:RewardScale",
        "reward_clip": "jaxstack.envs.wrappers:RewardClip",
    },
)


class Described(NamedTuple):
    """What rebuilds an environment."""

    env: str
    env_args: tuple[str, ...]
    wrap: tuple[str, ...]
    """The innermost first."""


def wrap(env: Environment, *entries: str) -> Environment:
    """Put wrappers around an environment.

    Args:
        env: The environment.
        *entries: The innermost first. Each is `name`, `name=value` of its first option, `name=[value, ...]` in order
            or `name={option: value}`; the name is one of `WRAPPERS` or `module:attribute` of one's own.

    Returns:
        The wrapped environment.

    Raises:
        UserError: For an unknown wrapper or option, and for one that does not fit the environment.

    Example:
        wrap(make("dispersion"), "time_limit=50", "reward_clip=[0, 1]")
    """
    for entry in entries:
        where = f"wrap {entry!r}"
        factory, given = read(WRAPPERS, entry, where, but=("env",))
        try:
            env = factory(env, **given)
        except UserError as e:
            raise UserError(f"{where}: {e}") from e
        if not isinstance(env, Environment):
            raise UserError(f"{where}: made a {type(env).__name__}, expected an Environment")
    return env


def entries(options: Mapping[str, Any]) -> tuple[str, ...]:
    """`{"num_agents": 4}` -> `("num_agents=4",)`, as configs and flags have them."""
    return tuple(f"{name}={_text(value)}" for name, value in options.items())


def described(env: Environment, make: Callable[..., Environment], native: Mapping[str, str]) -> Described:
    """Name an environment object.

    Args:
        env: The object, or its class.
        make: `envs.make`.
        native: `envs.NATIVE`.

    Returns:
        Its id (`module:attribute` of one's own class), its options that differ from the defaults, and its wrappers.

    Raises:
        UserError: Where these do not give an equal environment.
    """
    whole, around = env, []
    try:
        while isinstance(env, Wrapper):
            name, options = _named(type(env), WRAPPERS), _changed(env, ("env",))
            around.append(f"{name}={_text(options)}" if options else name)
            env = env.env
        if isinstance(env, type):
            return Described(_named(env, native), (), tuple(around[::-1]))
        *_, family, _ = ("", "", *type(env).__module__.split("."))
        if type(env).__module__ == f"jaxstack.envs.{family}.adapter":
            known: Any = env
            id, options = f"{family}/{known.name}", dict(known.options) | _changed(env, ("name", "options"))
        else:
            id, options = _named(type(env), native), _changed(env)
        found = Described(id, entries(options), tuple(around[::-1]))
        again = wrap(make(found.env, **texts.parse(found.env_args, "env_args")), *found.wrap)
        if again != whole:
            raise UserError("its options give another one")
    except (UserError, TypeError, ValueError) as e:
        what = f"env={type(whole).__name__}: expected an environment that its class and options rebuild"
        raise UserError(f"{what}, as a dataclass of plain fields at the top of a module ({e})") from e
    return found


def _named(cls: type, table: Mapping[str, str]) -> str:
    """The short name of a class in a registry, else `module:attribute`."""
    target = f"{cls.__module__}:{cls.__qualname__}"
    name = next((n for n in table if table[n] == target), target)
    if name == target and not own(target):
        raise UserError(f"{cls.__qualname__} is no class at the top of a module")
    return name


def _changed(env: Any, but: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults."""
    if not dataclasses.is_dataclass(env):
        raise UserError(f"{type(env).__name__} is no dataclass")
    own_fields = [f for f in dataclasses.fields(env) if f.init and f.name not in but]
    return {f.name: getattr(env, f.name) for f in own_fields if getattr(env, f.name) != f.default}


def _text(value: Any) -> str:
    """A plain value as one line of YAML, which `core.options` reads back."""
    return texts.dump_line(_listed(value))


def _listed(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_listed(v) for v in value]
    if isinstance(value, dict):
        return {k: _listed(v) for k, v in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise UserError(f"{value!r} is no plain value")
