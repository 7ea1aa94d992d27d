"""Look at a DeepSpeed configuration, or at a checkpoint, before a run: python -m ds_plugin check ds_config.json."""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from ds_plugin.config import BLOCK, check_optimizer, check_sections, parse_block, read_file, refuse_unsupported
from ds_plugin.note import describe
from ds_plugin.versions import SUPPORTED
from hvd_qoda.errors import QodaError

NOT_READ = {"fusion_buffer_mb": "  (not read here: gradients travel in DeepSpeed's buckets)"}
USE = """In the training script: import ds_plugin before deepspeed.initialize(), and after it
    ds_plugin.require(engine)
which raises an error where nobody has read the block."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m ds_plugin", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help=f'say what a "{BLOCK}" block does, or what a checkpoint needs')
    check.add_argument("path", type=Path, help="a DeepSpeed configuration, JSON, or the folder of a checkpoint")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.path.is_dir():
            print(f"{describe(chosen.path)}\nDeepSpeed: {_installed()}")
            return 0
        return _check(chosen.path)
    except QodaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _check(path: Path) -> int:
    configuration = read_file(path)
    config = parse_block(configuration, str(path))
    if config is None:
        print(f'{path} has no block "{BLOCK}": gradients travel uncompressed', file=sys.stderr)
        return 1
    check_sections(configuration)
    refuse_unsupported(configuration, config)
    print(f'{path}, block "{BLOCK}", with the environment and the defaults:')
    for key, value in config.to_dict().items():
        print(f"  {key}: {value}{NOT_READ.get(key, '')}")
    print(f"DeepSpeed: {_installed()}")
    if importlib.util.find_spec("deepspeed") is not None and check_optimizer(configuration) is None:
        print("optimizer: none here; gradients are reduced only with one given to deepspeed.initialize()")
    print(USE)
    return 0


def _installed() -> str:
    try:
        import deepspeed
    except ImportError:
        return f"not installed (supported: {SUPPORTED})"
    return f"{deepspeed.__version__} (supported: {SUPPORTED}), all hooks found"


if __name__ == "__main__":
    sys.exit(main())
