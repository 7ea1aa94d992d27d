#!/usr/bin/env bash
# Builds a wheel of Horovod 0.28.1 against the PyTorch that is installed; see --help.
set -euo pipefail

CONSTRAINTS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/constraints.txt
readonly CONSTRAINTS
readonly HOROVOD_VERSION=0.28.1
readonly SDIST_SHA256=92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0
# What to do with a file, in sed's words; why is explained by --help.
readonly NEEDS_CXX20='s/set(CMAKE_CXX_STANDARD 14)/set(CMAKE_CXX_STANDARD 20)/'
readonly RECEIVE_THEN_SEND='125{h;d};126G;133{h;d};134G'
readonly RECEIVE_ALL_THEN_SEND='148{p;h;d};149{H;d};151,152{H;d};155{p;x;G}'
# Each file that is changed: sha256 before that (it vouches for the line numbers above), path, what to do.
readonly PATCHES="\
bd359fa17a149c61030e3b64cedd6c7237ddccd1b4f20acc900adda013e60a9a  CMakeLists.txt  $NEEDS_CXX20
5e5ba9ee3e32ef26b58f0e2af1236098c674b39a8d5825b32942a3173dead6fc  horovod/torch/CMakeLists.txt  $NEEDS_CXX20
7d840cc1890c45dcd2531c4159e7565ea096aaa32be55b1182ad4bcf174f0989  third_party/gloo/gloo/allgatherv.cc  $RECEIVE_THEN_SEND
a0dedee45528ecbf2293f81be56c2e90aa80361ef25ba0e091718dfdc63f7a44  third_party/gloo/gloo/alltoallv.cc  $RECEIVE_ALL_THEN_SEND"
# Variables that Horovod's build reads, as opposed to those that it reads when it runs.
readonly BUILD_OPTIONS='^HOROVOD_((WITH|WITHOUT)_[A-Z]+|GPU|GPU_[A-Z]+|CPU_OPERATIONS|CUDA_HOME|ROCM_HOME|NCCL_(HOME|INCLUDE|LIB|LINK)|NVTX_INCLUDE|ALLOW_MIXED_GPU_IMPL|BUILD_[A-Z_]+|DEBUG)='
# What Horovod's own build imports, beside PyTorch.
readonly BUILD_PACKAGES=(setuptools wheel packaging cffi cloudpickle psutil pyyaml)

usage() {
    cat <<'HELP'
Usage: launch/build_horovod.sh [options]

Builds a wheel of Horovod 0.28.1 with PyTorch support and prints the wheel's path as the last line of its output.
The program downloads the source distribution with pip, verifies its checksum and those of the files to change, changes
them, and builds. What it changes:
  - Horovod asks for C++14, PyTorch's headers need C++20.
  - Gloo's all-gather and all-to-all tell a peer that they are ready to receive only after what they send to it has been
    queued. Of two ranks the later one then sends first and the other one afterwards, so a link carries one direction
    at a time and takes twice as long. Here they get ready to receive first; what travels is the same, and ranks with
    and without the change understand each other.

Options:
  --python PATH  Python that has PyTorch, and that the wheel is for (default: .venv of this project, else python3).
  --out DIR      Also put the wheel there. Without a cache the default is the current directory.
  --sdist FILE   Use this horovod-0.28.1.tar.gz; nothing is downloaded.
  --no-cache     Build anew, and leave the cache alone.
  --verbose      Show the build's output while it runs.
  --check        Only check that the compiler, CMake and Python's headers are there.
  -h, --help     Show this help.

Environment:
  HOROVOD_*        Horovod's own build options are passed on. The default is Gloo without MPI and without GPU
                   operations: the same as HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_MPI=1.
                     HOROVOD_GPU_OPERATIONS=NCCL   collectives on GPUs; needs CUDA's compiler and NCCL
                     HOROVOD_CUDA_HOME, HOROVOD_NCCL_HOME, HOROVOD_BUILD_CUDA_CC_LIST   where CUDA and NCCL are, and
                                                   for which GPUs
                     HOROVOD_WITH_MPI=1            with MPI, beside Gloo
                     HOROVOD_WITHOUT_GLOO=1        without Gloo
                     HOROVOD_BUILD_ARCH_FLAGS      for example "-mavx -mf16c"; the default is what this machine's
                                                   processor has, so build on the oldest one of a mixed cluster
  MAKEFLAGS        Passed on; the default is one job for each processor core.
  HVD_QODA_CACHE   Folder of built wheels, one for each combination of PyTorch, Python and build options
                   (default: ${XDG_CACHE_HOME:-$HOME/.cache}/hvd-qoda). If it cannot be written to, it is not used.

Example: with NCCL and MPI, on a machine of the cluster:
  HOROVOD_GPU_OPERATIONS=NCCL HOROVOD_WITH_MPI=1 launch/build_horovod.sh --python python3 --out wheels
HELP
}

