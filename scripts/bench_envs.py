"""Speed of the environments under random play: ours against the wrapped library, used as its own scripts use it.

    python scripts/bench_envs.py                                      # native and cheap wrapped ids; minutes on 2 cores
    python scripts/bench_envs.py --families                           # one id of every family; half an hour
    python scripts/bench_envs.py --env jaxmarl/MPE_simple_spread_v3 --widths 16 1024
    python scripts/bench_envs.py --env dispersion --widths 16 --steps 2000 --repeats 5          # seconds

Each form is one jitted scan over rollouts of 128 steps of `width` environments with uniformly random legal actions:

    pool     jaxstack, new episodes from a pool of starts made once per rollout (the default)
    exact    jaxstack, a reset in every step
    library  the library's own auto-reset: `step` of JaxMARL and gymnax under vmap, brax with its training wrappers

Ours draws the random numbers of all actions before the first step, as its training does (`rollout.random_policy`), the
library in every step. All give the same: reward and done flag, summed in every step, and the observation to act on,
which is carried to the next step, where a policy needs it, as the libraries' own scripts do (the speed test of
JaxMARL's walkthrough, PureJaxRL): ours as one array for all agents, JaxMARL's by agent. (The true last observation,
which only ours has, is not asked for.) Observations are not summed: that is the dearest part of a cheap environment's
step, no environment's work, and the same for all forms.

Each repeat runs all forms one after the other on the same number of steps, so that load on the machine hits all alike.
Shown are the median of steps per second and the median of the ratios pool / other within a repeat with its quartiles,
in wall time; the JSON has both in CPU time too, which counts waiting threads. Above 1 the pool is faster.
"""

import argparse
import contextlib
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import bench_report
import jax
import jax.numpy as jnp
import numpy as np

from jaxstack import envs
from jaxstack.core.errors import UserError
from jaxstack.envs import rollout, vector
from jaxstack.envs.base import Environment
from jaxstack.report.timing import Taken, in_turn, quartiles, timed

DEFAULT_ENVS = (
    *envs.ids("native"),
    "jaxmarl/MPE_simple_spread_v3",
    "jaxmarl/overcooked/cramped_room",
    "gymnax/CartPole-v1",
)
FAMILIES = (
    "jaxmarl/MPE_simple_spread_v3",
    "jaxmarl/smax/2s3z",
    "jaxmarl/overcooked/cramped_room",
    "jaxmarl/overcooked_v2/cramped_room",
    "jaxmarl/hanabi",
    "jaxmarl/hopper_3x1",
    "jaxmarl/switch_riddle",
    "jaxmarl/coin_game",
    "jaxmarl/jaxnav",
    "jaxmarl/storm_np",
    "gymnax/CartPole-v1",
    "gymnax/Breakout-MinAtar",
    "brax/hopper",
)
DEFAULT_WIDTHS = (1, 16, 128, 1024)
FORMS = ("pool", "exact", "library")

Run = Callable[[Any, jax.Array], tuple[Any, jax.Array]]
"""(carry, key) -> (carry, sum of all outputs); what is in the carry is computed in every step, as it is returned"""
Step = Callable[[Any, Any], tuple[Any, Any]]
"""(carry with the observation, random numbers) -> (carry, outputs) of one step of all environments"""


def total(tree: Any) -> jax.Array:
    return sum((jnp.sum(x, dtype=jnp.float32) for x in jax.tree.leaves(tree)), jnp.float32(0))


def play(step: Step, carry: Any, random: Any) -> tuple[Any, jax.Array]:
    def body(c: tuple[Any, jax.Array], x: Any) -> tuple[tuple[Any, jax.Array], None]:
        carry, out = step(c[0], x)
        return (carry, c[1] + total(out)), None

    return jax.lax.scan(body, (carry, jnp.float32(0)), random)[0]


