"""Vectorised environments: `make(id)` gives one functional environment, `vectorise(env, n)` many.

Ids: `matrix_game`, `dispersion`, ... (native), `jaxmarl/...`, `gymnax/...`, `brax/...`. Nothing is imported from the
wrapped libraries until an id of theirs is made.
"""

from importlib import import_module
from typing import Any

from jaxstack.core import config
from jaxstack.core import options as texts
from jaxstack.core.errors import unknown
from jaxstack.core.registry import Registry, own
from jaxstack.envs import naming
from jaxstack.envs.base import Box, Discrete, Environment, Image, MultiDiscrete, Spec, TimeStep
from jaxstack.envs.check import check_env
from jaxstack.envs.naming import WRAPPERS, Described, entries, wrap
from jaxstack.envs.vector import VecEnv, VecState, parameters_of, vectorise, with_parameters

__all__ = [
    "NATIVE",
    "WRAPPERS",
    "Box",
    "Described",
    "Discrete",
    "Environment",
    "Image",
    "MultiDiscrete",
    "Spec",
    "TimeStep",
    "VecEnv",
    "VecState",
    "check_env",
    "described",
    "entries",
    "ids",
    "make",
    "parameters_of",
    "parse_options",
    "vectorise",
    "with_parameters",
    "wrap",
]

NATIVE = Registry(
    "environment",
    {
        "matrix_game": "jaxstack.envs.matrix_game:MatrixGame",
        "dispersion": "jaxstack.envs.dispersion:Dispersion",
        "navigation": "jaxstack.envs.navigation:Navigation",
        "blind_particle_spread": "jaxstack.envs.blind_particle_spread:BlindParticleSpread",
        "follow_partner": "jaxstack.envs.follow_partner:FollowPartner",
        "match_now": "jaxstack.envs.cue_tasks:MatchNow",
        "repeat_last": "jaxstack.envs.cue_tasks:RepeatLast",
        "hidden_corner": "jaxstack.envs.hidden_corner:HiddenCorner",
        "cliff_walking": "jaxstack.envs.cliff_walking:CliffWalking",
        "taxi": "jaxstack.envs.taxi:Taxi",
        "lbf": "jaxstack.envs.lbf:Lbf",
        "boulder_push": "jaxstack.envs.boulder_push:BoulderPush",
        "zone_spread": "jaxstack.envs.zone_spread:ZoneSpread",
        "rware": "jaxstack.envs.rware:Rware",
    },
)

FAMILIES = Registry(
    "environment family",
    {
        "jaxmarl": "jaxstack.envs.jaxmarl:make",
        "gymnax": "jaxstack.envs.gymnax:make",
        "brax": "jaxstack.envs.brax:make",
    },
)


def make(id: str, **options: Any) -> Environment:
    """Make an environment by its id.

    Args:
        id: One of `jaxstack list envs`, or `module:attribute` of one's own.
        **options: Of its constructor; `jaxstack info ID` lists them.

    Returns:
        The environment, a frozen object of pure functions.

    Raises:
        UnknownName: For an unknown id, with the nearest ones.
        UserError: For an option that the environment does not take.

    Example:
        env = jaxstack.make_env("dispersion", num_agents=4)
        state, ts = env.reset(jax.random.key(0))
    """
    family, _, rest = id.partition("/")
    if rest:
        return FAMILIES.load(family)(rest, **options) if family in FAMILIES else _unknown(id)
    if id not in NATIVE and not own(id):
        return _unknown(id)
    factory = NATIVE.load(id)
    return factory(**config.check_options(options, config.options_of(factory), f"environment {id!r}"))


def described(env: Any) -> Described:
    """Name an environment object, or class, as configs store it: id, options, wrappers. Raises `UserError` where these
    do not rebuild it."""
    return naming.described(env, make, NATIVE)


def parse_options(options: tuple[str, ...]) -> dict[str, Any]:
    """`("num_agents=4", "layout=small")` -> `{"num_agents": 4, "layout": "small"}`, see `core.options`.

    Raises `UserError` for an entry without `=`.
    """
    return texts.parse(options, "env_args")


def ids(family: str | None = None) -> list[str]:
    """All known ids, those of one family, or the native ones with `family="native"`; imports no wrapped library."""
    out = list(NATIVE) if family in (None, "native") else []
    for name, target in FAMILIES.items():
        if family in (None, name):
            out += [f"{name}/{i}" for i in import_module(target.split(":")[0]).IDS]
    return out


def _unknown(id: str) -> Environment:
    raise unknown("environment", id, ids())
