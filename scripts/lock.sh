#!/usr/bin/env bash
# Renew requirements/*.txt: versions and hashes for Python 3.11 - 3.13 on Linux and macOS.
#
#   scripts/lock.sh [--upgrade | --upgrade-package NAME]
#
# Without an option what is locked stays, and only what pyproject.toml changed is added or dropped.
# The files carry no address, so any index can serve them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi

uv=$(command -v uv || true)
[[ -x .venv/bin/uv ]] && uv=$PWD/.venv/bin/uv
[[ -n $uv ]] || { echo "lock.sh: needs uv: run scripts/setup_env.sh first" >&2; exit 1; }

compile() {  # OUTPUT [uv arguments]
    local output=requirements/$1.txt
    shift
    "$uv" pip compile "$@" --output-file "$output" \
        --universal --python-version 3.11 --generate-hashes --quiet \
        --no-header --no-emit-index-url --no-emit-find-links \
        "${options[@]}"
    echo "lock.sh: $output: $(grep -c '^[a-z]' "$output") packages"
}
options=("$@")

# The test environment first; the others agree with it on every package they share.
compile test pyproject.toml --extra plot --extra test --constraints requirements/constraints.in
compile base pyproject.toml --extra plot --constraints requirements/test.txt
compile parity pyproject.toml --extra parity --constraints requirements/test.txt \
    --no-emit-package torch
compile gpu pyproject.toml --extra gpu --extra plot --constraints requirements/test.txt
compile plan pyproject.toml --extra plan --constraints requirements/gpu.txt
compile setup requirements/setup.in --constraints requirements/test.txt
compile uv requirements/uv.in
compile te requirements/te.in --constraints requirements/gpu.txt
