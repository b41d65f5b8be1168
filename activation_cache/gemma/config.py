"""The sizes and switches of a Gemma 2 or Gemma 3 text model, read from its checkpoint.

Defaults are those of the two families in `transformers` 5 (`Gemma2Config`, `Gemma3TextConfig`):
published `config.json` files leave out whatever equals them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from activation_cache.runtime.errors import UserError

Family = Literal["gemma2", "gemma3"]

EMBEDDING_HF, EMBEDDING_GGUF = "embed_tokens.weight", "token_embd.weight"
_MODEL_TYPES: dict[str, Family] = {
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
}
_COMMON_DEFAULTS: dict[str, Any] = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 2,
}
_DEFAULTS: dict[Family, dict[str, Any]] = {
    "gemma2": _COMMON_DEFAULTS
    | {
        "vocab_size": 256_000,
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "rope_theta": 10_000.0,
    },
    "gemma3": _COMMON_DEFAULTS
    | {
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "sliding_window_pattern": 6,
    },
}


@dataclass(frozen=True)
class GemmaConfig:
    """Sizes and switches of one model; hashable, so it can be a static argument of `jit`."""

    family: Family
    vocab_size: int
    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    query_scalar: float  # attention logits are q.k / sqrt(query_scalar)
    window: int  # a local layer sees keys with 0 <= query - key < window
    global_layers: tuple[bool, ...]  # per layer: full attention instead of local
    rope_base_global: float
    rope_base_local: float
    rope_factor_global: float  # positions of global layers are divided by this
    norm_epsilon: float
    attention_softcap: float | None
    final_softcap: float | None
    context_length: int
    bos_id: int

    @property
    def qk_norm(self) -> bool:
        """Gemma 3 normalises queries and keys per head."""
        return self.family == "gemma3"


def config_from_hf(raw: Mapping[str, Any], *, source: str) -> GemmaConfig:
    """Read a Hugging Face `config.json`; of a multimodal one only the text part.

    Args:
        raw: the parsed JSON.
        source: what error messages call the file.

    Raises:
        UserError: not a Gemma 2 or Gemma 3 model, or one with a switch this forward lacks.
    """
    text = raw.get("text_config", raw)
    family = _family(str(raw.get("model_type")), source=source)
    value = _DEFAULTS[family] | {k: v for k, v in text.items() if v is not None}
    _refuse_unknown_switches(value, source=source)
    base_global, base_local, factor = _rope_from_hf(value, family, source=source)
    num_layers = value["num_hidden_layers"]
    _check_types(value, source=source)
    return _checked(
        GemmaConfig(
            family=family,
            vocab_size=value["vocab_size"],
            d_model=value["hidden_size"],
            d_ff=value["intermediate_size"],
            num_layers=num_layers,
            num_heads=value["num_attention_heads"],
            num_kv_heads=value["num_key_value_heads"],
            head_dim=value["head_dim"],
            query_scalar=float(value["query_pre_attn_scalar"]),
            window=value["sliding_window"],
            global_layers=_global_layers_from_hf(value, family, source=source),
            rope_base_global=base_global,
            rope_base_local=base_local,
            rope_factor_global=factor,
            norm_epsilon=value["rms_norm_eps"],
            attention_softcap=value["attn_logit_softcapping"],
            final_softcap=value["final_logit_softcapping"],
            context_length=value["max_position_embeddings"],
            bos_id=value["bos_token_id"],
        ),
        source=source,
    )


def config_to_hf(config: GemmaConfig) -> dict[str, Any]:
    """The `config.json` that `config_from_hf` (and `transformers` 5) reads as this config."""
    kinds = ["full_attention" if g else "sliding_attention" for g in config.global_layers]
    rope_global: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_base_global}
    if config.rope_factor_global != 1:
        rope_global |= {"rope_type": "linear", "factor": config.rope_factor_global}
    rope_local = {"rope_type": "default", "rope_theta": config.rope_base_local}
    gemma3 = config.family == "gemma3"
    return {
        "architectures": ["Gemma3ForCausalLM" if gemma3 else "Gemma2ForCausalLM"],
        "model_type": "gemma3_text" if gemma3 else "gemma2",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "query_pre_attn_scalar": config.query_scalar,
        "sliding_window": config.window,
        "layer_types": kinds,
        "rope_parameters": (
            {"full_attention": rope_global, "sliding_attention": rope_local}
            if gemma3
            else rope_global
        ),
        "rms_norm_eps": config.norm_epsilon,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.final_softcap,
        "max_position_embeddings": config.context_length,
        "bos_token_id": config.bos_id,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    }


def config_from_gguf(metadata: Mapping[str, Any], *, vocab_size: int, source: str) -> GemmaConfig:
    """Read the metadata of a GGUF file as llama.cpp's converter writes it.

    GGUF has no key for `query_pre_attn_scalar`: llama.cpp uses d_model / heads for the two 27B
    models and the head dimension for the rest. Gemma 2 files carry no RoPE base (10,000), and
    Gemma 3 files neither the local base (10,000) nor the pattern (every sixth layer global).

    Raises:
        UserError: another architecture, or a key is missing.
    """
    arch = str(metadata.get("general.architecture"))
    family = _family(arch, source=source)

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{arch}.{key}", default)
        if value is None:
            raise UserError(
                f"{source} lacks the metadata key '{arch}.{key}': a {arch} GGUF file must have "
                "it. The file is damaged or from an old converter: convert the checkpoint anew."
            )
        return value

    gemma3 = family == "gemma3"
    num_layers, num_heads = int(get("block_count")), int(get("attention.head_count"))
    head_dim, d_model = int(get("attention.key_length", 256)), int(get("embedding_length"))
    is_27b = num_layers == (62 if gemma3 else 46)
    linear = metadata.get(f"{arch}.rope.scaling.type") == "linear"
    softcaps = (None, None) if gemma3 else (50.0, 30.0)
    return _checked(
        GemmaConfig(
            family=family,
            vocab_size=vocab_size,
            d_model=d_model,
            d_ff=int(get("feed_forward_length")),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=int(get("attention.head_count_kv")),
            head_dim=head_dim,
            query_scalar=d_model / num_heads if is_27b else float(head_dim),
            window=int(get("attention.sliding_window", 4096)),
            global_layers=_global_layers_from_gguf(
                metadata.get(f"{arch}.attention.sliding_window_pattern", 6 if gemma3 else 2),
                num_layers,
            ),
            rope_base_global=float(get("rope.freq_base", 1e6 if gemma3 else 1e4)),
            rope_base_local=float(get("rope.freq_base_swa", 1e4)),
            rope_factor_global=float(get("rope.scaling.factor")) if linear else 1.0,
            # stored as float32: 9.99999997e-07 is 1e-06
            norm_epsilon=float(f"{get('attention.layer_norm_rms_epsilon'):.6g}"),
            attention_softcap=metadata.get(f"{arch}.attn_logit_softcapping", softcaps[0]),
            final_softcap=metadata.get(f"{arch}.final_logit_softcapping", softcaps[1]),
            context_length=int(get("context_length")),
            bos_id=int(metadata.get("tokenizer.ggml.bos_token_id", 2)),
        ),
        source=source,
    )


def _family(model_type: str, *, source: str) -> Family:
    family = _MODEL_TYPES.get(model_type)
    if family is None:
        raise UserError(
            f"{source} is of architecture '{model_type}': only Gemma 2 and Gemma 3 text models "
            f"({', '.join(_MODEL_TYPES)}) are read. Choose such a checkpoint."
        )
    return family


def _refuse_unknown_switches(value: Mapping[str, Any], *, source: str) -> None:
    """Settings a Gemma-like config may carry and the released models never do."""
    required = {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "use_bidirectional_attention": False,
    }
    for key, wanted in required.items():
        if value.get(key, wanted) != wanted:
            raise UserError(
                f"{source} has {key} = {value[key]!r}: only {wanted!r}, as in every released "
                "Gemma 2 and 3 text model, is implemented. Choose another checkpoint."
            )


def _rope_from_hf(
    value: Mapping[str, Any], family: Family, *, source: str
) -> tuple[float, float, float]:
    """(global base, local base, global factor) from either generation of `config.json`."""
    scaling: Mapping[str, Any]
    if rope := value.get("rope_parameters"):
        scaling = rope.get("full_attention", rope)
        local = rope.get("sliding_attention", {"rope_theta": scaling.get("rope_theta")})
        base_local = local.get("rope_theta") or value.get("rope_local_base_freq", 1e4)
        if local.get("rope_type", "default") != "default":
            raise _unknown_rope(local, source=source)
    else:
        scaling = value.get("rope_scaling") or {}
        base_local = value.get("rope_local_base_freq", value["rope_theta"])
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear") or (kind == "linear" and family == "gemma2"):
        raise _unknown_rope(scaling, source=source)
    base_global = scaling.get("rope_theta") or value["rope_theta"]
    factor = scaling["factor"] if kind == "linear" else 1.0
    return float(base_global), float(base_local), float(factor)


def _unknown_rope(rope: Mapping[str, Any], *, source: str) -> UserError:
    return UserError(
        f"{source} has RoPE settings {dict(rope)}: only the default kind, and on Gemma 3's global "
        "layers the linear kind, are implemented. Choose another checkpoint."
    )


def _global_layers_from_hf(
    value: Mapping[str, Any], family: Family, *, source: str
) -> tuple[bool, ...]:
    kinds = value.get("layer_types")
    num_layers = value["num_hidden_layers"]
    if kinds is None:
        period = 2 if family == "gemma2" else value["sliding_window_pattern"]
        return tuple((layer + 1) % period == 0 for layer in range(num_layers))
    if len(kinds) != num_layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise UserError(
            f"{source} has layer_types with {len(kinds)} entries of kinds {sorted(set(kinds))} "
            f"for {num_layers} layers: it needs one full_attention or sliding_attention per "
            "layer. Mend config.json."
        )
    return tuple(kind == "full_attention" for kind in kinds)


def _global_layers_from_gguf(pattern: int | list[bool], num_layers: int) -> tuple[bool, ...]:
    if isinstance(pattern, int):
        return tuple((layer + 1) % pattern == 0 for layer in range(num_layers))
    return tuple(not sliding for sliding in pattern[:num_layers])


def _check_types(value: Mapping[str, Any], *, source: str) -> None:
    for key, default in _COMMON_DEFAULTS.items():
        wanted = (int, float) if isinstance(default, float) or "scalar" in key else int
        if not isinstance(value[key], wanted) or isinstance(value[key], bool):
            raise UserError(f"{source} has {key} = {value[key]!r}: a number is needed there.")


def _checked(config: GemmaConfig, *, source: str) -> GemmaConfig:
    for field in fields(config):
        number = getattr(config, field.name)
        if isinstance(number, (int, float)) and number <= 0 and field.name != "bos_id":
            raise UserError(f"{source} has {field.name} = {number}: it must be above 0.")
    if config.num_heads % config.num_kv_heads:
        raise UserError(
            f"{source} has {config.num_heads} attention heads and {config.num_kv_heads} key-value "
            "heads: the first must be a multiple of the second. The file is damaged."
        )
    if config.head_dim % 2:
        raise UserError(
            f"{source} has head_dim {config.head_dim}: RoPE needs an even one. The file is damaged."
        )
    if len(config.global_layers) != config.num_layers:
        raise UserError(
            f"{source} gives the attention kind of {len(config.global_layers)} layers and has "
            f"{config.num_layers}. The file is damaged."
        )
    return config
