"""Where the fields of the records lie that kernels read, and the kernels' constants, in the types that they need.

The records are those of `device_tables.py` and `device_statistics.py`. Numba takes module-level scalars as constants,
so each offset of a field has a name.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qoda_kernels import codebook, device_statistics, device_tables, layout
from qoda_kernels.device_statistics import GATHERED
from qoda_kernels.device_tables import KINDS, METHODS, PLAN, SEGMENT, SENDER, STATUS, STEP, WORKSPACE

WARPS = device_tables.WARPS  # of a block
FLOAT32, FLOAT16, BFLOAT16, FLOAT64 = (np.uint32(kind) for kind in KINDS.values())
UNIFORM, MINIMUM = np.uint32(METHODS["uniform"]), np.uint32(METHODS["minimum"])
EXACT = np.uint32(codebook.EXACT_BITS)
HEADER_BYTES, HEADER_WORDS = np.uint32(layout.HEADER_BYTES), np.uint32(layout.HEADER_BYTES // 4)
COUNTER_WORD, CHECKSUM_WORD = device_tables.COUNTER_WORD, device_tables.CHECKSUM_WORD
FRACTION_BITS = device_statistics.FRACTION_BITS


def _offsets(record: np.dtype[Any], *names: str) -> list[np.uint64]:
    fields: Mapping[str, Any] = record.fields or {}
    return [np.uint64(fields[name][1]) for name in names]


PLAN_SEGMENTS, PLAN_ROUNDING, PLAN_LEVELS, PLAN_WORKSPACE, PLAN_TOTALS, PLAN_STATUS = _offsets(
    PLAN, "segments", "rounding", "levels", "workspace", "totals", "status"
)
PLAN_SEGMENT_COUNT, PLAN_UNITS, PLAN_ROUNDING_FLOATS, PLAN_LEVEL_FLOATS, PLAN_PAYLOAD_BYTES, PLAN_ROTATED = _offsets(
    PLAN, "segment_count", "units", "rounding_floats", "level_floats", "payload_bytes", "rotated"
)

COORDINATE, LENGTH, BEGIN, CODES_BEGIN, CODES_END, END, FIRST_UNIT, UNIT_LENGTH = _offsets(
    SEGMENT, "coordinate", "length", "begin", "codes_begin", "codes_end", "end", "first_unit", "unit_length"
)
BITS, LANES, KIND, NORM_BYTES, IS_L2, METHOD, ROUNDING, LEVELS, CODEBOOK, CLIP, ROTATES, SPREAD, MAGNITUDES = _offsets(
    SEGMENT,
    "bits",
    "lanes",
    "kind",
    "norm_bytes",
    "is_l2",
    "method",
    "rounding",
    "levels",
    "codebook",
    "clip",
    "rotates",
    "spread",
    "magnitudes",
)
SEGMENT_BYTES = np.uint64(SEGMENT.itemsize)

TOTAL, FINISHED_BLOCKS = _offsets(WORKSPACE, "total", "finished_blocks")

SENDER_MESSAGE, SENDER_HEADER = _offsets(SENDER, "message", "header")
SENDER_BYTES = np.uint64(SENDER.itemsize)

REFUSED, REFUSED_SENDER, RECEIVED, EXPECTED = _offsets(STATUS, "refused", "sender", "received", "expected")

GATHERED_LARGEST, WEIGHT_BITS, FINITE, SKIPPED, SUMS = _offsets(
    GATHERED, "largest", "weight_bits", "finite", "skipped", "sums"
)
GATHERED_BYTES = np.uint64(GATHERED.itemsize)

KEY_FIRST, KEY_SECOND, COMMON_FIRST, COMMON_SECOND, POSITION, STRATA, COUNTER = _offsets(
    STEP, "key_first", "key_second", "common_first", "common_second", "position", "strata", "counter"
)
ROTATION_FIRST, ROTATION_SECOND = _offsets(STEP, "rotation_first", "rotation_second")
