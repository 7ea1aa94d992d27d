"""Every program explains itself, takes the options that all have in common, and leaves with a message when misused."""

import argparse
import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("horovod.torch")

from launch.train.options import LEARNING_RATES, build_parser, parse_options

ROOT = Path(__file__).resolve().parents[2]
# Started by other programs, with arguments that nobody types.
STARTED_BY_OTHERS = {
    "launch/bench/end_to_end_ranks.py",
    "launch/bench/exchange_ranks.py",
    "launch/bench/fault_ranks.py",
    "launch/bench/long_run_ranks.py",
    "launch/packet_delay.py",
}
PROGRAMS = sorted(
    {str(path.relative_to(ROOT)) for path in (ROOT / "launch").rglob("*.py") if "__main__" in path.read_text()}
    - STARTED_BY_OTHERS
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def parser_of(program: str, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """The parser that a program makes, caught as it begins to parse."""
    caught: list[Any] = []

    def catch(self: argparse.ArgumentParser, *_: object, **__: object) -> None:
        caught.append(self)
        raise SystemExit(0)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", catch)
    with pytest.raises(SystemExit):
        importlib.import_module(program.removesuffix(".py").replace("/", ".")).main([])
    parser: argparse.ArgumentParser = caught[0]
    return parser


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_is_shown_from_the_file_itself(program: str) -> None:
    outcome = run(program, "--help")
    assert outcome.returncode == 0, outcome.stderr
    assert "--json PATH" in outcome.stdout
    assert "--seed" in outcome.stdout
    assert str(ROOT) not in outcome.stdout


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_option_is_explained_and_its_default_shown(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = parser_of(program, monkeypatch)
    options = {option for action in parser._actions for option in action.option_strings}
    assert {"--json", "--seed", "--help"} <= options
    unexplained = [action.option_strings for action in parser._actions if not action.help or len(action.help) < 10]
    assert unexplained == []
    shown = re.sub(r"\s+", "", parser.format_help())
    for action in parser._actions:
        if action.default not in (None, argparse.SUPPRESS):
            assert re.sub(r"\s+", "", f"(default: {action.default})") in shown


def test_defaults_of_the_training_program() -> None:
    options = parse_options("", [])
    assert options.epochs == 1.0
    assert options.steps is None
    assert (options.compression, options.bits, options.bucket_size, options.levels) == ("qoda", 5, 512, "adaptive")
    assert options.learning_rate == LEARNING_RATES["qodadam"]
    assert parse_options("", ["--optimizer", "sgd"]).learning_rate == LEARNING_RATES["sgd"]
    assert parse_options("", ["--steps", "7"]).epochs is None


@pytest.mark.parametrize(
    "arguments",
    [
        ["--bits", "9"],
        ["--steps", "0"],
        ["--steps", "3", "--epochs", "1"],
        ["--update-levels-at", "5,3"],
        ["--update-levels-at", "0"],
        ["--model-size", "huge"],
        ["--optimizer", "lion"],
        ["--learning-rate", "0"],
        ["--seed", "-1"],
        ["--unknown"],
    ],
)
def test_impossible_options_are_refused_with_a_message(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        build_parser("").parse_args(arguments)
    assert leaving.value.code == 2
    assert "error:" in capsys.readouterr().err
