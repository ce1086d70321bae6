#!/usr/bin/env bash
# One of the tasks beside toxicity, from its config to samples: makes .venv, installs the data that configs/tasks name, runs.
#   bash launch/tasks.sh helpfulness|instruction_following|sycophancy|survival [--section.field value ...]
# After the quickstart, `--scan.sae runs/quickstart/sae` takes the SAE that is there already.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
cd "$ROOT"
task="${1:?name a task: $(cd configs/tasks && echo *.yaml)}"; shift
fac_install "" "$ROOT/launch/quickstart-data.txt" "$ROOT/launch/tasks-data.txt"
exec .venv/bin/fac run "configs/tasks/$task.yaml" "$@"
