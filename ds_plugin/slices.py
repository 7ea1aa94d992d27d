"""Which coordinates of which parameters lie where in the flat buffers that DeepSpeed reduces."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from hvd_qoda.errors import UnsupportedError

__all__ = ["BufferMap", "Piece", "joined", "whole_parameters"]


@dataclass(frozen=True)
class Piece:
    """A run of coordinates of one parameter in a flat buffer.

    Attributes:
        parameter: its name.
        start: the first coordinate, in the flattened parameter.
        length: number of coordinates.
        position: place of the first coordinate in the buffer.
        owner: position in the process group of the only rank that keeps the result; None if all keep it.
    """

    parameter: str
    start: int
    length: int
    position: int
    owner: int | None = None

    @property
    def end(self) -> int:
        """Place behind the last coordinate in the buffer."""
        return self.position + self.length


@dataclass(frozen=True)
class BufferMap:
    """A flat tensor of the host, and the pieces that it consists of."""

    tensor: torch.Tensor
    pieces: tuple[Piece, ...]

    def holds(self, view: torch.Tensor) -> bool:
        """Whether a tensor is a part of this one's memory."""
        return view.untyped_storage().data_ptr() == self.tensor.untyped_storage().data_ptr()

    def pieces_of(self, view: torch.Tensor, owner: int | None = None) -> list[Piece]:
        """The pieces of a contiguous part of this tensor, at places counted from the part's beginning.

        Raises:
            UnsupportedError: unless the pieces cover the part.
        """
        begin = int(view.storage_offset()) - int(self.tensor.storage_offset())
        end = begin + view.numel()
        found = []
        for piece in self.pieces:
            first, last = max(begin, piece.position), min(end, piece.end)
            if first < last:
                start = piece.start + first - piece.position
                found.append(Piece(piece.parameter, start, last - first, first - begin, owner))
        if not view.is_contiguous() or sum(piece.length for piece in found) != view.numel():
            raise UnsupportedError(
                f"DeepSpeed reduces the places {begin} to {end} of a buffer whose {self.tensor.numel()} places belong "
                f"to {[piece.parameter for piece in self.pieces]}: ds_plugin does not know whose gradients these are"
            )
        return found


def whole_parameters(names_and_sizes: Iterable[tuple[str, int]]) -> Iterator[Piece]:
    """The pieces of a buffer in which whole parameters lie one behind the other."""
    position = 0
    for name, size in names_and_sizes:
        yield Piece(name, 0, size, position)
        position += size


def joined(parts: Iterable[tuple[Sequence[Piece], int]]) -> tuple[Piece, ...]:
    """The pieces of several buffers that are laid one behind the other.

    Args:
        parts: each buffer's pieces, and its number of elements, padding included.
    """
    pieces = []
    begin = 0
    for part, size in parts:
        pieces += [replace(piece, position=begin + piece.position) for piece in part if piece.length]
        begin += size
    return tuple(pieces)
