#!/usr/bin/env bash
# Sets up, then runs the demonstration.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
if [[ ${1:-} == --help || ${1:-} == -h ]] && ! [[ -x .venv/bin/python ]]; then
    cat <<'HELP'
Usage: launch/demo.sh [arguments of launch/train/demo.py]

Sets up with launch/setup.sh (some minutes the first time), then trains on two ranks with fp32 and with 5-bit gradients
and compares them. After the set-up, --help explains the options.
HELP
    exit
fi
launch/setup.sh
exec .venv/bin/python launch/train/demo.py "$@"
