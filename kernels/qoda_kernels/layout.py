"""Message plans: which bytes of a message belong to which slice of which parameter.

A **slice** is a run of coordinates of one parameter. Each slice becomes one **segment** of the message, 16-byte
aligned: first one norm word per bucket, then the codes. The bucket grid restarts at each slice.

Codes are **lane-planar**: a tile is 8 rows of W lanes (W = 32, or 16 where the bucket size is no multiple of 256); lane
j holds the coordinates j, j + W, ..., j + 7 W of the tile, whose 8 codes form one little-endian integer (row r in its
bits [r * bits, (r + 1) * bits)). Byte p of lane j lies at p * W + j of the tile's bits * W bytes. The last
n < 8 W coordinates of a slice form a tile of ceil(n / 8) lanes, with codes 0 where it has no coordinate.
Exact segments hold the raw values, little-endian.

All sizes follow from metadata (slices and codebook formats), so ranks never exchange sizes; but
those of entropy-coded messages (`coded_message.py`) do not.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from qoda_kernels.codebook import ROWS, Codebook, CodebookFormat
from qoda_kernels.errors import PlanError

HEADER_BYTES = 32
SEGMENT_ALIGNMENT = 16
MAX_PAYLOAD_BYTES = 2**31 - HEADER_BYTES - 1  # the hosts count split sizes in int32
QUANTIZED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EXACT_DTYPES = (*QUANTIZED_DTYPES, torch.float64)


@dataclass(frozen=True)
class Slice:
    """A run of coordinates of one parameter.

    Attributes:
        parameter: the parameter's name.
        start: first coordinate, in the flattened parameter.
        length: number of coordinates.
        dtype: dtype of the gradient.
        codebook: key of the codebook in the registry.
        offset: number, in the whole model, of the parameter's coordinate 0; random numbers follow offset + start + i.
    """

    parameter: str
    start: int
    length: int
    dtype: torch.dtype
    codebook: str
    offset: int

    @property
    def coordinate(self) -> int:
        """Number, in the whole model, of the slice's first coordinate."""
        return self.offset + self.start


