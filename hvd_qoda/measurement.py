"""Measures what the cost model needs to know: the host's collectives among the ranks, and this rank's codec.

All ranks get the same numbers, bit for bit: they gather the times that each has seen and take the same statistic of
them, in rank order. A collective has lasted as long as for the rank that joined it last, so the least time over the
ranks counts, and of the rounds the median. Codecs run on all ranks at once, as in a step, because ranks may share
cores. How much is measured follows from these numbers too, never from one rank's clock: the ranks start the same
collectives.

Whoever waits here sleeps between two looks, as in an exchange of ours, "off" of the overlapping route included.
Horovod's own `synchronize` looks all the time. Where ranks have no core to spare for that, an all-reduce takes longer
than measured here: 25M fp32 values between two ranks on two cores 19 %, between four 33 %.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np
import torch

from hvd_qoda.cost_model import CodecSpeed, CollectiveCost, Link, fit_cost
from hvd_qoda.exchange import Stamp
from hvd_qoda.gradient_codec import GradientCodec
from hvd_qoda.hosts import Hosts, SubgroupTransport
from hvd_qoda.staging import values_on, written_back
from hvd_qoda.traffic import all_reduce_bytes
from hvd_qoda.transport import Handle, ReducingTransport, Transport, all_gather_array
from qoda_kernels.codebook import Codebook
from qoda_kernels.layout import MessagePlan, Slice
from qoda_kernels.wire import MessageContext
from qoda_kernels.worker_threads import WorkerThreads

__all__ = ["fitted_codebook", "measure_codec", "measure_link"]

_SMALLEST_BYTES = 2**10
_LARGEST_BYTES = 2**25  # where a fast link lets bursts pass, smaller ones say little
_GROWTHS = (64, 8, 2)  # from one size to the next, the largest factor for which there is time
_ROUNDS = 3
_FEWEST_ROUNDS = 2  # where time is short; one alone may have been disturbed
_TOGETHER = 8  # collectives under way at the same time, to see what each further one costs
_BUDGET_S = 0.8
_LONGEST_S = 0.5
_CODEC_ELEMENTS = (4096, 2**21)
_CODEC_RUNS = 4  # at least
_MOST_CODEC_GRADIENTS = 8  # taken in turns: 64 MiB, more than a core's caches hold
_CODEC_ROUNDS = 2
_CODEC_MESSAGES = 4
_BESIDE_BYTES = (2**20, 2**23)  # sent while coding goes on, the more the faster the link
_BESIDE_S = 0.02
_STAMP = Stamp(0, 0, 0)
_CPU = torch.device("cpu")

_GAUSSIAN_VALUES = 2**16  # repeated; so many that no branch predictor learns them by heart


@dataclass(frozen=True)
class _Kind:
    """One kind of collective.

    Attributes:
        name: for the collectives' names.
        make: makes what one takes in which this rank sends about so many bytes.
        start: starts one with that, under a name.
        sent: how many bytes it really sends then.
    """

    name: str
    make: Callable[[int], torch.Tensor]
    start: Callable[[torch.Tensor, str], Handle]
    sent: Callable[[int], float]

    def seconds(self, sent: int, count: int, name: str) -> float:
        """How long so many of them take, under way together; making what they take does not count."""
        taken = [self.make(sent) for _ in range(count)]
        begin = time.perf_counter()
        handles = [self.start(values, f"{name}.{index}") for index, values in enumerate(taken)]
        for handle in handles:
            handle.wait()
        return time.perf_counter() - begin


def measure_link(
    transport: ReducingTransport,
    hosts: Hosts | None = None,
    device: torch.device | None = None,
    largest_bytes: int = _LARGEST_BYTES,
    budget_s: float = _BUDGET_S,
    name: str = "hvd_qoda.link",
) -> Link:
    """Time the host's collectives; a collective call that waits.

    Args:
        transport: the ranks.
        hosts: where they run; with it and several hosts of several ranks each, the ways within and between hosts are
            measured too.
        device: where gradients are, which the host's own all-reduce takes from there; by default the CPU.
        largest_bytes: no more than this is sent at once: what the gradients of a step take.
        budget_s: seconds that this may take, about. Sizes that would take longer are left out.
        name: what the names of its collectives begin with; the same on every rank.

    Returns:
        The same numbers on every rank; zeros for a rank alone, which sends nothing.
    """
    if transport.size == 1:
        nothing = CollectiveCost(0.0, 0.0)
        return Link(nothing, nothing, nothing)
    kinds = _kinds(transport, hosts, torch.device("cpu") if device is None else device)
    largest = min(max(largest_bytes, _GROWTHS[0] * _SMALLEST_BYTES), _LARGEST_BYTES)
    costs = {
        kind.name: _measure_kind(transport, kind, largest, budget_s / len(kinds), f"{name}.{kind.name}")
        for kind in kinds
    }
    return Link(**costs)


def fitted_codebook(bits: int, bucket_size: int = 512) -> Codebook:
    """A codebook as fast as adaptive ones are after their first update: levels (j/s)^1.5, denser near zero."""
    top = 2 ** (bits - 1) - 1
    return Codebook(bits, tuple((j / top) ** 1.5 for j in range(top + 1)), bucket_size=bucket_size)


def measure_codec(
    codebook: Codebook,
    transport: Transport,
    threads: WorkerThreads | None = None,
    device: torch.device | None = None,
    name: str = "hvd_qoda.codec_speed",
    elements: int = _CODEC_ELEMENTS[-1],
    coding_device: torch.device = _CPU,
) -> CodecSpeed:
    """Time the codec on Gaussian float32 gradients, on all ranks at once; a collective call that waits.

    Args:
        codebook: of most gradients.
        transport: the ranks.
        threads: what runs the codec; by default the calling thread.
        device: where gradients are; the way to the codec and back counts. By default the CPU.
        name: of the collective; the same on every rank.
        elements: of all gradients of a step. Where these are more than caches hold, gradients are taken from memory.
        coding_device: what codes them.

    Returns:
        The slowest rank's speed, on which all others wait; the same numbers on every rank.
    """

    def together() -> None:
        all_gather_array(transport, np.zeros(1), f"{name}.begin")

    devices = (_CPU if device is None else device, coding_device)
    own = _codec_speed(codebook, threads, devices, together, elements)
    all_ranks = all_gather_array(transport, np.array(astuple(own)), name)
    slowest = CodecSpeed(*(float(value) for value in all_ranks.max(axis=0)))
    if transport.size == 1:
        return slowest
    return replace(slowest, overlap=_measure_overlap(codebook, transport, threads, slowest.encode_s, name, elements))


def _measure_overlap(
    codebook: Codebook, transport: Transport, threads: WorkerThreads | None, encode_s: float, name: str, elements: int
) -> float:
    """How much of the shorter of encoding and an all-gather costs nothing where both go on at once, 0 to 1.

    No more is coded and sent at once than the gradients of a step are, or little: a small model's probe is small.
    """
    elements = min(max(elements, _CODEC_ELEMENTS[0]), _CODEC_ELEMENTS[-1])
    codec, gradient, context = _codec_for(codebook, elements, threads)
    message = codec.encode([gradient], context)

    def timed(sent_bytes: int, encodings: int) -> float:
        """Seconds of an all-gather, of encodings, or of both at once."""
        all_gather_array(transport, np.zeros(1), f"{name}.begin")
        begin = time.perf_counter()
        if sent_bytes:
            share = sent_bytes // (transport.size - 1)
            sent = torch.zeros(share, dtype=torch.uint8, device="cpu")
            handle = transport.start_all_gather(sent, [share] * transport.size, f"{name}.beside")
        for _ in range(encodings):
            codec.encode([gradient], context, message)
        if sent_bytes:
            handle.wait()
        return time.perf_counter() - begin

    def agreed(sent_bytes: int, encodings: int) -> float:
        own = [timed(sent_bytes, encodings) for _ in range(_ROUNDS)]
        return float(np.median(all_gather_array(transport, np.array(own), f"{name}.beside_times").mean(axis=0)))

    sizes = sorted({min(size, 4 * elements) for size in _BESIDE_BYTES})
    sent_bytes = sizes[0]
    sending = agreed(sent_bytes, 0)
    if sending < _BESIDE_S and len(sizes) > 1:
        sent_bytes = sizes[1]
        sending = agreed(sent_bytes, 0)
    encodings = max(1, round(sending / (elements * encode_s)))
    coding, both = agreed(0, encodings), agreed(sent_bytes, encodings)
    return min(1.0, max(0.0, (sending + coding - both) / min(sending, coding)))


def _kinds(transport: ReducingTransport, hosts: Hosts | None, device: torch.device) -> list[_Kind]:
    size = transport.size
    others = max(1, size - 1)

    # Neither zeros nor equal on all ranks: hosts convert and round 16-bit values with branches that depend on them.
    gaussian = torch.randn(_GAUSSIAN_VALUES, generator=torch.Generator().manual_seed(transport.rank), device="cpu")

    def elements(sent: int) -> int:
        return max(1, sent * size // (2 * others * 4))

    def gradient(count: int, dtype: torch.dtype) -> torch.Tensor:
        return gaussian.to(dtype).repeat(-(-count // _GAUSSIAN_VALUES))[:count].to(device)

    def message(sent: int) -> torch.Tensor:
        return torch.zeros(sent // others, dtype=torch.uint8, device="cpu")

    def all_gather(own: torch.Tensor, name: str) -> Handle:
        return transport.start_all_gather(own, [own.numel()] * size, name)

    kinds = [
        _Kind(
            "all_reduce",
            lambda sent: gradient(elements(sent), torch.float32),
            transport.start_all_reduce,
            lambda sent: all_reduce_bytes(4 * elements(sent), size),
        ),
        _Kind(
            "all_reduce_fp16",
            lambda sent: gradient(elements(2 * sent), torch.float16),
            transport.start_all_reduce,
            lambda sent: all_reduce_bytes(2 * elements(2 * sent), size),
        ),
        _Kind("all_gather", message, all_gather, lambda sent: float(sent // others * others)),
        _all_to_all("all_to_all", transport),
    ]
    if hosts is not None and "hierarchical" in hosts.ranks.schemes:
        kinds.append(_all_to_all("within_host", SubgroupTransport(transport, hosts.local(transport.rank))))
        kinds.append(_all_to_all("between_hosts", SubgroupTransport(transport, hosts.cross(transport.rank))))
    return kinds


def _all_to_all(name: str, transport: Transport) -> _Kind:
    others = max(1, transport.size - 1)

    def make(sent: int) -> torch.Tensor:
        return torch.zeros(sent // others * transport.size, dtype=torch.uint8, device="cpu")

    def start(message: torch.Tensor, name: str) -> Handle:
        shares = [message.numel() // transport.size] * transport.size
        return transport.start_all_to_all(message, shares, shares, name)

    return _Kind(name, make, start, lambda sent: float(sent // others * others))


def _measure_kind(transport: Transport, kind: _Kind, largest: int, budget_s: float, name: str) -> CollectiveCost:
    def agreed(sent: int, count: int, rounds: int) -> float:
        own = [kind.seconds(sent, count, name) for _ in range(rounds)]
        return float(np.median(all_gather_array(transport, np.array(own), f"{name}.times").min(axis=0)))

    kind.seconds(_SMALLEST_BYTES, 1, name)  # the first one makes connections
    times = {_SMALLEST_BYTES: agreed(_SMALLEST_BYTES, 1, _ROUNDS)}
    together = agreed(_SMALLEST_BYTES, _TOGETHER, _ROUNDS)
    spent = _ROUNDS * (times[_SMALLEST_BYTES] + together)
    while (found := _next_size(times, largest, budget_s - spent)) is not None:
        sent, rounds = found
        times[sent] = agreed(sent, 1, rounds)
        spent += rounds * times[sent]
    fixed, per_byte = fit_cost([kind.sent(size) for size in times], list(times.values()))
    if per_byte == 0.0:  # smaller messages were disturbed so much that they took as long as the largest
        fixed, per_byte = min(times.values()), times[max(times)] / kind.sent(max(times))
    each = (together - times[_SMALLEST_BYTES]) / (_TOGETHER - 1) - kind.sent(_SMALLEST_BYTES) * per_byte
    return CollectiveCost(fixed, per_byte, max(0.0, each))


def _next_size(times: Mapping[int, float], largest: int, left_s: float) -> tuple[int, int] | None:
    """The next larger size and how many rounds of it there is time for; None where there is none.

    A second size is always measured, and a third one if it is expected to take less than half a second: times of small
    ones say little about the bandwidth, and links let bursts pass.
    """
    smallest, before = min(times), max(times)
    if before >= largest:
        return None
    if len(times) == 1:
        return min(before * _GROWTHS[0], largest), _ROUNDS
    slope = max(0.0, times[before] - times[smallest]) / (before - smallest)
    for growth in _GROWTHS:
        sent = min(before * growth, largest)
        expected = times[before] + (sent - before) * slope
        if expected < (_LONGEST_S if len(times) == 2 else left_s):
            return sent, _ROUNDS if _ROUNDS * expected < left_s else _FEWEST_ROUNDS
    return None


def _codec_speed(
    codebook: Codebook,
    threads: WorkerThreads | None,
    devices: tuple[torch.device, torch.device],
    together: Callable[[], None],
    step_elements: int,
) -> CodecSpeed:
    count = min(_MOST_CODEC_GRADIENTS, max(1, round(step_elements / _CODEC_ELEMENTS[-1])))
    timed = [_CodecTimes.measure(codebook, size, count, threads, devices, together) for size in _CODEC_ELEMENTS]
    exact = _CodecTimes.measure(Codebook.exact(), _CODEC_ELEMENTS[-1], count, threads, devices, together)
    call, encode = fit_cost(_CODEC_ELEMENTS, [times.encode for times in timed])
    large, elements = timed[-1], _CODEC_ELEMENTS[-1]
    decode = max(0.0, (large.decode_many - large.decode_one) / (elements * (_CODEC_MESSAGES - 1)))
    store = max(0.0, (large.decode_one - call) / elements - decode)
    return CodecSpeed(
        encode, decode, store, call, large.cast / elements, exact.encode / elements, exact.decode_one / elements
    )


@dataclass(frozen=True)
class _CodecTimes:
    """Seconds for gradients of one size."""

    encode: float
    decode_one: float
    decode_many: float
    cast: float

    @classmethod
    def measure(
        cls,
        codebook: Codebook,
        elements: int,
        count: int,
        threads: WorkerThreads | None,
        devices: tuple[torch.device, torch.device],
        together: Callable[[], None],
    ) -> "_CodecTimes":
        """Times for `count` gradients of so many elements, taken in turns; `devices`: that hold and that code them."""
        device, coding_device = devices
        codec, values, context = _codec_for(codebook, elements, threads)
        gradients = [values.to(device).clone() for _ in range(count)]
        contexts = [_STAMP.context(0, source, 0) for source in range(_CODEC_MESSAGES)]
        messages = [codec.encode([values], context) for context in contexts]

        def encode(gradient: torch.Tensor) -> None:
            codec.encode([values_on(coding_device, gradient)], context, messages[0])

        def decode(gradient: torch.Tensor, count: int) -> None:
            written_back(
                gradient,
                lambda out: _ignore(codec.decode_mean(messages[:count], contexts[:count], [out])),
                coding_device,
            )

        def seconds(run: Callable[[torch.Tensor], object]) -> float:
            return _seconds_of(run, gradients, together)

        return cls(
            seconds(encode),
            seconds(lambda gradient: decode(gradient, 1)),
            seconds(lambda gradient: decode(gradient, _CODEC_MESSAGES)),
            seconds(lambda gradient: gradient.half().float()) / 2,
        )


def _codec_for(
    codebook: Codebook, elements: int, threads: WorkerThreads | None
) -> tuple[GradientCodec, torch.Tensor, MessageContext]:
    """A codec, a gradient for it, and the context of its first message."""
    books = {"measured": codebook}
    plan = MessagePlan.build([Slice("measured", 0, elements, torch.float32, "measured", 0)], books)
    gradient = torch.randn(elements, generator=torch.Generator().manual_seed(0), device="cpu")
    return GradientCodec(plan, books, threads), gradient, _STAMP.context(0, 0, 0)


def _ignore(_: Sequence[torch.Tensor]) -> None:
    """Take a result that nobody needs."""


def _seconds_of(
    run: Callable[[torch.Tensor], object], gradients: Sequence[torch.Tensor], together: Callable[[], None]
) -> float:
    """Mean of some runs, on all ranks at once; of several rounds of that the shortest, which was disturbed least."""
    run(gradients[0])
    rounds = []
    for _ in range(_CODEC_ROUNDS):
        together()
        begin = time.perf_counter()
        for index in range(max(_CODEC_RUNS, len(gradients))):
            run(gradients[index % len(gradients)])
        rounds.append((time.perf_counter() - begin) / max(_CODEC_RUNS, len(gradients)))
    return min(rounds)
