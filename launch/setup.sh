#!/usr/bin/env bash
# Makes the project's Python environment, .venv, ready to use; see --help.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
readonly ROOT
readonly VENV=$ROOT/.venv
readonly CONSTRAINTS=$ROOT/launch/constraints.txt
readonly SETUP_STAMP=$VENV/.setup-stamp
readonly HOROVOD_STAMP=$VENV/.horovod-stamp
readonly EXTRAS=deepspeed,wandb,cuda,dev
readonly BUILD_PACKAGES=(setuptools wheel hatchling) # of DeepSpeed and of this project

usage() {
    cat <<'HELP'
Usage: launch/setup.sh [options]

Makes .venv in the project's folder: PyTorch, Horovod built from source, DeepSpeed, the tools that the tests use, and
this project itself, editable; all in the versions of launch/constraints.txt. It needs Python 3.11, 3.12 or 3.13, g++,
make and CMake. Where everything is in place already it ends at once.

Options:
  --python PATH  Python to make .venv with (default: the first of python3, python3.13, python3.12, python3.11 that is
                 Python 3.11 to 3.13). An existing .venv is kept; remove it to change its Python.
  --force        Do every step again, and reinstall Horovod: for example after a change of its build options.
  -h, --help     Show this help.

Environment:
  HVD_QODA_TORCH_INDEX  URL of a package index to take PyTorch from, for example the CPU builds' or those of one CUDA
                        version. Default: pip's own index. Without a GPU (no nvidia-smi), PyTorch's CPU build is taken
                        where the index has one, else its usual build, which works there too but is several GB.
  HOROVOD_*, HVD_QODA_CACHE
                        Build options and cache of Horovod's wheel: see launch/build_horovod.sh --help.
  PIP_*                 pip's own settings.
HELP
}

say() { printf '%s\n' "$*"; }

fail() {
    printf 'setup.sh: %s\n' "$*" >&2
    exit 1
}

parse_arguments() {
    PYTHON='' FORCE=no
    while (($#)); do
        case $1 in
            --python)
                (($# >= 2)) || fail "--python needs a value; see --help"
                PYTHON=$2
                shift
                ;;
            --force) FORCE=yes ;;
            -h | --help) usage && exit ;;
            *) fail "unknown option '$1'; see --help" ;;
        esac
        shift
    done
}

is_supported_python() { # COMMAND
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_python() {
    local candidate
    if [[ -n $PYTHON ]]; then
        is_supported_python "$PYTHON" || fail "'$PYTHON' is not a working Python 3.11, 3.12 or 3.13 with venv"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11; do
        if is_supported_python "$candidate"; then
            PYTHON=$candidate
            return
        fi
    done
    fail "no Python 3.11, 3.12 or 3.13 with venv was found (Debian and Ubuntu: apt install python3 python3-venv python3-dev); name one with --python"
}

# An environment does not survive being moved or copied: pip then runs from elsewhere or not at all.
is_usable_venv() {
    is_supported_python "$VENV/bin/python" && [[ $("$VENV/bin/pip" --version 2>/dev/null) == *" from $VENV/"* ]]
}

make_venv() {
    if is_usable_venv; then return; fi
    find_python
    "$ROOT/launch/build_horovod.sh" --check --python "$PYTHON"
    say "Making .venv with $("$PYTHON" --version)"
    "$PYTHON" -m venv --clear "$VENV"
}

pip_install() { "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$CONSTRAINTS" "$@"; }

torch_version() { "$VENV/bin/python" -c 'import torch; print(torch.__version__)'; }

install_torch() {
    local version
    version=$(sed -n 's/^torch==//p' "$CONSTRAINTS")
    if [[ $(torch_version 2>/dev/null) == "$version"* ]]; then return; fi
    say "Installing PyTorch $version"
    if [[ -n ${HVD_QODA_TORCH_INDEX:-} ]]; then
        pip_install --index-url "$HVD_QODA_TORCH_INDEX" "torch==$version"
    elif command -v nvidia-smi >/dev/null; then
        pip_install "torch==$version"
    elif ! pip_install "torch==$version+cpu" 2>/dev/null; then
        say "The package index has no CPU build of PyTorch: taking the usual one, several GB (see --help to choose)"
        pip_install "torch==$version"
    fi
}

install_packages() {
    pip_install "${BUILD_PACKAGES[@]}"
    install_torch
    say "Installing the other packages and this project"
    # DeepSpeed's set-up imports torch, so nothing is built in isolation; it compiles what it needs when that is used.
    DS_BUILD_OPS=0 DS_ACCELERATOR=cpu pip_install --no-build-isolation --use-pep517 --editable "${ROOT}[$EXTRAS]"
}

install_horovod() {
    local version wheel
    version="$(torch_version) $(sha256sum <"$ROOT/launch/build_horovod.sh")"
    if [[ $FORCE == no && -f $HOROVOD_STAMP && $(<"$HOROVOD_STAMP") == "$version" ]]; then return; fi
    wheel=$("$ROOT/launch/build_horovod.sh" --python "$VENV/bin/python" --out "$VENV/horovod-wheel" | tail -n 1)
    say "Installing Horovod"
    pip_install --force-reinstall --no-deps "$wheel"
    "$VENV/bin/python" -c 'import horovod.torch' || fail "Horovod was installed but does not import"
    echo "$version" >"$HOROVOD_STAMP"
}

# What the environment depends on: if this text is the same as last time, there is nothing to do.
inputs() {
    echo "$ROOT"
    "$VENV/bin/python" --version
    cat "$ROOT/pyproject.toml" "$CONSTRAINTS" "$ROOT/launch/setup.sh" "$ROOT/launch/build_horovod.sh"
}

main() {
    parse_arguments "$@"
    if [[ $FORCE == no && -f $SETUP_STAMP && $(inputs 2>&1 | sha256sum) == "$(<"$SETUP_STAMP")" ]]; then return; fi
    make_venv
    install_packages
    install_horovod
    inputs | sha256sum >"$SETUP_STAMP"
    say "Ready: .venv has $("$VENV/bin/python" --version), PyTorch $(torch_version) and Horovod"
}

main "$@"
