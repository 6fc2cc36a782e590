"""The child process of bench_marl.py that trains MATE's official code, run by a Python that has its packages.

    python bench_marl_mate.py PATH          PATH is a clone of uoe-agents/MATE

The Python needs torch, gymnasium and lbforaging; gymnasium stands in for the gym 0.21 that the code asks for.
Commands come one a line on stdin, answers go one a line to stdout: {"do": "about"} -> versions; {"do": "train", "mode":
"mix", "updates": N} -> [environment steps, seconds, CPU seconds]. Ends with its input.

Sizes are those of bench_marl.py. The environments are stepped one after another in this process, as with the code's
`dummy_vecenv`; observations are lbforaging's vectors, smaller than ours. Nothing is saved or logged.
"""

import collections
import collections.abc
import importlib
import importlib.metadata
import json
import os
import sys
import time
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np

ENVS, STEPS = 10, 5
KINDS = {"cen": "CentralisedMATE", "ind": "IndependentMATE", "mix": "MixedMATE"}


class Fields(dict):
    """Nested options, by attribute and by key."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


def fields(**options: Any) -> Fields:
    return Fields({k: fields(**v) if isinstance(v, dict) else v for k, v in options.items()})


class Team:
    """Environments side by side, as the code's vectorised ones answer."""

    def __init__(self) -> None:
        from lbforaging.foraging.environment import ForagingEnv  # pyright: ignore[reportMissingImports]

        make = lambda: ForagingEnv(2, 1, 2, 1, None, (8, 8), 2, 2, 50, force_coop=False)
        self.envs = [make() for _ in range(ENVS)]
        self.observation_space = self.envs[0].observation_space
        self.action_space = self.envs[0].action_space

    def reset(self) -> Any:
        return self._stack([env.reset(seed=i)[0] for i, env in enumerate(self.envs)])

    def step(self, actions: list) -> Any:
        seen, rewards, dones, infos = [], [], [], []
        for env, action in zip(self.envs, actions):
            obs, reward, done, truncated, _ = env.step([int(a) for a in action])
            over = bool(done or truncated)
            if over:
                obs, _ = env.reset()
            seen.append(obs)
            rewards.append(reward)
            dones.append(over)
            infos.append({"episode_reward": 0.0} if over else {})
        return self._stack(seen), np.asarray(rewards, np.float32), np.asarray(dones), infos

    def close(self) -> None:
        """The next training continues from them."""

    def _stack(self, seen: list) -> tuple:
        return tuple(np.stack(x).astype(np.float32) for x in zip(*seen))


def official(path: Path) -> Any:
    """The code's modules, with gymnasium in place of gym."""
    for name in ("", ".spaces", ".spaces.utils"):
        sys.modules[f"gym{name}"] = importlib.import_module(f"gymnasium{name}")
    collections.MutableMapping = collections.abc.MutableMapping  # pyright: ignore - gone since Python 3.10
    sys.path[:0] = [str(path), str(path / "mate")]
    train: Any = importlib.import_module("mate.algos.a2c.train")
    train.save_models = lambda *_: None
    return train


class Trainer:
    """The code's training loop with one set of networks."""

    def __init__(self, path: Path, mode: str) -> None:
        import torch  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(1)  # as the code does
        self.train, self.team = official(path), Team()
        layers = fields(hiddens=[64, 64], activation="relu")
        embedding = fields(task_emb_dim=10, lr=1e-4, device="cpu", max_grad_norm=0.5, detach=True)
        embedding |= fields(obs_loss_coef=1.0, rew_loss_coef=1.0, kl_loss_coef=0.1)
        embedding |= fields(encoder=dict(type="vae", **layers), decoder=dict(type="deterministic", **layers))
        embedding |= fields(mixing=dict(hiddens=[64], activation="relu"))
        model = dict(actor=[128, 128], critic=[128, 128], recurrent=True, activation="relu", device="cpu")
        algorithm = fields(model=model, lr=5e-4, tau=0.01, max_grad_norm=0.0, entropy_coef=0.01, value_loss_coef=0.5)
        algorithm |= fields(adam_eps=1e-3, gamma=0.99, n_steps=STEPS, greedy_evaluation=False)
        algorithm |= fields(standardise_rewards=False, load_dir=None, log_interval=10**12, save_interval=None)
        algorithm |= fields(eval_interval=None, episodes_per_eval=1)
        spaces = self.team.observation_space, self.team.action_space
        kind = getattr(importlib.import_module(f"mate.algos.ae.{mode}_mate"), KINDS[mode])
        self.embedding = kind(*spaces, Fields(embedding))
        learner = importlib.import_module("mate.algos.a2c.maa2c").MAA2C
        self.learner = learner(*spaces, Fields(algorithm), self.embedding.task_emb_dim)
        self.config = fields(env=dict(parallel_envs=ENVS), autoencoder=dict(embedding), algorithm=dict(algorithm))
        nothing = lambda *_, **__: None
        self.logger = types.SimpleNamespace(
            info=nothing, log_episode=nothing, log_metrics=nothing, log_progress=nothing, wandb=None, database=None
        )

    def run(self, updates: int) -> list[float]:
        steps = updates * ENVS * STEPS
        self.config.algorithm["num_env_steps"] = steps
        wall, cpu = time.perf_counter(), time.process_time()
        self.train.main(self.team, self.learner, self.embedding, self.logger, self.config)
        return [steps, time.perf_counter() - wall, time.process_time() - cpu]


def main() -> None:
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    trainers: dict[str, Trainer] = {}
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "about":
            answer: Any = {p: importlib.metadata.version(p) for p in ("torch", "lbforaging", "gymnasium")}
        else:
            mode = command["mode"]
            if mode not in trainers:
                trainers[mode] = Trainer(Path(sys.argv[1]), mode)
            answer = trainers[mode].run(command["updates"])
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
