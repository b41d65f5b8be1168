"""`sae export --neuronpedia`, `--upload neuronpedia`: which SAEs, under which names, with what."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import StoragePath, make_folder, storage_path
from activation_cache.storage.locks import folder_lock
from launch.config.job import Job
from launch.console import print_text
from launch.processes.signals import StopFlag
from sae_train.config.file import read_run_config
from sae_train.config.run import Config
from sae_train.inference.hook_names import transformer_lens_hook
from sae_train.release.suite_names import GEMMA_SCOPE_SITES, sparsity_name, width_name
from sae_train.runs.folder import newest_checkpoint

if TYPE_CHECKING:
    import numpy as np

    from sae_train.latents.reader import Latents
    from sae_train.release.neuronpedia import Chosen, Source

FOLDER = "neuronpedia"

# Options of `sae export`.
SWITCHES = (
    (
        "--neuronpedia",
        "write instead what Neuronpedia imports of the latents, into neuronpedia/",
    ),
    ("--batches", "with --neuronpedia: SAEDashboard's batch files too"),
)
SETTINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "--contexts",
        {
            "default": "all",
            "metavar": "SUBSETS",
            "help": "which texts go to Neuronpedia: names of the text's subsets with "
            "commas, all or none (default: all)",
        },
    ),
    ("--model-id", {"help": "the model's name on Neuronpedia (default: from its weights)"}),
    ("--set-name", {"help": "the source set's name there (default: from the run)"}),
    ("--creator", {"default": "", "help": "your name, for Neuronpedia's files"}),
    ("--creator-id", {"help": "your id on Neuronpedia, for its files"}),
)


def export(
    config: Job, folders: Sequence[StoragePath], arguments: argparse.Namespace, stop: StopFlag
) -> None:
    """Write Neuronpedia's files of these runs, send their latents to it, or both.

    Raises:
        UserError: a run has no latents, a name that Neuronpedia doesn't take, no key, or the site
            refuses.
    """
    from sae_train.latents.reader import open_latents
    from sae_train.release.neuronpedia import Chosen

    runs = [(folder, open_latents(folder)) for folder in folders]
    target = storage_path(config.output) / FOLDER
    for folder, latents in runs:
        run = read_run_config(folder)
        source = _source(config, run, arguments, is_alone=len(runs) == 1)
        chosen = Chosen.read(arguments.contexts, latents=latents)
        if arguments.neuronpedia:
            with stop.at_once():
                _write(folder, run, latents, target, source, chosen, arguments)
        if arguments.upload == FOLDER:
            _upload(run, latents, target, source, chosen, arguments, stop)


def _source(config: Job, run: Config, arguments: argparse.Namespace, *, is_alone: bool) -> Source:
    """The names of a run's SAE on Neuronpedia: given, or made of what it is."""
    from activation_cache.language_model.names import model_name
    from sae_train.release.neuronpedia import Source, slug

    sae = run.sae
    if arguments.set_name is not None and not is_alone:
        raise UserError(
            "--set-name names one SAE's set and this sweep has several SAEs: give a run's folder, "
            "or leave the names to the command"
        )
    site = "transcoder" if sae.is_transcoder else GEMMA_SCOPE_SITES.get(sae.site, sae.site)
    kind = "" if sae.architecture == "jumprelu" else sae.architecture
    parts = [config.name, site, width_name(sae.width), kind, sparsity_name(run)]
    model = model_name(run.model.weights).rpartition("/")[2]
    return Source(
        model=arguments.model_id or model.lower().replace("_", "-"),
        set_name=arguments.set_name or slug(" ".join(parts)),
        layer=sae.layer,
        hook=transformer_lens_hook(sae.site, sae.layer),
        dataset=", ".join(run.text.source),
    )


def _write(
    folder: StoragePath,
    run: Config,
    latents: Latents,
    target: StoragePath,
    source: Source,
    chosen: Chosen,
    arguments: argparse.Namespace,
) -> None:
    from sae_train.release.neuronpedia_files import FALLBACK_CREATOR, About, write_source

    about = About(
        release=run.name,
        title=f"{run.name}: SAEs of {source.model}",
        creator=arguments.creator,
        creator_id=arguments.creator_id or FALLBACK_CREATOR,
    )
    written = write_source(
        latents,
        target,
        source=source,
        about=about,
        chosen=chosen,
        decoder_FD=_decoder(folder, run),
        batches=arguments.batches,
    )
    print_text(
        f"{written.folder}: {written.latents:,} latents, {written.contexts:,} contexts, "
        f"{written.explanations:,} explanations"
    )


def _decoder(folder: StoragePath, run: Config) -> np.ndarray:
    """The decoder's rows of a trained run, or of the SAE it would start from."""
    from sae_train.checkpoint.trained import load_trained
    from sae_train.inference.fold import fold
    from sae_train.inference.read_formats import load_sae

    if newest_checkpoint(folder) is None and run.sae.start_from is not None:
        return load_sae(run.sae.start_from).tensors["W_dec"]
    return fold(load_trained(folder)).tensors["W_dec"]


def _upload(
    run: Config,
    latents: Latents,
    target: StoragePath,
    source: Source,
    chosen: Chosen,
    arguments: argparse.Namespace,
    stop: StopFlag,
) -> None:
    from activation_cache.language_model.shape import read_gemma_config
    from sae_train.release import neuronpedia_upload as site

    url = os.environ.get(site.URL) or site.SITE
    going = site.content(latents, chosen)
    texts = ", ".join(going.subsets) or "one, without names of subsets"
    print_text(
        f"{latents.name} to {url}, as {source.model}/{source.id}: {going.latents:,} latents, "
        f"{going.explanations:,} explanations, and {going.contexts:,} pieces of text of "
        f"{going.tokens:,} tokens (of: {texts}). Whoever has the address can read them; --contexts "
        f"chooses which go. {going.left_out:,} latents without a piece of text stay out"
    )
    if arguments.dry_run:
        return
    key = os.environ.get(site.KEY)
    if not key:
        raise UserError(f"Neuronpedia wants a key: put yours into the variable {site.KEY}")
    if not isinstance(target, Path):
        raise UserError(
            f"{target} is in a bucket, and the journal of what was sent is kept on this machine: "
            "copy the run here"
        )
    folder = make_folder(target)
    with folder_lock(folder):
        sent = site.upload(
            latents,
            source=source,
            chosen=chosen,
            server=site.server(url, key),
            journal=folder / f"{source.model}-{source.id}-{site.JOURNAL}",
            num_layers=read_gemma_config(run.model).num_layers,
            description=f"{run.name}: {run.sae.site} of layer {run.sae.layer}",
            stop=stop,
        )
    print_text(f"{sent:,} latents sent: {url}/{source.model}/{source.id}")
