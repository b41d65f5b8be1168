"""The tiny Gemma as a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from activation_cache.gemma.params import parameter_table
from tests.support.tiny_gemma import tiny_config, tiny_pieces, tiny_tensors


def write_gguf(
    path: Path,
    *,
    family: Any = "gemma3",
    quantisation: gguf.GGMLQuantizationType | None = None,
    architecture: str | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    leave_out: str = "",
    split: int = 1,
    **changes: Any,
) -> Path:
    """A GGUF file as llama.cpp's converter writes it: norm gains as 1 + w."""
    sizes = {"head_dim": 6, "query_scalar": 6.0, "num_layers": 7} | changes
    sizes["global_layers"] = tuple(
        (layer + 1) % (6 if family == "gemma3" else 2) == 0 for layer in range(sizes["num_layers"])
    )
    config = tiny_config(family, **sizes)
    arch = architecture or family
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_sliding_window(config.window)
    if family == "gemma3":
        writer.add_rope_freq_base(config.rope_base_global)
    if split != 1:
        writer.add_uint16("split.count", split)
    pieces = tiny_pieces()
    writer.add_tokenizer_model("llama")
    writer.add_token_list(list(pieces.pieces))
    writer.add_token_scores(list(pieces.scores))
    writer.add_token_types(list(pieces.types))
    values = tiny_tensors(config) | (tensors or {})
    for parameter in parameter_table(config):
        if parameter.gguf == leave_out:
            continue
        array = values[f"model.{parameter.hf}"]
        array = array + 1 if parameter.is_norm else array
        if quantisation is None or parameter.is_norm:
            writer.add_tensor(parameter.gguf, array)
        else:
            data = gguf.quants.quantize(array, quantisation)
            writer.add_tensor(parameter.gguf, data, raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
