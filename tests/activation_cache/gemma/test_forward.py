"""Our forward against `transformers`' Gemma2ForCausalLM and Gemma3ForCausalLM, random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from activation_cache.config import ModelConfig
from activation_cache.gemma import attention, scores
from activation_cache.gemma.forward import Gemma
from activation_cache.gemma.taps import Splice, Tap
from activation_cache.language_model.model import LanguageModel, load_model
from tests.support.tiny_gemma import write_tiny_gemma, write_tiny_tokenizer

pytestmark = pytest.mark.slow

COMMON = {
    "vocab_size": 403,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,  # not 36 / 6
    "query_pre_attn_scalar": 7,
    "sliding_window": 5,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
LINEAR_ROPE = GEMMA3_ROPE | {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
}
BATCH, LENGTH = 3, 23


def _gemma2() -> Any:
    # Small caps, so that both bite on logits of this size.
    config = transformers.Gemma2Config(
        num_hidden_layers=4, attn_logit_softcapping=2.0, final_logit_softcapping=1.5, **COMMON
    )
    return transformers.Gemma2ForCausalLM(config)


def _gemma3_text(rope: dict[str, Any]) -> Any:
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    return transformers.Gemma3TextConfig(
        num_hidden_layers=4, layer_types=kinds, rope_parameters=rope, **COMMON
    )


def _gemma3() -> Any:
    return transformers.Gemma3ForCausalLM(_gemma3_text(GEMMA3_ROPE))


def _gemma3_multimodal() -> Any:
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
              "num_attention_heads": 1, "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=_gemma3_text(LINEAR_ROPE).to_dict(),
        vision_config=vision,
        attn_implementation="eager",
    )
    return transformers.Gemma3ForConditionalGeneration(config)


BUILDERS: dict[str, Callable[[], Any]] = {
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gemma3_multimodal": _gemma3_multimodal,
}


@pytest.fixture(autouse=True)
def _small_query_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks of queries for 23 positions, as 1,024 positions make four."""
    monkeypatch.setattr(attention, "MIN_QUERY_BLOCK", 9)


@dataclass
class Pair:
    """The same model twice, and tokens to run through both."""

    theirs: Any
    ours: LanguageModel
    folder: Path
    tokens: np.ndarray

    @property
    def layers(self) -> Any:
        model = self.theirs.model
        return getattr(model, "language_model", model).layers


