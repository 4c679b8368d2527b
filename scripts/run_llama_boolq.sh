#!/usr/bin/env bash
# Fine-tune a LLaMA on BoolQ, all weights or adapters, and evaluate it; or evaluate weights as they are.
#
#   VOCAB_PATH=... TFDS_DATA_DIR=... CHECKPOINT_RESTORE_PATH=... run_llama_boolq.sh [main.py arguments]
#
# Environment (defaults in brackets), by Pax's names:
#   VOCAB_PATH               tokenizer.model, or a folder with tokenizer.json
#   TFDS_DATA_DIR            where download_boolq.py put the data
#   CHECKPOINT_RESTORE_PATH  weights to start from, or with EVAL_ONLY=1 to evaluate: a folder of
#                            Hugging Face or Meta, or a checkpoint of paxlike
#   CONFIG                   LLaMA7B, LLaMA13B, LLaMA70B, LLaMA3_1_8B, ... [LLaMA7B]
#   EVAL_ONLY                1: no training [0]
#   USE_LORA                 1: adapters only [0]; LORA_RANK [32], LORA_TARGET_LAYERS [all]
#   LOG_DIR                  job directories and logs [a temporary folder]
#   USE_MULTIPROCESS         1: one of the processes of a Slurm step [0]
#   PERCORE_BATCH_SIZE [2], MAX_SEQ_LEN [4096], USE_REPEATED_LAYER [True]
#   MAX_STEPS [1000; LoRA 600], LEARNING_RATE [1e-6; LoRA 1e-4],
#   LR_SCHEDULE [linear_rampup_cosine_decay; LoRA constant], LR_COS_WARMUP [half of MAX_STEPS]
#   ICI_MESH_SHAPE, DCN_MESH_SHAPE [those of the config]
#   XLA_FLAGS adds to BASE_XLA_FLAGS; XLA_PYTHON_CLIENT_MEM_FRACTION [0.85]; PYTHON;
#   DRY_RUN=1 only prints the commands
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/launch.sh"

[[ ${1:-} != --help && ${1:-} != -h ]] || { usage; exit; }
for name in VOCAB_PATH TFDS_DATA_DIR CHECKPOINT_RESTORE_PATH; do
    [[ -n ${!name:-} ]] || die "set $name; --help tells more"
done
for name in EVAL_ONLY USE_LORA USE_MULTIPROCESS; do
    [[ ${!name:-0} == [01] ]] || die "$name=${!name}: it must be 0 or 1"
done
[[ ${USE_MULTIPROCESS:-0} == 0 || -n ${LOG_DIR:-} ]] ||
    die "set LOG_DIR to a folder that all processes see; --help tells more"
export VOCAB_PATH TFDS_DATA_DIR
config=${CONFIG:-LLaMA7B}
use_lora=${USE_LORA:-0}
percore_batch_size=${PERCORE_BATCH_SIZE:-2}
if [[ $use_lora == 1 ]]; then
    max_steps=${MAX_STEPS:-600} rate=${LEARNING_RATE:-1e-4} schedule=${LR_SCHEDULE:-constant}
else
    max_steps=${MAX_STEPS:-1000} rate=${LEARNING_RATE:-1e-6}
    schedule=${LR_SCHEDULE:-linear_rampup_cosine_decay}
fi
warmup=${LR_COS_WARMUP:-$((max_steps / 2))}

log_dir=${LOG_DIR:-$(mktemp -d -t llama-boolq-XXXXXX)}
job=$log_dir/llama-$config-mbs-$percore_batch_size-lora-$use_lora
log=$(log_of_process "$log_dir/logs" "$(basename "$job")")

arguments=(--fdl_config="$config"
    --fdl.CHECKPOINT_RESTORE_PATH="$CHECKPOINT_RESTORE_PATH"
    --fdl.TFDS_DATA_DIR="$TFDS_DATA_DIR"
    --fdl.PERCORE_BATCH_SIZE="$percore_batch_size"
    --fdl.MAX_SEQ_LEN="${MAX_SEQ_LEN:-4096}"
    --fdl.USE_REPEATED_LAYER="${USE_REPEATED_LAYER:-True}"
    --fdl.MAX_STEPS="$max_steps"
    --fdl.LEARNING_RATE="$rate"
    --fdl.LR_SCHEDULE="$schedule"
    --fdl.LR_COS_WARMUP="$warmup"
    --fdl.LR_COS_DECAY_START="$((warmup + 1))"
    --fdl.LR_COS_DECAY_END="$max_steps")
for name in ICI_MESH_SHAPE DCN_MESH_SHAPE; do
    if [[ -n ${!name:-} ]]; then arguments+=("--fdl.$name=${!name}"); fi
done
if [[ $use_lora == 1 ]]; then
    arguments+=(--fdl.USE_LORA=True --fdl.LORA_RANK="${LORA_RANK:-32}"
        --fdl.LORA_TARGET_LAYERS="${LORA_TARGET_LAYERS:-all}")
fi
if [[ ${USE_MULTIPROCESS:-0} == 1 ]]; then
    set_distributed
    arguments+=("${distributed[@]}")
fi
choose_python
set_xla_flags
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.85}

evaluated=()
if [[ ${EVAL_ONLY:-0} == 1 ]]; then
    evaluated=(--checkpoint="$CHECKPOINT_RESTORE_PATH")
else
    status=0
    launch "$log" "${arguments[@]}" --job_log_dir="$job" --mode=train "$@" || status=$?
    if [[ $status != 0 ]]; then report "$config on BoolQ" "$log" "$status"; fi
fi
status=0
launch "$log" "${arguments[@]}" --job_log_dir="$job" --mode=eval "${evaluated[@]}" "$@" || status=$?
if [[ $status == 0 && -z ${DRY_RUN:-} ]]; then echo "job directory: $job"; fi
report "$config on BoolQ" "$log" "$status"
