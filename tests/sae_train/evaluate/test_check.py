"""`sae check`: SAEs whose files say the wrong thing are found out, in every format.

The SAEs are codebooks. Latent i of `codebook` is the nearest one to row i of the tensor it was made
from, and decodes to that row: it reconstructs that tensor, on that text, and no other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from activation_cache.config import ModelConfig
from activation_cache.gemma.taps import Tap
from activation_cache.language_model.model import LanguageModel, load_model
from activation_cache.runtime.errors import UserError
from launch.cli import main
from sae_train.evaluate import check as module
from sae_train.evaluate.check import Declared, check, declared_of
from sae_train.inference import circuit_tracer
from sae_train.inference.sae import Sae
from sae_train.inference.write_formats import (
    write_gemma_scope,
    write_gemma_scope_2,
    write_sae_lens,
)
from tests.support.tiny_gemma import write_tiny_gemma

TOKENS, LAYER = 384, 1
MLP_OUT = Tap("mlp_out", LAYER)
TEXT = " ".join(f"the {n * n} of {n % 7} and on" for n in range(400))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gemma(tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="module")
def model(weights: Path) -> LanguageModel:
    return load_model(ModelConfig(weights=str(weights), dtype="float32"))


@pytest.fixture(scope="module")
def tensors(model: LanguageModel) -> dict[str, np.ndarray]:
    return tensors_of(model)


def tensors_of(model: LanguageModel) -> dict[str, np.ndarray]:
    """Every tensor that is tried, on the text with BOS and without."""
    ids = model.tokenizer.encode_batch([TEXT])[0]
    count = -(-TOKENS // module.SEQUENCE)
    pieces = np.array(ids[: count * (module.SEQUENCE - 1)], np.int32).reshape(count, -1)
    blank = codebook(np.ones((2, 20)), np.ones((2, 20)))
    reader = module._Tensors(model, Declared(MLP_OUT, MLP_OUT), blank)
    found = reader.of(np.pad(pieces, ((0, 0), (1, 0)), constant_values=2)).inputs
    without = reader.of(pieces).inputs
    return found | {f"{name}, without BOS": x for name, x in without.items()}


def codebook(x: np.ndarray, y: np.ndarray, **metadata: Any) -> Sae:
    """|x - x_i|² is least where z_i = x·x_i - |x_i|²/2 is largest; z_i of x_i is |x_i|²/2."""
    square_N = np.square(x).sum(axis=1)
    return Sae(
        W_enc=np.ascontiguousarray(x.T, np.float32),
        W_dec=(y * (2 / square_N)[:, None]).astype(np.float32),
        b_enc=(-square_N / 2).astype(np.float32),
        b_dec=np.zeros(y.shape[1], np.float32),
        threshold=np.zeros(len(x), np.float32),
        k=1,
        architecture="topk",
        metadata=metadata,
    )


def test_the_raw_output_of_the_mlp_is_what_its_norm_reads(tensors: dict[str, np.ndarray]):
    raw, no_gain, out = (
        tensors[f"mlp_out.1{ending}"]
        for ending in (" before its norm", " before its norm's gain", "")
    )
    rms = np.sqrt(np.square(raw).mean(axis=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(raw / rms, no_gain, rtol=1e-4, atol=1e-5)
    gain = out / no_gain
    np.testing.assert_allclose(gain, np.broadcast_to(gain[0], gain.shape), rtol=1e-3)
    assert gain[0].std() > 0.05  # else the test couldn't tell the two apart


@pytest.mark.parametrize(
    ("of", "scaled"),
    [
        ("mlp_out.1 before its norm", ""),
        ("mlp_out.1 before its norm's gain", ""),
        ("mlp_in.1", ""),
        ("mlp_in_normalized.1", ""),
        ("mlp_out.2", ""),
        ("resid_post.0", ""),
        ("mlp_out.1", ", scaled to a mean squared norm of 1"),
        ("resid_post.1", ", scaled to a mean norm of sqrt(D)"),
    ],
)
def test_what_it_was_trained_on_is_found(
    model: LanguageModel,
    tensors: dict[str, np.ndarray],
    of: str,
    scaled: str,
):
    """All are declared to read mlp_out of layer 1, with an L0 of 1 and an FVU of 0."""
    x = module._SCALES[scaled](tensors[of])
    declared = Declared(MLP_OUT, MLP_OUT, l0=1.0, fvu=0.0)
    result = check(codebook(x, x), declared, model=model, text=TEXT, tokens=TOKENS)
    assert result.problems
    best = result.others[0]
    assert best.words == f"{of}{scaled}"
    assert best.fvu < 1e-3 < 0.05 < result.found.fvu


def test_text_without_bos_is_found(model: LanguageModel, monkeypatch: pytest.MonkeyPatch):
    """Layer 1 of this model sees BOS from its first ten positions alone."""
    monkeypatch.setattr(module, "FIRST_COUNTED", 1)
    monkeypatch.setattr(module, "_FVU_SLACK", 0.0)
    x = tensors_of(model)["mlp_out.1, without BOS"]
    declared = Declared(MLP_OUT, MLP_OUT, fvu=0.0)
    result = check(codebook(x, x), declared, model=model, text=TEXT, tokens=TOKENS)
    assert result.others[0].words == "mlp_out.1, without BOS"
    assert result.others[0].fvu < 1e-3 < result.found.fvu


def test_what_fits_is_said_to(model: LanguageModel, tensors: dict[str, np.ndarray]):
    x = tensors["mlp_out.1"]
    arguments: dict[str, Any] = {"model": model, "text": TEXT, "tokens": TOKENS}
    found = check(codebook(x, x), Declared(MLP_OUT, MLP_OUT, l0=1.2, fvu=0.1), **arguments)
    assert (found.problems, found.others) == ((), ())
    other = check(codebook(x, x), Declared(MLP_OUT, MLP_OUT, l0=2.0), **arguments)
    assert other.problems == ("L0 is 1.0, and 2 is declared",)
    with pytest.raises(UserError, match=r"the text has \d+ tokens and 381 are needed"):
        check(codebook(x, x), Declared(MLP_OUT, MLP_OUT), **(arguments | {"text": "the"}))
    with pytest.raises(UserError, match="reads vectors of 7, and no site"):
        check(codebook(x[:, :7], x[:, :7]), Declared(MLP_OUT, MLP_OUT), **arguments)
    with pytest.raises(UserError, match="layer 9"):
        check(codebook(x, x), Declared(Tap("mlp_out", 9), MLP_OUT), **arguments)
    with pytest.raises(UserError, match="don't say where it reads"):
        declared_of(codebook(x, x), tap=None, l0=None, fvu=None)


def jumprelu(x: np.ndarray, **metadata: Any) -> Sae:
    """A codebook without k: rows of one length are told apart by a threshold on their cosine."""
    cosine = x @ x.T / np.square(x).sum(axis=1)[0]
    kept: list[int] = []  # of rows nearly alike one, or several latents would fire
    for row in range(len(x)):
        if not kept or cosine[row, kept].max() < 0.98:
            kept.append(row)
    x = x[kept]
    sae = codebook(x, x, **metadata)
    threshold = (np.square(x).sum(axis=1) / 2 * (2 * 0.98 - 1)).astype(np.float32)
    return dataclasses.replace(sae, k=None, architecture="jumprelu", threshold=threshold)


WRONG = {"hook_name": "blocks.1.hook_resid_post", "hf_hook_name": "model.layers.1.output"}


def save_topk(tensors: dict[str, np.ndarray], folder: Path) -> tuple[Path, list[str], str]:
    x = tensors["mlp_out.1 before its norm"]
    write_sae_lens(codebook(x, x, **WRONG, l0=1), folder)
    return folder, [], "mlp_out.1 before its norm"


def save_gemma_scope_2(tensors: dict[str, np.ndarray], folder: Path) -> tuple[Path, list[str], str]:
    write_gemma_scope_2(jumprelu(tensors["mlp_in_normalized.1"], **WRONG, l0=1), folder)
    return folder, [], "mlp_in_normalized.1"


def save_gemma_scope(tensors: dict[str, np.ndarray], folder: Path) -> tuple[Path, list[str], str]:
    write_gemma_scope(jumprelu(tensors["mlp_in_normalized.1"]), folder)
    (folder / "README.md").write_text("| L0 | 1.00 |\n| FVU (squared error) | 0.01 |\n")
    return folder / "params.npz", ["--tap", "mlp_in.1"], "mlp_in_normalized.1"


def save_circuit_tracer(
    tensors: dict[str, np.ndarray], folder: Path
) -> tuple[Path, list[str], str]:
    hooks = {"hook_name": "blocks.1.hook_mlp_in", "hook_name_out": "blocks.1.hook_mlp_out"}
    own = {"model_name": "tiny", **hooks, "hf_hook_name": "-", "hf_hook_name_out": "-"}
    names = "resid_post.0", "mlp_out.1 before its norm"
    sae = codebook(*(tensors[name] for name in names), **own)
    folder.mkdir()
    circuit_tracer.write_set_config(circuit_tracer.set_config(sae), folder)
    return circuit_tracer.write_layer(sae, folder), [], " to ".join(names)


@pytest.mark.parametrize(
    "save", [save_topk, save_gemma_scope_2, save_gemma_scope, save_circuit_tracer]
)
def test_the_command_reads_every_format(
    weights: Path,
    tensors: dict[str, np.ndarray],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    save: Callable[..., tuple[Path, list[str], str]],
):
    path, options, truth = save(tensors, tmp_path / "sae")
    (tmp_path / "a.txt").write_text(TEXT)
    words = ["check", str(path), "--model", str(weights), "--text", str(tmp_path / "a.txt")]
    assert main([*words, "--tokens", str(TOKENS), *options]) == 2
    shown = capsys.readouterr().out
    assert "it doesn't fit" in shown
    assert f"it seems to have been trained on {truth}\n" in shown