def _randomise(model: Any, *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norm gains start at 0, which would hide a missing 1 + w.
            scale = 0.4 if "norm" in name else 0.25
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


@pytest.fixture(scope="module", params=list(BUILDERS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    model = BUILDERS[request.param]().eval()
    _randomise(model, seed=1)
    folder = tmp_path_factory.mktemp(request.param)
    # Gemma 3 goes through an index with several shards.
    sharded = {"max_shard_size": "60KB"} if request.param == "gemma3" else {}
    model.save_pretrained(folder, **sharded)
    write_tiny_tokenizer(folder)
    ours = load_model(ModelConfig(weights=str(folder), dtype="float32"))
    tokens = np.random.default_rng(0).integers(3, COMMON["vocab_size"], (BATCH, LENGTH))
    tokens[:, 0] = 2
    return Pair(theirs=model, ours=ours, folder=folder, tokens=tokens.astype(np.int32))


def _their_forward(pair: Pair, *, replace: tuple[Tap, Callable] | None = None) -> dict[Any, Any]:
    """Logits under None, and every tap, from hooks."""
    found: dict[Any, Any] = {}
    handles = []

    def see(tap: Tap, value: torch.Tensor) -> torch.Tensor | None:
        found[tap] = value.detach().numpy()
        return replace[1](value) if replace is not None and replace[0] == tap else None

    for i, layer in enumerate(pair.layers):

        def before(_: Any, args: Any, *, i: int = i) -> Any:
            new = see(Tap("attn_out_prelinear", i), args[0])
            return None if new is None else (new,)

        def after(_: Any, __: Any, out: Any, *, i: int = i, site: str = "mlp_out") -> Any:
            value = out[0] if isinstance(out, tuple) else out
            new = see(Tap(site, i), value)  # type: ignore[arg-type]
            return (new, *out[1:]) if new is not None and isinstance(out, tuple) else new

        def after_norm(module: Any, args: Any, out: Any, *, i: int = i) -> Any:
            wide = args[0].float()
            rms = (wide.square().mean(dim=-1, keepdim=True) + module.eps).sqrt()
            see(Tap("mlp_in_normalized", i), wide / rms)
            return after(module, args, out, i=i, site="mlp_in")

        def after_block(module: Any, args: Any, out: Any, *, i: int = i) -> Any:
            return after(module, args, out, i=i, site="resid_post")

        handles += [
            layer.self_attn.o_proj.register_forward_pre_hook(before),
            layer.pre_feedforward_layernorm.register_forward_hook(after_norm),
            layer.post_feedforward_layernorm.register_forward_hook(after),
            layer.register_forward_hook(after_block),
        ]
    try:
        with torch.no_grad():
            found[None] = pair.theirs(torch.from_numpy(pair.tokens).long()).logits.numpy()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _their_losses(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    wide = logits[:, :-1].astype(np.float64)
    shifted = wide - wide.max(axis=-1, keepdims=True)
    picked = np.take_along_axis(shifted, tokens[:, 1:, None].astype(np.int64), axis=-1)[..., 0]
    return np.log(np.exp(shifted).sum(axis=-1)) - picked


def _assert_close(ours: Any, theirs: np.ndarray, *, tolerance: float = 1e-5) -> None:
    """Largest difference relative to the largest value; 3e-6 at most was measured."""
    ours = np.asarray(ours, np.float32)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def _all_taps(model: LanguageModel) -> list[Tap]:
    sites = ("resid_post", "mlp_out", "attn_out_prelinear", "mlp_in", "mlp_in_normalized")
    return [Tap(site, layer) for layer in range(model.config.num_layers) for site in sites]


def test_logits_and_every_tap(pair: Pair) -> None:
    theirs = _their_forward(pair)
    taps = _all_taps(pair.ours)
    acts = pair.ours.activations(pair.tokens, taps)
    assert set(acts) == set(taps)
    for tap in taps:
        _assert_close(acts[tap], theirs[tap])
    forward = jax.jit(Gemma(pair.ours.config).apply)
    output: Any = forward({"params": pair.ours.params}, jnp.asarray(pair.tokens))
    _assert_close(output.logits, theirs[None])


@pytest.mark.parametrize("pair", ["gemma2", "gemma3"], indirect=True)  # with a cap and without
def test_losses_in_chunks_of_positions(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    # 44 rows, 7 at a time: the last chunk is padded. (`test_splice` has all rows in one chunk.)
    monkeypatch.setattr(scores, "MAX_LOGIT_ELEMENTS", 7 * COMMON["vocab_size"])
    losses = pair.ours.losses(pair.tokens[:2])
    assert losses.dtype == jnp.float32
    _assert_close(losses, _their_losses(_their_forward(pair)[None], pair.tokens)[:2])


def _halve_and_shift(acts: jax.Array, shift: jax.Array) -> jax.Array:
    return acts * 0.5 + shift[None, None, :]


@pytest.mark.parametrize(
    ("pair", "site"),
    [
        ("gemma2", "resid_post"),
        ("gemma2", "mlp_out"),
        ("gemma2", "mlp_in"),
        ("gemma3", "attn_out_prelinear"),
        ("gemma3_multimodal", "resid_post"),
    ],
    indirect=["pair"],
)
def test_splice(pair: Pair, site: Any) -> None:
    """Every site once: a splice is the same code in every family."""
    tap = Tap(site, 2)
    width = 60 if site == "attn_out_prelinear" else 36
    for seed in (0, 1):  # other arguments, same compiled forward
        shift = np.random.default_rng(seed).standard_normal(width).astype(np.float32)
        theirs = _their_forward(
            pair, replace=(tap, lambda x, s=shift: x * 0.5 + torch.from_numpy(s))
        )
        losses = pair.ours.losses(pair.tokens, Splice(tap, _halve_and_shift, shift))
        _assert_close(losses, _their_losses(theirs[None], pair.tokens))


def _add_what_was_read(acts: jax.Array, gain: jax.Array, *, read: jax.Array) -> jax.Array:
    return 0.3 * acts + gain * read


@pytest.mark.parametrize(
    ("pair", "site"), [("gemma2", "mlp_in"), ("gemma3", "mlp_in_normalized")], indirect=["pair"]
)
def test_a_splice_sees_an_earlier_tap(pair: Pair, site: Any) -> None:
    read: dict[str, torch.Tensor] = {}

    def note(module: Any, args: Any, out: Any) -> None:
        wide = args[0].float()
        rms = (wide.square().mean(dim=-1, keepdim=True) + module.eps).sqrt()
        read["acts"] = out if site == "mlp_in" else wide / rms

    handle = pair.layers[2].pre_feedforward_layernorm.register_forward_hook(note)
    replace = (Tap("mlp_out", 2), lambda x: 0.3 * x + 1.7 * read["acts"])
    theirs = _their_forward(pair, replace=replace)
    handle.remove()
    splice = Splice(Tap("mlp_out", 2), _add_what_was_read, jnp.float32(1.7), reads=Tap(site, 2))
    _assert_close(pair.ours.losses(pair.tokens, splice), _their_losses(theirs[None], pair.tokens))


@pytest.mark.parametrize("pair", ["gemma2"], indirect=True)
def test_bfloat16_stays_near_float32(pair: Pair) -> None:
    """Tolerance 5 %: bfloat16 keeps 8 bits, and four layers add up their rounding."""
    model = load_model(ModelConfig(weights=str(pair.folder), dtype="bfloat16"))
    tap = Tap("resid_post", 3)
    acts = model.activations(pair.tokens, [tap])[tap]
    assert acts.dtype == jnp.bfloat16
    exact = np.asarray(pair.ours.activations(pair.tokens, [tap])[tap])
    error = np.linalg.norm(np.asarray(acts, np.float32) - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.05
    # The losses leave bfloat16 before the vocabulary is summed over.
    assert jax.eval_shape(model.losses, jnp.asarray(pair.tokens)).dtype == jnp.float32


@pytest.fixture(scope="module")
def gemma2_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = _gemma2()
    _randomise(model, seed=2)
    folder = tmp_path_factory.mktemp("gemma2_alone")
    model.to(torch.bfloat16).save_pretrained(folder)
    write_tiny_tokenizer(folder)
    return folder


def test_bfloat16_checkpoint_is_read_exactly(gemma2_pair: Path) -> None:
    ours = load_model(ModelConfig(weights=str(gemma2_pair), dtype="float32"))
    theirs = transformers.Gemma2ForCausalLM.from_pretrained(gemma2_pair, dtype=torch.float32)
    weight = theirs.model.layers[1].mlp.down_proj.weight.detach().numpy()
    np.testing.assert_array_equal(ours.params["layers_1"]["mlp"]["W_down"], weight.T)


def test_layers_past_the_deepest_tap_are_not_computed(tmp_path: Path) -> None:
    folder = write_tiny_gemma(tmp_path / "tiny", d_model=32, d_ff=256)
    model = load_model(ModelConfig(weights=str(folder), dtype="float32"))
    tokens = jnp.full((2, 16), 5)

    def flops(*taps: Tap) -> float:
        function = jax.jit(lambda tokens: model.activations(tokens, taps))
        return function.lower(tokens).compile().cost_analysis()["flops"]

    one = flops(Tap("resid_post", 0))
    assert flops(Tap("resid_post", 1), Tap("mlp_out", 0)) == pytest.approx(2 * one, rel=0.1)
    # Inside the deepest layer too: before W_O there is no MLP.
    assert flops(Tap("attn_out_prelinear", 0)) < 0.3 * one
    # The parameters of later layers need not even be there.
    params = {key: model.params[key] for key in ("embedding", "layers_0")}
    taps = (Tap("resid_post", 0),)

    def forward(params: Any, tokens: jax.Array) -> dict[Tap, jax.Array]:
        output: Any = Gemma(model.config).apply(params, tokens, taps=taps, logits=False)
        assert output.logits is None
        return output.taps

    assert tuple(jax.eval_shape(forward, {"params": params}, tokens)) == taps


@pytest.mark.parametrize("window", [None, 300])
def test_query_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.standard_normal((1, 700, heads, 8)), jnp.float32) for heads in (4, 2, 2)
    )

    def attended() -> jax.Array:
        return attention.attend(q, k, v, scale=0.3, softcap=5.0, window=window, precision="float32")

    monkeypatch.setattr(attention, "MIN_QUERY_BLOCK", 700)
    whole = attended()
    monkeypatch.setattr(attention, "MIN_QUERY_BLOCK", 256)
    np.testing.assert_allclose(attended(), whole, atol=1e-6)
