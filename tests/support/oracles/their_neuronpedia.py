"""What SAEDashboard's exporter makes of our batch file, for tests/data/neuronpedia.json.gz.

SAEDashboard pins other versions of what this project uses, so it runs in an environment of its
own, by hand:

    python -m tests.sae_train.release.test_neuronpedia WORK    # writes WORK/batch-0.json
    THEIRS/bin/python tests/support/oracles/their_neuronpedia.py WORK tests/data

THEIRS has SAEDashboard at db4839a: the newest release, 0.8.0, has no exporter.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from pathlib import Path

from sae_dashboard.neuronpedia.neuronpedia_dashboard import NeuronpediaDashboardBatch
from sae_dashboard.neuronpedia.neuronpedia_export import (
    NeuronpediaExportConfig,
    export_neuronpedia_dashboards,
)


def main(work: Path, data: Path) -> None:
    """Read the batch with SAEDashboard's classes, export it, and keep what comes out."""
    content = (work / "batch-0.json").read_bytes()
    batch = NeuronpediaDashboardBatch(**json.loads(content))
    assert json.loads(json.dumps(batch.to_dict(), default=lambda one: one.to_dict())) == json.loads(
        content
    )
    config = NeuronpediaExportConfig(
        saedashboard_output_dir=str(work),
        exports_dir=str(work / "theirs"),
        creator_name="A Person",
        creator_id="c-person",
        release_id="tiny",
        release_title="tiny SAEs",
        url="",
        model_name="gemma-tiny",
        neuronpedia_source_set_id="tiny-res-7",
        neuronpedia_source_set_description="tiny SAEs",
        hf_weights_repo_id="me/saes",
        hf_weights_path="res/layer_1/params.npz",
        hook_point="hook_resid_post",
        layer_num=1,
        prompts_huggingface_dataset_path="data/*.txt",
        n_prompts_total=batch.features[0].n_prompts_total,
        n_tokens_in_prompt=batch.features[0].n_tokens_in_prompt,
    )
    folder = Path(export_neuronpedia_dashboards(config))
    files = {}
    for path in sorted(folder.rglob("*.jsonl*")):
        text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        files[path.relative_to(folder).as_posix()] = [json.loads(one) for one in text.splitlines()]
    result = {
        "source": "jbloomAus/SAEDashboard db4839a41116d729fc9f43c1878e7b8b157748ea",
        "batch_sha256": hashlib.sha256(content).hexdigest(),
        "files": files,
    }
    compressed = gzip.compress(json.dumps(result).encode(), mtime=0)
    (data / "neuronpedia.json.gz").write_bytes(compressed)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
