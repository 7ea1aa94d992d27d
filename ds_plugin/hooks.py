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
from ds_plugin.unused_parameters import send_zeros

__all__ = ["install"]

_MARK = "wrapped_by_ds_plugin"
_AVG_SCATTER = "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads"
_AVG_SCATTER_CONTIGUOUS = "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_contiguous_grads"

_flat: ContextVar[BufferMap | None] = ContextVar("ds_plugin.flat", default=None)  # ZeRO 1 and 2: buffer under way
_Owners = tuple[int | None, ...]
_owners: ContextVar[_Owners | None] = ContextVar("ds_plugin.owners", default=None)  # of the bucket under way

Method = Callable[..., Any]


def install() -> None:
    """Wrap the methods; a second call does nothing."""
    for owner, name, wrapper in (
        (DeepSpeedEngine, "_configure_optimizer", _configure_optimizer),
        (DeepSpeedEngine, "allreduce_gradients", _allreduce_gradients),
        (DeepSpeedEngine, "allreduce_bucket", _allreduce_bucket_of_engine),
        (DeepSpeedEngine, "sparse_allreduce", _sparse_allreduce_of_engine),
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
    if state.monitor is not None:
        state.monitor.write_step(engine.global_samples)


def _loss_scale(engine: Any) -> float:
    if not engine.fp16_enabled():
        return 1.0
    # Without ZeRO the optimizer keeps a configuration of its scaler, with ZeRO the scale itself.
    config = getattr(engine.optimizer, "loss_scale_config", None)
    return float(engine.optimizer.loss_scale if config is None else config.cur_scale)


def _allreduce_gradients(original: Method, engine: Any, *args: Any, **kwargs: Any) -> None:
    """What ends every backward pass."""
    if state_of(engine) is not None and isinstance(engine.optimizer, DeepSpeedZeroOptimizer):
        # Not where autograd's own hooks call this: with reentrant checkpoints that is in the middle of a pass, too.
        ends_pass = engine._running_engine_backward or engine._running_engine_step
        reduces = engine.zero_optimization_partition_gradients() or engine.is_gradient_accumulation_boundary()
        if ends_pass and reduces:
            send_zeros(engine.optimizer)
    original(engine, *args, **kwargs)


def _allreduce_bucket_of_engine(original: Method, engine: Any, bucket: Any, *args: Any, **kwargs: Any) -> Any:
    """No ZeRO: whole gradients. ZeRO 1 in bf16 with fp32 accumulation: flat groups."""
    state = state_of(engine)
    if state is None:
        return original(engine, bucket, *args, **kwargs)
    late = state.late_gradients(engine, bucket)
    if not late:
        with backend.gradients(state.reducer, state.pieces_of_gradients(engine, bucket)):
            return original(engine, bucket, *args, **kwargs)
    known = [number for number in range(len(bucket)) if number not in late]
    reduced: dict[int, torch.Tensor] = {}

    def reduce_some(numbers: list[int]) -> None:
        some = [bucket[number] for number in numbers]
        flat = original(engine, some, *args, **kwargs)
        reduced.update(zip(numbers, engine.unflatten(flat, some), strict=True))

    if known:
        with backend.gradients(state.reducer, state.pieces_of_gradients(engine, [bucket[number] for number in known])):
            reduce_some(known)
    # Those travel as they are, and the result lies in the bucket's order again.
    state.reducer.pass_by("all_reduce", sum(bucket[number].nbytes for number in late))
    reduce_some(late)
    return engine.flatten([reduced[number] for number in range(len(bucket))])


def _sparse_allreduce_of_engine(original: Method, engine: Any, sparse: Any, *args: Any, **kwargs: Any) -> Any:
    """No ZeRO: DeepSpeed gathers the rows of a sparse gradient, as they are."""
    state = state_of(engine)
    if state is not None:
        state.reducer.pass_by("all_gather", sparse.indices.nbytes + sparse.values.nbytes)
    return original(engine, sparse, *args, **kwargs)


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
    sets = [ranks if isinstance(ranks, frozenset) else frozenset((ranks,)) for ranks in kwargs["bucket_ranks"]]
    # Muon needs whole matrices: one that lies on a boundary of partitions belongs to several ranks. Then all get all.
    one_each = all(len(ranks) == 1 for ranks in sets)
    owners = tuple(int(next(iter(ranks))) if one_each else None for ranks in sets)
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
    with backend.gradients(state.reducer, state.in_model_order(flat.pieces_of(tensor))):
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
