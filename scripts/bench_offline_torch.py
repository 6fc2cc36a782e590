"""The child process of bench_offline.py: CORL's TD3+BC, PTGOOD's planner and models, run by a Python that has torch.

    python bench_offline_torch.py CORL PTGOOD        clones; - for one that there is not

Commands come one a line on stdin, answers go one a line to stdout: {"do": "about"} -> {"torch": version}; {"do":
"weights", "obs": O, "act": A} -> entries of the matrices of PTGOOD's networks; {"do": "td3_bc" | "plan" | "dynamics",
"threads": N, "repeat": R, ...} -> seconds per update, plan, and row learned. Ends with its input. What the packages
print goes to stderr.

Modules that the clones lack or do not need are empty; PTGOOD's mixture calls `.cuda()`, which changes nothing here.
"""

import functools
import importlib
import itertools
import json
import os
import sys
import time
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]

CORL, PTGOOD = Path(sys.argv[1]), Path(sys.argv[2])
ROWS, BATCH, OBS, ACT = 10_000, 256, 17, 6
WIDE = [200] * 4


def stand_in(name: str, **content: Any) -> None:
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(content)


def timed(call: Any) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def rows() -> dict[str, np.ndarray]:
    """Rows as those of bench_offline.py, by D4RL's names."""
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(ROWS, OBS)).astype(np.float32)
    action = rng.uniform(-0.99, 0.99, (ROWS, ACT)).astype(np.float32)
    after = 0.9 * obs + (action @ rng.normal(size=(ACT, OBS)) + rng.normal(size=obs.shape)) / 5
    found = dict(observations=obs, actions=action, rewards=obs[:, 0], next_observations=after.astype(np.float32))
    return found | {"terminals": (rng.random(ROWS) < 0.01).astype(np.float32)}


@functools.cache
def corl(width: int) -> tuple[Any, Any]:
    """CORL's learner with layers of a width, and its buffer."""
    stand_in("d4rl")
    stand_in("wandb")
    stand_in("gym", Env=object)
    stand_in("pyrallis", wrap=lambda: lambda function: function)
    sys.path.insert(0, str(CORL / "algorithms" / "offline"))
    script = importlib.import_module("td3_bc")
    nn = torch.nn

    def layers(inputs: int, out: int, *last: Any) -> Any:
        sizes = (inputs, width, width)
        between = [x for a, b in itertools.pairwise(sizes) for x in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(*between, nn.Linear(width, out), *last)

    actor = script.Actor(OBS, ACT, 1.0)
    critics = [script.Critic(OBS, ACT) for _ in range(2)]
    if width != 256:  # the file's own width
        actor.net = layers(OBS, ACT, nn.Tanh())
        for critic in critics:
            critic.net = layers(OBS + ACT, 1)
    adam = lambda net: torch.optim.Adam(net.parameters(), lr=3e-4)
    learner = script.TD3_BC(1.0, actor, adam(actor), critics[0], adam(critics[0]), critics[1], adam(critics[1]))
    buffer = script.ReplayBuffer(OBS, ACT, ROWS)
    buffer.load_d4rl_dataset(rows())
    return learner, buffer


def td3_bc(command: dict[str, Any]) -> float:
    learner, buffer = corl(command["width"])

    def run() -> None:
        for _ in range(command["updates"]):
            learner.train(buffer.sample(BATCH))

    return timed(run) / command["updates"]


@functools.cache
def ptgood() -> Any:
    """PTGOOD's modules."""
    stand_in("planners.basic", Tree=object)
    stand_in("pstar", pdict=dict)
    sys.path.insert(0, str(PTGOOD))
    torch.Tensor.cuda = lambda self, *_, **__: self
    names = dict(sac="rl.sac", ensembles="networks.ensembles", ceb="ml.ceb", mixtures="ml.mixtures")
    names |= dict(planners="planners.ceb_planners")
    return types.SimpleNamespace(**{k: importlib.import_module(v) for k, v in names.items()})


def ensemble(patience: int) -> Any:
    """PTGOOD's models as its script makes them, their inputs standardised."""
    options = ["elu", False, "normal", 5000, True, True, 512, 0.001, patience, 5, None, False, None, 0.0, None, None]
    made = ptgood().ensembles.DynamicsEnsemble(7, OBS, ACT, WIDE, *options, None, 0.0, None, "cpu")
    made.logger = types.SimpleNamespace(log=lambda *_: None)
    data = rows()
    made.scaler.fit(torch.from_numpy(np.concatenate([data["observations"], data["actions"]], 1)))
    return made


@functools.cache
def planner() -> Any:
    """(observation, width, depth) -> an action, as PTGOOD's script sets its planner up."""
    parts = ptgood()
    actor = parts.sac.Actor(OBS, ACT, [256] * 3, "elu", False, -20, 2)
    models = ensemble(10)
    ceb = parts.ceb.CEB(OBS, ACT, [256, 128, 64], 8, "normal", 0.01, "cpu")
    ceb.scaler, ceb.marginal_z = models.scaler, parts.mixtures.GMM(32, 8)
    plan = parts.planners.CEBVecTree(0.0, 1.0, 0.3)
    plan.termination_fn = None
    run = lambda obs, width, depth: plan.plan(obs, models, ceb, actor, None, depth, width)
    return run, {"actor": actor, "model": models.forward_models[0], "encoder": ceb.e_zx}


def weights(command: dict[str, Any]) -> dict[str, int]:
    assert (command["obs"], command["act"]) == (OBS, ACT)
    linear = lambda net: [m for m in net.modules() if isinstance(m, torch.nn.Linear)]
    return {name: sum(m.weight.numel() for m in linear(net)) for name, net in planner()[1].items()}


def plan(command: dict[str, Any]) -> float:
    run, _ = planner()
    obs = torch.randn((1, OBS))

    def several() -> None:
        for _ in range(command["plans"]):
            run(obs, command["width"], command["depth"])

    return timed(several) / command["plans"]


def fit(command: dict[str, Any]) -> float:
    """Seconds per row learned of a fit call of fresh models."""
    data, batch = rows(), command["batch"]
    models = ensemble(command["patience"])
    buffer = object.__new__(importlib.import_module("utils.replays").OfflineReplay)  # its own beginning loads d4rl
    buffer.device, buffer.size = "cpu", ROWS
    buffer.states, buffer.actions, buffer.next_states = data["observations"], data["actions"], data["next_observations"]
    buffer.rewards, buffer.not_dones = data["rewards"][:, None], 1 - data["terminals"][:, None]
    steps: list[float] = []
    seconds = timed(lambda: steps.extend(models.train_single_step(buffer, 0.2, batch)))
    learned = 10 * batch - int(batch * 0.2)
    return seconds / (len(steps) / -(-learned // 512) * learned)


def main() -> None:
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    does = {"weights": weights, "td3_bc": td3_bc, "plan": plan, "dynamics": fit}
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "about":
            answer: Any = {"torch": torch.__version__}
        else:
            torch.set_num_threads(command.get("threads", 1))
            torch.manual_seed(command.get("repeat", 0))
            np.random.seed(command.get("repeat", 0))  # noqa: NPY002 - what the packages draw from
            answer = does[command["do"]](command)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
