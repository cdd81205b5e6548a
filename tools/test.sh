#!/usr/bin/env bash
# Set up the environment and run the tests on two processes; arguments go to pytest: bash tools/test.sh -k pyramid
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/_env.sh mmseg,mmdet,mmpretrain,test
export OMP_NUM_THREADS=1  # two processes share the cores
exec "$PYTHON" -m pytest -n 2 "$@"
