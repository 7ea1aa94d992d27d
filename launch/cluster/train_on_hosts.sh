#!/usr/bin/env bash
# Trains on the hosts of a hostfile with horovodrun; see --help.
set -euo pipefail

# shellcheck source=launch/cluster/hosts.sh
source "$(dirname "${BASH_SOURCE[0]}")/hosts.sh"

usage() {
    cat <<'HELP'
Usage: launch/cluster/train_on_hosts.sh HOSTFILE -- COMMAND...
       launch/cluster/train_on_hosts.sh HOSTFILE [options of launch/train/mnist.py]

Starts COMMAND, for example "python train.py --epochs 5", on every host of HOSTFILE with horovodrun and Gloo; without
"--" this project's MNIST training. HOSTFILE has one line per host, "NAME slots=RANKS"; empty lines and lines that begin
with # are left out. launch/cluster/hostfile.example is one.

What the hosts need:
  - the folder in which you start this, and the environment of COMMAND, at the same path on each host: a shared file
    system, or the same set-up. The PATH of this shell is used on all of them;
  - ssh from the host where this is started to all others without a password;
  - for checkpoints: a folder on a file system that they share.

Environment:
  PYTHON                Python of the MNIST training (default: .venv/bin/python of this folder).
  HOROVOD_INTERFACE     Network interface that the ranks talk over, for example eth0 (default: Horovod looks for one
                        that all hosts have).
  HOROVODRUN_ARGUMENTS  Further options of horovodrun, for example "--ssh-port 2222 --verbose".

Examples:
  launch/cluster/train_on_hosts.sh hosts.txt -- python train.py --epochs 5
  launch/cluster/train_on_hosts.sh hosts.txt --data data/MNIST --epochs 5 --bits 5 --run-dir shared/runs/mnist
HELP
}

main() {
    if [[ ${1:-} == --help || ${1:-} == -h ]]; then usage && exit; fi
    (($# >= 1)) || fail "give a hostfile; see --help"
    read_hosts "$1"
    read_program launch/train/mnist.py "${@:2}"
    local hosts='' number
    for number in "${!HOST_NAMES[@]}"; do
        hosts+=${hosts:+,}${HOST_NAMES[number]}:${HOST_SLOTS[number]}
    done
    local options=(--gloo -np "$RANKS" -H "$hosts")
    if [[ -n ${HOROVOD_INTERFACE:-} ]]; then options+=(--network-interfaces "$HOROVOD_INTERFACE"); fi
    local further=()
    read -ra further <<<"${HOROVODRUN_ARGUMENTS:-}"
    if [[ ${PROGRAM[0]} == */* ]]; then PATH=$(dirname "${PROGRAM[0]}"):$PATH; fi # horovodrun lies beside that Python
    command -v horovodrun >/dev/null || fail "there is no horovodrun on the PATH: activate the environment that has Horovod"
    exec horovodrun "${options[@]}" ${further[@]+"${further[@]}"} "${PROGRAM[@]}"
}

main "$@"
