"""Gradients of every dtype, layout and memory format, and what each front end must make of them.

`CASES` is the table; the folders of the front ends test each of its rows. A model holds the row's parameter beside an
ordinary layer, `own_gradient` says what its loss makes of it on a rank, and `verdict` compares what arrived with the
exact mean over the ranks.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

SHAPE = (40, 64)  # more elements than min_numel
_USED_ROWS = 12


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        expected: "quantized", "exact", "refused" when the object is made, or "frozen": without a gradient, left alone.
        dtype: of the parameter.
        shape: of the parameter.
        layout: how it lies in memory; "sparse" is an embedding with sparse gradients.
    """

    expected: Literal["quantized", "exact", "refused", "frozen"]
    dtype: torch.dtype = torch.float32
    shape: tuple[int, ...] = SHAPE
    layout: Literal["plain", "channels_last", "transposed", "strided", "expanded", "sparse"] = "plain"


CASES: dict[str, Case] = {
    "float32": Case("quantized"),
    "float16": Case("quantized", torch.float16),
    "bfloat16": Case("quantized", torch.bfloat16),
    "float64": Case("exact", torch.float64),
    "complex64": Case("exact", torch.complex64),
    "complex128": Case("exact", torch.complex128),
    "float8": Case("refused", torch.float8_e4m3fn),
    "integers": Case("frozen", torch.int64),
    "bool": Case("frozen", torch.bool),
    "channels_last": Case("quantized", shape=(16, 16, 3, 3), layout="channels_last"),
    "channels_last_bfloat16": Case("quantized", torch.bfloat16, (16, 16, 3, 3), "channels_last"),
    "transposed": Case("quantized", layout="transposed"),
    "transposed_complex": Case("exact", torch.complex64, layout="transposed"),
    "strided": Case("quantized", layout="strided"),
    "expanded": Case("quantized", layout="expanded"),
    "empty": Case("exact", shape=(0,)),
    "empty_matrix": Case("exact", shape=(5, 0)),
    "empty_complex": Case("exact", torch.complex64, (0, 3)),
    "scalar": Case("exact", shape=()),
    "scalar_complex": Case("exact", torch.complex64, ()),
    "one_element": Case("exact", shape=(1,)),
    "sparse": Case("exact", layout="sparse"),
    "sparse_float64": Case("exact", torch.float64, layout="sparse"),
    "sparse_bfloat16": Case("exact", torch.bfloat16, layout="sparse"),
    "sparse_float16": Case("exact", torch.float16, layout="sparse"),
}


class CaseModel(nn.Module):
    """The parameter of a case, and an ordinary layer."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.case = case
        self.ordinary = nn.Linear(32, 64)
        data = torch.zeros(case.shape).to(case.dtype)
        self.subject: nn.Embedding | None = None
        if case.layout == "sparse":
            self.subject = nn.Embedding(*case.shape, sparse=True, dtype=case.dtype)
            return
        if case.layout == "channels_last":
            data = data.to(memory_format=torch.channels_last)
        elif case.layout == "transposed":
            data = data.t().contiguous().t()
        elif case.layout == "strided":
            data = torch.zeros(case.shape[0], 2 * case.shape[1], dtype=case.dtype)[:, ::2]
        elif case.layout == "expanded":
            data = torch.zeros(case.shape[0], 1, dtype=case.dtype).expand(case.shape)
        self.weight = nn.Parameter(data, requires_grad=case.expected != "frozen")

    @property
    def parameter(self) -> torch.Tensor:
        return self.weight if self.subject is None else self.subject.weight

    def forward(self, rank: int) -> torch.Tensor:
        """A loss whose gradients are `own_gradient` and, for the layer, a batch's."""
        batch = torch.randn(8, 32, generator=torch.Generator().manual_seed(rank))
        loss = self.ordinary(batch).square().mean()
        wanted = _wanted(self.case, rank)
        if self.subject is not None:
            rows = self.subject(_rows(self.case, rank))
            return loss + (rows * wanted[: rows.shape[0]]).sum().float()
        if self.case.expected == "frozen":
            return loss
        product = (self.weight * wanted.conj()).sum()
        return loss + (product.real if product.is_complex() else product).float()


def own_gradient(case: Case, rank: int) -> torch.Tensor:
    """The gradient that a rank's backward makes, dense."""
    wanted = _wanted(case, rank)
    if case.layout != "sparse":
        return wanted
    dense = torch.zeros(case.shape, dtype=case.dtype)
    return dense.index_add_(0, _rows(case, rank), wanted[:_USED_ROWS])


def verdict(model: CaseModel, found: torch.Tensor | None, size: int) -> str:
    """The case's `expected` where what arrived is right; else what is wrong."""
    case = model.case
    if case.expected == "frozen":
        return "frozen" if found is None else "there is a gradient"
    if found is None:
        return "no gradient"
    if (found.shape, found.dtype, found.is_sparse) != (case.shape, case.dtype, case.layout == "sparse"):
        return f"shape {tuple(found.shape)}, {found.dtype}, sparse: {found.is_sparse}"
    wide = torch.complex128 if case.dtype.is_complex else torch.float64
    mean = torch.stack([own_gradient(case, rank).to(wide) for rank in range(size)]).mean(dim=0)
    error = float((found.to_dense().to(wide) - mean).abs().norm() / mean.abs().norm()) if mean.numel() else 0.0
    rounding = 4.0 * torch.finfo(case.dtype).eps
    if error <= rounding:
        return "exact"
    return "quantized" if case.expected == "quantized" and error < 0.15 else f"relative error {error:.3g}"


def bits(gradient: torch.Tensor | None) -> bytes:
    """A gradient's bytes, in row-major order; for comparing ranks."""
    if gradient is None:
        return b""
    dense = gradient.detach().to_dense().resolve_conj().contiguous()
    return dense.reshape(-1).view(torch.uint8).numpy().tobytes()


def compared(results: list[dict[str, tuple[str, bytes]]]) -> dict[str, str]:
    """By case, its verdict, the same on every rank; or that ranks hold other bits."""
    first = results[0]
    for other in results[1:]:
        assert list(other) == list(first)
    return {
        name: said if all(other[name] == (said, data) for other in results) else "ranks differ"
        for name, (said, data) in first.items()
    }


def expected(cases: dict[str, Case], quantize: bool = True) -> dict[str, str]:
    """What `compared` must return.

    Args:
        cases: rows of the table.
        quantize: whether the exchange quantizes at all.
    """
    instead = {} if quantize else {"quantized": "exact"}
    return {name: instead.get(case.expected, case.expected) for name, case in cases.items()}


def _wanted(case: Case, rank: int) -> torch.Tensor:
    generator: Any = torch.Generator().manual_seed(100 + rank)
    dtype = torch.complex128 if case.dtype.is_complex else torch.float64
    return torch.randn(case.shape, generator=generator, dtype=dtype).to(case.dtype)


def _rows(case: Case, rank: int) -> torch.Tensor:
    """Rows of the embedding that a rank uses, some of them twice."""
    return torch.randint(0, case.shape[0] // 2, (_USED_ROWS,), generator=torch.Generator().manual_seed(rank))
