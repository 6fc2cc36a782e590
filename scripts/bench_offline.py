"""Speed of the learners from data, of SAC, and of PTGOOD's planner and models, against public code.

    python scripts/bench_offline.py                                    ours alone; what has no peer says so
    python scripts/bench_offline.py --jax-corl PATH --unifloral PATH --rejax PATH     peers in JAX; PATH is a clone
    python scripts/bench_offline.py --corl PATH --ptgood PATH --torch-python PYTHON   peers in torch
    python scripts/bench_offline.py --cases plan --ptgood PATH --torch-python PYTHON --add     beside the rows in --out

td3_bc     an update of TD3+BC on 256 rows of 17 observations and 6 actions, two layers of 256: JAX-CORL's file
           (nissymori/JAX-CORL), whose critics normalise their layers, against ours with such critics; CORL's torch file
           (tinkoff-ai/CORL) against ours without. Aims: at least 1.0 and 1.3 times as fast.
td3_bc-64  the same with layers of 64; CORL's networks get that width too. Aim: at least 4 times CORL.
sac        a step of SAC on Pendulum with an update on 256 rows, two layers of 64 with ReLU: keraJLi/rejax, without its
           evaluations. Aim: at least 1.1 times as fast.
edac       an update of EDAC with 10 critics, three layers of 256: EmptyJackson/unifloral. Aim: at least 2.5 times.
seeds      8 vmapped seeds of TD3+BC with layers of 64 against one. Aim: at most 5 times the time.
plan       one plan of PTGOOD in a learned model: BayesWatch/ptgood, a mixture of 32 as marginal, networks of its sizes.
           Aims: at least 1.2 times as fast at width 10 and depth 3, 2 times at width 5; 8 environments at once in at
           most 6 times the time of one.
dynamics   a fit call of the 7 models, time per row learned: BayesWatch/ptgood. Aim: as fast.

Each case runs in a process of its own. Programs are compiled before they are timed. Repeats alternate between all that
is compared; shown are medians, ratios within a repeat with their quartiles, and the share of the machine's matrix rate
(the best float32 product of 1024 x 1024) that the products of an update or plan come to, by a count of the parameters.
A peer's file is imported from its clone with empty modules for packages that training does not need; torch runs with
one thread and with one a core, the faster of which counts. See bench_offline_torch.py.
"""

import argparse
import contextlib
import datetime
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bench_report
import jax
import jax.numpy as jnp
import numpy as np
from bench_agents import matrix_rate
from bench_offline_peers import (
    ACT,
    BATCH,
    OBS,
    PEERS,
    ROWS,
    Measure,
    Torch,
    fastest,
    jax_corl,
    lacks,
    rejax,
    synthetic,
    unifloral,
)

from jaxstack import agents
from jaxstack.agents import offline, planning, td3
from jaxstack.core import ledger, program
from jaxstack.core.errors import UserError
from jaxstack.core.learner import Learner
from jaxstack.data.files import save_dataset
from jaxstack.data.offline import dataset
from jaxstack.nn import bottleneck, dynamics
from jaxstack.nn.distributions import TanhNormal
from jaxstack.nn.ensembles import Critics, Net, forward
from jaxstack.report.timing import in_turn, quartiles, timed

ENV = "brax/halfcheetah"
"""Of that many observations and actions; it is not played."""
Row = dict[str, Any]


# --- what is compared


def ours(learner: Learner, updates: int, seeds: int = 1) -> Measure:
    """Seconds per step of the runner's own program."""
    data = None if learner.source is None else learner.source(learner.config)
    made = program.build(learner, range(seeds), ledger.Ledger(), data=data, chunk=updates, evaluate=False)
    items: Any = ()
    if (feed := made.feed()) is not None:
        with contextlib.closing(feed):
            items = feed.take(0, updates)

    def measure(_: int) -> float:
        state, alive = jax.block_until_ready(made.init())
        seconds = timed(lambda: jax.block_until_ready(made.advance(state, alive, 0, updates, items))).wall
        return seconds / updates

    return measure


def td3_bc(path: Path, width: int, norm: Any) -> Learner:
    """TD3+BC whose critics normalise their layers or not, its actor never."""
    cfg = agents.make(
        "td3_bc", env=ENV, dataset=str(path), actor_hidden=(width,) * 2, critic_hidden=(width,) * 2
    ).config
    task = offline.make_task(cfg)
    critics = Critics(Net(cfg.critic_hidden, 1, norm), td3.CRITICS)
    nets = td3.Nets(task, Net(cfg.actor_hidden, task.action_size), critics)
    update = lambda s, batch, number, key: td3.update(nets, s, batch, number, td3.draw(nets, key, cfg.batch_size))
    return offline.make_learner("td3_bc", task, lambda key, hypers: td3.init(nets, key, hypers), update, nets.actor)


def cells(params: Any) -> int:
    """Entries of the matrices that rows are multiplied by."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return sum(int(np.prod(x.shape)) for path, x in leaves if jax.tree_util.keystr(path[-1:]) == "['kernel']")


def of_update(learner: Learner, actor: float, critic: float) -> float:
    """Flops of an update whose products see the actor's matrices so many times and the critics' so many."""
    params = jax.eval_shape(learner.init, jax.random.key(0), learner.hypers).params
    return 2.0 * BATCH * (actor * cells(params["actor"]) + critic * cells(params["critic"]))


# --- rows


def report(
    case: str, seconds: dict[str, list[float]], flops: dict[str, float], unit: str, rate: float, about: Any = None
) -> list[Row]:
    """A row for each side."""
    rows: list[Row] = []
    for name, values in seconds.items():
        low, median, high = (float(q) * 1e3 for q in np.quantile(values, (0.25, 0.5, 0.75)))
        row: Row = {"case": f"{case}, {name}", "ms_quartiles": [low, median, high], "per": unit}
        own = next((v for k, v in flops.items() if name.startswith(k)), None)
        text = ""
        if own is not None:
            row["share_of_matrix_rate"] = own / (median * 1e-3) / rate
            text = f"   {row['share_of_matrix_rate']:.0%} of the matrix rate"
        if about and name.partition(",")[0] in ("CORL", "ptgood"):
            row |= about
        rows.append(row)
        print(f"{row['case']:52s} {median:9.4g} ms [{low:.4g}, {high:.4g}] per {unit}{text}", flush=True)
    return rows


def ratio(case: str, over: Sequence[float], under: Sequence[float], aim: float | None, at_least: bool = True) -> Row:
    low, median, high = found = quartiles(over, under)
    row: Row = {"case": case, "ratio_quartiles": found}
    text = ""
    if aim is not None:
        row |= {"target": aim, "met": median >= aim if at_least else median <= aim}
        text = f" (aim at {'least' if at_least else 'most'} {aim:g})"
    print(f"{case:52s} {median:9.2f} [{low:.2f}, {high:.2f}]{text}", flush=True)
    return row


def absent(case: str, why: str) -> Row:
    """The row of what was not measured."""
    print(f"{case:52s} not measured: {why}", flush=True)
    return {"case": case, "not_measured": why}


# --- cases


def updates_of_td3_bc(args: argparse.Namespace, rate: float, width: int) -> list[Row]:
    case, updates = f"td3_bc 2x{width}", args.updates or (160 if width > 64 else 800)
    aims = {"JAX-CORL": 1.0, "CORL": 1.3} if width > 64 else {"JAX-CORL": None, "CORL": 4.0}
    torch = None if lacks(args, "corl") else Torch(args)
    with tempfile.TemporaryDirectory() as folder:
        path = save_dataset(Path(folder) / "rows.npz", dataset("rows", **synthetic()))
        plain, normal = td3_bc(path, width, "none"), td3_bc(path, width, "before")
        measures = {"jaxstack": ours(plain, updates), "jaxstack with normalised critics": ours(normal, updates)}
    if not lacks(args, "jax_corl"):
        measures["JAX-CORL"] = jax_corl(args, width, updates)
    if torch:
        measures |= torch.measures("CORL", do="td3_bc", width=width, updates=updates)
    seconds = in_turn(measures, args.repeats)
    if torch:
        torch.child.close()
    flops = of_update(plain, 2.5, 4.5)
    rows = report(
        case, seconds, dict.fromkeys(("jaxstack", "JAX-CORL", "CORL"), flops), "update", rate, torch and torch.about
    )
    for peer, own in (("JAX-CORL", "jaxstack with normalised critics"), ("CORL", "jaxstack")):
        name = f"{case}, {peer} / {own}"
        why = lacks(args, peer.lower().replace("-", "_"))
        rows.append(absent(name, why) if why else ratio(name, fastest(seconds, peer), seconds[own], aims[peer]))
    return rows


def steps_of_sac(args: argparse.Namespace, rate: float) -> list[Row]:
    steps = args.updates or 2_000
    sizes = dict(num_envs=1, updates=1, buffer_size=10_000, learning_starts=BATCH, batch_size=BATCH)
    learner = agents.make("sac", env="gymnax/Pendulum-v1", rounds=min(100, steps), total_steps=steps, **sizes)
    assert learner.num_steps is not None
    one = ours(learner, learner.num_steps)
    measures: dict[str, Measure] = {"jaxstack": lambda n: one(n) / learner.samples_per_step}
    if not (why := lacks(args, "rejax")):
        measures["rejax"] = rejax(args, steps)
    seconds = in_turn(measures, args.repeats)
    rows = report("sac", seconds, dict.fromkeys(seconds, of_update(learner, 5, 6)), "step", rate)
    name = "sac, rejax / jaxstack"
    return [*rows, absent(name, why) if why else ratio(name, seconds["rejax"], seconds["jaxstack"], 1.1)]


def updates_of_edac(args: argparse.Namespace, rate: float) -> list[Row]:
    updates = args.updates or 8
    with tempfile.TemporaryDirectory() as folder:
        path = save_dataset(Path(folder) / "rows.npz", dataset("rows", **synthetic()))
        learner = agents.make("edac", env=ENV, dataset=str(path))
        measures = {"jaxstack": ours(learner, updates)}
    if not (why := lacks(args, "unifloral")):
        measures["unifloral"] = unifloral(args, max(updates // 4, 1))
    seconds = in_turn(measures, args.repeats)
    rows = report("edac", seconds, dict.fromkeys(seconds, of_update(learner, 5, 9)), "update", rate)
    name = "edac, unifloral / jaxstack"
    return [*rows, absent(name, why) if why else ratio(name, seconds["unifloral"], seconds["jaxstack"], 2.5)]


def many_seeds(args: argparse.Namespace, rate: float) -> list[Row]:
    updates = args.updates or 400
    with tempfile.TemporaryDirectory() as folder:
        path = save_dataset(Path(folder) / "rows.npz", dataset("rows", **synthetic()))
        learner = td3_bc(path, 64, "none")
        measures = {f"{n} seeds": ours(learner, updates, n) for n in (1, 8)}
    seconds = in_turn(measures, args.repeats)
    flops = of_update(learner, 2.5, 4.5)
    rows = report("seeds", seconds, {"1 seeds": flops, "8 seeds": 8 * flops}, "update", rate)
    return [*rows, ratio("seeds, 8 / 1", seconds["8 seeds"], seconds["1 seeds"], 5.0, at_least=False)]


class Planner:
    """Our planner with networks of the released sizes."""

    def __init__(self) -> None:
        size = OBS + ACT
        self.actor = Net((256,) * 3, 2 * ACT, activation="elu")
        self.dyn, self.encoders = dynamics.Dynamics(OBS, ACT), bottleneck.Encoders(size)
        k = jax.random.split(jax.random.key(0), 4)
        zero, one = jnp.zeros(size, jnp.float32), jnp.ones(size, jnp.float32)
        codes = jax.random.normal(k[3], (512, self.encoders.codes), jnp.float32)
        self.params = {
            "actor": self.actor.init(k[0], jnp.zeros((1, OBS), jnp.float32))["params"],
            "model": self.dyn.init(k[1])._replace(mean=zero, std=one),
            "encoders": self.encoders.init(k[2]),
            "marginal": bottleneck.first_mixture(codes, 512, k[3], 32, False),
        }

    def __call__(self, params: Any, key: Any, obs: Any, width: int, depth: int) -> Any:
        """The action for one observation."""

        def act(obs: Any, noise: Any) -> Any:
            mean, log_std = jnp.split(forward(self.actor, params["actor"], obs), 2, axis=-1)
            return TanhNormal(mean, jnp.clip(log_std, -20.0, 2.0)).sample_from(noise)[0]

        def score(obs: Any, action: Any) -> Any:
            x = jnp.concatenate([obs, action], -1)
            return bottleneck.rate(self.encoders, params["encoders"], params["marginal"], x)

        model = params["model"]
        advance = lambda e, obs, action: self.dyn.advance(model, self.dyn.elite(model, e), obs, action)
        parts = planning.Parts(act, advance, score, lambda obs: jnp.zeros(len(obs), bool))
        levels = planning.draw(key, width, depth, ACT, self.dyn.num_elites)
        return planning.plan(parts, levels, obs, 0.3, 0.99)[0]

    def weights(self) -> dict[str, int]:
        """Entries of the matrices of policy, one model and one encoder."""
        net, code = self.params["model"].params["net"], self.params["encoders"]["e"]
        return {"actor": cells(self.params["actor"]), "model": cells(net) // self.dyn.members, "encoder": cells(code)}

    def flops(self, width: int, depth: int) -> float:
        """Of the products of one plan."""
        size, nodes = self.weights(), [width ** (k + 1) for k in range(depth)]
        return 2.0 * (sum(nodes) * (size["actor"] + size["encoder"]) + sum(nodes[:-1]) * size["model"])

    def measure(self, width: int, depth: int, envs: int, plans: int) -> Measure:
        """Seconds per plan of so many environments at once."""
        one = lambda params, key, obs: self(params, key, obs, width, depth)
        many = lambda params, key, obs: jax.vmap(one, (None, 0, 0))(params, jax.random.split(key, envs), obs)
        obs = jax.random.normal(jax.random.key(1), (envs, OBS) if envs > 1 else (OBS,), jnp.float32)
        run = jax.jit(many if envs > 1 else one).lower(self.params, jax.random.key(0), obs).compile()

        def several(repeat: int) -> None:
            for n in range(plans):  # each action is played before the next is planned
                jax.block_until_ready(run(self.params, jax.random.key(plans * repeat + n), obs))

        return lambda repeat: timed(lambda: several(repeat)).wall / plans


def plans(args: argparse.Namespace, rate: float) -> list[Row]:
    planner, count, rows = Planner(), args.updates or 40, []
    torch, why = None, lacks(args, "ptgood")
    if not why:
        torch = Torch(args)
        if (theirs := torch.child.ask(do="weights", obs=OBS, act=ACT)) != planner.weights():
            raise UserError(f"--ptgood: its networks have {theirs} weights, expected {planner.weights()}")
    for width, aim in ((10, 1.2), (5, 2.0)):
        case, depth = f"plan {width}^3", 3
        measures = {"jaxstack": planner.measure(width, depth, 1, count)}
        measures["jaxstack, 8 environments"] = planner.measure(width, depth, 8, max(count // 8, 1))
        if torch:
            measures |= torch.measures("ptgood", do="plan", width=width, depth=depth, plans=count)
        seconds, flops = in_turn(measures, args.repeats), planner.flops(width, depth)
        shares = {"jaxstack, 8": 8 * flops, "jaxstack": flops, "ptgood": flops}
        rows += report(case, seconds, shares, "plan", rate, torch and torch.about)
        name = f"{case}, ptgood / jaxstack"
        own = seconds["jaxstack"]
        rows.append(absent(name, why) if why else ratio(name, fastest(seconds, "ptgood"), own, aim))
        rows.append(ratio(f"{case}, 8 environments / 1", seconds["jaxstack, 8 environments"], own, 6.0, at_least=False))
    if torch:
        torch.child.close()
    return rows


def model_fits(args: argparse.Namespace, rate: float) -> list[Row]:
    dyn, drawn, patience = dynamics.Dynamics(OBS, ACT), synthetic(), 1
    rows_ = dynamics.Rows(*(jnp.asarray(drawn[k]) for k in ("obs", "action", "reward", "next_obs")))
    model, count = dyn.init(jax.random.key(0)), jnp.int32(ROWS)
    mean, std = dynamics.scaler(rows_, count)
    model = model._replace(mean=mean, std=std)
    call = lambda model, rows, key: dynamics.fit_call(dyn, model, rows, count, key, batch=BATCH, patience=patience)
    run = jax.jit(call).lower(model, rows_, jax.random.key(0)).compile()
    per_epoch = (10 * BATCH - BATCH // 5) // dynamics.MINIBATCH * dynamics.MINIBATCH

    def own(repeat: int) -> float:
        found = []
        seconds = timed(lambda: found.append(jax.block_until_ready(run(model, rows_, jax.random.key(repeat))))).wall
        return seconds / (int(found[0][1]) * per_epoch)

    measures: dict[str, Measure] = {"jaxstack": own}
    torch, why = None, lacks(args, "ptgood")
    if not why:
        torch = Torch(args)
        measures |= torch.measures("ptgood", do="dynamics", patience=patience, batch=BATCH, obs=OBS, act=ACT)
    seconds = in_turn(measures, args.repeats)
    if torch:
        torch.child.close()
    flops = 6.0 * cells(model.params["net"])
    rows = report("dynamics", seconds, dict.fromkeys(("jaxstack", "ptgood"), flops), "row", rate, torch and torch.about)
    name = "dynamics, ptgood / jaxstack"
    return [*rows, absent(name, why) if why else ratio(name, fastest(seconds, "ptgood"), seconds["jaxstack"], 1.0)]


CASES: dict[str, Callable[[argparse.Namespace, float], list[Row]]] = {
    "td3_bc": lambda args, rate: updates_of_td3_bc(args, rate, 256),
    "td3_bc-64": lambda args, rate: updates_of_td3_bc(args, rate, 64),
    "sac": steps_of_sac,
    "edac": updates_of_edac,
    "seeds": many_seeds,
    "plan": plans,
    "dynamics": model_fits,
}


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    for peer in PEERS:
        parser.add_argument(f"--{peer.replace('_', '-')}", type=Path, metavar="PATH", help="a clone of it")
    parser.add_argument("--torch-python", type=Path, metavar="PYTHON", help="a Python that has torch and numpy")
    parser.add_argument("--updates", type=int, help="or steps or plans in a repeat; default: by case")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--add", action="store_true", help="keep the rows of other cases in --out")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_offline.json"))
    return parser


def main() -> int:
    parser = options()
    args = parser.parse_args()
    for peer in PEERS:
        path = getattr(args, peer)
        if path is not None and not path.is_dir():
            parser.error(f"--{peer.replace('_', '-')} {path}: expected the directory of a clone")
    if args.repeats < 5:
        parser.error(f"--repeats {args.repeats}: expected at least 5, for quartiles")
    rows: list[Row] = json.loads(args.out.read_text())["rows"] if args.add and args.out.is_file() else []
    if len(args.cases) > 1:  # each in a process of its own
        given = [x for x in sys.argv[1:] if x != "--add"]
        at = given.index("--cases") if "--cases" in given else None
        if at is not None:
            given = given[:at] + given[at + 1 + len(args.cases) :]
        for number, case in enumerate(args.cases):
            command = [sys.executable, __file__, *given, "--cases", case]
            command += ["--add"] * (args.add or number > 0)
            if code := subprocess.run(command, check=False).returncode:
                return code
        return 0
    (case,) = args.cases
    rate = max(matrix_rate() for _ in range(5))  # the machine may just have become quiet
    print(f"float32 matrix rate {rate / 1e9:.0f} Gflop/s")
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    found = [row | {"of": case, "matrix_rate": rate, "date": when} for row in CASES[case](args, rate)]
    rows = [row for row in rows if row["of"] != case] + found
    rows.sort(key=lambda row: list(CASES).index(row["of"]))
    bench_report.write(args.out, rows, backend=jax.default_backend(), repeats=args.repeats)
    print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
