"""A model and the SAEs of run folders, loaded for texts that a reader gives."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from activation_cache.config import ModelConfig, Site
from activation_cache.gemma.taps import Tap
from activation_cache.language_model.model import LanguageModel, conversion_folder, load_model
from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import StoragePath
from sae_train.checkpoint.trained import load_trained
from sae_train.config.file import FILE_NAME, read_run_config
from sae_train.inference.fold import fold
from sae_train.inference.read_formats import load_sae
from sae_train.inference.sae import Sae
from sae_train.latents.reader import Latents
from sae_train.live.placed import PlacedSae, place
from sae_train.runs.folder import newest_checkpoint

_Say = Callable[[str], None]


@dataclass
class Loader:
    """Keeps the model that was used last, and a few SAEs."""

    saes_kept: int = 2
    model: tuple[ModelConfig, LanguageModel] | None = None
    saes: OrderedDict[str, Sae] = field(default_factory=OrderedDict)

    def load(
        self, latents: Latents, folder: StoragePath, *, say: _Say = lambda text: None
    ) -> tuple[LanguageModel, PlacedSae]:
        """The model that the latents were made with, and their SAE at its place.

        Args:
            folder: the run's.
            say: told what is being done, in words.

        Raises:
            UserError: the weights or the SAE are missing, or another model or SAE than that of the
                latents lies there now.
        """
        record, run = latents.record, _run_of(folder)
        model = self._model(ModelConfig(weights=record.model), run, say)
        made_with = record.fingerprints.get("model", model.fingerprint)
        if model.fingerprint != made_with:
            raise UserError(
                f"{model.source} holds another model now than when the latents of {latents.name} "
                "were written: put the old one back, or give `sae latents` again"
            )
        key = str(folder)
        if key not in self.saes:
            say("loading the SAE")
            self.saes[key] = _read_sae(run)
        self.saes.move_to_end(key)
        while len(self.saes) > self.saes_kept:
            self.saes.popitem(last=False)
        sae, own = self.saes[key], record.saes[0].fingerprint
        if sae.fingerprint != own:
            raise UserError(
                f"{run} holds another SAE now than when its latents were written: give "
                f"`sae latents {run}` again"
            )
        tap = _tap(record.site, record.layer)
        target = tap if record.target is None else _tap(record.target, record.layer)
        return model, place(PlacedSae(sae, tap, target), model)

    def _model(self, given: ModelConfig, run: StoragePath, say: _Say) -> LanguageModel:
        converted = None
        if (run / FILE_NAME).is_file():
            config = read_run_config(run)
            given, converted = config.model, conversion_folder(config.cache.path)
        if self.model is None or self.model[0] != given:
            say(f"loading {given.weights}")
            self.model = None  # two may not fit in memory
            self.model = (given, load_model(given, converted=converted))
        return self.model[1]


def _run_of(folder: StoragePath) -> StoragePath:
    """The run's folder, also of its `latents/`."""
    return folder if (folder / FILE_NAME).is_file() else folder.parent


def _tap(site: str, layer: int) -> Tap:
    known: Site = site  # type: ignore[assignment]  # written from a config, which checked it
    return Tap(known, layer)


def _read_sae(run: StoragePath) -> Sae:
    if newest_checkpoint(run) is not None:
        return fold(load_trained(run))
    config = read_run_config(run) if (run / FILE_NAME).is_file() else None
    if config is not None and config.sae.start_from is not None:
        return load_sae(config.sae.start_from)
    return load_sae(run)
