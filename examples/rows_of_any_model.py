"""Rows of any `transformers` model, caught by a hook, become a store to train SAEs on."""

from pathlib import Path

import torch

from activation_cache import write_rows


def rows_of(model, module, ids, *, tap="resid_post.5", batch=8):
    """What a module puts out, batch by batch; `ids` are sequences of token ids, [sequences, S]."""
    caught = []
    hook = module.register_forward_hook(lambda _, __, out: caught.append(out))
    with torch.no_grad():
        for part in ids.split(batch):
            model(part)
            out = caught.pop()
            yield {tap: out[0] if isinstance(out, tuple) else out, "token_ids": part}
    hook.remove()


if __name__ == "__main__":
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("openai-community/gpt2")
    tokenizer = AutoTokenizer.from_pretrained("openai-community/gpt2")
    ids = tokenizer(Path("text.txt").read_text(), return_tensors="pt").input_ids[0]
    ids = ids[: len(ids) // 128 * 128].reshape(-1, 128)
    rows = rows_of(model, model.transformer.h[5], ids)
    write_rows(rows, to="store", special_ids=[tokenizer.eos_token_id], held_out=0.05)
