"""The command `hvd-qoda`: its numbers, its tables, and that mistakes are named."""

import json
import math
from contextlib import nullcontext
from typing import Any

import pytest
from rich.console import Console

from hvd_qoda import advise, check, cli, measurement
from hvd_qoda.cost_model import CodecSpeed, Link, Ranks
from hvd_qoda.hosts import Hosts
from hvd_qoda.transport import LocalTransport
from qoda_kernels.cpu import target as processor_target
from qoda_kernels.fastest_method import search_methods


@pytest.fixture
def codec(monkeypatch: pytest.MonkeyPatch) -> CodecSpeed:
    """A codec of known speed, for predictions that do not depend on this machine."""
    speed = CodecSpeed(encode_s=1e-9, decode_s=5e-10, call_s=1e-5)
    for module in (advise, check):
        monkeypatch.setattr(module, "measure_codec", lambda *arguments, **keywords: speed)
    return speed


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert cli.main([*arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_advise_predicts_every_size_bandwidth_and_number_of_ranks(
    codec: CodecSpeed, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ("--elements", "1000000", "25000000", "--mbit", "100", "100000", "--ranks", "2", "8")
    found = run_json(capsys, "advise", *sizes)
    assert found["kind"] == "prediction"
    assert found["here"] is None
    cells = {(cell["ranks"], cell["elements"], cell["mbit"]): cell for cell in found["cells"]}
    assert len(cells) == 8
    slow, fast = cells[2, 25_000_000, 100.0], cells[2, 25_000_000, 100_000.0]
    assert slow["scheme"] == "allgather"
    assert 5.5 < slow["speedup"] < 6.4
    assert cells[8, 25_000_000, 100.0]["scheme"] == "reduce_scatter"
    assert fast["scheme"] == "off"
    assert fast["speedup"] == 1.0
    assert all(100.0 < cell["break_even_mbit"] < 100_000.0 for cell in cells.values())
    assert slow["break_even_mbit"] == fast["break_even_mbit"]


def test_advise_says_what_is_best_where_it_is_launched(
    codec: CodecSpeed, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(advise, "launched_ranks", lambda: nullcontext(LocalTransport()))
    monkeypatch.setattr(advise, "measure_link", lambda transport, hosts: Link.of(Ranks(4, 2), 1e-4, 1e8))
    monkeypatch.setattr(advise, "gather_hosts", lambda transport: Hosts((0, 0, 1, 1)))
    assert cli.main(["advise", "--elements", "25000000", "--ranks", "2", "--mbit", "1000"]) == 0
    text = capsys.readouterr().out
    # The answer, then the link at hand, then the general tables.
    assert text.startswith('25M parameters: exchange="')
    assert " times as fast as fp32." in text
    assert text.index("Here: 4 ranks on 2 host(s), link measured") < text.index("Prediction for 5 bits")
    here = run_json(capsys, "advise", "--elements", "25000000", "--ranks", "2", "--mbit", "1000")["here"]
    assert here["schemes"] == ["off", "fp16", "allgather", "reduce_scatter", "hierarchical"]
    (row,) = here["rows"]
    assert row["scheme"] == min(set(here["schemes"]) - {"fp16"}, key=row["seconds"].get)


def test_advise_says_so_where_gradients_are_best_left_alone(
    codec: CodecSpeed, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(advise, "launched_ranks", lambda: nullcontext(LocalTransport()))
    monkeypatch.setattr(advise, "measure_link", lambda transport, hosts: Link.of(Ranks(2, 1), 1e-5, 1e12))
    monkeypatch.setattr(advise, "gather_hosts", lambda transport: Hosts((0, 1)))
    assert cli.main(["advise", "--elements", "25000000", "--ranks", "2", "--mbit", "1000"]) == 0
    assert capsys.readouterr().out.startswith("25M parameters: leave gradients alone")


def test_advise_prints_tables(codec: CodecSpeed, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["advise", "--ranks", "4", "16", "--ranks-per-host", "2", "--mbit", "1000", "--latency-us", "100"]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert text.startswith("4 ranks: 5 bits pay on links up to ")
    for words in ("Prediction for 5 bits", "16 ranks", "1 Gbit/s", "break-even", "hierarchical", "measure the link"):
        assert words in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mbit", "0"], "--mbit 0: must be positive"),
        (["--latency-us", "-1"], "--latency-us -1: must not be negative"),
        (["--ranks", "3", "--ranks-per-host", "2"], "cannot lie on hosts"),
        (["--bits", "9"], "bits"),
        (["--bits", "32"], "no compression"),
    ],
)
def test_impossible_options_are_named(
    codec: CodecSpeed, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert cli.main(["advise", *arguments]) == 1
    assert words in capsys.readouterr().err


def test_check_tells_what_is_there(
    codec: CodecSpeed, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Importing DeepSpeed takes long.
    monkeypatch.setattr(check, "_deepspeed", lambda: {"says": "not installed", "problem": None, "warnings": []})
    found = run_json(capsys, "check")
    assert found["packages"]["torch"]
    assert set(found["hosts"]) == {"horovod", "deepspeed"}
    assert found["codec"]["encode_s"] == codec.encode_s
    assert found["processor"]["vectors"] == processor_target.vector_extension()[0]
    assert found["processor"]["search"] in search_methods(5)
    assert found["link"] is None


@pytest.mark.parametrize(
    ("triple", "features", "expected"),
    [
        ("x86_64-unknown-linux-gnu", {"avx", "avx2", "fma", "avx512f"}, ("AVX-512", 16)),
        ("x86_64-unknown-linux-gnu", {"avx", "avx2", "fma"}, ("AVX2", 8)),
        ("x86_64-unknown-linux-gnu", {"avx"}, ("AVX", 8)),
        ("x86_64-unknown-linux-gnu", {"sse3"}, ("SSE", 4)),
        ("aarch64-unknown-linux-gnu", {"neon"}, ("NEON", 4)),
    ],
)
def test_check_names_the_processors_vectors(
    monkeypatch: pytest.MonkeyPatch, triple: str, features: set[str], expected: tuple[str, int]
) -> None:
    monkeypatch.setattr(processor_target, "target", lambda: (triple, "some-processor", frozenset(features)))
    assert processor_target.vector_extension() == expected
    names = {"vectors": expected[0], "numbers_at_once": expected[1]}
    line = check._processor_line({**names, "target": "some-processor", "search": "cells", "look_up": "loads"})
    assert line.startswith(f"{expected[0]}, {expected[1]} numbers at once (some-processor): ")
    assert line.endswith("levels are found in cells, looked up in loads")


AVX2 = {"avx2", "fma"}


@pytest.mark.parametrize(
    ("variables", "left_out", "warning"),
    [
        ({}, set(), None),
        ({}, {"avx512f"}, "AVX-512 of this processor not used because of Numba's setting NUMBA_ENABLE_AVX"),
        ({"NUMBA_CPU_NAME": "haswell"}, set(), "whatever the name"),
        ({"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma"}, set(), None),
        ({"NUMBA_CPU_FEATURES": ""}, AVX2, "AVX2, fused multiply-add of this processor not used because of NUMBA_CPU_"),
    ],
)
def test_check_tells_what_numbas_variables_leave_out(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], left_out: set[str], warning: str | None
) -> None:
    for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(check, "left_out", lambda: frozenset(left_out))
    found = check._warning_of_numba()
    assert found is None if warning is None else warning in str(found)


def test_check_tells_whether_gpus_can_code_gradients(
    codec: CodecSpeed, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    works = {"says": "not installed", "problem": None, "warnings": []}
    monkeypatch.setattr(check, "_horovod", lambda: works)
    monkeypatch.setattr(check, "_deepspeed", lambda: works)
    monkeypatch.setattr(check, "_gpus", lambda: ["first", "second"])
    monkeypatch.setattr(check, "runtime_of", lambda device: device)
    problems = {0: None, 1: "no such driver"}
    monkeypatch.setattr(check, "checked_problem", lambda runtime, books, dtypes: problems[runtime.index])
    assert run_json(capsys, "check")["coding_on_gpus"] == [None, "no such driver"]
    assert cli.main(["check"]) == 0
    text = capsys.readouterr().out
    assert "passed the self check" in text
    assert "no such driver" in text


def test_check_fails_where_something_installed_does_not_work(
    codec: CodecSpeed, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = {"says": None, "problem": "does not work: undefined symbol", "warnings": []}
    monkeypatch.setattr(check, "_horovod", lambda: broken)
    monkeypatch.setattr(check, "_deepspeed", lambda: {"says": "not installed", "problem": None, "warnings": []})
    assert cli.main(["check"]) == 1
    text = capsys.readouterr().out
    assert "undefined symbol" in text
    assert "Broken: Horovod" in text


def test_check_takes_the_middle_of_several_measurements(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first comes while the machine still does other work."""
    nanoseconds = iter([25.7, 4.3, 4.2, 4.4, 9.5])
    monkeypatch.setattr(
        check,
        "measure_codec",
        lambda *arguments, **keywords: CodecSpeed(encode_s=1e-9 * next(nanoseconds), decode_s=1e-9, call_s=1e-5),
    )
    for name in ("_horovod", "_deepspeed"):
        monkeypatch.setattr(check, name, lambda: {"says": "works", "problem": None, "warnings": ["it is old"]})
    found = check.run(cli._parser().parse_args(["check"]))[0]
    speeds = [1e9 * found["codec"][f"{which}encode_s"] for which in ("", "fastest_", "slowest_")]
    assert speeds == pytest.approx([4.4, 4.2, 25.7])
    # 27 bits of 32 are saved for 5.4 ns.
    assert "slower than about 5 Gbit/s" in found["verdict"][-1]
    check.show(found, Console(width=120))
    text = capsys.readouterr().out
    assert "4.40 ns to encode" in text
    assert "it is old" in text


def test_hosts_are_tried_in_processes_of_their_own() -> None:
    assert check._host("no_such_package", "", "", "")["says"] == "not installed"
    assert check._host("json", "print('x')", "has {}", "")["says"] == "has x"
    program = "import warnings; warnings.warn('built for another torch'); print('x')"
    (warning,) = check._host("json", program, "has {}", "")["warnings"]
    assert "built for another torch" in warning
    problem = check._host("json", "raise OSError('broken pipe of tea')", "", "build it again")["problem"]
    assert problem == "does not work: OSError: broken pipe of tea; build it again"


def test_a_command_is_needed_and_help_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([])
    assert caught.value.code == 2
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert "advise" in text
    assert "check" in text


def test_the_fitted_codebook_is_like_adaptive_ones() -> None:
    book = measurement.fitted_codebook(5)
    gaps = [b - a for a, b in zip(book.levels, book.levels[1:], strict=False)]
    assert gaps == sorted(gaps)
    assert math.isclose(book.levels[-1], 1.0)
