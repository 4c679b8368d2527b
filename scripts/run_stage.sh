#!/usr/bin/env bash
# Run one stage of a job, unless it is done: the command of one process (see python -m paxlike.launch).
#
#   run_stage.sh STAGE KEY JOB_LOG_DIR main.py [ARGUMENTS]
#   run_stage.sh STAGE KEY JOB_LOG_DIR PROGRAM [ARGUMENTS]
#
#   STAGE        its name; the output also goes to JOB_LOG_DIR/STAGE.log, STAGE-1.log, ...
#   KEY          changes with the command: a stage is done where JOB_LOG_DIR/stages/STAGE.done holds it
#   JOB_LOG_DIR  of the run
#
# Environment: XLA_FLAGS adds to BASE_XLA_FLAGS; PYTHON; DRY_RUN=1 only prints the command.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/launch.sh"

[[ ${1:-} != --help && ${1:-} != -h ]] || { usage; exit; }
[[ $# -ge 4 ]] || die "needs STAGE, KEY, JOB_LOG_DIR and a command; --help tells more"
stage=$1 key=$2 job_log_dir=$3
shift 3
mark=$job_log_dir/stages/$stage.done
index=${SLURM_PROCID:-${JOB_COMPLETION_INDEX:-0}}

if [[ -r $mark && $(cat "$mark") == "$key" ]]; then
    if [[ $index == 0 ]]; then echo "$stage: done before ($mark)"; fi
    exit
fi
log=$(SLURM_PROCID=$index log_of_process "$job_log_dir" "$stage")
choose_python
status=0
if [[ $1 == main.py ]]; then
    set_xla_flags
    export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}
    launch "$log" "${@:2}" || status=$?
elif [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "$@"
    echo
else
    mkdir -p "$job_log_dir"
    (cd "$root" && "$@") 2>&1 | tee -a "$log" || status=$?
fi
if [[ $status == 0 && $index == 0 && -z ${DRY_RUN:-} ]]; then
    # All processes are through: they leave jax together.
    mkdir -p "$job_log_dir/stages"
    printf '%s' "$key" > "$mark.new" && mv "$mark.new" "$mark"
fi
report "$stage, process $index" "$log" "$status"
