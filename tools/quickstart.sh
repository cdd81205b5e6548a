#!/usr/bin/env bash
# From a fresh machine with Python 3.10 to 3.13 and pip to a trained, evaluated and drawn segmentor; safe to run again.
# Arguments go to tools/quickstart.py: see bash tools/quickstart.sh --help
set -euo pipefail
here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case " $* " in *' --help '* | *' -h '*) BEIT_PLUGIN_PYTHON=python3 ;; esac  # help needs no environment
source tools/_env.sh mmseg
case $PYTHON in .venv/*) PYTHON=$PWD/$PYTHON ;; esac
quickstart=$PWD/tools/quickstart.py
cd "$here"  # relative paths in the arguments are the caller's
exec "$PYTHON" "$quickstart" "$@"
