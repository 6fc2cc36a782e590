"""`jaxstack audit` and `jaxstack conventions`: what environments ask for, and what trained pairs do."""

import argparse

from jaxstack.cli import runs
from jaxstack.cli.parsing import Commands, seed, whole


def add_commands(commands: Commands) -> None:
    """Add the commands of this file."""
    p = commands.add(
        "audit",
        _audit,
        "Train teams in environments, probe their greedy play for memory, hidden information and coordination, and "
        "write one HTML report.",
    )
    p.add_argument("envs", metavar="ENV", nargs="*", help="environment ids")
    p.add_argument("--scenarios", metavar="NAME", help="a list of scenarios instead: reduced, paper, or one of --file")
    p.add_argument("--file", metavar="YAML", help="scenarios of your own")
    p.add_argument("--algorithms", nargs="+", metavar="NAME", help="some of IPPO-FF IPPO-RNN MAPPO-FF MAPPO-RNN")
    p.add_argument("--total-steps", type=whole, help="environment steps per seed; default: the scenario's")
    p.add_argument("--seeds", type=whole, default=5, help="training seeds 0, 1, ...; fewer than 5 show no memory gap")
    p.add_argument("--null-reps", type=whole, default=200, help="null values per probe")
    p.add_argument(
        "--slow-null-reps",
        type=whole,
        default=20,
        help="where neighbours are found again for each: feed-forward PIF and DAI, and continuous actions",
    )
    p.add_argument("--null", choices=("permute", "shift"), default="permute")
    p.add_argument("--out", default="audit", help="folder of report.html, probes.csv and audit.json")
    p = commands.add(
        "conventions",
        _conventions,
        "Play trained pairs with themselves, with each other and with partners that do not adapt.",
    )
    p.add_argument("run_dirs", metavar="RUN", nargs="+", help="every seed is a pair; runs of equal config, two agents")
    p.add_argument("--episodes", type=whole, default=256, help="episodes per score")
    p.add_argument("--seed", type=seed, default=0, help="of the episodes")
    p.add_argument("--out", default="conventions.png", help="figure of the cross-play matrix; .csv holds the rows")


def _audit(args: argparse.Namespace, _: list[str]) -> None:
    from jaxstack.agents import probe_audit, probe_page
    from jaxstack.core import config
    from jaxstack.core.errors import UserError, unknown
    from jaxstack.measures.probes import Settings

    if bool(args.envs) == bool(args.scenarios):
        raise UserError("audit: expected environment ids or --scenarios NAME, one of the two")
    if args.seeds < 1:
        raise UserError(f"--seeds {args.seeds}: expected at least 1")
    for option in ("null_reps", "slow_null_reps"):
        if getattr(args, option) < 1:
            raise UserError(f"--{option.replace('_', '-')} {getattr(args, option)}: expected at least 1")
    settings = Settings(null=args.null, null_reps=args.null_reps, slow_null_reps=args.slow_null_reps)
    if args.envs:
        scenarios = [probe_audit.Scenario(id) for id in args.envs]
    else:
        lists = probe_audit.read_scenarios(args.file)
        if args.scenarios not in lists:
            raise unknown("list of scenarios", args.scenarios, lists)
        scenarios = lists[args.scenarios]
    changes = {"total_steps": args.total_steps, "algorithms": args.algorithms and tuple(args.algorithms)}
    scenarios = [config.replace(s, **{k: v for k, v in changes.items() if v}) for s in scenarios]
    for scenario in scenarios:  # before anything trains
        for algorithm in scenario.algorithms:
            probe_audit.learner_of(scenario, algorithm)
    audited = []
    for scenario in scenarios:
        audited.append(probe_audit.audit_scenario(scenario, range(args.seeds), settings))
        # a long audit shows what it has
        page = probe_page.write(audited, args.out)
    print(f"report: {page}")


def _conventions(args: argparse.Namespace, _: list[str]) -> None:
    from pathlib import Path

    import jax
    import pandas as pd

    from jaxstack import envs
    from jaxstack.core.errors import UserError
    from jaxstack.envs.base import Discrete
    from jaxstack.envs.follow_partner import FollowPartner
    from jaxstack.measures import conventions, partners
    from jaxstack.report import plots

    plots.figure_path(args.out)
    groups = runs.groups(args.run_dirs)
    if len(groups) > 1:
        raise UserError(f"conventions: expected runs of one agent and config, found {len(groups)} different ones")
    ((learner, members, states),) = groups
    runs.needs_policy(learner, "conventions")
    env = learner.env
    actions = env.spec.action_space
    if isinstance(env, FollowPartner):
        zoo = partners.follow_partner_zoo(env.symbols, env.types)
        env = envs.make("follow_partner", symbols=env.symbols, types=env.types, horizon=env.horizon)
    elif isinstance(actions, Discrete):
        zoo = {f"constant {a}": partners.constant(a) for a in range(min(actions.n, 8))}
        zoo["uniform"] = partners.noisy(1.0, actions.n)
    else:
        zoo = {}
    key = jax.random.key(args.seed)
    report = conventions.audit(env, learner, states, zoo, key=key, episodes=args.episodes)
    table = pd.DataFrame(report.rows())
    table.insert(1, "run", [f"{m.run} seed {m.seed}" for m in members])
    print(table.drop(columns="run").round(3).to_string(index=False))
    print(f"chance: {report.chance:.3f}")
    for name, estimate in report.summary().items():
        print(f"{name}: {estimate}")
    figure = report.figure(args.out, f"{learner.name} on {env.spec.id}")
    table.to_csv(Path(args.out).with_suffix(".csv"), index=False)
    print(figure)
