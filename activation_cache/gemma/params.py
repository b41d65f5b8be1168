"""One table of Gemma's parameters: their paths in our tree, shapes, and names in checkpoints.

Reading, checking, converting and sharding checkpoints all derive from it: `path` is the key path in
the pytree that `forward.Gemma` reads, `dims` decide how a tensor is cut on a mesh.

Dims: V vocabulary, D model width, H query heads x head dim, G key-value heads x head dim, F the
MLP's width, E head dim. `axis` is a mesh axis.
"""

from __future__ import annotations

from dataclasses import dataclass

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from activation_cache.gemma.config import EMBEDDING_GGUF, EMBEDDING_HF, GemmaConfig
from activation_cache.runtime.errors import UserError

_MODEL = "model"


@dataclass(frozen=True)
class Parameter:
    """One tensor.

    Attributes:
        path: keys in the parameter tree, e.g. ("layers_3", "attention", "W_Q").
        shape: in a checkpoint: [out, in] for a projection.
        dims: of `shape`.
        hf: name in a safetensors file, without the model's prefix.
        gguf: name in a GGUF file.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dims: tuple[str, ...]
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

    @property
    def tree_shape(self) -> tuple[int, ...]:
        """The shape in our tree."""
        return self.shape[::-1] if self.is_projection else self.shape


def parameter_table(config: GemmaConfig) -> tuple[Parameter, ...]:
    """All parameters of a model; embeddings are tied, so there is no output projection."""
    sizes = _sizes(config)
    top = (
        _parameter(("embedding",), "VD", EMBEDDING_HF, EMBEDDING_GGUF, sizes=sizes),
        _parameter(("final_norm", "scale"), "D", "norm.weight", "output_norm.weight", sizes=sizes),
    )
    layers = (p for layer in range(config.num_layers) for p in _layer(config, layer))
    return (*top, *layers)


def _sizes(config: GemmaConfig) -> dict[str, int]:
    return {
        "V": config.vocab_size,
        "D": config.d_model,
        "H": config.num_heads * config.head_dim,
        "G": config.num_kv_heads * config.head_dim,
        "F": config.d_ff,
        "E": config.head_dim,
    }


def _parameter(
    path: tuple[str, ...], dims: str, hf: str, gguf: str, *, sizes: dict[str, int]
) -> Parameter:
    return Parameter(path, tuple(sizes[dim] for dim in dims), tuple(dims), hf, gguf)


def _layer(config: GemmaConfig, layer: int) -> list[Parameter]:
    sizes = _sizes(config)
    rows = [
        ("pre_attention_norm.scale", "D", "input_layernorm", "attn_norm"),
        ("attention.W_Q", "HD", "self_attn.q_proj", "attn_q"),
        ("attention.W_K", "GD", "self_attn.k_proj", "attn_k"),
        ("attention.W_V", "GD", "self_attn.v_proj", "attn_v"),
        ("attention.W_O", "DH", "self_attn.o_proj", "attn_output"),
        ("post_attention_norm.scale", "D", "post_attention_layernorm", "post_attention_norm"),
        ("pre_mlp_norm.scale", "D", "pre_feedforward_layernorm", "ffn_norm"),
        ("mlp.W_gate", "FD", "mlp.gate_proj", "ffn_gate"),
        ("mlp.W_up", "FD", "mlp.up_proj", "ffn_up"),
        ("mlp.W_down", "DF", "mlp.down_proj", "ffn_down"),
        ("post_mlp_norm.scale", "D", "post_feedforward_layernorm", "post_ffw_norm"),
    ]
    if config.qk_norm:
        rows += [
            ("attention.query_norm.scale", "E", "self_attn.q_norm", "attn_q_norm"),
            ("attention.key_norm.scale", "E", "self_attn.k_norm", "attn_k_norm"),
        ]
    return [
        _parameter(
            (f"layers_{layer}", *path.split(".")),
            dims,
            f"layers.{layer}.{hf}.weight",
            f"blk.{layer}.{gguf}.weight",
            sizes=sizes,
        )
        for path, dims, hf, gguf in rows
    ]


def check_model_axis(config: GemmaConfig, size: int) -> None:
    """Check that a model can be cut over a mesh axis `model` of this size.

    Query heads and the MLP are cut evenly or not at all. Key-value heads and the vocabulary are
    cut where that comes out even, and otherwise kept whole on every device.

    Raises:
        UserError: the heads or the MLP's width aren't a multiple of `size`.
    """
    parts = {"query heads": config.num_heads, "MLP width": config.d_ff}
    if all(count % size == 0 for count in parts.values()):
        return
    words = " and ".join(f"{count} {name}" for name, count in parts.items())
    fitting = [n for n in range(1, config.num_heads + 1) if all(c % n == 0 for c in parts.values())]
    raise UserError(
        f"the language model has {words}, which mesh axis 'model' (size {size}) must divide: use "
        f"{', '.join(map(str, fitting))}. Harvesting and evaluation take cache.mesh where it is "
        "given, and mesh where it isn't."
    )


def cut_dims(parameter: Parameter, config: GemmaConfig, *, size: int) -> tuple[bool, ...]:
    """Which dims of a parameter of our tree are cut over `size` devices of mesh axis `model`."""
    units = {"V": config.vocab_size, "H": config.num_heads, "F": config.d_ff}
    units["G"] = config.num_kv_heads
    dims = parameter.dims[::-1] if parameter.is_projection else parameter.dims
    return tuple(dim in units and units[dim] % size == 0 for dim in dims)


def placement(parameter: Parameter, config: GemmaConfig, mesh: Mesh) -> NamedSharding:
    """The sharding of a parameter of our tree: cut over `model` as `check_model_axis` says."""
    cut = cut_dims(parameter, config, size=mesh.shape[_MODEL])
    return NamedSharding(mesh, PartitionSpec(*(_MODEL if one else None for one in cut)))


def on_all(mesh: Mesh) -> NamedSharding:
    """A whole array on every device: tokens, and the residual stream."""
    return NamedSharding(mesh, PartitionSpec())


def on_model_axis(mesh: Mesh, *, dim: int, ndim: int) -> NamedSharding:
    """An array with one dim cut over `model`."""
    spec = [None] * ndim
    return NamedSharding(mesh, PartitionSpec(*spec[:dim], _MODEL, *spec[dim + 1 :]))
