"""The child process of bench_marl.py: other packages' environments and probes, run by a Python that has them.

    python bench_marl_peers.py

Commands come one a line on stdin, answers go one a line to stdout: {"do": "about"} -> versions of the packages that it
finds; {"do": "play", "peer": NAME, "steps": N} -> [steps, CPU seconds]; {"do": "audit", "arrays": NPZ, "null_reps": R}
-> values of dec-pomdp-diagnostics and the seconds that it took. The first play of a peer compiles and is not to be
counted. Ends with its input. What the packages print goes to stderr.

Sizes are those of bench_marl.py: foraging on 8 x 8 cells, 2 agents, 2 foods, sight 2, 50 steps; the tiny warehouse, 2
agents, sight 2, 500 steps. lbforaging gives its vector observation: the shape that 2.0.0 declares for the other one is
refused by gymnasium. jumanji steps 128 environments with its own auto-reset, actions drawn before the first step.
"""

import importlib.metadata
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

WIDTH, LENGTH = 128, 128
PACKAGES = {
    "lbforaging": "lbforaging",
    "robotic-warehouse": "rware",
    "jumanji-lbf": "jumanji",
    "jumanji-rware": "jumanji",
    "dec-pomdp-diagnostics": "dec-pomdp-diagnostics",
}
WINDOWS = {
    "OAR": ("oar", "oarR"),
    "HAR": ("har_ohist", "harRcond_ohist"),
    "PIF": ("pifOA_ohist", "pifOARcond_ohist"),
    "PIF-obs": ("pif_ohist", "pifRcond_ohist"),
    "AA": ("aa", "aaRcond"),
    "DAI": ("daiOA_ohist", "daiOARcond_ohist"),
}
"""dec-pomdp-diagnostics' names of a probe's bits and normalised value for feed-forward policies."""
HIDDEN = WINDOWS | {p: (f"{p.lower()}_hidden", f"{p.lower()}Rcond_hidden") for p in ("HAR", "PIF", "DAI")}


def lbforaging() -> Any:
    from lbforaging.foraging.environment import ForagingEnv  # pyright: ignore[reportMissingImports]

    return ForagingEnv(2, 1, 2, 1, None, (8, 8), 2, 2, 50, force_coop=False)


def rware() -> Any:
    from rware.warehouse import ObservationType, RewardType, Warehouse  # pyright: ignore[reportMissingImports]

    rest = dict(reward_type=RewardType.INDIVIDUAL, observation_type=ObservationType.IMAGE_DICT)
    return Warehouse(3, 8, 1, 2, 0, 2, 2, None, 500, **rest)


def one_by_one(env: Any) -> Iterator[tuple[int, float]]:
    """Play as many steps as are sent."""
    rng = np.random.default_rng(0)
    choices = env.action_space[0].n
    env.reset(seed=0)
    steps = yield 0, 0.0
    while True:
        begin = time.process_time()
        for action in rng.integers(0, choices, (steps, 2)).tolist():
            *_, done, truncated, _ = env.step(action)
            if done or truncated:
                env.reset()
        steps = yield steps, time.process_time() - begin


def jumanji_lbf() -> tuple[Any, int]:
    from jumanji.environments.routing.lbf.env import LevelBasedForaging  # pyright: ignore[reportMissingImports]
    from jumanji.environments.routing.lbf.generator import RandomGenerator  # pyright: ignore[reportMissingImports]

    return LevelBasedForaging(RandomGenerator(8, 2, 2, fov=2), time_limit=50, grid_observation=True), 6


def jumanji_rware() -> tuple[Any, int]:
    from jumanji.environments.routing.robot_warehouse.env import (  # pyright: ignore[reportMissingImports]
        RobotWarehouse,
    )
    from jumanji.environments.routing.robot_warehouse.generator import (  # pyright: ignore[reportMissingImports]
        RandomGenerator,
    )

    return RobotWarehouse(RandomGenerator(1, 3, 8, 2, sensor_range=2, request_queue_size=2), time_limit=500), 5


def many(env: Any, choices: int) -> Iterator[tuple[int, float]]:
    """Play rollouts until there are as many steps as are sent."""
    import jax
    import jax.numpy as jnp
    from jumanji.wrappers import VmapAutoResetWrapper  # pyright: ignore[reportMissingImports]

    env = VmapAutoResetWrapper(env)

    @jax.jit
    def rollout(carry: Any, key: Any) -> Any:
        def step(c: Any, action: Any) -> Any:
            (state, _), total = c
            state, ts = env.step(state, action)
            return ((state, ts.observation), total + ts.reward.sum() + ts.last().sum()), None

        actions = jax.random.randint(key, (LENGTH, WIDTH, 2), 0, choices)
        return jax.lax.scan(step, (carry, jnp.float32(0)), actions)[0]

    state, ts = jax.jit(env.reset)(jax.random.split(jax.random.key(0), WIDTH))
    carry, key = (state, ts.observation), 0
    steps = yield 0, 0.0
    while True:
        begin, played = time.process_time(), 0
        while played < steps:
            key += 1
            carry, total = rollout(carry, jax.random.key(key))
            played += LENGTH * WIDTH
        jax.block_until_ready((carry, total))
        steps = yield played, time.process_time() - begin


MAKE: dict[str, Callable[[], Iterator[tuple[int, float]]]] = {
    "lbforaging": lambda: one_by_one(lbforaging()),
    "robotic-warehouse": lambda: one_by_one(rware()),
    "jumanji-lbf": lambda: many(*jumanji_lbf()),
    "jumanji-rware": lambda: many(*jumanji_rware()),
}


def audit(path: str, null_reps: int) -> dict[str, Any]:
    """Probe a team's arrays [E, T, 2, ...] and time it."""
    import dec_pomdp_diagnostics as package  # pyright: ignore[reportMissingImports]

    drawn = np.load(path)
    episodes, steps = drawn["obs"].shape[:2]
    episode, step = (v.reshape(-1) for v in np.meshgrid(np.arange(episodes), np.arange(steps), indexing="ij"))
    rows = lambda x: {str(n): x[:, :, n].reshape(episodes * steps, *x.shape[3:]) for n in range(2)}
    both = lambda x: {"0": x, "1": x}
    hidden = rows(drawn["hidden"]) if "hidden" in drawn else None
    data = package.UserData(
        rows(drawn["obs"]), rows(drawn["action"]), both(step), both(episode), hidden, alg_name="RNN" if hidden else "FF"
    )
    cpu, wall = time.process_time(), time.perf_counter()
    found = package.compute_diagnostics(data, null_reps=null_reps).metrics
    taken = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
    values = {
        name: {"bits": found[f"{bits}_max"], "norm": found[f"{norm}_max"], "null": found[f"{norm}_max_null"]}
        for name, (bits, norm) in (HIDDEN if hidden else WINDOWS).items()
    }
    return {"values": values, **taken}


def versions() -> dict[str, str]:
    found = {}
    for peer, package in PACKAGES.items():
        try:
            found[peer] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            print(f"{peer}: {package} is not installed", file=sys.stderr)
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    players: dict[str, Any] = {}
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "about":
            answer: Any = versions()
        elif command["do"] == "audit":
            answer = audit(command["arrays"], command["null_reps"])
        else:
            peer = command["peer"]
            if peer not in players:
                players[peer] = MAKE[peer]()
                next(players[peer])
            answer = players[peer].send(command["steps"])
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
