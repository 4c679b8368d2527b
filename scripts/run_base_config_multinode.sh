#!/usr/bin/env bash
# Train any config on several nodes of Slurm, on its own mesh: the command of one process.
#
#   srun ... run_base_config_multinode.sh CONFIG [PREC] [NUM_GPUS] LOG_DIR [TFDS_DATA_DIR] \
#       [VOCAB_PATH] [ADDITIONAL_ARGS]
#
#   CONFIG            a config, as in --fdl_config
#   PREC              compute dtype (bfloat16)
#   NUM_GPUS          devices of one node; kept for its place, the mesh is the config's
#   LOG_DIR           job directory; output in LOG_DIR/CONFIG_output.log, CONFIG_output-1.log, ...
#   TFDS_DATA_DIR     data, for a config that reads any ('None')
#   VOCAB_PATH        SentencePiece model, for a config that tokenizes
#   ADDITIONAL_ARGS   more arguments of main.py in one word, apart by spaces; those after it too
#
# An argument between others may be '' for its default.
# Environment: SLURM_*; SERVER_PORT (one by the job); XLA_FLAGS adds to BASE_XLA_FLAGS; PYTHON;
# DRY_RUN=1 only prints the command.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/launch.sh"

[[ ${1:-} != --help && ${1:-} != -h ]] || { usage; exit; }
[[ $# -ge 4 && -n $1 && -n $4 ]] ||
    die "needs CONFIG and, as the fourth, LOG_DIR; --help tells more"
config=$1
prec=${2:-bfloat16}
log_dir=$4
tfds_data_dir=${5:-None}
vocab_path=${6:-}
read -r -a additional <<< "${7:-}"

set_distributed
log=$(log_of_process "$log_dir" "${config##*.}_output")
choose_python
set_xla_flags
if [[ -n $vocab_path ]]; then export VOCAB_PATH=$vocab_path; fi
if [[ $tfds_data_dir != None ]]; then additional+=(--tfds_data_dir="$tfds_data_dir"); fi
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}
status=0
launch "$log" \
    --fdl_config="$config" \
    --job_log_dir="$log_dir" \
    --fdl.FPROP_DTYPE="$prec" \
    "${distributed[@]}" \
    "${additional[@]}" \
    "${@:8}" || status=$?
report "$config, process ${SLURM_PROCID}" "$log" "$status"
