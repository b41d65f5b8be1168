"""`export`: a run's newest checkpoint as a release tree, every file read back and compared."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import StoragePath, make_folder, write_text
from sae_train.checkpoint.trained import load_trained
from sae_train.config.file import FILE_NAME, read_run_config
from sae_train.config.run import Config
from sae_train.evaluate.result import Evaluation, read_evaluation, read_frequencies
from sae_train.inference import circuit_tracer
from sae_train.inference.fold import fold
from sae_train.inference.read_formats import load_sae
from sae_train.inference.sae import Sae
from sae_train.inference.write_formats import write_gemma_scope, write_gemma_scope_2, write_sae_lens
from sae_train.release.card import model_card
from sae_train.runs.folder import RELEASE, newest_checkpoint, run_folders

logger = logging.getLogger(__name__)

_WEIGHTS = ("params.npz", "params.safetensors", "sae_weights.safetensors")
CARD = "README.md"


@dataclass(frozen=True)
class Release:
    """What `export_run` wrote.

    Attributes:
        folder: the run's `release/`.
        files: every file written, the card last.
        evaluation: the one that the card quotes, if there is one of these weights.
        config: the run's.
    """

    folder: StoragePath
    files: tuple[StoragePath, ...]
    sae: Sae
    evaluation: Evaluation | None
    config: Config


def export(folder: StoragePath) -> list[Release]:
    """Write `release/` in a run's folder, or in every trained run of a sweep's folder.

    A card quotes an evaluation only if it is of the exported weights.

    Returns:
        One release per run.

    Raises:
        UserError: there is no trained run; weights aren't finite; the disk fails; a file reads
            back different from what was written.
    """
    runs = [folder]
    # A folder with a checkpoint is a run's, also without config.yaml: the checkpoint has a config.
    if newest_checkpoint(folder) is None and (folder / FILE_NAME).is_file():
        runs = [run for run in run_folders(folder) if newest_checkpoint(run) is not None]
    if not runs:
        raise UserError(f"{folder} holds no trained run yet: start with `sae train` or `sae sweep`")
    return [export_run(run) for run in runs]


def export_run(folder: StoragePath) -> Release:
    """Write one run's `release/`; returns and raises as `export`."""
    trained = load_trained(folder)
    sae = fold(trained)
    evaluation = _evaluation_of(sae, folder)
    frequency_F = None
    if evaluation is not None:
        frequency_F = read_frequencies(folder, evaluation)
        sae.metadata["l0"] = evaluation.l0
    target = make_folder(folder / RELEASE)
    card = target / CARD
    card.unlink(missing_ok=True)  # written last: a release without a card is unfinished
    files = _write_formats(sae, target, frequency_F=frequency_F)
    for path in files:
        if is_weights(path.name):
            check_same(sae, load_sae(path), path=path)
    config = _config(folder, trained.config)
    write_text(card, model_card(sae, config=config, evaluation=evaluation))
    formats = sorted({path.parent.name for path in files})
    logger.info("%s: step %d released as %s", target, trained.step, ", ".join(formats))
    return Release(target, (*files, card), sae, evaluation, config)


def _write_formats(
    sae: Sae, target: StoragePath, *, frequency_F: np.ndarray | None
) -> list[StoragePath]:
    """Write the SAE in every format that can hold it; returns the files."""
    files: list[StoragePath] = []
    if sae.k is not None and sae.is_transcoder:  # SAELens has no TopK transcoder
        folder = make_folder(target / "circuit_tracer")
        return [
            circuit_tracer.write_set_config(circuit_tracer.set_config(sae), folder),
            circuit_tracer.write_layer(sae, folder),
        ]
    if sae.k is None:  # Gemma Scope's formats can't hold k, and its first can't hold a skip
        if sae.W_skip is None:
            files += write_gemma_scope(sae, target / "gemma_scope")
        files += write_gemma_scope_2(sae, target / "gemma_scope_2")
    return files + write_sae_lens(sae, target / "sae_lens", frequency_F=frequency_F)


def is_weights(name: str) -> bool:
    """Is a file of this name an SAE's weights?"""
    return name in _WEIGHTS or circuit_tracer.LAYER_FILE.fullmatch(name) is not None


def _config(folder: StoragePath, trained: Config) -> Config:
    """The run's config.yaml; without one, the config in the checkpoint."""
    return read_run_config(folder) if (folder / FILE_NAME).is_file() else trained


def _evaluation_of(sae: Sae, folder: StoragePath) -> Evaluation | None:
    evaluation = read_evaluation(folder)
    if evaluation is None or evaluation.fingerprints.get("sae") == sae.fingerprint:
        return evaluation
    logger.warning(
        "%s: evaluation.json is of step %d and other weights; the release won't quote it. Run "
        "`sae evaluate` and export again.",
        folder,
        evaluation.step,
    )
    return None


def check_same(sae: Sae, read: Sae, *, path: StoragePath) -> None:
    """Raise `UserError` if the SAE `read` from `path` differs from the one written there."""
    if sae.k != read.k:
        raise UserError(f"{path} reads back with k {read.k}, written was {sae.k}: export again")
    if sae.tensors.keys() != read.tensors.keys():
        raise UserError(f"{path} reads back with {sorted(read.tensors)}: export again")
    for name in sae.tensors:
        written, found = sae.tensors[name], read.tensors[name]
        # SAELens keeps a Gated SAE's threshold as the difference of two biases.
        slack = 1e-6 if sae.architecture == "gated" and name == "threshold" else 0.0
        if not np.allclose(found, written, rtol=slack, atol=slack * np.abs(sae.b_enc).max()):
            raise UserError(
                f"{path} reads back with another {name} than was written: the disk or the file "
                "system is at fault. Export to another disk"
            )
    for key, value in read.metadata.items():
        # Gemma Scope 2 has the L0 rounded.
        if key != "l0" and sae.metadata.get(key) != value:
            raise UserError(f"{path} reads back with {key} {value!r}: export again")
