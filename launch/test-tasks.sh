#!/usr/bin/env bash
# The five tasks on real weights and text, from their configs to kept samples: the backbone writes, then a real vLLM server for
# CPUs, which is installed into the user's cache folder, once (2.5 GiB, 3 minutes). Prints what it measured.
#   bash launch/test-tasks.sh runs/quickstart/sae [pytest's arguments]        (the SAE: that of a finished quickstart)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
FAC_TASKS_SAE="$(realpath "${1:?name the folder of an SAE, such as runs/quickstart/sae}")"; shift
export FAC_TASKS_SAE
cd "$ROOT"
fac_install "dev,torch" "$ROOT/launch/quickstart-data.txt" "$ROOT/launch/tasks-data.txt"
export FAC_SIDECAR_CACHE="${FAC_JAX_CACHE:-}" # the tests have a cache folder of their own, which ends with them
# Each run is a process of its own, and compiles the same programs: the first one leaves them to the others.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$(mktemp -d)}"
exec .venv/bin/python -m pytest tests/synthesis/real_tasks.py --capture=no "$@"
