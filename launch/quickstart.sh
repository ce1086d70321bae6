#!/usr/bin/env bash
# The main job on a bare machine: makes .venv, installs, runs configs/quickstart.yaml on real weights and real text,
# prints a summary and the path of the report. Run again, it does nothing twice; killed, it goes on where it was.
#   bash launch/quickstart.sh [--section.field value ...]     for instance --llm.url http://127.0.0.1:8000/v1
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
cd "$ROOT"
fac_install "" "$ROOT/launch/quickstart-data.txt"
exec .venv/bin/fac run configs/quickstart.yaml "$@"
