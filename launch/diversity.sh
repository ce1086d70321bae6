#!/usr/bin/env bash
# The diversity of data sets by other metrics: makes .venv, installs spaCy and the models that configs/quickstart.yaml names
# (105 MB), then runs `fac diversity`, whose --help says every setting.
#   bash launch/diversity.sh configs/quickstart.yaml [--data NAME] [--section.field value ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
fac_install "diversity" "$ROOT/launch/quickstart-data.txt" "$ROOT/launch/diversity-data.txt"
exec "$ROOT/.venv/bin/fac" diversity "$@"
