#!/usr/bin/env bash
# Train Pile126M on the Pile on several nodes of Slurm: the command of one process.
#
#   srun ... run_pile_multinode.sh TFDS_DATA_DIR VOCAB_PATH [PREC] [NUM_GPUS] \
#       [PERCORE_BATCH_SIZE] [LOG_DIR] [main.py arguments]
#
#   TFDS_DATA_DIR        where download_the_pile.py put the data
#   VOCAB_PATH           SentencePiece model
#   PREC                 compute dtype (bfloat16)
#   NUM_GPUS             devices of one node (8)
#   PERCORE_BATCH_SIZE   sequences a device and step (4)
#   LOG_DIR              job directory (test_logdir); output in its pile_output.log, -1.log, ...
#
# Environment: SLURM_*; SERVER_PORT (one by the job); XLA_FLAGS adds to BASE_XLA_FLAGS; PYTHON;
# DRY_RUN=1 only prints the command.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/launch.sh"

[[ ${1:-} != --help && ${1:-} != -h ]] || { usage; exit; }
[[ $# -ge 2 ]] || die "needs TFDS_DATA_DIR and VOCAB_PATH; --help tells more"
tfds_data_dir=$1
vocab_path=$2
prec=${3:-bfloat16}
num_gpus=${4:-8}
percore_batch_size=${5:-4}
log_dir=${6:-test_logdir}

set_distributed
[[ -n ${SLURM_JOB_NUM_NODES:-} ]] ||
    die "SLURM_JOB_NUM_NODES is not set: it is the number of nodes of the mesh"
log=$(log_of_process "$log_dir" pile_output)
choose_python
set_xla_flags
export VOCAB_PATH=$vocab_path
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.85}
status=0
launch "$log" \
    --fdl_config=configs.gpt.Pile126M \
    --job_log_dir="$log_dir" \
    --tfds_data_dir="$tfds_data_dir" \
    --fdl.FPROP_DTYPE="$prec" \
    --fdl.ICI_MESH_SHAPE="[$num_gpus,1,1]" \
    --fdl.DCN_MESH_SHAPE="[$SLURM_JOB_NUM_NODES,1,1]" \
    --fdl.PERCORE_BATCH_SIZE="$percore_batch_size" \
    "${distributed[@]}" \
    "${@:7}" || status=$?
report "Pile126M, process ${SLURM_PROCID}" "$log" "$status"
