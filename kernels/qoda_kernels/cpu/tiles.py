"""What the CPU kernels do with one tile, or one run of floats, as explicit vector code (`vectors.py`).

A tile is ROWS rows of W lanes, one vector of W elements a row. All arguments called addresses are integers; the caller
has made sure that what lies there is large enough. `reference.py` defines every result.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import Signature
from numba.extending import intrinsic

from qoda_kernels import kernel_constants
from qoda_kernels.cpu.target import bits_in_registers, has_avx512
from qoda_kernels.cpu.vectors import (
    GATHERS,
    LOADS,
    REGISTERS,
    Floats,
    Table,
    TableInMemory,
    Words,
    load_table,
    look_up,
    look_up_pairs,
)
from qoda_kernels.kernel_constants import ROWS, SIGN_LANES

UNIFORM, MINIMUM, IN_REGISTERS, CELLS, GATHERED_CELLS, SEARCH = range(
    6
)  # how a position is found; see `level_tables.KernelTable`
GROUP = 32  # floats that `largest_magnitude` and `add_squares` take at a time

_BYTE, _WORD, _LONG, _FLOAT = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
_ROUNDING_BITS, _WEYL = int(kernel_constants.ROUNDING_BITS), int(kernel_constants.WEYL)
_MULTIPLIERS = int(kernel_constants.FIRST_MULTIPLIER), int(kernel_constants.SECOND_MULTIPLIER)
_CACHE_LINE = 64
_SUMMED_LANES = 16
_NEAR_VECTORS = 8  # of a bucket that are transformed at a time
_WIDTH = 16  # lanes that are worked on at a time: all 8 rows then fit into the registers of AVX-512

Generator = Callable[[Any, Any, Any, Any], Any]


def _moved(builder: Any, address: Any, count: int) -> Any:
    """An address so many bytes further on."""
    return builder.add(address, ir.Constant(address.type, count))


def _data(context: Any, builder: Any, kind: Any, array: Any) -> Any:
    """Pointer to the first element of an array."""
    return context.make_array(kind)(context, builder, array).data


def _scalar(builder: Any, table: Any, index: int) -> Any:
    return builder.load(builder.gep(table, [ir.Constant(_LONG, index)]))


@intrinsic
def keep(context: Any, arrays: Any) -> tuple[Signature, Callable[..., Any]]:
    """Do nothing: Numba frees an array after its last use, even if its address is used later on; this is a use."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.get_dummy_value()

    return types.void(arrays), generate


@intrinsic(prefer_literal=True)
def prefetch(context: Any, address: Any, count: Any) -> tuple[Signature, Callable[..., Any]]:
    """Ask for the cache lines of so many bytes (a literal number), which may lie outside of all arrays."""
    size = count.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = ir.PointerType(_BYTE)
        function = builder.module.declare_intrinsic(
            "llvm.prefetch", [pointer], ir.FunctionType(ir.VoidType(), [pointer, _WORD, _WORD, _WORD])
        )
        read, keep, data = (ir.Constant(_WORD, number) for number in (0, 3, 1))
        for line in range(0, size, _CACHE_LINE):
            place = builder.inttoptr(_moved(builder, arguments[0], line), pointer)
            builder.call(function, [place, read, keep, data])
        return context.get_dummy_value()

    return types.void(types.uint64, count), generate


