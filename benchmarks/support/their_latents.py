"""SAEDashboard's work on batches of 128 latents, for `benchmarks.latents`.

It runs in an environment of its own (`pip install sae-dashboard==0.8.0`), with what a folder holds:
sae_lens/, tokens.npy [N, S], W_U.npy [D, V] and model_activations_*.pt, the activations in
SAEDashboard's own cache. So no model is loaded and none is timed. For each line on stdin it does
one batch, configured as SAEDashboard's runner for Neuronpedia configures it, and answers with wall
and CPU seconds.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from sae_dashboard.components_config import (
    ActsHistogramConfig,
    Column,
    FeatureTablesConfig,
    LogitsHistogramConfig,
    LogitsTableConfig,
    SequencesConfig,
)
from sae_dashboard.layout import SaeVisLayoutConfig
from sae_dashboard.sae_vis_data import SaeVisConfig
from sae_dashboard.sae_vis_runner import SaeVisRunner
from sae_lens import SAE

PER_BATCH, PROMPTS = 128, 32  # the runner's defaults


def main(folder: Path) -> None:
    """Answer each line on stdin."""
    hook = json.loads((folder / "hook.json").read_text())
    sae = SAE.load_from_disk(folder / "sae_lens", device="cpu")
    tokens = torch.from_numpy(np.load(folder / "tokens.npy").astype(np.int64))
    W_U = torch.from_numpy(np.load(folder / "W_U.npy"))
    model = SimpleNamespace(hook_dict={hook: None}, W_U=W_U)
    columns = Column(
        SequencesConfig(
            stack_mode="stack-all",
            buffer=None,
            compute_buffer=True,
            n_quantiles=5,
            top_acts_group_size=20,
            quantile_group_size=5,
        ),
        ActsHistogramConfig(),
        LogitsHistogramConfig(),
        LogitsTableConfig(),
        FeatureTablesConfig(n_rows=3),
    )
    print("ready", flush=True)  # noqa: T201
    for batch, _ in enumerate(sys.stdin):
        first = batch * PER_BATCH % sae.cfg.d_sae
        config = SaeVisConfig(
            hook_point=hook,
            features=list(range(first, first + PER_BATCH)),
            minibatch_size_features=PER_BATCH,
            minibatch_size_tokens=PROMPTS,
            quantile_feature_batch_size=64,
            device="cpu",
            feature_centric_layout=SaeVisLayoutConfig(columns=[columns]),
            dtype="float32",
            cache_dir=folder,
            ignore_tokens={0, 1, 2},
        )
        wall, cpu = time.perf_counter(), time.process_time()
        data = SaeVisRunner(config).run(encoder=sae, model=model, tokens=tokens)
        found = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        values = [
            [max(group[0].feat_acts) if group else 0.0]
            for group in (
                [one for part in feature.sequence_data.seq_group_data[:1] for one in part.seq_data]
                for feature in data.feature_data_dict.values()
            )
        ]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps(found | {"peak_kb": peak, "first": first, "top": values}), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
