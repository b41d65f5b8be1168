"""The safetensors format: checked headers, tensors as views of the file, streaming.

A file is an 8-byte little-endian header length, a JSON header giving each tensor's dtype, shape
and byte range, then the bytes. The `safetensors` package (0.8) is the tests' oracle and is not used
here, for three reasons. It copies what it reads: a bfloat16 tensor of 302 MB took it 0.5 s and
288 MiB, where a view of the mapped file takes neither. It hands out no raw header, which the
fingerprint covers, and names a Git LFS pointer "header too large". And it writes from whole models
in memory: a converted 27B is 108 GB.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from activation_cache.runtime.errors import UserError

_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor's entry in the header. `dtype` is the format's own name, such as "BF16"."""

    dtype: str
    shape: tuple[int, ...]
    offset: int  # from the start of the file
    num_bytes: int


@dataclass(frozen=True)
class SafetensorsFile:
    """The header of one file."""

    path: Path
    entries: Mapping[str, TensorEntry]
    header_bytes: bytes

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A read-only view of one tensor, or of the part that `index` selects.

        Raises:
            UserError: as `check_dtype`.
        """
        self.check_dtype(name)
        entry = self.entries[name]
        data = np.memmap(
            self.path, mode="r", offset=entry.offset, shape=(entry.num_bytes,), dtype=np.uint8
        )
        return data.view(_DTYPES[entry.dtype]).reshape(entry.shape)[index]

    def check_dtype(self, name: str) -> None:
        """Raises `UserError` for a tensor of a dtype other than F64, F32, F16 and BF16."""
        if self.entries[name].dtype not in _DTYPES:
            raise UserError(
                f"{self.path}: tensor {name} is stored as {self.entries[name].dtype}; one of "
                f"{', '.join(_DTYPES)} is needed. Use an unquantised checkpoint, or a .gguf file."
            )


def open_safetensors(path: Path) -> SafetensorsFile:
    """Read and check a file's header.

    Raises:
        UserError: not a safetensors file, or shorter or longer than its header says.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        header_bytes = file.read(length) if 2 <= length <= size - 8 else b""
    try:
        header = json.loads(header_bytes)
        entries = {
            name: _entry(value, start=8 + length)
            for name, value in header.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(_not_safetensors(path, size=size, start=start, length=length)) from error
    expected = max((e.offset + e.num_bytes for e in entries.values()), default=8 + length)
    if size != expected:
        raise UserError(
            f"{path} has {size} bytes and its header promises {expected}: the file is "
            f"{'truncated' if size < expected else 'damaged'}. Download it again."
        )
    return SafetensorsFile(path=path, entries=entries, header_bytes=header_bytes)


def _entry(value: Any, *, start: int) -> TensorEntry:
    """A tensor's entry; its data is counted from `start`. Raises `ValueError` for nonsense."""
    (first, last), shape = value["data_offsets"], tuple(value["shape"])
    entry = TensorEntry(value["dtype"], shape, offset=start + first, num_bytes=last - first)
    dtype = _DTYPES.get(entry.dtype)
    sound = first >= 0 and all(type(size) is int and size >= 0 for size in shape)
    if not sound or (dtype and entry.num_bytes != math.prod(shape) * dtype.itemsize):
        raise ValueError("a shape that its bytes don't have")
    return entry


def _not_safetensors(path: Path, *, size: int, start: bytes, length: int) -> str:
    if start == b"version ":
        return f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder."
    return (
        f"{path} is not a whole safetensors file: it must start with the length of a JSON header "
        f"that gives each tensor's type, shape and bytes, and says {length} bytes of header in a "
        f"file of {size}. Download it again."
    )


def write_safetensors(
    file: BinaryIO,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, np.ndarray]],
) -> None:
    """Write float32 tensors one after the other, so that only one need exist at a time.

    Args:
        file: open for writing at its start.
        shapes: every tensor's name and shape, in the order in which `tensors` gives them.
        tensors: (name, values) in that order.
    """
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(struct.pack("<Q", len(encoded)) + encoded)
    for (name, values), wanted in zip(tensors, shapes, strict=True):
        assert (name, values.shape) == (wanted, shapes[wanted]), (name, values.shape, wanted)
        file.write(np.ascontiguousarray(values, dtype=np.float32).data)