def ours(env: Environment, width: int, num_steps: int, auto_reset: vector.AutoReset) -> tuple[Run, Any]:
    vec = envs.vectorise(env, width, auto_reset)
    act, draw = rollout.random_policy(vec)

    def run(vs: vector.VecState, key: jax.Array) -> tuple[vector.VecState, jax.Array]:
        k_act, k_pool, k_step = vector.rollout_keys(vec, key, num_steps)

        def step(c: tuple, random: tuple[jax.Array, jax.Array]) -> tuple[tuple, Any]:
            vs, pool = c
            _, action, _ = act(random[0], (), vs)
            vs, last, pool = vector.step(vec, random[1], vs, action, pool)
            return (vs, pool), (last.reward, last.terminated | last.truncated)

        random = draw(k_act, num_steps), k_step
        (vs, _), out = play(step, (vs, vector.make_pool(vec, k_pool)), random)
        return vs, out

    return jax.jit(run), jax.jit(partial(vector.init, vec))(jax.random.key(0))


def library(id: str, env: Any, width: int, num_steps: int) -> tuple[Run, Any] | None:
    """None for native environments, which wrap nothing."""
    family = id.partition("/")[0]
    if family not in PEERS:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step, carry = PEERS[family](env, width)
    return jax.jit(lambda carry, key: play(step, carry, jax.random.split(key, num_steps))), carry


def jaxmarl_step(env: Any, width: int) -> tuple[Step, Any]:
    import jaxmarl

    from jaxstack.envs.jaxmarl import adapter, mabrax

    # ours switches off the first of the two auto-resets of MABrax; its users get both
    both = env.name in mabrax.IDS
    lib = jaxmarl.make(env.name, **dict(env.options)) if both else adapter.library(env.name, env.options)[0]
    legal = {"smax": "get_avail_actions", "hanabi": "get_legal_moves"}.get(env.name.split("/")[0])

    def act(key: jax.Array, state: Any) -> dict[str, jax.Array]:
        keys = dict(zip(lib.agents, jax.random.split(key, lib.num_agents)))
        if legal is None:
            return {a: lib.action_space(a).sample(keys[a]) for a in lib.agents}
        masks = getattr(lib, legal)(state)
        return {a: jax.random.categorical(keys[a], jnp.where(masks[a], 0.0, -jnp.inf)) for a in lib.agents}

    def step(carry: Any, key: jax.Array) -> tuple[Any, Any]:
        _, state = carry
        k_act, k_step = jax.random.split(key)
        action = jax.vmap(act)(jax.random.split(k_act, width), state)
        obs, state, reward, done, _ = jax.vmap(lib.step)(jax.random.split(k_step, width), state, action)
        return (obs, state), (reward, done)

    return step, jax.jit(jax.vmap(lib.reset))(jax.random.split(jax.random.key(0), width))


def gymnax_step(env: Any, width: int) -> tuple[Step, Any]:
    import gymnax

    lib, params = gymnax.make(env.name)
    params = params.replace(**dict(env.options))
    keys = jax.random.split(jax.random.key(0), width)

    def step(carry: Any, key: jax.Array) -> tuple[Any, Any]:
        _, state = carry
        k_act, k_step = jax.random.split(key)
        action = jax.vmap(lib.action_space(params).sample)(jax.random.split(k_act, width))
        env_step = jax.vmap(lib.step, in_axes=(0, 0, 0, None))
        obs, state, reward, terminated, truncated, _ = env_step(jax.random.split(k_step, width), state, action, params)
        return (obs, state), (reward, terminated | truncated)

    return step, jax.jit(jax.vmap(lib.reset, in_axes=(0, None)))(keys, params)


def brax_step(env: Any, width: int) -> tuple[Step, Any]:
    from brax import envs as brax_envs

    lib = brax_envs.create(env.name, env.episode_length, batch_size=width, backend=env.backend, **dict(env.options))

    def step(state: Any, key: jax.Array) -> tuple[Any, Any]:
        action = jax.random.uniform(key, (width, lib.action_size), minval=-1.0, maxval=1.0)
        state = lib.step(state, action)
        return state, (state.reward, state.done)

    return step, jax.jit(lib.reset)(jax.random.key(0))


