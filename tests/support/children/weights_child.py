"""`python -m tests.support.children.weights_child FOLDER`: load a model on all devices.

Prints the bytes of weights that this process read, and the largest piece.
"""

from __future__ import annotations

import sys
from typing import Any

import jax
import numpy as np

from activation_cache.config import ModelConfig
from activation_cache.language_model.model import load_model
from activation_cache.mesh import make_mesh
from activation_cache.runtime import processes
from activation_cache.storage.safetensors_file import SafetensorsFile


def main(folder: str) -> None:
    processes.join()
    sizes: list[int] = []
    read = SafetensorsFile.read

    def counted(self: SafetensorsFile, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        values: Any = read(self, name, index)
        sizes.append(values.nbytes)
        return values

    SafetensorsFile.read = counted  # type: ignore[method-assign]
    load_model(ModelConfig(weights=folder, dtype="float32"), mesh=make_mesh(jax.devices()))
    sys.stdout.write(f"read {sum(sizes)} {max(sizes)}\n")
    processes.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
