"""What circuit-tracer makes of a set of transcoders, for tests/data/circuit_tracer.json.

circuit-tracer pins other versions of what this project uses, so it runs in an environment of its
own, by hand:

    python -m tests.sae_train.release.test_transcoder_sets SETS  # writes sets and inputs.json
    THEIRS/bin/python tests/support/oracles/their_circuit_tracer.py SETS tests/data

THEIRS has circuit-tracer at 4bb8c0e: the newest release, 0.5.0, has no TopK.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import sys
from pathlib import Path

import torch
import yaml
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


def main(sets: Path, data: Path) -> None:
    """Write the outputs of every set below a folder, with where they came from."""
    folders = sorted(path for path in sets.iterdir() if path.is_dir())
    x_LBD = torch.tensor(json.loads((sets / "inputs.json").read_text()), dtype=torch.float32)
    result = {
        "source": "decoderesearch/circuit-tracer 4bb8c0ea10bde09727e14565ec8469656880da53",
        "torch": importlib.metadata.version("torch"),
        "sets": {folder.name: outputs(folder, x_LBD) for folder in folders},
    }
    (data / "circuit_tracer.json").write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    with torch.no_grad():
        main(Path(sys.argv[1]), Path(sys.argv[2]))
