"""The "qoda" block of a DeepSpeed configuration, and the settings beside it that do not go together with it."""

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from hvd_qoda.config import QodaConfig
from hvd_qoda.config_files import read_json, shown
from hvd_qoda.errors import ConfigError, UnsupportedError

__all__ = ["BLOCK", "check_optimizer", "parse_block", "read_file", "refuse_unsupported"]

BLOCK = "qoda"
_SECTIONS = (
    "zero_optimization",
    "fp16",
    "bf16",
    "scheduler",
    "compile",
    "tensor_parallel",
    "expert_parallel",
)
_LAST_STAGE = 3
_REMOVED_OPTIMIZERS = ("onebitadam", "zerooneadam", "onebitlamb")


def parse_block(configuration: Mapping[str, Any], source: str = "DeepSpeed configuration") -> QodaConfig | None:
    """The configuration of the "qoda" block, under the environment's values; None where there is no block.

    The block may also be the path of a JSON or YAML file that holds it: Hugging Face's Trainer and accelerate take
    every "auto" in the configuration for one that they have to fill in, so bits="auto" needs a file there.

    Args:
        configuration: the whole DeepSpeed configuration.
        source: where it comes from, for messages.

    Raises:
        ConfigError: naming the key and the nearest valid one; also for a name that is nearly the block's.
    """
    if BLOCK not in configuration:
        for key in configuration:
            if difflib.get_close_matches(str(key).lower(), [BLOCK], cutoff=0.75):
                raise ConfigError(f'{source}: no block "{BLOCK}", but a key {key!r}; did you mean "{BLOCK}"?')
        return None
    block = configuration[BLOCK]
    where = f'{source}, block "{BLOCK}"'
    if isinstance(block, str):
        return QodaConfig.load(block)
    if not isinstance(block, Mapping):
        raise ConfigError(f"{where}: must map keys to values, or be the path of a file; got {shown(block)}")
    # Not the whole configuration: its own keys have meanings of their own.
    return QodaConfig.from_environment(QodaConfig.from_dict({BLOCK: block}, where))


