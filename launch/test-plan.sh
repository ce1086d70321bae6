#!/usr/bin/env bash
# The plans that need the TPU compiler itself: makes .venv and, in .venv/libtpu, libtpu; arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
cd "$ROOT"
fac_install "dev,torch" "$ROOT/launch/quickstart-data.txt"
fac_install_libtpu
export PYTHONPATH="$LIBTPU_PATH${PYTHONPATH:+:$PYTHONPATH}"
exec .venv/bin/python -m pytest tests/scale/test_plan_tpu.py "$@"
