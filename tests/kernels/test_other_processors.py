"""The CPU kernels on processors that this machine is not: the same bits without AVX, with AVX2, and code for arm64.

The machine's own kernels are what all other tests run. Here the kernels are compiled once more, in another process.
"""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numba.core.registry import cpu_target

from qoda_kernels.codec import Codec
from tests.kernels.codebooks import codebook_for, context, rotated_codebook, single_slice_plan

CODEBOOKS = (
    codebook_for("uniform", 4),
    codebook_for("minimum", 5, norm="l2"),
    codebook_for("general", 6),
    rotated_codebook("nearest", 3, 512),
)
"""Between them they use most of the vector code: searches of levels, norms, rotation, dither and its absence."""

FEATURES = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
END_OF_PART = "; end of part\n"
ARM64 = "aarch64-unknown-linux-gnu"
# Numba's own counting of references, as LLVM writes it for x86.
_OF_NUMBA = "llvm.x86.atomic.sub.cc.i64"


def digest_of_messages() -> str:
    """Digest of messages and of what is decoded from them."""
    digest = hashlib.sha256()
    values = torch.from_numpy(np.random.default_rng(5).standard_t(3, size=40_000).astype(np.float32))
    for codebook in CODEBOOKS:
        plan = single_slice_plan(values.numel(), codebook)
        codec = Codec(plan, {"other": codebook})
        message = codec.encode([values], context())
        (result,) = codec.decode_mean([message], [context()])
        digest.update(message.numpy().tobytes())
        digest.update(result.numpy().tobytes())
    return digest.hexdigest()


def print_digest() -> None:
    print(digest_of_messages())


def print_digest_and_code() -> None:
    """What another processor makes of the messages, and what Numba hands to LLVM for two of its kernels."""
    from qoda_kernels.cpu.arguments import FLOAT32
    from qoda_kernels.cpu.decoding import decoder
    from qoda_kernels.cpu.encoding import encoder

    print(digest_of_messages())
    for kernel in (encoder(5, 64, "minimum", FLOAT32, False), decoder(5, 64, FLOAT32, "loads")):
        (compiled,) = kernel.owner.overloads.values()
        print(END_OF_PART, compiled.library.get_llvm_str())


def run_as(processor: str, features: str, function: str, cache: Path) -> str:
    """What a function of this file prints in a process that compiles for another processor, with an empty cache."""
    code = f"import runpy; runpy.run_path({__file__!r})[{function!r}]()"
    environment = {
        "NUMBA_CPU_NAME": processor,
        "NUMBA_CPU_FEATURES": features,
        "NUMBA_CACHE_DIR": str(cache),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_same_bits_without_vector_extensions(tmp_path: Path) -> None:
    """Nor a fused multiply-add: it is made of sums and products of doubles."""
    assert run_as("generic", "", "print_digest", tmp_path).strip() == digest_of_messages()


@pytest.mark.skipif("+avx2" not in FEATURES or "+fma" not in FEATURES, reason="this processor has no AVX2")
def test_the_same_bits_with_avx2(tmp_path: Path) -> None:
    """Most processors have it but not AVX-512, and look up levels by other instructions."""
    assert run_as("haswell", "+avx2,+fma", "print_digest", tmp_path).strip() == digest_of_messages()


@pytest.mark.skipif("+fma" not in FEATURES, reason="this processor has no fused multiply-add")
def test_the_kernels_compile_for_arm64_to_vector_code_without_contraction(tmp_path: Path) -> None:
    """A fused multiply-add that is not meant would give other bits than the reference.

    The code is what Numba hands to LLVM for a processor whose only extension is the one that arm64 always has. Code in
    the cache would not be printed, so it is empty.
    """
    digest, *texts = run_as("generic", "+fma", "print_digest_and_code", tmp_path).split(END_OF_PART)
    assert digest.strip() == digest_of_messages()
    from llvmlite import binding as llvm

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(ARM64).create_target_machine(cpu="generic", opt=2)
    fused = []
    for text in texts:
        assert set(re.findall(r"llvm\.x86\.[\w.]+", text)) <= {_OF_NUMBA}
        # What the kernels mean to fuse is set apart, and must not be made of a product and a sum.
        text = text.replace("llvm.fma.", "fused_on_purpose_").replace(_OF_NUMBA, "numba_decrease_count")
        text = re.sub(r'target triple = ".*"', f'target triple = "{ARM64}"', text)
        text = re.sub(r'target datalayout = ".*"', f'target datalayout = "{machine.target_data}"', text)
        assembly = machine.emit_assembly(llvm.parse_assembly(text))
        fused.append("fused_on_purpose_" in assembly)
        assert not re.findall(r"\bf(?:n?m(?:add|sub)|ml[as])\b.*", assembly)
        assert len(re.findall(r"\bv\d+\.4s\b", assembly)) > 100
    assert fused == [True, False]  # searches of levels fuse, decoding does not
