"""`jaxstack collect`."""

import argparse
from typing import Any

from jaxstack.cli.parsing import Commands, whole

QUALITIES = ("random", "medium-replay", "medium", "medium-expert", "expert")


def add_commands(commands: Commands) -> None:
    """Add the commands of this file."""
    p = commands.add("collect", _collect, "Record a data set for offline learners: random play, or a behaviour of PPO.")
    p.add_argument("env", metavar="ENV", help="one agent, with a horizon")
    p.add_argument("--quality", choices=QUALITIES, required=True, help="medium: the first update past a third")
    p.add_argument(
        "--out",
        metavar="FILE",
        required=True,
        help="a name ending in .npz, or in -v and a number for a new folder of Minari",
    )
    p.add_argument("--seed", type=whole, default=0)
    p.add_argument("--episodes", type=whole, default=100, help="recorded episodes (default: 100)")
    p.add_argument("--steps", type=whole, default=500_000, help="environment steps that PPO trains for (default: 5e5)")
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
    data = behaviour.collect(args.env, args.quality, args.seed, **options)
    path = save_dataset(args.out, data, behaviour.choices(args.env, options["env_args"]))
    print("\n".join(data.describe()))
    print(f"data set: {path}")
