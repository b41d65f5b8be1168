"""Released SAEs on the Hugging Face Hub: a folder of a repository, fetched once and kept.

google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82
google/gemma-scope-2-270m-pt/resid_post/layer_5_width_16k_l0_small
"""

from __future__ import annotations

import re
from pathlib import Path

from activation_cache.runtime.errors import UserError
from activation_cache.storage import hub

_ADDRESS = re.compile(r"(?:hf://)?([A-Za-z0-9_][\w.-]*/[\w.-]+)((?:/[\w.+-]+)*)/?")
_FILES = (
    "params.npz",
    "params.safetensors",
    "config.json",
    "sae_weights.safetensors",
    "cfg.json",
)


def is_hub_address(text: str) -> bool:
    """Does it look like `organisation/repository/folder`? A local path may: look for it first."""
    return _ADDRESS.fullmatch(text) is not None


def fetch_sae(address: str) -> Path:
    """The local folder with the SAE that `address` names, downloaded if it isn't cached yet.

    Without a network, what is in the Hub's local cache still works.

    Raises:
        UserError: huggingface_hub isn't installed, the download fails, or the repository has no
            such folder.
    """
    match = _ADDRESS.fullmatch(address)
    assert match is not None, address
    repository, folder = match[1], match[2].strip("/")
    patterns = [f"{folder}/{name}" if folder else name for name in _FILES]
    named_by = f"{address}, which is no path here,"
    kept = hub.fetch(repository, revision=None, patterns=patterns, named_by=named_by)
    if not (kept / folder).is_dir():
        raise UserError(
            f"{repository} on the Hub has no SAE at {folder or 'its root'} (looked for "
            f"{', '.join(_FILES)}): look at its list of files for the folder's name"
        )
    return kept / folder
