"""Broken models: GGUF, safetensors, config.json, tokenizers."""

from __future__ import annotations

import json
import struct

from tests.fuzz.outcome import Input
from tests.fuzz.values import NASTY, Random, broken_bytes, broken_json, changed, one_of
from tests.fuzz.world import World

_JSON = (
    "gemma/config.json", "gemma/config.json", "gemma/tokenizer.json", "gemma/tokenizer_config.json",
    "shards/model.safetensors.index.json",
)  # fmt: skip
_WEIGHTS = (
    "gemma/model.safetensors", "gemma/model.safetensors", "shards/model-00001-of-00002.safetensors",
)  # fmt: skip
_CONFIG_KEYS = (
    "rope_parameters", "rope_scaling", "rope_theta", "layer_types", "text_config", "model_type",
    "sliding_window", "sliding_window_pattern", "attn_logit_softcapping", "bos_token_id",
    "eos_token_id", "pad_token_id", "num_hidden_layers", "head_dim", "quantization_config",
    "query_pre_attn_scalar", "architectures", "torch_dtype", "tie_word_embeddings", "vocab_size",
)  # fmt: skip


def broken_model(random: Random, world: World) -> Input:
    """A model with one file broken, given to what reads its shape, its tokenizer or all of it."""
    kind = random.random()
    if kind < 0.45:
        name = one_of(random, _JSON)
        data = _broken_json(random, name, world.files[name])
    elif kind < 0.7:
        name = one_of(random, _WEIGHTS)
        data = broken_safetensors(random, world.files[name])
    else:
        name = "model.gguf"
        data = _broken_gguf(random, world.files[name])
    source = world.folder / name
    weights = source if name == "model.gguf" else source.parent
    return Input(_command(random, world, str(weights)), {name: data})


def _command(random: Random, world: World, weights: str) -> tuple[str, ...]:
    config, folder = str(world.folder / "config.yaml"), world.folder
    model = f"model.weights={weights}"
    harvest = ("harvest", config, f"cache.path={folder}/new", "cache.tokens=100", model)
    if not weights.endswith("gemma"):
        return one_of(random, (harvest, harvest, ("plan", config, model)))
    return one_of(
        random,
        (
            harvest, harvest, ("plan", config), ("harvest", config),
            ("evaluate", str(folder / "out"), "evaluation.sequences=2"),
        ),
    )  # fmt: skip


def _broken_json(random: Random, name: str, data: bytes) -> bytes:
    if name.endswith("config.json") and random.random() < 0.3:
        value = json.loads(data)
        value[one_of(random, _CONFIG_KEYS)] = one_of(random, NASTY)
        return json.dumps(value).encode()
    if name.endswith("tokenizer.json") and random.random() < 0.5:
        value = json.loads(data)  # its vocabulary has most of the places
        part = one_of(random, [key for key in value if key != "model"])
        if random.random() < 0.5:
            value[part] = changed(random, value[part])
        else:
            model = {key: one for key, one in value["model"].items() if key != "vocab"}
            value["model"] |= changed(random, model) if random.random() < 0.9 else {}
        return json.dumps(value).encode()
    return broken_json(random, data) if random.random() < 0.85 else broken_bytes(random, data)


def broken_safetensors(random: Random, data: bytes) -> bytes:
    """Its header's JSON changed, its length too or not; or a byte somewhere."""
    if random.random() < 0.3:
        return broken_bytes(random, data)
    (length,) = struct.unpack("<Q", data[:8])
    header = broken_json(random, data[8 : 8 + length])
    if random.random() < 0.1:
        length = one_of(random, (0, 1, 2, length, 2**31, 2**63, 2**64 - 1))
    else:
        length = len(header)
    return struct.pack("<Q", length) + header + data[8 + json_end(data) :]


def json_end(data: bytes) -> int:
    """The length of a safetensors file's header."""
    return int(struct.unpack("<Q", data[:8])[0])


def _broken_gguf(random: Random, data: bytes) -> bytes:
    """A number or a name of the header overwritten; or a byte somewhere."""
    if random.random() < 0.4:
        return broken_bytes(random, data, header=1500)
    # Where keys and tensors are described, a number follows the name.
    names = [b"general.architecture", b"general.alignment", b"block_count", b"context_length",
             b"embedding_length", b"head_count", b"key_length", b"layer_norm_rms_epsilon",
             b"sliding_window", b"freq_base", b"tokenizer.ggml.model", b"tokenizer.ggml.tokens",
             b"tokenizer.ggml.scores", b"tokenizer.ggml.token_type", b"token_embd.weight",
             b"blk.0.ffn_up.weight", b"output_norm.weight", b"blk.1.attn_q.weight"]  # fmt: skip
    name = one_of(random, names)
    at = data.find(name)
    if at < 0:
        return broken_bytes(random, data, header=600)
    if random.random() < 0.15:
        return data.replace(name, one_of(random, (name[:-1] + b"x", b"x" * len(name))))
    at += len(name) + 4 * int(random.integers(0, 8))
    number = one_of(random, (0, 1, 2, 7, 255, 2**31, 2**32 - 1))
    width = one_of(random, ("<I", "<I", "<Q"))
    word = struct.pack(width, number)
    return data[:at] + word + data[at + len(word) :]
