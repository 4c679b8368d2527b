#!/usr/bin/env bash
# Train Pile126M on the Pile on this machine, data parallel.
#
#   run_pile_singlenode.sh TFDS_DATA_DIR VOCAB_PATH [PREC] [NUM_GPUS] [PERCORE_BATCH_SIZE] \
#       [LOG_DIR] [main.py arguments]
#
#   TFDS_DATA_DIR        where download_the_pile.py put the data
#   VOCAB_PATH           SentencePiece model
#   PREC                 compute dtype (bfloat16)
#   NUM_GPUS             devices of this machine (8)
#   PERCORE_BATCH_SIZE   sequences a device and step (4)
#   LOG_DIR              job directory; the output goes to LOG_DIR/pile_output.log (test_logdir)
#
# Environment: XLA_FLAGS adds to BASE_XLA_FLAGS; PYTHON; DRY_RUN=1 only prints the command.
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
log=$log_dir/pile_output.log

choose_python
set_xla_flags
export VOCAB_PATH=$vocab_path
status=0
launch "$log" \
    --fdl_config=configs.gpt.Pile126M \
    --job_log_dir="$log_dir" \
    --tfds_data_dir="$tfds_data_dir" \
    --fdl.FPROP_DTYPE="$prec" \
    --fdl.ICI_MESH_SHAPE="[$num_gpus,1,1]" \
    --fdl.DCN_MESH_SHAPE="[1,1,1]" \
    --fdl.PERCORE_BATCH_SIZE="$percore_batch_size" \
    "${@:7}" || status=$?
report "Pile126M" "$log" "$status"
