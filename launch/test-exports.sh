#!/usr/bin/env bash
# Exports in the programs that they are for (TRL, LLaMA-Factory, RewardBench, AlpacaEval, datasets, pandas): makes .venv and,
# in .venv/loaders, those programs; arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
cd "$ROOT"
fac_install "dev,torch" "$ROOT/launch/quickstart-data.txt"
fac_install_loaders
export EXPORT_LOADERS_PYTHON="$LOADERS_PYTHON"
exec .venv/bin/python -m pytest tests/synthesis/test_export_loaders.py "$@"
