"""What the CPU kernels take: the dtypes of tensors, the fields of a part, and the kernels' signatures for Numba."""

from numba import types

FLOAT32, FLOAT16, BFLOAT16, FLOAT64 = range(4)

# Fields of a part, int64 each. Bytes are counted from the message's start.
SEGMENT = 0  # number of the tensor
FIRST = 1  # first coordinate, in the tensor
LENGTH = 2  # coordinates
COORDINATE = 3  # number of the first coordinate in the whole model
NORMS_BEGIN = 4  # first byte of the norm words
CODES_BEGIN = 5  # first byte of the codes or raw values
CODES_END = 6  # first byte behind them
END = 7  # first byte behind the padding that follows them, if any
PART_FIELDS = 8

_FLOATS, _WORDS, _PARTS = types.float32[::1], types.uint32[::1], types.int64[:, ::1]
_ADDRESS, _ADDRESSES = types.uint64, types.uint64[::1]
_CODEBOOK = (types.int64, types.int64, types.boolean, types.uint32, *[_ADDRESS] * 3)
_ROTATION = (types.float32, _ADDRESS, _FLOATS)
ENCODE = types.uint64(_ADDRESSES, _PARTS, _ADDRESS, _ADDRESS, *_CODEBOOK)
ENCODE_ROTATED = types.uint64(_ADDRESSES, _PARTS, _ADDRESS, _ADDRESS, _WORDS, *_CODEBOOK, *_ROTATION)
DECODE = types.void(_ADDRESSES, _ADDRESSES, _PARTS, types.float32, types.int64, types.int64, _ADDRESS)
DECODE_ROTATED = types.void(
    _ADDRESSES, _ADDRESSES, _PARTS, types.float32, _WORDS, types.int64, types.int64, _ADDRESS, _FLOATS
)
COPY = types.uint64(_ADDRESSES, _PARTS, _ADDRESS, types.int64)
SUM = types.void(_ADDRESSES, _ADDRESSES, _PARTS, types.float32, types.int64)
SUM_BYTES = types.uint64(types.uint64, types.int64, types.int64)