@intrinsic
def largest_magnitude(context: Any, address: Any, groups: Any) -> tuple[Signature, Callable[..., Any]]:
    """Bits of the largest magnitude of GROUP * groups float32; NaN and infinity compare as the largest."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        begin, groups = arguments
        zero = Words.multiples(builder, 0, GROUP)
        largest = cgutils.alloca_once_value(builder, zero.value)
        with cgutils.for_range(builder, groups) as loop:
            place = builder.add(begin, builder.mul(loop.index, ir.Constant(_LONG, 4 * GROUP)))
            magnitudes = Words.load(builder, place, GROUP) & 0x7FFFFFFF
            builder.store(magnitudes.maximum(Words(builder, builder.load(largest))).value, largest)
        return Words(builder, builder.load(largest)).largest()

    return types.uint32(types.uint64, types.int64), generate


@intrinsic
def add_squares(
    context: Any, address: Any, groups: Any, scale: Any, lanes: Any
) -> tuple[Signature, Callable[..., Any]]:
    """Add the squares of GROUP * groups float32, each times a scale, to the array of GROUP lanes, group by group."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        begin, groups, scale, lanes = arguments
        scales = Floats.filled(builder, scale, GROUP)
        target = builder.ptrtoint(_data(context, builder, signature.args[3], lanes), _LONG)
        total = cgutils.alloca_once_value(builder, Floats.load(builder, target, GROUP).value)
        with cgutils.for_range(builder, groups) as loop:
            place = builder.add(begin, builder.mul(loop.index, ir.Constant(_LONG, 4 * GROUP)))
            scaled = Floats.load(builder, place, GROUP) * scales
            builder.store((Floats(builder, builder.load(total)) + scaled * scaled).value, total)
        Floats(builder, builder.load(total)).store(target)
        return context.get_dummy_value()

    return types.void(types.uint64, types.int64, types.float32, lanes), generate


