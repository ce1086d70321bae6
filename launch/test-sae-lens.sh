#!/usr/bin/env bash
# The interchange of SAEs with SAELens itself, both ways: makes .venv and, in .venv/peers, SAELens; arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
cd "$ROOT"
fac_install "dev,torch" "$ROOT/launch/quickstart-data.txt"
fac_install_peers
export SAE_LENS_PYTHON="$PEERS_PYTHON"
exec .venv/bin/python -m pytest tests/sae/formats/test_sae_lens_itself.py "$@"
