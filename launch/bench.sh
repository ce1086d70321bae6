#!/usr/bin/env bash
# The training step beside published ones, on this machine's CPU: makes .venv and, in .venv/peers, the peers; then
#   bash launch/bench.sh [--shapes 768x16384x1024 ...] [--out FILE]      (fac bench sae --help: every setting)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
fac_install ""
peers="$ROOT/.venv/peers"
wanted="$(sha256sum < "$ROOT/launch/bench-peers.txt")"
if [ "$(cat "$peers/installed" 2>/dev/null)" != "$wanted" ]; then
  echo "installing the peers into .venv/peers" >&2
  "${PYTHON:-python3}" -m venv --clear "$peers"
  "$peers/bin/python" -m pip install --quiet --disable-pip-version-check --requirement "$ROOT/launch/bench-peers.txt"
  # A torchvision that does not belong to this torch breaks every import of transformers; nothing here needs one.
  "$peers/bin/python" -m pip uninstall --quiet --yes torchvision
  echo "$wanted" > "$peers/installed"
fi
exec "$ROOT/.venv/bin/fac" bench sae --peers-python "$peers/bin/python" "$@"
