"""The CUDA kernels without a GPU: what NVVM and ptxas make of them, and that the PTX computes the codec's bits.

Every kernel is compiled for compute capability 8.0 and 9.0 and assembled. The compiled PTX then runs on
`ptx_machine.py` (NumPy, real memory, strict bounds and alignment) and must equal the CPU codec bit for bit. The host's
side of a launch is `test_cuda_launch.py`'s. Left to the tests with the marker `gpu`: what ptxas makes of the PTX, races
between blocks, streams, CUDA graphs.
"""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qoda_kernels.codebook import Codebook
from qoda_kernels.errors import PlanError
from tests.kernels import device_checks as checks
from tests.kernels.codebooks import codebook_for, context, methods_of
from tests.kernels.ptx_device import Capability, PtxDevice, compile_ptx, kernels, program
from tests.kernels.ptx_machine import Machine, Memory, Program, PtxError

CAPABILITIES: tuple[Capability, ...] = ((8, 0), (9, 0))
# 64 otherwise: four blocks a multiprocessor, else three.
REGISTERS = {
    ("encode", (8, 0)): 80,  # three blocks
    ("encode_stratified", (8, 0)): 80,
    ("encode_stratified", (9, 0)): 80,
    ("encode_rotated", (8, 0)): 112,  # two blocks
    ("encode_rotated", (9, 0)): 112,
    ("decode_mean_rotated", (8, 0)): 80,
    ("decode_mean_rotated", (9, 0)): 80,
}
VARIANTS = [(bits, method) for bits in range(2, 9) for method in methods_of(bits)]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", list(kernels.SIGNATURES))
def test_assembles_without_spills_and_within_the_register_ceiling(
    name: str, capability: Capability, tmp_path: Path
) -> None:
    assembler = shutil.which("ptxas")
    if assembler is None:
        pytest.skip("ptxas is not installed")
    source = tmp_path / "kernel.ptx"
    source.write_text(compile_ptx(name, capability))
    architecture = f"sm_{capability[0]}{capability[1]}"
    command = [assembler, "-v", f"-arch={architecture}", str(source), "-o", str(tmp_path / "kernel.cubin")]
    report = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stderr
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report
    used = re.search(r"Used (\d+) registers", report)
    assert used is not None
    assert int(used.group(1)) <= REGISTERS.get((name, capability), 64), report


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", list(kernels.SIGNATURES))
def test_ptx_holds_no_contracted_sum_and_no_call(name: str, capability: Capability) -> None:
    """Fused are lines of codebooks and divisions by the number of strata only.

    Other sums and products say how they round; nothing is flushed to zero.
    """
    text = compile_ptx(name, capability)
    parsed = Program.parse(text)
    encodes = name.startswith("encode")
    lines = parsed.count(r"fma\.rn\.f32$") if encodes else 0
    assert parsed.count(r"(fma|mad)\.\w+\.f(32|64)") == lines
    assert encodes == (lines > 0)
    assert lines % 8 == 0  # eight coordinates a line
    assert not encodes or parsed.count(r".*\.f64") == 0  # float64 is for exact slices and statistics
    assert parsed.count(r"(add|mul|sub|div|sqrt)\.f(32|64)") == 0
    assert parsed.count(r".*\.(ftz|approx)") == 0
    assert parsed.count(r"call|ld\.local|st\.local|.*\.local\.") == 0
    assert ".func" not in text


@pytest.mark.parametrize(("bits", "method"), VARIANTS)
def test_every_variant_equals_the_cpu(bits: int, method: str) -> None:
    checks.check_every_variant(PtxDevice(1), bits, method)


@pytest.mark.parametrize(("bits", "method"), [(3, "minimum"), (4, "uniform"), (6, "close")])
def test_codebooks_that_clip_equal_the_cpu(bits: int, method: str) -> None:
    checks.check_clipping(PtxDevice(1), bits, method)


