"""Cost model: predicts what every way of exchanging gradients costs, and chooses one. Pure functions of numbers.

A collective in which a rank sends n bytes takes `fixed_s + n * seconds_per_byte`, and `each_s` instead of `fixed_s` for
each further one that is under way at the same time, which hosts start or fuse together (the latency-bandwidth model of
Hockney, Parallel Computing 20, 1994; for collectives see Thakur, Rabenseifner and Gropp, IJHPCA 19, 2005). Bytes are
those of `hvd_qoda.traffic`. The codec takes a time per call and per element. Where gradients travel in several
messages, coding one overlaps with sending another, and sending overlaps with the backward pass:

    seconds = max(coding, first encode + sending - hidden + last decode) + (1 - overlap) * what is done beside that

where `overlap` is 1 if neither coding nor a collective under way slows the other one down, and 0 if they share a core
and cost as much together as one after the other. The numbers are measured by `hvd_qoda.measurement`, or assumed
(`Link.of`).

Schemes: "off" (the host's own all-reduce of the gradients as they are), "fp16" (the same, after rounding to 16 bits),
"allgather", "reduce_scatter" and "hierarchical" (see `hvd_qoda.exchange`).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from hvd_qoda.errors import ConfigError
from hvd_qoda.exchange import WORTH_A_ROUND_TRIP_BYTES
from hvd_qoda.traffic import all_gather_bytes, all_reduce_bytes
from qoda_kernels.layout import HEADER_BYTES, MessagePlan

__all__ = [
    "BUFFER_BYTES",
    "QUANTIZED_SCHEMES",
    "SCHEMES",
    "Choice",
    "CodecSpeed",
    "CollectiveCost",
    "Layout",
    "Link",
    "Prediction",
    "Ranks",
    "break_even_bytes_per_s",
    "choose",
    "fit_cost",
    "host_bytes",
    "predict",
]

QUANTIZED_SCHEMES = ("allgather", "reduce_scatter", "hierarchical")
SCHEMES = ("off", "fp16", *QUANTIZED_SCHEMES)
BUFFER_BYTES = tuple(2**exponent for exponent in range(20, 28))
"""Sizes of fusion buffers that are considered: 1 to 128 MiB of gradients."""

_PASSES_TO_SEND = 2  # over values that travel exactly: copy, checksum
_PASSES_TO_RECEIVE = 3  # checksum, copy, sum
_FASTEST_BYTES_PER_S = 1e13  # where the search for a break-even bandwidth gives up
_SLOWEST_BYTES_PER_S = 1e2


@dataclass(frozen=True)
class Ranks:
    """How many ranks there are, and how they lie on hosts.

    Attributes:
        size: number of ranks, K.
        local_size: ranks on each host; 1 also where hosts have unequal numbers or nothing is known.
    """

    size: int
    local_size: int = 1

    def __post_init__(self) -> None:
        if self.size < 1 or self.local_size < 1 or self.size % self.local_size:
            raise ConfigError(f"{self.size} ranks cannot lie on hosts with {self.local_size} ranks each")

    @property
    def hosts(self) -> int:
        """Number of hosts."""
        return self.size // self.local_size

    @property
    def schemes(self) -> tuple[str, ...]:
        """The schemes that these ranks can use: "hierarchical" needs several hosts with several ranks."""
        hierarchy = self.hosts > 1 and self.local_size > 1
        return SCHEMES if hierarchy else tuple(name for name in SCHEMES if name != "hierarchical")


@dataclass(frozen=True)
class CollectiveCost:
    """What one kind of collective costs.

    Attributes:
        fixed_s: seconds of one that sends nothing.
        seconds_per_byte: for each byte that a rank sends, as `hvd_qoda.traffic` counts them.
        each_s: seconds of each further one that sends nothing and is under way at the same time.
    """

    fixed_s: float
    seconds_per_byte: float
    each_s: float = 0.0

    def seconds(self, sent_bytes: float, count: int = 1) -> float:
        """Seconds of `count` collectives, at least one, that are under way together and send so many bytes in sum."""
        return self.fixed_s + (count - 1) * self.each_s + sent_bytes * self.seconds_per_byte


@dataclass(frozen=True)
class Link:
    """What the collectives cost among the ranks.

    Attributes:
        all_reduce: the host's own.
        all_gather: of bytes.
        all_to_all: of bytes.
        within_host: all-to-all among the ranks of each host, on all hosts at once; None where that is not known.
        between_hosts: all-to-all among the ranks at the same place of every host, for all places at once.
        all_reduce_fp16: the host's all-reduce of 16-bit values, which it may add more slowly than others; None: as
            `all_reduce`.
    """

    all_reduce: CollectiveCost
    all_gather: CollectiveCost
    all_to_all: CollectiveCost
    within_host: CollectiveCost | None = None
    between_hosts: CollectiveCost | None = None
    all_reduce_fp16: CollectiveCost | None = None

    @classmethod
    def of(
        cls,
        ranks: Ranks,
        latency_s: float,
        bytes_per_s: float,
        each_s: float = 0.0,
        local_bytes_per_s: float = 1e10,
    ) -> "Link":
        """A link that nobody has measured: ring collectives between hosts that send `bytes_per_s` each.

        Args:
            ranks: who takes part.
            latency_s: of one message.
            bytes_per_s: of each host's connection, which its ranks share.
            each_s: of each further collective that is under way.
            local_bytes_per_s: of each rank inside its host.

        Raises:
            ConfigError: for a bandwidth that is not positive or a negative time.
        """
        if bytes_per_s <= 0 or local_bytes_per_s <= 0 or latency_s < 0 or each_s < 0:
            raise ConfigError(
                f"a link needs positive bandwidths and times that are not negative; got {bytes_per_s:g} and "
                f"{local_bytes_per_s:g} bytes/s, latency {latency_s:g} s, {each_s:g} s for each collective"
            )
        others = ranks.size - 1
        # In a ring each host sends what one rank sends; in an all-to-all, what its ranks send to other hosts' ranks.
        ring = 1 / bytes_per_s if ranks.hosts > 1 else 1 / local_bytes_per_s
        leaving = (ranks.size - ranks.local_size) / others if others else 0.0
        shared = leaving * ranks.local_size / bytes_per_s + (1 - leaving) / local_bytes_per_s
        return cls(
            all_reduce=CollectiveCost(2 * others * latency_s, ring, each_s),
            all_gather=CollectiveCost(others * latency_s, ring, each_s),
            all_to_all=CollectiveCost(latency_s, shared, each_s),
            within_host=CollectiveCost(latency_s, 1 / local_bytes_per_s, each_s),
            between_hosts=CollectiveCost(latency_s, ranks.local_size / bytes_per_s, each_s),
        )

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Plain values; parts that are not known are left out."""
        return {
            name: {"fixed_s": cost.fixed_s, "seconds_per_byte": cost.seconds_per_byte, "each_s": cost.each_s}
            for name, cost in vars(self).items()
            if cost is not None
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Mapping[str, float]]) -> "Link":
        """The link that `to_dict` described."""
        return cls(**{name: CollectiveCost(**cost) for name, cost in values.items()})


