"""The methods of DeepSpeed that are wrapped, and what each wrapper adds.

Wrappers only say which gradients the next reduction is about (`backend.gradients`) and call DeepSpeed's own method:
scaling, casts, clipping, accumulation and overflow checks stay DeepSpeed's. Other engines pass through.
"""

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from ds_plugin import backend, checkpoint
from ds_plugin import engine as engines
from ds_plugin.engine import state_of
from ds_plugin.slices import BufferMap

__all__ = ["install"]

_MARK = "wrapped_by_ds_plugin"
_AVG_SCATTER = "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads"
_AVG_SCATTER_CONTIGUOUS = "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_contiguous_grads"

_flat: ContextVar[BufferMap | None] = ContextVar("ds_plugin.flat", default=None)  # ZeRO 1 and 2: buffer under way
_owners: ContextVar[tuple[int, ...] | None] = ContextVar("ds_plugin.owners", default=None)  # of the bucket under way

Method = Callable[..., Any]


def install() -> None:
    """Wrap the methods; a second call does nothing."""
    for owner, name, wrapper in (
        (DeepSpeedEngine, "_configure_optimizer", _configure_optimizer),
        (DeepSpeedEngine, "allreduce_bucket", _allreduce_bucket_of_engine),
        (DeepSpeedEngine, "_take_model_step", _take_model_step),
        (DeepSpeedEngine, "save_checkpoint", checkpoint.save),
        (DeepSpeedEngine, "load_checkpoint", checkpoint.load),
        (DeepSpeedEngine, "destroy", _destroy),
        (DeepSpeedZeroOptimizer, "average_tensor", _average_tensor),
        (DeepSpeedZeroOptimizer, "allreduce_and_copy_with_multiple_ranks", _allreduce_for_owners),
        (DeepSpeedZeroOptimizer, "allreduce_bucket", _allreduce_bucket_of_zero),
        (DeepSpeedZeroOptimizer, "gradient_reduction_w_predivide", _reduce_whole_buffer),
        (DeepSpeedZeroOptimizer_Stage3, _AVG_SCATTER, _average_and_scatter),
        (DeepSpeedZeroOptimizer_Stage3, _AVG_SCATTER_CONTIGUOUS, _average_contiguous),
    ):
        _wrap(owner, name, wrapper)


def _wrap(owner: type, name: str, wrapper: Method) -> None:
    original: Method = vars(owner)[name]
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    setattr(method, _MARK, True)
    setattr(owner, name, method)


def _configure_optimizer(original: Method, engine: Any, *args: Any, **kwargs: Any) -> None:
    engines.configure(engine, lambda: original(engine, *args, **kwargs))


def _destroy(original: Method, engine: Any) -> None:
    engines.release(engine)
    original(engine)


def _take_model_step(original: Method, engine: Any, *args: Any, **kwargs: Any) -> None:
    state = state_of(engine)
    if state is None:
        original(engine, *args, **kwargs)
        return
    state.reducer.end_step()
    before = _loss_scale(engine)
    original(engine, *args, **kwargs)
    state.reducer.loss_scale_changed(_loss_scale(engine) / before)


def _loss_scale(engine: Any) -> float:
    if not engine.fp16_enabled():
        return 1.0
    # Without ZeRO the optimizer keeps a configuration of its scaler, with ZeRO the scale itself.
    config = getattr(engine.optimizer, "loss_scale_config", None)
    return float(engine.optimizer.loss_scale if config is None else config.cur_scale)


def _allreduce_bucket_of_engine(original: Method, engine: Any, bucket: Any, *args: Any, **kwargs: Any) -> Any:
    """No ZeRO: whole gradients. ZeRO 1 in bf16 with fp32 accumulation: flat groups."""
    state = state_of(engine)
    if state is None:
        return original(engine, bucket, *args, **kwargs)
    with backend.gradients(state.reducer, state.pieces_of_gradients(engine, bucket)):
        return original(engine, bucket, *args, **kwargs)


