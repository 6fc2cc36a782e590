"""Training speed against the peers' own scripts: same network, batch, epochs and minibatches, same process.

    python scripts/bench_agents.py --jaxmarl PATH --purejaxrl PATH            all cases; PATH is a clone
    python scripts/bench_agents.py --jaxmarl PATH --cases mpe-16 --repeats 5
    python scripts/bench_agents.py --cases hyper seeds                        no clone needed

Cases with a peer: mpe-16, mpe-128, mpe-1024 (IPPO on simple_spread_v3), smax (recurrent IPPO on 2s3z), mabrax (IPPO on
hopper_3x1), cartpole (PPO). Our own: hyper (an update of HyperMARL against FuPS+ID at N = 8, and its growth up to
N = 30), seeds (8 vmapped seeds against one), update (what share of the matrix rate the gradient steps alone reach).

Each case runs in a process of its own, both its sides in the same. They are compiled ahead of time with the
persistent cache off. Repeats alternate between them, each a run of the same number of updates from the start; shown
are medians of steps per second, the median ratio within a repeat with its quartiles, compile seconds, and XLA's peak
memory (of one device). A peer's script is imported from its clone; its plotting, logging and configuration packages
are replaced by empty modules, and gymnax' six-value step by the five values PureJaxRL expects.
"""

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import bench_report
import jax
import numpy as np

from jaxstack import agents
from jaxstack.core import devices, ledger, program
from jaxstack.report.timing import in_turn, quartiles, timed

PPO = dict(num_epochs=4, num_minibatches=4, gamma=0.99, lam=0.95, clip=0.2, vf_coef=0.5, ent_coef=0.01)


class Side(NamedTuple):
    """A compiled training run: `run(repeat)` blocks until it is done; `updates(repeat)` is its part after the
    initialisation, to be called, untimed, for what is to be timed."""

    run: Callable[[int], None]
    compile_seconds: float
    peak_bytes: int
    updates: Callable[[int], Callable[[], None]] | None = None


class Case(NamedTuple):
    """What is trained: `updates` of `steps` environment steps each."""

    agent: str
    options: dict[str, Any]
    updates: int
    peer: Callable[["Case", argparse.Namespace], Side] | None
    target: float
    env_devices: int = 1
    """Measured with the environments over so many devices of the CPU too, where there are as many cores."""

    @property
    def learner(self) -> Any:
        size = self.options["num_envs"] * self.options["num_steps"]
        return agents.make(self.agent, total_steps=size * self.updates, **self.options)


def ours(learner: Any, updates: int, seeds: int = 1, over: tuple[int, int] = (1, 1)) -> Side:
    """The runner's own compiled program over all updates, seeds and environments over so many devices."""
    book = ledger.Ledger()
    begin = time.perf_counter()
    options: dict[str, Any] = dict(chunk=updates, evaluate=False, devices=over[0], env_devices=over[1])
    programs = program.build(learner, list(range(seeds)), book, **options)
    seconds = time.perf_counter() - begin

    def prepared(_: int) -> Callable[[], None]:
        state, alive = jax.block_until_ready(programs.init())
        return lambda: jax.block_until_ready(programs.advance(state, alive, 0, updates))

    return Side(lambda n: prepared(n)(), seconds, max(p.peak_bytes for p in book.programs), prepared)


def compiled(function: Callable, key: jax.Array) -> Side:
    begin = time.perf_counter()
    program = jax.jit(function).lower(key).compile()
    seconds = time.perf_counter() - begin
    m = program.memory_analysis()
    assert m is not None, "this backend has no memory analysis"
    peak = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
    return Side(lambda repeat: jax.block_until_ready(program(jax.random.PRNGKey(repeat))), seconds, peak)


