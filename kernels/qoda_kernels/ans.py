"""Range asymmetric numeral systems (Duda, arXiv 1311.2540), from the package `constriction`: at the entropy, slow.

An entropy-coded slice is the number of 32-bit words (uint32, little-endian), then the words. The codes are in the order
of the coordinates, zeros that fill up the last lanes included.
"""

import hashlib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from qoda_kernels import bit_streams
from qoda_kernels.errors import CodebookError, WireError
from qoda_kernels.levels import level_count

ByteArray = npt.NDArray[np.uint8]

_COUNT_BYTES = 4
_MODEL_BITS = 24  # no symbol is less likely than 2^-24 in constriction's model


@dataclass(frozen=True, eq=False)
class AnsCode:
    """The code of one layer type; used like `entropy.SliceCode`.

    Attributes:
        bits: code width.
        weights: of each level, whole numbers.
    """

    bits: int
    weights: tuple[int, ...]

    @classmethod
    def of_weights(cls, bits: int, weights: Sequence[int]) -> "AnsCode":
        """Code for level weights.

        Raises:
            CodebookError: when the weights do not fit the code width, or `constriction` is not installed.
        """
        own = tuple(int(weight) for weight in weights)
        if len(own) != level_count(bits) or min(own) < 0:
            raise CodebookError(f"{bits} bits need {level_count(bits)} level weights >= 0; got {list(own)}")
        _constriction()
        return cls(bits, own)

    @cached_property
    def digest(self) -> bytes:
        """Eight bytes that differ when any weight differs."""
        return hashlib.blake2b(f"ans {self.bits} {self.weights}".encode(), digest_size=8).digest()

    @cached_property
    def _model(self) -> Any:
        """Probabilities of the codes, with minus zero (which is never sent) as unlikely as the model allows."""
        own = np.array([max(weight, 1) for weight in self.weights], dtype=np.float64)
        codes = np.concatenate([own, np.zeros(own.size)])
        codes[1 : own.size] = codes[own.size + 1 :] = own[1:] / 2.0
        probabilities = (codes / np.cumsum(codes)[-1]).astype(np.float32)
        return _constriction().stream.model.Categorical(probabilities, perfect=False)

    def maximum_bytes(self, packed_bytes: int) -> int:
        """Most bytes of a slice with so many bytes of packed codes."""
        return _COUNT_BYTES + packed_bytes * 8 // self.bits * _MODEL_BITS // 8 + 16

    def encode(self, packed: ByteArray, lanes: int, out: ByteArray) -> int:
        """Entropy-code the lane-planar codes of one slice into `out`; returns the bytes written."""
        codes = bit_streams.unpack(packed, self.bits, lanes).astype(np.int32)
        codes[codes == 1 << self.bits - 1] = 0
        coder = _constriction().stream.stack.AnsCoder()
        if codes.size:
            coder.encode_reverse(codes, self._model)
        words = coder.get_compressed().astype("<u4")
        written = np.concatenate([np.array([words.size], dtype="<u4"), words]).view(np.uint8)
        out[: written.size] = written
        return int(written.size)

    def decode(self, data: ByteArray, lanes: int, packed: ByteArray) -> int:
        """Codes of the slice with which `data` begins; returns its bytes.

        Raises:
            WireError: when the bytes encode no such slice.
        """
        end = _COUNT_BYTES + 4 * int(data[:_COUNT_BYTES].copy().view("<u4")[0]) if data.size >= _COUNT_BYTES else 0
        if not _COUNT_BYTES <= end <= data.size:
            raise WireError(f"an entropy-coded slice ends at byte {end} of {data.size}")
        words = data[_COUNT_BYTES:end].copy().view("<u4").astype(np.uint32)
        try:
            coder = _constriction().stream.stack.AnsCoder(words)
        except ValueError as error:
            raise WireError(f"the words of an entropy-coded slice are damaged: {error}") from error
        length = packed.size * 8 // self.bits
        codes = coder.decode(self._model, length) if length else np.zeros(0, dtype=np.int32)
        if not coder.is_empty():
            raise WireError("an entropy-coded slice does not end with its last code: the message was damaged")
        bit_streams.pack(codes.astype(np.uint8), self.bits, lanes, packed)
        return end


def _constriction() -> ModuleType:
    try:
        return importlib.import_module("constriction")
    except ImportError as error:
        raise CodebookError('coding "ans" needs the package constriction: pip install constriction') from error
