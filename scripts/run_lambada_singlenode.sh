#!/usr/bin/env bash
# Evaluate the newest checkpoint of a Pile126M run on LAMBADA, on this machine.
#
#   run_lambada_singlenode.sh TFDS_DATA_DIR VOCAB_PATH [PREC] [NUM_GPUS] [PERCORE_BATCH_SIZE] \
#       LOG_DIR [main.py arguments]
#
#   TFDS_DATA_DIR        where download_lambada.py put the data
#   VOCAB_PATH           SentencePiece model
#   PREC                 compute dtype (bfloat16)
#   NUM_GPUS             devices of this machine (8)
#   PERCORE_BATCH_SIZE   sequences a device and step (4)
#   LOG_DIR              job directory of the training run; output in LOG_DIR/lambada_output.log
#
# An argument between others may be '' for its default.
# Environment: XLA_FLAGS adds to BASE_XLA_FLAGS; PYTHON; DRY_RUN=1 only prints the command.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/launch.sh"

[[ ${1:-} != --help && ${1:-} != -h ]] || { usage; exit; }
[[ $# -ge 6 && -n $6 ]] ||
    die "needs TFDS_DATA_DIR, VOCAB_PATH and, as the sixth, LOG_DIR of the run; --help tells more"
tfds_data_dir=$1
vocab_path=$2
prec=${3:-bfloat16}
num_gpus=${4:-8}
percore_batch_size=${5:-4}
log_dir=$6
log=$log_dir/lambada_output.log

choose_python
set_xla_flags
export VOCAB_PATH=$vocab_path
status=0
launch "$log" \
    --fdl_config=configs.gpt.Lambada126M \
    --job_log_dir="$log_dir" \
    --mode=eval \
    --tfds_data_dir="$tfds_data_dir" \
    --fdl.FPROP_DTYPE="$prec" \
    --fdl.ICI_MESH_SHAPE="[$num_gpus,1,1]" \
    --fdl.DCN_MESH_SHAPE="[1,1,1]" \
    --fdl.PERCORE_BATCH_SIZE="$percore_batch_size" \
    "${@:7}" || status=$?
report "Lambada126M" "$log" "$status"
