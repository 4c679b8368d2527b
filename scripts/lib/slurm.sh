# What the job files (*.sub, and those of `python -m paxlike.launch`) share; sourced inside a Slurm job, never run.

say() { echo "job ${SLURM_JOB_ID:-?}: $*"; }
die() { say "$*" >&2; exit 2; }

# A path as an absolute one; relative to FOLDER.
absolute() { # PATH FOLDER
    if [[ $1 == /* ]]; then echo "$1"; else echo "$2/$1"; fi
}

# Mount SOURCE at TARGET in the container: into the array `mounts`.
mount_path() { # SOURCE TARGET
    [[ $1$2 != *[,:]* ]] || die "'$1': a path with a comma or colon cannot be mounted in a container"
    mounts+=("$1:$2")
}

# Run a program as every task of a step: one for each of --ntasks-per-node on every node. In a container where
# CONTAINER is set. The output of each task goes to OUTPUT_DIR/output-JOB-NODE-TASK.txt, appended by a restart.
#
# A task that ends takes the others with it after TASK_WAIT seconds (30). Not srun's --kill-on-bad-exit: tasks that stop
# for a signal end with 83 one after the other, and it would kill the one that still writes.
run_step() { # [--one] PROGRAM [ARGUMENTS]
    local options=(--kill-on-bad-exit=0 --wait="${TASK_WAIT:-30}" --unbuffered) list
    if [[ $1 == --one ]]; then
        options+=(--nodes=1 --ntasks=1)
        shift
    fi
    if [[ -n ${OUTPUT_DIR:-} ]]; then
        mkdir -p "$OUTPUT_DIR"
        options+=(--output="${OUTPUT_DIR//%/%%}/output-%j-%n-%t.txt" --open-mode=append)
    fi
    if [[ -n ${CONTAINER:-} ]]; then
        list=$(IFS=,; echo "${mounts[*]:-}")
        options+=(--container-image="$CONTAINER" --no-container-mount-home)
        if [[ -n $list ]]; then options+=(--container-mounts="$list"); fi
    fi
    srun "${options[@]}" "$@"
}

# Step of the newest complete checkpoint in a job directory or in one of its folders; -1 for none.
newest_checkpoint() { # FOLDER
    find "$1" -maxdepth 4 -type d -path '*/checkpoints/checkpoint_[0-9]*' -prune 2> /dev/null |
        sed -n 's/.*checkpoint_0*\([0-9][0-9]*\)$/\1/p' | sort -n | tail -n 1 | grep . || echo -1
}

# End the job, or send it back to the queue: after a signal (83: it has saved), a crash, a hang or a lost node.
# Not when it is complete (0), the user is at fault (2), or it made no checkpoint in MAX_RESTARTS (3) starts.
#
# Where somebody cancelled the job, Slurm has ended this script, and nothing here runs.
finish() { # STATUS JOB_DIR
    local status=$1 counter=$2/restarts.txt step last=-2 count=0
    case $status in
        0) rm -f "$counter"; say "done"; exit 0 ;;
        2) say "not started again: see the message above, or in ${OUTPUT_DIR:-the output}" >&2; exit 2 ;;
    esac
    if [[ ${REQUEUE:-1} != 1 ]]; then say "status $status; REQUEUE=0: not started again" >&2; exit "$status"; fi
    step=$(newest_checkpoint "$2")
    if [[ -r $counter ]]; then read -r last count < "$counter" || true; fi
    if [[ $step != "$last" ]]; then count=0; fi
    count=$((count + 1))
    if [[ $count -gt ${MAX_RESTARTS:-3} ]]; then
        rm -f "$counter"
        say "status $status; not started again: $((count - 1)) restarts brought no checkpoint beyond step $step" >&2
        exit "$status"
    fi
    mkdir -p "$2" && echo "$step $count" > "$counter"
    say "status $status at checkpoint $step: back to the queue (restart $count from there, of ${MAX_RESTARTS:-3})"
    scontrol requeue "$SLURM_JOB_ID" || exit "$status"
    sleep 60 # Slurm ends this script
    exit "$status"
}