@pytest.mark.parametrize("rotates", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_extreme_buckets_equal_the_cpu(seed: int, rotates: bool) -> None:
    checks.check_extremes(PtxDevice(1), seed, rotates)


@pytest.mark.parametrize(("bits", "method", "strata"), [(4, "uniform", 4), (5, "minimum", 3), (8, "general", 64)])
def test_stratified_random_numbers_equal_the_cpu(bits: int, method: str, strata: int) -> None:
    device = PtxDevice(1)
    checks.check_stratified(device, bits, method, strata)
    assert device.runtime.launches.count("encode_stratified") == 4


@pytest.mark.parametrize(
    ("rounding", "bits", "bucket_size", "strata"),
    [
        ("nearest", 4, 512, 1),
        ("nearest", 2, 128, 3),
        ("nearest, uniform", 6, 256, 1),
        ("stochastic", 3, 1024, 3),
    ],
)
def test_rotated_buckets_equal_the_cpu(rounding: str, bits: int, bucket_size: int, strata: int) -> None:
    device = PtxDevice(1)
    checks.check_rotated(device, rounding, bits, bucket_size, strata)
    assert device.runtime.launches == (["encode_rotated"] * 2 + ["decode_mean_rotated"]) * 2


def test_exact_segments_equal_the_cpu() -> None:
    checks.check_exact_segments(PtxDevice(2))


def test_non_finite_exact_values_stay() -> None:
    checks.check_non_finite_exact_values(PtxDevice(1))


def test_several_codebooks_in_one_launch() -> None:
    device = PtxDevice(2, together=False)
    checks.check_several_codebooks_of_all_methods(device)
    assert device.runtime.launches == (["encode"] * 3 + ["decode_mean"]) * 2


def test_statistics_are_those_of_the_cpu() -> None:
    checks.check_statistics(PtxDevice(2))


def test_messages_of_many_senders() -> None:
    checks.check_messages_of_many_senders(PtxDevice(1))


@pytest.mark.parametrize("seed", range(12))
def test_damage_is_nan_at_once_and_an_error_at_the_next_call(seed: int) -> None:
    checks.check_damage(PtxDevice(1 + seed % 2, together=seed % 3 > 0), seed)


def test_the_wrong_message_is_named() -> None:
    checks.check_the_wrong_message_is_named(PtxDevice(1))


def test_what_does_not_fit_is_refused() -> None:
    checks.check_what_does_not_fit_is_refused(PtxDevice(1))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(data=st.data())
def test_any_layout_equals_the_cpu(data: st.DataObject) -> None:
    """Random segments, codebooks, dtypes, bucket sizes and coordinates."""
    codebooks = {"off": Codebook.exact()}
    for index in range(data.draw(st.integers(1, 3))):
        bits, method = data.draw(st.sampled_from(VARIANTS))
        codebooks[f"type{index}"] = codebook_for(
            method,
            bits,
            bucket_size=128 * data.draw(st.sampled_from([1, 2, 3, 4, 5, 8, 64])),
            norm=data.draw(st.sampled_from(["max", "l2"])),
            norm_format=data.draw(st.sampled_from(["fp32", "bf16"])),
        )
    parts = data.draw(
        st.lists(
            st.tuples(st.sampled_from(list(codebooks)), st.integers(0, 3000), st.sampled_from(list(checks.DTYPES))),
            min_size=1,
            max_size=6,
        )
    )
    device = PtxDevice(data.draw(st.integers(1, 2)), together=data.draw(st.booleans()))
    coordinate, seed = data.draw(st.integers(0, 2**48)), data.draw(st.integers(0, 10**6))
    checks.check_against_codec(device, parts, codebooks, coordinate=coordinate, seed=seed, senders=2)


def test_a_tuple_of_tensors_is_not_looked_at_again_but_a_list_is() -> None:
    device, codebooks = PtxDevice(1), {"on": Codebook.uniform(4)}
    plan = checks.plan_of([("on", 100, torch.float32)], codebooks)
    codec = device.codec(plan, codebooks)
    out = device.place(torch.zeros(plan.message_bytes, dtype=torch.uint8))
    values = (device.place(torch.randn(100)),)
    first = codec.encode(values, context(), out).clone()
    values[0].mul_(-1)  # the same memory holds the next step's gradient
    second = codec.encode(values, context(), out).clone()
    assert not torch.equal(first, second)
    third = codec.encode([device.place(-values[0])], context(), out)
    assert torch.equal(first, third)


def test_a_captured_call_takes_key_and_counter_from_the_device() -> None:
    """The same launch, replayed after `stage`, gives the next step's message; new addresses cannot be captured."""
    device, codebooks = PtxDevice(1), {"on": codebook_for("minimum", 5)}
    plan = checks.plan_of([("on", 3000, torch.float32)], codebooks)
    codec, twin = device.codec(plan, codebooks), checks.ReferenceCodec(plan, codebooks)
    values = (device.place(torch.randn(3000, generator=torch.Generator().manual_seed(0))),)
    out = device.place(torch.zeros(plan.message_bytes, dtype=torch.uint8))
    result = (device.place(torch.zeros(3000)),)
    codec.encode(values, context(), out)
    codec.decode_mean([out], [context()], result)
    device.runtime.capturing = True
    for counter in (9, 10):
        where = context(counter=counter)
        codec.stage(where)
        codec.encode(values, context(), out)  # the captured arguments are still the first step's
        codec.decode_mean([out], [context()], result)
        expected = twin.encode(list(values), where)
        assert torch.equal(out, expected)
        assert checks.same_bits(result[0], twin.decode_mean([expected], where)[0])
    with pytest.raises(PlanError, match="capture"):
        codec.encode([device.place(torch.zeros(3000))], context(), out)


def test_the_machine_refuses_what_a_gpu_forbids() -> None:
    """The checks above would see a kernel that reads one word too far, or at an odd address."""
    memory = Memory()
    array = np.zeros(8, dtype=np.uint8)
    memory.expose(array)
    place = np.array([array.ctypes.data], dtype=np.uint64)
    assert memory.load(place + np.uint64(4), 4, 4).shape == (1, 4)
    for offset, message in ((8, "array of 8 bytes"), (2, "misaligned")):
        with pytest.raises(PtxError, match=message):
            memory.load(place + np.uint64(offset), 4, 4)
    text = ".visible .entry f(\n)\n{\n.reg .b32 %r<3>;\nfrobnicate.u32 %r1, %r2;\nret;\n}"
    with pytest.raises(PtxError, match="frobnicate"):
        Machine(Program.parse(text), memory).launch(1, 32, (), 0)
    waiting = ".visible .entry f(\n)\n{\n.reg .pred %p<2>;\n.reg .b32 %r<2>;\nmov.u32 %r1, %tid.x;\n"
    waiting += "setp.eq.u32 %p1, %r1, 0;\n@%p1 bra $END;\nbar.sync 0;\n$END:\nret;\n}"
    with pytest.raises(PtxError, match="wait for others"):
        Machine(Program.parse(waiting), memory).launch(1, 32, (), 0)


def test_the_machine_runs_the_program_for_the_newer_gpu() -> None:
    assert program("encode").parameters[0][1] == "u64"
