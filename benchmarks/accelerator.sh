#!/usr/bin/env bash
# Measures an accelerator in less than 8 minutes: benchmarks/accelerator.sh [--out FILE] [--small]
#
# Each part is a process of its own and ended when its time is up, so that one that crashes or hangs
# costs its own lines alone. PYTHON names the interpreter (python3). The table is printed at the end,
# and the file has every line as soon as it is measured.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
# Room for a million latents: JAX takes three quarters of a GPU's memory by default.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-3}
for part in ceilings:40 correctness:60 steps:235 kernels:85 harvest:36; do
  timeout -k 5 "${part#*:}" "$PYTHON" -m benchmarks.accelerator --only "${part%:*}" "$@" >/dev/null ||
    echo "accelerator: ${part%:*} ended with status $?" >&2
done
exec "$PYTHON" -m benchmarks.accelerator "$@" --only
