"""Wire format, version 2: the header of a message and what is checked on arrival.

    bytes   field              meaning
    0-3     magic              b"QODA"
    4-5     version            2
    6-7     flags              0, or FLAG_CODED for an entropy-coded message (`coded_message.py`)
    8-15    digest             BLAKE2b of plan, codebooks, phase, source and destination
    16-19   registry version   of the codebooks, modulo 2^32
    20-23   exchange counter   modulo 2^32
    24-27   payload bytes      everything behind the header
    28-31   checksum           of the payload

All numbers are unsigned and little-endian. The payload is laid out as `layout.py` says; its size is a multiple of 16.
With the payload's 32-bit words w_0, w_1, ... the checksum is A + 0x9E3779B97F4A7C15 B, folded to 32 bits by xor of its
halves and of 0x51C0DA7A, where A = sum of w_i and B = sum of (i + 1) w_i modulo 2^64. That of zeros is not zero: memory
that was never written is no message.

How strong it is: any change of one or two words, and any swap of two, changes the pair (A, B); folding then misses
1 change of 2^32, as any checksum of 32 bits does. `launch/bench/damage.py` counts that: with words changed by opposite
amounts, swapped or replaced, with zeroed tails, and with all pairs of bits. Changes of three and more words that leave
both sums alone are missed always: d, -2 d and d added to words at equal distances. So it finds what networks and faulty
memory do. It is no signature: who can write a message can also write the checksum that fits.
"""

import hashlib
import struct
from dataclasses import dataclass

from qoda_kernels.dither import DitherKey
from qoda_kernels.errors import WireError
from qoda_kernels.layout import HEADER_BYTES
from qoda_kernels.rotation import RotationKey

MAGIC = b"QODA"
WIRE_VERSION = 2
FLAG_CODED = 1
CHECKSUM_MULTIPLIER = 0x9E3779B97F4A7C15
CHECKSUM_OF_ZEROS = 0x51C0DA7A
_HEADER = struct.Struct("<4sHH8sIIII")
_START = int.from_bytes(struct.pack("<4sHH", MAGIC, WIRE_VERSION, 0), "little")  # of a message without flags
HeaderWords = tuple[int, int, int, int]  # a header as words of 64 bits; without the checksum, the last one's upper half
_MASK32 = 0xFFFFFFFF
assert _HEADER.size == HEADER_BYTES


@dataclass(frozen=True)
class MessageContext:
    """What identifies one message: part of its header, and of the sender's random key.

    Attributes:
        seed: the user's seed.
        counter: number of the exchange, counted over the whole training.
        rank: the sender's position in its group.
        phase: 0 for the first quantization, 1 for the second.
        registry_version: version of the codebooks.
        source: index of the sender among those whose messages are summed together.
        destination: index of the share in a reduce-scatter; 0 otherwise.
        strata: number of ranks among which the random numbers of the rounding are stratified; 1 for independent ones.
            Matters to the sender only (`dither.py`).
        rotations: "common" to the senders of a phase, or "separate": every rank has its own.
    """

    seed: int
    counter: int
    rank: int
    phase: int
    registry_version: int
    source: int
    destination: int
    strata: int = 1
    rotations: str = "common"

    def key(self) -> DitherKey:
        """The sender's random key."""
        return DitherKey.derive(self.seed, self.counter, self.rank, self.phase, self.strata)

    def rotation_key(self) -> RotationKey:
        """Key of the rotation."""
        rank = self.rank if self.rotations == "separate" else None
        return RotationKey.derive(self.seed, self.counter, self.phase, rank)


@dataclass(frozen=True)
class Header:
    """The fields of a message's header that are not constant."""

    digest: bytes
    registry_version: int
    counter: int
    payload_bytes: int
    checksum: int
    flags: int = 0

    @classmethod
    def expected(
        cls, plan_digest: bytes, context: MessageContext, payload_bytes: int, checksum: int, flags: int = 0
    ) -> "Header":
        """Header that a message with this context must carry.

        Args:
            plan_digest: digest of the message plan and its codebooks.
            context: which message it is.
            payload_bytes: size of the payload.
            checksum: of the payload.
            flags: 0 or FLAG_CODED.
        """
        return cls(
            message_digest(plan_digest, context),
            context.registry_version & _MASK32,
            context.counter & _MASK32,
            payload_bytes,
            checksum,
            flags,
        )

    def pack(self) -> bytes:
        """The 32 bytes of the header."""
        numbers = self.registry_version, self.counter, self.payload_bytes, self.checksum
        return _HEADER.pack(MAGIC, WIRE_VERSION, self.flags, self.digest, *numbers)


def header_words(digest: int, context: MessageContext, payload_bytes: int) -> HeaderWords:
    """Header of a message without flags, for compiled code that adds the checksum.

    Args:
        digest: `message_digest`, as a number.
        context: which message it is.
        payload_bytes: size of the payload.
    """
    return _START, digest, context.registry_version & _MASK32 | (context.counter & _MASK32) << 32, payload_bytes


def message_digest(plan_digest: bytes, context: MessageContext) -> bytes:
    """The header's digest of a message.

    Args:
        plan_digest: digest of the message plan and its codebooks.
        context: which message it is.
    """
    identity = struct.pack("<8sIII", plan_digest, context.phase, context.source, context.destination)
    return hashlib.blake2b(identity, digest_size=8).digest()


def fold_checksum(total: int) -> int:
    """Checksum from the payload's total A + CHECKSUM_MULTIPLIER B, of which only the low 64 bits count."""
    total &= 2**64 - 1
    return (total ^ (total >> 32)) & _MASK32 ^ CHECKSUM_OF_ZEROS


def check_header(received: bytes, expected: Header, source: int) -> None:
    """Compare a received header with the expected one.

    Args:
        received: the message's first 32 bytes.
        expected: what it must be; its checksum is the one of the received payload.
        source: the sender, for the error message.

    Raises:
        WireError: naming the first field that differs.
    """
    if received == expected.pack():
        return
    magic, version, flags, digest, registry_version, counter, payload_bytes, checksum = _HEADER.unpack(received)
    pairs = (
        (magic, MAGIC),
        (version, WIRE_VERSION),
        (flags, expected.flags),
        (payload_bytes, expected.payload_bytes),
        (counter, expected.counter),
        (registry_version, expected.registry_version),
        (digest, expected.digest),
        (checksum, expected.checksum),
    )
    for (name, advice), (value, want) in zip(_FIELDS, pairs, strict=True):
        if value != want:
            shown = [v.hex() if isinstance(v, bytes) else v for v in (value, want)]
            raise WireError(f"message from source {source}: {name} is {shown[0]}, expected {shown[1]}; {advice}")


_FIELDS = (
    ("magic", "the bytes are no message of ours: check that every rank uses the same compression"),
    ("wire version", "every rank must run the same version of this package"),
    ("flags", "every rank must run the same version of this package with the same coding"),
    ("payload size", "the ranks disagree on the model or on its codebooks"),
    ("exchange counter", "the ranks are at different exchanges: load the same checkpoint on every rank"),
    ("registry version", "the ranks updated their levels at different steps: load the same checkpoint on every rank"),
    ("digest", "the ranks disagree on the plan, the levels, or the order of messages"),
    ("payload checksum", "the message was damaged on its way"),
)