@contextlib.contextmanager
def stand_ins(path: Path, *folders: str) -> Iterator[None]:
    """Import from a clone with empty modules where it wants packages that training does not need."""
    names = {n: types.ModuleType(n) for n in ("hydra", "omegaconf", "wandb", "navix") if not _installed(n)}
    if "hydra" in names:
        vars(names["hydra"])["main"] = lambda **_: lambda f: f
    if "omegaconf" in names:
        vars(names["omegaconf"])["OmegaConf"] = object
    if "wandb" in names:
        vars(names["wandb"])["log"] = lambda *_, **__: None
    sys.modules.update(names)
    places = [str(path / f) for f in folders]
    sys.path[:0] = places
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for place in places:
            sys.path.remove(place)


def _installed(name: str) -> bool:
    with contextlib.suppress(ValueError):
        return importlib.util.find_spec(name) is not None
    return False


def jaxmarl_config(case: Case) -> dict[str, Any]:
    o = case.options
    return {
        "LR": o["lr"],
        "NUM_ENVS": o["num_envs"],
        "NUM_STEPS": o["num_steps"],
        "TOTAL_TIMESTEPS": o["num_envs"] * o["num_steps"] * case.updates,
        "UPDATE_EPOCHS": o["num_epochs"],
        "NUM_MINIBATCHES": o["num_minibatches"],
        "GAMMA": o["gamma"],
        "GAE_LAMBDA": o["lam"],
        "CLIP_EPS": o["clip"],
        "SCALE_CLIP_EPS": False,
        "ENT_COEF": o["ent_coef"],
        "VF_COEF": o["vf_coef"],
        "MAX_GRAD_NORM": o["max_grad_norm"],
        "ACTIVATION": o.get("activation", "tanh"),
        "ANNEAL_LR": True,
        "ENV_KWARGS": {},
        "SEED": 0,
        "NUM_SEEDS": 1,
    }


def jaxmarl_mpe(case: Case, args: argparse.Namespace) -> Side:
    with stand_ins(args.jaxmarl, "baselines/IPPO"):
        script = importlib.import_module("ippo_ff_mpe")
        config = jaxmarl_config(case) | {"ENV_NAME": "MPE_simple_spread_v3"}
        return compiled(script.make_train(config), jax.random.PRNGKey(0))


def jaxmarl_mabrax(case: Case, args: argparse.Namespace) -> Side:
    with stand_ins(args.jaxmarl, "baselines/IPPO"):
        script = importlib.import_module("ippo_ff_mabrax")
        config = jaxmarl_config(case) | {"ENV_NAME": "hopper_3x1"}
        return compiled(script.make_train(config, jax.random.PRNGKey(0)), jax.random.PRNGKey(0))


def jaxmarl_smax(case: Case, args: argparse.Namespace) -> Side:
    with stand_ins(args.jaxmarl, "baselines/IPPO"):
        script = importlib.import_module("ippo_rnn_smax")
        kwargs = {"see_enemy_actions": True, "walls_cause_death": True, "attack_mode": "closest"}
        config = jaxmarl_config(case) | {"ENV_NAME": "HeuristicEnemySMAX", "MAP_NAME": "2s3z", "ENV_KWARGS": kwargs}
        config |= {"GRU_HIDDEN_DIM": case.options["gru"], "FC_DIM_SIZE": case.options["hidden"][0]}
        return compiled(script.make_train(config), jax.random.PRNGKey(0))


def purejaxrl_cartpole(case: Case, args: argparse.Namespace) -> Side:
    with stand_ins(args.purejaxrl, "purejaxrl"):
        import gymnax

        make = gymnax.make
        gymnax.make = five_values
        try:
            script = importlib.import_module("ppo")
            config = jaxmarl_config(case) | {"ENV_NAME": "CartPole-v1"}
            return compiled(script.make_train(config), jax.random.PRNGKey(0))
        finally:
            gymnax.make = make


def five_values(name: str) -> tuple[Any, Any]:
    """The step signature of gymnax before 1.0."""
    from gymnax.environments import classic_control

    class CartPole(classic_control.CartPole):
        def step(self, key, state, action, params=None):  # pyright: ignore[reportIncompatibleMethodOverride]
            obs, state, reward, terminated, truncated, info = super().step(key, state, action, params)
            return obs, state, reward, terminated | truncated, info

    env = CartPole()
    return env, env.default_params


