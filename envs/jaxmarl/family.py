"""What a family of JaxMARL's environments says beside the common adapter."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array

from jaxstack.envs.base import Kind, Spec


def registered(name: str, options: dict[str, Any]) -> Any:
    """Return a new environment of the library under its registered name."""
    import jaxmarl

    return jaxmarl.make(name, **options)


class Family(NamedTuple):
    """Facts of a family that the library does not give in one way; `lib` is the library's environment."""

    ids: tuple[str, ...]
    """without `jaxmarl/`"""
    horizon: Callable[[Any, dict[str, Any]], int | None]
    """(lib, the options it was made with) -> time limit in steps"""
    terminal: Callable[[Any, Any, Array, Any, Array], Array] | None
    """(lib, state, actions, next state, the library's done flag) -> the task really ended; None: only the time limit
    ends an episode"""
    make: Callable[[str, dict[str, Any]], Any] = registered
    """(id, options) -> lib"""
    mask: Callable[[Any, Any], dict[str, Array]] | None = None
    """(lib, state) -> legal actions of each agent"""
    state: Callable[[Any, Any], Array] | None = None
    """(lib, state) -> global state"""
    alive: Callable[[Any, Any], Array] | None = None
    """(lib, state) -> [A] which agents act"""
    info: Callable[[Any, Any, dict], dict[str, Array]] = lambda lib, state, info: {}
    """(lib, state, the library's info) -> ours"""
    fast: Callable[..., Any] = lambda lib, **options: lib
    """(lib, the options it was made with) -> the same with methods in a form that runs faster"""
    frame: Callable[[Any, Any, int], np.ndarray] | None = None
    """(lib, state, number of agents) -> picture [H, W, 3]"""
    legend: Callable[[Spec], tuple[Kind, ...]] = lambda spec: ()
    """What the picture shows."""
    shared_reward: bool = False
    options: dict[str, Any] = {}  # noqa: RUF012
    """Types of options that no signature of the library names."""
    writes_integers: bool = False
    """The library writes the integer 1 into a boolean array: exact, but jax warns about it while tracing."""
    notes: tuple[str, ...] = ()
    """Where ours differs from the library."""
