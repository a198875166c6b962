#!/usr/bin/env bash
# A SLURM of four nodes on this machine, for tests, without systemd and beside whatever is installed.
# Its partitions: cpu; gpu, with GPUs that are not there; high, whose jobs pre-empt those of low.
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
    local host port device here user_signal
    host=$(hostname -s)
    # Below the ephemeral ports, and not those of another cluster.
    port=$((20000 + RANDOM % 5000 * 2))
    # Pre-empted jobs get submitit's signal first; SLURM 23.11 has moved that.
    user_signal=SlurmctldParameters=preempt_send_user_signal
    if [ "$(printf '23.11\n%s' "$(slurmctld -V | cut -d' ' -f2)" | sort -V | head -n 1)" = 23.11 ]; then
        user_signal=PreemptParameters=send_user_signal
    fi
    here="NodeHostname=$host NodeAddr=127.0.0.1"
    mkdir -p "$1/state" "$1/spool"
    for device in 0 1 2 3 4 5 6 7; do ln -sf /dev/null "$1/gpu$device"; done
    chmod 755 "$1" # munge wants its socket within everyone's reach
    cat >"$1/slurm.conf" <<EOF
# The tests use no other cluster than one of this name.
ClusterName=fairchemkdtests
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
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
$user_signal
GresTypes=gpu
# Several slurmd of one host. The first one's name is what ranks on several nodes meet at.
NodeName=DEFAULT CPUs=3 RealMemory=12000
NodeName=$host $here Port=$((port + 1))
NodeName=${host}2 $here Port=$((port + 10001))
NodeName=${host}3 $here Port=$((port + 10002)) CPUs=64 Gres=gpu:8
NodeName=${host}4 $here Port=$((port + 10003)) CPUs=64 Gres=gpu:8
PartitionName=DEFAULT MaxTime=INFINITE State=UP
PartitionName=cpu Nodes=$host,${host}2 Default=YES
PartitionName=gpu Nodes=${host}3,${host}4
PartitionName=low Nodes=${host}4 PriorityTier=1 GraceTime=60
PartitionName=high Nodes=${host}4 PriorityTier=2
EOF
    echo "NodeName=${host}[3-4] Name=gpu File=$1/gpu[0-7]" >"$1/gres.conf"
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
    for node in $(sed -n '/DEFAULT/d; s/^NodeName=\([^ ]*\).*/\1/p' "$SLURM_CONF"); do
        mkdir -p "$1/spool/$node"
        slurmd -f "$SLURM_CONF" -N "$node"
    done
    for _ in $(seq 240); do
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
    export SLURM_CONF=$1/slurm.conf
    # Jobs first: what they have started would wait for the cluster for ever.
    scancel --user="$(id -un)" 2>/dev/null || true
    for _ in $(seq 20); do
        [ -z "$(squeue -h 2>/dev/null)" ] && break
        sleep 0.5
    done
    for file in "$1"/slurmd.*.pid "$1/slurmctld.pid" "$1/munged.pid"; do
        [ -f "$file" ] && kill "$(cat "$file")" 2>/dev/null || true
    done
}

case "${1:-} $#" in
"install 1") install ;;
"start 2" | "stop 2") "$1" "$(realpath "$2")" ;;
*) sed -n '2,7s/^# \?//p' "$0" && exit 2 ;;
esac
