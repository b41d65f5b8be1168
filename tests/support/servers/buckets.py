"""Real object storage servers on this machine, gcp-storage-emulator and moto, each with a bucket.

The environment is set as a user would set it; nothing of ours is replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import subprocess
import sys
import time
import types
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from activation_cache.storage import bucket, bucket_client
from activation_cache.storage.bucket import BucketPath, files_below
from activation_cache.storage.files import storage_path
from sae_train.config.run import Config
from tests.support.children.processes import free_port
from tests.support.servers.bucket_proxy import Proxy, proxy_before
from tests.support.training import make_run

BUCKET = "acts"
_START_SECONDS = 300


@dataclass(frozen=True)
class Server:
    """A running server behind its proxy, and what it needs in the environment."""

    scheme: str
    proxy: Proxy

    @property
    def environment(self) -> dict[str, str]:
        return environment_for(self.scheme, self.proxy.address)

    def folder(self, name: str) -> str:
        """The URL of a folder in the bucket."""
        return f"{self.scheme}://{BUCKET}/{name}"


def environment_for(scheme: str, address: str) -> dict[str, str]:
    """What a user sets to reach a server of this kind at an address."""
    if scheme == "gs":
        return {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address,
                "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x"}  # fmt: skip
    return {"AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_REGION": "us-east-1"}  # fmt: skip


@contextlib.contextmanager
def servers(log_folder: Path, *schemes: str) -> Iterator[dict[str, Server]]:
    """Start servers of these schemes and set the environment for them."""
    found = {}
    before = dict(os.environ)
    with contextlib.ExitStack() as stack:
        for scheme in schemes:
            port = free_port()
            log = stack.enter_context(open(log_folder / f"{scheme}.log", "wb"))
            process = subprocess.Popen(_command(scheme, port), stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.kill)
            proxy = proxy_before(f"http://127.0.0.1:{port}", scheme=scheme)
            found[scheme] = Server(scheme, stack.enter_context(proxy))
            os.environ.update(found[scheme].environment)
        for server in found.values():
            _await(server)
        forget()
        if "gs" in schemes:
            # gcsfs, once it is loaded as we load it, pauses for half a minute before it gives up.
            bucket_client.file_system("gs")
            clock = types.SimpleNamespace(sleep=lambda seconds: asyncio.sleep(seconds / 20))
            stack.enter_context(mock.patch("gcsfs.retry.asyncio", clock))
        try:
            yield found
        finally:
            os.environ.clear()
            os.environ.update(before)
            forget()


def forget() -> None:
    """Have the next request read the environment anew."""
    bucket_client.file_system.cache_clear()
    bucket_client._known_buckets.clear()


def _command(scheme: str, port: int) -> list[str]:
    programs = Path(sys.executable).parent
    if scheme == "gs":
        return [str(programs / "gcp-storage-emulator"), "start", "--host=127.0.0.1",
                f"--port={port}", "--in-memory", f"--default-bucket={BUCKET}"]  # fmt: skip
    return [str(programs / "moto_server"), "-H", "127.0.0.1", "-p", str(port)]


def _await(server: Server) -> None:
    """Return when a server answers; moto has no bucket until it is asked for one."""
    deadline = time.monotonic() + _START_SECONDS
    method, path = ("PUT", f"/{BUCKET}") if server.scheme == "s3" else ("GET", "/storage/v1/b")
    while True:
        try:
            urllib.request.urlopen(
                urllib.request.Request(server.proxy.address + path, method=method)
            )
            return
        except (urllib.error.URLError, ConnectionError):
            assert time.monotonic() < deadline, f"{server} didn't start"
            time.sleep(0.1)


def object_hashes(folder: str) -> dict[str, str]:
    """SHA-256 of every object below a folder, by its name there (`stores.file_hashes`)."""
    root = BucketPath.parse(folder)
    return {
        str(file)[len(str(root)) + 1 :]: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files_below(root)
    }


def run_in(server: Server, local: Path, name: str, **options: Any) -> Config:
    """The config of the same run in the server's bucket, and its store there."""
    store = storage_path(server.folder("store"))
    assert isinstance(store, BucketPath)
    if not (store / "manifest.json").exists():
        for file in sorted((local / "store").rglob("*")):
            if file.is_file():
                bucket.upload(store / str(file.relative_to(local / "store")), file)
    config = make_run(local, output="whole", **options)
    cache = config.cache.model_copy(update={"path": str(store)})
    return config.model_copy(update={"cache": cache, "output": server.folder(name)})
