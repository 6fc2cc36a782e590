"""JaxMARL's SMAX with the same numbers in less time: what `faster` puts in place of the library's methods.

The library follows single units: gathers and scatters over units, a reduction and five calls of the random generator
in each of the eight ticks of a step, all observations twice for the built-in enemy. Here a step is elementwise work on
arrays [units, environments] (the batch last, which a vector unit likes), loops over units are written out, and what is
random is drawn before the ticks.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

Unit = Array
"""[N, B]: a number of each unit, allies first, in each environment."""


def faster(lib: Any, **_: Any) -> Any:
    """The same environment `lib` of JaxMARL's SMAX with methods replaced where the result is known to be equal."""
    from jaxmarl.environments.smax.heuristic_enemy_smax_env import HeuristicEnemySMAX

    if type(lib) is not HeuristicEnemySMAX:
        return lib
    game = lib._env
    game.get_world_state, lib.get_avail_actions = _world_state(game), _avail_actions(game)
    pushed = with_batch_last(partial(_push, game))
    game._push_units_away = lambda s: s.replace(unit_positions=pushed(s.unit_positions, s.unit_alive, s.unit_types))
    if game.observation_type == "unit_list":
        game.get_obs = game.get_obs_unit_list = _unit_list(game)
    if game.action_type == "discrete" and lib.attack_mode == "closest":
        lib.step_env = _step(lib, lib.step_env)
    return lib


