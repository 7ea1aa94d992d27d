#!/usr/bin/env bash
# Trains on the hosts of a hostfile with horovodrun; see --help.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
readonly ROOT

usage() {
    cat <<'HELP'
Usage: launch/cluster/train_on_hosts.sh HOSTFILE [options of launch/train/mnist.py]

Starts launch/train/mnist.py on every host of HOSTFILE with horovodrun and Gloo: one line per host, "NAME slots=RANKS";
empty lines and lines that begin with # are left out. launch/cluster/hostfile.example is one.

What the hosts need:
  - this folder with its .venv, at the same path (a shared file system, or the same set-up on each host);
  - ssh from the host where this is started to all others without a password;
  - for checkpoints: a run directory (--run-dir) on a file system that they share.

Environment:
  PYTHON                Python to run with (default: .venv/bin/python of this folder).
  HOROVOD_INTERFACE     Network interface that the ranks talk over, for example eth0 (default: Horovod looks for one
                        that all hosts have).
  HOROVODRUN_ARGUMENTS  Further options of horovodrun, for example "--ssh-port 2222 --verbose".

Example:
  launch/cluster/train_on_hosts.sh hosts.txt --data data/MNIST --epochs 5 --bits 5 --run-dir shared/runs/mnist
HELP
}

fail() {
    printf 'train_on_hosts.sh: %s\n' "$*" >&2
    exit 2
}

# Sets HOSTS to "name:slots,name:slots" and RANKS to the sum of the slots.
read_hosts() { # HOSTFILE
    HOSTS='' RANKS=0
    local line name slots
    while IFS= read -r line || [[ -n $line ]]; do
        [[ $line =~ ^[[:space:]]*(#|$) ]] && continue
        [[ $line =~ ^[[:space:]]*([^[:space:]]+)[[:space:]]+slots=([1-9][0-9]*)[[:space:]]*$ ]] ||
            fail "$1: '$line' is not 'NAME slots=RANKS'"
        name=${BASH_REMATCH[1]} slots=${BASH_REMATCH[2]}
        HOSTS+=${HOSTS:+,}$name:$slots
        RANKS=$((RANKS + slots))
    done <"$1"
    ((RANKS > 0)) || fail "$1 names no host"
}

main() {
    if [[ ${1:-} == --help || ${1:-} == -h ]]; then usage && exit; fi
    (($# >= 1)) || fail "give a hostfile; see --help"
    local hostfile=$1
    shift
    [[ -r $hostfile ]] || fail "cannot read the hostfile $hostfile"
    read_hosts "$hostfile"
    local python=${PYTHON:-$ROOT/.venv/bin/python}
    local options=(--gloo -np "$RANKS" -H "$HOSTS")
    if [[ -n ${HOROVOD_INTERFACE:-} ]]; then options+=(--network-interfaces "$HOROVOD_INTERFACE"); fi
    local further=()
    read -ra further <<<"${HOROVODRUN_ARGUMENTS:-}"
    PATH=$(dirname "$python"):$PATH
    exec horovodrun "${options[@]}" ${further[@]+"${further[@]}"} "$python" "$ROOT/launch/train/mnist.py" "$@"
}

main "$@"
