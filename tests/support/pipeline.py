"""The whole pipeline in seconds: a config file around a tiny random Gemma and a little text."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT
from tests.support.tiny_gemma import write_tiny_gemma

_WORDS = ["the", "cat", "and", "a", "dog", "in", "an", "on", "re", "of", "anther", "then"]

_CONFIG = """\
name: tiny
model: {{weights: {folder}/gemma, dtype: float32}}
text: {{source: ["{folder}/*.txt"], sequence_length: 16, held_out_sequences: 4}}
cache:
  path: {folder}/out/store
  sites: [{{site: resid_post, layers: [1]}}]
  tokens: 1000
  shuffle_rows: 512
  block_rows: 32
sae: {{site: resid_post, layer: 1, width: 64, threshold: {{init: 0.01, parametrisation: direct}}}}
train:
  batch_size: 64
  tokens: 1280
  log_every_steps: 5
  dead_after_tokens: 1000
  learning_rate: {{peak: 1e-3, warmup_steps: 5}}
  sparsity: {{penalty: l0, coefficient: 1e-3, warmup_steps: 10}}
checkpoint: {{every_steps: 10}}
evaluation: {{sequences: 4, importance_sequences: 0}}
output: {folder}/out
"""


def write_pipeline(folder: Path, *, sweep: str = "", **model: Any) -> Path:
    """Write weights, text and `config.yaml` into `folder`; returns the config's path.

    `model` changes the tiny Gemma's sizes.
    """
    write_tiny_gemma(folder / "gemma", **model)
    words = random.Random(0)
    documents = (" ".join(words.choice(_WORDS) for _ in range(60)) for _ in range(30))
    (folder / "text.txt").write_text("\n\n".join(documents))
    path = folder / "config.yaml"
    path.write_text(_CONFIG.format(folder=folder) + sweep)
    return path


def sae_process(*arguments: str) -> subprocess.Popen[str]:
    """Start the real command in its own process."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
