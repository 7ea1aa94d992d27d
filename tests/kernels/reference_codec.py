"""A codec made of `reference.py` alone: slow, for comparison."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from qoda_kernels import reference
from qoda_kernels.codebook import Codebook
from qoda_kernels.codec import Codec
from qoda_kernels.layout import HEADER_BYTES, MessagePlan
from qoda_kernels.wire import CHECKSUM_MULTIPLIER, Header, MessageContext, fold_checksum


class ReferenceCodec:
    """Encodes and decodes CPU tensors as `reference.py` and `layout.py` say."""

    def __init__(self, plan: MessagePlan, codebooks: Mapping[str, Codebook]) -> None:
        self.plan = plan
        self._codebooks = codebooks
        self._digest = Codec(plan, codebooks)._digest

    def encode(self, values: Sequence[torch.Tensor], context: MessageContext) -> torch.Tensor:
        """One message."""
        key, rotation = context.key(), context.rotation_key()
        data = np.zeros(self.plan.message_bytes, dtype=np.uint8)
        for segment, tensor in zip(self.plan.segments, values, strict=True):
            codes = data[segment.codes_begin : segment.codes_begin + segment.codes_bytes]
            if segment.format.is_exact:
                codes[:] = tensor.view(torch.uint8).numpy()
                continue
            codebook = self._codebooks[segment.slice.codebook]
            place = segment.slice.coordinate, key, rotation, name_of(segment.slice.dtype)
            norms, words = reference.quantize(tensor.float().numpy(), codebook, *place)
            stored = norms.astype("<u4" if codebook.norm_format == "fp32" else "<u2")
            data[segment.begin : segment.codes_begin] = stored.view(np.uint8)
            codes[:] = reference.pack(words, codebook.bits, codebook.format.lanes)
        payload = data[HEADER_BYTES:].view("<u4").astype(object)
        word_sum, weighted_sum = int(payload.sum()), int((payload * np.arange(1, payload.size + 1)).sum())
        checksum = fold_checksum(word_sum + CHECKSUM_MULTIPLIER * weighted_sum)
        header = Header.expected(self._digest, context, self.plan.payload_bytes, checksum)
        data[:HEADER_BYTES] = np.frombuffer(header.pack(), dtype=np.uint8)
        return torch.from_numpy(data)

    def decode_mean(
        self, messages: Sequence[torch.Tensor], context: MessageContext, scale: float | None = None
    ) -> list[torch.Tensor]:
        """Sum of messages, times a scale; headers are not looked at. The context is that of any of them."""
        factor = np.float32(1.0 / len(messages) if scale is None else scale)
        results = []
        for segment in self.plan.segments:
            dtype, length = segment.slice.dtype, segment.slice.length
            codes = [m[segment.codes_begin : segment.codes_begin + segment.codes_bytes] for m in messages]
            if segment.format.is_exact:
                wide = torch.float64 if dtype == torch.float64 else torch.float32
                parts = [part.clone().view(dtype).to(wide) for part in codes]
                results.append((sum(parts[1:], start=parts[0]) * float(factor)).to(dtype))
                continue
            codebook = self._codebooks[segment.slice.codebook]
            stored = "<u4" if codebook.norm_format == "fp32" else "<u2"
            received = [
                (
                    m[segment.begin : segment.codes_begin].numpy().view(stored).astype(np.uint32),
                    reference.unpack(part.numpy(), length, codebook.bits, codebook.format.lanes),
                )
                for m, part in zip(messages, codes, strict=True)
            ]
            where = segment.slice.coordinate, context.rotation_key(), name_of(dtype)
            mean = reference.decode_mean(received, codebook, factor, *where)
            results.append(_rounded(torch.from_numpy(mean), dtype))
        return results


def name_of(dtype: torch.dtype) -> str:
    """A dtype as `reference.py` calls it."""
    return str(dtype).removeprefix("torch.")


def _rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Float32 to a dtype, to nearest even; NaN to the dtype's positive quiet NaN (torch has no rule for its bits)."""
    result = values.to(dtype)
    if dtype != torch.float32:
        result.view(torch.int16)[torch.isnan(values)] = {torch.float16: 0x7E00, torch.bfloat16: 0x7FC0}[dtype]
    return result
