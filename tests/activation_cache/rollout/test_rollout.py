"""Rollouts: another sampler's tokens, the same bytes after a stop and in any part, bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zstandard

from activation_cache.config import MeshConfig, ModelConfig, RolloutConfig, TextConfig
from activation_cache.language_model.model import LanguageModel, load_model
from activation_cache.rollout import rollout as rollout_module
from activation_cache.rollout.rollout import Record, part_file, rollout
from activation_cache.runtime.errors import Interrupted, UserError
from activation_cache.store.order import derive_key
from activation_cache.text.sources import find_sources
from tests.support.stores import file_hashes
from tests.support.tiny_gemma import write_tiny_gemma

# A chat template of the simplest kind.
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHAT = [
    {"role": "user", "content": "the end"},
    {"role": "assistant", "content": "on the"},
]
TEXTS = ["the end", "and in", "one the other", "then", "an ant on the"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = write_tiny_gemma(tmp_path_factory.mktemp("gemma"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return ModelConfig(weights=str(folder), dtype="float32")


@pytest.fixture(scope="module")
def loaded(model: ModelConfig) -> LanguageModel:
    return load_model(model)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings_of(folder: Path, **changes: Any) -> RolloutConfig:
    file = folder / "prompts.jsonl"
    if not file.exists():
        write(file, [{"text": text, "chat": CHAT * 2, "tail": CHAT[1:]} for text in TEXTS])
    values = {"path": str(folder / "out"), "source": [str(file)], "tokens": 6, "batch": 2}
    return RolloutConfig(**values | {"per_prompt": 2, "seed": 5} | changes)


def run(model: ModelConfig, settings: RolloutConfig, **options: Any) -> Record:
    return rollout(model=model, settings=settings, mesh=MeshConfig(), **options)


def lines(folder: Path) -> list[dict[str, Any]]:
    parts = sorted(folder.glob("*.zst"))
    return [
        json.loads(line)
        for part in parts
        for line in zstandard.decompress(part.read_bytes()).splitlines()
    ]


def sampled(loaded: LanguageModel, prompt: list[int], *, first: int, row: int, seed: int) -> list:
    """Tokens drawn one by one from the forward without a cache, by the documented keys."""
    batch_key = jax.random.key(np.uint32(derive_key(seed, first) % 2**32))
    key = jax.random.fold_in(batch_key, row)
    ids = list(prompt)
    for number in range(6):
        # Padded behind, which no token before sees: one shape is compiled once.
        tokens = np.array([ids + [0] * (32 - len(ids))], np.int32)
        logits = np.asarray(loaded.next_logits(tokens, np.array([len(ids) - 1])))[0]
        noise = jax.random.gumbel(jax.random.fold_in(key, number), logits.shape)
        ids.append(int(jnp.argmax(logits + noise)))
        if ids[-1] == loaded.tokenizer.eos_id:
            break
    return ids[len(prompt) :]


def test_continuations_are_another_sampler_s(
    model: ModelConfig, loaded: LanguageModel, tmp_path: Path
):
    settings = settings_of(tmp_path)
    record = run(model, settings)
    assert (record.prompts, record.skipped, record.rows) == (5, 0, 10)
    found = lines(tmp_path / "out")
    assert [(one["prompt"], one["sample"]) for one in found] == [
        (prompt, sample) for prompt in range(5) for sample in range(2)
    ]
    encoded = loaded.tokenizer.encode_batch(TEXTS)
    for index, one in enumerate(found):
        prompt = [loaded.tokenizer.bos_id, *encoded[one["prompt"]]]
        first, row = index // 2 * 2, index % 2
        expected = sampled(loaded, prompt, first=first, row=row, seed=settings.seed)
        assert one["tokens"] == len(expected)
        assert one["stopped"] == (expected[-1] == loaded.tokenizer.eos_id)
        words = loaded.tokenizer.decode(expected[:-1] if one["stopped"] else expected)
        assert one["continuation"] == words
        assert one["text"] == TEXTS[one["prompt"]] + words
    texts = TextConfig(source=[str(tmp_path / "out")])
    names = [source.name for source in find_sources(texts)]
    assert names == [str(part_file(tmp_path / "out", 0))]


def test_stopped_and_continued_the_bytes_are_the_same(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(rollout_module, "PART_ROWS", 4)
    settings = settings_of(tmp_path)
    run(model, settings_of(tmp_path, path=str(tmp_path / "calm")))
    calls = []

    def stop() -> bool:
        calls.append(None)
        return len(calls) > 3

    with pytest.raises(Interrupted, match="the finished parts"):
        run(model, settings, stop=stop)
    assert len(list((tmp_path / "out").glob("part-*"))) == 1
    assert not (tmp_path / "out" / "rollout.json").exists()
    run(model, settings)
    assert len(list((tmp_path / "out").glob("part-*"))) == 3
    assert file_hashes(tmp_path / "out") == file_hashes(tmp_path / "calm")
    with pytest.raises(
        UserError, match=r"begun otherwise: rollout was .*'seed': 5.* is .*'seed': 6"
    ):
        run(model, settings_of(tmp_path, seed=6))


def test_each_team_makes_its_own_parts(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(rollout_module, "PART_ROWS", 4)
    run(model, settings_of(tmp_path, path=str(tmp_path / "alone")))
    alone = rollout_module.place_replicas(MeshConfig())
    made = []
    for team in (1, 0):
        placement = replace(alone, team=team, num_teams=2)
        monkeypatch.setattr(rollout_module, "place_replicas", lambda _, own=placement: own)
        run(model, settings_of(tmp_path))
        made.append(len(list((tmp_path / "out").glob("part-*"))))
    assert made == [1, 3]
    assert file_hashes(tmp_path / "out") == file_hashes(tmp_path / "alone")


def test_conversations_are_answered_after_the_last_user(model: ModelConfig, tmp_path: Path):
    settings = settings_of(tmp_path, prompt="messages", field="chat", per_prompt=1, temperature=0)
    run(model, settings)
    for one in lines(tmp_path / "out"):
        assert one["messages"][:-1] == [*CHAT, CHAT[0]]
        assert one["messages"][-1] == {"role": "assistant", "content": one["continuation"]}
        begun = "[user]the end\n[assistant]on the\n[user]the end\n[assistant]"
        assert one["text"] == begun + one["continuation"]
    said = run(model, settings_of(tmp_path, prompt="user", path=str(tmp_path / "b"), prompts=2))
    assert (said.prompts, said.rows) == (2, 4)
    assert {one["text"].split("\n")[0] for one in lines(tmp_path / "b")} == {
        "[user]the end",
        "[user]and in",
    }
    nobody = settings_of(tmp_path, prompt="messages", field="tail", path=str(tmp_path / "c"))
    with pytest.raises(UserError, match=r"has 0 prompts and none fits"):
        run(model, nobody)


def test_what_does_not_fit_is_skipped_or_refused(
    model: ModelConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    write(tmp_path / "prompts.jsonl", [{"text": "the end"}, {"text": "the end " * 99}])
    record = run(model, settings_of(tmp_path))
    assert (record.prompts, record.skipped, record.rows) == (2, 1, 2)
    assert "1 of 2 prompts are skipped" in caplog.text
    with pytest.raises(UserError, match=r"rollout.tokens 256 leaves no room .* of 256: lower it"):
        run(model, settings_of(tmp_path, tokens=256))
    plain = write_tiny_gemma(tmp_path / "plain")
    with pytest.raises(UserError, match="has no chat template"):
        run(ModelConfig(weights=str(plain)), settings_of(tmp_path, prompt="user"))
