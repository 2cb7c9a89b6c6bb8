#!/usr/bin/env bash
# Installs the project and runs a comparison of load-balancing methods, in one command:
#   bash scripts/quickstart.sh [flags of experiments/load_balancing.py]
# The default is --preset=quick, a tour of under three minutes. Only the installation needs the network. See environment.sh for PYTHON and MOE_JAX_VENV.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

prepare_environment
say "running experiments/load_balancing.py --preset=quick $*"
exec "$python" "$root/experiments/load_balancing.py" --preset=quick "$@"
