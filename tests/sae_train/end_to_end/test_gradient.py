"""The loss through the model and its gradient, against transformers' autograd in float64.

Legend: B sequences, S position, R = S - 1 rows of a sequence, D width of a tap.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from activation_cache.config import MeshConfig, ModelConfig
from activation_cache.gemma.taps import Tap
from activation_cache.language_model.model import load_model
from sae_train.end_to_end.frozen_model import FrozenModel
from sae_train.end_to_end.loss import through_model
from sae_train.end_to_end.sequences import Text
from sae_train.model.sharding import make_mesh
from tests.support.tiny_gemma import write_tiny_gemma

LENGTH, BETA, SCALE = 12, 0.7, 3.0
BOS, EOS = 2, 1
LAYERS: dict[str, Any] = {"num_layers": 2, "global_layers": (False, True)}


def some_text() -> Text:
    """Two sequences, with an EOS in the first: that place holds a row of position 1 again."""
    tokens = np.random.default_rng(3).integers(5, 400, (2, LENGTH)).astype(np.int32)
    tokens[:, 0], tokens[0, 6] = BOS, EOS
    usable = (tokens != BOS) & (tokens != EOS)
    positions = [np.resize(np.flatnonzero(one), LENGTH - 1) for one in usable]
    return Text(
        tokens_BS=tokens,
        position_BR=np.stack(positions).astype(np.int32),
        row_BS=np.where(usable, usable.cumsum(axis=1) - 1, 0).astype(np.int32),
        usable_BS=usable,
        counted_BP=usable[:, :-1],
    )


def their_logits(model: Any, tap: Tap, text: Text, put: torch.Tensor | None) -> Any:
    """Logits, and what was at the tap; `put` [B, S, D] replaces it at usable tokens."""
    held: dict[str, torch.Tensor] = {}
    usable = torch.from_numpy(np.asarray(text.usable_BS))[:, :, None]

    def seen(value: torch.Tensor) -> torch.Tensor:
        held["x"] = value.detach()
        return value if put is None else torch.where(usable, put, value)

    layer = model.model.layers[tap.layer]
    if tap.site == "attn_out_prelinear":
        hook = layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: (seen(args[0]),))
    elif tap.site == "mlp_out":
        hook = layer.post_feedforward_layernorm.register_forward_hook(lambda _, __, out: seen(out))
    else:
        hook = layer.register_forward_hook(
            lambda _, __, out: (seen(out[0]), *out[1:]) if isinstance(out, tuple) else seen(out)
        )
    logits = model(torch.from_numpy(np.asarray(text.tokens_BS).astype(np.int64))).logits
    hook.remove()
    return logits[:, :-1], held["x"]


def theirs(model: Any, tap: Tap, text: Text, noise_BRD: np.ndarray) -> dict[str, Any]:
    """Loss, KL and the gradient in the scaled reconstruction: the rows plus `noise_BRD`."""
    original, acts_BSD = their_logits(model, tap, text, None)
    index = torch.from_numpy(np.asarray(text.position_BR).astype(np.int64))[:, :, None]
    target = torch.take_along_dim(acts_BSD, index, dim=1) / SCALE
    leaf = (target + torch.from_numpy(noise_BRD)).requires_grad_(True)
    rows = torch.from_numpy(np.asarray(text.row_BS).astype(np.int64))[:, :, None]
    logits, _ = their_logits(model, tap, text, torch.take_along_dim(leaf * SCALE, rows, dim=1))
    log_p, log_q = (torch.log_softmax(one, dim=-1) for one in (original.detach(), logits))
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    kl = kl[torch.from_numpy(np.asarray(text.counted_BP))].mean()
    mse = (target - leaf).square().sum(dim=-1).mean()
    alpha = (mse / (kl + 1e-8)).detach()
    loss = (mse + alpha * BETA * kl) / (1 + BETA)
    loss.backward()
    assert leaf.grad is not None
    found = {"loss": loss, "kl": kl, "alpha": alpha, "gradient": leaf.grad}
    return {name: one.detach().numpy() for name, one in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "tap", "mesh"),
    [
        ("gemma2", Tap("resid_post", 0), (1, 1)),
        ("gemma2", Tap("attn_out_prelinear", 0), (1, 1)),
        ("gemma3", Tap("mlp_out", 1), (2, 2)),
    ],
    ids=lambda one: getattr(one, "name", None),
)
def test_loss_and_gradient_are_theirs(tmp_path: Path, family: Any, tap: Tap, mesh: Any):
    folder = write_tiny_gemma(tmp_path / "gemma", family=family, **LAYERS)
    devices = make_mesh(MeshConfig(data=mesh[0], model=mesh[1]))
    ours = load_model(ModelConfig(weights=str(folder), dtype="float32"), mesh=devices)
    model = FrozenModel(ours.config, devices, ours.precision, tap, tap)
    text = some_text()
    original = jax.jit(model.read)(ours.params, text)
    target = np.asarray(original.inputs_BRD, np.float64) / SCALE
    noise = 0.3 * np.random.default_rng(0).standard_normal(target.shape)
    noise[0, -1] = noise[0, 0]  # one row twice, and the SAE reconstructs both alike

    @jax.jit
    def of(params: Any, original: Any, scaled_BRD: jax.Array) -> Any:
        error = through_model(
            lambda rows: model.divergence(params, original, SCALE * rows.reshape(target.shape)),
            beta=BETA,
        )
        rows_ND = original.inputs_BRD.reshape(-1, target.shape[-1]) / SCALE
        return jax.value_and_grad(
            lambda one: error(one.reshape(rows_ND.shape), rows_ND), has_aux=True
        )(scaled_BRD)

    scaled = jnp.asarray(target + noise, jnp.float32)
    (loss, parts), gradient = of(ours.params, original, scaled)
    their_model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager"
    ).eval()
    expected = theirs(their_model, tap, text, noise)
    found = {"loss": loss, "kl": parts.kl, "alpha": parts.alpha, "gradient": gradient}
    assert expected["kl"] > 0.01
    for name, value in expected.items():
        tolerance = 1e-5 * np.abs(value).max()
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=tolerance, err_msg=name)
