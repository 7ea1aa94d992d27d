"""Which device codes gradients, its self check, and the codec that follows the tensors; on the PTX machine."""

import dataclasses
import logging
import threading
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from hvd_qoda import codec_device
from hvd_qoda.codec_device import CodecDevice
from hvd_qoda.config import QodaConfig
from hvd_qoda.errors import RankMismatchError, UnsupportedError, WireError
from hvd_qoda.gradient_codec import GradientCodec
from hvd_qoda.session import Session
from qoda_kernels.codebook import Codebook
from qoda_kernels.codec import Codec
from qoda_kernels.layout import MessagePlan, Slice
from qoda_kernels.registry import CodebookRegistry
from tests.coded_on_machine import BrokenRuntime, FlippingRuntime, MachineRuntime, compiled, gradients_on
from tests.in_memory_transport import InMemoryGroup
from tests.kernels.codebooks import codebook_for, context, rotated_codebook, single_slice_plan

GPU = torch.device("cuda", 0)
OTHER_GPU = torch.device("cuda", 1)
CPU = torch.device("cpu")


class Route:
    """Enough of one to begin a step."""

    def description(self) -> dict[str, Any]:
        return {}


def registry() -> CodebookRegistry:
    return QodaConfig(bits=4, bucket_size=128, levels="uniform").build_registry(nn.Linear(64, 64))


def on(device: torch.device) -> Any:
    """Enough of a gradient to ask where to code it: there is no such device here."""
    return SimpleNamespace(device=device)


def chosen(wanted: Any, runtime: Any, *devices: torch.device, chooser: CodecDevice | None = None) -> torch.device:
    device = chooser or CodecDevice(wanted, stratified=False)
    runtimes = {GPU: runtime, OTHER_GPU: runtime}
    with mock.patch.object(codec_device, "runtime_of", runtimes.get):
        return device.of([on(each) for each in devices], registry())


def test_a_device_that_gives_the_cpus_bits_is_used() -> None:
    runtime = MachineRuntime(compiled())
    assert chosen("auto", runtime, GPU, GPU) == GPU
    assert {"encode", "decode_mean"} <= set(runtime.launches)
    assert chosen("gpu", runtime, GPU) == GPU


def test_it_is_checked_once_for_each_set_of_codebooks() -> None:
    runtime, chooser, books = MachineRuntime(compiled()), CodecDevice("auto", stratified=False), registry()
    counts = []
    with mock.patch.object(codec_device, "runtime_of", return_value=runtime):
        for each in (books, books, registry()):
            chooser.of([on(GPU)], each)
            counts.append(len(runtime.launches))
    assert counts[0] == counts[1] < counts[2]


