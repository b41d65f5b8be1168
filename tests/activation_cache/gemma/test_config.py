"""config.json and GGUF metadata as they come: read as `transformers` does, or told in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from activation_cache.gemma.config import check_context, config_from_gguf, config_from_hf
from activation_cache.runtime.errors import UserError
from tests.support.tiny_gemma import tiny_config

SIZES = {
    "hidden_size": 20, "intermediate_size": 28, "num_hidden_layers": 7, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "vocab_size": 401,
}  # fmt: skip
FAMILIES = {
    "gemma2": SIZES | {"model_type": "gemma2"},
    "gemma3": SIZES | {"model_type": "gemma3_text"},
}
GLOBAL = {"rope_type": "default", "rope_theta": 5e5}
LOCAL = {"rope_type": "default", "rope_theta": 2e4}
OLD_BASES = {"rope_theta": 3e5, "rope_local_base_freq": 2e4}

BOTH = {"full_attention": GLOBAL, "sliding_attention": LOCAL}
LINEAR = {"rope_type": "linear", "rope_theta": 1e6}
AS_WRITTEN: dict[str, dict[str, dict[str, Any]]] = {
    "gemma3": {
        "nothing but sizes": {},
        "both kinds": {"rope_parameters": BOTH},
        "sliding null": {"rope_parameters": BOTH | {"sliding_attention": None}},
        "sliding absent": {"rope_parameters": {"full_attention": GLOBAL}},
        "full null": {"rope_parameters": BOTH | {"full_attention": None}},
        "parameters null": {"rope_parameters": None} | OLD_BASES,
        "parameters empty": {"rope_parameters": {}},
        "bases in the old keys": {
            "rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention": {}}
        }
        | OLD_BASES,
        "scaling": {"rope_scaling": {"rope_type": "linear", "factor": 8}},
        "scaling named twice": {
            "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 8.0}
        },
        "scaling and parameters": {
            "rope_parameters": BOTH,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        "no BOS": {"bos_token_id": None},
        "several EOS": {"eos_token_id": [1, 106], "pad_token_id": 1},
        "a pattern": {"sliding_window_pattern": 3},
        "kinds null": {"layer_types": None},
        "global everywhere": {"layer_types": ["full_attention"] * 7, "sliding_window": None},
        "dtypes": {"dtype": "bfloat16", "torch_dtype": "float32"},
    },
    "gemma2": {
        "nothing but sizes": {},
        "flat": {"rope_parameters": GLOBAL},
        "old base": {"rope_theta": 3e5, "rope_scaling": None},
        "no soft caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        "a pattern of Gemma 3": {"sliding_window_pattern": 3},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family in FAMILIES for name in AS_WRITTEN[family]]
)
def test_it_is_read_as_transformers_reads_it(tmp_path: Path, family: str, name: str):
    import transformers

    raw = FAMILIES[family] | AS_WRITTEN[family][name]
    if family == "gemma3":
        inside = config_from_hf({"model_type": "gemma3", "text_config": raw}, source="4b")
        assert inside == config_from_hf(raw, source="text alone")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path).get_text_config()
    ours = config_from_hf(raw, source="config.json")
    rope = theirs.rope_parameters
    full, sliding = (
        (rope["full_attention"], rope["sliding_attention"]) if family == "gemma3" else (rope, rope)
    )
    assert (ours.rope_base_global, ours.rope_base_local) == (
        full["rope_theta"],
        sliding["rope_theta"],
    )
    assert ours.rope_factor_global == full.get("factor", 1.0)
    assert [kind == "full_attention" for kind in theirs.layer_types] == list(ours.global_layers)
    assert ours.attention_softcap == theirs.attn_logit_softcapping
    assert ours.final_softcap == theirs.final_logit_softcapping
    no_window = theirs.max_position_embeddings
    assert ours.window == (theirs.sliding_window or no_window)
    assert ours.bos_id == theirs.bos_token_id
    assert (ours.query_scalar, ours.head_dim) == (theirs.query_pre_attn_scalar, theirs.head_dim)


ODD: dict[str, list[tuple[dict[str, Any], str]]] = {
    "gemma3": [
        ({"vocab_size": "401"}, r"vocab_size = '401': it should be a valid integer"),
        ({"head_dim": True}, "head_dim = True"),
        ({"num_attention_heads": 4.5}, r"num_attention_heads = 4\.5"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0: it should be greater"),
        ({"num_hidden_layers": 10**12}, "less than or equal to 1000"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan"),
        ({"layer_types": 4}, "layer_types = 4: it should be a valid list"),
        ({"layer_types": [{}] * 7}, "'full_attention' or 'sliding_attention'"),
        ({"layer_types": ["chunked_attention"] * 7}, "'full_attention' or"),
        ({"layer_types": ["full_attention"]}, "of 1 layers and has 7"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern = 0"),
        ({"sliding_window": None}, "sliding_window = null and 6 layers"),
        ({"text_config": [1]}, r"text_config = \[1\]: it should be a valid dictionary"),
        ({"bos_token_id": [2]}, r"bos_token_id = \[2\]"),
        ({"rope_parameters": {"full_attention": LINEAR}}, "the RoPE factor = None"),
        ({"rope_scaling": LINEAR | {"factor": 0}}, "the RoPE factor = 0"),
        ({"rope_theta": "1e6"}, "rope_theta = '1e6'"),
        ({"rope_scaling": "linear"}, "rope_scaling = 'linear'"),
        ({"rope_parameters": {"sliding_attention": LINEAR | {"factor": 2.0}}}, "'factor': 2.0"),
        ({"rope_parameters": GLOBAL}, "RoPE settings .*500000.0"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE settings .*dynamic"),
        ({"rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5}}}, "partial_rotary"),
        ({"model_type": ["gemma3"]}, "architecture"),
    ],
    "gemma2": [
        ({"attn_logit_softcapping": "50"}, "attn_logit_softcapping = '50'"),
        ({"rope_parameters": {"full_attention": GLOBAL}}, "RoPE settings"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "RoPE settings .*linear"),
    ],
}


@pytest.mark.parametrize(
    ("family", "changes", "message"), [(family, *one) for family in ODD for one in ODD[family]]
)
def test_an_odd_value_is_told_with_its_key(family: str, changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message) as caught:
        config_from_hf(FAMILIES[family] | changes, source="x/config.json")
    assert str(caught.value).startswith("x/config.json ")


METADATA: dict[str, Any] = {
    "general.architecture": "gemma3", "gemma3.block_count": 7, "gemma3.embedding_length": 20,
    "gemma3.feed_forward_length": 28, "gemma3.context_length": 9, "gemma3.attention.head_count": 4,
    "gemma3.attention.head_count_kv": 2, "gemma3.attention.layer_norm_rms_epsilon": 9.99999997e-07,
    "gemma3.attention.key_length": 6, "tokenizer.ggml.bos_token_id": 2,
}  # fmt: skip


def test_gguf_metadata():
    found = config_from_gguf(METADATA, vocab_size=401, source="a.gguf")
    assert (found.norm_epsilon, found.window, found.query_scalar) == (1e-6, 4096, 6.0)
    assert found.global_layers == (False,) * 5 + (True, False)
    listed = METADATA | {"gemma3.attention.sliding_window_pattern": [True, False] * 4}
    assert config_from_gguf(listed, vocab_size=9, source="a.gguf").global_layers[:2] == (
        False,
        True,
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("gemma3.block_count", "7", "gemma3.block_count = '7'"),
        ("gemma3.block_count", None, "lacks the metadata key 'gemma3.block_count'"),
        ("gemma3.attention.head_count", [4, 4], r"gemma3.attention.head_count = \[4, 4\]"),
        ("gemma3.attention.sliding_window_pattern", 0, "sliding_window_pattern = 0"),
        ("gemma3.attention.sliding_window_pattern", "2", "sliding_window_pattern = '2'"),
        ("gemma3.attention.sliding_window_pattern", [True], "of 1 layers and has 7"),
        ("gemma3.rope.freq_base", float("inf"), "gemma3.rope.freq_base = inf"),
        ("gemma3.rope.scaling.type", "yarn", "RoPE settings .*yarn"),
        (
            "gemma3.rope.scaling.type",
            "linear",
            "lacks the metadata key 'gemma3.rope.scaling.factor'",
        ),
        ("tokenizer.ggml.bos_token_id", -1, "tokenizer.ggml.bos_token_id = -1"),
    ],
)
def test_odd_metadata_is_told_with_its_key(key: str, value: Any, message: str):
    with pytest.raises(UserError, match=message):
        config_from_gguf(METADATA | {key: value}, vocab_size=401, source="a.gguf")


def test_a_sequence_longer_than_the_context_is_refused():
    check_context(tiny_config(), 256)
    with pytest.raises(UserError, match=r"text\.sequence_length is 257 .* has 256 .* at most 256"):
        check_context(tiny_config(), 257)
