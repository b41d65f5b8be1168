"""Gemma 2 and Gemma 3 text in flax, one forward for both, with taps and a splice.

Exact in what `transformers` 5 computes (modeling_gemma2.py, modeling_gemma3.py): RMSNorm in
float32 with gain 1 + w, the embedding scale rounded to the weights' dtype, scores divided by
sqrt(query_pre_attn_scalar), soft caps before the mask, local and global layers, and Gemma 3's
norms of queries and keys before RoPE. In bfloat16 the scores, RoPE and the activation function
are computed in float32 and rounded once, where `transformers` rounds after each operation.

Shapes: B sequences, S positions, D model width, V vocabulary, H query heads, G key-value heads,
E head dim. Projections are [in, out], so that products read `x @ W` (on a CPU as fast as [out,
in]); the embedding stays [V, D], as it is looked up by row.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from activation_cache.config import Site
from activation_cache.gemma.attention import attend_in_order
from activation_cache.gemma.config import GemmaConfig
from activation_cache.gemma.params import on_all, on_model_axis
from activation_cache.gemma.scores import Score, project
from activation_cache.gemma.taps import Splice, Tap
from activation_cache.precision import Precision
from activation_cache.products import einsum

Visit = Callable[[Site, Array], Array]
# Queries, keys and values to heads' outputs, as `attend_in_order`.
Attend = Callable[..., Array]


@struct.dataclass
class GemmaOutput:
    """The result of a forward: the tapped activations, and logits if they were asked for."""

    taps: dict[Tap, Float[Array, "B S D"]]
    logits: Float[Array, "B S V"] | None


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + w), all in float32, then rounded to x's dtype."""

    epsilon: float

    @nn.compact
    def __call__(
        self,
        x_D: Float[Array, "*batch D"],
        visit: Callable[[Array], Array] = lambda normalized_D: normalized_D,
    ) -> Float[Array, "*batch D"]:
        """`visit` is given x / rms(x), in float32."""
        w_D = self.param("scale", nn.initializers.zeros_init(), x_D.shape[-1:], jnp.float32)
        wide_D = x_D.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide_D), axis=-1, keepdims=True)
        gain_D = (1.0 + w_D.astype(jnp.float32)).reshape((1,) * (x_D.ndim - 1) + (-1,))
        normalized_D = visit(wide_D * jax.lax.rsqrt(mean_square + self.epsilon))
        return (normalized_D * gain_D).astype(x_D.dtype)


def _weight(module: nn.Module, name: str, shape: tuple[int, int]) -> Array:
    return module.param(name, nn.initializers.lecun_normal(), shape, jnp.float32)


def _product(x: Array, weight: Array, *, precision: Precision) -> Array:
    """x @ weight, accumulated in float32 and rounded once.

    Naming the dtype lets XLA use a CPU's bfloat16 matrix units (4 times faster where there are any)
    and costs nothing on other devices.
    """
    return einsum("...d,de->...e", x, weight, precision=precision).astype(x.dtype)


