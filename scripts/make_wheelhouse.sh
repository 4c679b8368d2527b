#!/usr/bin/env bash
# Collect the wheels that a machine with jax, flax, optax and orbax may still lack to run paxlike, for Python 3.12.
#
#   scripts/make_wheelhouse.sh FOLDER
#
# For machines without a network: carry FOLDER along and give it to scripts/benchmark.py as --wheelhouse=FOLDER, which
# installs those that are not there, into a folder of their own. The versions are those of requirements/base.txt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ $# -ne 1 || $1 == -* ]]; then
    sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    [[ ${1:-} == --help || ${1:-} == -h ]] && exit 0
    exit 2
fi
packages=(
    fiddle graphviz libcst pyyaml jaxtyping wadler-lindig tensorboardx cloudpickle tqdm etils zstandard absl-py
    simplejson humanize nest-asyncio grain array-record tokenizers jinja2 markupsafe
)
wanted=()
for name in "${packages[@]}"; do
    # The line for this Python where there is one for each version.
    line=$(grep -iE "^${name//-/[-_]}==" requirements/base.txt | tail -n 1) || true
    version=${line#*==}
    wanted+=("$name${line:+==${version%%[ ;\\]*}}")
done
"${PYTHON:-python3}" -m pip download --quiet --no-deps --dest "$1" --only-binary=:all: \
    --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform any \
    "${wanted[@]}" 2> >(grep -v "WARNING: Location" >&2)
echo "make_wheelhouse.sh: $1: $(find "$1" -name '*.whl' | wc -l) wheels, $(du -sm "$1" | cut -f1) MiB"
