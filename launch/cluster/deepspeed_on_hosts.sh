#!/usr/bin/env bash
# Trains on the hosts of a hostfile with DeepSpeed's launcher; see --help.
set -euo pipefail

# shellcheck source=launch/cluster/hosts.sh
source "$(dirname "${BASH_SOURCE[0]}")/hosts.sh"

usage() {
    cat <<'HELP'
Usage: launch/cluster/deepspeed_on_hosts.sh HOSTFILE -- python PROGRAM...
       launch/cluster/deepspeed_on_hosts.sh HOSTFILE [options of launch/train/language_model.py]

Starts PROGRAM, for example "train.py --deepspeed_config ds_config.json", on every host of HOSTFILE with the deepspeed
launcher; without "--" this project's language model. HOSTFILE has one line per host, "NAME slots=PROCESSES".
launch/cluster/hostfile.example is one.

What the hosts need:
  - the folder in which you start this, and the environment of PROGRAM, at the same path on each host: a shared file
    system, or the same set-up;
  - pdsh on the host where this is started, and ssh from it to all others without a password;
  - for checkpoints: a folder on a file system that they share: every process writes its part.

Environment:
  PYTHON               Python of the language model (default: .venv/bin/python of this folder).
  MASTER_ADDR          Name or address of the first host, as the others reach it (default: DeepSpeed asks the host).
  DEEPSPEED_ARGUMENTS  Further options of deepspeed, for example "--master_port 29501 --launcher openmpi".

Examples:
  launch/cluster/deepspeed_on_hosts.sh hosts.txt -- python train.py --deepspeed_config ds_config.json
  launch/cluster/deepspeed_on_hosts.sh hosts.txt --zero 2 --bits 5 --dtype bf16 --run-dir shared/runs/lm
HELP
}

main() {
    if [[ ${1:-} == --help || ${1:-} == -h ]]; then usage && exit; fi
    (($# >= 1)) || fail "give a hostfile; see --help"
    read_hosts "$1"
    read_program launch/train/language_model.py "${@:2}"
    split_interpreter
    local options=(--hostfile "$1")
    if [[ -n ${MASTER_ADDR:-} ]]; then options+=(--master_addr "$MASTER_ADDR"); fi
    local further=()
    read -ra further <<<"${DEEPSPEED_ARGUMENTS:-}"
    PATH=$(dirname "$INTERPRETER"):$PATH
    command -v deepspeed >/dev/null || fail "there is no deepspeed beside $INTERPRETER or on the PATH: pip install deepspeed"
    exec deepspeed "${options[@]}" ${further[@]+"${further[@]}"} "${PROGRAM[@]}"
}

main "$@"