say() { printf '%s\n' "$*" >&2; }

fail() {
    say "build_horovod.sh: $*"
    exit 1
}

default_python() {
    local project_python
    project_python=$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/python
    if [[ -x $project_python ]]; then echo "$project_python"; else echo python3; fi
}

parse_arguments() {
    PYTHON='' OUT='' SDIST='' USE_CACHE=yes VERBOSE=no ONLY_CHECK=no
    while (($#)); do
        case $1 in
            --python | --out | --sdist)
                (($# >= 2)) || fail "$1 needs a value; see --help"
                case $1 in
                    --python) PYTHON=$2 ;;
                    --out) OUT=$2 ;;
                    --sdist) SDIST=$2 ;;
                esac
                shift
                ;;
            --no-cache) USE_CACHE=no ;;
            --verbose) VERBOSE=yes ;;
            --check) ONLY_CHECK=yes ;;
            -h | --help) usage && exit ;;
            *) fail "unknown option '$1'; see --help" ;;
        esac
        shift
    done
    PYTHON=${PYTHON:-$(default_python)}
}

set_build_options() {
    export HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1
    unset HOROVOD_WITHOUT_PYTORCH HOROVOD_WITH_TENSORFLOW HOROVOD_WITH_MXNET
    if [[ ${HOROVOD_WITHOUT_GLOO:-} != 1 ]]; then export HOROVOD_WITH_GLOO=1; fi
    if [[ ${HOROVOD_WITH_MPI:-} != 1 ]]; then export HOROVOD_WITHOUT_MPI=1; fi
    if [[ ${HOROVOD_WITHOUT_GLOO:-} == 1 && ${HOROVOD_WITHOUT_MPI:-} == 1 ]]; then
        fail "HOROVOD_WITHOUT_GLOO=1 leaves no way to talk: set HOROVOD_WITH_MPI=1 as well"
    fi
}

build_options() { env | grep -E "$BUILD_OPTIONS" | LC_ALL=C sort; }

# --- What the build needs --------------------------------------------------------------------------------------------

check_tools() {
    local tool
    for tool in "${CXX:-g++}" "${HOROVOD_CMAKE:-cmake}" make; do
        command -v "$tool" >/dev/null ||
            fail "'$tool' was not found: install g++, make and CMake 3.13 or newer (Debian and Ubuntu: apt install g++ make cmake)"
    done
}

check_python() {
    "$PYTHON" -c '' 2>/dev/null || fail "'$PYTHON' does not run: name another Python with --python"
}

check_python_headers() {
    "$PYTHON" - <<'PY' || fail "'$PYTHON' cannot compile extensions: install Python's headers (Debian and Ubuntu: apt install python3-dev)"
import pathlib, sys, sysconfig
sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())
PY
}

check_torch() {
    [[ -z $(missing_packages torch) ]] || fail "'$PYTHON' has no PyTorch: install it first, because Horovod is built against it"
}

missing_packages() { # PACKAGES...
    "$PYTHON" - "$@" <<'PY'
import sys
from importlib.metadata import PackageNotFoundError, version

for package in sys.argv[1:]:
    try:
        version(package)
    except PackageNotFoundError:
        print(package)
PY
}

