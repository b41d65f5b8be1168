"""The subcommands of `sae`: their help, their options and the functions that run them."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from launch import commands, explaining, importing
from launch.processes.signals import StopFlag
from launch.show import browse, neuronpedia
from launch.show import check as checking

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
        options=(
            ("--follow", "of a rolling store: harvest ahead of the trainer until it is done"),
            _DRY_RUN,
        ),
    ),
    Command(
        name="import",
        handler=importing.import_rows,
        summary="make an activation store of rows that another program has written",
        details="Reads .npy, .safetensors, .arrow, .parquet and zarr, a folder or glob of them, "
        "and SAELens' cached activations; shuffles and checks them as a harvest does "
        "(docs/import.md). Needs no language model. After a stop or a crash the same command "
        "continues.",
        example="sae import resid_post.12=activations/ --to store --held-out 100000",
        metavar="[TAP=]ROWS",
        target="files of rows [rows, width] or [sequences, rows, width]; PATH::NAME names a tensor "
        "or column; TAP is a site and layer, as resid_post.12, else rows.0",
        others=("[TAP=]ROWS", "rows of further taps, of the same tokens"),
        settings=importing.SETTINGS,
    ),
    Command(
        name="rollout",
        handler=commands.rollout,
        summary="write the model's own continuations of prompts, as text",
        details="Samples what the section rollout asks for into files that text.source can name. "
        "After a stop or a crash the same command continues from the last complete file.",
        example="sae rollout configs/demo.yaml rollout.path=rollouts 'rollout.source=[p.jsonl]'",
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
        name="probe",
        handler=commands.probe,
        summary="measure what latents tell of labelled text, by k-sparse probes",
        details="Writes probe.json into each run's folder: F1, accuracy and AUC of logistic "
        "regressions on the k best latents, beside those on the activations themselves, on data "
        "sets of sae-probes or your own (docs/probing.md). One pass of the model for each data set "
        "serves all SAEs; after a stop or a crash the same command continues.",
        example="sae probe runs/demo probe.datasets=all",
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
        "and the nearest mesh that fits where the config's doesn't. Needs neither weights nor "
        "devices; of a store that is there it reads the first rows. docs/plan.md has the tables.",
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
    Command(
        name="check",
        handler=checking.check,
        summary="hold a released SAE to what its files declare",
        details="Measures L0 and FVU on about a thousand tokens at the site that the files name. "
        "Where they don't fit, other readings are tried and ranked by FVU: other tensors of the "
        "layer, before or after a norm or its gain, a scale that wasn't folded in, no BOS. Ends "
        "with 2 if it doesn't fit (docs/release.md).",
        example="sae check runs/demo/coefficient_0.0001 --model google/gemma-3-270m --text a.txt",
        metavar="RELEASE",
        target="a released SAE or transcoder in any format that is read: a path or a Hub address",
        overrides=False,
        settings=checking.SETTINGS,
    ),
)
