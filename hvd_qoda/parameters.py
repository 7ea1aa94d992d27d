"""Which parameters' gradients can be exchanged at all: refused by name when an object is made for a model."""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from hvd_qoda.errors import ConfigError, UnsupportedError
from qoda_kernels.layout import EXACT_DTYPES
from qoda_kernels.registry import COMPRESSIBLE_DTYPES, ParameterEntry

__all__ = ["check_parameters", "check_unchanged", "refuse_sharded_modules"]


def check_parameters(parameters: Mapping[str, torch.Tensor]) -> None:
    """Look at a model's parameters before anything is made for them.

    Args:
        parameters: name -> parameter.

    Raises:
        ConfigError: for parameters without a shape (lazy) or without data (meta device).
        UnsupportedError: for parts of parameters (DTensor), and parameters that get gradients of a dtype that cannot be
            sent, such as those of 8 bits.
    """
    for name, parameter in parameters.items():
        if is_lazy(parameter):
            raise ConfigError(
                f"parameter {name!r} is lazy, its shape is not known yet: run the model on one batch first, on every "
                "rank"
            )
        if parameter.is_meta:
            raise ConfigError(
                f"parameter {name!r} lies on the meta device: give the model its data first (model.to_empty(), then "
                "initialise or load it), because that makes new parameters"
            )
        if _is_instance(parameter, "torch.distributed.tensor", "DTensor"):
            raise UnsupportedError(
                f"parameter {name!r} is a DTensor, of which each rank holds a part (FSDP2, tensor parallelism): "
                "gradients of whole parameters can be exchanged; use DistributedDataParallel, Horovod, or DeepSpeed's "
                "ZeRO with ds_plugin"
            )
        if parameter.requires_grad and _real(parameter.dtype) not in EXACT_DTYPES:
            raise UnsupportedError(
                f"parameter {name!r} has dtype {parameter.dtype}, whose gradients cannot be sent: freeze it "
                "(requires_grad=False), or keep it in another dtype"
            )


def check_unchanged(parameters: Mapping[str, torch.Tensor], entries: Mapping[str, ParameterEntry]) -> None:
    """Look at the parameters once more before the first step.

    Args:
        parameters: name -> parameter, as it is now.
        entries: as they were when the codebooks were made.

    Raises:
        ConfigError: for parameters that have been cast to a dtype that is quantized, or is not, where it was otherwise.
    """
    for name, parameter in parameters.items():
        before, now = entries[name].dtype, parameter.dtype
        if parameter.requires_grad and (before in COMPRESSIBLE_DTYPES) != (now in COMPRESSIBLE_DTYPES):
            raise ConfigError(
                f"parameter {name!r} has dtype {now} now, and had {before} when its codebook was made: cast the model "
                "first, then make the compression for it"
            )


def refuse_sharded_modules(model: Any) -> None:
    """Raise UnsupportedError for a model wrapped by FullyShardedDataParallel."""
    if isinstance(model, torch.nn.Module) and any(
        _is_instance(module, "torch.distributed.fsdp", "FullyShardedDataParallel") for module in model.modules()
    ):
        raise UnsupportedError(
            "FullyShardedDataParallel reduces shards of gradients, without saying whose they are: use "
            "DistributedDataParallel, or DeepSpeed's ZeRO with ds_plugin"
        )


def _is_instance(value: object, module: str, name: str) -> bool:
    """`isinstance` for a class of a module that is imported only if somebody else has done so."""
    known = getattr(sys.modules.get(module), name, None)
    return known is not None and isinstance(value, known)


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype
