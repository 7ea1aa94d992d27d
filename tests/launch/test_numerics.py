"""The programs that count what goes wrong with extreme numbers and with damaged messages, on some cases."""

import json
from pathlib import Path

import numpy as np
import pytest

from launch.bench import damage, numerics
from qoda_kernels.codec import Codec


def test_ten_thousand_finite_buckets_of_every_dtype(tmp_path: Path) -> None:
    path = tmp_path / "numerics.json"
    assert numerics.main(["--cases", "10000", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["dtype"], row["cases"], row["failed"]) for row in rows] == [(d, 10_000, 0) for d in numerics.DTYPES]


@pytest.mark.parametrize("change", [1.02, np.inf])
def test_a_bias_and_an_overflow_would_be_found(change: float, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Codec.decode_mean

    def wrong(self: Codec, *arguments: object) -> object:
        return [values * change for values in right(self, *arguments)]

    monkeypatch.setattr(Codec, "decode_mean", wrong)
    assert numerics.measure("float32", 2000, seed=0).failed > 200


@pytest.mark.parametrize("coding", damage.CODINGS)
@pytest.mark.parametrize("name", list(damage.CODEBOOKS))
def test_damage_is_found_and_what_is_sealed_again_stays_in_bounds(name: str, coding: str) -> None:
    row = damage.measure(name, coding, 400, seed=1)
    if row is None:
        assert coding == "huffman"
        return
    assert (row["messages"], row["accepted_wrongly"]) == (400, 0)
    # Sealed again, only what is too long or too short must be refused; of codes, most that do not end where they must.
    assert row["resealed_refused"] >= 100


def test_accepted_damage_would_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Codec, "_check_messages", lambda *arguments: None)
    monkeypatch.setattr(damage, "DAMAGE", damage.DAMAGE[:6])  # not those of another size
    row = damage.measure("uniform, 4 bits", "fixed", 60, seed=1)
    assert row is not None
    assert row["accepted_wrongly"] == 60


def test_the_checksum_misses_no_more_than_chance() -> None:
    """Half of it misses 1 of 2^16: Poisson, so within six standard deviations. What two sums cannot see is known."""
    every_pair, *rows, three_words = damage.checksum_rows(2**20, seed=1, words=24)
    assert every_pair["missed"] == 0
    assert three_words["missed"] == three_words["trials"]
    for row in rows:
        expected = row["missed_by_half_expected"]
        assert row["missed"] == 0
        for half in ("low", "high"):
            assert abs(row[f"missed_by_{half}_half"] - expected) < 6 * expected**0.5 + 6, row
