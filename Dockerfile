# paxlike on NVIDIA GPUs, with Transformer Engine; or, smaller, on CPUs.
#
#   docker build -t paxlike .
#   docker build -t paxlike:cpu --build-arg VARIANT=cpu .
#   docker run --gpus all --ipc=host -v "$PWD/runs:/runs" paxlike \
#       --fdl_config=configs.gpt.Synthetic126M --job_log_dir=/runs/synthetic
#
# Not built yet: where it was written there was no Docker engine. There its lists of Python packages
# were resolved (Python 3.12, with hashes), hadolint was content, and the Transformer Engine recipe
# was run by hand on Python 3.12 with CUDA 13 headers. Ubuntu's packages were not looked up.
#
# CUDA, cuDNN and NCCL come as wheels with jax[cuda13]; the host gives the driver (580 or newer).

ARG VARIANT=gpu

# --- What every stage stands on: Python 3.12 and uv.
FROM ubuntu:24.04 AS python
ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 UV_NO_CACHE=1 UV_LINK_MODE=copy
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/paxlike
COPY requirements/ requirements/
RUN python3 -m venv /opt/venv \
    && pip install --require-hashes -r requirements/uv.txt \
    && uv pip install --require-hashes -r requirements/setup.txt

# --- The JAX half of Transformer Engine, built from source against CUDA's headers. The wheels of
# cuBLAS, cuDNN and NCCL bring theirs; the core comes ready built.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04 AS transformer-engine
ARG TE_VERSION=2.20.2
ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 UV_NO_CACHE=1 UV_LINK_MODE=copy
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        build-essential cmake ninja-build python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/build
COPY requirements/ requirements/
RUN python3 -m venv /opt/venv \
    && pip install --require-hashes -r requirements/uv.txt \
    && uv pip install --require-hashes -r requirements/te.txt
RUN NVTE_BUILD_USE_NVIDIA_WHEELS=1 CPLUS_INCLUDE_PATH=/usr/local/cuda/include CUDA_VERSION=13.0 \
    JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 \
    pip wheel --no-deps --no-build-isolation -w /opt/wheels "transformer_engine_jax==${TE_VERSION}"

# --- The two variants.
FROM python AS cpu
RUN uv pip install --compile-bytecode --require-hashes -r requirements/base.txt

FROM python AS gpu
RUN uv pip install --compile-bytecode --require-hashes \
    -r requirements/gpu.txt -r requirements/te.txt
COPY --from=transformer-engine /opt/wheels/ /opt/wheels/
RUN uv pip install --no-deps --no-index /opt/wheels/*.whl
# Read by the container runtime: all GPUs, and of the driver what computing needs.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# One hardware queue keeps collectives and compute in the order of XLA's schedule (Hopper and older;
# 32 on Blackwell). Kernels are loaded before the first step. NVLink SHARP costs memory that large
# models want.
ENV CUDA_DEVICE_MAX_CONNECTIONS=1 CUDA_MODULE_LOADING=EAGER NCCL_NVLS_ENABLE=0
ENV XLA_PYTHON_CLIENT_MEM_FRACTION=0.85

# --- paxlike itself, last: a change of source rebuilds only this.
FROM ${VARIANT}
WORKDIR /opt/paxlike
COPY . .
RUN uv pip install --no-deps --no-build-isolation --editable . \
    && useradd --create-home --uid 10001 paxlike \
    && mkdir /runs && chown paxlike /runs
# By number: Kubernetes' runAsNonRoot knows no names.
USER 10001
ENTRYPOINT ["python", "/opt/paxlike/main.py"]
CMD ["--help"]
