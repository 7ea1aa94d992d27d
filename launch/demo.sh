#!/usr/bin/env bash
# Sets up, then runs the demonstration. Arguments go to it; try launch/demo.sh --help.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
launch/setup.sh
exec .venv/bin/python launch/train/demo.py "$@"
