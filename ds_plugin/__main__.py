"""Look at a DeepSpeed configuration before a run: python -m ds_plugin check ds_config.json."""

import argparse
import sys
from collections.abc import Sequence

from ds_plugin.config import BLOCK, parse_block, read_file, refuse_unsupported
from ds_plugin.versions import SUPPORTED
from hvd_qoda.errors import QodaError

USE = """In the training script: import ds_plugin before deepspeed.initialize(), and after it
    ds_plugin.require(engine)
which raises an error where nobody has read the block."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m ds_plugin", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help=f'say what the "{BLOCK}" block of a configuration does')
    check.add_argument("configuration", help="a DeepSpeed configuration, JSON")
    chosen = parser.parse_args(arguments)
    try:
        return _check(chosen.configuration)
    except QodaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _check(path: str) -> int:
    configuration = read_file(path)
    config = parse_block(configuration, path)
    if config is None:
        print(f'{path} has no block "{BLOCK}": gradients travel uncompressed', file=sys.stderr)
        return 1
    refuse_unsupported(configuration, config)
    print(f'{path}, block "{BLOCK}", with the environment and the defaults:')
    for key, value in config.to_dict().items():
        print(f"  {key}: {value}")
    print(f"DeepSpeed: {_installed()}\n{USE}")
    return 0


def _installed() -> str:
    try:
        import deepspeed
    except ImportError:
        return f"not installed (supported: {SUPPORTED})"
    return f"{deepspeed.__version__} (supported: {SUPPORTED}), all hooks found"


if __name__ == "__main__":
    sys.exit(main())
