"""Which coordinates lie where in DeepSpeed's buffers: merged, split, and with padding between."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_plugin.engine import EngineState
from ds_plugin.slices import BufferMap, Piece, joined, whole_parameters
from hvd_qoda.errors import UnsupportedError

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def mapped(sizes: list[int], before: int = 3) -> BufferMap:
    memory = torch.zeros(before + sum(sizes))
    pieces = tuple(whole_parameters((f"p{i}", size) for i, size in enumerate(sizes)))
    return BufferMap(memory[before:], pieces)


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, data=st.data())
def test_any_part_of_a_buffer_is_covered_by_its_pieces(sizes: list[int], data: Any) -> None:
    buffer = mapped(sizes)
    begin = data.draw(st.integers(0, sum(sizes) - 1))
    end = data.draw(st.integers(begin + 1, sum(sizes)))
    coordinates = [(piece.parameter, piece.start + i) for piece in buffer.pieces for i in range(piece.length)]
    found = buffer.pieces_of(buffer.tensor[begin:end], owner=1)
    seen = [(piece.parameter, piece.start + i) for piece in found for i in range(piece.length)]
    assert seen == coordinates[begin:end]
    assert [piece.position for piece in found] == [
        sum(piece.length for piece in found[:index]) for index in range(len(found))
    ]
    assert {piece.owner for piece in found} == {1}


def test_memory_that_belongs_to_nobody_is_refused() -> None:
    buffer = mapped([5, 6])
    longer = torch.zeros(20)
    assert not buffer.holds(longer)
    wide = BufferMap(longer, buffer.pieces)
    with pytest.raises(UnsupportedError, match="does not know whose gradients"):
        wide.pieces_of(longer[8:14])
    with pytest.raises(UnsupportedError, match="does not know whose gradients"):
        buffer.pieces_of(buffer.tensor[::2])


def test_buffers_behind_each_other_keep_their_padding() -> None:
    first = [Piece("a", 0, 3, 0), Piece("b", 0, 2, 3)]
    second = [Piece("c", 4, 6, 1)]
    assert joined([(first, 8), (second, 7)]) == (*first, Piece("c", 4, 6, 9))


class FakeState(EngineState):
    def __init__(self, names: dict[int, str]) -> None:
        self._names = names


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, ranks=st.integers(1, 5))
def test_partitions_of_zero_3_hold_every_coordinate_once(sizes: list[int], ranks: int) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    state = FakeState({id(p): f"p{i}" for i, p in enumerate(parameters)})
    pieces = state.pieces_of_partitions(parameters, ranks)
    seen = sorted((piece.parameter, piece.start + i) for piece in pieces for i in range(piece.length))
    assert seen == sorted((f"p{i}", j) for i, size in enumerate(sizes) for j in range(size))
    chunk = sum(-(-size // ranks) for size in sizes)
    for piece in pieces:
        assert piece.owner is not None
        assert piece.owner * chunk <= piece.position < piece.end <= (piece.owner + 1) * chunk
