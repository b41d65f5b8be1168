"""The sizes of the published Gemma 2 and Gemma 3 models, for a plan without a checkpoint.

A checkpoint's own config.json always comes first. Sources:
the `config.json` of each Hub repository; Gemma 2 also in the Gemma 2 report (arXiv 2408.00118,
table 1), Gemma 3 also in DeepMind's `gemma` package (gm.nn.Gemma3_*).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from activation_cache.config import NO_MODEL, ModelConfig
from activation_cache.gemma.config import GemmaConfig, config_from_hf
from activation_cache.language_model.shape import read_gemma_config
from activation_cache.runtime.errors import UserError


def _sizes(
    layers: int, d_model: int, d_ff: int, heads: int, kv_heads: int, head_dim: int, **rest: Any
) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": d_model,
        "intermediate_size": d_ff,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        **rest,
    }


# Small Gemma 3 models are text only: 262,144 ids, window 512; from 4B up there are 64 more ids,
# a window of 1,024 and, on global layers, positions divided by 8.
_TEXT_ONLY = {"vocab_size": 262_144, "sliding_window": 512, "max_position_embeddings": 32_768}
_LARGE = {"sliding_window": 1024, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}

KNOWN_SIZES: dict[str, dict[str, Any]] = {
    "gemma-2-2b": _sizes(26, 2304, 9216, 8, 4, 256),
    "gemma-2-9b": _sizes(42, 3584, 14_336, 16, 8, 256),
    "gemma-2-27b": _sizes(46, 4608, 36_864, 32, 16, 128, query_pre_attn_scalar=144),
    "gemma-3-270m": _sizes(18, 640, 2048, 4, 1, 256, **_TEXT_ONLY),
    "gemma-3-1b": _sizes(26, 1152, 6912, 4, 1, 256, **_TEXT_ONLY),
    "gemma-3-4b": _sizes(34, 2560, 10_240, 8, 4, 256, **_LARGE),
    "gemma-3-12b": _sizes(48, 3840, 15_360, 16, 8, 256, **_LARGE),
    "gemma-3-27b": _sizes(62, 5376, 21_504, 32, 16, 128, query_pre_attn_scalar=168, **_LARGE),
}
_NAME = re.compile(r"gemma-([23])-(\d+[bm])(?![0-9a-z])", re.IGNORECASE)


def known_config(weights: str) -> GemmaConfig | None:
    """The shape of the published model that a Hub id, folder or file is named after, if any.

    `google/gemma-2-9b-it` and `models/gemma-3-270m-q4_k_m.gguf` are both known by their names.
    """
    named = _NAME.search(Path(weights).name)
    key = f"gemma-{named[1]}-{named[2].lower()}" if named else ""
    if key not in KNOWN_SIZES:
        return None
    family = "gemma2" if key.startswith("gemma-2") else "gemma3_text"
    return config_from_hf({"model_type": family, **KNOWN_SIZES[key]}, source=key)


def config_for_planning(model: ModelConfig) -> tuple[GemmaConfig, str]:
    """The model's shape and where it is from: its checkpoint if that is here, else its name.

    The network is asked only for a Hub id that isn't a published Gemma's.

    Raises:
        UserError: a damaged checkpoint, or neither a checkpoint nor a known name.
    """
    if model.weights == NO_MODEL or Path(model.weights).exists():
        return read_gemma_config(model), model.weights
    known = known_config(model.weights)
    if known is not None:
        return known, f"the published sizes of {Path(model.weights).name}"
    try:
        return read_gemma_config(model), model.weights
    except UserError as error:
        names = ", ".join(KNOWN_SIZES)
        raise UserError(f"{error} To plan without weights, name one of {names}.") from error
