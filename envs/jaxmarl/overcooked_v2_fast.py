"""JaxMARL's OvercookedV2 with the same numbers in less time: what `faster` puts in place of the library's methods.

The library builds observations layer by layer. Here a cell holds what its layers show as the bits of an integer, and
one pass over the observation takes them apart.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

WORD = 31
"""Bits of a word: without the sign, which a shift to the right would repeat."""


def faster(lib: Any, **_: Any) -> Any:
    """The same environment `lib` of JaxMARL with methods replaced where the result is known to be equal."""
    from jaxmarl.environments.overcooked_v2.overcooked import ObservationType

    plain = lib.observation_type == ObservationType.DEFAULT and not lib.op_ingredient_permutations
    # states from outside may hold another layout
    if plain and lib.initial_state_buffer is None and lib.num_agents <= 2:
        lib.get_obs = _obs(lib)
    return lib


def _obs(lib: Any) -> Callable[[Any], dict[str, Array]]:
    from jaxmarl.environments.overcooked_v2.common import StaticObject

    still, n = np.asarray(lib.layout.static_objects), lib.layout.num_ingredients
    width = still.shape[1]
    view = lib.agent_view_size or 0
    cell = np.arange(still.size).reshape(still.shape)
    item = [(0, 1), (1, 1), *((2 * (i + 1), 3) for i in range(n))]
    cook = [*((i, 1) for i in range(5)), *((shift + 5, mask) for shift, mask in item)]
    names = ["WALL", "GOAL", "POT", "RECIPE_INDICATOR", "BUTTON_RECIPE_INDICATOR", "PLATE_PILE"]
    kinds = [*(StaticObject[x] for x in names), *(StaticObject.INGREDIENT_PILE_BASE + i for i in range(n))]
    fixed = sum((still == kind).astype(np.int32) << i for i, kind in enumerate(kinds))
    # fields of a cell in the order of the layers: each layer is a (shift, mask) in one of them
    fields = [cook, cook, [(i, 1) for i in range(len(kinds))], item, item, [(0, 31)]]
    fields += [[(0, 1)]] * lib.indicate_successful_delivery
    place, layers = _pack(fields)
    which, shift, mask = (np.array(x, np.int32) for x in zip(*layers))

    def obs(state: Any) -> dict[str, Array]:
        cooks, lies, timer = state.agents, state.grid[..., 1], state.grid[..., 2]
        at = (cooks.pos.y * width + cooks.pos.x)[:, None, None]
        shown = (still == StaticObject.RECIPE_INDICATOR) | (
            (still == StaticObject.BUTTON_RECIPE_INDICATOR) & (timer > 0)
        )
        code = 1 | (2 << cooks.dir) | (cooks.inventory << 5)
        own = jnp.where(cell == at, code[:, None, None], 0)
        other = own[::-1] if len(code) == 2 else jnp.zeros_like(own)
        values = [own, other, fixed, lies, jnp.where(shown, state.recipe, 0)]
        values += [jnp.where(still == StaticObject.POT, timer, 0)]
        values += [jnp.where(still == StaticObject.GOAL, jnp.int32(state.new_correct_delivery), 0)]
        words = [jnp.zeros_like(own) for _ in range(which.max() + 1)]
        for (word, offset), value in zip(place, values):
            words[word] |= value << offset
        if view:
            words = [_window(x, cooks.pos.y, cooks.pos.x, view) for x in words]
        word = words[0][..., None]
        for i, x in enumerate(words[1:], 1):
            word = jnp.where(which == i, x[..., None], word)
        layers = (word >> shift) & mask
        return {a: layers[i] for i, a in enumerate(lib.agents)}

    return obs


def _pack(fields: list[list[tuple[int, int]]]) -> tuple[list[tuple[int, int]], list[tuple[int, int, int]]]:
    """The (word, offset) of each field, and the (word, shift, mask) of each layer."""
    place, layers, word, used = [], [], 0, 0
    for field in fields:
        size = max(shift + mask.bit_length() for shift, mask in field)
        if used + size > WORD:
            word, used = word + 1, 0
        place.append((word, used))
        layers += [(word, used + shift, mask) for shift, mask in field]
        used += size
    return place, layers


def _window(grid: Array, y: Array, x: Array, view: int) -> Array:
    """[A, H, W] -> [A, 2 * view + 1, 2 * view + 1] around each cook, zero outside."""
    size = 2 * view + 1
    padded = jnp.pad(grid, ((0, 0), (view, view), (view, view)))
    return jax.vmap(lambda g, y, x: jax.lax.dynamic_slice(g, (y, x), (size, size)))(padded, y, x)
