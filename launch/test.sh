#!/usr/bin/env bash
# Lint, types and every test. Makes .venv if need be; arguments go to pytest.
# Most of the time goes into compiling, on one core: so two processes run the tests (FAC_TEST_WORKERS), file by file.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
cd "$ROOT"
fac_install "dev,torch,diversity" "$ROOT"/launch/{quickstart,tasks,science,diversity}-data.txt
.venv/bin/ruff check fac_jax launch tests
.venv/bin/ruff format --check fac_jax launch tests
.venv/bin/mypy fac_jax
.venv/bin/mypy launch/local.py launch/gke/submit.py
exec .venv/bin/python -m pytest --numprocesses "${FAC_TEST_WORKERS:-2}" --dist loadfile "$@"
