#!/usr/bin/env bash
# What was built here beside what others use, on this machine's CPU: makes .venv and, in .venv/peers, the peers; then
#   bash launch/bench.sh [sae] [--shapes 768x16384x1024 ...] [--out FILE]    the training step beside published ones
#   bash launch/bench.sh activations [--documents 64] [--out FILE]           harvest, store and stream beside others'
#   bash launch/bench.sh scan [--features 4096 65536] [--out FILE]           what activates each feature, beside others' ways
# `fac bench sae --help` and so on say every setting.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
if [ "${1:-}" = activations ] || [ "${1:-}" = scan ]; then
  what="$1"
  shift
  fac_install "" "$ROOT/launch/quickstart-data.txt"
  set -- "$what" --config "$ROOT/configs/quickstart.yaml" "$@"
else
  if [ "${1:-}" = sae ]; then shift; fi
  fac_install ""
  set -- sae "$@"
fi
what="$1"
shift
fac_install_peers
exec "$ROOT/.venv/bin/fac" bench "$what" --peers-python "$PEERS_PYTHON" "$@"