# The environment itself gets nothing: what it lacks for the build goes into the folder WORK.
get_build_packages() {
    local missing
    mapfile -t missing < <(missing_packages "${BUILD_PACKAGES[@]}")
    if ((${#missing[@]} == 0)); then return; fi
    say "Downloading what the build needs: ${missing[*]}"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --constraint "$CONSTRAINTS" --target "$WORK/packages" \
        "${missing[@]}" >&2 || fail "pip could not install ${missing[*]}, which the build needs"
    export PYTHONPATH=$WORK/packages${PYTHONPATH:+:$PYTHONPATH}
}

# --- The cache -------------------------------------------------------------------------------------------------------

cache_folder() {
    local root=${HVD_QODA_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/hvd-qoda} platform recipe
    platform=$("$PYTHON" -c 'import platform, sys, torch
print(f"torch{torch.__version__}-cp{sys.version_info[0]}{sys.version_info[1]}-{platform.machine()}")')
    recipe=$({ build_options && echo "$PATCHES"; } | sha256sum)
    echo "$root/horovod-$HOROVOD_VERSION/$platform-${recipe::12}"
}

find_wheel() { # FOLDER
    if [[ -d $1 ]]; then find "$1" -maxdepth 1 -name '*.whl' -print -quit; fi
}

# A wheel appears in a folder under its name only when it is complete: several builds may run at once.
put_wheel() { # WHEEL FOLDER
    local name=${1##*/}
    mkdir -p "$2" && cp "$1" "$2/.$name.$$" && mv "$2/.$name.$$" "$2/$name"
}

# --- The build -------------------------------------------------------------------------------------------------------

verify() { # SHA256 FILE
    local found
    found=$(sha256sum <"$2") && found=${found%% *}
    [[ $found == "$1" ]] || fail "${2##*/} is not the file of Horovod $HOROVOD_VERSION that this program can patch:
  expected sha256 $1
  found    sha256 $found"
}

get_source() { # FOLDER
    local sdist=$SDIST
    if [[ -z $sdist ]]; then
        say "Downloading the source distribution of Horovod $HOROVOD_VERSION"
        "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --no-build-isolation --use-pep517 \
            --no-binary horovod --dest "$1" "horovod==$HOROVOD_VERSION" >&2
        sdist=$1/horovod-$HOROVOD_VERSION.tar.gz
    fi
    [[ -f $sdist ]] || fail "there is no file '$sdist'"
    verify "$SDIST_SHA256" "$sdist"
    tar -xzf "$sdist" -C "$1"
}

patch_source() { # SOURCE
    local sha256 file change
    while read -r sha256 file change; do
        verify "$sha256" "$1/$file"
        sed -i "$change" "$1/$file"
    done <<<"$PATCHES"
}

compile() { # SOURCE FOLDER LOG
    # GCC 13 and newer need <cstdint> included by name, and CMake 4 refuses the version that Gloo's CMakeLists.txt asks for.
    CXXFLAGS="${CXXFLAGS:-} -include cstdint" CMAKE_POLICY_VERSION_MINIMUM=3.5 MAKEFLAGS="${MAKEFLAGS:--j$(nproc)}" \
        "$PYTHON" -m pip wheel --verbose --disable-pip-version-check --no-cache-dir --no-deps --no-build-isolation \
        --use-pep517 --wheel-dir "$2" "$1" >"$3" 2>&1
}

# Leaves the wheel in the folder WORK, which is removed when the program ends.
build_wheel() {
    local source log
    check_tools
    check_python_headers
    WORK=$(mktemp -d -t hvd-qoda.XXXXXX)
    trap 'rm -rf "$WORK"' EXIT
    source=$WORK/horovod-$HOROVOD_VERSION
    log=$WORK/build.log
    get_build_packages
    get_source "$WORK"
    patch_source "$source"
    say "Building Horovod $HOROVOD_VERSION, which takes some minutes, with: $(build_options | tr '\n' ' ')"
    if [[ $VERBOSE == yes ]]; then log=/dev/stderr; fi
    compile "$source" "$WORK" "$log" || report_failure "$log"
}

report_failure() { # LOG
    local kept_log
    if [[ -f $1 ]]; then
        kept_log=$(mktemp -t horovod-build.XXXXXX.log)
        cp "$1" "$kept_log"
        grep -E -m 3 -A 3 'CMake Error|error:' "$1" >&2 || tail -n 20 "$1" >&2
        if grep -q 'Could NOT find CUDAToolkit' "$1"; then
            say "Horovod follows PyTorch, whose build here is for CUDA, and CUDA's headers and libraries are not all there:"
            say "install CUDA's whole toolkit, or PyTorch's CPU build"
        fi
        say "The whole output is in $kept_log"
    fi
    fail "the build failed"
}

main() {
    local folder='' wheel=''
    parse_arguments "$@"
    set_build_options
    check_python
    if [[ $ONLY_CHECK == yes ]]; then
        check_tools
        check_python_headers
        exit
    fi
    check_torch
    if [[ $USE_CACHE == yes ]]; then
        folder=$(cache_folder)
        wheel=$(find_wheel "$folder")
    fi
    if [[ -n $wheel ]]; then
        say "This wheel of Horovod was built before: $wheel"
    else
        build_wheel
        wheel=$(find_wheel "$WORK")
        if [[ -n $folder ]] && put_wheel "$wheel" "$folder" 2>/dev/null; then
            wheel=$folder/${wheel##*/}
        else
            OUT=${OUT:-$PWD}
        fi
    fi
    if [[ -n $OUT ]]; then
        put_wheel "$wheel" "$OUT"
        wheel=$(cd "$OUT" && pwd)/${wheel##*/}
    fi
    echo "$wheel"
}

main "$@"