def mpe(num_envs: int, updates: int, target: float) -> Case:
    options = PPO | dict(
        env="jaxmarl/MPE_simple_spread_v3",
        sharing="full",
        num_envs=num_envs,
        num_steps=128,
        lr=2.5e-4,
        max_grad_norm=0.5,
    )
    return Case("ippo", options, updates, jaxmarl_mpe, target)


CASES: dict[str, Case] = {
    "mpe-16": mpe(16, 40, 2.0),
    "mpe-128": mpe(128, 6, 2.0),
    "mpe-1024": mpe(1024, 1, 2.0),
    "smax": Case(
        "ippo",
        PPO
        | dict(
            env="jaxmarl/smax/2s3z",
            sharing="full",
            num_envs=128,
            num_steps=128,
            gru=128,
            hidden=(128,),
            common_torso=True,
            activation="relu",
            lr=4e-3,
            clip=0.05,
            max_grad_norm=0.25,
        ),
        1,
        jaxmarl_smax,
        1.1,
    ),
    "mabrax": Case(
        "ippo",
        PPO
        | dict(
            env="jaxmarl/hopper_3x1",
            sharing="full",
            num_envs=64,
            num_steps=300,
            lr=1e-3,
            ent_coef=2e-6,
            vf_coef=4.5,
            max_grad_norm=0.5,
        ),
        1,
        jaxmarl_mabrax,
        1.5,
        env_devices=2,
    ),
    "cartpole": Case(
        "ppo",
        PPO | dict(env="gymnax/CartPole-v1", num_envs=4, num_steps=128, lr=2.5e-4, max_grad_norm=0.5),
        200,
        purejaxrl_cartpole,
        1.3,
    ),
}


def interleaved(sides: dict[Any, Side], repeats: int, updates: bool = False) -> dict[Any, list[float]]:
    """Seconds of each run, or of its updates alone; the first round is not counted."""

    def measure(side: Side, repeat: int) -> float:
        return timed(side.updates(repeat) if updates and side.updates else partial(side.run, repeat)).wall

    return in_turn({name: partial(measure, side) for name, side in sides.items()}, repeats)


def matrix_rate() -> float:
    """Multiply-adds count two: the best float32 rate of a square matrix product of 1024, in flops per second."""
    x = jax.random.normal(jax.random.key(0), (1024, 1024))
    product = jax.jit(lambda a: a @ a)
    jax.block_until_ready(product(x))
    best = np.inf
    for _ in range(20):
        best = min(best, timed(lambda: jax.block_until_ready(product(x))).wall)
    return 2 * 1024**3 / best


def network_flops(learner: Any) -> float:
    """Flops of the matrix products of one run's updates: forward and backward cost three times a forward pass, times
    epochs, and one forward pass for the rollout and one for the values."""
    params = jax.eval_shape(learner.init, jax.random.key(0)).params
    cells = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params) if x.ndim == 2)
    cfg = learner.config
    samples = cfg.num_envs * cfg.num_steps * learner_agents(learner)
    return 2.0 * cells * samples * (3 * cfg.num_epochs + 1) * cfg.num_updates


def learner_agents(learner: Any) -> int:
    from jaxstack.agents.team_ppo import make_env

    return make_env(learner.config).spec.num_agents


def against_peer(name: str, case: Case, args: argparse.Namespace, rate: float) -> list[dict[str, Any]]:
    """A row for one device, and one for several where the case asks for it."""
    assert case.peer is not None
    learner = case.learner
    mine, count = {name: ours(learner, case.updates)}, case.env_devices
    if 1 < count <= jax.device_count():
        mine[f"{name}, environments over {count} devices"] = ours(learner, case.updates, over=(1, count))
    peer = case.peer(case, args)
    seconds = interleaved(mine | {"peer": peer}, args.repeats)
    steps = case.updates * learner.samples_per_step
    return [row(own, case, side, peer, seconds[own], seconds["peer"], steps, rate) for own, side in mine.items()]


