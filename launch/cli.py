"""The `sae` command.

Exit status (`launch.exit_codes`): 0 done; 2 the user's mistake, in one message; 75 stopped by a
signal with everything saved, run me again; anything else is a bug or a lost machine, and shows its
traceback.
"""

from __future__ import annotations

import argparse
import errno
import logging
import sys
import textwrap
from collections.abc import Sequence

from activation_cache.runtime.errors import Interrupted, UserError
from activation_cache.runtime.processes import launched_index
from activation_cache.runtime.version import package_version
from activation_cache.storage.files import disk_refusal
from launch import console, exit_codes
from launch.command_table import COMMANDS, Command
from launch.processes import group
from launch.processes.signals import stop_on_signals

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    Exceptions that are neither the user's mistake nor a stop pass through with their traceback.
    """
    console.prepare_process()
    try:
        with console.output():
            arguments = _parse(sys.argv[1:] if argv is None else argv)
    except SystemExit as finished:  # argparse: 0 after --help, 2 after a wrong command line
        return finished.code if isinstance(finished.code, int) else exit_codes.MISTAKE
    except console.ClosedOutput:
        return exit_codes.DONE
    try:
        # Of several processes the first logs everything, the others warnings alone.
        quiet = max(arguments.quiet, min(1, launched_index()))
        console.configure_logging(verbosity=-1 if quiet else arguments.verbose)
        with stop_on_signals() as stop:
            code = arguments.handler(arguments, stop)
    except UserError as error:
        group.tell(arguments.command, str(error))
        code = exit_codes.MISTAKE
    except Interrupted as stopped:
        group.tell(arguments.command, str(stopped), remedy=". The same command continues.")
        code = exit_codes.STOPPED
    except console.ClosedOutput:
        code = exit_codes.DONE
    except Exception as error:
        told = _disk_words(error)
        if told is None:
            group.end_broken()
            raise
        group.tell(arguments.command, told)
        code = exit_codes.MISTAKE
    return group.end(code)


_OF_OPEN_FILES = (
    errno.EIO,
    errno.ESTALE,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
)


def _disk_words(error: Exception) -> str | None:
    """What a disk refused where no message of ours says it; None for any other error.

    A file that isn't there is a bug, or hasn't reached this machine yet: it keeps its traceback.
    An error of an open file has no name, and only some of those numbers can't be a socket's.
    """
    if not isinstance(error, OSError) or error.errno == errno.ENOENT:
        return None
    if error.filename is None and error.errno not in _OF_OPEN_FILES:
        return None
    refusal = disk_refusal(error.errno, error.filename or "an open file", doing="use")
    return None if refusal is None else str(refusal)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    # Overrides may come before and after an option, which argparse alone does not allow.
    arguments, rest = parser.parse_known_args(argv)
    takes_overrides = hasattr(arguments, "overrides")
    # They tell further words from overrides themselves.
    several = arguments.command in ("train", "browse", "import")
    stray = [
        one
        for one in rest
        if one.startswith("-") or not takes_overrides or not ("=" in one or several)
    ]
    if stray and not takes_overrides and not any(one.startswith("-") for one in stray):
        parser.error(f"`sae {arguments.command}` takes no overrides: leave out {' '.join(stray)}")
    if stray:
        parser.error(f"unrecognised arguments: {' '.join(stray)} (an override is key=value)")
    if takes_overrides:
        arguments.overrides += rest
    return arguments


def _parser() -> argparse.ArgumentParser:
    width = max(len(command.name) for command in COMMANDS)
    listing = "\n".join(f"  {command.name:<{width}}  {command.summary}" for command in COMMANDS)
    parser = argparse.ArgumentParser(
        prog="sae",
        description="From text to released, evaluated JumpReLU SAEs of a Gemma model.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"commands:\n{listing}\n\nexample:\n  sae sweep configs/demo.yaml\n\n"
        "`sae COMMAND --help` explains each. Exit status: 0 done; 2 a mistake in the config or on\n"
        "the command line; 75 stopped by a signal, everything saved: run the same command again.",
    )
    parser.add_argument("--version", action="version", version=f"sae {package_version()}")
    commands_parser = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        _add_command(commands_parser, command)
    return parser


def _add_command(parsers: argparse._SubParsersAction, command: Command) -> None:
    overriding = (
        "\n\nAny value of the config can be overridden by its dotted key, as in\n"
        "  train.batch_size=2048 train.sparsity.coefficient=5e-4 'cache.sites=[{site: mlp_out, "
        "layers: all}]'"
        if command.overrides and "key=value" in command.others[0]
        else ""
    )
    summary = command.summary[0].upper() + command.summary[1:]
    parser = parsers.add_parser(
        command.name,
        description=textwrap.fill(f"{summary}. {command.details}", width=88),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"example:\n  {command.example}{overriding}",
    )
    parser.add_argument("target", metavar=command.metavar, help=command.target)
    if command.overrides:
        metavar, words = command.others
        parser.add_argument("overrides", nargs="*", metavar=metavar, help=words)
    for flag, words in command.options:
        parser.add_argument(flag, action="store_true", help=words)
    for flag, how in command.settings:
        parser.add_argument(flag, **how)
    parser.add_argument("-v", "--verbose", action="store_true", help="log more")
    parser.add_argument("-q", "--quiet", action="store_true", help="log warnings only")
    parser.set_defaults(handler=command.handler)


if __name__ == "__main__":
    sys.exit(main())
