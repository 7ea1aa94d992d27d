#!/usr/bin/env bash
# Sets up, then runs every check: ruff, mypy and pytest. Arguments go to pytest, for example: launch/test.sh -k levels
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly ROOT
FAILED=()

usage() {
    cat <<'HELP'
Usage: launch/test.sh [arguments of pytest]

Sets up with launch/setup.sh, then runs ruff, mypy and pytest, and shellcheck where it is installed. All of them run, also
after one has failed; the exit status is 0 if all passed. Arguments go to pytest, for example:
  launch/test.sh -k levels
  launch/test.sh tests/test_codec.py -x
HELP
}

check() { # COMMAND...
    printf '\n== %s\n' "$*"
    "$@" || FAILED+=("$*")
}

check_shell_scripts() {
    if ! command -v shellcheck >/dev/null; then return; fi
    local scripts=()
    mapfile -t scripts < <(find launch -name '*.sh')
    check shellcheck .ci/run "${scripts[@]}"
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
    check pytest --durations=10 "$@"
    if ((${#FAILED[@]})); then
        printf '\nFailed:\n'
        printf '  %s\n' "${FAILED[@]}"
        exit 1
    fi
    printf '\nAll checks passed\n'
}

main "$@"
