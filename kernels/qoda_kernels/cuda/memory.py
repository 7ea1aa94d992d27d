"""Memory access, atomics and conversions for Numba's CUDA target, by 64-bit address.

Kernels that take addresses instead of arrays launch faster, need no array descriptors in registers, and can follow
tables of addresses, so one launch serves any number of tensors. Addresses are of global memory and aligned to what is
read or written.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.typing.templates import Signature
from numba.extending import intrinsic

_GLOBAL = 1  # NVVM's address space of global memory
_WORD = ir.IntType(32)
_TYPES = {
    types.uint8: ir.IntType(8),
    types.uint16: ir.IntType(16),
    types.uint32: _WORD,
    types.uint64: ir.IntType(64),
    types.float32: ir.FloatType(),
    types.float64: ir.DoubleType(),
}
Intrinsic = Callable[..., tuple[Signature, Callable[..., Any]]]


def _pointer(builder: Any, address: Any, element: Any) -> Any:
    return builder.inttoptr(address, ir.PointerType(element, _GLOBAL))


def _load(kind: Any) -> Intrinsic:
    """Typing function of a load from an address."""

    def typing(context: Any, address: Any) -> tuple[Signature, Callable[..., Any]]:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            place = context.cast(builder, arguments[0], signature.args[0], types.uint64)
            return builder.load(_pointer(builder, place, _TYPES[kind]))

        return kind(address), generate

    return typing


def _store(kind: Any) -> Intrinsic:
    """Typing function of a store to an address."""

    def typing(context: Any, address: Any, value: Any) -> tuple[Signature, Callable[..., Any]]:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            place = context.cast(builder, arguments[0], signature.args[0], types.uint64)
            stored = context.cast(builder, arguments[1], signature.args[1], kind)
            builder.store(stored, _pointer(builder, place, _TYPES[kind]))
            return context.get_dummy_value()

        return types.void(address, value), generate

    return typing


def _atomic(operation: str, kind: Any) -> Intrinsic:
    """Typing function of an atomic read-modify-write that gives the former value."""

    def typing(context: Any, address: Any, value: Any) -> tuple[Signature, Callable[..., Any]]:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            place = context.cast(builder, arguments[0], signature.args[0], types.uint64)
            operand = context.cast(builder, arguments[1], signature.args[1], kind)
            return builder.atomic_rmw(operation, _pointer(builder, place, _TYPES[kind]), operand, "monotonic")

        return kind(address, value), generate

    return typing


load_byte = intrinsic(_load(types.uint8))
load_half_word = intrinsic(_load(types.uint16))
load_word = intrinsic(_load(types.uint32))
load_long = intrinsic(_load(types.uint64))
load_float = intrinsic(_load(types.float32))
load_double = intrinsic(_load(types.float64))
store_byte = intrinsic(_store(types.uint8))
store_half_word = intrinsic(_store(types.uint16))
store_word = intrinsic(_store(types.uint32))
store_long = intrinsic(_store(types.uint64))
store_double = intrinsic(_store(types.float64))
atomic_add_word = intrinsic(_atomic("add", types.uint32))
atomic_add_long = intrinsic(_atomic("add", types.uint64))
atomic_max_word = intrinsic(_atomic("umax", types.uint32))


@intrinsic
def load_four_words(context: Any, address: Any) -> tuple[Signature, Callable[..., Any]]:
    """Four uint32 from an address that is a multiple of 16, in one access."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = builder.load(_pointer(builder, arguments[0], ir.VectorType(_WORD, 4)), align=16)
        words = [builder.extract_element(vector, ir.Constant(_WORD, index)) for index in range(4)]
        return context.make_tuple(builder, signature.return_type, words)

    return types.UniTuple(types.uint32, 4)(types.uint64), generate


@intrinsic
def widen_half(context: Any, half: Any) -> tuple[Signature, Callable[..., Any]]:
    """Float32 value of float16 bits (uint16): exact."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def round_to_half(context: Any, value: Any) -> tuple[Signature, Callable[..., Any]]:
    """Bits (uint16) of the float16 nearest to a float32, to even in a tie."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate


@intrinsic
def double_from_bits(context: Any, bits: Any) -> tuple[Signature, Callable[..., Any]]:
    """Float64 with the bits of a uint64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.DoubleType())

    return types.float64(types.uint64), generate


@intrinsic
def element(context: Any, array: Any, index: Any) -> tuple[Signature, Callable[..., Any]]:
    """array[index] of a one-dimensional shared array, for a uint32 index that is known to lie inside."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.load(builder.gep(data, [builder.zext(arguments[1], ir.IntType(64))]))

    return array.dtype(array, types.uint32), generate
