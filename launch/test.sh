#!/usr/bin/env bash
# Sets up, then runs every check: ruff, mypy and pytest. Arguments go to pytest, for example: launch/test.sh -k levels
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly ROOT
FAILED=()
RAN_TESTS=no

usage() {
    cat <<'HELP'
Usage: launch/test.sh [arguments of pytest]

Sets up with launch/setup.sh, then runs ruff, mypy and pytest, and shellcheck where it is installed. All of them run, also
after one has failed; the exit status is 0 if all passed. pytest runs twice: first, in a process for each processor but
four at most, the tests of one process; then, one after the other, those that start several processes or measure time.
With markers (-m) of yours it runs once. Arguments go to pytest, for example:
  launch/test.sh -k levels
  launch/test.sh tests/kernels/test_codec.py -x
  launch/test.sh -m 'not distributed' -n 2
HELP
}

check() { # COMMAND...
    printf '\n== %s\n' "$*"
    "$@" || FAILED+=("$*")
}

check_shell_scripts() {
    if ! command -v shellcheck >/dev/null; then return; fi
    local scripts=()
    mapfile -t scripts < <(find launch -name '*.sh' -o -name '*.sbatch')
    check shellcheck -x .ci/run "${scripts[@]}"
}

has_markers() { # ARGUMENTS OF PYTEST
    local argument
    for argument in "$@"; do
        if [[ $argument == -m* ]]; then return 0; fi
    done
    return 1
}

check_tests() { # MARKERS ARGUMENTS OF PYTEST
    local status=0
    printf '\n== pytest -m %s\n' "'$1' ${*:2}"
    pytest -m "$@" || status=$?
    if ((status == 5)); then return; fi # none of the chosen tests has these markers
    RAN_TESTS=yes
    if ((status)); then FAILED+=("pytest -m '$1' ${*:2}"); fi
}

check_all_tests() { # ARGUMENTS OF PYTEST
    if has_markers "$@"; then
        check pytest --durations=10 "$@"
        return
    fi
    local processors
    processors=$(env -u OMP_NUM_THREADS nproc) # which would answer with that variable's number
    check_tests 'not (distributed or timed)' --durations=10 \
        --numprocesses $((processors < 4 ? processors : 4)) --dist loadfile "$@"
    check_tests 'distributed or timed' --durations=10 "$@"
    if [[ $RAN_TESTS == no ]]; then FAILED+=("pytest $*: no tests were chosen"); fi
}

main() {
    if [[ ${1:-} == --help || ${1:-} == -h ]]; then usage && exit; fi
    cd "$ROOT"
    launch/setup.sh
    export PATH=$ROOT/.venv/bin:$PATH
    # Several processes share the cores in the distributed tests: one thread each.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    check ruff check .
    check ruff format --check .
    check mypy
    check_shell_scripts
    check_all_tests "$@"
    if ((${#FAILED[@]})); then
        printf '\nFailed:\n'
        printf '  %s\n' "${FAILED[@]}"
        exit 1
    fi
    printf '\nAll checks passed\n'
}

main "$@"