@dataclass(frozen=True)
class Segment:
    """Where one slice lies in the message.

    Attributes:
        slice: what is sent.
        format: how it is sent.
        begin: first byte, counted from the message's start.
    """

    slice: Slice
    format: CodebookFormat
    begin: int

    @cached_property
    def buckets(self) -> int:
        """Number of norms."""
        return -(-self.slice.length // self.format.bucket_size)

    @cached_property
    def norms_bytes(self) -> int:
        """Bytes of the norm words; 0 when exact."""
        return 0 if self.format.is_exact else self.buckets * self.format.norm_bytes

    @cached_property
    def codes_begin(self) -> int:
        """First byte of the codes (or raw values), counted from the message's start."""
        return self.begin + self.norms_bytes

    @cached_property
    def codes_bytes(self) -> int:
        """Bytes of the codes, or of the raw values when exact."""
        if self.format.is_exact:
            return self.slice.length * self.slice.dtype.itemsize
        tiles, tail = divmod(self.slice.length, ROWS * self.format.lanes)
        return self.format.bits * (tiles * self.format.lanes + -(-tail // ROWS))

    @cached_property
    def end(self) -> int:
        """First byte behind the segment, padding included."""
        used = self.codes_begin + self.codes_bytes
        return used + -used % SEGMENT_ALIGNMENT


@dataclass(frozen=True)
class MessagePlan:
    """The layout of one message: its segments in order."""

    segments: tuple[Segment, ...]

    @classmethod
    def build(cls, slices: Sequence[Slice], codebooks: Mapping[str, Codebook]) -> "MessagePlan":
        """Lay slices out one behind the other.

        Args:
            slices: what the message carries, in order; empty slices are allowed.
            codebooks: codebook of each slice's key; only their formats matter.

        Raises:
            PlanError: for a dtype that cannot be sent, a key without codebook, or a message of 2 GiB or more.
        """
        segments = []
        position = HEADER_BYTES
        for part in slices:
            if part.codebook not in codebooks:
                raise PlanError(f"parameter {part.parameter!r} wants codebook {part.codebook!r}, which does not exist")
            code_format = codebooks[part.codebook].format
            allowed = EXACT_DTYPES if code_format.is_exact else QUANTIZED_DTYPES
            if part.dtype not in allowed:
                raise PlanError(
                    f"parameter {part.parameter!r} has dtype {part.dtype}, which cannot be sent at "
                    f"{code_format.bits} bits; allowed: {', '.join(str(dtype) for dtype in allowed)}"
                )
            if part.length < 0 or part.start < 0:
                raise PlanError(
                    f"parameter {part.parameter!r}: start {part.start} and length {part.length} must be >= 0"
                )
            segments.append(Segment(part, code_format, position))
            position = segments[-1].end
        if position - HEADER_BYTES > MAX_PAYLOAD_BYTES:
            raise PlanError(f"a message of {position} bytes is too large (2 GiB at most); use smaller fusion buffers")
        return cls(tuple(segments))

    @cached_property
    def message_bytes(self) -> int:
        """Size of the message, header and padding included."""
        return self.segments[-1].end if self.segments else HEADER_BYTES

    @cached_property
    def payload_bytes(self) -> int:
        """Size of the message behind its header."""
        return self.message_bytes - HEADER_BYTES

    @property
    def coordinates(self) -> int:
        """Number of coordinates that the message carries."""
        return sum(segment.slice.length for segment in self.segments)

    @cached_property
    def digest(self) -> bytes:
        """Eight bytes that differ when slices or formats differ."""
        description = [
            (s.parameter, s.start, s.length, str(s.dtype), s.codebook, s.offset, f.bits, f.bucket_size, f.norm_format)
            for s, f in ((segment.slice, segment.format) for segment in self.segments)
        ]
        return hashlib.blake2b(json.dumps(description).encode(), digest_size=8).digest()

    def split(self, count: int) -> tuple["MessagePlan", ...]:
        """Shares for a reduce-scatter: whole buckets, every coordinate in exactly one share, about equal in bytes.

        Args:
            count: number of shares; a share may be empty.
        """
        if count < 1:
            raise PlanError(f"a plan is split into at least one share; got {count}")
        bounds = [self._shares_of_buckets(count, index) for index in range(len(self.segments))]
        return tuple(self._share([b[rank : rank + 2] for b in bounds]) for rank in range(count))

    @cached_property
    def _bytes_before(self) -> tuple[int, ...]:
        """Bytes of norms and codes in front of each segment, padding left out; last: of all segments."""
        sizes = [segment.norms_bytes + segment.codes_bytes for segment in self.segments]
        return tuple(int(total) for total in np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]))

    def _shares_of_buckets(self, count: int, index: int) -> list[int]:
        """Bucket bounds [b_0 = 0, ..., b_count = buckets] of one segment's shares."""
        segment = self.segments[index]
        before, total = self._bytes_before[index], self._bytes_before[-1]
        size = segment.norms_bytes + segment.codes_bytes
        bounds = [0]
        for rank in range(1, count):
            wanted = total * rank / count - before
            nearest = round(wanted * segment.buckets / size) if size else 0
            bounds.append(min(max(nearest, bounds[-1]), segment.buckets))
        return [*bounds, segment.buckets]

    def _share(self, bounds: Sequence[Sequence[int]]) -> "MessagePlan":
        """Plan of the buckets [begin, end) of each segment; segments without any are left out."""
        segments = []
        position = HEADER_BYTES
        for segment, (begin, end) in zip(self.segments, bounds, strict=True):
            if begin == end:
                continue
            first = begin * segment.format.bucket_size
            last = min(end * segment.format.bucket_size, segment.slice.length)
            part = replace(segment.slice, start=segment.slice.start + first, length=last - first)
            segments.append(Segment(part, segment.format, position))
            position = segments[-1].end
        return MessagePlan(tuple(segments))
