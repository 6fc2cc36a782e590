"""`jaxstack collect`."""

import argparse
from typing import Any

from jaxstack.cli.parsing import Commands, seed, whole

QUALITIES = ("random", "medium-replay", "medium", "medium-expert", "expert")
BEHAVIOURS = ("ppo", "dqn", "sac")


def add_commands(commands: Commands) -> None:
    """Add the commands of this file."""
    p = commands.add(
        "collect", _collect, "Record a data set for offline learners: random play, or a trained behaviour."
    )
    p.add_argument("env", metavar="ENV", help="one agent, with a horizon")
    p.add_argument("--quality", choices=QUALITIES, required=True, help="medium: the first update past a third")
    p.add_argument(
        "--out",
        metavar="FILE",
        required=True,
        help="a name ending in .npz, or in -v and a number for a new folder of Minari",
    )
    p.add_argument("--seed", type=seed, default=0)
    p.add_argument("--episodes", type=whole, default=100, help="recorded episodes (default: 100)")
    p.add_argument(
        "--behaviour",
        choices=BEHAVIOURS,
        default="ppo",
        help="what is trained: ppo, dqn for a fixed number of actions, sac for real ones (default: ppo)",
    )
    lengths = "5e5 of ppo, 1e5 of dqn, 2e4 of sac"
    p.add_argument("--steps", type=whole, help=f"environment steps of the training (default: {lengths})")
    p.add_argument("--env-args", nargs="*", default=(), metavar="NAME=VALUE", help="options of the environment")


def _collect(args: argparse.Namespace, _: list[str]) -> Any:
    from jaxstack.agents import behaviour
    from jaxstack.core.errors import UserError
    from jaxstack.data.files import check_target, save_dataset

    try:  # before anything is trained
        check_target(args.out)
    except UserError as e:
        raise UserError(f"--out {e}") from e
    options: dict[str, Any] = dict(env_args=tuple(args.env_args), episodes=args.episodes, steps=args.steps)
    options |= dict(behaviour=args.behaviour)
    data = behaviour.collect(args.env, args.quality, args.seed, **options)
    path = save_dataset(args.out, data, behaviour.choices(args.env, options["env_args"]))
    print("\n".join(data.describe()))
    print(f"data set: {path}")
