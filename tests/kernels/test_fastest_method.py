"""The choice among ways to the same bits: by a clock, kept on disk for each processor."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from qoda_kernels import fastest_method
from qoda_kernels.cpu.level_tables import WAYS
from qoda_kernels.fastest_method import Choices, look_up_way, search_method, search_methods


class Runs:
    """Ways that take a known time by a clock of their own, but mostly a longer one, because of other work."""

    def __init__(self, seconds: Mapping[str, float]) -> None:
        self.now = 0.0
        self.started: list[str] = []
        self._seconds = seconds

    def clock(self) -> float:
        return self.now

    def run_of(self, name: str) -> Callable[[], None]:
        def run() -> None:
            self.started.append(name)
            disturbance = 10.0 if len(self.started) % 5 else 0.0
            self.now += self._seconds[name] + disturbance

        return run


def test_the_fastest_way_is_chosen_though_other_work_disturbs() -> None:
    runs = Runs({"slow": 3.0, "fast": 1.0, "middle": 2.0})
    choices = Choices(None, runs.clock, {})
    assert choices.fastest("do it", ["slow", "fast", "middle"], runs.run_of) == "fast"
    assert choices.made == {"do it": "fast"}


def test_of_equals_the_preferred_one_is_chosen() -> None:
    runs = Runs({"first": 1.0, "second": 1.0})
    assert Choices(None, runs.clock, {}).fastest("do it", ["first", "second"], runs.run_of) == "first"


def test_one_candidate_is_not_timed() -> None:
    runs = Runs({"only": 1.0})
    assert Choices(None, runs.clock, {}).fastest("do it", ["only"], runs.run_of) == "only"
    assert not runs.started


def test_what_was_measured_is_kept_on_disk(tmp_path: Path) -> None:
    file = tmp_path / "methods.json"
    runs = Runs({"a": 2.0, "b": 1.0})
    assert Choices.load(file, runs.clock).fastest("do it", ["a", "b"], runs.run_of) == "b"
    assert json.loads(file.read_text()) == {"do it": "b"}
    assert list(tmp_path.iterdir()) == [file]
    count = len(runs.started)
    assert Choices.load(file, runs.clock).fastest("do it", ["a", "b"], runs.run_of) == "b"
    assert len(runs.started) == count
    # An answer that is no candidate any more is measured anew.
    assert Choices.load(file, runs.clock).fastest("do it", ["a", "c"], Runs({"a": 1.0, "c": 2.0}).run_of) == "a"


@pytest.mark.parametrize("content", ["", "[]", "{", '{"do it": 3}', "\x00", '"b"'])
def test_a_damaged_file_is_measured_anew(tmp_path: Path, content: str) -> None:
    file = tmp_path / "methods.json"
    file.write_text(content)
    runs = Runs({"a": 2.0, "b": 1.0})
    assert Choices.load(file, runs.clock).fastest("do it", ["a", "b"], runs.run_of) == "b"
    assert json.loads(file.read_text()) == {"do it": "b"}


def test_without_a_place_to_keep_it_each_process_measures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runs = Runs({"a": 2.0, "b": 1.0})
    choices = Choices.load(tmp_path / "absent" / "methods.json", runs.clock)
    with caplog.at_level(logging.INFO, logger="qoda_kernels"):
        assert choices.fastest("do it", ["a", "b"], runs.run_of) == "b"
    assert "each process measures anew" in caplog.text
    count = len(runs.started)
    assert choices.fastest("do it", ["a", "b"], runs.run_of) == "b"
    assert len(runs.started) == count


@pytest.mark.parametrize("bits", [4, 8])
def test_this_processor_is_measured(bits: int) -> None:
    assert search_method(bits) in search_methods(bits)
    assert look_up_way(bits) in WAYS


def test_choices_of_two_processors_lie_in_two_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """A home folder may be shared by machines of different kinds."""
    own = fastest_method._choices().file
    fastest_method._choices.cache_clear()
    monkeypatch.setattr(fastest_method, "target", lambda: ("x86_64", "another", frozenset()))
    other = fastest_method._choices().file
    fastest_method._choices.cache_clear()
    assert own is not None
    assert other is not None
    assert own.parent == other.parent
    assert own.name != other.name
