"""An all-gather of entropy-coded messages: every rank's has a size of its own.

The ranks gather their sizes first, eight bytes each, and then the messages. Coding changes no value, so results are
those of `hvd_qoda.exchange.AllGatherExchange`, from fewer bytes; a message that coding would not shorten travels as it
is. Sizes are few (`qoda_kernels.entropy.padded_size`), so hosts that remember the shapes of collectives go on doing so.
"""

from collections.abc import Mapping, Sequence

import torch

from hvd_qoda.errors import ConfigError, WireError
from hvd_qoda.exchange import AllGatherExchange, wait_for_last_phase
from hvd_qoda.shares import Stamp, check_not_refused, under_way, write_refusal
from hvd_qoda.traffic import all_gather_bytes
from hvd_qoda.transport import Handle, Transport
from qoda_kernels.codebook import Codebook
from qoda_kernels.coded_message import CodedMessages
from qoda_kernels.layout import MessagePlan
from qoda_kernels.worker_threads import WorkerThreads

__all__ = ["CodedAllGatherExchange", "check_not_coded", "is_coded"]

_SIZE_BYTES = 8


def is_coded(plan: MessagePlan, codebooks: Mapping[str, Codebook]) -> bool:
    """Whether any slice of a plan has an entropy code."""
    return any(codebooks[segment.slice.codebook].weights for segment in plan.segments)


def check_not_coded(scheme: str, plan: MessagePlan, codebooks: Mapping[str, Codebook]) -> None:
    """Raise ConfigError for a plan with an entropy code: this scheme sends messages of equal sizes only."""
    if is_coded(plan, codebooks):
        raise ConfigError(
            f"coding='huffman' makes messages of unequal sizes, which the exchange {scheme!r} does not send; use "
            "exchange='allgather' or coding='fixed'"
        )


class CodedAllGatherExchange(AllGatherExchange):
    """Every rank sends its coded message to every other; see the module's docstring.

    Args:
        plan: layout of the tensors.
        codebooks: codebooks of the plan's keys.
        transport: the ranks.
        name: of the collectives: the same on every rank, and its own for every exchange.
        threads: what runs the codec; by default the calling thread.
    """

    def __init__(
        self,
        plan: MessagePlan,
        codebooks: Mapping[str, Codebook],
        transport: Transport,
        name: str,
        threads: WorkerThreads | None = None,
    ) -> None:
        self._sizes: Handle | None = None
        self._size_message = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._sent = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._failure: WireError | None = None
        super().__init__(plan, codebooks, transport, name, threads)

    @property
    def sent_bytes(self) -> int:
        """See `Exchange`: of the last round; before the first one, the most that it can be."""
        message = self._sent.numel() or self.plan.message_bytes
        return all_gather_bytes(_SIZE_BYTES + message, self._transport.size)

    def use_codebooks(self, codebooks: Mapping[str, Codebook]) -> None:
        """See `Exchange`."""
        super().use_codebooks(codebooks)
        self._coded = CodedMessages(self._share.codec, codebooks)
        self._buffer = torch.empty(self._coded.maximum_bytes, dtype=torch.uint8, device="cpu")
        size = self.plan.message_bytes
        self._restored = [torch.empty(size, dtype=torch.uint8, device="cpu") for _ in range(self._transport.size)]

    def start(self, values: Sequence[torch.Tensor], stamp: Stamp) -> None:
        """See `Exchange`."""
        self._stamp = stamp
        rank, size = self._transport.rank, self._transport.size
        context = stamp.context(0, rank, 0, size)
        self._share.codec.encode(values, context, out=self._message)
        self._begin(self._buffer[: self._coded.shorten(self._message, context, self._buffer)])

    def start_refused(self, reason: str) -> None:
        """See `Exchange`."""
        write_refusal(self._message, reason)
        self._begin(self._message)

    def advance(self) -> bool:
        """See `Exchange`."""
        if self._sizes is not None and self._sizes.ready():
            handle, self._sizes = self._sizes, None
            sizes = [int.from_bytes(received.numpy().tobytes(), "little") for received in handle.wait()]
            wrong = [size for size in sizes if not 0 < size <= self.plan.message_bytes]
            if wrong:
                self._failure = WireError(
                    f"{self.waiting_for}: a rank announced a message of {wrong[0]} bytes, at most "
                    f"{self.plan.message_bytes} are possible; the ranks disagree on the model or on its codebooks"
                )
            else:
                self._handle = self._transport.start_all_gather(self._sent, sizes, self.waiting_for)
        return self._handle is not None or self._failure is not None

    def ready(self) -> bool:
        """See `Exchange`."""
        return self.advance() and (self._failure is not None or under_way(self._handle).ready())

    def finish(self, out: Sequence[torch.Tensor], scale: float = 1.0) -> None:
        """See `Exchange`."""
        if self._sizes is not None:
            wait_for_last_phase(self, self._transport)
        if self._failure is not None:
            raise self._failure
        handle, self._handle = under_way(self._handle), None
        received = handle.wait()
        for source, message in enumerate(received):
            check_not_refused(message, source)
        contexts = [self._stamp.context(0, source, 0) for source in range(self._transport.size)]
        places = zip(received, contexts, self._restored, strict=True)
        messages = [self._coded.restore(message, context, out=place) for message, context, place in places]
        self._share.codec.decode_mean(messages, contexts, out=out, scale=scale / len(messages))

    def drop(self) -> None:
        """See `Exchange`."""
        if self._sizes is not None:
            wait_for_last_phase(self, self._transport)
        super().drop()

    def _begin(self, message: torch.Tensor) -> None:
        self._handle, self._failure, self._sent = None, None, message
        self._size_message = torch.frombuffer(
            bytearray(message.numel().to_bytes(_SIZE_BYTES, "little")), dtype=torch.uint8
        )
        sizes = [_SIZE_BYTES] * self._transport.size
        self._sizes = self._transport.start_all_gather(self._size_message, sizes, f"{self.waiting_for}.sizes")
