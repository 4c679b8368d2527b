# What the launch scripts share; sourced, never run.
#
# DRY_RUN=1 prints the command and the environment of the run and starts nothing.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
source "$root/scripts/lib/malloc.sh"

die() { echo "$(basename "$0"): $*" >&2; exit 2; }

# Print the comment at the head of the script as its help.
usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

# The interpreter: what PYTHON says, else that of .venv, else python3 (inside a container).
choose_python() {
    if [[ -z ${PYTHON:-} ]]; then
        PYTHON=python3
        if [[ -x $root/.venv/bin/python ]]; then PYTHON=$root/.venv/bin/python; fi
    fi
    command -v "$PYTHON" > /dev/null || die "PYTHON=$PYTHON: no such interpreter"
}

# The XLA flags of Pax's scripts, less those that XLA has dropped or made the default: overlap
# collectives with compute, matrix products by cuBLAS, small all-reduce groups that start early, no
# CUDA graphs. BASE_XLA_FLAGS replaces them, XLA_FLAGS adds to them.
set_xla_flags() {
    local base="--xla_gpu_enable_latency_hiding_scheduler=true --xla_gpu_enable_triton_gemm=false"
    base+=" --xla_gpu_all_reduce_combine_threshold_bytes=51200 --xla_gpu_enable_command_buffer=''"
    export XLA_FLAGS="${BASE_XLA_FLAGS-$base} ${XLA_FLAGS:-}"
    [[ -n ${DRY_RUN:-} ]] || (cd "$root" && "$PYTHON" -m paxlike.xla_flags) || exit 2
}

# Set the array `distributed` to the flags by which this process finds the others of its Slurm step.
set_distributed() {
    [[ -n ${SLURM_NTASKS:-} && -n ${SLURM_PROCID:-} ]] ||
        die "SLURM_NTASKS and SLURM_PROCID are not set: start it by srun" \
            "(run_multiprocess_local.sh starts processes without Slurm)"
    distributed=(--multiprocess_gpu) # the address of process 0 is found in the Slurm step
    if [[ -n ${SLURM_LAUNCH_NODE_IPADDR:-} && -n ${SERVER_PORT:-} ]]; then
        distributed+=(--server_addr="$SLURM_LAUNCH_NODE_IPADDR:$SERVER_PORT")
        distributed+=(--num_hosts="$SLURM_NTASKS" --host_idx="$SLURM_PROCID")
    fi
}

# The log of this process: process 0 has the plain name.
log_of_process() { # FOLDER NAME
    local idx=${SLURM_PROCID:-0}
    if [[ $idx == 0 ]]; then echo "$1/$2.log"; else echo "$1/$2-$idx.log"; fi
}

# Run main.py, its output also in LOG, and return its own status. SIGTERM, SIGUSR1 and Ctrl-C reach it
# as SIGTERM, on which it saves a checkpoint; tee outlives it, so that its last lines are not lost.
launch() { # LOG [main.py arguments]
    local log=$1 notes waiter="" interrupted="" tee_pid status
    shift
    if [[ -n ${DRY_RUN:-} ]]; then
        print_environment
        printf '%q ' "$PYTHON" "$root/main.py" "$@"
        printf '\nlog: %s\n' "$log"
        return
    fi
    (mkdir -p "$(dirname "$log")" && touch "$log") 2> /dev/null || die "cannot write $log"
    notes=$(mktemp -d) || die "cannot make a temporary folder: TMPDIR=${TMPDIR:-/tmp}"
    # Before anything starts: without it a signal now would end this script and leave main.py alone.
    trap 'interrupted=1; kill -TERM $waiter 2> /dev/null || true' TERM INT USR1
    exec 3> >(trap '' TERM INT USR1; exec tee -a "$log")
    tee_pid=$!
    "$PYTHON" "$root/scripts/lib/note_status.py" "$notes/status" \
        "$PYTHON" "$root/main.py" "$@" >&3 2>&1 3>&- &
    waiter=$!
    exec 3>&-
    if [[ -n $interrupted ]]; then kill -TERM "$waiter" 2> /dev/null || true; fi
    while kill -0 "$waiter" 2> /dev/null; do wait "$waiter" || true; done # a signal ends `wait`
    trap - TERM INT USR1
    status=$(cat "$notes/status" 2> /dev/null || echo 255) # 255: the waiter was killed
    rm -rf "$notes"
    wait "$tee_pid" 2> /dev/null || true
    return "$status"
}

print_environment() {
    local name
    for name in XLA_FLAGS XLA_PYTHON_CLIENT_MEM_FRACTION VOCAB_PATH TFDS_DATA_DIR; do
        if [[ -n ${!name:-} ]]; then printf '%s=%q\n' "$name" "${!name}"; fi
    done
}

# Say how the run ended, and end with its status.
report() { # NAME LOG STATUS
    if [[ -z ${DRY_RUN:-} ]]; then
        case $3 in
            0) echo "$1: success" ;;
            83) echo "$1: stopped by a signal; the same command goes on from there (log: $2)" >&2 ;;
            *) echo "$1: FAILED with status $3 (log: $2)" >&2 ;;
        esac
    fi
    exit "$3"
}
