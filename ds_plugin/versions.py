"""Which DeepSpeed the plug-in works with, and the places in it that the plug-in holds on to.

The hooks are internal functions of DeepSpeed. Their names, classes and parameters are looked up when the plug-in is
imported: a release that has moved one of them is refused with a message that says which, before anything is trained.
"""

import ast
import importlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from hvd_qoda.errors import UnsupportedError

__all__ = ["HOOKS", "SUPPORTED", "Hook", "check_version", "missing_features"]

SUPPORTED = SpecifierSet(">=0.19.8,<0.20", prereleases=True)
"""The range of DeepSpeed's versions that the plug-in was written for."""


@dataclass(frozen=True)
class Hook:
    """A method of DeepSpeed that the plug-in wraps or relies on.

    Attributes:
        module: where its class is.
        owner: name of the class.
        method: name of the method, mangled if it is private.
        parameters: names of its parameters, self left out.
        calls: names that its source must mention: what the plug-in expects to happen inside.
    """

    module: str
    owner: str
    method: str
    parameters: tuple[str, ...]
    calls: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.module}.{self.owner}.{self.method}"

    @property
    def written_name(self) -> str:
        """The method's name as its class has it in the source."""
        return self.method.removeprefix(f"_{self.owner}")


_ENGINE = ("deepspeed.runtime.engine", "DeepSpeedEngine")
_ZERO = ("deepspeed.runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer")
_ZERO3 = ("deepspeed.runtime.zero.stage3", "DeepSpeedZeroOptimizer_Stage3")
_BACKEND = ("deepspeed.comm.torch", "TorchBackend")

HOOKS: tuple[Hook, ...] = (
    Hook(*_ENGINE, "_configure_optimizer", ("client_optimizer", "model_parameters")),
    Hook(*_ENGINE, "_configure_basic_optimizer", ("model_parameters",), ("getattr(torch.optim",)),
    Hook(*_ENGINE, "allreduce_gradients", ("bucket_size",), ("overlapping_partition_gradients_reduce_epilogue()",)),
    Hook(*_ENGINE, "allreduce_bucket", ("bucket", "dp_group", "dp_world_size"), ("self.flatten(", "dist.all_reduce(")),
    Hook(*_ENGINE, "sparse_allreduce", ("sparse", "dp_group", "dp_world_size"), ("sparse.indices", "sparse.values")),
    Hook(*_ENGINE, "_get_gradients_for_reduction", (), ("param.grad.data",)),
    Hook(*_ENGINE, "_take_model_step", ("lr_kwargs",), ("self.optimizer.step()", "self.global_samples +=")),
    Hook(*_ENGINE, "save_checkpoint", ("save_dir", "tag", "client_state", "save_latest", "exclude_frozen_parameters")),
    Hook(
        *_ENGINE,
        "load_checkpoint",
        (
            "load_dir",
            "tag",
            "load_module_strict",
            "load_optimizer_states",
            "load_lr_scheduler_states",
            "load_module_only",
            "custom_load_fn",
        ),
    ),
    Hook(*_ENGINE, "destroy", ()),
    Hook(
        *_ZERO,
        "average_tensor",
        ("tensor", "communication_data_type"),
        ("bucket.params", "tensor.narrow(", "self.allreduce_and_scatter(", "self.gradient_reduction_w_predivide("),
    ),
    Hook(
        *_ZERO,
        "allreduce_and_copy_with_multiple_ranks",
        (
            "small_bucket",
            "communication_data_type",
            "log",
            "divide",
            "process_group",
            "bucket_ranks",
            "output_bucket",
        ),
        ("self.allreduce_bucket(", "local_rank in bucket_rank"),
    ),
    Hook(
        *_ZERO,
        "allreduce_bucket",
        ("bucket", "communication_data_type", "rank", "log", "divide", "process_group"),
        ("self.flatten(", "dist.all_reduce(", "dist.reduce("),
    ),
    Hook(*_ZERO, "setup_buckets", ()),
    Hook(*_ZERO, "get_gradient_for_reduction", ("param",), ("grad_accum",)),
    Hook(*_ZERO, "reduce_independent_p_g_buckets_and_remove_grads", ("param", "i"), ("bucket.params.append(",)),
    Hook(*_ZERO, "gradient_reduction_w_predivide", ("tensor", "communication_data_type"), ("dist.all_reduce(",)),
    Hook(*_ZERO, "reduce_ipg_grads", ("comm_dtype",), ("self.average_tensor(", "bucket.grads")),
    Hook(
        *_ZERO3,
        "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads",
        ("params_to_reduce", "communication_data_type"),
        ("reduce_scatter_coalesced(",),
    ),
    Hook(
        *_ZERO3,
        "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_contiguous_grads",
        ("buffer_to_reduce", "communication_data_type"),
        ("bucket.params", "dist.all_reduce("),
    ),
    Hook(*_ZERO3, "_get_param_partition_group", ("param",)),
    Hook(*_BACKEND, "all_reduce", ("tensor", "op", "group", "async_op")),
    Hook(*_BACKEND, "reduce", ("tensor", "dst", "op", "group", "async_op")),
    Hook(*_BACKEND, "reduce_scatter_tensor", ("output_tensor", "input_tensor", "op", "group", "async_op")),
)
"""Everything that the plug-in wraps, and what it reads in DeepSpeed's source."""


def check_version(version: str) -> None:
    """Refuse a DeepSpeed that the plug-in was not written for.

    Args:
        version: DeepSpeed's.

    Raises:
        UnsupportedError: outside `SUPPORTED`, or where a hook is missing or has other parameters.
    """
    try:
        supported = SUPPORTED.contains(Version(version))
    except InvalidVersion:
        supported = False
    if not supported:
        raise UnsupportedError(
            f"ds_plugin works with DeepSpeed {SUPPORTED}, and this is {version}: it wraps internal functions, which "
            "change between releases. Install a DeepSpeed in that range, or do not import ds_plugin."
        )
    missing = missing_features()
    if missing:
        raise UnsupportedError(
            f"DeepSpeed {version} differs from the releases that ds_plugin knows: {'; '.join(missing)}. Install "
            "deepspeed==0.19.8, or do not import ds_plugin."
        )


def missing_features(hooks: Sequence[Hook] = HOOKS) -> list[str]:
    """What is missing of the hooks in the installed DeepSpeed, one sentence each; empty if all are there."""
    found = []
    for hook in hooks:
        source = _source(hook.module)
        method = _method(hook) if source else None
        if method is None:
            found.append(f"{hook} does not exist")
            continue
        arguments = method.args
        parameters = tuple(each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs))[1:]
        if parameters != hook.parameters:
            found.append(f"{hook} takes {', '.join(parameters)}, expected {', '.join(hook.parameters)}")
        text = ast.get_source_segment(source, method) or ""
        found += [f"{hook} does not contain {call!r}" for call in hook.calls if call not in text]
    return found


def _method(hook: Hook) -> ast.FunctionDef | None:
    # The source, because decorators hide parameters and bodies.
    for node in _tree(hook.module).body:
        if isinstance(node, ast.ClassDef) and node.name == hook.owner:
            for statement in node.body:
                if isinstance(statement, ast.FunctionDef) and statement.name == hook.written_name:
                    return statement
    return None


@cache
def _source(module: str) -> str:
    """The text of a module; empty where there is none."""
    try:
        return inspect.getsource(importlib.import_module(module))
    except (ImportError, OSError):
        return ""


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(_source(module))
