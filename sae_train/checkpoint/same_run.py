"""Does a checkpoint belong to this config's run? Which fields may differ; the rest is refused."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from activation_cache.precision import Precision
from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import StoragePath
from sae_train.config.file import differing_fields
from sae_train.config.run import Config

logger = logging.getLogger(__name__)

FORMAT_VERSION = 4
THRESHOLDS = "thresholds"  # of a run's last checkpoint, with `sae.threshold_per_latent`

# Fields that may change between two starts of one run: they say where data lies, how often
# something is saved, measured or logged, on which devices the arithmetic happens (the mesh), and
# what chose the numbers, which are compared themselves.
FREE_FIELDS = (
    "name",
    "output",
    "cache.path",
    "cache.rolling.beside",
    "model.weights",
    "model.precision",
    "text.source",
    "mesh",
    "checkpoint",
    "evaluation",
    "latents",
    "probe",
    "train.recipe",
    "train.recipe_chose",
    "train.stacked",
    "train.log_every_steps",
    "train.tensorboard",
    "train.wandb",
)


def checkpoint_meta(
    config: Config,
    *,
    input_scale: float,
    target_scale: float,
    d_model: int,
    store: str,
    precision: Precision,
    model_precision: Precision | None = None,
) -> dict[str, Any]:
    """The JSON saved beside a state: what `refuse_difference` and `load_trained` read.

    Args:
        input_scale: C of x = x_raw / C.
        target_scale: what a transcoder's target is divided by; for an SAE, C.
        store: the identity of the activation store.
        precision: at which the run's products are made: `train.precision`, resolved.
        model_precision: the language model's, of a run that trains through it.
    """
    return {
        "format_version": FORMAT_VERSION,
        "input_scale": input_scale,
        "target_scale": target_scale,
        "d_model": d_model,
        "store": store,
        "precision": precision,
        "model_precision": model_precision,
        "config": config.model_dump(mode="json", include=set(Config.model_fields)),
    }


def numeric_differences(a: Config, b: Config) -> list[str]:
    """The dotted keys in which two configs differ and that may change weights."""
    free = [*FREE_FIELDS]
    if a.train.order_seed == b.train.order_seed:
        free.append("train.data_seed")  # null and the value of train.seed mean the same
    if "auto" in (a.train.precision, b.train.precision):
        free.append("train.precision")  # what it means the checkpoint says: `refuse_precision`
    return [
        field
        for field in differing_fields(a, b)
        if not any(field == one or field.startswith(f"{one}.") for one in free)
    ]


def refuse_difference(
    config: Config, meta: Mapping[str, Any], *, store: str, folder: StoragePath
) -> None:
    """Raise `UserError` if the checkpoint with this `meta` is of another config or store."""
    refuse_other_config(Config.model_validate(meta["config"]), config, folder=folder)
    if meta["store"] != store:
        raise UserError(
            f"{folder} holds a run trained on another activation store "
            f"({meta['store'][:16]}, now {store[:16]}): point cache.path at the old store, choose "
            "another output, or give --fresh to delete the run and start anew."
        )


def refuse_precision(
    config: Config,
    meta: Mapping[str, Any],
    *,
    step: int,
    precision: Precision,
    folder: StoragePath,
) -> None:
    """Raise `UserError` if the checkpoint's steps were made at a precision that isn't accepted."""
    earlier = meta.get("precision", "float32")  # before there was a choice
    if earlier == precision:
        return
    if earlier != config.checkpoint.accept_precision:
        raise UserError(
            f"{folder} was trained with products in {earlier}, and train.precision "
            f"{config.train.precision} makes them in {precision} on these devices. Set "
            f"train.precision={earlier} to go on as it was, or "
            f"checkpoint.accept_precision={earlier} to go on in {precision} from its newest "
            "checkpoint; or choose another output, or give --fresh to delete the run and start "
            "anew."
        )
    logger.warning(
        "%s: from step %d on products are made in %s, before it they were made in %s "
        "(checkpoint.accept_precision allows it)",
        folder,
        step,
        precision,
        earlier,
    )


def refuse_model_precision(
    config: Config,
    meta: Mapping[str, Any],
    *,
    precision: Precision | None,
    folder: StoragePath,
) -> None:
    """Raise `UserError` if a run through the language model would compute it at another precision.

    Args:
        precision: at which the model's products are made here; None without `train.end_to_end`.
    """
    earlier = meta.get("model_precision")
    if precision is not None and earlier != precision:
        raise UserError(
            f"{folder} trains through the language model with its products in {earlier}, and "
            f"model.precision {config.model.precision} makes them in {precision} on these devices: "
            f"set model.precision={earlier}, choose another output, or give --fresh to delete the "
            "run and start anew."
        )


def refuse_other_config(earlier: Config, config: Config, *, folder: StoragePath) -> None:
    """Raise `UserError` if a run begun with `earlier` can't go on with `config`."""
    differing = numeric_differences(earlier, config)
    if earlier.train.precision == config.checkpoint.accept_precision:
        differing = [key for key in differing if key != "train.precision"]
    if differing:
        before, now = earlier.model_dump(), config.model_dump()
        changes = ", ".join(
            f"{key} was {_lookup(before, key)} and is now {_lookup(now, key)}" for key in differing
        )
        raise UserError(
            f"{folder} holds a run with another config: {changes}. Put the old value back to go "
            "on with it, choose another output, or give --fresh to delete it and start anew."
        )


def _lookup(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree
