#!/usr/bin/env bash
# Runs the tests:
#   bash scripts/test.sh [pytest arguments]
# Paths in the arguments are relative to the checkout. MOE_JAX_TEST_WORKERS sets the number of processes
# (default 2; 0 uses a single process, for a debugger). A test may take 300 s; with --timeout=0 as long as it likes.
# See environment.sh for PYTHON and MOE_JAX_VENV.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

prepare_environment dev
cd "$root"
say "running pytest $*"
# worksteal: neighbours run in one worker, which shares what a module sets up
exec "$python" -m pytest -n "${MOE_JAX_TEST_WORKERS:-2}" --dist=worksteal "$@"
