#!/usr/bin/env bash
# Run main.py as several processes on this machine, over loopback and without Slurm.
#
#   run_multiprocess_local.sh NUM_PROCESSES [main.py arguments]
#
# Each line of output begins with the number of its process. If one process fails the others end by
# themselves, within seconds, and say which one it was (job_log_dir/processes/failure.txt); what
# still runs after 5 s is stopped, and after 25 s killed. The status is that of the first that ended. SIGTERM, SIGUSR1 and
# Ctrl-C reach all, so that they save together.
#
# Environment: SERVER_PORT (a free one); JAX_NUM_CPU_DEVICES, virtual devices of each process on a
# CPU; PYTHON; DRY_RUN=1 only prints the commands.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/launch.sh"

[[ ${1:-} != --help && ${1:-} != -h ]] || { usage; exit; }
[[ ${1:-} =~ ^[1-9][0-9]*$ ]] ||
    die "needs the number of processes first, not '${1:-}'; --help tells more"
num_processes=$1
shift
choose_python
free_port='import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
port=${SERVER_PORT:-$("$PYTHON" -c "$free_port")}

command_of() { # IDX [main.py arguments]: into the array `command`
    command=("$PYTHON" "$root/main.py" "${@:2}" --multiprocess_gpu)
    command+=(--server_addr="127.0.0.1:$port" --num_hosts="$num_processes" --host_idx="$1")
}

if [[ -n ${DRY_RUN:-} ]]; then
    for ((idx = 0; idx < num_processes; idx++)); do
        command_of "$idx" "$@"
        printf '%q ' "${command[@]}"
        echo
    done
    exit
fi

pids=()
for ((idx = 0; idx < num_processes; idx++)); do
    command_of "$idx" "$@"
    # The prefixer ignores the signals: it must outlive what it prints.
    PYTHONUNBUFFERED=1 "${command[@]}" > >(trap '' TERM INT USR1; exec sed -u "s/^/[$idx] /") 2>&1 &
    pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2> /dev/null || true' TERM INT
trap 'kill -USR1 "${pids[@]}" 2> /dev/null || true' USR1

status=0 grace='' deadline=
while [[ ${#pids[@]} -gt 0 ]]; do
    alive=()
    for pid in "${pids[@]}"; do
        if kill -0 "$pid" 2> /dev/null; then
            alive+=("$pid")
            continue
        fi
        wait "$pid" && ended=0 || ended=$?
        [[ $status != 0 ]] || status=$ended
    done
    pids=("${alive[@]}")
    if [[ $status != 0 && $status != 83 && ${#pids[@]} -gt 0 ]]; then # 83: all are saving
        # One that waits for the lost process inside a collective does not hear SIGTERM.
        if [[ -z $grace ]]; then
            grace=$((SECONDS + 5))
        elif [[ -z $deadline ]]; then
            [[ $SECONDS -lt $grace ]] || { kill -TERM "${pids[@]}" 2> /dev/null || true; deadline=$((SECONDS + 20)); }
        elif [[ $SECONDS -ge $deadline ]]; then
            kill -KILL "${pids[@]}" 2> /dev/null || true
        fi
    fi
    sleep 0.2
done
exit "$status"
