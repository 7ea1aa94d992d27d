"""The tables from which CUDA kernels know a message plan: NumPy records that are copied to the device as they are.

A **unit** is what one warp does at a time: a bucket of a quantized segment, or EXACT_UNIT coordinates of an exact one.
Units are numbered through the message; a warp finds the segment of a unit by bisection of `first_unit`. Empty segments
have no unit and no record.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from qoda_kernels.codebook import EXACT_BITS, Codebook
from qoda_kernels.errors import PlanError
from qoda_kernels.layout import HEADER_BYTES, MessagePlan, Segment
from qoda_kernels.reference import rounding_table, signed_levels

EXACT_UNIT = 1024
WARPS = 8  # of a block
MAX_UNITS = 2**31
SHARED_FLOATS = 48 * 1024 // 4 - 128  # what a block may have without asking, less what the kernels use themselves

KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
METHODS = {"uniform": 0, "minimum": 1, "search": 2}

SEGMENT = np.dtype(
    [
        ("coordinate", "<u8"),  # number of the first coordinate in the whole model
        ("length", "<u8"),  # coordinates
        ("begin", "<u4"),  # first byte in the message: norms
        ("codes_begin", "<u4"),
        ("codes_end", "<u4"),
        ("end", "<u4"),  # first byte behind the padding
        ("first_unit", "<u4"),
        ("unit_length", "<u4"),  # coordinates of a unit: the bucket size
        ("bits", "<u4"),
        ("lanes", "<u4"),
        ("kind", "<u4"),  # of the values: KINDS
        ("norm_bytes", "<u4"),
        ("is_l2", "<u4"),
        ("method", "<u4"),  # METHODS
        ("rounding", "<u4"),  # first float of the codebook's part of the rounding table
        ("levels", "<u4"),  # likewise, of the table of signed levels
        ("codebook", "<u4"),  # number of the codebook, for statistics
        ("clip", "<f4"),  # in place of every norm; 0 for codebooks that do not clip
        ("rotates", "<u4"),
        ("spread", "<f4"),  # of codebooks that round to nearest; else 0
        ("magnitudes", "<u4"),  # first float of their levels in the rounding table
        ("unused", "<u4"),
    ]
)
PLAN = np.dtype(
    [
        ("segments", "<u8"),  # address of the SEGMENT records
        ("rounding", "<u8"),  # address of the rounding table, float32
        ("levels", "<u8"),  # address of the table of signed levels, float32
        ("workspace", "<u8"),  # address of WORKSPACE, zero between launches
        ("totals", "<u8"),  # address of uint64 [senders], zero between launches
        ("status", "<u8"),  # address of STATUS, in memory that the host can read
        ("segment_count", "<u4"),
        ("units", "<u4"),
        ("rounding_floats", "<u4"),
        ("level_floats", "<u4"),
        ("payload_bytes", "<u4"),
        ("rotated", "<u4"),  # `PlanTables.rotated`
    ]
)
WORKSPACE = np.dtype([("total", "<u8"), ("finished_blocks", "<u4"), ("unused", "<u4")])
# A message that is expected. `header` is the header with checksum 0 and, as counter, what is to be added to the step's.
SENDER = np.dtype([("message", "<u8"), ("header", "<u4", (HEADER_BYTES // 4,))])
# The first message that was refused, if `refused` is not 0. Sticky: only the host clears it.
STATUS = np.dtype(
    [
        ("refused", "<u4"),
        ("sender", "<u4"),  # its place among the messages
        ("received", "<u4", (HEADER_BYTES // 4,)),
        ("expected", "<u4", (HEADER_BYTES // 4,)),
    ]
)
# What differs from one exchange to the next, for launches that are replayed from a CUDA graph.
STEP = np.dtype(
    [
        ("key_first", "<u4"),  # this and the next five: `DitherKey.words`
        ("key_second", "<u4"),
        ("common_first", "<u4"),
        ("common_second", "<u4"),
        ("position", "<u4"),
        ("strata", "<u4"),
        ("counter", "<u4"),
        ("rotation_first", "<u4"),  # `RotationKey.words`
        ("rotation_second", "<u4"),
        ("unused", "<u4"),
    ]
)

COUNTER_WORD, CHECKSUM_WORD = 5, 7  # of a header, see `wire.py`


@dataclass(frozen=True)
class PlanTables:
    """Tables of one plan.

    Attributes:
        segments: SEGMENT [n], of the segments that are not empty.
        indices: their numbers in the plan.
        rounding: float32; per codebook nothing ("uniform"), slopes and intercepts ("minimum"), or levels, slopes and
            intercepts ("search"); where rounding is to nearest, then its levels.
        levels: float32; per codebook its signed levels.
        units: number of units.
        codebooks: keys of the quantizing codebooks, in the order of their numbers.
        rotated: largest bucket size of codebooks that rotate, 0 without any: each warp has so many floats of shared
            memory behind the table.
    """

    segments: npt.NDArray[np.void]
    indices: tuple[int, ...]
    rounding: npt.NDArray[np.float32]
    levels: npt.NDArray[np.float32]
    units: int
    codebooks: tuple[str, ...]
    rotated: int

    @classmethod
    def build(cls, plan: MessagePlan, codebooks: Mapping[str, Codebook]) -> "PlanTables":
        """Tables of a plan and its codebooks.

        Raises:
            PlanError: when the codebooks together need more shared memory than a block has, or the plan has too many
                buckets.
        """
        keys = tuple(dict.fromkeys(s.slice.codebook for s in plan.segments if not s.format.is_exact))
        rounding: list[npt.NDArray[np.float32]] = []
        levels: list[npt.NDArray[np.float32]] = []
        places: dict[str, tuple[int, int, int, int]] = {}
        magnitudes: dict[str, int] = {}
        for number, key in enumerate(keys):
            table = rounding_table(codebooks[key])
            parts = {
                "uniform": [],
                "minimum": [table.slopes, table.intercepts],
                "search": [table.levels, table.slopes, table.intercepts],
            }[table.method]
            places[key] = (METHODS[table.method], _floats(rounding), _floats(levels), number)
            rounding += parts
            if codebooks[key].rounding == "nearest":
                magnitudes[key] = _floats(rounding)
                rounding.append(np.array(codebooks[key].levels, dtype=np.float32))
            levels.append(signed_levels(codebooks[key]))
        rotated = max(
            (books.bucket_size for books in map(codebooks.__getitem__, keys) if books.rotation != "none"), default=0
        )
        needed = max(_floats(rounding), _floats(levels)) + rotated * WARPS
        if needed > SHARED_FLOATS:
            raise PlanError(
                f"the {len(keys)} codebooks need {4 * needed} bytes of shared memory, {4 * SHARED_FLOATS} are there; "
                "use fewer layer types, fewer bits, or smaller rotated buckets in one message"
            )
        indices = tuple(index for index, segment in enumerate(plan.segments) if segment.slice.length)
        records = np.zeros(len(indices), dtype=SEGMENT)
        units = 0
        for record, index in zip(records, indices, strict=True):
            segment = plan.segments[index]
            units += _fill(record, segment, units, codebooks[segment.slice.codebook], places)
            record["magnitudes"] = magnitudes.get(segment.slice.codebook, 0)
        if units > MAX_UNITS:
            raise PlanError(f"a plan of {units} buckets is too large ({MAX_UNITS} at most); use larger buckets")
        return cls(records, indices, _joined(rounding), _joined(levels), units, keys, rotated)


def _fill(
    record: np.void, segment: Segment, first_unit: int, codebook: Codebook, places: dict[str, tuple[int, int, int, int]]
) -> int:
    """Write one segment's record; returns its number of units."""
    part = segment.slice
    record["coordinate"], record["length"] = part.coordinate % 2**64, part.length
    record["begin"], record["codes_begin"] = segment.begin, segment.codes_begin
    record["codes_end"], record["end"] = segment.codes_begin + segment.codes_bytes, segment.end
    record["first_unit"] = first_unit
    record["kind"] = KINDS[part.dtype]
    record["bits"] = segment.format.bits
    if segment.format.bits == EXACT_BITS:
        record["unit_length"] = EXACT_UNIT
        return -(-part.length // EXACT_UNIT)
    record["unit_length"] = segment.format.bucket_size
    record["lanes"] = segment.format.lanes
    record["norm_bytes"] = segment.format.norm_bytes
    record["is_l2"] = codebook.norm == "l2"
    record["clip"] = codebook.clip
    record["rotates"], record["spread"] = codebook.rotation != "none", codebook.spread
    record["method"], record["rounding"], record["levels"], record["codebook"] = places[part.codebook]
    return segment.buckets


def _floats(parts: list[npt.NDArray[np.float32]]) -> int:
    return sum(part.size for part in parts)


def _joined(parts: list[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
    return np.concatenate([np.zeros(0, dtype=np.float32), *parts])
