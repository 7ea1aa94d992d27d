#!/usr/bin/env bash
# Runs the CPU kernels as an aarch64 processor does, by emulation; see --help.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
readonly ROOT
readonly CONSTRAINTS=$ROOT/launch/constraints.txt
# The last one whose wheel for aarch64 is a CPU build on the index.
readonly TORCH=torch==2.10.0
readonly NEEDED=(numpy numba llvmlite filelock fsspec Jinja2 MarkupSafe mpmath networkx sympy typing_extensions)
readonly NEEDED_BY_TESTS=(
    pytest pytest-timeout hypothesis iniconfig packaging pluggy Pygments scipy sortedcontainers
)
readonly KERNEL_TESTS=(
    tests/kernels/test_coded_message.py tests/kernels/test_worker_threads.py tests/kernels/test_dither.py
    tests/kernels/test_codec.py tests/kernels/test_rotation.py
)

usage() {
    cat <<'HELP'
Usage: launch/aarch64.sh --folder DIR [options]

Runs the CPU kernels under an emulated aarch64 processor (Graviton, Grace), and writes the digests of their messages to
DIR/aarch64.json, which launch/bench/targets.py --also aarch64 DIR/aarch64.json compares with those of x86-64:
ten minutes and more, mostly for compiling. It needs Debian 12 on x86-64, apt-get and pip, but no root.

Nothing is installed on this system: all that it downloads (some 350 MB, 1.3 GB unpacked) goes to DIR, which can be deleted
afterwards. It downloads, once:
  - qemu-user-static, Debian's emulator;
  - python3 for arm64 with the packages that it depends on, from this system's own Debian mirror;
  - wheels for aarch64 of torch 2.10.0, NumPy, Numba, llvmlite and what they import, from pip's index.

Options:
  --folder DIR   Where everything is kept, compiled kernels too. A second run downloads and compiles nothing again.
  --count N      Coordinates of a message (default: those of launch/bench/message_digests.py).
  --tests        Run the kernels' tests that fit into half an hour, in place of the digests.
  -h, --help     Show this help.
HELP
}

say() { printf '%s\n' "$*"; }

fail() {
    printf 'aarch64.sh: %s\n' "$*" >&2
    exit 1
}

parse_arguments() {
    FOLDER='' COUNT=() WHAT=digests
    while (($#)); do
        case $1 in
            --folder | --count)
                (($# >= 2)) || fail "$1 needs a value; see --help"
                if [[ $1 == --folder ]]; then FOLDER=$2; else COUNT=(--count "$2"); fi
                shift
                ;;
            --tests) WHAT=tests ;;
            -h | --help) usage && exit ;;
            *) fail "unknown option '$1'; see --help" ;;
        esac
        shift
    done
    [[ -n $FOLDER ]] || fail "--folder DIR says where everything is kept; see --help"
}

# Once: NAME is done by COMMAND... in the folder.
once() { # NAME COMMAND...
    if [[ -e $FOLDER/$1.done ]]; then return; fi
    say "== $1"
    (cd "$FOLDER" && "${@:2}")
    touch "$FOLDER/$1.done"
}

# apt-get with a state of its own, in which nothing is installed, for arm64.
arm64_apt() { # ARGUMENTS OF APT-GET
    apt-get -q -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Sandbox::User= \
        -o Dir::State="$FOLDER/apt/state" -o Dir::State::status="$FOLDER/apt/status" -o Dir::Cache="$FOLDER/apt/cache" "$@"
}

unpack() { # FOLDER PACKAGE...
    local package
    for package in "${@:2}"; do
        # Debian's /lib and /bin are links, which must not become folders.
        dpkg-deb --fsys-tarfile "$package" | tar -x --keep-directory-symlink -C "$1"
    done
}

make_emulator() {
    mkdir -p emulator
    (cd emulator && apt-get -q download -o APT::Sandbox::User= qemu-user-static)
    dpkg-deb --fsys-tarfile emulator/qemu-user-static_*.deb | tar -x -C emulator ./usr/bin/qemu-aarch64-static
}

make_python() {
    mkdir -p apt/state/lists/partial apt/cache/archives/partial system/usr/{lib,bin,sbin}
    : >apt/status
    ln -sfn usr/lib system/lib
    ln -sfn usr/bin system/bin
    ln -sfn usr/sbin system/sbin
    arm64_apt update
    arm64_apt -y --no-install-recommends --download-only install python3 libgomp1 libstdc++6
    unpack system apt/cache/archives/*.deb
}

make_packages() {
    local python constraints=$FOLDER/constraints.txt platform=() version
    python=$(basename "$(echo "$FOLDER"/system/usr/bin/python3.[0-9]*)")
    for version in 2_28 2_27 2_17; do platform+=(--platform "manylinux_${version}_aarch64"); done
    platform+=(--platform manylinux2014_aarch64)
    grep -v '^torch==' "$CONSTRAINTS" >"$constraints"
    # Without dependencies, since pip would take those of this processor.
    python3 -m pip install -q --no-deps --only-binary=:all: --target packages "${platform[@]}" \
        --python-version "${python#python}" -c "$constraints" "$TORCH" "${NEEDED[@]}" "${NEEDED_BY_TESTS[@]}"
}

emulated_python() { # ARGUMENTS OF PYTHON
    # Lower priority: it keeps one processor busy for long.
    PYTHONPATH=$ROOT:$ROOT/kernels:$FOLDER/packages PYTHONDONTWRITEBYTECODE=1 NUMBA_CACHE_DIR=$FOLDER/kernels \
        OMP_NUM_THREADS=1 nice -n 10 "$FOLDER/emulator/usr/bin/qemu-aarch64-static" -L "$FOLDER/system" \
        "$FOLDER"/system/usr/bin/python3.[0-9]* "$@"
}

main() {
    parse_arguments "$@"
    [[ $(uname -m) == x86_64 ]] || fail "this is $(uname -m); the command emulates aarch64 on x86-64"
    mkdir -p "$FOLDER"
    FOLDER=$(cd "$FOLDER" && pwd -P)
    once emulator make_emulator
    once python make_python
    once packages make_packages
    cd "$ROOT"
    if [[ $WHAT == tests ]]; then
        emulated_python -m pytest -p no:cacheprovider --timeout 1800 -q "${KERNEL_TESTS[@]}"
    else
        say "== digests"
        emulated_python launch/bench/message_digests.py "${COUNT[@]}" >"$FOLDER/aarch64.json.part"
        mv "$FOLDER/aarch64.json.part" "$FOLDER/aarch64.json"
        say "$FOLDER/aarch64.json"
    fi
}

main "$@"
