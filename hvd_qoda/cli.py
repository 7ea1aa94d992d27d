"""The command `hvd-qoda`: what compression would bring (`advise`), what is installed (`check`), pictures (`report`)."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from hvd_qoda import advise, check, report
from hvd_qoda.errors import QodaError
from qoda_kernels import __version__

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, or 1 where something is wrong, or 2 for wrong arguments."""
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], tuple[dict[str, Any], int]] = options.run
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        found, status = run(options)
    except QodaError as error:
        print(f"hvd-qoda: {error}", file=sys.stderr)
        return 1
    if found.pop("silent", False):  # other ranks of a launched job have nothing to add
        return status
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        options.show(found, console)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hvd-qoda", description=__doc__)
    parser.add_argument("--version", action="version", version=f"hvd-qoda {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module in (advise, check, report):
        command = commands.add_parser(
            module.NAME,
            help=module.SUMMARY,
            description=module.__doc__,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        command.add_argument("--json", action="store_true", help="print JSON instead of tables")
        module.add_options(command)
        command.set_defaults(run=module.run, show=module.show)
    return parser


if __name__ == "__main__":
    sys.exit(main())
