"""A kubectl for tests: a folder of JSON files is the cluster, `plan.json` what becomes of a JobSet.

Every look at a JobSet that is at work brings it one step nearer to its end, so that the order in
which things are submitted, looked at and finished can be read off the log.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

CLUSTER = Path(os.environ["FAKE_CLUSTER"])
LOOKS = 3  # at a JobSet until it ends


def main(arguments: list[str]) -> int:
    with open(CLUSTER / "log.jsonl", "a") as log:
        log.write(json.dumps(arguments) + "\n")
    while arguments and arguments[0] in ("--context", "--namespace"):
        arguments = arguments[2:]
    plan = json.loads((CLUSTER / "plan.json").read_text())
    down = CLUSTER / "down"
    if down.exists() and int(down.read_text() or 0) > 0:
        down.write_text(str(int(down.read_text()) - 1))
        sys.stderr.write("Unable to connect to the server: net/http: TLS handshake timeout\n")
        return 1
    if arguments[0] == "apply":
        if arguments[1] == "--dry-run=server":
            return refuse(arguments[3::2], refused=plan.get("refused", ""))
        return apply(Path(arguments[2]))
    file = CLUSTER / f"{arguments[2]}.json"
    if arguments[:2] == ["delete", "jobset"]:
        file.unlink()
    elif file.exists():
        job_set = json.loads(file.read_text())
        advance(job_set, failing=plan["failing"])
        file.write_text(json.dumps(job_set))
        sys.stdout.write(json.dumps(job_set))
    return 0


def refuse(files: list[str], *, refused: str) -> int:
    if refused and any(refused in Path(file).read_text() for file in files):
        sys.stderr.write(f'admission webhook denied the request: invalid value "{refused}"\n')
        return 1
    return 0


def apply(file: Path) -> int:
    import yaml  # slow to load, and most calls don't need it

    for document in yaml.safe_load_all(file.read_text()):
        kept = CLUSTER / f"{document['metadata']['name']}.json"
        if document["kind"] == "JobSet" and kept.exists():
            sys.stderr.write("The JobSet is invalid: field is immutable\n")
            return 1
        made = len((CLUSTER / "log.jsonl").read_text())  # grows with every call
        document["metadata"]["creationTimestamp"] = f"2026-01-01T00:00:{made:012}Z"
        kept.write_text(json.dumps(document))
    return 0


def advance(job_set: dict[str, Any], *, failing: str) -> None:
    status = job_set.setdefault("status", {"looks": 0, "conditions": []})
    status["looks"] += 1
    if status["looks"] == LOOKS:
        name = job_set["metadata"]["annotations"]["open-gemma-scope/name"]
        failed = failing and failing in name + job_set["metadata"]["name"]
        status["conditions"] = [
            {"type": "Suspended", "status": "False"},
            {"type": "Failed" if failed else "Completed", "status": "True"},
        ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