def row(
    name: str, case: Case, mine: Side, peer: Side, seconds: list[float], theirs: list[float], steps: int, rate: float
) -> dict[str, Any]:
    ratio = quartiles(theirs, seconds)
    median = float(np.median(seconds))
    out = {
        "case": name,
        "target": case.target,
        "ratio_quartiles": ratio,
        "jaxstack_steps_per_s": steps / median,
        "peer_steps_per_s": steps / float(np.median(theirs)),
        "jaxstack_compile_s": mine.compile_seconds,
        "peer_compile_s": peer.compile_seconds,
        "jaxstack_peak_mib": mine.peak_bytes / 2**20,
        "peer_peak_mib": peer.peak_bytes / 2**20,
        "share_of_matrix_rate": network_flops(case.learner) / median / rate,
    }
    print(
        f"{name:10s} {out['jaxstack_steps_per_s'] / 1e3:9.1f} {out['peer_steps_per_s'] / 1e3:9.1f}   "
        f"{ratio[1]:.2f} [{ratio[0]:.2f}, {ratio[2]:.2f}] (aim {case.target})   "
        f"{mine.compile_seconds:5.1f} {peer.compile_seconds:5.1f}   "
        f"{out['jaxstack_peak_mib']:7.1f} {out['peer_peak_mib']:7.1f}   {out['share_of_matrix_rate']:.0%}",
        flush=True,
    )
    return out


def hyper(args: argparse.Namespace, _: float) -> list[dict[str, Any]]:
    """Seconds an update of HyperMARL-MLP and FuPS+ID on blind_particle_spread with N agents."""
    rows, updates = [], 4
    common = PPO | dict(env="blind_particle_spread", num_envs=16, num_steps=128, max_grad_norm=0.5, lr=5e-4)
    common["total_steps"] = 16 * 128 * updates
    sides, costs = {}, {}
    for count in (4, 8, 16, 30):
        env = {"env_args": (f"groups=[{count}]",)}
        sides[f"HyperMARL {count}"] = ours(agents.make("hypermarl", **common, **env), updates)
        if count == 8:
            sides["FuPS+ID 8"] = ours(agents.make("ippo", sharing="full+id", **common, **env), updates)
    seconds = interleaved(sides, args.repeats, updates=True)
    for name, values in seconds.items():
        costs[name] = float(np.median(values)) / updates
        rows.append({"case": f"hyper, {name} agents", "seconds_an_update": costs[name]})
        print(f"{name:14s} {costs[name] * 1e3:8.1f} ms an update", flush=True)
    ratio = quartiles(seconds["HyperMARL 8"], seconds["FuPS+ID 8"])
    growth = float(np.polyfit(np.log([4, 8, 16, 30]), np.log([costs[f"HyperMARL {n}"] for n in (4, 8, 16, 30)]), 1)[0])
    print(f"HyperMARL / FuPS+ID at N = 8: {ratio[1]:.2f} [{ratio[0]:.2f}, {ratio[2]:.2f}] (aim 1.5)")
    print(f"growth with N: exponent {growth:.2f} (aim at most 1)", flush=True)
    return [*rows, {"case": "hyper", "ratio_quartiles": ratio, "exponent": growth}]


def many_seeds(args: argparse.Namespace, _: float) -> list[dict[str, Any]]:
    """8 vmapped seeds against one, IPPO on MPE with 16 environments, on one device and spread over a device a core."""
    learner = mpe(16, 10, 4.0).learner
    spreads = dict.fromkeys((1, math.gcd(8, jax.device_count())))
    sides = {"one": ours(learner, 10)} | {f"{n}": ours(learner, 10, 8, (n, 1)) for n in spreads}
    seconds = interleaved(sides, args.repeats, updates=True)
    rows = []
    for spread in spreads:
        case = "seeds" if spread == 1 else f"seeds, over {spread} devices"
        ratio = quartiles(seconds[f"{spread}"], seconds["one"])
        print(f"8 {case} / 1 seed: {ratio[1]:.2f} [{ratio[0]:.2f}, {ratio[2]:.2f}] (aim below 4)", flush=True)
        rows.append({"case": case, "ratio_quartiles": ratio})
    return rows


