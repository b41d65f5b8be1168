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
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from activation_cache.runtime.errors import Interrupted, UserError
from activation_cache.runtime.processes import launched_index
from activation_cache.runtime.version import package_version
from activation_cache.storage.files import disk_refusal
from launch import commands, console, exit_codes, explaining
from launch.processes import group
from launch.processes.signals import StopFlag, stop_on_signals
from launch.show import browse, neuronpedia

logger = logging.getLogger(__name__)

_TARGET = "a config file, or a folder that holds a resolved config.yaml"
_DRY_RUN = (
    "--dry-run",
    "if launch.on names a cluster: write and print what would be submitted, submit nothing",
)


@dataclass(frozen=True)
class Command:
    """One subcommand: its help text, its example and the function that runs it."""

    name: str
    handler: Callable[[argparse.Namespace, StopFlag], int]
    summary: str
    details: str
    example: str
    metavar: str = "CONFIG"
    target: str = _TARGET
    overrides: bool = True
    others: tuple[str, str] = ("key=value", "config overrides")  # further words: name and help
    options: tuple[tuple[str, str], ...] = ()
    settings: tuple[tuple[str, dict[str, Any]], ...] = ()  # options with a value, as argparse's


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < threading.TIMEOUT_MAX:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of seconds above 0; a config or folder goes before --watch"
        )
    return seconds


