"""Settings made before the first array: CPU, eight devices, strict arithmetic; shared fixtures.

What a fixture needs is imported in it: most test files need little of it.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Bytecode is kept, whatever the shell says: without it each process that a test starts compiles the
# sources of JAX anew, and that is most of its start.
os.environ["PYTHONDONTWRITEBYTECODE"] = ""
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Commands keep compiled programs in the user's cache folder. Those of tests have one of their own;
# the workers of one run (pytest-xdist) share it.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="open-gemma-scope-tests-")

import hypothesis
import jax
import pytest

import tests.support.session.typechecker  # noqa: F401 - the check named in pyproject is looked up as an attribute
from tests.support.session import compiled_programs

if TYPE_CHECKING:
    from tests.support.servers.buckets import Server

sys.dont_write_bytecode = False
if "PYTEST_XDIST_WORKER" not in os.environ:
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
# The flags count from the first array on.
os.environ["XLA_FLAGS"] = compiled_programs.QUICK_FLAGS
compiled_programs.share_compiled_programs()
# The same examples each time: a check shouldn't fail by chance, and nothing hangs on the clock.
hypothesis.settings.register_profile(
    "ours",
    derandomize=True,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("ours")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files come first: one that waits for processes overlaps with others that compute."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def logging_unconfigured() -> None:
    """No test hears less because one before it ran a command, with `-q` perhaps, in its process."""
    for name in ("activation_cache", "sae_train", "launch", "absl", "py.warnings"):
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.fixture(autouse=True, scope="module")
def steps_made_once() -> Iterator[None]:
    """The runs of a test file that have one step share its compilation."""
    from sae_train.train import cohort_step
    from sae_train.train.train_step import make_end_to_end_step
    from tests.support.session.steps_made_once import StepsMadeOnce

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cohort_step, "make_train_step", StepsMadeOnce())
        patch.setattr(cohort_step, "make_end_to_end_step", StepsMadeOnce(make_end_to_end_step))
        yield


@pytest.fixture(scope="module")
def own_garbage() -> Iterator[None]:
    """What a file's tests leave to the garbage collector complains in that file and not in another.

    For files that ignore such complaints of the libraries that they make fail.
    """
    yield
    gc.collect()


@pytest.fixture
def optimised_programs() -> Iterator[None]:
    """The test computes with the machine code that users have (other tests: XLA's quick one)."""
    with compiled_programs.optimised():
        yield


@pytest.fixture(scope="session")
def sae_lens() -> Any:
    """SAELens, the oracle of releases and architectures."""
    # What it pulls in warns on import of its own affairs (deprecations, optional packages).
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sae_lens
        import sae_lens.loading.pretrained_sae_loaders
        import sae_lens.saes.sae
    return sae_lens


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store and, in `whole`, a run on it of 40 steps, saved at 30 and 40."""
    from sae_train.train.loop import train
    from tests.support.training import make_run

    folder = tmp_path_factory.mktemp("finished")
    train(make_run(folder, output="whole"))
    return folder


@pytest.fixture(scope="module")
def bucket_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """A running server of each kind, by its scheme, and the environment set for them."""
    from tests.support.servers.buckets import servers

    with servers(tmp_path_factory.mktemp("servers"), "gs", "s3") as found:
        yield found


@pytest.fixture(params=["gs", "s3"])
def bucket_server(
    bucket_servers: dict[str, Server], request: pytest.FixtureRequest
) -> Iterator[Server]:
    """One of them after the other; it fails no more when the test is over."""
    from activation_cache.storage import bucket_client

    found = bucket_servers[request.param]
    yield found
    found.proxy.fail = lambda method, path: None
    bucket_client._known_buckets.clear()
