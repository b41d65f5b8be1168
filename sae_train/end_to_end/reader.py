"""What the loop reads in a phase through the model, as it else reads rows of the store.

Weights are checked when a run begins and loaded when the phase does.
"""

from __future__ import annotations

import logging
from functools import cached_property, partial

import jax
import numpy as np
from jax.sharding import Mesh

from activation_cache.gemma.config import check_context
from activation_cache.gemma.params import check_model_axis
from activation_cache.gemma.taps import check_tap
from activation_cache.language_model.checkpoint import weight_fingerprint
from activation_cache.language_model.model import (
    conversion_folder,
    convert_once,
    load_model,
    precision_on,
)
from activation_cache.language_model.shape import read_gemma_config
from activation_cache.runtime import exchange
from activation_cache.runtime.errors import UserError
from activation_cache.store.store import Store
from sae_train.config.run import Config
from sae_train.end_to_end.frozen_model import FrozenModel, ModelParams, SequenceBatch
from sae_train.end_to_end.sequences import Sequences, Text
from sae_train.model.sharding import sharding

logger = logging.getLogger(__name__)

_read = jax.jit(FrozenModel.read, static_argnums=0)


class OriginalReader:
    """`batch(step)` for runs that train through the model; a function of the step alone.

    Attributes:
        model: how the model computes.
    """

    def __init__(self, config: Config, *, store: Store, mesh: Mesh) -> None:
        """Check all that can be checked before the weights are read.

        Raises:
            UserError: the weights aren't there, are others than the store's, or can't be cut over
                the mesh; or there is too little text.
        """
        self._config, self._store, self._mesh = config, store, mesh
        language_model = config.model
        try:
            shape = read_gemma_config(language_model)
            store.check_matches(fingerprint=weight_fingerprint(language_model))
        except UserError as error:
            raise UserError(
                f"train.end_to_end needs the language model of the store: {error}"
            ) from error
        check_model_axis(shape, mesh.shape["model"])
        check_context(shape, store.tokens.sequence_length)
        for tap in config.sae.taps:
            check_tap(tap, shape)
        train = config.train
        self._sequences = Sequences(
            store.tokens, batch_size=train.batch_size, seed=train.order_seed
        )
        self.model = FrozenModel(
            config=shape,
            mesh=mesh,
            precision=precision_on(language_model, mesh),
            tap=config.sae.tap,
            target=config.sae.target_tap,
        )

    def batch(self, step: int) -> SequenceBatch:
        """The weights and a step's sequences, with what the model makes of them."""
        text = self._placed(self._sequences.text(step))
        return self._params, _read(self.model, self._params, text)

    @cached_property
    def _params(self) -> ModelParams:
        config = self._config
        folder = conversion_folder(config.cache.path)
        convert = partial(convert_once, config.model, folder=folder)
        exchange.run_on_main_and_broadcast("conversion", convert)
        logger.info("%s is loaded: training goes on through it", config.model.weights)
        return load_model(config.model, converted=folder, mesh=self._mesh).params

    def _placed(self, text: Text) -> Text:
        """Each sequence on the devices at its index of mesh axis `data`."""

        def place(array: np.ndarray) -> jax.Array:
            here = sharding(self._mesh, ("B", "whole"))
            return jax.make_array_from_callback(array.shape, here, lambda index: array[index])

        return jax.tree.map(place, text)
