"""The entry point: which commands there are, and what becomes of their errors."""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from typing import NoReturn, Protocol

from bncpu.backends import NoGPUError
from bncpu.cli import bench, data, info, moments, reproduce, train
from bncpu.cli.ranks import Ranks
from bncpu.experiments import RunError


class Command(Protocol):
    """What the module of a command has."""

    SUMMARY: str
    EXAMPLES: str

    def add_arguments(self, sub: argparse.ArgumentParser, /) -> None:
        """Add the arguments to the command's parser."""

    def run(self, args: argparse.Namespace, ranks: Ranks, /) -> None:
        """Run the command; raise what is wrong."""


COMMANDS: dict[str, Command] = {
    "info": info,
    "bench": bench,
    "train": train,
    "moments": moments,
    "data": data,
    "reproduce": reproduce,
}


# Besides those of the system, the errors whose text says all that there is to say.
TOLD = (ValueError, ImportError, OverflowError, FloatingPointError, NoGPUError, RunError)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        """Print the line and exit with 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status, as the head of bncpu.cli lists them.

    On one of several ranks an error does not return: it ends them all.
    """
    ranks = Ranks()
    try:
        return run(argv, ranks)
    except BaseException:
        # A bug, of which the interpreter tells; but at its end it would wait for the other ranks.
        if ranks.size > 1:
            ranks.end_all_after(traceback.print_exc, 1)
        raise


def run(argv: Sequence[str] | None, ranks: Ranks) -> int:
    """Run the command; errors of the user's and of the world's become a line and a status."""
    command = "bncpu"

    def complain(text: str, status: int) -> int:
        where = f"rank {ranks.rank}: " if ranks.rank else ""
        line = f"{command}: {where}{' '.join(text.split())}"
        ranks.end_all_after(lambda: print(line, file=sys.stderr), status)
        return status

    try:
        try:
            args, unknown = parser().parse_known_args(argv)
            command = f"bncpu {args.command}"
            # Told here and not by parse_args, the line begins with the command's name.
            if unknown:
                raise ValueError(f"unrecognized arguments: {' '.join(unknown)}")
            if getattr(args, "distributed", False):
                ranks.meet()
            args.run(args, ranks)
        finally:
            print(end="", flush=True)  # now, while an error of stdout can still be told
        return 0
    except KeyboardInterrupt:
        return complain("interrupted", 130)
    except BrokenPipeError:
        give_up_stdout()
        ranks.end_all_after(lambda: None, 141)
        return 141  # as if by SIGPIPE, what a shell expects of `bncpu ... | head`
    except OSError as error:
        give_up_stdout()
        # str(error) may begin with a number in brackets.
        text = error.strerror or str(error)
        return complain(f"{error.filename}: {text}" if error.filename else text, 2)
    except MemoryError as error:
        return complain(f"not enough memory; {error or 'take a smaller model'}", 2)
    except TOLD as error:
        return complain(str(error), 2)


def give_up_stdout() -> None:
    """Drop what stdout will not take, of which the interpreter would complain when it ends."""
    try:
        print(end="", flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def parser() -> Parser:
    """Return the parser of all commands."""
    top = Parser(
        prog="bncpu",
        description="Batch normalisation as a fast, accurate and deterministic NumPy library.",
        epilog="bncpu COMMAND --help explains a command.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"bncpu {version('bncpu')}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.SUMMARY,
            description=command.SUMMARY[0].upper() + command.SUMMARY[1:] + ".",
            epilog=f"examples:\n{command.EXAMPLES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return top
