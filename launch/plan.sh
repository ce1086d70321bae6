#!/usr/bin/env bash
# What training and harvest would take on a pod that is not here (predicted): makes .venv and, in .venv/libtpu, the TPU compiler; then
#   bash launch/plan.sh configs/llama31_8b_l16.yaml --topology v5e:4x4 --mesh.feature 16 [--search] [--out FILE]      (fac plan --help)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
fac_install ""
fac_install_libtpu
export PYTHONPATH="$LIBTPU_PATH${PYTHONPATH:+:$PYTHONPATH}"
exec "$ROOT/.venv/bin/fac" plan "$@"
