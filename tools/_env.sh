# Sourced by quickstart.sh and test.sh as `source tools/_env.sh EXTRAS`, in the root of the repository: sets PYTHON to
# an interpreter that has the plugin with these extras, and makes .venv for it where there is none.
# BEIT_PLUGIN_PYTHON=/path/to/python uses that environment as it is and installs nothing.

extras=$1
export OMP_WAIT_POLICY=PASSIVE  # threads that spin while another process has their core cost a factor of ten

find_python() {
    local candidate
    for candidate in python3 python python3.13 python3.12 python3.11 python3.10; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.10, 3.11, 3.12 or 3.13 found: install one. (mmengine 0.10.7 does not work on 3.14.)" >&2
    return 1
}

make_environment() {
    local base=$1
    if [ -e .venv/unfinished ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        rm -rf .venv  # pip takes a package that it was interrupted at for installed
    fi
    if [ ! -e .venv ]; then
        # Debian ships python without ensurepip: there the pip outside fills the environment
        "$base" -m venv .venv 2>/dev/null ||
            { "$base" -m venv --clear --without-pip .venv && "$base" -m pip --python .venv/bin/python install pip; }
    fi
    touch .venv/unfinished
}

if [ -n "${BEIT_PLUGIN_PYTHON:-}" ]; then
    PYTHON=$BEIT_PLUGIN_PYTHON
else
    base=$(find_python)
    PYTHON=.venv/bin/python
    stamp=.venv/installed-$extras
    wanted="$(cat pyproject.toml tools/_env.sh | cksum) $PWD $("$base" --version)"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ] || ! "$PYTHON" -c '' 2>/dev/null; then
        echo "Setting up .venv with beit-plugin[$extras]; this downloads PyTorch once and takes some minutes."
        make_environment "$base"
        "$PYTHON" -m pip install --quiet --editable ".[$extras]"
        # opencv-python needs libGL, which servers and containers lack; the headless build is the same without windows
        if ! "$PYTHON" -c 'import cv2' 2>/dev/null; then
            "$PYTHON" -m pip uninstall --quiet --yes opencv-python
            "$PYTHON" -m pip install --quiet --force-reinstall --no-deps opencv-python-headless
        fi
        echo "$wanted" >"$stamp"
        rm .venv/unfinished
    fi
fi
