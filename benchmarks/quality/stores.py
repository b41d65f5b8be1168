"""The stores that all trainers read: three taps of one layer, two texts.

Legend: N rows, D width of the tap.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from activation_cache.gemma.taps import Tap
from activation_cache.harvest.harvest import harvest
from activation_cache.store.reader import ActivationReader
from activation_cache.store.store import Store, open_store
from benchmarks.precision.quality import library_as_text
from sae_train.config.file import load_config, resolved_yaml, with_values
from sae_train.config.run import Config

LAYER, ROWS = 12, 100_000
SITES = ("resid_post", "mlp_out", "attn_out_prelinear")
TEXTS = ("python", "sotu")  # Python's standard library; the demo's State of the Union addresses
# The settings are searched on the first.
TAPS = tuple((site, text) for text in TEXTS for site in SITES)


@dataclass(frozen=True)
class Rows:
    """One tap of one text, as every trainer gets it."""

    site: str
    text: str
    config: Config
    store: Store

    @property
    def tap(self) -> Tap:
        """Which activations."""
        return self.config.sae.tap

    @property
    def width(self) -> int:
        """D."""
        return self.store.tap_info(self.tap).width

    @property
    def input_scale(self) -> float:
        """C, the root of the rows' mean squared norm."""
        return float(np.sqrt(self.store.tap_info(self.tap).mean_squared_norm))

    @cached_property
    def all_ND(self) -> Float[np.ndarray, "N D"]:
        """All rows in stored order."""
        return self.store.read(self.tap, start=0, stop=self.store.rows).astype(np.float32)

    def batches(self, *, size: int, seed: int) -> Iterator[Float[np.ndarray, "B D"]]:
        """The batches of a seed in their order, the same for every trainer."""
        with ActivationReader(self.store, self.tap, batch_size=size, seed=seed) as reader:
            for step in itertools.count():
                yield reader.batch(step).astype(np.float32)


def text_config(text: str, root: Path) -> Config:
    """The config of a text's store; its `sae` section is that of the first tap."""
    own: dict[str, Any] = {
        "name": f"quality-{text}",
        "cache.path": str(root / "stores" / text),
        "cache.sites": [{"site": site, "layers": [LAYER]} for site in SITES],
        "cache.tokens": ROWS,
        "sae.site": SITES[0],
        "sae.layer": LAYER,
        "output": str(root / "none"),
    }
    if text == "python":
        own["text.source"] = [str(library_as_text(root / "text") / "*.txt")]
    return with_values(load_config("configs/demo.yaml"), own, source="benchmark")


def harvested(site: str, text: str, root: Path) -> Rows:
    """A tap's rows; the text's three taps are harvested together, unless they are there."""
    config = text_config(text, root)
    harvest(
        model=config.model,
        text=config.text,
        cache=config.cache,
        mesh=config.mesh,
        resolved_config_yaml=resolved_yaml(config),
    )
    config = with_values(config, {"sae.site": site}, source="benchmark")
    return Rows(site, text, config, open_store(config.cache.path))
