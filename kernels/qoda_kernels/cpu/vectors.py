"""Vectors of 32-bit elements in LLVM's intermediate language, written like arithmetic.

For the bodies of Numba intrinsics. LLVM turns a vector of any length into registers of whatever width the processor
has (or into single operations), so the same code serves every target. Words wrap around; nothing is contracted:
products and sums of floats are rounded one by one, except in `Floats.fused`.
"""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from qoda_kernels.cpu.target import has_avx512, has_fused_multiply_add

_BYTE, _WORD, _LONG, _FLOAT = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()


def _constant(kind: Any, values: Sequence[int | float]) -> Any:
    return ir.Constant(ir.VectorType(kind, len(values)), list(values))


def _filled(builder: Any, kind: Any, count: int, scalar: Any) -> Any:
    """Vector of `count` copies of a scalar."""
    nothing = ir.Constant(ir.VectorType(kind, count), ir.Undefined)
    first = builder.insert_element(nothing, scalar, ir.Constant(_WORD, 0))
    return builder.shuffle_vector(first, nothing, _constant(_WORD, [0] * count))


def _half(builder: Any, value: Any, begin: int) -> Any:
    places = _constant(_WORD, range(begin, begin + value.type.count // 2))
    return builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), places)


def _joined(builder: Any, parts: list[Any]) -> Any:
    """Vectors of one length, a power of two of them, behind each other."""
    while len(parts) > 1:
        places = _constant(_WORD, range(2 * parts[0].type.count))
        parts = [builder.shuffle_vector(low, high, places) for low, high in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _place(builder: Any, address: Any, kind: Any, count: int) -> Any:
    return builder.inttoptr(address, ir.PointerType(ir.VectorType(kind, count)))


class Words:
    """A vector of uint32."""

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder = builder
        self.value = value

    @classmethod
    def load(cls, builder: Any, address: Any, count: int) -> "Words":
        """The words at an address (any alignment)."""
        return cls(builder, builder.load(_place(builder, address, _WORD, count), align=1))

    @classmethod
    def load_bytes(cls, builder: Any, address: Any, count: int) -> "Words":
        """The bytes at an address, each as a word."""
        loaded = builder.load(_place(builder, address, _BYTE, count), align=1)
        return cls(builder, builder.zext(loaded, ir.VectorType(_WORD, count)))

    @classmethod
    def filled(cls, builder: Any, scalar: Any, count: int) -> "Words":
        """Copies of a scalar that is known at run time."""
        return cls(builder, _filled(builder, _WORD, count, scalar))

    @classmethod
    def multiples(cls, builder: Any, factor: int, count: int, first: int = 0) -> "Words":
        """The products first * factor, (first + 1) * factor, ... modulo 2^32."""
        return cls(builder, _constant(_WORD, [(first + n) * factor & 0xFFFFFFFF for n in range(count)]))

    @property
    def count(self) -> int:
        """Number of elements."""
        return int(self.value.type.count)

    def __add__(self, other: "Words | int") -> "Words":
        return Words(self.builder, self.builder.add(self.value, self._value(other)))

    def __sub__(self, other: "Words | int") -> "Words":
        return Words(self.builder, self.builder.sub(self.value, self._value(other)))

    def __mul__(self, other: "Words | int") -> "Words":
        return Words(self.builder, self.builder.mul(self.value, self._value(other)))

    def __and__(self, other: "Words | int") -> "Words":
        return Words(self.builder, self.builder.and_(self.value, self._value(other)))

    def __or__(self, other: "Words | int") -> "Words":
        return Words(self.builder, self.builder.or_(self.value, self._value(other)))

    def __xor__(self, other: "Words | int") -> "Words":
        return Words(self.builder, self.builder.xor(self.value, self._value(other)))

    def __lshift__(self, places: int) -> "Words":
        return self if places == 0 else Words(self.builder, self.builder.shl(self.value, self._value(places)))

    def __rshift__(self, places: int) -> "Words":
        return self if places == 0 else Words(self.builder, self.builder.lshr(self.value, self._value(places)))

    def shifted_in(self, lower: "Words", places: int) -> "Words":
        """Each element shifted to the left by some places, which the highest bits of `lower` fill."""
        kind = self.value.type
        function = cgutils.get_or_insert_function(
            self.builder.module, ir.FunctionType(kind, [kind] * 3), f"llvm.fshl.v{self.count}i32"
        )
        return Words(self.builder, self.builder.call(function, [self.value, lower.value, self._value(places)]))

    def shifted_right(self, places: "Words") -> "Words":
        """Each element shifted by its own number of places."""
        return Words(self.builder, self.builder.lshr(self.value, places.value))

    def minimum(self, other: "Words | int") -> "Words":
        """The smaller ones."""
        return self._chosen("<", self._value(other))

    def maximum(self, other: "Words | int") -> "Words":
        """The larger ones."""
        return self._chosen(">", self._value(other))

    def sign_mask(self) -> "Words":
        """All bits set where the highest one is."""
        return Words(self.builder, self.builder.ashr(self.value, self._value(31)))

    def largest(self) -> Any:
        """The largest element, a scalar."""
        found = self
        while found.count > 1:
            upper = Words(self.builder, _half(self.builder, found.value, found.count // 2))
            found = Words(self.builder, _half(self.builder, found.value, 0)).maximum(upper)
        return self.builder.extract_element(found.value, ir.Constant(_WORD, 0))

    def as_floats(self) -> "Floats":
        """Floats with these bits."""
        return Floats(self.builder, self.builder.bitcast(self.value, ir.VectorType(_FLOAT, self.count)))

    def to_floats(self) -> "Floats":
        """Floats with these values, which are below 2^24."""
        return Floats(self.builder, self.builder.sitofp(self.value, ir.VectorType(_FLOAT, self.count)))

    def longs(self) -> Any:
        """A vector of uint64 with these values."""
        return self.builder.zext(self.value, ir.VectorType(_LONG, self.count))

    def store_low_bytes(self, address: Any) -> None:
        """Store the low byte of every element."""
        low = self.builder.trunc(self.value, ir.VectorType(_BYTE, self.count))
        self.builder.store(low, _place(self.builder, address, _BYTE, self.count), align=1)

    def _value(self, other: "Words | int") -> Any:
        return _constant(_WORD, [other] * self.count) if isinstance(other, int) else other.value

    def _chosen(self, relation: str, other: Any) -> "Words":
        is_own = self.builder.icmp_unsigned(relation, self.value, other)
        return Words(self.builder, self.builder.select(is_own, self.value, other))


class Floats:
    """A vector of float32."""

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder = builder
        self.value = value

    @classmethod
    def load(cls, builder: Any, address: Any, count: int) -> "Floats":
        """The floats at an address."""
        return cls(builder, builder.load(_place(builder, address, _FLOAT, count), align=4))

    @classmethod
    def filled(cls, builder: Any, scalar: Any, count: int) -> "Floats":
        """Copies of a scalar that is known at run time."""
        return cls(builder, _filled(builder, _FLOAT, count, scalar))

    @property
    def count(self) -> int:
        """Number of elements."""
        return int(self.value.type.count)

    def __add__(self, other: "Floats | float") -> "Floats":
        return Floats(self.builder, self.builder.fadd(self.value, self._value(other)))

    def __sub__(self, other: "Floats") -> "Floats":
        return Floats(self.builder, self.builder.fsub(self.value, other.value))

    def __mul__(self, other: "Floats") -> "Floats":
        return Floats(self.builder, self.builder.fmul(self.value, other.value))

    def fused(self, factor: "Floats", addend: "Floats") -> "Floats":
        """Self * factor + addend, rounded once."""
        if not has_fused_multiply_add():
            return self._fused_in_doubles(factor, addend)
        kind = self.value.type
        function = cgutils.get_or_insert_function(
            self.builder.module, ir.FunctionType(kind, [kind] * 3), f"llvm.fma.v{self.count}f32"
        )
        return Floats(self.builder, self.builder.call(function, [self.value, factor.value, addend.value]))

    def _fused_in_doubles(self, factor: "Floats", addend: "Floats") -> "Floats":
        """`fused` for processors that lack it, whose C library would take some nanoseconds for each element.

        Products of floats are exact in doubles. Their sums with the addend are rounded to odd: to the neighbour whose
        last bit is 1, unless they are exact. Rounded to float, that is the same as if it had been rounded once
        (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
        """
        builder = self.builder
        doubles, longs = (ir.VectorType(kind, self.count) for kind in (ir.DoubleType(), _LONG))
        one, two, addends = (builder.fpext(each.value, doubles) for each in (self, factor, addend))
        products = builder.fmul(one, two)
        sums = builder.fadd(products, addends)
        # What rounding left out, exactly (Knuth's two-sum).
        added = builder.fsub(sums, products)
        errors = builder.fadd(builder.fsub(products, builder.fsub(sums, added)), builder.fsub(addends, added))
        bits, nothing = builder.bitcast(sums, longs), ir.Constant(doubles, [0.0] * self.count)
        one_long = ir.Constant(longs, [1] * self.count)
        is_even = builder.icmp_unsigned("==", builder.and_(bits, one_long), ir.Constant(longs, [0] * self.count))
        is_inexact = builder.fcmp_ordered("!=", errors, nothing)
        # The true sum lies further from zero than the rounded one where both have the same sign.
        signs = builder.xor(builder.bitcast(errors, longs), bits)
        is_further = builder.icmp_signed(">=", signs, ir.Constant(longs, [0] * self.count))
        step = builder.select(is_further, one_long, ir.Constant(longs, [-1] * self.count))
        moved = builder.add(bits, step)
        odd = builder.select(builder.and_(is_even, is_inexact), moved, bits)
        return Floats(builder, builder.fptrunc(builder.bitcast(odd, doubles), self.value.type))

    def minimum(self, other: "Floats") -> "Floats":
        """The smaller ones; none may be NaN."""
        is_own = self.builder.fcmp_ordered("<", self.value, other.value)
        return Floats(self.builder, self.builder.select(is_own, self.value, other.value))

    def at_least(self, other: "Floats") -> Words:
        """1 where self >= other, else 0."""
        flags = self.builder.fcmp_ordered(">=", self.value, other.value)
        return Words(self.builder, self.builder.zext(flags, ir.VectorType(_WORD, self.count)))

    def where(self, flags: Words, other: "Floats") -> "Floats":
        """Own elements where a word is not 0, others elsewhere."""
        is_own = self.builder.icmp_unsigned("!=", flags.value, _constant(_WORD, [0] * self.count))
        return Floats(self.builder, self.builder.select(is_own, self.value, other.value))

    def with_neighbours(self, distance: int) -> "Floats":
        """Sum a + b and difference a - b of each two elements a, b a power of two apart, in their places."""
        places = range(self.count)
        nothing = ir.Constant(self.value.type, ir.Undefined)
        partners = self.builder.shuffle_vector(
            self.value, nothing, _constant(_WORD, [place ^ distance for place in places])
        )
        signs = _constant(_FLOAT, [-1.0 if place & distance else 1.0 for place in places])
        signed, partner = Floats(self.builder, signs), Floats(self.builder, partners)
        # The product is exact, so that both are the same number.
        return self.fused(signed, partner) if has_fused_multiply_add() else self * signed + partner

    def parted(self) -> "tuple[Floats, Floats]":
        """Elements 0, 2, 4, ... and elements 1, 3, 5, ..."""
        return self.every(2, 0), self.every(2, 1)

    def every(self, step: int, first: int) -> "Floats":
        """Elements first, first + step, first + 2 step, ..."""
        places = _constant(_WORD, range(first, self.count, step))
        nothing = ir.Constant(self.value.type, ir.Undefined)
        return Floats(self.builder, self.builder.shuffle_vector(self.value, nothing, places))

    def with_one_nan(self) -> "Floats":
        """The same, with the bits 0x7FC00000 for every NaN."""
        flags = self.builder.fcmp_unordered("uno", self.value, self.value)
        nan = self._value(float("nan"))
        return Floats(self.builder, self.builder.select(flags, nan, self.value))

    def truncated(self) -> Words:
        """Integer parts of values from 0 to 2^31."""
        return Words(self.builder, self.builder.fptosi(self.value, ir.VectorType(_WORD, self.count)))

    def as_words(self) -> Words:
        """The bits."""
        return Words(self.builder, self.builder.bitcast(self.value, ir.VectorType(_WORD, self.count)))

    def store(self, address: Any) -> None:
        """Store all elements."""
        self.builder.store(self.value, _place(self.builder, address, _FLOAT, self.count), align=4)

    def _value(self, other: "Floats | float") -> Any:
        return _constant(_FLOAT, [other] * self.count) if isinstance(other, float) else other.value


REGISTERS, GATHERS, LOADS = range(3)
"""Ways to look up numbers in a table: in registers; in memory by instructions that gather; in memory one by one."""


class Table:
    """A table of 2^bits floats.

    AVX-512 has one instruction that finds 16 numbers in a register, or in two, AVX2 one that finds 8 numbers in one.
    """

    def __init__(self, elements: Floats) -> None:
        """Hold 2^bits floats in registers."""
        self._builder, count = elements.builder, elements.count
        self._lanes = 16 if has_avx512() else 8
        # A table smaller than a register fills it several times over: higher bits of a place do not matter then.
        nothing = ir.Constant(elements.value.type, ir.Undefined)
        self._registers = [
            self._builder.shuffle_vector(
                elements.value, nothing, _constant(_WORD, [(begin + lane) % count for lane in range(self._lanes)])
            )
            for begin in range(0, count, self._lanes)
        ]

    def look_up(self, places: Words) -> Floats:
        """The element at each place, of which only the low bits count.

        Args:
            places: 8 or 16 words.
        """
        builder, count = self._builder, places.count
        if count > self._lanes:
            halves = [Words(builder, _half(builder, places.value, begin)) for begin in (0, count // 2)]
            return Floats(builder, _joined(builder, [self.look_up(half).value for half in halves]))
        step = 2 if has_avx512() else 1  # registers that one instruction looks in
        found = [self._permuted(self._registers[n : n + step], places) for n in range(0, len(self._registers), step)]
        bit = self._lanes * step
        while len(found) > 1:
            found = [high.where(places & bit, low) for low, high in zip(found[::2], found[1::2], strict=True)]
            bit *= 2
        return found[0]

    def _permuted(self, registers: Sequence[Any], places: Words) -> Floats:
        """The elements of one register, or of two; higher bits of the places are ignored."""
        floats, words = registers[0].type, places.value.type
        if len(registers) == 2:
            name, kinds = "avx512.vpermi2var.ps.512", [floats, words, floats]
            arguments = [registers[0], places.value, registers[1]]
        else:
            name = "avx512.permvar.sf.512" if has_avx512() else "avx2.permps"
            kinds, arguments = [floats, words], [registers[0], places.value]
        function = cgutils.get_or_insert_function(
            self._builder.module, ir.FunctionType(floats, kinds), f"llvm.x86.{name}"
        )
        return Floats(self._builder, self._builder.call(function, arguments))


class TableInMemory:
    """A table of 2^bits floats in memory."""

    def __init__(self, pointer: Any, bits: int, way: int) -> None:
        """The table at a pointer to float32 [2^bits], looked up by GATHERS or LOADS."""
        self._pointer, self._last, self._way = pointer, (1 << bits) - 1, way

    def look_up(self, places: Words) -> Floats:
        """The element at each place, of which only the low bits count."""
        return look_up(self._pointer, places & self._last, self._way)


def load_table(builder: Any, pointer: Any, bits: int, way: int) -> "Table | TableInMemory":
    """The table of 2^bits float32 at a pointer, looked up in one of the three ways."""
    if way != REGISTERS:
        return TableInMemory(pointer, bits, way)
    return Table(Floats.load(builder, builder.ptrtoint(pointer, _LONG), 1 << bits))


def look_up(table: Any, places: Words, way: int) -> Floats:
    """table[place] for every place, which are known to lie inside.

    Args:
        table: pointer to float32.
        places: indices below 2^31.
        way: GATHERS or LOADS.
    """
    return Floats(places.builder, _found(table, places, _FLOAT, way))


def look_up_pairs(table: Any, places: Words, way: int) -> tuple[Floats, Floats]:
    """table[2 place] and table[2 place + 1] for every place, in one access each.

    Args:
        table: pointer to float32.
        places: indices of pairs, below 2^30, known to lie inside.
        way: GATHERS or LOADS.
    """
    builder, count = places.builder, places.count
    pairs = builder.bitcast(_found(table, places, _LONG, way), ir.VectorType(_FLOAT, 2 * count))
    return Floats(builder, pairs).parted()


def _found(table: Any, places: Words, element: Any, way: int) -> Any:
    """Elements of any type from a table that is aligned to 4 bytes."""
    return (_gathered if way == GATHERS else _loaded_one_by_one)(table, places, element)


def _gathered(table: Any, places: Words, element: Any) -> Any:
    builder, count = places.builder, places.count
    pointers = builder.gep(table, [places.value], source_etype=element)
    pointers.type = ir.VectorType(ir.PointerType(element), count)  # llvmlite does not know of vectors of pointers
    kind, flags = ir.VectorType(element, count), ir.VectorType(ir.IntType(1), count)
    suffix = "f32" if element is _FLOAT else "i64"
    gather = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(kind, [pointers.type, _WORD, flags, kind]),
        f"llvm.masked.gather.v{count}{suffix}.v{count}p0",
    )
    everywhere = ir.Constant(flags, [1] * count)
    return builder.call(gather, [pointers, ir.Constant(_WORD, 4), everywhere, ir.Constant(kind, ir.Undefined)])


def _loaded_one_by_one(table: Any, places: Words, element: Any) -> Any:
    """Most of the time goes into bringing the places to general registers: they are taken two at a time."""
    builder, count = places.builder, places.count
    elements = builder.bitcast(table, ir.PointerType(element))
    low_word = ir.Constant(_LONG, 0xFFFFFFFF)
    pairs = builder.bitcast(places.value, ir.VectorType(_LONG, count // 2))
    numbers: list[Any] = []
    for index in range(count // 2):
        pair = builder.extract_element(pairs, ir.Constant(_WORD, index))
        numbers += [builder.and_(pair, low_word), builder.lshr(pair, ir.Constant(_LONG, 32))]
    per_part = 2 if element is _LONG else 4  # 16 bytes
    parts = []
    for begin in range(0, count, per_part):
        part = ir.Constant(ir.VectorType(element, per_part), ir.Undefined)
        for lane in range(per_part):
            loaded = builder.load(builder.gep(elements, [numbers[begin + lane]]), align=4)
            part = builder.insert_element(part, loaded, ir.Constant(_WORD, lane))
        parts.append(part)
    return _joined(builder, parts)