@pytest.mark.parametrize("stratified", [False, True])
def test_every_kernel_that_messages_need_is_checked(stratified: bool) -> None:
    names = ("encode_stratified",) if stratified else ("encode", "encode_rotated", "decode_mean_rotated")
    runtime = MachineRuntime(compiled(("decode_mean", *names)))
    books = [Codebook.exact(), codebook_for("minimum", 3, bucket_size=128)]
    books += [] if stratified else [rotated_codebook("nearest", 4, 128)]
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    assert codec_device.checked_problem(runtime, books, dtypes, stratified) is None
    assert set(runtime.launches) == {"decode_mean", *names}


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(FlippingRuntime, "encoding differs from the CPU's at byte 100"), (BrokenRuntime, "encode: no such driver")],
)
def test_one_that_does_not_is_left_alone(kind: Any, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    runtime, chooser = kind(compiled()), CodecDevice("auto", stratified=False)
    with caplog.at_level(logging.WARNING):
        assert chosen("auto", runtime, GPU, chooser=chooser) == CPU
        assert chosen("auto", runtime, GPU, chooser=chooser) == CPU
    (record,) = caplog.records
    assert "gradients on cuda:0 are copied to the CPU" in record.message
    assert reason in record.message
    with pytest.raises(UnsupportedError, match="codec_device='gpu', but its self check failed"):
        chosen("gpu", runtime, GPU)


def test_other_reasons_for_the_cpu(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    runtime = MachineRuntime(compiled())
    assert chosen("cpu", runtime, GPU) == CPU
    assert chosen("auto", runtime, GPU, OTHER_GPU) == CPU
    assert chosen("auto", runtime, torch.device("meta")) == CPU
    assert not runtime.launches
    assert [record.message.rsplit(": ", 1)[1] for record in caplog.records] == [
        "codec_device is 'cpu'",
        "gradients that travel together lie on different devices",
        "there are no kernels for this kind of device",
    ]
    caplog.clear()
    assert chosen("gpu", runtime, CPU) == CPU  # gradients on the CPU are nobody's mistake
    assert not caplog.records


def test_a_rank_says_whether_gpu_can_be_had() -> None:
    runtimes = {GPU: MachineRuntime(compiled()), OTHER_GPU: BrokenRuntime({})}
    books = registry()
    with mock.patch.object(codec_device, "runtime_of", runtimes.get):
        for wanted in ("auto", "cpu", "gpu"):
            chooser = CodecDevice(wanted, stratified=False)
            assert chooser.verdict([CPU, GPU], books) == "possible"
            chooser.refuse([CPU, GPU], books)
        assert "its self check failed: RuntimeError: encode: no such driver" in chooser.verdict([GPU, OTHER_GPU], books)
        assert "no kernels for this kind" in chooser.verdict([torch.device("meta")], books)
        with pytest.raises(UnsupportedError, match=r"codec_device='gpu', but its self check failed.*cuda:1"):
            chooser.refuse([GPU, OTHER_GPU], books)


@pytest.mark.parametrize("failing_step", [1, 2])
@pytest.mark.parametrize("other", ["cpu", "gpu"])
def test_all_ranks_learn_that_gpu_cannot_be_had_on_one(failing_step: int, other: Any) -> None:
    """Before gradients come, and when codebooks change; ranks may want different devices."""

    fails = threading.local()  # in this rank

    def train(transport: Any) -> str:
        schedule = {"at": [2], "samples": 1}
        wanted = "gpu" if transport.rank == 1 else other
        session = Session(nn.Linear(64, 64), QodaConfig(codec_device=wanted, min_numel=1, update_levels=schedule))
        route: Any = Route()
        session.use_route(route)
        for step in range(1, failing_step + 1):
            fails.now = transport.rank == 1 and step == failing_step
            try:
                session.begin_step(transport)
            except RankMismatchError as error:
                return f"step {step}: {error}"
            for name, parameter in session.parameters.items():
                session.observe_exact(name, session.registry.parameters[name].codebook, torch.ones_like(parameter))
            session.end_step(transport, [])
        return "no error"

    def problem(*_: object) -> str | None:
        return "its self check failed" if fails.now else None

    with (
        mock.patch.object(codec_device, "runtime_of", return_value=object()),
        mock.patch.object(codec_device, "checked_problem", problem),
    ):
        first, second = InMemoryGroup(2).run(train)
    assert first == second
    wanted = f"step {failing_step}: the ranks do not agree: codec_device='gpu': \"possible\" on rank 0, "
    assert first.startswith(wanted + '"its self check failed" on rank 1')


def test_all_ranks_raise_where_gpu_can_be_had_on_none() -> None:
    def begin(transport: Any) -> None:
        session = Session(nn.Linear(64, 64), QodaConfig(codec_device="gpu"))
        route: Any = Route()
        session.use_route(route)
        with pytest.raises(UnsupportedError, match="codec_device='gpu', but its self check failed"):
            session.begin_step(transport)

    with mock.patch.object(codec_device, "runtime_of", return_value=BrokenRuntime({})):
        InMemoryGroup(2).run(begin)


def test_the_codec_follows_the_tensors() -> None:
    book, runtime = codebook_for("minimum", 5), MachineRuntime(compiled())
    plan = single_slice_plan(700, book)
    values = [torch.randn(700, generator=torch.Generator().manual_seed(rank)) for rank in range(2)]
    cpu, codec = Codec(plan, {"other": book}), GradientCodec(plan, {"other": book})
    expected = [cpu.encode([tensor], context(rank)) for rank, tensor in enumerate(values)]
    contexts = [context(rank) for rank in range(2)]
    mean = cpu.decode_mean(expected, contexts)[0]
    assert torch.equal(codec.encode([values[0]], contexts[0]), expected[0])
    assert not runtime.launches
    with gradients_on(runtime):
        codec = GradientCodec(plan, {"other": book})
        # Messages where the kernels can reach them, and where they cannot.
        for shift in (0, 4):
            room = torch.zeros(2, plan.message_bytes + 16, dtype=torch.uint8)
            messages = [row[shift : shift + plan.message_bytes] for row in room]
            for tensor, where, message, wanted in zip(values, contexts, messages, expected, strict=True):
                assert codec.encode([tensor], where, message) is message
                assert torch.equal(message, wanted)
            out = torch.zeros(700)
            codec.decode_mean(messages, contexts, [out])
            assert torch.equal(out, mean)
        assert runtime.launches == 2 * ["encode", "encode", "decode_mean"]


def test_a_damaged_message_raises_at_once_and_the_next_one_is_good() -> None:
    book, runtime = Codebook.uniform(4, bucket_size=128), MachineRuntime(compiled())
    plan = single_slice_plan(300, book)
    with gradients_on(runtime):
        codec = GradientCodec(plan, {"other": book})
        good = codec.encode([torch.randn(300)], context())
        bad = good.clone()
        bad[50] ^= 1
        out = torch.zeros(300)
        with pytest.raises(WireError, match="checksum"):
            codec.decode_mean([bad], [context()], [out])
        codec.decode_mean([good], [context()], [out])
        assert torch.equal(out, Codec(plan, {"other": book}).decode_mean([good], [context()])[0])
        with pytest.raises(WireError, match="uint8"):
            codec.decode_mean([good[:64]], [context()], [out])


def test_what_the_kernels_cannot_take_is_coded_on_the_cpu(caplog: pytest.LogCaptureFixture) -> None:
    """Codebooks that do not fit into shared memory."""
    caplog.set_level(logging.WARNING)
    books = {str(index): codebook_for("close", 8, bucket_size=128) for index in range(40)}
    plan = MessagePlan.build([Slice(key, 0, 130, torch.float32, key, 0) for key in books], books)
    values = [torch.randn(130) for _ in books]
    runtime = MachineRuntime(compiled())
    with gradients_on(runtime):
        message = GradientCodec(plan, books).encode(values, context())
    assert not runtime.launches
    assert "shared memory" in caplog.text
    assert torch.equal(message, Codec(plan, books).encode(values, context()))


def test_separate_rotations_on_the_device() -> None:
    names = "encode_rotated", "decode_mean_rotated"
    book, runtime = rotated_codebook("nearest", 3, 128), MachineRuntime(compiled(names))
    plan = single_slice_plan(300, book)
    contexts = [dataclasses.replace(context(rank), rotations="separate") for rank in range(2)]
    values = [torch.randn(300, generator=torch.Generator().manual_seed(rank)) for rank in range(2)]
    cpu = Codec(plan, {"other": book})
    messages = [cpu.encode([tensor], where) for tensor, where in zip(values, contexts, strict=True)]
    (expected,) = cpu.decode_mean(messages, contexts)
    with gradients_on(runtime):
        codec = GradientCodec(plan, {"other": book})
        (found,) = codec.decode_mean(messages, contexts, [torch.empty(300)])
        assert torch.equal(codec.encode([values[1]], contexts[1]), messages[1])
    assert "decode_mean_rotated" in runtime.launches
    assert torch.equal(found, expected)
