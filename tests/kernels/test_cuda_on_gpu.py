"""The device codec on a GPU: the same checks as on the PTX machine, and what only a GPU can show."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from qoda_kernels.codebook import Codebook
from qoda_kernels.codec import Codec
from qoda_kernels.device_codec import DeviceCodec
from qoda_kernels.layout import MessagePlan
from tests.kernels import device_checks as checks
from tests.kernels.codebooks import codebook_for, context, methods_of
from tests.kernels.reference_codec import ReferenceCodec

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed (extra [cuda])")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU, or torch is a CPU build"),
]

VARIANTS = [(bits, method) for bits in range(2, 9) for method in methods_of(bits)]


class Gpu:
    """The current CUDA device (`device_checks.Device`)."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())

    def codec(self, plan: MessagePlan, codebooks: Mapping[str, Codebook]) -> DeviceCodec:
        return DeviceCodec(plan, codebooks, self.device)

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, copy=True)

    def synchronise(self) -> None:
        torch.cuda.synchronize(self.device)


@pytest.mark.parametrize(("bits", "method"), VARIANTS)
def test_every_variant(bits: int, method: str) -> None:
    checks.check_every_variant(Gpu(), bits, method)


@pytest.mark.parametrize(("bits", "method"), [(3, "minimum"), (4, "uniform"), (6, "close")])
def test_codebooks_that_clip(bits: int, method: str) -> None:
    checks.check_clipping(Gpu(), bits, method)


@pytest.mark.parametrize("rotates", [False, True])
def test_extreme_buckets(rotates: bool) -> None:
    checks.check_extremes(Gpu(), 0, rotates)


@pytest.mark.parametrize(("bits", "method", "strata"), [(4, "uniform", 4), (5, "minimum", 3), (8, "general", 64)])
def test_stratified_random_numbers(bits: int, method: str, strata: int) -> None:
    checks.check_stratified(Gpu(), bits, method, strata)


@pytest.mark.parametrize(
    ("rounding", "bits", "bucket_size", "strata"),
    [("nearest", 4, 512, 1), ("nearest, uniform", 6, 256, 1), ("stochastic", 5, 1024, 3), ("nearest", 2, 128, 1)],
)
def test_rotated_buckets(rounding: str, bits: int, bucket_size: int, strata: int) -> None:
    checks.check_rotated(Gpu(), rounding, bits, bucket_size, strata)


@pytest.mark.parametrize(
    "check",
    [
        checks.check_exact_segments,
        checks.check_non_finite_exact_values,
        checks.check_several_codebooks_of_all_methods,
        checks.check_messages_of_many_senders,
        checks.check_statistics,
        checks.check_the_wrong_message_is_named,
        checks.check_what_does_not_fit_is_refused,
    ],
)
def test_same_as_on_the_machine(check) -> None:  # type: ignore[no-untyped-def]  # functions of a Device
    check(Gpu())


@pytest.mark.parametrize("seed", range(12))
def test_damage(seed: int) -> None:
    checks.check_damage(Gpu(), seed)


def test_many_blocks_give_the_same_bits_every_time() -> None:
    """A message of many blocks, ten times: totals and the last block's work do not race."""
    gpu, codebooks = Gpu(), {"on": codebook_for("minimum", 5)}
    length = 5_000_000
    plan = checks.plan_of([("on", length, torch.float32)], codebooks)
    codec = gpu.codec(plan, codebooks)
    values = (torch.randn(length, generator=torch.Generator().manual_seed(0)).to(gpu.device),)
    expected = Codec(plan, codebooks).encode([values[0].cpu()], context())
    messages = [codec.encode(values, context()) for _ in range(10)]
    means = [codec.decode_mean([message], [context()])[0] for message in messages]
    gpu.synchronise()
    codec.check()
    for message, mean in zip(messages, means, strict=True):
        assert torch.equal(message.cpu(), expected)
        assert torch.equal(mean, means[0])


def test_a_captured_graph_takes_key_and_counter_from_the_device() -> None:
    gpu, codebooks = Gpu(), {"on": codebook_for("minimum", 5)}
    plan = checks.plan_of([("on", 3000, torch.float32)], codebooks)
    codec, twin = gpu.codec(plan, codebooks), ReferenceCodec(plan, codebooks)
    values = (gpu.place(torch.randn(3000, generator=torch.Generator().manual_seed(0))),)
    out = gpu.place(torch.zeros(plan.message_bytes, dtype=torch.uint8))
    result = (gpu.place(torch.zeros(3000)),)
    codec.encode(values, context(), out)
    codec.decode_mean([out], [context()], result)
    gpu.synchronise()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codec.encode(values, context(), out)
        codec.decode_mean([out], [context()], result)
    for counter in (9, 10):
        where = context(counter=counter)
        codec.stage(where)
        graph.replay()
        gpu.synchronise()
        expected = twin.encode([values[0].cpu()], where)
        assert torch.equal(out.cpu(), expected)
        assert checks.same_bits(result[0], twin.decode_mean([expected], where)[0])
    codec.check()


def test_on_another_stream() -> None:
    gpu, codebooks = Gpu(), {"on": Codebook.uniform(4)}
    plan = checks.plan_of([("on", 3000, torch.float32)], codebooks)
    codec = gpu.codec(plan, codebooks)
    values = gpu.place(torch.randn(3000))
    gpu.synchronise()
    with torch.cuda.stream(torch.cuda.Stream()):
        message = codec.encode([values], context())
        torch.cuda.current_stream().synchronize()
    assert torch.equal(message.cpu(), ReferenceCodec(plan, codebooks).encode([values.cpu()], context()))


def test_from_a_thread_that_has_not_used_the_gpu() -> None:
    """A new thread has no current CUDA context until something makes the device's its own."""
    gpu, codebooks = Gpu(), {"on": Codebook.uniform(4)}
    plan = checks.plan_of([("on", 3000, torch.float32)], codebooks)
    codec, values = gpu.codec(plan, codebooks), gpu.place(torch.randn(3000))
    out = gpu.place(torch.zeros(plan.message_bytes, dtype=torch.uint8))
    with ThreadPoolExecutor(1) as thread:
        thread.submit(codec.encode, [values], context(), out).result()
    assert torch.equal(out.cpu(), ReferenceCodec(plan, codebooks).encode([values.cpu()], context()))