@dataclass(frozen=True)
class CodecSpeed:
    """What coding costs on this rank, in seconds.

    Attributes:
        encode_s: for each element of a message that is encoded.
        decode_s: for each element of each message that is decoded.
        store_s: for each element of a result that is written.
        call_s: for each call of the codec.
        pass_s: for each element of a pass that reads and writes gradients, such as a cast or a sum.
        exact_encode_s: for each element of a message that carries values unquantized; None: derived from `pass_s`.
        exact_decode_s: for each element of each such message that is decoded; None: likewise.
        overlap: how much of the shorter of coding and sending costs no time where both go on at once, 0 to 1.
    """

    encode_s: float
    decode_s: float
    store_s: float = 0.0
    call_s: float = 0.0
    pass_s: float = 0.0
    exact_encode_s: float | None = None
    exact_decode_s: float | None = None
    overlap: float = 1.0

    def beside(self, coding_s: float, sending_s: float, messages: int) -> float:
        """Seconds of coding and sending so many messages where one is coded while another one is sent."""
        longer = max(coding_s, coding_s / messages + sending_s)
        return longer + (1.0 - self.overlap) * max(0.0, coding_s + sending_s - longer)

    def encode_exact(self, elements: float, calls: int = 1) -> float:
        """Seconds to put so many elements into messages unquantized."""
        each = _PASSES_TO_SEND * self.pass_s if self.exact_encode_s is None else self.exact_encode_s
        return calls * self.call_s + elements * each

    def decode_exact(self, elements: float, calls: int = 1) -> float:
        """Seconds to take so many elements, counted for each message, from such messages."""
        each = _PASSES_TO_RECEIVE * self.pass_s if self.exact_decode_s is None else self.exact_decode_s
        return calls * self.call_s + elements * each

    def encode(self, elements: float, calls: int = 1) -> float:
        """Seconds to encode so many elements in so many calls."""
        return calls * self.call_s + elements * self.encode_s

    def decode(self, elements: float, messages: int, calls: int = 1) -> float:
        """Seconds to decode the mean of so many messages of so many elements each."""
        return calls * self.call_s + elements * (messages * self.decode_s + self.store_s)


