"""The peers of bench_offline.py: files of their clones, imported beside ours or run by a child that has torch."""

import argparse
import contextlib
import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_child import Child

from jaxstack.core.errors import UserError
from jaxstack.report.timing import timed

OBS, ACT, ROWS, BATCH = 17, 6, 10_000, 256
PEERS = ("corl", "jax_corl", "unifloral", "rejax", "ptgood")
Measure = Callable[[int], float]
"""Number of the repeat -> seconds per update, step or plan."""


def synthetic() -> dict[str, Any]:
    """Rows of a linear system with noise."""
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(ROWS, OBS)).astype(np.float32)
    action = rng.uniform(-0.99, 0.99, (ROWS, ACT)).astype(np.float32)
    after = 0.9 * obs + (action @ rng.normal(size=(ACT, OBS)) + rng.normal(size=obs.shape)) / 5
    ends = rng.random(ROWS) < 0.01
    return dict(obs=obs, action=action, reward=obs[:, 0], next_obs=after.astype(np.float32), terminated=ends)


def lacks(args: argparse.Namespace, peer: str) -> str | None:
    """Why a peer cannot be measured."""
    option = peer.replace("_", "-")
    if getattr(args, peer) is None:
        return f"--{option} PATH was not given"
    if peer in ("corl", "ptgood") and args.torch_python is None:
        return "--torch-python PYTHON was not given"
    return None


@contextlib.contextmanager
def imported(file: Path, **stand_ins: dict[str, Any]) -> Iterator[Any]:
    """A peer's file as a module; `stand_ins` are packages with what it wants of them, where they are not installed."""
    environment, name = dict(os.environ), f"peer_{file.stem}"
    for package, content in stand_ins.items():
        if package not in sys.modules and importlib.util.find_spec(package) is None:
            sys.modules[package] = types.ModuleType(package)
            vars(sys.modules[package]).update(content)
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise UserError(f"{file}: found no such file, expected that of a clone")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        os.environ.clear()  # they set flags for GPUs
        os.environ.update(environment)


class Fields:
    """In place of pydantic's: fields with defaults."""

    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields)


def jax_corl(args: argparse.Namespace, width: int, updates: int) -> Measure:
    rows, empty = synthetic(), {}
    gym = {"Env": object}
    configs = types.SimpleNamespace(from_cli=dict)
    packages = dict(d4rl=empty, wandb=empty, tqdm=empty, gym=gym, omegaconf={"OmegaConf": configs})
    with imported(args.jax_corl / "algos" / "td3bc.py", pydantic={"BaseModel": Fields}, **packages) as script:
        cfg = script.TD3BCConfig(hidden_dims=(width, width))
        data = script.Transition(*(jnp.asarray(rows[k]) for k in ("obs", "action", "reward", "next_obs", "terminated")))
        data = data._replace(dones=data.dones.astype(jnp.float32))
        begin = script.create_td3bc_train_state(jax.random.PRNGKey(0), data.observations[0], data.actions[0], cfg)
        update = jax.jit(script.TD3BC().update_n_times, static_argnums=(3,))

    def run(repeat: int) -> None:
        state, key = begin, jax.random.PRNGKey(repeat)
        for _ in range(updates // cfg.n_jitted_updates):
            key, own = jax.random.split(key)
            state, _ = update(state, data, own, cfg)
        jax.block_until_ready(state.actor.params)

    return lambda repeat: timed(lambda: run(repeat)).wall / updates


def unifloral(args: argparse.Namespace, updates: int) -> Measure:
    rows, empty = synthetic(), {}
    packages = dict(d4rl=empty, gym=empty, wandb=empty, tyro=empty)
    with imported(args.unifloral / "algorithms" / "edac.py", **packages) as script:
        cfg = script.Args(num_critics=10, batch_size=BATCH)
        names = ("obs", "action", "reward", "next_obs", "terminated")
        data = script.Transition(*(jnp.asarray(rows[k], jnp.float32) for k in names))
        actor, q, alpha = script.TanhGaussianActor(ACT), script.VectorQ(10), script.EntropyCoef()
        obs, action = data.obs[0], data.action[0]
        made = lambda i, net, inputs: script.create_train_state(cfg, jax.random.PRNGKey(i), net, inputs)
        parts = made(0, actor, [obs]), made(1, q, [obs, action]), made(1, q, [obs, action]), made(2, alpha, [])
        step = script.make_train_step(cfg, actor.apply, q.apply, alpha.apply, data)
        begin = (jax.random.PRNGKey(0), script.AgentTrainState(*parts))
        run = jax.jit(lambda s: jax.lax.scan(step, s, None, updates)[0]).lower(begin).compile()
    return lambda _: timed(lambda: jax.block_until_ready(run(begin))).wall / updates


def rejax(args: argparse.Namespace, steps: int) -> Measure:
    from gymnax.environments import classic_control

    class Pendulum(classic_control.Pendulum):
        """The step of gymnax before 1.0."""

        def step(self, key: Any, state: Any, action: Any, params: Any = None) -> Any:
            obs, state, reward, terminated, truncated, info = super().step(key, state, action, params)
            return obs, state, reward, terminated | truncated, info

    sys.path.insert(0, str(args.rejax / "src"))
    try:
        algorithms = importlib.import_module("rejax")
    except ImportError as e:
        raise UserError(f"--rejax {args.rejax}: cannot be imported ({e})") from e
    finally:
        sys.path.pop(0)
    sizes = dict(num_envs=1, buffer_size=10_000, fill_buffer=BATCH, batch_size=BATCH, num_epochs=1)
    rates = dict(learning_rate=1e-3, gamma=0.99, polyak=0.995, total_timesteps=steps, eval_freq=steps)
    sac = algorithms.get_algo("sac").create(env=Pendulum(), skip_initial_evaluation=True, **sizes, **rates)
    sac = sac.replace(eval_callback=lambda *_: jnp.float32(0))
    begin = jax.jit(sac.init_state)(jax.random.PRNGKey(0))
    run = jax.jit(lambda state: sac.train(train_state=state)[0]).lower(begin).compile()
    return lambda _: timed(lambda: jax.block_until_ready(run(begin).actor_ts.params)).wall / steps


class Torch:
    """The child process of both torch peers."""

    def __init__(self, args: argparse.Namespace) -> None:
        clones = [str(x) for x in (args.corl or "-", args.ptgood or "-")]
        script = str(Path(__file__).with_name("bench_offline_torch.py"))
        self.child = Child("torch", [str(args.torch_python), script, *clones])
        self.about = self.child.ask(do="about")

    def measures(self, name: str, **command: Any) -> dict[str, Measure]:
        """Seconds with one thread and with one a core."""
        counts = dict.fromkeys((1, os.cpu_count() or 1))
        ask = lambda repeat, n: self.child.ask(threads=n, repeat=repeat, **command)
        return {f"{name}, {n} threads": lambda r, n=n: ask(r, n) for n in counts}


def fastest(seconds: dict[str, list[float]], name: str) -> list[float]:
    """The seconds of the number of threads that is faster."""
    found = [v for k, v in seconds.items() if k == name or k.startswith(f"{name}, ")]
    return min(found, key=np.median)
