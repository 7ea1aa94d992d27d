"""Finite gradients of extreme size."""

import numpy as np
import torch

FORMS = ("largest", "subnormal", "near the largest", "tiny", "huge", "ordinary", "single", "any bits")


def extreme(length: int, dtype: torch.dtype, form: str, rng: np.random.Generator) -> torch.Tensor:
    """A gradient of one form, with numbers that are finite in its dtype."""
    info = torch.finfo(dtype)
    if form == "any bits":
        values = torch.from_numpy(rng.integers(0, 2**32, length, dtype=np.uint32)).view(torch.float32)
        values = torch.nan_to_num(values, nan=0.0)
    else:
        draws = {
            "largest": info.max * rng.choice([-1.0, 1.0], length),
            "subnormal": rng.integers(-100, 101, length) * 2.0**-149,
            "near the largest": info.max * rng.uniform(-1, 1, length),
            "tiny": rng.standard_normal(length) * 2.0 ** int(rng.integers(-140, -90)),
            "huge": rng.standard_normal(length) * 2.0 ** int(rng.integers(90, 125)),
            "ordinary": rng.standard_normal(length),
            "single": np.where(np.arange(length) == length // 2, 2.0**-149, 0.0),
        }
        values = torch.from_numpy(draws[form])
    return values.clamp(info.min, info.max).to(dtype)
