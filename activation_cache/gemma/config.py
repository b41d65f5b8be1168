"""The sizes and switches of a Gemma 2 or Gemma 3 text model, read from its checkpoint.

Defaults are those of the two families in `transformers` 5 (`Gemma2Config`, `Gemma3TextConfig`):
published `config.json` files leave out whatever equals them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from activation_cache.config import Count, Positive, PositiveCount
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
_LayerCount = Annotated[PositiveCount, Field(le=1000)]
# What both formats store under a key: our name, its type, the key in config.json, and the key in
# GGUF metadata behind the architecture's name.
_FIELDS: tuple[tuple[str, Any, str, str], ...] = (
    ("d_model", PositiveCount, "hidden_size", "embedding_length"),
    ("d_ff", PositiveCount, "intermediate_size", "feed_forward_length"),
    ("num_layers", _LayerCount, "num_hidden_layers", "block_count"),
    ("num_heads", PositiveCount, "num_attention_heads", "attention.head_count"),
    ("num_kv_heads", PositiveCount, "num_key_value_heads", "attention.head_count_kv"),
    ("head_dim", PositiveCount, "head_dim", "attention.key_length"),
    ("window", PositiveCount | None, "sliding_window", "attention.sliding_window"),
    ("norm_epsilon", Positive, "rms_norm_eps", "attention.layer_norm_rms_epsilon"),
    ("attention_softcap", Positive | None, "attn_logit_softcapping", "attn_logit_softcapping"),
    ("final_softcap", Positive | None, "final_logit_softcapping", "final_logit_softcapping"),
    ("context_length", PositiveCount, "max_position_embeddings", "context_length"),
)
# Of these null is a value in `transformers`: none. Elsewhere it stands for the default.
_NULL_IS_NONE = frozenset(
    ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "bos_token_id")
)
_OPTIONAL_IN_GGUF = frozenset(("head_dim", "window", "attention_softcap", "final_softcap"))


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
    bos_id: int | None  # None: the checkpoint doesn't say

    @property
    def qk_norm(self) -> bool:
        """Gemma 3 normalises queries and keys per head."""
        return self.family == "gemma3"


def check_context(config: GemmaConfig, length: int, *, key: str = "text.sequence_length") -> None:
    """Raises `UserError` if sequences are longer than the model's context; `key` set the length."""
    if length > config.context_length:
        raise UserError(
            f"{key} is {length} and the model's context has {config.context_length} tokens: past "
            f"them its activations mean nothing. Set {key} to at most {config.context_length}."
        )


