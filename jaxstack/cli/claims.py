"""`jaxstack reproduce`."""

import argparse

from jaxstack.claims import command
from jaxstack.cli.parsing import Commands, whole


def add_commands(commands: Commands) -> None:
    """Add the commands of this file."""
    p = commands.add(
        "reproduce",
        lambda args, _: command.reproduce(args),
        "Check a paper's claim by experiment; exits with 1 when it does not hold.",
        epilog=command.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_options(p, whole)
