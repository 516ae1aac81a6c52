#!/usr/bin/env bash
# Makes .venv in the repository (Python 3.11) with the versions of requirements.lock and the project
# itself, editable. Needs python3.11 only: uses uv if it is there, else gets it into the new
# environment, else goes on with pip. Safe to run again; an existing .venv is brought up to date.
#
#   PYTHON   interpreter to make the environment with (default: python3.11, else python3)
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
py=$venv/bin/python
stamp=$venv/.pmkvq-installed
start=$SECONDS

# A shim on PATH may exist and still not run: ask for the version.
have_uv() { uv --version >/dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3.11 python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
}

if ! "$py" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
    if [ -e "$venv" ]; then
        echo "setup: $venv exists but holds no working Python 3.11; remove it and run again" >&2
        exit 1
    fi
    python=$(find_python)
    if [ -n "$python" ]; then
        echo "setup: making $venv with $("$python" --version)"
        # Without ensurepip (Debian splits it off) uv can still make the environment.
        "$python" -m venv "$venv" 2>/dev/null || {
            rm -rf "$venv"
            have_uv || { echo "setup: '$python -m venv' failed; install python3-venv or uv" >&2; exit 1; }
            uv venv --quiet --python "$python" "$venv"
        }
    elif have_uv; then
        echo "setup: no python3.11 on PATH; uv gets one"
        uv venv --quiet --python 3.11 "$venv"
    else
        echo "setup: needs python3.11 (or uv, which can install it) on PATH" >&2
        exit 1
    fi
fi

if have_uv; then
    install() { uv pip install --quiet --python "$py" "$@"; }
elif "$py" -m uv --version >/dev/null 2>&1 || "$py" -m pip install --quiet uv 2>/dev/null; then
    install() { "$py" -m uv pip install --quiet --python "$py" "$@"; }
else
    echo "setup: uv is not to be had; pip takes a few minutes longer"
    install() { "$py" -m pip install --quiet "$@"; }
fi

# The lock is complete, so nothing needs resolving.
echo "setup: installing $(grep -c '==' requirements.lock) pinned packages"
install --no-deps -r requirements.lock
install --no-deps --no-build-isolation -e .
touch "$stamp"
echo "setup: ready in $((SECONDS - start)) s: $venv/bin/pmkvq doctor"
