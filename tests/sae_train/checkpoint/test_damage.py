"""A checkpoint that isn't what was written is skipped for the one before, with a warning."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from activation_cache.runtime.errors import UserError
from sae_train.checkpoint.checksum import DamagedCheckpoint, array_checksum, seal_meta, unseal_meta
from sae_train.checkpoint.trained import load_trained
from sae_train.config.run import MeshConfig
from sae_train.model.sharding import make_mesh, sharding
from sae_train.train.loop import train
from tests.support.training import assert_same_run, make_run

META = "meta/metadata"

# When one read fails Orbax drops its other reads, and Python warns of each.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("own_garbage"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]


def largest(checkpoint: Path) -> Path:
    files = (path for path in (checkpoint / "state").rglob("*") if path.is_file())
    return max(files, key=lambda path: path.stat().st_size)


def flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 4
    file.write_bytes(data)


def flip_middle_of_largest(checkpoint: Path) -> None:
    file = largest(checkpoint)
    flip(file, file.stat().st_size // 2)


def cut_largest(checkpoint: Path) -> None:
    file = largest(checkpoint)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def change_a_digit_of_meta(checkpoint: Path) -> None:
    file = checkpoint / META
    meta = json.loads(file.read_text())
    file.write_text(json.dumps(meta | {"input_scale": meta["input_scale"] * 1.5}))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped": flip_middle_of_largest,
    "cut": cut_largest,
    "largest gone": lambda checkpoint: largest(checkpoint).unlink(),
    "state gone": lambda checkpoint: shutil.rmtree(checkpoint / "state"),
    "state empty": lambda checkpoint: [
        path.write_bytes(b"") for path in (checkpoint / "state").rglob("*") if path.is_file()
    ],  # type: ignore[dict-item]
    "meta gone": lambda checkpoint: (checkpoint / META).unlink(),
    "meta cut": lambda checkpoint: (checkpoint / META).write_text("{"),  # type: ignore[dict-item]
    "meta another": change_a_digit_of_meta,
    "everything gone": lambda checkpoint: [
        shutil.rmtree(path) if path.is_dir() else path.unlink() for path in checkpoint.iterdir()
    ],  # type: ignore[dict-item]
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(
    finished_run: Path, kind: str, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO", logger="sae_train")
    name = f"run-{kind.replace(' ', '-')}"
    shutil.copytree(finished_run / "whole", finished_run / name)
    DAMAGES[kind](finished_run / name / "checkpoints" / "40")
    trained = load_trained(finished_run / name)
    assert trained.step == 30
    assert "skipping the damaged checkpoint at step 40" in caplog.text
    assert (finished_run / name / "checkpoints" / "40").exists(), "reading deletes nothing"
    assert train(make_run(finished_run, output=name)).step == 40
    assert "going on from the checkpoint at step 30" in caplog.text
    assert_same_run(finished_run / "whole", finished_run / name, step=40)


def test_every_flipped_byte_is_found(finished_run: Path):
    """With any byte flipped, the values read are those written, or it is called damaged."""
    rng = random.Random(0)
    expected = load_trained(finished_run / "whole", step=40).params
    checkpoint = finished_run / "whole" / "checkpoints" / "40"
    # In a fixed order, weighted by size: most bytes of the small files are never read.
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    found = 0
    for number in range(12):
        copy = finished_run / f"flip-{number}"
        shutil.copytree(finished_run / "whole", copy)
        [file] = rng.choices(files, weights=sizes)
        flip(copy / file.relative_to(finished_run / "whole"), rng.randrange(file.stat().st_size))
        try:
            params = load_trained(copy, step=40).params
        except DamagedCheckpoint:
            found += 1
            continue
        for key, value in expected.items():
            np.testing.assert_array_equal(params[key], value)
    assert found >= 3


def test_a_checkpoint_of_another_format_is_refused_and_kept(finished_run: Path):
    shutil.copytree(finished_run / "whole", finished_run / "other-format")
    for file in (finished_run / "other-format" / "checkpoints").glob(f"*/{META}"):
        meta = unseal_meta(file.read_bytes())
        checksums = meta.pop("checksums")
        sealed = seal_meta(meta | {"format_version": 3}, checksums=checksums)
        file.write_text(json.dumps(sealed))
    with pytest.raises(UserError, match=r"checkpoint format 3.* reads 4.*--fresh"):
        load_trained(finished_run / "other-format")
    with pytest.raises(UserError, match="checkpoint format 3"):
        train(make_run(finished_run, output="other-format"))
    assert len(list((finished_run / "other-format" / "checkpoints").glob(f"*/{META}"))) == 2


def test_if_all_are_damaged_it_says_so_and_fresh_starts_anew(finished_run: Path):
    shutil.copytree(finished_run / "whole", finished_run / "hopeless")
    for checkpoint in (finished_run / "hopeless" / "checkpoints").iterdir():
        cut_largest(checkpoint)
    config = make_run(finished_run, output="hopeless")
    with pytest.raises(UserError, match=r"every checkpoint of .*hopeless is damaged.*--fresh"):
        train(config)
    assert train(config, fresh=True).step == 40
    assert_same_run(finished_run / "whole", finished_run / "hopeless", step=40)


def test_a_description_with_other_types_is_named_and_not_needed(finished_run: Path):
    shutil.copytree(finished_run / "whole", finished_run / "described")
    files = list((finished_run / "described/checkpoints").glob("*/_CHECKPOINT_METADATA"))
    assert len(files) == 2
    files[0].write_text(
        files[0]
        .read_text()
        .replace('"init_timestamp_nsecs": ', '"init_timestamp_nsecs": [1], "x": ')
    )
    config = make_run(finished_run, output="described")
    with pytest.raises(UserError, match=r"_CHECKPOINT_METADATA in .*delete those files"):
        train(config)
    for file in files:
        file.unlink()
    assert train(config).step == 40


def test_reading_disturbs_no_save_in_progress(finished_run: Path):
    shutil.copytree(finished_run / "whole", finished_run / "busy")
    partial = finished_run / "busy" / "checkpoints" / "50.orbax-checkpoint-tmp"
    partial.mkdir()
    (partial / "file").write_text("half")
    assert load_trained(finished_run / "busy").step == 40
    assert (partial / "file").exists()
    shutil.rmtree(finished_run / "busy" / "checkpoints" / "40")
    assert train(make_run(finished_run, output="busy")).step == 40
    # Orbax clears up in the background, and waits for that before its first save.
    assert not partial.exists(), "the run that saves clears up"


def test_checksums_do_not_depend_on_the_mesh_and_see_every_change():
    values = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)
    sums = set()
    for data, model in ((1, 1), (1, 8), (2, 4)):
        placement = sharding(make_mesh(MeshConfig(data=data, model=model)), ("F", "D"))
        sums.add(int(jax.jit(array_checksum)(jax.device_put(values, placement))))
    assert len(sums) == 1
    swapped = values.copy()
    swapped[[3, 5]] = swapped[[5, 3]]
    zeros = np.zeros((4, 4), np.float32)
    assert int(array_checksum(jnp.asarray(swapped))) not in sums
    assert int(array_checksum(jnp.asarray(zeros))) != int(array_checksum(jnp.asarray(-zeros)))
    for position in (0, 511, 1023):
        changed = values.copy()
        changed.view(np.uint32).reshape(-1)[position] ^= 1
        assert int(array_checksum(jnp.asarray(changed))) not in sums


def test_a_changed_meta_is_damaged():
    sealed = seal_meta({"a": 1, "b": [1.5, None]}, checksums={"x": 7})
    assert unseal_meta(json.dumps(sealed).encode())["checksums"] == {"x": 7}
    with pytest.raises(DamagedCheckpoint):
        unseal_meta(json.dumps(sealed | {"a": 2}).encode())
    for data in (b"[" * 5000, b"[]", b"{}", b'{"a": ' + b"9" * 5000 + b"}"):
        with pytest.raises(DamagedCheckpoint, match="not the JSON that was written"):
            unseal_meta(data)
