#!/usr/bin/env bash
# Builds Transformer Engine where there is no GPU, so that tests/ops/test_te*.py run on its own CPU forms.
#
#   scripts/build_te_cpu.sh FOLDER [PYTHON]
#
# makes FOLDER/venv (PYTHON: 3.12, default python3.12) and FOLDER/run, a wrapper that runs a command in it:
#
#   FOLDER/run python -m pytest tests/ops/test_te.py tests/ops/test_te_fused.py
#
# It takes 5 to 10 minutes, 8 GB of disk and the network, needs CUDA's headers (CUDA_HOME, default
# /usr/local/cuda) and g++, and asks for no GPU: libcuda is replaced by a library whose functions all fail.
set -euo pipefail

folder=${1:?usage: scripts/build_te_cpu.sh FOLDER [PYTHON]}
python=${2:-python3.12}
version=2.20.2
jax=0.11.2
cuda=${CUDA_HOME:-/usr/local/cuda}
here=$(cd "$(dirname "$0")/.." && pwd)

[[ -f $cuda/include/cuda.h ]] || { echo "no $cuda/include/cuda.h: set CUDA_HOME to a folder with CUDA's headers" >&2; exit 1; }
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
[[ -x $folder/venv/bin/python ]] || "$python" -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }

pip install "jax[cuda13]==$jax" flax "pybind11[global]" "nvidia-cudnn-frontend>=1.25.0" setuptools wheel \
  ninja cmake nvidia-nvtx nvidia-curand packaging pydantic importlib-metadata
# What paxlike and its tests need.
pip install -e "${here}[test]" "jax==$jax"

if ! ls "$folder"/wheels/transformer_engine_jax-*.whl >/dev/null 2>&1; then
  NVTE_BUILD_USE_NVIDIA_WHEELS=1 CPLUS_INCLUDE_PATH=$cuda/include CUDA_VERSION=13.0 MAX_JOBS=${MAX_JOBS:-2} \
    NVTE_BUILD_THREADS_PER_JOB=1 JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 \
    pip wheel --no-deps --no-build-isolation -w "$folder/wheels" "transformer_engine_jax==$version"
fi
pip install --no-deps "$folder"/wheels/transformer_engine_jax-*.whl \
  "transformer_engine_cu13==$version" "transformer_engine==$version"

# The names of the driver's functions, also with the suffixes that its headers add by macro.
"$folder/venv/bin/python" - "$cuda/include" "$folder/stub.c" <<'PY'
import pathlib
import re
import sys

include, target = map(pathlib.Path, sys.argv[1:])
text = "".join((include / name).read_text() for name in ("cuda.h", "cudaTypedefs.h"))
names = set(re.findall(r"\b(cu[A-Z]\w+)\s*\(", text))
names |= {name.removeprefix("PFN_") for name in re.findall(r"\bPFN_cu\w+", text)}
names = {re.sub(r"_v\d+(_ptds|_ptsz)?$", "", name) for name in names}
suffixes = ("", "_v2", "_v3", "_ptsz", "_ptds", "_v2_ptsz", "_v2_ptds")
lines = sorted({f"int {name}{suffix}(void) {{ return 100; }}" for name in names for suffix in suffixes})
target.write_text("\n".join(lines) + "\n")
PY
mkdir -p "$folder/stub"
gcc -shared -fPIC -w -Wl,-soname,libcuda.so.1 -o "$folder/stub/libcuda.so.1" "$folder/stub.c"

cat > "$folder/run" <<EOF_RUN
#!/usr/bin/env bash
site=\$("$folder/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
export LD_LIBRARY_PATH="$folder/stub:\$site/nvidia/nccl/lib:\${LD_LIBRARY_PATH:-}"
export JAX_PLATFORMS=cpu NVTE_JAX_CUSTOM_CALLS=false PATH="$folder/venv/bin:\$PATH"
exec "\$@"
EOF_RUN
chmod +x "$folder/run"
"$folder/run" python -c 'import transformer_engine.jax; print("Transformer Engine can be imported: use '"$folder"'/run")'