@intrinsic
def add_values(context: Any, address: Any, groups: Any, lanes: Any) -> tuple[Signature, Callable[..., Any]]:
    """Add GROUP * groups float32 to the array of GROUP lanes, group by group."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        begin, groups, lanes = arguments
        target = builder.ptrtoint(_data(context, builder, signature.args[2], lanes), _LONG)
        total = cgutils.alloca_once_value(builder, Floats.load(builder, target, GROUP).value)
        with cgutils.for_range(builder, groups) as loop:
            place = builder.add(begin, builder.mul(loop.index, ir.Constant(_LONG, 4 * GROUP)))
            builder.store((Floats(builder, builder.load(total)) + Floats.load(builder, place, GROUP)).value, total)
        Floats(builder, builder.load(total)).store(target)
        return context.get_dummy_value()

    return types.void(types.uint64, types.int64, lanes), generate


def _rotated_width() -> int:
    """Coordinates of a bucket in one vector while it is transformed: 8 vectors fit into the registers."""
    return _WIDTH if has_avx512() else _WIDTH // 2


class _Signs:
    """Signs of a whole bucket's coordinates (`rotation.py`), one vector of neighbours at a time."""

    def __init__(self, builder: Any, weyl: Any, first: Any, second: Any) -> None:
        width = _rotated_width()
        hashed = _Hash(builder, first, second, width)
        numbers = Words.filled(builder, weyl, width)
        self._words = [
            hashed(numbers + Words.multiples(builder, _WEYL, width, begin)) for begin in range(0, SIGN_LANES, width)
        ]

    def applied(self, values: Floats, place: int) -> Floats:
        """Values that begin at a place of the bucket, a multiple of their number."""
        word = self._words[place % SIGN_LANES // values.count]
        return (values.as_words() ^ ((word << (31 - place // SIGN_LANES)) & 0x80000000)).as_floats()


def _butterflies(values: list[Floats]) -> list[Floats]:
    """Transform over the numbers of the vectors, a power of two of them."""
    distance = len(values) // 2
    while distance:
        result = list(values)
        for low in (n for n in range(len(values)) if not n & distance):
            result[low] = values[low] + values[low + distance]
            result[low + distance] = values[low] - values[low + distance]
        values, distance = result, distance // 2
    return values


def _far_transforms(builder: Any, load: Callable[[int], Floats], target: Any, length: int) -> None:
    """The first steps of a bucket's transform, of coordinates that are 8 vectors and more apart."""
    width = _rotated_width()
    near = _NEAR_VECTORS * width
    for begin in range(0, near, width):
        places = list(range(begin, length, near))
        for place, value in zip(places, _butterflies([load(place) for place in places]), strict=True):
            value.store(_moved(builder, target, 4 * place))


def _near_transforms(builder: Any, address: Any, length: int, finish: Callable[[Floats, int], Floats]) -> None:
    """The other steps, in place."""
    width = _rotated_width()
    near = _NEAR_VECTORS * width
    for first in range(0, length, near):
        places = [_moved(builder, address, 4 * (first + begin)) for begin in range(0, near, width)]
        values = _butterflies([Floats.load(builder, place, width) for place in places])
        for number, (place, value) in enumerate(zip(places, values, strict=True)):
            for distance in (8, 4, 2, 1) if width == 16 else (4, 2, 1):
                value = value.with_neighbours(distance)
            finish(value, first + number * width).store(place)


@intrinsic(prefer_literal=True)
def rotate(
    context: Any, source: Any, target: Any, up: Any, weyl: Any, first: Any, second: Any, factor: Any, length: Any
) -> tuple[Signature, Callable[..., Any]]:
    """Rotate a whole bucket (`rotation.rotate`).

    Arguments of the compiled function:
        source: address of float32 [length].
        target: address of float32 [length], written.
        up: float32, what coordinates are multiplied by before.
        weyl: uint32, number of the first coordinate in the whole model times the Weyl multiplier.
        first: uint32, word of the rotation's key plus the share of the number's high word.
        second: uint32, the key's other word.
        factor: float32, 1 / sqrt(length).
        length: literal: 128, 256, 512 or 1024.
    """
    size = length.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, target, up, weyl, first, second, factor = arguments[:7]
        signs = _Signs(builder, weyl, first, second)
        width = _rotated_width()
        ups, factors = Floats.filled(builder, up, width), Floats.filled(builder, factor, width)

        def load(place: int) -> Floats:
            return signs.applied(Floats.load(builder, _moved(builder, source, 4 * place), width) * ups, place)

        _far_transforms(builder, load, target, size)
        _near_transforms(builder, target, size, lambda value, _: value * factors)
        return context.get_dummy_value()

    words, floats = types.uint32, types.float32
    return types.void(types.uint64, types.uint64, floats, words, words, words, floats, length), generate


@intrinsic(prefer_literal=True)
def rotate_back(
    context: Any, address: Any, scale: Any, weyl: Any, first: Any, second: Any, factor: Any, length: Any
) -> tuple[Signature, Callable[..., Any]]:
    """Rotate a whole bucket back, in place (`rotation.rotate_back`), and multiply it by a scale; with one NaN.

    The arguments of the compiled function are those of `rotate`.
    """
    size = length.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, scale, weyl, first, second, factor = arguments[:6]
        signs = _Signs(builder, weyl, first, second)
        width = _rotated_width()
        scales, factors = Floats.filled(builder, scale, width), Floats.filled(builder, factor, width)

        def load(place: int) -> Floats:
            return Floats.load(builder, _moved(builder, address, 4 * place), width)

        def finished(value: Floats, place: int) -> Floats:
            return (signs.applied(value * factors, place) * scales).with_one_nan()

        _far_transforms(builder, load, address, size)
        _near_transforms(builder, address, size, finished)
        return context.get_dummy_value()

    words, floats = types.uint32, types.float32
    return types.void(types.uint64, floats, words, words, words, floats, length), generate


@intrinsic
def sum_words(
    context: Any, address: Any, steps: Any, first: Any, multiplier: Any
) -> tuple[Signature, Callable[..., Any]]:
    """Sum of w_i + multiplier (first + i) w_i over 16 * steps uint32 w_0, w_1, ..., modulo 2^64.

    The sums of the first 1, 2, ..., n vectors add up to n, n-1, ..., 1 times each vector: no products in the loop.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        begin, steps, first, multiplier = arguments
        zero = ir.Constant(ir.VectorType(_LONG, _SUMMED_LANES), [0] * _SUMMED_LANES)
        total, descending = (cgutils.alloca_once_value(builder, zero) for _ in range(2))
        with cgutils.for_range(builder, steps) as loop:
            place = builder.add(begin, builder.mul(loop.index, ir.Constant(_LONG, 4 * _SUMMED_LANES)))
            words = Words.load(builder, place, _SUMMED_LANES).longs()
            builder.store(builder.add(builder.load(total), words), total)
            builder.store(builder.add(builder.load(descending), builder.load(total)), descending)
        result = ir.Constant(_LONG, 0)
        total, descending = builder.load(total), builder.load(descending)
        for lane in range(_SUMMED_LANES):
            place = ir.Constant(_WORD, lane)
            own, falling = builder.extract_element(total, place), builder.extract_element(descending, place)
            rising = builder.sub(builder.mul(steps, own), falling)
            weighted = builder.add(
                builder.mul(ir.Constant(_LONG, _SUMMED_LANES), rising),
                builder.mul(builder.add(first, ir.Constant(_LONG, lane)), own),
            )
            result = builder.add(result, builder.add(own, builder.mul(multiplier, weighted)))
        return result

    return types.uint64(types.uint64, types.int64, types.uint64, types.uint64), generate


class _Hash:
    """`dither.hash32` of coordinates, given their numbers times the Weyl multiplier.

    Each word of the key is xored after the shift, with its own shifted bits, so that both xors are one operation; but
    before it where the code around leaves no registers for that (is_crowded).
    """

    def __init__(self, builder: Any, first: Any, second: Any, count: int, is_crowded: bool = False) -> None:
        self._is_crowded = is_crowded
        keys = (first, second) if is_crowded else (_xored_with_shifted(builder, key) for key in (first, second))
        self._keys = [Words.filled(builder, key, count) for key in keys]

    def __call__(self, word: Words) -> Words:
        for key, multiplier in zip(self._keys, _MULTIPLIERS, strict=True):
            if self._is_crowded:
                word = word ^ key
                word = word ^ (word >> 15)
            else:
                word = word ^ (word >> 15) ^ key
            word = word * multiplier
        return word ^ (word >> 15)


def _xored_with_shifted(builder: Any, key: Any) -> Any:
    """What a word of the key, xored before a step x ^ (x >> 15), amounts to after it."""
    return builder.xor(key, builder.lshr(key, ir.Constant(_WORD, 15)))


class _Strata:
    """`dither.stratified` for the rows of a tile; one word has the common bits of rows r, r + 2, r + 4, r + 6."""

    def __init__(self, builder: Any, key: Any, first: Any, weyl: Words, row_weyl: Words) -> None:
        hashed = _Hash(builder, first, _scalar(builder, key, 3), weyl.count)
        self._words = hashed(weyl), hashed(weyl + row_weyl)
        self._position, self._count = (Words.filled(builder, _scalar(builder, key, n), weyl.count) for n in (4, 5))
        count = builder.sitofp(_scalar(builder, key, 5), _FLOAT)
        inverse = builder.fdiv(ir.Constant(_FLOAT, 1.0), count)
        self._inverse = Floats.filled(builder, inverse, weyl.count)
        self._half = Floats.filled(builder, builder.fmul(inverse, ir.Constant(_FLOAT, 0.5)), weyl.count)

    def dither(self, random: Words, row: int, values: Words) -> Words:
        """16 random bits of a row's coordinates from independent ones and the values' bits."""
        byte = (self._words[row % 2] >> (8 * (row // 2))) & 0xFF
        moved = ((byte * self._count) >> 8) + self._position
        stratum = moved.minimum(moved - self._count)
        scaled = ((stratum << 16) | random).to_floats().fused(self._inverse, self._half)
        return scaled.truncated() ^ (values.sign_mask() & 0xFFFF)


class _Rounding:
    """The positions of magnitudes on the scale of level indices, times 2^F (`reference.fixed_point`)."""

    def __init__(self, builder: Any, method: int, bits: int, tables: Any, scales: Floats) -> None:
        self._builder, self._method, self._bits = builder, method, bits
        self.way = GATHERS if method == GATHERED_CELLS else LOADS
        self._lines, self._levels, self._cells = tables
        self._scales = scales
        if method == IN_REGISTERS:
            self._thresholds, self._slopes, self._intercepts = self._tables_in_registers()

    def _tables_in_registers(self) -> tuple[list[Table], Table, Table]:
        """What a bisection compares with, a table for each step, and the lines of the intervals."""
        levels, lines = (
            Floats.load(self._builder, self._builder.ptrtoint(pointer, _LONG), count)
            for pointer, count in ((self._levels, 1 << (self._bits - 1)), (self._lines, 1 << self._bits))
        )
        steps = (levels.count >> step for step in range(self._bits - 1))
        thresholds = [Table(levels.every(step, step // 2)) for step in steps]
        slopes, intercepts = (Table(part) for part in lines.parted())
        return thresholds, slopes, intercepts

    def positions(self, magnitudes: list[Floats]) -> list[Floats]:
        """Positions; with uniform levels the magnitudes, which `raised` multiplies."""
        if self._method == UNIFORM:
            return magnitudes
        scaled = [magnitude * self._scales for magnitude in magnitudes]
        if self._method != MINIMUM:
            return [self._on_own_line(x) for x in scaled]
        # As many rows at a time as leave registers for the lines and what is computed.
        rows = ROWS if has_avx512() else ROWS // 2
        return [least for begin in range(0, ROWS, rows) for least in self._least_lines(scaled[begin : begin + rows])]

    def raised(self, position: Floats, start: Words) -> Words:
        """Random numbers plus a position, rounded once; start is _ROUNDING_BITS plus the numbers, and the result too.

        As a float, start is 1.5 * 2^23 plus the numbers, and has the ulp 1.
        """
        addend = start.as_floats()
        total = position.fused(self._scales, addend) if self._method == UNIFORM else position + addend
        return total.as_words()

    def _least_lines(self, scaled: list[Floats]) -> list[Floats]:
        """The least of all lines, in a loop over the lines.

        The compiler must not see how many there are: it would unroll the loop, compute all lines before it compares
        them, and be without registers for what it has computed.
        """
        builder, count = self._builder, scaled[0].count

        def values_of(line: Any) -> list[Floats]:
            place = builder.mul(line, ir.Constant(_LONG, 2))
            slope, intercept = (
                Floats.filled(builder, builder.load(builder.gep(self._lines, [builder.add(place, part)])), count)
                for part in (ir.Constant(_LONG, 0), ir.Constant(_LONG, 1))
            )
            return [slope.fused(x, intercept) for x in scaled]

        first = values_of(ir.Constant(_LONG, 0))
        number_of_lines = builder.zext(_scalar(builder, self._cells, 0), _LONG)
        before, body, behind = (
            builder.block,
            builder.append_basic_block("line"),
            builder.append_basic_block("lines_end"),
        )
        builder.branch(body)
        builder.position_at_end(body)
        line, *least = (builder.phi(kind) for kind in (_LONG, *(value.value.type for value in first)))
        values = [value.minimum(Floats(builder, best)) for value, best in zip(values_of(line), least, strict=True)]
        next_line = builder.add(line, ir.Constant(_LONG, 1))
        for variable, start, following in (
            (line, ir.Constant(_LONG, 1), next_line),
            *((best, begin.value, value.value) for best, begin, value in zip(least, first, values, strict=True)),
        ):
            variable.add_incoming(start, before)
            variable.add_incoming(following, body)
        builder.cbranch(builder.icmp_unsigned("<", next_line, number_of_lines), body, behind)
        builder.position_at_end(behind)
        return values

    def _on_own_line(self, x: Floats) -> Floats:
        if self._method == IN_REGISTERS:
            index = self._interval_in_registers(x)
            return self._slopes.look_up(index).fused(x, self._intercepts.look_up(index))
        line = self._line_by_bisection(x) if self._method == SEARCH else self._line_of_cell(x)
        slope, intercept = look_up_pairs(self._lines, line, self.way)
        return slope.fused(x, intercept)

    def _interval_in_registers(self, x: Floats) -> Words:
        index = x.at_least(self._thresholds[0].look_up(Words.multiples(self._builder, 0, x.count)))
        for table in self._thresholds[1:]:
            index = index + index + x.at_least(table.look_up(index))
        return index

    def _line_of_cell(self, x: Floats) -> Words:
        lowest, shift = (Words.filled(self._builder, _scalar(self._builder, self._cells, n), x.count) for n in (0, 1))
        cell = (x.as_words().maximum(lowest) - lowest).shifted_right(shift)
        return (cell << 1) | x.at_least(look_up(self._levels, cell, self.way))

    def _line_by_bisection(self, x: Floats) -> Words:
        index = Words.multiples(self._builder, 0, x.count)
        for bit in reversed(range(self._bits - 1)):
            is_above = x.at_least(look_up(self._levels, index | (1 << bit), self.way))
            index = index | (is_above << bit)
        return index.minimum(2 ** (self._bits - 1) - 2)


def _encoded_width(method: int) -> int:
    """Lanes that are encoded at a time: fewer where registers are few and all rows are under way at once."""
    return _WIDTH if has_avx512() or method != MINIMUM else _WIDTH // 2


def _starts(both: Words, shift: int) -> tuple[Words, Words]:
    """_ROUNDING_BITS plus the highest `shift` bits of the low and of the high half of random words."""
    low = (both >> (16 - shift)) & ((1 << shift) - 1)
    high = Words.multiples(both.builder, 0, both.count) | (_ROUNDING_BITS >> shift)
    return low | _ROUNDING_BITS, high.shifted_in(both, shift)


def _codes(values: Words, raised: Words, bits: int, shift: int, is_bounded: bool) -> Words:
    """Code words of coordinates, in the highest bits of each element, given `_Rounding.raised`.

    Below the level index its fraction remains. The highest bit is free for the sign: the bit above the level index's
    is zero in _ROUNDING_BITS, too. Where positions and random bits cannot lead beyond the highest level, is_bounded.
    """
    if not is_bounded:
        raised = raised.minimum(_ROUNDING_BITS + (1 << (bits - 1 + shift)) - 1)
    return (values & 0x80000000) | (raised << (32 - bits - shift))


def _nearest_codes(
    rounding: _Rounding,
    positions: list[Floats],
    places: list[Any],
    level_table: Table | TableInMemory,
    bits: int,
    shift: int,
) -> tuple[Words, Words]:
    """Codes of rows 0-3 and of rows 4-7; replaces coordinates by their magnitudes times the levels of the codes."""
    builder, count = positions[0].builder, positions[0].count
    words = [Words.multiples(builder, 0, count)] * 2
    start = Words.multiples(builder, 0, count) | _ROUNDING_BITS
    for row in reversed(range(ROWS)):
        values = Words.load(builder, places[row], count)
        code = _codes(values, rounding.raised(positions[row], start), bits, shift, is_bounded=False)
        half = row // (ROWS // 2)
        words[half] = words[half].shifted_in(code, bits)
        level = level_table.look_up(code >> (32 - bits))
        ((values & 0x7FFFFFFF).as_floats() * level).store(places[row])
    return words[0], words[1]


def _plane(low: Words, high: Words, index: int, bits: int) -> Words:
    """Byte `index` (in the low byte) of each lane's integer; `low` has the codes of rows 0-3, `high` of rows 4-7."""
    begin, middle = 8 * index, 4 * bits
    if begin + 8 <= middle:
        return low >> begin
    if begin >= middle:
        return high >> (begin - middle)
    return (low >> begin) | (high << (middle - begin))


@intrinsic(prefer_literal=True)
def encode_tile(
    context: Any,
    source: Any,
    target: Any,
    weyl: Any,
    row_weyl: Any,
    key: Any,
    high_share: Any,
    scale: Any,
    limit: Any,
    lines: Any,
    levels: Any,
    cells: Any,
    magnitudes: Any,
    bits: Any,
    lanes: Any,
    shift: Any,
    method: Any,
    is_stratified: Any,
    is_limited: Any,
    is_nearest: Any,
) -> tuple[Signature, Callable[..., Any]]:
    """Quantize and pack one tile.

    Where rounding is to nearest, each coordinate is replaced by the product of its magnitude and the level that it is
    rounded to.

    Arguments of the compiled function:
        source: address of float32 [ROWS, lanes]; written where rounding is to nearest.
        target: address of uint8 [bits, lanes], written.
        weyl: uint32, number of the first coordinate in the whole model times the Weyl multiplier.
        row_weyl: uint32, likewise of the distance of two rows.
        key: address of uint32 [6], `DitherKey.words`.
        high_share: uint32, what the number's high word adds to the first of them, and to the third.
        scale: float32, what makes magnitudes positions ("uniform") or normalised.
        limit: float32, what larger magnitudes are lowered to first, if is_limited.
        lines: address of float32, of the `KernelTable`; so are levels and cells.
        magnitudes: address of float32 [2^(bits-1)], the codebook's levels; read where rounding is to nearest.
        bits: literal; so are lanes, shift (the fraction bits), method, is_stratified, is_limited and is_nearest (0 or
            1).
    """
    words = types.uint32
    literals = [kind.literal_value for kind in (bits, lanes, shift, method, is_stratified, is_limited, is_nearest)]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits, lanes, shift, method, is_stratified, is_limited, is_nearest = literals
        source, target, weyl, row_weyl, key, high_share, scale, limit, lines, levels, cells, magnitudes = arguments[:12]
        key, cells = (builder.inttoptr(address, _WORD.as_pointer()) for address in (key, cells))
        lines, levels, magnitude_pointer = (
            builder.inttoptr(address, _FLOAT.as_pointer()) for address in (lines, levels, magnitudes)
        )
        first, common_first = (builder.add(_scalar(builder, key, n), high_share) for n in (0, 2))
        width = _encoded_width(method)
        row_step = Words.filled(builder, row_weyl, width)
        hashed = _Hash(builder, first, _scalar(builder, key, 1), width, is_crowded=method == MINIMUM)
        limits = Floats.filled(builder, limit, width)
        rounding = _Rounding(builder, method, bits, (lines, levels, cells), Floats.filled(builder, scale, width))
        for begin in range(0, lanes, width):
            places = [_moved(builder, source, 4 * (row * lanes + begin)) for row in range(ROWS)]
            magnitudes = [(Words.load(builder, place, width) & 0x7FFFFFFF).as_floats() for place in places]
            if is_limited:
                magnitudes = [magnitude.minimum(limits) for magnitude in magnitudes]
            positions = rounding.positions(magnitudes)
            if is_nearest:
                way = REGISTERS if bits - 1 <= bits_in_registers() else rounding.way
                level_table = load_table(builder, magnitude_pointer, bits - 1, way)
                code_words = _nearest_codes(rounding, positions, places, level_table, bits, shift)
                for index in range(bits):
                    plane = _plane(*code_words, index, bits)
                    plane.store_low_bytes(_moved(builder, target, index * lanes + begin))
                continue
            number = Words.filled(builder, weyl, width) + Words.multiples(builder, _WEYL, width, begin)
            strata = _Strata(builder, key, common_first, number, row_step) if is_stratified else None
            # A magnitude is at most the norm, times (1 + 2^-23) with what roundings add: the rounded position is at
            # most that of the highest level. Stratified bits may be 2^16, by a rounding.
            is_bounded = method == UNIFORM and not is_stratified
            words = [Words.multiples(builder, 0, width)] * 2  # of rows 0-3 and of rows 4-7
            number = number + row_step + row_step + row_step
            for row in reversed(range(ROWS // 2)):
                both = hashed(number)
                for half, start in enumerate(_starts(both, shift)):
                    place = row + half * ROWS // 2
                    values = Words.load(builder, places[place], width)
                    if strata is not None:
                        random = strata.dither(both >> 16 if half else both & 0xFFFF, place, values)
                        start = (random >> (16 - shift)) + _ROUNDING_BITS
                    code = _codes(values, rounding.raised(positions[place], start), bits, shift, is_bounded)
                    words[half] = words[half].shifted_in(code, bits)
                number = number - row_step
            low, high = words
            for index in range(bits):
                _plane(low, high, index, bits).store_low_bytes(_moved(builder, target, index * lanes + begin))
        return context.get_dummy_value()

    address = types.uint64
    numbers = address, address, words, words, address, words, types.float32, types.float32
    switches = is_stratified, is_limited, is_nearest
    return types.void(*numbers, *[address] * 4, bits, lanes, shift, method, *switches), generate


@intrinsic(prefer_literal=True)
def find_positions(
    context: Any,
    source: Any,
    target: Any,
    lines: Any,
    levels: Any,
    cells: Any,
    bits: Any,
    method: Any,
) -> tuple[Signature, Callable[..., Any]]:
    """Find the positions of one tile's magnitudes: the part of encoding that methods differ in, to be timed alone.

    Arguments of the compiled function:
        source: address of float32 [ROWS, 16], normalised magnitudes.
        target: address of float32 [ROWS, 16], written.
        lines: address of float32, of the `KernelTable`; so are levels and cells.
        bits: literal, and so is method.
    """
    literals = bits.literal_value, method.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, target, lines, levels, cells = arguments[:5]
        cells = builder.inttoptr(cells, _WORD.as_pointer())
        lines, levels = (builder.inttoptr(address, _FLOAT.as_pointer()) for address in (lines, levels))
        bits, method = literals
        one = Floats.filled(builder, ir.Constant(_FLOAT, 1.0), _WIDTH)
        rounding = _Rounding(builder, method, bits, (lines, levels, cells), one)
        offsets = [4 * _WIDTH * row for row in range(ROWS)]
        magnitudes = [Floats.load(builder, _moved(builder, source, offset), _WIDTH) for offset in offsets]
        for offset, position in zip(offsets, rounding.positions(magnitudes), strict=True):
            position.store(_moved(builder, target, offset))
        return context.get_dummy_value()

    return types.void(*[types.uint64] * 5, bits, method), generate


@intrinsic(prefer_literal=True)
def decode_tile(
    context: Any,
    source: Any,
    target: Any,
    norm: Any,
    levels: Any,
    bits: Any,
    lanes: Any,
    is_first: Any,
    way: Any,
) -> tuple[Signature, Callable[..., Any]]:
    """Unpack one tile, and store its values, or add them to what is there.

    Arguments of the compiled function:
        source: address of uint8 [bits, lanes].
        target: address of float32 [ROWS, lanes].
        norm: float32, finite.
        levels: address of float32 [2^bits], `reference.signed_levels`.
        bits: literal; so are lanes, is_first (1 to store, 0 to add) and way (of the level table, see `vectors.py`).
    """
    literals = [kind.literal_value for kind in (bits, lanes, is_first, way)]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits, lanes, is_first, way = literals
        source, target = arguments[:2]
        norms = Floats.filled(builder, arguments[2], _WIDTH)
        table = load_table(builder, builder.inttoptr(arguments[3], _FLOAT.as_pointer()), bits, way)
        for first in range(0, lanes, _WIDTH):
            low = high = Words.multiples(builder, 0, _WIDTH)
            middle = 4 * bits
            for index in range(bits):
                byte = Words.load_bytes(builder, _moved(builder, source, index * lanes + first), _WIDTH)
                begin = 8 * index
                if begin < middle:
                    low = low | (byte << begin)
                if begin >= middle:
                    high = high | (byte << (begin - middle))
                elif begin + 8 > middle:
                    high = high | (byte >> (middle - begin))
            for row in range(ROWS):
                word = low if row < ROWS // 2 else high
                value = norms * table.look_up(word >> (row % (ROWS // 2) * bits))
                place = _moved(builder, target, 4 * (row * lanes + first))
                if not is_first:
                    value = Floats.load(builder, place, _WIDTH) + value
                value.store(place)
        return context.get_dummy_value()

    switches = is_first, way
    return types.void(types.uint64, types.uint64, types.float32, types.uint64, bits, lanes, *switches), generate
