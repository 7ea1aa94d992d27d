"""Codebooks: what exists, what is refused, digests."""

import pytest

from qoda_kernels.codebook import Codebook
from qoda_kernels.errors import CodebookError


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_code_word_is_a_sign_and_a_level_with_a_true_zero(bits: int) -> None:
    for codebook in (Codebook.uniform(bits), Codebook.exponential(bits)):
        assert len(codebook.levels) == 2 ** (bits - 1)
        assert codebook.levels[0] == 0
        assert codebook.levels[-1] == 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bits": 1}, "bits must be 2 to 8, or 32"),
        ({"bits": 9}, "got 9"),
        ({"bits": 4, "bucket_size": 100}, "multiple of 128"),
        ({"bits": 4, "bucket_size": 16384}, "between 128 and 8192"),
        ({"bits": 4, "norm": "l1"}, "norm must be one of max, l2; got 'l1'"),
        ({"bits": 4, "norm_format": "fp16"}, "norm_format must be one of fp32, bf16"),
    ],
)
def test_impossible_codebooks_are_refused(fields: dict, words: str) -> None:
    with pytest.raises(CodebookError, match=words):
        Codebook.uniform(**fields) if 2 <= fields["bits"] <= 8 else Codebook(**fields)


@pytest.mark.parametrize(
    "levels",
    [(0, 1), (0, 0.5, 0.4, 1), (0.1, 0.2, 0.5, 1), (0, 0.2, 0.5, 0.9), (0, float("nan"), 0.5, 1), (0, 1e-9, 1e-9, 1)],
)
def test_impossible_levels_are_refused(levels: tuple[float, ...]) -> None:
    with pytest.raises(CodebookError):
        Codebook(3, levels)


def test_exact_codebooks_have_no_levels() -> None:
    assert Codebook.exact().is_exact
    with pytest.raises(CodebookError, match="no levels"):
        Codebook(32, (0.0, 1.0))


def test_dictionary_round_trip_and_digest() -> None:
    codebook = Codebook.exponential(5, bucket_size=1024, norm="l2", norm_format="bf16").with_levels(
        [(j / 15) ** 1.7 for j in range(16)], version=3
    )
    assert Codebook.from_dict(codebook.to_dict()) == codebook
    others = [
        Codebook.from_dict({**codebook.to_dict(), **change})
        for change in ({"version": 4}, {"norm": "max"}, {"norm_format": "fp32"}, {"bucket_size": 512})
    ]
    assert len({codebook.digest, *(other.digest for other in others)}) == 5
