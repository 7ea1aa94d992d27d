# Sourced by the scripts beside it: the hosts of a hostfile, and the program to run on them.
# shellcheck shell=bash disable=SC2034  # the scripts use what is set here

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
readonly ROOT

fail() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 2
}

# Sets HOST_NAMES and HOST_SLOTS, a host each, and RANKS, the sum of the slots.
read_hosts() { # HOSTFILE
    HOST_NAMES=() HOST_SLOTS=() RANKS=0
    [[ -r $1 ]] || fail "cannot read the hostfile $1"
    local line
    while IFS= read -r line || [[ -n $line ]]; do
        [[ $line =~ ^[[:space:]]*(#|$) ]] && continue
        [[ $line =~ ^[[:space:]]*([^[:space:]]+)[[:space:]]+slots=([1-9][0-9]*)[[:space:]]*$ ]] ||
            fail "$1: '$line' is not 'NAME slots=RANKS'"
        HOST_NAMES+=("${BASH_REMATCH[1]}")
        HOST_SLOTS+=("${BASH_REMATCH[2]}")
        RANKS=$((RANKS + BASH_REMATCH[2]))
    done <"$1"
    ((RANKS > 0)) || fail "$1 names no host"
}

# Sets PROGRAM: what follows "--", else one of this project's programs with the options that are given.
read_program() { # DEFAULT ARGUMENTS...
    local default=$1
    shift
    if [[ ${1:-} != -- ]]; then
        PROGRAM=("${PYTHON:-$ROOT/.venv/bin/python}" "$ROOT/$default" "$@")
        return
    fi
    shift
    (($# >= 1)) || fail "give a program behind --, for example: -- python train.py; see --help"
    PROGRAM=("$@")
}

# For launchers that start Python themselves: sets INTERPRETER, and takes it off PROGRAM.
split_interpreter() {
    case ${PROGRAM[0]##*/} in
        python | python[0-9]*)
            ((${#PROGRAM[@]} >= 2)) || fail "give a program behind ${PROGRAM[0]}, for example: -- python train.py"
            INTERPRETER=${PROGRAM[0]}
            PROGRAM=("${PROGRAM[@]:1}")
            ;;
        *) INTERPRETER=python ;;
    esac
    INTERPRETER=$(command -v "$INTERPRETER") || fail "there is no '$INTERPRETER' on the PATH"
}
