"""Our forward to a tap against `transformers` with hooks, and what a harvest loses beside it.

    python -m benchmarks.harvest [--dtype bfloat16] [--layer 5]

Both have the demo's Gemma 3 270M (`python -m launch.demo demo-data`), the same tokens in the same
batches, the same dtype and as many threads; `transformers` is cut after the tapped layer and has no
head, so both compute as deep. Each hands over what a store keeps: float32 on the host. Beside them
stand a whole harvest, its tokens read, its rows shuffled and written, and what each library's own
matrix product runs at, which is the most that its forward could.
"""

from __future__ import annotations

import argparse
import functools
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from activation_cache.config import Dtype, MeshConfig, ModelConfig
from activation_cache.gemma import PRECISION
from activation_cache.harvest import harvest
from activation_cache.model import LanguageModel, load_model
from activation_cache.taps import Tap
from benchmarks.measure import interleaved, prepare
from sae_train.config_file import load_config

logger = logging.getLogger("harvest")

CONFIG = "configs/demo.yaml"
BATCH, LENGTH = 8, 256


class _Hooked:
    """`transformers`' model up to a layer, its output caught by a hook."""

    def __init__(self, weights: Path, *, layer: int, dtype: Dtype) -> None:
        whole: Any = transformers.AutoModelForCausalLM.from_pretrained(
            weights.parent, gguf_file=weights.name, dtype=getattr(torch, dtype)
        )
        self._model = whole.model.eval()
        self._model.layers = self._model.layers[: layer + 1]
        self._caught: torch.Tensor | None = None
        self._model.layers[layer].register_forward_hook(self._catch)

    def _catch(self, module: Any, inputs: Any, output: Any) -> None:
        self._caught = output[0] if isinstance(output, tuple) else output

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            self._model(torch.from_numpy(tokens).long(), use_cache=False)
        assert self._caught is not None
        return self._caught.float().numpy()


def measure(*, dtype: Dtype, layer: int, rounds: int, rows: int) -> dict[str, Any]:
    """Tokens per second of each, and their ratios."""
    config = load_config(CONFIG, [f"model.dtype={dtype}"])
    with tempfile.TemporaryDirectory() as scratch:
        converted, tap = Path(scratch, "weights"), Tap("resid_post", layer)
        ours = load_model(config.model, converted=converted)
        theirs = _Hooked(Path(config.model.weights), layer=layer, dtype=dtype)
        rng = np.random.default_rng(0)
        tokens = rng.integers(1000, 200_000, (BATCH, LENGTH), dtype=np.int32)
        tokens[:, 0] = 2
        away = _difference(ours, theirs, tokens, tap)
        times = interleaved(
            {
                "transformers, hooks": lambda: theirs(tokens),
                "ours": lambda: _on_host(ours, tokens, tap),
            }
            | _products(ours, dtype=dtype),
            rounds=rounds,
        )
        flops = 2 * BATCH * LENGTH * ours.config.d_model * ours.config.d_ff
        del ours, theirs
        whole = _whole_harvest(config.model, scratch=Path(scratch), tap=tap, rows=rows)
    rates = {name: BATCH * LENGTH / times[name].median for name in ("transformers, hooks", "ours")}
    return {
        "dtype": dtype,
        "tap": tap.name,
        "relative_difference": away,
        "times": times,
        "tokens_per_second": rates | {"a whole harvest": whole},
        "product_gflop_per_s": {
            name: flops / times[name].median / 1e9 for name in ("torch's product", "XLA's product")
        },
        "ratio": rates["ours"] / rates["transformers, hooks"],
        "harvest_of_forward": whole / rates["ours"],
    }


def _products(model: LanguageModel, *, dtype: Dtype) -> dict[str, Callable[[], Any]]:
    """The MLP's first product by torch and by XLA: what each forward can at best run at."""
    rng = np.random.default_rng(1)
    rows_ND = rng.standard_normal((BATCH * LENGTH, model.config.d_model), np.float32)
    weight_DF = rng.standard_normal((model.config.d_model, model.config.d_ff), np.float32)
    x, W = jnp.asarray(rows_ND, dtype), jnp.asarray(weight_DF, dtype)
    wide = functools.partial(jnp.dot, precision=PRECISION, preferred_element_type=jnp.float32)
    ours = jax.jit(lambda x, W: wide(x, W).astype(dtype))
    their_x = torch.from_numpy(rows_ND).to(getattr(torch, dtype))
    their_W = torch.from_numpy(weight_DF.T.copy()).to(getattr(torch, dtype))
    linear = torch.nn.functional.linear
    return {
        "torch's product": lambda: linear(their_x, their_W),
        "XLA's product": lambda: ours(x, W),
    }


def _on_host(model: LanguageModel, tokens: np.ndarray, tap: Tap) -> np.ndarray:
    return np.asarray(model.activations(tokens, [tap])[tap]).astype(np.float32)


def _difference(ours: LanguageModel, theirs: _Hooked, tokens: np.ndarray, tap: Tap) -> float:
    """How far apart the two are, so that it is the same work that is compared."""
    a, b = _on_host(ours, tokens, tap), theirs(tokens)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def _whole_harvest(model: ModelConfig, *, scratch: Path, tap: Tap, rows: int) -> float:
    """Tokens per second of a harvest under way: its tokens read, its rows shuffled and written.

    Of two harvests the difference, after one that converts the weights and compiles.
    """
    seconds = []
    for number, part in enumerate((rows // 8, rows // 4, rows)):
        store = scratch / f"store_{number}"
        overrides = [
            f"model.dtype={model.dtype}",
            f"cache.path={store}",
            f"cache.sites=[{{site: {tap.site}, layers: [{tap.layer}]}}]",
            f"cache.tokens={part}",
            f"cache.shuffle_rows={rows // 8}",
            f"sae.layer={tap.layer}",
        ]
        config = load_config(CONFIG, overrides)
        start = time.perf_counter()
        harvest(model=config.model, text=config.text, cache=config.cache, mesh=MeshConfig())
        seconds.append(time.perf_counter() - start)
    return (rows - rows // 4) / (seconds[2] - seconds[1])


def main() -> None:
    """Log the rates and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--layer", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=60_000, help="of the whole harvest")
    told = parser.parse_args()
    prepare()
    logger.setLevel(logging.INFO)
    found = measure(dtype=told.dtype, layer=told.layer, rounds=told.rounds, rows=told.rows)
    for name, times in found.pop("times").items():
        logger.info("%-20s %s", name, times)
    for name, value in found.items():
        logger.info("%-20s %s", name, value)


if __name__ == "__main__":
    main()
