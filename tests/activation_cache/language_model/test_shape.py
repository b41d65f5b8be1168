"""The published architectures, read from their config.json."""

from __future__ import annotations

from activation_cache.gemma.config import config_from_hf, config_to_hf
from tests.support.tiny_gemma import tiny_config

GEMMA_2_9B = {
    "model_type": "gemma2", "hidden_size": 3584, "intermediate_size": 14336,
    "num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8,
    "head_dim": 256, "query_pre_attn_scalar": 256, "vocab_size": 256000,
}  # fmt: skip


GEMMA_3_4B = {  # as published: everything equal to the defaults is left out
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
        "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
}  # fmt: skip


GEMMA_3_1B = {
    "model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912,
    "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1,
    "sliding_window": 512, "sliding_window_pattern": 6, "rope_theta": 1000000,
    "rope_local_base_freq": 10000, "rope_scaling": None, "vocab_size": 262144,
}  # fmt: skip


def test_published_configs() -> None:
    nine = config_from_hf(GEMMA_2_9B, source="9b")
    assert nine.global_layers == (False, True) * 21
    assert (nine.window, nine.attention_softcap, nine.final_softcap) == (4096, 50.0, 30.0)
    assert nine.rope_base_global == nine.rope_base_local == 1e4
    four = config_from_hf(GEMMA_3_4B, source="4b")
    assert (four.num_heads, four.num_kv_heads, four.head_dim, four.vocab_size) == (
        8,
        4,
        256,
        262208,
    )
    assert (four.rope_base_global, four.rope_base_local, four.rope_factor_global) == (1e6, 1e4, 8.0)
    assert [i for i, is_global in enumerate(four.global_layers) if is_global] == [5, 11, 17, 23, 29]
    one = config_from_hf(GEMMA_3_1B, source="1b")
    assert (one.window, one.rope_factor_global, one.attention_softcap) == (512, 1.0, None)
    assert one.global_layers[23:] == (True, False, False)
    for config in (nine, four, one, tiny_config()):
        assert config_from_hf(config_to_hf(config), source="back") == config
