"""JaxMARL's OvercookedV2 with the same numbers in less time: what `faster` puts in place of the library's methods.

The library moves things on its grid by scatters, which run one by one on a CPU, searches the grid for what the layout
fixes, and builds observations layer by layer. Here a cell holds what its layers show as the bits of an integer, and
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


def faster(lib: Any) -> Any:
    """The same environment `lib` of JaxMARL with methods replaced where the result is known to be equal."""
    from jaxmarl.environments.overcooked_v2.overcooked import ObservationType

    # states from outside may hold another layout; three cooks push each other in a chain
    if lib.initial_state_buffer is None and lib.num_agents <= 2 and _closed(lib.layout.static_objects == 0):
        lib.step_agents = _step(lib)
        if lib.observation_type == ObservationType.DEFAULT and not lib.op_ingredient_permutations:
            lib.get_obs = _obs(lib)
    return lib


def _closed(floor: np.ndarray) -> bool:
    """No cook can stand at the border and face what lies outside."""
    inner = np.zeros_like(floor)
    inner[1:-1, 1:-1] = True
    return not np.any(floor & ~inner)


def _paths(floor: np.ndarray, moves: list[int]) -> Array:
    """[H * W, actions]: the cell where an action takes a cook from a cell; `moves` are offsets, 0 for none."""
    cell = np.arange(floor.size)[:, None]
    to = np.clip(cell + np.asarray(moves), 0, floor.size - 1)
    return jnp.asarray(np.where(floor.reshape(-1)[to], to, cell), jnp.int32)


def _apart(at: Array, to: Array) -> Array:
    """Where the cooks [A] end who stand `at` cells and head `to` others: two that meet or swap both stay."""
    if len(at) == 1:
        return to
    return jnp.where((to[0] == to[1]) | ((to[0] == at[1]) & (to[1] == at[0])), at, to)


def _step(lib: Any) -> Callable[..., Any]:
    from jaxmarl.environments.overcooked_v2 import settings
    from jaxmarl.environments.overcooked_v2.common import ACTION_TO_DIRECTION, DynamicObject, StaticObject

    still = np.asarray(lib.layout.static_objects)
    width = still.shape[1]
    paths = _paths(still == StaticObject.EMPTY, [1, width, -1, -width, 0, 0])
    turn, ahead = np.asarray(ACTION_TO_DIRECTION), np.array([-width, width, 1, -1])
    objects, cell = jnp.asarray(still.reshape(-1)), np.arange(still.size)[:, None]
    pots, buttons = (still.reshape(-1) == x for x in (StaticObject.POT, StaticObject.BUTTON_RECIPE_INDICATOR))
    by_hand, resample = bool(lib.start_cooking_interaction), bool(lib.sample_recipe_on_delivery)
    penalty, worth = (1.0 if lib.negative_rewards else 0.0), settings.SHAPED_REWARDS
    plate, cooked = int(DynamicObject.PLATE), int(DynamicObject.COOKED)

    def full(things: Array) -> Array:
        return sum((things >> 2 * (i + 1)) & 3 for i in range(lib.layout.num_ingredients)) == 3

    def interact(obj: Array, lies: Array, timer: Array, held: Array, recipe: Array) -> tuple[Array, ...]:
        """What lies in the cell, its timer, what the cook holds; (delivered, right dish), reward, shaped reward."""
        pot, pile = obj == StaticObject.POT, obj >= StaticObject.PLATE_PILE
        wall, bare, free = obj == StaticObject.WALL, lies == 0, held == 0
        both, dish = lies + held, recipe | plate | cooked
        idle = pot & (timer <= 0) & (lies & cooked == 0)
        plated = pot & (lies & cooked != 0) & (held == plate)
        took = (pile & free) | plated | (wall & ~bare & free)
        put = idle & (held >> 2 != 0) & (held & plate == 0) & ~full(lies)
        laid = (wall & bare & ~free) | put
        delivered = (obj == StaticObject.GOAL) & (held & cooked != 0)
        kept = ~(took | laid | delivered)
        asked = (obj == StaticObject.BUTTON_RECIPE_INDICATOR) & free & bare
        fresh = jnp.where(obj == StaticObject.PLATE_PILE, plate, 4 << 2 * (obj - StaticObject.INGREDIENT_PILE_BASE))
        after = jnp.where(laid, both, jnp.where(kept, lies, 0))
        started = idle & ~bare & free if by_hand else jnp.bool_(False)
        lit = started if by_hand else idle & full(after)
        clock = jnp.where(lit, settings.POT_COOK_TIME, jnp.where(asked, settings.INDICATOR_ACTIVATION_TIME, timer))
        hand = jnp.where(took, jnp.where(pile, fresh, 0) + both, jnp.where(kept, held, 0))
        right = held == dish
        reward = jnp.where(delivered, jnp.where(right, 1.0, -penalty) * settings.DELIVERY_REWARD, 0.0)
        reward -= asked * float(settings.INDICATOR_ACTIVATION_COST)
        one_of = held | (held << 1)
        shaped = (plated & (both == dish)) * float(worth["DISH_PICKUP"])
        shaped += (put & (lies & one_of < recipe & one_of)) * float(worth["PLACEMENT_IN_POT"])
        shaped += (started & (lies == recipe)) * float(worth["POT_START_COOKING"])
        return after, clock, hand, delivered & right, reward, shaped, took & (hand == plate)

    def step(key: Array, state: Any, action: Array) -> tuple[Any, Array, Array]:
        cooks, grid = state.agents, state.grid.reshape(-1, 3)
        at = cooks.pos.y * width + cooks.pos.x
        to = _apart(at, paths[at, action])
        facing = jnp.where(action < 4, jnp.asarray(turn)[action], cooks.dir)
        front = to + jnp.asarray(ahead)[facing]
        acts, obj, cells = action == 5, objects[front], grid[front]
        # each cook finds the kitchen as the one before left it, but counts plates in hands as they were
        plates = jnp.sum(cooks.inventory == plate)
        counters = jnp.sum(grid[:, 1] == plate)
        busy = sum(jnp.int32(grid[i, 1] != 0) for i in np.flatnonzero(pots))
        lies, timer, held, shaped = [], [], [], []
        reward, right = jnp.float32(0), jnp.bool_(False)
        for i in range(len(action)):
            old, clock = cells[i, 1], cells[i, 2]
            if i:
                same = front[i] == front[0]
                old, clock = jnp.where(same, lies[0], old), jnp.where(same, timer[0], clock)
            new, ticks, hand, well, gain, extra, got_plate = interact(
                obj[i], old, clock, cooks.inventory[i], state.recipe
            )
            extra += (got_plate & (counters == 0) & (plates < busy)) * float(worth["PLATE_PICKUP"])
            new = jnp.where(acts[i], new, old)
            counters += jnp.int32(new == plate) - (old == plate)
            busy += (obj[i] == StaticObject.POT) * (jnp.int32(new != 0) - (old != 0))
            lies.append(new)
            timer.append(jnp.where(acts[i], ticks, clock))
            held.append(jnp.where(acts[i], hand, cooks.inventory[i]))
            shaped.append(jnp.where(acts[i], extra, 0.0))
            reward, right = reward + jnp.where(acts[i], gain, 0.0), right | (acts[i] & well)
        for i in range(len(action)):
            grid = jnp.where(cell == front[i], jnp.stack([obj[i], lies[i], timer[i]]), grid)
        ticking = grid[:, 2:] > 0
        done = (pots[:, None] & (grid[:, 2:] == 1)) * jnp.array([0, cooked, 0])
        grid = (grid | done) - ((pots | buttons)[:, None] & ticking) * jnp.array([0, 0, 1])
        recipe = state.recipe
        if resample:
            recipe = jnp.where(right, lib._sample_recipe(jax.random.split(key)[1]), recipe)
        cooks = cooks.replace(pos=cooks.pos.replace(x=to % width, y=to // width), dir=facing, inventory=jnp.stack(held))
        state = state.replace(
            agents=cooks, grid=grid.reshape(state.grid.shape), recipe=recipe, new_correct_delivery=right
        )
        return state, reward, jnp.stack(shaped)

    return step


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
