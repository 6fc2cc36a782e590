"""JaxMARL's STORM with the same numbers in less time: what `faster` puts in place of the library's methods.

Under vmap the library shuffles the grid by sorting for a new episode and for freed agents in every step, resolves
collisions and zaps one agent at a time, and builds the view cell by cell. Here the rare things are only computed in
steps where some environment needs them, and a view is read from a table by what stands in a cell.
"""

import inspect
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

STEP = np.array([[0, 1], [1, 0], [0, -1], [-1, 0]], np.int32)
"""Of an agent that looks up, right, down, left."""


def faster(lib: Any, **options: Any) -> Any:
    """The same environment `lib` of JaxMARL's STORM, which was made with these options; so far that of n agents."""
    from jaxmarl.environments.storm.storm import InTheMatrix

    if type(lib) is InTheMatrix and _roomy(lib):
        known = inspect.signature(InTheMatrix.__init__).parameters
        payoff, penalty = (options.get(k, known[k].default) for k in ("payoff_matrix", "freeze_penalty"))
        step = jax.jit(_matrix_step(lib, np.asarray(payoff, np.float32), penalty))
        vars(lib).update(get_obs=_matrix_obs(lib), reset=jax.jit(_matrix_reset(lib)), step_env=step)
    return lib


def _roomy(lib: Any) -> bool:
    """No draw of a place can fail, and one round of sorting shuffles the grid."""
    things, cells = lib.num_agents + 2 * lib.NUM_COINS, lib.GRID_SIZE**2
    return things + max(lib.num_agents, lib.NUM_COINS) <= cells <= 1600


def rarely(when: Array, then: Callable[..., Any], old: Any, *args: Any) -> Any:
    """`then(*args)` where `when` holds, else `old`.

    Over a batch of environments `then` is computed in steps where some of them need it, else not at all: vmap of
    `lax.cond` computes it always. `then` must get all arrays by `args`.
    """
    return _choice(then)(when, old, args)


def _choice(then: Callable[..., Any]) -> Callable[[Array, Any, tuple], Any]:
    @jax.custom_batching.custom_vmap
    def choose(when: Array, old: Any, args: tuple) -> Any:
        pick = lambda new, old: jnp.where(when.reshape(when.shape + (1,) * (old.ndim - when.ndim)), new, old)
        return jax.lax.cond(when.any(), lambda: jax.tree.map(pick, then(*args), old), lambda: old)

    @choose.def_vmap
    def _(size: int, batched: Any, when: Array, old: Any, args: tuple) -> tuple[Any, Any]:
        whole = lambda x, done: x if done else jnp.broadcast_to(x, (size, *jnp.shape(x)))
        out = _choice(jax.vmap(then))(*jax.tree.map(whole, (when, old, args), tuple(batched)))
        return out, jax.tree.map(lambda _: True, out)

    return choose


def shuffled(key: Array, n: int, places: Array) -> Array:
    """`jax.random.permutation(key, n)[places]` for n up to 1600, without sorting: vmap of that is slow."""
    bits = jax.random.bits(jax.random.split(key)[1], (n,))
    before = (bits < bits[:, None]) | ((bits == bits[:, None]) & np.tri(n, k=-1, dtype=bool))
    rank = before.sum(1, dtype=jnp.int32)
    return ((rank == places[:, None]) * np.arange(n)).sum(1, dtype=jnp.int32)


def _view(size: int) -> np.ndarray:
    """[4, size * size, 2] where the cells of a view lie from an agent that looks up, right, down, left."""
    r, c = np.mgrid[:size, :size]
    half, last = size // 2, size - 1
    starts = [(-half, 0), (0, -half), (-half, -last), (-last, -half)]
    cells = [np.rot90(np.stack([r + x, c + y], -1), k) for k, (x, y) in enumerate(starts)]
    return np.stack(cells).reshape(4, -1, 2).astype(np.int32)