COMMANDS = (
    Command(
        name="harvest",
        handler=commands.harvest,
        summary="run the model over the text and write the activation store",
        details="Writes the store that cache.path names. After a stop or a crash the same command "
        "continues from the last complete bucket of rows.",
        example="sae harvest configs/demo.yaml cache.tokens=1e6",
        options=(_DRY_RUN,),
    ),
    Command(
        name="train",
        handler=commands.train,
        summary="train one SAE on a harvested store, or several side by side",
        details="Writes config.yaml, metrics.jsonl and checkpoints/ into the folder that output "
        "names, and continues from its last checkpoint if there is one. Further configs are runs "
        "that read the same batches: each batch is read once for all of them.",
        example="sae train configs/demo.yaml sweep=null train.learning_rate.peak=1e-3",
        options=(
            ("--fresh", "delete what an earlier run left in the folder and start from step 0"),
            _DRY_RUN,
        ),
        others=("CONFIG|key=value", "further configs, and config overrides"),
    ),
    Command(
        name="evaluate",
        handler=commands.evaluate,
        summary="measure trained SAEs on held-out text, inside the model",
        details="Writes evaluation.json into each run's folder: L0, FVU, delta loss by splicing.",
        example="sae evaluate runs/demo evaluation.sequences=64",
        metavar="CONFIG-or-FOLDER",
    ),
    Command(
        name="latents",
        handler=commands.latents,
        summary="write what is known of every latent of trained SAEs",
        details="Writes latents/ into each run's folder: contexts, statistics, logits, neighbours "
        "(docs/latents.md). One walk of the model over the held-out text serves all SAEs; after a "
        "stop or a crash the same command continues.",
        example="sae latents runs/demo latents.tokens=1e6",
        metavar="CONFIG-or-FOLDER",
    ),
    Command(
        name="export",
        handler=commands.export,
        summary="write the release formats of trained SAEs",
        details="Writes release/gemma_scope, release/gemma_scope_2 and release/sae_lens into each "
        "run's folder, and of a sweep a tree of all into its own, named as released suites are, "
        "with a card and an index; reads every file back to check.",
        example="sae export runs/demo --upload me/my-saes --dry-run",
        metavar="CONFIG-or-FOLDER",
        overrides=False,
        options=(
            ("--dry-run", "with --upload: list the files and their sizes, send nothing"),
            (
                "--circuit-tracer",
                "of a sweep with transcoders for every layer: write sets of them that "
                "circuit-tracer loads, into release/circuit_tracer",
            ),
            *neuronpedia.SWITCHES,
        ),
        settings=(
            (
                "--upload",
                {
                    "help": "a repository of the Hub, organisation/name, to send the release to; "
                    "or the word neuronpedia, to send the latents there (key: the variable "
                    "NEURONPEDIA_API_KEY)"
                },
            ),
            *neuronpedia.SETTINGS,
        ),
    ),
    Command(
        name="sweep",
        handler=commands.sweep,
        summary="harvest, then train, evaluate and export every run of a sweep, and report",
        details="Expands sweep.grid (product) and sweep.zip (in step). A run that fails does not "
        "stop the rest. Run again, it does only what is missing.",
        example="sae sweep configs/demo.yaml",
        metavar="CONFIG-or-FOLDER",
        options=(
            (
                "--dry-run",
                "print the runs, which of them train together, and what would be submitted where "
                "launch.on names a cluster; run and submit nothing",
            ),
        ),
    ),
    Command(
        name="explain",
        handler=explaining.explain,
        summary="say in words what latents stand for, and test the words",
        details="Asks a model behind an OpenAI-compatible endpoint about each latent of the "
        "folder, and writes explanations.parquet beside what `sae latents` wrote. Says first how "
        "many calls that takes. The key is read from the variable OPENAI_API_KEY. Answers are "
        "kept: what was answered once is not asked again.",
        example="sae explain runs/demo --sample 50 --url http://localhost:8000/v1 --model qwen3-8b",
        metavar="FOLDER",
        target="a run's folder with latents, or a sweep's",
        overrides=False,
        options=explaining.SWITCHES,
        settings=explaining.SETTINGS,
    ),
    Command(
        name="report",
        handler=commands.report,
        summary="write report/index.html for a run or a sweep",
        details="One self-contained page: frontier, training curves, histograms, table of runs.",
        example="sae report runs/demo",
        metavar="CONFIG-or-FOLDER",
        overrides=False,
    ),
    Command(
        name="log",
        handler=commands.log,
        summary="send the metrics of a run or a sweep to Weights & Biases",
        details="Sends the rows of metrics.jsonl that W&B hasn't got, under the id that is kept in "
        "the run's folder. While a run trains, train.wandb sends them.",
        example="sae log runs/demo --wandb train.wandb.project=my-saes",
        metavar="FOLDER",
        target="the output folder of a run or a sweep",
        options=(("--wandb", "to Weights & Biases (extra wandb)"),),
        others=("key=value", "keys of train.wandb"),
    ),
    Command(
        name="plan",
        handler=commands.plan,
        summary="show what a config will cost before anything is spent",
        details="Bytes of the store, memory of a device, FLOPs, all-reduced bytes, hours and cost, "
        "and the nearest mesh that fits where the config's doesn't. Opens no store and needs "
        "neither weights nor devices. docs/plan.md explains the tables.",
        example="sae plan configs/demo.yaml --accelerator h200 --mfu 0.4 --price 2.5",
        metavar="CONFIG-or-FOLDER",
        options=(("--json", "print one JSON object instead of tables"),),
        settings=(
            ("--accelerator", {"help": "v5e, v5p, v6e, a100, h100 or h200 (default: all)"}),
            (
                "--devices",
                {"type": int, "help": "how many there are; else as many as the mesh has"},
            ),
            (
                "--mfu",
                {
                    "type": float,
                    "default": 0.4,
                    "help": "share of the accelerator's peak that is reached (default 0.4)",
                },
            ),
            (
                "--price",
                {"type": float, "help": "of one device for one hour; without it no cost is shown"},
            ),
        ),
    ),
    Command(
        name="status",
        handler=commands.status,
        summary="show how far each run has come",
        details="Reads the folders only, so it is safe while the runs are training.",
        example="sae status runs/demo --watch 10",
        metavar="CONFIG-or-FOLDER",
        overrides=False,
        settings=(
            (
                "--watch",
                {
                    "type": _seconds,
                    "nargs": "?",
                    "const": 5.0,
                    "metavar": "SECONDS",
                    "help": "show it anew every 5 or SECONDS seconds, until Ctrl-C",
                },
            ),
        ),
    ),
    Command(
        name="browse",
        handler=browse.browse,
        summary="show the latents of SAEs as pages in a browser",
        details="Serves pages on this machine: latents to sort and search, their contexts, texts "
        "of your own, steering. `sae latents` writes what they show.",
        example="sae browse runs/demo",
        metavar="FOLDER",
        target="the folder of a run, a sweep or a suite",
        others=("FOLDER", "further folders"),
        settings=browse.SETTINGS,
    ),
    Command(
        name="inspect",
        handler=commands.inspect,
        summary="describe a store, a run or a released SAE",
        details="Of a store its taps, rows and norms; of a run how far it is; of an SAE its "
        "shapes, norms and thresholds.",
        example="sae inspect runs/demo/store --verify",
        metavar="PATH",
        target="an activation store, a run's or sweep's folder, or a released SAE",
        overrides=False,
        options=(("--verify", "read a store whole and check every checksum"),),
    ),
)


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
    several = arguments.command in (
        "train",
        "browse",
    )  # it separates further configs from overrides itself
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
