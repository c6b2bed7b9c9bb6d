"""Adds `optimum-cli llq ...`: the commands of llq, with their own options and help.

It is installed as optimum/commands/register/register_llq.py, where optimum looks for subcommands.
optimum-cli imports it at every call, so it imports nothing of ours before it runs.
"""

from argparse import REMAINDER, ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class LLQCommand(BaseOptimumCLICommand):  # type: ignore[misc]
    """Passes all that follows `llq` to llq itself, so that there is no second list of options."""

    COMMAND = CommandInfo(
        name="llq", help="Low-bit LLaMA models: all of llq, as `llq quantize --help`."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument(
            "arguments",
            nargs=REMAINDER,
            help="a command of llq and its options; `llq quantize --help`",
        )

    def run(self) -> None:
        import sys

        from llq_hf.cli import main

        sys.argv = ["llq", *self.args.arguments]
        main()


REGISTER_COMMANDS = [LLQCommand]