def _seen(grid: Array, locs: Array, size: int, wall: int) -> Array:
    """[A, size * size] what agents at `locs` (x, y, direction) [A, 3] see of the grid, walls around it."""
    side = grid.shape[0]
    at = locs[:, None, :2] + jnp.asarray(_view(size))[locs[:, 2]]
    inside = ((at >= 0) & (at < side)).all(-1)
    cell = jnp.where(inside, at[..., 0] * side + at[..., 1], 0)
    return jnp.where(inside, grid.reshape(-1)[cell].astype(jnp.int32), wall)


def _matrix_obs(lib: Any) -> Callable[[Any], Array]:
    from jaxmarl.environments.storm.storm import INTERACT_THRESHOLD, Items

    n, first, size = lib.num_agents, len(Items), lib.OBS_SIZE
    agent, value = np.arange(n)[:, None], np.arange(first + n)
    # the library's channel "me" and its row of who is shown are off by the agents' offset in the grid
    me = value - 1 == np.minimum(first + agent, first + n - 2)
    is_agent, other = value >= first, (value >= first) & ~me
    who = np.maximum(value - first, 0)
    told = np.maximum(value - 1, 0) - first
    told = np.clip(np.where(told < 0, told + n, told), 0, n - 1)
    row = np.minimum(first + np.arange(n), n - 1)
    item = np.broadcast_to(value[:, None] == np.arange(1, first), (n, len(value), first - 1))

    def obs(state: Any) -> Array:
        frozen = state.freeze.max(-1) > 0
        met = state.freeze[row] != 0
        if n > 12:
            met &= jnp.cumsum(met, 1) <= 12
        shown = frozen[:, None] & (value > first) & met[:, np.maximum(value - first - 1, 0)] | me
        turn = (state.agent_locs[who, 2] - state.agent_locs[:, 2:]) % 4
        turn = (turn[..., None] == np.arange(4)) & (is_agent & (value - first != agent))[..., None]
        ready = (state.agent_invs.sum(-1) > INTERACT_THRESHOLD)[who] & is_agent
        parts = (
            item,
            me[..., None],
            other[..., None],
            turn,
            jnp.broadcast_to(ready[:, None], (n, len(value), 1)),
            jnp.where(shown[..., None], state.agent_invs[told], 0),
            (other & frozen[told])[..., None],
        )
        table = jnp.concatenate([jnp.asarray(p, jnp.float32) for p in parts], axis=-1)
        seen = _seen(state.grid, state.agent_locs, size, Items.wall) + agent * len(value)
        return table.reshape(n * len(value), -1)[seen].reshape(n, size, size, -1)

    return obs