@dataclass(frozen=True)
class Layout:
    """Sizes of what one rank exchanges in a step.

    Attributes:
        elements: coordinates.
        raw_bytes: of the gradients.
        message_bytes: of one rank's messages, norms and headers included.
        messages: how many messages these are; each has collectives of its own.
    """

    elements: int
    raw_bytes: int
    message_bytes: int
    messages: int = 1

    @classmethod
    def of(cls, plans: Iterable[MessagePlan]) -> "Layout":
        """The layout of several plans with a message each."""
        total = cls(0, 0, 0, 0)
        for plan in plans:
            raw = sum(segment.slice.length * segment.slice.dtype.itemsize for segment in plan.segments)
            total += cls(plan.coordinates, raw, plan.message_bytes, 1)
        return total

    def __add__(self, other: "Layout") -> "Layout":
        return Layout(
            self.elements + other.elements,
            self.raw_bytes + other.raw_bytes,
            self.message_bytes + other.message_bytes,
            self.messages + other.messages,
        )

    def in_buffers(self, buffer_bytes: int) -> "Layout":
        """The same gradients in fusion buffers of so many bytes of gradients, one message for each."""
        count = max(1, math.ceil(self.raw_bytes / buffer_bytes))
        headers = (count - self.messages) * HEADER_BYTES
        return replace(self, messages=count, message_bytes=self.message_bytes + headers)


@dataclass(frozen=True)
class Prediction:
    """What one scheme costs.

    Attributes:
        scheme: its name.
        messages: number of messages, or of all-reduces.
        sent_bytes: that leave one rank in a step.
        coding_s: work of the codec, all messages.
        sending_s: of the collectives, all messages.
        seconds: by which a step gets longer: what neither the backward pass nor coding hides, and coding.
        buffer_bytes: size of the fusion buffers; None where every tensor is a message.
    """

    scheme: str
    messages: int
    sent_bytes: float
    coding_s: float
    sending_s: float
    seconds: float
    buffer_bytes: int | None = None


@dataclass(frozen=True)
class Choice:
    """The cheapest scheme, and what all of them would cost, cheapest first."""

    best: Prediction
    predictions: tuple[Prediction, ...]

    def of(self, scheme: str) -> Prediction:
        """The cheapest prediction of one scheme; raises ConfigError where it was not considered."""
        for prediction in self.predictions:
            if prediction.scheme == scheme:
                return prediction
        raise ConfigError(f"scheme {scheme!r} was not considered")

    @property
    def reason(self) -> str:
        """One sentence for a log."""
        times = ", ".join(f"{p.scheme} {1e3 * p.seconds:.3g} ms" for p in self.predictions)
        return f"{self.best.scheme} is predicted to be the fastest ({times} per step)"


@dataclass(frozen=True)
class _Work:
    """One scheme's work for all messages of a layout."""

    encode_s: float
    decode_s: float
    sending_s: float
    sent_bytes: float


def predict(
    scheme: str,
    layout: Layout,
    ranks: Ranks,
    link: Link,
    codec: CodecSpeed,
    overlap_s: float = 0.0,
    buffer_bytes: int | None = None,
) -> Prediction:
    """What a scheme costs in a step.

    Args:
        scheme: one of `SCHEMES`.
        layout: what is exchanged.
        ranks: among whom.
        link: between them.
        codec: on each of them.
        overlap_s: seconds of the backward pass that follow the moment when the first message is complete.
        buffer_bytes: cut the gradients into fusion buffers of this size first.

    Raises:
        ConfigError: for an unknown scheme, or "hierarchical" where the link between hosts is not known.
    """
    if buffer_bytes is not None:
        layout = layout.in_buffers(buffer_bytes)
    if layout.elements == 0 or ranks.size == 1:
        return Prediction(scheme, layout.messages, 0.0, 0.0, 0.0, 0.0, buffer_bytes)
    work = _work(scheme, layout, ranks, link, codec)
    count = layout.messages
    coding = work.encode_s + work.decode_s
    # The last message leaves when the backward pass is over: nothing hides it.
    hidden = min(overlap_s, work.sending_s * (count - 1) / count)
    seconds = codec.beside(coding, work.sending_s - hidden, count)
    return Prediction(scheme, count, work.sent_bytes, coding, work.sending_s, seconds, buffer_bytes)


