"""Vectors of 32-bit elements in LLVM's intermediate language, written like arithmetic.

For the bodies of Numba intrinsics. LLVM turns a vector of any length into registers of whatever width the processor
has (or into single operations), so the same code serves every target. Words wrap around; nothing is contracted:
products and sums of floats are rounded one by one, except in `Floats.fused`.
"""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils

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
        kind = self.value.type
        function = cgutils.get_or_insert_function(
            self.builder.module, ir.FunctionType(kind, [kind] * 3), f"llvm.fma.v{self.count}f32"
        )
        return Floats(self.builder, self.builder.call(function, [self.value, factor.value, addend.value]))

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
        return self.fused(Floats(self.builder, signs), Floats(self.builder, partners))

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


class Table:
    """A table of 2^bits floats in memory, taken into registers where the processor can look up there and it fits.

    AVX-512 has one instruction that finds 16 numbers in a register, or in two, AVX2 one that finds 8 numbers in one; a
    gather takes several times as long.
    """

    def __init__(self, context: Any, builder: Any, pointer: Any, bits: int) -> None:
        """Load the table if it fits.

        Args:
            context: of Numba's code generation.
            builder: of LLVM's code.
            pointer: to float32 [2^bits].
            bits: of a place.
        """
        self._builder, self._pointer, self._bits = builder, pointer, bits
        features = context.codegen().magic_tuple()[2].split(",")
        self._has_avx512 = "+avx512f" in features
        self._lanes = 16 if self._has_avx512 else 8
        self._registers: list[Any] = []
        if bits <= (6 if self._has_avx512 else 5 if "+avx2" in features else 0):
            loaded = Floats.load(builder, builder.ptrtoint(pointer, _LONG), 1 << bits).value
            nothing = ir.Constant(loaded.type, ir.Undefined)
            for begin in range(0, 1 << bits, self._lanes):
                places = [min(begin + lane, (1 << bits) - 1) for lane in range(self._lanes)]
                self._registers.append(builder.shuffle_vector(loaded, nothing, _constant(_WORD, places)))

    def look_up(self, places: Words) -> Floats:
        """The element at each place, of which only the low bits count.

        Args:
            places: 16 words.
        """
        if not self._registers:
            return look_up(self._pointer, places & ((1 << self._bits) - 1))
        builder, count = self._builder, places.count
        if count > self._lanes:
            halves = [Words(builder, _half(builder, places.value, begin)) for begin in (0, count // 2)]
            low, high = (self.look_up(half).value for half in halves)
            return Floats(builder, builder.shuffle_vector(low, high, _constant(_WORD, range(count))))
        if 1 << self._bits < self._lanes:
            places = places & ((1 << self._bits) - 1)
        step = 2 if self._has_avx512 else 1  # registers that one instruction looks in
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
            name = "avx512.permvar.sf.512" if self._has_avx512 else "avx2.permps"
            kinds, arguments = [floats, words], [registers[0], places.value]
        function = cgutils.get_or_insert_function(
            self._builder.module, ir.FunctionType(floats, kinds), f"llvm.x86.{name}"
        )
        return Floats(self._builder, self._builder.call(function, arguments))


def look_up(table: Any, places: Words) -> Floats:
    """table[place] for every place, which are known to lie inside.

    Args:
        table: pointer to float32.
        places: indices below 2^31.
    """
    return Floats(places.builder, _gathered(table, places, _FLOAT, "f32"))


def look_up_pairs(table: Any, places: Words) -> tuple[Floats, Floats]:
    """table[2 place] and table[2 place + 1] for every place, in one access each.

    Args:
        table: pointer to float32.
        places: indices of pairs, below 2^30, known to lie inside.
    """
    builder, count = places.builder, places.count
    pairs = builder.bitcast(_gathered(table, places, _LONG, "i64"), ir.VectorType(_FLOAT, 2 * count))
    nothing = ir.Constant(pairs.type, ir.Undefined)
    first, second = (
        builder.shuffle_vector(pairs, nothing, _constant(_WORD, range(begin, 2 * count, 2))) for begin in (0, 1)
    )
    return Floats(builder, first), Floats(builder, second)


def _gathered(table: Any, places: Words, element: Any, suffix: str) -> Any:
    """Elements of any type from a table that is aligned to 4 bytes."""
    builder, count = places.builder, places.count
    pointers = builder.gep(table, [places.value], source_etype=element)
    pointers.type = ir.VectorType(ir.PointerType(element), count)  # llvmlite does not know of vectors of pointers
    kind, flags = ir.VectorType(element, count), ir.VectorType(ir.IntType(1), count)
    gather = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(kind, [pointers.type, _WORD, flags, kind]),
        f"llvm.masked.gather.v{count}{suffix}.v{count}p0",
    )
    everywhere = ir.Constant(flags, [1] * count)
    return builder.call(gather, [pointers, ir.Constant(_WORD, 4), everywhere, ir.Constant(kind, ir.Undefined)])