def update_phase(args: argparse.Namespace, rate: float) -> list[dict[str, Any]]:
    """Share of the matrix rate in the gradient steps alone: what as many epochs more cost."""
    rows = []
    for name in ("mpe-16", "mpe-1024", "smax", "cartpole"):
        case, epochs = CASES[name], PPO["num_epochs"]
        longer = case._replace(options=case.options | {"num_epochs": 2 * epochs})
        learners = {"once": case.learner, "twice": longer.learner}
        sides = {key: ours(learner, case.updates) for key, learner in learners.items()}
        seconds = interleaved(sides, args.repeats, updates=True)
        flops = network_flops(learners["twice"]) - network_flops(learners["once"])
        times = np.asarray(seconds["twice"]) - np.asarray(seconds["once"])
        share = [float(q) for q in np.quantile(flops / times / rate, (0.25, 0.5, 0.75))]
        print(
            f"{name:10s} gradient steps: {share[1]:.0%} [{share[0]:.0%}, {share[2]:.0%}] of the matrix rate (aim 60%)"
        )
        part = float(np.median(times / np.asarray(seconds["once"])))
        print(f"           they are {part:.0%} of an update's time", flush=True)
        rows.append({"case": f"update, {name}", "share_of_matrix_rate_quartiles": share, "part_of_time": part})
    return rows


HEADER = "case       ours k/s  peer k/s   ratio                        compile s     peak MiB          of matrix rate"
OWN = {"hyper": hyper, "seeds": many_seeds, "update": update_phase}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jaxmarl", type=Path, help="a clone of JaxMARL")
    parser.add_argument("--purejaxrl", type=Path, help="a clone of PureJaxRL")
    parser.add_argument("--cases", nargs="+", choices=[*CASES, *OWN], default=[*CASES, *OWN])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_agents.json"))
    args = parser.parse_args()
    for option in ("jaxmarl", "purejaxrl"):
        path = getattr(args, option)
        if path is not None and not path.is_dir():
            parser.error(f"--{option} {path}: expected the directory of a clone")
    if args.repeats < 5:
        parser.error(f"--repeats {args.repeats}: expected at least 5, for quartiles")
    if len(args.cases) > 1:
        return apart(args)
    if missing := without_peer(args, args.cases[0]):
        parser.error(f"--cases {args.cases[0]}: expected --{missing} PATH, a clone of the peer")
    jax.config.update("jax_enable_compilation_cache", False)
    devices.show(os.cpu_count() or 1)  # XLA starts a thread a core either way
    rate = matrix_rate()
    name = args.cases[0]
    if name in OWN:
        rows = OWN[name](args, rate)
    else:
        print(f"float32 matrix rate {rate / 1e9:.0f} Gflop/s")
        print(HEADER)
        rows = against_peer(name, CASES[name], args, rate)
    bench_report.write(args.out, rows, backend=jax.default_backend(), matrix_rate=rate, repeats=args.repeats)
    return 0


def without_peer(args: argparse.Namespace, case: str) -> str | None:
    """The option that a case needs and that is missing."""
    needs = "purejaxrl" if case == "cartpole" else "jaxmarl"
    return needs if case in CASES and getattr(args, needs) is None else None


def apart(args: argparse.Namespace) -> int:
    """Each case in a process of its own, as a training script runs. Rows are joined after every case, so that a long
    run that is stopped keeps what it measured."""
    rows: list[dict[str, Any]] = []
    peers = [x for name in ("jaxmarl", "purejaxrl") if (path := getattr(args, name)) for x in (f"--{name}", str(path))]
    for case in args.cases:
        if missing := without_peer(args, case):
            print(f"{case:10s} left out: needs --{missing} PATH", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "rows.json"
            options = [*peers, "--cases", case, "--repeats", str(args.repeats), "--out", str(out)]
            if code := subprocess.run([sys.executable, __file__, *options], check=False).returncode:
                return code
            found = json.loads(out.read_text())
        rows += [row | {"matrix_rate": found["matrix_rate"]} for row in found["rows"]]
        bench_report.write(args.out, rows, backend=found["backend"], repeats=args.repeats)
    if rows:
        print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