def _average_tensor(
    original: Method, optimizer: Any, tensor: torch.Tensor, communication_data_type: torch.dtype
) -> Any:
    """ZeRO 1 and 2: the gradients of one bucket, one behind the other."""
    state = state_of(optimizer)
    if state is None:
        return original(optimizer, tensor, communication_data_type)
    bucket = optimizer.ipg_buckets[communication_data_type]
    parameters = [optimizer.bit16_groups[group][index] for group, index, _ in bucket.params]
    token = _flat.set(BufferMap(tensor, state.whole(parameters)))
    try:
        return original(optimizer, tensor, communication_data_type)
    finally:
        _flat.reset(token)


def _allreduce_for_owners(original: Method, optimizer: Any, small_bucket: Any, *args: Any, **kwargs: Any) -> Any:
    """ZeRO 1 and 2: of every tensor one rank keeps the result, so that only it need receive it."""
    if state_of(optimizer) is None:
        return original(optimizer, small_bucket, *args, **kwargs)
    # A set of several ranks is Muon's, which is refused.
    owners = tuple(
        next(iter(ranks)) if isinstance(ranks, frozenset) and len(ranks) == 1 else int(ranks)
        for ranks in kwargs["bucket_ranks"]
    )
    token = _owners.set(owners)
    try:
        return original(optimizer, small_bucket, *args, **kwargs)
    finally:
        _owners.reset(token)


def _allreduce_bucket_of_zero(
    original: Method,
    optimizer: Any,
    bucket: Any,
    communication_data_type: torch.dtype,
    rank: int | None = None,
    **kwargs: Any,
) -> Any:
    """ZeRO 1 and 2: all ways but the one without reduce_scatter lead here."""
    state = state_of(optimizer)
    if state is None:
        return original(optimizer, bucket, communication_data_type, rank=rank, **kwargs)
    announced = _owners.get()
    owners = (rank,) * len(bucket) if announced is None or rank is not None else announced
    pieces = state.pieces_of_bucket(optimizer, bucket, _flat.get(), owners)
    with backend.gradients(state.reducer, pieces):
        return original(optimizer, bucket, communication_data_type, rank=rank, **kwargs)


def _reduce_whole_buffer(
    original: Method, optimizer: Any, tensor: torch.Tensor, communication_data_type: torch.dtype
) -> Any:
    """ZeRO 1 and 2 with reduce_scatter=false: everybody gets everything."""
    state, flat = state_of(optimizer), _flat.get()
    if state is None or flat is None or tensor.numel() == 0:
        return original(optimizer, tensor, communication_data_type)
    with backend.gradients(state.reducer, flat.pieces_of(tensor)):
        return original(optimizer, tensor, communication_data_type)


def _average_and_scatter(
    original: Method, optimizer: Any, params_to_reduce: Any, communication_data_type: torch.dtype
) -> Any:
    """ZeRO 3: every rank keeps its part of every parameter."""
    state = state_of(optimizer)
    if state is None:
        return original(optimizer, params_to_reduce, communication_data_type)
    ranks = dist.get_world_size(group=optimizer._get_param_partition_group(params_to_reduce[0]))
    with backend.gradients(state.reducer, state.pieces_of_partitions(params_to_reduce, ranks)):
        return original(optimizer, params_to_reduce, communication_data_type)


def _average_contiguous(
    original: Method, optimizer: Any, buffer_to_reduce: torch.Tensor, communication_data_type: torch.dtype
) -> Any:
    """ZeRO 3 with reduce_scatter=false: everybody gets everything."""
    state = state_of(optimizer)
    if state is None:
        return original(optimizer, buffer_to_reduce, communication_data_type)
    parameters = optimizer.ipg_buckets[communication_data_type].params
    with backend.gradients(state.reducer, state.whole(parameters)):
        return original(optimizer, buffer_to_reduce, communication_data_type)
