"""What circuit-tracer makes of a set of transcoders, for tests/data/circuit_tracer.json.

circuit-tracer pins other versions of what this project uses, so it runs in an environment of its
own, by hand:

    python -m tests.sae_train.release.test_transcoder_sets SETS  # writes sets and inputs.json
    THEIRS/bin/python tests/support/oracles/their_circuit_tracer.py SETS tests/data

THEIRS has circuit-tracer at 4bb8c0e: the newest release, 0.5.0, has no TopK.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import json
import sys
import urllib.request
import zlib
from pathlib import Path

import torch
import yaml
from circuit_tracer.frontend.feature_models import Model
from circuit_tracer.frontend.local_server import serve
from circuit_tracer.utils.hf_utils import load_transcoders


def outputs(folder: Path, x_LBD: torch.Tensor) -> dict[str, object]:
    """circuit-tracer's latents and predictions of one set, and the bytes it read."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    files = sorted(folder.glob("layer_*.safetensors"))
    config |= {"scan": str(folder), "transcoders": [str(path) for path in files]}
    found = load_transcoders(config, torch.device("cpu"), torch.float32, False, False)
    latents_LBF = found.encode(x_LBD)
    sparse = found.compute_attribution_components(x_LBD, zero_positions=slice(0, 0))
    return {
        "sha256": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (*files, folder / "config.yaml")
        },
        "latents": latents_LBF.tolist(),
        "predictions": found.decode(latents_LBF, x_LBD).tolist(),
        "sparse_predictions": sparse["reconstruction"].tolist(),
    }


def features(folder: Path) -> dict[str, object]:
    """What the local server hands out of a folder of features, and what their model says of it."""
    server = serve(str(folder), features_dir=str(folder), port=8765)
    address = "http://localhost:8765/features/"

    def get(name: str, range_: str | None = None) -> bytes:
        headers = {"Range": range_} if range_ else {}
        with urllib.request.urlopen(urllib.request.Request(address + name, headers=headers)) as one:
            return one.read()

    read = 0
    for layer in json.loads(gzip.decompress(get("index.json.gz"))).values():
        for begin, end in zip(layer["offsets"][:-1], layer["offsets"][1:], strict=True):
            data = get(layer["filename"], f"bytes={begin}-{end}")  # the page's own arithmetic
            length = int.from_bytes(data[:4], "little")
            Model.model_validate_json(zlib.decompress(data[4 : 4 + length]), strict=True)
            read += 1
    server.stop()
    return {"read": read, "schema": Model.model_json_schema()}


def main(sets: Path, data: Path) -> None:
    """Write the outputs of every set below a folder, with where they came from."""
    folders = sorted(path.parent for path in sets.glob("*/config.yaml"))
    x_LBD = torch.tensor(json.loads((sets / "inputs.json").read_text()), dtype=torch.float32)
    result = {
        "source": "decoderesearch/circuit-tracer 4bb8c0ea10bde09727e14565ec8469656880da53",
        "torch": importlib.metadata.version("torch"),
        "sets": {folder.name: outputs(folder, x_LBD) for folder in folders},
        "features": features(sets / "features"),
    }
    (data / "circuit_tracer.json").write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    with torch.no_grad():
        main(Path(sys.argv[1]), Path(sys.argv[2]))