def host_bytes(scheme: str, layout: Layout, ranks: Ranks) -> float:
    """Bytes that each host's connection carries away in a step, of L ranks on each of H hosts, K in all.

    Hosts' all-reduces and all-gathers are rings, of which one link leaves each host: what one rank sends passes there.
    In an all-to-all every rank sends to K - L ranks elsewhere, in a hierarchical exchange to H - 1.

    Args:
        scheme: one of `SCHEMES`.
        layout: what is exchanged.
        ranks: among whom; 0 bytes where there is one host only.

    Raises:
        ConfigError: for an unknown scheme.
    """
    size, local, hosts = ranks.size, ranks.local_size, ranks.hosts
    if scheme not in SCHEMES:
        raise ConfigError(f"scheme must be one of {', '.join(SCHEMES)}; got {scheme!r}")
    if hosts == 1:
        return 0.0
    if scheme in ("off", "fp16"):
        raw = layout.raw_bytes if scheme == "off" else min(layout.raw_bytes, 2 * layout.elements)
        return all_reduce_bytes(raw, size)
    if scheme == "allgather":
        return all_gather_bytes(layout.message_bytes, size)
    if scheme == "reduce_scatter":
        shares = layout.message_bytes + layout.messages * (size - 1) * HEADER_BYTES
        return local * (size - local) / size * shares + (size - 1) / size * shares
    return local * _sent_across_hosts(layout.messages, layout.message_bytes / local, hosts)


def choose(
    layout: Layout,
    ranks: Ranks,
    link: Link,
    codec: CodecSpeed,
    overlap_s: float = 0.0,
    schemes: Sequence[str] | None = None,
    buffers: Sequence[int | None] = (None,),
) -> Choice:
    """The cheapest scheme, and size of fusion buffers.

    Args:
        layout: what is exchanged.
        ranks: among whom.
        link: between them.
        codec: on each of them.
        overlap_s: see `predict`.
        schemes: which ones to consider, earlier ones win a draw; by default all that `ranks` can use and that are as
            exact as the user has asked for, that is all but "fp16".
        buffers: sizes of fusion buffers to consider, such as `BUFFER_BYTES`; None for the layout's own messages.
    """
    considered = [name for name in ranks.schemes if name != "fp16"] if schemes is None else list(schemes)
    if not considered or not buffers:
        raise ConfigError("there is no scheme, or no size of fusion buffers, to choose from")
    cheapest = [
        min(
            (predict(scheme, layout, ranks, link, codec, overlap_s, buffer) for buffer in buffers),
            key=lambda prediction: prediction.seconds,
        )
        for scheme in considered
    ]
    predictions = tuple(sorted(cheapest, key=lambda prediction: prediction.seconds))  # stable
    return Choice(predictions[0], predictions)


def break_even_bytes_per_s(
    layout: Layout,
    ranks: Ranks,
    codec: CodecSpeed,
    latency_s: float,
    overlap_s: float = 0.0,
    buffers: Sequence[int | None] = (None,),
) -> float:
    """Bandwidth of each host's connection below which a quantized scheme beats "off"; 0 where none ever does.

    Args:
        layout: what is exchanged.
        ranks: among whom; links are those of `Link.of`.
        codec: on each of them.
        latency_s: of one message.
        overlap_s: see `predict`.
        buffers: see `choose`.
    """

    def pays(bytes_per_s: float) -> bool:
        link = Link.of(ranks, latency_s, bytes_per_s)
        return choose(layout, ranks, link, codec, overlap_s, buffers=buffers).best.scheme != "off"

    low, high = _SLOWEST_BYTES_PER_S, _FASTEST_BYTES_PER_S
    if ranks.size == 1 or not pays(low):
        return 0.0
    if pays(high):
        return math.inf
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if pays(middle) else (low, middle)
    return low


