"""32-bit arithmetic for Numba kernels.

Numba widens expressions of 32-bit integers to 64 bits, which halves the width of every vector instruction. These
helpers stay in 32 bits, wrap around, and compile to one instruction each.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
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
def fused_multiply_add(context: Any, a: Any, x: Any, b: Any) -> tuple[Signature, Callable[..., Any]]:
    """A * x + b of float32, rounded once."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


@intrinsic
def truncated(context: Any, value: Any) -> tuple[Signature, Callable[..., Any]]:
    """Integer part of a float32 between 0 and 2^31, as uint32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fptosi(arguments[0], _WORD)

    return types.uint32(types.float32), generate


def pointer(kind: Any) -> Callable[..., tuple[Signature, Callable[..., Any]]]:
    """For `intrinsic`: converts an address (uint64) to a pointer to a type of Numba, for `numba.carray`."""

    def typing(context: Any, address: Any) -> tuple[Signature, Callable[..., Any]]:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(types.CPointer(kind)))

        return types.CPointer(kind)(types.uint64), generate

    return typing


byte_pointer = intrinsic(pointer(types.uint8))
half_pointer = intrinsic(pointer(types.uint16))
word_pointer = intrinsic(pointer(types.uint32))
float_pointer = intrinsic(pointer(types.float32))
double_pointer = intrinsic(pointer(types.float64))
