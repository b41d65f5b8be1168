"""One table of Gemma's parameters: where each sits in our tree, its shape, its checkpoint names.

Reading, checking and converting checkpoints all derive from it, and so can placement: `path` is
the key path in the pytree that `gemma.Gemma` reads.
"""

from __future__ import annotations

from dataclasses import dataclass

from activation_cache.gemma_config import GemmaConfig


@dataclass(frozen=True)
class Parameter:
    """One tensor.

    Attributes:
        path: keys in the parameter tree, e.g. ("layers_3", "attention", "W_Q").
        shape: in a checkpoint: [out, in] for a projection.
        hf: name in a safetensors file, without the model's prefix.
        gguf: name in a GGUF file.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    hf: str
    gguf: str

    @property
    def is_norm(self) -> bool:
        """Norm gains: stored as w in safetensors and as 1 + w in GGUF; kept in float32."""
        return self.path[-1] == "scale"

    @property
    def is_projection(self) -> bool:
        """Projections are [out, in] in checkpoints and [in, out] in our tree."""
        return self.path[-1].startswith("W_")


EMBEDDING_HF, EMBEDDING_GGUF = "embed_tokens.weight", "token_embd.weight"


def parameter_table(config: GemmaConfig) -> tuple[Parameter, ...]:
    """All parameters of a model; embeddings are tied, so there is no output projection."""
    top = (
        Parameter(
            ("embedding",), (config.vocab_size, config.d_model), EMBEDDING_HF, EMBEDDING_GGUF
        ),
        Parameter(("final_norm", "scale"), (config.d_model,), "norm.weight", "output_norm.weight"),
    )
    layers = (p for layer in range(config.num_layers) for p in _layer(config, layer))
    return (*top, *layers)


def _layer(config: GemmaConfig, layer: int) -> list[Parameter]:
    d, ff, e = config.d_model, config.d_ff, config.head_dim
    queries, keys = config.num_heads * e, config.num_kv_heads * e
    rows: list[tuple[str, tuple[int, ...], str, str]] = [
        ("pre_attention_norm.scale", (d,), "input_layernorm", "attn_norm"),
        ("attention.W_Q", (queries, d), "self_attn.q_proj", "attn_q"),
        ("attention.W_K", (keys, d), "self_attn.k_proj", "attn_k"),
        ("attention.W_V", (keys, d), "self_attn.v_proj", "attn_v"),
        ("attention.W_O", (d, queries), "self_attn.o_proj", "attn_output"),
        ("post_attention_norm.scale", (d,), "post_attention_layernorm", "post_attention_norm"),
        ("pre_mlp_norm.scale", (d,), "pre_feedforward_layernorm", "ffn_norm"),
        ("mlp.W_gate", (ff, d), "mlp.gate_proj", "ffn_gate"),
        ("mlp.W_up", (ff, d), "mlp.up_proj", "ffn_up"),
        ("mlp.W_down", (d, ff), "mlp.down_proj", "ffn_down"),
        ("post_mlp_norm.scale", (d,), "post_feedforward_layernorm", "post_ffw_norm"),
    ]
    if config.qk_norm:
        rows += [
            ("attention.query_norm.scale", (e,), "self_attn.q_norm", "attn_q_norm"),
            ("attention.key_norm.scale", (e,), "self_attn.k_norm", "attn_k_norm"),
        ]
    return [
        Parameter(
            path=(f"layers_{layer}", *path.split(".")),
            shape=shape,
            hf=f"layers.{layer}.{hf}.weight",
            gguf=f"blk.{layer}.{gguf}.weight",
        )
        for path, shape, hf, gguf in rows
    ]
