"""A codebook: the immutable description of how the coordinates of one layer type become code words.

A code word of b bits is a sign (its highest bit) and the index of a magnitude level (the other bits), with a true zero:
there are 2^(b-1) levels 0 = l_0 < l_1 < ... < 1, so 2^b - 2 intervals between -1 and 1. A coordinate v in a bucket of
norm N is sent as one of the two levels around |v| / N, at random, so that the mean is v (QSGD, arXiv 1610.02132;
non-uniform levels as in NUQSGD, arXiv 1908.06077, ALQ, and QODA, arXiv 2505.14371). A codebook that clips (`tails.py`)
has the same N for every bucket, its clip value: coordinates beyond it are sent as the last level, with a bias.

A codebook that rotates (`rotation.py`) does the same with rotated buckets. There, coordinates may also be rounded to
the nearest level, and N is chosen such that the mean over the rotations is v (EDEN, arXiv 2108.08842): unbiased as long
as rotations are random, though not for each of them.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from qoda_kernels.errors import CodebookError
from qoda_kernels.levels import check_levels, exponential_levels, uniform_levels
from qoda_kernels.rotation import ROTATED_BUCKET_SIZES

EXACT_BITS = 32
MIN_BITS, MAX_BITS = 2, 8
ROWS = 8  # rows of a tile: a lane packs 8 codes, so any code width fills whole bytes
MIN_BUCKET_SIZE, MAX_BUCKET_SIZE = 128, 8192
NORMS = ("max", "l2")
NORM_BYTES = {"fp32": 4, "bf16": 2}
ROTATIONS = ("none", "hadamard")
ROUNDINGS = ("stochastic", "nearest")
SMALLEST_CLIP, LARGEST_CLIP = 2.0**-100, 2.0**100


@dataclass(frozen=True)
class CodebookFormat:
    """What the size of a message depends on: code width, bucket size and the format of the norm words."""

    bits: int
    bucket_size: int
    norm_format: str

    @property
    def is_exact(self) -> bool:
        """Whether values travel raw, in their own dtype."""
        return self.bits == EXACT_BITS

    @property
    def lanes(self) -> int:
        """Lanes of a full tile: 32, or 16 where the bucket size is no multiple of 256."""
        return 32 if self.bucket_size % (ROWS * 32) == 0 else 16

    @property
    def norm_bytes(self) -> int:
        """Bytes of one norm word."""
        return NORM_BYTES[self.norm_format]


@dataclass(frozen=True)
class Codebook:
    """Levels and format with which one layer type is quantized.

    Attributes:
        bits: code width, 2 to 8; 32 means exact: values travel raw.
        levels: 2^(bits-1) float32 magnitudes from 0 to 1, strictly increasing; empty when exact. Where rounding is to
            nearest, the first may be above 0.
        bucket_size: coordinates that share one norm; a multiple of 128 between 128 and 8192.
        norm: "max" (largest magnitude) or "l2" (Euclidean norm of the bucket).
        norm_format: "fp32", or "bf16", rounded up so that no coordinate exceeds its norm.
        version: how many times the levels have been updated.
        clip: magnitude at which coordinates are clipped, rounded to float32 (and up to bfloat16 on the wire with bf16
            norms); it stands in place of every bucket's norm. 0 for codebooks that do not clip.
        rotation: "none", or "hadamard": buckets of 128, 256, 512 or 1024 coordinates are rotated at random.
        rounding: "stochastic"; or "nearest", for rotated buckets with the norm "l2".
        spread: the last level where rounding is to nearest, in standard deviations of the rotated bucket, rounded to
            float32; else 0.
        weights: how often each level occurs, as whole numbers (`entropy.level_weights`), from which the entropy code
            follows; empty where codes travel with fixed length.

    Raises:
        CodebookError: for a value outside these.
    """

    bits: int
    levels: tuple[float, ...] = ()
    bucket_size: int = 512
    norm: str = "max"
    norm_format: str = "fp32"
    version: int = 0
    clip: float = 0.0
    rotation: str = "none"
    rounding: str = "stochastic"
    spread: float = 0.0
    weights: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.bits != EXACT_BITS and not (isinstance(self.bits, int) and MIN_BITS <= self.bits <= MAX_BITS):
            raise CodebookError(f"bits must be {MIN_BITS} to {MAX_BITS}, or {EXACT_BITS} for exact; got {self.bits!r}")
        if self.bucket_size % MIN_BUCKET_SIZE or not MIN_BUCKET_SIZE <= self.bucket_size <= MAX_BUCKET_SIZE:
            raise CodebookError(
                f"bucket_size must be a multiple of {MIN_BUCKET_SIZE} between {MIN_BUCKET_SIZE} and {MAX_BUCKET_SIZE}; "
                f"got {self.bucket_size!r}"
            )
        if self.norm not in NORMS:
            raise CodebookError(f"norm must be one of {', '.join(NORMS)}; got {self.norm!r}")
        if self.norm_format not in NORM_BYTES:
            raise CodebookError(f"norm_format must be one of {', '.join(NORM_BYTES)}; got {self.norm_format!r}")
        object.__setattr__(self, "clip", self._checked_clip())
        object.__setattr__(self, "spread", float(np.float32(self.spread)))
        self._check_rotation()
        if self.is_exact:
            if self.levels:
                raise CodebookError(f"an exact codebook ({EXACT_BITS} bits) has no levels; got {len(self.levels)}")
            return
        rounded = np.asarray(self.levels, dtype=np.float32)
        check_levels(rounded, self.bits, may_lack_zero=self.rounding == "nearest")
        if self.rounding == "nearest" and not 0.0 < self.spread * (rounded[0] + rounded[1]) / 2.0 <= 1.0:
            raise CodebookError(
                f"spread {self.spread!r} must be above 0, and so small that no bucket is rounded to zeros: the middle "
                "of the first two levels at most at one standard deviation"
            )
        object.__setattr__(self, "levels", tuple(float(level) for level in rounded))
        self._check_weights()

    @classmethod
    def uniform(cls, bits: int, **fields: Any) -> "Codebook":
        """Codebook with equally spaced levels (QSGD, arXiv 1610.02132)."""
        return cls(bits=bits, levels=tuple(uniform_levels(bits).tolist()), **fields)

    @classmethod
    def exponential(cls, bits: int, **fields: Any) -> "Codebook":
        """Codebook with levels 0, ..., 1/4, 1/2, 1 (NUQSGD, arXiv 1908.06077)."""
        return cls(bits=bits, levels=tuple(exponential_levels(bits).tolist()), **fields)

    @classmethod
    def exact(cls, **fields: Any) -> "Codebook":
        """Codebook of layers that are not quantized: their values travel raw."""
        return cls(bits=EXACT_BITS, **fields)

    @property
    def is_exact(self) -> bool:
        """Whether values travel raw."""
        return self.bits == EXACT_BITS

    @cached_property
    def format(self) -> CodebookFormat:
        """The part of the codebook on which message sizes depend."""
        return CodebookFormat(self.bits, self.bucket_size, self.norm_format)

    @cached_property
    def digest(self) -> bytes:
        """Eight bytes that differ when any field differs."""
        return hashlib.blake2b(json.dumps(self.to_dict(), sort_keys=True).encode(), digest_size=8).digest()

    def with_levels(self, levels: Sequence[float], version: int, clip: float = 0.0) -> "Codebook":
        """The same codebook with other levels, as after an update at step t in U, and their clip value; no weights."""
        own = tuple(float(level) for level in levels)
        return dataclasses.replace(self, levels=own, version=version, clip=clip, weights=())

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON-able values; `from_dict` restores them exactly."""
        fields = {**dataclasses.asdict(self), "levels": list(self.levels), "weights": list(self.weights)}
        if not self.weights:  # as in messages and states without entropy coding
            del fields["weights"]
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Codebook":
        """Codebook from `to_dict`'s result."""
        return cls(**{**fields, "levels": tuple(fields["levels"]), "weights": tuple(fields.get("weights", ()))})

    @property
    def may_be_coded(self) -> bool:
        """Whether an entropy code may replace code words of fixed length: there is a zero, which has no sign."""
        return not self.is_exact and not self.clip and self.levels[0] == 0.0

    def _check_weights(self) -> None:
        if not self.weights:
            return
        are_counts = all(type(weight) is int and weight >= 0 for weight in self.weights)
        if not self.may_be_coded or len(self.weights) != len(self.levels) or not are_counts:
            raise CodebookError(
                "weights are whole numbers >= 0, one for each level of a codebook that has a zero and does not clip; "
                f"got {self.weights!r}"
            )

    def _check_rotation(self) -> None:
        if self.rotation not in ROTATIONS:
            raise CodebookError(f"rotation must be one of {', '.join(ROTATIONS)}; got {self.rotation!r}")
        if self.rounding not in ROUNDINGS:
            raise CodebookError(f"rounding must be one of {', '.join(ROUNDINGS)}; got {self.rounding!r}")
        if self.rotation != "none" and self.bucket_size not in ROTATED_BUCKET_SIZES:
            raise CodebookError(
                f"rotated buckets have {', '.join(map(str, ROTATED_BUCKET_SIZES))} coordinates; "
                f"got {self.bucket_size!r}"
            )
        if self.rotation != "none" and (self.is_exact or self.clip):
            raise CodebookError("a codebook that rotates has 2 to 8 bits and does not clip")
        if self.rounding == "nearest" and (self.rotation == "none" or self.norm != "l2"):
            raise CodebookError('rounding to nearest needs rotation "hadamard" and norm "l2": else it is biased')
        if self.rounding == "stochastic" and self.spread:
            raise CodebookError("only codebooks that round to nearest have a spread")

    def _checked_clip(self) -> float:
        clip = float(np.float32(self.clip))
        if clip == 0.0:
            return clip
        if not SMALLEST_CLIP <= clip <= LARGEST_CLIP:
            raise CodebookError(f"clip must be 0, or between 2^-100 and 2^100; got {self.clip!r}")
        if self.is_exact or self.norm != "max":
            raise CodebookError('a codebook that clips has no norm: bits must be 2 to 8 and norm "max"')
        return clip