def _matrix_start(lib: Any) -> Callable[[Array], Any]:
    from jaxmarl.environments.storm import storm

    Items, make_state = storm.Items, cast(Callable[..., Any], storm.State)

    n, coins, side = lib.num_agents, lib.NUM_COINS, lib.GRID_SIZE
    what = np.repeat([Items.red_coin, Items.blue_coin], coins)

    def start(key: Array) -> Any:
        _, key = jax.random.split(key)
        places = shuffled(key, side * side, jnp.arange(n + 2 * coins))
        at = jnp.stack([places % side, places // side], 1).astype(jnp.int16)
        turn = jax.random.randint(key, (n,), 0, 3, jnp.int8)
        hit = at[:, 0] * side + at[:, 1] == np.arange(side * side)[:, None]
        grid = (hit * np.concatenate([np.arange(n) + len(Items), what])).sum(1, dtype=jnp.int16)
        return make_state(
            agent_locs=jnp.concatenate([at[:n], turn[:, None].astype(jnp.int16)], 1),
            agent_invs=jnp.zeros((n, 2), jnp.int8),
            step=0,
            outer_t=0,
            done=False,
            grid=grid.reshape(side, side),
            red_coins=at[n : n + coins],
            blue_coins=at[n + coins :],
            freeze=jnp.full((n, n), -1, jnp.int16),
        )

    return start


def _matrix_reset(lib: Any) -> Callable[[Array], tuple[Array, Any]]:
    start, obs = _matrix_start(lib), _matrix_obs(lib)

    def reset(key: Array) -> tuple[Array, Any]:
        state = start(key)
        return obs(state), state

    return reset


def _last(hits: Array) -> Array:
    """Of several writes [W, ...] to a cell the last counts, as in the library's scatters."""
    return hits & ~jnp.flip(jnp.cumsum(jnp.flip(hits, 0), 0) - jnp.flip(hits, 0), 0).astype(bool)


def _matrix_step(lib: Any, payoff: np.ndarray, penalty: int) -> Callable[..., tuple]:
    from jaxmarl.environments.storm.storm import INTERACT_THRESHOLD, Actions, Items

    n, coins, side, first = lib.num_agents, lib.NUM_COINS, lib.GRID_SIZE, len(Items)
    cells, agents = np.arange(side * side), np.arange(n)
    start, obs = _matrix_start(lib), _matrix_obs(lib)

    def part(key: Array, collided: Array, moved: Array, old: Array, new: Array) -> Array:
        """Of agents that meet in a cell one that stayed keeps it, else one at random; the others go back."""
        left = collided & moved[:, None]
        for _ in range(max(n // 2, 1)):
            going = left.any()
            group = collided[jnp.argmax(left.any(1))] & going
            k, later = jax.random.split(key)
            lucky = jnp.cumsum(group) > jax.random.randint(k, (1,), 0, group.sum())
            stayed = group & ~moved
            keeps = jnp.argmax(jnp.where(stayed.any(), stayed, lucky))
            new = jnp.where((group & (agents != keeps))[:, None], old, new)
            left &= ~group[:, None]
            key = jnp.where(going, later, key)
        return new

    def one_zapper(key: Array, target: Array) -> Array:
        """Of agents with the same target one at random keeps it."""
        left = target >= first
        for i in range(n):
            group = left & (target == target[i]) & left[i]
            k, later = jax.random.split(key)
            lucky = jnp.argmax(jnp.cumsum(group) > jax.random.randint(k, (1,), 0, group.sum()))
            target = jnp.where(group & (agents != lucky), Items.empty, target)
            key = jnp.where(left[i], later, key)
            left &= ~group
        return target

    def zapped(key: Array, aim: Array, near: Array, invs: Array, freeze: Array) -> tuple[Array, Array]:
        """Rewards [A] and freezes [A, A] where agents [A] aim at what stands in a cell."""
        _, k_near, k = jax.random.split(key, 3)
        k_far = jax.random.split(k)[1]
        for k, which in ((k_near, near), (k_far, ~near)):
            target = jnp.where(which, aim, Items.empty)
            same = (target[:, None] == target) & (target >= first)
            shared = (same.sum(1) > 1).any()
            aim = jnp.where(which, rarely(shared, one_zapper, target, k, target), aim)
        who = jnp.maximum(aim - first, 0)
        aim = jnp.where((aim >= first) & (freeze.max(-1) > 0)[who], Items.empty, aim)
        hit, who = aim >= first, jnp.maximum(aim - first, 0)
        pair = hit[:, None] & (who[:, None] == agents)
        freeze = jnp.where(pair | pair.T, jnp.int16(penalty), freeze)
        share = invs / jnp.where(invs.sum(-1) > 0, invs.sum(-1), 1)[:, None]
        games = ((share[who, None, :, None] * payoff).sum(2) * share[:, None]).sum(2)
        games = jnp.where(hit[:, None], games, 0.0)
        zapper = jnp.where(hit, games[who, 0], 0.0)
        zappee = jnp.where(hit, zapper[who] + games[:, 1], 0.0)
        zappee = jnp.where(hit, zappee, zappee[0])
        written = _last(who[:, None] == agents)
        return jnp.where(written.any(0), (written * zappee[:, None]).sum(0), zapper), freeze

    def freed(key: Array, free: Array, locs: Array, invs: Array, grid: Array, red: Array, blue: Array) -> tuple:
        """Agents that may move again and coins that were taken go to cells at random."""
        _, k_place, k_turn = jax.random.split(key, 3)
        at = lambda x: x[:, 0].astype(jnp.int32) * side + x[:, 1]
        gone = [grid.reshape(-1)[at(x)] != what for x, what in ((red, Items.red_coin), (blue, Items.blue_coin))]
        needs, things = [free, *gone], [locs[:, :2], red, blue]
        # the library looks for free cells by the number of the draw, and draws a cell for each
        words = [jnp.uint32(0)] * -(-side * side // 32)
        for need, thing in zip(needs, things):
            cell = at(thing)
            for i in range(len(thing)):
                for w in range(len(words)):
                    bit = jnp.where(cell[i] // 32 == w, jnp.uint32(1) << (cell[i] % 32).astype(jnp.uint32), 0)
                    words[w] = jnp.where(need[i], words[w] & ~bit, words[w] | bit)
        empty = [~w & jnp.uint32(min(2 ** (side * side - 32 * i), 2**32) - 1) for i, w in enumerate(words)]
        draws = []
        for need in needs:
            t = jnp.int32(-1)
            for i in range(len(need)):
                found = jnp.int32(side * side)
                for w in reversed(range(len(empty))):
                    skip = jnp.clip(t + 1 - 32 * w, 0, 32)
                    rest = empty[w] & jnp.where(skip > 31, 0, jnp.uint32(0xFFFFFFFF) << (skip % 32).astype(jnp.uint32))
                    lowest = 32 * w + jax.lax.population_count((rest & -rest) - 1).astype(jnp.int32)
                    found = jnp.where(rest != 0, lowest, found)
                t = jnp.where(need[i], found, t + 1)
                draws.append(jnp.where(need[i], found, side * side))
                for w in range(len(empty)):
                    bit = jnp.where(need[i] & (found // 32 == w), jnp.uint32(1) << (found % 32).astype(jnp.uint32), 0)
                    empty[w] &= ~bit
        draws = jnp.stack(draws)
        place = shuffled(k_place, side * side, draws)
        place = jnp.stack([place % side, place // side], 1)
        place = jnp.where(draws[:, None] < side * side, place, -1).astype(jnp.int16)
        was = jnp.concatenate(things)
        now = jnp.where(jnp.concatenate(needs)[:, None], place, was)
        on = lambda x: at(x)[:, None] == cells
        new = jnp.where(on(locs).any(0), Items.empty, grid.reshape(-1))
        new = _place_agents(new, on(now[:n]))
        for i, what in enumerate((Items.red_coin, Items.blue_coin)):
            new = jnp.where(gone[i].any() & on(now[n + i * coins :][:coins]).any(0), what, new)
        turn = jnp.where(free, jax.random.randint(k_turn, (n,), 0, 3, jnp.int8), locs[:, 2])
        locs = jnp.concatenate([now[:n], turn[:, None].astype(jnp.int16)], 1)
        invs = jnp.where(free[:, None], jnp.int8(0), invs)
        return locs, invs, new.astype(jnp.int16).reshape(side, side), now[n : n + coins], now[n + coins :]

    def _place_agents(grid: Array, on: Array) -> Array:
        for i in range(n):
            grid = jnp.where(on[i], first + i, grid)
        return grid

    def step(key: Array, state: Any, actions: Any) -> tuple:
        action = jnp.stack([jnp.asarray(actions[a]) for a in lib.agents])
        old, freeze = state.agent_locs, state.freeze
        able = freeze.max(-1) <= 0
        action = jnp.where(able, action, Actions.stay)

        ahead = jnp.asarray(STEP)[old[:, 2]]
        xy = old[:, :2] + (action == Actions.forward)[:, None] * ahead
        turn = (old[:, 2] + (action == Actions.left) - (action == Actions.right)) % 4
        new = jnp.concatenate([jnp.clip(xy, 0, side - 1), turn[:, None]], 1).astype(jnp.int16)
        moved = (new[:, :2] != old[:, :2]).any(1)
        collided = (new[:, None, :2] == new[:, :2]).all(-1)
        clash = (moved & (collided.sum(1) > 1)).any()
        crowd = collided & (collided.sum(1) > 1)[:, None]
        locs = rarely(clash, part, new, key, crowd, moved, old, new)

        # moves, then coins, agents and beams in the grid
        grid = state.grid.reshape(-1)
        at = locs[:, 0].astype(jnp.int32) * side + locs[:, 1]
        under = grid[at]
        taken = under[:, None] == np.array([Items.red_coin, Items.blue_coin])
        invs = state.agent_invs + taken
        left = (old[:, 0].astype(jnp.int32) * side + old[:, 1])[:, None] == cells
        grid = jnp.where(left.any(0), Items.empty, grid)
        grid = _place_agents(grid, at[:, None] == cells)
        grid = jnp.where(grid == Items.interact, Items.empty, grid)

        zaps, ready = action >= Actions.zap_forward, invs.sum(-1) > INTERACT_THRESHOLD
        armed = zaps & ready & able
        ahead, right, back = (jnp.asarray(np.roll(STEP, -i, 0))[locs[:, 2]] for i in (0, 1, 3))
        here = locs[:, :2].astype(jnp.int32)
        near, far = (jnp.clip(here + i * ahead, 0, side - 1) for i in (1, 2))
        beams = [near, far]
        for sideways in (right, back):
            beam = here + ahead + sideways
            out = ((beam < 0) | (beam > side - 1)).any(1) | (locs[:, 2] > side - 1)
            beams.append(jnp.where(out[:, None], near, beam))
        beams = jnp.stack(beams, 1)
        beams = beams[..., 0] * side + beams[..., 1]
        items = grid[beams]
        kind = jnp.clip(action - Actions.zap_forward, 0, 3)
        chosen = lambda k: jnp.take_along_axis(items, k[:, None], 1)[:, 0]
        aim, checked = chosen(kind), chosen(jnp.minimum(kind, 2))
        who = jnp.maximum(checked - first, 0)
        valid = (checked >= first) & able[who] & ready[who] & (checked != agents + first) & armed
        aim = jnp.where(valid, jnp.where(aim == Items.empty, Items.interact, aim), Items.empty)
        rewards, new_freeze = rarely(
            valid.any(),
            zapped,
            (jnp.zeros(n), freeze),
            *(key, aim, action == Actions.zap_forward, invs, freeze),
        )
        # an agent without a beam writes what was there over another's beam of the same kind
        lit = armed[:, None] & ~(
            (beams[:, None] == beams) & (agents[:, None] < agents)[..., None] & ~armed[None, :, None]
        ).any(1)
        beam = ((beams.reshape(-1, 1) == cells) & lit.reshape(-1, 1)).any(0)
        grid = jnp.where(beam & (grid == Items.empty), Items.interact, grid)
        grid = grid.astype(jnp.int16).reshape(side, side)

        new_freeze = new_freeze - ((new_freeze <= freeze) & (new_freeze > 0)).astype(jnp.int16)
        free = ((new_freeze == 0) & (freeze == 1)).any(-1)
        locs, invs, grid, red, blue = rarely(
            free.any(),
            freed,
            (locs, invs, grid, state.red_coins, state.blue_coins),
            *(key, free, locs, invs, grid, state.red_coins, state.blue_coins),
        )
        state = state.replace(
            agent_locs=locs,
            agent_invs=invs,
            step=state.step + 1,
            done=False,
            grid=grid,
            red_coins=red,
            blue_coins=blue,
            freeze=new_freeze,
        )
        ended = state.step == lib.num_inner_steps
        begin = lambda key, outer: jax.tree.map(jnp.asarray, start(key).replace(outer_t=outer + 1))
        state = rarely(ended, begin, jax.tree.map(jnp.asarray, state), key, state.outer_t)
        over = state.outer_t == lib.num_outer_steps
        state = state.replace(done=over)
        done = {f"agent_{a}": over for a in lib.agents} | {"__all__": over}
        mean = state.agent_invs.mean(axis=0)
        info = {
            "discount": jnp.zeros((), jnp.int8),
            "coin_ratio": jnp.clip(mean[0] / (mean.sum() + 1e-9), 0.0, 1.0),
        }
        return obs(state), state, jnp.where(ended, 0.0, rewards), done, info

    return step