def with_batch_last(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f`, written for arrays whose last axis is the batch, as a function of one element that vmap batches that way."""

    @jax.custom_batching.custom_vmap
    def batched(*args: Array) -> Any:
        return f(*args)

    @batched.def_vmap
    def _(size: int, mapped: list[bool], *args: Array) -> tuple[Any, Any]:
        def merge(x: Array, is_mapped: bool) -> Array:
            x = jnp.moveaxis(x, 0, -1) if is_mapped else jnp.broadcast_to(x[..., None], (*x.shape, size))
            return x.reshape(*x.shape[:-2], -1)

        out = batched(*map(merge, args, mapped))
        out = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(*x.shape[:-1], -1, size), -1, 0), out)
        return out, jax.tree.map(lambda _: True, out)

    return lambda *args: jax.tree.map(lambda x: x[..., 0], batched(*(x[..., None] for x in args)))


def _of(table: Any, types: Array) -> Array:
    """`table[types]` without a gather."""
    table = np.asarray(table)
    out = jnp.full(types.shape, table[0])
    for kind in range(1, len(table)):
        out = jnp.where(types == kind, table[kind], out)
    return out


whole = jax.lax.optimization_barrier
"""Computed once, where XLA would compute it anew for every unit that uses it (and compile for minutes)."""


def _length(x: Array, y: Array) -> Array:
    return jnp.sqrt(x * x + y * y)


def _apart(x: Unit, y: Unit, alive: Unit, radius: Unit) -> tuple[Unit, Unit]:
    """Positions after living units that overlap have pushed each other away."""
    x, y, radius = whole((x, y, jnp.where(alive, radius, -jnp.inf)))
    reach = radius + radius[:, None]
    overlap = whole(jax.nn.relu(reach / (_length(x - x[:, None], y - y[:, None]) + 1e-6) - 1.0))
    push_x, push_y = jnp.zeros_like(x), jnp.zeros_like(y)
    for j in range(len(x)):
        push_x, push_y = push_x + (x - x[j]) * overlap[j], push_y + (y - y[j]) * overlap[j]
    return x + push_x / 2, y + push_y / 2


def _push(game: Any, position: Array, alive: Unit, types: Unit) -> Array:
    x, y = _apart(position[:, 0], position[:, 1], alive, _of(game.unit_type_radiuses, types))
    return jnp.stack([x, y], axis=1)


def threefry(key: tuple[Array, Array], count: Any) -> tuple[Array, Array]:
    """The generator's two words for a counter, written out: as XLA's loop its rounds cost more than they need."""
    words = (key[0], key[1], key[0] ^ key[1] ^ np.uint32(0x1BD11BDA))
    x, y = jnp.broadcast_arrays(words[0], words[1] + jnp.asarray(count, jnp.uint32))
    for group in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x = x + y
            y = x ^ ((y << np.uint32(turn)) | (y >> np.uint32(32 - turn)))
        x, y = x + words[(group + 1) % 3], y + words[(group + 2) % 3] + np.uint32(group + 1)
    return x, y


def split(key: tuple[Array, Array], n: int) -> tuple[Array, Array]:
    """Words [n, B] of the keys of `jax.random.split(key, n)` for words [B] of keys."""
    return threefry(key, jnp.arange(n, dtype=jnp.uint32)[:, None])


def uniform(key: tuple[Array, Array], low: float, high: float) -> Array:
    """`jax.random.uniform` of one number of each key."""
    x, y = threefry(key, 0)
    unit = jax.lax.bitcast_convert_type(((x ^ y) >> np.uint32(9)) | np.uint32(0x3F800000), jnp.float32) - 1.0
    low, high = np.float32(low), np.float32(high)
    return jnp.maximum(low, unit * (high - low) + low)


def is_threefry(key: jax.Array) -> bool:
    return str(jax.random.key_impl(key)) == "threefry2x32" and bool(jax.config.jax_threefry_partitionable)  # pyright: ignore


def _step(lib: Any, theirs: Callable[..., Any]) -> Callable[..., Any]:
    game = lib._env
    with jax.ensure_compile_time_eval():
        moves = np.asarray(game._decode_discrete_actions(jnp.arange(game.num_movement_actions - 1))[0])
    play = with_batch_last(partial(_play, lib, moves))

    def step_env(key: jax.Array, state: Any, actions: dict[str, Array], get_state_sequence: bool = False) -> Any:
        if get_state_sequence or not is_threefry(key):
            return theirs(key, state, actions, get_state_sequence)
        s, enemy = state.state, state.enemy_policy_state
        action = jnp.stack([actions[a] for a in lib.agents])
        units = s.unit_positions, s.unit_alive, s.unit_health, s.unit_weapon_cooldowns
        memory = enemy.default_target, enemy.last_attacked_enemy
        units, choice, memory, reward = play(*units, s.unit_types, action, *memory, jax.random.key_data(key))
        names = "unit_positions", "unit_alive", "unit_health", "unit_weapon_cooldowns"
        s = s.replace(**dict(zip(names, units, strict=True)), step=s.step + 1)
        s = s.replace(prev_movement_actions=choice[0], prev_attack_actions=choice[1])
        # the library tests the counter before it is raised
        s = s.replace(done=game.is_terminal(s.replace(step=state.state.step)))
        enemy = enemy.replace(default_target=memory[0], last_attacked_enemy=memory[1])
        obs = game.get_obs(s)
        obs = {a: obs[a] for a in lib.agents} | {"world_state": game.get_world_state(s)}
        dones = {a: ~s.unit_alive[i] for i, a in enumerate(lib.agents)} | {"__all__": s.done}
        obs, s = jax.lax.stop_gradient((obs, s))
        return obs, state.replace(state=s, enemy_policy_state=enemy), dict.fromkeys(lib.agents, reward), dones, {}

    return step_env


def _play(
    lib: Any,
    moves: np.ndarray,
    position: Array,
    alive: Unit,
    health: Unit,
    cooldown: Unit,
    types: Unit,
    action: Array,
    default: Array,
    last: Array,
    key: Array,
) -> tuple[tuple[Array, ...], tuple[Array, ...], tuple[Array, ...], Array]:
    """A step: units (position [N, 2, B], alive, health, cooldown), choices (movement [N, 2, B], attack [N, B]), the
    enemies' memory (default target [E, 2, B], last attacked [E, B]) and the allies' reward [B]."""
    game = lib._env
    a, first = game.num_allies, game.num_movement_actions
    x, y = position[:, 0], position[:, 1]
    keys = whole(split((key[0], key[1]), 2))
    key, k_enemy = ((keys[0][i], keys[1][i]) for i in (0, 1))
    enemy_action, default, last = _enemies(
        lib, x, y, alive, types, default, last, whole(split(k_enemy, game.num_enemies))
    )
    action = jnp.concatenate([action, enemy_action])
    move = [sum(jnp.where(action == k, moves[k, axis], 0.0) for k in range(first - 1)) for axis in (0, 1)]
    attack = jnp.where(action >= first, action, 0)

    speed = _of(game.unit_type_velocities, types)
    reach, strength = _of(game.unit_type_attack_ranges, types), _of(game.unit_type_attacks, types)
    rest, radius = _of(game.unit_type_weapon_cooldowns, types), _of(game.unit_type_radiuses, types)
    # the unit each one attacks; the enemies count the allies from the last
    goal = jnp.concatenate([action[:a] + (a - first), a - 1 - (action[a:] - first)])
    goal = jnp.where(action >= first, goal, -1)
    teams = slice(0, a), slice(a, game.num_agents)

    def aim(x: Unit, y: Unit, alive: Unit) -> Unit:
        """Whether the unit that is attacked lives and is in reach."""
        out = []
        for own, other in (teams, teams[::-1]):
            to_x, to_y, lives = jnp.zeros_like(x[own]), jnp.zeros_like(x[own]), jnp.zeros_like(alive[own])
            for j in range(other.start, other.stop):
                it = goal[own] == j
                to_x, to_y, lives = jnp.where(it, x[j], to_x), jnp.where(it, y[j], to_y), jnp.where(it, alive[j], lives)
            out.append((_length(x[own] - to_x, y[own] - to_y) < reach[own]) & lives)
        return jnp.concatenate(out)

    def hurt(hit: Unit) -> Unit:
        damage = whole(jnp.where(hit, strength, 0.0))
        out = []
        for own, other in (teams, teams[::-1]):
            index = jnp.arange(own.start, own.stop)[:, None]
            out.append(sum(jnp.where(goal[j] == index, damage[j], 0.0) for j in range(other.start, other.stop)))
        return jnp.concatenate(out)

    def tick(c: tuple[Any, ...], _: None) -> tuple[tuple[Any, ...], None]:
        key, x, y, alive, health, cooldown = c
        keys = whole(split(key, 2))
        key, k_units = ((keys[0][i], keys[1][i]) for i in (0, 1))
        noise = uniform(split(k_units, game.num_agents), -game.time_per_step, 2 * game.time_per_step)
        hit = alive & (cooldown <= 0.0) & aim(x, y, alive)
        health = jnp.maximum(health - hurt(hit), 0.0)
        cooldown = cooldown + jnp.where(hit, (rest + noise) - cooldown, -game.time_per_step)
        go = lambda p, v, most: jnp.where(alive, jnp.clip(p + v * speed * game.time_per_step, 0.0, most), p)
        x, y = go(x, move[0], game.map_width), go(y, move[1], game.map_height)
        if game.walls_cause_death:
            health = jnp.where((x <= 0) | (y <= 0) | (x >= game.map_width) | (y >= game.map_height), 0.0, health)
        alive = health > 0
        x, y = _apart(x, y, alive, radius)
        return (key, x, y, alive, health, cooldown), None

    before = health
    start = key, x, y, alive, health, cooldown
    (_, x, y, alive, health, cooldown), _ = jax.lax.scan(tick, start, None, game.world_steps_per_env_step)
    lost = (health - before) / _of(game.unit_type_health, types)
    won = alive[:a].any(0) & ~alive[a:].any(0)
    reward = jnp.where(won, game.won_battle_bonus, 0.0)
    if game.use_self_play_reward:
        reward = reward - jnp.where(~alive[:a].any(0) & alive[a:].any(0), game.won_battle_bonus, 0.0)
    else:
        reward = jnp.abs(sum(lost[a:])) / game.num_enemies + reward
    units = jnp.stack([x, y], axis=1), alive, health, cooldown
    return units, (jnp.stack(move, axis=1), attack), (default, last), reward


def _enemies(
    lib: Any, x: Unit, y: Unit, alive: Unit, types: Unit, default: Array, last: Array, keys: Any
) -> tuple[Array, Array, Array]:
    """The enemies' actions, default targets and last attacked allies: the heuristic policy on what they see."""
    game, a = lib._env, lib._env.num_allies
    width, height = game.map_width, game.map_height
    sight, reach = (_of(t, types)[a:] for t in (game.unit_type_sight_ranges, game.unit_type_attack_ranges))
    at = [jnp.where(alive[a:], p[a:] / most * most, 0.0) for p, most in ((x, width), (y, height))]
    seen, shootable, far, spots = [], [], [], []
    for ally in reversed(range(a)):
        dx, dy = x[ally] - x[a:], y[ally] - y[a:]
        seen.append((_length(dx, dy) < sight) & alive[a:] & alive[ally])
        dx, dy = dx / sight * sight, dy / sight * sight
        far.append(_length(dx, dy))
        shootable.append(seen[-1] & (far[-1] < reach))
        spots.append((dx + at[0], dy + at[1]))

    most = jnp.full_like(sight, np.linalg.norm(np.asarray([width, height], np.float32)))
    near, new = jnp.where(shootable[0], far[0], most), jnp.zeros_like(last)
    for t in range(1, a):
        distance = jnp.where(shootable[t], far[t], most)
        near, new = jnp.minimum(near, distance), jnp.where(distance < near, t, new)
    can_shoot = sum(shootable) > 0
    again = sum((last == t) & shootable[t] for t in range(a)) > 0
    attack = jnp.where(again, last, new)

    fresh = (default[:, 0] == 0) & (default[:, 1] == 0) & (last == -1)
    # `jax.random.choice` of an ally in sight, of the first of each enemy's two keys
    some, reached = sum(x.astype(jnp.float32) for x in seen), [jnp.zeros_like(sight)]
    for visible in seen:
        reached.append(reached[-1] + visible / some)
    least = whole(reached[-1] * (1 - uniform(threefry(keys, 0), 0.0, 1.0)))
    target = sum((x < least).astype(jnp.int32) for x in reached[1:])
    can_see = sum(seen) > 0
    heading, to = [], []
    for axis, most in ((0, width), (1, height)):
        heading.append(jnp.where(fresh, -(at[axis] - most / 2) + most / 2, default[:, axis]))
        goal = sum(jnp.where(target == t, spots[t][axis], 0.0) for t in range(a))
        to.append(jnp.where(can_see, goal, heading[axis]) - at[axis])
    move, best = jnp.zeros_like(last), to[1]
    for k, along in ((1, to[0]), (2, -to[1]), (3, -to[0])):
        move, best = jnp.where(along > best, k, move), jnp.maximum(along, best)
    action = jnp.where(can_shoot & lib.enemy_shoots, attack + game.num_movement_actions, move)
    return action, jnp.stack(heading, axis=1), jnp.where(can_shoot, attack, -1)


def _unit_list(game: Any) -> Callable[[Any], dict[str, Array]]:
    n, a = game.num_agents, game.num_allies
    kinds = np.arange(game.unit_type_bits)[:, None]
    last_action = np.where(np.arange(n) < a, game.num_ally_actions - 1, game.num_enemy_actions - 1).astype(np.float32)

    def rows(team: int, rows: Array, own_rows: Array, alive: Unit, sight: Unit) -> Array:
        """What the first units, the team, see [team, size, B], from numbers [N, F, B] of all in the order they see."""
        before = (np.arange(n - 1) < np.arange(team)[:, None])[..., None]
        x, y = rows[:, 1], rows[:, 2]
        others = lambda x: jnp.where(before, x[:-1], x[1:])
        far = _length(others(x) - x[:team, None], others(y) - y[:team, None])
        seen = whole((far < sight[:team, None]) & others(alive) & alive[:team, None])
        # where they are is relative, the rest is not
        place = np.isin(np.arange(rows.shape[1]), (1, 2))[:, None]
        origin, unit = jnp.where(place, rows[:team], 0.0), jnp.where(place, sight[:team, None], 1.0)
        rows, origin, unit = whole((rows, origin, unit))
        out = jnp.where(before[..., None], rows[:-1], rows[1:])
        out = jnp.where(seen[:, :, None], (out - origin[:, None]) / unit[:, None], 0.0)
        if not game.see_enemy_actions:
            secret = (np.arange(n - 1) >= team - 1)[:, None] & np.isin(np.arange(rows.shape[1]), (3, 4, 5))
            out = jnp.where(secret[..., None], 0.0, out)
        own_rows = jnp.where(alive[:team, None], own_rows[:team], 0.0)
        return jnp.concatenate([out.reshape(team, -1, out.shape[-1]), own_rows], axis=1)

    def look(position: Array, alive: Unit, health: Unit, cooldown: Unit, types: Unit, move: Array, attack: Unit) -> Any:
        x, y = position[:, 0], position[:, 1]
        health = health / _of(game.unit_type_health, types)
        cooldown = jnp.clip(cooldown / _of(game.unit_type_weapon_cooldowns, types), 0.0, 1.0)
        kind = (types[:, None] == kinds).astype(jnp.float32)
        attack = attack.astype(jnp.float32) / last_action[:, None]
        stack = lambda *x: jnp.concatenate([jnp.stack(x, axis=1), kind], axis=1)
        other = stack(health, x, y, move[:, 0], move[:, 1], attack, cooldown)
        own = stack(health, x / game.map_width, y / game.map_height, cooldown)
        units = other, own, alive, _of(game.unit_type_sight_ranges, types)
        return rows(a, *units), rows(n - a, *(x[::-1] for x in units))[::-1]

    looked = with_batch_last(look)

    def obs(s: Any) -> dict[str, Array]:
        units = s.unit_positions, s.unit_alive, s.unit_health, s.unit_weapon_cooldowns, s.unit_types
        allies, enemies = looked(*units, s.prev_movement_actions, s.prev_attack_actions)
        return {name: allies[i] if i < a else enemies[i - a] for i, name in enumerate(game.agents)}

    return obs


def _world_state(game: Any) -> Callable[[Any], Array]:
    def world_state(s: Any) -> Array:
        health = s.unit_health / _of(game.unit_type_health, s.unit_types)
        kinds = (s.unit_types[:, None] == np.arange(game.unit_type_bits)).astype(jnp.float32)
        rows = [health[:, None], s.unit_positions, s.unit_weapon_cooldowns[:, None], kinds]
        units = jnp.where(s.unit_alive[:, None], jnp.concatenate(rows, axis=1), 0.0)
        return jnp.concatenate([units.reshape(-1), s.unit_teams, s.unit_types])

    return world_state


def _avail_actions(game: Any) -> Callable[[Any], dict[str, Array]]:
    a, moves = game.num_allies, game.num_movement_actions

    def avail_actions(state: Any) -> dict[str, Array]:
        s = state.state
        x, y, alive = s.unit_positions[:, 0], s.unit_positions[:, 1], s.unit_alive
        reach = _of(game.unit_type_attack_ranges, s.unit_types[:a])[:, None]
        near = _length(x[a:] - x[:a, None], y[a:] - y[:a, None]) < reach
        free = jnp.broadcast_to(alive[:a, None], (a, moves - 1))
        masks = [free, jnp.ones((a, 1), bool), near & alive[:a, None] & alive[a:]]
        mask = jnp.concatenate(masks, axis=1).astype(jnp.uint8)
        return {name: mask[i] for i, name in enumerate(game.agents[:a])}

    return avail_actions
