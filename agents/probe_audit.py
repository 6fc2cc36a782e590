"""Audit environments for Dec-POMDP reasoning: train teams, record their greedy play, probe it (Tessera et al., 2026).

As in the paper every agent has its own networks (`sharing="none"`), each algorithm comes feed-forward and recurrent,
and the question is asked of the policies that training finds, not of the environment alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxstack import agents, envs
from jaxstack.core import config as configs
from jaxstack.core.config import Config, require, require_at_least
from jaxstack.core.errors import UserError
from jaxstack.core.runner import RunOptions, train
from jaxstack.measures import conventions, probe_tables
from jaxstack.measures.probes import Probe, Settings, audit

ALGORITHMS = ("IPPO-FF", "IPPO-RNN", "MAPPO-FF", "MAPPO-RNN")


@dataclass(frozen=True)
class Scenario(Config):
    """One environment and how its teams are trained."""

    env: str
    suite: str = "own"
    env_args: tuple[str, ...] = ()
    algorithms: tuple[str, ...] = ALGORITHMS
    total_steps: int = 300_000
    num_envs: int = 16
    num_steps: int = 128
    num_minibatches: int = 4
    num_epochs: int = 4
    gru: int = 128
    hidden: tuple[int, ...] = (128,)
    activation: str = "tanh"
    anneal_lr: bool = True
    lr: float = 1e-3
    clip: float = 0.2
    ent_coef: float = 0.01
    vf_coef: float = 0.5
    max_grad_norm: float = 0.5
    episodes: int = 128
    """Episodes of greedy play that the probes read."""

    def validate(self) -> None:
        require_at_least(self, 1, "total_steps", "episodes", "gru")
        known = all(a in ALGORITHMS for a in self.algorithms)
        require(self, "algorithms", known and bool(self.algorithms), f"some of {', '.join(ALGORITHMS)}")


class Run(NamedTuple):
    """One trained team."""

    algorithm: str
    seed: int
    score: float
    """Mean return of greedy episodes."""
    probes: dict[str, Probe]


class Audited(NamedTuple):
    """One scenario with all its runs."""

    scenario: Scenario
    runs: list[Run]
    gaps: dict[str, probe_tables.Gap]
    """IPPO, MAPPO -> recurrent less feed-forward over seeds, where both were run."""

    def of(self, algorithm: str) -> list[Run]:
        """The runs of one algorithm."""
        return [r for r in self.runs if r.algorithm == algorithm]


def read_scenarios(path: str | Path | None = None) -> dict[str, list[Scenario]]:
    """Read lists of scenarios from a YAML file; default: the paper's 37 (`paper`) and a reduced form (`reduced`).

    Each list is a mapping `suite -> {settings..., scenarios: [id or {env: id, ...}]}`.

    Raises:
        UserError: a file that cannot be read, or a setting that does not exist.
    """
    import yaml

    if path is None:
        text, name = resources.files("jaxstack.agents").joinpath("probe_scenarios.yaml").read_text("utf-8"), "scenarios"
    else:
        name = str(path)
        try:
            text = Path(path).read_text("utf-8")
        except OSError as e:
            raise UserError(f"{path}: cannot be read ({e.strerror})") from e
    try:
        content = yaml.safe_load(text)
        lists = {key: list(suites.items()) for key, suites in content.items()}
    except (yaml.YAMLError, AttributeError) as e:
        raise UserError(f"{name}: expected lists of suites of scenarios ({e})") from e
    out: dict[str, list[Scenario]] = {}
    for key, suites in lists.items():
        out[key] = []
        for suite, body in suites:
            common = {k: v for k, v in body.items() if k != "scenarios"} | {"suite": suite}
            for entry in body.get("scenarios", ()):
                own = entry if isinstance(entry, dict) else {"env": entry}
                out[key].append(configs.from_dict(Scenario, common | own, f"{name}: {key}: {suite}"))
    return out


def learner_of(scenario: Scenario, algorithm: str) -> Any:
    """The learner of one algorithm, without parameter sharing."""
    base, kind = algorithm.split("-")
    s, recurrent = scenario, kind == "RNN"
    return agents.make(
        base.lower(),
        env=s.env,
        env_args=s.env_args,
        sharing="none",
        gru=s.gru if recurrent else 0,
        hidden=s.hidden if recurrent else (*s.hidden, *s.hidden[-1:]),
        activation=s.activation,
        total_steps=s.total_steps,
        num_envs=s.num_envs,
        num_steps=s.num_steps,
        num_epochs=s.num_epochs,
        num_minibatches=s.num_minibatches,
        anneal_lr=s.anneal_lr,
        lr=s.lr,
        clip=s.clip,
        ent_coef=s.ent_coef,
        vf_coef=s.vf_coef,
        max_grad_norm=s.max_grad_norm,
        eval_episodes=s.episodes,
    )


def audit_scenario(
    scenario: Scenario, seeds: Sequence[int], settings: Settings = Settings(), say: Callable[[str], None] = print
) -> Audited:
    """Train all algorithms of a scenario with all seeds, then probe each team's greedy play.

    Args:
        scenario: what is audited.
        seeds: seeds of training; 5 are needed for a significant memory gap.
        settings: of the probes.
        say: called with one line per algorithm.

    Returns:
        `Audited` with a run per algorithm and seed.
    """
    env = envs.make(scenario.env, **envs.parse_options(scenario.env_args))
    runs: list[Run] = []
    for algorithm in scenario.algorithms:
        learner = learner_of(scenario, algorithm)
        result = train(learner, seeds=seeds, options=RunOptions(progress=False))
        last = result.metrics[result.metrics.step == result.metrics.step.max()]
        scores = {int(r["seed"]): float(r["eval/return"]) for _, r in last.iterrows()}
        played = conventions.record(learner, result.state, env, jax.random.key(1), episodes=scenario.episodes)
        for i, seed in enumerate(seeds):
            if not result.alive[i]:
                say(f"{scenario.env}: {algorithm}: seed {seed} went non-finite and is left out")
                continue
            runs.append(Run(algorithm, seed, scores[seed], audit(played[i], settings)))
        own = [r.score for r in runs if r.algorithm == algorithm]
        say(f"{scenario.env}: {algorithm}: return {np.mean(own):.3f} over {len(own)} seeds")
    return Audited(scenario, runs, _gaps(runs))


def _gaps(runs: Sequence[Run]) -> dict[str, probe_tables.Gap]:
    out = {}
    for base in dict.fromkeys(r.algorithm.split("-")[0] for r in runs):
        rnn, ff = ({r.seed: r.score for r in runs if r.algorithm == f"{base}-{k}"} for k in ("RNN", "FF"))
        both = sorted(set(rnn) & set(ff))
        if len(both) > 1:
            out[base] = probe_tables.memory_gap({s: rnn[s] for s in both}, {s: ff[s] for s in both})
    return out


def table(audited: Sequence[Audited]) -> list[dict[str, Any]]:
    """The released decision table: a row per suite."""
    return probe_tables.decision_table(
        [
            probe_tables.Scenario(a.scenario.env, a.scenario.suite, [r.probes for r in a.runs], list(a.gaps.values()))
            for a in audited
        ]
    )


def discoveries(audited: Sequence[Audited]) -> dict[str, Mapping[str, bool]]:
    """Return for each probe which scenarios differ from their null at a false discovery rate of 5% over all scenarios
    and runs: the released flag's five null values are no test."""
    out: dict[str, Mapping[str, bool]] = {}
    for name in dict.fromkeys(n for a in audited for r in a.runs for n in r.probes):
        every = {
            f"{i}|{r.algorithm}|{r.seed}": r.probes[name]
            for i, a in enumerate(audited)
            for r in a.runs
            if name in r.probes
        }
        found = probe_tables.discoveries(every)
        out[name] = {
            a.scenario.env: any(v for k, v in found.items() if k.startswith(f"{i}|")) for i, a in enumerate(audited)
        }
    return out
