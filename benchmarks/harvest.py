"""Our forward to a tap against `transformers` with hooks, and what a harvest loses beside it.

    python -m benchmarks.harvest [--dtype bfloat16] [--layer 5] [--batch 8] [--length 256]

Both have the demo's Gemma 3 270M (`python -m launch.demo demo-data`), the same tokens in the same
batches, the same dtype and as many threads; `transformers` is cut after the tapped layer and has no
head, so both compute as deep. Each has a process of its own and hands over what a store keeps:
float32 on the host. Beside them stand a whole harvest, its tokens read, its rows shuffled and
written, and what each library's own matrix product runs at, which is the most its forward could.
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
from activation_cache.gemma.taps import Tap
from activation_cache.harvest.harvest import harvest
from activation_cache.language_model.model import load_model
from activation_cache.language_model.shape import read_gemma_config
from activation_cache.products import einsum
from benchmarks.support.apart import apart
from benchmarks.support.measure import interleaved, prepare
from sae_train.config.file import load_config

logger = logging.getLogger("harvest")

CONFIG = "configs/demo.yaml"
PAUSE = 0.2  # seconds in which the threads of the one whose turn it was fall asleep


def our_ways(dtype: Dtype, layer: int, batch: int, length: int) -> dict[str, Callable[[], Any]]:
    """Our forward to a tap and, with the model's shapes, XLA's product."""
    config = load_config(CONFIG, [f"model.dtype={dtype}"])
    with tempfile.TemporaryDirectory() as scratch:
        model = load_model(config.model, converted=Path(scratch, "weights"))
    tokens, tap = _tokens(batch, length), Tap("resid_post", layer)
    rows_ND, weight_DF = _factors(model.config.d_model, model.config.d_ff, num_rows=tokens.size)
    x, W = jnp.asarray(rows_ND, dtype), jnp.asarray(weight_DF, dtype)
    wide = functools.partial(einsum, "nd,df->nf", precision="float32")
    product = jax.jit(lambda x, W: wide(x, W).astype(dtype))
    return {
        "forward": lambda: np.asarray(model.activations(tokens, [tap])[tap]).astype(np.float32),
        "product": lambda: product(x, W),
    }


def their_ways(dtype: Dtype, layer: int, batch: int, length: int) -> dict[str, Callable[[], Any]]:
    """`transformers`' model up to a layer, its output caught by a hook, and torch's product."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    weights = Path(load_config(CONFIG).model.weights)
    whole: Any = transformers.AutoModelForCausalLM.from_pretrained(
        weights.parent, gguf_file=weights.name, dtype=getattr(torch, dtype)
    )
    model = whole.model.eval()
    model.layers = model.layers[: layer + 1]
    caught: list[torch.Tensor] = []
    model.layers[layer].register_forward_hook(
        lambda module, inputs, output: caught.append(
            output[0] if isinstance(output, tuple) else output
        )
    )
    tokens = torch.from_numpy(_tokens(batch, length)).long()

    def forward() -> np.ndarray:
        with torch.inference_mode():
            model(tokens, use_cache=False)
        return caught.pop().float().numpy()

    sizes = whole.config.hidden_size, whole.config.intermediate_size
    rows_ND, weight_DF = _factors(*sizes, num_rows=tokens.numel())
    x = torch.from_numpy(rows_ND).to(getattr(torch, dtype))
    W = torch.from_numpy(weight_DF.T.copy()).to(getattr(torch, dtype))
    product = torch.inference_mode()(torch.nn.functional.linear)
    return {"forward": forward, "product": lambda: product(x, W)}


def _tokens(batch: int, length: int) -> np.ndarray:
    tokens = np.random.default_rng(0).integers(1000, 200_000, (batch, length), dtype=np.int32)
    tokens[:, 0] = 2
    return tokens


def _factors(d_model: int, d_ff: int, *, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the MLP's first product: what each forward can at best run at."""
    rng = np.random.default_rng(1)
    return (
        rng.standard_normal((num_rows, d_model), np.float32),
        rng.standard_normal((d_model, d_ff), np.float32),
    )


def measure(
    *, dtype: Dtype, layer: int, batch: int, length: int, rounds: int, rows: int
) -> dict[str, Any]:
    """Tokens per second of each, and their ratios."""
    shape = dtype, layer, batch, length
    with apart(our_ways, *shape) as ours, apart(their_ways, *shape) as theirs:
        a, b = (ways["forward"](result=True) for ways in (ours, theirs))
        times = interleaved(
            {
                "transformers, hooks": theirs["forward"],
                "ours": ours["forward"],
                "torch's product": theirs["product"],
                "XLA's product": ours["product"],
            },
            rounds=rounds,
            pause=PAUSE,
        )
    config = load_config(CONFIG, [f"model.dtype={dtype}"])
    sizes = read_gemma_config(config.model)
    flops = 2 * batch * length * sizes.d_model * sizes.d_ff
    rates = {name: batch * length / times[name].median for name in ("transformers, hooks", "ours")}
    found = {
        "dtype": dtype,
        "tap": Tap("resid_post", layer).name,
        "sequences": (batch, length),
        # So that it is the same work that is compared.
        "relative_difference": float(np.linalg.norm(a - b) / np.linalg.norm(b)),
        "times": times,
        "tokens_per_second": rates,
        "product_gflop_per_s": {
            name: flops / times[name].median / 1e9 for name in ("torch's product", "XLA's product")
        },
        "ratio": rates["ours"] / rates["transformers, hooks"],
    }
    if not rows:
        return found
    with tempfile.TemporaryDirectory() as scratch:
        tap = Tap("resid_post", layer)
        whole = _whole_harvest(config.model, scratch=Path(scratch), tap=tap, rows=rows)
    rates["a whole harvest"] = whole
    return found | {"harvest_of_forward": whole / rates["ours"]}


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
    parser.add_argument("--batch", type=int, default=8, help="sequences")
    parser.add_argument("--length", type=int, default=256, help="of a sequence, in tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--rows", type=int, default=60_000, help="of the whole harvest; 0 leaves it out"
    )
    told = parser.parse_args()
    prepare()
    logger.setLevel(logging.INFO)
    found = measure(
        dtype=told.dtype,
        layer=told.layer,
        batch=told.batch,
        length=told.length,
        rounds=told.rounds,
        rows=told.rows,
    )
    for name, times in found.pop("times").items():
        logger.info("%-20s %s", name, times)
    for name, value in found.items():
        logger.info("%-20s %s", name, value)


if __name__ == "__main__":
    main()
