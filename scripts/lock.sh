#!/usr/bin/env bash
# Remakes requirements.lock: exact versions of everything that `make setup` installs, test tools
# included, for Python 3.11. Names no index: the versions come from whatever registry pip or uv is
# configured with. Existing pins are kept unless `--upgrade` (or another uv option) is given.
set -euo pipefail
cd "$(dirname "$0")/.."

tmp=$(mktemp)
trap 'rm -f "$tmp"' EXIT
grep -v '^#' requirements.lock >"$tmp" 2>/dev/null || true
uv pip compile pyproject.toml --extra test --python-version 3.11 \
    --no-annotate --no-header --quiet --output-file "$tmp" "$@" >/dev/null
if grep -qE '://|^-' "$tmp"; then
    echo "lock.sh: a line names a host or an option:" >&2
    grep -nE '://|^-' "$tmp" >&2
    exit 1
fi
{
    echo "# Exact versions for Python 3.11 on Linux x86_64, test tools included. Made by \`make lock\`."
    cat "$tmp"
} >requirements.lock
echo "requirements.lock: $(grep -c '==' requirements.lock) packages"
