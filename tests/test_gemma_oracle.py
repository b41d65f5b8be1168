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

from activation_cache import gemma as gemma_module
from activation_cache.config import ModelConfig
from activation_cache.gemma import Gemma
from activation_cache.model import LanguageModel, load_model
from activation_cache.taps import Splice, Tap
from tests.tiny_gemma import write_tiny_tokenizer

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
        num_hidden_layers=5, attn_logit_softcapping=2.0, final_logit_softcapping=1.5, **COMMON
    )
    return transformers.Gemma2ForCausalLM(config)


def _gemma3(rope: dict[str, Any] = GEMMA3_ROPE) -> Any:
    config = transformers.Gemma3TextConfig(num_hidden_layers=7, rope_parameters=rope, **COMMON)
    return transformers.Gemma3ForCausalLM(config)


def _gemma3_multimodal() -> Any:
    text = transformers.Gemma3TextConfig(num_hidden_layers=7, rope_parameters=LINEAR_ROPE, **COMMON)
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
              "num_attention_heads": 1, "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text.to_dict(), vision_config=vision, attn_implementation="eager"
    )
    return transformers.Gemma3ForConditionalGeneration(config)


BUILDERS: dict[str, Callable[[], Any]] = {
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gemma3_linear_rope": lambda: _gemma3(LINEAR_ROPE),
    "gemma3_multimodal": _gemma3_multimodal,
}


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

        def after_block(module: Any, args: Any, out: Any, *, i: int = i) -> Any:
            return after(module, args, out, i=i, site="resid_post")

        handles += [
            layer.self_attn.o_proj.register_forward_pre_hook(before),
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


def _assert_close(ours: Any, theirs: np.ndarray, *, tolerance: float = 1e-4) -> None:
    """Largest difference relative to the largest value."""
    ours = np.asarray(ours, np.float32)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def _all_taps(model: LanguageModel) -> list[Tap]:
    sites = ("resid_post", "mlp_out", "attn_out_prelinear")
    return [Tap(site, layer) for layer in range(model.config.num_layers) for site in sites]


def test_logits_and_every_tap(pair: Pair) -> None:
    theirs = _their_forward(pair)
    taps = _all_taps(pair.ours)
    output: Any = Gemma(pair.ours.config).apply(
        {"params": pair.ours.params}, jnp.asarray(pair.tokens), taps=taps
    )
    _assert_close(output.logits, theirs[None], tolerance=1e-5)
    acts = pair.ours.activations(pair.tokens, taps)
    assert set(acts) == set(taps)
    for tap in taps:
        _assert_close(acts[tap], theirs[tap], tolerance=1e-5)
        _assert_close(output.taps[tap], theirs[tap], tolerance=1e-5)


def test_losses_in_chunks_of_positions(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _their_losses(_their_forward(pair)[None], pair.tokens)
    for rows_at_a_time in (7, 1000):  # 66 rows: the last chunk is padded
        monkeypatch.setattr(gemma_module, "MAX_LOGIT_ELEMENTS", rows_at_a_time * 403)
        jax.clear_caches()
        losses = pair.ours.losses(pair.tokens)
        assert losses.dtype == jnp.float32
        _assert_close(losses, expected, tolerance=1e-5)


def _halve_and_shift(acts: jax.Array, shift: jax.Array) -> jax.Array:
    return acts * 0.5 + shift[None, None, :]


@pytest.mark.parametrize("site", ["resid_post", "mlp_out", "attn_out_prelinear"])
def test_splice(pair: Pair, site: Any) -> None:
    tap = Tap(site, 2)
    width = 60 if site == "attn_out_prelinear" else 36
    for seed in (0, 1):  # other arguments, same compiled forward
        shift = np.random.default_rng(seed).standard_normal(width).astype(np.float32)
        theirs = _their_forward(
            pair, replace=(tap, lambda x, s=shift: x * 0.5 + torch.from_numpy(s))
        )
        losses = pair.ours.losses(pair.tokens, Splice(tap, _halve_and_shift, shift))
        _assert_close(losses, _their_losses(theirs[None], pair.tokens), tolerance=1e-5)
    plain = pair.ours.losses(pair.tokens)
    assert np.abs(np.asarray(plain) - np.asarray(losses)).max() > 1e-2


def test_bfloat16_stays_near_float32(pair: Pair) -> None:
    """Tolerance 5 %: bfloat16 keeps 8 bits, and 5 to 7 layers add up their rounding."""
    model = load_model(ModelConfig(weights=str(pair.folder), dtype="bfloat16"))
    tap = Tap("resid_post", 3)
    acts = model.activations(pair.tokens, [tap])[tap]
    assert acts.dtype == jnp.bfloat16
    exact = np.asarray(pair.ours.activations(pair.tokens, [tap])[tap])
    error = np.linalg.norm(np.asarray(acts, np.float32) - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.05
    losses, exact_losses = model.losses(pair.tokens), pair.ours.losses(pair.tokens)
    assert losses.dtype == jnp.float32
    assert abs(float(losses.mean() - exact_losses.mean())) < 0.05


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


def _multiplications(function: Callable[[jax.Array], Any], tokens: np.ndarray) -> float:
    analysis = jax.jit(function).lower(jnp.asarray(tokens)).compile().cost_analysis()
    return analysis["flops"]


def test_layers_past_the_deepest_tap_are_not_computed(pair: Pair) -> None:
    model = pair.ours

    def cost(*taps: Tap) -> float:
        return _multiplications(lambda tokens: model.activations(tokens, taps), pair.tokens)

    one = cost(Tap("resid_post", 0))
    assert cost(Tap("resid_post", 1)) == pytest.approx(2 * one, rel=0.1)
    assert cost(Tap("resid_post", 1), Tap("mlp_out", 0)) == pytest.approx(2 * one, rel=0.1)
    # Inside the deepest layer too: before W_O there is no MLP and no output projection.
    assert cost(Tap("attn_out_prelinear", 0)) < 0.6 * one
    # The parameters of later layers aren't even there to be used.
    params = {k: v for k, v in model.params.items() if k in ("embedding", "layers_0")}
    taps = (Tap("resid_post", 0),)
    output: Any = Gemma(model.config).apply(
        {"params": params}, jnp.asarray(pair.tokens), taps=taps, logits=False
    )
    assert output.logits is None
    assert list(output.taps) == list(taps)
