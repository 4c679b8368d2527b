#!/usr/bin/env bash
# Start or stop a Slurm of this machine alone, whose "nodes" n1, n2, ... all are this machine: to try job files.
#
#   scripts/slurm_loopback.sh [--install] start DIR [--nodes=2] [--cpus=2]
#   scripts/slurm_loopback.sh stop DIR
#
#   start      starts munged, slurmctld and a slurmd for each node; configuration, logs and state lie in DIR. Then
#              export SLURM_CONF=DIR/slurm.conf, and sinfo, sbatch, squeue and scancel speak to it.
#   stop       cancels all jobs and ends the daemons
#   --nodes    number of nodes; --cpus, what Slurm believes each to have
#   --install  first installs the Debian packages slurmctld, slurmd, slurm-client and munge where they are missing
#
# It must run as root (slurmd starts jobs as their user). Nothing outside DIR is written, apart from the packages.
set -euo pipefail

usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
die() { echo "slurm_loopback.sh: $*" >&2; exit 2; }

install=
if [[ ${1:-} == --install ]]; then install=1; shift; fi
command=${1:-} dir=${2:-} nodes=2 cpus=2
case $command in
    start | stop) ;;
    -h | --help) usage; exit ;;
    "") if [[ -n $install ]]; then command=install; else usage; exit 2; fi ;;
    *) die "unknown command '$command': use start or stop; --help tells more" ;;
esac
if [[ $command != install ]]; then
    [[ -n $dir ]] || die "$command needs a folder; --help tells more"
    [[ $dir != *[[:space:]\"\'%]* ]] || die "'$dir' has characters that slurm.conf cannot hold"
fi
for option in "${@:3}"; do
    case $option in
        --nodes=[1-9] | --nodes=[1-9][0-9]) nodes=${option#*=} ;;
        --cpus=[1-9] | --cpus=[1-9][0-9]) cpus=${option#*=} ;;
        *) die "'$option' is not understood; --help tells more" ;;
    esac
done
PATH=$PATH:/usr/sbin:/sbin

missing() {
    local program
    for program in munged slurmctld slurmd sbatch srun scontrol; do
        command -v "$program" > /dev/null || { echo "$program"; return; }
    done
}

install_packages() {
    [[ -n $(missing) ]] || return 0
    [[ $(id -u) == 0 ]] || die "only root can install packages"
    command -v apt-get > /dev/null || die "there is no apt-get here: install slurmctld, slurmd and munge by other means"
    export DEBIAN_FRONTEND=noninteractive
    local quick=(-o Acquire::Retries=0 -o Acquire::http::Timeout=10 -o Acquire::https::Timeout=10 -qq)
    # A package must not start the daemons of a real cluster.
    local policy=/usr/sbin/policy-rc.d made=
    if [[ ! -e $policy ]]; then
        printf '#!/bin/sh\nexit 101\n' > "$policy" && chmod +x "$policy" && made=1
    fi
    local status=0
    timeout 300 bash -c '
        apt-get "$@" update > /dev/null 2>&1 || true
        apt-get "$@" install --yes --no-install-recommends slurmctld slurmd slurm-client munge > /dev/null
    ' _ "${quick[@]}" || status=$?
    if [[ -n $made ]]; then rm -f "$policy"; fi
    [[ $status == 0 && -z $(missing) ]] || die "the packages could not be installed"
}

# Ports that nobody listens on, as many as asked for.
free_ports() {
    python3 -c '
import socket, sys
held = [socket.socket() for _ in range(int(sys.argv[1]))]
for one in held: one.bind(("127.0.0.1", 0))
print(*[one.getsockname()[1] for one in held])' "$1"
}

write_config() {
    local host ports i memory
    host=$(hostname)
    read -r -a ports <<< "$(free_ports $((nodes + 1)))"
    memory=$(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
    cat > "$dir/slurm.conf" << END
ClusterName=loopback
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
AuthType=auth/munge
AuthInfo=socket=$dir/run/munge.sock
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool.%n
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,bf_interval=1,sched_interval=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobRequeue=1
KillWait=10
MinJobAge=600
SlurmdTimeout=60
InactiveLimit=0
END
    for ((i = 1; i <= nodes; i++)); do
        echo "NodeName=n$i NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[i]} CPUs=$cpus RealMemory=$memory"
    done >> "$dir/slurm.conf"
    echo "PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4" >> "$dir/slurm.conf"
}

start() {
    local i
    [[ $(id -u) == 0 ]] || die "only root can start slurmd"
    [[ -z $(missing) ]] || die "there is no $(missing) here; --install installs Slurm on Debian"
    [[ ! -e $dir/run/slurmctld.pid ]] || die "$dir is in use: stop it first"
    mkdir -p "$dir"/{run,log,state}
    dir=$(cd "$dir" && pwd)
    chmod 700 "$dir/state"
    chmod 755 "$dir/run"
    trap 'stop' ERR
    head -c 1024 /dev/urandom > "$dir/munge.key"
    chmod 600 "$dir/munge.key"
    write_config
    export SLURM_CONF=$dir/slurm.conf
    munged --force --socket="$dir/run/munge.sock" --key-file="$dir/munge.key" --log-file="$dir/log/munged.log" \
        --pid-file="$dir/run/munged.pid" --seed-file="$dir/run/munged.seed" 2> /dev/null
    slurmctld -c > /dev/null
    for ((i = 1; i <= nodes; i++)); do
        mkdir -p "$dir/spool.n$i"
        slurmd -N "n$i" -c > /dev/null
    done
    for ((i = 0; i < 100; i++)); do
        if [[ $(sinfo --noheader --states=idle --Node 2> /dev/null | wc -l) == "$nodes" ]]; then
            trap - ERR
            echo "export SLURM_CONF=$dir/slurm.conf"
            return
        fi
        sleep 0.2
    done
    tail -n 5 "$dir"/log/*.log >&2 || true
    stop
    die "the $nodes nodes did not come up in 20 s"
}

stop() {
    local file pid i
    trap - ERR
    [[ -d $dir/run ]] || return 0
    dir=$(cd "$dir" && pwd)
    export SLURM_CONF=$dir/slurm.conf
    if [[ -e $dir/run/slurmctld.pid ]]; then
        timeout 10 scancel --quiet --user=root 2> /dev/null || true
        for ((i = 0; i < 150; i++)); do # steps get SIGTERM, and SIGKILL after KillWait
            timeout 5 squeue --noheader --states=all --format=%t 2> /dev/null | grep -qE '^(R|CG|S)$' || break
            sleep 0.1
        done
    fi
    local pids=()
    for file in "$dir"/run/*.pid; do
        if [[ -e $file ]]; then pids+=("$(cat "$file")"); fi
        rm -f "$file"
    done
    kill "${pids[@]}" 2> /dev/null || true
    for ((i = 0; i < 20; i++)); do
        for pid in "${pids[@]}"; do
            if kill -0 "$pid" 2> /dev/null; then sleep 0.1; continue 2; fi
        done
        break
    done
    kill -KILL "${pids[@]}" 2> /dev/null || true
}

if [[ -n $install ]]; then install_packages; fi
case $command in
    start) start ;;
    stop) stop ;;
esac
