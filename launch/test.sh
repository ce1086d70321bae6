#!/usr/bin/env bash
# Lint, types and every test. Makes .venv if need be; arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
cd "$ROOT"
fac_install "dev,torch" "$ROOT/launch/quickstart-data.txt"
.venv/bin/ruff check fac_jax launch tests
.venv/bin/ruff format --check fac_jax launch tests
.venv/bin/mypy fac_jax
.venv/bin/mypy launch/local.py launch/gke/submit.py
exec .venv/bin/python -m pytest "$@"
