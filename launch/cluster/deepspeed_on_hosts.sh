#!/usr/bin/env bash
# Trains on the hosts of a hostfile with DeepSpeed's launcher; see --help.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
readonly ROOT

usage() {
    cat <<'HELP'
Usage: launch/cluster/deepspeed_on_hosts.sh HOSTFILE [options of launch/train/language_model.py]

Starts launch/train/language_model.py on every host of HOSTFILE with the deepspeed launcher: one line per host,
"NAME slots=PROCESSES". launch/cluster/hostfile.example is one.

What the hosts need:
  - this folder with its .venv, at the same path (a shared file system, or the same set-up on each host);
  - pdsh on the host where this is started, and ssh from it to all others without a password;
  - for checkpoints: a run directory (--run-dir) on a file system that they share: every process writes its part.

Environment:
  PYTHON               Python to run with (default: .venv/bin/python of this folder).
  MASTER_ADDR          Name or address of the first host, as the others reach it (default: DeepSpeed asks the host).
  DEEPSPEED_ARGUMENTS  Further options of deepspeed, for example "--master_port 29501 --launcher openmpi".

Example:
  launch/cluster/deepspeed_on_hosts.sh hosts.txt --zero 2 --bits 5 --dtype bf16 --run-dir shared/runs/lm
HELP
}

fail() {
    printf 'deepspeed_on_hosts.sh: %s\n' "$*" >&2
    exit 2
}

main() {
    if [[ ${1:-} == --help || ${1:-} == -h ]]; then usage && exit; fi
    (($# >= 1)) || fail "give a hostfile; see --help"
    local hostfile=$1
    shift
    [[ -r $hostfile ]] || fail "cannot read the hostfile $hostfile"
    local python=${PYTHON:-$ROOT/.venv/bin/python}
    local options=(--hostfile "$hostfile")
    if [[ -n ${MASTER_ADDR:-} ]]; then options+=(--master_addr "$MASTER_ADDR"); fi
    local further=()
    read -ra further <<<"${DEEPSPEED_ARGUMENTS:-}"
    PATH=$(dirname "$python"):$PATH
    exec deepspeed "${options[@]}" ${further[@]+"${further[@]}"} "$ROOT/launch/train/language_model.py" "$@"
}

main "$@"