def config_from_hf(raw: Mapping[str, Any], *, source: str) -> GemmaConfig:
    """Read a Hugging Face `config.json`; of a multimodal one only the text part.

    Args:
        raw: the parsed JSON.
        source: what error messages call the file.

    Raises:
        UserError: not a Gemma 2 or Gemma 3 model, one with a switch this forward lacks, or a value
            of the wrong type.
    """
    family = _family(str(raw.get("model_type")), source=source)
    text = raw if raw.get("text_config") is None else raw["text_config"]
    text = _valid(dict[str, Any], text, key="text_config", source=source)
    value = _DEFAULTS[family] | {
        key: one for key, one in text.items() if one is not None or key in _NULL_IS_NONE
    }
    _refuse_unknown_switches(value, source=source)

    def get(key: str, kind: Any) -> Any:
        return _valid(kind, value[key], key=key, source=source)

    fields = {name: get(key, kind) for name, kind, key, _ in _FIELDS}
    kinds = _global_layers_from_hf(value, family, num_layers=fields["num_layers"], source=source)
    if fields["window"] is None:
        if not all(kinds):
            raise UserError(
                f"{source} has sliding_window = null and {kinds.count(False)} layers of kind "
                "sliding_attention: their window is needed. The file is damaged."
            )
        fields["window"] = fields["context_length"]  # no layer reads it
    base_global, base_local, factor = _rope_from_hf(value, family, source=source)
    return _checked(
        GemmaConfig(
            family=family,
            vocab_size=get("vocab_size", PositiveCount),
            query_scalar=float(get("query_pre_attn_scalar", Positive)),
            global_layers=kinds,
            rope_base_global=base_global,
            rope_base_local=base_local,
            rope_factor_global=factor,
            bos_id=get("bos_token_id", Count | None),
            **fields,
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
    gemma3, scalar = config.family == "gemma3", config.query_scalar
    return {
        "architectures": ["Gemma3ForCausalLM" if gemma3 else "Gemma2ForCausalLM"],
        "model_type": "gemma3_text" if gemma3 else "gemma2",
        "vocab_size": config.vocab_size,
        **{key: getattr(config, name) for name, _, key, _ in _FIELDS},
        # `transformers` 5 refuses 256.0.
        "query_pre_attn_scalar": int(scalar) if scalar.is_integer() else scalar,
        "layer_types": kinds,
        "rope_parameters": (
            {"full_attention": rope_global, "sliding_attention": rope_local}
            if gemma3
            else rope_global
        ),
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
        UserError: another architecture, or a key is missing or of the wrong type.
    """
    arch = str(metadata.get("general.architecture"))
    family = _family(arch, source=source)

    def get(key: str, kind: Any, default: Any = None) -> Any:
        key = key if key.startswith("tokenizer.") else f"{arch}.{key}"
        value = metadata.get(key, default)
        if value is None and kind in (PositiveCount, _LayerCount, Positive):
            raise UserError(
                f"{source} lacks the metadata key '{key}': a {arch} GGUF file must have "
                "it. The file is damaged or from an old converter: convert the checkpoint anew."
            )
        return _valid(kind, value, key=key, source=source)

    gemma3, defaults = family == "gemma3", _DEFAULTS[family]
    fields = {
        name: get(key, kind, defaults[hf_key] if name in _OPTIONAL_IN_GGUF else None)
        for name, kind, hf_key, key in _FIELDS
    }
    # stored as float32: 9.99999997e-07 is 1e-06
    fields["norm_epsilon"] = float(f"{fields['norm_epsilon']:.6g}")
    num_layers, d_model = fields["num_layers"], fields["d_model"]
    is_27b = num_layers == (62 if gemma3 else 46)
    scalar = d_model / fields["num_heads"] if is_27b else float(fields["head_dim"])
    pattern = get(
        "attention.sliding_window_pattern", PositiveCount | list[bool], 6 if gemma3 else 2
    )
    scaling = metadata.get(f"{arch}.rope.scaling.type", "none")
    linear = scaling == "linear"
    if not (scaling == "none" or (linear and gemma3)):
        raise _unknown_rope({"rope.scaling.type": scaling}, source=source)
    return _checked(
        GemmaConfig(
            family=family,
            vocab_size=vocab_size,
            query_scalar=scalar,
            global_layers=(
                _every(pattern, num_layers)
                if isinstance(pattern, int)
                else tuple(not sliding for sliding in pattern[:num_layers])
            ),
            rope_base_global=float(get("rope.freq_base", Positive, defaults["rope_theta"])),
            rope_base_local=float(get("rope.freq_base_swa", Positive, 1e4)),
            rope_factor_global=float(get("rope.scaling.factor", Positive)) if linear else 1.0,
            bos_id=get("tokenizer.ggml.bos_token_id", Count, 2),
            **fields,
        ),
        source=source,
    )


def _valid(kind: Any, value: Any, *, key: str, source: str) -> Any:
    """The value as this type; no text is taken for a number."""
    try:
        return TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        problem = error.errors()[0]["msg"].replace("Input", "it", 1)
        shown = repr(value) if len(repr(value)) < 100 else f"{repr(value)[:100]} ..."
        raise UserError(
            f"{source} has {key} = {shown}: {problem}. Correct it there, or take the file that "
            "came with the model."
        ) from error


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
    """(global base, local base, global factor) from either generation of `config.json`.

    `rope_parameters` is newer than `rope_theta`, `rope_local_base_freq` and `rope_scaling`. In a
    file that has both, `transformers` lets `rope_scaling` change the global layers, and takes a
    base from the old keys where the new one has none.
    """

    def parameters(given: Any, key: str) -> dict[str, Any]:
        return _valid(dict[str, Any], {} if given is None else given, key=key, source=source)

    scaling = parameters(value.get("rope_scaling"), "rope_scaling")
    given = parameters(value.get("rope_parameters"), "rope_parameters")
    old_local = value["rope_theta"]
    rope_global = rope_local = given
    if family == "gemma3":
        if not set(given) <= {"full_attention", "sliding_attention"}:
            raise _unknown_rope(given, source=source)
        rope_global, rope_local = (
            parameters(given.get(kind), f"rope_parameters.{kind}")
            for kind in ("full_attention", "sliding_attention")
        )
        old_local = value["rope_local_base_freq"]
    rope_global = rope_global | scaling
    kind, base_global, factor = _rope_settings(rope_global, value["rope_theta"], source=source)
    kind_local, base_local, _ = _rope_settings(rope_local, old_local, source=source)
    if kind_local != "default" or (kind == "linear" and family == "gemma2"):
        raise _unknown_rope(rope_global if family == "gemma2" else rope_local, source=source)
    return base_global, base_local, factor


def _rope_settings(given: Mapping[str, Any], base: Any, *, source: str) -> tuple[str, float, float]:
    """Kind, base and factor of one set of RoPE parameters; `base` is for one without a base."""
    kind = given.get("rope_type") or given.get("type") or "default"
    partial = given.get("partial_rotary_factor")
    if kind not in ("default", "linear") or partial not in (None, 1) or "full_attention" in given:
        raise _unknown_rope(given, source=source)
    base = base if given.get("rope_theta") is None else given["rope_theta"]
    factor = given.get("factor") if kind == "linear" else 1.0
    return (
        kind,
        float(_valid(Positive, base, key="rope_theta", source=source)),
        float(_valid(Positive, factor, key="the RoPE factor", source=source)),
    )


def _unknown_rope(rope: Mapping[str, Any], *, source: str) -> UserError:
    return UserError(
        f"{source} has RoPE settings {dict(rope)}: only the default kind, and on Gemma 3's global "
        "layers (full_attention) the linear kind, are implemented. Choose another checkpoint."
    )


def _every(period: int, num_layers: int) -> tuple[bool, ...]:
    return tuple((layer + 1) % period == 0 for layer in range(num_layers))


def _global_layers_from_hf(
    value: Mapping[str, Any], family: Family, *, num_layers: int, source: str
) -> tuple[bool, ...]:
    given = value.get("layer_types")
    if given is None:
        period = 2 if family == "gemma2" else value["sliding_window_pattern"]
        period = _valid(PositiveCount, period, key="sliding_window_pattern", source=source)
        return _every(period, num_layers)
    kinds = _valid(
        list[Literal["full_attention", "sliding_attention"]],
        given,
        key="layer_types",
        source=source,
    )
    return tuple(kind == "full_attention" for kind in kinds)


def _checked(config: GemmaConfig, *, source: str) -> GemmaConfig:
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
            f"{config.num_layers}: each layer needs one. The file is damaged."
        )
    return config
