#!/usr/bin/env bash
# Does coverage help? Makes .venv, installs the text and the models that configs/science_toxicity.yaml names, runs it.
#   bash launch/science.sh [--section.field value ...]
# After the quickstart, `--scan.sae runs/quickstart/sae` takes the SAE that is there already. Stopped, it goes on.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
cd "$ROOT"
fac_install "diversity" "$ROOT/launch/quickstart-data.txt" "$ROOT/launch/diversity-data.txt" "$ROOT/launch/science-data.txt"
exec .venv/bin/fac run configs/science_toxicity.yaml "$@"