def _sum_of_products(x: Array, weight: Array, mesh: Mesh | None, *, precision: Precision) -> Array:
    """x @ weight where x's columns and the weight's rows are cut over mesh axis `model`.

    The partial sums are added in the order of the devices: each device receives its share of the
    rows from all of them, adds, and sends the sums to all. An all-reduce moves no fewer bytes, and
    its order of additions is not specified: it changes with the transport, and so with the number
    of processes.
    """
    size = 1 if mesh is None else mesh.shape["model"]
    if mesh is None or size == 1:
        return _product(x, weight, precision=precision)
    put = jax.lax.with_sharding_constraint
    rows = x.reshape(-1, size, x.shape[-1] // size)
    num_rows = len(rows)
    rows = jnp.pad(rows, ((0, -num_rows % size), (0, 0), (0, 0)))
    weights = weight.reshape(size, -1, weight.shape[-1])
    parts = einsum("nmi,mid->mnd", rows, weights, precision=precision)
    parts = put(parts, on_model_axis(mesh, dim=0, ndim=3))
    parts = put(parts, on_model_axis(mesh, dim=1, ndim=3))
    total = functools.reduce(jnp.add, [parts[device] for device in range(size)])
    total = put(total.astype(x.dtype), on_all(mesh))
    return total[:num_rows].reshape(*x.shape[:-1], -1)


class Attention(nn.Module):
    """Causal attention of one layer, local or global."""

    config: GemmaConfig
    is_global: bool
    precision: Precision
    mesh: Mesh | None = None

    @nn.compact
    def __call__(
        self, x_BSD: Float[Array, "B S D"], visit: Visit, attend: Attend
    ) -> Float[Array, "B S D"]:
        c = self.config
        batch, length, _ = x_BSD.shape

        def heads(name: str, count: int) -> Array:
            weight = _weight(self, name, (c.d_model, count * c.head_dim))
            wide = _product(x_BSD, weight, precision=self.precision)
            return wide.reshape(batch, length, count, c.head_dim)

        q_BSHE, k_BSGE = heads("W_Q", c.num_heads), heads("W_K", c.num_kv_heads)
        v_BSGE = heads("W_V", c.num_kv_heads)
        if c.qk_norm:
            q_BSHE = RMSNorm(c.norm_epsilon, name="query_norm")(q_BSHE)
            k_BSGE = RMSNorm(c.norm_epsilon, name="key_norm")(k_BSGE)
        out_BSD = attend(
            q_BSHE,
            k_BSGE,
            v_BSGE,
            base=c.rope_base_global if self.is_global else c.rope_base_local,
            factor=c.rope_factor_global if self.is_global else 1.0,
            scale=c.query_scalar**-0.5,
            softcap=c.attention_softcap,
            window=None if self.is_global else c.window,
            precision=self.precision,
        ).reshape(batch, length, c.num_heads * c.head_dim)
        out_BSD = visit("attn_out_prelinear", out_BSD)
        weight = _weight(self, "W_O", (c.num_heads * c.head_dim, c.d_model))
        return _sum_of_products(out_BSD, weight, self.mesh, precision=self.precision)


class MLP(nn.Module):
    """down(gelu_tanh(gate x) * up x)."""

    config: GemmaConfig
    precision: Precision
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, x_BSD: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        c = self.config
        product = functools.partial(_product, x_BSD, precision=self.precision)
        gate = product(_weight(self, "W_gate", (c.d_model, c.d_ff)))
        up = product(_weight(self, "W_up", (c.d_model, c.d_ff)))
        active = jax.nn.gelu(gate.astype(jnp.float32), approximate=True).astype(x_BSD.dtype)
        down = _weight(self, "W_down", (c.d_ff, c.d_model))
        return _sum_of_products(active * up, down, self.mesh, precision=self.precision)


class Block(nn.Module):
    """One layer: attention and MLP, each between two norms, added to the residual stream."""

    config: GemmaConfig
    is_global: bool
    precision: Precision
    mesh: Mesh | None = None

    @nn.compact
    def __call__(
        self, h_BSD: Float[Array, "B S D"], visit: Visit, attend: Attend
    ) -> Float[Array, "B S D"]:
        norm = functools.partial(RMSNorm, self.config.norm_epsilon)
        made = self.precision, self.mesh
        attention = Attention(self.config, self.is_global, *made, name="attention")
        attended = attention(norm(name="pre_attention_norm")(h_BSD), visit, attend)
        h_BSD = h_BSD + norm(name="post_attention_norm")(attended)
        visit_normalized = functools.partial(visit, "mlp_in_normalized")
        mlp_in = visit("mlp_in", norm(name="pre_mlp_norm")(h_BSD, visit_normalized))
        mlp_out = MLP(self.config, *made, name="mlp")(mlp_in)
        h_BSD = h_BSD + visit("mlp_out", norm(name="post_mlp_norm")(mlp_out))
        return visit("resid_post", h_BSD)


class Gemma(nn.Module):
    """The language model: tokens to taps, logits or scores of its predictions.

    Layers past the last one needed are not computed. Parameters: `embedding` [V, D],
    `layers_0` ..., `final_norm`; `params.py` lists them all, and how they are cut over `mesh` if
    there is one. With `recompute` a gradient keeps each layer's input and computes the rest again.
    `precision` is that of products of float32 weights; bfloat16 ones ask for no other.
    """

    config: GemmaConfig
    mesh: Mesh | None = None
    recompute: bool = False
    precision: Precision = "float32"

    def setup(self) -> None:
        c = self.config
        block = nn.remat(Block, static_argnums=(2, 3)) if self.recompute else Block
        initialiser = nn.initializers.normal(1 / math.sqrt(c.d_model))
        self.embedding = self.param("embedding", initialiser, (c.vocab_size, c.d_model))
        made = self.precision, self.mesh
        self.layers = [block(c, is_global, *made) for is_global in c.global_layers]
        self.final_norm = RMSNorm(c.norm_epsilon)

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        *,
        taps: Sequence[Tap] = (),
        splice: Splice | None = None,
        logits: bool = True,
    ) -> GemmaOutput:
        """Run the model once.

        Args:
            tokens: ids, each sequence starting with BOS; positions count from 0.
            taps: the activations to return. At a tap that is also spliced, those before it.
            splice: activations to replace inside this forward.
            logits: whether to compute logits; without them the forward stops after the deepest
                tap.
        """
        num_layers = self.config.num_layers
        if not logits:
            deep = [tap.layer for tap in taps if tap.site != "embedding"]
            num_layers = 1 + max(deep, default=-1)
        splices = () if splice is None else (splice,)
        h_BSD, found = self._trunk(tokens, taps=taps, splices=splices, num_layers=num_layers)
        if not logits:
            return GemmaOutput(taps=found, logits=None)
        h_BSD = self.final_norm(h_BSD)
        return GemmaOutput(taps=found, logits=self._project(h_BSD))

    def scores(
        self,
        tokens: Int[Array, "B S"],
        *,
        score: Score,
        counted_BP: Bool[Array, "B S-1"],
        splice: Splice | None = None,
        kept: tuple[int, Float[Array, "B S D"]] | None = None,
    ) -> Float[Array, "B S-1"]:
        """`score` of every counted prediction, float32, and 0 elsewhere; entry s predicts s + 1.

        Args:
            kept: a layer, and the residual stream after it, as the taps of an earlier forward hold
                it: this one goes on from there. What is spliced may not lie further below.
        """
        h_BPD, _ = self.predictions(tokens, splice=splice, kept=kept)
        how = {"softcap": self.config.final_softcap, "precision": self.precision}
        return score(h_BPD, tokens[:, 1:], counted_BP, self.embedding, **how)

    def predictions(
        self,
        tokens: Int[Array, "B S"],
        *,
        taps: Sequence[Tap] = (),
        splice: Splice | None = None,
        kept: tuple[int, Float[Array, "B S D"]] | None = None,
    ) -> tuple[Float[Array, "B S-1 D"], dict[Tap, Array]]:
        """What the final norm returns for every prediction, which logits are products of; and taps.

        Arguments as of `__call__` and `scores`.
        """
        splices = () if splice is None else (splice,)
        h_BSD, found = self._trunk(
            tokens, taps=taps, splices=splices, num_layers=self.config.num_layers, kept=kept
        )
        return self.final_norm(h_BSD)[:, :-1], found

    def next_logits(
        self,
        tokens: Int[Array, "B S"],
        last_B: Int[Array, " B"],
        *,
        attend: Attend = attend_in_order,
        splices: Sequence[Splice] = (),
    ) -> Float[Array, "B V"]:
        """The logits that token `last_B` of each row gives for the one after it.

        `attend` is called once for each layer, in their order: `sampling` keeps keys and values
        there.
        """
        h_BSD, _ = self._trunk(
            tokens, taps=(), splices=splices, num_layers=self.config.num_layers, attend=attend
        )
        h_BD = jnp.take_along_axis(h_BSD, last_B[:, None, None], axis=1)[:, 0]
        return self._project(self.final_norm(h_BD))

    def _trunk(
        self,
        tokens: Int[Array, "B S"],
        *,
        taps: Sequence[Tap],
        splices: Sequence[Splice],
        num_layers: int,
        attend: Attend = attend_in_order,
        kept: tuple[int, Array] | None = None,
    ) -> tuple[Float[Array, "B S D"], dict[Tap, Array]]:
        found: dict[Tap, Array] = {}
        read: dict[Tap, Array] = {}
        is_read = {splice.reads for splice in splices}

        def visit(site: Site, acts: Array, *, layer: int) -> Array:
            tap = Tap(site, layer)
            if tap in taps:
                found[tap] = acts.astype(self.embedding.dtype)
            if tap in is_read:
                read[tap] = acts.astype(self.embedding.dtype)
            for splice in splices:
                if splice.tap == tap:
                    reads = {} if splice.reads is None else {"read": read[splice.reads]}
                    acts = splice.replace(acts, splice.arguments, **reads).astype(acts.dtype)
            return acts

        if kept is None:
            first = 0
            h_BSD = visit("embedding", self.embedding[tokens], layer=0)
            # The scale is rounded to the weights' dtype: 59.75 for Gemma 2 9B in bfloat16.
            h_BSD = h_BSD * jnp.asarray(math.sqrt(self.config.d_model), h_BSD.dtype)
        else:
            first = kept[0] + 1
            h_BSD = visit("resid_post", kept[1], layer=kept[0])
        for layer in range(first, num_layers):
            h_BSD = self.layers[layer](h_BSD, functools.partial(visit, layer=layer), attend)
        return h_BSD, found

    def _project(self, h_D: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        softcap = self.config.final_softcap
        return project(h_D, self.embedding, softcap=softcap, precision=self.precision)