def fit_cost(sent_bytes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Fixed seconds and seconds per byte of a straight line through measured times, whatever single ones do.

    The slope is the median of the slopes between all pairs of points, each with the weight of its distance (Theil 1950,
    Sen 1968, weighted as by Jaeckel 1972): times of small messages say little about it. Neither number is negative.

    Args:
        sent_bytes: at least two different numbers.
        seconds: one time for each.

    Raises:
        ConfigError: where there are no two different numbers of bytes.
    """
    points = list(zip(sent_bytes, seconds, strict=True))
    slopes = sorted(((t2 - t1) / (n2 - n1), abs(n2 - n1)) for (n1, t1), (n2, t2) in combinations(points, 2) if n1 != n2)
    if not slopes:
        raise ConfigError(f"a line needs times of two different sizes; got {list(sent_bytes)}")
    slope = max(0.0, _weighted_median(slopes))
    rests = sorted(t - n * slope for n, t in points)
    middle = len(rests) // 2
    fixed = rests[middle] if len(rests) % 2 else (rests[middle - 1] + rests[middle]) / 2
    return max(0.0, fixed), slope


def _weighted_median(weighted: Sequence[tuple[float, float]]) -> float:
    """Median of sorted (value, weight) pairs."""
    half = sum(weight for _, weight in weighted) / 2
    total = 0.0
    for value, weight in weighted:
        total += weight
        if total >= half:
            return value
    return weighted[-1][0]


def _work(scheme: str, layout: Layout, ranks: Ranks, link: Link, codec: CodecSpeed) -> _Work:
    n, calls, size = layout.elements, layout.messages, ranks.size
    if scheme == "off":
        sent = all_reduce_bytes(layout.raw_bytes, size)
        return _Work(0.0, 0.0, link.all_reduce.seconds(sent, calls), sent)
    if scheme == "fp16":
        sent = all_reduce_bytes(min(layout.raw_bytes, 2 * n), size)
        cast = 0.0 if layout.raw_bytes <= 2 * n else n * codec.pass_s
        cost = link.all_reduce if link.all_reduce_fp16 is None else link.all_reduce_fp16
        return _Work(cast, cast, cost.seconds(sent, calls), sent)
    if scheme == "allgather":
        sent = all_gather_bytes(layout.message_bytes, size)
        sending = link.all_gather.seconds(sent, calls)
        return _Work(codec.encode(n, calls), codec.decode(n, size, calls), sending, sent)
    if scheme == "reduce_scatter":
        return _reduce_scatter_work(n, calls, layout.message_bytes, size, codec, (link.all_to_all, link.all_gather))
    if scheme == "hierarchical":
        return _hierarchical_work(layout, ranks, link, codec)
    raise ConfigError(f"scheme must be one of {', '.join(SCHEMES)}; got {scheme!r}")


def _reduce_scatter_work(
    elements: float,
    calls: int,
    message_bytes: float,
    size: int,
    codec: CodecSpeed,
    costs: tuple[CollectiveCost, CollectiveCost],
) -> _Work:
    """Shares to their owners, the owners' means to everybody."""
    shares = message_bytes + calls * (size - 1) * HEADER_BYTES
    sent = (size - 1) / size * shares  # in each phase
    owner = codec.decode(elements / size, size, calls) + codec.encode(elements / size, calls)
    return _Work(
        codec.encode(elements, calls * size),
        owner + codec.decode(elements, 1, calls * size),
        costs[0].seconds(sent, calls) + costs[1].seconds(sent, calls),
        2 * sent,
    )


def _hierarchical_work(layout: Layout, ranks: Ranks, link: Link, codec: CodecSpeed) -> _Work:
    """Exact sums inside a host, one share for each of its ranks; shares quantized between hosts, then exact again."""
    if link.within_host is None or link.between_hosts is None:
        raise ConfigError("the link between hosts was not measured: there are not several hosts with several ranks")
    local, hosts, calls = ranks.local_size, ranks.hosts, layout.messages
    share = layout.elements / local
    message = layout.message_bytes / local
    moved = (local - 1) / local * 4 * layout.elements  # in each of the two exact phases
    across = _across_hosts(share, calls, message, hosts, link.between_hosts, codec)
    return _Work(
        codec.encode_exact(layout.elements, calls * local) + across.encode_s,
        across.decode_s
        + codec.decode_exact(2 * layout.elements, calls * (local + 1))
        + codec.encode_exact(share, calls),
        2 * link.within_host.seconds(moved, calls) + across.sending_s,
        2 * moved + across.sent_bytes,
    )


def _across_hosts(
    elements: float, calls: int, message_bytes: float, hosts: int, cost: CollectiveCost, codec: CodecSpeed
) -> _Work:
    """One rank's share among its fellows of all hosts, by the scheme that `exchange_by_bytes` takes for it."""
    sent = _sent_across_hosts(calls, message_bytes, hosts)
    if sent < (hosts - 1) * message_bytes:
        return _reduce_scatter_work(elements, calls, message_bytes, hosts, codec, (cost, cost))
    return _Work(codec.encode(elements, calls), codec.decode(elements, hosts, calls), cost.seconds(sent, calls), sent)


def _sent_across_hosts(calls: int, message_bytes: float, hosts: int) -> float:
    """Bytes that one rank sends to its fellows of all hosts, by the scheme that `exchange_by_bytes` takes for it."""
    shares = message_bytes + calls * (hosts - 1) * HEADER_BYTES
    at_once, in_two_phases = (hosts - 1) * message_bytes, 2 * (hosts - 1) / hosts * shares
    return in_two_phases if at_once - in_two_phases >= calls * WORTH_A_ROUND_TRIP_BYTES else at_once
