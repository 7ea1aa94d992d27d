#!/usr/bin/env bash
# Trains on the hosts of a hostfile with torchrun, which is started on each of them; see --help.
set -euo pipefail

# shellcheck source=launch/cluster/hosts.sh
source "$(dirname "${BASH_SOURCE[0]}")/hosts.sh"

usage() {
    cat <<'HELP'
Usage: launch/cluster/torchrun_on_hosts.sh HOSTFILE -- python PROGRAM...
       launch/cluster/torchrun_on_hosts.sh HOSTFILE [options of launch/train/ddp.py]

Starts PROGRAM, for example "train.py --epochs 5", on every host of HOSTFILE with torchrun: for DistributedDataParallel,
FSDP, accelerate and DeepSpeed. Without "--" it starts this project's example of DistributedDataParallel. HOSTFILE has
one line per host, "NAME slots=PROCESSES"; launch/cluster/hostfile.example is one. When torchrun fails on one host, it
is ended on the others.

What the hosts need:
  - the folder in which you start this, and the environment of PROGRAM, at the same path on each host: a shared file
    system, or the same set-up;
  - ssh from the host where this is started to all others without a password; a host named localhost needs none;
  - for checkpoints: a folder on a file system that they share.

Environment:
  PYTHON              Python of the example (default: .venv/bin/python of this folder).
  MASTER_ADDR         Name or address of the first host, as the others reach it (default: its name in HOSTFILE).
  MASTER_PORT         A free port there (default: 29500).
  INTERFACE           Network interface that the ranks talk over, for example eth0 (default: Gloo and NCCL choose).
  SSH_ARGUMENTS       Further options of ssh, for example "-p 2222".
  OMP_NUM_THREADS     Threads of each process (default: torchrun's, 1).

Examples:
  launch/cluster/torchrun_on_hosts.sh hosts.txt -- python train.py --epochs 5
  INTERFACE=eth0 launch/cluster/torchrun_on_hosts.sh hosts.txt --bits 5
HELP
}

# Prints the command line of a host, for a shell there.
host_command() { # NUMBER
    local words=(env "PATH=$PATH")
    if [[ -n ${OMP_NUM_THREADS:-} ]]; then words+=("OMP_NUM_THREADS=$OMP_NUM_THREADS"); fi
    if [[ -n ${INTERFACE:-} ]]; then words+=("GLOO_SOCKET_IFNAME=$INTERFACE" "NCCL_SOCKET_IFNAME=$INTERFACE"); fi
    words+=("$INTERPRETER" -m torch.distributed.run --nnodes "${#HOST_NAMES[@]}" --node-rank "$1"
        --nproc-per-node "${HOST_SLOTS[$1]}" --master-addr "${MASTER_ADDR:-${HOST_NAMES[0]}}"
        --master-port "${MASTER_PORT:-29500}" "${PROGRAM[@]}")
    printf 'cd %q && exec' "$PWD"
    printf ' %q' "${words[@]}"
}

# Runs a command line on a host, in place of this shell. With a terminal there, it ends when the connection does.
run_on_host() { # NAME COMMAND
    if [[ $1 == localhost ]]; then exec bash -c "$2"; fi
    local further=()
    read -ra further <<<"${SSH_ARGUMENTS:-}"
    exec ssh -tt -o BatchMode=yes ${further[@]+"${further[@]}"} "$1" "$2" </dev/null
}

# shellcheck disable=SC2317  # called by the trap
end_all() {
    local processes
    mapfile -t processes < <(jobs -p)
    if ((${#processes[@]})); then kill "${processes[@]}" 2>/dev/null || true; fi
    wait
}

main() {
    if [[ ${1:-} == --help || ${1:-} == -h ]]; then usage && exit; fi
    (($# >= 1)) || fail "give a hostfile; see --help"
    read_hosts "$1"
    read_program launch/train/ddp.py "${@:2}"
    split_interpreter
    local number status=0 processes=()
    trap end_all EXIT
    for number in "${!HOST_NAMES[@]}"; do
        run_on_host "${HOST_NAMES[number]}" "$(host_command "$number")" &
        processes+=($!)
    done
    for number in "${processes[@]}"; do
        wait -n || {
            status=$?
            break
        }
    done
    exit "$status"
}

main "$@"
