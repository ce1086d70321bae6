#!/usr/bin/env bash
# The training step beside published ones, on this machine's CPU: makes .venv and, in .venv/peers, the peers; then
#   bash launch/bench.sh [--shapes 768x16384x1024 ...] [--out FILE]      (fac bench sae --help: every setting)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
fac_install ""
fac_install_peers
exec "$ROOT/.venv/bin/fac" bench sae --peers-python "$PEERS_PYTHON" "$@"
