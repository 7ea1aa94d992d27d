"""One DeepSpeed engine and what the plug-in keeps for it."""

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfigError

from ds_plugin import backend
from ds_plugin.config import BLOCK, parse_block, refuse_unsupported
from ds_plugin.monitor import MonitorTelemetry
from ds_plugin.optimizers import adapt_optimizer, worker_sums
from ds_plugin.reducer import GradientReducer
from ds_plugin.reports import Reports
from ds_plugin.slices import BufferMap, Piece, joined, whole_parameters
from hvd_qoda.agreement import check_agreement
from hvd_qoda.config import QodaConfig
from hvd_qoda.errors import ConfigError, UnsupportedError
from hvd_qoda.session import Session
from hvd_qoda.torch_distributed import TorchTransport
from qoda_kernels.worker_threads import allotted_threads

__all__ = ["EngineState", "QodaConfigError", "configure", "release", "state_of"]

_ATTRIBUTE = "qoda_state"
_logger = logging.getLogger(__name__)


class QodaConfigError(DeepSpeedConfigError, ConfigError):
    """A mistake in the "qoda" block; the message names the key. DeepSpeed's own class, and the library's."""


class EngineState:
    """The reducer of an engine, and the names of its parameters.

    Args:
        engine: the DeepSpeed engine, before its optimizer is made.
        config: of its "qoda" block.
    """

    def __init__(self, engine: Any, config: QodaConfig) -> None:
        self.front: backend.QodaBackend | None = None
        self.monitor: MonitorTelemetry | None = None
        named = list(engine.module.named_parameters())
        shapes = {name: tuple(p.ds_shape) for name, p in named if hasattr(p, "ds_shape")}
        reports = Reports()
        session = Session(engine.module, config, reports, shapes=shapes)
        self._names = {id(parameter): name for name, parameter in named}
        self._parameters = [parameter for _, parameter in named]  # keeps the ids from being used again
        self._late: set[str] = set()  # those that were not there, by name
        group, threads = engine.seq_data_parallel_group, allotted_threads(os.environ)
        self.reducer = GradientReducer(session, reports, group, threads, _settings(engine))

    def name_of(self, parameter: torch.Tensor) -> str:
        """Name of a parameter of the model.

        Raises:
            UnsupportedError: for any other tensor.
        """
        name = self._names.get(id(parameter))
        if name is None:
            raise UnsupportedError(
                f"DeepSpeed reduces the gradient of a {tuple(parameter.shape)} parameter that was not in the model "
                "when the engine was made: parameters must not be replaced later"
            )
        return name

    def whole(self, parameters: Sequence[torch.Tensor]) -> tuple[Piece, ...]:
        """The pieces of a buffer in which the gradients of these parameters lie one behind the other."""
        return tuple(whole_parameters((self.name_of(p), getattr(p, "ds_numel", p.numel())) for p in parameters))

    def pieces_of_gradients(self, engine: Any, bucket: Sequence[torch.Tensor]) -> tuple[Piece, ...]:
        """The pieces of a bucket that the engine itself reduces (no ZeRO, or its optimizer for bf16 with fp32 sums)."""
        flat_groups = {
            id(flat): i for i, flat in enumerate(getattr(engine.optimizer, "fp32_groups_gradients_flat", ()))
        }
        by_address: dict[tuple[int, int], list[str]] = {}
        for parameter in () if flat_groups else engine.module.parameters():
            if _has_dense_gradient(parameter) and id(parameter) in self._names:
                by_address.setdefault(_address(parameter.grad), []).append(self.name_of(parameter))
        parts: list[tuple[Sequence[Piece], int]] = []
        for tensor in bucket:
            if id(tensor) in flat_groups:  # whole parameters, and padding behind the last
                parts.append((self.whole(engine.optimizer.bf16_groups[flat_groups[id(tensor)]]), tensor.numel()))
                continue
            names = by_address.get(_address(tensor), [])
            if len(names) != 1:
                raise UnsupportedError(
                    f"DeepSpeed reduces a {tensor.dtype} {list(tensor.shape)} that is the gradient of "
                    f"{names or 'no parameter of the model'}: ds_plugin needs one gradient per parameter"
                )
            parts.append(([Piece(names[0], 0, tensor.numel(), 0)], tensor.numel()))
        return joined(parts)

    def late_gradients(self, engine: Any, bucket: Sequence[torch.Tensor]) -> list[int]:
        """Which tensors of a bucket are gradients of parameters that were not there when the engine was made.

        One that has taken the place of another, of the same name and shape, travels like that one. The others travel
        as they are: ranks have not agreed on a codebook for them.
        """
        late = []
        for name, parameter in engine.module.named_parameters():
            if id(parameter) in self._names or not parameter.requires_grad:
                continue
            known = self.reducer.registry.parameters.get(name)
            if known is not None and known.shape == tuple(parameter.shape):
                self._names[id(parameter)] = name
                self._parameters.append(parameter)
                continue
            if name not in self._late:
                self._late.add(name)
                _logger.warning(
                    "the parameter %s was added after deepspeed.initialize(): its gradients travel uncompressed. To "
                    "compress them, change the model first",
                    name,
                )
            if _has_dense_gradient(parameter):
                late.append(_address(parameter.grad))
        return [number for number, tensor in enumerate(bucket) if late and _address(tensor) in late]

    def pieces_of_bucket(
        self, optimizer: Any, bucket: Sequence[torch.Tensor], flat: BufferMap | None, owners: Sequence[int | None]
    ) -> tuple[Piece, ...]:
        """The pieces of a bucket of ZeRO 1 and 2, in the model's order.

        Args:
            optimizer: ZeRO's.
            bucket: parts of the buffer under way, or whole gradients.
            flat: the buffer under way.
            owners: position of the rank that keeps each tensor of the bucket.
        """
        gradients = {
            id(gradient): optimizer.bit16_groups[group][index]
            for ipg in optimizer.ipg_buckets.values()
            for gradient, (group, index, _) in zip(ipg.grads, ipg.params, strict=True)
        }
        parts: list[tuple[Sequence[Piece], int]] = []
        for tensor, owner in zip(bucket, owners, strict=True):
            if flat is not None and flat.holds(tensor):
                parts.append((flat.pieces_of(tensor, owner), tensor.numel()))
            elif id(tensor) in gradients:
                name = self.name_of(gradients[id(tensor)])
                parts.append(([Piece(name, 0, tensor.numel(), 0, owner)], tensor.numel()))
            else:
                raise UnsupportedError(
                    f"ZeRO reduces a {tensor.dtype} {list(tensor.shape)} that is not in its bucket: ds_plugin does not "
                    "know whose gradient it is"
                )
        return self.in_model_order(joined(parts))

    def in_model_order(self, pieces: Iterable[Piece]) -> tuple[Piece, ...]:
        """The pieces of a buffer that every rank fills in an order of its own, in an order that is the same on all."""
        entries = self.reducer.registry.parameters
        return tuple(sorted(pieces, key=lambda piece: entries[piece.parameter].offset + piece.start))

    def pieces_of_partitions(self, parameters: Sequence[torch.Tensor], ranks: int) -> tuple[Piece, ...]:
        """The pieces of a buffer of ZeRO 3: for each rank its part of every parameter, padded to equal lengths."""
        pieces = []
        position = 0
        for owner in range(ranks):
            for parameter in parameters:
                numel = getattr(parameter, "ds_numel", parameter.numel())
                chunk = -(-numel // ranks)
                start = min(owner * chunk, numel)
                length = min(start + chunk, numel) - start
                if length:
                    pieces.append(Piece(self.name_of(parameter), start, length, position, owner))
                position += chunk
        return tuple(pieces)


def _has_dense_gradient(parameter: torch.Tensor) -> bool:
    return parameter.grad is not None and parameter.grad.layout == torch.strided


def _address(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel()


def state_of(host: Any) -> EngineState | None:
    """The state of an engine or of its optimizer; None where the plug-in is not at work."""
    return vars(host).get(_ATTRIBUTE)


def configure(engine: Any, make_optimizer: Callable[[], None]) -> None:
    """Set an engine up if its configuration has a "qoda" block; a collective call.

    Args:
        engine: the engine, as its optimizer is to be made.
        make_optimizer: lets DeepSpeed make it.

    Raises:
        ConfigError: for keys and values of the block that cannot be.
        UnsupportedError: for settings and models that do not go together with it.
        RankMismatchError: on every rank, if ranks do not agree.
    """
    values: Mapping[str, Any] = engine._config._param_dict
    try:
        config = parse_block(values)
    except ConfigError as error:
        raise QodaConfigError(str(error)) from None
    _agree_on_the_block(engine, config)
    if config is None:
        make_optimizer()
        adapt_optimizer(engine, TorchTransport(engine.seq_data_parallel_group))
        return
    refuse_unsupported(values, config)
    _refuse_parallelism(engine, config)
    state = EngineState(engine, config)
    state.reducer.agree()
    with worker_sums(engine, state.reducer):
        make_optimizer()
    adapt_optimizer(engine, state.reducer.transport)
    state.front = backend.install()
    vars(engine)[_ATTRIBUTE] = state
    if engine.zero_optimization():
        vars(engine.optimizer)[_ATTRIBUTE] = state
    if engine.monitor.enabled:
        state.monitor = MonitorTelemetry(engine.monitor, engine.global_rank)
        state.reducer.reports.add(state.monitor, close=True)


def release(engine: Any) -> None:
    """Forget a destroyed engine; DeepSpeed has its own backend again after the last one."""
    state = vars(engine).pop(_ATTRIBUTE, None)
    if state is not None:
        vars(engine.optimizer).pop(_ATTRIBUTE, None)
        state.reducer.close()
        if state.front is not None:
            backend.uninstall(state.front)


def _agree_on_the_block(engine: Any, config: QodaConfig | None) -> None:
    """Every engine takes part, with a block or without: else the ranks that have one would wait for the others."""
    block = "absent" if config is None else config.to_dict()
    zero = {"zero_optimization.stage": int(engine.zero_optimization_stage())}
    transport = TorchTransport(engine.seq_data_parallel_group)
    check_agreement(transport, {f'"{BLOCK}" block': block, **zero}, "ds_plugin.block")


def _refuse_parallelism(engine: Any, config: QodaConfig) -> None:
    if engine.pipeline_parallelism:
        raise UnsupportedError(f'the "{BLOCK}" block does not support PipelineModule: use ZeRO, or leave the block out')
    if engine.sequence_parallel_size > 1:
        raise UnsupportedError(f'the "{BLOCK}" block does not support sequence parallelism: leave the block out')
    if engine.mpu is not None and engine.mp_world_size > 1:
        raise UnsupportedError(f'the "{BLOCK}" block does not support model parallelism: leave the block out')
    if engine.has_moe_layers:
        _refuse_with_experts(engine, config)


def _refuse_with_experts(engine: Any, config: QodaConfig) -> None:
    if config.worker_norms:
        raise UnsupportedError(f"{BLOCK}.worker_norms is one sum over one model, and ranks hold different experts")
    if config.error_feedback:
        raise UnsupportedError(
            f"{BLOCK}.error_feedback does not support experts, whose gradients travel in other groups of ranks: set it "
            "to false"
        )


def _settings(engine: Any) -> dict[str, Any]:
    """Settings of DeepSpeed that decide what is exchanged, and when."""
    zero = engine._config.zero_config
    return {
        "version": deepspeed.__version__,
        "zero_optimization.stage": int(zero.stage),
        "zero_optimization.reduce_scatter": zero.reduce_scatter,
        "zero_optimization.reduce_bucket_size": int(zero.reduce_bucket_size),
        "zero_optimization.contiguous_gradients": zero.contiguous_gradients,
        "zero_optimization.round_robin_gradients": zero.round_robin_gradients,
        "zero_optimization.use_multi_rank_bucket_allreduce": zero.use_multi_rank_bucket_allreduce,
        "communication_data_type": str(engine.communication_data_type),
        "gradient_accumulation_steps": engine.gradient_accumulation_steps(),
        "gradient_predivide_factor": engine.gradient_predivide_factor(),
        "prescale_gradients": not engine.postscale_gradients(),
        "gradient_allreduce_op is mean": engine.gradient_average,
    }
