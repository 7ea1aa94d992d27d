"""The token: what the compressor gives the host to all-reduce in place of a gradient.

The gradient travels by exchanges of our own. The token rides Horovod's all-reduce, so that it comes back with whatever
the optimizer's options do to a gradient (average or sum, pre- and postscaling): [1, s_k], s_k a number that differs
from rank to rank. The first element gives the factor of the decoded mean. The second tells whether exactly the
compressor's ranks took part, and whether the reduction was a sum at all; without it a compressor and an optimizer with
different process sets would be wrong silently.
"""

from collections.abc import Sequence

import torch

from hvd_qoda.errors import RankMismatchError, UnsupportedError
from hvd_qoda.horovod.transport import join_error

__all__ = ["TOKEN_BYTES", "TokenScale"]

TOKEN_BYTES = 8
_TOLERANCE = 1e-4  # of float32 sums that are exact for some thousand ranks, after two scalings


class TokenScale:
    """Makes tokens and reads them.

    Args:
        ranks: numbers in the whole job of the ranks that exchange gradients.
        position: this rank's place among them.
    """

    def __init__(self, ranks: Sequence[int], position: int) -> None:
        self._ranks = tuple(ranks)
        signatures = [_signature(rank) for rank in ranks]
        self._own = float(signatures[position])
        self._mean = sum(signatures) / len(signatures)

    def token(self, device: torch.device) -> torch.Tensor:
        """A new token: float32 [2]. On the gradient's device, because Horovod's groups do not mix devices."""
        return torch.tensor([1.0, self._own], device=device)

    def scale(self, token: torch.Tensor) -> float:
        """The factor of the mean: exactly 1 or the number of ranks.

        Exact, because the bits on which ranks must agree are not to depend on the rounding of the host's reduction.

        Args:
            token: as it came back.

        Raises:
            UnsupportedError: if a rank has joined, or the reduction is neither average nor sum.
            RankMismatchError: if the optimizer reduces over other ranks than the compressor.
        """
        one, signature = token.tolist()
        size = len(self._ranks)
        if one > 0 and _near(signature, one * self._mean):
            for scale in (1.0, float(size)):
                if _near(one, scale):
                    return scale
        if self._lost_ranks(one):
            raise join_error()
        if _near(one, 1.0) or _near(one, float(size)):
            raise UnsupportedError(
                f"the host's reduction of [1, s_k] gave [{one:g}, {signature:g}] among the ranks {self._ranks}, "
                f"expected [1, {self._mean:g}] or a multiple: compressed gradients are averaged or summed "
                "(op=hvd.Average or hvd.Sum), and the compressor and hvd.DistributedOptimizer must be given the same "
                "process_set"
            )
        raise RankMismatchError(
            f"the optimizer reduces over other ranks than the compressor, whose ranks are {self._ranks} (the token "
            f"came back as [{one:g}, {signature:g}]): give the same process_set to both"
        )

    def _lost_ranks(self, one: float) -> bool:
        """Whether some ranks have answered with zeros, as joined ones do, to an average."""
        size = len(self._ranks)
        return any(_near(one, present / size) for present in range(1, size))


def _signature(rank: int) -> int:
    """A whole number from 1 to 65535 that hardly any other rank has; sums of it are exact in float32."""
    return (rank * 0x9E37 + 0x3C6F) % 0xFFFF + 1


def _near(value: float, wanted: float) -> bool:
    return abs(value - wanted) <= _TOLERANCE * abs(wanted)
