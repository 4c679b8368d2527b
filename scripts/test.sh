#!/usr/bin/env bash
# Set up what the tests need, then check style and types and run the tests.
#
#   scripts/test.sh [pytest arguments]      all of them without arguments
#
# Environment: PYTHON and VENV, as in setup_env.sh; PYTEST_WORKERS, tests at a time (the cores, from
# 2 to 8).
# The exit status is 0 only if everything passed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit
fi

if [[ -n ${VENV:-} && $VENV != /* ]]; then VENV=$PWD/$VENV; fi
export VENV=${VENV:-$root/.venv}
"$root/scripts/setup_env.sh" test
cd "$root"

# A run of tests asks no model hub, and says what it does without a terminal.
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 MPLBACKEND=Agg
unset XLA_FLAGS JAX_PLATFORMS # tests/conftest.py sets its own
bin=$VENV/bin
failed=()

check() { # NAME COMMAND...
    echo "== $1" >&2
    "${@:2}" || failed+=("$1")
}

check "ruff check" "$bin/ruff" check .
check "ruff format" "$bin/ruff" format --check .
check "mypy" "$bin/mypy"

cores=$(getconf _NPROCESSORS_ONLN)
workers=$((cores < 2 ? 2 : cores > 8 ? 8 : cores))
echo "== pytest" >&2
"$bin/python" -m pytest -n "${PYTEST_WORKERS:-$workers}" --dist worksteal --durations 10 "$@" ||
    failed+=("pytest (status $?)")

if [[ ${#failed[@]} -gt 0 ]]; then
    printf 'test.sh: failed: %s\n' "$(IFS=,; echo "${failed[*]}")" >&2
    exit 1
fi
