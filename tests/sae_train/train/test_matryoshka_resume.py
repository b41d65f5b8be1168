"""A Matryoshka run that was stopped goes on: on its mesh bit for bit, and on another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from activation_cache.runtime.errors import Interrupted, UserError
from sae_train.checkpoint.trained import load_trained
from sae_train.config.run import Config
from sae_train.train.loop import train
from tests.support.training import assert_same_run, make_run, stop_after

pytestmark = pytest.mark.slow

STEPS, STOP = 16, 7


def nested(folder: Path, output: str, **options: Any) -> Config:
    prefixes = options.pop("prefixes", [8, 24])
    return make_run(folder, output=output, steps=STEPS, sae={"matryoshka": prefixes}, **options)


def test_it_goes_on_where_it_was_and_on_other_meshes(tmp_path: Path):
    train(nested(tmp_path, "whole"))
    for output in ("same", "other"):
        with pytest.raises(Interrupted):
            train(nested(tmp_path, output), stop=stop_after(STOP))
    train(nested(tmp_path, "same"))
    assert_same_run(tmp_path / "whole", tmp_path / "same", step=STEPS)
    train(nested(tmp_path, "other", mesh=(2, 4)))
    whole, other = (load_trained(tmp_path / output).params for output in ("whole", "other"))
    for name, value in whole.items():
        np.testing.assert_allclose(other[name], value, rtol=1e-4, atol=1e-4, err_msg=name)
    with pytest.raises(UserError, match=r"prefixes was \[8, 24\] and is now \[8, 32\]"):
        train(nested(tmp_path, "same", prefixes=[8, 32]))
