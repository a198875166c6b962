#!/usr/bin/env bash
# A SLURM of two nodes on this machine, for tests, without systemd and beside whatever is installed.
#
#   cluster.sh install      Debian's packages (as root)
#   cluster.sh start DIR    everything it writes goes to DIR; then: export SLURM_CONF=DIR/slurm.conf
#   cluster.sh stop DIR
set -euo pipefail

install() {
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge
}

configure() {
    local host port nodes
    host=$(hostname -s)
    # Below the ephemeral ports, and not those of another cluster.
    port=$((20000 + RANDOM % 5000 * 2))
    # Two slurmd of one host. The first one's name is what ranks on several nodes meet at.
    nodes="$host,${host}2"
    mkdir -p "$1/state" "$1/spool"
    chmod 755 "$1" # munge wants its socket within everyone's reach
    cat >"$1/slurm.conf" <<EOF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it starts again (120 s by default).
AuthInfo=socket=$1/munge.socket,cred_expire=5
StateSaveLocation=$1/state
SlurmdSpoolDir=$1/spool/%n
SlurmctldPidFile=$1/slurmctld.pid
SlurmdPidFile=$1/slurmd.%n.pid
SlurmctldLogFile=$1/slurmctld.log
SlurmdLogFile=$1/slurmd.%n.log
# No control groups: containers have none to give away.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
# As many tasks at a time as the memory of a small machine has room for, whatever its cores.
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=2
NodeName=$host NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=3 RealMemory=12000
NodeName=${host}2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 10001)) CPUs=3 RealMemory=12000
PartitionName=cpu Nodes=$nodes Default=YES MaxTime=INFINITE State=UP
EOF
    printf 'CgroupAutomount=no\nConstrainCores=no\n' >"$1/cgroup.conf"
    (umask 077 && head -c 128 /dev/urandom >"$1/munge.key")
}

start() {
    export SLURM_CONF=$1/slurm.conf
    configure "$1"
    munged --key-file="$1/munge.key" --socket="$1/munge.socket" --pid-file="$1/munged.pid" \
        --log-file="$1/munged.log" --seed-file="$1/munged.seed"
    slurmctld -c -f "$SLURM_CONF"
    local node
    for node in $(sed -n 's/^NodeName=\([^ ]*\).*/\1/p' "$SLURM_CONF"); do
        mkdir -p "$1/spool/$node"
        slurmd -f "$SLURM_CONF" -N "$node"
    done
    for _ in $(seq 60); do
        [ "$(sinfo -h -N -o %T 2>/dev/null | sort -u)" = idle ] && return
        sleep 0.5
    done
    echo "the nodes did not come up:" >&2
    tail -n 5 "$1"/*.log >&2
    stop "$1"
    return 1
}

stop() {
    local file
    for file in "$1"/slurmd.*.pid "$1/slurmctld.pid" "$1/munged.pid"; do
        [ -f "$file" ] && kill "$(cat "$file")" 2>/dev/null || true
    done
}

case "${1:-} $#" in
"install 1") install ;;
"start 2" | "stop 2") "$1" "$(realpath "$2")" ;;
*) sed -n '2,6s/^# \?//p' "$0" && exit 2 ;;
esac
