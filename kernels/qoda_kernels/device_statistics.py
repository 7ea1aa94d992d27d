"""Level statistics as a CUDA kernel gathers them, in whole numbers, so that their sum does not depend on any order.

Of a coordinate in a cell [low, low + width) of the grid of `statistics.py`, with u = low + width t, the kernel adds
w, w t and w t^2 to three uint64, where w = (norm / 2^E)^2 2^B rounded, 2^E is the power of two above the largest norm
of the layer type, and B as large as the type's coordinates allow. E comes from a first launch over the norms.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from qoda_kernels.statistics import CELL_COUNT, HistogramStatistics

GATHERED = np.dtype(
    [
        ("largest", "<u4"),  # norm, as float32 bits
        ("weight_bits", "<u4"),  # B
        ("finite", "<u8"),  # buckets
        ("skipped", "<u8"),
        ("sums", "<u8", (CELL_COUNT, 3)),
    ]
)
FRACTION_BITS = 19  # of t
MOST_WEIGHT_BITS = 44  # so that w t fits into 63 bits


def empty_records(coordinates: Sequence[int]) -> npt.NDArray[np.void]:
    """GATHERED [types], given each type's number of coordinates."""
    records = np.zeros(len(coordinates), dtype=GATHERED)
    records["weight_bits"] = [min(MOST_WEIGHT_BITS, 63 - int(count).bit_length()) for count in coordinates]
    return records


def histograms(records: npt.NDArray[np.void], keys: Sequence[str]) -> Mapping[str, HistogramStatistics]:
    """Statistics of each type from what the kernel gathered."""
    return {key: _histogram(record) for key, record in zip(keys, records, strict=True)}


def _histogram(record: np.void) -> HistogramStatistics:
    exponent = (int(record["largest"]) >> 23) - 126
    weight, first, second = record["sums"].astype(np.float64).T * 2.0 ** (2 * exponent - int(record["weight_bits"]))
    low, width = _cells()
    cells = np.stack(
        [weight, low * weight + width * first, low * low * weight + 2 * low * width * first + width * width * second],
        axis=1,
    )
    return HistogramStatistics(cells, int(record["finite"]), int(record["skipped"]))


def _cells() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Lower ends and widths of the cells; those of u = 0 and u = 1 have no width."""
    coarse = np.arange(103 << 4, 119 << 4, dtype=np.int32) << 19
    fine = np.arange(119 << 6, (127 << 6) + 1, dtype=np.int32) << 17
    edges = np.concatenate([coarse, fine]).view(np.float32).astype(np.float64)
    low = np.concatenate([[0.0, 0.0], edges])
    width = np.concatenate([[0.0], np.diff(np.concatenate([[0.0], edges])), [0.0]])
    return low, width
