"""32-bit arithmetic for Numba kernels.

Numba widens expressions of 32-bit integers to 64 bits, which halves the width of every vector instruction. These
helpers stay in 32 bits, wrap around, and compile to one instruction each.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import Signature
from numba.extending import intrinsic

_FLOAT = ir.FloatType()
_WORD = ir.IntType(32)


def _two_words(operation: Callable[[Any, Any, Any], Any]) -> Callable[..., tuple[Signature, Callable[..., Any]]]:
    """Typing function of an operation on two uint32 that gives a uint32."""

    def typing(context: Any, a: Any, b: Any) -> tuple[Signature, Callable[..., Any]]:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            first, second = (
                context.cast(builder, value, kind, types.uint32)
                for value, kind in zip(arguments, signature.args, strict=True)
            )
            return operation(builder, first, second)

        return types.uint32(a, b), generate

    return typing


add = intrinsic(_two_words(lambda builder, a, b: builder.add(a, b)))
subtract = intrinsic(_two_words(lambda builder, a, b: builder.sub(a, b)))
multiply = intrinsic(_two_words(lambda builder, a, b: builder.mul(a, b)))
bit_and = intrinsic(_two_words(lambda builder, a, b: builder.and_(a, b)))
bit_or = intrinsic(_two_words(lambda builder, a, b: builder.or_(a, b)))
bit_xor = intrinsic(_two_words(lambda builder, a, b: builder.xor(a, b)))
shift_left = intrinsic(_two_words(lambda builder, a, b: builder.shl(a, b)))
shift_right = intrinsic(_two_words(lambda builder, a, b: builder.lshr(a, b)))
minimum = intrinsic(_two_words(lambda builder, a, b: builder.select(builder.icmp_unsigned("<", a, b), a, b)))
maximum = intrinsic(_two_words(lambda builder, a, b: builder.select(builder.icmp_unsigned(">", a, b), a, b)))


@intrinsic
def float_bits(context: Any, value: Any) -> tuple[Signature, Callable[..., Any]]:
    """Bits of a float32 as uint32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _WORD)

    return types.uint32(types.float32), generate


@intrinsic
def float_from_bits(context: Any, word: Any) -> tuple[Signature, Callable[..., Any]]:
    """Float32 with the bits of a uint32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(context.cast(builder, arguments[0], signature.args[0], types.uint32), _FLOAT)

    return types.float32(word), generate


@intrinsic
def low_byte(context: Any, word: Any) -> tuple[Signature, Callable[..., Any]]:
    """Low 8 bits of a uint32 as uint8."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.trunc(arguments[0], ir.IntType(8))

    return types.uint8(types.uint32), generate


@intrinsic
def fused_multiply_add(context: Any, a: Any, x: Any, b: Any) -> tuple[Signature, Callable[..., Any]]:
    """A * x + b of float32, rounded once."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


@intrinsic
def float_minimum(context: Any, a: Any, b: Any) -> tuple[Signature, Callable[..., Any]]:
    """The smaller of two float32 that are not NaN."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.select(builder.fcmp_ordered("<", *arguments), *arguments)

    return types.float32(types.float32, types.float32), generate


@intrinsic
def truncated(context: Any, value: Any) -> tuple[Signature, Callable[..., Any]]:
    """Integer part of a float32 between 0 and 2^31, as uint32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fptosi(arguments[0], _WORD)

    return types.uint32(types.float32), generate


@intrinsic
def is_at_most(context: Any, a: Any, b: Any) -> tuple[Signature, Callable[..., Any]]:
    """1 where the float32 a <= b, else 0, as uint32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.zext(builder.fcmp_ordered("<=", *arguments), _WORD)

    return types.uint32(types.float32, types.float32), generate


@intrinsic
def address_to_pointer(context: Any, address: Any) -> tuple[Signature, Callable[..., Any]]:
    """Pointer to bytes from an integer address, for `numba.carray`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.CPointer(types.uint8)))

    return types.CPointer(types.uint8)(address), generate


@intrinsic
def least_line(context: Any, slopes: Any, intercepts: Any, x: Any) -> tuple[Signature, Callable[..., Any]]:
    """Minimum over i of slopes[i] * x + intercepts[i], each rounded once; tuples of float32, unrolled."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        slope_values, intercept_values, position = arguments
        least = None
        for line in range(slopes.count):
            slope = builder.extract_value(slope_values, line)
            value = builder.fma(slope, position, builder.extract_value(intercept_values, line))
            least = value if least is None else builder.select(builder.fcmp_ordered("<", value, least), value, least)
        return least

    return types.float32(slopes, intercepts, types.float32), generate


def _stack_room(builder: Any, kind: Any, count: int) -> Any:
    """Pointer to so many elements on the stack, not initialised; allocated once per call of the kernel."""
    with builder.goto_entry_block():
        return builder.alloca(kind, size=count)


@intrinsic(prefer_literal=True)
def private_table(context: Any, array: Any, capacity: Any) -> tuple[Signature, Callable[..., Any]]:
    """A copy, on the stack, of a contiguous float32 array of at most `capacity` elements (a literal number).

    The compiler then knows that no store can change it, without which loops that look values up are not vectorised.
    Valid until the calling kernel returns.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source = context.make_array(signature.args[0])(context, builder, arguments[0])
        copy = _stack_room(builder, _FLOAT, capacity.literal_value)
        with cgutils.for_range(builder, builder.extract_value(source.shape, 0)) as loop:
            builder.store(builder.load(builder.gep(source.data, [loop.index])), builder.gep(copy, [loop.index]))
        return copy

    return types.CPointer(types.float32)(array, capacity), generate


@intrinsic
def private_bytes(context: Any) -> tuple[Signature, Callable[..., Any]]:
    """256 bytes on the stack, for `numba.carray`; valid until the calling kernel returns."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _stack_room(builder, ir.IntType(8), 256)

    return types.CPointer(types.uint8)(), generate


@intrinsic
def element(context: Any, table: Any, index: Any) -> tuple[Signature, Callable[..., Any]]:
    """table[index] of a `private_table`, for a uint32 index that is known to lie inside."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(builder.gep(arguments[0], [builder.zext(arguments[1], ir.IntType(64))]))

    return types.float32(table, types.uint32), generate


@intrinsic
def last_not_above(context: Any, levels: Any, halvings: Any, x: Any) -> tuple[Signature, Callable[..., Any]]:
    """Largest index i, as uint32, with levels[i] <= x, by bisection without branches.

    levels is a `private_table` of 2^k elements, the first of them not above x; halvings is any tuple of length k, which
    tells the compiler how often to halve.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        index = ir.Constant(_WORD, 0)
        for bit in reversed(range(halvings.count)):
            middle = builder.or_(index, ir.Constant(_WORD, 1 << bit))
            level = builder.load(builder.gep(arguments[0], [builder.zext(middle, ir.IntType(64))]))
            is_not_above = builder.zext(builder.fcmp_ordered("<=", level, arguments[2]), _WORD)
            index = builder.or_(index, builder.shl(is_not_above, ir.Constant(_WORD, bit)))
        return index

    return types.uint32(levels, halvings, types.float32), generate