PEERS: dict[str, Callable[[Any, int], tuple[Step, Any]]] = {
    "jaxmarl": jaxmarl_step,
    "gymnax": gymnax_step,
    "brax": brax_step,
}


def measure(id: str, width: int, args: argparse.Namespace) -> dict[str, Any]:
    """One row: steps per wall and CPU second of each form, and quartiles of the ratios pool / form."""
    with contextlib.redirect_stdout(None):  # jaxmarl greets
        env = envs.make(id)
    forms: dict[str, tuple[Run, Any]] = {
        "pool": ours(env, width, args.num_steps, "pool"),
        "exact": ours(env, width, args.num_steps, "exact"),
    }
    peer = library(id, env, width, args.num_steps)
    if peer is not None:
        forms["library"] = peer
    calls = max(1, round(args.steps / (width * args.num_steps)))
    steps = calls * width * args.num_steps

    def play(form: str, repeat: int) -> Taken:
        run, carry = forms[form]
        out = jnp.zeros(())

        def rollouts() -> None:
            nonlocal carry, out
            for call in range(calls):
                carry, out = run(carry, jax.random.key(repeat * calls + call))
            jax.block_until_ready((carry, out))

        taken = timed(rollouts)
        if not bool(jnp.isfinite(out)):
            raise UserError(f"{id}, {form}: outputs are not finite")
        forms[form] = run, carry
        return taken

    taken = in_turn({form: partial(play, form) for form in forms}, args.repeats)  # the first one compiles
    wall, cpu = ({form: [t[i] for t in found] for form, found in taken.items()} for i in range(2))
    row: dict[str, Any] = {"env": id, "width": width, "steps_per_repeat": steps}
    for form in forms:
        row[form] = {
            "steps_per_s": steps / float(np.median(wall[form])),
            "steps_per_cpu_s": steps / float(np.median(cpu[form])),
        }
        if form != "pool":
            for name, times in (("pool_ratio_quartiles", wall), ("pool_cpu_ratio_quartiles", cpu)):
                row[form][name] = quartiles(times[form], times["pool"])
    return row


def line(row: dict[str, Any]) -> str:
    speeds = [f"{row[f]['steps_per_s'] / 1e3:>12.1f}" if f in row else f"{'-':>12}" for f in FORMS]
    ratios = []
    for form in FORMS[1:]:
        low, mid, high = row[form]["pool_ratio_quartiles"] if form in row else (np.nan,) * 3
        ratios.append(f"{mid:.2f} [{low:.2f}, {high:.2f}]" if form in row else "-")
    return f"{row['env']:<38}{row['width']:>6}{''.join(speeds)}{ratios[0]:>22}{ratios[1]:>22}"


def header() -> str:
    speeds = "".join(f"{f'{f} k/s':>12}" for f in FORMS)
    return f"{'environment':<38}{'width':>6}{speeds}{'pool / exact':>22}{'pool / library':>22}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--env", nargs="+", default=list(DEFAULT_ENVS), metavar="ID")
    which.add_argument(
        "--families", dest="env", action="store_const", const=list(FAMILIES), help="wrapped ids, one each"
    )
    parser.add_argument("--widths", nargs="+", type=int, default=list(DEFAULT_WIDTHS))
    parser.add_argument("--num-steps", type=int, default=128, help="length of a rollout")
    parser.add_argument("--steps", type=int, default=50_000, help="environment steps of one repeat, at least a rollout")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_envs.json"))
    args = parser.parse_args()
    if args.repeats < 5:
        parser.error(f"--repeats {args.repeats}: expected at least 5, for quartiles")
    rows = []
    facts: dict[str, Any] = dict(backend=jax.default_backend(), num_steps=args.num_steps, repeats=args.repeats)
    print(header())
    for id in args.env:
        for width in args.widths:
            row = measure(id, width, args)
            rows.append(row)
            print(line(row), flush=True)
            # a long run that is stopped keeps what it has measured
            bench_report.write(args.out, rows, **facts)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
