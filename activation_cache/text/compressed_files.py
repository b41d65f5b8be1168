"""A file's bytes as they were before gzip, xz or zstandard, read as a stream.

A file that was cut short is an error, never a shorter text.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from activation_cache.runtime.errors import UserError
from activation_cache.storage.files import disk_errors
from activation_cache.text.source_files import COMPRESSIONS

_CHUNK_BYTES = 2**20


@contextlib.contextmanager
def reading(name: str) -> Iterator[tuple[io.BufferedReader, BinaryIO]]:
    """A file's content as it was before compression, and the file itself, to see how far it is.

    Raises:
        UserError: while reading too: the disk fails, or the file is damaged or ends too early.
    """
    kind = next((kind for ending, kind in COMPRESSIONS.items() if name.endswith(ending)), None)
    with disk_errors(name, doing="read"), open(name, "rb") as file:
        if kind is None:
            yield file, file
            return
        try:
            yield _decompressed(file, kind), file
        except EOFError as error:
            raise UserError(
                f"{name} ends within its {kind} data: the file was cut short"
            ) from error
        except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, _DamagedFrameError) as error:
            raise UserError(f"{name} is not readable {kind} ({error}): it is damaged") from error


def _decompressed(file: BinaryIO, kind: str) -> io.BufferedReader:
    if kind == "gzip":
        return io.BufferedReader(gzip.GzipFile(fileobj=file, mode="rb"), _CHUNK_BYTES)
    if kind == "xz":
        return io.BufferedReader(lzma.LZMAFile(file), _CHUNK_BYTES)
    return io.BufferedReader(_Frames(file), _CHUNK_BYTES)


class _DamagedFrameError(Exception):
    pass


class _Frames(io.RawIOBase):
    """All frames of a zstandard file. (The library's own reader ends a cut file in silence.)"""

    def __init__(self, file: BinaryIO) -> None:
        import zstandard

        self._file = file
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._waiting = b""  # of the file, not decompressed yet
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill the buffer as far as one chunk goes; 0 at the end. Raises EOFError in a frame."""
        while not self._ready:
            self._waiting = self._waiting or self._file.read(_CHUNK_BYTES)
            if not self._waiting:
                if self._frame is not None:
                    raise EOFError
                return 0
            self._ready = self._next()
        part, self._ready = self._ready[: len(buffer)], self._ready[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)

    def _next(self) -> bytes:
        import zstandard

        frame = self._frame or self._decompressor.decompressobj()
        try:
            data = frame.decompress(self._waiting)
        except zstandard.ZstdError as error:
            raise _DamagedFrameError(str(error)) from error
        self._frame, self._waiting = (None, frame.unused_data) if frame.eof else (frame, b"")
        return data
