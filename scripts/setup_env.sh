#!/usr/bin/env bash
# Set up .venv with the locked dependencies; does nothing when it is already right.
#
#   scripts/setup_env.sh [run | test]
#
# run   (default) what training, evaluation, decoding and the loss curve need
# test  also pytest, ruff and mypy; torch and transformers where torch has a CPU build
#
# Environment:
#   PYTHON   the interpreter to build .venv from (python3); Python 3.11 to 3.13
#   VENV     where the environment lies (.venv in the repository)
#   NO_UV=1  install with pip even where uv can be had
#   ACCELERATOR=gpu|cpu  the CUDA build of JAX, or not (by default where nvidia-smi finds a GPU)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
python=$venv/bin/python
uv=

usage() { sed -n '2,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
say() { echo "setup: $*" >&2; }
die() { say "$*"; exit 1; }

main() {
    case ${1:-run} in
        run) if has_gpu; then locks=(gpu.txt); else locks=(base.txt); fi ;;
        test) locks=(test.txt parity.txt) ;;
        -h | --help) usage; return ;;
        *) die "unknown profile '$1': use 'run' or 'test'" ;;
    esac
    local profile=${1:-run}
    cd "$root"
    hold_lock
    check_python
    if [[ $(stamp) == "$(cat "$venv/.paxlike-$profile" 2> /dev/null)" ]]; then return; fi

    SECONDS=0
    make_venv
    get_uv
    say "installing the locked packages with ${uv:-pip}"
    install --require-hashes -r requirements/setup.txt -r "requirements/${locks[0]}" ||
        die "packages could not be installed (see above); the first setup needs a network"
    install --no-deps --no-build-isolation --editable . ||
        die "paxlike itself could not be installed (see above)"
    if [[ $profile == test ]]; then install_parity; fi
    stamp > "$venv/.paxlike-$profile"
    say "$venv is ready ($profile, $("$python" -V), $SECONDS s)"
}

# An NVIDIA GPU gets the CUDA build of JAX for runs; the tests are made for CPUs.
has_gpu() {
    [[ ${ACCELERATOR:-} != cpu ]] || return 1
    [[ ${ACCELERATOR:-} == gpu ]] || nvidia-smi -L > /dev/null 2>&1
}

# Two setups at once would write into one another's packages. The lock is on a file that is always
# there, and ends with this process.
hold_lock() {
    command -v flock > /dev/null || return 0 # macOS has none
    exec 9< pyproject.toml
    flock --nonblock 9 && return
    say "waiting for another setup of $root to end"
    flock 9
}

# The interpreter: what PYTHON says, else the one .venv has, else python3.
check_python() {
    local wanted=${PYTHON:-python3} version hint="name another, as in PYTHON=python3.12"
    if [[ -z ${PYTHON:-} && -n $(version_of "$python") ]]; then wanted=$python; fi
    version=$(version_of "$wanted")
    [[ -n $version ]] || die "'$wanted' is no working Python: $hint"
    case $version in
        3.11.* | 3.12.* | 3.13.*) ;;
        *) die "'$wanted' is Python $version, but paxlike needs 3.11 to 3.13: $hint" ;;
    esac
    base_python=$wanted base_version=$version
}

version_of() {
    "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2> /dev/null || true
}

# Everything that changes what would be installed.
stamp() {
    echo "$root $base_version"
    cksum pyproject.toml requirements/setup.txt "${locks[@]/#/requirements/}"
    cksum <<< "${PIP_EXTRA_INDEX_URL:-} ${PIP_FIND_LINKS:-}" # they may bring torch
}

make_venv() {
    local clear=
    if [[ -e $venv ]]; then
        [[ -e $venv/pyvenv.cfg ]] ||
            die "$venv is there and is no virtual environment: name another with VENV="
        if [[ $(version_of "$python") == "$base_version" ]] && has_pip; then return; fi
        clear=--clear
    fi
    say "${clear:+re}building $venv from $base_python ($base_version)"
    if [[ $base_python == "$python" ]]; then # --clear removes it: take the one it was made from
        base_python=$("$python" -c 'import sys; print(sys._base_executable)')
    fi
    if ! "$base_python" -m venv ${clear} "$venv" || ! has_pip; then
        die "'$base_python' cannot build environments: install its venv module (python3-venv)"
    fi
}

has_pip() { "$python" -c 'import pip' 2> /dev/null; }

get_uv() {
    [[ -z ${NO_UV:-} ]] || return 0
    uv=$(command -v uv || command -v "$venv/bin/uv" || true)
    [[ -z $uv ]] || return 0
    if install --quiet --require-hashes -r requirements/uv.txt; then
        uv=$venv/bin/uv
    else
        say "uv cannot be had here: going on with pip"
    fi
}

# uv writes no bytecode unless told to, and without it every start of Python costs seconds.
install() {
    if [[ -n $uv ]]; then
        "$uv" pip install --python "$python" --compile-bytecode "$@"
    else
        pip_install "$@"
    fi
}

pip_install() {
    "$python" -m pip install --disable-pip-version-check "$@" 2>&1 |
        { grep -Ev 'WARNING: Location|Requirement already|^ +[A-Z]' || true; }
}

# On Linux the registry's torch pulls gigabytes of CUDA packages; a CPU build is told by its local
# version. CPU builds differ from place to place, so torch alone is locked by version, not by hash;
# the rest of the lock is whole, and --no-deps keeps a package that names torch from asking for it.
install_parity() {
    local torch
    torch=$(sed -n 's/.*"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
    [[ $(uname) == Linux ]] && torch+=+cpu
    say "installing $torch for the parity tests"
    if pip_install --quiet --no-deps --only-binary :all: "$torch" > /dev/null; then
        install --no-deps --require-hashes -r requirements/parity.txt ||
            die "the parity packages could not be installed (see above)"
    else
        say "pip finds no $torch for Python $base_version: the parity tests will be skipped" \
            "(PIP_EXTRA_INDEX_URL can name an index that has it)"
    fi
}

main "$@"
