"""Settings that must be made before the first array: CPU, eight devices, strict arithmetic."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Commands keep compiled programs in the user's cache folder; those of tests have one of their own.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="open-gemma-scope-tests-")

import jax
import pytest

import tests.typechecker  # noqa: F401 - the check named in pyproject is looked up as an attribute

atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def logging_unconfigured() -> None:
    """No test hears less because one before it ran a command, with `-q` perhaps, in its process."""
    for name in ("activation_cache", "sae_train", "launch", "absl", "py.warnings"):
        logging.getLogger(name).setLevel(logging.NOTSET)
