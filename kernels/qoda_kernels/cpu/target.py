"""What the processor that Numba compiles for can do: this machine's, or another one that its variables name."""

from functools import cache

from llvmlite import binding as llvm
from numba.core.registry import cpu_target


@cache
def target() -> tuple[str, str, frozenset[str]]:
    """Triple, name and features ("avx2", "fma", ...) of the processor, as LLVM calls them."""
    triple, name, features = cpu_target.target_context.codegen().magic_tuple()
    return triple, name, frozenset(feature[1:] for feature in features.split(",") if feature.startswith("+"))


def left_out() -> frozenset[str]:
    """Features that this machine's processor has and the one that Numba compiles for has not."""
    return frozenset(name for name, is_here in llvm.get_host_cpu_features().items() if is_here) - target()[2]


def is_x86() -> bool:
    """Whether it is an x86-64 processor."""
    return target()[0].startswith("x86_64")


def has_fused_multiply_add() -> bool:
    """Whether a product and a sum can be rounded once, in one instruction; arm64 always has it."""
    return not is_x86() or "fma" in target()[2]


def has_avx512() -> bool:
    """Whether it has 32 registers of 16 words, gathers, and look-ups in two registers."""
    return "avx512f" in target()[2]


def has_avx2() -> bool:
    """Whether it has 16 registers of 8 words, and look-ups in one of them."""
    return "avx2" in target()[2]


def bits_in_registers() -> int:
    """Bits of a place in a table that is looked up in registers faster than anywhere else; 0 where that cannot be."""
    return 6 if has_avx512() else 5 if has_avx2() else 0


def vector_extension() -> tuple[str, int]:
    """Name of the widest vector instructions that kernels are compiled to, and how many float32 numbers each takes."""
    if not is_x86():
        return "NEON", 4  # which every arm64 processor has
    features = target()[2]
    widths = {"avx512f": ("AVX-512", 16), "avx2": ("AVX2", 8), "avx": ("AVX", 8)}
    return next((found for feature, found in widths.items() if feature in features), ("SSE", 4))