def read_file(path: str | Path) -> dict[str, Any]:
    """A DeepSpeed configuration from a JSON file.

    Raises:
        ConfigError: if there is no such file, or it is not a JSON object, or has a key twice.
    """
    values = read_json(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a DeepSpeed configuration maps keys to values")
    return values


def check_optimizer(configuration: Mapping[str, Any]) -> str | None:
    """Name of the optimizer of a configuration, which DeepSpeed would make; None where there is none.

    Raises:
        ConfigError: for a name that neither DeepSpeed nor `torch.optim` knows.
        ImportError: without DeepSpeed.
    """
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    section = configuration.get("optimizer")
    if section is not None and not isinstance(section, Mapping):
        raise ConfigError(
            f'DeepSpeed configuration: optimizer: must map "type" and "params" to values, got {shown(section)}'
        )
    name = _section(configuration, "optimizer").get("type")
    of_torch = [word for word, found in vars(torch.optim).items() if _is_optimizer(found)]
    if name is None or str(name).lower() in DEEPSPEED_OPTIMIZERS or name in of_torch:
        return None if name is None else str(name)
    if name == "auto":
        raise ConfigError(
            'DeepSpeed configuration: optimizer.type: "auto" is filled in by nobody: Hugging Face\'s Trainer and '
            'accelerate fill in optimizer.params only. Write a name, such as "AdamW" or "QODAdam"; or leave the '
            'section "optimizer" out, for the Trainer\'s own optimizer or one given to deepspeed.initialize()'
        )
    if _letters(name) in _REMOVED_OPTIMIZERS:
        raise ConfigError(
            f"DeepSpeed configuration: optimizer.type: DeepSpeed has removed {shown(name)}, whose point was to send "
            'fewer bytes. For the same saving write "AdamW" (for LAMB: "Lamb") with its usual params, leave out '
            f'freeze_step, cuda_aware and comm_backend_name, and let the "{BLOCK}" block compress the gradients: '
            f'"{BLOCK}": {{"bits": 5}} sends about a sixth of fp32\'s bytes from the first step on'
        )
    known = sorted({*DEEPSPEED_OPTIMIZERS, *of_torch})
    nearest = {word.lower(): word for word in known}
    found = difflib.get_close_matches(str(name).lower(), nearest, n=1)
    hint = f"; did you mean {nearest[found[0]]!r}?" if found else ""
    raise ConfigError(f"DeepSpeed configuration: optimizer.type: DeepSpeed knows no {shown(name)}{hint}")


def _letters(name: Any) -> str:
    """A name without what people write differently: "1-bit Adam" is "OneBitAdam"."""
    letters = "".join(character for character in str(name).lower() if character.isalnum())
    return letters.replace("1bit", "onebit").replace("01adam", "zerooneadam")


def check_sections(configuration: Mapping[str, Any]) -> None:
    """Look at what the plug-in goes by: sections are mappings, and the ZeRO stage is one that exists.

    Raises:
        ConfigError: naming the key.
    """
    for key in _SECTIONS:
        section = configuration.get(key)
        if section is not None and not isinstance(section, Mapping):
            raise ConfigError(f"DeepSpeed configuration: {key}: must map keys to values, got {shown(section)}")
    stage = _section(configuration, "zero_optimization").get("stage", 0)
    if not isinstance(stage, int) or isinstance(stage, bool) or not 0 <= stage <= _LAST_STAGE:
        raise ConfigError(
            f"DeepSpeed configuration: zero_optimization.stage: must be 0 to {_LAST_STAGE}, got {shown(stage)}"
        )


def _is_optimizer(found: Any) -> bool:
    is_class = isinstance(found, type) and issubclass(found, torch.optim.Optimizer)
    return is_class and found is not torch.optim.Optimizer


def refuse_unsupported(configuration: Mapping[str, Any], config: QodaConfig) -> None:
    """Raise UnsupportedError for settings whose gradients travel on ways that the plug-in does not cover.

    Args:
        configuration: the whole DeepSpeed configuration.
        config: that of the "qoda" block.
    """
    found = [f"{key}: {reason}" for key, reason in _refused(configuration, config)]
    if found:
        raise UnsupportedError(
            f'DeepSpeed configuration: the "{BLOCK}" block does not go together with {"; ".join(found)}'
        )


def _refused(configuration: Mapping[str, Any], config: QodaConfig) -> Iterator[tuple[str, str]]:
    zero = _section(configuration, "zero_optimization")
    if zero.get("zero_quantized_gradients"):
        yield "zero_optimization.zero_quantized_gradients", "it compresses the same gradients; set it to false"
    if _integer(zero, "zero_hpz_partition_size", 1) > 1:
        yield "zero_optimization.zero_hpz_partition_size", "hierarchical partitioning is not supported; leave it out"
    if _integer(zero, "mics_shard_size", -1) > 0:
        yield "zero_optimization.mics_shard_size", "MiCS reduces in two groups, which is not supported; leave it out"
    if zero.get("zenflow") is not None:
        yield "zero_optimization.zenflow", "it reduces gradients on ways of its own; leave it out"
    for key in ("offload_optimizer", "offload_param"):
        offload = zero.get(key) or {}
        if not isinstance(offload, Mapping):
            raise ConfigError(
                f"DeepSpeed configuration: zero_optimization.{key}: must map keys to values, got {shown(offload)}"
            )
        if offload.get("device") == "nvme":
            yield f"zero_optimization.{key}.device", '"nvme" is not supported; use "cpu" or "none"'
        if offload.get("super_offload"):
            yield f"zero_optimization.{key}.super_offload", "it is not supported; leave it out"
    if _section(configuration, "compile").get("deepcompile"):
        yield "compile.deepcompile", "compiled graphs reduce gradients by themselves; set it to false"
    if _integer(_section(configuration, "tensor_parallel"), "autotp_size", 0) > 1:
        yield "tensor_parallel.autotp_size", "tensor parallelism is not supported; leave it out"
    if _section(configuration, "expert_parallel").get("enabled"):
        yield "expert_parallel.enabled", "replaced expert layers are not supported; set it to false"
    if configuration.get("sparse_gradients"):
        yield "sparse_gradients", "sparse gradients are gathered as they are; set it to false"
    if config.exchange in ("off", "hierarchical"):
        yield (
            "qoda.exchange",
            f'{config.exchange!r} is of the Horovod front end; use "by_bytes", "allgather" or "reduce_scatter", and to '
            f'send gradients uncompressed leave the "{BLOCK}" block out',
        )
    if config.worker_norms:
        yield from _refused_with_worker_norms(configuration, zero)


def _refused_with_worker_norms(configuration: Mapping[str, Any], zero: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if _integer(zero, "stage", 0) >= 2 and configuration.get("gradient_accumulation_steps", 1) not in (1, "auto"):
        yield (
            "gradient_accumulation_steps",
            "with qoda.worker_norms every exchange must be a step, and ZeRO 2 and 3 exchange every micro-batch",
        )
    if _section(configuration, "fp16").get("enabled"):
        yield "fp16.enabled", "with qoda.worker_norms the loss scale would be in the norms; use bf16 or fp32"


def _integer(section: Mapping[str, Any], key: str, default: int) -> int:
    """A number; the default for "auto", which Hugging Face fills in.

    Raises:
        ConfigError: for anything else.
    """
    value = section.get(key, default)
    if value == "auto":
        return default
    if isinstance(value, int):
        return int(value)
    raise ConfigError(f"DeepSpeed configuration: {key} must be an integer, got {shown(value)}")


def _section(configuration: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = configuration.get(key)
    return found if isinstance(found, Mapping) else {}
